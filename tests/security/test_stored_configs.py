"""A stored config reads no variable of the environment but msenc's own, and sends to no address by itself."""

import json
import random
import runpy
import shutil
import sys
from importlib.metadata import packages_distributions

import pytest
from conftest import ROOT
from file_server import serve
from omegaconf import OmegaConf

from msenc.config.build import build
from msenc.config.targets import BUILDABLE
from msenc.files import read_json
from msenc.pipelines.evaluate import evaluate
from msenc.pipelines.report import report
from msenc.pipelines.respond import respond
from msenc.runs.overrides import resumed_arguments
from msenc.runs.record import read_run
from msenc.training.export import load_export
from msenc.training.restore import open_run
from msenc.types import MsencError

OTHER_NODES = ("model.llm_recipe", "optimizer", "scheduler", "trainer", "callbacks.streams", "logger.csv")
NODES = ("prompt", "model.llm", "model.connector", "model.streams.audio.encoder", "model.streams.video.encoder")
TARGETS = {
    "os.system": {"command": "touch executed"},
    "subprocess.run": {"args": ["touch", "executed"]},
    "builtins.exec": {"source": "open('executed', 'w')"},
    "pathlib.Path.touch": {"self": "executed"},
    "shutil.copy": {"src": "runs/single/old/run.json", "dst": "executed"},
    "msenc.files.write_text": {"path": "executed", "text": "x"},
    "msenc.store.manifest.write_rejections": {"path": "executed", "rejections": []},
    "msenc.config.build.build": {"node": {"_target_": "os.system", "command": "touch executed"}},
    "msenc.models.pretrained.load_torch_file": {"path": "pickled.pt"},
    "lightning.fabric.utilities.cloud_io._load": {"path_or_url": "pickled.pt", "weights_only": False},
    "lightning.pytorch.callbacks.LambdaCallback": {},
    "lightning.pytorch.callbacks.ModelCheckpoint": {"dirpath": "executed"},
    "torch.optim.lr_scheduler.LambdaLR": {},
    "torch.load": {"f": "pickled.pt", "weights_only": False},
    "torch.hub.load": {"repo_or_dir": ".", "model": "x", "source": "local"},
    "my_parts.Mine": {},
    "antigravity": {},
    "": {},
    "..": {},
    None: {},
    7: {},
    ("os.system",): {},
}


def change(stored_run, path, value) -> None:
    """Set a value of the stored config."""
    file = stored_run / ".hydra" / "config.yaml"
    config = OmegaConf.load(file)
    OmegaConf.update(config, path, value, merge=False, force_add=True)
    file.write_text(OmegaConf.to_yaml(config), encoding="utf-8")


# What may be built


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_no_node_builds_what_is_not_in_the_table(target, stored_run, guard, payload):
    """The door itself, which all others lead to."""
    (stored_run.parents[2] / "my_parts.py").write_text(payload)
    for place in (*NODES, *OTHER_NODES, "speech", "data.recordings.recogniser", "prompt.turn", "", "hydra.callbacks.x"):
        node = {"_target_": list(target) if isinstance(target, tuple) else target, **TARGETS[target]}
        assert "_target_: found" in guard.refuses(lambda node=node, place=place: build(node, place))
        assert not {"my_parts", "antigravity"} & set(guard.imported)


@pytest.mark.parametrize("node", [None, 1, "os.system", ["os.system"], {}, {"command": "touch executed"}])
def test_what_is_no_node_is_refused(node, guard):
    assert "prompt" in guard.refuses(lambda: build(node, "prompt"))


@pytest.mark.parametrize("place", [*NODES, *OTHER_NODES])
def test_a_run_with_another_target_is_not_opened(place, stored_run, guard):
    change(stored_run, f"{place}._target_", "os.system")
    text = guard.refuses(lambda: open_run(stored_run, None))
    assert f"{place}._target_: found 'os.system'" in text


@pytest.mark.parametrize("place", ["prompt", "connector"])
def test_an_export_with_another_target_is_not_loaded(place, stored_run, guard):
    file = stored_run / "export" / "export.json"
    node = {"_target_": "os.system", "command": "touch executed"}
    file.write_text(json.dumps({**read_json(file), place: node}))
    assert "_target_: found 'os.system'" in guard.refuses(lambda: load_export(stored_run / "export"))


def test_plugins_of_a_stored_config_are_not_imported(stored_run, guard, payload, monkeypatch, compose):
    (stored_run.parents[2] / "their_parts.py").write_text(payload)
    monkeypatch.syspath_prepend(stored_run.parents[2])
    change(stored_run, "plugins", ["their_parts"])
    with guard.on():
        open_run(stored_run, None)
    assert "their_parts" not in guard.imported


def importable_names(rng: random.Random, number: int) -> list[str]:
    """Names of modules, and of what lies in some that are loaded: of Python's library and of all that is installed."""
    modules = sorted({*sys.stdlib_module_names, *packages_distributions()})
    names = []
    for _ in range(number):
        module = rng.choice(modules if rng.random() < 0.5 else sorted(sys.modules))
        inside = sorted(vars(sys.modules[module])) if module in sys.modules else ["main", "load", "run", "system"]
        names.append(".".join([module, *rng.sample(inside or ["x"], min(rng.randint(0, 1), len(inside or "x")))]))
    return names


def test_of_random_names_none_is_built_that_is_not_in_the_table(guard):
    rng = random.Random(5)
    places = [pattern.replace("*", "mine") for pattern in BUILDABLE]
    tried, allowed = 0, {name for names in BUILDABLE.values() for name in names}
    for name in importable_names(rng, 5000):
        place = rng.choice(places)
        if name in BUILDABLE.get(place.replace("mine", "*"), ()):
            continue
        tried += 1
        with guard.on(), pytest.raises(MsencError, match="_target_: found"):
            build({"_target_": name, "path": "executed", "_partial_": rng.random() < 0.5}, place)
        assert guard.imported == []
    assert tried > 4900
    # and what may be built in one place may not in another
    for name in sorted(allowed):
        for place in places:
            if name not in BUILDABLE[place.replace("mine", "*")]:
                with pytest.raises(MsencError, match="_target_: found"):
                    build({"_target_": name, "_partial_": True}, place)


# What may be referred to

REFERENCES = [
    "${oc.env:SECRET_TOKEN}",
    "${oc.env:SECRET_TOKEN,x}",
    "http://127.0.0.1:9/${oc.env:SECRET_TOKEN}",
    "${oc.env:MSENC_DATA,${oc.env:SECRET_TOKEN}}",
    "${oc.env:${paths.runs_dir}}",
    "${oc.env:MSENC_${paths.runs_dir}}",
    "${ oc.env:SECRET_TOKEN}",
    "${oc.env :SECRET_TOKEN}",
    "${oc.env:'SECRET_TOKEN'}",
    "${${paths.runs_dir}:SECRET_TOKEN}",
    "${oc.decode:'[1]'}",
    "${oc.create:{a: 1}}",
    "${oc.select:paths.data_dir}",
    "${oc.dict.values:paths}",
    "${oc.deprecated:paths.data_dir}",
    "${hydra:runtime.cwd}",
    "${hydra:job.env_set}",
    "${now:%Y}",
    "${python_version:}",
    "\\${oc.env:SECRET_TOKEN}",
    "\\\\${oc.env:SECRET_TOKEN}",
    "${a.b",
]


@pytest.mark.parametrize("text", REFERENCES)
def test_a_stored_config_refers_to_nothing_of_the_environment(text, stored_run, guard, monkeypatch, compose):
    monkeypatch.setenv("SECRET_TOKEN", "s3cr3t")
    change(stored_run, "prompt.instruction", "KEPT")
    file = stored_run / ".hydra" / "config.yaml"
    file.write_text(file.read_text().replace("KEPT", json.dumps(text)))
    calls = [
        lambda: open_run(stored_run, None),
        lambda: report(compose([f"sweep_dir={stored_run}"], "report")),
        lambda: evaluate(compose([f"run_dir={stored_run}"], "evaluate")),
        lambda: respond(compose([f"run_dir={stored_run}", "text=Hello."], "respond")),
    ]
    for call in calls:
        refused = guard.refuses(call)
        assert "config.yaml" in refused
        assert "s3cr3t" not in refused


@pytest.mark.parametrize("text", ["${paths.runs_dir}/x", "${oc.env:MSENC_MODELS,${paths.data_dir}}", "$5", "{x}"])
def test_its_own_keys_and_msencs_variables_are_referred_to(text, stored_run, monkeypatch):
    monkeypatch.delenv("MSENC_MODELS", raising=False)
    change(stored_run, "prompt.instruction", text)
    _, own = open_run(stored_run, None)
    resolved = text.replace("${paths.runs_dir}", "runs").replace("${oc.env:MSENC_MODELS,${paths.data_dir}}", "data")
    assert own["prompt"]["instruction"] == resolved


@pytest.mark.parametrize("text", REFERENCES)
def test_a_stored_override_refers_to_nothing_of_the_environment(text, stored_run, guard, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "s3cr3t")
    (stored_run / ".hydra" / "overrides.yaml").write_text(json.dumps(["seed=2", f"data.root='{text}'"]))
    refused = guard.refuses(lambda: resumed_arguments([f"resume={stored_run}"]))
    assert "overrides.yaml" in refused
    assert "s3cr3t" not in refused


@pytest.mark.parametrize(
    "content", ["!!python/object/apply:os.system ['touch executed']", "- 1", "[", "\xff", "a: &a [*a]", "a: *b"]
)
def test_a_file_that_is_no_config_is_refused(content, stored_run, guard):
    (stored_run / ".hydra" / "config.yaml").write_bytes(content.encode("latin-1"))
    assert "config.yaml: " in guard.refuses(lambda: read_run(stored_run))


# Where may be asked


@pytest.mark.parametrize(
    "key", ["data.dir", "model.llm.name_or_path", "paths.runs_dir", "logger.csv.save_dir", "model.connector.init"]
)
@pytest.mark.parametrize("scheme", ["http", "s3", "hf", "ftp", "simplecache::http", "filecache::memory"])
def test_an_address_of_a_stored_config_is_not_asked(key, scheme, stored_run, guard, no_server, compose):
    change(stored_run, key, f"{scheme}://{no_server.partition('://')[2]}/demo")
    text = guard.refuses(lambda: evaluate(compose([f"run_dir={stored_run}"], "evaluate")))
    assert f"config.yaml: {key}={scheme}://" in text
    assert "'urls=[" in text


def test_what_is_fetched_goes_where_the_user_keeps_it_and_not_where_a_run_says(stored_run, guard, no_server, compose):
    change(stored_run, "paths.cache_dir", f"{no_server}/demo")
    with guard.on():
        assert evaluate(compose([f"run_dir={stored_run}", "generate=false"], "evaluate"))


@pytest.mark.parametrize("place", ["file:///data/demo", "memory://demo", "data/demo", "See http://a: it says more."])
def test_what_lies_on_this_machine_or_is_text_is_no_address(place, stored_run):
    change(stored_run, "data.dir", place)
    assert open_run(stored_run, None)[1]["data"]["dir"] == place


def test_no_address_is_put_together_from_parts(stored_run, guard, no_server, monkeypatch):
    change(stored_run, "paths.runs_dir", "http:")
    change(stored_run, "data.dir", "${paths.runs_dir}" + no_server.removeprefix("http:"))
    assert f"data.dir={no_server}" in guard.refuses(lambda: open_run(stored_run, None))
    parts = ["paths.runs_dir=http:", f"data.dir='${{paths.runs_dir}}{no_server.removeprefix('http:')}/demo'"]
    (stored_run / ".hydra" / "overrides.yaml").write_text(json.dumps(parts))
    monkeypatch.setattr(sys, "argv", ["train.py", f"resume={stored_run}", "hydra/job_logging=none"])
    with guard.on(), pytest.raises(SystemExit, match=f"data.dir={no_server}/demo: a URL"):
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


def test_an_address_that_the_user_names_is_asked(stored_run, tmp_path, compose, monkeypatch):
    shutil.move("data/demo", "served")
    measure = [f"run_dir={stored_run}", "generate=false"]
    with serve(tmp_path) as server:
        change(stored_run, "data.dir", f"{server.url}/served")
        for wrong in (f"{server.url}/serve", server.url[:-1], "http://", "http:", "*"):
            with pytest.raises(MsencError, match="a URL stored here is not opened"):
                evaluate(compose([*measure, f"urls=['{wrong}']"], "evaluate"))
        assert server.asked == []
        evaluate(compose([*measure, f"urls=['{server.url}/']"], "evaluate"))
        assert "served/dataset.json" in server.asked
        monkeypatch.setenv("MSENC_DATA", server.url)
        open_run(stored_run, None)


def test_a_stored_address_is_replayed_only_if_it_is_named(stored_run, guard):
    stored = "data.dir=s3://bucket/demo"
    (stored_run / ".hydra" / "overrides.yaml").write_text(json.dumps([stored]))
    resume = f"resume={stored_run}"
    assert "'urls=[s3://bucket/demo]'" in guard.refuses(lambda: resumed_arguments([resume]))
    for given in ("urls=[s3://bucket]", "+urls.0=s3://bucket/demo"):
        assert resumed_arguments([resume, given])[:2] == [stored, given]
    assert stored not in resumed_arguments([resume, "data.dir=s3://bucket/other"])
