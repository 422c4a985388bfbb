"""Encoder layers as a choice: stored once, chosen by runs, mixed by connectors, traced and reported."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CONFIGS, SMALL_DEMO, _compose, run_driver
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from safetensors.torch import load_file

from msenc.config.checks import checked
from msenc.data.dataset import DialogueDataset, StreamSpec
from msenc.evaluation.trace import read_trace
from msenc.models.layers import holds
from msenc.pipelines.evaluate import evaluate
from msenc.pipelines.prepare import _recipes, prepare
from msenc.pipelines.train import train as run_train
from msenc.report.collect import collect_runs
from msenc.report.page import render_page
from msenc.report.table import summarise
from msenc.runs.identity import run_settings
from msenc.store.location import locate
from msenc.store.manifest import DatasetManifest
from msenc.store.shards import ShardReader
from msenc.training.assembly import GIVEN
from msenc.training.export import load_export
from msenc.types import MsencError

SHORT = [
    "trainer.max_steps=4",
    "trainer.max_epochs=1",
    "model.connector.hidden_dim=16",
    "decoding.max_new_tokens=4",
]


def audio_of(tiny_models, layers):
    return [
        "model/audio=whisper",
        f"model.streams.audio.encoder.name_or_path={tiny_models['whisper']}",
        "model.streams.audio.dim=16",
        f"model.streams.audio.encoder.layers={layers}",
    ]


def video_of(tiny_models, layers):
    return [
        "model/video=clip",
        f"model.streams.video.encoder.name_or_path={tiny_models['clip']}",
        "model.streams.video.dim=16",
        f"model.streams.video.encoder.layers={layers}",
    ]


@pytest.fixture(scope="module")
def folder(demo_home, tiny_models, tmp_path_factory):
    """The small demo with three layers of the audio, two of the video."""
    folder = tmp_path_factory.mktemp("layers") / "demo"
    overrides = [*SMALL_DEMO, "prepare_workers=0", f"data.dir={folder}"]
    overrides += audio_of(tiny_models, "[2,0,-2]") + video_of(tiny_models, "[1,2]")
    prepare(_compose(overrides, "prepare", demo_home))
    return folder


@pytest.fixture
def prepared(folder, tmp_path):
    """A copy of it, to be prepared again."""
    return shutil.copytree(folder, tmp_path / "again")


def test_layers_are_stored_once_in_each_frames_width(folder):
    manifest = DatasetManifest.read(folder)
    infos = {name: info for name, info in manifest.streams.items() if info.kind != "text"}
    assert {name: info.dim for name, info in infos.items()} == {"audio-whisper_base": 48, "video-clip_vit_b32": 32}
    assert infos["audio-whisper_base"].settings["layers"] == [2, 0, -2]
    reader = ShardReader(folder / "audio-whisper_base", "train")
    assert reader[0]["features.npy"].shape == (sum(reader.lengths[0]), 48)


def test_a_choice_of_none_leaves_settings_as_they_were(compose):
    cfg = compose(["modality=text_audio", "model/audio=wavlm"])
    (recipe,) = _recipes(checked(cfg, GIVEN))
    assert recipe.settings == {
        "_target_": "msenc.models.encoders.SpeechEncoder",
        "name_or_path": "microsoft/wavlm-large",
        "layer": -1,
    }
    assert recipe.dim == 1024
    assert "layers" not in run_settings(cfg)["model"]["streams"]["audio"]["encoder"]
    chosen = compose(["modality=text_audio", "model/audio=wavlm", "model.streams.audio.encoder.layers=[4,-1]"])
    assert run_settings(chosen)["model"]["streams"]["audio"]["encoder"]["layers"] == [4, -1]


def test_a_run_reads_the_layers_that_it_asks_for(folder, tiny_models):
    stored = ShardReader(folder / "audio-whisper_base", "train")
    settings = {**stored.settings, "layers": [-2, 2]}

    spec = StreamSpec("whisper_base", 16, 4, settings)
    dataset = DialogueDataset(locate(str(folder), "unused", None), "train", {"audio": spec}, None)
    members = stored.read(dataset.ids[0])
    first = members["features.npy"][: members["offsets.npy"][1]]
    np.testing.assert_array_equal(dataset.features(0)["audio"][0], np.hstack([first[:, 32:], first[:, :16]]))


@pytest.mark.parametrize(
    ("there", "asked", "is_held"),
    [
        ([0, 1, 2], [2, 0], True),
        ([0, 1], [0, 1], True),
        ([0, 1], [0, 2], False),
        (None, [0], False),
        ([0], None, False),
        (None, None, True),
    ],
)
def test_more_layers_hold_fewer(there, asked, is_held):
    def settings(layers):
        return {"a": 1, "dim": 16 * len(layers or [0]), **({} if layers is None else {"layers": layers})}

    assert holds(settings(there), settings(asked)) is is_held
    assert not holds({**settings(there), "a": 2}, settings(asked))


def test_preparing_fewer_layers_changes_nothing_and_more_are_made(prepared, compose, tiny_models):
    def again(layers):
        overrides = [f"data.dir={prepared}", "prepare_workers=0", "modality=text_audio", *audio_of(tiny_models, layers)]
        prepare(compose([*SMALL_DEMO, *overrides], "prepare"))
        return DatasetManifest.read(prepared).streams["audio-whisper_base"]

    before = DatasetManifest.read(prepared).streams["audio-whisper_base"]
    assert again("[0]") == before
    more = again("[0,1]")
    assert (more.dim, more.settings["layers"]) == (32, [0, 1])
    assert again("null").dim == 16


@pytest.mark.parametrize(
    ("layers", "found"),
    [
        (
            "[0,1]",
            r"hold the layers \[2, 0, -2\], the config asks for \[0, 1\]: missing are \[1\] .*layers=\[2,0,-2,1\]",
        ),
        ("null", r"hold the layers \[2, 0, -2\], the config asks for one output\. Choose among them .*layers=\[-2\]"),
        ("[0,0]", r"model\.streams\.audio\.encoder\.layers: found layer 0 twice"),
        ("[]", r"model\.streams\.audio\.encoder\.layers: found a list of 0, expected numbers"),
    ],
)
def test_layers_that_are_not_there_are_named(folder, tiny_models, train, layers, found):
    data = [f"data.dir={folder}", "data.generate=null"]
    with pytest.raises(MsencError, match=found):
        train([*data, "modality=text_audio", *audio_of(tiny_models, layers)])


def test_data_of_one_output_cannot_give_layers(demo_home, tiny_models, train):
    overrides = ["modality=text_audio", "data.generate=null", *audio_of(tiny_models, "[0,1]")]
    overrides += ["model.streams.audio.name=logmel", "model.streams.audio.dim=80"]
    with pytest.raises(
        MsencError, match=r"hold one output \(layer=-1\), the config asks for \[0, 1\]: missing are \[0, 1\]"
    ):
        train(overrides)


@pytest.mark.parametrize("plus", ["", "+"])
def test_an_encoder_without_layers_says_so(run_script, plus):
    done = run_script("train.py", "modality=text_audio", f"{plus}model.streams.audio.encoder.layers=[1]")
    assert done.returncode == 1
    assert "model.streams.audio.encoder.layers: LogMel has no layers to choose among." in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def run(folder, tiny_models, tmp_path_factory):
    """A run that mixes all layers of audio and video."""
    where = tmp_path_factory.mktemp("mixed") / "run"
    overrides = [f"data.dir={folder}", *SHORT, *audio_of(tiny_models, "[2,0,-2]"), *video_of(tiny_models, "[1,2]")]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        GlobalHydra.instance().hydra.run(
            "train", run_train, [*overrides, f"paths.output_dir={where}"], with_log_configuration=False
        )
    return where


def test_weights_are_logged_and_stand_in_metrics_and_report(run):
    logged = json.loads((run / "metrics.json").read_text())
    names = {name for name in logged if name.startswith("layers/")}
    assert names == {"layers/audio/2", "layers/audio/0", "layers/audio/-2", "layers/video/1", "layers/video/2"}
    assert sum(logged[f"layers/audio/{layer}"] for layer in (2, 0, -2)) == pytest.approx(1, abs=1e-5)
    (found,) = (run / "evaluation").glob("*-test-*/metrics.json")
    layers = json.loads(found.read_text())["layers"]
    assert {stream: list(weights) for stream, weights in layers.items()} == {
        "audio": ["2", "0", "-2"],
        "video": ["1", "2"],
    }
    assert any(abs(weight - 1 / 3) > 1e-4 for weight in layers["audio"].values())  # they have trained
    table = summarise(collect_runs(run))
    page = render_page(table, "Report", [run])
    assert "Which layers of the encoder?" in page
    assert f"{layers['audio']['-2']:.3f}" in page
    values = json.loads(found.read_text())
    values["layers"] = {"audio": {"<b>": 1.0}}
    kept = found.read_text()
    found.write_text(json.dumps(values))
    try:
        with pytest.raises(MsencError, match=r"metrics\.json, layers, audio"):
            render_page(table, "Report", [run])
    finally:
        found.write_text(kept)


def test_a_trace_probes_each_layer(run, compose, capsys):
    evaluate(compose([f"run_dir={run}", "trace=true", "split=train", "generate=false"], "evaluate"))
    (file,) = (run / "evaluation").glob("*-train-*/trace.json")
    streams = read_trace(file)["streams"]
    for stream, layers in (("audio", ("2", "0", "-2")), ("video", ("1", "2"))):
        for label in streams[stream]["labels"].values():
            stations = [station["station"] for station in label["stations"]]
            assert stations[: len(layers) + 2] == [*(f"encoder {layer}" for layer in layers), "encoder", "connector"]
    printed = capsys.readouterr().out
    assert re.search(
        r"\n  Emotion: bits in the encoder's layers: 2: -?\d\.\d\d, 0: -?\d\.\d\d, -2: -?\d\.\d\d\n", printed
    )
    assert re.search(r"\nvideo: weights of the encoder's layers: 1: 0\.\d\d, 2: 0\.\d\d\n", printed)


def test_an_export_mixes_the_same_layers(run, tmp_path):
    model, _ = load_export(run / "export")
    audio = model.connectors["audio"]
    assert audio.mixture.layers == (2, 0, -2)
    stored = load_file(run / "export" / "connectors.safetensors")
    torch.testing.assert_close(audio.mixture.logits.data, stored["audio.mixture.logits"])
    assert audio(torch.randn(2, 5, 48), torch.ones(2, 5, dtype=torch.bool)).shape[:2] == (2, 4)


@pytest.mark.parametrize("layers", ["[0,2,-2]", "[2,0]"])
def test_connectors_of_other_layers_are_no_start(run, folder, tiny_models, train, layers):
    overrides = [
        f"data.dir={folder}",
        *SHORT,
        "evaluate=null",
        f"init_from.connectors={run}",
        *video_of(tiny_models, "[1,2]"),
    ]
    with pytest.raises(MsencError, match=r"encoder\.layers=\[2, 0, -2\] there, .* here"):
        train([*overrides, *audio_of(tiny_models, layers)])


def test_a_run_starts_from_the_mixture_of_another(run, folder, tiny_models, train):
    overrides = [
        f"data.dir={folder}",
        *SHORT,
        "evaluate=null",
        f"init_from.connectors={run}",
        "optimizer.lr=0",
        "optimizer.groups.connectors.lr=0",
    ]
    started = train([*overrides, *audio_of(tiny_models, "[2,0,-2]"), *video_of(tiny_models, "[1,2]")], "started")
    own = load_export(started.folder / "export")[0].connectors["audio"].mixture.logits
    torch.testing.assert_close(own, load_export(run / "export")[0].connectors["audio"].mixture.logits)


@pytest.mark.parametrize(
    "more", [["align=column", "align.steps=5"], ["data.drop={audio:0.9}"], ["model/connector=qformer"]]
)
def test_a_run_of_some_of_the_stored_layers(folder, tiny_models, train, more):
    column = ["align.labels={audio:{source:column,column:Emotion}}"] if "align=column" in more else []
    overrides = [f"data.dir={folder}", "modality=text_audio", *SHORT, "evaluate=null", *column]
    overrides += [*audio_of(tiny_models, "[-2,2]"), *more]
    if "model/connector=qformer" in more:
        overrides.append("model.connector.num_layers=1")
    done = train(overrides)
    weights = json.loads((done.folder / "metrics.json").read_text())
    assert {name for name in weights if name.startswith("layers/")} == {"layers/audio/-2", "layers/audio/2"}


def test_one_layer_of_several_needs_no_mixture(folder, tiny_models, train):
    done = train([f"data.dir={folder}", "modality=text_audio", *SHORT, "evaluate=null", *audio_of(tiny_models, "[0]")])
    assert not any(name.startswith("layers/") for name in json.loads((done.folder / "metrics.json").read_text()))
    assert not any("mixture" in name for name in load_export(done.folder / "export")[0].state_dict())


def test_two_processes_mix_layers_as_one(folder, tiny_models, tmp_path):
    """Whether each has the whole model (DDP) or its share (FSDP2), some steps without any audio."""
    shared = ["modality=text_audio", *SHORT, "trainer.max_steps=6", "trainer.max_epochs=2", "data.batch_size=3"]
    shared += [
        f"data.dir={folder}",
        "evaluate=null",
        "optimizer.lr=0.01",
        "model.llm.dropout=0",
        "data.drop={audio:0.8}",
    ]
    cpu = ["trainer.accelerator=cpu", "trainer.precision=32-true"]
    trainers = {"one": [], "fsdp2": ["trainer=fsdp2", *cpu], "ddp": ["trainer=ddp", *cpu]}
    specs = []
    for name, trainer in trainers.items():
        run = tmp_path / name / "run"
        run.parent.mkdir()
        first = [*shared, *audio_of(tiny_models, "[2,0,-2]"), *trainer, f"paths.output_dir={run}"]
        processes = [1 if name == "one" else 2]
        specs.append({"folder": str(run), "first": first, "again": [], "moments": [], "processes": processes})
    results = run_driver(Path(__file__).parent / "kill_driver.py", specs, tmp_path)
    for starts in results:
        assert starts[-1]["status"] == 0, starts[-1]["said"]
    one, *others = (json.loads((tmp_path / name / "run" / "metrics.json").read_text()) for name in trainers)
    names = [name for name in one if name.startswith("layers/")]
    assert len(names) == 3
    moved = [one[name] - 1 / 3 for name in names]
    assert max(map(abs, moved)) > 1e-4
    for other in others:
        assert [other[name] - 1 / 3 for name in names] == pytest.approx(moved, rel=1e-2, abs=1e-6)
