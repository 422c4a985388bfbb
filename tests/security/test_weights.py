"""A folder of a model, an adapter or a checkpoint is data: its code is not run, its pickles are not executed."""

import json
import os
import pickle
import shutil
import tarfile
from contextlib import suppress

import pytest
import torch
from tiny_models import save_clip, save_speech_encoder, save_whisper

from msenc.evaluation.metrics.embeddings import EmbeddingSimilarity
from msenc.files import read_json
from msenc.models.connector import QFormer
from msenc.models.encoders import ClipVision, SpeechEncoder, WhisperEncoder
from msenc.models.llm import load_llm, load_tokenizer
from msenc.models.pretrained import load_torch_file
from msenc.models.recognition import Recogniser
from msenc.pipelines.evaluate import evaluate
from msenc.raw.speakers import XVector
from msenc.training.checkpoints import CheckpointFiles, read_checkpoint
from msenc.training.export import load_export
from msenc.types import MsencError
from msenc.upstream import read_tensors

LOADERS = {
    "llm": load_llm,
    "empty llm": lambda folder: load_llm(folder, empty=True),
    "tokenizer": load_tokenizer,
    "speech": SpeechEncoder,
    "whisper": WhisperEncoder,
    "clip": ClipVision,
    "recogniser": Recogniser,
    "x-vector": XVector,
    "embeddings": EmbeddingSimilarity,
}
AUTO_MAP = {
    **{f"Auto{name}": "evil.Evil" for name in ("Config", "Model", "FeatureExtractor", "ImageProcessor", "Processor")},
    **{f"AutoModelFor{name}": "evil.Evil" for name in ("CausalLM", "AudioXVector", "SpeechSeq2Seq")},
    "AutoTokenizer": ["evil.Evil", "evil.Evil"],
}
CONFIGS = ("config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json")


class Executed:
    """What is pickled as a command that leaves the marker."""

    def __init__(self, marker) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def with_code(folder, payload, **config) -> str:
    """A folder whose every config names a module that lies beside it."""
    folder.mkdir(exist_ok=True)
    (folder / "evil.py").write_text(f"{payload}\nclass Evil: pass\n")
    for name in CONFIGS:
        own = read_json(folder / name) if (folder / name).is_file() else {}
        (folder / name).write_text(json.dumps({**own, "auto_map": AUTO_MAP, **config}))
    return str(folder)


@pytest.mark.parametrize("kind", LOADERS)
def test_a_folder_that_wants_its_own_code_is_refused(kind, guard, payload, tmp_path, capsys):
    folder = with_code(tmp_path / "evil", payload, model_type="evil", tokenizer_class="Evil")
    text = guard.refuses(lambda: LOADERS[kind](folder))
    assert "it requires running its own code" in text
    assert "trust_remote_code" not in text
    assert "[y/N]" not in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["llm", "tokenizer", "speech", "whisper", "clip"])
def test_code_beside_a_known_model_is_not_run(kind, guard, payload, tmp_path, stored_run, capsys):
    save = {
        "speech": lambda folder: save_speech_encoder(folder, "WavLM", "layer"),
        "whisper": save_whisper,
        "clip": save_clip,
    }
    folder = tmp_path / "model"
    if kind in save:
        save[kind](folder)
    else:
        shutil.copytree("data/tiny-llm", folder)
    with guard.on(), suppress(MsencError):
        LOADERS[kind](with_code(folder, payload))
    assert "[y/N]" not in capsys.readouterr().out


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_no_kernel_is_fetched_because_a_config_names_it(key, guard, tmp_path):
    folder = save_clip(tmp_path / "clip")
    config = {**read_json(folder / "config.json"), key: "somebody/kernel"}
    (folder / "config.json").write_text(json.dumps(config))
    with guard.on(), suppress(MsencError):
        ClipVision(str(folder))


@pytest.mark.parametrize("method", ["gptq", "quanto"])
def test_a_quantization_that_is_not_here_is_a_refusal(method, guard, stored_run):
    file = stored_run.parents[2] / "data" / "tiny-llm" / "config.json"
    file.write_text(json.dumps({**read_json(file), "quantization_config": {"quant_method": method, "bits": 4}}))
    assert "cannot load" in guard.refuses(lambda: load_llm("data/tiny-llm"))


@pytest.mark.parametrize("kind", ["llm", "tokenizer", "speech", "clip", "recogniser", "x-vector"])
@pytest.mark.parametrize("scheme", ["http", "hf", "file"])
def test_the_name_of_a_model_is_no_address(kind, scheme, guard, no_server):
    address = f"{scheme}://{no_server.partition('://')[2]}/model"
    assert f"{address!r} is a URL" in guard.refuses(lambda: LOADERS[kind](address))


# Pickles


def pickled(guard, file, where="weights") -> None:
    """A file of weights in a format of torch's, with code in it."""
    content = {"weights": {"x": Executed(guard.marker)}, "object": Executed(guard.marker)}.get(where)
    if content is None:
        content = {"state_dict": {}, where: Executed(guard.marker)}
    torch.save(content, file)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00001.bin"])
def test_weights_with_code_are_refused(name, guard, stored_run, tmp_path):
    folder = tmp_path / "data" / "tiny-llm"
    for file in folder.glob("*.safetensors"):
        file.unlink()
    pickled(guard, folder / name)
    index = {"metadata": {}, "weight_map": {"model.norm.weight": name}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    text = guard.refuses(lambda: load_llm(str(folder)))
    assert "posix.system, which is not a tensor" in text
    assert "weights_only" not in text


@pytest.mark.parametrize(
    ("kind", "save"),
    [
        ("speech", lambda folder: save_speech_encoder(folder, "WavLM", "layer")),
        ("whisper", save_whisper),
        ("clip", save_clip),
    ],
)
def test_weights_of_an_encoder_with_code_are_refused(kind, save, guard, tmp_path):
    folder = save(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    pickled(guard, folder / "pytorch_model.bin")
    assert "posix.system, which is not a tensor" in guard.refuses(lambda: LOADERS[kind](str(folder)))


def test_a_connector_starts_from_no_code(guard, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    pickled(guard, tmp_path / "pytorch_model.bin")
    settings = {"num_queries": 2, "num_layers": 1, "hidden_dim": 16, "num_heads": 2, "encoder_dim": 8}
    text = guard.refuses(lambda: QFormer(4, 16, **settings, init=str(tmp_path)))
    assert "posix.system, which is not a tensor" in text


WRITERS = {
    "torch's": lambda value, file: torch.save(value, file),
    "torch's old": lambda value, file: torch.save(value, file, _use_new_zipfile_serialization=False),
    "a pickle": lambda value, file: file.write_bytes(pickle.dumps(value)),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("place", ["state_dict", "optimizer_states", "hyper_parameters", "loops", "resume", None])
def test_a_checkpoint_with_code_is_refused(writer, place, guard, tmp_path):
    file = tmp_path / "last.ckpt"
    evil = Executed(guard.marker)
    WRITERS[writer]({"state_dict": {}, place: [evil]} if place else evil, file)
    for call in (
        lambda: read_checkpoint(file),
        lambda: CheckpointFiles().load_checkpoint(file),
        lambda: CheckpointFiles().newest(tmp_path, print),
    ):
        text = guard.refuses(call)
        assert "last.ckpt: cannot be read" in text
        assert "weights_only" not in text
    with guard.on(), pytest.raises(ValueError, match=r"last\.ckpt cannot be read as tensors"):
        load_torch_file(file)
    assert "msenc never executes" in guard.refuses(lambda: read_tensors(file))


def test_a_tar_of_upstreams_with_code_is_refused(guard, tmp_path):
    (tmp_path / "pickle").write_bytes(pickle.dumps(Executed(guard.marker)))
    with tarfile.open(tmp_path / "upstream.tar", "w") as tar:
        for name in ("pickle", "storages", "tensors"):
            tar.add(tmp_path / "pickle", name)
    assert "msenc never executes" in guard.refuses(lambda: read_tensors(tmp_path / "upstream.tar"))


def test_a_run_whose_checkpoint_holds_code_is_not_evaluated(guard, stored_run, compose):
    pickled(guard, stored_run / "checkpoints" / "best.ckpt", "optimizer_states")
    measure = [f"run_dir={stored_run}", "generate=false", "overwrite=true", "limit=1"]
    assert "best.ckpt: cannot be read" in guard.refuses(lambda: evaluate(compose(measure, "evaluate")))


# Adapters

ADAPTERS = {
    "megatron": {"megatron_config": {"a": 1}, "megatron_core": "evil"},
    "a core to import": {"megatron_core": "evil"},
    "a file of EVA": {"eva_config": {"path": "evil.pt"}},
    "a file of CorDA": {"corda_config": {"cache_file": "evil.pt"}},
    "a library": {"auto_mapping": {"parent_library": "evil", "base_model_class": "Evil"}},
    "something new": {"loads_code": "evil"},
    "a prompt": {"peft_type": "PROMPT_TUNING", "tokenizer_kwargs": {"trust_remote_code": True}},
    "other adapters": {"peft_type": "XLORA", "adapters": {"0": "evil"}},
    "no type": {"peft_type": None},
    "no layer": {"target_modules": ["nothing"]},
    "no number": {"r": "many"},
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_does_no_more_than_adapt(kind, guard, payload, stored_run, monkeypatch):
    (stored_run.parents[2] / "evil.py").write_text(payload)
    monkeypatch.syspath_prepend(stored_run.parents[2])
    file = stored_run / "export" / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**read_json(file), **ADAPTERS[kind]}))
    assert "adapter" in guard.refuses(lambda: load_export(stored_run / "export"))
    assert "evil" not in guard.imported


@pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"{}"])
def test_an_adapter_that_is_damaged_is_refused(content, guard, stored_run):
    (stored_run / "export" / "adapter" / "adapter_model.safetensors").write_bytes(content)
    assert "adapter" in guard.refuses(lambda: load_export(stored_run / "export"))


def test_a_pickled_adapter_is_refused(guard, stored_run):
    folder = stored_run / "export" / "adapter"
    (folder / "adapter_model.safetensors").unlink()
    pickled(guard, folder / "adapter_model.bin")
    assert "no adapter_model.safetensors" in guard.refuses(lambda: load_export(stored_run / "export"))


def test_a_base_that_an_export_names_is_no_address(guard, stored_run, no_server):
    file = stored_run / "export" / "export.json"
    content = read_json(file)
    content["base_llm"]["name"] = f"{no_server}/llm"
    file.write_text(json.dumps(content))
    assert "is a URL" in guard.refuses(lambda: load_export(stored_run / "export"))


@pytest.mark.parametrize(
    "setting", [{"megatron_core": "evil"}, {"eva_config": {}}, {"corda_config": {}}, {"loads": "evil"}]
)
def test_a_config_gives_lora_numbers_and_names_alone(setting, guard, stored_run):
    text = guard.refuses(lambda: load_llm("data/tiny-llm", lora={"r": 2, "target_modules": ["q_proj"], **setting}))
    assert f"model.llm.lora.{next(iter(setting))}" in text
