"""A run as its trackers have it: one run across kills, with settings, metrics and replies, whatever fails."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb_files import read_runs

from msenc.files import read_json, write_json
from msenc.tracking import mlflow as mlflow_module
from msenc.tracking.trackers import hyperparameters
from msenc.types import MsencError

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::PendingDeprecationWarning",  # of MLflow's, about its libraries
)

TINY = [
    "modality=text",
    "data.batch_size=2",  # 16 dialogues: 8 batches
    "callbacks.checkpoints.every_n_steps=2",
    "trainer.log_every_n_steps=1",
    "trainer.max_epochs=2",
    "decoding.max_new_tokens=3",
    "decoding=greedy",
]


def mlflow_runs(runs_dir: Path) -> list:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{runs_dir / 'mlflow.db'}")
    found = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    return [(client, run) for run in found]


def history(client, run, name) -> list[tuple[int, float]]:
    return sorted((m.step, m.value) for m in client.get_metric_history(run.info.run_id, name))


def predictions_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]


def logged(folder: Path, name: str) -> list[tuple[int, float]]:
    """What the run's own file says, which is bit for bit that of an unbroken run (tests/test_resume.py)."""
    with (folder / "logs" / "csv" / "metrics.csv").open(newline="") as file:
        return [(int(row["step"]), float(row[name])) for row in csv.DictReader(file) if row.get(name)]


def killed_while_training(arguments: list[str], folder: Path, env: dict[str, str]) -> None:
    """Start train.py, and end it for good once it has trained for some steps beyond a checkpoint."""
    process = subprocess.Popen(
        [sys.executable, "train.py", *arguments], cwd=ROOT, stdout=-1, stderr=subprocess.STDOUT, text=True, env=env
    )
    note, checkpoint = folder / "logs" / "mlflow.sent.json", folder / "checkpoints" / "last.ckpt"
    while process.poll() is None and not (checkpoint.is_file() and read_json(note)["train/loss"] >= 4):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, said


@pytest.fixture(scope="module")
def tracked(demo_home, tmp_path_factory):
    """A run that was killed and resumed, tracked by W&B (offline) and MLflow, then evaluated once more."""
    pytest.importorskip("wandb", reason="needs the extra wandb")
    pytest.importorskip("mlflow", reason="needs the extra mlflow")
    home = tmp_path_factory.mktemp("tracked")
    folder = home / "run"
    env = {**os.environ, "WANDB_API_KEY": "0123456789abcdef" * 2, "MY_SECRET": "swordfish-and-more", "COLUMNS": "200"}
    arguments = [*TINY, "logger=[wandb,mlflow]", "logger.wandb.offline=true", f"paths.runs_dir={home}"]
    arguments += ["seed=3", f"paths.output_dir={folder}", "control=shuffle_text"]
    killed_while_training(arguments, folder, env)
    for command in (
        ["train.py", f"resume={folder}"],
        ["evaluate.py", f"run_dir={folder}", "split=val", "decoding=sample", "decoding.max_new_tokens=2"],
    ):
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=300
        )
        assert done.returncode == 0, done.stderr
        assert "logger." not in done.stdout, done.stdout
    return home, folder


def check_history(folder: Path, rows: dict[str, list]) -> None:
    """Every step, with the values of the run's own file; and what is measured of the machine."""
    for name in ("train/loss", "val/loss", "lr/all", "grad_norm/llm"):
        own = logged(folder, name)
        assert len({step for step, _ in own}) == len(own) > 1, name
        assert rows[name] == own, name
    for name in ("speed/tokens_per_s", "memory/peak_mib"):
        assert len({step for step, _ in rows[name]}) == 16
        assert all(value > 0 for _, value in rows[name])
    assert not any("speed/" in name for name in (folder / "logs" / "csv" / "metrics.csv").read_text().split(","))


def test_a_killed_and_resumed_run_is_one_run_of_mlflow(tracked):
    home, folder = tracked
    ((client, run),) = mlflow_runs(home)
    check_history(folder, {name: history(client, run, name) for name in run.data.metrics})
    record = read_json(folder / "run.json")
    assert record["resumed"] == 1
    assert run.data.tags["msenc.run"] == record["tracked"]["id"]
    assert run.info.run_name == record["tracked"]["name"] == "run"
    assert (run.data.tags["seed"], run.data.tags["modality"]) == ("3", "text")
    assert (run.data.params["seed"], run.data.params["optimizer.lr"]) == ("3", "0.0003")
    assert run.info.status == "FINISHED"


def test_a_killed_and_resumed_run_is_one_run_of_wandb(tracked):
    _, folder = tracked
    record = read_json(folder / "run.json")
    ((id, run),) = read_runs(folder).items()
    assert id == record["tracked"]["id"]
    assert len(run["files"]) > 2  # starts and evaluations, which `wandb sync` puts together
    # What W&B had written when it was killed nobody knows: a few points may stand there twice.
    check_history(
        folder, {name: sorted(set(rows)) for name, rows in run["history"].items() if "evaluation" not in name}
    )
    assert run["name"] == "run"
    assert {"seed=3", "modality=text"} <= set(run["tags"])
    assert (run["config"]["seed"], run["config"]["optimizer.lr"]) == (3, 0.0003)


def test_the_evaluations_of_a_run_are_in_its_tracked_run(tracked):
    home, folder = tracked
    ((client, run),) = mlflow_runs(home)
    (wandb_run,) = read_runs(folder).values()
    of_test, of_val, under_control = (
        next(f for f in (folder / "evaluation").iterdir() if kind(f)) for kind in (is_test, is_val, is_control)
    )
    for evaluated, name in ((of_test, "test"), (of_val, of_val.name), (under_control, "test/shuffle_text")):
        metrics = read_json(evaluated / "metrics.json")
        for metric in ("nll", "control/delta" if is_control(evaluated) else "bleu_4"):
            key = f"evaluation/{name}/{metric.removeprefix('control/')}"
            assert history(client, run, key) == [(16, pytest.approx(metrics[metric]))]
            assert wandb_run["history"][key] == [(16, pytest.approx(metrics[metric]))]
    replies = [prediction["reply"]["text"] for prediction in predictions_of(of_test)]
    shown = Path(client.download_artifacts(run.info.run_id, "evaluation/test/replies.md")).read_text()
    assert replies[0].strip() in shown
    assert wandb_run["history"]["evaluation/test/replies._type"] == [(16, "table-file")]


def is_control(folder):
    return "control" in read_json(folder / "metrics.json")


def is_test(folder):
    return "-test-" in folder.name and not is_control(folder)


def is_val(folder):
    return "-val-" in folder.name


def test_no_secret_is_in_any_file(tracked):
    home, _ = tracked
    files = [path for path in home.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    for secret in (b"0123456789abcdef0123456789abcdef", b"swordfish"):
        assert [path for path in files if secret in path.read_bytes()] == []


# ------------------------------------------------------------------------------------------------ TensorBoard, sweeps


def test_tensorboard_has_settings_rates_metrics_and_replies_with_their_sound(train, call_script, tmp_path):
    pytest.importorskip("espeakng_loader")
    folder = train([*TINY, "trainer.max_epochs=1", "evaluate=null", "logger=default"]).folder
    call_script(
        "evaluate.py", f"run_dir={folder}", "limit=1", "decoding.max_new_tokens=4", "speech=espeak", "speech_workers=0"
    )
    events = EventAccumulator(str(folder / "logs" / "tensorboard"), {"audio": 0, "tensors": 0}).Reload()
    tags = events.Tags()
    assert {"lr/all", "grad_norm/llm", "speed/tokens_per_s", "memory/peak_mib"} <= set(tags["scalars"])
    (evaluated,) = (folder / "evaluation").iterdir()
    name = f"evaluation/{evaluated.name}"
    (nll,) = events.Scalars(f"{name}/nll")
    assert nll.value == pytest.approx(read_json(evaluated / "metrics.json")["nll"])
    assert f"{name}/replies/text_summary" in tags["tensors"]
    spoken = sum(bool(prediction["speech"]) for prediction in predictions_of(evaluated))
    assert len([tag for tag in tags["audio"] if tag.startswith(name)]) == spoken > 0
    assert "_hparams_/session_start_info" in events.summary_metadata


def test_jobs_of_a_sweep_are_runs_of_their_own_in_a_group(demo_home, call_script, tmp_path):
    pytest.importorskip("mlflow", reason="needs the extra mlflow")
    pytest.importorskip("wandb", reason="needs the extra wandb")
    overrides = [*TINY, "seed=1,2", "trainer.max_epochs=1", "evaluate=null", "logger=[wandb,mlflow]"]
    call_script("train.py", "-m", *overrides, "logger.wandb.offline=true", f"paths.runs_dir={tmp_path}")
    (sweep,) = (tmp_path / "sweeps").iterdir()
    runs = [run for _, run in mlflow_runs(tmp_path)]
    assert {run.data.tags["sweep"] for run in runs} == {sweep.name}
    assert {run.data.params["seed"] for run in runs} == {"1", "2"}
    for folder in (path.parent for path in sweep.rglob("run.json")):
        ((id, run),) = read_runs(folder).items()
        assert (run["group"], id) == (sweep.name, read_json(folder / "run.json")["tracked"]["id"])
        assert len(run["history"]["train/loss"]) == 8


# ------------------------------------------------------------------------------------------------ failures


@pytest.mark.parametrize("moment", ["start", "step"])
def test_a_tracker_that_fails_is_said_once_and_the_run_goes_on(train, tmp_path, monkeypatch, capsys, moment):
    pytest.importorskip("mlflow", reason="needs the extra mlflow")
    calls = []

    def fail(self, metrics, step=None):
        calls.append(step)
        raise OSError(28, "No space left on device")

    overrides = [*TINY, "trainer.max_epochs=1", "logger=mlflow", f"logger.mlflow.save_dir={tmp_path / 'ml'}"]
    if moment == "step":
        monkeypatch.setattr(mlflow_module.MlflowLogger, "log_metrics", fail)
    else:
        (tmp_path / "ml").write_text("in the folder's place")
    run = train([*overrides, "evaluate=null"])
    assert read_json(run.folder / "run.json")["status"] == "finished"
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("logger.mlflow: failed, and gets nothing from here on") == 1
    assert len(calls) <= 1
    assert len(logged(run.folder, "train/loss")) == 8


def test_a_disk_without_space_for_the_logs_ends_no_run(train, monkeypatch, capsys):
    from lightning.pytorch.loggers.csv_logs import ExperimentWriter

    def fail(self):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ExperimentWriter, "save", fail)
    run = train([*TINY, "trainer.max_epochs=1", "evaluate=null"])
    assert read_json(run.folder / "run.json")["status"] == "finished"
    assert capsys.readouterr().out.count("logger.csv: failed") == 1


def test_an_extra_that_is_missing_is_said_before_anything_is_loaded(run_script, tmp_path, monkeypatch):
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    program = (
        "import importlib.util, runpy, sys\nfind = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name == 'mlflow' else find(name, *a)\n"
        "sys.argv = ['train.py', 'logger=mlflow', sys.argv[1]]\nrunpy.run_path('train.py', run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, f"paths.data_dir={hidden}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1, done.stderr
    assert "the package mlflow, which is not installed" in done.stderr
    assert "pip install -e '.[mlflow]'" in done.stderr
    assert list(hidden.iterdir()) == []


# ------------------------------------------------------------------------------------------------ secrets


@pytest.mark.parametrize(
    "override",
    [
        "+logger.mlflow.api_key=abcdef",
        "logger.mlflow.tracking_uri=https://me:pw@host/x",
        "+logger.mlflow.settings={nested:{auth_token:abcdef}}",
    ],
)
def test_a_secret_in_a_loggers_settings_is_refused_and_not_repeated(compose, override):
    from msenc.pipelines.train import _open

    with pytest.raises(MsencError, match="would be stored in the run's folder") as refused:
        _open(compose(["logger=mlflow", override]), "")
    assert "abcdef" not in str(refused.value)
    assert ":pw@" not in str(refused.value)


def test_hyperparameters_have_no_secrets(monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "held-by-the-environment")
    config = {
        "data": {"dir": "https://me:pw@host/x?X-Amz-Signature=abc&part=1", "name": "held-by-the-environment/2"},
        "speech": {"api_key": "abc"},
        "decoding": {"max_new_tokens": 3},
        "logger": {"x": 1},
    }
    found = hyperparameters(config, {"commit": "1"})
    assert found["data.dir"] == "https://***@host/x?X-Amz-Signature=***&part=1"
    assert (found["data.name"], found["speech.api_key"], found["decoding.max_new_tokens"]) == ("***/2", "***", 3)
    assert not any(name.startswith("logger") for name in found)


def test_a_strangers_run_is_only_added_to_where_it_is(train, call_script, tmp_path, capsys):
    """Of a stored config no place outside of the run's folder, and no other setting of a service, is used."""
    pytest.importorskip("mlflow", reason="needs the extra mlflow")
    folder = train([*TINY, "trainer.max_epochs=1", "evaluate=null", "logger=default"]).folder
    config = (folder / ".hydra" / "config.yaml").read_text()
    elsewhere = tmp_path / "elsewhere"
    planted = config.replace("save_dir: ${paths.output_dir}", f"save_dir: {elsewhere}")
    node = f"logger:\n  mlflow:\n    _target_: msenc.tracking.mlflow.MlflowLogger\n    save_dir: {elsewhere}\n"
    assert planted != config
    (folder / ".hydra" / "config.yaml").write_text(planted.replace("logger:\n", node))
    call_script("evaluate.py", f"run_dir={folder}", "generate=false", "limit=1")
    assert "logger.mlflow: failed" in capsys.readouterr().out
    assert not elsewhere.exists()


def test_a_run_of_before_is_evaluated_as_before(train, call_script):
    folder = train([*TINY, "trainer.max_epochs=1", "evaluate=null"]).folder
    record = read_json(folder / "run.json")
    del record["tracked"]
    write_json(folder / "run.json", record)
    before = sorted((folder / "logs" / "tensorboard").iterdir())
    call_script("evaluate.py", f"run_dir={folder}", "generate=false", "limit=1")
    assert sorted((folder / "logs" / "tensorboard").iterdir()) == before
