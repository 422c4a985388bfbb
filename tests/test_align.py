"""The alignment stage: labels -> aligned connectors, kept for other runs; and runs that start from another run."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import SMALL_DEMO

from msenc.files import read_json
from msenc.store.labels import LABELS, VOICE_TURNS
from msenc.training import align as alignment
from msenc.types import MsencError

COLUMN = ["align=column", "align.steps=60", "model/connector=mlp"]
BARE = ["align=column", "align.steps=60"]
SMALL = ["model/connector=mlp", "model/llm=tiny_lora", "model.llm.lora.r=4"]
FAST = ["trainer.max_steps=3", "data.batch_size=8", "evaluate=null", "modality=text_audio_video"]


@pytest.fixture
def fresh(train, tmp_path):
    """``fresh(overrides, folder)``: a run whose alignments lie in a folder of the test's own."""
    return lambda overrides, folder="run": train([*overrides, f"paths.runs_dir={tmp_path / 'runs'}"], folder)


def weights(folder, name="last"):
    return torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)["state_dict"]


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def test_stages_one_by_one_equal_the_one_command(fresh):
    whole = fresh([*COLUMN, *FAST], "whole").folder
    first = fresh([*COLUMN, *FAST, "stage=align"], "first").folder
    record = read_json(first / "run.json")
    assert (record["status"], record["stop_reason"]) == ("finished", "connectors aligned (stage=align)")
    second = fresh(["model/connector=mlp", *FAST, f"init_from.connectors={first}"], "second").folder
    assert_equal(weights(whole), weights(second))
    assert not torch.equal(
        weights(whole)["model.connectors.video.out_norm.gain"], weights(first)["model.connectors.video.out_norm.gain"]
    )
    cold = fresh(["model/connector=mlp", *FAST], "cold").folder
    assert any(not torch.equal(t, weights(cold)[n]) for n, t in weights(whole).items())


def test_runs_that_share_an_alignment_make_it_once_and_say_what_it_was_made_of(fresh, tmp_path, capsys):
    one = read_json(fresh([*COLUMN, *FAST], "one").folder / "run.json")
    made = sorted(path.name for path in (tmp_path / "runs" / "alignments").iterdir())
    assert [name.partition("-")[0] for name in made] == ["audio", "video"]
    capsys.readouterr()
    two = read_json(fresh([*COLUMN, *FAST, "modality=text_video", "seed=2"], "two").folder / "run.json")
    assert "already aligned, loaded from" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "runs" / "alignments").iterdir()) == made
    assert two["alignments"]["video"]["reused"]
    assert not one["alignments"]["video"]["reused"]
    assert two["alignments"]["video"]["weights"] == one["alignments"]["video"]["weights"]
    assert one["labels"]["video"] == two["labels"]["video"]
    assert (one["labels"]["video"]["source"], one["labels"]["video"]["different"]) == ("Emotion", 2)
    other = read_json(fresh([*COLUMN, *FAST, "align.seed=2"], "other").folder / "run.json")
    assert other["alignments"]["video"]["weights"] != one["alignments"]["video"]["weights"]
    assert other["identity"] != one["identity"]


def test_measured_voices_are_labels_and_the_turns_stay_as_they_are(fresh, demo_home):
    before = read_json(demo_home / "data" / "demo" / "dataset.json")["turns_hash"]
    folder = fresh(["align=words", "align.steps=4", *FAST, "modality=text_audio", *SMALL_DEMO]).folder
    record = read_json(folder / "run.json")
    assert record["labels"]["audio"]["source"] == "description"
    assert record["labels"]["audio"]["different"] > 1
    assert record["turns_hash"] == before
    assert (demo_home / "data" / "demo" / VOICE_TURNS).is_file()


def test_without_labels_an_utterance_is_told_by_its_own_words(fresh):
    record = read_json(fresh(["align=contrastive", "align.steps=2", *FAST, "stage=align"]).folder / "run.json")
    assert {stream: facts["source"] for stream, facts in record["labels"].items()} == {
        "audio": "transcript",
        "video": "transcript",
    }


def test_the_frozen_llm_comes_to_write_the_words_from_the_clip_alone(fresh, monkeypatch):
    fit, losses = alignment.fit, []

    def noted(*given):
        *others, on_step = given
        fit(*others, lambda step, loss, take: losses.append(loss) or on_step(step, loss, take))

    monkeypatch.setattr(alignment, "fit", noted)
    fresh([*COLUMN, *FAST, "stage=align", "align.objective=llm", "modality=text_video"])
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


def test_a_modality_without_streams_has_nothing_to_align(fresh):
    assert "labels" not in read_json(fresh([*BARE, *FAST, "modality=text"]).folder / "run.json")


@pytest.fixture
def own_data(demo_home, tmp_path):
    """A copy of the demo whose labels a test may spoil."""
    shutil.copytree(demo_home / "data" / "demo", tmp_path / "data")
    return tmp_path / "data"


def labels_of(folder):
    return [json.loads(line) for line in (folder / LABELS).read_text().splitlines()]


def write(folder, rows):
    (folder / LABELS).write_text("".join(json.dumps(row) + "\n" for row in rows))


def spoil_missing(folder):
    (folder / LABELS).unlink()


def spoil_one(folder):
    write(folder, [{**row, "Emotion": "joy"} for row in labels_of(folder)])


def spoil_other(folder):
    write(folder, [{**row, "id": row["id"].replace("demo/", "meld/")} for row in labels_of(folder)])


@pytest.mark.parametrize(
    ("spoil", "overrides", "said"),
    [
        (spoil_missing, [], r"labels\.jsonl: missing.*prepare\.py"),
        (spoil_one, [], r"align\.labels\.video: all .* have the same label 'joy'"),
        (spoil_other, [], r"no utterance of the train split has a label.*labels of meld/.*the data has demo/"),
        (None, ["align.labels.video.column=Emotoin"], r"column=Emotoin: no such column.*Did you mean 'Emotion'"),
        (None, ["align.labels.video.source=colunm"], r"source: found 'colunm'.*Did you mean 'column'"),
        (None, ["align.labels.video.attributes=[pich]"], r"no attribute 'pich'.*Did you mean 'pitch'"),
        (None, ["align.objective=lm"], r"align\.objective: found 'lm'"),
        (None, ["stage=algin"], r"stage=algin: expected align"),
        (
            None,
            ["~align.labels.video", "stage=align"],
            r"stage=align: found modality=text_video has no stream to align",
        ),
        (None, ["model.tie_connectors=true"], r"tied connectors cannot be aligned"),
    ],
)
def test_labels_and_settings_that_teach_nothing_are_refused(fresh, own_data, spoil, overrides, said):
    if spoil is not None:
        spoil(own_data)
    own = ["data.name=demo", f"data.dir={own_data}", "data.generate=null", "modality=text_video"]
    with pytest.raises(MsencError, match=said):
        fresh([*COLUMN, "align.steps=1", *FAST, *own, *overrides])


# ------------------------------------------------------------------------------------------ another run


@pytest.fixture(scope="module")
def trained(demo_home, tmp_path_factory):
    """A finished run with connectors and an adapter."""
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from msenc.pipelines.train import train as run

    folder = tmp_path_factory.mktemp("trained") / "run"
    with initialize_config_dir(str(Path(__file__).parents[1] / "configs"), version_base="1.3"):
        overrides = [*SMALL, *FAST, f"paths.output_dir={folder}"]
        GlobalHydra.instance().hydra.run("train", run, overrides, with_log_configuration=False)
    return folder


SAME = [*SMALL, *FAST, "optimizer.lr=0", "optimizer.groups.connectors=null"]
"""Nothing moves, so that a run ends where it starts."""


def part(state, prefix):
    return {name: tensor for name, tensor in state.items() if name.startswith(prefix)}


@pytest.mark.parametrize(
    ("argument", "taken"),
    [
        ("init_from.run", ("model.connectors.", "model.llm.")),
        ("init_from.connectors", ("model.connectors.",)),
        ("init_from.adapter", ("model.llm.",)),
    ],
)
def test_a_run_starts_from_what_another_has_trained(train, trained, argument, taken):
    folder = train([*SAME, f"{argument}={trained}"]).folder
    best, own = weights(trained, "best"), weights(folder)
    for prefix in ("model.connectors.", "model.llm."):
        if prefix in taken:
            assert_equal(part(own, prefix), part(best, prefix))
        else:
            assert any(not torch.equal(t, best[n]) for n, t in part(own, prefix).items())
    record = read_json(folder / "run.json")
    assert len(record["starts"]) == len(taken)
    assert set(record["init_from"]) == set(record["starts"])


def test_what_a_run_starts_from_is_part_of_its_identity_and_its_place_is_not(train, trained, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(trained, moved)
    here, there = (train([*SAME, f"init_from.run={place}"], name) for place, name in ((trained, "a"), (moved, "b")))
    cold = train(SAME, "c")
    one, two, other = (read_json(run.folder / "run.json")["identity"] for run in (here, there, cold))
    assert one == two != other


def test_a_text_run_takes_the_adapter_alone(train, trained):
    overrides = [o for o in SAME if "connector" not in o]
    folder = train([*overrides, "modality=text", f"init_from.run={trained}"]).folder
    assert list(read_json(folder / "run.json")["starts"]) == ["adapter"]


@pytest.mark.parametrize(
    ("overrides", "argument", "said"),
    [
        (["model.llm.lora.r=8"], "run", r"model\.llm\.lora\): r=4 there, 8 here"),
        (["model/connector=conv"], "connectors", r"connectors have different settings: _target_="),
        (["model.connector.hidden_dim=64"], "connectors", r"hidden_dim=128 there, 64 here"),
        (["model.llm.freeze=true"], "adapter", r"no part of the LLM trains"),
        (["align=column"], "connectors", r"init_from and align both initialize"),
    ],
)
def test_what_does_not_fit_is_refused_with_both_sides(train, trained, overrides, argument, said):
    with pytest.raises(MsencError, match=said):
        train([*SAME, *overrides, f"init_from.{argument}={trained}"])


def test_another_encoder_stream_and_base_are_refused(train, trained, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(trained, other)
    config = other / ".hydra" / "config.yaml"
    text = config.read_text()
    config.write_text(text.replace("hop_s: 0.04", "hop_s: 0.01"))
    with pytest.raises(MsencError, match=r"another encoder's features: encoder\.hop_s=0\.01 there, 0\.04 here"):
        train([*SAME, f"init_from.run={other}"])
    config.write_text(text.replace("\n    video:", "\n    film:"))
    with pytest.raises(MsencError, match=r"has no connector for video.*Found there: audio, film"):
        train([*SAME, f"init_from.run={other}"], "two")
    config.write_text(text)
    checkpoint = torch.load(other / "checkpoints" / "best.ckpt", weights_only=True)
    checkpoint["msenc"]["base_fingerprint"] = "0" * 16
    torch.save(checkpoint, other / "checkpoints" / "best.ckpt")
    with pytest.raises(MsencError, match=r"trained on the base weights .*fingerprint 0000"):
        train([*SAME, f"init_from.run={other}"], "three")


def test_a_folder_that_is_no_run_and_a_run_without_a_part_are_refused(train, fresh, tmp_path):
    with pytest.raises(MsencError, match=r"init_from=.*nowhere: does not exist"):
        train([*SAME, f"init_from.run={tmp_path / 'nowhere'}"])
    text = fresh([*FAST, "modality=text"], "text").folder
    with pytest.raises(MsencError, match=r"init_from\.connectors=.*that run trained no connector"):
        train([*SAME, f"init_from.connectors={text}"], "two")
    with pytest.raises(MsencError, match=r"found run=.* and connectors="):
        train([*SAME, f"init_from.run={text}", f"init_from.connectors={text}"], "three")
    with pytest.raises(MsencError, match=r"modality=text has no stream"):
        train([*FAST, "modality=text", f"init_from.connectors={text}"], "four")
