import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import save_speech_encoder

from msenc.config.build import build
from msenc.config.schema import plain
from msenc.files import read_json
from msenc.models.conversation import ConversationModel
from msenc.models.llm import load_llm, load_tokenizer
from msenc.models.pretrained import pinned
from msenc.runs.record import read_run
from msenc.training.assembly import build_datamodule, build_model
from msenc.training.export import load_encoders, load_export, write_export
from msenc.training.module import ConversationModule
from msenc.training.restore import load_checkpoint
from msenc.types import MsencError

FAST = ["trainer.max_epochs=1", "evaluate=null", "optimizer.lr=0.02", "model.connector.num_blocks=1"]
PROMPT = {"_target_": "msenc.prompt.Prompt", "instruction": "A conversation.\n", "response": "{speaker}:"}
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
WHAT = {
    "adapter": ["modality=text_audio", "model/llm=tiny_lora"],
    "llm": ["modality=text_audio"],
    "frozen": [
        "modality=text_audio_video",
        "model.llm.freeze=true",
        "model.tie_connectors=true",
        "model/connector=qformer",
    ],
    "text": ["modality=text", "model/llm=tiny_lora"],
}


@pytest.mark.parametrize("what", WHAT)
def test_one_call_loads_what_a_run_has_trained(what, train):
    overrides = [o for o in FAST if what not in ("text", "frozen") or "connector" not in o]
    run = train([*overrides, *WHAT[what]]).folder
    _, cfg = read_run(run)
    cfg.paths.output_dir = str(run)
    config = plain(cfg)
    expected = build_model(config)
    load_checkpoint(ConversationModule(expected), run, "best")
    datamodule = build_datamodule(config, "")

    model, tokenizer = load_export(run / "export")
    assert tokenizer.prompt == datamodule.tokenizer.prompt
    assert not any(p.requires_grad or m.training for m in model.modules() for p in m.parameters())
    batch = next(iter(datamodule.eval_dataloader("val")))
    with torch.no_grad():  # some processors add in another order where a file's bytes lie otherwise in memory
        torch.testing.assert_close(model(batch).nll, expected.eval()(batch).nll, rtol=0, atol=1e-5)
    trained = dict(expected.named_parameters())
    assert model.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(parameter, trained[name]) for name, parameter in model.named_parameters())

    names = {p.relative_to(run / "export").as_posix() for p in (run / "export").rglob("*") if p.is_file()}
    assert ("adapter/adapter_model.safetensors" in names) == (what in ("adapter", "text"))
    assert ("llm/model.safetensors" in names) == (what == "llm")
    assert ("connectors.safetensors" in names) == (what != "text")
    content = json.loads((run / "export" / "export.json").read_text())
    assert content["task_hash"] == json.loads((run / "run.json").read_text())["task_hash"]
    assert set(content["streams"]) == set(config["model"]["streams"])


def test_the_adapter_of_a_bfloat16_llm_is_float32_and_plain_peft_loads_it(train, demo_home):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    lora = ["model/llm=tiny_lora", "+model.llm.lora.target_modules=all-linear"]
    settings = ["modality=text", "model.llm.dtype=bfloat16", *lora]
    run = train([*FAST[:3], *settings]).folder
    tensors = load_file(run / "export" / "adapter" / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert {name.split(".")[-3] for name in tensors} == {*(f"{n}_proj" for n in "qkvo"), *PROJECTIONS}
    base = AutoModelForCausalLM.from_pretrained(demo_home / "data" / "tiny-llm", dtype=torch.bfloat16)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        before = base(ids).logits.float()
        after = PeftModel.from_pretrained(base, run / "export" / "adapter").eval()(ids).logits.float()
        ours = load_export(run / "export")[0].llm(ids).logits.float()
    moved = (after - before).norm()
    assert moved > 0.05 * before.norm()
    assert (after - ours).norm() < 0.2 * moved


def test_other_base_weights_and_versions_are_refused(train, demo_home, tmp_path):
    llm = shutil.copytree(demo_home / "data" / "tiny-llm", tmp_path / "llm")
    lora = ["model/llm=tiny_lora", f"model.llm.name_or_path={llm}"]
    export = train([*FAST, "modality=text_audio", *lora]).folder / "export"
    with safe_open(export / "adapter" / "adapter_model.safetensors", "pt") as tensors:
        assert all("lora_" in name for name in tensors.keys())  # noqa: SIM118
    tensors = load_file(llm / "model.safetensors")
    save_file(
        {**tensors, "model.norm.weight": tensors["model.norm.weight"] + 1}, llm / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(MsencError, match=r"base weights of a local folder with fingerprint \w+, .*llm has \w+"):
        load_export(export)
    load_export(export, base=str(demo_home / "data" / "tiny-llm"))
    path = export / "export.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 0}))
    with pytest.raises(MsencError, match="format_version 0, this msenc reads 1 and 2"):
        load_export(export)


@pytest.fixture
def heard_by_a_model(demo_home, tiny_models, tmp_path):
    """A small export of a run whose audio features a local WavLM made, without training it."""
    encoder = {"_target_": "msenc.models.encoders.SpeechEncoder", "name_or_path": str(tiny_models["wavlm"])}
    connector = {"_target_": "msenc.models.connector.Mlp", "num_queries": 2, "hidden_dim": 8}
    llm = load_llm(str(tiny_models["llama"]), lora={"r": 2, "target_modules": ["q_proj"]})
    model = ConversationModel(llm, {"audio": build(connector, "model.connector", in_dim=16, out_dim=16)})
    config = {
        "model": {
            "llm": {"lora": {"r": 2, "target_modules": ["q_proj"]}, "dtype": "float32"},
            "streams": {"audio": {"name": "wavlm", "dim": 16, "encoder": {**encoder, "layer": -1}}},
            "connector": connector,
            "tie_connectors": False,
        },
        "prompt": {**PROMPT, "turn": "{speaker}:{audio} {text}\n"},
        "data": {"max_history_tokens": 64},
        "decoding": {"max_new_tokens": 4},
    }
    write_export(tmp_path / "export", model, config, {"data": "mine"})
    return tmp_path / "export"


def test_no_file_has_a_path_of_this_machine(heard_by_a_model, tiny_models):
    content = read_json(heard_by_a_model / "export.json")
    assert content["base_llm"]["name"] is None
    assert content["streams"]["audio"]["left_out"] == ["name_or_path"]
    for file in heard_by_a_model.rglob("*"):
        if file.is_file():
            for folder in {*tiny_models.values(), heard_by_a_model.parent}:
                assert str(folder).encode() not in file.read_bytes(), file


def test_models_that_were_local_are_given_and_no_others_taken(heard_by_a_model, tiny_models, tmp_path):
    with pytest.raises(MsencError, match=r"its base LLM was a local folder, .*base=FOLDER"):
        load_export(heard_by_a_model)
    load_export(heard_by_a_model, base=str(tiny_models["llama"]))
    renamed = shutil.copytree(tiny_models["llama"], tmp_path / "renamed")
    tokenizer = load_tokenizer(str(renamed))
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(renamed)
    with pytest.raises(MsencError, match="has the weights that it was trained on, but another vocabulary"):
        load_export(heard_by_a_model, base=str(renamed))
    with pytest.raises(MsencError, match=r"the audio encoder wavlm was a local path.*encoders.audio=FOLDER"):
        load_encoders(heard_by_a_model, {})
    (encoder,) = load_encoders(heard_by_a_model, {"audio": str(tiny_models["wavlm"])}).values()
    assert encoder.dim == 16
    other = save_speech_encoder(tmp_path / "other", "WavLM", "layer")
    tensors = load_file(other / "model.safetensors")
    name = min(tensors)
    save_file({**tensors, name: tensors[name] + 1}, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(MsencError, match=r"audio features were made by wavlm with .*, .*other has \w+"):
        load_encoders(heard_by_a_model, {"audio": str(other)})
    with pytest.raises(MsencError, match=r"encoders.video: .* has no such stream, only audio"):
        load_encoders(heard_by_a_model, {"video": str(other)})


def test_a_model_of_the_hub_is_named_by_its_commit(tiny_models, tmp_path, monkeypatch):
    """Loaded from the local cache of the hub, where two commits of it lie."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    place = tmp_path / "models--anna--llm"
    for commit, family in (("a" * 40, "llama"), ("b" * 40, "qwen2")):
        shutil.copytree(tiny_models[family], place / "snapshots" / commit)
    (place / "snapshots" / ("a" * 40) / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("b" * 40)
    assert pinned("anna/llm") == f"anna/llm@{'b' * 40}"
    assert pinned(f"anna/llm@{'a' * 40}") == f"anna/llm@{'a' * 40}"
    assert load_llm("anna/llm").config.model_type == "qwen2"
    llm = load_llm(f"anna/llm@{'a' * 40}", lora={"r": 2, "target_modules": ["q_proj"]})
    assert llm.config.model_type == "llama"
    shares = load_llm(f"anna/llm@{'a' * 40}", lora={"r": 2, "target_modules": ["q_proj"]}, by_shares=True)
    assert shares.base_fingerprint == llm.base_fingerprint
    config = {
        "model": {
            **{"llm": {"lora": {"r": 2, "target_modules": ["q_proj"]}, "dtype": "float32"}, "streams": {}},
            **{"connector": None, "tie_connectors": False},
        },
        **{"prompt": {**PROMPT, "turn": "{speaker}: {text}\n"}, "data": {"max_history_tokens": 64}, "decoding": {}},
    }
    content = write_export(tmp_path / "export", ConversationModel(llm, {}), config, {})
    assert content["base_llm"]["name"] == f"anna/llm@{'a' * 40}"
    assert content["base_llm"]["licence"] == "apache-2.0"
    stored = read_json(tmp_path / "export" / "adapter" / "adapter_config.json")
    assert (stored["base_model_name_or_path"], stored["revision"]) == ("anna/llm", "a" * 40)
    model, _ = load_export(tmp_path / "export")
    assert model.base_fingerprint == llm.base_fingerprint
