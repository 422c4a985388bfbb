"""The alignment stage of train.py: labels of the train split -> aligned connectors, shared by runs with equal settings.

An alignment is stored in ``alignments/<stream>-<hash>`` in the runs' folder, keyed by all that it depends on, and is
resumed if it was killed.
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np
import torch
from filelock import FileLock
from rich.table import Table
from torch import Tensor, nn

from msenc.config.build import build_connector
from msenc.config.hints import nearest
from msenc.data.collate import collate, dialogue_rows
from msenc.data.datamodule import DialogueDataModule
from msenc.files import content_hash, digest, read_json, write_json
from msenc.files.kinds import Count
from msenc.models.alignment import (
    AlignmentSettings,
    AlignmentState,
    EmbeddingTargets,
    Known,
    fit,
    make_loss,
    own_random_numbers,
    score,
)
from msenc.models.connector import calibrate
from msenc.models.conversation import ConversationModel
from msenc.models.layers import without_absent
from msenc.models.llm import token_embeddings
from msenc.prompt import TOKEN_KINDS, DialogueTokenizer, Slot, Target, TokenizedDialogue
from msenc.runs.identity import stream_hashes
from msenc.store.labels import LABELS, VOICE_TURNS, columns_of, read_labels
from msenc.training.assembly import num_for_calibration
from msenc.training.checkpoints import read_checkpoint, write_checkpoint
from msenc.types import UNKNOWN, Dialogue, MsencError, VoiceAttributes
from msenc.work.console import console, shown
from msenc.work.progress import Bar

VERSION = 1
"""Version of the algorithm: raised when equal settings give a different alignment."""
SOURCES = ("description", "column", "transcript")
FILE, RECORD, PARTIAL = "connector.ckpt", "alignment.json", "partial.ckpt"
SAVE_EVERY = 50
"""Optimizer steps between two saved states from which a killed alignment resumes."""
SCORED = 512
"""Maximum number of validation utterances on which an alignment is scored."""
WEAK = 0.1
"""An alignment that covers less than this share of the way from chance to 100 % accuracy is discarded."""
ATTRIBUTES = tuple(field.name for field in fields(VoiceAttributes))


@dataclass(frozen=True)
class Source:
    """The labels of a stream's utterances.

    Args:
        source: ``description`` (measured attributes of the voice), ``column`` (of the data's table), ``transcript``
            (the utterance's own words).
        column: the column's name.
        attributes: of the voice, in order; attributes that do not vary are omitted.
    """

    source: str
    column: str | None = None
    attributes: Sequence[str] = ("pitch", "range")

    def check(self, stream: str) -> None:
        """Refuse what does not exist."""
        if self.source not in SOURCES:
            raise MsencError(f"align.labels.{stream}.source: {self.source!r}.{nearest(self.source, SOURCES)}")
        if self.source == "column" and not self.column:
            raise MsencError(f"align.labels.{stream}.column: no value. Name a column: align.labels.{stream}.column=...")
        for name in self.attributes:
            if name not in ATTRIBUTES:
                raise MsencError(f"align.labels.{stream}.attributes: no attribute {name!r}.{nearest(name, ATTRIBUTES)}")


def sources_of(config: Mapping[str, Any]) -> dict[str, Source]:
    """The run's aligned streams -> the sources of their labels, validated."""
    node = config["align"]
    if node is None:
        return {}
    if config["model"]["tie_connectors"]:
        raise MsencError("align: tied connectors cannot be aligned, since each needs its own labels. Set align=none.")
    found = {
        stream: Source(**node["labels"][stream]) for stream in config["model"]["streams"] if stream in node["labels"]
    }
    for stream, source in found.items():
        source.check(stream)
    return found


class Labels:
    """Stream -> the label of each utterance of the data, read once.

    Args:
        config: the run's.
        datamodule: set up.
        prepare_command: creates missing labels; for messages.
    """

    def __init__(self, config: Mapping[str, Any], datamodule: DialogueDataModule, prepare_command: str) -> None:
        self.sources = sources_of(config)
        self.template: str = config["align"]["template"] if config["align"] else ""
        self.datamodule = datamodule
        self.command = prepare_command
        self._files: dict[str, dict[str, dict[str, Any]]] = {}
        self._words: dict[tuple[str, str], list[list[str | None]]] = {}

    @cached_property
    def hashes(self) -> dict[str, dict[str, Any]]:
        """Stream -> source, hash of the train split's labels, number of labelled utterances and of distinct labels.

        Raises:
            MsencError: labels are missing, belong to other data, or are all the same.
        """
        return {stream: self._facts(stream) for stream in self.sources}

    def words(self, stream: str, split: str) -> list[list[str | None]]:
        """The label of the utterance for each dialogue of the split and turn; None if it has none."""
        if (stream, split) not in self._words:
            dataset = self.datamodule.dataset(split)
            self._words[stream, split] = [
                self._words_of(stream, dataset.dialogue(index)) for index in range(len(dataset))
            ]
        return self._words[stream, split]

    def _words_of(self, stream: str, dialogue: Dialogue) -> list[str | None]:
        source = self.sources[stream]
        found = []
        for utterance in dialogue.utterances:
            id = f"{dialogue.id}/utt{utterance.id}"
            if source.source == "transcript":
                words = utterance.text
            elif source.source == "column":
                words = str(self._file(LABELS).get(id, {}).get(source.column, "")).strip().lower()
            else:
                measured = self._file(VOICE_TURNS).get(id, {}).get("measured", {})
                words = " ".join(w for name in source.attributes if (w := measured.get(name, UNKNOWN)) != UNKNOWN)
            found.append(words or None)
        return found

    def _file(self, name: str) -> dict[str, dict[str, Any]]:
        if name not in self._files:
            how = f"{self.command} describe=measure" if name == VOICE_TURNS else self.command
            self._files[name] = read_labels(
                self.datamodule.folder, name, f"Labels for alignment come from: {how}. Or set align=none."
            )
        return self._files[name]

    def _facts(self, stream: str) -> dict[str, Any]:
        source = self.sources[stream]
        if source.source == "column":
            columns = columns_of(self._file(LABELS))
            if source.column not in columns:
                raise MsencError(
                    f"align.labels.{stream}.column={source.column}: no such column in "
                    f"{self.datamodule.folder / LABELS}.{nearest(str(source.column), columns)}"
                )
        words = self.words(stream, "train")
        dataset = self.datamodule.dataset("train")
        pairs = [(f"{dataset.ids[i]}/{turn}", w) for i, row in enumerate(words) for turn, w in enumerate(row)]
        known = [w for _, w in pairs if w is not None]
        where = source.column if source.source == "column" else source.source
        if not known:
            file = self.datamodule.folder / (LABELS if source.source == "column" else VOICE_TURNS)
            some = next(iter(self._file(file.name)), "nothing")
            raise MsencError(
                f"align.labels.{stream}: no utterance of the train split has a label ({where}). {file} holds labels of "
                f"{some} and others, the data has {pairs[0][0].rpartition('/')[0]}. Are they from other data? Prepare "
                f"again ({self.command}), choose another source, or align=none."
            )
        different = len(set(known))
        if different == 1:
            raise MsencError(
                f"align.labels.{stream}: all {len(known):,} labelled utterances have the same label {known[0]!r} "
                f"({where}), so there is nothing to learn. Choose another source or other attributes, or align=none."
            )
        return {
            "source": where,
            "hash": content_hash(pairs)[:12],
            "utterances": len(known),
            "without": len(pairs) - len(known),
            "different": different,
        }


class _Facts(TypedDict):
    source: str
    hash: str
    utterances: Count
    without: Count
    different: Count


class _Scores(TypedDict):
    accuracy: NotRequired[float]
    chance: NotRequired[float]
    spread: NotRequired[float | None]


class _Record(TypedDict):
    """The content of ``alignment.json``; `scores` is empty if there was nothing to score on."""

    labels: _Facts
    scores: _Scores
    seconds: float


def align_connectors(
    config: Mapping[str, Any],
    model: ConversationModel,
    datamodule: DialogueDataModule,
    labels: Labels,
) -> dict[str, Any]:
    """Align the model's connectors in place, or load an earlier alignment; returns the entry of run.json.

    A connector that has learned only what all utterances have in common, not what distinguishes them, is constant and
    thus worse than a new one. It is discarded, and the stream starts as without alignment.
    """
    facts = {}
    for stream in labels.sources:
        connector, facts[stream] = _align(config, model, datamodule, labels, stream)
        if facts[stream]["used"]:
            model.connectors[stream].load_state_dict(connector)
    if facts:
        _print(facts)
    return facts


def _align(
    config: Mapping[str, Any],
    model: ConversationModel,
    datamodule: DialogueDataModule,
    labels: Labels,
    stream: str,
) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
    node = {k: v for k, v in config["align"].items() if k not in ("labels", "template")}
    settings, settings_of_stream = AlignmentSettings(**node), config["model"]["streams"][stream]
    identity = {
        "version": VERSION,
        "stream": stream,
        "encoder": {**settings_of_stream, "encoder": without_absent(settings_of_stream["encoder"])},
        "features": stream_hashes(datamodule)[stream],
        "turns": datamodule.manifest.turns_hash,
        "left_out": sorted(datamodule.left_out),
        "labels": labels.hashes[stream],
        "template": labels.template,
        "settings": {k: v for k, v in asdict(settings).items() if (k, v) != ("keep", 0)},  # as before there was such
        "connector": config["model"]["connector"],
        "base_fingerprint": model.base_fingerprint,
        "dtype": str(next(model.llm.parameters()).dtype),
    }
    folder = Path(config["paths"]["runs_dir"]) / "alignments" / f"{stream}-{digest(identity)}"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):  # of parallel jobs that need the same one, the first computes it
        is_there = (folder / RECORD).is_file()
        if not is_there:
            _make(folder, identity, settings, config, model, datamodule, labels, stream)
        record, connector = read_alignment(folder, model.connectors[stream])
    return connector, {
        **{k: record[k] for k in ("labels", "scores", "seconds")},
        "folder": str(folder),
        "hash": folder.name.rpartition("-")[2],
        "weights": hash_of_tensors(connector),
        "reused": is_there,
        "used": not _is_weak(record["scores"]),
    }


def read_alignment(folder: Path, connector: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """An existing alignment: its record, and the tensors of its connector.

    Args:
        folder: of the alignment.
        connector: the one to load it into.

    Raises:
        MsencError: either is missing or damaged, or the tensors do not fit the connector.
    """
    advice = f"Remove {folder}; it will be recomputed."
    record = read_json(folder / RECORD, _Record, advice)
    state = read_checkpoint(folder / FILE)["state_dict"]
    if {n: t.shape for n, t in state.items()} != {n: t.shape for n, t in connector.state_dict().items()}:
        raise MsencError(f"{folder / FILE}: its tensors do not fit the run's connector. {advice}")
    return record, state


def _make(
    folder: Path,
    identity: Mapping[str, Any],
    settings: AlignmentSettings,
    config: Mapping[str, Any],
    model: ConversationModel,
    datamodule: DialogueDataModule,
    labels: Labels,
    stream: str,
) -> None:
    if settings.objective == "llm" and model.llm.stored is not None:
        raise MsencError(
            "align.objective=llm: found trainer=fsdp2, under which no process holds the LLM; expected one that does. "
            "Align in a run of its own (stage=align trainer=gpu), and start from that: init_from.connectors=RUN."
        )
    embeddings = token_embeddings(model.llm)
    device = embeddings.device
    with own_random_numbers(settings.seed):
        node = config["model"]["connector"]
        connector = build_connector(node, config["model"]["streams"][stream], embeddings.shape[1])
        connector.to(device)
        train = _Utterances(datamodule, labels, stream, "train")
        calibrate(connector, train.frames(num_for_calibration(connector)), embeddings)
        targets = EmbeddingTargets(embeddings, connector.num_queries)
        if settings.objective == "llm":
            loss_of = _llm_loss(model, datamodule.tokenizer, stream)
        else:
            loss_of = make_loss(settings, targets, connector)
        state = _read_state(folder / PARTIAL)
        start = time.monotonic()
        with Bar(console=console) as progress:
            bar = progress.add_task(f"aligning {stream}", total=settings.steps, completed=state.step if state else 0)

            def on_step(done: int, loss: float, take: Callable[[], AlignmentState]) -> None:
                progress.update(bar, completed=done, description=f"aligning {stream}: loss {loss:.3f}")
                if done % SAVE_EVERY == 0 and done < settings.steps:
                    write_checkpoint({"state_dict": {}, "alignment": asdict(take())}, folder / PARTIAL)

            fit(connector, settings, lambda step: train.batch(step, settings), loss_of, state, on_step)
        validates = config["data"]["val"] is not None
        held_out = _Utterances(datamodule, labels, stream, "val").first(SCORED) if validates else []
        scores = score(connector, held_out, targets, settings.objective) if held_out else {}
    write_checkpoint({"state_dict": {k: v.cpu() for k, v in connector.state_dict().items()}}, folder / FILE)
    record = {
        "identity": dict(identity),
        "labels": labels.hashes[stream],
        "scores": scores,
        "seconds": round(time.monotonic() - start, 2),
    }
    write_json(folder / RECORD, record)
    (folder / PARTIAL).unlink(missing_ok=True)


class _Utterances:
    """The utterances of a split that have the stream and a label, read on demand, dialogue by dialogue."""

    def __init__(self, datamodule: DialogueDataModule, labels: Labels, stream: str, split: str) -> None:
        self.dataset = datamodule.dataset(split)
        self.words = labels.words(stream, split)
        self.stream = stream
        is_label = labels.sources[stream].source != "transcript"
        self.template = labels.template if is_label else "{words}"
        self.tokenizer = datamodule.tokenizer.tokenizer
        self._ids: dict[str, tuple[int, ...]] = {}

    def ids(self, words: str) -> tuple[int, ...]:
        if words not in self._ids:
            text = " " + self.template.replace("{words}", words).lstrip()
            self._ids[words] = tuple(
                self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
            )
        return self._ids[words]

    def of(self, index: int) -> Iterator[Known]:
        """The utterances of a dialogue."""
        if not any(self.words[index]):
            return
        for frames, words in zip(self.dataset.features(index)[self.stream], self.words[index], strict=True):
            if frames is not None and words is not None:
                yield Known(frames, self.ids(words))

    def frames(self, most: int) -> Iterator[Tensor]:
        """Frames of some utterances, drawn from the whole split, since a corpus may be sorted."""
        given = 0
        for index in np.random.default_rng(0).permutation(len(self.dataset)).tolist():
            for frames in self.dataset.features(index)[self.stream]:
                if frames is not None and given < most:
                    given += 1
                    yield torch.from_numpy(frames)

    def batch(self, step: int, settings: AlignmentSettings) -> list[Known]:
        """The utterances of whole dialogues, about as many as requested; depends only on seed and step."""
        order = np.random.default_rng([settings.seed, step]).permutation(len(self.dataset)).tolist()
        found: list[Known] = []
        while order and len(found) < settings.batch_size:
            found += self.of(order.pop())
        return found[: settings.batch_size]

    def first(self, most: int) -> list[Known]:
        found: list[Known] = []
        for index in range(len(self.dataset)):
            found += self.of(index)
            if len(found) >= most:
                break
        return found[:most]


def _llm_loss(
    model: ConversationModel, tokenizer: DialogueTokenizer, stream: str
) -> Callable[[nn.Module, Sequence[Known]], Tensor]:
    """The frozen LLM's loss on the label, given only the clip: a dialogue of one turn that has only a slot."""
    speaker = tokenizer.tokenizer(" user:", add_special_tokens=False).input_ids
    end = tokenizer.tokenizer.eos_token_id
    reply = TOKEN_KINDS.index("reply")

    def loss_of(connector: nn.Module, known: Sequence[Known]) -> Tensor:
        dialogues = [
            TokenizedDialogue(
                id=str(n),
                instruction=tokenizer.instruction,
                turns=((tuple(speaker), Slot(stream)), ()),
                responses=(tuple(speaker),),
                targets=(Target((*k.ids, end), (reply,) * (len(k.ids) + 1)),),
                turn_tokens=(len(speaker), 0),
            )
            for n, k in enumerate(known)
        ]
        queries = {stream: connector.num_queries}
        rows = [dialogue_rows(d, budget=10**9, num_queries=queries) for d in dialogues]
        features = [{stream: [k.frames, None]} for k in known]
        batch = collate(dialogues, features, rows, queries, pack=True)
        own = model.connectors[stream]
        model.connectors[stream] = connector
        try:
            return model(batch).nll.mean()
        finally:
            model.connectors[stream] = own

    return loss_of


def _read_state(path: Path) -> AlignmentState | None:
    try:
        return AlignmentState(**read_checkpoint(path)["alignment"]) if path.is_file() else None
    except (KeyError, TypeError) as error:
        raise MsencError(f"{path}: not a saved state of an alignment ({error!r}). Remove it to start over.") from error


def hash_of_tensors(state: Mapping[str, Tensor]) -> str:
    """A hash of all values of some weights, independent of their order and device."""
    found = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def _is_weak(scores: Mapping[str, float]) -> bool:
    return bool(scores) and scores["accuracy"] - scores["chance"] < WEAK * (1 - scores["chance"])


def _print(facts: Mapping[str, Mapping[str, Any]]) -> None:
    table = Table(title="aligned connectors")
    for column in ("stream", "labels", "distinct", "utterances", "accuracy (val)", "majority", "spread"):
        table.add_column(column, justify="left" if column in ("stream", "words") else "right")
    for stream, fact in facts.items():
        own, scores = fact["labels"], fact["scores"]
        shares = [f"{100 * scores[k]:.1f} %" if k in scores else "" for k in ("accuracy", "chance", "spread")]
        table.add_row(stream, own["source"], f"{own['different']:,}", f"{own['utterances']:,}", *shares)
    console.print(table)
    for stream, fact in facts.items():
        if fact["reused"]:
            console.print(f"{stream}: already aligned, loaded from {shown(Path(fact['folder']))}", soft_wrap=True)
        if fact["labels"]["without"]:
            console.print(f"{stream}: {fact['labels']['without']:,} training utterances have no label", soft_wrap=True)
        if not fact["used"]:
            scores = fact["scores"]
            console.print(
                f"{stream}: the alignment hardly distinguishes utterances: it labels "
                f"{100 * scores['accuracy']:.1f} % of the validation utterances correctly, the majority label alone "
                f"{100 * scores['chance']:.1f} %. It is not used: the stream starts unaligned. The clips may not show "
                "what the labels describe: try another source, encoder or connector.",
                style="yellow",
                soft_wrap=True,
            )
