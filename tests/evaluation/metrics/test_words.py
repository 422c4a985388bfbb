# ruff: noqa: RUF001 (texts in other scripts)
import random
import unicodedata
from importlib.util import find_spec

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
    "Hebrew": ["בוקר טוב, מה שלומך היום?", "תודה רבה, אני בסדר גמור."],
    "Emoji": ["😀 👍🏽 ❤️ 🎉 👨‍👩‍👧", "😢 👎 💔 🇩🇪 1️⃣"],
    "Mixed": [
        "Good morning!",
        "早上好，你好吗？",
        "Доброе утро, как дела?",
        "👍",
        "สวัสดีครับ วันนี้",
        "Größe über alles",
        "Ó!",
    ],
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
        if (language, name) != ("Mixed", "cider"):  # which gives less to texts of fewer than four words
            assert same[name + end] == pytest.approx(best)
        assert crossed[name + end] < 0.7 * best


SCRIPTS = {  # letters, and marks that follow some of them
    "Chinese": ("今天气很好我们去公园吧", ""),
    "Japanese": ("こんにちはカタカナ漢字", "\u3099"),
    "Korean": ("안녕하세요오늘날씨", ""),
    "Arabic": ("صباحالخيريا", "\u064e\u0651"),
    "Hindi": ("नमसतकयहल", "\u093e\u094d\u0902"),
    "Thai": ("สวดครบวนอากาศเแ", "\u0e31\u0e35\u0e48"),
    "Khmer": ("កខគឃង", "\u17b6\u17d2"),
    "Russian": ("приветкакделаё", ""),
    "Greek": ("καλημέραςΏ", "\u0301"),
    "Hebrew": ("שלוםבוקרטוב", "\u05b8"),
    "Latin": ("abczéüß09", "\u0301"),
    "emoji": ("😀👍❤🎉👨🇩", "\ufe0f\u200d"),
    "signs": ("!?.,-…。，«»'", ""),
}


@pytest.mark.parametrize("seed", range(60))
def test_whatever_the_script_a_text_is_like_itself(seed):
    draw = random.Random(seed)
    scripts = draw.sample(sorted(SCRIPTS), draw.choice([1, 1, 2, len(SCRIPTS)]))

    def text():
        pieces = []
        for _ in range(draw.randint(4, 30)):
            letters, marks = SCRIPTS[draw.choice(scripts)]
            pieces.append(draw.choice(letters) + draw.choice(["", *marks]) + draw.choice(["", "", " "]))
        return "".join(pieces)

    texts = [text() for _ in range(4)]
    if scripts == ["signs"]:
        return  # no letter, digit or emoji: nothing that a metric of words could count
    if "signs" in scripts:
        texts = [f"{t}{SCRIPTS[next(s for s in scripts if s != 'signs')][0]}" for t in texts]
    found = scores(texts, texts)
    for name, value in found.items():
        if name.startswith(("bleu_1", "rouge_l")):
            assert value == pytest.approx(1), name
    for cut in (words, characters):  # nothing is lost
        joined = ["".join(unicodedata.normalize("NFC", t).lower().split()) for t in texts]
        assert ["".join(cut(t)) for t in texts] == joined


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
    for settings in ({"bleu": {"tokenizer": "klingon"}}, {"tokenizer": "klingon"}):
        with pytest.raises(MsencError, match=r"found 'klingon', expected one of auto"):
            build_text_metrics(["bleu"], settings)
    with pytest.raises(
        MsencError, match=r"metric_settings\.rougel: no such metric. Expected tokenizer, or one of bleu"
    ):
        build_text_metrics(["rouge_l"], {"rougel": {"tokenizer": "zh"}})
    with pytest.raises(MsencError, match=r"metric_settings\.rouge_l: found 'zh', expected its settings"):
        build_text_metrics(["rouge_l"], {"rouge_l": "zh"})


@pytest.mark.parametrize("name", ["ja-mecab", "ko-mecab"])
def test_without_mecab_its_packages_are_named(name):
    pytest.importorskip("sacrebleu")
    if find_spec("MeCab") or find_spec("mecab_ko"):
        pytest.skip("MeCab is here")
    with pytest.raises(MsencError, match=rf"{name} needs MeCab \(.*mecab-.*pip install 'sacrebleu\[{name[:2]}\]'"):
        build_text_metrics(["bleu"], {"tokenizer": name})


def test_with_mecab_japanese_is_cut_into_words():
    for package in ("sacrebleu", "MeCab", "ipadic"):
        pytest.importorskip(package)
    found = build_text_metrics(["rouge_l"], {"tokenizer": "ja-mecab"})["rouge_l"](["今日は晴れ"], ["明日は晴れ"]).corpus
    assert found == {"rouge_l-ja-mecab": pytest.approx(2 / 3)}  # 今日|は|晴れ


def test_one_key_sets_all_metrics_of_words_and_their_own_goes_before():
    pytest.importorskip("sacrebleu")
    texts, found = TEXTS["Chinese"], {}
    settings = {"tokenizer": "zh", "cider": {"tokenizer": "char"}}
    for scorer in build_text_metrics([*METRICS, "sacrebleu", "distinct"], settings).values():
        found |= scorer(texts, texts).corpus
    assert found["rouge_l-zh"] == found["bleu_4-zh"] == pytest.approx(1)
    assert found["sacrebleu-zh"] == pytest.approx(100)
    assert found["cider-char"] == pytest.approx(10)
    assert "distinct_1" in found


def test_marks_stay_with_their_letters():
    assert words("हूँ") == ["हूँ"]
    assert words("cafe\u0301") == words("café") == ["café"]
    assert characters("お茶を2杯") == ["お", "茶", "を", "2", "杯"]
