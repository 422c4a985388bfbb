"""Metrics of generated replies against references, by torchmetrics."""

from collections.abc import Sequence

from msenc.types import Reply


def text_metrics(replies: Sequence[Reply], references: Sequence[Reply]) -> dict[str, float]:
    """Corpus BLEU-1..4 and ROUGE-L (F) of the replies' texts, and how many voice descriptions are exactly right.

    BLEU splits at white space and leaves case and punctuation as they are; ROUGE-L is torchmetrics' (lower case,
    letters and digits alone, no stemming). All are shares between 0 and 1; higher is better.

    Args:
        replies: what was generated.
        references: what was said; ``description_exact`` counts only those that have a description.

    Example:
        >>> scores = text_metrics([Reply("You look happy.")], [Reply("You look sad.")])
        >>> round(scores["bleu_1"], 3), round(scores["rouge_l"], 3)
        (0.667, 0.667)
    """
    from torchmetrics.text import BLEUScore, ROUGEScore

    texts, wanted = [r.text for r in replies], [r.text for r in references]
    scores = {f"bleu_{n}": BLEUScore(n_gram=n)(texts, [[w] for w in wanted]).item() for n in range(1, 5)}
    scores["rouge_l"] = ROUGEScore(rouge_keys="rougeL")(texts, wanted)["rougeL_fmeasure"].item()
    described = [
        (reply.description, reference.description)
        for reply, reference in zip(replies, references, strict=True)
        if reference.description is not None
    ]
    if described:
        scores["description_exact"] = sum(a == b for a, b in described) / len(described)
    return scores
