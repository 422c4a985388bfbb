"""Names and links of a stranger's files lead nowhere: each is refused, or nothing outside is written."""

import json
import os
import tarfile
import zipfile
from pathlib import Path

import fsspec
import pytest
import torch
from stranger import DATA, EVALUATION, RUN, change_json, original, place, refusal  # noqa: F401 (fixtures)

from msenc.config.checks import check_targets
from msenc.config.schema import register_schemas
from msenc.files import check_no_way_out, inside, read_json, whole, whole_folder, write_json, write_text
from msenc.files.kinds import is_below, is_name
from msenc.models.connector import QFormerCore, load_blip2
from msenc.pipelines.evaluate import evaluate
from msenc.pipelines.report import report
from msenc.pipelines.respond import respond
from msenc.prepare.dataset import prepare_part
from msenc.raw.annotations import Annotations
from msenc.raw.probe import probe_clips
from msenc.runs.record import RunRecord
from msenc.runs.sweep import job_folder
from msenc.speech.attributes import VoiceSettings
from msenc.store.location import locate
from msenc.store.manifest import DatasetManifest
from msenc.store.shards import ShardReader, write_stream
from msenc.talk.page import read_saved
from msenc.training.checkpoints import write_checkpoint
from msenc.training.restore import open_run
from msenc.types import MsencError
from msenc.work.items import Part

BAD = ["..", ".", "", "a/b", "/etc/passwd", "../../x", "a\\b", "..\\x", "a\0b", "a\nb", "a\x7f", "x" * 256, "é" * 128,
       "NUL", "con.txt", "Lpt1", "a.", "a ", "\ud800"]  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_name_is_refused_at_every_way_in(name, place, monkeypatch):  # noqa: F811
    assert not is_name(name)
    expected = "expected a name: one part of a path"
    assert expected in refusal(lambda: check_targets({"data": {"name": name}}))
    assert expected in refusal(lambda: check_targets({"model": {"streams": {"audio": {"name": f"{name}/../.."}}}}))
    far = locate("memory://far/data", "cache")
    assert expected in refusal(lambda: far / name)
    for keys in (("name",), ("streams", name)):
        path = DATA / "dataset.json"
        before = path.read_bytes()
        change_json(path, *keys, value={} if len(keys) == 2 else name)
        assert refusal(lambda: DatasetManifest.read(DATA))
        path.write_bytes(before)
    change_json(DATA / "turns/index.json", "shards", 0, "file", value=name)
    assert refusal(lambda: ShardReader(DATA / "turns", "train"))
    write_json(Path("sweep/sweep.json"), {"jobs": []})
    change_json(Path("sweep/sweep.json"), "started", value=name)
    assert refusal(lambda: job_folder(Path("sweep"), 0, []))
    samples = [(f"{name}/train/dia0", "train", {"turns.json": {}})]
    if name != "a/b":  # ids are names with / between them
        assert refusal(lambda: write_stream(Path("stream"), samples, {}))
        assert not Path("stream").exists()


@pytest.mark.parametrize(
    "name", ["meld", "my data", "train-000000.tar", "Fürst", "日本", "wavlm-large", "a..b", ".hidden", "x" * 200]
)
def test_names_are_taken(name):
    assert is_name(name)


def test_paths_below():
    assert all(map(is_below, ["a", "a/b.mp4", "./a", "a..b/c", "~/x"]))
    assert not any(map(is_below, ["", ".", "..", "a/../../b", "/a", "a/..", "a\0"]))


@pytest.mark.parametrize("key", ["file", "sha256"])
@pytest.mark.parametrize("bad", ["../../../outside/x", "/tmp/x.pth", "..", "sub/x.tar"])
def test_an_index_behind_a_url_names_no_file_outside_the_cache(key, bad, place):  # noqa: F811
    memory = fsspec.filesystem("memory")
    change_json(DATA / "turns/index.json", "shards", 0, key, value=bad)
    memory.put(str(DATA), "/far/data", recursive=True)
    try:
        far = locate("memory://far/data", place / "cache")
        assert f"shards[0].{key}: found {bad!r}" in refusal(lambda: ShardReader(far / "turns", "train")[0])
    finally:
        memory.rm("/far", recursive=True)
    assert {p.name for p in (place / "cache").rglob("*") if p.is_file()} <= {"index.json", ".index.json.lock"}


def test_weights_of_a_stranger_lie_in_their_folder(place):  # noqa: F811
    folder = Path("blip2")
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    index = {"weight_map": {"qformer.x": "../../../outside/precious.txt"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    core = QFormerCore.__new__(QFormerCore)
    torch.nn.Module.__init__(core)
    assert "weight_map.qformer.x: found" in refusal(lambda: load_blip2(core, str(folder)))


# ---------------------------------------------------------------------------------------------------- links


@pytest.fixture
def outside(place) -> Path:  # noqa: F811
    register_schemas()
    return place.parent / "outside"


def link(path: Path, to: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(to)


def test_whole_files_and_folders_take_the_place_of_links(outside):
    partial = Path(f".a.txt.writing-{os.getpid()}")
    link(partial, outside / "precious.txt")
    link(Path("a.txt"), outside / "precious.txt")
    write_text(Path("a.txt"), "mine")
    assert (Path("a.txt").read_text(), Path("a.txt").is_symlink()) == ("mine", False)
    for name in ("folder", ".folder.partial"):
        link(Path(name), outside)
    with whole_folder(Path("folder")) as folder:
        (folder / "b.txt").write_text("mine")
    assert [p.name for p in Path("folder").iterdir()] == ["b.txt"]
    with whole(Path("c")) as partial:
        partial.write_text("mine")


def test_a_checkpoint_takes_the_place_of_links(outside):
    link(Path("c/.last.ckpt.partial"), outside / "precious.txt")
    link(Path("c/last.ckpt"), outside / "precious.txt")
    write_checkpoint({"state_dict": {}}, Path("c/last.ckpt"))
    assert not Path("c/last.ckpt").is_symlink()


def test_a_link_that_leads_out_is_refused_and_one_that_stays_is_not(outside):
    link(Path("run/a"), Path("b"))
    Path("run/b").mkdir()
    assert inside(Path("run"), "a", "c") == Path("run/a/c")
    check_no_way_out(Path("run"))
    link(Path("run/b/out"), outside)
    for act in (lambda: inside(Path("run"), "b", "out", "x"), lambda: check_no_way_out(Path("run"))):
        assert "leads out of run" in refusal(act)
    assert "leads out of run" in refusal(lambda: inside(Path("run"), "..", "x"))


@pytest.mark.parametrize("file", [".lock", "logs", "checkpoints/last.ckpt", "evaluation", "logs/csv/events"])
def test_a_run_with_a_way_out_is_not_continued(file, outside):
    path = RUN / file
    if path.exists():
        path.rename(path.with_name("before"))
    link(path, outside / "precious.txt")
    before = (RUN / "run.json").read_bytes()
    assert f"{file.split('/')[0]}" in refusal(lambda: RunRecord.reopen(RUN))
    assert (RUN / "run.json").read_bytes() == before


@pytest.mark.parametrize("name", ["evaluation", EVALUATION.relative_to(RUN).as_posix()])
def test_an_evaluation_is_not_written_through_a_link(name, outside, compose):
    (RUN / name).rename(Path("before"))
    link(RUN / name, outside)
    said = refusal(lambda: evaluate(compose([f"run_dir={RUN}", "split=test", "device=cpu"], "evaluate")))
    assert f"leads out of {RUN}" in said


def test_a_reply_and_a_report_are_not_written_through_a_link(outside, compose):
    for name in ("replies", "report"):
        link(RUN / name, outside)
    said = refusal(lambda: respond(compose([f"run_dir={RUN}", "text=Hi", "speech=none"], "respond")))
    assert f"leads out of {RUN}" in said
    assert f"leads out of {RUN}" in refusal(lambda: report(compose([f"sweep_dir={RUN}"], "report")))


@pytest.mark.parametrize("name", ["../../x", "/etc", "..", "a\\b"])
def test_evaluations_of_other_data_stay_in_the_run(name, outside, compose):
    change_json(DATA / "dataset.json", "name", value=name)
    options = ["split=test", "device=cpu", f"on_data={DATA}"]
    assert "dataset.json, name: found" in refusal(lambda: evaluate(compose([f"run_dir={RUN}", *options], "evaluate")))


def test_what_a_run_fetches_goes_to_the_users_own_cache(outside, monkeypatch):
    path = RUN / ".hydra" / "config.yaml"
    text = path.read_text()
    path.write_text(text.replace("cache_dir: ${oc.env:MSENC_CACHE,${paths.data_dir}/cache}", f"cache_dir: {outside}"))
    assert path.read_text() != text
    assert open_run(RUN, None)[1]["paths"]["cache_dir"] == "data/cache"
    (Path("elsewhere") / "tiny-llm").mkdir(parents=True)
    assert open_run(RUN, "elsewhere")[1]["paths"]["cache_dir"] == "elsewhere/cache"
    assert open_run(RUN, None)[1]["paths"]["cache_max_bytes"] is None
    monkeypatch.setenv("MSENC_CACHE", "mine")
    monkeypatch.setenv("MSENC_CACHE_MAX_BYTES", "1000")
    paths = open_run(RUN, None)[1]["paths"]
    assert (paths["cache_dir"], paths["cache_max_bytes"]) == ("mine", 1000)
    monkeypatch.setenv("MSENC_CACHE_MAX_BYTES", "1 GB")
    assert "paths.cache_max_bytes: found '1 GB', expected" in refusal(lambda: open_run(RUN, None))


def test_an_audit_and_items_are_not_written_through_links(outside):
    Path("clips").mkdir()
    (Path("clips") / "a.mp4").write_text("no clip")
    link(Path("audit/clips.jsonl"), outside / "precious.txt")
    assert "leads out of audit" in refusal(lambda: probe_clips(Path("clips"), ["a.mp4"], 0, Path("audit/clips.jsonl")))
    link(DATA / ".voice.items", outside)
    annotations = Annotations([], [], [], {})
    act = lambda: prepare_part(annotations, Path("clips"), DATA, [], 0, VoiceSettings(), Part(1, 1))  # noqa: E731
    assert f"leads out of {DATA}" in refusal(act)


@pytest.mark.parametrize(
    "name", ["../../outside/x", "/outside/x", "a/../../../outside/x", "C:\\x", "talk.json/x", "x" * 300]
)
def test_a_saved_talk_unpacks_into_its_folder(name, outside):
    with zipfile.ZipFile("talk.zip", "w") as archive:
        archive.writestr("talk.json", json.dumps({"turns": [{"speaker": "A", "text": "Hi", "audio": name}]}))
        archive.writestr(name, "sound")
    folder = Path("unpacked")
    said = refusal(lambda: read_saved(Path("talk.zip"), folder, 10**6))
    assert said or (folder / name).is_file()  # a name that is odd and a name all the same


def test_a_shard_whose_members_lead_out_is_read_and_not_unpacked(outside):
    reader = ShardReader(DATA / "turns", "train")
    right = [reader.read(id) for id in reader.ids]
    path = DATA / "turns" / "train-000000.tar"
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        first = next(iter(tar))
        data[first.offset_data - 512 : first.offset_data - 502] = b"../../../x"
    path.write_bytes(data)
    index = read_json(DATA / "turns" / "index.json")
    again = ShardReader(DATA / "turns", "train", verify=False)
    assert [again.read(id) for id in again.ids] == right
    assert index["shards"][0]["sha256"]
    with pytest.raises(MsencError, match="differs from its sha256"):
        ShardReader(DATA / "turns", "train").check()
