"""A dialogue's sound -> who speaks when, by number: voices as vectors, clustered over all of it."""

from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage

from msenc.raw.segment import SAMPLE_RATE, Spans, Stretch, quietest_moment
from msenc.types import UNKNOWN_SPEAKER, MsencError

VERSION = 2  # raised whenever equal sound and settings give other speakers
HOP_S = 0.25
OTHER_VOICE = 0.35
"""Mean cosine distance of two clusters of the default encoder's windows, above which they are two speakers.

Chosen on two real meetings, a reader, and synthetic meetings (docs/log.md): best from 0.34 to 0.36, worse beyond.
"""
NOBODY = -1

_WIDTHS_S = (0.8, 1.0)  # of a voice's two windows
_REPEATED_S = 1.6  # what the second one is repeated to
_JOIN_S = 0.5  # a window may hear across a pause that is shorter
_MIN_WINDOWS = 5  # of a speaker: 1.25 s
_STRANGE = 0.35  # distance from a speaker's mean, above which a voice is not that speaker's
_SHARPNESS, _CHANGE, _AFTER_PAUSE = 10.0, 2.0, 0.5  # of the states; the costs of another speaker
_ROUNDS = 5
_MIN_STRETCH_S = 0.4  # changes are known no better
_MOST_CLUSTERED = 4000  # windows; the distances of more take gigabytes


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


def find_speakers(sound: np.ndarray, speech: Spans, encode: SpeakerEncoder) -> list[Stretch]:
    """Part speech where another speaker begins.

    Windows of the voice, four a second, are clustered over the whole sound (average linkage of cosine distances), and
    the clusters' means are states of a hidden Markov model, whose best path says who speaks when: one speaker at a
    time, also where several do.

    Args:
        sound: float32 (S,) at 16 kHz, of one dialogue.
        speech: in seconds, in order, apart from each other.
        encode: tells voices apart.

    Returns:
        The same speech in stretches of one speaker each, numbered from 0 on in the order of first appearance;
        ``-1`` where nobody is like it.
    """
    times, vectors = _hear(sound, speech, encode)
    if len(times) == 0:
        return []
    labels = _smooth(times, vectors, _cluster(vectors))
    stretches = [s for start_s, end_s in speech for s in _part(sound, start_s, end_s, times, labels)]
    numbers: dict[int, str] = {NOBODY: UNKNOWN_SPEAKER}
    for *_, label in stretches:
        numbers.setdefault(label, str(len(numbers) - 1))
    return [(start_s, end_s, numbers[label]) for start_s, end_s, label in stretches]


def _hear(sound: np.ndarray, speech: Spans, encode: SpeakerEncoder) -> tuple[np.ndarray, np.ndarray]:
    """Times (N,) in seconds and voices (N, 2E), each of length 1, in speech and in the short pauses of it."""
    passages: list[list[float]] = []
    for start_s, end_s in speech:
        if passages and start_s - passages[-1][1] < _JOIN_S:
            passages[-1][1] = end_s
        else:
            passages.append([start_s, end_s])
    times, vectors = [], []
    for start_s, end_s in passages:
        count = max(round((end_s - start_s) / HOP_S), 1)
        for time_s in start_s + (np.arange(count) + 0.5) * (end_s - start_s) / count:
            views = []
            for width_s in _WIDTHS_S:
                first_s = max(start_s, min(time_s - width_s / 2, end_s - width_s))
                views.append(_cut(sound, first_s, min(end_s, first_s + width_s)))
            # A window is too short for the encoder. What it makes of the silence behind it, and of hearing it again,
            # errs in different ways.
            views[1] = np.resize(views[1], round(_REPEATED_S * SAMPLE_RATE))
            times.append(float(time_s))
            vectors.append(np.concatenate([encode(view) for view in views]) / 2**0.5)
    return np.array(times), np.array(vectors)


def _cluster(vectors: np.ndarray) -> np.ndarray:
    """(N, E) -> (N,) clusters from 0 on; of a long sound, every so manieth vector has one and the others have none."""
    labels = np.full(len(vectors), NOBODY)
    chosen = np.linspace(0, len(vectors) - 1, min(len(vectors), _MOST_CLUSTERED)).round().astype(int)
    labels[chosen] = 0
    if len(chosen) > 1:
        labels[chosen] = fcluster(linkage(vectors[chosen], "average", "cosine"), OTHER_VOICE, "distance") - 1
    return labels


def _smooth(times: np.ndarray, vectors: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Labels (N,) of the best path through clusters that hold enough; `NOBODY` where no cluster is near."""
    leaving = np.where(np.diff(times, prepend=times[0]) > 2 * HOP_S, _AFTER_PAUSE, _CHANGE)
    for _ in range(_ROUNDS):
        kept = [k for k in np.unique(labels) if k != NOBODY and (labels == k).sum() >= _MIN_WINDOWS]
        if not kept:
            return np.zeros(len(labels), int)  # too little speech for more than one
        means = np.array([vectors[labels == k].mean(axis=0) for k in kept])
        means /= np.linalg.norm(means, axis=1, keepdims=True)
        likeness = np.hstack([vectors @ means.T, np.full((len(vectors), 1), 1 - _STRANGE)])
        path = _best_path(_SHARPNESS * likeness, leaving)
        found = np.where(path == len(kept), NOBODY, path)
        if np.array_equal(found, labels):
            break
        labels = found
    return labels


def _best_path(scores: np.ndarray, leaving: np.ndarray) -> np.ndarray:
    """(N, K) scores and (N,) costs of another state than the one before -> (N,) states (Viterbi)."""
    total, back = scores[0], []
    for score, cost in zip(scores[1:], leaving[1:], strict=True):
        best = int(total.argmax())
        stays = total >= total[best] - cost
        back.append(np.where(stays, np.arange(len(total)), best))
        total = np.where(stays, total, total[best] - cost) + score
    path = [int(total.argmax())]
    for step in reversed(back):
        path.append(int(step[path[-1]]))
    return np.array(path[::-1])


def _part(
    sound: np.ndarray, start_s: float, end_s: float, times: np.ndarray, labels: np.ndarray
) -> list[tuple[float, float, int]]:
    """One stretch of speech, parted between windows of different labels, where it is quietest."""
    quietest = quietest_moment(sound)
    inside = [k for k in range(1, len(times)) if labels[k] != labels[k - 1]]
    edges = [(float(quietest(*times[k - 1 : k + 1])), k) for k in inside if times[k] - times[k - 1] < 2 * HOP_S]
    edges = [(time_s, k) for time_s, k in edges if start_s + _MIN_STRETCH_S < time_s < end_s - _MIN_STRETCH_S]
    bounds = [start_s, *(time_s for time_s, _ in edges), end_s]
    middles = [(a + b) / 2 for a, b in pairwise(bounds)]
    return [
        (a, b, int(labels[np.abs(times - middle).argmin()]))
        for (a, b), middle in zip(pairwise(bounds), middles, strict=True)
    ]


def _cut(sound: np.ndarray, start_s: float, end_s: float) -> np.ndarray:
    return sound[max(round(start_s * SAMPLE_RATE), 0) : round(end_s * SAMPLE_RATE)]
