"""Upstream's checkpoint, imported: the same numbers as upstream's model computes, and refusals by name; its options."""

import dataclasses
import json
import os
import pickle
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from tiny_models import save_clip, save_speech_encoder
from torch.nn.functional import cross_entropy

from msenc.config.checks import check_targets
from msenc.config.schema import plain
from msenc.data.collate import collate, dialogue_rows
from msenc.files import read_json
from msenc.pipelines.evaluate import evaluate
from msenc.pipelines.respond import respond
from msenc.prompt import TOKEN_KINDS
from msenc.runs.record import read_run
from msenc.training.assembly import GIVEN, build_datamodule, build_model
from msenc.training.module import ConversationModule
from msenc.training.restore import load_checkpoint
from msenc.types import Dialogue, MsencError, Utterance
from msenc.upstream import import_run, main

SHARED = Path(os.environ.get("MSENC_SHARED", "")) / "data" / "upstream_tiny"
needs_shared = pytest.mark.skipif(not (SHARED / "checkpoint.tar").is_file(), reason="no upstream_tiny in MSENC_SHARED")

MODALITIES = {
    "text": (),
    "text_audio": ("audio",),
    "text_video": ("video",),
    "text_audio_video": ("video", "audio"),
}
"""msenc's modality -> its streams in upstream's order."""

QUERIES = 32
WIDTHS = {"audio": 80, "video": 256}  # of the demo's features
FRAMES = {"audio": (9, 4, 1), "video": (3, 4, 2)}
WINDOWS = {"audio": 4, "video": 5}  # turn 0 falls out of both, and both cut turn 1
SIZES = {"num_layers": 2, "hidden_dim": 24, "num_heads": 12, "intermediate_dim": 16, "encoder_dim": 28}
INSTRUCTION = "###Instruction: Generate a following response of this conversation\n"
RESPONSE = "\n###Generate a response format as [text of response (voice description)], Speaker_{}:"


# ------------------------------------------------------------------------------------------------ checkpoints


@pytest.fixture(scope="module")
def tiny():
    """The folder that upstream's own model was run on: files, dialogue, expected values, overrides for the import."""
    expected = json.loads((SHARED / "expected.json").read_text(encoding="utf-8"))
    names = {"text_audio_video": "audio_video_text"}
    return SimpleNamespace(
        checkpoint=SHARED / "checkpoint.tar",
        llm=SHARED / "llm",
        base=[],
        sizes=["model.connector.num_layers=2", "model.connector.intermediate_dim=64"],
        dialogue=expected,
        expected={modality: expected["expected"][names.get(modality, modality)] for modality in MODALITIES},
    )


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory, demo_home):
    """The same made here, of upstream's parts put together by hand: transformers' LLM and Q-Former, PEFT's LoRA."""
    folder = tmp_path_factory.mktemp("upstream")
    rng = np.random.default_rng(0)
    dialogue = {
        "texts": ["Did you sleep?", "Hardly (as always).", "Why is that?"],
        "speakers": [0, 1, 2, 1],
        "target": "The dog barked. (A man speaks slowly.)",
        **{s: [rng.integers(-3, 4, (t, w)).tolist() for t in FRAMES[s]] for s, w in WIDTHS.items()},
    }
    torch.manual_seed(0)
    parts = upstream_parts(folder / "llm", demo_home / "data" / "tiny-llm")
    with torch.inference_mode():
        expected = {m: upstream_forward(parts, dialogue, streams) for m, streams in MODALITIES.items()}
        windowed = upstream_forward(parts, dialogue, MODALITIES["text_audio_video"], WINDOWS)
    torch.save({"model_state_dict": upstream_state(parts), "optimizer_state_dict": {}}, folder / "checkpoint.tar")
    return SimpleNamespace(
        checkpoint=folder / "checkpoint.tar",
        llm=folder / "llm",
        base=["data=demo", "streams=demo"],
        sizes=["model/connector=paper", *(f"model.connector.{key}={value}" for key, value in SIZES.items())],
        dialogue=dialogue,
        expected=expected,
        windowed=windowed,
    )


def upstream_parts(folder, tokenizer_folder):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer, Blip2QFormerConfig, Blip2QFormerModel, MistralConfig, MistralForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    config = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=4096,
        initializer_range=0.3,
        sliding_window=None,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    llm = MistralForCausalLM(config)
    llm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for parameter in llm.parameters():  # upstream loads its LLM in bfloat16; the folder holds float32
        parameter.data = parameter.data.bfloat16().float()
    lora = get_peft_model(llm, LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=32, lora_dropout=0.1)).eval()
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:  # which begins at zero
            torch.nn.init.normal_(parameter, std=0.3)
    qformer = Blip2QFormerModel(
        Blip2QFormerConfig(
            hidden_size=SIZES["hidden_dim"],
            num_hidden_layers=SIZES["num_layers"],
            num_attention_heads=SIZES["num_heads"],
            intermediate_size=SIZES["intermediate_dim"],
            encoder_hidden_size=SIZES["encoder_dim"],
            cross_attention_frequency=2,
            initializer_range=0.3,
        )
    ).eval()
    return SimpleNamespace(
        tokenizer=tokenizer,
        lora=lora,
        qformer=qformer,
        query=torch.randn(1, QUERIES, SIZES["hidden_dim"]),
        feature_proj={s: torch.randn(SIZES["encoder_dim"], w) for s, w in WIDTHS.items()},
        out_proj={s: 0.3 * torch.randn(16, SIZES["hidden_dim"]) for s in WIDTHS},
    )


def upstream_state(parts):
    llm = parts.lora.base_model.model.state_dict()
    state = {f"{view}.{k}": v for view in ("generator_model", "lora_model.base_model.model") for k, v in llm.items()}
    state |= {f"generator_mode.{k}": v for k, v in llm.items()}
    for stream in WIDTHS:
        state |= {f"{stream}_q_former.qformer.{k}": v for k, v in parts.qformer.state_dict().items()}
        state[f"{stream}_q_former.query"] = parts.query
        state[f"{stream}_q_former.feature_proj.weight"] = parts.feature_proj[stream]
        state[f"{stream}_q_former.out_proj.weight"] = parts.out_proj[stream]
    return state


def upstream_forward(parts, dialogue, streams, windows=None):
    """One sample, piece by piece, as upstream puts it together; nothing of msenc takes part.

    With windows, the frames of all turns stand in one line, each marked with its turn, and the last ones are left.
    """
    marks = {s: [k for k, frames in enumerate(dialogue[s]) for _ in frames] for s in streams}
    left = {s: marks[s][-(windows or {}).get(s, 10**6) :] for s in streams}
    first = max((min(left[s]) for s in streams), default=0)
    table = parts.lora.get_input_embeddings()

    def piece(text):
        return table(torch.tensor([parts.tokenizer(text).input_ids]))

    def queries(stream, turn):
        frames = (
            torch.tensor([dialogue[stream][turn][-left[stream].count(turn) :]], dtype=torch.float32)
            @ parts.feature_proj[stream].T
        )
        return parts.qformer(parts.query, encoder_hidden_states=frames).last_hidden_state @ parts.out_proj[stream].T

    pieces = [piece(INSTRUCTION)]
    for turn in range(first, len(dialogue["texts"])):
        speaker, text = dialogue["speakers"][turn], dialogue["texts"][turn]
        pieces += [piece(f"###Speaker_{speaker}:"), *(queries(s, turn) for s in streams), piece(text)]
    pieces.append(piece(RESPONSE.format(dialogue["speakers"][-1])))
    labels = [*parts.tokenizer(dialogue["target"]).input_ids, parts.tokenizer.eos_token_id]
    logits = parts.lora(inputs_embeds=torch.cat([*pieces, table(torch.tensor([labels]))], 1)).logits[0]
    ce = cross_entropy(logits[-len(labels) - 1 : -1], torch.tensor(labels), reduction="none")
    return {"length": len(logits), "label_ids": labels, "ce": ce.tolist(), "last": logits[-1].tolist()}


# ------------------------------------------------------------------------------------------------ the same numbers


def run_import(source, out, modality="text_audio_video", checkpoint=None, llm=None, overrides=()):
    overrides = [*overrides, "model.llm.dtype=float32", f"modality={modality}", *source.base]
    overrides += source.sizes if MODALITIES[modality] else []
    import_run(checkpoint or source.checkpoint, str(llm or source.llm), out, overrides)


def load(run_dir):
    """What evaluate.py builds from a run's folder: model and data module, without the data."""
    record, cfg = read_run(run_dir)
    cfg.paths.output_dir = str(run_dir)
    config = plain(cfg)
    model = build_model(config)
    load_checkpoint(ConversationModule(model), run_dir, "best")
    return model.eval(), build_datamodule(config, record["prepare_command"])


def dialogue_of(source):
    """Upstream's sample as a dialogue; upstream writes the bracket right behind the text, whose space stays."""
    given = source.dialogue
    text, _, description = given["target"].rpartition("(")
    said = [*((t, None) for t in given["texts"]), (text, description.rstrip(")"))]
    turns = [Utterance(str(i), str(s), *t) for i, (s, t) in enumerate(zip(given["speakers"], said, strict=True))]
    return Dialogue("d", "test", tuple(turns))


def batch_of(source, datamodule, layout):
    streams = list(datamodule.streams)
    present = [{s: len(source.dialogue[s][turn]) for s in streams} for turn in range(len(source.dialogue["texts"]))]
    tokens = datamodule.tokenizer(dialogue_of(source), [*present, {}])
    frames = {s: [*(np.array(f, dtype=np.float16) for f in source.dialogue[s]), None] for s in streams}
    rows = dialogue_rows(tokens, datamodule.max_history_tokens, datamodule.num_queries, layout)
    return collate([tokens], [frames], [rows], datamodule.num_queries, pack=layout == "dialogue"), rows


@pytest.fixture(scope="module", params=["synthetic", pytest.param("tiny", marks=needs_shared)])
def source(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module", params=MODALITIES)
def imported(request, source, home, tmp_path_factory):
    modality = request.param
    out = tmp_path_factory.mktemp("runs") / "run"
    run_import(source, out, modality)
    model, datamodule = load(out)
    return SimpleNamespace(
        modality=modality,
        out=out,
        model=model,
        datamodule=datamodule,
        source=source,
        expected=source.expected[modality],
    )


@pytest.mark.parametrize("layout", ["sample", "dialogue"])
def test_an_imported_run_computes_what_upstream_computes(imported, layout):
    assert_computes(imported.model, imported.datamodule, imported.source, layout, imported.expected)


@pytest.mark.parametrize("layout", ["sample", "dialogue"])
def test_windows_over_the_history_are_upstreams(synthetic, layout, home, tmp_path):
    whole, windowed = synthetic.expected["text_audio_video"], synthetic.windowed
    assert windowed["length"] < whole["length"]
    assert np.abs(np.subtract(windowed["ce"], whole["ce"])).max() > 0.01
    windows = ",".join(f"{stream}:{frames}" for stream, frames in WINDOWS.items())
    run_import(synthetic, tmp_path / "run", overrides=[f"prompt.windows={{{windows}}}"])
    assert_computes(*load(tmp_path / "run"), synthetic, layout, windowed)


def assert_computes(model, datamodule, source, layout, expected):
    """Length and label ids exactly, cross entropy of every label token and final logits to 1e-4."""
    batch, _ = batch_of(source, datamodule, layout)
    _, alone = batch_of(source, datamodule, "sample")
    own = batch.targets == batch.target_ids.index(("d", len(source.dialogue["texts"])))
    assert len(alone[-1].ids) == expected["length"]
    assert batch.labels[own].tolist() == expected["label_ids"]
    # One more position to look at: the last token, after which upstream's final logits come.
    final = batch.predictors[own][-1:] + 1
    probe = dataclasses.replace(
        batch,
        predictors=torch.cat([batch.predictors, final]),
        labels=torch.cat([batch.labels, batch.labels[:1]]),
    )
    seen = []
    hook = model.llm.get_output_embeddings().register_forward_hook(lambda *call: seen.append(call[-1]))
    with torch.inference_mode():
        scores = model(probe)
    hook.remove()
    assert (scores.nll[:-1][own] - torch.tensor(expected["ce"])).abs().max() < 1e-4
    assert (seen[0][0, -1] - torch.tensor(expected["last"])).abs().max() < 1e-4


def test_an_imported_run_holds_what_trained_and_says_where_it_is_from(imported):
    record = read_json(imported.out / "run.json")
    assert (record["status"], record["stop_reason"]) == ("finished", "imported")
    assert record["imported_from"] == "checkpoint.tar"
    assert record["modality"] == imported.modality
    saved = torch.load(imported.out / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(".lora_" in name or name.startswith("model.connectors.") for name in saved)
    if imported.modality == "text_audio_video":  # one Q-Former for both
        assert not any(name.startswith("model.connectors.video.core.") for name in saved)
        connectors = imported.model.connectors
        assert connectors["video"].core is connectors["audio"].core


def test_a_checkpoint_of_a_frozen_llm_is_imported_with_freeze(synthetic, home, tmp_path):
    """Upstream adds no LoRA then, and its file holds the LLM once, under the names of the plain model."""

    def freeze(state):
        for name in [n for n in state if n.startswith(("lora_model.", "generator_mode.")) or ".lora_" in n]:
            del state[name]
        for name in [n for n in state if ".base_layer." in n]:
            state[name.replace(".base_layer.", ".")] = state.pop(name)

    checkpoint = changed(synthetic, tmp_path, freeze)
    run_import(synthetic, tmp_path / "run", checkpoint=checkpoint, overrides=["model.llm.freeze=true"])
    model, _ = load(tmp_path / "run")
    assert model.trainable_parameters()["llm"] == 0
    with pytest.raises(MsencError, match=r"tensors missing there: .*lora_A"):
        run_import(synthetic, tmp_path / "other", checkpoint=checkpoint)


def test_evaluate_takes_an_imported_run(synthetic, compose, tmp_path):
    run_import(synthetic, tmp_path / "imported")
    overrides = ["split=val", "limit=2", "decoding.max_new_tokens=3", "device=cpu"]
    (metrics,) = evaluate(compose([f"run_dir={tmp_path / 'imported'}", *overrides], "evaluate"))
    assert metrics["targets"] > 2
    assert len(metrics["task_hash"]) == 12  # of the data it was measured on
    assert metrics["nll/begin"] > 0
    (folder,) = (tmp_path / "imported" / "evaluation").iterdir()
    assert len((folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()) == metrics["targets"]


def test_an_imported_run_answers_in_words_and_sound(source, compose, demo_home, tmp_path):
    encoders = []
    if source.base == []:  # the paper's encoders, in small; the synthetic checkpoint reads the demo's features
        audio = save_speech_encoder(tmp_path / "wavlm", "WavLM", "layer", dim=1024)
        video = save_clip(tmp_path / "clip", dim=512)
        encoders = [f"model.streams.{s}.encoder.name_or_path={f}" for s, f in (("audio", audio), ("video", video))]
    run_import(source, tmp_path / "imported", overrides=encoders)
    clip = min((demo_home / "data" / "demo-raw").rglob("*.mp4"))
    given = ["text='Hello!'", f"video={clip}", f"audio={clip}"]
    replies = []
    for name, turn in (("all", given), ("words", given[:1])):
        out = tmp_path / name
        overrides = [f"run_dir={tmp_path / 'imported'}", f"out={out}", "decoding.max_new_tokens=8", "device=cpu"]
        respond(compose([*overrides, *turn], "respond"))
        replies.append(read_json(out / "reply.json"))
    assert replies[0]["notices"] == []
    assert len(replies[1]["notices"]) == 2
    assert replies[0]["replies"][0]["text"] != replies[1]["replies"][0]["text"]  # it has heard and seen something


def test_a_missing_data_set_is_named_with_the_command(synthetic, compose, tmp_path):
    run_import(synthetic, tmp_path / "imported")
    overrides = [f"run_dir={tmp_path / 'imported'}", f"data_dir={tmp_path}"]
    with pytest.raises(MsencError, match=r"Run: python prepare\.py modality=text_audio_video data=demo streams=demo"):
        evaluate(compose(overrides, "evaluate"))


def test_the_label_begins_as_a_text_of_its_own(imported):
    batch, _ = batch_of(imported.source, imported.datamodule, "sample")
    first = [int((batch.targets == t).nonzero()[0]) for t in range(len(batch.target_ids))]
    assert {TOKEN_KINDS[batch.kinds[i]] for i in first} == {"begin"}
    assert (batch.kinds == TOKEN_KINDS.index("begin")).sum() == len(first)


# ------------------------------------------------------------------------------------------------ refusals


def changed(source, tmp_path, change):
    """A copy of the checkpoint with another state."""
    saved = torch.load(source.checkpoint, weights_only=True)
    state = dict(saved["model_state_dict"])
    change(state)
    path = tmp_path / "changed.tar"
    torch.save({**saved, "model_state_dict": state}, path)
    return path


LORA = "model.layers.1.self_attn.v_proj.lora_B.default.weight"


def lose_lora(state):
    for view in ("generator_model", "lora_model.base_model.model", "generator_mode"):
        del state[f"{view}.{LORA}"]


def lose_a_view(state):
    del state[f"generator_mode.{LORA}"]


def widen(state):
    for stream in WIDTHS:
        state[f"{stream}_q_former.query"] = torch.zeros(1, QUERIES, 36)


def add(state):
    state["audio_q_former.gate.weight"] = torch.zeros(3)


def part_llm_views(state):
    state[f"generator_mode.{LORA}"] = state[f"generator_mode.{LORA}"] + 1


def part_qformers(state):
    state["audio_q_former.query"] = state["audio_q_former.query"] + 1


def move_base(state):
    for view in ("generator_model", "lora_model.base_model.model", "generator_mode"):
        name = f"{view}.model.norm.weight"
        state[name] = state[name] + 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lose_lora, rf"3 tensors missing there: generator_mode\.{LORA}, generator_model\.{LORA}"),
        (lose_a_view, rf"1 tensors missing there: generator_mode\.{LORA}"),
        (widen, r"of another shape: audio_q_former\.query \(1, 32, 36\) for \(1, 32, 24\), video_q_former\.query"),
        (add, r"1 tensors unknown here: audio_q_former\.gate\.weight"),
        (part_llm_views, rf"1 pairs of tensors differ .*generator_model\.{LORA} and generator_mode\.{LORA}"),
        (part_qformers, r"1 pairs of tensors differ .*video_q_former\.query and audio_q_former\.query"),
        (move_base, r"1 tensors of its base LLM differ .*generator_model\.model\.norm\.weight"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_tensor(change, message, synthetic, tmp_path):
    with pytest.raises(MsencError, match=message):
        run_import(synthetic, tmp_path / "run", checkpoint=changed(synthetic, tmp_path, change))
    assert not (tmp_path / "run").exists()


def test_a_base_llm_of_other_size_is_refused_by_tensor(synthetic, tmp_path):
    from transformers import AutoTokenizer, MistralConfig, MistralForCausalLM

    small = {**MistralConfig.from_pretrained(synthetic.llm).to_dict(), "intermediate_size": 20}
    MistralForCausalLM(MistralConfig(**small)).save_pretrained(tmp_path / "llm")
    AutoTokenizer.from_pretrained(synthetic.llm).save_pretrained(tmp_path / "llm")
    message = r"of another shape: generator_mode\.model\.layers\.0\.mlp\.down_proj\.weight \(16, 32\) for \(16, 20\)"
    with pytest.raises(MsencError, match=message):
        run_import(synthetic, tmp_path / "run", llm=tmp_path / "llm")


class Trap:
    """Leaves a file behind where a loader executes it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("where", ["model_state_dict", "optimizer_state_dict"])
def test_a_pickle_with_anything_but_tensors_is_refused_and_not_executed(where, synthetic, tmp_path):
    trap = tmp_path / "sprung"
    saved = {"model_state_dict": {}, "optimizer_state_dict": {}, where: {"x": Trap(trap)}}
    torch.save(saved, tmp_path / "trap.tar")
    with pytest.raises(MsencError, match=r"it contains posix\.mkdir, which is not a tensor") as caught:
        run_import(synthetic, tmp_path / "run", checkpoint=tmp_path / "trap.tar")
    assert not trap.exists()
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"state_dict": {}}, "found state_dict; expected model_state_dict"),
        ([1], "found list; expected model_state_dict"),
        ({"model_state_dict": {"x": 1}}, "expected model_state_dict, a dictionary of tensors"),
    ],
)
def test_another_file_of_torch_is_refused(saved, message, synthetic, tmp_path):
    torch.save(saved, tmp_path / "other.tar")
    with pytest.raises(MsencError, match=message):
        run_import(synthetic, tmp_path / "run", checkpoint=tmp_path / "other.tar")


def test_a_file_that_is_none_is_refused(synthetic, tmp_path):
    with pytest.raises(MsencError, match=r"absent\.tar: no such file"):
        run_import(synthetic, tmp_path / "run", checkpoint=tmp_path / "absent.tar")
    (tmp_path / "text.tar").write_text("no checkpoint")
    with pytest.raises(MsencError, match=r"text\.tar cannot be read as tensors"):
        run_import(synthetic, tmp_path / "run", checkpoint=tmp_path / "text.tar")
    (tmp_path / "old.tar").write_bytes(pickle.dumps({"model_state_dict": {}}))
    with pytest.raises(MsencError, match=r"old\.tar cannot be read as tensors"):
        run_import(synthetic, tmp_path / "run", checkpoint=tmp_path / "old.tar")


def test_a_folder_that_holds_something_is_left_alone(synthetic, tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(MsencError, match="is not empty"):
        run_import(synthetic, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["note.txt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["checkpoint=C", "out=RUN"], "llm: no value. Give it: llm=..."),
        (
            ["chekpoint=C", "llm=L", "out=RUN"],
            "checkpoint: no value. Give it: checkpoint=... Did you mean 'checkpoint'?",
        ),
    ],
)
def test_a_missing_argument_is_named(arguments, message):
    with pytest.raises(MsencError) as caught:
        main(arguments)
    assert message in str(caught.value)


# ------------------------------------------------------------------------------------------------ command and docs


def test_the_command_imports(synthetic, home, tmp_path, capsys, monkeypatch):
    given = [f"checkpoint={synthetic.checkpoint}", f"llm={synthetic.llm}", f"out={tmp_path / 'run'}"]
    monkeypatch.setattr(sys, "argv", ["upstream.py", *given, "modality=text_adio"])
    # a message, of which Python makes the end of standard error and the exit status 1
    with pytest.raises(SystemExit, match=r"modality=text_adio: no such choice\. Did you mean 'text_audio'\?"):
        runpy.run_path(str(ROOT / "msenc" / "upstream.py"), run_name="__main__")
    main([*given, *synthetic.base, *synthetic.sizes])
    assert f"python evaluate.py run_dir={tmp_path / 'run'}" in capsys.readouterr().out
    assert read_json(tmp_path / "run" / "run.json")["status"] == "finished"


def test_help_needs_no_torch():
    code = "import sys, msenc.upstream as u; u.main(['--help']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "checkpoint=FILE llm=FOLDER out=RUN" in done.stdout


DOCS = (ROOT / "docs" / "upstream.md").read_text(encoding="utf-8")
OPTIONS = [line.split(" | ") for line in DOCS.splitlines() if line.startswith("| `--")]
OVERRIDES = [
    *(span for _, here, *_ in OPTIONS for span in re.findall(r"`([^`]+)`", here)),
    *re.findall(r"^\| `([^`-][^`]*=[^`]*)`", DOCS, flags=re.MULTILINE),
]


def test_every_option_of_upstream_is_in_the_table():
    named = {name for option, *_ in OPTIONS for name in re.findall(r"--(\w+)", option)}
    given = """data_name stage LLM LLM_freeze QFormer QFormer_freeze seed epochs batch_size bs lr dropout decay_rate
        act max_history audio_type audio_pad_size video_pad_size fps max_length target modal wandb_name save metric
        resume"""
    assert named >= set(given.split())
    assert len(OVERRIDES) > 25


def test_the_overrides_of_the_table_compose(compose):
    """As many at once as do not set the same key, since composing takes its time."""
    together = []
    for override in OVERRIDES:
        values = dict(o.replace("FOLDER", "folder").split("=", 1) for o in override.split())
        fits = (b for b in together if not b.keys() & values.keys() and "modality" not in {**b, **values})
        batch = next(fits, None)
        if batch is None:
            together.append(values)
        else:
            batch |= values
    assert 4 < len(together) < 12
    for batch in together:
        cfg = compose(["experiment=paper_msenc", *(f"{key}={value}" for key, value in batch.items())])
        cfg.logger = {}  # wandb is an extra
        check_targets(plain(cfg), GIVEN)
