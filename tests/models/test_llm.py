import numpy as np
import pytest
import torch
from random_dialogues import DIMS, NUM_QUERIES, draw_dialogue

from msenc.data.collate import collate, dialogue_rows
from msenc.models.connector import Mlp
from msenc.models.conversation import ConversationModel
from msenc.models.llm import fingerprint, load_llm, load_tokenizer
from msenc.types import MsencError

LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1}


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


def test_a_frozen_llm_has_no_adapter(tiny_models):
    llm = load_llm(str(tiny_models["llama"]), freeze=True, lora=LORA)
    assert not any("lora_" in name for name in llm.state_dict())


def test_new_adapters_change_no_output(tiny_models):
    ids = torch.arange(3, 13)[None]
    plain, adapted = (load_llm(str(tiny_models["llama"]), lora=lora).eval() for lora in (None, LORA))
    torch.testing.assert_close(plain(ids).logits, adapted(ids).logits)


def test_adapters_of_a_bfloat16_llm_are_float32(tiny_models):
    llm = load_llm(str(tiny_models["llama"]), lora=LORA, dtype="bfloat16")
    kinds = {("lora_" in name, parameter.dtype) for name, parameter in llm.named_parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    assert llm(torch.arange(3, 8)[None]).logits.isfinite().all()


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
    with pytest.raises(MsencError, match="dtype 'float8' is not known: expected one of float32"):
        load_llm(str(tiny_models["llama"]), dtype="float8")
    with pytest.raises(MsencError, match=r"attn_implementation=nonsense: expected one of auto, split, dense"):
        load_llm(str(tiny_models["llama"]), attn_implementation="nonsense")


@pytest.mark.parametrize("lora", [{"r": 8, "alpha": 32}, {"r": 0}, {"r": 4, "target_modules": ["no_such_layer"]}])
def test_lora_arguments_that_peft_refuses(tiny_models, lora):
    with pytest.raises(MsencError, match=r"model\.llm\.lora: PEFT refuses"):
        load_llm(str(tiny_models["llama"]), lora=lora)
