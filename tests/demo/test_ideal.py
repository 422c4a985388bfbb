"""The ideal listener, against sums and samples that are written out."""

import math

import numpy as np
import pytest

from msenc.demo.graded import SCRIPT
from msenc.demo.ideal import Belief, Cue, expected_share, ideal_loss, said_bit
from msenc.demo.table import find_world

MODALITIES = ((), ("audio",), ("video",), ("audio", "video"))
KINDS = ("text", "audio", "video", "both")


def test_in_the_demo_one_stream_gives_nothing_of_the_parity():
    demo = find_world("demo").belief
    shares = {kind: [round(expected_share(demo, kind, streams), 6) for streams in MODALITIES] for kind in KINDS}
    assert shares == {"text": [1, 1, 1, 1], "audio": [0, 1, 0, 1], "video": [0, 0, 1, 1], "both": [0, 0, 0, 1]}


def test_in_beats_one_stream_gives_a_part_of_the_conjunction():
    beats = find_world("beats").belief
    entropy = -(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75))
    assert beats.bits("both") == pytest.approx(entropy)
    # With one stream the word is known in half of the turns, and a coin in the others.
    shares = [expected_share(beats, "both", streams) for streams in MODALITIES]
    assert shares == pytest.approx([0, 1 - 0.5 / entropy, 1 - 0.5 / entropy, 1])


def density(x: float, mean: float) -> float:
    return math.exp(-((x - mean) ** 2) / 2) / math.sqrt(2 * math.pi)


def test_the_loss_of_an_item_is_bayes_rule_written_out():
    audio, video = Cue(True, 0.7, 2.0), Cue(False, -1.2, 1.0)
    levels = (0, 1, 2, 3, 4)

    def tells(x, bit):
        return sum(density(x, d / 2 if bit else -d / 2) for d in levels) / 5

    chances = {
        (a, v): (0.7 if a else 0.3) * (0.75 if a == v else 0.25) * tells(0.7, a) * tells(-1.2, v)
        for a in (True, False)
        for v in (True, False)
    }
    total = sum(chances.values())
    wanted = {
        "audio": (chances[True, True] + chances[True, False]) / total,  # "high", which is true
        "video": (chances[True, False] + chances[False, False]) / total,  # "left", which is true
        "both": 1 - chances[True, True] / total,
    }
    for kind, chance in wanted.items():
        assert ideal_loss(SCRIPT.belief, kind, ("audio", "video"), audio, video) == pytest.approx(-math.log(chance))
    assert ideal_loss(SCRIPT.belief, "video", (), audio, video) == pytest.approx(-math.log(0.4))
    # Sound alone: the note leans to high, and the side goes with it.
    high = 0.7 * tells(0.7, True) / (0.7 * tells(0.7, True) + 0.3 * tells(0.7, False))
    chance = 1 - (0.75 * high + 0.25 * (1 - high))
    assert ideal_loss(SCRIPT.belief, "video", ("audio",), audio, video) == pytest.approx(-math.log(chance))
    assert ideal_loss(SCRIPT.belief, "text", (), audio, video) == 0


@pytest.mark.parametrize("streams", MODALITIES)
def test_the_expected_share_is_the_mean_over_many_items(streams):
    belief, rng = SCRIPT.belief, np.random.default_rng(5)
    cues = [belief.draw(rng) for _ in range(4000)]
    for kind in ("audio", "video", "both"):
        losses = np.array([ideal_loss(belief, kind, streams, *pair) for pair in cues]) / math.log(2) / belief.bits(kind)
        error = losses.std() / math.sqrt(len(losses))
        assert abs(1 - losses.mean() - expected_share(belief, kind, streams)) < 4 * error + 1e-9
        if kind in ("audio", "video"):
            own = np.array([pair[kind == "video"].level for pair in cues])
            for level in belief.levels:
                some = losses[own == level]
                error = some.std() / math.sqrt(len(some))
                assert abs(1 - some.mean() - expected_share(belief, kind, streams, level)) < 4 * error + 1e-9


def test_an_ideal_text_model_recovers_nothing_and_no_listener_does_better_than_both_streams():
    for name in ("demo", "beats", "graded"):
        belief = find_world(name).belief
        for kind in ("audio", "video", "both"):
            shares = [expected_share(belief, kind, streams) for streams in MODALITIES]
            assert shares[0] == pytest.approx(0, abs=1e-6)
            assert max(shares) == shares[3] <= 1
            assert min(shares) > -1e-6


def test_the_curve_rises_with_the_level():
    curve = [expected_share(SCRIPT.belief, "audio", ("audio",), level) for level in SCRIPT.belief.levels]
    assert curve == sorted(curve)
    assert curve[0] < 0 < curve[1]
    assert 0.75 < curve[-1] < 0.9


def test_shown_bits_cost_nothing():
    belief = Belief(((0.1, 0.2), (0.3, 0.4)), ((0, 1), (1, 0)))
    for audio in (False, True):
        for video in (False, True):
            cues = [Cue(bit, 1.0 if bit else -1.0, math.inf) for bit in (audio, video)]
            assert ideal_loss(belief, "both", ("audio", "video"), *cues) == 0
            assert said_bit(belief, "both", audio, video) == (audio != video)
    assert belief.bits("video") == pytest.approx(-(0.4 * math.log2(0.4) + 0.6 * math.log2(0.6)))
