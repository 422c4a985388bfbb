import os
from pathlib import Path

import checkpoint
import pytest

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*in eval mode",
    "ignore:.*does not have many workers",
    "ignore:.*logging interval",
    "ignore:.*no `val_dataloader`",
)


def check(result):
    assert result["ratios"]["checkpoint_to_what_trains"] <= 1.1
    assert result["bytes"]["optimizer_state"] >= 2 * result["bytes"]["trainable_tensors"]
    assert result["bytes"]["everything"] > 10 * result["bytes"]["checkpoint"]


def test_a_checkpoint_holds_little_but_what_trains(tmp_path):
    check(checkpoint.measure(tmp_path, is_quick=True))


@pytest.mark.real
def test_so_it_does_for_a_real_llm(tmp_path):
    if not (Path(os.environ.get("MSENC_MODELS", "nowhere")).expanduser() / "smollm2-135m-instruct").is_dir():
        pytest.skip("MSENC_MODELS names no folder with smollm2-135m-instruct")
    result = checkpoint.measure(tmp_path, is_quick=False)
    assert result["parameters"] > 134e6
    check(result)
