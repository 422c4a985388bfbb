"""Word-based scores: (replies, references) -> Scores. Words are split at white space; case matters.

Each names the reference implementation whose values it equals, including those for empty texts.
"""

import math
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

from msenc.evaluation.metrics.scores import Scorer, Scores, mean_scores
from msenc.types import MsencError, needing

_CIDER_ORDER, _CIDER_SIGMA = 4, 6.0
_REPEATED = 4


def bleu(replies: Sequence[str], references: Sequence[str]) -> Scores:
    """Corpus BLEU-1..4, unsmoothed, of words as they are; 0..1, higher is better.

    By torchmetrics. Equals sacrebleu's ``BLEU(max_ngram_order=n, tokenize="none", smooth_method="none")`` / 100, and
    pycocoevalcap's ``Bleu`` without its tokenizer but for what that adds to avoid a division by zero.

    Source: Papineni et al. (ACL 2002).

    Example:
        >>> round(bleu(["the cat sat down"], ["the cat sat there"]).corpus["bleu_2"], 4)
        0.7071
    """
    from torchmetrics.functional.text import bleu_score

    wanted = [[reference] for reference in references]
    return Scores({f"bleu_{n}": bleu_score(list(replies), wanted, n_gram=n).item() for n in range(1, 5)}, {})


def make_sacrebleu(tokenize: str = "13a") -> Scorer:
    """SacreBLEU in its default setting: nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp; 0..100, higher is better.

    By sacrebleu itself. Per item its sentence BLEU (``sacrebleu_sentence``: eff:yes), whose mean is not the corpus's.

    Source: Post (WMT 2018).

    Raises:
        MsencError: sacrebleu is not installed.

    Example:
        >>> scores = make_sacrebleu()(["The cat sat down, happily."], ["The cat sat down, happy."])
        >>> round(scores.corpus["sacrebleu"], 2)
        64.35
    """
    with needing("the metric sacrebleu", "metrics"):
        from sacrebleu.metrics import BLEU
    corpus, sentence = BLEU(tokenize=tokenize), BLEU(tokenize=tokenize, effective_order=True)

    def score(replies: Sequence[str], references: Sequence[str]) -> Scores:
        items = [sentence.sentence_score(*pair).score for pair in zip(replies, ([r] for r in references), strict=True)]
        return Scores(
            {"sacrebleu": corpus.corpus_score(list(replies), [list(references)]).score}, {"sacrebleu_sentence": items}
        )

    return score


def rouge_l(replies: Sequence[str], references: Sequence[str]) -> Scores:
    """Mean ROUGE-L (F1) of lower-case runs of a-z and 0-9, unstemmed; 0..1, higher is better.

    By torchmetrics. Equals rouge-score's ``RougeScorer(["rougeL"])``.

    Source: Lin (ACL 2004 workshop, section 3).

    Example:
        >>> rouge_l(["you look happy"], ["You look sad!"]).corpus
        {'rouge_l': 0.6666666865348816}
    """
    return _rouge_l(replies, references)


def rouge_l_of_words(replies: Sequence[str], references: Sequence[str]) -> Scores:
    """`rouge_l` of words split at white space.

    Example:
        >>> rouge_l_of_words(["да нет"], ["да нет"]).corpus
        {'rouge_l': 1.0}
    """
    return _rouge_l(replies, references, normalizer=str, tokenizer=str.split)


def _rouge_l(replies: Sequence[str], references: Sequence[str], **cut: Any) -> Scores:
    from torchmetrics.functional.text import rouge_score

    items = [
        rouge_score(reply, reference, rouge_keys="rougeL", **cut)["rougeL_fmeasure"].item()
        for reply, reference in zip(replies, references, strict=True)
    ]
    return mean_scores("rouge_l", items)


def make_meteor(with_wordnet: bool) -> Scorer:
    """Mean METEOR (2007) of white-space words, lower-cased and stemmed; 0..1, higher is better.

    By NLTK's ``single_meteor_score``, which it equals: ``meteor`` with the synonyms of WordNet, ``meteor_no_wordnet``
    with none, so that it matches equal words and equal Porter stems alone and scores lower. Neither is METEOR 1.5, the
    Java program, whose weights and paraphrase tables are others.

    Source: Lavie and Agarwal (WMT 2007).

    Raises:
        MsencError: NLTK, or for ``meteor`` its copy of WordNet, is not installed.

    Example:
        >>> score = make_meteor(with_wordnet=False)
        >>> round(score(["she walks home slowly"], ["she walked home"]).corpus["meteor_no_wordnet"], 4)
        0.9498
    """
    name = "meteor" if with_wordnet else "meteor_no_wordnet"
    with needing(f"the metric {name}", "metrics"):
        from nltk.corpus import wordnet
        from nltk.translate.meteor_score import single_meteor_score
    if with_wordnet:
        try:
            wordnet.ensure_loaded()
        except LookupError as error:
            raise MsencError(
                "metric meteor: NLTK finds no WordNet. Expected the folder corpora/wordnet in one of NLTK_DATA's "
                "folders: python -m nltk.downloader wordnet, or unpack it there. To do without it: "
                "metrics=[meteor_no_wordnet]."
            ) from error
    compare = partial(single_meteor_score, wordnet=wordnet if with_wordnet else _NoSynonyms())

    def score(replies: Sequence[str], references: Sequence[str]) -> Scores:
        pairs = zip(replies, references, strict=True)
        return mean_scores(name, [compare(reference.split(), reply.split()) for reply, reference in pairs])

    return score


class _NoSynonyms:
    """Stands in for WordNet if it is not used."""

    def synsets(self, word: str) -> tuple[()]:
        """No word has any sense."""
        return ()


def cider(replies: Sequence[str], references: Sequence[str]) -> Scores:
    """Mean CIDEr-D of words as they are, document frequencies from the references; 0..10, higher is better.

    Equals pycocoevalcap's ``Cider`` without its tokenizer, in which the length that a score is penalized by is the
    number of bigrams. It depends on all references: of a single pair it is 0.

    Source: Vedantam et al. (CVPR 2015), eq. 1 and 5.

    Example:
        >>> scores = cider(["you look happy", "no"], ["you look happy today", "never mind"])
        >>> [round(v, 4) for v in scores.items["cider"]]
        [5.8917, 0.0]
    """
    written, wanted = ([_count_ngrams(t.split(), _CIDER_ORDER) for t in texts] for texts in (replies, references))
    frequency = Counter(ngram for counts in wanted for order in counts for ngram in order)
    items = [_cider(*pair, frequency, len(wanted)) for pair in zip(written, wanted, strict=True)]
    return mean_scores("cider", items)


def _cider(reply: list[Counter], reference: list[Counter], frequency: Counter, num_references: int) -> float:
    penalty = math.exp(-((reply[1].total() - reference[1].total()) ** 2) / (2 * _CIDER_SIGMA**2))
    similarities = []
    for counts in zip(reply, reference, strict=True):
        one, other = (
            {g: n * (math.log(num_references) - math.log(max(1, frequency[g]))) for g, n in c.items()} for c in counts
        )
        norm = math.hypot(*one.values()) * math.hypot(*other.values())
        product = sum(min(weight, other[g]) * other[g] for g, weight in one.items() if g in other)
        similarities.append(product / norm if norm else 0.0)
    return 10 * penalty * sum(similarities) / len(similarities)


def distinct(replies: Sequence[str], references: Sequence[str]) -> Scores:
    """Distinct-1 and -2: distinct n-grams of all replies over all their n-grams; 0..1, higher is more varied.

    It falls with the number of replies: compare equal numbers of them. References are not used.

    Source: Li et al. (NAACL 2016), where n-grams of both orders are divided by the number of words.

    Example:
        >>> distinct(["I am fine", "I am"], ["", ""]).corpus
        {'distinct_1': 0.6, 'distinct_2': 0.6666666666666666}
    """
    counts = [_count_ngrams(reply.split(), 2) for reply in replies]
    corpus = {}
    for n in (1, 2):
        total = sum((c[n - 1] for c in counts), Counter())
        corpus[f"distinct_{n}"] = len(total) / total.total() if total else 0.0
    return Scores(corpus, {})


def repetition(replies: Sequence[str], references: Sequence[str]) -> Scores:
    """Share of a reply's 4-grams that repeat an earlier one, mean over replies; 0..1, lower is better.

    The seq-rep-4 of Welleck et al. (ICLR 2020). Shorter replies score 0. References are not used.

    Example:
        >>> repetition(["so so so so so so"], [""]).corpus
        {'repetition_4': 0.6666666666666667}
    """
    items = []
    for reply in replies:
        counts = _count_ngrams(reply.split(), _REPEATED)[-1]
        items.append(1 - len(counts) / counts.total() if counts else 0.0)
    return mean_scores(f"repetition_{_REPEATED}", items)


def length_ratio(replies: Sequence[str], references: Sequence[str]) -> Scores:
    """Words of all replies over words of all references; 1 is best. Equals sacrebleu's ``ratio`` without a tokenizer.

    Example:
        >>> length_ratio(["yes", "not at all"], ["yes", "no"]).corpus
        {'length_ratio': 2.0}
    """
    written, wanted = (sum(len(text.split()) for text in texts) for texts in (replies, references))
    return Scores({"length_ratio": written / wanted if wanted else 0.0}, {})


def _count_ngrams(words: list[str], max_order: int) -> list[Counter[tuple[Any, ...]]]:
    """The n-grams of orders 1 to `max_order`, counted."""
    return [Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1)) for n in range(1, max_order + 1)]
