import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from random_dialogues import draw_dialogue

from msenc.data.collate import collate, dialogue_rows
from msenc.files import read_json
from msenc.models.conversation import ConversationModel
from msenc.models.llm import load_llm, load_tokenizer
from msenc.training.export import load_export
from msenc.types import MsencError

pytest.importorskip("bitsandbytes")

LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": "all-linear"}
BITS = ["4bit", "8bit"]
MODELS = Path(os.environ.get("MSENC_MODELS", "models"))


def load(folder, quantization, **options):
    """With adapters that change something: PEFT's second factors begin at zero."""
    llm = load_llm(str(folder), lora=LORA, quantization=quantization, **options)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in llm.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=random))
    return ConversationModel(llm, {}).train()


def make_batch():
    drawn = [draw_dialogue(np.random.default_rng(i), 4, f"d{i}", streams=()) for i in range(2)]
    rows = [dialogue_rows(d, 10**6, {}) for d, _ in drawn]
    return collate([d for d, _ in drawn], [{} for _ in drawn], rows, {}, pack=True)


def step(model, batch):
    """Loss per token, and gradients as one vector."""
    model.train().zero_grad()
    loss = model(batch).nll.mean()
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for _, p in sorted(model.trainable().items())])


def apart(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def quantized_layers(model):
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    return {n: m for n, m in model.named_modules() if isinstance(m, Linear4bit | Linear8bitLt)}


def with_values_of(plain, quantized):
    """A model of float32 weights that are what the quantized ones stand for."""
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    layers = dict(plain.named_modules())
    with torch.no_grad():
        for name, layer in quantized_layers(quantized).items():
            weight = dequantize_bnb_weight(layer.weight, getattr(layer, "state", None))
            layers[name].weight.copy_(weight)
    return plain


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_quantized_layers_compute_with_the_values_they_store(tiny_models, family, bits):
    batch, folder = make_batch(), tiny_models[family]
    plain, quantized = load(folder, None), load(folder, bits)
    assert len(quantized_layers(quantized)) == 2 * 7  # all but the output layer
    loss, gradient = step(quantized, batch)
    before, _ = step(plain, batch)
    assert loss != before
    expected, expected_gradient = step(with_values_of(plain, quantized), batch)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert apart(gradient, expected_gradient) < 1e-4


@pytest.mark.parametrize("bits", BITS)
def test_an_evaluation_changes_neither_weights_nor_gradients(tiny_models, bits):
    """On CPUs with bfloat16 products, bitsandbytes packs 4-bit weights anew, and gradients are lost without a word."""
    batch, model = make_batch(), load(tiny_models["llama"], bits)
    before, gradient = step(model, batch)
    assert gradient.any()
    with torch.no_grad():
        evaluated = model.eval()(batch).nll.mean().item()
    assert evaluated == pytest.approx(before, rel=1e-5 if bits == "4bit" else 1e-2)  # 8 bits round activations, too
    after, gradient_after = step(model, batch)
    assert after == before
    assert torch.equal(gradient_after, gradient)


@pytest.mark.parametrize("bits", BITS)
def test_base_weights_are_known_by_what_they_were_before(tiny_models, bits):
    folder = str(tiny_models["llama"])
    expected = load_llm(folder).base_fingerprint
    assert load_llm(folder, lora=LORA, quantization=bits).base_fingerprint == expected
    assert load_llm(folder, freeze=True, quantization=bits).base_fingerprint == expected


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mixed", [False, True])
def test_layers_compute_in_the_precision_of_the_run_and_adapters_stay_float32(tiny_models, dtype, mixed, bits):
    model = load(tiny_models["llama"], bits, dtype=dtype)
    assert {p.dtype for p in model.trainable().values()} == {torch.float32}
    assert model.llm.get_input_embeddings().weight.dtype == getattr(torch, dtype)
    types = set()
    for layer in quantized_layers(model).values():
        layer.register_forward_hook(lambda _, inputs, output: types.add(output.dtype))
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        loss, gradient = step(model, make_batch())
    assert types == {torch.bfloat16 if mixed else getattr(torch, dtype)}
    assert loss == pytest.approx(step(load(tiny_models["llama"], bits), make_batch())[0], rel=0.01)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("bits", BITS)
def test_a_model_may_be_moved_after_it_has_computed(tiny_models, bits):
    model, batch = load(tiny_models["llama"], bits), make_batch()
    before = step(model, batch)[0]
    assert step(model.to("cpu"), batch)[0] == step(model.cpu(), batch)[0] == before


@pytest.mark.parametrize("bits", BITS)
def test_adapters_of_a_quantized_bfloat16_llm_compute_in_bfloat16(tiny_models, bits):
    model = load(tiny_models["llama"], bits, dtype="bfloat16")
    types = set()
    for name, module in model.named_modules():
        if name.endswith("lora_A.default"):
            module.register_forward_hook(lambda _, inputs, output: types.add((inputs[0].dtype, output.dtype)))
    step(model, make_batch())
    assert types == {(torch.bfloat16, torch.bfloat16)}


@pytest.mark.parametrize("bits", BITS)
def test_recomputed_activations_change_no_gradient(tiny_models, bits):
    batch, folder = make_batch(), tiny_models["llama"]
    (loss, gradient), (expected, expected_gradient) = (
        step(load(folder, bits, gradient_checkpointing=recomputes), batch) for recomputes in (True, False)
    )
    assert loss == expected
    assert apart(gradient, expected_gradient) < 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantization": "4bit"}, r"trained in full, and quantized weights cannot be trained\. Train an adapter"),
        ({"quantization": "3bit", "lora": LORA}, "expected 4bit, 8bit, or null"),
        (
            {"quantization": "8bit", "lora": {**LORA, "modules_to_save": ["q_proj"]}},
            r"model\.llm\.lora: PEFT refuses",
        ),
    ],
)
def test_what_cannot_be_quantized_is_refused(tiny_models, options, message):
    with pytest.raises(MsencError, match=message):
        load_llm(str(tiny_models["llama"]), **options)


def test_weights_that_are_quantized_already_are_not_quantized_again(tiny_models, tmp_path):
    load_llm(str(tiny_models["llama"]), freeze=True, quantization="8bit").save_pretrained(tmp_path)
    with pytest.raises(MsencError, match=r"are quantized already\. Name the LLM that they were made from"):
        load_llm(str(tmp_path), freeze=True, quantization="4bit")


def test_a_missing_package_is_named_with_its_extra(tiny_models, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MsencError, match=r"quantization=4bit needs the package bitsandbytes.*'\.\[quantize\]'"):
        load_llm(str(tiny_models["llama"]), lora=LORA, quantization="4bit")


def test_a_run_on_quantized_weights_says_so_and_is_loaded_as_it_was_trained(train, capsys):
    short = ["model/llm=tiny_lora", "modality=text", "trainer.max_steps=6", "decoding.max_new_tokens=1"]
    run = train([*short, "model.llm.quantization=4bit", "evaluate=val"])
    assert "4-bit weights" in capsys.readouterr().out
    facts = read_json(run.folder / "run.json")
    assert facts["quantization"] == "4bit"
    (metrics,) = (run.folder / "evaluation").glob("*/metrics.json")
    assert read_json(metrics)["nll"] == pytest.approx(facts["best_loss"], abs=2e-6)
    content = read_json(run.folder / "export" / "export.json")
    assert content["llm"]["quantization"] == "4bit"
    assert content["base_llm"]["fingerprint"] == facts["base_fingerprint"]
    quantized, _ = load_export(run.folder / "export")
    plain, _ = load_export(run.folder / "export", unquantized=True)
    assert (quantized.quantization, plain.quantization) == ("4bit", None)
    assert quantized_layers(quantized)
    assert not quantized_layers(plain)
    train([*short, "trainer.max_steps=2", "evaluate=null", f"init_from.adapter={run.folder}"], "unquantized")
    assert "They were trained on 4-bit weights; these are unquantized." in " ".join(capsys.readouterr().out.split())


def test_strategies_that_divide_the_llm_are_refused_by_name(train):
    overrides = ["model/llm=tiny_lora", "model.llm.quantization=4bit"]
    with pytest.raises(MsencError, match=r"trainer\.strategy=fsdp divides the LLM's weights among processes"):
        train([*overrides, "+trainer.strategy=fsdp"])
    with pytest.raises(MsencError, match="quantized weights cannot be trained"):
        train([*overrides, "model.llm.lora=null"])


@pytest.mark.real
@pytest.mark.skipif(not (MODELS / "smollm2-135m-instruct").is_dir(), reason="no SmolLM2 in MSENC_MODELS")
def test_a_quantized_smollm2_trains_near_float32():
    """Loss per token of one text: 3.380 in float32, 3.462 in 4 bits, 3.411 in 8; gradients 0.77 and 0.09 apart."""
    folder = MODELS / "smollm2-135m-instruct"
    text = (
        "Good morning, how are you today? I did not sleep well, the neighbours had a party until three. Oh no! That "
        "sounds terrible. Did you talk to them about it? Not yet, I was too tired to get up. Maybe we should invite "
        "them for dinner, so that they know us."
    )
    ids = load_tokenizer(str(folder))(text, return_tensors="pt").input_ids

    def loss_of(bits):
        llm = load(folder, bits).llm
        return llm(input_ids=ids, labels=ids).loss.item()

    exact = loss_of(None)
    assert abs(loss_of("8bit") - exact) < 0.05
    assert abs(loss_of("4bit") - exact) < 0.15
