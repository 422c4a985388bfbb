"""Schemas for editors accept every config of ours and no broken one; --help says what each key is; completion works."""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
from conftest import CONFIGS, ROOT
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from msenc import commands
from msenc.config import editor, targets
from msenc.types import MsencError

FILES = sorted(CONFIGS.rglob("*.yaml"))


def faults(file: Path, text: str) -> list[str]:
    """What an editor underlines in a file of that place with that text."""
    (named,) = editor.MODELINE.findall(file.read_text(encoding="utf-8"))
    schema = json.loads((file.parent / named).resolve().read_text(encoding="utf-8"))
    value = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    return [error.message for error in jsonschema.Draft7Validator(schema).iter_errors(value)]


def differences(here, there, path=""):
    """Where two schemas differ, and in what: whole ones are too long to be shown."""
    if isinstance(here, dict) and isinstance(there, dict):
        keys = sorted(here.keys() | there.keys())
        return [line for key in keys for line in differences(here.get(key), there.get(key), f"{path}/{key}")]
    return [] if here == there else [f"{path}: {here!r:.500} / {there!r:.500}"]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Name -> schema, as the command writes them, in a process where no test has replaced a part of a package."""
    folder = tmp_path_factory.mktemp("schemas")
    shutil.copytree(CONFIGS, folder / "configs", ignore=shutil.ignore_patterns(editor.FOLDER))
    command = [sys.executable, "-m", "msenc", "configs", "--schema"]
    subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, stdout=subprocess.PIPE)
    return read(folder / "configs" / editor.FOLDER)


def read(folder):
    return {path.name: json.loads(path.read_text(encoding="utf-8")) for path in folder.iterdir()}


def test_the_schemas_that_lie_there_are_those_of_the_code(written):
    there = read(CONFIGS / editor.FOLDER)
    assert there.keys() == written.keys(), "msenc configs --schema writes them"
    for name, schema in written.items():
        jsonschema.Draft7Validator.check_schema(schema)
        assert differences(there[name], schema) == [], f"{name} is out of date: msenc configs --schema writes it"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(CONFIGS)))
def test_every_config_names_its_schema_and_validates(file):
    text = file.read_text(encoding="utf-8")
    lines = text.splitlines()
    assert lines[lines[0].startswith("# @package")] == editor.modeline(file, CONFIGS)
    assert faults(file, text) == []


BROKEN = [
    ("train.yaml", "sead: 1"),
    ("train.yaml", "seed: one"),
    ("train.yaml", "data: {batch_sise: 4}"),
    ("data/demo.yaml", "batch_size: many"),
    ("data/demo.yaml", "voice: {loudness: loud}"),
    ("data/demo.yaml", "generate: {_target_: msenc.demo.world.write_demo, sises: {train: 1}}"),
    ("model/connector/qformer.yaml", "num_qeries: 4"),
    ("model/connector/mlp.yaml", "{_target_: msenc.models.connector.Mlp, cross_attention_frequency: 2}"),
    ("model/audio/wavlm.yaml", "{name: wavlm, dimension: 768}"),
    ("model/llm/tiny_lora.yaml", "llm: {lora: {rank: 8}}"),
    ("trainer/cpu.yaml", "max_step: 5"),
    ("trainer/cpu.yaml", "{_target_: lightning.Trainr}"),
    ("optimizer/adamw.yaml", "lr: fast"),
    ("experiment/paper_text.yaml", "experiment: paper"),
    ("speech/kokoro.yaml", "num_threads: 1.5"),
    ("evaluate.yaml", "metrics: bleu"),
    ("align/words.yaml", "labels: {video: {source: picture}}"),
]


@pytest.mark.parametrize(("file", "text"), BROKEN)
def test_a_broken_config_does_not_validate(file, text):
    assert faults(CONFIGS / file, text)


def test_a_class_of_ones_own_validates_with_any_arguments():
    assert faults(CONFIGS / "model/audio/wavlm.yaml", "encoder: {_target_: my_parts.Energy, hop_s: 1}") == []


def test_keys_are_completed_with_their_meaning(written):
    trainer, data = written["trainer.json"]["properties"], written["data.json"]["properties"]
    assert "max_steps" in trainer
    assert "gradient" in trainer["gradient_clip_val"]["description"].lower()
    assert data["val"]["description"].startswith("``val``, the split that is validated on")
    assert "qformer" not in data


def test_the_schemas_are_written_beside_ones_own_configs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MsencError, match=r"configs: no such folder here\. msenc configs --copy"):
        commands.write_schemas()
    commands.copy_configs(["--copy", "trainer/cpu.yaml", "data/demo.yaml"])
    own = tmp_path / "configs" / "model" / "audio" / "mine.yaml"
    own.parent.mkdir(parents=True)
    own.write_text(text := "# @package model.streams.audio\nname: mine\n")
    (tmp_path / "configs" / editor.FOLDER).mkdir()
    (tmp_path / "configs" / editor.FOLDER / "gone.json").touch()
    monkeypatch.setattr(sys, "argv", ["msenc", "configs", "--schema"])
    commands.main()
    assert sorted(p.name for p in (tmp_path / "configs" / editor.FOLDER).iterdir()) == [
        "data.json",
        "model.streams.audio.json",
        "trainer.json",
    ]
    said = capsys.readouterr().out
    assert said.count("Written: configs/schema/") == 3
    assert said.endswith("Written: configs/model/audio/mine.yaml\n")
    named = own.read_text()
    package, _, rest = text.partition("\n")  # Hydra looks for a package in the first line
    line = "# yaml-language-server: $schema=../../schema/model.streams.audio.json"
    assert named == f"{package}\n{line}\n{rest}"
    commands.main()
    assert own.read_text() == named
    assert faults(tmp_path / "configs" / "trainer" / "cpu.yaml", "max_step: 5")


@pytest.mark.parametrize("command", editor.COMMANDS)
def test_help_has_a_line_for_every_key(command):
    lines = dict(editor.help_of(command))
    assert lines.keys() >= set(editor.COMMANDS[command].__dataclass_fields__)
    assert [key for key, text in lines.items() if not text] == []


def test_help_prints_them():
    done = subprocess.run(
        [sys.executable, "report.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    keys = done.partition("== Keys ==")[2].partition("== Config ==")[0]
    assert "\nspread                               ci: means with half of their interval" in keys
    assert "\nnoise_floor: null\n" in done  # the composed config below


def test_the_schemas_are_not_copied_for_each_group_that_help_lists_and_stay_as_they_are(compose):
    store = ConfigStore.instance()
    before = {name: OmegaConf.to_yaml(store.load(name).node) for name in store.list("") if name.endswith(".yaml")}
    config = compose(["modality=text", "seed=7"])
    config.seed = 8
    assert copy.deepcopy(store) is store
    assert {name: OmegaConf.to_yaml(store.load(name).node) for name in before} == before
    assert compose().seed == 1


@pytest.mark.parametrize(
    ("overrides", "package", "refusal"),
    [
        (["logger=wandb"], "wandb", r"logger\.wandb: .*WandbLogger needs the package wandb, .*'\.\[wandb\]'"),
        (["logger=mlflow"], "mlflow", r"logger\.mlflow: .* needs the package mlflow, .*'\.\[mlflow\]'"),
        (["speech=kokoro"], "onnxruntime", r"speech: .*Kokoro needs the package onnxruntime, .*'\.\[kokoro\]'"),
        (["speech=espeak"], "espeakng_loader", r"speech: .*ESpeak needs the package espeakng_loader, .*'\.\[demo\]'"),
        (["page=true"], "gradio", r"page: page=true needs the package gradio, .*'\.\[talk\]'"),
    ],
)
def test_a_missing_package_is_said_before_anything_loads(overrides, package, refusal, compose, monkeypatch):
    from msenc.config.checks import checked
    from msenc.training.assembly import GIVEN

    find = targets.find_spec
    monkeypatch.setattr(targets, "find_spec", lambda name: None if name == package else find(name))
    monkeypatch.setattr("msenc.config.checks.check_values", lambda config: pytest.fail("it came later"))
    command = {"logger": "train", "page": "respond"}.get(overrides[0].partition("=")[0], "evaluate")
    given = overrides if command == "train" else [*overrides, "run_dir=RUN"]
    with pytest.raises(MsencError, match=refusal):
        checked(compose(given, command), GIVEN)


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize("command", ["python train.py", "msenc train"])
@pytest.mark.parametrize(("word", "expected"), [("data=iem", "data=iemocap"), ("trainer.max_st", "trainer.max_steps=")])
def test_a_shell_completes_groups_and_keys(command, word, expected, tmp_path):
    assert complete(f"{command} {word}", tmp_path) == [expected]


def test_a_shell_completes_the_command(tmp_path):
    assert complete("msenc prep", tmp_path) == ["prepare"]


def complete(line: str, folder: Path) -> list[str]:
    """What bash makes of a line at the press of Tab."""
    for name, module in (("python", ""), ("msenc", "-m msenc")):
        (folder / name).write_text(f'#!/bin/sh\nexec {sys.executable} {module} "$@"\n')
        (folder / name).chmod(0o755)
    script = f"""
        cd {ROOT}
        export PATH="{folder}:$PATH" PYTHONPATH="{ROOT}"
        eval "$(python train.py -sc install=bash)"
        COMP_LINE='{line}'
        COMP_POINT=${{#COMP_LINE}}
        COMP_CWORD={len(line.split()) - 1}
        hydra_bash_completion
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()
