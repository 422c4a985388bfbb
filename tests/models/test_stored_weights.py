import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import LORA, save_causal_lm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
)

from msenc.models.llm import load_llm, parts_used_alone, token_embeddings
from msenc.types import MsencError

SAVED = ["Llama", "Mistral", "Qwen2", "Qwen3", "Phi3"]
FAMILIES = [*SAVED, "Gemma3", "GPT2"]
WAYS = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "rounded": {"dtype": "float32", "round_to": "bfloat16"},
}


@pytest.fixture(scope="module")
def stored(tiny_models, tmp_path_factory):
    """Family -> folder; "parts": safetensors in several files; "tied": the output layer is the embedding."""
    home = tmp_path_factory.mktemp("stored")
    tokenizer = AutoTokenizer.from_pretrained(tiny_models["llama"])
    made = {family: save_causal_lm(home / family, family, tokenizer) for family in SAVED}
    sizes = {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    others = {
        "Gemma3": Gemma3ForCausalLM(Gemma3TextConfig(**sizes, **small, num_key_value_heads=1, head_dim=8)),
        "GPT2": GPT2LMHeadModel(GPT2Config(**sizes, n_embd=16, n_layer=2, n_head=2)),
        "GPTNeoX": GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, **small)),
    }
    for name, llm in others.items():
        llm.save_pretrained(home / name)
        made[name] = home / name
    llm = AutoModelForCausalLM.from_pretrained(made["Qwen2"])
    llm.save_pretrained(home / "parts", max_shard_size="10KB")
    llm.config.tie_word_embeddings = True
    llm.tie_weights()
    llm.save_pretrained(home / "tied")
    return {**made, "parts": home / "parts", "tied": home / "tied"}


def test_there_are_several_files(stored):
    assert len(list(stored["parts"].glob("*.safetensors"))) > 1


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [*FAMILIES, "parts", "tied"])
def test_what_is_read_by_shares_is_what_is_loaded_whole(stored, name, way):
    folder, options = str(stored[name]), {"attn_implementation": "eager", **WAYS[way]}
    torch.manual_seed(1)
    whole = load_llm(folder, lora=None, **options)
    torch.manual_seed(1)
    llm = load_llm(folder, lora=None, by_shares=True, **options)
    assert llm.base_fingerprint == whole.base_fingerprint
    assert all(p.is_meta for p in llm.parameters())
    assert {n for n, _ in llm.named_parameters()} == {n for n, _ in whole.named_parameters()}
    expected = dict(whole.named_buffers())
    assert all(torch.equal(buffer, expected[n]) for n, buffer in llm.named_buffers())
    for n, parameter in whole.named_parameters(remove_duplicate=False):
        first, second = llm.stored.read(n, 0, 1), llm.stored.read(n, 1)
        assert (first.dtype, llm.get_parameter(n).dtype) == (parameter.dtype, parameter.dtype)
        assert torch.equal(torch.cat([first, second]), parameter)
    assert torch.equal(token_embeddings(llm), token_embeddings(whole))
    assert len(parts_used_alone(llm)) == (2 if whole.config.tie_word_embeddings else 4)
    assert llm.generation_config.eos_token_id == whole.generation_config.eos_token_id


ADAPTERS = {
    "usual": LORA,
    "all linear": {**LORA, "target_modules": "all-linear"},
    "an embedding, and a whole module": {
        **LORA,
        "target_modules": ["embed_tokens", "v_proj"],
        "modules_to_save": ["lm_head"],
    },
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapters_begin_as_those_of_a_whole_llm(stored, adapter, dtype):
    options = {"lora": ADAPTERS[adapter], "dtype": dtype}
    torch.manual_seed(1)
    whole = load_llm(str(stored["Llama"]), **options)
    after = torch.rand(1)
    torch.manual_seed(1)
    llm = load_llm(str(stored["Llama"]), by_shares=True, **options)
    assert torch.equal(torch.rand(1), after)
    named = dict(llm.named_parameters())
    kinds = {"lora_" in n: 0 for n in named}
    assert kinds.keys() == {True, False}
    for name, parameter in whole.named_parameters():
        found = named.pop(name)
        assert (found.dtype, found.requires_grad) == (parameter.dtype, parameter.requires_grad)
        assert found.is_meta == ("lora_" not in name)
        values = llm.stored.read(name).to(found.dtype) if found.is_meta else found
        assert torch.equal(values, parameter), name
    assert not named


@pytest.mark.parametrize("setting", [{"use_dora": True}, {"trainable_token_indices": [3]}])
def test_adapters_that_are_computed_from_base_weights_are_refused(stored, setting):
    with pytest.raises(MsencError, match=r"model\.llm\.lora: \d+ tensors are computed from base weights \(.*fsdp2"):
        load_llm(str(stored["Llama"]), lora={**LORA, **setting}, by_shares=True)


def test_files_that_cannot_be_read_by_shares_are_refused(stored, tmp_path):
    def copy(name, tensors, **config):
        (tmp_path / name).mkdir()
        own = json.loads((stored["Llama"] / "config.json").read_text())
        (tmp_path / name / "config.json").write_text(json.dumps({**own, **config}))
        if tensors is not None:
            save_file(tensors, tmp_path / name / "model.safetensors")
        return str(tmp_path / name)

    tensors = load_file(stored["Llama"] / "model.safetensors")
    fewer = {n: t for n, t in tensors.items() if "layers.1" not in n}
    with pytest.raises(MsencError, match=r"found no model\.safetensors, expected one.*save_pretrained"):
        load_llm(copy("none", None), by_shares=True)
    with pytest.raises(MsencError, match=r"lack \d+ tensors of LlamaForCausalLM \(model\.layers\.1.*save_pretrained"):
        load_llm(copy("fewer", fewer), by_shares=True)
    with pytest.raises(
        MsencError, match=r"lack 1 tensors of GPTNeoXForCausalLM .*by names that only its own loader knows"
    ):
        load_llm(str(stored["GPTNeoX"]), by_shares=True)
    with pytest.raises(MsencError, match=r"is \(\d+, 16\) in its safetensors, and \(\d+, 16\) by its config"):
        load_llm(copy("other", tensors, vocab_size=7), by_shares=True)
    with pytest.raises(MsencError, match=r"config ties .*tie_word_embeddings"):
        load_llm(copy("tied", tensors, tie_word_embeddings=True), by_shares=True)
