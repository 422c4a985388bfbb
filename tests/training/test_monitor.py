import pytest
import torch
from random_dialogues import NUM_QUERIES
from test_module import loader, make_batches, make_module, make_trainer

from msenc.files import read_json
from msenc.models.connector import QFormer
from msenc.training.monitor import CONSTANT, StreamMonitor, exchange, findings, warnings
from msenc.types import MsencError

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*in eval mode")


@pytest.fixture
def folder(tiny_models):
    return tiny_models["llama"]


def watch(module, batches, folder, targets=64):
    trainer = make_trainer(folder, callbacks=[StreamMonitor(targets)])
    trainer.validate(module, loader(batches), verbose=False)
    return {name: value.item() for name, value in trainer.callback_metrics.items()}


def test_each_utterance_gets_another_ones_queries():
    batch = make_batches([3])[0]
    for stream, queries in NUM_QUERIES.items():
        number = sum(len(f) for f in batch.streams[stream].features)
        exchanged = exchange(batch, stream, number, queries)
        before, after = batch.streams[stream].sources, exchanged.streams[stream].sources
        assert (before // queries != after // queries).all()
        assert torch.equal(before % queries, after % queries)
        assert sorted(set(after.tolist())) == sorted(set(before.tolist()))
        for other in set(batch.streams) - {stream}:
            assert exchanged.streams[other] is batch.streams[other]


def test_a_constant_connector_is_seen_and_one_that_is_not_is_not(folder, tmp_path):
    module = make_module(folder, width=8)
    batches = make_batches([3, 3])
    alive = watch(module, batches, tmp_path)
    assert isinstance(module.model.connectors["audio"], QFormer)
    torch.nn.init.zeros_(module.model.connectors["audio"].in_proj.weight)
    dead = watch(module, batches, tmp_path)
    assert alive["connector/audio/spread"] > CONSTANT > 1e-6 > dead["connector/audio/spread"]
    assert abs(alive["stream/audio/used_nats"]) > 1e-5
    assert dead["stream/audio/used_nats"] == pytest.approx(0, abs=1e-6)
    assert dead["connector/video/spread"] == pytest.approx(alive["connector/video/spread"])
    said = warnings(dead)
    assert [text.partition(":")[0] for text in said if "nearly the same for every utterance" in text] == ["audio"]


def test_no_more_targets_are_looked_at_than_asked_for(folder, tmp_path):
    module, batches = make_module(folder), make_batches([1, 4])
    first = watch(module, batches[:1], tmp_path, targets=1)
    assert watch(module, batches, tmp_path, targets=1)["connector/audio/spread"] == first["connector/audio/spread"]
    with pytest.raises(MsencError, match="targets: found 0"):
        StreamMonitor(0)


def test_a_stream_that_is_not_used_is_said_and_its_names_are_read_back():
    metrics = {"val/loss": 1.0, "connector/audio/spread": 0.3, "stream/audio/used_nats": 0.0001}
    assert findings(metrics) == {"audio": {"spread": 0.3, "used_nats": 0.0001}}
    assert "does not use the stream" in (said := warnings(metrics)[0])
    assert "align=" in said
    assert "align=" not in (said := warnings(metrics, aligned=["audio"])[0])
    assert "other labels (align.labels.audio.source=...) or none ('~align.labels.audio')" in said
    assert warnings({**metrics, "stream/audio/used_nats": 0.1}) == []


def test_a_run_with_a_collapse_made_on_purpose_says_so(train, capsys):
    run = train(
        [
            "model/connector=qformer",
            "modality=text_audio",
            "optimizer.lr=0.02",
            "optimizer.groups.connectors=null",
            "trainer.max_epochs=6",
            "evaluate=null",
        ]
    )
    record = read_json(run.folder / "run.json")
    assert record["metrics"]["connector/audio/spread"] < CONSTANT
    assert "nearly the same for every utterance" in record["warnings"][0]
    assert "nearly the same for every utterance" in " ".join(capsys.readouterr().out.split())
