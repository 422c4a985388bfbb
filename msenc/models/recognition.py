"""Speech recognition by Whisper: transcribes turns without text, recordings, and synthesized replies."""

import re
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from msenc.models.pretrained import load_pretrained, quiet, to_dtype
from msenc.types import MsencError

NO_WORDS = re.compile(r"[\[(].*[\])]")
"""Whisper's output for audio without speech: [BLANK_AUDIO], (music)."""


class Passage(NamedTuple):
    """Words, and when they are spoken, in seconds from the start of the audio."""

    start_s: float
    end_s: float
    text: str


class Recogniser:
    """Audio (S,) -> passages, as segmented by Whisper.

    Args:
        name_or_path: a Whisper with its tokenizer and feature extractor; hub id or folder.
        language: code as ``en``, for a multilingual Whisper; None detects it for each clip.
        device: where the model runs.
        dtype: float32, bfloat16 or float16.
    """

    def __init__(
        self, name_or_path: str, language: str | None = "en", device: str = "cpu", dtype: str = "float32"
    ) -> None:
        from transformers import AutoConfig, WhisperForConditionalGeneration, WhisperProcessor

        config = load_pretrained(AutoConfig, name_or_path)
        if config.model_type != "whisper":
            raise MsencError(
                f"{name_or_path}: a model of type {config.model_type!r} cannot recognise speech. Expected a Whisper "
                "model."
            )
        self.processor = load_pretrained(WhisperProcessor, name_or_path)
        self.model = load_pretrained(WhisperForConditionalGeneration, name_or_path, dtype=to_dtype(dtype))
        self.model.to(device).eval()
        self.sample_rate: int = self.processor.feature_extractor.sampling_rate
        is_multilingual = getattr(self.model.generation_config, "is_multilingual", False)
        self._options = {"language": language, "task": "transcribe"} if is_multilingual else {}

    @torch.inference_mode()
    def __call__(self, sound: np.ndarray) -> list[Passage]:
        """Transcribe audio of any length.

        Args:
            sound: float32 (S,) at `sample_rate`.

        Returns:
            In temporal order; empty if no words were found.
        """
        return self._recognise([sound])[0]

    @torch.inference_mode()
    def texts(self, sounds: Sequence[np.ndarray], batch_size: int = 8) -> list[str]:
        """Transcribe several clips of at most 30 s, batched; returns one line each.

        Args:
            sounds: float32 (S,) each, at `sample_rate`.
            batch_size: clips per batch.
        """
        batches = [sounds[i : i + batch_size] for i in range(0, len(sounds), batch_size)]
        texts = [_joined(passages) for batch in batches for passages in self._recognise(batch)]
        # Whisper occasionally repeats itself in loops. Its own remedy is random, this one is not.
        return [
            _joined(self._recognise([sound], no_repeat_ngram_size=3)[0]) if _is_loop(text) else text
            for sound, text in zip(sounds, texts, strict=True)
        ]

    def _recognise(self, sounds: Sequence[np.ndarray], **options: Any) -> list[list[Passage]]:
        is_long = max(map(len, sounds)) > 30 * self.sample_rate
        inputs = self.processor(
            list(sounds),
            sampling_rate=self.sample_rate,
            return_tensors="pt",
            truncation=False,
            padding="longest" if is_long else "max_length",
            return_attention_mask=True,
        ).to(self.model.device)
        with quiet(hide_bars=True):  # Whisper's own settings reach `generate` in a way that triggers a warning
            found = self.model.generate(
                inputs.input_features.to(self.model.dtype),
                attention_mask=inputs.attention_mask,
                return_timestamps=True,
                return_segments=True,
                **self._options,
                **options,
            )
        return [[p for segment in segments if (p := self._passage(segment))] for segments in found["segments"]]

    def _passage(self, segment: dict[str, Any]) -> Passage | None:
        text = self.processor.tokenizer.decode(segment["tokens"], skip_special_tokens=True).strip()
        if not text or NO_WORDS.fullmatch(text):
            return None
        return Passage(float(segment["start"]), float(segment["end"]), text)

    def text(self, sound: np.ndarray) -> str:
        """The transcript, in one line."""
        return _joined(self(sound))


def _joined(passages: Sequence[Passage]) -> str:
    return " ".join(passage.text for passage in passages)


def _is_loop(text: str) -> bool:
    """Whether a text repeats itself unnaturally, by Whisper's measure and threshold (arXiv 2212.04356)."""
    data = text.encode()
    return len(data) > 2.4 * len(zlib.compress(data))
