"""Semantic scores, by a pretrained encoder: (replies, references) -> Scores."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from msenc.evaluation.metrics.scores import Scores, mean_scores
from msenc.models.pretrained import load_pretrained
from msenc.types import MsencError

_BATCH_SIZE = 64


class EmbeddingSimilarity:
    """Mean cosine between the embeddings of reply and reference; -1..1, higher is better.

    An embedding is the mean of the last hidden states over a text's tokens, special ones too. Equals
    ``util.pairwise_cos_sim`` of sentence-transformers for models that pool so and add no layer after it (all-MiniLM,
    all-mpnet ...).

    Source: Reimers and Gurevych (EMNLP 2019).

    Args:
        name_or_path: a transformers text encoder: a folder, or a hub id.
        device: where it computes.

    Raises:
        MsencError: the encoder cannot be loaded.
    """

    def __init__(self, name_or_path: str, device: str = "cpu") -> None:
        self.encoder = _TextEncoder(name_or_path, device)

    def __call__(self, replies: Sequence[str], references: Sequence[str]) -> Scores:
        """Score the pairs; equal texts are encoded once."""
        texts = sorted({*replies, *references}, key=lambda text: (len(text), text))  # little padding
        place = {text: i for i, text in enumerate(texts)}
        vectors = torch.cat([self._embed(batch) for batch in _batches(texts, "embedding_similarity")])
        one, other = (vectors[[place[text] for text in side]] for side in (replies, references))
        return mean_scores("embedding_similarity", (one * other).sum(-1).tolist())

    def _embed(self, texts: Sequence[str]) -> Tensor:
        """N texts -> (N, D) float64 of length 1."""
        hidden, is_token, _ = self.encoder(texts, layer=-1)
        mean = (hidden.double() * is_token.unsqueeze(-1)).sum(1) / is_token.sum(1, keepdim=True)
        return torch.nn.functional.normalize(mean, dim=-1).cpu()


class BertScore:
    """Mean BERTScore, the F1 of greedily matched tokens, not rescaled; about 0..1, higher is better.

    Equals bert-score's ``score(..., idf=False, rescale_with_baseline=False)``: a text of no tokens scores 0.
    (torchmetrics' gives the scores in another order than the pairs.)

    Source: Zhang et al. (ICLR 2020).

    Args:
        name_or_path: a transformers text encoder: a folder, or a hub id.
        num_layers: the layer whose hidden states are compared; bert-score's ``model2layers`` has it for many models.
        device: where it computes.

    Raises:
        MsencError: the encoder cannot be loaded, or has fewer layers.
    """

    def __init__(self, name_or_path: str, num_layers: int, device: str = "cpu") -> None:
        self.encoder = _TextEncoder(name_or_path, device)
        self.num_layers = num_layers
        if not 0 < num_layers <= self.encoder.model.config.num_hidden_layers:
            raise MsencError(
                f"metric bertscore: found num_layers={num_layers}, expected 1 to "
                f"{self.encoder.model.config.num_hidden_layers}, the layers of {name_or_path}."
            )

    def __call__(self, replies: Sequence[str], references: Sequence[str]) -> Scores:
        """Score the pairs."""
        pairs = list(zip(replies, references, strict=True))
        order = sorted(range(len(pairs)), key=lambda i: (len(pairs[i][0]) + len(pairs[i][1]), pairs[i]))
        items = [0.0] * len(pairs)
        for places in _batches(order, "bertscore"):
            for place, item in zip(places, self._compare([pairs[i] for i in places]), strict=True):
                items[place] = item
        return mean_scores("bertscore", items)

    def _compare(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        sides = []
        for texts in zip(*pairs, strict=True):
            hidden, is_token, is_word = self.encoder(texts, layer=self.num_layers)
            sides.append((torch.nn.functional.normalize(hidden, dim=-1), is_token, is_word))
        (reply, reply_tokens, reply_words), (reference, reference_tokens, reference_words) = sides
        cosine = reply @ reference.transpose(1, 2)  # (N, L of replies, L of references)
        # special tokens may be matched to, but are not scored themselves
        cosine = cosine * reply_tokens.unsqueeze(2) * reference_tokens.unsqueeze(1)
        precision = (cosine.amax(2) * reply_words).sum(1) / reply_words.sum(1)
        recall = (cosine.amax(1) * reference_words).sum(1) / reference_words.sum(1)
        return (2 * precision * recall / (precision + recall)).nan_to_num(0.0).tolist()


class _TextEncoder:
    """Texts -> hidden states of one layer."""

    def __init__(self, name_or_path: str, device: str) -> None:
        from transformers import AutoModel, AutoTokenizer

        self.tokenizer = load_pretrained(AutoTokenizer, name_or_path)
        # the pooler belongs to a pre-training head, which many checkpoints lack
        self.model = load_pretrained(AutoModel, name_or_path, may_miss=("pooler.dense.weight", "pooler.dense.bias"))
        self.model.eval().to(device)
        positions = getattr(self.model.config, "max_position_embeddings", None) or self.tokenizer.model_max_length
        self.max_tokens = min(self.tokenizer.model_max_length, positions)

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str], layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """N texts -> hidden states (N, L, D), which are tokens (N, L) bool, which of them are not special (N, L).

        All on the encoder's device.
        """
        given: Any = self.tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=self.max_tokens,
            return_special_tokens_mask=True,
            return_tensors="pt",
        )
        given = given.to(self.model.device)
        is_token = given["attention_mask"].bool()
        is_word = is_token & ~given.pop("special_tokens_mask").bool()
        output = self.model(**given, output_hidden_states=True)
        return output.hidden_states[layer].float(), is_token, is_word


def _batches(items: list, metric: str) -> Iterable[list]:
    batches = [items[start : start + _BATCH_SIZE] for start in range(0, len(items), _BATCH_SIZE)]
    return track(batches, description=metric, transient=True)
