import os
from pathlib import Path

import numpy as np
import pytest

from msenc.models.recognition import Recogniser, _is_loop
from msenc.types import MsencError


def test_a_model_that_is_no_whisper_is_refused(tiny_models):
    with pytest.raises(MsencError, match="a model of type 'wavlm' cannot recognise speech"):
        Recogniser(str(tiny_models["wavlm"]))


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(MsencError, match="nowhere"):
        Recogniser(str(tmp_path / "nowhere"))


@pytest.mark.real
def test_whisper_hears_what_was_said(demo_home):
    folder = Path(os.environ.get("MSENC_MODELS", "")) / "whisper-base"
    if "MSENC_MODELS" not in os.environ or not folder.is_dir():
        pytest.skip("MSENC_MODELS names no folder with whisper-base")
    import soxr

    from msenc.speech.synthesizers.libespeak import VoiceSettings, speak

    recogniser = Recogniser(str(folder))
    sound, rate = speak(
        "My sister lives in London, and she works in a large hospital.", VoiceSettings("en-us", rate_wpm=150)
    )
    sound = soxr.resample(sound, rate, recogniser.sample_rate).astype(np.float32)
    passages = recogniser(sound)
    assert "she works in a large hospital" in recogniser.text(sound).lower()
    assert 0 <= passages[0].start_s < passages[-1].end_s <= len(sound) / recogniser.sample_rate + 1
    assert recogniser.text(np.zeros(16000, np.float32)).strip(" .") in ("", "you", "Thank you")


def test_a_loop_is_told_from_a_long_text():
    assert _is_loop("and Merry Christmas " * 12)
    assert not _is_loop("I hear you are excited. Here is the desert. Am I inside or outside? " * 2)
    assert not _is_loop("")
