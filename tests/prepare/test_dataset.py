import csv
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from msenc.config.schema import plain
from msenc.data.datamodule import DialogueDataModule
from msenc.data.dataset import StreamSpec
from msenc.models.connector import Mlp
from msenc.models.conversation import ConversationModel
from msenc.models.encoders import LogMel, Pixels
from msenc.models.llm import load_llm, load_tokenizer
from msenc.prepare import features
from msenc.prepare.dataset import folder_lock, prepare_dataset, prepare_part
from msenc.prepare.features import StreamRecipe
from msenc.prompt import DialogueTokenizer, Prompt
from msenc.raw.annotations import MELD_FILES, read_meld
from msenc.speech.attributes import VoiceSettings
from msenc.store.manifest import DatasetManifest, read_rejections
from msenc.store.shards import ShardReader
from msenc.types import MsencError
from msenc.work.items import Part

KEEP = {"train": 2, "val": 1, "test": 1}


class Killed(BaseException):
    """Ends a preparation as a signal would."""


class Failing(LogMel):
    """Ends at its second batch of clips."""

    def encode(self, clips):
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls == 2:
            raise Killed
        return super().encode(clips)


@pytest.fixture
def root(demo_home, tmp_path):
    """A folder in MELD's shape: the demo's first dialogues, with their clips."""
    source, root = demo_home / "data" / "demo-raw", tmp_path / "raw"
    for split, (name, clips) in MELD_FILES.items():
        (root / clips).mkdir(parents=True)
        with (source / name).open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.DictReader(file) if int(row["Dialogue_ID"]) < KEEP[split]]
        write_rows(root / name, rows)
        for row in rows:
            clip = f"dia{row['Dialogue_ID']}_utt{row['Utterance_ID']}.mp4"
            shutil.copy(source / clips / clip, root / clips / clip)
    return root


def write_rows(path, rows):
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def change_text(root, old, new):
    path = root / MELD_FILES["train"][0]
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def audio(make=LogMel, dim=8, num_mels=8):
    settings = {"sample_rate": 16000, "n_fft": 512, "hop_s": 0.05, "num_mels": num_mels}
    return StreamRecipe("audio", "logmel", dim, partial(make, **settings), settings)


def video(size=4):
    return StreamRecipe("video", "pixels", size**2, partial(Pixels, fps=2, size=size), {"fps": 2, "size": size})


def prepare(root, folder, *streams):
    return prepare_dataset("meld", read_meld(root), root, folder, list(streams), num_workers=0)


def refuse():
    raise AssertionError("nothing is left to encode")


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def stamps(folder):
    """When each file below a stream's folder was written."""
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.glob("*/*")}


def written_anew(before, after):
    return {name.split("/")[0] for name in after if before.get(name) != after[name]}


def listed(folder):
    return {(r.id, r.what, r.reason) for r in read_rejections(folder / "rejected.csv")}


# ------------------------------------------------------------------------------------------------ what is made


def test_manifest_counts_what_was_made(root, tmp_path):
    manifest = prepare(root, tmp_path / "out", audio(), video())
    assert DatasetManifest.read(tmp_path / "out") == manifest
    assert list(manifest.splits) == ["train", "val", "test"]
    for split, counts in manifest.splits.items():
        reader = ShardReader(tmp_path / "out" / "turns", split)
        turns = [len(lengths) for lengths in reader.lengths]
        assert (counts.dialogues, counts.utterances) == (KEEP[split], sum(turns))
        assert counts.samples == sum(n - 1 for n in turns)
        for name in ("audio-logmel", "video-pixels"):
            assert manifest.streams[name].utterances[split] == sum(turns)
            assert ShardReader(tmp_path / "out" / name, split).ids == reader.ids
    assert manifest.streams["audio-logmel"].dim == 8
    assert manifest.streams["video-pixels"].dim == 16
    assert manifest.rejected == {}
    assert listed(tmp_path / "out") == set()


def test_a_second_call_makes_nothing(root, tmp_path):
    first = prepare(root, tmp_path / "out", audio(), video())
    before = stamps(tmp_path / "out")
    assert prepare(root, tmp_path / "out", audio(), video()) == first
    assert stamps(tmp_path / "out") == before


def test_only_what_changed_is_made_anew(root, tmp_path):
    out = tmp_path / "out"
    first = prepare(root, out, audio(), video())
    before = stamps(out)
    manifest = prepare(root, out, audio(), video(size=5))
    after = stamps(out)
    assert written_anew(before, after) == {"video-pixels"}
    assert manifest.streams["video-pixels"].dim == 25
    assert manifest.streams["audio-logmel"] == first.streams["audio-logmel"]

    clips = sorted((root / "train_splits").iterdir())
    shutil.copy(max(clips, key=lambda p: p.stat().st_size), min(clips, key=lambda p: p.stat().st_size))
    before = after
    prepare(root, out, audio())
    after = stamps(out)
    assert written_anew(before, after) == {"audio-logmel"}

    change_text(root, "I am in", "We are in")
    before = after
    prepare(root, out, audio(), video(size=5))
    assert written_anew(before, stamps(out)) == {"turns", "audio-logmel", "video-pixels"}


def test_streams_of_other_encoders_stay_while_the_turns_do(root, tmp_path):
    out = tmp_path / "out"
    prepare(root, out, audio())
    assert list(prepare(root, out, video()).streams) == ["turns", "audio-logmel", "video-pixels"]
    assert set(prepare(root, out).streams) == {"turns", "audio-logmel", "video-pixels"}
    change_text(root, "I am in", "We are in")
    assert set(prepare(root, out).streams) == {"turns"}  # the features were made from other turns


# ------------------------------------------------------------------------------------------------ rejections


def test_missing_clips_are_listed_counted_and_the_dialogue_stays(root, tmp_path, tiny_models):
    out = tmp_path / "out"
    (root / "train_splits" / "dia0_utt1.mp4").unlink()
    (root / "train_splits" / "dia1_utt0.mp4").write_bytes(b"no clip at all")
    manifest = prepare(root, out, audio())
    assert listed(out) == {
        ("meld/train/dia0/utt1", "audio", "clip missing"),
        ("meld/train/dia1/utt0", "audio", "clip corrupt"),
    }
    assert manifest.rejected == {"audio: clip missing": 1, "audio: clip corrupt": 1}
    assert manifest.streams["audio-logmel"].utterances["train"] == manifest.splits["train"].utterances - 2
    assert manifest.splits["train"].dialogues == 2

    # A reused stream's rejections are still listed, whether it is asked for again or only kept.
    for streams in ([audio()], [], [video()]):
        again = prepare(root, out, *streams)
        assert again.rejected["audio: clip missing"] == 1
        assert ("meld/train/dia0/utt1", "audio", "clip missing") in listed(out)
    assert ("meld/train/dia0/utt1", "video", "clip missing") in listed(out)
    assert again.rejected["video: clip missing"] == 1

    # The dialogues still train: without the stream in that turn, with it in the others.
    prompt = Prompt(instruction="Talk.\n", turn="{speaker}:{video}{audio} {text}\n", response="{speaker}:")
    llm = load_llm(str(tiny_models["llama"]), freeze=True)
    tokenizer = DialogueTokenizer(prompt, load_tokenizer(str(tiny_models["llama"])))
    specs = {"audio": StreamSpec("logmel", 8, 2), "video": StreamSpec("pixels", 16, 3)}
    datamodule = DialogueDataModule(out, specs, tokenizer, batch_size=2)
    datamodule.setup()
    dataset = datamodule.dataset("train")
    present = {
        id: [f is not None for f in features["audio"]] for id, (_, features) in zip(dataset.ids, dataset, strict=True)
    }
    assert present["meld/train/dia0"][:3] == [True, False, True]
    assert present["meld/train/dia1"][:2] == [False, True]
    batch = next(iter(datamodule.eval_dataloader("train")))
    assert len(batch.target_ids) == manifest.splits["train"].samples
    turns_read = sum(len(p) - 1 for p in present.values())
    assert sum(map(len, batch.streams["audio"].lengths)) == turns_read - 2
    model = ConversationModel(llm, {name: Mlp(s.dim, 16, s.num_queries, 8) for name, s in specs.items()})
    loss = model(batch).nll.sum()
    loss.backward()
    assert torch.isfinite(loss)
    assert model.connectors["audio"].layers[0].weight.grad.abs().sum() > 0


def test_two_encoders_without_the_same_clip_list_it_once(root, tmp_path):
    out = tmp_path / "out"
    (root / "train_splits" / "dia0_utt1.mp4").unlink()
    prepare(root, out, audio())
    other = audio(num_mels=6, dim=6)
    manifest = prepare(root, out, StreamRecipe("audio", "small", 6, other.make_encoder, other.settings))
    assert set(manifest.streams) == {"turns", "audio-logmel", "audio-small"}
    assert manifest.rejected == {"audio: clip missing": 1}


def test_an_encoder_of_another_width_is_refused(root, tmp_path):
    with pytest.raises(
        MsencError,
        match=r"model\.streams\.audio: the encoder 'logmel' gives features 8 wide, the config says dim=80\. "
        r"Set model\.streams\.audio\.dim=8",
    ):
        prepare(root, tmp_path / "out", audio(dim=80))
    assert not (tmp_path / "out" / "audio-logmel").exists()
    assert not (tmp_path / "out" / "dataset.json").exists()


# ------------------------------------------------------------------------------------------------ interruptions


def test_an_end_in_the_middle_leaves_nothing_half_made(root, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(Killed):
        prepare(root, out, audio(Failing))
    assert {p.name for p in out.iterdir() if not p.name.startswith(".")} == {"turns", "clip-hashes.json"}
    with pytest.raises(MsencError, match=r"dataset\.json: missing"):
        DatasetManifest.read(out)
    assert list(prepare(root, out, audio()).streams) == ["turns", "audio-logmel"]


def test_an_end_in_the_middle_leaves_what_was_there(root, tmp_path):
    out = tmp_path / "out"
    first = prepare(root, out, video())
    manifest, before = (out / "dataset.json").read_bytes(), stamps(out)
    with pytest.raises(Killed):
        prepare(root, out, video(), audio(Failing))
    assert (out / "dataset.json").read_bytes() == manifest
    assert stamps(out) == before
    assert DatasetManifest.read(out) == first
    datamodule = DialogueDataModule(out, {"video": StreamSpec("pixels", 16, 3)}, tokenizer=None, batch_size=1)
    datamodule.setup()
    assert datamodule.dataset("train").streams["video"].read("meld/train/dia0")["features.npy"].shape[1] == 16


def test_new_turns_beside_old_features_are_refused_until_prepared_again(root, tmp_path):
    out = tmp_path / "out"
    prepare(root, out, audio(), video())
    change_text(root, "I am in", "We are in")
    with pytest.raises(Killed):
        prepare(root, out, audio(Failing), video())
    specs = {"audio": StreamSpec("logmel", 8, 2)}
    with pytest.raises(MsencError, match=r"turns: found shards with hash .* a preparation was interrupted"):
        DialogueDataModule(out, specs, tokenizer=None, batch_size=1).setup()
    prepare(root, out, audio())
    DialogueDataModule(out, specs, tokenizer=None, batch_size=1).setup()


def test_an_index_that_lost_a_dialogue_is_refused_and_made_anew(root, tmp_path):
    out = tmp_path / "out"
    manifest = prepare(root, out, audio())
    path = out / "audio-logmel" / "index.json"
    whole = path.read_bytes()
    index = json.loads(whole)
    index["samples"].pop()
    path.write_text(json.dumps(index))
    specs = {"audio": StreamSpec("logmel", 8, 2)}
    with pytest.raises(MsencError, match=r"audio-logmel: its index names .* utterances, dataset\.json"):
        DialogueDataModule(out, specs, tokenizer=None, batch_size=1).setup()
    assert prepare(root, out, audio()) == manifest
    assert path.read_bytes() == whole


def test_a_stream_remade_without_its_manifest_is_not_kept(root, tmp_path):
    out = tmp_path / "out"
    prepare(root, out, audio(), video())
    refused = StreamRecipe("video", "other", 17, partial(Pixels, fps=2, size=4), {})
    with pytest.raises(MsencError, match="16 wide"):  # the audio is written anew before the next stream fails
        prepare(root, out, audio(num_mels=6, dim=6), refused)
    assert set(prepare(root, out).streams) == {"turns", "video-pixels"}


# ------------------------------------------------------------------------------------------------ parts


def test_parts_make_what_one_run_makes(root, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "MIN_ITEM_UTTERANCES", 1)  # an item per dialogue
    voice = VoiceSettings(levels=2)
    recipes = [audio(), video()]
    whole = prepare_dataset("meld", read_meld(root), root, tmp_path / "whole", recipes, 0, voice)
    arguments = (read_meld(root), root, tmp_path / "parts", recipes, 0, voice)
    assert prepare_part(*arguments, Part(1, 3)) == [
        "audio-logmel: 2 of 4 items remain, of the parts 2/3, 3/3",
        "video-pixels: 2 of 4 items remain, of the parts 2/3, 3/3",
    ]
    remaining = prepare_part(*arguments, Part(3, 3))
    assert [r.split(": ")[1] for r in remaining] == ["1 of 4 items remain, of the parts 2/3"] * 2
    assert not (tmp_path / "parts" / "turns").exists()
    assert prepare_part(*arguments, Part(2, 3)) == []
    built = [replace(recipe, make_encoder=refuse) for recipe in recipes]
    assert prepare_dataset("meld", read_meld(root), root, tmp_path / "parts", built, 0, voice) == whole
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert prepare_part(*arguments[:3], built, 0, voice, Part(2, 3)) == []  # made once, no part has work


def test_the_last_part_makes_the_shards(root, compose, tmp_path, capsys, monkeypatch):
    from msenc.pipelines.prepare import prepare

    monkeypatch.setattr(features, "MIN_ITEM_UTTERANCES", 10)
    arguments = ["data=meld", f"data.root={root}", f"data.dir={tmp_path / 'out'}", "modality=text_audio"]
    arguments.append("prepare_workers=0")
    assert prepare(compose([*arguments, "part=1/2"], "prepare")) is None
    said = capsys.readouterr().out
    assert "Part 1/2 is done." in said
    assert "audio-logmel: 1 of 2 items remain, of the parts 2/2" in said
    assert "The job that completes the last one writes the shards" in said
    last = prepare(compose([*arguments, "part=2/2"], "prepare"))
    assert last == DatasetManifest.read(tmp_path / "out")
    assert list(tmp_path.glob(".out.part-*")) == []
    assert prepare(compose([*arguments, "part=1/2"], "prepare")) == last


def test_status_says_what_is_left_and_how_to_do_it(root, compose, tmp_path, capsys, monkeypatch):
    from msenc.pipelines.prepare import prepare

    monkeypatch.setattr(features, "MIN_ITEM_UTTERANCES", 10)
    out = tmp_path / "out"
    arguments = ["data=meld", f"data.root={root}", f"data.dir={out}", "modality=text_audio", "prepare_workers=0"]

    def status(*more):
        with pytest.raises(SystemExit) as left:
            prepare(compose([*arguments, "status=true", *more], "prepare"))
        assert left.value.code == 1
        return " ".join(re.sub("[│┃]", " ", capsys.readouterr().out).split())

    said = status("part=1/2")
    assert "1/2 0 / 1 0.00 / 0.0" in said
    assert said.count("not begun") == 2
    assert "For the rest: python prepare.py -m part=1/2,2/2" in said
    assert not (out / "dataset.json").exists()

    prepare(compose([*arguments, "part=1/2"], "prepare"))
    capsys.readouterr()
    (tmp_path / ".out.part-2-of-2.lock").touch()  # as a killed process leaves it
    said = status()
    assert re.search(r"1/2 1 / 1 [\d.]+ / [\d.]+ done 2/2 0 / 1 [\d.]+ / [\d.]+ killed or stopped", said)
    assert "For the rest: python prepare.py -m part=2/2" in said
    with folder_lock(out, part=Part(2, 2)):
        assert "2/2 0 / 1" in (said := status())
        assert "running" in said
        assert "All parts that are left are being prepared." in said

    prepare(compose([*arguments, "part=2/2"], "prepare"))
    capsys.readouterr()
    prepare(compose([*arguments, "status=true"], "prepare"))  # exit status 0
    assert f"Complete: {out}" in capsys.readouterr().out.replace("\n", "")


def test_a_killed_part_is_named_by_the_others(root, compose, tmp_path, capsys, monkeypatch):
    from msenc.pipelines.prepare import prepare

    monkeypatch.setattr(features, "MIN_ITEM_UTTERANCES", 10)
    arguments = ["data=meld", f"data.root={root}", f"data.dir={tmp_path / 'out'}", "modality=text_audio"]
    (tmp_path / ".out.part-2-of-2.lock").touch()
    prepare(compose([*arguments, "prepare_workers=0", "part=1/2"], "prepare"))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "Killed" in line]
    assert "Killed or stopped before it was done: part 2/2. python prepare.py -m part=2/2 goes on with it." in line


def test_parts_of_one_command_leave_nothing_in_the_working_folder(root, call_script, tmp_path, monkeypatch, capsys):
    from conftest import ROOT

    before = {path.name for path in ROOT.iterdir()}
    arguments = ["data=meld", f"data.root={root}", f"data.dir={tmp_path / 'out'}", f"paths.data_dir={tmp_path}"]
    call_script("prepare.py", "-m", *arguments, "modality=text_audio", "prepare_workers=0", "part=1/2,2/2")
    assert DatasetManifest.read(tmp_path / "out").streams.keys() == {"turns", "audio-logmel"}
    assert {path.name for path in ROOT.iterdir()} == before
    assert [path.name for path in (tmp_path / ".parts").iterdir()] == ["multirun.yaml"]


def test_features_are_the_same_data_wherever_they_were_encoded(compose):
    from msenc.pipelines.prepare import _recipes

    overrides = ["modality=text_audio", "model/audio=whisper"]
    on_gpu = [*overrides, "+model.streams.audio.encoder.device=cuda"]
    (here,), (there,) = (_recipes(plain(compose(given, "prepare"))) for given in (overrides, on_gpu))
    assert here.settings == there.settings
    assert there.make_encoder.keywords["device"] == "cuda"


def test_a_job_that_a_launcher_lost_is_one_line():
    from msenc.config.messages import refusal

    lost = type("TerminatedWorkerError", (Exception,), {"__module__": "joblib.externals.loky.process_executor"})
    assert refusal(lost("a traceback\nof many lines")).startswith("error: a job of the launcher was killed")
    assert "\n" not in refusal(lost())


def test_parts_run_side_by_side_and_nothing_else_does(tmp_path):
    out, part = tmp_path / "out", Part(1, 2)
    with folder_lock(out, part=part):
        with folder_lock(out, part=Part(2, 2)):
            pass
        with pytest.raises(MsencError, match=r"preparing this folder, or part 1/2 of it"), folder_lock(out, part=part):
            pass
        with pytest.raises(MsencError, match=r"another process is preparing this folder\."), folder_lock(out):
            pass
    with folder_lock(out), pytest.raises(MsencError, match="part 1/2"), folder_lock(out, part=part):
        pass
    with folder_lock(out):
        pass


# ------------------------------------------------------------------------------------------------ one at a time


def test_another_process_that_prepares_the_folder_is_refused(demo_home, compose, tmp_path):
    from msenc.pipelines.prepare import prepare

    folder = tmp_path / "demo"
    cfg = compose(["modality=text", f"data.dir={folder}"], "prepare")
    program = (
        "import sys, pathlib\nfrom msenc.prepare.dataset import folder_lock\n"
        "with folder_lock(pathlib.Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(
        [sys.executable, "-c", program, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    ) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(MsencError, match=r"demo: another process is preparing this folder\. Wait for it"):
            prepare(cfg)
        assert not folder.exists()
        other.stdin.close()
        assert other.wait(30) == 0
    with pytest.raises(
        MsencError, match=r"has generated data with .*sizes"
    ):  # the lock is free; the small demo is another
        prepare(cfg)


# ------------------------------------------------------------------------------------------------ MELD


def meld_root():
    shared = os.environ.get("MSENC_SHARED", "")
    folder = Path(shared) / "data" / "meld"
    if not shared or not folder.is_dir():
        pytest.skip("MSENC_SHARED names no folder with MELD's annotations")
    return folder


def test_real_annotations_prepare_and_train(call_script, train, tmp_path, capsys):
    root, data = meld_root(), tmp_path / "meld"
    call_script("prepare.py", "data=meld", f"data.root={root}", "modality=text", f"data.dir={data}")
    splits = json.loads((data / "dataset.json").read_text(encoding="utf-8"))["splits"]
    assert {s: c["dialogues"] for s, c in splits.items()} == {"train": 1038, "val": 114, "test": 280}
    assert {s: c["samples"] for s, c in splits.items()} == {"train": 8951, "val": 995, "test": 2330}
    assert "8,951" in capsys.readouterr().out

    run = train(
        [
            "data=meld",
            f"data.dir={data}",
            "modality=text",
            "data.batch_size=2",
            "trainer.max_steps=50",
            "trainer.log_every_n_steps=1",
            "evaluate=null",
        ]
    )
    with (run.folder / "logs" / "csv" / "metrics.csv").open(newline="") as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert len(losses) == 50
    assert sum(losses[-10:]) < sum(losses[:10])
