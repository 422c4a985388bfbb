"""prepare.py: raw data -> shards, or an audit."""

import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.table import Table

from msenc.config.build import build
from msenc.config.checks import checked
from msenc.data.datamodule import DialogueDataModule
from msenc.models.layers import num_outputs, without_absent
from msenc.pipelines.prepare_status import say_stopped, show_status
from msenc.prepare.dataset import folder_lock, prepare_dataset, prepare_part
from msenc.prepare.describe import read_bins
from msenc.prepare.features import StreamRecipe
from msenc.raw.annotations import Annotations, read_meld, read_table
from msenc.raw.audit import audit_dataset
from msenc.raw.layouts.layout import read_layout
from msenc.raw.recordings import REJECTED, STAGES, UTTERANCES, Recipe, Transcript, transcribe_recordings
from msenc.speech.attributes import UNITS, NoVoiceError, VoiceSettings
from msenc.store.flags import Audit
from msenc.store.labels import VOICE_TURNS, read_labels
from msenc.store.location import Place, is_url, local_folder
from msenc.store.manifest import MANIFEST, DatasetManifest
from msenc.training.assembly import GIVEN
from msenc.types import SPLITS, MsencError
from msenc.work.console import console, quieten, shown
from msenc.work.items import Part
from msenc.work.pool import beside
from msenc.work.threads import one_thread

MEASURE = "measure"
"""``describe=measure``: measure voices, as labels for alignment; turns and their descriptions stay unchanged."""

PREPARE_KEYS = (
    "world",
    "data",
    "align",
    "streams",
    "modality",
    "model/audio",
    "model/video",
    "model.streams",
    "paths.data_dir",
)


def prepare(cfg: DictConfig) -> DatasetManifest | Audit | None:
    """Raw data -> shards; first generates the demo and its LLM if the config asks for them and they are missing.

    With ``stage=audit``: raw data -> an audit. With a stage of recordings: stop after that stage.
    With a part: only that part of the work, then the shards if no other part is missing (else None).
    """
    config = checked(cfg, GIVEN)
    stages = (*STAGES, "audit") if config["data"]["recordings"] else ("audit",)
    if config["stage"] not in (None, *stages):
        raise MsencError(f"stage={config['stage']}: no such stage. Expected {', '.join(stages)}, or null for shards.")
    if config["data"]["table"] is not None and not config["data"]["recordings"]:
        raise MsencError(f"data.table={config['data']['table']}: only data=folder takes a table. Set data=folder, too.")
    if config["status"]:
        return show_status(config, partial(_survey, config))
    if config["stage"] == "audit":
        return _audit(config)
    manifest = _prepare(config)
    if manifest is not None:
        _print_manifest(config, manifest)
    return manifest


def _survey(config: Mapping[str, Any]) -> bool:
    """Go through what `prepare` would do, within `surveying`; returns whether it comes to the streams."""
    data = config["data"]
    root, folder = local_folder(data["root"], "data.root"), local_folder(data["dir"], "data.dir")
    annotations = _annotations(config, root, folder, Part(1, 1))
    if annotations is None:
        return False
    describe = MEASURE if config["describe"] is None and wants_voices(config) else config["describe"]
    voice = _voice_settings(describe, data["voice"], folder)
    prepare_part(annotations, root, folder, _recipes(config), config["prepare_workers"], voice, Part(1, 1))
    return True


def _audit(config: Mapping[str, Any]) -> Audit:
    data, workers = config["data"], config["prepare_workers"]
    root, folder = local_folder(data["root"], "data.root"), local_folder(data["dir"], "data.dir")
    with folder_lock(folder):
        _generate(data, root, workers)
        annotations = _annotations(config, root, folder, None)
        audit = audit_dataset(data["name"], annotations, root, folder, workers)
    targets = Counter[str]()
    for dialogue in annotations.dialogues:
        targets[dialogue.split] += dialogue.num_samples
    table = Table(title=f"{data['name']}, audited")
    for column in ("found", *audit.columns):
        table.add_column(column, justify="left" if column == "found" else "right")
    sections = {
        "not usable": audit.rejected_by_split(),
        "flagged": audit.flagged_by_split(),
        "facts": {
            fact: {split: values.get(fact) for split, values in audit.facts.items()}
            for fact in dict.fromkeys(fact for values in audit.facts.values() for fact in values)
        },
    }
    for title, rows in sections.items():
        table.add_section()
        table.add_row(title + ("" if rows else ": nothing"), style="bold")
        for name, counts in rows.items():
            found = [counts.get(split, 0) for split in audit.columns]
            table.add_row(f"  {name}", *("" if n is None else n if isinstance(n, str) else f"{n:,}" for n in found))
    console.print(table)
    _warn_of_splits(targets)
    written = ", ".join(str(shown(folder / "audit" / f)) for f in ("rejected.csv", "audit.csv", "audit.html"))
    console.print(f"Nothing was removed; data.filter=no_<flag> excludes flagged items. Written: {written}")
    return audit


def _prepare(config: Mapping[str, Any], wait: bool = False) -> DatasetManifest | None:
    describe = config.get("describe")
    if describe is None and wants_voices(config):
        describe = MEASURE
    data, workers = config["data"], config["prepare_workers"]
    root, folder = local_folder(data["root"], "data.root"), local_folder(data["dir"], "data.dir")
    streams = _recipes(config)
    part = Part.parse(config["part"]) if config.get("part") else None
    if part is not None:
        with folder_lock(folder, wait=True, part=part):
            _generate(data, root, workers)
            annotations = _annotations(config, root, folder, part)
            remaining = []
            if annotations is not None:
                voice = _voice_settings(describe, data["voice"], folder)
                remaining = prepare_part(annotations, root, folder, streams, workers, voice, part)
        if annotations is None:
            return None
        console.print(f"Part {part} is done.", *remaining, sep="\n")
        say_stopped(folder, part, remaining)
        if remaining:
            console.print("The job that completes the last one writes the shards; so does prepare.py without a part.")
            return None
    with folder_lock(folder, wait=wait or part is not None), _pretraining_beside(config) as left:
        _generate(data, root, left())
        annotations = _annotations(config, root, folder, None)
        if annotations is None:
            return None
        voice = _voice_settings(describe, data["voice"], folder)
        try:
            manifest = prepare_dataset(data["name"], annotations, root, folder, streams, left(), voice)
        except NoVoiceError:
            if config.get("describe") is not None:
                raise
            console.print(
                "No clip has a measurable voice, so there are no labels for alignment: train with align=none."
            )
            manifest = prepare_dataset(data["name"], annotations, root, folder, streams, left(), None)
    if data["generate"] is not None and (recipe := _llm_recipe(config)):
        _pretrain(recipe)
    return manifest


def _recipes(config: Mapping[str, Any]) -> list[StreamRecipe]:
    return [
        StreamRecipe(
            kind=kind,
            name=stream["name"],
            dim=stream["dim"] * num_outputs(stream["encoder"]),
            make_encoder=build({**encoder, "_partial_": True}, f"model.streams.{kind}.encoder"),
            settings={key: value for key, value in encoder.items() if key != "device"},  # as on any other
        )
        for kind, stream in config["model"]["streams"].items()
        for encoder in [without_absent(stream["encoder"])]
    ]


def _generate(data: Mapping[str, Any], root: Path, workers: int) -> None:
    if data["generate"] is not None:
        build(data["generate"], "data.generate", root=root, num_workers=workers)


def _annotations(config: Mapping[str, Any], root: Path, folder: Path, part: Part | None) -> Annotations | None:
    """The annotations, with a val that is drawn where `data.val` is a share; see `_read_annotations`."""
    annotations, val = _read_annotations(config, root, folder, part), config["data"]["val"]
    return annotations.with_val(val) if annotations is not None and isinstance(val, float) else annotations


def _read_annotations(config: Mapping[str, Any], root: Path, folder: Path, part: Part | None) -> Annotations | None:
    """As they stand there; recordings without a table are transcribed first. None if that is incomplete, or was all."""
    data, stage = config["data"], config.get("stage")
    labels, track = data["labels"], data["audio_track"]
    if data["layout"] is not None:
        layout = build(data["layout"], "data.layout")
        read = read_layout(layout, root, data["name"], labels, data["encoding"])
        return read.stored_in(root).with_track(track)
    if data["recordings"] is None:
        return read_meld(root, data["name"], labels, data["encoding"]).stored_in(root).with_track(track)
    recordings = data["recordings"]
    if config.get("recogniser") is not None:
        recordings = {**recordings, "recogniser": {**recordings["recogniser"], "name_or_path": config["recogniser"]}}
    split = recordings["split"]
    table = local_folder(data["table"], "data.table") if data["table"] else root / UTTERANCES
    if data["table"] or (stage in (None, "audit") and table.is_file()):
        return read_table(table, data["name"], split, labels, data["encoding"]).stored_in(root).with_track(track)

    def make_part(name: str) -> Callable[[], Any]:
        return build({**recordings[name], "_partial_": True}, f"data.recordings.{name}")

    recipe = Recipe(
        segment=build(recordings["segment"], "data.recordings.segment"),
        make_recogniser=make_part("recogniser"),
        make_encoder=make_part("speaker_encoder"),
        settings={
            key: recordings[key] | ({"device": "cpu"} if "device" in recordings[key] else {})  # as on any other
            for key in ("recogniser", "speaker_encoder")
        },
        split=split,
        track=track,
        per_channel=data["recordings"]["channels"] == "speakers",
    )
    last = stage if stage in STAGES else None
    made = transcribe_recordings(data["name"], root, folder, recipe, config["prepare_workers"], last, part)
    if not isinstance(made, Transcript):
        if not config.get("status"):
            console.print(*(made or [f"Done up to the stage {stage}; to continue, omit stage=."]), sep="\n")
        return None
    _print_transcript(made)
    if stage in STAGES:
        return None
    annotations = read_table(made.file, data["name"], split).with_track(track)
    return replace(annotations, rejections=[*made.rejections, *annotations.rejections])


def _print_transcript(made: Transcript) -> None:
    for note in made.notes:
        console.print(note, soft_wrap=True)
    console.print(
        f"{made.num_utterances:,} utterances in {made.num_dialogues:,} dialogues; {made.num_unknown:,} have an unknown "
        "speaker.",
        soft_wrap=True,
    )
    console.print(
        f"Written: {shown(made.file)}, {shown(made.file.with_name(REJECTED))}. To correct words, speakers, times or "
        "splits, put a copy of the first file next to the recordings (data.root), where it will be read.",
        soft_wrap=True,
    )


def _voice_settings(describe: bool | str | None, wanted: Mapping[str, Any], folder: Path) -> VoiceSettings | None:
    """How to describe voices; by default as in the previous call, so that no later call loses descriptions."""
    if describe not in (None, True, False, MEASURE):
        raise MsencError(
            f"describe={describe}: expected true, false, {MEASURE} (measure voices without describing them), or null."
        )
    before = None
    if describe in (None, MEASURE):
        with suppress(MsencError):
            before = DatasetManifest.read(folder).settings.get("voice")
    only_measure = describe == MEASURE if before is None else before.get("only_measure", False)
    if describe is None:
        if before is None:
            return None
        # as it was before there was a choice
        before = {"loudness": "absolute", "writer": None, **before, "writer_url": wanted["writer_url"]}
        return VoiceSettings(**{k: before[k] for k in wanted}, only_measure=only_measure)
    return VoiceSettings(**wanted, only_measure=only_measure) if describe else None


@contextmanager
def _pretraining_beside(config: Mapping[str, Any]) -> Iterator[Callable[[], int]]:
    """Pre-train a missing LLM in one of the `prepare_workers` processes; yields the number of workers left."""
    recipe, workers = _llm_recipe(config), config["prepare_workers"]
    if recipe is None or config["data"]["generate"] is None or workers < 2 or _llm_folder(recipe).is_dir():
        yield lambda: workers
        return
    with beside(partial(_pretrain, recipe), "tiny LLM") as job:
        yield lambda: workers - job.is_running


def _llm_recipe(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """How the config's LLM is created; None if it has to exist."""
    recipe = config["model"]["llm_recipe"]
    return recipe if recipe and recipe["folder"] == config["model"]["llm"]["name_or_path"] else None


def _llm_folder(recipe: Mapping[str, Any]) -> Path:
    return local_folder(recipe["folder"], "model.llm_recipe.folder")


def _pretrain(recipe: Mapping[str, Any]) -> None:
    """On one thread, however many cores: what it learns depends on rounding, and two threads are not worth it here."""
    quieten()
    folder = _llm_folder(recipe)
    # It is written atomically, so if it exists there is nothing to wait for; and read-only data take no lock.
    with nullcontext() if folder.is_dir() else folder_lock(folder, wait=True), one_thread():
        build(recipe, "model.llm_recipe")


def ensure_llm(config: Mapping[str, Any]) -> None:
    """Pre-train the LLM if the config says how; any other LLM has to exist.

    If the demo is missing as well, it is prepared in parallel.
    """
    recipe, data = _llm_recipe(config), config["data"]
    if recipe is None:
        return
    is_missing = not is_url(data["dir"]) and not (Path(data["dir"]) / MANIFEST).is_file()
    if data["generate"] is not None and is_missing and not _llm_folder(recipe).is_dir():
        _prepare_generated(config)
    else:
        _pretrain(recipe)


def ensure_prepared(config: Mapping[str, Any], datamodule: DialogueDataModule) -> None:
    """Prepare data that msenc generates itself; other data must exist."""
    try:
        datamodule.setup()
    except MsencError:
        if config["data"]["generate"] is None or is_url(config["data"]["dir"]):
            raise
        _prepare_generated(config)
        datamodule.setup()
        return
    if config["data"]["generate"] is not None and wants_voices(config) and lacks_voices(datamodule.folder):
        console.print(f"Measuring voices for alignment (prepare.py data={config['data']['name']} describe=measure).")
        _prepare(config, wait=True)
        datamodule.setup()


def _prepare_generated(config: Mapping[str, Any]) -> None:
    console.print(f"The data {config['data']['name']} is not prepared yet: preparing it first, as prepare.py does.")
    _prepare(config, wait=True)


def wants_voices(config: Mapping[str, Any]) -> bool:
    """Whether a stream of the run is aligned to measured voices."""
    labels = (config.get("align") or {}).get("labels", {})
    return any(labels.get(stream, {}).get("source") == "description" for stream in config["model"]["streams"])


def lacks_voices(folder: Place) -> bool:
    """Whether the voices of prepared data at a path have not been measured."""
    return isinstance(folder, Path) and not (folder / VOICE_TURNS).is_file()


def prepare_command(overrides: list[str], choices: Mapping[str, str | None]) -> str:
    """The `prepare.py` command that creates what a `train.py` call with these overrides and choices needs."""
    kept = [o for o in overrides if o.lstrip("+").split("=")[0].split("@")[0].startswith(PREPARE_KEYS)]
    given = {o.split("=")[0] for o in kept}
    # An experiment chooses too; prepare.py's own defaults are omitted.
    world = choices.get("world")
    chosen = [f"{group}={choices[group]}" for group in ("data", "streams") if choices[group] not in ("demo", world)]
    if choices.get("align") not in (None, "none"):
        chosen.append(f"align={choices['align']}")
    chosen = [f"world={world}", *chosen] if world else chosen
    kept = [*(c for c in chosen if c.split("=")[0] not in given), *kept]
    if "modality" not in given:
        kept.append(f"modality={choices['modality']}")
    if choices["data"] not in ("demo", world) and "data.root" not in given:
        kept.append("data.root=FOLDER")
    kept = ["data.dir=FOLDER" if o.startswith("data.dir=") and is_url(o) else o for o in kept]
    return shlex.join(["python", "prepare.py", *kept])


def _print_manifest(config: Mapping[str, Any], manifest: DatasetManifest) -> None:
    table = Table(title=f"{manifest.name}, prepared")
    table.add_column()
    for split in manifest.splits:
        table.add_column(split, justify="right")
    rows = {
        name: [f"{getattr(n, name):,}" for n in manifest.splits.values()]
        for name in ("dialogues", "utterances", "samples")
    }
    rows["hours"] = [f"{n.hours:.2f}" for n in manifest.splits.values()]
    for stream, info in manifest.streams.items():
        if stream == "turns":
            continue  # every utterance has one
        rows[f"with {stream}"] = [f"{info.utterances.get(split, 0):,}" for split in manifest.splits]
    for name, values in rows.items():
        table.add_row(name, *values)
    console.print(table)
    folder = Path(config["data"]["dir"])
    if "voice" in manifest.settings:
        _print_bins(folder)
        if not manifest.settings["voice"].get("only_measure"):
            _print_descriptions(folder)
    if manifest.num_repaired:
        console.print(f"Text with repaired encoding: {manifest.num_repaired:,} rows.")
    _warn_of_splits({split: n.samples for split, n in manifest.splits.items()})
    for reason, count in manifest.rejected.items():
        console.print(f"Not used: {count:,} x {reason}")
    files = f"{shown(folder / 'dataset.json')}, {shown(folder / 'rejected.csv')}"
    console.print(f"Written: {files}, one folder per stream next to them.", soft_wrap=True)


def _warn_of_splits(targets: Mapping[str, int]) -> None:
    """Name splits without targets; data for evaluation only may have just one split."""
    empty = [split for split in SPLITS if not targets.get(split)]
    if len(empty) == len(SPLITS):
        console.print(
            "Without a target (a dialogue of two turns): all splits, so there is nothing to train or evaluate on. "
            "Turns of one conversation need the same dialogue in the table; a recording needs more than one utterance.",
            style="yellow",
            soft_wrap=True,
        )
    elif targets.get("train") and empty:
        console.print(
            f"Without a target (a dialogue of two turns): {', '.join(empty)}. train.py needs train, val unless "
            "data.val=null, and test unless evaluate=null. Set split=... in the table's rows, remove the column, or "
            "draw val from train: data.val=0.1.",
            style="yellow",
            soft_wrap=True,
        )


def _print_descriptions(folder: Path) -> None:
    """Where descriptions come from, and what was not understood of those that were given."""
    turns = read_labels(folder, VOICE_TURNS, "").values()
    sources = Counter(turn["description_source"] or "none" for turn in turns)
    console.print(f"Descriptions: {', '.join(f'{count:,} {source}' for source, count in sources.items())}.")
    if unread := Counter(words for turn in turns for words in turn["not_understood"]):
        common = ", ".join(words for words, _ in unread.most_common(5))
        num_turns = sum(bool(turn["not_understood"]) for turn in turns)
        console.print(f"Not all was understood of {num_turns:,} descriptions: {common}{' ...' * (len(unread) > 5)}")


def _print_bins(folder: Path) -> None:
    table = Table(title="voice attributes: thresholds between words, from the train split")
    for column in ("attribute", "words", "unit", "clips", "10 %", "50 %", "90 %"):
        table.add_column(column, justify="left" if column in ("attribute", "words", "unit") else "right")
    for name, bin in read_bins(folder).items():
        words = bin.words[0] + "".join(f" {e:.4g} {w}" for e, w in zip(bin.edges or (), bin.words[1:], strict=False))
        table.add_row(
            name,
            words if bin.edges else f"unknown: {bin.source}",
            UNITS[name.partition("/")[0]],
            f"{bin.clips:,}",
            *(f"{p:.3g}" for p in bin.percentiles or ()),
        )
    console.print(table)
    console.print(
        f"Written: {shown(folder / 'voice-bins.json')}, {shown(folder / 'voice-turns.jsonl')}", soft_wrap=True
    )
