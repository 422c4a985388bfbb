import json
import math
import os
import sys
from pathlib import Path

import pytest
from make_goldens import make_pairs
from nltk.translate.meteor_score import single_meteor_score
from nltk.util import ngrams
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU
from tiny_models import save_bert

from msenc.evaluation.metrics.text import DEFAULT_METRICS, TEXT_METRICS, build_text_metrics, score_replies
from msenc.types import MsencError, Reply

GOLDENS = json.loads((Path(__file__).parent / "goldens.json").read_text(encoding="utf-8"))
PAIRS = [tuple(pair) for pair in GOLDENS["pairs"]]
REPLIES, REFERENCES = map(list, zip(*PAIRS, strict=True))

EQUAL = {"rel": 0, "abs": 1e-6}
LIGHT = [name for name in TEXT_METRICS if name not in ("meteor", "embedding_similarity", "bertscore")]


def scores(name, **settings):
    return build_text_metrics([name], {name: settings})[name](REPLIES, REFERENCES)


def mean(values):
    return math.fsum(values) / len(values)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return str(save_bert(tmp_path_factory.mktemp("bert"), " ".join(REPLIES + REFERENCES)))


@pytest.fixture
def minilm():
    folder = Path(os.environ.get("MSENC_MODELS", "none")).expanduser() / "all-minilm-l6-v2"
    if not folder.is_dir():
        pytest.skip("MSENC_MODELS has no all-minilm-l6-v2")
    return str(folder)


def test_the_pairs_are_many_and_odd():
    assert make_pairs() == PAIRS
    assert len(PAIRS) >= 200
    texts = REPLIES + REFERENCES
    assert sum(not text for text in REPLIES) > 3
    assert sum(not text for text in REFERENCES) > 3
    for sign in "([é—それ😀":
        assert any(sign in text for text in texts)


def test_bleu_equals_sacrebleu_and_pycocoevalcap():
    found = scores("bleu").corpus
    for n in range(1, 5):
        reference = BLEU(max_ngram_order=n, tokenize="none", smooth_method="none", force=True)
        assert found[f"bleu_{n}"] == pytest.approx(reference.corpus_score(REPLIES, [REFERENCES]).score / 100, **EQUAL)
        assert found[f"bleu_{n}"] == pytest.approx(GOLDENS["bleu"][n - 1], **EQUAL)


def test_sacrebleu_equals_sacrebleu():
    found = scores("sacrebleu")
    reference = BLEU()
    assert found.corpus["sacrebleu"] == pytest.approx(reference.corpus_score(REPLIES, [REFERENCES]).score, **EQUAL)
    assert str(reference.get_signature()).startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp")
    sentence = BLEU(effective_order=True)
    wanted = [sentence.sentence_score(reply, [reference]).score for reply, reference in PAIRS]
    assert found.items["sacrebleu_sentence"] == pytest.approx(wanted, **EQUAL)


def test_rouge_l_equals_rouge_score():
    reference = RougeScorer(["rougeL"])
    wanted = [reference.score(b, a)["rougeL"].fmeasure for a, b in PAIRS]
    assert 0.3 < mean(wanted) < 0.9
    found = scores("rouge_l")
    assert found.items["rouge_l"] == pytest.approx(wanted, **EQUAL)
    assert found.corpus["rouge_l"] == pytest.approx(mean(wanted), **EQUAL)


def test_meteor_without_wordnet_equals_nltk_without_synonyms():
    class Empty:
        def synsets(self, word):
            return []

    wanted = [single_meteor_score(b.split(), a.split(), wordnet=Empty()) for a, b in PAIRS]
    found = scores("meteor_no_wordnet")
    assert found.items["meteor_no_wordnet"] == pytest.approx(wanted, **EQUAL)
    assert found.corpus["meteor_no_wordnet"] == pytest.approx(mean(wanted), **EQUAL)
    assert wanted != pytest.approx(GOLDENS["meteor"], abs=0.05)  # so that its name has to differ


def test_meteor_equals_nltk_where_wordnet_is():
    try:
        found = scores("meteor")
    except MsencError:
        pytest.skip("NLTK_DATA has no WordNet")
    assert found.items["meteor"] == pytest.approx(GOLDENS["meteor"], **EQUAL)


def test_cider_equals_pycocoevalcap():
    found = scores("cider")
    assert found.items["cider"] == pytest.approx(GOLDENS["cider"], **EQUAL)
    assert found.corpus["cider"] == pytest.approx(mean(GOLDENS["cider"]), **EQUAL)


@pytest.mark.parametrize("n", [1, 2])
def test_distinct_equals_a_count_by_nltk(n):
    grams = [gram for reply in REPLIES for gram in ngrams(reply.split(), n)]
    assert scores("distinct").corpus[f"distinct_{n}"] == pytest.approx(len(set(grams)) / len(grams), **EQUAL)


def test_repetition_equals_a_count_by_nltk():
    grams = [list(ngrams(reply.split(), 4)) for reply in REPLIES]
    wanted = [1 - len(set(g)) / len(g) if g else 0.0 for g in grams]
    assert max(wanted) > 0.1
    assert scores("repetition").items["repetition_4"] == pytest.approx(wanted, **EQUAL)


def test_length_ratio_equals_sacrebleu():
    reference = BLEU(tokenize="none", force=True).corpus_score(REPLIES, [REFERENCES])
    assert scores("length_ratio").corpus["length_ratio"] == pytest.approx(
        reference.sys_len / reference.ref_len, **EQUAL
    )


@pytest.mark.real
def test_embedding_similarity_equals_sentence_transformers(minilm):
    found = scores("embedding_similarity", name_or_path=minilm)
    assert found.items["embedding_similarity"] == pytest.approx(GOLDENS["embedding_similarity"], **EQUAL)


@pytest.mark.real
def test_bertscore_equals_bert_score(minilm):
    found = scores("bertscore", name_or_path=minilm, num_layers=5)
    assert found.items["bertscore"] == pytest.approx(GOLDENS["bertscore"], **EQUAL)


@pytest.mark.parametrize("name", ["embedding_similarity", "bertscore"])
def test_a_pair_scores_the_same_in_any_company(name, bert):
    settings = {"name_or_path": bert} | ({"num_layers": 2} if name == "bertscore" else {})
    scorer = build_text_metrics([name], {name: settings})[name]
    together = scorer(REPLIES[:20], REFERENCES[:20]).items[name]
    alone = [scorer([a], [b]).items[name][0] for a, b in PAIRS[:20]]
    assert together == pytest.approx(alone, **EQUAL)
    assert together[0] == pytest.approx(1, abs=1e-5)  # equal texts
    assert min(together) < 0.9


def test_models_of_metrics_are_where_the_evaluation_is_unless_their_settings_say_otherwise(bert):
    settings = {"embedding_similarity": {"name_or_path": bert}, "bertscore": {"name_or_path": bert, "num_layers": 2}}
    settings["bertscore"]["device"] = "cpu"
    scorers = build_text_metrics(["embedding_similarity", "bertscore", "rouge_l"], settings, device="meta")
    places = [scorers[name].encoder.model.device.type for name in settings]
    assert places == ["meta", "cpu"]


# --------------------------------------------------------------------------------------------------- replies, refusals


def test_text_and_description_are_scored_separately():
    replies = [Reply("Yes, I am.", "a man speaks fast"), Reply("No.", None), Reply("Maybe")]
    references = [Reply("Yes, I am.", "a woman speaks fast"), Reply("Yes.", "a man speaks slowly"), Reply("Maybe")]
    corpus, items = score_replies(replies, references, build_text_metrics(["rouge_l", "length_ratio"]))
    assert corpus["rouge_l"] == pytest.approx(2 / 3)
    assert corpus["description/rouge_l"] == pytest.approx((0.75 + 0) / 2)
    assert corpus["description/length_ratio"] == 4 / 8
    assert corpus["description/exact"] == 0
    assert [set(item) for item in items] == [{"rouge_l", "description/rouge_l"}] * 2 + [{"rouge_l"}]


def test_without_descriptions_nothing_is_said_of_them():
    corpus, _ = score_replies([Reply("Yes")], [Reply("Yes")], build_text_metrics(["rouge_l"]))
    assert not [name for name in corpus if name.startswith("description")]


def test_empty_references_are_counted_and_left_out():
    metrics = build_text_metrics(["bleu", "rouge_l", "repetition", "cider"])
    replies = [Reply("Yes, I am."), Reply("What?"), Reply("so so so so so")]
    references = [Reply("Yes, I am."), Reply(" "), Reply("")]
    corpus, items = score_replies(replies, references, metrics)
    assert corpus["references_empty"] == 2
    assert corpus["rouge_l"] == 1
    assert corpus["repetition_4"] == pytest.approx(0.5 / 3)  # for which a reply is enough
    assert set(items[0]) == {"rouge_l", "cider", "repetition_4"}
    assert set(items[1]) == set(items[2]) == {"repetition_4"}
    corpus, _ = score_replies(replies[1:], references[1:], metrics)
    assert set(corpus) == {"references_empty", "repetition_4"}


def test_nothing_is_said_at_all():
    corpus, _ = score_replies([Reply("")] * 2, [Reply("Yes")] * 2, build_text_metrics(LIGHT))
    assert {v for k, v in corpus.items() if k != "references_empty"} == {0}


def test_what_is_cheap_needs_no_extra(monkeypatch):
    for package in ("sacrebleu.metrics", "nltk.corpus"):
        monkeypatch.setitem(sys.modules, package, None)
    assert score_replies([Reply("Yes")], [Reply("Yes")], build_text_metrics(DEFAULT_METRICS))[0]["rouge_l"] == 1
    with pytest.raises(MsencError, match=r"the metric sacrebleu needs the package sacrebleu, .*\.\[metrics\]"):
        build_text_metrics(["sacrebleu"])


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("blue", {}, "metrics: found 'blue', expected names among bleu, "),
        ("bleu", {"max_order": 3}, "metric_settings.bleu: found {'max_order': 3}, but .* unexpected keyword"),
        ("embedding_similarity", {}, "metric_settings.embedding_similarity: found {}, but .*name_or_path"),
        ("embedding_similarity", {"name_or_path": "nowhere"}, "cannot load 'nowhere'"),
        ("bertscore", {"name_or_path": "{bert}", "num_layers": 3}, "found num_layers=3, expected 1 to 2"),
    ],
)
def test_refusals(name, settings, message, bert):
    settings = {k: v.format(bert=bert) if isinstance(v, str) else v for k, v in settings.items()}
    with pytest.raises(MsencError, match=message):
        build_text_metrics([name], {name: settings})


def test_meteor_without_its_wordnet_is_refused(monkeypatch, tmp_path):
    import nltk
    from nltk.corpus.reader.wordnet import WordNetCorpusReader
    from nltk.corpus.util import LazyCorpusLoader

    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    monkeypatch.setattr(nltk.corpus, "wordnet", LazyCorpusLoader("wordnet", WordNetCorpusReader, None))
    with pytest.raises(MsencError, match=r"NLTK finds no WordNet.*metrics=\[meteor_no_wordnet\]"):
        build_text_metrics(["meteor"])
