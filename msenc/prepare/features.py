"""Dialogues with clips -> features of one encoder, ready for `msenc.data.shards.write_stream`."""

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from msenc.data.media import MediaError, read_audio, read_frames
from msenc.prepare.workers import progress_bar, watch_parent
from msenc.types import Dialogue, MsencError, Rejection, Utterance

if TYPE_CHECKING:
    from msenc.models.encoders import Encoder

# Decoded clips that are held and encoded together; a dialogue of long clips takes several rounds.
MAX_BATCH_BYTES = 64 * 2**20
FLOAT16_MAX = float(np.finfo(np.float16).max)


def extract(
    dialogues: Sequence[Dialogue],
    root: Path,
    make_encoder: "Callable[[], Encoder]",
    kind: str,
    num_workers: int,
    rejections: list[Rejection],
    description: str,
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Decode and encode every utterance; dialogues come in their order, whatever the number of workers.

    An utterance without the stream gets length zero and is appended to `rejections`. At most a few dialogues per
    worker are held at a time.

    Args:
        dialogues: whose clips to read.
        root: folder that the clips' paths start from.
        make_encoder: builds the encoder, once per worker; picklable (a class, or `functools.partial` of one).
        kind: ``audio`` or ``video``.
        num_workers: processes; 0 works in this one. Each uses one torch thread.
        rejections: receives what could not be used.
        description: what the progress bar says.

    Yields:
        (dialogue id, split, {"features.npy": float16 (sum of T, D), "offsets.npy": int64 (U+1,)}).

    Raises:
        MsencError: if an encoder gives what float16 cannot hold or another width than it says, or a worker dies.
    """
    with progress_bar("utterances") as progress:
        bar = progress.add_task(description, total=sum(len(d.utterances) for d in dialogues))
        results = _results(dialogues, Path(root), make_encoder, kind, num_workers)
        for dialogue, (members, rejected) in zip(dialogues, results, strict=True):
            rejections += rejected
            progress.advance(bar, len(dialogue.utterances))
            yield dialogue.id, dialogue.split, members


def encode_clip(path: Path, encoder: "Encoder", kind: str) -> np.ndarray:
    """One clip's features, (T, D) float16, made as `extract` makes them.

    Raises:
        MediaError: the clip lacks the stream, or is too short for the encoder.
    """
    clip = Utterance("0", "", "", clip=str(Path(path).resolve()))
    members, rejected = _Worker(Path(), lambda: encoder, kind)(Dialogue(str(path), "test", (clip,)))
    if rejected:
        raise MediaError(rejected[0].reason)
    return members["features.npy"]


Result = tuple[dict[str, np.ndarray], list[Rejection]]


def _results(
    dialogues: Sequence[Dialogue], root: Path, make_encoder: "Callable[[], Encoder]", kind: str, num_workers: int
) -> Iterator[Result]:
    if num_workers == 0:
        worker = _Worker(root, make_encoder, kind)
        yield from map(worker, dialogues)
        return
    # A forked process would inherit torch's threads in an unknown state.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_workers, context, initializer=_start, initargs=(root, make_encoder, kind))
    waiting: deque = deque()
    try:
        for dialogue in dialogues:
            waiting.append((dialogue, pool.submit(_work, dialogue)))
            if len(waiting) >= 4 * num_workers:
                yield waiting.popleft()[1].result()
        while waiting:
            yield waiting.popleft()[1].result()
    except BrokenProcessPool as error:
        raise MsencError(
            f"A worker process died while {kind} features were extracted; memory that ran out is the usual cause. "
            f"{num_workers} workers ran; set fewer."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


class _Worker:
    """Dialogue -> (members, rejections). The encoder is built at the first call, so that its errors arrive whole."""

    def __init__(self, root: Path, make_encoder: "Callable[[], Encoder]", kind: str):
        self.root, self.make_encoder, self.kind = root, make_encoder, kind
        self.encoder: Encoder | None = None

    def __call__(self, dialogue: Dialogue) -> Result:
        import torch

        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)  # sums in one order, whatever the number of workers
        try:
            if self.encoder is None:
                self.encoder = self.make_encoder()
            return self._extract(dialogue)
        finally:
            torch.set_num_threads(num_threads)

    def _extract(self, dialogue: Dialogue) -> Result:
        empty = np.zeros((0, self.encoder.dim), np.float16)
        features = [empty] * len(dialogue.utterances)  # each (T, D)
        rejections: list[Rejection] = []
        batch: dict[int, np.ndarray] = {}

        def reject(u: int, reason: str) -> None:
            utterance = dialogue.utterances[u]
            id = f"{dialogue.id}/utt{utterance.id}"
            rejections.append(Rejection(id, self.kind, reason, utterance.clip or ""))

        def encode_batch() -> None:
            for u, encoded in zip(batch, self._encode(list(batch.values())), strict=True):
                features[u] = self._checked(encoded, f"{dialogue.id}, utterance {dialogue.utterances[u].id}")
                if len(encoded) == 0:
                    reject(u, "clip too short")
            batch.clear()

        for u, utterance in enumerate(dialogue.utterances):
            try:
                batch[u] = self._read(utterance.clip)
            except MediaError as error:
                reject(u, error.reason)
            if sum(clip.nbytes for clip in batch.values()) > MAX_BATCH_BYTES:
                encode_batch()
        if batch:
            encode_batch()
        offsets = np.cumsum([0] + [len(f) for f in features], dtype=np.int64)
        return {"features.npy": np.concatenate([empty, *features]), "offsets.npy": offsets}, rejections

    def _read(self, clip: str | None) -> np.ndarray:
        if clip is None:
            raise MediaError("clip missing")
        if self.kind == "audio":
            return read_audio(self.root / clip, self.encoder.sample_rate)
        return read_frames(self.root / clip, self.encoder.fps)

    def _encode(self, clips: list[np.ndarray]) -> list[np.ndarray]:
        return [np.asarray(features) for features in self.encoder.encode(clips)]

    def _checked(self, features: np.ndarray, where: str) -> np.ndarray:
        name = type(self.encoder).__name__
        if features.ndim != 2 or features.shape[1] != self.encoder.dim:
            raise MsencError(
                f"{where}: encoder {name} gave features of shape {features.shape}; expected (T, {self.encoder.dim})."
            )
        largest = float(np.abs(features).max(initial=0.0))
        if not largest <= FLOAT16_MAX:  # NaN compares as false
            raise MsencError(
                f"{where}: encoder {name} gave a value of magnitude {largest:g}; expected finite values up to "
                f"{FLOAT16_MAX:g}, which float16 can hold. Check the encoder's settings, or leave out this clip."
            )
        return features.astype(np.float16)


_worker: _Worker | None = None  # of this worker process


def _start(root: Path, make_encoder: "Callable[[], Encoder]", kind: str) -> None:
    global _worker
    _worker = _Worker(root, make_encoder, kind)
    watch_parent()


def _work(dialogue: Dialogue) -> Result:
    return _worker(dialogue)
