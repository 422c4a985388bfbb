"""Seconds that one waits for: ``train.py --help``, a checked config, the first training step.

    python benchmarks/startup.py [--quick] [--repetitions N] [--json FILE]

Each is a fresh process, timed from its start to its end; Python's bytecode and the libraries are in the page cache.

- ``bare Hydra --help``: a program of five lines with an empty config. Below it lies nothing that msenc could save.
- ``train.py --help``
- ``train.py --cfg job``: composes all groups and prints the config.
- ``compose and check``: composes, and checks all that a run checks before it opens its data.
- ``imports``: torch, lightning, transformers and peft alone, what every training with them waits for.
- ``first step``: ``train.py`` on the prepared demo, to the end of its first training step, and out.

The demo is the one below MSENC_DATA or ``data``; where none is prepared, a small one is made first.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from measure import console, interleave, parser, print_table, summarise, time_rows, write_json

ROOT = Path(__file__).parents[1]

BARE_PROGRAM = """
import hydra
@hydra.main(version_base="1.3", config_path=None)
def main(cfg): pass
main()
"""

COMPOSE_AND_CHECK = """
from hydra import compose, initialize_config_dir
from msenc.config.checks import checked
from msenc.config.messages import CONFIGS
from msenc.config.schema import register_schemas
from msenc.training.assembly import GIVEN
register_schemas()
with initialize_config_dir(str(CONFIGS), version_base="1.3"):
    checked(compose("train", ["paths.output_dir=none"]), GIVEN)
"""

SMALL_DEMO = [
    "data.generate.sizes={train:16,val:4,test:4}",
    "model.llm_recipe.num_dialogues=64",
    "model.llm_recipe.attempts=1",
]
FIRST_STEP = ["+trainer.fast_dev_run=1", "+trainer.limit_val_batches=0", "+trainer.enable_progress_bar=false"]


def main() -> None:
    arguments = parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory(prefix="msenc-startup-") as name:
        folder = Path(name)
        data = Path(os.environ.get("MSENC_DATA", ROOT / "data")).absolute()
        is_prepared = (data / "demo" / "dataset.json").is_file() and (data / "tiny-llm" / "recipe.json").is_file()
        overrides = [] if is_prepared else SMALL_DEMO
        os.environ |= {
            "MSENC_DATA": str(data if is_prepared else folder / "data"),
            "MSENC_RUNS": str(folder / "runs"),
            "PYTHONPATH": str(ROOT),
        }
        if not is_prepared:
            console.print("Preparing a small demo")
            process("prepare.py", "data=demo", *overrides)()
        (folder / "bare.py").write_text(BARE_PROGRAM, encoding="utf-8")
        variants = {
            "bare Hydra --help": process(str(folder / "bare.py"), "--help"),
            "train.py --help": process("train.py", "--help"),
            "train.py --cfg job": process("train.py", "--cfg", "job"),
            "imports": process("-c", "import torch, lightning, transformers, peft"),
            "compose and check": process("-c", COMPOSE_AND_CHECK),
            "first step": process("train.py", *overrides, *FIRST_STEP),
        }
        seconds = interleave(variants, 1 if arguments.quick else arguments.repetitions)
    base = "bare Hydra --help"
    results = summarise(seconds, base)
    print_table(
        f"Start, in fresh processes ({'the demo as prepared' if is_prepared else 'a small demo'})",
        ["variant", "median s", "fastest", "slowest", f"times {base}"],
        time_rows(results, base),
    )
    write_json(arguments.json, results)


def process(*arguments: str) -> Callable[[], None]:
    """A call of Python that has to succeed."""

    def run() -> None:
        done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{arguments}: exit status {done.returncode}\n{done.stdout}\n{done.stderr}")

    return run


if __name__ == "__main__":
    main()
