"""Shards in a bucket: as good as on a disk, whatever the network does; and how much of them is kept."""

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator

import fsspec
import numpy as np
import pytest
from object_storage import Storage, serve_s3

from msenc.store import cache, location
from msenc.store.cache import Cache, hold, locked, partial_of
from msenc.store.location import locate
from msenc.store.shards import ShardReader, write_stream
from msenc.types import MsencError

NUM = 12


@pytest.fixture
def storage(monkeypatch) -> Iterator[Storage]:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # botocore tries for seconds by itself
    monkeypatch.setattr(location, "WAITS_S", (0.0, 0.0))
    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": {"read_timeout": 1}})
    with serve_s3(monkeypatch) as storage:
        monkeypatch.setattr(fsspec.get_filesystem_class("s3"), "retries", 1)
        yield storage


@pytest.fixture
def stream(tmp_path):
    """A stream of 12 dialogues, one shard each."""
    folder = tmp_path / "far" / "audio"
    samples = [(f"d{n}", "train", _members(n)) for n in range(NUM)]
    write_stream(folder, samples, {}, max_shard_bytes=1)
    return folder


def _members(n: int):
    return {"features.npy": np.full((4000, 2), n, np.float16), "offsets.npy": np.array([0, 4000])}


def shard_bytes(folder) -> int:
    (size,) = {path.stat().st_size for path in folder.glob("*.tar")}
    return size


def kept(folder) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.tar"))


@pytest.fixture
def bucket(storage, stream):
    fsspec.filesystem("s3").put(str(stream), "bucket/data/audio", recursive=True)
    return "s3://bucket/data"


def read_all(reader) -> None:
    for n, id in enumerate(reader.ids):
        assert (reader.read(id)["features.npy"] == n).all()


@pytest.mark.parametrize("faults", [["500", "500"], ["cut", "cut"], ["stall", "stall"], ["500", "cut"]])
def test_faults_that_pass_are_not_noticed(storage, bucket, tmp_path, faults):
    reader = ShardReader(locate(bucket, tmp_path / "cache") / "audio", "train")
    storage.faults = list(faults)
    read_all(reader)
    assert storage.faults == []
    assert len(storage.asked) == NUM + len(faults)
    read_all(ShardReader(locate(bucket, tmp_path / "cache") / "audio", "train"))
    assert len(storage.asked) == NUM + len(faults)  # from the cache


@pytest.mark.parametrize(
    ("fault", "said"), [("500", "OSError"), ("cut", "ClientPayloadError|Response"), ("stall", "Timeout")]
)
def test_faults_that_stay_are_named_in_one_line(storage, bucket, tmp_path, fault, said):
    reader = ShardReader(locate(bucket, tmp_path / "cache") / "audio", "train")
    storage.faults = [fault] * 100
    with pytest.raises(
        MsencError, match=rf"s3://bucket/data/audio/train-000000\.tar: cannot be fetched \(.*({said})"
    ) as e:
        reader.read("d0")
    assert "\n" not in str(e.value)
    assert len(storage.asked) == 3
    assert [p.name for p in (tmp_path / "cache").rglob("*") if p.suffix in (".tar", ".partial")] == []
    storage.faults = []
    read_all(reader)


def test_other_content_is_refused(storage, bucket, tmp_path):
    fsspec.filesystem("s3").pipe("bucket/data/audio/train-000001.tar", b"x" * 100)
    reader = ShardReader(locate(bucket, tmp_path / "cache") / "audio", "train")
    reader.read("d0")
    with pytest.raises(MsencError, match=r"train-000001\.tar: found 100 bytes, expected"):
        reader.read("d1")
    assert storage.asked == [f"/bucket/data/audio/train-00000{n}.tar" for n in (0, 1)]


def test_what_is_not_there_or_not_allowed_is_not_asked_for_again(storage, bucket, tmp_path, monkeypatch):
    fsspec.filesystem("s3").rm("bucket/data/audio/train-000001.tar")
    reader = ShardReader(locate(bucket, tmp_path / "cache") / "audio", "train")
    with pytest.raises(MsencError, match=r"train-000001\.tar: no such file, though the index names it"):
        reader.read("d1")
    assert len(storage.asked) == 1
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    type(fsspec.filesystem("s3")).clear_instance_cache()
    monkeypatch.setattr(location, "WAITS_S", (60.0,))
    with pytest.raises(MsencError, match=r"index\.json: cannot be fetched \(NoCredentialsError"):
        ShardReader(locate("s3://bucket/data", tmp_path / "other") / "audio", "train")


def test_a_run_reads_its_data_from_a_bucket(train, demo_home, storage, tmp_path):
    fsspec.filesystem("s3").put(str(demo_home / "data" / "demo"), "bucket/demo", recursive=True)
    storage.faults = ["500", "cut"]
    fast = ["modality=text_audio", "trainer.max_epochs=1", "evaluate=null"]
    largest = max(path.stat().st_size for path in (demo_home / "data" / "demo").rglob("*.tar"))
    there = ["data.dir=s3://bucket/demo", f"paths.cache_dir={tmp_path}/cache", f"paths.cache_max_bytes={largest}"]
    run = train([*fast, *there, "data.num_workers=2"], "there")
    assert run.loss == train(fast, "here").loss
    assert storage.faults == []
    assert 0 < kept(tmp_path / "cache") <= largest
    written = [path for path in run.folder.rglob("*") if path.is_file()]
    assert not any(b"secret-key" in path.read_bytes() for path in written)
    assert (run.folder / "run.json") in written


# ------------------------------------------------------------------------------------------------ the limit


def test_the_longest_unused_goes_first(stream, tmp_path, caplog):
    limit = 3 * shard_bytes(stream)
    place = locate(f"file://{stream.parent}", tmp_path / "cache", limit) / "audio"
    reader = ShardReader(place, "train")
    assert f"take {NUM * shard_bytes(stream)} bytes, more than paths.cache_max_bytes={limit}" in caplog.text
    for n in (0, 1, 2, 0, 3):
        reader.read(f"d{n}")
        time.sleep(0.02)  # times of files are counted in ticks
    names = {path.name.partition("-")[2] for path in (tmp_path / "cache").rglob("*.tar")}
    assert names == {f"train-00000{n}.tar" for n in (0, 2, 3)}
    reader.check()
    read_all(reader)
    assert kept(tmp_path / "cache") == limit
    assert not reader._descriptors


def test_what_is_read_or_written_stays(stream, tmp_path, caplog):
    size = shard_bytes(stream)
    place = locate(f"file://{stream.parent}", tmp_path / "cache", 2 * size) / "audio"
    reader, other = ShardReader(place, "train"), ShardReader(place, "train")
    descriptor = reader._open(0)
    for n in range(1, 5):
        other.read(f"d{n}")
    assert kept(tmp_path / "cache") == 2 * size
    assert os.fstat(descriptor).st_nlink == 1
    held = other._open(5)
    caplog.clear()
    other.read("d6")  # more is read at once than there is room for
    assert f"takes {size} bytes more than paths.cache_max_bytes" in caplog.text
    assert (os.fstat(descriptor).st_nlink, os.fstat(held).st_nlink) == (1, 1)
    for each in (descriptor, held):
        os.close(each)
    other.read("d7")
    assert kept(tmp_path / "cache") == 2 * size


def test_a_download_takes_its_room_at_once_and_one_that_was_killed_gives_it_back(tmp_path):
    folder = tmp_path / "demo"
    folder.mkdir()
    copies = [folder / f"{n:016x}-train.tar" for n in range(3)]
    room = Cache(tmp_path, 100)
    with locked(copies[0]):
        room.make_room(partial_of(copies[0], 60), 60)
        copies[1].write_bytes(bytes(40))
        room.make_room(partial_of(copies[2], 30), 30)  # by another process
        assert partial_of(copies[0], 60).exists()
        assert not copies[1].exists()
    room.make_room(partial_of(copies[1], 60), 60)
    assert not partial_of(copies[0], 60).exists()


def test_a_copy_that_was_dropped_is_fetched_again(stream, tmp_path, monkeypatch):
    place = locate(f"file://{stream.parent}", tmp_path / "cache") / "audio"
    reader = ShardReader(place, "train")
    real, dropped = location.hold, []

    def hold_late(copy):
        if not dropped:  # between its check and its opening
            dropped.append(copy)
            assert cache._drop(copy)
        return real(copy)

    monkeypatch.setattr(location, "hold", hold_late)
    read_all(reader)
    assert dropped[0].exists()
    assert hold(tmp_path / "none") is None


def test_a_limit_that_no_shard_fits_is_refused(stream, tmp_path):
    place = locate(f"file://{stream.parent}", tmp_path / "cache", 1000) / "audio"
    with pytest.raises(MsencError, match=r"paths\.cache_max_bytes=1000: found a shard of \d+ bytes"):
        ShardReader(place, "train").read("d0")


def test_processes_share_a_limit(stream, tmp_path):
    limit = 4 * shard_bytes(stream)
    code = """
import sys, random
from msenc.store.location import locate
from msenc.store.shards import ShardReader
url, cache, limit, seed = sys.argv[1:]
reader = ShardReader(locate(url, cache, int(limit)) / "audio", "train")
draw = random.Random(int(seed))
for n in (draw.randrange(len(reader)) for _ in range(60)):
    assert (reader.read(f"d{n}")["features.npy"] == n).all()
"""
    command = [sys.executable, "-c", code, f"file://{stream.parent}", str(tmp_path / "cache"), str(limit)]
    processes = [subprocess.Popen([*command, str(n)], stderr=subprocess.PIPE, text=True) for n in range(3)]
    said = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 3, said
    assert kept(tmp_path / "cache") <= limit
    for path in (tmp_path / "cache").rglob("*.tar"):
        assert hashlib.sha256(path.read_bytes()).hexdigest().startswith(path.name[:16])
