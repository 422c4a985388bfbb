import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from msenc.runs.identity import run_settings
from msenc.training.loggers import TrainingProgress
from msenc.work import progress
from msenc.work.group import ALONE
from msenc.work.progress import Bar


@pytest.fixture
def written(monkeypatch):
    """``written(terminal)`` -> what is printed from then on."""

    def call(terminal):
        file = io.StringIO()
        console = Console(file=file, force_terminal=terminal, width=60, markup=False)
        monkeypatch.setattr("msenc.work.progress.console", console)
        monkeypatch.setattr("msenc.training.loggers.console", console)
        return file

    return call


def gathered(clock, monkeypatch, seconds):
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])

    def results():
        for n in range(10):
            clock[0] += seconds
            yield n

    return ALONE.gather(results(), 10, Bar(console=progress.console), "generating replies of [test]")


def test_long_work_without_a_terminal_prints_a_line_a_minute(written, monkeypatch):
    file = written(False)
    assert gathered([0.0], monkeypatch, 25) == [*range(10)]
    lines = [line for line in file.getvalue().splitlines() if " of 10, " in line]
    assert lines == [f"generating replies of [test]: {n} of 10, {m} min" for n, m in ((3, 1), (6, 2), (9, 4))]


def test_short_work_and_a_terminal_get_no_lines(written, monkeypatch):
    for terminal, seconds in ((False, 5), (True, 25)):
        file = written(terminal)
        gathered([0.0], monkeypatch, seconds)
        assert " of 10, " not in file.getvalue()


def test_a_run_without_a_terminal_says_how_far_it_is(train, written, capsys):
    file = written(False)
    train(["modality=text", "trainer.max_epochs=2", "evaluate=null"])
    lines = file.getvalue().splitlines()
    assert [line.partition(":")[0].partition(",")[0] for line in lines] == ["epoch 1 of 2", "epoch 2 of 2"]
    assert "train/loss" in lines[1]
    assert "val/loss" in lines[1]
    assert "v_num" not in lines[1] + capsys.readouterr().out


def test_lines_count_the_batch_that_has_ended_and_begin_anew_after_a_validation(train, written, monkeypatch):
    file = written(False)
    monkeypatch.setattr(progress, "LINE_EVERY_S", -1)
    train(["modality=text", "trainer.max_epochs=1", "evaluate=null"])
    batches = [line.split(", ")[1] for line in file.getvalue().splitlines() if line.startswith("epoch ")]
    assert batches == [f"batch {n} of 4" for n in (1, 2, 3, 4, 4)]  # the last after the validation
    clock = [0.0]
    monkeypatch.setattr(progress, "LINE_EVERY_S", 60.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    pace = progress.Pace()
    clock[0] = 50.0
    pace.count()
    clock[0] = 70.0
    assert not pace.is_due()


def test_the_bar_that_earlier_runs_name_is_the_same_run(compose):
    config = compose([])
    assert config.callbacks.progress._target_.endswith("TrainingProgress")
    settings = run_settings(config)
    config.callbacks.progress._target_ = "lightning.pytorch.callbacks.RichProgressBar"
    assert run_settings(config) == settings


def test_a_bar_that_is_off_prints_nothing(written, monkeypatch):
    file = written(False)
    monkeypatch.setattr(progress, "LINE_EVERY_S", -1)
    bar = TrainingProgress(refresh_rate=0)
    bar.on_train_batch_end(SimpleNamespace(), SimpleNamespace(), None, None, 0)
    off = Bar(disable=True)
    off.advance(off.add_task("x", total=2))
    assert file.getvalue() == ""
