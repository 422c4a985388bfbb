import copy
import json
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from random_dialogues import draw_dialogue

from msenc.data.collate import collate, dialogue_rows
from msenc.models.conversation import ConversationModel
from msenc.models.llm import load_llm
from msenc.training.export import load_export, write_export
from msenc.training.module import ConversationModule
from msenc.types import MsencError

PLAIN = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0}
TAKEN = {
    "plain": {},
    "all linear": {"target_modules": "all-linear"},
    "pattern": {"target_modules": r".*\.(q|v)_proj"},
    "excluded": {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
    "DoRA": {"use_dora": True},
    "rsLoRA": {"use_rslora": True},
    "one layer": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "ranks": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 4}},
    "bias": {"bias": "lora_only"},
    "Gaussian": {"init_lora_weights": "gaussian"},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "output layer": {"target_modules": ["lm_head", "q_proj"]},
    "some tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 6, 7]},
    "embeddings whole": {"modules_to_save": ["embed_tokens"]},
    "output layer whole": {"modules_to_save": ["lm_head"]},
    "norms whole": {"modules_to_save": ["norm"]},
    "orthogonal": {"init_lora_weights": "orthogonal"},
}
UNQUANTIZED = [(name, bits) for name in ("orthogonal", "bias") for bits in ("4bit", "8bit")] + [("DoRA", "8bit")]
REFUSED = {
    "PiSSA": {"init_lora_weights": "pissa"},
    "fast PiSSA": {"init_lora_weights": "pissa_niter_4"},
    "OLoRA": {"init_lora_weights": "olora"},
    "EVA": {"init_lora_weights": "eva"},
    "CorDA": {"init_lora_weights": "corda"},
    "LoftQ": {"init_lora_weights": "loftq", "loftq_config": {}},
    "LoRA-GA": {"init_lora_weights": "lora_ga"},
    "layers twice": {"layer_replication": [[0, 2], [1, 2]]},
    "bias of the second factor": {"lora_bias": True},
    "activated": {"alora_invocation_tokens": [5, 6]},
}

IS_THERE = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
STORED = [
    {},
    {"round_to": "bfloat16"},
    pytest.param({"quantization": "4bit"}, marks=IS_THERE),
    pytest.param({"quantization": "8bit"}, marks=IS_THERE),
]


def batch():
    drawn = [draw_dialogue(np.random.default_rng(i), 4, f"d{i}", streams=()) for i in range(2)]
    rows = [dialogue_rows(d, 10**6, {}) for d, _ in drawn]
    return collate([d for d, _ in drawn], [{} for _ in drawn], rows, {}, pack=True)


def config_of(llm):
    return {
        "model": {"llm": llm, "streams": {}, "connector": None, "tie_connectors": False},
        "prompt": {
            "_target_": "msenc.prompt.Prompt",
            "instruction": "Go on.",
            "turn": "{speaker}: {text}",
            "response": "{speaker}:",
        },
        "data": {"max_history_tokens": 100},
        "decoding": {},
    }


@pytest.mark.parametrize("stored", STORED, ids=str)
@pytest.mark.parametrize("variant", TAKEN)
def test_what_lora_trains_is_exported_and_resumed(tiny_models, tmp_path, variant, stored):
    """Export and checkpoint, put on base weights that are loaded anew, say what the trained model says."""
    options = {"name_or_path": str(tiny_models["llama"]), "lora": {**PLAIN, **TAKEN[variant]}, **stored}
    if (variant, stored.get("quantization")) in UNQUANTIZED:
        with pytest.raises(MsencError, match=rf"model\.llm\.lora\.{next(iter(TAKEN[variant]))}=.* does not work"):
            load_llm(**options)
        return
    torch.manual_seed(1)
    model = ConversationModel(load_llm(**options), {})
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    before = model.eval()(batch()).nll.detach()
    optimizer = torch.optim.AdamW(model.trainable().values(), lr=0.02)
    for _ in range(3):
        optimizer.zero_grad()
        model.train()(batch()).nll.mean().backward()
        optimizer.step()
    assert {n for n, p in model.trainable().items() if p.grad is not None and p.grad.any()}
    expected = model.eval()(batch()).nll.detach()
    assert (expected - before).abs().max() > 1e-3
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[n], value) for n, value in frozen.items())
    content = write_export(tmp_path / "export", model, config_of(options), {})
    assert {key: content["llm"][key] for key in stored} == stored
    assert content["llm"]["lora"] == options["lora"]
    assert json.loads((tmp_path / "export" / "export.json").read_text()) == content

    state = copy.deepcopy(dict(ConversationModule(model).state_dict()))
    torch.manual_seed(2)
    exported, _ = load_export(tmp_path / "export", base=str(tiny_models["llama"]))
    assert (exported(batch()).nll - expected).abs().max() == 0
    resumed = ConversationModule(ConversationModel(load_llm(**options), {}))
    saved = {n: state[n] for n in resumed.trainable_names()}
    resumed.load_state_dict(saved, strict=False)
    assert (resumed.model.eval()(batch()).nll - expected).abs().max() == 0


@pytest.mark.parametrize("variant", REFUSED)
def test_what_would_not_come_back_is_refused_by_name(tiny_models, variant):
    key = next(iter(REFUSED[variant]))
    with pytest.raises(MsencError, match=rf"model\.llm\.lora\.{key}="):
        load_llm(str(tiny_models["llama"]), lora={**PLAIN, **REFUSED[variant]})
