import shutil

import numpy as np
import pytest
import torch
from random_dialogues import DIMS, NUM_QUERIES, draw_dialogue
from transformers import AutoModelForCausalLM, GenerationConfig, OPTConfig, OPTForCausalLM

from msenc.data.collate import collate, dialogue_rows
from msenc.models.connector import Mlp
from msenc.models.conversation import ConversationModel
from msenc.models.llm import fingerprint, load_llm, load_tokenizer
from msenc.types import MsencError

LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1}
ALL_LINEAR = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": "all-linear"}


def trainable(llm):
    return {name for name, parameter in llm.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_freeze_lora_and_full_decide_what_trains(tiny_models, family):
    folder = str(tiny_models[family])
    assert trainable(load_llm(folder, freeze=True, lora=LORA)) == set()
    assert trainable(load_llm(folder, freeze=True)) == set()
    adapted = trainable(load_llm(folder, lora=LORA))
    assert adapted
    assert all("lora_" in name for name in adapted)
    full = load_llm(folder)
    assert trainable(full) == {name for name, _ in full.named_parameters()}


def test_what_a_checkpoint_recommends_for_decoding_is_not_taken(tiny_models, tmp_path):
    folder = tmp_path / "opinionated"
    shutil.copytree(tiny_models["llama"], folder)
    ends = [2, 7]
    settings = {"do_sample": True, "temperature": 0.1, "repetition_penalty": 9.0, "max_new_tokens": 1}
    GenerationConfig(**settings, eos_token_id=ends).save_pretrained(folder)
    assert AutoModelForCausalLM.from_pretrained(folder).generation_config.repetition_penalty == 9.0
    found = load_llm(str(folder)).generation_config.to_dict()
    assert found["eos_token_id"] == ends  # but where a reply ends is no taste
    assert {name: found.get(name) for name in settings} == dict.fromkeys(settings)


def test_a_frozen_llm_has_no_adapter(tiny_models):
    llm = load_llm(str(tiny_models["llama"]), freeze=True, lora=LORA)
    assert not any("lora_" in name for name in llm.state_dict())


def test_new_adapters_change_no_output(tiny_models):
    ids = torch.arange(3, 13)[None]
    plain, adapted = (load_llm(str(tiny_models["llama"]), lora=lora).eval() for lora in (None, LORA))
    torch.testing.assert_close(plain(ids).logits, adapted(ids).logits)


@pytest.mark.parametrize("lora", [None, {**LORA, "lora_dropout": 0.0}])
def test_dropout_zeroes_a_share_of_what_feed_forward_blocks_add_in_training_alone(tiny_models, lora):
    folder, ids = str(tiny_models["llama"]), torch.arange(3, 13).repeat(20, 1)
    plain, dropped = (load_llm(folder, lora=lora, dropout=share) for share in (0.0, 0.3))
    added = []
    for llm in (plain, dropped):
        block = next(m for n, m in llm.named_modules() if n.endswith("layers.0.mlp"))
        block.register_forward_hook(lambda *hooked: added.append(hooked[2]))
        llm.train()(ids)
    before, after = added
    kept = after != 0
    assert kept.float().mean().item() == pytest.approx(0.7, abs=0.03)  # of 3,200 values: four standard errors
    torch.testing.assert_close(after[kept], before[kept] / 0.7)
    assert torch.equal(plain.eval()(ids).logits, dropped.eval()(ids).logits)
    assert plain.state_dict().keys() == dropped.state_dict().keys()


def test_a_frozen_llm_drops_nothing(tiny_models):
    ids = torch.arange(3, 13)[None]
    llm = load_llm(str(tiny_models["llama"]), freeze=True, dropout=0.5)
    assert torch.equal(llm.train()(ids).logits, llm.eval()(ids).logits)


@pytest.mark.parametrize("share", [1.0, -0.1, float("nan")])
def test_a_dropout_that_is_no_share_is_refused(tiny_models, share):
    with pytest.raises(MsencError, match=r"model\.llm\.dropout=.*: expected a share from 0 to below 1"):
        load_llm(str(tiny_models["llama"]), dropout=share)


def test_dropout_is_refused_where_no_feed_forward_block_is_found(tmp_path):
    OPTForCausalLM(
        OPTConfig(hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=16)
    ).save_pretrained(tmp_path)
    with pytest.raises(MsencError, match=r"dropout=0\.1: OPTForCausalLM has no mlp"):
        load_llm(str(tmp_path), dropout=0.1)


def test_adapters_of_a_bfloat16_llm_are_float32(tiny_models):
    llm = load_llm(str(tiny_models["llama"]), lora=LORA, dtype="bfloat16")
    kinds = {("lora_" in name, parameter.dtype) for name, parameter in llm.named_parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    assert llm(torch.arange(3, 8)[None]).logits.isfinite().all()


def lora_by_peft(folder, dtype):
    """The same adapters as PEFT computes them, of an LLM in that type."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **ALL_LINEAR))


def fill_adapters(llm):
    """Adapters that change something: PEFT's second factors begin at zero."""
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in llm.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=random))
    return llm.train()


def logits_and_gradients(llm):
    logits = llm(torch.arange(3, 13)[None]).logits
    logits.float().log_softmax(-1)[..., 5].sum().backward()
    return logits.detach(), {n: p.grad for n, p in llm.named_parameters() if p.requires_grad}


def test_lora_in_a_float32_llm_computes_what_peft_does(tiny_models):
    ours = fill_adapters(load_llm(str(tiny_models["llama"]), lora=ALL_LINEAR, attn_implementation="eager"))
    theirs = fill_adapters(lora_by_peft(tiny_models["llama"], torch.float32))
    theirs.set_attn_implementation("eager")
    (logits, gradients), (expected, expected_gradients) = map(logits_and_gradients, (ours, theirs))
    assert torch.equal(logits, expected)
    assert gradients.keys() == expected_gradients.keys()
    assert len(gradients) == 2 * 2 * 7
    assert all(torch.equal(gradients[name], expected_gradients[name]) for name in gradients)


def test_lora_in_a_bfloat16_llm_computes_in_bfloat16_and_learns_in_float32(tiny_models):
    ours = fill_adapters(load_llm(str(tiny_models["llama"]), lora=ALL_LINEAR, dtype="bfloat16"))
    types = []
    for name, module in ours.named_modules():
        if name.endswith("lora_A.default"):
            module.register_forward_hook(lambda _, inputs, output: types.append((inputs[0].dtype, output.dtype)))
    theirs, precise = (fill_adapters(lora_by_peft(tiny_models["llama"], t)) for t in (torch.bfloat16, torch.float64))
    (_, gradients), (_, by_peft), (_, exact) = map(logits_and_gradients, (ours, theirs, precise))
    assert types == [(torch.bfloat16, torch.bfloat16)] * 14
    assert {g.dtype for g in gradients.values()} == {torch.float32}

    def error(found):
        pairs = [(found[name].double() - exact[name], exact[name]) for name in exact]
        return (sum(e.square().sum() for e, _ in pairs) / sum(x.square().sum() for _, x in pairs)).sqrt().item()

    # Most of what a bfloat16 LLM's gradients miss is its own rounding; the adapters' adds little to it.
    assert error(gradients) < torch.finfo(torch.bfloat16).eps
    assert error(gradients) < 1.5 * error(by_peft)


def test_adapters_that_are_no_plain_product_compute_as_peft_does_it(tiny_models):
    llm = load_llm(str(tiny_models["llama"]), lora={**LORA, "use_dora": True}, dtype="bfloat16")
    assert llm(torch.arange(3, 8)[None]).logits.isfinite().all()
    factors = [m for n, m in llm.named_modules() if n.endswith("lora_A.default")]
    assert {type(f) for f in factors} == {torch.nn.Linear}


def test_fingerprints_tell_base_weights_apart(tiny_models):
    folder = str(tiny_models["llama"])
    first = load_llm(folder).base_fingerprint
    assert load_llm(folder, freeze=True).base_fingerprint == first
    assert load_llm(folder, lora=LORA).base_fingerprint == first
    assert load_llm(str(tiny_models["mistral"])).base_fingerprint != first
    llm = load_llm(folder)
    assert fingerprint(llm) == first
    with torch.no_grad():
        for parameter in llm.parameters():
            parameter.add_(1e-3)
    assert fingerprint(llm) != first


@pytest.mark.parametrize("options", [{"freeze": True}, {"lora": {**LORA, "lora_dropout": 0.0}}])
def test_gradient_checkpointing_changes_no_gradient(tiny_models, options):
    rng = np.random.default_rng(0)
    dialogue, features = draw_dialogue(rng, 4)
    batch = collate([dialogue], [features], [dialogue_rows(dialogue, 10**6, NUM_QUERIES)], NUM_QUERIES, pack=True)
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        llm = load_llm(str(tiny_models["llama"]), gradient_checkpointing=checkpointing, **options)
        connectors = {name: Mlp(DIMS[name], 16, NUM_QUERIES[name], 8) for name in DIMS}
        model = ConversationModel(llm, connectors).train()
        calls = []
        next(m for n, m in llm.named_modules() if n.endswith("layers.0.mlp")).register_forward_pre_hook(
            lambda *_, calls=calls: calls.append(1)
        )
        model(batch).nll.sum().backward()
        if not options.get("freeze"):
            assert len(calls) == 1 + checkpointing  # activations are computed again
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
        assert {n for n, g in gradients[-1].items() if g is None} == set()
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


def test_what_cannot_be_loaded_is_refused(tiny_models, tmp_path):
    for load in (load_llm, load_tokenizer):
        with pytest.raises(MsencError, match=r"cannot load 'nobody/no-such-model'[\s\S]*do: check the name"):
            load("nobody/no-such-model")
    (tmp_path / "empty").mkdir()
    with pytest.raises(MsencError, match=r"cannot load '.*empty'[\s\S]*tried: as a folder\n"):
        load_llm(str(tmp_path / "empty"))
    with pytest.raises(MsencError, match="dtype 'float8': expected one of float32"):
        load_llm(str(tiny_models["llama"]), dtype="float8")
    with pytest.raises(MsencError, match=r"attn_implementation=nonsense: expected one of auto, split, dense"):
        load_llm(str(tiny_models["llama"]), attn_implementation="nonsense")


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"r": 8, "alpha": 32}, r"model\.llm\.lora\.alpha: no such setting\. Expected some of r, lora_alpha"),
        ({"r": 0}, r"model\.llm\.lora: PEFT refuses"),
        ({"r": 4, "target_modules": ["no_such_layer"]}, r"model\.llm\.lora: PEFT refuses"),
    ],
)
def test_lora_arguments_that_are_refused(tiny_models, lora, message):
    with pytest.raises(MsencError, match=message):
        load_llm(str(tiny_models["llama"]), lora=lora)
