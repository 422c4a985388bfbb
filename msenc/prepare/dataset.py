"""Raw material -> prepared data: annotations, shards of turns, shards of features per stream, manifest.

Each part is made only where it is missing or was made of something else, and appears whole or not at all. The
manifest is written last: without it the folder is no data set.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from msenc.data.annotations import read_meld
from msenc.data.flags import find_audit
from msenc.data.manifest import (
    DatasetManifest,
    StreamInfo,
    count_rejections,
    count_splits,
    read_rejections,
    write_rejections,
)
from msenc.data.shards import read_index, write_stream
from msenc.prepare.describe import VoiceSettings, describe_dialogues, describe_settings
from msenc.prepare.features import extract
from msenc.types import Dialogue, MsencError, Rejection


@dataclass(frozen=True)
class StreamRecipe:
    """How a stream's features are made.

    Args:
        kind: ``audio`` or ``video``.
        name: the encoder's name.
        dim: width that the config claims; the encoder's own must agree.
        make_encoder: builds the encoder; picklable.
        settings: the encoder's config; features are made anew when it changes.
    """

    kind: str
    name: str
    dim: int
    make_encoder: Callable[[], Any]
    settings: Mapping[str, Any]


def prepare_dataset(
    name: str,
    root: Path,
    folder: Path,
    streams: list[StreamRecipe],
    num_workers: int,
    voice: VoiceSettings | None = None,
) -> DatasetManifest:
    """Make what is missing of a prepared data set.

    Args:
        name: of the data set; begins every id.
        root: raw material in MELD's layout.
        folder: where the prepared data goes; streams of other encoders in it stay.
        streams: the features wanted.
        num_workers: processes for decoding and encoding.
        voice: how to describe the turns' voices; None leaves the descriptions as the annotations have them.

    Returns:
        The manifest, as written to ``dataset.json``; what could not be used stands in ``rejected.csv``.

    Raises:
        MsencError: unusable annotations, a full disk, an encoder of another width than claimed, or another process
            that prepares the same folder.
    """
    annotations = read_meld(root, name)
    dialogues, rejections = annotations.dialogues, list(annotations.rejections)
    settings: dict[str, Any] = {"annotations": "meld"}
    if voice is not None:
        dialogues, _ = describe_dialogues(dialogues, root, folder, voice, num_workers, rejections)
        settings["voice"] = describe_settings(voice)
    turns = _write_turns(folder, dialogues)
    infos = {"turns": _info("text", None, None, turns, dialogues)}
    # Streams of other encoders stay usable as long as they were made from these turns.
    for stream, info in _kept_streams(folder, turns["hash"], {f"{s.kind}-{s.name}" for s in streams}).items():
        infos[stream] = info
        rejections += read_rejections(folder / stream / "rejected.csv")
    for recipe in streams:
        index, rejected = _write_features(folder, root, recipe, dialogues, turns["hash"], num_workers)
        rejections += rejected
        infos[f"{recipe.kind}-{recipe.name}"] = _info(recipe.kind, recipe.name, recipe.dim, index, dialogues)
    rejections = list(dict.fromkeys(rejections))  # two encoders of one stream lack the same clips
    manifest = DatasetManifest(
        name=name,
        splits=count_splits(dialogues),
        streams=infos,
        rejected=count_rejections(rejections),
        num_repaired=annotations.num_repaired,
        settings=settings,
        turns_hash=turns["hash"],
        audit_hash=find_audit(folder, turns["settings"]["content"]),
    )
    write_rejections(folder / "rejected.csv", rejections)
    manifest.write(folder)
    return manifest


@contextmanager
def folder_lock(folder: Path, wait: bool = False) -> Iterator[None]:
    """Let only one process at a time make a folder; the lock goes when the process ends, however it ends.

    Args:
        folder: what is made; the lock is a hidden file beside it.
        wait: wait for the other process instead of refusing.

    Raises:
        MsencError: another process holds the lock, and `wait` is False.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder.parent / f".{folder.name}.lock", timeout=-1 if wait else 0):
            yield
    except Timeout as e:
        raise MsencError(f"{folder}: another process is preparing this folder. Wait for it, then repeat.") from e


def content_digest(dialogues: Iterable[Dialogue]) -> str:
    """A hash of all that the annotations say; turns and audit carry it."""
    return _digest(d.to_json() for d in dialogues)


def _write_turns(folder: Path, dialogues: list[Dialogue]) -> dict[str, Any]:
    samples = [(d.id, d.split, {"turns.json": d.to_json()}) for d in dialogues]
    settings = {"content": content_digest(dialogues)}
    return _reuse(folder / "turns", settings, dialogues) or write_stream(folder / "turns", samples, settings)


def _write_features(
    folder: Path,
    root: Path,
    recipe: StreamRecipe,
    dialogues: list[Dialogue],
    turns_hash: str,
    num_workers: int,
) -> tuple[dict[str, Any], list[Rejection]]:
    stream = folder / f"{recipe.kind}-{recipe.name}"
    clips = _digest(_clip_size(root, u.clip) for d in dialogues for u in d.utterances)
    settings = {**recipe.settings, "dim": recipe.dim, "turns": turns_hash, "clips": clips}
    rejections: list[Rejection] = []
    index = _reuse(stream, settings, dialogues) if (stream / "rejected.csv").is_file() else None
    if index is None:
        dim = recipe.make_encoder().dim
        if dim != recipe.dim:
            raise MsencError(
                f"model.streams.{recipe.kind}: the encoder {recipe.name!r} gives features {dim} wide, the config says "
                f"dim={recipe.dim}. Set model.streams.{recipe.kind}.dim={dim}."
            )
        samples = extract(
            dialogues, root, recipe.make_encoder, recipe.kind, num_workers, rejections, f"{recipe.kind}: {recipe.name}"
        )
        index = write_stream(stream, samples, settings)
        write_rejections(stream / "rejected.csv", rejections)
    else:
        rejections = read_rejections(stream / "rejected.csv")
    return index, rejections


def _reuse(stream: Path, settings: Mapping[str, Any], dialogues: list[Dialogue]) -> dict[str, Any] | None:
    """The stream's index, if it is there and was made with these settings, of all utterances of these dialogues."""
    try:
        index = read_index(stream)
    except MsencError:
        return None
    found = [(s["id"], s["split"], len(s["lengths"])) for s in index["samples"]]
    is_complete = found == [(d.id, d.split, len(d.utterances)) for d in dialogues]
    return index if index["settings"] == settings and is_complete else None


def _kept_streams(folder: Path, turns_hash: str, remade: set[str]) -> dict[str, StreamInfo]:
    try:
        before = DatasetManifest.read(folder)
    except MsencError:
        return {}
    if before.turns_hash != turns_hash:
        return {}
    return {
        name: info
        for name, info in before.streams.items()
        if info.kind != "text" and name not in remade and _is_whole(folder / name, info)
    }


def _is_whole(stream: Path, info: StreamInfo) -> bool:
    try:
        index = read_index(stream)
    except MsencError:
        return False
    return index["hash"] == info.hash and (stream / "rejected.csv").is_file()


def _info(
    kind: str, encoder: str | None, dim: int | None, index: dict[str, Any], dialogues: list[Dialogue]
) -> StreamInfo:
    split_of = {d.id: d.split for d in dialogues}
    utterances: dict[str, int] = {}
    for sample in index["samples"]:
        split = split_of[sample["id"]]
        utterances[split] = utterances.get(split, 0) + sum(length > 0 for length in sample["lengths"])
    return StreamInfo(kind, encoder, dim, index["settings"], index["hash"], utterances)


def _clip_size(root: Path, clip: str | None) -> tuple[str | None, int]:
    """What tells, without reading it, that a clip was exchanged."""
    path = root / clip if clip else None
    return clip, path.stat().st_size if path and path.is_file() else -1


def _digest(values: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for value in values:
        digest.update(json.dumps(value, sort_keys=True).encode())
    return digest.hexdigest()
