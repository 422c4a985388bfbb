"""Wrong command lines, generated key by key and kind by kind, end in a refusal; right ones do not.

In this process, as the scripts do it: arguments are read, composed and checked. What is refused so has prepared, loaded
and written nothing; a few are typed into the scripts themselves.
"""

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args

import pytest
from conftest import CONFIGS, ROOT
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from omegaconf.errors import ValidationError
from test_configs import GROUPS

from msenc.config.checks import checked
from msenc.config.messages import refusal
from msenc.config.schema import (
    EvaluateConfig,
    PrepareConfig,
    ReportConfig,
    RespondConfig,
    TrainConfig,
    plain,
    register_schemas,
)
from msenc.config.targets import BUILDABLE
from msenc.config.values import VALUES, _found, check_values
from msenc.files.kinds import MisfitError, check
from msenc.runs.overrides import read_arguments, spelt_out
from msenc.training.assembly import GIVEN
from msenc.types import MsencError
from msenc.work.console import console

NEEDED = {"train": [], "prepare": [], "evaluate": ["run_dir=R"], "respond": ["run_dir=R"], "report": ["sweep_dir=S"]}
LITERAL = ("text", "audio", "video", "history", "speaker", "reply_as", "out", "runs_dir", "run_dir")


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory) -> Iterator[Path]:
    """A current folder and an environment in which nothing is, and in which nothing may appear."""
    place = tmp_path_factory.mktemp("place")
    (place / "a_file").write_text("")
    before = Path.cwd()
    register_schemas()
    with pytest.MonkeyPatch.context() as patch, initialize_config_dir(str(CONFIGS), version_base="1.3"):
        patch.chdir(place)
        for name in ("MSENC_DATA", "MSENC_RUNS", "MSENC_CACHE"):
            patch.delenv(name, raising=False)
        yield place
    assert Path.cwd() == before
    assert [path.name for path in place.rglob("*")] == ["a_file"]


def accept(command: str, *arguments: str) -> dict[str, Any]:
    """What a script does before it begins to work."""
    if command == "train":
        arguments = tuple(spelt_out(arguments))
    given = read_arguments([*NEEDED[command], *arguments], LITERAL if command == "respond" else ())
    cfg = compose(command, given)
    if command != "report":
        return checked(cfg, GIVEN)
    config = plain(cfg)
    check_values(config)
    return config


def refused(command: str, *arguments: str) -> str:
    """What is said of a command line: one line or two, and no exception but those that become one."""
    try:
        accept(command, *arguments)
    except Exception as error:
        said = refusal(error)
        if said is None:
            raise
        assert len(said.splitlines()) <= 2
        assert len(said) < 1000
        assert "Traceback" not in said
        return said
    pytest.fail(f"accepted: {command}.py {' '.join(arguments)}")


# ------------------------------------------------------------------------------- generated from what is configured

WRONG = [None, True, "", "nonsense?", -5, 7, 2**70, 0.5, -0.5, 1.5, float("inf"), float("nan"), [], ["x"], {"a": 1}]
CHOICES = {
    "train": ["model/llm=tiny_lora", "model/connector=qformer", "align=words", "world=beats"],
    "prepare": ["data=folder", "data.generate=null", "model/llm=tiny"],
    "evaluate": ["speech=openai", "decoding=sample"],
    "respond": ["speech=kokoro"],
    "report": [],
}
"""What fills as many keys as can be."""


def typed(value: Any) -> str:
    """A value as one types it."""
    if isinstance(value, list | dict):
        return {0: "[]", 1: "[x]"}[len(value)] if isinstance(value, list) else "{a:1}"
    return {None: "null", True: "true", False: "false"}[value] if value in (None, True, False) else str(value)


def misfits(kind: Any) -> list[Any]:
    def fits(value: Any) -> bool:
        try:
            check(value, kind)
        except MisfitError:
            return False
        return True

    def fits_as_typed(value: Any) -> bool:
        # Where a text is expected, a number that is typed is one; a whole number is one with decimals.
        return fits(typed(value)) or (type(value) is int and fits(float(value)))

    return [v for v in WRONG if not fits(v) and (v is None or isinstance(v, list | dict) or not fits_as_typed(v))]


def generated() -> list[tuple[str, str, Any]]:
    """(command, key, wrong value), two of each key that a command's config holds."""
    rng = random.Random(0)
    lines = []
    for command, choices in CHOICES.items():
        config = plain(compose(command, [*NEEDED[command], *choices]))
        for pattern, kind in VALUES.items():
            if command == "respond" and pattern in LITERAL:  # any text is one
                continue
            for key, _ in _found(config, pattern.split(".")):
                wrong = misfits(kind)
                lines += [(command, key, value) for value in rng.sample(wrong, min(2, len(wrong)))]
    return lines


def test_every_wrong_value_of_every_key_is_refused_and_its_key_named(place):
    lines = generated()
    assert len(lines) > 300
    rng = random.Random(1)
    seen = 0
    failed = []
    for command, key, value in lines:
        if rng.random() > 0.25:
            continue  # of them all: a config is composed for each
        line = f"{key}={typed(value)}"
        try:
            said = refused(command, *CHOICES[command], line)
            assert key.rpartition(".")[2] in said or typed(value) in said
        except BaseException as error:
            failed.append((command, line, repr(error)[:200]))
        seen += 1
    assert failed == [], "\n".join(map(str, failed))
    assert seen > 60


def leaves(schema: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    for field in fields(schema):
        inner = next((t for t in (field.type, *get_args(field.type)) if is_dataclass(t)), None)
        name = f"{path}.{field.name}".lstrip(".")
        if inner is None:
            yield name, field.type
        else:
            yield from leaves(inner, f"{name}.*" if "dict" in str(field.type) else name)


def test_no_key_of_a_schema_is_without_what_it_may_be():
    """A key that is added later is given its range, or is found here."""
    nodes = {*BUILDABLE, "decoding", "data.generate", "callbacks", "logger", "model.llm", "loss.weights"}
    lacking = set()
    for schema in (TrainConfig, PrepareConfig, EvaluateConfig, ReportConfig, RespondConfig):
        for name, kind in leaves(schema):
            is_node = name in nodes or name.replace("streams.*", "streams.audio") in nodes
            known = name in VALUES or f"{name.rpartition('.')[0]}.*" in VALUES
            if not is_node and kind is not bool and not known:
                lacking.add(name)
    assert lacking == set(), sorted(lacking)


SWITCHES = [
    (command, name)
    for command, schema in zip(
        NEEDED, (TrainConfig, PrepareConfig, EvaluateConfig, RespondConfig, ReportConfig), strict=True
    )
    for name, kind in leaves(schema)
    if kind is bool
]


@pytest.mark.parametrize(("command", "name"), SWITCHES)
def test_a_switch_is_true_or_false(command, name):
    for value in (5, 1, 0, -1, 1.0, "yes", "on", "nonsense?", "[]"):
        assert name in (said := refused(command, f"{name}={value}")), said
    for value in (True, False):
        *nodes, key = name.split(".")
        config = accept(command, f"{name}={typed(value)}")
        for node in nodes:
            config = config[node]
        assert config[key] is value


def test_a_switch_in_a_file_is_true_or_false():
    schema = ConfigStore.instance().load("evaluate_schema.yaml").node
    with pytest.raises(ValidationError) as raised:
        OmegaConf.merge(schema, OmegaConf.create("overwrite: 5"))
    assert "overwrite: Value '5' of type 'int' is neither true nor false" in refusal(raised.value)


# ------------------------------------------------------------------------------- by hand: what tables do not say

BY_HAND = {
    "train": """
        seed=-1 | seed=99999999999999999999 | seed= | seed=1.5 | seed=abc | seed=null | seed=[1] | ~seed
        optimizer.lr=inf | optimizer.lr=nan | optimizer.lr=-1 | optimizer.lr=fast | optimizer.weight_decay=-1
        +optimizer.betas=[2,3] | +optimizer.betas=[0.9] | +optimizer.betas=0.9 | +optimizer.betas=[a,b]
        +optimizer.eps=-1
        +optimizer.capturable=true | +optimizer.amsgrad=3 | optimizer._target_=torch.optim.Adamm | +optimizer.lrr=1
        optimizer.groups.connectors.lr=-1 | +optimizer.groups.connectors.betas=[2,3] | optimizer.groups.nothing.lr=1
        optimizer=null | optimizer=sgdd | optimizer=3 | scheduler.warmup=1.5 | scheduler.warmup=nan | scheduler=cosine
        callbacks=null | trainer=null | trainer=tpuu | trainer.max_epochs=-2 | trainer.max_epochs=0
        trainer.max_epochs=1.5
        trainer.max_epochs=-1 | trainer.accumulate_grad_batches=0 | trainer.gradient_clip_val=-1 | trainer.devices=0
        trainer.devices=-3 | trainer.devices=many | trainer.devices=[] | trainer.accelerator=abacus
        trainer.precision=8
        trainer.precision=33-true | +trainer.strategy=hope | +trainer.val_check_interval=0 | trainer.log_every_n_steps=0
        +trainer.val_check_interval=2.5 | +trainer.limit_train_batches=0 | +trainer.limit_val_batches=-1
        +trainer.max_time=soon | +trainer.profiler=me | +trainer.num_sanity_val_steps=-2 | +trainer.fast_dev_run=-1
        +trainer.gradient_clip_algorithm=hard | +trainer.deterministic=maybe | +trainer.callbacks=[]
        +trainer.logger=true
        +trainer.limit_train_batches=1.5 | +trainer.overfit_batches=-1 | trainer.check_val_every_n_epoch=0
        data.name= | data.dir= | data.name=a/b | data.name=.. | data.dir=a_file | data.dir=a_file/x | data.batch_size=0
        data.batch_size=-1 | data.max_tokens_per_batch=0 | data.max_history_tokens=-5 | data.num_workers=-1
        data.num_workers=100000 | data.verify=perhaps | data.filter=3 | data.filter=[3] | data.generate.sizes={train:0}
        data.generate.sizes={trian:5} | data.generate.sizes=5 | data.generate.seed=-1 | data=null | data=mled
        paths.runs_dir=a_file | paths.runs_dir=a_file/x | paths.runs_dir= | paths.data_dir=a_file
        paths.output_dir=a_file | paths.runs_dir=s3://b/runs | paths.output_dir=s3://b/run | paths.cache_dir=s3://b/c
        paths.cache_max_bytes=0 | paths.cache_max_bytes=1.5 | paths.cache_max_bytes=10GB
        paths=null | modality=null | modality= | streams=null | model/llm=null | model/connector=null | hydra=null
        model.connector.num_queries=0 | model.connector.kernel=4 | model.connector.pooling=max
        model.connector.hidden_dim=-1 | model.llm.dropout=1 | model.llm.dropout=-0.1 | model.llm.dtype=float8
        model.llm.freeze=maybe | model.llm.name_or_path= | model.layout=tree
        model.streams.audio.dim=0 | model.streams.audio.encoder.hop_s=0 | model.streams.audio.encoder.n_fft=0
        model.streams.video.encoder.fps=0 | model.streams.video.encoder.fps=inf
        callbacks.checkpoints.mode=up | callbacks.checkpoints.every_minutes=-1 | callbacks.streams.targets=0
        callbacks.average.eta=-1 | callbacks.progress.refresh_rate=-1 | +callbacks.stop._target_=os.system
        +callbacks.stop={_target_:lightning.pytorch.callbacks.EarlyStopping} | +callbacks.stop={patience:3}
        +callbacks.stop={_target_:lightning.pytorch.callbacks.EarlyStopping,monitor:val/loss,mode:up}
        logger.csv.name=[a] | +logger.csv.flush_logs_every_n_steps=0 | logger.tensorboard=3 | logger=wand
        loss.weights.text=-1 | loss.weights.text=nan | loss.weights.smell=1 | loss.weights=3
        decoding.num_beams=0 | +decoding.num_beams=0 | decoding.max_new_tokens=0 | decoding.batch_size=0
        decoding.do_sample=maybe | +decoding.temperature=0 | +decoding.top_p=2 | +decoding.length_penalty=nan
        evaluate=tset | control=[3] | stage=3.5.6/x= | prepare_workers=-1 | prompt.target=sound | prompt.chat=true
        +prompt.windows={audio:x} | prompt.turn=3 | prompt.turn= | sed=2 | data.batchsize=2 | trainr.devices=1
        data.labels=[a | data.labels={a | data.labels=[a,, | seed=1, | seed=1,2 | seed=range(1 | seed=range(1,3)
        seed=${nothing} | seed=${oc.env:NOT_SET_ANYWHERE} | seed=${nope:1} | data.name=${data.name} | seed=${
        modality | =3 | --foo | -x | --cfg=everything | ~nothing | +seed.x=1 | seed.x=1 | plugins=[not_there]
        plugins=3
        align.steps=0 align=words | align=words align.template=words | align=words align.objective=hope
        align=words align.labels.audio.source=smell | align=words align.temperature=0
        model/llm=tiny_lora model.llm.lora.r=0
        model/llm=tiny_lora model.llm.lora.lora_dropout=1 | model/llm=tiny_lora model.llm.lora.bias=some
        model/llm=tiny_lora model.llm.lora.r=eight | model/llm=tiny_lora model.llm.lora.target_modules=3
        model/connector=qformer model.connector.num_heads=3 | modality=text model/audio=logmel | experiment=papr
        world=moon
    """,
    "prepare": """
        stage=3= | describe=perhaps | prepare_workers=-1 | data.voice.levels=4 | data.voice.genders={Ana:cat}
        data.voice.edges={pitch:3} | data.audio_track=0 | data.labels=Emotion | data.table= data=folder
        data=folder data.recordings.split.rule=fair | data=folder data.recordings.split.fractions={train:2}
        data=folder data.recordings.segment.min_pause_s=-1 | data=folder data.recordings.recogniser.device=quantum
        data=folder data.recordings.segment.speech_threshold=2 | data.dir=a_file | describe=3
    """,
    "evaluate": """
        run_dir= | run_dir=[] | run_dir=[3,4] | split=tset | checkpoint= | limit=0 | limit=-1 | limit=some | device=gpu9
        device= | control_draws=0 | metrics=bleu | metrics=[3 | metrics.tokenizer=zh
        metrics.99=bleu | +metrics.x=zh | metric_settings=[a] | generate=maybe | speech_workers=-1 | speech=opera
        decoding=null | decoding.num_beams=0 | +decoding.top_p=7 | decoding.batch_size=0 | on_data=a_file
        speech=kokoro speech.num_threads=0 | speech=openai speech.timeout_s=0 | speech=openai speech.max_retries=-1
        metric_settings=3 | speech=openai speech.voices=[a]
    """,
    "respond": """
        port=-1 | port=0 | port=65536 | port=http | num_replies=0 | seed=-1 | max_clip_s=0 | max_clip_s=nan | out=a_file
        out=a_file/x | max_upload_mb=0 | device=abacus | speech=opera | page=perhaps | host=
        decoding.max_new_tokens=-1
        runs_dir=a_file | runs_dir=s3://b/r | out=s3://b/o | checkpoint= | recogniser= | speech=espeak speech.language=
    """,
    "report": """
        sweep_dir= | sweep_dir=[3] | split=tset | split= | settings= | sweepdir=x | sweep_dir={a:1} | layout=tex
        decimals=7 | decimals={nll:-1} | names=3 | names={nll:''} | margins={nll:0} | margins.nll=small
        spread=se | metrics=nll
        percent=3 | noise_floor= | title=
    """,
}


def test_what_cannot_be_meant_is_refused(place):
    number = 0
    accepted = []
    for command, lines in BY_HAND.items():
        for line in lines.replace("\n", "|").split("|"):
            if arguments := line.split():
                number += 1
                try:
                    refused(command, *arguments)
                except BaseException as error:
                    accepted.append((f"{command}.py {line.strip()}", repr(error)[:150]))
    assert accepted == [], "\n".join(map(str, accepted))
    assert number > 200


@pytest.mark.parametrize("command", NEEDED)
def test_every_group_refuses_what_is_no_choice_of_it(command):
    for group in sorted(group for group, commands in GROUPS.items() if command in commands):
        for value in ("nonsense", "3", "{a:1}", ""):
            assert group in refused(command, f"{group}={value}")


def test_it_is_said_how_a_text_is_typed():
    said = refused("train", "data.name=Gespräche, zwei")
    assert said.endswith("""a text is typed as "data.name='Gespräche, zwei'\"""")
    assert accept("train", "data.name='Gespräche, zwei'")["data"]["name"] == "Gespräche, zwei"
    said = refused("train", "data.labels=Emotion,Sentiment")
    assert "data.labels=[Emotion,Sentiment]" in said


# ------------------------------------------------------------------------------- right ones

RIGHT = {
    "train": """
        scheduler=null | scheduler=none | logger=null | align=null | world=null | experiment=null
        seed=0 | seed=4294967295 | optimizer.lr=0 | optimizer.lr=1 | +optimizer.betas=[0.8,0.9]
        +optimizer.amsgrad=true
        optimizer.groups.connectors=null | optimizer.groups.llm.weight_decay=0 | scheduler.warmup=0 | scheduler.warmup=1
        trainer.max_epochs=-1 trainer.max_steps=5 | +trainer.max_time=00:01:00:00 | +trainer.val_check_interval=0.25
        +trainer.limit_train_batches=0.5 | +trainer.limit_val_batches=0 | +trainer.fast_dev_run=3 | trainer=ddp
        trainer.precision=bf16-mixed | trainer.precision=32 | trainer.gradient_clip_val=null
        +trainer.deterministic=warn
        ~callbacks.progress | callbacks.average=null | callbacks.checkpoints.monitor=null | +trainer.strategy=ddp
        data.max_history_tokens=0 | data.batch_size=null data.max_tokens_per_batch=900 | data.filter=no_silent
        data.filter=[no_silent,no_short] | data.dir=s3://bucket/folder | data.dir=somewhere/else | data.name=Gespr
        decoding=sample | +decoding.num_beams=4 | decoding=sample decoding.top_k=0 | evaluate=null | control=shuffle
        model/connector=qformer model.connector.num_heads=8 | model/llm=tiny_lora model.llm.lora.r=1
        plan=true trainer=gpu
        model/llm=tiny_lora model.llm.lora.target_modules=[q_proj] | loss.weights.reply=0.5 | align=words align.steps=1
        +callbacks.stop={_target_:lightning.pytorch.callbacks.EarlyStopping,monitor:val/loss} | prompt=upstream
        optimizer=adam optimizer._target_=torch.optim.SGD | data.dir=${paths.data_dir}/other
        prompt.instruction=''
        data.batch_size=${trainer.max_epochs} | +trainer.profiler=simple | hydra.verbose=true
    """,
    "prepare": "describe=measure | describe=null | part=1/3 | prepare_workers=0 | data=folder | stage=audit",
    "evaluate": """
        run_dir=[A,B] | limit=1 | limit=null | control=[shuffle_text] | metrics=[] | device=cuda:0 | speech=null
        decoding=sample | generate=false | on_data=http://localhost/data
    """,
    "respond": "port=65535 | text=[red],=~'? | speech=null | max_clip_s=0.5 | out=new/folder | page=true",
    "report": """
        sweep_dir=[A,B] | split=val | settings=null | decimals=1 | decimals={nll:2} | layout=csv | margins.nll=0.1
        names={planted/audio/recovered:voice} | names={text_audio:'T+A'} | spread=sd | title=Modalities
    """,
}


def test_what_is_right_is_taken():
    number = 0
    for command, lines in RIGHT.items():
        for line in lines.replace("\n", "|").split("|"):
            if arguments := line.split():
                accept(command, *arguments)
                number += 1
    assert number > 60


ODD = (
    "a=b",
    "a, b",
    "it's",
    "~tilde",
    "Gespräche",
    "对话",
    "a b",
    "[red]x[/]",
    "{a}",
    "a(1)",
    'a"q',
    "1e5",
    "007",
    "true",
)


@pytest.mark.parametrize("name", ODD)
def test_a_path_is_what_is_typed(name):
    assert accept("train", f"data.dir=x/{name}")["data"]["dir"] == f"x/{name}"
    assert accept("train", f"data.root={name}")["data"]["root"] == name
    assert accept("prepare", f"paths.data_dir={name}")["paths"]["data_dir"] == name
    assert accept("evaluate", f"run_dir={name}")["run_dir"] == name
    assert accept("respond", f"run_dir={name}", f"out={name}")["out"] == name
    assert accept("report", f"sweep_dir={name}")["sweep_dir"] == name


def test_a_path_that_begins_with_the_home_folder():
    assert accept("prepare", "data.root=~/x, y")["data"]["root"] == str(Path.home() / "x, y")


PASSWORDS = [
    ("train", "data.dir=s3://key:hush/h+h@bucket/x"),
    ("train", "paths.data_dir=https://user:hush@host/x"),
    ("train", "urls=['https://host/x?X-Amz-Signature=hush']"),
    ("prepare", "data.dir=s3://key:hush@bucket/x"),
    ("evaluate", "on_data=ftp://user:hush@host/x"),
    ("evaluate", "data_dir=s3://key:hush@bucket/x"),
    ("report", "sweep_dir=s3://key:hush@bucket/x"),
]


@pytest.mark.parametrize(("command", "argument"), PASSWORDS)
def test_a_password_in_a_url_is_neither_taken_nor_shown(place, command, argument):
    said = refused(command, argument)
    assert argument.partition("=")[0] in said
    assert "AWS_SECRET_ACCESS_KEY" in said
    assert "hush" not in said


def test_names_are_printed_as_they_are():
    from rich.table import Table

    with console.capture() as captured:
        console.print("data [red]x[/] :cat: [/]")
        table = Table(title="[bold]title[/]")
        table.add_column("[link]")
        table.add_row("[/nothing] :cat:")
        console.print(table)
    for text in ("data [red]x[/] :cat: [/]", "[bold]title[/]", "[link]", "[/nothing] :cat:"):
        assert text in captured.get()


# ------------------------------------------------------------------------------- as typed into the scripts

SCRIPTS = [
    ("train.py", "seed=-1", "seed: found -1"),
    ("train.py", "-m trainer=ddp seed=1,2", "trainer.devices=2"),
    ("train.py", "-m seed=1,-1", "job 1 of the sweep"),
    ("train.py", "paths.runs_dir=a_file/x", "paths.runs_dir"),
    (
        "train.py",
        "-m seed=1,2 paths.runs_dir=s3://b/runs",
        "paths.runs_dir=s3://b/runs: a URL, expected a local folder",
    ),
    ("train.py", "-m seed=1,2 data.dir=s3://key:hush@b/x", "data.dir: found a URL with a password or key in it"),
    ("prepare.py", "data.dir=a_file", "data.dir"),
    ("evaluate.py", "run_dir=no,where", "no,where"),
    ("respond.py", "run_dir=R text=hi port=70000", "port"),
    ("report.py", "sweep_dir=a=b", "a=b"),
]


@pytest.mark.parametrize(("script", "line", "said"), SCRIPTS)
def test_a_script_says_it_in_a_line_and_writes_nothing(script, line, said, place):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *line.split()],
        capture_output=True,
        text=True,
        check=False,
        cwd=place,
        env=environment,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_bug_keeps_its_traceback():
    assert refusal(ZeroDivisionError("in msenc")) is None
    assert refusal(FileNotFoundError(2, "No such file", "x")) is None
    assert refusal(MsencError("said")) == "error: said"
    assert "/x" in (refusal(PermissionError(13, "Permission denied", "/x")) or "")


@pytest.mark.parametrize("command", NEEDED)
def test_help_waits_for_no_heavy_library(command):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(ROOT / f"{command}.py"), "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "hydra" in imported
    assert imported.isdisjoint({"torch", "lightning", "transformers"})
