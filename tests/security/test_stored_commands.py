"""`train.py resume=RUN` replays a command line that somebody stored: it sets values, and does nothing else."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

from msenc.config.messages import CONFIGS
from msenc.runs.overrides import resumed_arguments

CALLBACK = "hydra.callbacks.x={_target_: builtins.exec, _args_: [\"import os; os.system('touch executed')\"]}"
OPTIONS = "is not an override"
HYDRA = "sets a Hydra option"
TARGET = "changes what is built"
FILE = "is not a file of configs/"

REFUSED = {
    f"+{CALLBACK}": HYDRA,
    f"++{CALLBACK}": HYDRA,
    "+hydra.callbacks.x._target_=os.system": HYDRA,
    "hydra.callbacks.sweep._target_=os.system": HYDRA,
    "hydra.sweeper._target_=os.system": HYDRA,
    "hydra.launcher._target_=os.system": HYDRA,
    "hydra/launcher=joblib": HYDRA,
    "hydra=in_place": HYDRA,
    "hydra.run.dir=/": HYDRA,
    "hydra.searchpath=[file:///elsewhere]": HYDRA,
    "~hydra.callbacks": HYDRA,
    "data@hydra.callbacks=demo": HYDRA,
    "+experiment@_global_=known_answer": HYDRA,
    "--config-dir=/elsewhere": OPTIONS,
    "--config-path=/elsewhere": OPTIONS,
    "-cn=elsewhere": OPTIONS,
    "--multirun": OPTIONS,
    "-m": OPTIONS,
    "--experimental-rerun=job.pickle": OPTIONS,
    "": OPTIONS,
    "modality": OPTIONS,
    "modality=text\nseed=2": OPTIONS,
    "prompt._target_=os.system": TARGET,
    "+prompt._target_=os.system": TARGET,
    "++model.llm._target_=lightning.fabric.utilities.cloud_io._load": TARGET,
    "prompt={_target_: os.system, command: 'touch executed'}": TARGET,
    "+callbacks.x={_target_: os.system}": TARGET,
    "+callbacks={x: {_target_: os.system}}": TARGET,
    "+data.labels=[{_target_: os.system}]": TARGET,
    "optimizer._partial_=false": TARGET,
    "model.connector._args_=[1]": TARGET,
    "prompt=../../elsewhere": FILE,
    "prompt=/elsewhere/prompt": FILE,
    "model/llm=../../../elsewhere": FILE,
    "experiment=[known_answer,../../elsewhere]": FILE,
    "data='file:///elsewhere'": FILE,
    "plugins=[antigravity]": "changes what is trusted",
    "+plugins.0=antigravity": "changes what is trusted",
    "urls=['http:${paths.cache_dir}']": "changes what is trusted",
    "+anything.x=1": "sets a key that no run's config has",
    "+sed=1": "sets a key that no run's config has",
    "seed=1,2": "is not a single value",
    "modality=glob(*)": "is not a single value",
    "prompt=choice(default,chat)": "is not a single value",
}


def store(stored_run, overrides) -> None:
    (stored_run / ".hydra" / "overrides.yaml").write_text(json.dumps(overrides), encoding="utf-8")


@pytest.mark.parametrize(("override", "message"), REFUSED.items(), ids=[*map(repr, REFUSED)])
def test_a_stored_override_that_does_more_than_set_a_value_is_refused(override, message, stored_run, guard):
    store(stored_run, ["modality=text", override])
    text = guard.refuses(lambda: resumed_arguments([f"resume={stored_run}"]))
    assert message in text
    assert "overrides.yaml" in text


@pytest.mark.parametrize(
    "content", ["{seed: 1}", "[[seed=1]]", "[1]", "!!python/object/apply:os.system ['touch executed']", "[", "\xff", ""]
)
def test_a_file_that_is_no_list_of_overrides_is_refused(content, stored_run, guard):
    (stored_run / ".hydra" / "overrides.yaml").write_bytes(content.encode("latin-1"))
    assert "overrides.yaml" in guard.refuses(lambda: resumed_arguments([f"resume={stored_run}"]))


def test_ones_own_command_line_has_the_last_word(stored_run):
    store(stored_run, ["plugins=[theirs]", "seed=2", "modality=text"])
    given = ["plugins=[mine]", "+hydra.verbose=true"]
    assert resumed_arguments([f"resume={stored_run}", *given])[:4] == ["seed=2", "modality=text", *given]


def test_all_that_a_run_can_be_started_with_is_taken(stored_run):
    choices = [f"{file.parent.relative_to(CONFIGS)}={file.stem}" for file in CONFIGS.rglob("*/*.yaml")]
    overrides = [choice for choice in choices if not choice.startswith("hydra")]
    assert len(overrides) > 50
    values = ["+trainer.val_check_interval=0.5", "~callbacks.checkpoints", "data.dir='it\\'s, here'", "align=null"]
    values += ["data.generate.sizes={train:2,val:1,test:1}", "model.llm.lora={r: 4, target_modules: [q_proj]}"]
    store(stored_run, [*overrides, *values])
    assert resumed_arguments([f"resume={stored_run}"])[:-2] == [*overrides, *values]


def test_the_command_refuses_without_a_traceback(stored_run, guard):
    """As a process of its own, from the terminal to the exit status."""
    store(stored_run, [f"+{CALLBACK}"])
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), f"resume={stored_run}"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: {stored_run}")
    assert HYDRA in done.stderr
    assert "Traceback" not in done.stderr
    assert not guard.marker.exists()
