import pytest

pytest.importorskip("trl")
pytest.importorskip("datasets")
import sft_trainer

pytestmark = pytest.mark.filterwarnings("ignore")  # other libraries' own


def test_both_trainers_compute_the_same_loss_of_as_many_tokens(tmp_path):
    result = sft_trainer.measure(tmp_path, "tiny", number=3, per_step=2, longest=False, repetitions=1)
    losses = result["losses"]
    assert losses.keys() == {"dialogue", "padded", "grouped", "padding-free"}
    assert max(losses.values()) < (1 + 1e-4) * min(losses.values())
    assert result["ratios"].keys() == {"padded", "grouped", "padding-free", "floor"}
    assert result["counts"]["tokens"] < result["counts"]["tokens of samples"]


def test_other_losses_are_noticed(tmp_path, monkeypatch):
    real = sft_trainer.total_of_trl
    monkeypatch.setattr(sft_trainer, "total_of_trl", lambda trainer: (1.001 * real(trainer)[0], real(trainer)[1]))
    with pytest.raises(AssertionError, match="padded: loss"):
        sft_trainer.measure(tmp_path, "tiny", number=2, per_step=2, longest=False, repetitions=1)
