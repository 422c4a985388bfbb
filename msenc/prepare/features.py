"""Dialogues with clips -> features of one encoder, ready for `msenc.store.shards.write_stream`.

The work is cut into items of some dialogues each (`msenc.work.items`): what is encoded stays, whatever happens to
the rest.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from msenc.files import digest
from msenc.models.layers import layers_of, num_outputs
from msenc.raw import container
from msenc.raw.container import MAX_CLIP_S, MediaError
from msenc.raw.media import read_audio, read_frames
from msenc.types import Dialogue, MsencError, Rejection, Utterance
from msenc.work.items import Item, Members, read_result
from msenc.work.threads import one_thread

if TYPE_CHECKING:
    from msenc.models.encoders import Encoder

T = TypeVar("T")

VERSION = [1, container.VERSION]
"""Of how features are stored, and how clips are decoded; with another one, equal clips may give other features."""

MIN_ITEM_UTTERANCES = 16
# Clips that are held and encoded together, while the next ones are decoded.
MAX_BATCH_CLIPS = 8
MAX_BATCH_BYTES = 64 * 2**20
FLOAT16_MAX = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class StreamRecipe:
    """How a stream's features are made.

    Args:
        kind: ``audio`` or ``video``.
        name: the encoder's name.
        dim: width that the config claims, of all layers together; the encoder's own must agree.
        make_encoder: builds the encoder; picklable (a class, or `functools.partial` of one).
        settings: the encoder's config; features are made anew when it changes.
    """

    kind: str
    name: str
    dim: int
    make_encoder: "Callable[[], Encoder]"
    settings: Mapping[str, Any]

    @property
    def stream(self) -> str:
        """Name of the stream and its folder."""
        return f"{self.kind}-{self.name}"


def feature_items(dialogues: Sequence[Dialogue], recipe: StreamRecipe, hashes: Mapping[str, str | None]) -> list[Item]:
    """Cut the extraction of a stream into items: neighbouring dialogues, together 16 utterances or a few more.

    Args:
        dialogues: all of them, in their order.
        recipe: what makes the features.
        hashes: clip -> hash of its content, or None where there is no such file.
    """
    groups: list[list[Dialogue]] = []
    size = MIN_ITEM_UTTERANCES
    for dialogue in dialogues:
        if size >= MIN_ITEM_UTTERANCES:
            groups.append([])
            size = 0
        groups[-1].append(dialogue)
        size += len(dialogue.utterances)
    return [
        Item(
            id=group[0].id if len(group) == 1 else f"{group[0].id} .. {group[-1].id}",
            key=digest(
                [
                    VERSION,
                    [recipe.kind, recipe.dim, dict(recipe.settings)],
                    [[d.id, [[u.id, *_content(u, recipe.kind, hashes)] for u in d.utterances]] for d in group],
                ],
                length=64,
            ),
            input=tuple(group),
            size=sum(len(d.utterances) for d in group),
        )
        for group in groups
    ]


def _content(utterance: Utterance, kind: str, hashes: Mapping[str, str | None]) -> tuple[str | None, str | None]:
    clip = utterance.clip_of(kind)
    return clip, hashes.get(clip)


def read_features(
    items: Sequence[Item], folder: Path, rejections: list[Rejection]
) -> Iterator[tuple[str, str, Members]]:
    """Results of all items -> samples of the stream, in the order of the dialogues.

    Args:
        items: of `feature_items`, all done.
        folder: where their results are.
        rejections: receives what could not be used.

    Yields:
        (dialogue id, split, {"features.npy": float16 (sum of T, D), "offsets.npy": int64 (U+1,)}).
    """
    for item in items:
        members = read_result(item, folder)
        rejections += [Rejection(**rejection) for rejection in members["rejections.json"]]
        features, offsets = members["features.npy"], members["offsets.npy"]
        first = 0
        for dialogue in item.input:
            own = offsets[first : first + len(dialogue.utterances) + 1]
            first += len(dialogue.utterances)
            yield (
                dialogue.id,
                dialogue.split,
                {"features.npy": features[own[0] : own[-1]], "offsets.npy": own - own[0]},
            )


def make_extract(root: Path, recipe: StreamRecipe) -> Callable[[Sequence[Dialogue]], Members]:
    """Build the encoder; what comes back does an item's work, `extract`.

    Raises:
        MsencError: the encoder is of another width than the recipe says.
    """
    encoder = recipe.make_encoder()
    if encoder.dim != recipe.dim:
        node, number = f"model.streams.{recipe.kind}", num_outputs(recipe.settings)
        own, said = (f"{dim / number:g}" for dim in (encoder.dim, recipe.dim))
        each = " in each layer" if layers_of(recipe.settings) else ""
        raise MsencError(
            f"{node}: the encoder {recipe.name!r} gives features {own} wide{each}, the config says "
            f"dim={said}. Set {node}.dim={own}."
        )
    return partial(extract, root=root, encoder=encoder, kind=recipe.kind)


def extract(
    dialogues: Sequence[Dialogue], root: Path, encoder: "Encoder", kind: str, max_s: float = MAX_CLIP_S
) -> Members:
    """Features of the utterances, one after another, with offsets and rejections.

    An utterance without the stream gets length zero, and a rejection. Clips are decoded in a thread while those before
    are encoded.

    Args:
        dialogues: whose clips to read.
        root: folder that the clips' paths start from.
        encoder: of this kind.
        kind: ``audio`` or ``video``.
        max_s: a longer clip is rejected.

    Raises:
        MsencError: the encoder gives what float16 cannot hold, or another width than it says.
    """
    turns = [(f"{d.id}/utt{u.id}", u) for d in dialogues for u in d.utterances]
    empty = np.zeros((0, encoder.dim), np.float16)
    features = [empty] * len(turns)  # each (T, D)
    reasons: dict[int, str] = {}
    with one_thread(), ThreadPoolExecutor(1) as pool:
        for batch in _one_ahead(pool, _decode([u for _, u in turns], root, encoder, kind, reasons, max_s)):
            for place, encoded in zip(batch, encoder.encode(list(batch.values())), strict=True):
                features[place] = _checked(np.asarray(encoded), encoder, turns[place][0])
                if len(encoded) == 0:
                    reasons[place] = "clip too short"
    rejections = [
        Rejection(turns[place][0], kind, reason, turns[place][1].clip_of(kind) or "")
        for place, reason in sorted(reasons.items())
    ]
    return {
        "features.npy": np.concatenate([empty, *features]),
        "offsets.npy": np.cumsum([0] + [len(f) for f in features], dtype=np.int64),
        "rejections.json": [asdict(rejection) for rejection in rejections],
    }


def encode_clip(path: Path, encoder: "Encoder", kind: str, max_s: float = MAX_CLIP_S) -> np.ndarray:
    """One clip's features, (T, D) float16, made as `extract` makes them.

    Raises:
        MediaError: the clip lacks the stream, is too short for the encoder, or longer than `max_s`.
    """
    clip = Utterance("0", "", "", clip=str(Path(path).resolve()))
    members = extract([Dialogue(str(path), "test", (clip,))], Path(), encoder, kind, max_s)
    for rejection in members["rejections.json"]:
        raise MediaError(rejection["reason"])
    return members["features.npy"]


def _decode(
    utterances: Sequence[Utterance], root: Path, encoder: "Encoder", kind: str, reasons: dict[int, str], max_s: float
) -> Iterator[dict[int, np.ndarray]]:
    """Batches of decoded clips by their place among the utterances; why there is none goes into `reasons`."""
    batch: dict[int, np.ndarray] = {}
    for place, utterance in enumerate(utterances):
        try:
            batch[place] = _read(utterance.clip_of(kind), root, encoder, kind, max_s)
        except MediaError as error:
            reasons[place] = error.reason
        if len(batch) == MAX_BATCH_CLIPS or sum(clip.nbytes for clip in batch.values()) > MAX_BATCH_BYTES:
            yield batch
            batch = {}
    if batch:
        yield batch


def _read(clip: str | None, root: Path, encoder: "Encoder", kind: str, max_s: float) -> np.ndarray:
    if clip is None:
        raise MediaError("clip missing")
    if kind == "audio":
        return read_audio(root / clip, encoder.sample_rate, max_s=max_s)
    return read_frames(root / clip, encoder.fps, max_s=max_s)


def _checked(features: np.ndarray, encoder: "Encoder", where: str) -> np.ndarray:
    name = type(encoder).__name__
    if features.ndim != 2 or features.shape[1] != encoder.dim:
        raise MsencError(
            f"{where}: encoder {name} gave features of shape {features.shape}; expected (T, {encoder.dim})."
        )
    largest = float(np.abs(features).max(initial=0.0))
    if not largest <= FLOAT16_MAX:  # NaN compares as false
        raise MsencError(
            f"{where}: encoder {name} gave a value of magnitude {largest:g}; expected finite values up to "
            f"{FLOAT16_MAX:g}, which float16 can hold. Check the encoder's settings, or leave out this clip."
        )
    return features.astype(np.float16)


def _one_ahead(pool: ThreadPoolExecutor, values: Iterator[T]) -> Iterator[T]:
    """The same values, each made while the one before is in use."""
    step = pool.submit(next, values, None)
    while (value := step.result()) is not None:
        step = pool.submit(next, values, None)
        yield value
