"""A small demo, prepared once, and the ways that tests compose, train and call the scripts on it."""

import gc
import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: no test waits for a network

import runpy
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock
from guarding import guard, no_server, payload, stored_run  # noqa: F401 (fixtures)
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from local_slurm import slurm, slurm_packages  # noqa: F401 (fixtures)
from omegaconf import DictConfig
from tiny_models import save_causal_lm, save_clip, save_speech_encoder, save_whisper

from msenc.config.schema import register_schemas
from msenc.work.signals import HEARD

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"

SMALL_DEMO = [
    "data.generate.sizes={train:16,val:4,test:4}",
    "model.llm_recipe.num_dialogues=64",
    "model.llm_recipe.attempts=1",
]
"""Overrides that the small demo was made with; any other sizes would be refused in its folder."""


SLOW = (
    *("test_commands", "test_resume", "test_sharding", "test_pipelines", "test_sweeps", "test_configs"),
    *("test_processes", "test_readme", "test_align", "test_command_lines", "test_listening_page", "test_signals"),
    *("test_trackers", "test_visitors", "test_talk_page", "test_hands_free", "test_layers", "test_plan"),
    *("test_preference", "test_hub", "test_worlds", "test_search", "test_object_storage", "test_demo", "test_own_data"),
    *("test_evaluate", "test_trace", "test_description", "test_kills", "test_tour"),
)
"""Files that take long, up to several minutes: runs that are killed, searches and sweeps, several processes, browsers,
generated worlds. They have the marker `slow`, and begin first, so that no core waits for another's last one."""

QUICK = "not fuzz and not slow"
"""What `make test` selects."""


def pytest_configure(config: pytest.Config) -> None:
    """Leave slow files to ``-m slow`` and to who names them, or their folder."""
    if config.args_source is pytest.Config.ArgsSource.TESTPATHS and config.option.markexpr == "not fuzz":
        config.option.markexpr = QUICK


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Import no file of which no test is run."""
    return True if config.option.markexpr == QUICK and collection_path.stem in SLOW else None


def pytest_collection_finish() -> None:
    """What is imported stays: each collection of garbage, of which a run makes one, would look through it for half a
    second.
    """  # noqa: D205
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow files first, in this order; the others as they come."""
    order = {name: number for number, name in enumerate(SLOW)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
    for item in items:
        if item.path.stem in order:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """MSENC_DATA and MSENC_RUNS lie in a temporary folder for the whole session: no test writes into the checkout."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MSENC_DATA", str(home / "data"))
        patch.setenv("MSENC_RUNS", str(home / "runs"))
        patch.setenv("OMP_NUM_THREADS", "1")
        torch.set_num_threads(1)
        register_schemas()
        yield home


@pytest.fixture(scope="session")
def demo_home(home, tmp_path_factory) -> Path:
    """A folder with the small demo's raw material, shards and tiny LLM in ``data/``, as `prepare.py` makes them."""
    from msenc.pipelines.prepare import prepare

    if "PYTEST_XDIST_WORKER" not in os.environ:
        prepare(_compose([*SMALL_DEMO, "prepare_workers=0"], "prepare", home))
        return home
    made = tmp_path_factory.getbasetemp().parent / "demo"  # of all processes that test
    with FileLock(made.with_suffix(".lock")):
        if not made.exists():
            prepare(_compose([*SMALL_DEMO, "prepare_workers=0"], "prepare", home))
            shutil.copytree(home / "data", made.with_suffix(".partial"))
            made.with_suffix(".partial").rename(made)
        else:
            shutil.copytree(made, home / "data")
    return home


@pytest.fixture
def compose(home, tmp_path) -> Callable[..., DictConfig]:
    """``compose(overrides, config_name="train")`` -> the config of that command, its run folder below `tmp_path`."""

    def call(overrides: list[str] = [], config_name: str = "train") -> DictConfig:  # noqa: B006 (never changed)
        return _compose(overrides, config_name, tmp_path / "run")

    return call


def _compose(overrides: list[str], config_name: str, output_dir: Path) -> DictConfig:
    if config_name not in ("report", "evaluate", "respond"):  # which writes where its argument says
        overrides = [*overrides, f"paths.output_dir={output_dir}"]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return hydra_compose(config_name, overrides)


def run_driver(driver: Path, specs: list[dict], home: Path) -> list[list[dict]]:
    """Let a driver, in a process without torch's threads, start what is to be killed; what it saw of each start."""
    (home / "spec.json").write_text(json.dumps(specs))
    done = subprocess.run(
        [sys.executable, str(driver), str(home / "spec.json"), str(home / "result.json")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads((home / "result.json").read_text())


@pytest.fixture
def train(demo_home, tmp_path) -> Callable[..., SimpleNamespace]:
    """``train(overrides, folder="run")``: what `train.py` does, in this process -> folder, loss.

    Hydra's own job runner makes the run folder, writes ``.hydra`` and sets HydraConfig; exceptions come out as raised.
    """

    def call(overrides: list[str], folder: str = "run") -> SimpleNamespace:
        from msenc.pipelines.train import train

        run_dir = tmp_path / folder
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            job = GlobalHydra.instance().hydra.run(
                "train", train, [*overrides, f"paths.output_dir={run_dir}"], with_log_configuration=False
            )
        return SimpleNamespace(folder=run_dir, loss=job.return_value)

    return call


@pytest.fixture(scope="session")
def short_run(demo_home, tmp_path_factory) -> Path:
    """The folder of a run of text, audio and video that has trained for a moment; to be read only."""
    from msenc.pipelines.train import train

    folder = tmp_path_factory.mktemp("short") / "run"
    overrides = ["trainer.max_epochs=1", "evaluate=null", f"paths.output_dir={folder}"]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        GlobalHydra.instance().hydra.run("train", train, overrides, with_log_configuration=False)
    return folder


@pytest.fixture(scope="session")
def run_script(demo_home) -> Callable[..., subprocess.CompletedProcess]:
    """``run_script("train.py", *args, env={})`` -> the finished process; data and runs lie in `demo_home`."""

    def call(name: str, *args: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, name, *args],
            cwd=ROOT,
            env={**os.environ, "COLUMNS": "200", **(env or {})},
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )

    return call


@pytest.fixture
def call_script(demo_home, monkeypatch) -> Callable[..., None]:
    """``call_script("train.py", *args)``: the script in this process, which spares its start of some seconds.

    SystemExit comes out as raised. Hydra leaves logging alone, which is of the whole process.
    """

    def call(name: str, *args: str) -> None:
        quiet = ["hydra/job_logging=none", "hydra/hydra_logging=none"]
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", [name, *args, *quiet])
        before = {number: signal.getsignal(number) for number in (*HEARD, signal.SIGINT)}
        try:
            runpy.run_path(str(ROOT / name), run_name="__main__")
        finally:  # a script's process ends with its handlers
            for number, handler in before.items():
                signal.signal(number, handler)

    return call


@pytest.fixture(scope="session")
def tiny_models(demo_home, tmp_path_factory) -> dict[str, Path]:
    """Folders of random models: llama, mistral, qwen2, qwen3 (16 wide, the demo's tokenizer), wavlm, wav2vec2,
    whisper (16 wide), clip (12 wide).
    """  # noqa: D205
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("models")
    tokenizer = AutoTokenizer.from_pretrained(demo_home / "data" / "tiny-llm")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return {
            **{
                family.lower(): save_causal_lm(folder / family, family, tokenizer)
                for family in ("Llama", "Mistral", "Qwen2", "Qwen3")
            },
            "wavlm": save_speech_encoder(folder / "wavlm", "WavLM", "layer"),
            "wav2vec2": save_speech_encoder(folder / "wav2vec2", "Wav2Vec2", "group"),
            "whisper": save_whisper(folder / "whisper"),
            "clip": save_clip(folder / "clip"),
        }
