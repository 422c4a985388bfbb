"""Sound -> words, by Whisper: fills in what a turn says, transcribes recordings, and checks synthetic speech."""

import re
from typing import NamedTuple

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
        inputs = self.processor(
            sound,
            sampling_rate=self.sample_rate,
            return_tensors="pt",
            truncation=False,
            padding="longest" if len(sound) > 30 * self.sample_rate else "max_length",
            return_attention_mask=True,
        ).to(self.model.device)
        with quiet(hide_bars=True):  # Whisper's own settings reach `generate` by a way that it warns of
            found = self.model.generate(
                inputs.input_features.to(self.model.dtype),
                attention_mask=inputs.attention_mask,
                return_timestamps=True,
                return_segments=True,
                **self._options,
            )
        passages = []
        for segment in found["segments"][0]:
            text = self.processor.tokenizer.decode(segment["tokens"], skip_special_tokens=True).strip()
            if text and not NO_WORDS.fullmatch(text):
                passages.append(Passage(float(segment["start"]), float(segment["end"]), text))
        return passages

    def text(self, sound: np.ndarray) -> str:
        """What is said, in one line."""
        return " ".join(passage.text for passage in self(sound))
