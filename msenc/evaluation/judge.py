"""Replies judged in pairs, by an LLM: a system's against another's, or against what was said in the data.

Each pair is asked in both orders, so that a judge who prefers a place gives both replies the same. How much it prefers
the first place, or the longer reply, is measured on pairs built in, whose replies are equally good, and stands beside
every score.
"""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from msenc.data.datamodule import DialogueDataModule
from msenc.evaluation.losses import read_predictions
from msenc.evaluation.metrics.judge import CRITERIA, VERSION, Judge, Turn, parse_verdict, question
from msenc.evaluation.statistics import Effect, paired_effect
from msenc.types import MsencError, Reply
from msenc.work.console import console

MOST_TURNS = 20
"""Of a history that the judge reads, the last ones."""

_SAID = (
    "My dog died on Sunday.",
    "I got the job!",
    "I failed the exam again.",
    "We are getting married in May.",
    "Nobody came to my birthday.",
    "They took my bike while I was in the shop.",
    "I finally finished the marathon.",
    "My boss shouted at me in front of everyone.",
    "I have to move out by Friday.",
    "My sister is out of hospital.",
    "I can't sleep these days.",
    "She never answered my letter.",
    "I am so nervous about tomorrow.",
    "The test came back clear.",
    "I broke my mother's favourite vase.",
    "He said I was his best friend.",
    "The flight is cancelled, and I'm stuck here.",
    "I painted the whole kitchen on my own.",
    "I don't know what to do with my life.",
    "My grandmother turned a hundred today.",
    "The landlord raised the rent again.",
    "I told them the truth at last.",
    "It rained on every day of our holiday.",
    "My son took his first steps.",
)
_ALIKE = (
    ("I hear you. How are you feeling about it now?", "I understand. What is it like for you right now?"),
    ("Thank you for telling me. Do you want to talk about it?", "I'm glad you told me. Shall we talk about it?"),
    ("Oh, that must be a lot to take in. What happened next?", "That sounds like a lot at once. What came after that?"),
)
"""Equally good replies to whatever has been said."""
_WORDS = (
    "Well, you know, what I would like to say to you at this point is simply this, if I may put it that way: {} And "
    "that is really what I wanted to say to you about all of this, as far as I can say anything about it at all."
)
"""What makes a reply long, and adds nothing to it."""

Pair = tuple[Sequence[Turn], Reply, Reply]
"""History, and the replies that are compared."""


def built_in_pairs() -> dict[str, list[Pair]]:
    """Bias -> pairs of equally good replies: ``first``: in other words; ``longer``: the second one is longer."""
    pairs: dict[str, list[Pair]] = {"first": [], "longer": []}
    for number, said in enumerate(_SAID):
        history, (one, other) = [Turn("A", said)], map(Reply, _ALIKE[number % len(_ALIKE)])
        pairs["first"].append((history, one, other))
        pairs["longer"].append((history, one, Reply(_WORDS.format(one.text))))
    return pairs


def judge_replies(
    judge: Judge,
    datamodule: DialogueDataModule,
    split: str,
    predictions: Sequence[Mapping[str, Any]],
    against: Mapping[tuple[str, int], Reply] | None = None,
) -> dict[str, Any]:
    """Judge the replies of an evaluation; each one's scores are added to its ``scores``.

    Args:
        judge: whom to ask.
        datamodule: of the run.
        split: that was evaluated.
        predictions: one per target, with replies.
        against: (dialogue, turn) -> the reply of another system; None: what was said in the data.

    Returns:
        ``judge/empathy`` and ``judge/fit``, the share of pairs that the run's reply wins (a tie is half a win);
        ``judge/inconsistent``, the share of verdicts that the other order contradicts; ``judge/bias/first`` and
        ``judge/bias/longer``, the share of verdicts for the first place and for the longer reply in pairs of equally
        good ones (0.5 is none); and ``judge``: intervals, counts, and what was asked.

    Raises:
        MsencError: as `Judge` does; or no pair has a verdict in both orders.
    """
    is_described = datamodule.tokenizer.prompt.target == "text_description"
    pairs, owners = [], []
    histories = _histories(datamodule, split, predictions)
    for item, history in zip(predictions, histories, strict=True):
        said = Reply(item["reference"]["text"], item["reference"]["description"] if is_described else None)
        other = said if against is None else against[item["dialogue"], item["turn"]]
        if other.text.strip():
            pairs.append((history, Reply(item["reply"]["text"], item["reply"]["description"]), other))
            owners.append(item)
    built_in = built_in_pairs()
    every = [*built_in["first"], *built_in["longer"], *pairs]
    verdicts, nonsense = _ask_all(judge, every)
    num_built_in = len(built_in["first"])
    first, longer, own = np.split(verdicts, [num_built_in, 2 * num_built_in])  # (N, 2 orders, C), NaN without an answer
    biases = {"first": _place(np.concatenate([first, longer])), "longer": 1 - _wins(longer)}
    wins = _wins(own)  # (N, C)
    for item, scores in zip(owners, wins, strict=True):
        if np.isfinite(scores).all():
            item["scores"] |= {f"judge/{name}": float(score) for name, score in zip(CRITERIA, scores, strict=True)}
    known = np.isfinite(wins).all(axis=1)
    if not known.any() or not all(np.isfinite(bias).any() for bias in biases.values()):
        raise MsencError(
            f"metric judge: {judge.name} has given no pair a verdict in both orders: {judge.failed} questions failed"
            f"{f' ({judge.last_failure})' if judge.last_failure else ''}, {nonsense} answers were no verdict. Expected "
            'a model that answers with {"empathy": "A", "fit": "B"}.'
        )
    dialogues = [item["dialogue"] for item, is_known in zip(owners, known, strict=True) if is_known]
    effects = {name: paired_effect(wins[known, place], dialogues) for place, name in enumerate(CRITERIA)}
    for name, bias in biases.items():
        sure = np.isfinite(bias).all(axis=1)
        effects[f"bias/{name}"] = paired_effect(bias[sure].mean(axis=1), np.flatnonzero(sure))
    contradicts = np.abs(own[:, 0] - (1 - own[:, 1])) > 0.5  # one order for the one reply, one for the other
    return {
        **{f"judge/{name}": effect.mean for name, effect in effects.items()},
        "judge/inconsistent": float(contradicts[known].mean()),
        "judge": {
            "model": judge.name,
            "version": VERSION,
            "against": "the data's own replies" if against is None else "another system's replies",
            "pairs": int(known.sum()),
            "left_out": len(predictions) - int(known.sum()),
            "asked": judge.asked,
            "failed": judge.failed,
            "last_failure": judge.last_failure,
            "no_verdict": nonsense,
            "intervals": {name: asdict(effect) for name, effect in effects.items()},
        },
    }


def judge_lines(found: Mapping[str, Any]) -> list[str]:
    """What `judge_replies` has found, in words: scores never without the biases of who gave them."""
    facts = found["judge"]
    lines = [
        f"Judged by {facts['model']} (question {facts['version']}) against {facts['against']}, {facts['pairs']:,} "
        "pairs in both orders:"
    ]
    effects = {name: Effect(**effect) for name, effect in facts["intervals"].items()}
    lines += [f"  {name}: wins {_share(effects[name])}" for name in CRITERIA]
    lines += [
        f"  its bias, on {2 * len(_SAID)} built-in pairs (50 % is none): the first place "
        f"{_share(effects['bias/first'])}, the longer reply {_share(effects['bias/longer'])}",
        f"  {100 * found['judge/inconsistent']:.1f} % of verdicts are contradicted by the other order",
    ]
    if any(facts[key] for key in ("left_out", "failed", "no_verdict")):
        why = f" (the last one: {facts['last_failure']})" if facts["last_failure"] else ""
        lines.append(
            f"  without a verdict: {facts['left_out']:,} replies; {facts['failed']:,} questions failed{why}, "
            f"{facts['no_verdict']:,} answers were no verdict"
        )
    return lines


def _share(effect: Effect) -> str:
    return f"{100 * effect.mean:.1f} % [{100 * effect.low:.1f}, {100 * effect.high:.1f}]"


def read_replies(folder: Path, split: str, predictions: Sequence[Mapping[str, Any]]) -> dict[tuple[str, int], Reply]:
    """The replies of another system to the same targets: of an evaluation's folder, or of a run's newest one.

    Raises:
        MsencError: there is none of the split with replies to all targets.
    """
    wanted = {(item["dialogue"], item["turn"]) for item in predictions}
    places = [folder] if (folder / "predictions.jsonl").is_file() else [*folder.glob(f"evaluation/*-{split}-*")]
    places = [place for place in places if (place / "predictions.jsonl").is_file()]
    for place in sorted(places, key=lambda place: (place / "predictions.jsonl").stat().st_mtime, reverse=True):
        rows = [row for row in read_predictions(place) if row.get("reply")]
        found = {
            (row["dialogue"], row["turn"]): Reply(row["reply"]["text"], row["reply"].get("description")) for row in rows
        }
        if wanted <= found.keys():
            return found
    raise MsencError(
        f"metric_settings.judge.against={folder}: found {len(places)} evaluations of {split} there, none with replies "
        f"to all {len(wanted):,} targets. Evaluate that run on the same data: evaluate.py run_dir={folder} "
        f"split={split}"
    )


def _histories(
    datamodule: DialogueDataModule, split: str, predictions: Sequence[Mapping[str, Any]]
) -> list[list[Turn]]:
    """What the replies' model has read of each dialogue, or the end of it."""
    dataset = datamodule.dataset(split)
    wanted = {item["dialogue"] for item in predictions}
    turns = {
        id: [Turn(u.speaker, u.text, u.description) for u in dataset.dialogue(index).utterances]
        for index, id in enumerate(dataset.ids)
        if id in wanted
    }
    return [
        turns[item["dialogue"]][max(item["history"][0], item["turn"] - MOST_TURNS) : item["turn"]]
        for item in predictions
    ]


def _ask_all(judge: Judge, pairs: Sequence[Pair]) -> tuple[np.ndarray, int]:
    """Verdicts (N, 2 orders, C) for the reply in the first place; NaN without one. And the number of other answers."""
    questions = [question(h, *order) for h, a, b in pairs for order in ((a, b), (b, a))]
    keys = [json.dumps(messages) for messages in questions]
    distinct = dict(zip(keys, questions, strict=True))  # equal replies make equal questions
    judge(questions[0])  # what would be refused of every question is refused before they are all under way
    with ThreadPoolExecutor(judge.num_workers) as pool:
        answered = track(pool.map(judge, distinct.values()), "judging", len(distinct), console=console, transient=True)
        known = dict(zip(distinct, answered, strict=True))
    answers = [known[key] for key in keys]
    nonsense, verdicts = 0, np.full((len(questions), len(CRITERIA)), np.nan)
    for row, answer in zip(verdicts, answers, strict=True):
        if answer is not None and (verdict := parse_verdict(answer)) is not None:
            row[:] = [verdict[criterion] for criterion in CRITERIA]
        else:
            nonsense += answer is not None
    return verdicts.reshape(len(pairs), 2, -1), nonsense


def _wins(verdicts: np.ndarray) -> np.ndarray:
    """(N, 2, C) -> (N, C): how the pair's first reply does, over both orders."""
    return (verdicts[:, 0] + 1 - verdicts[:, 1]) / 2


def _place(verdicts: np.ndarray) -> np.ndarray:
    """(N, 2, C) -> (N, C): how the first place does, over both orders."""
    return verdicts.mean(axis=1)
