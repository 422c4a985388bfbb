"""A run and its data, written at commit 0ff0afd, before modules moved: still read, found, evaluated and talked to.

`old_run.tar.xz` holds what these commands left, but for raw material and TensorBoard's log:

    python train.py 'data.generate.sizes={train:2,val:1,test:1}' model/llm=tiny_lora model.llm_recipe.num_dialogues=16 \
        model.llm_recipe.attempts=1 model.llm_recipe.hidden_size=16 model.llm_recipe.num_layers=1 \
        model.llm_recipe.num_heads=2 model.llm_recipe.vocab_size=300 model.streams.audio.dim=16 \
        model.streams.video.dim=16 model.streams.video.encoder.size=4 model.connector.hidden_dim=16 \
        model.connector.num_blocks=1 trainer.max_epochs=1 hydra.run.dir=runs/single/old
"""

import tarfile
from pathlib import Path

import pytest
import torch

from msenc.evaluation.losses import read_predictions
from msenc.files import read_json
from msenc.pipelines.evaluate import evaluate
from msenc.pipelines.report import report
from msenc.pipelines.respond import respond
from msenc.runs.find import find_run
from msenc.runs.identity import data_hashes, run_identity
from msenc.runs.record import read_run
from msenc.training.assembly import build_datamodule
from msenc.training.export import load_export
from msenc.training.restore import load_trained, open_run
from msenc.types import MsencError

ARCHIVE = Path(__file__).parent / "old_run.tar.xz"
RUN = Path("runs/single/old")


@pytest.fixture
def old(tmp_path, monkeypatch, home) -> Path:
    """The run's folder, as its config names it: relative to where it was written."""
    with tarfile.open(ARCHIVE) as file:
        file.extractall(tmp_path, filter="data")
    monkeypatch.delenv("MSENC_DATA")
    monkeypatch.delenv("MSENC_RUNS")
    monkeypatch.chdir(tmp_path)
    return RUN


def test_its_losses_are_measured_again(old, compose):
    """To the last digit that is written, which another processor may round the other way."""
    (before,) = old.glob("evaluation/demo-test-*")
    evaluate(compose([f"run_dir={old}", "split=test", "overwrite=true", "device=cpu"], "evaluate"))
    (after,) = old.glob("evaluation/demo-test-*")
    assert after == before
    with tarfile.open(ARCHIVE) as file:
        file.extractall("again", filter="data")
    rows, again = list(read_predictions("again" / before)), list(read_predictions(after))
    losses = [[row.pop("nll") for row in side] for side in (again, rows)]
    for found, known in zip(*losses, strict=True):
        assert found == pytest.approx(known, rel=0, abs=1.1e-6)
    # What the reply's description has beyond attributes is of a later version.
    assert [{k: v for k, v in row.items() if k in known} for row, known in zip(again, rows, strict=True)] == rows


def test_it_is_found_by_its_identity(old):
    record, config = read_run(old)
    _, plain_config = open_run(old, None)
    datamodule = build_datamodule(plain_config, "")
    datamodule.setup()
    assert run_identity(config, data_hashes(plain_config, datamodule)) == record["identity"]
    assert find_run([Path("runs")], record["identity"]) == old


def test_it_answers(old, compose):
    respond(compose([f"run_dir={old}", "text=Hello.", "out=reply", "decoding.max_new_tokens=4"], "respond"))
    assert read_json(Path("reply/reply.json"))["replies"]


@pytest.mark.parametrize(("command", "name"), [(evaluate, "evaluate"), (respond, "respond")])
def test_from_another_folder_it_says_where_its_llm_is_and_asks_no_hub(
    old, compose, command, name, tmp_path, monkeypatch
):
    run = old.resolve()
    (elsewhere := tmp_path / "else").mkdir()
    monkeypatch.chdir(elsewhere)
    text = {"evaluate": ["split=val", "generate=false"], "respond": ["text=Hello.", "decoding.max_new_tokens=4"]}[name]
    with pytest.raises(MsencError, match=f"data/tiny-llm: no such folder in {elsewhere}") as refused:
        command(compose([f"run_dir={run}", *text], name))
    advice = str(refused.value).rpartition("where that is: ")[2]
    assert advice == f"data_dir={tmp_path / 'data'}"
    command(compose([f"run_dir={run}", *text, advice], name))


def test_it_is_reported(old, compose, capsys):
    report(compose([f"sweep_dir={old}"], "report"))
    (page,) = old.rglob("report.html")
    assert f"Written: {page}, and beside it table.md, " in capsys.readouterr().out
    assert "I see you are sad. This is the garden. Do face and voice agree?" in page.read_text()


def test_its_export_is_its_model(old):
    record, config = open_run(old, None)
    trained = load_trained(old, "best", record, config).state_dict()
    exported, _ = load_export(old / "export")
    own = exported.state_dict()
    assert own.keys() == trained.keys()
    assert all(torch.equal(own[name], trained[name]) for name in own)
