"""Loader processes end with their loader, whatever refers to it."""

import gc

from msenc.data.loader import EpochLoader


def test_the_processes_of_a_loader_that_refers_to_itself_end_with_it():
    loader = EpochLoader([1, 2, 3, 4], lambda epoch: [[0, 1], [2, 3]], list, num_workers=1)
    assert list(loader) == [[1, 2], [3, 4]]
    workers = loader._loader._iterator._workers
    assert all(worker.is_alive() for worker in workers)
    loader.trainer = {"loader": loader}  # as Lightning's trainer and its loaders do
    del loader
    gc.collect()
    alive = [worker for worker in workers if worker.is_alive()]
    for worker in alive:
        worker.kill()  # or this process would wait for them at its end
    assert alive == []
