import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from multiprocessing.context import SpawnProcess

import pytest

from msenc.types import MsencError
from msenc.work.pool import beside, lone_bar, pool_of


def learn(file):
    with lone_bar() as progress:
        for lesson in ("first", "second"):
            bar = progress.add_task(lesson, total=3)
            for _ in range(3):
                progress.update(bar, advance=1, description=f"{lesson} lesson")
    print("[learned]")
    file.write_text(f"{os.getpid()}")


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def refuse():
    raise MsencError("no such thing")


def divide():
    return 1 / 0


def note_and_sleep(file):
    file.write_text(f"{os.getpid()}")
    time.sleep(600)


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_for(file):
    end = time.monotonic() + 60
    while not (file.is_file() and file.read_text()):
        assert time.monotonic() < end
        time.sleep(0.01)
    return int(file.read_text())


def interrupt_when(file):
    assert is_alive(wait_for(file))
    raise KeyboardInterrupt


def test_a_job_beside_tells_what_it_does(tmp_path, capsys):
    before = set(multiprocessing.active_children())  # loaders of other tests may still end
    with beside(partial(learn, tmp_path / "pid"), "learning") as job:
        assert job.is_running
    assert not job.is_running
    assert wait_for(tmp_path / "pid") != os.getpid()
    said = capsys.readouterr().out
    assert "[learned]" in said  # as it was printed, whatever a bar takes brackets for
    assert re.search(r"second lesson .* 100%", said)
    assert set(multiprocessing.active_children()) <= before


def test_its_end_is_an_error_and_says_how_it_came():
    for work, error, message in (
        (die, MsencError, r"tiny: its process died \(exit status -9\).*prepare_workers=0"),
        (refuse, MsencError, "^no such thing$"),
        (divide, RuntimeError, r"ZeroDivisionError[\s\S]*in divide"),
    ):
        seen = []
        with pytest.raises(error, match=message), beside(work, "tiny"):
            seen.append("body")
        assert seen == ["body"]


def test_an_end_of_the_body_ends_the_job(tmp_path):
    """As Ctrl-C does; a launcher's jobs ignore SIGTERM, and so do the processes that they start."""
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with pytest.raises(KeyboardInterrupt), beside(partial(note_and_sleep, tmp_path / "pid"), "tiny"):
            interrupt_when(tmp_path / "pid")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not is_alive(wait_for(tmp_path / "pid"))


def parent(file):
    with beside(partial(note_and_sleep, file), "tiny"):
        time.sleep(600)


def test_the_job_ends_with_a_parent_that_was_killed(tmp_path):
    process = multiprocessing.get_context("spawn").Process(target=parent, args=(tmp_path / "pid",))
    process.start()
    pid = wait_for(tmp_path / "pid")
    process.kill()
    process.join()
    end = time.monotonic() + 60
    while is_alive(pid):
        assert time.monotonic() < end
        time.sleep(0.05)


def blocked():
    return signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_a_worker_hears_no_ctrl_c_while_it_still_imports():
    """A blocked signal is one that the process was started with: no code of the worker has to run first."""
    with pool_of(1) as pool:
        assert signal.SIGINT in pool.submit(blocked).result()
    assert signal.SIGINT not in blocked()


FIRST = """
import signal
from msenc.work.pool import beside

def tell():
    print("blocked" if signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []) else "heard")

if __name__ == "__main__":
    with beside(tell, "first"):
        pass
"""


def test_nor_does_the_first_one_of_its_parent(tmp_path):
    """A process of its own, in which nothing has started multiprocessing's resource tracker yet."""
    (tmp_path / "first.py").write_text(FIRST)
    done = subprocess.run([sys.executable, tmp_path / "first.py"], capture_output=True, text=True, check=True)
    assert "blocked" in done.stdout.split()


def start_in_pool():
    with pool_of(1) as pool:
        pool.submit(int)


def start_beside():
    with beside(partial(time.sleep, 60), "waiting"):
        pass


@pytest.mark.parametrize("start", [start_in_pool, start_beside])
@pytest.mark.parametrize("others", [0, 1])
def test_ctrl_c_while_a_worker_starts_leaves_none_behind(start, others, monkeypatch):
    """Another thread takes a signal that this one blocks, and the interpreter interrupts this one all the same."""
    before, begin, done = set(multiprocessing.active_children()), SpawnProcess.start, threading.Event()

    def interrupted(process):
        begin(process)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(SpawnProcess, "start", interrupted)
    threads = [threading.Thread(target=done.wait) for _ in range(others)]
    for thread in threads:
        thread.start()
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            start()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, handler)
        done.set()
    assert set(multiprocessing.active_children()) <= before
