import hashlib
import io
import logging
import os
import resource
import subprocess
import sys

import fsspec
import pytest
from file_server import serve

from msenc.store import location
from msenc.store.cache import Cache
from msenc.store.location import RemotePath, local_folder, locate
from msenc.types import MsencError

SHARD = bytes(range(256)) * 1000
SHA256 = hashlib.sha256(SHARD).hexdigest()
SIZE = len(SHARD)


@pytest.fixture
def remote(tmp_path):
    """A folder that stands for the far end, with a shard and an index."""
    folder = tmp_path / "far" / "meld"
    (folder / "turns").mkdir(parents=True)
    (folder / "turns" / "train-000000.tar").write_bytes(SHARD)
    (folder / "turns" / "index.json").write_text('{"é": 1}', encoding="utf-8")
    return folder


@pytest.fixture
def server(remote, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serve(remote.parent) as server:
        yield server


@pytest.fixture(autouse=True)
def no_wait(monkeypatch):
    monkeypatch.setattr(location, "WAITS_S", (0.0, 0.0))


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def shard_of(url, cache) -> RemotePath:
    return locate(url, cache) / "turns" / "train-000000.tar"


def files(folder):
    """What is in a cache but for the locks."""
    return sorted(p.name for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock")


def test_a_path_is_read_in_place(remote, cache):
    place = locate(str(remote), cache)
    assert place / "turns" == remote / "turns"
    assert not cache.exists()


@pytest.mark.parametrize("protocol", ["file", "memory", "http"])
def test_a_file_is_fetched_once_and_kept_whole(remote, cache, server, protocol):
    memory = fsspec.filesystem("memory")
    memory.put(str(remote), "/far/meld", recursive=True)
    url = {"file": f"file://{remote}", "memory": "memory://far/meld/", "http": f"{server.url}/meld"}[protocol]
    try:
        first = shard_of(url, cache).fetch(SHA256, SIZE)
        assert first.read_bytes() == SHARD
        assert (locate(url, cache) / "turns" / "index.json").read_text() == '{"é": 1}'
        again = shard_of(url, cache).fetch(SHA256, SIZE)
    finally:
        memory.rm("/far", recursive=True)
    assert again == first
    assert files(cache) == [f"{SHA256[:16]}-train-000000.tar", "index.json"]
    if protocol == "http":
        assert server.asked == ["meld/turns/train-000000.tar", "meld/turns/index.json"]


def test_two_locations_do_not_share_a_folder(remote, cache, server):
    copies = {locate(url, cache).copy for url in (f"{server.url}/meld", f"{server.url}/a/meld", f"file://{remote}")}
    assert len(copies) == 3
    assert all(copy.parent == cache and copy.name.startswith("meld-") for copy in copies)
    assert locate(f"{server.url}/meld/", cache) == locate(f"{server.url}/meld", cache)


def test_what_may_change_is_read_anew_once_per_start(remote, cache, server):
    folder = locate(f"{server.url}/meld", cache)
    index = folder / "turns" / "index.json"
    index.read_text()
    (remote / "turns" / "index.json").write_text("2")
    assert index.read_text() == '{"é": 1}'  # as at the start
    assert (folder / "turns" / "index.json").read_text() == '{"é": 1}'
    assert (locate(f"{server.url}/meld", cache) / "turns" / "index.json").read_text() == "2"
    assert len(server.asked) == 2


def test_without_a_network_the_last_copy_is_taken_with_a_warning(remote, cache, server, caplog):
    index = locate(f"{server.url}/meld", cache) / "turns" / "index.json"
    index.read_text()
    server.shutdown()
    server.server_close()
    again = locate(f"{server.url}/meld", cache)
    assert (again / "turns" / "index.json").read_text() == '{"é": 1}'
    (message,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert f"{index}: cannot be fetched (Client" in message
    assert "Using the copy of 20" in message
    with pytest.raises(MsencError, match=r"dataset\.json: cannot be fetched .*Check the address, the network"):
        (again / "dataset.json").read_text()
    with pytest.raises(MsencError, match=r"train-000000\.tar: cannot be fetched"):
        shard_of(f"{server.url}/meld", cache).fetch(SHA256, SIZE)


@pytest.mark.parametrize("protocol", ["file", "http"])
def test_what_does_not_exist_is_not_taken_from_the_cache(remote, cache, server, protocol):
    url = f"file://{remote}" if protocol == "file" else f"{server.url}/meld"
    (locate(url, cache) / "turns" / "index.json").read_text()
    for path in (remote / "turns").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError):
        (locate(url, cache) / "turns" / "index.json").read_text()
    with pytest.raises(MsencError, match=r"train-000000\.tar: no such file, though the index names it"):
        shard_of(url, cache).fetch(SHA256, SIZE)
    assert files(cache) == ["index.json"]


def test_a_shard_that_was_replaced_is_fetched_anew(remote, cache):
    old = shard_of(f"file://{remote}", cache).fetch(SHA256, SIZE)
    other = SHARD[::-1]
    (remote / "turns" / "train-000000.tar").write_bytes(other)
    sha256 = hashlib.sha256(other).hexdigest()
    new = shard_of(f"file://{remote}", cache).fetch(sha256, SIZE, verify=False)
    assert (old.read_bytes(), new.read_bytes()) == (SHARD, other)


def test_a_damaged_copy_is_fetched_again(remote, cache, caplog):
    shard = shard_of(f"file://{remote}", cache)
    copy = shard.fetch(SHA256, SIZE)
    copy.write_bytes(b"x" + SHARD[1:])
    assert shard.fetch(SHA256, SIZE, verify=False).read_bytes() != SHARD  # as asked for
    assert not caplog.messages
    assert shard.fetch(SHA256, SIZE).read_bytes() == SHARD
    assert "the copy in the cache is damaged; fetching" in caplog.text
    copy.write_bytes(SHARD[:-1])
    assert shard.fetch(SHA256, SIZE, verify=False).read_bytes() == SHARD


@pytest.mark.parametrize(
    ("content", "found"), [(SHARD[:-1], f"{SIZE - 1} bytes"), (SHARD[::-1], "content that differs from its sha256")]
)
def test_other_content_than_the_index_names_is_refused(remote, cache, content, found):
    (remote / "turns" / "train-000000.tar").write_bytes(content)
    with pytest.raises(MsencError, match=rf"train-000000\.tar: found {found}, expected {SIZE} bytes"):
        shard_of(f"file://{remote}", cache).fetch(SHA256, SIZE, verify=False)
    assert files(cache) == []


def test_a_connection_that_breaks_half_way_leaves_nothing(cache, server):
    shard = shard_of(f"{server.url}/meld", cache)
    server.cut = {"meld/turns/train-000000.tar"}
    with pytest.raises(MsencError, match=r"train-000000\.tar: cannot be fetched \(ClientPayloadError"):
        shard.fetch(SHA256, SIZE)
    assert files(cache) == []
    server.cut = set()
    assert shard.fetch(SHA256, SIZE).read_bytes() == SHARD


def test_processes_that_want_the_same_file_fetch_it_once(cache, server):
    code = (
        "import sys; from msenc.store.location import locate\n"
        "shard = locate(sys.argv[1], sys.argv[2]) / 'turns' / 'train-000000.tar'\n"
        "print('ready', flush=True); sys.stdin.read()\n"
        "print(len(shard.fetch(sys.argv[3], int(sys.argv[4])).read_bytes()))\n"
    )
    command = [sys.executable, "-c", code, f"{server.url}/meld", str(cache), SHA256, str(SIZE)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(3)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:  # all at once
        process.stdin.close()
        process.stdin = None
    assert [process.communicate(timeout=60)[0] for process in processes] == [f"{SIZE}\n"] * 3
    assert server.asked == ["meld/turns/train-000000.tar"]
    assert files(cache) == [f"{SHA256[:16]}-train-000000.tar"]


def test_a_dataset_of_the_hub_is_read(remote, cache):
    code = (
        "import sys; from msenc.store.location import locate\n"
        "folder = locate(sys.argv[1], sys.argv[2])\n"
        "print((folder / 'turns' / 'index.json').read_text())\n"
        "shard = folder / 'turns' / 'train-000000.tar'\n"
        "print(len(shard.fetch(sys.argv[3], int(sys.argv[4])).read_bytes()))\n"
        "(folder / 'dataset.json').read_text()\n"
    )
    command = [sys.executable, "-c", code, "hf://datasets/owner/name", str(cache), SHA256, str(SIZE)]
    with serve(remote, "owner/name") as hub:
        own = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_secret", "NO_PROXY": "127.0.0.1"}
        done = subprocess.run(command, env={**os.environ, **own}, capture_output=True, text=True, check=False)
    assert done.stdout == f'{{"é": 1}}\n{SIZE}\n'
    assert "FileNotFoundError" in done.stderr
    assert "hf_secret" not in done.stderr
    assert hub.asked == ["turns/index.json", "turns/train-000000.tar"]
    assert files(cache) == [f"{SHA256[:16]}-train-000000.tar", "index.json"]


def test_a_full_disk_is_named(remote, cache):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE // 2, hard))  # as on a disk that is full
    try:
        with pytest.raises(MsencError, match=r"cannot be written \(File too large\).*paths\.cache_dir=FOLDER"):
            shard_of(f"file://{remote}", cache).fetch(SHA256, SIZE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files(cache) == []


def test_a_cache_that_cannot_be_made_is_named(remote, tmp_path):
    (tmp_path / "occupied").write_text("")
    with pytest.raises(MsencError, match=r"occupied/.*cannot be written \(Not a directory\)"):
        shard_of(f"file://{remote}", tmp_path / "occupied").fetch(SHA256, SIZE)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_large_files_show_their_progress(remote, cache, server, monkeypatch):
    monkeypatch.setattr(sys, "stderr", shown := Terminal())
    shard_of(f"{server.url}/meld", cache).fetch(SHA256, SIZE)
    assert shown.getvalue() == ""
    monkeypatch.setattr(location, "LARGE_BYTES", SIZE)
    shard_of(f"{server.url}/meld", cache / "other").fetch(SHA256, SIZE)
    assert "train-000000.tar: 100%" in shown.getvalue()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nowhere://x", r"nowhere://x: cannot be used as a URL \(Protocol not known: nowhere\)\. Expected a path, or"),
        ("sftp://host/x", r"the protocol 'sftp' needs a package.* pip install 'fsspec\[sftp\]'"),
    ],
)
def test_protocols_that_cannot_be_used_are_refused(cache, monkeypatch, url, message):
    monkeypatch.setitem(sys.modules, "paramiko", None)  # as if not installed
    with pytest.raises(MsencError, match=message):
        locate(url, cache)


def test_errors_of_a_protocol_show_no_password(remote, cache, monkeypatch, caplog):
    monkeypatch.setattr(location.log, "level", 0)
    caplog.set_level("INFO")
    calls = []

    class Failing:
        def get_file(self, *args, **kwargs):
            calls.append(args)
            raise OSError("cannot reach\nhttp://user:a/pass@proxy:80")

    monkeypatch.setattr(location, "_file_system", lambda url: (Failing(), "x"))
    place = RemotePath("s3://b/x", cache / "x", Cache(cache))
    with pytest.raises(
        MsencError, match=r"s3://b/x: cannot be fetched \(OSError: cannot reach http://\*\*\*@proxy:80\)"
    ):
        place.read_text()
    assert len(calls) == 3
    assert len(caplog.messages) == 2
    assert "pass@" not in caplog.text


def test_nothing_is_written_to_a_url(tmp_path):
    with pytest.raises(MsencError, match=r"data\.dir=s3://x/y: a URL, expected a local folder\..*copy"):
        local_folder("s3://x/y", "data.dir")
    with pytest.raises(MsencError, match=r"paths\.cache_dir=s3://x/cache: a URL"):
        locate("memory://x", "s3://x/cache")
    assert local_folder(str(tmp_path), "data.dir") == tmp_path
