import pytest
import torch
from test_conversation import apart, distance, draw, losses
from tiny_models import build_conversation
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from msenc.models.attention import NAME, register
from msenc.models.layout import check_layout, choose_attention, reads_positions
from msenc.models.llm import load_llm
from msenc.types import MsencError

SIZES = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
TAKEN = {
    "gemma2": ("eager", {"head_dim": 8}),  # a soft cap
    "gpt_oss": ("eager", {"head_dim": 8, **EXPERTS}),  # sinks, which SDPA would leave out without a word
    "gptj": ("eager", {"n_embd": 16, "n_head": 2, "n_layer": 2, "rotary_dim": 4, "n_positions": 512}),
    "stablelm": ("eager", {}),  # computes its attention itself, whatever it is told
    "gpt2": (NAME, {"n_embd": 16, "n_head": 2, "n_layer": 2, "n_positions": 512}),  # learned positions
    "opt": (NAME, {"ffn_dim": 32, "word_embed_proj_dim": 16}),
    "deepseek_v3": (  # values narrower than keys
        NAME,
        {
            **{"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 6},
            **{"n_routed_experts": 4, "n_group": 1, "topk_group": 1, **EXPERTS},
        },
    ),
}
REFUSED = {
    "gpt_neo": (
        "does not accept the mask",
        {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]], "window_size": 40},
    ),
    "bloom": ("accepts no position ids", {"n_head": 2, "n_layer": 2}),
    "mpt": ("accepts no position ids", {"d_model": 16, "n_heads": 2, "n_layers": 2, "max_seq_len": 512}),
    "mamba": ("accepts no position ids", {"state_size": 4}),
    "qwen3_next": (
        "1 of 2 layers follow",
        {"head_dim": 8, "layer_types": ["linear_attention", "full_attention"], **EXPERTS},
    ),
}


def save(folder, family, sizes):
    config = CONFIG_MAPPING[family](**{**SIZES, **sizes})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", TAKEN)
def test_a_family_that_takes_the_layout_computes_its_single_samples(tmp_path, family):
    attention, sizes = TAKEN[family]
    model = build_conversation(save(tmp_path / family, family, sizes), lora=None)
    assert model.llm.config._attn_implementation == attention
    whole, _ = draw(0, 2, vocab=60)
    _, samples = draw(0, 2, layout="sample", vocab=60)
    (nll, gradient), (nll_alone, gradient_alone) = losses(model, [whole]), losses(model, samples)
    assert apart(nll_alone, nll) < 1e-4
    assert distance(gradient_alone, gradient) < 1e-4


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_does_not_is_refused_and_trains_with_the_layout_sample(tmp_path, family):
    reason, sizes = REFUSED[family]
    model = build_conversation(save(tmp_path / family, family, sizes), lora=None)
    whole, _ = draw(0, 2, vocab=60)
    with pytest.raises(MsencError, match=rf"{reason}.*model\.layout=sample"):
        model(whole)
    padded, alone = draw(0, 2, layout="sample", vocab=60)
    assert not padded.attention_mask.all()
    (nll, gradient), (nll_alone, gradient_alone) = losses(model, [padded]), losses(model, alone)
    assert apart(nll_alone, nll) < 1e-4
    assert distance(gradient_alone, gradient) < 1e-4


def test_a_language_model_that_is_not_causal_is_refused(tmp_path):
    folder = save(tmp_path / "bert", "bert", {})
    with pytest.raises(MsencError, match=r"BertLMHeadModel: its tokens attend to later tokens.*causal"):
        load_llm(str(folder))


def test_a_kernel_that_would_leave_something_out_is_refused(tmp_path):
    folder = save(tmp_path / "llm", "gpt_oss", TAKEN["gpt_oss"][1])
    with pytest.raises(MsencError, match=r"attn_implementation=split: .*gpt_oss.* only eager computes"):
        load_llm(str(folder), attn_implementation="split")


def test_what_limits_samples_is_found_in_the_layers_and_not_in_a_key(tmp_path):
    """A window that no layer has limits nothing, and a table of positions limits whoever reads it."""
    found = {
        family: check_layout(load_llm(str(save(tmp_path / str(i), family, sizes))))[1]
        for i, (family, sizes) in enumerate(
            [
                ("qwen2", {"sliding_window": 40, "use_sliding_window": False}),
                ("mistral", {"sliding_window": 40}),
                ("gpt2", TAKEN["gpt2"][1]),
                ("llama", {}),
            ]
        )
    }
    assert found == {"qwen2": {}, "mistral": {"sliding_window": 40}, "gpt2": {"n_positions": 512}, "llama": {}}


@pytest.mark.parametrize(("family", "limits"), [("mistral", {"sliding_window": 4096}), ("falcon_h1", None)])
def test_a_check_of_a_7b_model_builds_a_small_copy(family, limits):
    """On shapes alone: a copy that read or made all weights would take 28 GB."""
    config = CONFIG_MAPPING[family]()
    config._attn_implementation = register()
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(config)
    llm.attention_kernel = "auto"
    assert choose_attention(config) == NAME
    state = torch.random.get_rng_state()
    if limits is None:
        with pytest.raises(MsencError, match=r"model\.layout=sample"):
            check_layout(llm)
    else:
        assert check_layout(llm) == ("auto", limits)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_an_llm_of_which_no_copy_can_be_made_shows_it_itself(tiny_models, monkeypatch):
    monkeypatch.setattr("msenc.models.layout._small_copy", lambda *_: None)
    monkeypatch.setattr("msenc.models.layout._find_limits", lambda *_: None)
    model = build_conversation(tiny_models["mistral"])
    kernel, limits = check_layout(model.llm)
    assert kernel == "auto"
    assert limits["sliding_window"] == 4096
    attention = model.llm.get_base_model().model.layers[1].self_attn
    own = attention.forward
    attention.forward = lambda *args, attention_mask, layout, **kwargs: own(*args, attention_mask=None, **kwargs)
    with pytest.raises(MsencError, match=r"model\.layout=sample"):
        check_layout(model.llm)


def test_an_adapter_does_not_hide_what_its_llm_reads(tiny_models, tmp_path):
    assert reads_positions(build_conversation(tiny_models["llama"]).llm)
    assert not reads_positions(load_llm(str(save(tmp_path / "bloom", "bloom", REFUSED["bloom"][1]))))
