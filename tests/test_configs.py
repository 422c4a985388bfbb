"""Every file in configs/ composes, binds and, where this machine can, trains one step; refusals name what is valid."""

import re
import shlex
from itertools import chain, product
from pathlib import Path

import pytest
import torch
from conftest import CONFIGS, ROOT, SMALL_DEMO
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from omegaconf import OmegaConf
from tiny_models import save_blip2

from msenc.config.checks import check_targets
from msenc.config.schema import plain
from msenc.config.targets import BUILDABLE, locate_target
from msenc.files import read_json
from msenc.runs.overrides import spelt_out
from msenc.types import MsencError

SCRIPTS = {
    "train": [],
    "prepare": [],
    "evaluate": ["run_dir=RUN"],
    "report": ["sweep_dir=SWEEP"],
    "respond": ["run_dir=RUN"],
}
"""Script -> what its config cannot do without."""

LAYOUTS = ("avamerg", "dailytalk", "hub", "iemocap", "multidialog", "seamless")
"""Data sets that have a layout of their own."""

GROUPS = {
    "align": ["train"],
    "callbacks": ["train"],
    "data": ["train", "prepare"],
    "decoding": ["train", "evaluate", "respond"],
    "experiment": ["train"],
    "hydra": ["train", "prepare", "evaluate", "report", "respond"],
    "hydra/launcher": ["train"],
    "logger": ["train"],
    "modality": ["train", "prepare"],
    "model/audio": ["train", "prepare"],
    "model/connector": ["train", "prepare"],
    "model/llm": ["train", "prepare"],
    "model/video": ["train", "prepare"],
    "objective": ["train"],
    "optimizer": ["train"],
    "paths": ["train", "prepare"],
    "prompt": ["train", "prepare"],
    "scheduler": ["train"],
    "speech": ["evaluate", "respond"],
    "streams": ["train", "prepare"],
    "sweep": ["train"],
    "trainer": ["train"],
    "world": ["train", "prepare"],
}
"""Group -> the scripts whose configs take it."""

QFORMER = {
    "num_queries": 4,
    "num_layers": 2,
    "hidden_dim": 16,
    "num_heads": 2,
    "cross_attention_frequency": 2,
    "intermediate_dim": 64,
    "encoder_dim": 16,
}

AUDIO = "model.streams.audio.dim=16 model.streams.audio.encoder.name_or_path={wavlm} "
VIDEO = "model.streams.video.dim=12 model.streams.video.encoder.name_or_path={clip} "
BLIP2 = "model.connector.init={blip2} " + " ".join(f"model.connector.{k}={v}" for k, v in QFORMER.items())
PAPER = "data=demo trainer=cpu model.llm.name_or_path={mistral} "
"""What makes the paper's parts small."""

WORLD = " ".join([*SMALL_DEMO, "prepare_workers=0"]).replace("{", "{{").replace("}", "}}")
"""What makes a world small; its braces are not the ones that are filled in."""

SMALL = SMALL_DEMO[0].replace("{", "{{").replace("}", "}}")
"""For what prepares the small demo again, to measure its voices."""

TRAINED = {
    "align/column": "align.steps=1",
    "align/contrastive": "align.steps=1",
    "align/none": "",
    "align/transcript": "align.steps=1",
    "align/voice": "align.steps=1 " + SMALL,
    "align/words": "align.steps=1 " + SMALL,
    "callbacks/default": "",
    "data/beats": WORLD,
    "data/demo": "",
    "data/graded": WORLD,
    "data/leaky": WORLD,
    "decoding/greedy": "",
    "decoding/sample": "modality=text",
    "experiment/control_noise_audio": "",
    "experiment/control_noise_video": "",
    "experiment/control_shuffle_text": "",
    "experiment/known_answer": "world=graded " + WORLD,
    "experiment/demo_smollm2": "model.llm.name_or_path={llama} align.steps=1 " + SMALL,
    "experiment/paper_frozen": PAPER + AUDIO + VIDEO + BLIP2,
    "experiment/paper_meld": PAPER + AUDIO + VIDEO + BLIP2,
    "experiment/paper_msenc": PAPER + AUDIO + VIDEO + BLIP2,
    "experiment/paper_text": PAPER,
    "experiment/paper_text_audio": PAPER + AUDIO + BLIP2,
    "experiment/paper_text_video": PAPER + VIDEO + BLIP2,
    "hydra/default": "",
    "logger/default": "",
    "logger/none": "modality=text",
    "modality/text": "",
    "modality/text_audio": "",
    "modality/text_audio_video": "",
    "modality/text_video": "",
    "model/audio/demo": "modality=text_audio",
    "model/audio/logmel": "modality=text_audio",
    "model/audio/paper": "modality=text_audio " + AUDIO,
    "model/audio/wav2vec2": "modality=text_audio model.streams.audio.dim=16 "
    "model.streams.audio.encoder.name_or_path={wav2vec2}",
    "model/audio/wavlm": "modality=text_audio " + AUDIO,
    "model/audio/whisper": "modality=text_audio model.streams.audio.dim=16 "
    "model.streams.audio.encoder.name_or_path={whisper}",
    "model/connector/conv": "",
    "model/connector/conv_spans": "",
    "model/connector/demo": "",
    "model/connector/mlp": "",
    "model/connector/paper": BLIP2,
    "model/connector/qformer": "",
    "model/connector/qformer_blip2": BLIP2,
    "model/llm/mistral_7b": "model.llm.name_or_path={mistral}",
    "model/llm/smollm2": "model.llm.name_or_path={llama}",
    "model/llm/tiny": "",
    "model/llm/tiny_lora": "",
    "model/llm/tiny_world": "data=beats " + WORLD,
    "model/video/clip": "modality=text_video " + VIDEO,
    "model/video/demo": "modality=text_video",
    "model/video/paper": "modality=text_video " + VIDEO,
    "model/video/pixels": "modality=text_video",
    "objective/dpo": "modality=text objective.pairs=wrong",
    "objective/none": "",
    "optimizer/adam": "modality=text scheduler=epoch_decay",
    "optimizer/adamw": "modality=text",
    "paths/default": "modality=text",
    "prompt/chat": "modality=text model/llm=smollm2 model.llm.name_or_path={llama}",
    "prompt/default": "modality=text",
    "prompt/upstream": "",
    "scheduler/epoch_decay": "modality=text",
    "scheduler/none": "modality=text",
    "scheduler/warmup_cosine": "modality=text",
    "streams/demo": "",
    "streams/paper": AUDIO + VIDEO + BLIP2,
    "trainer/cpu": "modality=text",
    "trainer/debug": "",
    "world/beats": WORLD,
    "world/demo": "",
    "world/graded": WORLD,
}
"""File -> what else its training step needs; large models become random ones of the same class."""


def files_of(group: str) -> list[Path]:
    return sorted((CONFIGS / group).glob("*.yaml"))


BINDS_ONLY = {
    "data/meld": "needs MELD's files (tests that have them train on them)",
    "data/folder": "needs recordings (tests/test_own_data.py)",
    **{f"data/{name}": "needs the release (tests/raw/test_data_sets.py)" for name in LAYOUTS},
    "data/msenc": "needs MSenC's videos",
    "data/raw_demo": "needs a recogniser (tests/test_own_data.py)",
    "experiment/zero_shot": "trains nothing (tests/test_evaluate.py has it as a baseline)",
    "hydra/in_place": "for scripts that do not train",
    "hydra/launcher/slurm": "needs Slurm",
    "hydra/launcher/slurm_multi_node": "needs Slurm",
    "logger/mlflow": "needs the extra mlflow (tests/tracking/)",
    "logger/wandb": "needs the extra wandb (tests/tracking/)",
    "speech/espeak": "speaks replies, which evaluate.py writes",
    "speech/openai": "speaks replies, by a server",
    "speech/qwen": "speaks replies, by one or two servers",
    "speech/hibari": "speaks replies, by the package of the extra hibari",
    "speech/kokoro": "speaks replies, by a model that is not in the repository",
    "speech/none": "speaks nothing",
    **{f"sweep/{f.stem}": "its rows are trained one by one" for f in files_of("sweep")},
    "trainer/ddp": "needs two processes",
    "trainer/fsdp2": "needs several processes; tests/training/test_sharding.py trains with it",
    "trainer/gpu": "needs a GPU",
    "trainer/multi_node": "needs GPUs of several nodes",
}


def named(path: Path) -> str:
    return str(path.relative_to(CONFIGS).with_suffix(""))


EVERY_FILE = sorted(map(named, CONFIGS.rglob("*.yaml")))


def compose_with_hydra(script: str, overrides: list[str]):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return hydra_compose(script, [*SCRIPTS[script], *overrides], return_hydra_config=True)


def bind(cfg, tmp_path) -> int:
    """Check the composed config as the scripts do; returns the number of nodes that were bound."""
    from msenc.training.assembly import GIVEN

    callbacks = plain(cfg.hydra.callbacks)
    if "paths" in cfg:
        cfg.paths.output_dir = str(tmp_path)
    del cfg.hydra
    assert {node["_target_"] for node in callbacks.values()} <= {"msenc.pipelines.sweep_callback.Sweep"}
    return check_targets(plain(cfg), GIVEN)


def choose(name: str, script: str) -> list[str]:
    """The override that chooses a group's file, with the modality that brings its part."""
    group, _, choice = name.rpartition("/")
    if group in ("model/audio", "model/video"):
        return [f"modality=text_{Path(group).name}", f"{group}={choice}"]
    return [f"{group}={choice}"]


def contains(whole, part) -> bool:
    if isinstance(part, dict):
        return isinstance(whole, dict) and all(k in whole and contains(whole[k], v) for k, v in part.items())
    return whole == part


def test_every_file_composes_and_binds(home, tmp_path):
    covered, num_bound = set(), 0
    for script, needed in SCRIPTS.items():
        num_bound += bind(compose_with_hydra(script, needed), tmp_path)
        covered.add(script)
    for group, scripts in GROUPS.items():
        for name in map(named, files_of(group)):
            own = OmegaConf.to_container(OmegaConf.load(CONFIGS / f"{name}.yaml"), resolve=False)
            own.pop("defaults", None)
            own.get("hydra", {}).pop("mode", None)  # composing, a test sets it
            package = re.match(r"# @package (\S+)", (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))
            package = package.group(1) if package else group
            for script in scripts:
                cfg = compose_with_hydra(script, choose(name, script))
                if script == "prepare" and group == "hydra":
                    own.pop("sweep", None)  # that command has a folder of its own for -m
                node = cfg if package == "_global_" else OmegaConf.select(cfg, package.replace("/", "."))
                assert contains(OmegaConf.to_container(node, resolve=False), own), f"{name}.yaml has no effect"
                num_bound += bind(cfg, tmp_path)
            covered.add(name)
    assert covered == set(EVERY_FILE)
    assert len(covered) == len(list(CONFIGS.rglob("*.yaml")))
    print(f"{len(covered)} files composed, {num_bound} nodes bound")
    assert num_bound > len(covered)


def test_every_file_is_trained_or_says_why_not():
    in_groups = {name for name in EVERY_FILE if "/" in name}
    assert set(TRAINED) | set(BINDS_ONLY) == in_groups
    assert not set(TRAINED) & set(BINDS_ONLY)
    untrained = [name for name in BINDS_ONLY if name.startswith(("experiment/", "modality/", "model/"))]
    assert untrained == ["experiment/zero_shot"]


@pytest.fixture(scope="module")
def blip2(tmp_path_factory):
    torch.manual_seed(0)
    return save_blip2(tmp_path_factory.mktemp("connector") / "blip2", **QFORMER)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The folder of the demo as the paper's encoders see it; the first test that needs it fills it."""
    return tmp_path_factory.mktemp("prepared") / "demo"


@pytest.mark.parametrize("name", TRAINED)
def test_trains_a_step(name, train, tiny_models, blip2, prepared, tmp_path):
    overrides = TRAINED[name].format(**tiny_models, blip2=blip2).split()
    given = {o.split("=")[0] for o in overrides}
    overrides = [*(o for o in choose(name, "train") if o.split("=")[0] not in given), *overrides]
    if not name.startswith("decoding/"):
        overrides.append("evaluate=null")
    if "encoder.name_or_path" in TRAINED[name]:  # features of its own, which the shared demo does without
        folder = prepared if AUDIO in TRAINED[name] and VIDEO in TRAINED[name] else tmp_path / "prepared"
        small = SMALL_DEMO[:1] if PAPER in TRAINED[name] else SMALL_DEMO  # the paper's LLM has no recipe
        overrides += [*small, "prepare_workers=0", f"data.dir={folder}"]
    # one batch is the epoch, so that one step ends in a validation
    run = train([*overrides, "trainer.max_steps=1", "data.batch_size=16"])
    record = read_json(run.folder / "run.json")
    assert record["status"] == "finished"
    assert record["steps"] == 1
    assert 0 < run.loss < 20
    if name != "trainer/debug":
        assert is_trained(run.folder / "checkpoints" / "last.ckpt")


def rows_of(sweep: str) -> list[list[str]]:
    """The overrides of each row of a sweep, without its seeds."""
    params = dict(OmegaConf.load(CONFIGS / "sweep" / f"{sweep}.yaml").hydra.sweeper.params)
    assert len(params.pop("seed").split(",")) >= 3
    return [
        list(row) for row in product(*([f"{key}={v}" for v in values.split(",")] for key, values in params.items()))
    ]


# A search has ranges instead of rows; tests/test_search.py trains in them.
ROWS = [(f.stem, row) for f in files_of("sweep") if f.stem != "search" for row in rows_of(f.stem)]


@pytest.mark.parametrize(("sweep", "row"), ROWS, ids=[f"{s}: {' '.join(r)}" for s, r in ROWS])
def test_each_row_of_a_sweep_trains_a_step(sweep, row, train, home, tmp_path):
    assert OmegaConf.load(CONFIGS / "sweep" / f"{sweep}.yaml").hydra.mode == "MULTIRUN"
    assert bind(compose_with_hydra("train", [f"sweep={sweep}", *row]), tmp_path) > 0
    if all(o.replace("=", "/") in TRAINED for o in row):
        return  # test_trains_a_step trains what this row chooses
    run = train([*row, "trainer.max_steps=1", "data.batch_size=16", "evaluate=null"])
    assert read_json(run.folder / "run.json")["steps"] == 1
    assert is_trained(run.folder / "checkpoints" / "last.ckpt")


def is_trained(checkpoint: Path) -> bool:
    """Whether the optimizer has moved something: its first moments are not all zero."""
    saved = torch.load(checkpoint, weights_only=True)
    return any(state["exp_avg"].abs().max() > 0 for state in saved["optimizer_states"][0]["state"].values())


@pytest.mark.parametrize(("name", "reason"), BINDS_ONLY.items(), ids=[f"{k}: {v}" for k, v in BINDS_ONLY.items()])
def test_binds_only(name, reason, home, tmp_path):
    script = GROUPS[name.rpartition("/")[0]][0]
    num_bound = bind(compose_with_hydra(script, [*SCRIPTS[script], *choose(name, script)]), tmp_path)
    assert num_bound > 0 or name == "speech/none"


@pytest.mark.parametrize("name", EVERY_FILE)
def test_the_head_of_a_file_tells_its_use(name, home):
    """One sentence, and a command that composes."""
    lines = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    head = next(line for line in lines if not line.startswith(("# @package", "# yaml-language-server:")))
    found = re.fullmatch(r"# (?P<sentence>.+): (?:\w+=\w+ )?python (?P<script>\w+)\.py(?P<rest>.*)", head)
    assert found, f"{name}.yaml begins with {head!r}; expected '# A sentence: python SCRIPT.py ...'"
    assert len(head) <= 120
    overrides = [o for o in shlex.split(re.sub(r"\[[^]]*\]", "", found["rest"])) if o != "-m"]
    compose_with_hydra(found["script"], overrides)


def test_every_target_is_in_the_table():
    targets = [
        (name, target)
        for name in EVERY_FILE
        for target in re.findall(r"_target_: *(\S+)", (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))
    ]
    assert len(targets) > 10
    table = {"msenc.pipelines.sweep_callback.Sweep", *chain(*BUILDABLE.values())}
    assert [t for t in targets if t[1] not in table] == []


def test_everything_in_the_table_is_there():
    """By the name that it has; what an extra brings is imported when it is called."""
    for place, names in BUILDABLE.items():
        assert all(callable(locate_target(name, place.replace("*", "mine"))) for name in names)


def test_the_papers_sweep_lists_upstreams_ablations(home):
    cfg = compose_with_hydra("train", ["sweep=paper"])
    rows = cfg.hydra.sweeper.params.experiment.split(",")
    assert {f"experiment/{row}" for row in rows} <= set(TRAINED)
    assert OmegaConf.load(CONFIGS / "sweep" / "paper.yaml").hydra.mode == "MULTIRUN"
    composed = [compose_with_hydra("train", ["sweep=paper", f"experiment={row}"]) for row in rows]
    # --modal text, text_audio, text_video; all; --LLM_freeze
    assert [(c.modality, c.model.llm.freeze) for c in composed] == [
        ("text", False),
        ("text_audio", False),
        ("text_video", False),
        ("text_audio_video", False),
        ("text_audio_video", True),
    ]
    on_meld = compose_with_hydra("train", ["sweep=paper", "experiment=paper_text", "data=meld"])
    assert (on_meld.data.name, on_meld.prompt.target) == ("meld", "text_description")
    for c in composed:
        del c.hydra
        c.modality, c.model.llm.freeze = "text", False
        c.model.streams, c.model.connector = {}, None
    assert all(c == composed[0] for c in composed), "rows differ in more than what they compare"


def test_lora_adapts_all_linear_layers_of_a_real_llm_and_upstreams_two_in_the_paper(home):
    targets = {
        command: (compose_with_hydra("train", command.split()).model.llm.lora or {}).get("target_modules")
        for command in (
            "model/llm=smollm2",
            "model/llm=mistral_7b",
            "model/llm=tiny",
            "experiment=demo_smollm2",
            *(f"experiment={f.stem}" for f in files_of("experiment") if f.stem.startswith("paper_")),
        )
    }
    assert len(targets) == 10
    for command, found in targets.items():
        upstreams = ["q_proj", "v_proj"] if "paper" in command else "all-linear"
        assert found == (None if "tiny" in command else upstreams), command


@pytest.mark.parametrize("modality", ["text", "text_audio", "text_video", "text_audio_video"])
def test_an_experiment_of_the_paper_takes_any_modality(modality, home, tmp_path):
    cfg = compose_with_hydra("train", ["experiment=paper_msenc", f"modality={modality}"])
    names = {stream: node.name for stream, node in cfg.model.streams.items()}
    assert names == {s: n for s, n in (("audio", "wavlm_large"), ("video", "clip_vit_b32")) if s in modality}
    assert bind(cfg, tmp_path) > 0


def test_a_world_brings_its_data_and_an_llm_that_has_read_it(home):
    for world in ("beats", "graded"):
        for script, extra in (("train", ["experiment=known_answer"]), ("train", []), ("prepare", [])):
            cfg = compose_with_hydra(script, [*extra, f"world={world}", "paths.data_dir=d", "data.generate.variant=2"])
            assert (cfg.data.name, cfg.data.generate.world, cfg.model.llm_recipe.world) == (world, world, world)
            assert (cfg.data.dir, cfg.data.root) == (f"d/{world}-2-1", f"d/{world}-2-1-raw")
            assert cfg.model.llm.name_or_path == cfg.model.llm_recipe.folder == f"d/tiny-llm-{world}"
    real = compose_with_hydra("train", ["experiment=known_answer", "model/llm=smollm2"])
    assert (real.data.name, real.model.llm_recipe) == ("beats", None)


# Refusals, through the scripts


@pytest.mark.parametrize(
    ("script", "overrides", "message"),
    [
        ("train", "modality=text model/audio=logmel", "modality=text_audio|text_audio_video"),
        ("train", "modality=text model/connector=mlp", "model/connector: the chosen modality has no such part"),
        ("train", "modality=text model.streams.audio.dim=3", "model.streams.audio: no such key. Nothing is there"),
        (
            "train",
            "model.llm.lora.r=16",
            "model.llm.lora.r: no such key. Nothing is there to set: model.llm.lora is null or empty. Choose a config",
        ),
        ("train", "controls=shuffle", "controls: is called control now."),
        ("respond", "asr=FOLDER", "asr: is called recogniser now."),
        ("evaluate", "speech_recogniser=FOLDER", "speech_recogniser: is called recogniser now."),
        ("train", "modality=text_adio", "modality=text_adio: no such choice. Did you mean 'text_audio'?"),
        ("train", "-m modality=text,text_adio", "modality=text_adio: no such choice. Did you mean 'text_audio'?"),
        ("train", "model/lm=tiny", "model/lm: no such group. Did you mean 'model/llm'?"),
        ("train", "model.llm.freze=true", "model.llm.freze: no such key. Did you mean 'freeze'?"),
        ("train", "prompt.chat=true", "msenc.prompt.Prompt takes it. Add it: +prompt.chat="),
        ("train", "sed=2", "sed: no such key. Did you mean 'seed'?"),
        ("train", "data.batch_size=many", "data.batch_size: Value 'many' of type 'str' could not be converted"),
        ("prepare", "data=mled", "data=mled: no such choice. Did you mean 'meld'?"),
        ("evaluate", "run_dr=x", "run_dr: no such key. Did you mean 'run_dir'?"),
        ("evaluate", "", "run_dir: no value. Give it: run_dir="),
        ("report", "sweepdir=x", "sweepdir: no such key. Did you mean 'sweep_dir'?"),
    ],
)
def test_a_wrong_override_is_refused(script, overrides, message, run_script):
    assert_refused(run_script(f"{script}.py", *overrides.split()), message)


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("seeed: 2", "experiment/mine.yaml: seeed: no such key. Did you mean 'seed'?"),
        ("data: {batchsize: 2}", "experiment/mine.yaml: data.batchsize: no such key. Did you mean 'batch_size'?"),
        ("model: {tie_conectors: true}", "model.tie_conectors: no such key. Did you mean 'tie_connectors'?"),
        ("defaults: [override /modality: text_adio]", "modality=text_adio: no such choice. Did you mean 'text_audio'?"),
        ("seed: [1", 'mine.yaml", line'),
        ("model: {llm: {freze: true}}", "load_llm takes no such argument. Did you mean 'freeze'?"),
    ],
)
def test_a_wrong_key_in_a_file_is_refused(yaml, message, run_script, tmp_path):
    write_experiment(tmp_path, yaml)
    assert_refused(run_script("train.py", "--config-dir", str(tmp_path), "experiment=mine"), message)


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("trainer: {max_epocs: 2}", r"trainer\.max_epocs: .* takes no such argument\. Did you mean 'max_epochs'\?"),
        ("optimizer: {learning_rate: 1}", r"optimizer\.learning_rate: torch\.optim\.AdamW takes no such argument"),
        ("callbacks: {besst: {monitor: x}}", r"callbacks\.besst: no _target_ tells what to build"),
        ("decoding: {temprature: 1}", r"decoding\.temprature: no such setting\. Did you mean 'temperature'\?"),
        ("model: {llm: {lora: {alpha: 1}}}", r"model\.llm\.lora\.alpha: no such setting\. Did you mean 'lora_alpha'"),
        ("prompt: {_target_: os.system}", r"prompt\._target_: found 'os\.system', which is none of those"),
        (
            "prompt: {_target_: msenc.prompt.Promt}",
            r"'msenc\.prompt\.Promt', which .* Did you mean 'msenc\.prompt\.Prompt'",
        ),
        ("optimizer: {eps: '???'}", r"optimizer\.eps: no value\. Give it: optimizer\.eps="),
        ("optimizer: {lr: fast}", r"optimizer\.lr: found 'fast', expected a number"),
        (
            "model: {connector: {num_blocks: two}}",
            r"model\.connector\.num_blocks: found 'two', expected a whole number",
        ),
        ("optimizer: {lr: '${learning_rate}'}", "Interpolation key 'learning_rate' not found"),
    ],
)
def test_a_file_is_checked_before_anything_is_built(yaml, message, train, tmp_path):
    write_experiment(tmp_path, yaml)
    with pytest.raises(MsencError, match=message):
        train([f"hydra.searchpath=[file://{tmp_path}]", "experiment=mine"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+seeed=2", "seeed: no such key. Did you mean 'seed'?"),
        ("+data.size=2", r"data\.size: no such key\. Valid: audio_track, batch"),
    ],
)
def test_a_plus_adds_no_key_that_no_schema_has(override, message, train):
    with pytest.raises(MsencError, match=message):
        train([override])


def write_experiment(folder: Path, yaml: str) -> None:
    (folder / "experiment").mkdir()
    (folder / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{yaml}\n", encoding="utf-8")


def assert_refused(process, message):
    assert process.returncode == 1
    assert message in process.stderr
    assert "Traceback" not in process.stderr
    assert str(ROOT) not in process.stderr


@pytest.mark.parametrize(
    ("override", "found"),
    [
        ("model.llm.lora.use_dora=true", {"use_dora": True}),
        ("model.llm.lora.target_modules=[embed_tokens,q_proj]", {"target_modules": ["embed_tokens", "q_proj"]}),
        ("model.llm.lora.rank_pattern={q_proj:4}", {"rank_pattern": {"q_proj": 4}}),
        ("model.llm.lora.r=4", {"r": 4}),
    ],
)
def test_every_key_of_lora_is_set_without_a_plus(compose, override, found):
    config = plain(compose(spelt_out(["model/llm=tiny_lora", override])))
    assert config["model"]["llm"]["lora"] == {"r": 8, "lora_alpha": 32, "lora_dropout": 0.1, **found}
    assert check_targets(config, {"model.connector": {"in_dim", "out_dim"}, "data.generate": {"root", "num_workers"}})


def test_arguments_of_a_chat_template_are_set_without_a_plus(compose):
    given = ["prompt=chat", "prompt.template_arguments.enable_thinking=false", "prompt.template_arguments.n=[1,2]"]
    config = plain(compose(spelt_out(given)))
    assert config["prompt"]["template_arguments"] == {"enable_thinking": False, "n": [1, 2]}
    assert check_targets(config, {"model.connector": {"in_dim", "out_dim"}, "data.generate": {"root", "num_workers"}})


def test_a_key_of_lora_alone_makes_no_adapters(compose):
    config = plain(compose(spelt_out(["model/llm=tiny", "model.llm.lora.use_dora=true"])))
    with pytest.raises(MsencError, match=r"model\.llm\.lora\.use_dora: the chosen LLM has no adapters"):
        check_targets(config, {})


@pytest.mark.parametrize("override", ["model.llm.lora.init_lora_weights=pissa", "model.llm.lora.lora_bias=true"])
def test_what_of_lora_would_not_come_back_is_refused_before_data_are_read(compose, override):
    config = plain(compose(spelt_out(["model/llm=tiny_lora", override])))
    with pytest.raises(MsencError, match=re.escape(override.replace("true", "True"))):
        check_targets(config, {})
