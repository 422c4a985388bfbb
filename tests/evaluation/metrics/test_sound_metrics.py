import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from msenc.evaluation.metrics.sound import PredictedMos, speaker_similarity
from msenc.types import MsencError


def sounds():
    """From a second to almost half a minute, one of them silent."""
    rng = np.random.default_rng(0)
    tone = np.sin(np.arange(28 * 16_000) / 40).astype(np.float32)
    for seconds in (1.0, 4.3, 9.01, 9.5, 11.0, 19.2, 28.0):
        noise = rng.normal(0, 0.01, round(seconds * 16_000)).astype(np.float32)
        yield np.clip(0.3 * tone[: len(noise)] + noise, -1, 1)
    yield np.zeros(32_000, np.float32)


def test_mos_is_that_of_the_reference_implementation(monkeypatch):
    for package in ("onnxruntime", "requests"):
        pytest.importorskip(package)
    librosa = ModuleType("librosa")  # only for a score that is not taken over
    librosa.feature = ModuleType("librosa.feature")
    librosa.feature.melspectrogram = lambda y, n_mels, hop_length, **_: np.ones((n_mels, len(y) // hop_length))
    librosa.power_to_db = lambda spectrum, ref: spectrum
    monkeypatch.setitem(sys.modules, "librosa", librosa)
    dnsmos = pytest.importorskip("speechmos.dnsmos")
    predict = PredictedMos()
    names = {"overall": "ovrl_mos", "sig": "sig_mos", "bak": "bak_mos"}
    for sound in sounds():
        wanted = dnsmos.run(sound, 16_000)
        assert predict(sound) == pytest.approx({name: wanted[key] for name, key in names.items()}, abs=1e-6)


def test_mos_without_its_weights_is_refused(monkeypatch):
    monkeypatch.setattr("msenc.evaluation.metrics.sound.find_spec", lambda name: None)
    with pytest.raises(MsencError, match=r"pip install --no-deps -c constraints\.txt speechmos"):
        PredictedMos()


@pytest.mark.parametrize(
    ("device", "usable", "expected"),
    [
        ("cpu", ["CUDAExecutionProvider"], []),
        ("cuda", ["CUDAExecutionProvider"], [("CUDAExecutionProvider", {"device_id": 0})]),
        ("cuda:1", ["CUDAExecutionProvider"], [("CUDAExecutionProvider", {"device_id": 1})]),
        ("cuda", [], []),  # onnxruntime for CPUs alone
    ],
)
def test_mos_is_predicted_where_the_evaluation_is(monkeypatch, device, usable, expected):
    runtime = ModuleType("onnxruntime")
    runtime.SessionOptions = SimpleNamespace
    runtime.get_available_providers = lambda: [*usable, "CPUExecutionProvider"]
    runtime.InferenceSession = lambda path, options, providers: providers
    monkeypatch.setitem(sys.modules, "onnxruntime", runtime)
    package = SimpleNamespace(submodule_search_locations=["speechmos"])
    monkeypatch.setattr("msenc.evaluation.metrics.sound.find_spec", lambda name: package)
    assert PredictedMos(device).session == [*expected, "CPUExecutionProvider"]


def test_voices_are_compared_within_their_dialogue():
    one, other = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    found = speaker_similarity([one, other, one, one], ["a", "a", "b", "b"], ["Ana", "Leo", "Ana", "Ana"])
    assert found == {"speech/speaker_similarity/same": 1.0, "speech/speaker_similarity/others": 0.0}
    assert speaker_similarity([one, other], ["a", "b"], ["Ana", "Ana"]) == {}
