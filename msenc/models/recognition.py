"""Sound -> words, by Whisper: fills in what a turn says, transcribes recordings, and checks synthetic speech."""

import re
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from msenc.models.pretrained import load_pretrained, quiet, to_dtype
from msenc.types import MsencError

NO_WORDS = re.compile(r"[\[(].*[\])]")
"""What Whisper writes where it hears no speech: [BLANK_AUDIO], (music)."""


class Passage(NamedTuple):
    """Words, and when they are spoken, in seconds from the beginning of the sound."""

    start_s: float
    end_s: float
    text: str


class Recogniser:
    """Sound (S,) -> passages, as Whisper cuts it.

    Args:
        name_or_path: a Whisper with its tokenizer and feature extractor; hub id or folder.
        language: code as ``en``, for a multilingual Whisper; None lets it decide for each sound.
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
                f"{name_or_path}: a model of type {config.model_type!r} recognises no speech here. Expected a Whisper."
            )
        self.processor = load_pretrained(WhisperProcessor, name_or_path)
        self.model = load_pretrained(WhisperForConditionalGeneration, name_or_path, dtype=to_dtype(dtype))
        self.model.to(device).eval()
        self.sample_rate: int = self.processor.feature_extractor.sampling_rate
        is_multilingual = getattr(self.model.generation_config, "is_multilingual", False)
        self._options = {"language": language, "task": "transcribe"} if is_multilingual else {}

    @torch.inference_mode()
    def __call__(self, sound: np.ndarray) -> list[Passage]:
        """Transcribe a sound of any length.

        Args:
            sound: float32 (S,) at `sample_rate`.

        Returns:
            In the order of time; empty where no words were found.
        """
        return self._recognise([sound])[0]

    @torch.inference_mode()
    def texts(self, sounds: Sequence[np.ndarray], batch_size: int = 8) -> list[str]:
        """What is said in each of several sounds of at most 30 s, in one line each; several are recognised at once.

        Args:
            sounds: float32 (S,) each, at `sample_rate`.
            batch_size: sounds at once.
        """
        batches = [sounds[i : i + batch_size] for i in range(0, len(sounds), batch_size)]
        texts = [_joined(passages) for batch in batches for passages in self._recognise(batch)]
        # Whisper falls into loops now and then. Its own way out draws by chance, this one does not.
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
        with quiet(hide_bars=True):  # Whisper's own settings reach `generate` by a way that it warns of
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
        """What is said, in one line."""
        return _joined(self(sound))


def _joined(passages: Sequence[Passage]) -> str:
    return " ".join(passage.text for passage in passages)


def _is_loop(text: str) -> bool:
    """Whether a text repeats itself as no speech does; the measure and its bound are Whisper's (arXiv 2212.04356)."""
    data = text.encode()
    return len(data) > 2.4 * len(zlib.compress(data))
