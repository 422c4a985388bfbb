"""Raw material -> prepared data: annotations, shards of turns, shards of features per stream, manifest.

Each stream is made only where it is missing or was made of something else, and appears whole or not at all; what takes
long is cut into items that stay when the rest is killed, and can be spread over jobs. The manifest is written last:
without it the folder is no data set.
"""

import glob
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from msenc.files import content_hash, inside
from msenc.models.layers import holds
from msenc.prepare.describe import audio_hashes, describe_dialogues, describe_settings, measure_items, run_measures
from msenc.prepare.features import VERSION, StreamRecipe, feature_items, make_extract, read_features
from msenc.raw.annotations import Annotations, content_digest
from msenc.raw.hashes import hash_clips
from msenc.speech.attributes import VoiceSettings
from msenc.store.flags import find_audit
from msenc.store.labels import write_labels
from msenc.store.manifest import (
    DatasetManifest,
    StreamInfo,
    count_rejections,
    count_splits,
    read_rejections,
    write_rejections,
)
from msenc.store.shards import clear_leftovers, read_index, write_stream
from msenc.types import Dialogue, MsencError, Rejection
from msenc.work.items import Item, Part, run_items, say_missing


def prepare_dataset(
    name: str,
    annotations: Annotations,
    root: Path,
    folder: Path,
    streams: list[StreamRecipe],
    num_workers: int,
    voice: VoiceSettings | None = None,
) -> DatasetManifest:
    """Make what is missing of a prepared data set.

    Args:
        name: of the data set; begins every id.
        annotations: of the raw material.
        root: folder that the clips' paths start from.
        folder: where the prepared data goes; streams of other encoders in it stay.
        streams: the features wanted.
        num_workers: processes for decoding and encoding.
        voice: how to describe the turns' voices; None leaves the descriptions as the annotations have them.

    Returns:
        The manifest, as written to ``dataset.json``; what could not be used stands in ``rejected.csv``.

    Raises:
        MsencError: a full disk, an encoder of another width than claimed, or another process that prepares the same
            folder.
    """
    clear_leftovers(folder)
    dialogues, rejections = annotations.dialogues, list(annotations.rejections)
    settings: dict[str, Any] = {} if annotations.val is None else {"val": annotations.val}
    if voice is not None:
        described, _ = describe_dialogues(dialogues, root, folder, voice, num_workers, rejections)
        dialogues = dialogues if voice.only_measure else described
        settings["voice"] = describe_settings(voice)
    turns = _write_turns(folder, dialogues)
    infos = {"turns": _info("text", None, None, turns, dialogues)}
    # Streams of other encoders stay usable as long as they were made from these turns.
    for stream, info in _kept_streams(folder, turns["hash"], {recipe.stream for recipe in streams}).items():
        infos[stream] = info
        rejections += read_rejections(folder / stream / "rejected.csv")
    hashes = _hashes(root, dialogues, folder, num_workers) if streams else {}
    for recipe in streams:
        index, rejected = _write_features(folder, root, recipe, dialogues, hashes, turns["hash"], num_workers)
        rejections += rejected
        infos[recipe.stream] = _info(recipe.kind, recipe.name, index["settings"]["dim"], index, dialogues)
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
    write_labels(folder, annotations.labels)
    write_rejections(folder / "rejected.csv", rejections)
    manifest.write(folder)
    return manifest


def prepare_part(
    annotations: Annotations,
    root: Path,
    folder: Path,
    streams: list[StreamRecipe],
    num_workers: int,
    voice: VoiceSettings | None,
    part: Part,
) -> list[str]:
    """Do one part of what takes long, so that `prepare_dataset` finds it done; several parts may run at one time.

    Args:
        annotations: as `prepare_dataset` takes it, and so on until `voice`.
        root: the same.
        folder: the same.
        streams: the same.
        num_workers: the same.
        voice: the same.
        part: which of the items to do.

    Returns:
        Per stage what other parts have to do yet, in words; empty when all is there.

    Raises:
        MsencError: as `prepare_dataset` does.
    """
    dialogues = annotations.dialogues
    hashes = _hashes(root, dialogues, folder, num_workers)
    stages: dict[str, tuple[list[Item], list[Item]]] = {}  # all items, and those that are missing
    if voice is not None:
        items = measure_items(audio_hashes(dialogues, hashes), root, folder)
        stages["voice"] = items, run_measures(items, folder, num_workers, part)
    for recipe in streams:
        index = _index(folder / recipe.stream, dialogues)
        settings = _stream_settings(recipe, dialogues, hashes)
        if index is None or not holds({**index["settings"], "turns": None}, {**settings, "turns": None}):
            items = feature_items(dialogues, recipe, hashes)
            stages[recipe.stream] = items, _extract(items, folder, root, recipe, num_workers, part)
    return [f"{stage}: {say_missing(items, missing, part)}" for stage, (items, missing) in stages.items() if missing]


@contextmanager
def folder_lock(folder: Path, wait: bool = False, part: Part | None = None) -> Iterator[None]:
    """Let only one process at a time make a folder, or each of its parts; locks go with their process, however it ends.

    Args:
        folder: what is made; the locks are hidden files beside it.
        wait: wait for whoever makes the folder, or parts of it, instead of refusing.
        part: hold the lock of this part alone. Other parts may be made meanwhile, but not the folder as a whole.

    Raises:
        MsencError: the folder or a part of it is being made, and `wait` is False; or the same part is.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    timeout = -1 if wait else 0
    with ExitStack() as stack:
        try:
            # Parts take and look at their locks under the folder's, so that nobody comes between.
            with FileLock(folder.parent / f".{folder.name}.lock", timeout=timeout) as whole:
                if part is not None:
                    name = f".{folder.name}.part-{part.number}-of-{part.of}.lock"
                    stack.enter_context(FileLock(folder.parent / name, timeout=0))
                    whole.release()
                else:
                    for path in folder.parent.glob(f".{folder.name}.part-*.lock"):
                        with FileLock(path, timeout=timeout):
                            path.unlink(missing_ok=True)
                yield
        except Timeout as e:
            what = "this folder" if part is None else f"this folder, or part {part} of it"
            raise MsencError(f"{folder}: another process is preparing {what}. Wait for it, then repeat.") from e


def parts_begun(folder: Path) -> dict[Part, bool]:
    """Parts of a folder that were begun since it was whole -> whether a process is at it; others ended, or were killed.

    Args:
        folder: as `folder_lock` takes it.
    """
    begun = {}
    for path in folder.parent.glob(f".{glob.escape(folder.name)}.part-*-of-*.lock"):
        number, _, of = path.name.removeprefix(f".{folder.name}.part-").removesuffix(".lock").partition("-of-")
        if not (number.isdecimal() and of.isdecimal()):
            continue
        try:
            with FileLock(path, timeout=0):
                begun[Part(int(number), int(of))] = False
        except Timeout:
            begun[Part(int(number), int(of))] = True
    return begun


def _write_turns(folder: Path, dialogues: list[Dialogue]) -> dict[str, Any]:
    samples = [(d.id, d.split, {"turns.json": d.to_json()}) for d in dialogues]
    settings = {"content": content_digest(dialogues)}
    return _reuse(folder / "turns", settings, dialogues) or write_stream(folder / "turns", samples, settings)


def _write_features(
    folder: Path,
    root: Path,
    recipe: StreamRecipe,
    dialogues: list[Dialogue],
    hashes: Mapping[str, str | None],
    turns_hash: str,
    num_workers: int,
) -> tuple[dict[str, Any], list[Rejection]]:
    stream = folder / recipe.stream
    settings = {**_stream_settings(recipe, dialogues, hashes), "turns": turns_hash}
    rejections: list[Rejection] = []
    index = _reuse(stream, settings, dialogues) if (stream / "rejected.csv").is_file() else None
    if index is None:
        items = feature_items(dialogues, recipe, hashes)
        _extract(items, folder, root, recipe, num_workers)
        index = write_stream(stream, read_features(items, _items_folder(folder, recipe), rejections), settings)
        write_rejections(stream / "rejected.csv", rejections)
    else:
        rejections = read_rejections(stream / "rejected.csv")
    shutil.rmtree(_items_folder(folder, recipe), ignore_errors=True)
    return index, rejections


def _extract(
    items: Sequence[Item], folder: Path, root: Path, recipe: StreamRecipe, num_workers: int, part: Part | None = None
) -> list[Item]:
    make = partial(make_extract, root, recipe)
    description = f"{recipe.kind}: {recipe.name}"
    return run_items(items, _items_folder(folder, recipe), make, num_workers, description, "utterances", part)


def _items_folder(folder: Path, recipe: StreamRecipe) -> Path:
    return inside(folder, f".{recipe.stream}.items")


def _stream_settings(
    recipe: StreamRecipe, dialogues: Iterable[Dialogue], hashes: Mapping[str, str | None]
) -> dict[str, Any]:
    """What a stream is made of, but for the turns."""
    names = (u.clip_of(recipe.kind) for d in dialogues for u in d.utterances)
    clips = content_hash((clip, hashes.get(clip)) for clip in names)
    return {**recipe.settings, "dim": recipe.dim, "clips": clips, "version": VERSION}


def _hashes(root: Path, dialogues: Iterable[Dialogue], folder: Path, num_workers: int) -> dict[str, str | None]:
    return hash_clips(root, (clip for d in dialogues for u in d.utterances for clip in u.clips), folder, num_workers)


def _reuse(stream: Path, settings: Mapping[str, Any], dialogues: list[Dialogue]) -> dict[str, Any] | None:
    """The stream's index, if it is there and was made with these settings, of all utterances of these dialogues.

    A stream that holds more layers of the encoder than are wanted is one that was.
    """
    index = _index(stream, dialogues)
    return index if index is not None and holds(index["settings"], settings) else None


def _index(stream: Path, dialogues: list[Dialogue]) -> dict[str, Any] | None:
    try:
        index = read_index(stream)
    except MsencError:
        return None
    found = [(s["id"], s["split"], len(s["lengths"])) for s in index["samples"]]
    return index if found == [(d.id, d.split, len(d.utterances)) for d in dialogues] else None


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
