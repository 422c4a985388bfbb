"""Does a run follow the words, the voice or the face where they contradict each other?

items of `data.conflict` -> how much likelier either reply is under either contradiction -> shares with intervals

With the words w and the voice v of a turn, and w' and v' of one whose label differs, R and R' the replies that are
consistent with either:

    log p(R | w, v') - log p(R' | w, v')    the same words in a contradicting voice
    log p(R | w', v) - log p(R' | w', v)    the same voice with contradicting words

Whatever makes R likelier than R' in both (its length, its wording, the dialogue) cancels in the difference of the two,
which is above 0 if the words decide, and below 0 if the voice does.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device

from msenc.data.batches import share
from msenc.data.conflict import PLANTED, ConflictItem, ConflictSamples
from msenc.data.datamodule import DialogueDataModule
from msenc.data.loader import make_loader
from msenc.evaluation.losses import AGAIN
from msenc.evaluation.statistics import Effect, paired_effect
from msenc.files import read_json_lines, write_json, write_text
from msenc.files.kinds import Count
from msenc.models.conversation import ConversationModel
from msenc.work.group import ALONE, Group
from msenc.work.progress import Bar

CONFLICT = "conflict.json"
ITEMS = "conflict.jsonl"
FOLLOWED = {"audio": "voice", "video": "face"}
"""Stream -> what of a speaker it shows."""


def evaluate_conflict(
    model: ConversationModel,
    datamodule: DialogueDataModule,
    split: str,
    items: Sequence[ConflictItem],
    group: Group = ALONE,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Measure what a run follows.

    Args:
        model: in eval mode, on its device.
        datamodule: of the run.
        split: ``train``, ``val`` or ``test``.
        items: of the split, from `find_conflicts`.
        group: processes that share the items out, each with its copy of the model.

    Returns:
        Per stream and label the shares of items (see `shares_of`), and one row per item.
    """
    samples = ConflictSamples(datamodule.dataset(split), items)
    own = share(range(len(items)), [1] * len(items), group.rank, group.size)
    size = datamodule.batch_size or 1
    batches = [own[start : start + size] for start in range(0, len(own), size)]
    collate = datamodule.collate_fn()
    loader = make_loader(samples, batches, lambda found: collate([one for four in found for one in four]), 0)

    def results() -> Iterator[tuple[int, list[float]]]:
        for numbers, batch in zip(batches, loader, strict=True):
            yield from zip(numbers, _losses(model, batch), strict=True)

    doing = f"conflict on {split}"
    losses = dict(group.gather(results(), len(items), Bar(), doing))
    rows = []
    for number, item in enumerate(items):
        own_by_stream, other_by_stream, own_by_words, other_by_words = losses[number]
        nats = (other_by_stream - own_by_stream) - (other_by_words - own_by_words)
        rows.append(
            {
                "stream": item.stream,
                "label": item.label,
                "compared": item.compared,
                "dialogue": samples.dialogues.ids[item.place[0]],
                "turn": item.place[1],
                "donor": [samples.dialogues.ids[item.donor[0]], item.donor[1]],
                "labels": list(item.values),
                "same_speaker": item.same_speaker,
                "nats": round(nats, 6),
            }
        )
    return shares_of([rows]), rows


@torch.inference_mode()
def _losses(model: ConversationModel, batch: Any) -> list[list[float]]:
    """The loss of each target, in nats, by fours."""
    device = next(model.parameters()).device
    with model.computing():
        nll = model(move_data_to_device(batch, device)).nll.double().cpu()
    sums = torch.zeros(len(batch.target_ids), dtype=nll.dtype).index_add(0, batch.targets, nll)
    return sums.reshape(-1, 4).tolist()


def shares_of(runs: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Rows of one or more runs on the same items -> per stream and label the share of items that follows the stream.

    Returns:
        ``stream``, ``label``, ``compared``, ``items``, ``dialogues``, ``same_speaker`` (a share of items),
        ``follows_stream`` and ``follows_words`` (shares of items, together 1), ``low`` and ``high`` of the first (95 %,
        over dialogues and runs), ``verdict``.

    Example:
        >>> row = {"stream": "audio", "label": "Emotion", "compared": "reply", "turn": 0, "same_speaker": True}
        >>> rows = [{**row, "dialogue": str(k), "nats": -1.0} for k in range(20)]
        >>> [(found["follows_stream"], round(found["low"], 2), found["verdict"]) for found in shares_of([rows])]
        [(1.0, 0.83, 'the voice')]
    """
    found = []
    for key in dict.fromkeys((row["stream"], row["label"], row["compared"]) for rows in runs for row in rows):
        chosen = [[r for r in rows if (r["stream"], r["label"], r["compared"]) == key] for rows in runs]
        flat = [(number, row) for number, rows in enumerate(chosen) for row in rows]
        values = [0.5 - 0.5 * np.sign(row["nats"]) for _, row in flat]
        dialogues = [row["dialogue"] for _, row in flat]
        effect = paired_effect(values, dialogues, runs=[number for number, _ in flat])
        low, high = _limits(effect, len(set(dialogues)))
        stream, label, compared = key
        found.append(
            {
                "stream": stream,
                "label": label,
                "compared": compared,
                "items": len(chosen[0]),
                "dialogues": len(set(dialogues)),
                "same_speaker": float(np.mean([row["same_speaker"] for _, row in flat])),
                "follows_stream": effect.mean,
                "follows_words": 1 - effect.mean,
                "low": low,
                "high": high,
                "verdict": verdict(stream, low, high),
            }
        )
    return found


def _limits(effect: Effect, dialogues: int) -> tuple[float, float]:
    """The interval of a share; where all items agree, the exact one of as many independent dialogues."""
    if effect.low == effect.high and effect.mean in (0.0, 1.0):
        width = 1 - 0.025 ** (1 / dialogues)
        return max(effect.mean - width, 0.0), min(effect.mean + width, 1.0)
    if math.isnan(effect.low):
        return effect.low, effect.high
    return max(effect.low, 0.0), min(effect.high, 1.0)


def verdict(stream: str, low: float, high: float) -> str:
    """What a run follows, by the interval of the share of items that follows the stream.

    Example:
        >>> verdict("video", 0.9, 1.0), verdict("audio", 0.0, 0.1), verdict("audio", 0.4, 0.6)
        ('the face', 'the words', 'not shown')
    """
    if low > 0.5:
        return f"the {FOLLOWED[stream]}"
    return "the words" if high < 0.5 else "not shown"


def conflict_cells(found: Iterable[Mapping[str, Any]]) -> list[list[str]]:
    """Header and a row per stream and label, as text; shares in percent."""
    rows = [
        [
            FOLLOWED[one["stream"]],
            one["compared"] if one["label"] == PLANTED else f"{one['label']}, {one['compared']}",
            f"{one['items']:,}",
            f"{100 * one['follows_stream']:.1f} [{100 * one['low']:.1f}, {100 * one['high']:.1f}]",
            f"{100 * one['follows_words']:.1f}",
            one["verdict"],
        ]
        for one in found
    ]
    return [["words against", "label, compared", "items", "voice or face [95 %]", "words", "follows"], *rows]


def write_conflict(folder: Path, settings: str, shares: Sequence[Mapping[str, Any]], rows: Sequence[Any]) -> None:
    """Write ``conflict.jsonl`` (a line per item), then ``conflict.json``, next to the evaluation's metrics."""
    write_text(folder / ITEMS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    write_json(folder / CONFLICT, {"settings": settings, "shares": list(shares)})


class _Row(TypedDict):
    """A line of ``conflict.jsonl``."""

    stream: Literal["audio", "video"]
    label: str
    compared: str
    dialogue: str
    turn: Count
    same_speaker: bool
    nats: float


def read_conflict(folder: Path) -> list[dict[str, Any]]:
    """The items that an evaluation's folder has, in order; none if it was not measured since the evaluation.

    Raises:
        MsencError: a line is invalid; names it.
    """
    path = folder / ITEMS
    if not path.is_file() or path.stat().st_mtime < (folder / "metrics.json").stat().st_mtime:
        return []
    return [row for _, row in read_json_lines(path, _Row, AGAIN)]
