"""Dialogues -> WebDataset shards with an index, and back by random access.

One stream (turns, or the features of one encoder) is one folder: tar files per split, and ``index.json``, which says
where in them each dialogue lies. Any webdataset reader opens the tar files without it.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypedDict

import numpy as np

from msenc.files import read_json
from msenc.files.kinds import Count, Must, Name, Sha256, Split, is_name
from msenc.store.location import Place, RemotePath, hash_file
from msenc.store.members import check_features, check_turns, decode_member, encode_member
from msenc.types import MsencError

log = logging.getLogger(__name__)

SCHEMA_VERSION = 1
INDEX = "index.json"

# webdataset ends a sample's key at the first dot of the last part of its path.
_DIALOGUE_ID = re.compile(r"(?:[^/\s]+/)*[^./\s]+")


def is_dialogue_id(id: str) -> bool:
    """Whether an id can be a member's path in a tar file that any reader may unpack.

    Example:
        >>> is_dialogue_id("meld/train/dia3"), is_dialogue_id("../train/dia3")
        (True, False)
    """
    return _DIALOGUE_ID.fullmatch(id) is not None and all(map(is_name, id.split("/")))


DialogueId = Annotated[str, Must(is_dialogue_id, "names with / between them, none with a space, the last without dot")]


class _Shard(TypedDict):
    file: Name
    sha256: Sha256
    bytes: Count


class _Sample(TypedDict):
    id: DialogueId
    split: Split
    shard: Count
    members: dict[Name, tuple[Count, Count]]
    lengths: list[Count]


class _Index(TypedDict):
    stream: str
    settings: dict[str, Any]
    hash: str
    shards: list[_Shard]
    samples: list[_Sample]


def write_stream(
    folder: Path,
    samples: Iterable[tuple[str, str, dict[str, Any]]],
    settings: dict[str, Any],
    max_shard_bytes: int = 128 * 2**20,
) -> dict[str, Any]:
    """Write one stream; `folder` changes only when all is written, so that no half-written one looks whole.

    The same samples and settings give the same bytes and the same hash. One writer per folder at a time.

    Args:
        folder: becomes the stream; an earlier one there is replaced at the end.
        samples: (dialogue id, split, members); a member is ``name.json`` with plain values, or ``name.npy`` with an
            array. ``offsets.npy`` (U+1,) beside ``features.npy`` (sum of T, D) says where each utterance begins.
        settings: what made the stream, plain values; part of its hash.
        max_shard_bytes: a shard that would grow beyond is closed; one dialogue always stays in one shard.

    Returns:
        The index: schema_version, stream, settings, hash, shards, samples.

    Raises:
        MsencError: if nothing is to be written, an id is unfit or used twice, or the disk refuses.
    """
    folder = Path(folder)
    temporary = folder.parent / f".{folder.name}.writing-{os.getpid()}"
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        clear_leftovers(folder.parent, folder.name)
        temporary.mkdir()
    writers: dict[str, _SplitWriter] = {}
    try:
        seen: set[str] = set()
        for id, split, members in samples:
            if id in seen or not is_dialogue_id(id):
                found = "twice" if id in seen else "with a space, with .., or with a dot in its last part"
                raise MsencError(
                    f"{folder}: dialogue id {id!r} found {found}. Expected ids that are unique and fit a file name."
                )
            seen.add(id)
            with disk_errors(folder):
                writer = writers.setdefault(split, _SplitWriter(temporary, split, max_shard_bytes))
                writer.write(id, members)
        if not seen:
            raise MsencError(f"{folder}: no dialogue to write; expected at least one. Check the dataset's annotations.")
        with disk_errors(folder):
            for writer in writers.values():
                writer.close()
            index = _index(temporary, folder.name, settings, list(writers.values()))
            (temporary / INDEX).write_text(json.dumps(index, ensure_ascii=False), encoding="utf-8")
            _replace(folder, temporary)
    except BaseException:
        for writer in writers.values():
            writer.abandon()
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(samples, Generator):
            samples.close()  # its workers end before the error is shown
        raise
    return index


def read_index(folder: Place, hint: str = "") -> dict[str, Any]:
    """The index of a stream.

    Args:
        folder: what `write_stream` wrote.
        hint: added to error messages: the command that makes the stream.

    Raises:
        MsencError: if the folder or its index is missing, cannot be read, or is of another schema.
    """
    path = folder / INDEX
    if isinstance(folder, Path) and not folder.is_dir():
        raise MsencError(_with_hint(f"{folder}: no such folder of shards. Expected one written by prepare.py.", hint))
    advice = f"Prepare again. {hint}".strip()
    index = read_json(path, _Index, advice, SCHEMA_VERSION)
    sizes = [shard["bytes"] for shard in index["shards"]]
    ids = set()
    for number, sample in enumerate(index["samples"]):
        where = f"{path}, samples[{number}]"
        if sample["shard"] >= len(sizes):
            raise MsencError(f"{where}: found shard {sample['shard']}, expected one of {len(sizes)}. {advice}")
        if sample["id"] in ids:
            raise MsencError(f"{where}: the id {sample['id']} stands there twice. {advice}")
        ids.add(sample["id"])
        for name, (offset, size) in sample["members"].items():
            if offset + size > sizes[sample["shard"]]:
                raise MsencError(f"{where}: {name} ends behind the end of its shard. {advice}")
    if stream_hash(index["settings"], index["shards"]) != index["hash"]:
        raise MsencError(f"{path}: damaged; it does not hold what its hash says. {advice}")
    return index


def stream_hash(settings: dict[str, Any], shards: list[dict[str, Any]]) -> str:
    """The hash of a stream: what made it, and the content of its shards."""
    identity = {"settings": settings, "shards": [{key: s[key] for key in ("file", "sha256")} for s in shards]}
    return hashlib.sha256(json.dumps(identity, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class ShardReader:
    """Dialogue id, or its place in the split -> members, reading only that dialogue's bytes.

    Shards are opened, and behind a URL fetched, at the first read from them, and none of another split. A reader can
    be pickled, and used after a fork: reads name their offset, so processes do not disturb each other. Where the cache
    of remote files has a limit, a shard is only held while a dialogue is read, so that others can take its place.

    Args:
        folder: what `write_stream` wrote, or a copy of it behind a URL.
        split: which split's dialogues to offer.
        verify: compare a shard's sha256 with the index before its first read.
        hint: added to error messages: the command that makes the stream.

    Raises:
        MsencError: if folder, index or a shard of the split is missing, of wrong size, or of wrong content.
    """

    def __init__(self, folder: Place, split: str, verify: bool = True, hint: str = ""):
        self.folder, self.split, self.verify, self.hint = folder, split, verify, hint
        index = read_index(self.folder, hint)
        self.stream: str = index["stream"]
        self.settings: dict[str, Any] = index["settings"]
        self.hash: str = index["hash"]
        entries = [sample for sample in index["samples"] if sample["split"] == split]
        if not entries:
            present = ", ".join(sorted({sample["split"] for sample in index["samples"]}))
            self._refuse(self.folder / INDEX, f"no dialogue of the split {split!r}; found {present}")
        self.ids: list[str] = [entry["id"] for entry in entries]
        self.lengths: list[list[int]] = [entry["lengths"] for entry in entries]
        self._entries = dict(zip(self.ids, entries, strict=True))
        self._shards = {number: index["shards"][number] for number in sorted({entry["shard"] for entry in entries})}
        self._descriptors: dict[int, int] = {}
        self._verified: set[int] = set()
        self._sound: set[str] = set()
        self._keeps_open = not (isinstance(folder, RemotePath) and folder.cache.max_bytes is not None)
        for shard in self._shards.values():
            path = self.folder / shard["file"]
            if isinstance(path, RemotePath):
                continue  # looked at when it is fetched
            if not path.is_file():
                self._refuse(path, "missing; the index names it")
            if path.stat().st_size != shard["bytes"]:
                self._refuse(path, f"{path.stat().st_size} bytes, expected {shard['bytes']}")
        size = sum(shard["bytes"] for shard in self._shards.values())
        if not self._keeps_open and size > folder.cache.max_bytes:
            log.warning(
                "%s: the shards of %s take %d bytes, more than paths.cache_max_bytes=%d. Dialogues are drawn from all "
                "of them, so that each shard is fetched many times.",
                folder,
                split,
                size,
                folder.cache.max_bytes,
            )

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.read(self.ids[i])

    def read(self, id: str) -> dict[str, Any]:
        """The members of one dialogue by name: plain values, or arrays that may be written to.

        Raises:
            KeyError: if the split has no such dialogue.
            MsencError: if its shard is not what the index says.
        """
        if id not in self._entries:
            raise KeyError(f"no dialogue {id!r} in {self.folder} (split {self.split})")
        entry = self._entries[id]
        descriptor = self._open(entry["shard"])
        try:
            members = {
                name: decode_member(name, self._read(descriptor, *place)) for name, place in entry["members"].items()
            }
            if id not in self._sound:  # what was looked at once is the same the next time
                if "turns.json" in members:
                    check_turns(members["turns.json"], id, self.split, len(entry["lengths"]))
                if "offsets.npy" in members:
                    check_features(members.get("features.npy"), members["offsets.npy"], entry["lengths"])
                self._sound.add(id)
            return members
        except MsencError as error:  # the index names bytes that are no such member
            raise MsencError(_with_hint(f"{self.folder}, {id}, {error} Prepare the data again.", self.hint)) from error
        finally:
            self._leave(descriptor)

    def check(self) -> None:
        """Verify every shard of the split now; copies of this reader made afterwards do not verify again."""
        for number in self._shards:
            self._leave(self._open(number))

    def close(self) -> None:
        """Close what was opened; a later read opens it again."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __del__(self):
        if "_descriptors" in self.__dict__:
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptors": {}}  # a descriptor means nothing in another process

    def _open(self, number: int) -> int:
        if number in self._descriptors:
            return self._descriptors[number]
        shard = self._shards[number]
        path = self.folder / shard["file"]
        verify = self.verify and number not in self._verified
        if isinstance(path, RemotePath):
            descriptor = path.open(shard["sha256"], shard["bytes"], verify)
        else:
            if verify and hash_file(path) != shard["sha256"]:
                self._refuse(path, "content that differs from its sha256 in the index")
            descriptor = os.open(path, os.O_RDONLY)
        self._verified.add(number)
        if self._keeps_open:
            self._descriptors[number] = descriptor
        return descriptor

    def _leave(self, descriptor: int) -> None:
        if not self._keeps_open:
            os.close(descriptor)

    def _read(self, descriptor: int, offset: int, size: int) -> np.ndarray:
        data = np.empty(size, np.uint8)  # a bytearray would be filled with zeros first
        if os.preadv(descriptor, [data], offset) != size:
            self._refuse(self.folder, "a shard that ends before its index says")
        return data

    def _refuse(self, path: Place, found: str) -> NoReturn:
        raise MsencError(_with_hint(f"{path}: found {found}. Prepare the data again.", self.hint))


class _SplitWriter:
    """Members of one split's dialogues -> its shards, one open at a time."""

    def __init__(self, folder: Path, split: str, max_shard_bytes: int):
        self.folder, self.split, self.max_shard_bytes = folder, split, max_shard_bytes
        self.files: list[str] = []
        self.samples: list[dict[str, Any]] = []  # shard numbers count from this split's first
        self._file = self._tar = None
        self._bytes = 0

    def write(self, id: str, members: dict[str, Any]) -> None:
        import webdataset

        encoded = {name: encode_member(name, value) for name, value in members.items()}
        size = sum(len(data) for data in encoded.values())
        if self._tar is not None and self._bytes + size > self.max_shard_bytes:
            self.close()
        if self._tar is None:
            self.files.append(f"{self.split}-{len(self.files):06d}.tar")
            self._file = (self.folder / self.files[-1]).open("wb")
            # fixed owner, mode and time: the same data are the same bytes
            self._tar = webdataset.TarWriter(
                self._file, user="msenc", group="msenc", mode=0o644, mtime=0, encoder=False, format="PAX_FORMAT"
            )
            self._bytes = 0
        self._tar.write({"__key__": id, **encoded})
        self._bytes += size
        self.samples.append(
            {"id": id, "split": self.split, "shard": len(self.files) - 1, "members": {}, "lengths": _lengths(members)}
        )

    def close(self) -> None:
        """Finish the open shard."""
        if self._tar is not None:
            self._tar.close()
            self._file.close()
            self._tar = None

    def abandon(self) -> None:
        """Let go of the open shard, finished or not."""
        for part in (self._tar, self._file):
            if part is not None:
                with suppress(OSError, ValueError):  # a full disk refuses the last bytes again
                    part.close()
        self._tar = None


def _index(folder: Path, stream: str, settings: dict[str, Any], writers: list[_SplitWriter]) -> dict[str, Any]:
    import tarfile

    shards, samples = [], []
    for writer in writers:
        first = len(shards)
        places: dict[str, list[int]] = {}
        for name in writer.files:
            path = folder / name
            shards.append({"file": name, "sha256": hash_file(path), "bytes": path.stat().st_size})
            with tarfile.open(path) as tar:
                places |= {member.name: [member.offset_data, member.size] for member in tar}
        members: dict[str, dict[str, list[int]]] = {}
        for name, place in places.items():
            id, member = _split_key(name)
            members.setdefault(id, {})[member] = place
        samples += [
            {**sample, "shard": first + sample["shard"], "members": members[sample["id"]]} for sample in writer.samples
        ]
    return {
        "schema_version": SCHEMA_VERSION,
        "stream": stream,
        "settings": settings,
        "hash": stream_hash(settings, shards),
        "shards": shards,
        "samples": samples,
    }


def _split_key(name: str) -> tuple[str, str]:
    """Member's path in the tar -> (dialogue id, member's name), by webdataset's rule."""
    folder, slash, base = name.rpartition("/")
    key, _, member = base.partition(".")
    return folder + slash + key, member


def _lengths(members: dict[str, Any]) -> list[int]:
    """Raw length of each utterance: frames of its features, or characters of its text."""
    if "offsets.npy" in members:
        return np.diff(members["offsets.npy"]).tolist()
    for value in members.values():
        if isinstance(value, dict) and "utterances" in value:
            return [len(utterance["text"]) for utterance in value["utterances"]]
    return []


def clear_leftovers(folder: Path, name: str = "*") -> None:
    """Remove what killed writers left in a folder; an old version goes back where its successor did not arrive.

    Args:
        folder: in which nobody writes at the time.
        name: of the one stream in it that is meant; else all files and streams.
    """
    for kept in folder.glob(f".{name}.replaced-*"):
        target = folder / kept.name[1:].rpartition(".replaced-")[0]
        if target.exists():
            shutil.rmtree(kept, ignore_errors=True)
        else:
            kept.rename(target)
    for leftover in (*folder.glob(f".{name}.writing-*"), *folder.glob(f"{name}/.*.writing-*")):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _replace(folder: Path, temporary: Path) -> None:
    old = folder.parent / f".{folder.name}.replaced-{os.getpid()}"
    if folder.exists():
        folder.rename(old)
    try:
        temporary.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn what the disk refuses into an error that says so."""
    try:
        yield
    except OSError as error:
        raise MsencError(
            f"{folder}: cannot be written ({error.strerror or error}). What was there before is untouched. "
            "Free space or permissions there, or set another folder, and prepare again."
        ) from error


def _with_hint(message: str, hint: str) -> str:
    return f"{message} {hint}".strip()
