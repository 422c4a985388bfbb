import numpy as np
import pytest
import torch

from msenc.evaluation.probes import FOLDS, entropy, fit_logistic, fold_groups, log_p, probe
from msenc.types import MsencError


def draw(n=300, dim=40, classes=3, signal=1.0, seed=0):
    """Vectors whose first dimensions say the class, as far as `signal` exceeds their spread of 1."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, n)
    vectors = random.normal(size=(n, dim))
    vectors[np.arange(n), labels] += signal
    return vectors * random.lognormal(size=dim), labels


@pytest.mark.parametrize("penalty", [1e-3, 1e-2, 1.0])
def test_regressions_are_those_of_scikit_learn(penalty):
    linear_model = pytest.importorskip("sklearn.linear_model")
    vectors, labels = draw(signal=1.5)
    _, _, axes = np.linalg.svd(vectors - vectors.mean(0), full_matrices=False)
    x = (vectors - vectors.mean(0)) @ axes.T / 10
    fitted, scored = torch.tensor(x, dtype=torch.float32), slice(0, 50)
    other = np.random.default_rng(1).permutation(labels)
    y = torch.tensor(np.stack([labels, other]))
    found = log_p(fitted[scored], fit_logistic(fitted, y, torch.full((2,), penalty), 3), y[:, scored])
    for row, own in enumerate((labels, other)):
        theirs = linear_model.LogisticRegression(C=1 / (penalty * len(x)), tol=1e-10, max_iter=10000).fit(x, own)
        wanted = theirs.predict_log_proba(x[scored])[np.arange(50), own[scored]]
        np.testing.assert_allclose(found[row].numpy(), wanted, atol=2e-2)
        assert found[row].mean().item() == pytest.approx(wanted.mean(), abs=2e-3)


def test_a_probe_finds_the_bits_that_there_are_and_none_in_permuted_labels():
    folds = fold_groups(np.repeat(np.arange(30), 10))
    clear, labels = draw(signal=12.0)
    found = probe(clear, labels, folds)
    assert 0.85 * entropy(labels) < found.bits.mean() <= entropy(labels) + 0.05
    assert max(found.permuted) < 0.1
    nothing, labels = draw(signal=0.0)
    found = probe(nothing, labels, folds)
    assert abs(found.bits.mean()) < 0.05
    assert probe(nothing, labels, folds).permuted == found.permuted


def test_what_tells_the_speaker_alone_does_not_help_on_unseen_speakers():
    random = np.random.default_rng(0)
    speakers = np.repeat(np.arange(40), 10)
    labels = random.integers(0, 2, 40)[speakers]  # a label of the speaker, whom the vectors tell
    vectors = np.eye(40)[speakers] + 0.1 * random.normal(size=(400, 40))
    assert probe(vectors, labels, fold_groups(speakers)).bits.mean() < 0.1
    assert probe(vectors, labels, fold_groups(range(400))).bits.mean() > 0.5  # others of the same speaker


def test_vectors_that_do_not_vary_hold_nothing_however_their_rounding_errors_fall():
    labels = np.random.default_rng(0).integers(0, 2, 200)
    constant = np.full((200, 3), 7.0) + 1e-5 * labels[:, None]
    assert abs(probe(constant, labels, fold_groups(range(200))).bits.mean()) < 0.02
    assert probe(constant - 7, labels, fold_groups(range(200))).bits.mean() > 0.9  # nothing but the label


def test_groups_stay_whole_and_too_few_are_refused():
    groups = [f"speaker {i % 7}" for i in range(100)]
    folds = fold_groups(groups)
    assert {len({f for g, f in zip(groups, folds, strict=True) if g == group}) for group in groups} == {1}
    assert sorted(set(folds.tolist())) == list(range(FOLDS))
    with pytest.raises(MsencError, match="found 3 groups of examples, expected 5 or more"):
        fold_groups(["a", "b", "c"])
