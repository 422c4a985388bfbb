import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from msenc.config.schema import plain
from msenc.runs.record import read_run
from msenc.training.assembly import build_datamodule, build_model
from msenc.training.export import load_export
from msenc.training.module import ConversationModule
from msenc.training.restore import load_checkpoint
from msenc.types import MsencError

FAST = ["trainer.max_epochs=1", "evaluate=null", "optimizer.lr=0.02", "model.connector.num_blocks=1"]
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
    with torch.no_grad():
        assert torch.equal(model(batch).nll, expected.eval()(batch).nll)

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
