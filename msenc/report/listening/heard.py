"""Listeners' answers -> what they prefer, with intervals and tests, and how far they agree.

Listeners and dialogues are both drawn at random, and every listener judges every item. So the answers are a table of
listeners by dialogues, as the values of a configuration are one of runs by dialogues, and `evaluation.statistics`
applies with listeners in the place of runs.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from msenc.evaluation.power import ALPHA
from msenc.evaluation.statistics import Effect, holm, paired_effect
from msenc.report.listening.answers import Listener
from msenc.report.listening.study import BACKWARD, QUESTIONS, Study, Trial
from msenc.types import MsencError, needing

MAX_WRONG = 1
"""Attention checks that a listener may fail. Whoever always chooses one side fails half of them."""

CONFIDENCE = 0.95
SAME = "same"
TITLES = {
    "ab": "What listeners prefer: % of answers for the first of the two, with half of those that say 'no difference'; "
    "50 is no preference",
    "rating": "Listeners' ratings, 1 to 5, and their differences",
}
METHOD = (
    "95 % confidence intervals over listeners and dialogues; * p < 0.05 after Holm's correction over the comparisons "
    "of a question"
)


@dataclass(frozen=True)
class Judgement:
    """One question about one comparison, or about one configuration that is rated.

    Args:
        question: of `QUESTIONS`.
        treated: a configuration.
        baseline: the other, or None for a mean rating.
        effect: of A/B, the share of answers for `treated`; of ratings, the mean or the difference of means. The p-value
            is that of "no preference" (a share of 0.5, a difference of 0); NaN for a mean.
        adjusted: p-value after Holm's correction; NaN if not tested.
        ties: share of answers "no difference"; NaN of ratings.
        dialogues: that were heard.
    """

    question: str
    treated: str
    baseline: str | None
    effect: Effect
    ties: float
    dialogues: int
    adjusted: float = math.nan


@dataclass(frozen=True)
class Heard:
    """What a study's listeners said.

    Args:
        kind: ``ab`` or ``rating``.
        judgements: by comparison, then by question.
        agreement: question -> Krippendorff's alpha (ordinal); NaN where it is not defined or not computed.
        listeners: number of those who passed the attention checks.
        notes: on listeners and files that were left out, and on what the intervals cover.
    """

    kind: str
    judgements: list[Judgement]
    agreement: dict[str, float]
    listeners: int
    notes: list[str] = field(default_factory=list)


def judge(study: Study, listeners: Sequence[Listener], problems: Sequence[str] = ()) -> Heard:
    """Evaluate the answers to a page.

    Args:
        study: its key.
        listeners: who finished.
        problems: files that were left out.

    Raises:
        MsencError: nobody passed the attention checks.
    """
    wrong = {listener.code: _wrong_checks(study, listener) for listener in listeners}
    num_checks = sum(trial["is_check"] for trial in study["trials"])
    kept = [listener for listener in listeners if wrong[listener.code] <= MAX_WRONG]
    failed = [f"{code} (failed {count} of {num_checks})" for code, count in wrong.items() if count > MAX_WRONG]
    if not kept:
        raise MsencError(f"answers: no listener passed the attention checks: {', '.join(failed)}.")
    trials = [trial for trial in study["trials"] if not trial["is_check"]]
    judgements = (_preferences if study["kind"] == "ab" else _ratings)(study, trials, kept)
    agreement, unknown = _agreement(study, trials, kept)
    minutes = sorted(listener.minutes for listener in kept)
    seeds = ", ".join(f"{name} {seed}" for name, seed in study["seeds"].items())
    notes = [
        f"{len(kept)} listeners, {len(trials)} trials each, in {minutes[len(minutes) // 2]:.0f} minutes (median).",
        f"The replies are those of one seed each ({seeds}): other seeds may sound different.",
    ]
    if len(kept) == 1:
        notes.append("One listener: the intervals cover dialogues alone, and say nothing about other listeners.")
    if failed:
        notes.append(f"Excluded for inattention: {', '.join(failed)}.")
    return Heard(
        study["kind"],
        _corrected(judgements),
        agreement,
        len(kept),
        [*notes, *unknown, *(f"Left out: {p}" for p in problems)],
    )


def _wrong_checks(study: Study, listener: Listener) -> int:
    """A check is passed if what plays forwards is preferred in most questions, and in none what plays backwards."""
    wrong = 0
    for trial in study["trials"]:
        if not trial["is_check"]:
            continue
        (backward,) = [sound["id"] for sound in trial["sounds"] if sound["of"] == BACKWARD]
        better = worse = 0
        for question in QUESTIONS:
            answer = listener.answers[trial["id"], question]
            if beside := trial.get("beside"):
                difference = int(listener.answers[beside, question]) - int(answer)
            else:
                difference = 0 if answer == SAME else 1 - 2 * (answer == backward)
            better, worse = better + (difference > 0), worse + (difference < 0)
        wrong += worse > 0 or 2 * better <= len(QUESTIONS)
    return wrong


# ---------------------------------------------------------------------------------------------------- judgements


def _values(
    trials: Sequence[Trial], listeners: Sequence[Listener], value: Callable[[Trial, Listener], float]
) -> tuple[np.ndarray, list[str], list[int]]:
    """Of each listener and trial: the value, the dialogue, the listener."""
    cells = [(value(t, one), t["dialogue"], n) for n, one in enumerate(listeners) for t in trials]
    values, dialogues, numbers = zip(*cells, strict=True)
    return np.array(values, dtype=float), list(dialogues), list(numbers)


def _preference(trial: Trial, listener: Listener, question: str) -> float:
    """1 for the first configuration of the trial's pair, 0 for the other, 0.5 for neither."""
    answer = listener.answers[trial["id"], question]
    return 0.5 if answer == SAME else float(answer == trial["sounds"][0]["id"])


def _preferences(study: Study, trials: Sequence[Trial], listeners: Sequence[Listener]) -> list[Judgement]:
    found = []
    for group, (treated, baseline) in enumerate(study["pairs"]):
        own = [_turned(trial, treated) for trial in trials if trial["group"] == group]
        for question in QUESTIONS:
            values, dialogues, numbers = _values(own, listeners, lambda t, one, q=question: _preference(t, one, q))
            effect = paired_effect(values - 0.5, dialogues, runs=numbers, confidence=CONFIDENCE)
            share = _share(effect, min(len(set(dialogues)), len(listeners)))
            ties = float((values == 0.5).mean())
            found.append(Judgement(question, treated, baseline, share, ties, len(set(dialogues))))
    return found


def _turned(trial: Trial, treated: str) -> Trial:
    """A trial with the sound of `treated` first."""
    return {**trial, "sounds": sorted(trial["sounds"], key=lambda sound: sound["of"] != treated)}


def _share(effect: Effect, independent: int) -> Effect:
    """A share from its distance to a half.

    Where all agree, nothing spreads: the interval is the exact one of as many independent answers as there are
    dialogues or listeners, whichever are fewer.
    """
    low, high, p_value = effect.low, effect.high, effect.p_value
    if low == high and effect.mean != 0:
        width = 1 - ((1 - CONFIDENCE) / 2) ** (1 / independent)
        low, high, p_value = effect.mean - width, effect.mean + width, 2 * 0.5**independent
    if math.isnan(low):
        return replace(effect, mean=effect.mean + 0.5)
    return Effect(effect.mean + 0.5, max(low + 0.5, 0.0), min(high + 0.5, 1.0), min(p_value, 1.0))


def _ratings(study: Study, trials: Sequence[Trial], listeners: Sequence[Listener]) -> list[Judgement]:
    by_configuration: dict[str, dict[tuple[str, int], Trial]] = {}
    for trial in trials:
        by_configuration.setdefault(trial["sounds"][0]["of"], {})[trial["dialogue"], trial["turn"]] = trial
    found = []
    for name, own in by_configuration.items():
        for question in QUESTIONS:
            values, dialogues, numbers = _values(
                [*own.values()], listeners, lambda t, one, q=question: float(one.answers[t["id"], q])
            )
            effect = paired_effect(values, dialogues, runs=numbers, confidence=CONFIDENCE)
            effect = replace(effect, p_value=math.nan)
            found.append(Judgement(question, name, None, effect, math.nan, len(set(dialogues))))
    for treated, baseline in study["pairs"]:
        first, second = by_configuration[treated], by_configuration[baseline]
        for question in QUESTIONS:

            def difference(
                trial: Trial, one: Listener, q: str = question, second: Mapping[Any, Trial] = second
            ) -> float:
                other = second[trial["dialogue"], trial["turn"]]
                return float(one.answers[trial["id"], q]) - float(one.answers[other["id"], q])

            values, dialogues, numbers = _values([*first.values()], listeners, difference)
            effect = paired_effect(values, dialogues, runs=numbers, confidence=CONFIDENCE)
            found.append(Judgement(question, treated, baseline, effect, math.nan, len(set(dialogues))))
    return found


def _corrected(judgements: Sequence[Judgement]) -> list[Judgement]:
    adjusted = {}
    for question in QUESTIONS:
        places = [n for n, j in enumerate(judgements) if j.question == question]
        adjusted |= dict(zip(places, holm([judgements[n].effect.p_value for n in places]), strict=True))
    return [replace(j, adjusted=adjusted[n]) for n, j in enumerate(judgements)]


def _agreement(
    study: Study, trials: Sequence[Trial], listeners: Sequence[Listener]
) -> tuple[dict[str, float], list[str]]:
    """Krippendorff's alpha over all trials."""
    try:
        with needing("The agreement of listeners", "listen"):
            import krippendorff
    except MsencError as error:
        return dict.fromkeys(QUESTIONS, math.nan), [f"Not computed: {error}"]
    found = {}
    for question in QUESTIONS:
        if study["kind"] == "ab":
            turned = [_turned(trial, study["pairs"][trial["group"]][0]) for trial in trials]
            table = [[_preference(t, one, question) for t in turned] for one in listeners]
        else:
            table = [[float(one.answers[t["id"], question]) for t in trials] for one in listeners]
        is_defined = len(listeners) > 1 and len({value for row in table for value in row}) > 1
        found[question] = (
            float(krippendorff.alpha(reliability_data=table, level_of_measurement="ordinal"))
            if is_defined
            else math.nan
        )
    return found, []


# ---------------------------------------------------------------------------------------------------- as text


def heard_grid(heard: Heard, names: Mapping[str, str]) -> list[list[str]]:
    """Header and rows: a row per comparison or configuration, then the agreement; a column per question."""
    rows: dict[tuple[str, str | None], list[str]] = {}
    for j in heard.judgements:
        rows.setdefault((j.treated, j.baseline), []).append(_cell(heard.kind, j))

    def label(treated: str, baseline: str | None) -> str:
        between = " over " if heard.kind == "ab" else " - "
        return between.join(names.get(name, name) for name in (treated, baseline) if name is not None)

    agreement = [f"{alpha:.2f}" if math.isfinite(alpha) else "-" for alpha in heard.agreement.values()]
    return [
        [f"{heard.listeners} listeners", *QUESTIONS],
        *([label(*pair), *cells] for pair, cells in rows.items()),
        ["agreement (Krippendorff's alpha)", *agreement],
    ]


def _cell(kind: str, j: Judgement) -> str:
    e, star = j.effect, " *" if j.adjusted < ALPHA else ""
    if kind == "ab":
        interval = "" if math.isnan(e.low) else f" [{100 * e.low:.1f}, {100 * e.high:.1f}]"
        ties = f"\nno difference: {100 * j.ties:.0f} %" if j.ties else ""
        return f"{100 * e.mean:.1f}{interval}{star}{ties}"
    sign = "" if j.baseline is None else "+"
    interval = "" if math.isnan(e.low) else f" [{e.low:{sign}.2f}, {e.high:{sign}.2f}]"
    return f"{e.mean:{sign}.2f}{interval}{star}"


def heard_rows(heard: Heard) -> list[dict[str, object]]:
    """The same as rows of a CSV file, unrounded."""

    def known(value: float) -> float | str:
        return value if math.isfinite(value) else ""

    return [
        {
            "kind": heard.kind,
            "treated": j.treated,
            "baseline": j.baseline or "",
            "question": j.question,
            "estimate": j.effect.mean,
            "low": known(j.effect.low),
            "high": known(j.effect.high),
            "p_value": known(j.effect.p_value),
            "p_value_holm": known(j.adjusted),
            "no_difference": known(j.ties),
            "listeners": heard.listeners,
            "dialogues": j.dialogues,
            "alpha": known(heard.agreement[j.question]),
        }
        for j in heard.judgements
    ]
