"""Utterances' sound -> who speaks, by number within a dialogue: a voice as a vector, and vectors in clusters."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import numpy as np

from msenc.raw.segment import SAMPLE_RATE
from msenc.types import UNKNOWN_SPEAKER, MsencError, needing

VERSION = 1  # raised whenever equal sound and settings give other speakers
ONE_VOICE = 0.2
"""Cosine distance below which two utterances of the default encoder are one voice, however near others are."""


class SpeakerEncoder(Protocol):
    """Sound, float32 (S,) at 16 kHz -> a vector, float32 (E,), of length 1, that tells the voice."""

    def __call__(self, sound: np.ndarray) -> np.ndarray:
        """Embed one utterance."""
        ...


class Resemblyzer:
    """The GE2E encoder (arXiv 1710.10467) whose weights come in the wheel of the package resemblyzer.

    The package itself is not imported: it would need librosa and webrtcvad for what is a few lines here.

    Args:
        device: where it runs.

    Raises:
        MsencError: if the package is missing.
    """

    sample_rate = SAMPLE_RATE
    _WINDOW, _STEP, _MELS, _WIDTH = 400, 160, 40, 256  # samples, samples, bands, units
    _FRAMES, _HOP = 160, 77  # of a part, and from part to part: 1.6 s, 1.3 parts a second
    _LEVEL = 10 ** (-30 / 20)  # root mean square; quieter sound is raised to it

    def __init__(self, device: str = "cpu") -> None:
        import torch
        from transformers.audio_utils import mel_filter_bank

        spec = find_spec("resemblyzer")
        if spec is None:
            raise MsencError(
                "Telling speakers apart needs the weights in the package resemblyzer, which is not installed. "
                "Install it without what it asks for: pip install --no-deps resemblyzer; or set another encoder."
            )
        weights = torch.load(
            Path(spec.submodule_search_locations[0]) / "pretrained.pt", map_location="cpu", weights_only=True
        )["model_state"]
        self.device = device
        self.lstm = torch.nn.LSTM(self._MELS, self._WIDTH, 3, batch_first=True)
        self.linear = torch.nn.Linear(self._WIDTH, self._WIDTH)
        for name in ("lstm", "linear"):
            part = {k.removeprefix(f"{name}."): v for k, v in weights.items() if k.startswith(f"{name}.")}
            getattr(self, name).load_state_dict(part)
            getattr(self, name).to(device).eval()
        bank = mel_filter_bank(self._WINDOW // 2 + 1, self._MELS, 0.0, SAMPLE_RATE / 2, SAMPLE_RATE, "slaney", "slaney")
        self.bank = torch.from_numpy(bank).float().to(device)  # (frequencies, bands)
        self.window = torch.hann_window(self._WINDOW, device=device)

    def __call__(self, sound: np.ndarray) -> np.ndarray:
        """Embed one utterance: the mean over parts of 1.6 s."""
        import torch

        with torch.inference_mode():
            samples = torch.from_numpy(sound).to(self.device)
            level = samples.square().mean().sqrt()
            samples = samples * (self._LEVEL / level.clamp(1e-6, self._LEVEL))
            num_frames = max(len(sound) // self._STEP + 1, self._FRAMES)
            missing = (num_frames - 1) * self._STEP - len(sound)
            samples = torch.nn.functional.pad(samples, (0, max(missing, 0)))
            spectrum = torch.stft(
                samples, self._WINDOW, self._STEP, window=self.window, pad_mode="constant", return_complex=True
            )
            mels = (spectrum.abs().square().T @ self.bank).unfold(0, self._FRAMES, self._HOP)  # (N, bands, frames)
            _, (hidden, _) = self.lstm(mels.transpose(1, 2))
            parts = torch.nn.functional.normalize(torch.relu(self.linear(hidden[-1])), dim=1)
            return torch.nn.functional.normalize(parts.mean(0), dim=0).cpu().numpy()


class XVector:
    """Any encoder that transformers loads as ``AutoModelForAudioXVector``: WavLM's and others'.

    Args:
        name_or_path: hub id, as ``microsoft/wavlm-base-plus-sv``, or folder.
        device: where it runs.

    Raises:
        MsencError: if there is no such model.
    """

    _MIN_SAMPLES = SAMPLE_RATE // 2  # its convolutions over time need some frames

    def __init__(self, name_or_path: str, device: str = "cpu") -> None:
        from transformers import AutoFeatureExtractor, AutoModelForAudioXVector

        from msenc.models.pretrained import load_pretrained

        self.device = device
        self.extractor = load_pretrained(AutoFeatureExtractor, name_or_path)
        self.model = load_pretrained(AutoModelForAudioXVector, name_or_path).to(device).eval()

    def __call__(self, sound: np.ndarray) -> np.ndarray:
        """Embed one utterance."""
        import torch

        sound = np.pad(sound, (0, max(self._MIN_SAMPLES - len(sound), 0)))
        inputs = self.extractor(sound, sampling_rate=SAMPLE_RATE, return_tensors="pt").to(self.device)
        with torch.inference_mode():
            vector = self.model(**inputs).embeddings[0].float()
        return torch.nn.functional.normalize(vector, dim=0).cpu().numpy()


def cluster_speakers(vectors: np.ndarray) -> list[str]:
    """Give the utterances of one dialogue speakers, by HDBSCAN on cosine distance.

    Args:
        vectors: (U, E), each of length 1.

    Returns:
        Per utterance a number from 0 on, in the order of first appearance; ``-1`` where it belongs to nobody clearly.

    Raises:
        MsencError: if scikit-learn is missing.
    """
    with needing("telling speakers apart", "raw"):
        from sklearn.cluster import HDBSCAN
    if len(vectors) < 2:
        return ["0"] * len(vectors)
    # Nearer ones count as equally near: else HDBSCAN finds clusters within one voice. Its own setting for this,
    # cluster_selection_epsilon, ends in a TypeError with scikit-learn 1.9 and numpy 2.4.
    distances = np.clip(1 - vectors.astype(np.float64) @ vectors.T.astype(np.float64), ONE_VOICE, 2)
    np.fill_diagonal(distances, 0)
    for is_single_allowed in (False, True):  # allowed at once, it would join two speakers of most dialogues
        cluster = HDBSCAN(min_cluster_size=2, metric="precomputed", allow_single_cluster=is_single_allowed, copy=True)
        labels = cluster.fit_predict(distances)
        if (labels >= 0).any():
            break
    return _renumber(labels.tolist())


def _renumber(labels: Sequence[int]) -> list[str]:
    numbers: dict[int, str] = {}
    for label in labels:
        if label >= 0:
            numbers.setdefault(label, str(len(numbers)))
    return [numbers.get(label, UNKNOWN_SPEAKER) for label in labels]
