"""Prepares in processes of their own and kills them: ``python preparation_driver.py SPEC RESULT``.

The imports are paid once, here; every start is a fork. SPEC is a JSON list of objects: ``arguments`` of prepare.py,
``folder`` of all that it writes, ``log``, and ``moments``, one per start but the last. A moment stands before something
that a start does in the folder (opening for writing, renaming, removing, making folders): the given number of such
steps, or the first that ``event path`` names by the end of its path. RESULT gets, per object and start, whether it was
killed, how many steps it took, and which clips it encoded and measured.
"""

import hashlib
import json
import os
import signal
import sys
import traceback
from pathlib import Path

import av  # noqa: F401 (imported late elsewhere: here once, and not per start)
import soxr  # noqa: F401
import webdataset  # noqa: F401
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from msenc.config.schema import register_schemas
from msenc.models.encoders import LogMel, Pixels
from msenc.pipelines.prepare import prepare
from msenc.prepare import describe, features

CONFIGS = Path(__file__).parents[2] / "configs"
STEPS = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")


def watch(log: Path) -> None:
    """Write down each clip that is encoded or measured; and make items small, so that there are many."""
    features.MIN_ITEM_UTTERANCES, describe.ITEM_CLIPS = 3, 3
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(kind: str, content: bytes) -> None:
        os.write(file, f"{kind} {hashlib.sha1(content).hexdigest()}\n".encode())

    for encoder in (LogMel, Pixels):

        def encode(self, clips, real=encoder.encode):
            for clip in clips:
                note(self.kind, clip.tobytes())
            return real(self, clips)

        encoder.encode = encode
    measure = describe.measure_clip
    describe.measure_clip = lambda path: note("voice", path.read_bytes()) or measure(path)


def count_steps(steps: Path, folder: str, moment: int | str | None) -> None:
    """Die at the moment; the number of steps begun is the size of a file."""
    file = os.open(steps, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    count = 0

    def hook(event: str, args: tuple) -> None:
        nonlocal count
        is_step = event in STEPS or (event == "open" and (args[2] or 0) & (os.O_WRONLY | os.O_RDWR))
        if is_step and str(args[0]).startswith(folder):
            count += 1
            os.ftruncate(file, count)
            path = str(args[1] if event == "os.rename" else args[0])
            is_named = isinstance(moment, str) and event == moment.split()[0] and path.endswith(moment.split()[1])
            if count == moment or is_named:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def start(spec: dict, moment: int | str | None) -> dict:
    """One start in a process of its own."""
    log = Path(spec["log"])
    said, steps = log.with_suffix(".said"), log.with_suffix(".steps")
    pid = os.fork()
    if pid == 0:
        with said.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        status = 1
        try:
            watch(log)
            count_steps(steps, spec["folder"], moment)
            with initialize_config_dir(str(CONFIGS), version_base="1.3"):
                GlobalHydra.instance().hydra.run("prepare", prepare, spec["arguments"], False)
            status = 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(status)
    _, status = os.waitpid(pid, 0)
    work = log.read_text().splitlines() if log.is_file() else []
    log.unlink(missing_ok=True)
    return {
        "is_killed": os.WIFSIGNALED(status),
        "status": os.WEXITSTATUS(status) if os.WIFEXITED(status) else None,
        "said": said.read_text(),
        "steps": steps.stat().st_size,
        "work": work,
    }


def main() -> None:
    register_schemas()
    specs = json.loads(Path(sys.argv[1]).read_text())
    results = [[start(spec, moment) for moment in [*spec["moments"], None]] for spec in specs]
    Path(sys.argv[2]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
