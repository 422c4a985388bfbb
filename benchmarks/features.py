"""Share of feature extraction that is the encoder's bare forward, and what sparse decoding of video saves.

    python benchmarks/features.py [--quick] [--repetitions N] [--json FILE]

Two processes of one thread each, as ``prepare.py prepare_workers=2`` works. The clips are 720p at 24 frames/s with
sound, of MELD's mean length; the encoders have the sizes of openai/whisper-base and openai/clip-vit-base-patch32, with
random weights.

- ``extract``: what `prepare.py` does with them: decode, resample, mel or resize, encode, float16.
- ``forward``: the same encoder on the same batches, already decoded and prepared, in memory. Nothing can be faster.
- ``every picture``: decode and convert all pictures, and keep those that are on screen at 3 per second.
- ``sparse``: `read_frames`, which gives the same pictures bit for bit. What other pictures refer to has to be decoded
  whether it is kept or not: ``references alone`` is the floor, with no picture converted.
"""

import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from measure import interleave, parser, print_table, summarise, time_rows, write_json

from msenc.models.encoders import ClipVision, WhisperEncoder
from msenc.prepare.features import extract
from msenc.raw.media import read_frames
from msenc.types import Dialogue, Utterance

PROCESSES = 2
FPS = 3.0
SECONDS = 3.1  # MELD's mean utterance
RATE = 16000


def main() -> None:
    arguments = parser(__doc__).parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="msenc-features-") as name:
        folder = Path(name)
        clips = [write_clip(folder / f"{i}.mp4", seed=i) for i in range(2 if arguments.quick else 16)]
        results = {
            "whisper": measure_encoder("audio", save_whisper(folder / "whisper"), clips, arguments.repetitions),
            "clip": measure_encoder("video", save_clip(folder / "clip"), clips, arguments.repetitions),
            "decoding": measure_decoding(clips[: 1 if arguments.quick else 4], arguments.repetitions),
        }
    write_json(arguments.json, results)


# ---------------------------------------------------------------------------------------------------- encoders


def measure_encoder(kind: str, folder: Path, clips: list[Path], repetitions: int) -> dict[str, Any]:
    pools = [
        ProcessPoolExecutor(1, get_context("spawn"), initializer=start, initargs=(kind, folder, clips[n::PROCESSES]))
        for n in range(PROCESSES)
    ]

    def run(task: Callable[[], None]) -> None:
        for future in [pool.submit(task) for pool in pools]:
            future.result()

    try:
        seconds = interleave({"forward": partial(run, forward), "extract": partial(run, run_extract)}, repetitions)
    finally:
        for pool in pools:
            pool.shutdown()
    results = summarise(seconds, "extract")
    title = f"{folder.name}: {len(clips)} clips by {PROCESSES} processes; the ratio is the share of the bare forward"
    columns = ("variant", "median s", "fastest", "slowest", "of extract")
    print_table(title, columns, time_rows(results, "extract"))
    return results


class Replay:
    """In place of what prepares an encoder's input: the tensors that it made before, in the same order."""

    def __init__(self, prepare: Callable[..., Any]) -> None:
        self.prepare, self.made, self.next = prepare, [], 0

    def record(self, *args: Any, **kwargs: Any) -> Any:
        """Prepare, and remember."""
        self.made.append(self.prepare(*args, **kwargs))
        return self.made[-1]

    def replay(self, *args: Any, **kwargs: Any) -> Any:
        """What was prepared at this place of the order."""
        self.next += 1
        return self.made[(self.next - 1) % len(self.made)]


_state: dict[str, Any] = {}  # of a worker process


def start(kind: str, folder: Path, clips: list[Path]) -> None:
    torch.set_num_threads(1)
    make = {"audio": WhisperEncoder, "video": partial(ClipVision, fps=FPS)}[kind]
    utterances = tuple(Utterance(str(i), "", "", clip=clip.name) for i, clip in enumerate(clips))
    dialogues = [Dialogue("d", "train", utterances)]
    _state.update(kind=kind, root=clips[0].parent, dialogues=dialogues, encoder=make(str(folder)))
    bare, batches = make(str(folder)), []
    part = "extractor" if kind == "audio" else "processor"
    replay, encode = Replay(getattr(bare, part)), bare.encode
    setattr(bare, part, replay.record)
    bare.encode = lambda clips: batches.append(list(clips)) or encode(clips)
    extract(dialogues, clips[0].parent, bare, kind)
    setattr(bare, part, replay.replay)
    _state.update(forward=encode, batches=batches)


def run_extract() -> None:
    extract(_state["dialogues"], _state["root"], _state["encoder"], _state["kind"])


def forward() -> None:
    for batch in _state["batches"]:
        _state["forward"](batch)


def save_whisper(folder: Path) -> Path:
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperModel

    sizes = {"encoder_layers": 6, "encoder_attention_heads": 8, "encoder_ffn_dim": 2048, "d_model": 512}
    decoder = {"decoder_layers": 1, "decoder_attention_heads": 8, "decoder_ffn_dim": 64}  # not kept
    WhisperModel(WhisperConfig(**sizes, **decoder)).save_pretrained(folder)
    WhisperFeatureExtractor().save_pretrained(folder)
    return folder


def save_clip(folder: Path) -> Path:
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModelWithProjection

    CLIPVisionModelWithProjection(CLIPVisionConfig(projection_dim=512)).save_pretrained(folder)  # ViT-B/32
    CLIPImageProcessorPil().save_pretrained(folder)
    return folder


# ---------------------------------------------------------------------------------------------------- decoding


def measure_decoding(clips: list[Path], repetitions: int) -> dict[str, Any]:
    for clip in clips:
        np.testing.assert_array_equal(every_picture(clip), read_frames(clip, FPS))
    variants = {
        "every picture": lambda: [every_picture(clip) for clip in clips],
        "sparse": lambda: [read_frames(clip, FPS) for clip in clips],
        "references alone": lambda: [references(clip) for clip in clips],
    }
    results = summarise(interleave(variants, repetitions), "sparse")
    title = f"decoding {len(clips)} clips of 720p, {FPS:g} pictures/s kept; the ratio is how many times slower"
    print_table(title, ("variant", "median s", "fastest", "slowest", "to sparse"), time_rows(results, "sparse"))
    return results


def every_picture(path: Path) -> np.ndarray:
    kept: list[np.ndarray] = []
    picture = None
    with av.open(str(path)) as container:
        for frame in container.decode(container.streams.video[0]):
            while picture is not None and len(kept) / FPS < frame.time - 1e-6:
                kept.append(picture)
            picture = frame.to_ndarray(format="rgb24")
        while len(kept) / FPS < SECONDS - 1e-6:
            kept.append(picture)
    return np.stack(kept)


def references(path: Path) -> int:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.skip_frame = "NONREF"
        return sum(1 for _ in container.decode(stream))


# ---------------------------------------------------------------------------------------------------- clips


def write_clip(path: Path, seed: int) -> Path:
    """A picture that moves, with grain, and a tone; x264's own settings."""
    rng = np.random.default_rng(seed)
    height, width, rate = 720, 1280, 24
    coarse = np.clip(128 + 50 * rng.normal(size=(height // 8 + 8, width // 8 + 40, 3)), 0, 255)
    scene = np.kron(coarse, np.ones((8, 8, 1))).astype(np.int16)
    grain = [rng.integers(-6, 7, (height, width, 1), dtype=np.int16) for _ in range(7)]
    with av.open(str(path), "w") as file:
        video = file.add_stream("libx264", rate=rate)
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        sound = file.add_stream("aac", rate=RATE, layout="mono")
        for i in range(round(SECONDS * rate)):
            x, y = 3 * i % 300, round(20 + 20 * np.sin(i / 9))
            picture = np.clip(scene[y : y + height, x : x + width] + grain[i % 7], 0, 255).astype(np.uint8)
            file.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        tone = 0.3 * np.sin(np.arange(round(SECONDS * RATE)) / 9) + 0.01 * rng.normal(size=round(SECONDS * RATE))
        frame = av.AudioFrame.from_ndarray(tone.astype(np.float32)[None], format="fltp", layout="mono")
        frame.sample_rate = RATE
        file.mux(sound.encode(frame))
        for stream in (video, sound):
            file.mux(stream.encode(None))
    return path


if __name__ == "__main__":
    sys.exit(main())
