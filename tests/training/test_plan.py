from importlib.util import find_spec

import pytest
import torch
from torch import nn

from msenc.config.schema import plain
from msenc.data.loader import collate_units
from msenc.models.quantize import tensors_of
from msenc.pipelines.plan import memory_of
from msenc.training.assembly import build_datamodule, build_model, build_optimizer
from msenc.training.module import ConversationModule
from msenc.training.plan import batch_tokens, count_batches, largest_batch, predict_memory
from msenc.types import MsencError
from msenc.work.console import console


@pytest.fixture
def planned(demo_home, compose):
    """``planned(overrides)`` -> (config, data module, empty model)."""

    def call(overrides=()):
        config = plain(compose(["modality=text_audio", *overrides]))
        datamodule = build_datamodule(config, "")
        datamodule.setup()
        model = build_model(config, empty=True)
        if model.llm.attention_kernel == "auto":
            model.llm.attention_kernel = "split"
        return config, datamodule, model

    return call


def test_a_run_on_the_cpu_is_planned_with_the_kernel_of_the_cpu(demo_home, compose, monkeypatch):
    def peak(*overrides):
        config = plain(compose(["modality=text", *overrides]))
        datamodule = build_datamodule(config, "")
        datamodule.setup()
        return memory_of(config, datamodule)["peak"]

    split, dense = (peak(f"model.llm.attn_implementation={kernel}") for kernel in ("split", "dense"))
    assert split < dense
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert peak("trainer.accelerator=cpu") == split
    assert peak("trainer.accelerator=auto") == peak("trainer.accelerator=gpu") == dense
    half = "trainer.precision=bf16-mixed"  # which a GPU's flash kernel takes
    split, dense = (peak(half, f"model.llm.attn_implementation={kernel}") for kernel in ("split", "dense"))
    assert peak(half, "trainer.accelerator=gpu") == split < dense


BUDGETS = ["data.batch_size=null", "data.max_tokens_per_batch=500"]


@pytest.mark.parametrize("layout", ["dialogue", "sample"])
@pytest.mark.parametrize("size", [BUDGETS, ["data.batch_size=3"]], ids=["budget", "number"])
def test_batches_are_counted_as_they_are_collated(planned, layout, size):
    config, datamodule, _ = planned([f"model.layout={layout}", *size])
    found = count_batches(datamodule, config["trainer"])
    batches = [datamodule.train_batch(units) for units in datamodule.train_batches().batches_of(0)]
    laid_out = [batch.input_ids.numel() for batch in batches]
    real = [
        n if b.attention_mask is None else int(b.attention_mask.sum()) for n, b in zip(laid_out, batches, strict=True)
    ]
    assert (min(laid_out), max(laid_out)) == (found["tokens_per_batch"]["min"], found["tokens_per_batch"]["max"])
    assert sum(real) == found["tokens_per_epoch"]
    assert found["padding"] == pytest.approx(1 - sum(real) / sum(laid_out))
    assert (found["padding"] > 0) == (layout == "sample")
    assert found["batches_per_epoch"] == len(batches)
    assert found["steps"] == config["trainer"]["max_epochs"] * len(batches)
    if size is BUDGETS:
        assert max(laid_out) <= 500
        assert found["fill"] == pytest.approx(sum(laid_out) / 500 / len(batches))
    for rank in range(2):
        for units in datamodule.train_batches(rank, 2).batches_of(0):
            if units:
                assert batch_tokens(datamodule, units)[1] <= largest_batch(datamodule, 2).input_ids.numel()


def test_steps_follow_accumulation_and_bounds(planned):
    _, datamodule, _ = planned(["data.batch_size=3"])  # 6 batches

    def steps(**trainer):
        return count_batches(datamodule, trainer)["steps"]

    assert steps(max_epochs=10, accumulate_grad_batches=4) == 20
    assert steps(max_epochs=10, max_steps=7) == 7
    assert steps(max_epochs=1, max_steps=70) == 6
    assert steps(max_epochs=-1, max_steps=-1) is None


QUANTIZED = [
    pytest.param(
        ["model/llm=tiny_lora", f"model.llm.quantization={bits}"],
        marks=pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"),
        id=bits,
    )
    for bits in ("4bit", "8bit")
]


@pytest.mark.parametrize("overrides", [[], *QUANTIZED])
def test_what_stays_is_predicted_exactly(planned, overrides):
    config, datamodule, model = planned(overrides)
    batch = largest_batch(datamodule, 1)
    found = predict_memory(model, build_optimizer(config), batch)
    real = build_model(config).train()
    scales = [tensor for parameter in real.parameters() for tensor in tensors_of(parameter)]
    optimizer = build_optimizer(config)([p for p in real.parameters() if p.requires_grad])
    real(batch).nll.sum().backward()
    optimizer.step()

    def size(tensors):
        return sum(t.numel() * t.element_size() for t in {t.data_ptr(): t for t in tensors}.values())

    assert found["trainable_weights"] == found["gradients"] == size(p for p in real.parameters() if p.requires_grad)
    assert found["base_weights"] == size(
        [*(p for p in real.parameters() if not p.requires_grad), *real.buffers(), *scales]
    )
    assert found["optimizer_state"] == size(t for state in optimizer.state.values() for t in state.values())
    assert found["peak"] == sum(n for name, n in found.items() if name != "peak")


def saved_bytes(model, batch):
    """Bytes that autograd keeps of a real forward pass, weights not counted."""
    kept = {}
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(batch).nll.sum()
    assert loss.requires_grad
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("kernel", ["split", "dense"])
def test_activations_hold_what_autograd_keeps_and_little_else(planned, kernel):
    config, datamodule, model = planned([f"model.llm.attn_implementation={kernel}", "data.batch_size=16"])
    batch = largest_batch(datamodule, 1)
    found = predict_memory(model, build_optimizer(config), batch)["activations"]
    kept = saved_bytes(build_model(config).train(), batch)
    assert 0.9 * kept < found < 1.3 * kept


def test_other_settings_need_other_memory(planned):
    def activations(*overrides, precision="32-true", processes=1):
        config, datamodule, model = planned(["modality=text_audio", *overrides])
        batch = largest_batch(datamodule, processes)
        return predict_memory(model, build_optimizer(config), batch, precision, processes)

    whole = activations()
    assert activations("data.batch_size=16")["activations"] > 1.5 * whole["activations"]
    assert activations("model.llm.gradient_checkpointing=true")["activations"] < 0.8 * whole["activations"]
    assert activations(precision="bf16-mixed")["activations"] < 0.9 * whole["activations"]
    halved = activations(precision="bf16-true")
    assert halved["base_weights"] == pytest.approx(whole["base_weights"] / 2, rel=0.01)
    shared = activations(processes=2)
    assert shared["gradients"] == 2 * whole["gradients"]
    assert shared["activations"] < 0.8 * whole["activations"]
    assert activations("optimizer._target_=torch.optim.SGD")["optimizer_state"] == 0


# ------------------------------------------------------------------------------------------------ plan=true


def test_a_plan_is_printed_and_leaves_no_run(train, capsys, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", refuse)
    monkeypatch.setattr(console, "_width", 200)
    lora = ["model/llm=tiny_lora", "modality=text_audio"]
    run = train(["plan=true", *lora, "data.max_history_tokens=30", "trainer.max_epochs=7", *BUDGETS])
    assert run.loss is None
    assert not run.folder.exists()
    found = {}
    for line in capsys.readouterr().out.splitlines():
        cells = [cell.strip() for cell in line.strip("│").split("│")]
        if len(cells) == 2:
            found[cells[0]] = cells[1]
    assert found["dialogues"] == "16"
    assert found["targets"].startswith("55, 55 of them")
    assert found["batch"].startswith("at most 500 tokens (data.max_tokens_per_batch); 16 units, 0 dialogues split")
    batches = int(found["batches per epoch"])
    assert int(found["optimizer steps"]) == 7 * batches
    low, high = found["tokens per batch"].partition(",")[0].split(" to ")
    assert int(low) < int(high) <= 500
    filled = int(found["tokens per epoch"].replace(",", "")) / 500 / batches
    assert found["budget filled"] == f"{100 * filled:.1f} %"
    assert found["padding"] == "0.0 %"
    assert not found["truncated histories"].startswith("0 targets")
    parts = ("base weights", "trainable weights", "gradients", "optimizer state", "activations", "average of weights")
    sizes = [float(found[name].removesuffix(" MiB")) for name in (*parts, "predicted peak memory")]
    assert min(sizes) > 0
    assert sum(sizes[:-1]) == pytest.approx(sizes[-1], abs=0.3)


def test_a_plan_removes_nothing_that_was_there(train, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("kept", encoding="utf-8")
    train(["plan=true", "modality=text"])
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_a_sweep_of_plans_makes_no_report(call_script, tmp_path, capsys):
    call_script("train.py", "-m", "plan=true", "modality=text", "seed=1,2", f"hydra.sweep.dir={tmp_path}")
    out = capsys.readouterr().out
    assert out.count("batches per epoch") == 2
    assert "did not finish" not in out
    assert "No table" not in out
    assert [path.name for path in tmp_path.iterdir()] == ["multirun.yaml"]


def test_a_refused_plan_leaves_no_run_either(train, tmp_path):
    with pytest.raises(MsencError, match=r"data\.max_tokens_per_batch=20: \d+ targets exceed it on their own"):
        train(["plan=true", "modality=text", "data.batch_size=null", "data.max_tokens_per_batch=20"])
    assert not (tmp_path / "run").exists()


def test_where_nothing_trains_no_memory_is_predicted(train, capsys):
    train(["plan=true", "modality=text", "model.llm.freeze=true"])
    out = capsys.readouterr().out
    assert "batches per epoch" in out
    assert "predicted peak memory" not in out


# ------------------------------------------------------------------------------------------------ several processes


def test_a_process_without_a_unit_has_a_gradient_of_zero(planned):
    for layout in ("dialogue", "sample"):
        config, datamodule, _ = planned([f"model.layout={layout}"])
        module = ConversationModule(build_model(config))
        batch = collate_units([], 1024, datamodule.num_queries, layout)
        assert batch.target_ids == []
        loss = module.train().training_step(batch)
        loss.backward()
        assert loss.item() == 0
        assert module._step_sums.tolist() == [0, 0]
        trainable = [p for p in module.parameters() if p.requires_grad]
        assert all(isinstance(p, nn.Parameter) and p.grad is not None and not p.grad.any() for p in trainable)
