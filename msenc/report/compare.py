"""Runs -> configurations with their intervals, what is to be compared with what, and the tests of it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations

import numpy as np

from msenc.evaluation.power import ALPHA, Spread, spread_of
from msenc.evaluation.statistics import Effect, holm, paired_effect, unpaired_effect, verdict
from msenc.report.collect import Evaluation, Run
from msenc.report.items import Items, read_items
from msenc.report.noise import Floor
from msenc.types import MsencError

MAIN_METRICS = ("nll", "perplexity", "token_accuracy", "bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l")
PLANTED_KINDS = ("text", "audio", "video", "both")
STREAMS = {"text", "audio", "video"}
LOWER_IS_BETTER = (
    *("nll", "perplexity", "repetition_4", "parse_failure_rate", "not_understood", "wer", "cer", "others"),
    "inconsistent",
)
NEITHER_IS_BETTER = ("length_ratio",)
DEFAULT = "(default)"


@dataclass
class Configuration:
    """What was trained alike but for the seed.

    Args:
        levels: key -> value, of the keys in which the runs differ.
        runs: one per seed, in the order of seeds.
        evaluations: the chosen evaluation of each run.
        items: its predictions; None where the evaluation has left none.
        scores: metric -> mean with its interval, over dialogues and seeds; over seeds alone for `over_seeds`.
        over_seeds: metrics that are no mean of items.
    """

    levels: dict[str, str]
    runs: list[Run]
    evaluations: list[Evaluation]
    items: list[Items | None]
    scores: dict[str, Effect] = field(default_factory=dict)
    over_seeds: set[str] = field(default_factory=set)

    @property
    def name(self) -> str:
        """The levels; of a single key its value alone."""
        values = [value if value != DEFAULT else f"{key}={value}" for key, value in self.levels.items()]
        return ", ".join(values) or "all runs"

    def deviation(self, metric: str) -> float:
        """Standard deviation of a metric between the runs; NaN of a single one."""
        values = values_of(self.evaluations, metric)
        return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


@dataclass(frozen=True)
class Comparison:
    """One configuration less another, on one metric.

    Args:
        key: the key in which they differ.
        treated: name of the one.
        baseline: name of the other.
        metric: what is compared.
        effect: difference of the means, with its interval and p-value.
        adjusted: p-value after Holm's correction over all comparisons of this metric.
        size: the difference in standard deviations of the items' differences (Cohen's d of pairs); NaN without items.
        detectable: what as many seeds and dialogues show with 80 % power, after correction; NaN where it is unknown,
            and of differences that are significant.
        margin: what counts as no difference; NaN if nothing does.
        seeds_needed: that show a difference of the margin with that power; None: no number does, or it is unknown.
        floor: what runs differ by that are alike but for the seed; NaN if unknown.
    """

    key: str
    treated: str
    baseline: str
    metric: str
    effect: Effect
    adjusted: float
    size: float
    detectable: float = math.nan
    margin: float = math.nan
    seeds_needed: int | None = None
    floor: float = math.nan

    @property
    def is_equivalent(self) -> bool:
        """Whether the difference is shown to be smaller than the margin."""
        return self.effect.bound < self.margin

    @property
    def is_noise(self) -> bool:
        """Whether runs that are alike but for the seed differ by as much."""
        return abs(self.effect.mean) < self.floor

    @property
    def mark(self) -> str:
        """Better or worse after correction, no significant difference, or not tested."""
        if math.isnan(self.adjusted):
            return "not tested"
        if self.adjusted >= ALPHA:
            return "not shown"
        direction = direction_of(self.metric)
        if direction == 0:
            return "differs"
        return "better" if self.effect.mean * direction > 0 else "worse"


@dataclass(frozen=True)
class Verdict:
    """A control's verdict on a configuration: is the stream used?

    Args:
        configuration: its name.
        control: its name.
        effect: per-token loss with minus without the control, in nats, over seeds and dialogues.
        verdict: ``used``, ``not used`` or ``cannot tell``, for all seeds together.
        per_run: the verdict of each run's own control, by seed.
    """

    configuration: str
    control: str
    effect: Effect
    verdict: str
    per_run: dict[int, str]


def direction_of(metric: str) -> int:
    """1 if higher is better, -1 if lower is, 0 if neither.

    Example:
        >>> direction_of("nll"), direction_of("speech/speaker_similarity/others"), direction_of("rouge_l-zh")
        (-1, -1, 1)
        >>> direction_of("repetition_4"), direction_of("length_ratio")
        (-1, 0)
    """
    parts = metric.removesuffix(" %").split("/")
    if parts[-1] in NEITHER_IS_BETTER or parts[:2] == ["judge", "bias"]:
        return 0
    return -1 if {parts[0], parts[-1]} & set(LOWER_IS_BETTER) else 1


def configure(runs: Sequence[Run], chosen: dict[str, Evaluation], keys: Sequence[str]) -> list[Configuration]:
    """Group runs that differ only in their seed, in the order of the first of each, and score them.

    Raises:
        MsencError: predictions cannot be read, or runs were scored on other items.
    """
    groups: dict[tuple[str, ...], list[Run]] = defaultdict(list)
    for run in runs:
        groups[tuple(run.overrides.get(key, DEFAULT) for key in keys)].append(run)
    configurations = []
    for levels, group in groups.items():
        group = sorted(group, key=lambda run: run.seed)
        evaluations = [chosen[run.name] for run in group]
        paths = [evaluation.folder / "predictions.jsonl" for evaluation in evaluations]
        items = [read_items(path) if path.exists() else None for path in paths]
        configurations.append(Configuration(dict(zip(keys, levels, strict=True)), group, evaluations, items))
    _refuse_other_items(configurations)
    for configuration in configurations:
        _score(configuration)
    return configurations


def _refuse_other_items(configurations: Iterable[Configuration]) -> None:
    first: tuple[Run, Items] | None = None
    for configuration in configurations:
        for run, items in zip(configuration.runs, configuration.items, strict=True):
            if items is None:
                continue
            if first is None:
                first = run, items
            odd = sorted(set(first[1].ids) ^ set(items.ids))[:3]
            if odd:
                raise MsencError(
                    f"{first[0].name} and {run.name} were not scored on the same items: {len(first[1].ids)} and "
                    f"{len(items.ids)} predictions, and only one has {', '.join(f'{d} turn {t}' for d, t in odd)}. "
                    "Evaluate both again with the same split and limit."
                )


def _score(configuration: Configuration) -> None:
    names = dict.fromkeys(name for e in configuration.evaluations for name in table_metrics(e.metrics))
    for name in names:
        values = values_of(configuration.evaluations, name)
        if _have_items([configuration], name):
            items = [i for i in configuration.items if i is not None]
            effect = paired_effect(*_stacked(items, name))
        elif name == "perplexity" and _have_items([configuration], "nll"):
            nll = paired_effect(*_stacked([i for i in configuration.items if i is not None], "nll"))
            effect = Effect(math.fsum(values) / len(values), math.exp(nll.low), math.exp(nll.high), math.nan)
        else:
            configuration.over_seeds.add(name)
            effect = paired_effect(*_of_seeds(values))
            if len(values) == 1:
                effect = Effect(effect.mean, math.nan, math.nan, math.nan)
        configuration.scores[name] = effect


def table_metrics(metrics: dict[str, float]) -> dict[str, float]:
    """The metrics of an evaluation that a report compares; shares recovered are in percent, as their name says."""
    hidden = ("targets", "tokens", "references_empty", "speech/spoken", "control/", "nll/", "planted/", "description/")
    main = {n: v for n, v in metrics.items() if not n.startswith(hidden)}
    shares = {n: v for n, v in metrics.items() if n.startswith("planted/") and n.endswith("/recovered")}
    described = {n: v for n, v in metrics.items() if n in ("description/accuracy", "description/macro_f1")}
    return main | {f"{name} %": 100 * value for name, value in shares.items()} | described


def values_of(evaluations: Iterable[Evaluation], metric: str) -> list[float]:
    """A metric of those evaluations that have it."""
    found = (table_metrics(e.metrics).get(metric) for e in evaluations)
    return [value for value in found if value is not None]


def metric_order(name: str) -> tuple[int, str]:
    """Sort key: the main metrics, of whatever tokenizer, then planted bits, then all others by name."""
    order = [*MAIN_METRICS, *(f"planted/{kind}/recovered %" for kind in PLANTED_KINDS)]
    plain = name.partition("-")[0]
    return (order.index(plain), name) if plain in order else (len(order), name)


def _have_items(configurations: Sequence[Configuration], metric: str) -> bool:
    """Whether the metric is the mean of all runs' items; BLEU of other words than these is not."""
    for configuration in configurations:
        for items, evaluation in zip(configuration.items, configuration.evaluations, strict=True):
            if items is None or metric not in items.values:
                return False
            found = float(np.average(items.values[metric], weights=items.weights[metric]))
            if not math.isclose(found, table_metrics(evaluation.metrics).get(metric, found), abs_tol=1e-4):
                return False
    return True


def _stacked(items: Sequence[Items], metric: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Values, dialogues, weights and runs of several runs' items."""
    return (
        np.concatenate([i.values[metric] for i in items]),
        np.concatenate([i.dialogues for i in items]),
        np.concatenate([i.weights[metric] for i in items]),
        np.repeat(np.arange(len(items)), [len(i.ids) for i in items]),
    )


def _of_seeds(values: Sequence[float]) -> tuple[np.ndarray, list[str], None, np.ndarray]:
    """A corpus-level value varies between runs but not between dialogues: use two equal dialogues."""
    return (
        np.repeat(np.asarray(values, dtype=float), 2),
        ["one", "two"] * len(values),
        None,
        np.repeat(range(len(values)), 2),
    )


# ---------------------------------------------------------------------------------------------------- comparisons


def pairs_to_compare(configurations: Sequence[Configuration]) -> list[tuple[str, Configuration, Configuration]]:
    """(key, treated, baseline) of every comparison in a sweep.

    Values of a key are compared with all other keys equal: each modality with the one that lacks one of its
    streams, and the values of any other key with its default, or else its first value.
    """
    pairs = []
    keys = list(configurations[0].levels) if configurations else []
    for key in keys:
        groups: dict[tuple, list[Configuration]] = defaultdict(list)
        for c in configurations:
            groups[tuple((k, v) for k, v in c.levels.items() if k != key)].append(c)
        for group in groups.values():
            streams = [set(c.levels[key].split("_")) for c in group]
            if all(s <= STREAMS for s in streams):
                pairs += [
                    (key, a, b)
                    for (a, more), (b, fewer) in permutations(zip(group, streams, strict=True), 2)
                    if more > fewer and len(more - fewer) == 1
                ]
                continue
            base = next((c for c in group if c.levels[key] == DEFAULT), group[0])
            pairs += [(key, c, base) for c in group if c is not base]
    return pairs


def compare(
    configurations: Sequence[Configuration],
    metrics: Sequence[str],
    margins: Mapping[str, float] | None = None,
    floor: Floor | None = None,
) -> tuple[list[Comparison], list[str]]:
    """Test every pair on every metric.

    Args:
        configurations: of the sweep.
        metrics: in order.
        margins: metric -> what counts as no difference; where none is given, what `floor` says.
        floor: how far runs are apart that are alike but for the seed.

    Returns:
        Comparisons, by metric; and what could not be compared, and why.
    """
    pairs = pairs_to_compare(configurations)
    comparisons, notes = [], []
    for metric in metrics:
        if metric == "perplexity":  # same as nll
            continue
        found = []
        for key, treated, baseline in pairs:
            if not (metric in treated.scores and metric in baseline.scores):
                continue
            if _weights_differ(treated, baseline, metric):
                notes.append(
                    f"{metric} of {treated.name} and {baseline.name} is not compared: their tokenizers split the same "
                    "words into different tokens."
                )
                continue
            found.append((key, treated, baseline, *difference_of(treated, baseline, metric)))
        adjusted = holm([effect.p_value for *_, effect, _, _ in found])
        tests = sum(not math.isnan(p) for p in adjusted)
        for (key, treated, baseline, effect, size, spread), p in zip(found, adjusted, strict=True):
            noise = floor.smallest(metric, (len(treated.runs), len(baseline.runs))) if floor else math.nan
            margin = (margins or {}).get(metric, noise)
            detectable, needed = math.nan, None
            if spread is not None and p >= ALPHA:
                detectable = spread.detectable(alpha=ALPHA / tests)
                needed = (
                    spread.seeds_needed(margin, alpha=ALPHA / tests) if margin > 0 and max(spread.seeds) > 1 else None
                )
            comparisons.append(
                Comparison(key, treated.name, baseline.name, metric, effect, p, size, detectable, margin, needed, noise)
            )
    return comparisons, notes


def difference_of(treated: Configuration, baseline: Configuration, metric: str) -> tuple[Effect, float, Spread | None]:
    """The difference on a metric, in the items' standard deviations as well, and its variances; None without items."""
    sides = (treated, baseline)
    if _have_items(sides, metric):
        stacked = [_stacked([i for i in side.items if i is not None], metric) for side in sides]
        values, dialogues, weights, runs = zip(*stacked, strict=True)
        effect = unpaired_effect(*values, clusters=dialogues, weights=weights, runs=runs)
        first, second = (np.mean([i.values[metric] for i in side.items if i is not None], axis=0) for side in sides)
        weight = treated.items[0].weights[metric] if treated.items[0] is not None else 0.0
        spread = math.sqrt(
            np.average((first - second - np.average(first - second, weights=weight)) ** 2, weights=weight)
        )
        size = effect.mean / spread if spread > 0 else math.nan
        return effect, size, spread_of(*values, clusters=dialogues, weights=weights, runs=runs)
    measured = [values_of(side.evaluations, metric) for side in sides]
    values, dialogues, weights, runs = zip(*map(_of_seeds, measured), strict=True)
    effect = unpaired_effect(*values, clusters=dialogues, weights=weights, runs=runs)
    # No test: with seeds only, it would say nothing about other dialogues.
    limits = (effect.low, effect.high) if max(map(len, measured)) > 1 else (math.nan, math.nan)
    return Effect(effect.mean, *limits, math.nan), math.nan, None


def leaders(
    configurations: Sequence[Configuration], metrics: Sequence[str], comparisons: Sequence[Comparison]
) -> dict[str, Configuration]:
    """Metric -> the best configuration, where its difference to the next is significant.

    A pair that the report does not compare is tested as one more of its comparisons.
    """
    found = {}
    for metric in metrics:
        tested = "nll" if metric == "perplexity" else metric
        direction = direction_of(metric)
        scored = [c for c in configurations if tested in c.scores and not math.isnan(c.scores[tested].mean)]
        if not direction or len(scored) < 2:
            continue
        best, following = sorted(scored, key=lambda c: -direction * c.scores[tested].mean)[:2]
        family = [c for c in comparisons if c.metric == tested]
        adjusted = [c.adjusted for c in family if {c.treated, c.baseline} == {best.name, following.name}]
        if not adjusted and not _weights_differ(best, following, tested):
            effect, _, _ = difference_of(best, following, tested)
            adjusted = holm([*(c.effect.p_value for c in family), effect.p_value])[-1:]
        if adjusted and adjusted[0] < ALPHA:
            found[metric] = best
    return found


def _weights_differ(treated: Configuration, baseline: Configuration, metric: str) -> bool:
    weights = [i.weights[metric] for side in (treated, baseline) for i in side.items if i and metric in i.weights]
    return any(not np.array_equal(weights[0], other) for other in weights[1:])


# ---------------------------------------------------------------------------------------------------- controls


def judge_controls(configurations: Sequence[Configuration], split: str) -> tuple[list[Verdict], list[str]]:
    """The controls' verdicts, over all seeds of a configuration; and notes on missing ones."""
    verdicts, notes = [], []
    for configuration in configurations:
        controls: dict[str, list[tuple[Run, Items, Items, str]]] = defaultdict(list)
        for run, plain, items in zip(configuration.runs, configuration.evaluations, configuration.items, strict=True):
            newest = {}
            for e in sorted(run.evaluations, key=lambda e: e.written):
                if e.control and e.split == split and e.data == plain.data:
                    newest[e.control] = e
            for control, e in newest.items():
                path = e.folder / "predictions.jsonl"
                if items is None or not path.is_file():
                    notes.append(f"The control {control} of {run.name} has no predictions, so it is not judged here.")
                    continue
                controlled = read_items(path)
                if controlled.ids != items.ids:
                    notes.append(f"The control {control} of {run.name} was measured on other items, so it is excluded.")
                    continue
                controls[control].append((run, controlled, items, e.verdict or "not said"))
        for control, measured in controls.items():
            differences = np.concatenate([c.values["nll"] - i.values["nll"] for _, c, i, _ in measured])
            _, dialogues, weights, runs = _stacked([i for _, _, i, _ in measured], "nll")
            effect = paired_effect(differences, dialogues, weights, runs)
            verdicts.append(
                Verdict(configuration.name, control, effect, verdict(effect), {r.seed: v for r, _, _, v in measured})
            )
    return verdicts, notes
