"""Kokoro as a synthesizer: a small neural model, by onnxruntime, from a local folder."""

import json
import re
from pathlib import Path

import numpy as np

from msenc.speech.synthesis import SentenceSynthesizer, choose
from msenc.speech.synthesizers.libespeak import to_phonemes
from msenc.speech.synthesizers.psola import change_melody
from msenc.types import UNKNOWN, MsencError, VoiceAttributes, needing

SAMPLE_RATE = 24_000

VOICES = {
    "woman": ("af_heart", "af_bella", "bf_emma", "af_aoede"),
    "man": ("am_michael", "am_fenrir", "am_puck", "bm_daniel"),
}
"""Gender -> voices of a medium pitch, of those that the model's authors grade best."""

PROSODY = {"woman": {"low": "af_nova", "high": "bf_alice"}, "man": {"low": "am_onyx", "high": "bm_george"}}
"""Whose way of speaking is mixed in for a pitch; the timbre stays the speaker's."""

PITCH_HZ = {"woman": {"low": 165.0, "high": 230.0}, "man": {"low": 90.0, "high": 138.0}}
SPREAD = {"flat": 0.4, "expressive": 1.6}
SPEED = {"slow": 0.77, "fast": 1.3}

_PROSODY_SHARE = 0.6
_STYLE = 256  # its first half is the timbre, its second the prosody
_MARKS = r"([;:,.!?\u2014\u2026()\"\u201c\u201d]+)"
_REPLACED = {"r": "\u0279", "x": "k", "\u026c": "l", "\u02b2": "j"}  # eSpeak's letters that the model does not know


class Kokoro(SentenceSynthesizer):
    """A Kokoro model of 82 million parameters.

    Args:
        folder: holds ``model.onnx``, ``vocab.json`` (phoneme -> id) and ``voices/NAME.bin`` (float32, (510, 1, 256)).
        num_threads: of one sentence.

    Raises:
        MsencError: a package or a file is missing.
    """

    def __init__(self, folder: str | Path, num_threads: int = 1) -> None:
        self.folder = Path(folder)
        with needing("Kokoro", "kokoro"):
            import onnxruntime
        missing = [name for name in ("model.onnx", "vocab.json", "voices") if not (self.folder / name).exists()]
        if missing:
            raise MsencError(
                f"{self.folder}: no {' and no '.join(missing)}. Expected the folder of a Kokoro model with model.onnx, "
                "vocab.json and voices/; docs/speech.md describes them. Give it: speech.folder=..."
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads
        options.inter_op_num_threads = 1
        try:
            self.session = onnxruntime.InferenceSession(str(self.folder / "model.onnx"), options)
            self.vocabulary = json.loads((self.folder / "vocab.json").read_text(encoding="utf-8"))
        except Exception as error:  # onnxruntime has a class per fault, and none above them
            raise MsencError(f"{self.folder}: Kokoro cannot be loaded ({error}). Fetch the model again.") from error
        self._styles: dict[str, np.ndarray] = {}

    def synthesize(self, phrase: str, voice: VoiceAttributes, speaker: str | None) -> tuple[np.ndarray, int]:
        """See `SentenceSynthesizer`."""
        gender = voice.gender if voice.gender != UNKNOWN else choose(tuple(VOICES), speaker)
        style = self._style(choose(VOICES[gender], speaker))
        if voice.pitch in PROSODY[gender]:
            style = style.copy()
            other = self._style(PROSODY[gender][voice.pitch])
            prosody = slice(_STYLE // 2, _STYLE)
            style[:, prosody] += _PROSODY_SHARE * (other[:, prosody] - style[:, prosody])
        tokens = self._tokens(phrase)
        samples = self.session.run(
            None,
            {
                "tokens": np.array([[0, *tokens, 0]], np.int64),
                "style": style[len(tokens)][None],
                "speed": np.array([SPEED.get(voice.rate, 1.0)], np.float32),
            },
        )[0].reshape(-1)
        samples = change_melody(samples, SAMPLE_RATE, PITCH_HZ[gender].get(voice.pitch), SPREAD.get(voice.range, 1.0))
        return samples, SAMPLE_RATE

    def _tokens(self, phrase: str) -> list[int]:
        """Ids of a phrase's phonemes and punctuation marks."""
        parts = re.split(_MARKS, phrase)
        phonemes = ""
        for spoken, marks in zip(to_phonemes(parts[::2]), [*parts[1::2], ""], strict=True):
            phonemes += (" " if phonemes and spoken else "") + spoken + marks
        for old, new in _REPLACED.items():
            phonemes = phonemes.replace(old, new)
        tokens = [self.vocabulary[p] for p in phonemes if p in self.vocabulary]
        return tokens[: len(self._style(VOICES["woman"][0])) - 1]  # more than the longest phrase has

    def _style(self, name: str) -> np.ndarray:
        """(N, 256): one row per number of phonemes."""
        if name not in self._styles:
            path = self.folder / "voices" / f"{name}.bin"
            try:
                self._styles[name] = np.fromfile(path, np.float32).reshape(-1, _STYLE)
            except (OSError, ValueError) as error:
                raise MsencError(f"{path}: cannot be read as a voice ({error}). Fetch the model again.") from error
        return self._styles[name]
