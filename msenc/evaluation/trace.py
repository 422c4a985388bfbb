"""Where is it lost? A model and a split -> bits of each label at every station on its way, and those that replies use.

The stations: the encoder's output, the connector's, each layer of the LLM at the media slots, and at the token that
predicts a reply's first one. An example is the turn before a target; of later stations the vectors may also know the
history's words. What replies use of a label is measured, not probed: see `_used`.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn

from msenc.data.batches import share
from msenc.data.collate import Layout, dialogue_rows
from msenc.data.controls import Swap
from msenc.data.datamodule import DialogueDataModule
from msenc.data.loader import UnitSample, collate_units
from msenc.evaluation.losses import score_all
from msenc.evaluation.metrics.description import voice_of
from msenc.evaluation.probes import FOLDS, Probed, entropy, fold_groups, probe, probe_each
from msenc.evaluation.statistics import Effect, paired_effect
from msenc.files import read_json
from msenc.files.kinds import Count
from msenc.models.conversation import ConversationModel
from msenc.models.layers import layers_of
from msenc.store.labels import LABELS, VOICE_TURNS, read_labels
from msenc.types import UNKNOWN, UNKNOWN_SPEAKER, Batch, MsencError
from msenc.work.group import ALONE, Group
from msenc.work.progress import Bar

FILE = "trace.json"
ENCODER = "encoder"
"""The station of an encoder's output; ``encoder 4`` is that of its layer 4, where the run reads several."""
FEWEST = 10
"""Examples of a label's value; rarer values are left out."""
MOST_VALUES = 12
"""Values of a label; what has more (a name, a transcript) is no label."""
WIDEST = 4096
"""Width of a probed vector: the query vectors of a slot are joined up to here, and averaged beyond."""
DRAWS = 24
"""Of each turn's stream, by which is measured what replies use of the labels."""
NEGLIGIBLE = 0.1
"""Share of a label's entropy below which it counts as lost."""
NOTHING = 0.001
"""Share of a label's entropy below which replies do not use it, however narrow the interval."""


class _Effect(TypedDict):
    mean: float | None
    low: float | None
    high: float | None
    p_value: float | None


class _Station(_Effect):
    station: str
    permuted: float


class _Label(TypedDict):
    entropy: float
    examples: Count
    unseen: str
    stations: list[_Station]
    used: _Effect
    lost_at: str
    verdict: str


class _Stream(TypedDict):
    labels: dict[str, _Label]


class _Trace(TypedDict):
    """What ``trace.json`` holds; null is a number that is not known, as of the spread of a single dialogue."""

    streams: dict[str, _Stream]


Turn = tuple[str, int]
"""Dialogue id and turn."""


@dataclass(frozen=True)
class Stations:
    """What is probed of one stream.

    Args:
        turns: of the N examples.
        vectors: station -> (N, width).
    """

    turns: list[Turn]
    vectors: dict[str, np.ndarray]


def trace_split(
    model: ConversationModel,
    datamodule: DialogueDataModule,
    split: str,
    limit: int | None = None,
    group: Group = ALONE,
) -> dict[str, Any]:
    """Trace every label through every stream of a run.

    Args:
        model: in eval mode, on its device.
        datamodule: of the run.
        split: whose turns are probed; probes train on some of them, and are scored on others.
        limit: number of dialogues, from the start of the split.
        group: processes that share the work out.

    Returns:
        In the first process (empty in others): stream -> ``labels``: label -> its entropy in bits, ``stations`` with
        the bits found there, ``used`` (bits per reply), ``lost_at`` (``encoder``, ``connector``, ``llm``; ``nowhere``;
        ``unknown``) and ``verdict``, a sentence.

    Raises:
        MsencError: the run has no stream but the text, or the split no label to trace.
    """
    if not datamodule.streams:
        raise MsencError("trace=true: this run reads text alone; expected a run with audio or video.")
    labels = known_labels(datamodule, split, limit)
    stations = record(model, datamodule, split, limit, group)
    speakers = _speakers(datamodule, split, limit)
    found: dict[str, Any] = {}
    for stream, recorded in stations.items():
        own = usable_labels(labels[stream], recorded.turns)
        used = _used(model, datamodule, split, limit, stream, recorded.turns, own, group)
        if group.is_first:
            found[stream] = {
                "labels": {
                    name: _trace_label(stream, name, values, recorded, speakers, used[name])
                    for name, values in own.items()
                },
            }
    if group.is_first and not any(facts["labels"] for facts in found.values()):
        raise MsencError(
            f"{datamodule.folder}: no label to trace in the split {split}. Expected measured voices (prepare.py "
            f"describe=measure), a column of labels in the data's table, or planted bits, of which two values occur "
            f"{FEWEST} times or more."
        )
    return found


def read_trace(path: Path) -> dict[str, Any]:
    """What `trace_split` has found, as ``streams``.

    Raises:
        MsencError: the file is no trace.
    """
    return read_json(path, _Trace, "Trace again (evaluate.py run_dir=... trace=true overwrite=true), or move it away.")


def known_labels(
    datamodule: DialogueDataModule, split: str, limit: int | None = None
) -> dict[str, dict[str, dict[Turn, str]]]:
    """Stream -> label -> turn -> value: the voice's attributes, columns of the table, bits planted in the stream."""
    dataset, folder = datamodule.dataset(split), datamodule.folder
    files = [
        read_labels(folder, name, "") if isinstance(folder, Path) and (folder / name).is_file() else {}
        for name in (VOICE_TURNS, LABELS)
    ]
    found = {stream: defaultdict(dict) for stream in datamodule.streams}
    for index in range(min(len(dataset), limit or len(dataset))):
        dialogue = dataset.dialogue(index)
        for turn, utterance in enumerate(dialogue.utterances):
            measured, columns = (file.get(f"{dialogue.id}/utt{utterance.id}", {}) for file in files)
            values = {**asdict(voice_of(utterance)), **measured.get("measured", {}), **columns}
            following = dialogue.utterances[turn + 1 : turn + 2]
            for stream, of_stream in found.items():
                planted = {
                    f"planted in {mark.field}": getattr(target, mark.field)[mark.start : mark.end]
                    for target in following
                    for mark in target.marks
                    if mark.kind == stream and getattr(target, mark.field)
                }
                for name, value in (values | planted).items():
                    word = str(value).strip().lower()
                    if word and word != UNKNOWN:
                        of_stream[name][dialogue.id, turn] = word
    return {stream: dict(of_stream) for stream, of_stream in found.items()}


def usable_labels(labels: Mapping[str, Mapping[Turn, str]], turns: Sequence[Turn]) -> dict[str, np.ndarray]:
    """Label -> (N,) class of each turn, -1 where it has none or a rare one; only labels of two or more classes."""
    usable = {}
    for name, values in labels.items():
        words = [values.get(turn) for turn in turns]
        counts = Counter(word for word in words if word is not None)
        common = sorted(word for word, count in counts.items() if count >= FEWEST)
        if len(common) >= 2 and len(counts) <= MOST_VALUES:
            usable[name] = np.array([common.index(word) if word in common else -1 for word in words])
    return usable


def record(
    model: ConversationModel, datamodule: DialogueDataModule, split: str, limit: int | None, group: Group = ALONE
) -> dict[str, Stations]:
    """Stream -> what is probed of the turns before the split's targets; in every process."""
    tokens = datamodule.eval_tokens(split, limit)
    own = share(range(len(tokens)), tokens, group.rank, group.size)
    make = partial(
        _collate,
        budget=datamodule.max_history_tokens,
        num_queries=datamodule.num_queries,
        layout=datamodule.layout,
        layers={stream: layers_of(spec.settings) for stream, spec in datamodule.streams.items()},
    )
    loader = datamodule.eval_dataloader(split, limit, chosen=own, collate_fn=make)
    parts = group.gather(_record(model, loader), len(tokens), Bar(), f"tracing {split}")
    stations = {}
    for stream in datamodule.streams:
        of_stream = [part[stream] for part in parts if stream in part]
        if of_stream:
            names = of_stream[0].vectors
            stations[stream] = Stations(
                [turn for part in of_stream for turn in part.turns],
                {name: np.concatenate([part.vectors[name] for part in of_stream]) for name in names},
            )
    return stations


_Asking = dict[str, list[tuple[int, int, dict[str, np.ndarray]]]]
"""Stream -> (number of the target, number of the slot before it, its frames pooled: by station) in a batch."""


def _collate(
    samples: Sequence[UnitSample],
    budget: int,
    num_queries: Mapping[str, int],
    layout: Layout,
    layers: Mapping[str, Sequence[int]],
) -> tuple[Batch, _Asking]:
    asking: _Asking = defaultdict(list)
    slots: Counter[str] = Counter()
    targets = 0
    for dialogue, features, turns in samples:
        for row in dialogue_rows(dialogue, budget, num_queries, layout, turns):
            numbers = {turn: targets + number for number, turn in enumerate(row.target_turns)}
            for stream, turn, *_ in row.slots:
                if turn + 1 in numbers:
                    frames = features[stream][turn].astype(np.float32)
                    asking[stream].append((numbers[turn + 1], slots[stream], _pooled(frames, layers[stream])))
                slots[stream] += 1
            targets += len(row.target_turns)
    return collate_units(samples, budget, num_queries, layout), dict(asking)


def _pooled(frames: np.ndarray, layers: Sequence[int]) -> dict[str, np.ndarray]:
    """Station -> mean and standard deviation over time of the frames (T, D), or of each layer's in (T, K*D)."""
    names = [f"{ENCODER} {layer}" for layer in layers] if len(layers) > 1 else [ENCODER]
    parts = np.split(frames, len(names), axis=1)
    return {name: np.concatenate([p.mean(axis=0), p.std(axis=0)]) for name, p in zip(names, parts, strict=True)}


@torch.inference_mode()
def _record(model: ConversationModel, batches: Any) -> Iterator[dict[str, Stations]]:
    device = next(model.parameters()).device
    for batch, asking in batches:
        batch = move_data_to_device(batch, device)
        with model.computing(), _hidden_states(model.llm) as states:
            model(batch)
            queries = model.connect(batch)
        layers = [state.flatten(0, 1) for state in states]  # (B*L, H) each
        firsts = torch.searchsorted(batch.targets, torch.arange(len(batch.target_ids), device=device))
        found = {}
        for stream, examples in asking.items():
            targets, slots, pooled = zip(*examples, strict=True)
            num_queries = queries[stream].shape[1]
            places, sources = (
                of.reshape(-1, num_queries)[list(slots)]  # (N, Q)
                for of in (batch.streams[stream].places, batch.streams[stream].sources)
            )
            replies = batch.predictors[firsts[list(targets)]]
            vectors = {name: np.stack([one[name] for one in pooled]) for name in pooled[0]}
            vectors["connector"] = _flat(queries[stream].flatten(0, 1)[sources])
            vectors |= {f"slots {layer}": _flat(state[places]) for layer, state in enumerate(layers)}
            vectors |= {f"reply {layer}": _flat(state[replies, None]) for layer, state in enumerate(layers) if layer}
            ids = [batch.target_ids[target] for target in targets]
            found[stream] = Stations([(dialogue, turn - 1) for dialogue, turn in ids], vectors)
        yield found


def _flat(vectors: Tensor) -> np.ndarray:
    """(N, Q, H) -> (N, width) float32."""
    n, q, h = vectors.shape
    vectors = vectors.reshape(n, q * h) if q * h <= WIDEST else vectors.float().mean(1)
    return vectors.float().cpu().numpy()


@contextmanager
def _hidden_states(llm: nn.Module) -> Iterator[list[Tensor]]:
    """What the LLM's next call gives out: its input (B, L, H), and the output of each layer."""
    states: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        states[:] = output.hidden_states

    hooks = (
        llm.register_forward_pre_hook(lambda _, a, k: (a, {**k, "output_hidden_states": True}), with_kwargs=True),
        llm.register_forward_hook(keep),
    )
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


def _used(
    model: ConversationModel,
    datamodule: DialogueDataModule,
    split: str,
    limit: int | None,
    stream: str,
    turns: Sequence[Turn],
    labels: Mapping[str, np.ndarray],
    group: Group,
) -> dict[str, Effect]:
    """Label -> bits per reply that the model takes from it: how much likelier it finds the reply after the right value.

    In each draw, every turn gets the stream of another one. p(reply) after a value is the mean over the draws in which
    the turn before has got a turn of that value; the bits are log2 of p after its own value over the mean of p over all
    values by their shares: at most the surprise of the value, -log2 of its share. They are cut off there below 0 too:
    else the few replies would decide for which nothing else of the stream has fitted by chance.

    Args:
        model: as in `trace_split`.
        datamodule: as in `trace_split`.
        split: as in `trace_split`.
        limit: as in `trace_split`.
        stream: that is swapped.
        turns: of the N examples.
        labels: label -> (N,) class of each, or -1.
        group: as in `trace_split`.
    """
    numbers = {id: index for index, id in enumerate(datamodule.dataset(split).ids)}
    places = [(numbers[dialogue], turn) for dialogue, turn in turns]
    order = np.random.default_rng(datamodule.seed).permutation(len(turns))
    donors = np.empty((DRAWS, len(turns)), dtype=int)
    for draw in range(DRAWS):
        donors[draw, order] = np.roll(order, 1 + draw)
    swaps = [Swap(stream, {place: places[d] for place, d in zip(places, of, strict=True)}) for of in donors.tolist()]
    title = f"swapping {stream}"
    scored = score_all(model, datamodule, split, limit, [{"control": swap} for swap in swaps], title, group)
    if not group.is_first:
        return {}
    log_p = np.array([[-sum(found[dialogue, turn + 1].nll) for dialogue, turn in turns] for found in scored])
    effects = {}
    for name, classes in labels.items():
        bits = _bits_of(log_p, classes[donors], classes)
        known = np.isfinite(bits)
        dialogues = [dialogue for (dialogue, _), is_known in zip(turns, known, strict=True) if is_known]
        effects[name] = paired_effect(bits[known], dialogues)
    return effects


def _bits_of(log_p: np.ndarray, drawn: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Bits per reply, NaN where a turn has no label or no draw of its own value.

    Args:
        log_p: (K, N) of each reply in each draw, in nats.
        drawn: (K, N) class of what stood in the turn before it, or -1.
        own: (N,) class of that turn, or -1.
    """
    shares = np.bincount(own[own >= 0]) / (own >= 0).sum()
    values = np.arange(len(shares))[:, None, None]
    counts = (drawn == values).sum(axis=1)  # (C, N)
    with np.errstate(divide="ignore", invalid="ignore"):
        after = np.logaddexp.reduce(np.where(drawn == values, log_p, -np.inf), axis=1) - np.log(counts)  # (C, N)
        weights = np.where(counts > 0, shares[:, None], 0)
        mean = np.logaddexp.reduce(np.where(counts > 0, after + np.log(weights / weights.sum(axis=0)), -np.inf), axis=0)
        bits = (np.take_along_axis(after, own[None], axis=0)[0] - mean) / np.log(2)
    limits = -np.log2(shares)[own]
    bits = np.where((own >= 0) & np.isfinite(bits), np.clip(bits, -limits, limits), np.nan)
    return bits.round(6) + 0.0  # losses are of float32


def _speakers(datamodule: DialogueDataModule, split: str, limit: int | None) -> dict[Turn, str]:
    """Turn -> speaker."""
    dataset = datamodule.dataset(split)
    dialogues = map(dataset.dialogue, range(min(len(dataset), limit or len(dataset))))
    return {(d.id, turn): u.speaker for d in dialogues for turn, u in enumerate(d.utterances)}


def _groups(turns: Sequence[Turn], speakers: Mapping[Turn, str]) -> tuple[str, list[str]]:
    """Kind and group of each turn, of which probes are tested on unseen ones: speakers, or dialogues if too few."""
    own = [speakers[turn] for turn in turns]
    counts = Counter(own)
    if len(counts) >= FOLDS and UNKNOWN_SPEAKER not in counts and max(counts.values()) <= len(turns) / 3:
        return "speakers", own
    return "dialogues", [dialogue for dialogue, _ in turns]


def _trace_label(
    stream: str, name: str, classes: np.ndarray, recorded: Stations, speakers: Mapping[Turn, str], used: Effect
) -> dict[str, Any]:
    known = classes >= 0
    labels = classes[known]
    turns = [turn for turn, is_known in zip(recorded.turns, known, strict=True) if is_known]
    unseen, groups = _groups(turns, speakers)
    facts: dict[str, Any] = {"entropy": entropy(labels), "examples": len(labels), "unseen": unseen}
    if len(set(groups)) < FOLDS:
        few = f"found {len(set(groups))} {unseen}, expected {FOLDS} or more, to probe on unseen ones"
        verdict = f"{stream}, {name}: cannot tell: {few}"
        return {**facts, "stations": [], "used": asdict(used), "lost_at": "unknown", "verdict": verdict}
    folds = fold_groups(groups)
    of_encoder = [station for station in recorded.vectors if station.startswith(ENCODER)]
    each, best = probe_each([recorded.vectors[station][known] for station in of_encoder], labels, folds)
    probed: dict[str, Probed] = {**dict(zip(of_encoder, each, strict=True)), ENCODER: best}
    for station, vectors in recorded.vectors.items():
        if station in of_encoder:
            continue
        is_passed_on = station == "slots 0" and np.array_equal(vectors, recorded.vectors["connector"])
        probed[station] = probed["connector"] if is_passed_on else probe(vectors[known], labels, folds)
    stations = {station: paired_effect(found.bits, groups) for station, found in probed.items()}
    lost_at, verdict = judge(facts["entropy"], probed, stations, groups, used)
    return {
        **facts,
        "stations": [
            {"station": station, **asdict(effect), "permuted": max(probed[station].permuted)}
            for station, effect in stations.items()
        ],
        "used": asdict(used),
        "lost_at": lost_at,
        "verdict": f"{stream}, {name}: {verdict}",
    }


def layer_bits(stations: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Layer of the encoder -> the bits found in it, where a label was traced through several.

    Args:
        stations: of a label in ``trace.json``.
    """
    return {
        station["station"].removeprefix(f"{ENCODER} "): station["mean"]
        for station in stations
        if station["station"].startswith(f"{ENCODER} ")
    }


def judge(
    bits: float,
    probed: Mapping[str, Probed],
    stations: Mapping[str, Effect],
    groups: Sequence[str],
    used: Effect,
) -> tuple[str, str]:
    """Where a label is lost (see `trace_split`), and why, in words.

    Args:
        bits: the label's entropy.
        probed: station -> what was found there.
        stations: station -> its mean with its interval.
        groups: of the examples, which are clusters.
        used: bits per reply that the model takes from the label.
    """

    def has(station: str) -> bool:
        return stations[station].low > 0 and stations[station].mean > max(probed[station].permuted)

    def told(station: str) -> str:
        return f"{max(stations[station].mean, 0):.2f}"

    negligible = NEGLIGIBLE * bits
    if used.low > NOTHING * bits:
        beside = "" if has(ENCODER) else ", though no linear probe finds it in the encoder's output"
        found = f"the encoder has {told(ENCODER)} of {bits:.2f}{beside}"
        return "nowhere", f"replies use it ({used.mean:.2f} bits per reply; {found})"
    if not has(ENCODER) and not has("connector"):
        if stations[ENCODER].high < negligible:
            return "encoder", f"the encoder never had it ({told(ENCODER)} of {bits:.2f} bits)"
        found = f"{told(ENCODER)} of {bits:.2f} bits"
        return "unknown", f"cannot tell whether the encoder has it ({found}); trace more dialogues"
    drop = paired_effect(probed[ENCODER].bits - probed["connector"].bits, groups)
    passed = f"{told(ENCODER)} of {bits:.2f} bits before it, {told('connector')} after"
    if not has("connector") or (drop.low > 0 and stations["connector"].mean < stations[ENCODER].mean / 2):
        return "connector", f"the connector lost it ({passed})"
    if not used.high < negligible:
        found = f"{used.mean:.2f} bits [{used.low:.2f}, {used.high:.2f}]"
        return "unknown", f"cannot tell whether replies use it ({found}); trace more dialogues"
    last = max(int(station.split()[1]) for station in stations if station.startswith("slots"))
    if not has("slots 0"):
        where = "but none of it is in the LLM's input"
    elif has(f"reply {last}"):
        where = f"and {told(f'reply {last}')} at the reply's first token, which do not matter to the reply"
    else:
        where = f"{told(f'slots {last}')} in its last layer there, and none at the reply's first token"
    return "llm", f"the LLM ignores it (the connector gives {told('connector')} of {bits:.2f} bits, {where})"
