# ruff: noqa: RUF001 (texts in other scripts)
import pytest

from msenc.evaluation.metrics.text import build_text_metrics
from msenc.evaluation.metrics.words import characters, tokenizer_of, words
from msenc.types import MsencError

TEXTS = {
    "Chinese": ["今天天气很好，我们去公园吧。", "你说什么？我没听清楚。"],
    "Japanese": ["今日は天気がいいですね。", "コーヒーを飲みませんか？"],
    "Thai": ["สวัสดีครับ วันนี้อากาศดีมาก", "คุณชื่ออะไรครับ"],
    "Arabic": ["صباح الخير يا صديقي العزيز", "كيف حالك اليوم أنت بخير"],
    "Hindi": ["नमस्ते, आप आज कैसे हैं?", "मैं बहुत अच्छा हूँ, धन्यवाद।"],
    "Russian": ["Доброе утро, как у тебя дела?", "Спасибо, всё очень хорошо!"],
    "Korean": ["안녕하세요, 오늘 날씨가 정말 좋네요.", "네, 저도 그렇게 생각해요 정말로."],
    "Greek": ["Καλημέρα, τι κάνεις σήμερα;", "Είμαι πολύ καλά, ευχαριστώ πολύ."],
    "English": ["Good morning, how are you today?", "I am very well, thank you."],
}
METRICS = ["bleu", "rouge_l", "cider"]


def scores(replies, references, **settings):
    given = dict.fromkeys(METRICS, settings)
    found = {}
    for scorer in build_text_metrics(METRICS, given).values():
        found |= scorer(replies, references).corpus
    return found


@pytest.mark.parametrize("language", TEXTS)
def test_identical_texts_score_one_and_others_less(language):
    texts = TEXTS[language]
    tokenizer = tokenizer_of(texts)
    end = "" if tokenizer == "default" else f"-{tokenizer}"
    assert (end == "") == (language == "English")
    same, crossed = scores(texts, texts), scores(texts, texts[::-1])
    for name, best in {"bleu_1": 1, "bleu_4": 1, "rouge_l": 1, "cider": 10}.items():
        assert same[name + end] == pytest.approx(best)
        assert crossed[name + end] < 0.7 * best


def test_english_is_scored_as_without_a_tokenizer():
    replies, references = ["The cat sat down, happily."], ["the Cat sat down, happy."]
    assert scores(replies, references) == scores(replies, references, tokenizer="default")


@pytest.mark.parametrize(("name", "language"), [("intl", "Russian"), ("zh", "Chinese"), ("char", "Thai")])
def test_a_tokenizer_of_sacrebleu_is_named_with_the_score(name, language):
    pytest.importorskip("sacrebleu")
    found = scores(TEXTS[language], TEXTS[language], tokenizer=name)
    assert found[f"rouge_l-{name}"] == pytest.approx(1)
    assert all(key.endswith(f"-{name}") for key in found)


def test_a_tokenizer_that_is_not_there_is_refused():
    with pytest.raises(MsencError, match=r"no tokenizer 'klingon'. Expected one of auto"):
        build_text_metrics(["bleu"], {"bleu": {"tokenizer": "klingon"}})


def test_marks_stay_with_their_letters():
    assert words("हूँ") == ["हूँ"]
    assert words("cafe\u0301") == words("café") == ["café"]
    assert characters("お茶を2杯") == ["お", "茶", "を", "2", "杯"]
