import numpy as np
import pytest

from msenc.raw.speakers import cluster_speakers

pytest.importorskip("sklearn")


def _voices(labels, spread, seed=0):
    rng = np.random.default_rng(seed)
    centres = np.eye(16)[:4]
    vectors = centres[labels] + rng.normal(0, spread, (len(labels), 16))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def test_speakers_are_numbered_as_they_appear():
    labels = [2, 0, 2, 0, 0, 2]
    assert cluster_speakers(_voices(labels, 0.05)) == ["0", "1", "0", "1", "1", "0"]


def test_one_voice_is_one_speaker():
    for seed in range(5):
        assert set(cluster_speakers(_voices([0] * 12, 0.05, seed))) == {"0"}


def test_who_speaks_once_among_others_is_unknown():
    assert cluster_speakers(_voices([0, 1, 0, 1, 3], 0.05))[-1] == "-1"


def test_a_lone_utterance_has_a_speaker():
    assert cluster_speakers(_voices([0], 0.05)) == ["0"]
    assert cluster_speakers(np.zeros((0, 16), np.float32)) == []
