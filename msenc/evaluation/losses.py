"""A model and a split -> metrics and predictions.

Every target is scored under teacher forcing (its own token losses) and, if wanted, generated freely.
"""

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NamedTuple, NotRequired, TypedDict

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device

from msenc.data.batches import share
from msenc.data.collate import Batch, histories
from msenc.data.controls import Control
from msenc.data.datamodule import DialogueDataModule
from msenc.evaluation.metrics.description import DescribedTarget, score_descriptions, voice_of
from msenc.evaluation.metrics.scores import Scorer
from msenc.evaluation.metrics.text import score_replies
from msenc.evaluation.replies import decoding_for, write_replies
from msenc.evaluation.statistics import paired_effect, verdict
from msenc.files import known_to_json, read_json, read_json_lines, write_json, write_text
from msenc.files.kinds import Count, Must, is_name
from msenc.models.conversation import ConversationModel
from msenc.prompt import TOKEN_KINDS
from msenc.speech.description import read
from msenc.types import UNKNOWN, MsencError, Reply, Utterance, VoiceAttributes
from msenc.work.group import ALONE, Group
from msenc.work.progress import Bar

LN2 = math.log(2)
AGAIN = "Evaluate the run again (evaluate.py run_dir=... overwrite=true), or move the evaluation's folder away."
OF_REPLIES = {"reply", "scores", "attributes", "reply_attributes", "speech"}
"""Keys of a prediction that a control omits, since it only measures losses."""


def evaluate_split(
    model: ConversationModel,
    datamodule: DialogueDataModule,
    split: str,
    decoding: Mapping[str, Any] | None,
    seed: int,
    limit: int | None = None,
    metrics: Mapping[str, Scorer] | None = None,
    group: Group = ALONE,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Score a split.

    Args:
        model: in eval mode, on its device.
        datamodule: of the run.
        split: ``train``, ``val`` or ``test``.
        decoding: see `models.generation.read_decoding`; None generates nothing.
        seed: for sampling in decoding.
        limit: number of dialogues, from the start of the split.
        metrics: of replies, from `metrics.text.build_text_metrics`.
        group: processes that share the targets out, by their tokens, each with its copy of the model.

    Returns:
        Flat metrics (in the first process), and one prediction per target: ids, history, reference, token losses with
        their kinds, reply and (in the first process) its scores.
    """
    (scored,) = score_all(model, datamodule, split, limit, [{}], f"scoring {split}", group)
    predictions = _predictions(datamodule, split, limit, scored)
    if decoding is not None:
        _generate(model, datamodule, split, decoding, seed, predictions, group)
    if not group.is_first:
        return {}, predictions
    found: dict[str, Any] = loss_metrics(predictions)
    if decoding is not None:
        replies = [Reply(p["reply"]["text"], p["reply"]["description"]) for p in predictions]
        is_described = datamodule.tokenizer.prompt.target == "text_description"
        references = [
            Reply(p["reference"]["text"], p["reference"]["description"] if is_described else None) for p in predictions
        ]
        corpus, items = score_replies(replies, references, metrics or {})
        found |= corpus
        for prediction, scores in zip(predictions, items, strict=True):
            prediction["scores"] = scores
        if is_described:
            found |= _score_attributes(datamodule, split, predictions)
    return found, predictions


def evaluate_control(
    model: ConversationModel,
    datamodule: DialogueDataModule,
    split: str,
    control: Control,
    plain: Sequence[Mapping[str, Any]],
    draws: int,
    limit: int | None = None,
    group: Group = ALONE,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Measure a control: losses of the same targets, and how much they rise.

    A model that uses a stream also trusts another dialogue's: one draw makes it confidently wrong, and its loss rises
    without bound. So the loss is that of the mean probability over several draws, which is what the model would predict
    if it knew only the stream's distribution. Its rise estimates the information that the model takes from the stream.

    Args:
        model: in eval mode, on its device.
        datamodule: of the run.
        split: ``train``, ``val`` or ``test``.
        control: what replaces which stream.
        plain: predictions of the same targets without the control; only the first process needs them.
        draws: of what the control draws, 1 or more.
        limit: number of dialogues, from the start of the split.
        group: as in `evaluate_split`.

    Returns:
        In the first process (empty in others): flat metrics, with ``control/delta`` (nats per token, with its interval)
        and ``control/verdict``; predictions whose token losses are those under the control.
    """
    inputs = [{"control": control, "draw": draw} for draw in range(draws if control.is_drawn else 1)]
    found = score_all(model, datamodule, split, limit, inputs, f"{control} on {split}", group)
    if not group.is_first:
        return {}, []
    predictions = []
    for item in plain:
        drawn = [scores[item["dialogue"], item["turn"]] for scores in found]
        nll = mean_probability_loss([scores.nll for scores in drawn])
        correct = np.mean([scores.correct for scores in drawn], axis=0)
        facts = {key: value for key, value in item.items() if key not in OF_REPLIES}
        predictions.append(
            {**facts, "nll": [round(v, 6) for v in nll], "correct": [round(v, 4) for v in correct.tolist()]}
        )
    metrics = loss_metrics(predictions)
    effect = paired_effect(
        [np.mean(c["nll"]) - np.mean(p["nll"]) for c, p in zip(predictions, plain, strict=True)],
        clusters=[p["dialogue"] for p in plain],
        weights=[len(p["nll"]) for p in plain],
    )
    metrics |= {
        "control": str(control),
        "control/delta": effect.mean,
        "control/low": effect.low,
        "control/high": effect.high,
        "control/p_value": effect.p_value,
        "control/verdict": verdict(effect),
    }
    return metrics, predictions


def mean_probability_loss(losses: Sequence[Sequence[float]]) -> list[float]:
    """Losses of N tokens in K draws -> loss of each token's expected probability over draws.

    The loss of the mean over K draws is too high by Var(p) / (2 K mean(p)^2), to second order; this is subtracted.

    Example:
        >>> mean_probability_loss([[0.5, 1.0]])
        [0.5, 1.0]
        >>> right, wrong = 0.02, 4.0
        >>> round(mean_probability_loss([[right], [wrong]] * 8)[0], 2)
        0.66
    """
    p = np.exp(-np.asarray(losses, dtype=float))  # (K, N)
    mean = p.mean(axis=0)
    if len(p) == 1:
        return (-np.log(mean)).tolist()
    return (-np.log(mean) - p.var(axis=0, ddof=1) / (2 * len(p) * mean**2)).tolist()


class Scores(NamedTuple):
    """Per token of one target: loss in nats, kind, and whether it was the most likely one."""

    nll: list[float]
    kinds: list[int]
    correct: list[bool]


def score_all(
    model: ConversationModel,
    datamodule: DialogueDataModule,
    split: str,
    limit: int | None,
    inputs: Sequence[Mapping[str, Any]],
    doing: str,
    group: Group,
) -> list[dict[tuple[str, int], Scores]]:
    """Token losses by (dialogue, turn), for each input: what `eval_dataloader` is to replace or to drop.

    Whole batches are shared out, and are the same in any number of processes: so are the losses, to the bit.
    """
    tokens = datamodule.eval_tokens(split, limit)
    own = share(range(len(inputs) * len(tokens)), tokens * len(inputs), group.rank, group.size)

    def results() -> Iterator[tuple[int, dict[tuple[str, int], Scores]]]:
        for number, given in enumerate(inputs):
            chosen = [i % len(tokens) for i in own if i // len(tokens) == number]
            if chosen:
                for scored in _score(model, datamodule.eval_dataloader(split, limit, chosen=chosen, **given)):
                    yield number, scored

    found: list[dict[tuple[str, int], Scores]] = [{} for _ in inputs]
    for number, scored in group.gather(results(), len(inputs) * len(tokens), Bar(), doing):
        found[number] |= scored
    return found


@torch.inference_mode()
def _score(model: ConversationModel, batches: Iterable[Batch]) -> Iterator[dict[tuple[str, int], Scores]]:
    """Token losses of each batch's targets, by (dialogue, turn)."""
    device = next(model.parameters()).device
    for batch in batches:
        scored: dict[tuple[str, int], Scores] = {id: Scores([], [], []) for id in batch.target_ids}
        with model.computing():
            scores = model(move_data_to_device(batch, device))
        rows = zip(*(t.tolist() for t in (batch.targets, scores.nll, batch.kinds, scores.correct)), strict=True)
        for target, *row in rows:
            for values, value in zip(scored[batch.target_ids[target]], row, strict=True):
                values.append(value)
        yield scored


def _predictions(
    datamodule: DialogueDataModule, split: str, limit: int | None, scored: Mapping[tuple[str, int], Scores]
) -> list[dict[str, Any]]:
    """One per target, in the order of the split."""
    dataset = datamodule.dataset(split)
    predictions = []
    for index in range(min(len(dataset), limit or len(dataset))):
        dialogue, tokens = dataset.dialogue(index), dataset.tokens(index)
        starts = histories(tokens.turn_tokens, datamodule.max_history_tokens, tokens.windows)
        for turn, utterance in enumerate(dialogue.utterances[1:], start=1):
            scores, target = scored[dialogue.id, turn], tokens.targets[turn - 1]
            predictions.append(
                {
                    "dialogue": dialogue.id,
                    "turn": turn,
                    "utterance": utterance.id,
                    "speaker": utterance.speaker,
                    "history": [starts[turn - 1].start, turn],
                    "reference": {"text": utterance.text, "description": utterance.description},
                    "nll": [round(v, 6) for v in scores.nll],
                    "kinds": [TOKEN_KINDS[k] for k in scores.kinds],
                    "correct": [int(c) for c in scores.correct],
                    "words": target.words,
                    "bits": dict(target.bits),
                    "bits_in_words": _bits_in_words(utterance),
                }
            )
    return predictions


def _bits_in_words(utterance: Utterance) -> dict[str, float]:
    """Planted bits in the reply's words, by kind."""
    bits: dict[str, float] = defaultdict(float)
    for mark in utterance.marks:
        if mark.field == "text":
            bits[f"planted_{mark.kind}"] += mark.bits
    return dict(bits)


def loss_metrics(predictions: list[dict[str, Any]]) -> dict[str, Any]:
    """Loss per token, over all target tokens and by kind, and the share of planted bits recovered.

    ``planted/<kind>/recovered`` is 1 - (sum of the losses of the planted tokens, in bits) / (planted bits): 1 where
    the model knows them, 0 where it guesses at even odds, below 0 where it is confidently wrong. If a kind is planted
    both in words and in descriptions, ``planted/<kind>/in_words`` and ``planted/<kind>/in_descriptions`` are the
    shares of each: a total of one half may be all of one and nothing of the other.

    Example:
        >>> one = {"nll": [0.0, 2.0], "kinds": ["reply", "end"], "correct": [1, 0], "bits": {}}
        >>> metrics = loss_metrics([one])
        >>> metrics["nll"], metrics["nll/end"], metrics["token_accuracy"]
        (1.0, 2.0, 0.5)
    """
    by_kind: dict[str, list[float]] = defaultdict(list)
    nll_in_words: dict[str, float] = defaultdict(float)
    bits: dict[str, float] = defaultdict(float)
    bits_in_words: dict[str, float] = defaultdict(float)
    correct = 0
    for prediction in predictions:
        words = prediction.get("words", 0)
        for place, (kind, nll) in enumerate(zip(prediction["kinds"], prediction["nll"], strict=True)):
            by_kind[kind].append(nll)
            nll_in_words[kind] += nll if place < words else 0.0
        correct += sum(prediction["correct"])
        for kind, n in prediction["bits"].items():
            bits[kind] += n
        for kind, n in prediction.get("bits_in_words", {}).items():
            bits_in_words[kind] += n
    tokens = sum(map(len, by_kind.values()))
    nll = sum(map(sum, by_kind.values())) / tokens
    metrics: dict[str, Any] = {
        "targets": len(predictions),
        "tokens": tokens,
        "nll": nll,
        "perplexity": math.exp(nll),
        "token_accuracy": correct / tokens,
    }
    for kind in TOKEN_KINDS:
        if kind in by_kind:
            metrics[f"nll/{kind}"] = sum(by_kind[kind]) / len(by_kind[kind])
    for kind in TOKEN_KINDS:
        if bits.get(kind):
            name = kind.removeprefix("planted_")
            metrics[f"planted/{name}/recovered"] = 1 - sum(by_kind[kind]) / (bits[kind] * LN2)
            if 0 < bits_in_words[kind] < bits[kind]:
                said, described = nll_in_words[kind], sum(by_kind[kind]) - nll_in_words[kind]
                metrics[f"planted/{name}/in_words"] = 1 - said / (bits_in_words[kind] * LN2)
                metrics[f"planted/{name}/in_descriptions"] = 1 - described / ((bits[kind] - bits_in_words[kind]) * LN2)
    return metrics


def _generate(
    model: ConversationModel,
    datamodule: DialogueDataModule,
    split: str,
    decoding: Mapping[str, Any],
    seed: int,
    predictions: list[dict[str, Any]],
    group: Group,
) -> None:
    """Store each target's reply in its prediction."""
    dataset, tokenizer = datamodule.dataset(split), datamodule.tokenizer
    num_dialogues = len({prediction["dialogue"] for prediction in predictions})
    written = write_replies(
        model,
        [dataset.tokens(index) for index in range(num_dialogues)],
        dataset.features,
        decoding_for(decoding, tokenizer.tokenizer, seed),
        budget=datamodule.max_history_tokens,
        num_queries=datamodule.num_queries,
        layout=datamodule.layout,
        progress=f"generating replies of {split}",
        group=group,
    )
    for prediction, (*_, ids) in zip(predictions, written, strict=True):
        reply = tokenizer.prompt.parse(tokenizer.tokenizer.decode(ids, skip_special_tokens=True))
        prediction["reply"] = {"text": reply.text, "description": reply.description}


def _score_attributes(
    datamodule: DialogueDataModule, split: str, predictions: list[dict[str, Any]]
) -> dict[str, float]:
    """Compare the replies' descriptions with how the targets are spoken; also stored in the predictions."""
    dataset = datamodule.dataset(split)
    wanted = {p["dialogue"] for p in predictions}
    voices = {
        (dialogue.id, turn): voice_of(utterance)
        for dialogue in map(dataset.dialogue, range(len(wanted)))
        for turn, utterance in enumerate(dialogue.utterances)
    }
    targets, places = [], []
    for prediction in predictions:
        dialogue, turn = prediction["dialogue"], prediction["turn"]
        voice, (written, _, unread) = voices[dialogue, turn], read(prediction["reply"]["description"] or "")
        if voice != VoiceAttributes():
            targets.append(DescribedTarget(voice, written, voices[dialogue, turn - 1], prediction["speaker"]))
            places.append(prediction)
            prediction["attributes"] = {k: v for k, v in asdict(voice).items() if v != UNKNOWN}
            prediction["reply_attributes"] = {k: v for k, v in asdict(written).items() if v != UNKNOWN}
            prediction["reply_not_understood"] = list(unread)
    if not targets:
        return {}
    scores = score_descriptions(targets, (u for d in datamodule.dialogues("train") for u in d.utterances))
    for name, values in scores.items.items():
        for prediction, value in zip(places, values, strict=True):
            prediction["scores"][name] = value
    not_understood = sum(bool(prediction["reply_not_understood"]) for prediction in places) / len(places)
    return scores.corpus | {"description/not_understood": not_understood}


def write_evaluation(folder: Path, metrics: Mapping[str, Any], predictions: list[dict[str, Any]]) -> None:
    """Write ``metrics.json`` and ``predictions.jsonl`` to a folder."""
    lines = (json.dumps(known_to_json(p), ensure_ascii=False, allow_nan=False) + "\n" for p in predictions)
    write_text(folder / "predictions.jsonl", "".join(lines))
    write_json(folder / "metrics.json", dict(metrics))


def _is_speech(path: str) -> bool:
    folder, _, name = path.partition("/")
    return folder == "speech" and is_name(name)


class _Said(TypedDict):
    text: str
    description: str | None


class _Prediction(TypedDict):
    """A line of ``predictions.jsonl``."""

    dialogue: str
    turn: Count
    speaker: NotRequired[str]
    nll: list[float | None]
    kinds: list[str]
    correct: list[float | bool]
    bits: dict[str, float]
    scores: NotRequired[dict[str, float | None]]
    reference: NotRequired[_Said]
    reply: NotRequired[_Said]
    speech: NotRequired[Annotated[str, Must(_is_speech, "speech/NAME")] | None]
    attributes: NotRequired[dict[str, str]]
    reply_attributes: NotRequired[dict[str, str]]
    spoken_attributes: NotRequired[dict[str, str]]


def read_predictions(folder: Path) -> list[dict[str, Any]]:
    """The predictions written by `write_evaluation`; null is a loss that was not finite.

    Raises:
        MsencError: there are none, or a line is invalid; names the line.
    """
    predictions = []
    for where, row in read_json_lines(folder / "predictions.jsonl", _Prediction, AGAIN):
        if not len(row["nll"]) == len(row["kinds"]) == len(row["correct"]):
            sizes = ", ".join(f"{len(row[key])} {key}" for key in ("nll", "kinds", "correct"))
            raise MsencError(f"{where}: found {sizes}, expected one of each per token. {AGAIN}")
        row["nll"] = [math.nan if nll is None else nll for nll in row["nll"]]
        predictions.append(row)
    if not predictions:
        raise MsencError(f"{folder / 'predictions.jsonl'}: has no predictions, expected one line per target. {AGAIN}")
    return predictions


def read_metrics(folder: Path) -> dict[str, Any]:
    """The metrics written by `write_evaluation`; null is a value that was not finite, as in a diverged run."""
    metrics = read_json(folder / "metrics.json", dict[str, Any], AGAIN)
    return {name: math.nan if value is None else value for name, value in metrics.items()}
