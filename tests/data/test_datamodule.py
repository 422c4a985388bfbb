import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import fsspec
import lightning as L
import pytest
import torch
from file_server import serve

from msenc.data.datamodule import DialogueDataModule
from msenc.data.dataset import StreamSpec
from msenc.models.llm import load_tokenizer
from msenc.prompt import DialogueTokenizer, Prompt, Slot
from msenc.store.location import locate
from msenc.store.manifest import DatasetManifest
from msenc.store.shards import write_stream
from msenc.types import Dialogue, MsencError, Utterance

SPECS = {"audio": StreamSpec("logmel", 80, 2), "video": StreamSpec("pixels", 256, 3)}
COMMAND = "python prepare.py data=demo modality=text_audio"


@pytest.fixture
def prepared(demo_home, tmp_path):
    """A copy of the small demo's shards, to be spoilt."""
    return shutil.copytree(demo_home / "data" / "demo", tmp_path / "demo")


@pytest.fixture
def server(prepared, monkeypatch):
    """Serves `prepared` as ``demo/``."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serve(prepared.parent) as server:
        yield server


@pytest.fixture(scope="module")
def tokenizer(demo_home):
    prompt = Prompt(instruction="A conversation.\n", turn="{speaker}:{video}{audio} {text}\n", response="{speaker}:")
    return DialogueTokenizer(prompt, load_tokenizer(str(demo_home / "data" / "tiny-llm")))


def module_of(folder, tokenizer, streams=("audio",), **options):
    specs = {name: SPECS[name] for name in streams}
    options = {"batch_size": 4, "prepare_command": COMMAND, **options}
    return DialogueDataModule(folder, specs, tokenizer, **options)


def refusal(datamodule, split="train"):
    """What is said at `setup`, or else when the split's data is read."""

    def read():
        datamodule.setup()
        return datamodule.dataset(split)[0]

    with pytest.raises(MsencError) as caught:
        read()
    return str(caught.value)


def test_windows_of_a_stream_that_is_not_read_are_refused(prepared, tokenizer):
    prompt = dataclasses.replace(tokenizer.prompt, windows={"audio": 100, "video": 9})
    windowed = DialogueTokenizer(prompt, tokenizer.tokenizer)
    with pytest.raises(MsencError, match=r"prompt\.windows: video is not a stream of this modality"):
        module_of(prepared, windowed, ("audio",)).lengths("train")
    datamodule = module_of(prepared, windowed, ("audio", "video"))
    with_windows, without = (m.dropped_turns("train") for m in (datamodule, module_of(prepared, tokenizer)))
    assert with_windows["dropped_turns"] > without["dropped_turns"] == 0
    assert datamodule.dataset("train")[0][0].windows


# ------------------------------------------------------------------------------------------------ order


class Recorder(L.LightningModule):
    """Trains nothing; notes which dialogues each epoch brings, in order."""

    def __init__(self):
        super().__init__()
        self.epochs = []
        self.automatic_optimization = False

    def on_train_epoch_start(self):
        self.epochs.append([])

    def training_step(self, batch):
        self.epochs[-1] += dict.fromkeys(id for id, _ in batch.target_ids)

    def validation_step(self, batch):
        pass

    def configure_optimizers(self):
        return None


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*returned `None`")
def test_each_epoch_brings_all_dialogues_in_another_order(prepared, tokenizer, tmp_path):
    def epochs(seed):
        recorder = Recorder()
        silent = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = L.Trainer(
            max_epochs=3,
            accelerator="cpu",
            limit_val_batches=0,
            enable_checkpointing=False,
            default_root_dir=tmp_path,
            **silent,
        )
        trainer.fit(recorder, datamodule=module_of(prepared, tokenizer, (), seed=seed))
        return recorder.epochs

    first = epochs(1)
    ids = module_of(prepared, tokenizer, ()).dataset("train").ids
    assert len(ids) == 16
    assert all(sorted(epoch) == sorted(ids) for epoch in first)
    assert len(set(map(tuple, first))) == 3
    assert epochs(1) == first
    assert epochs(2) != first


def test_loader_processes_change_nothing(prepared, tokenizer):
    streams = ("audio", "video")
    alone, shared = (list(module_of(prepared, tokenizer, streams, num_workers=n).train_dataloader()) for n in (0, 2))
    assert len(alone) == len(shared) == 4
    for one, other in zip(alone, shared, strict=True):
        assert one.target_ids == other.target_ids
        torch.testing.assert_close(one.input_ids, other.input_ids, rtol=0, atol=0)
        torch.testing.assert_close(one.streams["video"].features, other.streams["video"].features, rtol=0, atol=0)


def test_evaluation_keeps_the_order_and_the_limit(prepared, tokenizer):
    datamodule = module_of(prepared, tokenizer)
    datamodule.setup()
    ids = datamodule.dataset("test").ids
    for limit, expected in ((None, ids), (3, ids[:3]), (100, ids)):
        found = [id for batch in datamodule.eval_dataloader("test", limit) for id, _ in batch.target_ids]
        assert list(dict.fromkeys(found)) == expected


# ------------------------------------------------------------------------------------------------ what is read

_opened: list[str] | None = None


def _note_open(event, args):
    if event == "open" and _opened is not None:
        _opened.append(str(args[0]))


@pytest.fixture
def opened(monkeypatch):
    """Names of all files that this process opens while the test runs, however it opens them."""
    if not getattr(sys, "_msenc_test_hook", False):
        sys.addaudithook(_note_open)
        sys._msenc_test_hook = True
    monkeypatch.setattr(sys.modules[__name__], "_opened", found := [])
    return found


@pytest.mark.parametrize("streams", [(), ("audio",), ("video",), ("audio", "video")])
def test_only_the_wanted_streams_are_opened(prepared, tokenizer, opened, streams):
    datamodule = module_of(prepared, tokenizer, streams)
    datamodule.setup()
    for split in ("train", "val", "test"):
        for batch in datamodule.eval_dataloader(split):
            assert set(batch.streams) == set(streams)
    datamodule.dropped_turns("train")
    datamodule.described_targets("train")
    folders = {Path(name).parent.name for name in opened if str(prepared) in name and name.endswith((".tar", ".json"))}
    folders -= {"demo", "lengths"}  # dataset.json, and what is kept of the tokens' numbers
    assert folders == {"turns", *(f"{name}-{SPECS[name].name}" for name in streams)}


@pytest.mark.parametrize("streams", [(), ("audio",), ("audio", "video")])
def test_behind_a_url_only_the_wanted_shards_are_fetched(prepared, tokenizer, server, tmp_path, streams):
    datamodule = module_of(locate(f"{server.url}/demo", tmp_path / "cache"), tokenizer, streams)
    datamodule.setup()
    wanted = ["turns", *(f"{name}-{SPECS[name].name}" for name in streams)]
    indexes = {f"demo/{name}/index.json" for name in wanted}
    assert [datamodule.dataset(split).split for split in ("train", "val", "test")] == ["train", "val", "test"]
    assert sorted(server.asked) == sorted({"demo/dataset.json", *indexes})
    for split in ("train", "val"):
        list(datamodule.eval_dataloader(split))
        list(datamodule.eval_dataloader(split))
    shards = {f"demo/{name}/{split}-000000.tar" for name in wanted for split in ("train", "val")}
    assert sorted(server.asked) == sorted({"demo/dataset.json", *indexes, *shards})
    assert {p.parent.name for p in (tmp_path / "cache").rglob("*.tar")} == set(wanted)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("protocol", ["file", "memory", "http"])
def test_a_url_gives_the_same_batches(prepared, tokenizer, server, tmp_path, protocol):
    memory = fsspec.filesystem("memory")
    memory.put(str(prepared), "/far/demo", recursive=True)
    url = {"file": f"file://{prepared}", "memory": "memory://far/demo", "http": f"{server.url}/demo"}[protocol]
    here = list(module_of(prepared, tokenizer).train_dataloader())
    try:
        there = module_of(locate(url, tmp_path / "cache"), tokenizer, num_workers=2)
        there.setup()  # so that the workers start after this process has used the connection
        loader = there.train_dataloader()
        for _ in range(2):
            for one, other in zip(here, loader, strict=True):
                assert one.target_ids == other.target_ids
                features = one.streams["audio"].features, other.streams["audio"].features
                torch.testing.assert_close(*features, rtol=0, atol=0)
    finally:
        memory.rm("/far", recursive=True)
    shards = [name for name in server.asked if name.endswith(".tar")]
    assert len(set(shards)) == len(shards) == (2 if protocol == "http" else 0)  # for both workers together


def test_a_sample_holds_the_turns_and_their_frames(prepared, tokenizer):
    dataset = module_of(prepared, tokenizer, ("audio", "video")).dataset("val")
    for index in range(len(dataset)):
        dialogue = dataset.dialogue(index)
        tokens, features = dataset[index]
        assert tokens.id == dialogue.id == dataset.ids[index]
        for stream, spec in SPECS.items():
            assert len(features[stream]) == len(dialogue.utterances)
            for turn, frames in enumerate(features[stream]):
                assert frames.shape[1] == spec.dim
                assert Slot(stream) in tokens.turns[turn]


def test_dialogues_of_one_turn_hold_no_target(tmp_path, tokenizer):
    one = Dialogue("x/train/dia0", "train", (Utterance("0", "Ana", "Hi."),))
    two = Dialogue("x/train/dia1", "train", (Utterance("0", "Ana", "Hi."), Utterance("1", "Ben", "Hello.", "a man")))
    lone = Dialogue("x/val/dia0", "val", (Utterance("0", "Ana", "Hi."),))
    samples = [(d.id, d.split, {"turns.json": d.to_json()}) for d in (one, two, lone)]
    index = write_stream(tmp_path / "turns", samples, {})
    DatasetManifest("x", {}, {}, turns_hash=index["hash"]).write(tmp_path)
    datamodule = module_of(tmp_path, tokenizer, ())
    datamodule.setup()
    assert datamodule.dataset("train").ids == ["x/train/dia1"]
    assert datamodule.described_targets("train") == 1
    assert datamodule.common_speakers("train") == ["Ana", "Ben"]
    assert refusal(datamodule, "val").startswith(f"{tmp_path}: the split 'val' has no dialogue of two or more turns")


def test_dropped_turns_are_counted_and_do_not_depend_on_streams(prepared, tokenizer):
    counts = [
        module_of(prepared, tokenizer, streams, max_history_tokens=20).dropped_turns("train")
        for streams in ((), ("audio",), ("audio", "video"))
    ]
    assert counts[0] == counts[1] == counts[2]
    assert 0 < counts[0]["targets_cut"] < counts[0]["targets"]
    assert 0 < counts[0]["dropped_turns"] < counts[0]["history_turns"]
    whole = module_of(prepared, tokenizer, ()).dropped_turns("train")
    assert (whole["targets_cut"], whole["dropped_turns"]) == (0, 0)
    assert whole["history_turns"] == counts[0]["history_turns"]


# ------------------------------------------------------------------------------------------------ refusals


def test_missing_data_is_refused_with_the_command(tmp_path, tokenizer):
    message = refusal(module_of(tmp_path / "nothing", tokenizer))
    assert message.endswith(f"Run: {COMMAND}")
    assert "nothing/dataset.json: missing" in message


def test_missing_data_behind_a_url_is_refused_with_what_to_do(tmp_path, tokenizer, server):
    message = refusal(module_of(locate(f"{server.url}/nothing", tmp_path), tokenizer))
    assert message.startswith(f"{server.url}/nothing/dataset.json: missing")
    assert message.endswith(f"Run: {COMMAND}, and copy the folder to {server.url}/nothing")


def test_another_encoder_is_refused_with_both_names(prepared, tokenizer):
    datamodule = module_of(prepared, tokenizer)
    datamodule.streams = {"audio": StreamSpec("wavlm_large", 1024, 2)}
    message = refusal(datamodule)
    assert re.search(r"found .*audio-logmel \(80 wide\); the config needs audio-wavlm_large \(1024 wide\)", message)
    assert message.endswith(f"Run: {COMMAND}")


def test_another_width_is_refused_with_both_numbers(prepared, tokenizer):
    datamodule = module_of(prepared, tokenizer)
    datamodule.streams = {"audio": StreamSpec("logmel", 64, 2)}
    message = refusal(datamodule)
    assert "the features audio-logmel are 80 wide, the config says model.streams.audio.dim=64" in message


def test_a_stream_that_was_not_prepared_is_refused(prepared, tokenizer):
    manifest = json.loads((prepared / "dataset.json").read_text())
    del manifest["streams"]["video-pixels"]
    (prepared / "dataset.json").write_text(json.dumps(manifest))
    assert "found no video features; the config needs video-pixels" in refusal(
        module_of(prepared, tokenizer, ("video",))
    )


@pytest.mark.parametrize("stream", ["turns", "audio-logmel"])
def test_shards_without_an_index_are_refused(prepared, tokenizer, stream):
    (prepared / stream / "index.json").unlink()
    datamodule = module_of(prepared, tokenizer)
    with pytest.raises(MsencError, match=rf"{stream}/index\.json: missing.*Run: {COMMAND}"):
        datamodule.setup()


@pytest.mark.parametrize("stream", ["turns", "audio-logmel"])
def test_a_flipped_byte_is_refused(prepared, tokenizer, stream):
    path = prepared / stream / "train-000000.tar"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    message = refusal(module_of(prepared, tokenizer))
    assert f"{stream}/train-000000.tar: found content that differs from its sha256 in the index" in message
    assert message.endswith(f"Run: {COMMAND}")
    datamodule = module_of(prepared, tokenizer, verify=False)
    datamodule.setup()
    assert len(datamodule.dataset("train"))
    if stream != "turns":  # one that nobody asked for does not matter
        module_of(prepared, tokenizer, ()).dataset("train")[0]


@pytest.mark.parametrize("stream", ["turns", "audio-logmel"])
def test_shards_other_than_the_manifests_are_refused(prepared, tokenizer, stream):
    # What is left when preparation is killed after a stream was written and before dataset.json was.
    path = prepared / "dataset.json"
    manifest = json.loads(path.read_text())
    before = manifest["streams"][stream]["hash"]
    path.write_text(path.read_text().replace(before, "0" * 64))
    with pytest.raises(
        MsencError, match=rf"{stream}: found shards with hash {before[:12]}, dataset\.json expects 000000000000"
    ):
        module_of(prepared, tokenizer).setup()


def test_an_unknown_split_is_refused(prepared, tokenizer):
    with pytest.raises(MsencError, match="split: found 'dev', expected one of train, val, test"):
        module_of(prepared, tokenizer).dataset("dev")


def test_other_settings_of_the_same_encoder_are_refused(prepared, tokenizer):
    datamodule = module_of(prepared, tokenizer)
    datamodule.streams["audio"] = dataclasses.replace(SPECS["audio"], settings={"hop_s": 0.01, "device": "cuda"})
    with pytest.raises(MsencError, match=r"audio-logmel were made with hop_s=0.04, the config says 0.01\. Correct"):
        datamodule.setup()
    datamodule.streams["audio"] = dataclasses.replace(SPECS["audio"], settings={"hop_s": 0.04, "device": "cuda"})
    datamodule.setup()


# ------------------------------------------------------------------------------------------------ size of a batch


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((8, 4096), "data.batch_size=8 and data.max_tokens_per_batch=4096: set exactly one of them"),
        ((None, None), "data.batch_size=null and data.max_tokens_per_batch=null: set exactly one"),
        ((0, None), "data.batch_size=0: expected 1 or more"),
        ((None, -5), "data.max_tokens_per_batch=-5: expected 1 or more"),
    ],
)
def test_exactly_one_size_is_accepted(tmp_path, tokenizer, sizes, message):
    with pytest.raises(MsencError, match=re.escape(message)):
        module_of(tmp_path, tokenizer, batch_size=sizes[0], max_tokens_per_batch=sizes[1])


@pytest.mark.parametrize("layout", ["dialogue", "sample"])
def test_a_budget_holds_for_real_batches_and_loses_no_target(prepared, tokenizer, layout):
    options = {"batch_size": None, "max_tokens_per_batch": 200, "max_history_tokens": 60, "layout": layout}
    datamodule = module_of(prepared, tokenizer, ("audio", "video"), **options)
    datamodule.setup()
    assert any(unit.turns is not None for unit in datamodule.units("train"))
    whole = module_of(prepared, tokenizer, ("audio", "video"), max_history_tokens=60)
    for split, loader in (("train", datamodule.train_dataloader()), ("val", datamodule.val_dataloader())):
        batches = list(loader)
        assert len(batches) == len(loader)
        assert max(batch.input_ids.numel() for batch in batches) <= 200
        found = [target for batch in batches for target in batch.target_ids]
        expected = [target for batch in whole.eval_dataloader(split) for target in batch.target_ids]
        assert sorted(found) == sorted(expected)
        assert split == "train" or found == expected


def test_a_limit_counts_dialogues_and_not_units(prepared, tokenizer):
    datamodule = module_of(prepared, tokenizer, batch_size=None, max_tokens_per_batch=160, layout="sample")
    found = [target for batch in datamodule.eval_dataloader("train", 3) for target in batch.target_ids]
    ids = datamodule.dataset("train").ids[:3]
    assert found == [
        (id, turn)
        for id, known in zip(ids, datamodule.lengths("train"), strict=False)
        for turn in range(1, len(known.turns))
    ]


def test_processes_divide_validation_and_training(prepared, tokenizer):
    def targets(rank, world_size, name):
        datamodule = module_of(prepared, tokenizer, batch_size=3)
        strategy = SimpleNamespace(root_device=torch.device("cpu"))
        datamodule.trainer = SimpleNamespace(global_rank=rank, world_size=world_size, strategy=strategy)
        return [batch.target_ids for batch in getattr(datamodule, name)()]

    for name in ("train_dataloader", "val_dataloader"):
        whole = targets(0, 1, name)
        shares = [targets(rank, 3, name) for rank in range(3)]
        assert len(whole[-1]) > 0
        for i, batch in enumerate(whole):
            assert sorted(t for share in shares for t in share[i]) == sorted(batch)
    assert [] in [share[-1] for share in shares]  # val's last batch holds one dialogue
