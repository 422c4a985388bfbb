"""Runs that are killed, for good, at the worst moments, and resumed: nothing of them differs from an unbroken one."""

import json
import random
import re
import signal
from pathlib import Path

import pytest
import torch
from conftest import run_driver
from filelock import FileLock
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from msenc.files import read_json, write_json
from msenc.training.module import ConversationModule

FAST = [
    "modality=text_audio",
    "data.batch_size=2",  # 16 dialogues: 8 batches
    "model.connector.num_blocks=1",
    "callbacks.checkpoints.every_n_steps=2",
    "trainer.log_every_n_steps=1",
    "trainer.max_epochs=3",
    "optimizer.lr=0.01",
    "decoding.max_new_tokens=1",
    "evaluate=val",
]


SHORT = [*(o for o in FAST if "connector" not in o), "modality=text", "trainer.max_epochs=1", "evaluate=null"]


@pytest.fixture(scope="module")
def drive(demo_home, tmp_path_factory):
    """``drive([(name, overrides, moments, again), ...])`` -> {name: (folder, starts)}; see `kill_driver`."""

    def call(*runs):
        home = tmp_path_factory.mktemp("runs")
        spec = []
        for name, overrides, moments, again in runs:
            (home / name).mkdir()
            folder = str(home / name / "run")
            # Folders of their own: an alignment serves all runs of a folder.
            first = [*FAST, *overrides, f"paths.output_dir={folder}", f"paths.runs_dir={home / name}"]
            spec.append({"folder": folder, "first": first, "again": again(folder), "moments": moments})
        results = run_driver(Path(__file__).parent / "kill_driver.py", spec, home)
        for starts in results:
            assert starts[-1]["status"] == 0, starts[-1]["said"]
            for start in starts[:-1]:
                expected = (signal.SIGKILL, None) if start["moment"].startswith("kill") else (None, 75)
                assert (start["signal"], start["status"]) == expected, (start["moment"], start["said"])
        return {name: (home / name / "run", starts) for (name, *_), starts in zip(runs, results, strict=True)}

    return call


def by_folder(folder):
    return [f"resume={folder}"]


def batches_of(folder):
    """(epoch, batch) -> optimizer steps before it and its dialogues, however often it was begun; and how often."""
    found = {}
    lines = Path(f"{folder}.batches").read_text().splitlines()
    for epoch, batch, step, ids in map(json.loads, lines):
        assert found.setdefault((epoch, batch), (step, ids)) == (step, ids)
    return found, len(lines)


def scalars(folder):
    """What TensorBoard shows: name -> (step, value) in order; of what is measured of the machine, the steps alone."""
    events = EventAccumulator(str(folder / "logs" / "tensorboard")).Reload()
    measured = ("speed/", "memory/")
    return {
        tag: [(e.step, None if tag.startswith(measured) else e.value) for e in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def load(folder, name="last"):
    return torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)


def assert_same_run(folder, whole):
    """Weights, optimizer, schedule, random numbers, order of batches, metrics, logs, evaluation: bit by bit."""
    for name in ("last", "best", "previous"):
        one, other = load(folder, name), load(whole, name)
        assert one["state_dict"].keys() == other["state_dict"].keys()
        assert all(torch.equal(one["state_dict"][k], other["state_dict"][k]) for k in one["state_dict"]), name
    one, other = load(folder), load(whole)
    assert flat(one["optimizer_states"]) == flat(other["optimizer_states"])
    assert flat(one["lr_schedulers"]) == flat(other["lr_schedulers"])
    assert flat(one["resume"]) == flat(other["resume"])
    assert one["loops"]["fit_loop"]["epoch_progress"] == other["loops"]["fit_loop"]["epoch_progress"]
    assert batches_of(folder)[0] == batches_of(whole)[0]
    for file in ("metrics.json", "logs/csv/metrics.csv"):
        assert (folder / file).read_text() == (whole / file).read_text()
    assert scalars(folder) == scalars(whole)
    (one,), (other,) = ((f / "evaluation").glob("*/predictions.jsonl") for f in (folder, whole))
    assert one.read_text() == other.read_text()


def flat(value):
    if isinstance(value, torch.Tensor):
        return value.dtype, value.tolist()
    if isinstance(value, dict):
        return {k: flat(v) for k, v in value.items()}
    return [flat(v) for v in value] if isinstance(value, list | tuple) else value


RANDOM = random.Random(20)


def at_random(epoch, first=0):
    return f"kill batch {epoch} {RANDOM.randrange(first, 8)}"


SETTINGS = {
    "one_step_per_batch": (
        [],
        [
            at_random(0, first=3),
            "kill epoch_end 0",
            "kill epoch_start 1",
            "kill write 2",
            "kill batch 1 7",
            "kill outcome",
        ],
    ),
    "accumulating_in_workers": (
        [
            "trainer.accumulate_grad_batches=4",
            "data.num_workers=2",
            "callbacks.checkpoints.every_n_steps=1",
            "optimizer.groups.connectors.lr=0.003",
            "optimizer.groups.connectors.warmup=0.5",
            "loss.weights.description=0.5",
            "data.drop.audio=0.5",
        ],
        ["kill batch 0 1", "kill write 2", "kill validation 0", at_random(1), "kill link"],
    ),
    "so_many_steps_in_workers": (
        ["trainer.max_steps=22", "data.num_workers=2"],
        [at_random(0, first=3), "kill epoch_start 1", at_random(1, first=1), "kill validation 1", "kill evaluation"],
    ),
    "validating_within_an_epoch": (
        [
            "trainer.max_steps=9",
            "trainer.max_epochs=-1",
            "trainer.accumulate_grad_batches=2",
            "+trainer.val_check_interval=0.5",
            "model/llm=tiny_lora",
        ],
        ["kill batch 0 4", "kill best", "kill epoch_start 1", "kill batch 1 5"],
    ),
    "aligned_first": (
        ["align=column", "align.steps=40", "modality=text_video"],
        ["kill align 25", "kill batch 0 2", "kill batch 1 1"],
    ),
}
"""Name -> overrides, and where it is killed, start by start."""


@pytest.fixture(scope="module")
def killed(drive):
    runs = []
    for name, (overrides, moments) in SETTINGS.items():
        runs += [(f"{name}-whole", overrides, [], by_folder), (name, overrides, moments, by_folder)]
    return drive(*runs)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_that_was_killed_again_and_again_is_the_unbroken_one(killed, name):
    folder, _ = killed[name]
    whole, _ = killed[f"{name}-whole"]
    assert_same_run(folder, whole)


def test_a_killed_run_counts_as_running_and_always_has_a_whole_checkpoint(killed):
    for name in SETTINGS:
        _, starts = killed[name]
        for start in starts[:-1]:
            assert start["record"]["status"] == "running"
            if start["moment"] not in ("kill align 25", "kill batch 0 1", "kill batch 0 4"):
                assert {"last.ckpt", "previous.ckpt"} & set(start["files"])
        last = starts[-1]["record"]
        assert (last["status"], last["resumed"]) == ("finished", len(starts) - 1)
        assert last["seconds"] >= max(s["record"]["seconds"] for s in starts)


def test_a_killed_alignment_goes_on_from_where_it_was_saved(killed):
    folder, _ = killed["aligned_first"]
    steps = [int(line) for line in folder.with_suffix(".aligned").read_text().split()]
    assert steps == [*range(1, 26), *range(21, 41)]
    (alignment,) = read_json(folder / "run.json")["alignments"].values()
    assert alignment["used"]


def test_what_was_evaluated_when_it_was_killed_is_not_trained_again(killed):
    for name in ("one_step_per_batch", "so_many_steps_in_workers"):  # killed before metrics.json, and after it
        folder, starts = killed[name]
        before, after = starts[-2]["record"], starts[-1]["record"]
        assert "Training resumes" not in starts[-1]["said"]
        assert ("stop_reason" in before) == (name == "so_many_steps_in_workers")
        assert after["steps"] == json.loads((folder / "run.json").read_text())["steps"]


# ------------------------------------------------------------------------------------------------ signals, auto


@pytest.fixture(scope="module")
def stopped(drive):
    workers = ["data.num_workers=2", "callbacks.checkpoints.every_n_steps=null"]

    def same_command(folder):
        other = f"{folder}-again"
        return [*FAST, *workers, "resume=auto", f"paths.output_dir={other}", f"paths.runs_dir={Path(folder).parent}"]

    moments = ["stop batch 0 3", "stop batch 1 7", "stop validation 1", "stop evaluation"]
    return drive(
        ("whole", workers, [], by_folder),
        ("stopped", workers, moments, same_command),
        ("signalled", workers, ["usr1 setup", "usr2 batch 0 3", "usr1 validation 0", "usr2 batch 2 0"], by_folder),
        ("done", workers, ["stop batch 0 3"], lambda folder: [*same_command(folder), "seed=2"]),
    )


def test_a_termination_is_a_checkpoint_and_a_status_of_its_own(stopped):
    folder, starts = stopped["stopped"]
    for start in starts[:-1]:
        assert start["status"] == 75
        assert start["record"]["status"] == "interrupted"
        assert "SIGTERM" in start["record"]["error"]
    assert starts[0]["files"] == ["last.ckpt"]  # no epoch has ended, no other rule asks for it
    assert "resumes from step 4 (last.ckpt)" in starts[1]["said"]
    assert_same_run(folder, stopped["whole"][0])


def test_what_a_launcher_sends_before_a_time_limit_costs_no_step_but_the_one_in_hand(stopped):
    folder, starts = stopped["signalled"]
    by = ["SIGUSR1", "SIGUSR2", "SIGUSR1", "SIGUSR2"]
    for name, start in zip(by, starts[:-1], strict=True):
        assert start["record"]["status"] == "interrupted"
        assert name in start["record"]["error"]
    assert starts[0]["files"] == []
    goes_on = [re.findall("resumes from step ([0-9]+)", start["said"]) for start in starts]
    assert goes_on == [[], [], ["4"], ["7"], ["17"]]  # 8 steps in an epoch; one is repeated before its validation
    assert_same_run(folder, stopped["whole"][0])


def test_the_same_command_finds_its_own_unfinished_run(stopped):
    folder, starts = stopped["stopped"]
    assert not Path(f"{folder}-again").exists()
    assert starts[-1]["record"]["resumed"] == 4
    folder, starts = stopped["done"]  # another seed is another run
    assert starts[-1]["record"]["status"] == "interrupted"
    assert json.loads((Path(f"{folder}-again") / "run.json").read_text())["seed"] == 2


# ------------------------------------------------------------------------------------------------ in this process


@pytest.fixture
def begun(train):
    """A run of one epoch, finished, whose record says that it was killed while it trained."""
    run = train(SHORT)
    path = run.folder / "run.json"
    record = json.loads(path.read_text())
    del record["stop_reason"]
    path.write_text(json.dumps({**record, "status": "running"}))
    return run.folder


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    data = bytearray(path.read_bytes())
    tensor = next(iter(load(path.parents[1], path.stem)["state_dict"].values()))
    data[data.index(tensor.numpy().tobytes()) + 5] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("spoil", [cut, flip, Path.unlink])
def test_an_unreadable_checkpoint_gives_way_to_the_previous_one(begun, call_script, capsys, spoil):
    before = load(begun)
    spoil(begun / "checkpoints" / "last.ckpt")
    capsys.readouterr()
    call_script("train.py", f"resume={begun}")
    said = " ".join(capsys.readouterr().out.split())
    assert "last.ckpt: missing" in said if spoil is Path.unlink else "last.ckpt: cannot be read" in said
    assert "previous.ckpt, step 7" in said  # saved before the last step, which a validation follows
    after = load(begun)
    assert all(torch.equal(before["state_dict"][k], after["state_dict"][k]) for k in before["state_dict"])
    capsys.readouterr()
    call_script("train.py", f"resume={begun}")
    assert "Already finished" in capsys.readouterr().out


def test_it_goes_on_with_the_threads_it_had(begun, call_script, monkeypatch, capsys):
    """Two for a model that is worth one: the size alone would say otherwise."""
    path, before = begun / "run.json", torch.get_num_threads()
    assert read_json(path)["threads"] == 1
    write_json(path, {**read_json(path), "threads": 2})
    (begun / "checkpoints" / "last.ckpt").unlink()
    monkeypatch.delenv("OMP_NUM_THREADS")
    used = []
    monkeypatch.setattr(ConversationModule, "on_train_epoch_start", lambda _: used.append(torch.get_num_threads()))
    monkeypatch.setattr(ConversationModule, "on_validation_epoch_start", lambda _: used.append(torch.get_num_threads()))
    try:
        call_script("train.py", f"resume={begun}")
        assert used
        assert set(used) == {2}
        assert read_json(path)["threads"] == 2
        assert "OMP_NUM_THREADS" not in capsys.readouterr().out
        write_json(path, {**read_json(path), "status": "running"})
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        call_script("train.py", f"resume={begun}")
    finally:
        torch.set_num_threads(before)
    assert "OMP_NUM_THREADS=1: the run had 2 before" in capsys.readouterr().out
    assert read_json(path)["threads"] == 1


def test_where_no_checkpoint_can_be_read_nothing_is_guessed(begun, call_script):
    for name in ("last", "previous"):
        cut(begun / "checkpoints" / f"{name}.ckpt")
    with pytest.raises(SystemExit, match=r"last\.ckpt: cannot be read.*previous\.ckpt: cannot be read.*from the start"):
        call_script("train.py", f"resume={begun}")


def test_another_run_is_not_continued(begun, call_script, tmp_path):
    with pytest.raises(SystemExit, match=r"other settings.*trainer\.max_epochs=1 there, 9 now.*start another run"):
        call_script("train.py", f"resume={begun}", "trainer.max_epochs=9")
    with pytest.raises(SystemExit, match=r"resume=.*nowhere: does not exist"):
        call_script("train.py", f"resume={tmp_path / 'nowhere'}")
    for several in ("-m", "sweep=modality"):
        with pytest.raises(SystemExit, match="a multirun makes many runs"):
            call_script("train.py", several, f"resume={begun}")
    with pytest.raises(SystemExit, match=r"already has a run.*resume="):
        call_script("train.py", *SHORT, f"paths.output_dir={begun}")
    before = (begun / "run.json").read_text()
    same = [*SHORT, "resume=auto", f"paths.runs_dir={begun.parent}", f"paths.output_dir={tmp_path / 'other'}"]
    for command in ([f"resume={begun}"], same):
        with FileLock(begun / ".lock"), pytest.raises(SystemExit, match="another process is using this run's folder"):
            call_script("train.py", *command)
    assert (begun / "run.json").read_text() == before  # it is the other's
    assert json.loads((begun / "run.json").read_text())["status"] == "running"
    call_script("train.py", f"resume={begun}", "data.num_workers=2", "~logger.tensorboard")  # of no consequence
    assert json.loads((begun / "run.json").read_text())["status"] == "finished"


def test_a_run_that_finds_other_data_says_so_in_its_record(begun, call_script):
    path = begun / "run.json"
    path.write_text(json.dumps({**read_json(path), "task_hash": "0123456"}))
    with pytest.raises(SystemExit, match="not the data that the run was trained on"):
        call_script("train.py", f"resume={begun}")
    facts = read_json(path)
    assert facts["status"] == "failed"
    assert "task_hash was 0123456" in facts["error"]


def test_changed_code_is_reported(begun, call_script, capsys):
    path = begun / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "commit": "0123456"}))
    call_script("train.py", f"resume={begun}")
    assert "The code has changed: the run started with commit 0123456" in " ".join(capsys.readouterr().out.split())


def test_a_job_of_a_sweep_is_skipped_where_it_is_finished(begun, call_script, demo_home, capsys):
    call_script("train.py", f"resume={begun}")
    sweep = begun.parent / "sweep"
    capsys.readouterr()
    call_script(
        "train.py",
        "-m",
        *(o for o in SHORT if not o.startswith("optimizer.lr")),
        "optimizer.lr=0.01,0.02",
        "resume=auto",
        f"paths.runs_dir={begun.parent}",
        f"hydra.sweep.dir={sweep}",
    )
    assert capsys.readouterr().out.count("Already finished") == 1
    assert [p.parent.name for p in sweep.glob("*/*/run.json")] == ["1"]
    (job,) = sweep.glob("*/1")
    call_script("train.py", f"resume={job}")  # a sweep's job by itself is one run
    assert "Already finished" in capsys.readouterr().out
