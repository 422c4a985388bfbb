"""The commands: msenc COMMAND [group=choice] [key=value ...]; msenc COMMAND --help lists what can be set.

train           train one run, or a sweep (-m, sweep=...), and evaluate it
prepare         raw clips and annotations -> shards
evaluate        score finished runs
report          compare the runs of sweeps
respond         let a trained run reply, or talk to it on a page
push            RUN OWNER/NAME: share a run's export on the Hugging Face hub; msenc.load("hub:OWNER/NAME") loads it
import-upstream turn a checkpoint of the Interspeech 2025 system into a run
configs         where the configs lie; configs --copy [FILE ...] copies them to configs/, to be changed; --schema
                writes there what editors complete and check them by
new             new NAME: a project with a config group, an encoder and a test of its own

Configs in the folder configs/ of the current folder are found beside msenc's, and before them. In a checkout,
python train.py is the same as msenc train.
"""

import contextlib
import io
import os
import re
import shutil
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from msenc.config.hints import nearest

try:
    from msenc.config.messages import CONFIGS, readable_errors
except ModuleNotFoundError as error:
    if error.name not in ("hydra", "omegaconf"):
        raise
    sys.exit(
        f"error: {sys.executable} has no package {error.name}. make installs msenc's packages into .venv: run source "
        ".venv/bin/activate first, or name its Python, .venv/bin/python."
    )
from msenc.types import MsencError
from msenc.work.command import as_typed

LITERAL = {
    "respond": (
        *("text", "audio", "video", "history", "speaker", "reply_as"),
        *("out", "runs_dir", "run_dir", "page_password", "base"),
    )
}
"""Keys whose values are typed without Hydra's quotes."""
COMMANDS = ("train", "prepare", "evaluate", "report", "respond")
"""Those that compose a config of the same name, and have a module of that name in `msenc.pipelines`."""
OTHERS = ("push", "import-upstream", "configs", "new")
OWN_CONFIGS = "configs"
CHILD = "MSENC_COMMAND"
"""Environment variable by which further processes of a run know the command."""


def run(command: str) -> None:
    """Do one of `COMMANDS`, as `sys.argv` says."""
    import hydra
    from omegaconf import DictConfig

    from msenc.config.schema import register_schemas
    from msenc.runs.overrides import read_arguments, resumed_arguments, spelt_out
    from msenc.work.threads import wait_passively

    def main(cfg: DictConfig) -> Any:
        with readable_errors():
            # Imported here: --help must not wait for torch.
            return getattr(import_module(f"msenc.pipelines.{command}"), command)(cfg)

    wait_passively()
    register_schemas()
    with readable_errors(), _as_module(f"msenc.pipelines.{command}"):
        given = spelt_out(sys.argv[1:]) if command == "train" else sys.argv[1:]
        given = read_arguments(given, LITERAL.get(command, ()))
        folders = _config_folders(given)
        given = resumed_arguments(given) if command == "train" else given
        # Hydra looks into the folder of its option last, so that is msenc's own; the last of equal options counts.
        sys.argv[1:] = [*given, *(["--config-dir", str(CONFIGS)] if len(folders) > 1 else [])]
        call = hydra.main(version_base="1.3", config_path=str(folders[0]), config_name=command)(main)
        with _full_help(command):
            call()


def main() -> None:
    """The command ``msenc``."""
    command, *arguments = sys.argv[1:] or ["--help"]
    if "LOCAL_RANK" in os.environ and CHILD in os.environ:  # Lightning repeats the arguments, as `run` left them
        command, arguments = os.environ[CHILD], sys.argv[1:]
    if command == "-sc":  # the shell asks Hydra's completion, which knows of no command in front
        command, arguments = _completed(), sys.argv[1:]
    if command is None:
        print(" ".join((*COMMANDS, *OTHERS)))
    elif command in ("-h", "--help"):
        print(__doc__.strip())
    elif command == "--version":
        from importlib.metadata import version

        print(f"msenc {version('msenc')}")
    elif command in COMMANDS:
        sys.argv = [sys.argv[0], *arguments]
        if command == "train":
            from msenc.work.signals import listen_from_start

            listen_from_start()
        os.environ[CHILD] = command
        sys.path.append(str(Path.cwd()))  # where plugins=[my_module] lies; last, so that it hides no library
        run(command)
    else:
        with readable_errors():
            _do_other(command, arguments)


def _completed() -> str | None:
    """The command in the line that a shell completes, which is taken out of it; None while it is being typed."""
    line = os.environ.get("COMP_LINE", "")
    typed = re.match(r"(\s*\S+)\s+(\S+)(\s.*)", line)
    if typed is None or typed[2] not in COMMANDS:
        return None
    before, command, after = typed.groups()
    os.environ["COMP_LINE"] = before + after
    os.environ["COMP_POINT"] = str(len(before + after))
    return command


def _do_other(command: str, arguments: Sequence[str]) -> None:
    if command == "configs":
        for file in write_schemas() if list(arguments) == ["--schema"] else copy_configs(arguments):
            print(f"Written: {file}")
    elif command == "new":
        if len(arguments) != 1:
            raise MsencError("msenc new NAME: expected one name, of a new folder.")
        for file in write_project(Path(arguments[0])):
            print(f"Written: {file}")
        print(f"Try it: cd {arguments[0]} && msenc train experiment={Path(arguments[0]).name}")
    elif command == "push":
        from msenc.pipelines.push import push

        print(f"Sent. To load it: {push(arguments)}")
    elif command == "import-upstream":
        from msenc.config.schema import register_schemas
        from msenc.upstream import main as import_upstream

        register_schemas()
        import_upstream(list(arguments))
    else:
        raise MsencError(f"{command}: no such command.{nearest(command, (*COMMANDS, *OTHERS))}")


def copy_configs(arguments: Sequence[str]) -> list[Path]:
    """Copy files of msenc's configs to ``configs/`` of the current folder, which comes before msenc's own.

    Args:
        arguments: ``--copy`` and the files or groups to copy, such as ``trainer/cpu.yaml``; none: only say where
            they lie.

    Returns:
        The new files.

    Raises:
        MsencError: there is no such config, or a copy is there already, which stays as it is.
    """
    if not arguments:
        print(CONFIGS)
        return []
    option, *names = arguments
    if option != "--copy" or not names:
        raise MsencError("msenc configs --copy FILE ...: expected files or groups, such as trainer/cpu.yaml or data.")
    files = sorted(file.relative_to(CONFIGS) for file in CONFIGS.rglob("*.yaml"))
    chosen: list[Path] = []
    for name in names:
        found = [file for file in files if Path(name) in (file, file.with_suffix(""), *file.parents)]
        if not found:
            raise MsencError(f"{name}: no such config.{nearest(name, [str(file) for file in files])}")
        chosen += found
    taken = [file for file in chosen if (Path(OWN_CONFIGS) / file).exists()]
    if taken:
        raise MsencError(f"{Path(OWN_CONFIGS) / taken[0]}: is there already. Remove it, or move it away.")
    for file in chosen:
        (Path(OWN_CONFIGS) / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(CONFIGS / file, Path(OWN_CONFIGS) / file)
    return [Path(OWN_CONFIGS) / file for file in chosen]


def write_schemas() -> list[Path]:
    """Write the JSON schemas of the configs in ``configs/`` of the current folder, by which editors complete them.

    In a checkout these are msenc's own. A file that names no schema gets a line that does, among
    its first: ``# yaml-language-server: $schema=../schema/data.json`` in ``configs/data/mine.yaml``.

    Raises:
        MsencError: there is no such folder.
    """
    from msenc.config.editor import write_schemas as write

    if not Path(OWN_CONFIGS).is_dir():
        raise MsencError(
            "configs: no such folder here. msenc configs --copy FILE makes one, and so does msenc new NAME."
        )
    return write(Path(OWN_CONFIGS))


EXPERIMENT = """# @package _global_
# An experiment of your own: msenc train experiment={name} (a table: -m ... seed=1,2,3)
defaults:
  - override /modality: text_audio
  - override /model/audio: {module}

plugins: [{module}]
trainer:
  max_epochs: 4
"""
ENCODER = """# @package model.streams.audio
# {module}.Level: msenc train plugins=[{module}] modality=text_audio model/audio={module}
name: {module} # of the stored features: change it when what the encoder returns changes
dim: 2
encoder:
  _target_: {module}.Level
  hop_s: 0.04
"""
MODULE = '''"""An audio encoder of your own. What it returns is computed once by msenc prepare, and stored."""

from collections.abc import Sequence

import numpy as np

from msenc.config.targets import buildable


@buildable("model.streams.audio.encoder")
class Level:
    """Waveforms -> loudness and rate of zero crossings, (T, 2) each.

    Args:
        hop_s: seconds per frame.
    """

    kind, dim, sample_rate = "audio", 2, 16000

    def __init__(self, hop_s: float = 0.04) -> None:
        self.hop = round(hop_s * self.sample_rate)

    def encode(self, clips: Sequence[np.ndarray]) -> list[np.ndarray]:
        """(samples,) per clip, 16 kHz -> (T, 2) per clip."""
        return [self._of(np.pad(clip, (0, -len(clip) % self.hop))) for clip in clips]

    def _of(self, clip: np.ndarray) -> np.ndarray:
        frames = clip.reshape(-1, self.hop)
        level = np.log(np.square(frames).mean(axis=1) + 1e-6)
        crossings = (np.diff(np.signbit(frames), axis=1)).mean(axis=1)
        return np.stack([level, crossings], axis=1).astype(np.float32)
'''
TEST = '''"""The encoder's output fits its config: pytest."""

import numpy as np
from {module} import Level


def test_frames_per_second():
    (features,) = Level().encode([np.sin(np.arange(16000) / 10)])
    assert features.shape == (25, 2)
    assert np.isfinite(features).all()
'''


def write_project(folder: Path) -> list[Path]:
    """Write a small project that trains at once.

    Args:
        folder: to create; its name is the experiment's.

    Returns:
        Its files.

    Raises:
        MsencError: the folder is there, or its name cannot be an experiment's.
    """
    name = folder.name
    module = f"{name.replace('-', '_')}_encoder"
    if not module.isidentifier():
        raise MsencError(f"{name!r}: expected letters, digits, - and _, such as my-experiment.")
    if folder.exists():
        raise MsencError(f"{folder}: is there already. Choose another name.")
    written = []
    for file, text in {
        f"configs/experiment/{name}.yaml": EXPERIMENT,
        f"configs/model/audio/{module}.yaml": ENCODER,
        f"{module}.py": MODULE,
        f"test_{module}.py": TEST,
    }.items():
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace("{name}", name).replace("{module}", module), encoding="utf-8")
        written.append(path)
    return written


def _config_folders(arguments: Sequence[str]) -> list[Path]:
    """Where configs are looked for, in this order: a folder of the user's, if there is one, and msenc's."""
    from hydra._internal.utils import get_args_parser

    named = get_args_parser().parse_args(list(arguments)).config_dir
    own = Path(named or OWN_CONFIGS).resolve()
    if named and not own.is_dir():
        raise MsencError(f"--config-dir={named}: no such folder.")
    return [own, CONFIGS] if own.is_dir() and own != CONFIGS else [CONFIGS]


@contextlib.contextmanager
def _as_module(name: str) -> Any:
    """Hydra names a job after the module of its function, here always the one in this file."""
    os.environ["HYDRA_MAIN_MODULE"] = name
    try:
        yield
    finally:
        os.environ.pop("HYDRA_MAIN_MODULE", None)


@contextlib.contextmanager
def _full_help(command: str) -> Any:
    """Hydra prints a command's help itself; what each key means is put before the composed config."""
    if not {"-h", "--help"} & set(sys.argv):
        yield
        return
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        try:
            yield
        finally:
            from msenc.config.editor import help_of

            keys = "".join(f"{key:<36} {text}\n" for key, text in help_of(command))
            before, config, after = said.getvalue().partition("== Config ==")
            print(as_typed(f"{before}== Keys ==\n{keys}\n{config}{after}"), end="", file=sys.__stdout__)
