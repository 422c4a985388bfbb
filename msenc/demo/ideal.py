"""The ideal listener of a generated world: what a modality can know about a planted word, by Bayes' rule.

cues of a turn, streams that are seen -> P(audio bit, video bit) -> loss of the word that follows from them

A stream reveals its bit fully, or shows a number x that is drawn from N(-d/2, 1) for bit 0 and from N(d/2, 1) for
bit 1. The level d is drawn for each turn and stream and hidden, so an ideal listener sums over all levels.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

KINDS = ("text", "audio", "video", "both")
_STREAMS = ("audio", "video")
_GRID = np.arange(-9, 9.001, 0.05)


@dataclass(frozen=True)
class Cue:
    """The hidden bit and visible cue of one stream in one turn.

    Args:
        bit: hidden.
        x: visible: a number whose sign depends on the bit; -1 or 1 if the bit is fully revealed.
        level: distance d between the two means of x; infinite if the bit is fully revealed.
    """

    bit: bool
    x: float
    level: float


@dataclass(frozen=True)
class Belief:
    """The probabilities of a turn's two bits, and the words that follow from them.

    Args:
        prior: P(audio bit, video bit), indexed in this order.
        both: the bit that a reply about both states, indexed in the same way.
        levels: equally likely values of d; none if the streams fully reveal their bits.
    """

    prior: tuple[tuple[float, float], tuple[float, float]]
    both: tuple[tuple[int, int], tuple[int, int]]
    levels: tuple[float, ...] = ()

    def draw(self, rng: np.random.Generator) -> tuple[Cue, Cue]:
        """Audio and video cue of one turn."""
        audio, video = divmod(int(rng.choice(4, p=np.ravel(self.prior))), 2)
        return self._draw_cue(bool(audio), rng), self._draw_cue(bool(video), rng)

    def _draw_cue(self, bit: bool, rng: np.random.Generator) -> Cue:
        sign = 1.0 if bit else -1.0
        if not self.levels:
            return Cue(bit, sign, math.inf)
        level = self.levels[int(rng.integers(len(self.levels)))]
        return Cue(bit, sign * level / 2 + float(rng.standard_normal()), level)

    def bits(self, kind: str) -> float:
        """Information of a planted word in bits, before any stream and the text's place are known.

        Example:
            >>> fair = Belief(((0.25, 0.25), (0.25, 0.25)), ((0, 0), (0, 1)))
            >>> fair.bits("audio"), round(fair.bits("both"), 3)
            (1.0, 0.811)
        """
        return 1.0 if kind == "text" else _entropy(float(_marginal(self, kind, np.asarray(self.prior)))) / math.log(2)


def said_bit(belief: Belief, kind: str, audio: bool, video: bool) -> bool:
    """The bit that a word of the kinds ``audio``, ``video`` and ``both`` states."""
    return {"audio": audio, "video": video, "both": bool(belief.both[audio][video])}[kind]


def ideal_loss(belief: Belief, kind: str, streams: Collection[str], audio: Cue, video: Cue) -> float:
    """Loss, in nats, of a planted word for a listener who knows the world and gets these streams of the previous turn.

    The value is exact for this item, so it holds for test splits of any size.

    Args:
        belief: of the world.
        kind: of the planted word: ``text``, ``audio``, ``video`` or ``both``.
        streams: available besides the text: of ``audio`` and ``video``.
        audio: cue of the turn that is asked about.
        video: its video cue.

    Example:
        >>> fair = Belief(((0.25, 0.25), (0.25, 0.25)), ((0, 0), (0, 1)))
        >>> yes, no = Cue(True, 1.0, math.inf), Cue(False, -1.0, math.inf)
        >>> [round(ideal_loss(fair, "both", s, yes, no), 3) for s in ((), ("audio",), ("audio", "video"))]
        [0.288, 0.693, 0.0]
    """
    if kind == "text":
        return 0.0
    evidence = [
        _likelihood(belief, np.array(cue.x))[:, None] if stream in streams else np.ones((2, 1))
        for stream, cue in zip(_STREAMS, (audio, video), strict=True)
    ]
    is_one = float(_posterior(belief, kind, *evidence)[0, 0])
    return max(0.0, -math.log(is_one if said_bit(belief, kind, audio.bit, video.bit) else 1 - is_one))


def expected_share(belief: Belief, kind: str, streams: Collection[str], level: float | None = None) -> float:
    """Share of a kind's planted bits that the ideal listener recovers, averaged over all turns.

    Args:
        belief: of the world.
        kind: of the planted word.
        streams: available besides the text.
        level: only turns whose own stream (of ``audio`` and ``video``) was drawn at this level; None: all turns. The
            listener does not know it, so the share may be below 0 for uninformative cues.

    Example:
        >>> fair = Belief(((0.25, 0.25), (0.25, 0.25)), ((0, 0), (0, 1)))
        >>> [round(expected_share(fair, "both", s), 3) for s in ((), ("audio",), ("audio", "video"))]
        [0.0, 0.384, 1.0]
    """
    if kind == "text":
        return 1.0
    grid = _GRID if belief.levels else np.array([-1.0, 1.0])
    evidence = [_likelihood(belief, grid) if s in streams else np.ones((2, 1)) for s in _STREAMS]  # (2, X) each
    drawn = [
        _likelihood(belief, grid, level if stream == kind else None) if stream in streams else np.ones((2, 1))
        for stream in _STREAMS
    ]
    is_one = np.clip(_posterior(belief, kind, *evidence), 1e-300, 1 - 1e-16)  # (X audio, X video)
    loss = 0.0
    for audio in (0, 1):
        for video in (0, 1):
            weights = np.outer(drawn[0][audio] / drawn[0][audio].sum(), drawn[1][video] / drawn[1][video].sum())
            said = said_bit(belief, kind, bool(audio), bool(video))
            nll = -np.log(is_one if said else 1 - is_one)
            loss += belief.prior[audio][video] * float((weights * nll).sum())
    return 1 - loss / (belief.bits(kind) * math.log(2))


def _likelihood(belief: Belief, x: np.ndarray, level: float | None = None) -> np.ndarray:
    """p(x | bit) for bit 0 and 1 up to a common factor, shape (2, *x.shape); of one level, or summed over all."""
    signs = np.array([-1.0, 1.0]).reshape(2, *[1] * x.ndim)
    if not belief.levels:
        return (np.sign(x) == signs).astype(float)
    levels = belief.levels if level is None else (level,)
    return sum(np.exp(-((x - signs * d / 2) ** 2) / 2) for d in levels) / len(levels)


def _posterior(belief: Belief, kind: str, audio: np.ndarray, video: np.ndarray) -> np.ndarray:
    """P(the word states bit 1) for each pair of audio and video evidence, (2, A) and (2, V) -> (A, V)."""
    joint = np.asarray(belief.prior)[:, :, None, None] * audio[:, None, :, None] * video[None, :, None, :]
    with np.errstate(invalid="ignore"):  # a pair of shown bits that never occurs
        return _marginal(belief, kind, joint / joint.sum((0, 1)))


def _marginal(belief: Belief, kind: str, joint: np.ndarray) -> np.ndarray:
    states = [(a, v) for a in (0, 1) for v in (0, 1) if said_bit(belief, kind, bool(a), bool(v))]
    return sum(joint[state] for state in states)


def _entropy(p: float) -> float:
    """Entropy of a coin, in nats."""
    return -sum(q * math.log(q) for q in (p, 1 - p) if q > 0)
