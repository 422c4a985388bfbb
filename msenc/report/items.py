"""`predictions.jsonl` of one evaluation -> a value and a weight per metric and item, for paired comparisons."""

import math
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from msenc.evaluation.losses import AGAIN, read_predictions
from msenc.types import MsencError

ORDERS = 4
"""Of BLEU's n-grams."""

BIT = math.log(2)


@dataclass(frozen=True)
class Items:
    """N targets of an evaluation, in the order of (dialogue, turn).

    Args:
        ids: (dialogue, turn) of each.
        rows: the predictions themselves.
        values: metric -> (N,) its value for each item, per unit of weight.
        weights: metric -> (N,) the items' weights; the weighted mean of the values is the overall metric.
    """

    ids: list[tuple[str, int]]
    rows: list[dict[str, Any]]
    values: dict[str, np.ndarray]
    weights: dict[str, np.ndarray]

    @property
    def dialogues(self) -> np.ndarray:
        """(N,) the dialogue of each item."""
        return np.array([dialogue for dialogue, _ in self.ids])


def read_items(path: Path) -> Items:
    """Read one file of predictions.

    Raises:
        MsencError: it is empty, or a row is not as `evaluate.py` writes it; names the row.
    """
    rows = read_predictions(path.parent)
    for row in rows:
        if any(map(math.isnan, row["nll"])):
            raise MsencError(f"{path}: turn {row['turn']} of {row['dialogue']}: a token's loss is not finite. {AGAIN}")
    rows.sort(key=lambda row: (row["dialogue"], row["turn"]))
    ids = [(row["dialogue"], row["turn"]) for row in rows]
    twice = [here for here, following in pairwise(ids) if here == following]
    if twice:
        raise MsencError(f"{path}: turn {twice[0][1]} of {twice[0][0]} occurs twice. {AGAIN}")
    values, weights = _losses(rows)
    for name in dict.fromkeys(name for row in rows for name in row.get("scores") or {}):
        scores = [(row.get("scores") or {}).get(name) for row in rows]
        known = np.array([isinstance(s, int | float) and math.isfinite(s) for s in scores])
        if known.any():
            values[name] = np.array([s if k else 0.0 for s, k in zip(scores, known, strict=True)], dtype=float)
            weights[name] = known.astype(float)
    corpus, shares = _bleu(rows)
    return Items(ids, rows, values | corpus, weights | shares)


def _losses(rows: list[dict[str, Any]]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The metrics of `evaluation.loss_metrics`, for each item; shares of planted bits are in percent."""
    tokens = np.array([len(row["nll"]) for row in rows], dtype=float)
    nll = np.array([math.fsum(row["nll"]) for row in rows])
    correct = np.array([sum(row["correct"]) for row in rows], dtype=float)
    weight = np.maximum(tokens, 1)
    values = {"nll": nll / weight, "token_accuracy": correct / weight}
    weights = {"nll": tokens, "token_accuracy": tokens}
    for kind in dict.fromkeys(kind for row in rows for kind in row["bits"]):
        bits = np.array([float(row["bits"].get(kind, 0.0)) for row in rows])
        lost = np.array(
            [math.fsum(v for v, k in zip(row["nll"], row["kinds"], strict=True) if k == kind) / BIT for row in rows]
        )
        name = f"planted/{kind.removeprefix('planted_')}/recovered %"
        values[name] = 100 * (1 - np.divide(lost, bits, out=np.zeros_like(lost), where=bits > 0))
        weights[name] = bits
    return values, weights


def _bleu(rows: list[dict[str, Any]]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """BLEU-1..4 of all replies, and each dialogue's influence on it (the jackknife).

    BLEU is not a mean of items. The mean of these values over dialogues is the corpus BLEU, and their spread is
    its spread between dialogues; all items of a dialogue have the same value.

    Source: B. Efron and C. Stein, Annals of Statistics 9 (1981) 586-596.
    """
    if not all((row.get("reply") or {}).get("text") is not None and row.get("reference") for row in rows):
        return {}, {}
    counts = np.array([_counts(row["reply"]["text"].split(), row["reference"]["text"].split()) for row in rows])
    _, places, sizes = np.unique([row["dialogue"] for row in rows], return_inverse=True, return_counts=True)
    if len(sizes) < 2:
        return {}, {}
    by_dialogue = np.zeros((len(sizes), counts.shape[1]))
    np.add.at(by_dialogue, places, counts)
    total = by_dialogue.sum(axis=0)
    values = {}
    for n in range(1, ORDERS + 1):
        without = np.array([_bleu_of(total - own, n) for own in by_dialogue])
        influence = (len(sizes) - 1) * (without.mean() - without)
        values[f"bleu_{n}"] = (_bleu_of(total, n) + influence)[places]
    return values, dict.fromkeys(values, 1.0 / sizes[places])


def _counts(reply: list[str], reference: list[str]) -> list[int]:
    """Matching n-grams, and n-grams of the reply, of each order; words of the reply and of the reference."""
    matching, written = [], []
    for n in range(1, ORDERS + 1):
        own, wanted = (Counter(zip(*(words[i:] for i in range(n)), strict=False)) for words in (reply, reference))
        matching.append((own & wanted).total())
        written.append(own.total())
    return [*matching, *written, len(reply), len(reference)]


def _bleu_of(counts: np.ndarray, n: int) -> float:
    matching, written = counts[:n], counts[ORDERS : ORDERS + n]
    length, wanted = counts[-2:]
    if matching.min() == 0:
        return 0.0
    penalty = min(0.0, 1 - wanted / length)
    return float(np.exp(penalty + np.mean(np.log(matching / written))))
