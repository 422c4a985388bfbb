"""In which numbers a run trains, and that it is measured in the same."""

import sys
from types import SimpleNamespace

import pytest
import torch
from test_module import LORA, loader, make_batches, make_module, make_trainer

from msenc.evaluation.losses import read_metrics
from msenc.files import read_json
from msenc.runs.record import RunRecord, machine
from msenc.training.assembly import check_precision
from msenc.types import MsencError

SHORT = ["trainer.max_steps=8", "evaluate=val", "decoding.max_new_tokens=1", "optimizer.lr=0.01"]


def test_a_run_is_evaluated_in_the_precision_in_which_its_best_checkpoint_was_chosen(train):
    losses = {}
    for precision in ("32-true", "bf16-mixed", "bf16-true"):
        run = train([*SHORT, f"trainer.precision={precision}", "callbacks.average=null"], precision)
        (evaluation,) = (run.folder / "evaluation").iterdir()
        losses[precision] = read_metrics(evaluation)["nll"]
        # Written with 6 digits per token; in another precision the losses part at the third.
        assert losses[precision] == pytest.approx(read_json(run.folder / "run.json")["best_loss"], abs=2e-6)
    assert len({round(loss, 5) for loss in losses.values()}) == 3


def test_weights_that_cannot_be_trained_in_their_type_are_refused_or_named(tiny_models):
    whole, adapter = (make_module(tiny_models["llama"], lora=lora).model for lora in (None, LORA))
    assert check_precision(whole, "32-true") == check_precision(whole, "bf16-mixed") == []
    (text,) = check_precision(whole, "bf16-true")
    assert "bfloat16" in text
    assert "1/256" in text
    with pytest.raises(MsencError, match=r"trainable tensors are float16 .*model\.llm\.dtype=float32"):
        check_precision(whole, "16-true")
    for model in (whole, adapter):
        for parameter in model.llm.parameters():
            if not parameter.requires_grad or model is whole:
                parameter.data = parameter.data.bfloat16()
    assert check_precision(adapter, "bf16-mixed") == []  # a base in bfloat16, adapters in float32
    assert len(check_precision(whole, "bf16-mixed")) == 1


def test_summed_losses_do_not_overflow_float16(tiny_models, tmp_path, monkeypatch):
    """Where Lightning scales float16's gradients by 65,536, a smaller loss leaves the steps as they are."""
    weights, losses = [], []
    for precision in ("32-true", "16-mixed"):
        module = make_module(tiny_models["llama"])
        trainer = make_trainer(tmp_path, 3)
        monkeypatch.setattr(type(trainer), "precision", precision)
        step = module.training_step
        module.training_step = lambda batch, step=step: losses.append(step(batch)) or losses[-1]
        module.train()
        batches = make_batches([2, 2, 2])
        trainer.fit(module, loader(batches), loader(batches[:1]))
        weights.append({name: p.detach().clone() for name, p in module.model.trainable().items()})
    assert losses[0].item() == pytest.approx(1024 * losses[3].item())
    for name, expected in weights[0].items():
        assert torch.equal(weights[1][name], expected), name


def test_batches_are_pinned_with_all_they_hold(monkeypatch):
    (batch,) = make_batches([2])
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor.clone())
    other = batch.pin_memory()
    tensors = [batch.input_ids, batch.labels, *batch.streams["audio"].features, batch.streams["audio"].places]
    assert all(any(tensor is one for one in pinned) for tensor in tensors)
    assert other.segments == batch.segments
    assert other.target_ids == batch.target_ids
    assert torch.equal(other.streams["audio"].features[0], batch.streams["audio"].features[0])


def test_a_gpu_and_its_memory_stand_in_the_record(tmp_path, monkeypatch):
    here = machine()
    RunRecord(tmp_path / "cpu").close()
    assert "peak_gpu_memory_mib" not in read_json(tmp_path / "cpu" / "run.json")
    taken = iter([0, 300 * 2**20, 200 * 2**20])
    cuda = SimpleNamespace(
        is_available=lambda: True,
        is_initialized=lambda: True,
        get_device_name=lambda: "Some GPU",
        max_memory_allocated=lambda: next(taken, 0),
        reset_peak_memory_stats=lambda: None,
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    assert machine() == f"{here}, Some GPU"
    record = RunRecord(tmp_path / "gpu")
    record.add()
    record.close()
    assert read_json(tmp_path / "gpu" / "run.json")["peak_gpu_memory_mib"] == 300
