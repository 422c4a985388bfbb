from random import Random

import pytest
import torch
from torchmetrics.functional.classification import multiclass_f1_score

from msenc.evaluation.metrics.description import DescribedTarget, macro_f1, score_descriptions, voice_of
from msenc.types import Utterance, VoiceAttributes

FAST, SLOW, UNSAID = VoiceAttributes(rate="fast"), VoiceAttributes(rate="slow"), VoiceAttributes()


def turn(speaker, rate):
    return Utterance("0", speaker, "Hi.", attributes=VoiceAttributes(rate=rate))


TRAIN = [turn("Ana", "slow"), turn("Ana", "slow"), turn("Ben", "fast"), turn("Ben", "unknown"), turn("Cy", "slow")]


@pytest.mark.parametrize("seed", range(5))
def test_macro_f1_equals_the_mean_of_torchmetrics_by_word(seed):
    rng = Random(seed)
    words = ["slow", "moderate", "fast", "unknown"]
    pairs = [(rng.choice(words[:2] if seed == 0 else words[:3]), rng.choice(words)) for _ in range(200)]
    wanted, found = (torch.tensor([words.index(w) for w in side]) for side in zip(*pairs, strict=True))
    by_word = multiclass_f1_score(found, wanted, num_classes=4, average=None)
    mean = by_word[sorted(set(wanted.tolist()))].mean().item()
    assert macro_f1(pairs) == pytest.approx(mean, abs=1e-6)


def test_replies_beside_three_rules():
    targets = [
        DescribedTarget(FAST, FAST, SLOW, "Ben"),
        DescribedTarget(SLOW, FAST, SLOW, "Ana"),
        DescribedTarget(SLOW, UNSAID, SLOW, "Dee"),
        DescribedTarget(FAST, FAST, UNSAID, "Ana"),
    ]
    scores = score_descriptions(targets, TRAIN)
    found = {name.removeprefix("description/rate/"): v for name, v in scores.corpus.items() if "/rate/" in name}
    assert found["targets"] == 4
    assert found["accuracy"] == 0.5
    assert found["macro_f1"] == pytest.approx((2 * 2 / (2 + 3) + 0) / 2)
    assert found["accuracy_previous"] == 0.5
    assert found["accuracy_majority"] == 0.5  # always slow
    assert found["macro_f1_majority"] == pytest.approx((0 + 2 * 2 / (2 + 4)) / 2)
    assert found["accuracy_speaker"] == 0.75  # Ben is fast; Dee, unheard, is as most are
    assert scores.corpus["description/accuracy"] == 0.5
    assert scores.corpus["description/parse_failure_rate"] == 0.25
    assert scores.items["description/accuracy"] == [1, 0, 0, 1]
    assert not [name for name in scores.corpus if "pitch" in name]


def test_only_what_is_known_of_a_target_counts():
    wanted = VoiceAttributes(gender="woman", rate="fast")
    targets = [
        DescribedTarget(wanted, VoiceAttributes(gender="woman", pitch="low"), UNSAID, "Ana"),
        DescribedTarget(FAST, VoiceAttributes(gender="man", rate="fast"), UNSAID, "Ana"),
    ]
    scores = score_descriptions(targets, TRAIN)
    assert scores.corpus["description/gender/targets"] == 1
    assert scores.corpus["description/gender/accuracy"] == 1
    assert scores.corpus["description/rate/accuracy"] == 0.5
    assert scores.corpus["description/accuracy"] == 0.75
    assert scores.items["description/accuracy"] == [0.5, 1]
    assert scores.corpus["description/gender/accuracy_majority"] == 0  # the train split tells of no gender


def test_without_a_train_split_the_rules_that_need_it_are_left_out():
    names = score_descriptions([DescribedTarget(FAST, FAST, SLOW, "Ana")], []).corpus
    assert "description/rate/accuracy_previous" in names
    assert not [name for name in names if name.endswith(("_majority", "_speaker"))]


def test_a_turn_is_spoken_as_measured_or_else_as_described():
    assert voice_of(Utterance("0", "Ana", "Hi.", "a woman speaks slowly", attributes=FAST)) == FAST
    assert voice_of(Utterance("0", "Ana", "Hi.", "someone speaks slowly")) == SLOW
    assert voice_of(Utterance("0", "Ana", "Hi.")) == UNSAID
