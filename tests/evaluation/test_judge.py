"""A judge of replies, against a small real server whose preferences are planted."""

import hashlib
import json
import shutil
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from types import SimpleNamespace

import pytest
from local_server import answering

from msenc.evaluation.judge import built_in_pairs, judge_lines, judge_replies, read_replies
from msenc.evaluation.losses import read_metrics, read_predictions
from msenc.evaluation.metrics.judge import Judge, parse_verdict
from msenc.pipelines.evaluate import evaluate
from msenc.types import Dialogue, MsencError, Utterance


def share(*texts):
    """A number from 0 to 1 that depends on the texts alone."""
    return int(hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:8], 16) / 16**8


def first_place(history, a, b):
    return {name: "A" if share(name, history, a, b) < 0.7 else "B" for name in ("empathy", "fit")}


def longer(history, a, b):
    return dict.fromkeys(("empathy", "fit"), "A" if len(a) > len(b) else "B")


def fair(history, a, b):
    return {name: "A" if share(name, history, a) > share(name, history, b) else "B" for name in ("empathy", "fit")}


def good(history, a, b):
    """For replies that say that they are good; else by content."""
    if ("good" in a) != ("good" in b):
        return {"empathy": "A" if "good" in a else "B", "fit": "tie"}
    return fair(history, a, b)


@contextmanager
def serving(prefers, answer=None):
    """A server that prefers as planted; `answer(number, text)` may replace what it would say by (status, text)."""
    received = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            received.append((self.path, dict(self.headers), body))
            asked = json.loads(body["messages"][1]["content"])
            texts = [asked[name]["text"] for name in ("reply A", "reply B")]
            status, text = 200, json.dumps(prefers(asked["dialogue"], *texts))
            if answer is not None:
                status, text = answer(len(received), text)
            content = json.dumps({"choices": [{"message": {"content": text}}]} if status == 200 else {"error": text})
            self.send_response(status)
            self.send_header("Content-Length", str(len(content.encode())))
            self.end_headers()
            self.wfile.write(content.encode())

    with answering(Handler) as url:
        yield url, received


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    monkeypatch.setenv("no_proxy", "*")


NUMBER = 30


def given(reply="So {}.", said="Fine {}."):
    """What `judge_replies` takes: dialogues of three turns, of which two are targets."""
    dialogues = [
        Dialogue(
            f"d/test/dia{n}",
            "test",
            tuple(
                Utterance(str(k), "AB"[k % 2], text) for k, text in enumerate(("Hi", said.format(n), said.format(-n)))
            ),
        )
        for n in range(NUMBER)
    ]
    dataset = SimpleNamespace(ids=[d.id for d in dialogues], dialogue=lambda index: dialogues[index])
    prompt = SimpleNamespace(target="text")
    datamodule = SimpleNamespace(dataset=lambda split: dataset, tokenizer=SimpleNamespace(prompt=prompt))
    predictions = [
        {
            "dialogue": d.id,
            "turn": turn,
            "history": [0, turn],
            "reference": {"text": d.utterances[turn].text, "description": None},
            "reply": {"text": reply.format(turn * n), "description": None},
            "scores": {},
        }
        for n, d in enumerate(dialogues)
        for turn in (1, 2)
    ]
    return datamodule, "test", predictions


def interval(found, name):
    effect = found["judge"]["intervals"][name]
    return effect["low"], effect["high"]


def test_a_judge_who_prefers_the_first_place_is_reported_as_such():
    with serving(first_place) as (url, _):
        found = judge_replies(Judge("planted", url), *given())
    low, high = interval(found, "bias/first")
    assert low < 0.7 < high
    assert low > 0.5
    assert high - low < 0.3
    low, high = interval(found, "bias/longer")
    assert low < 0.5 < high
    assert interval(found, "empathy")[0] < 0.5 < interval(found, "empathy")[1]  # both orders cancel it
    assert found["judge/inconsistent"] > 0.3
    (biased,) = [line for line in judge_lines(found) if "its bias" in line]
    assert f"the first place {100 * found['judge/bias/first']:.1f} %" in biased


def test_a_judge_who_prefers_the_longer_reply_is_reported_as_such():
    with serving(longer) as (url, _):
        found = judge_replies(Judge("planted", url), *given())
    assert found["judge/bias/longer"] == 1
    assert found["judge/bias/first"] == 0.5


def test_a_judge_of_the_content_has_no_bias_and_is_consistent():
    with serving(fair) as (url, _):
        found = judge_replies(Judge("planted", url), *given())
    assert found["judge/bias/first"] == 0.5
    assert found["judge/inconsistent"] == 0
    assert interval(found, "bias/longer")[0] < 0.5 < interval(found, "bias/longer")[1]


def test_a_better_reply_wins_and_each_has_its_score():
    datamodule, split, predictions = given(reply="A good {}.")
    with serving(good) as (url, _):
        found = judge_replies(Judge("planted", url), datamodule, split, predictions)
    assert (found["judge/empathy"], found["judge/fit"]) == (1, 0.5)
    assert all(item["scores"] == {"judge/empathy": 1.0, "judge/fit": 0.5} for item in predictions)
    with serving(good) as (url, _):
        datamodule, split, predictions = given(said="A good {}.")
        assert judge_replies(Judge("planted", url), datamodule, split, predictions)["judge/empathy"] == 0


def test_equal_questions_are_asked_once(tmp_path):
    with serving(first_place, lambda number, text: (time.sleep(0.005), (200, text))[1]) as (url, received):
        found = judge_replies(Judge("planted", url, cache=tmp_path), *given(reply="Fine 1.", said="Fine 1."))
    asked = [json.dumps(body["messages"]) for _, _, body in received]
    assert len(asked) == len(set(asked))
    assert found["judge/empathy"] == 0.5


def test_built_in_pairs_are_balanced():
    pairs = built_in_pairs()
    assert len(pairs["first"]) == len(pairs["longer"]) == 24
    for history, one, other in pairs["first"]:
        assert abs(len(one.text) - len(other.text)) < 15, history
    for _, one, other in pairs["longer"]:
        assert one.text in other.text
        assert len(other.text) > 3 * len(one.text)


@pytest.mark.parametrize(
    "answer",
    [
        "A",
        "",
        '{"empathy": "A"}',
        '{"empathy": "A", "fit": "C"}',
        '{"empathy": "A", "fit": "B", "why": "it is kind"}',
        '{"empathy": "A", "empathy": "B", "fit": "A"}',
        '[{"empathy": "A", "fit": "B"}]',
        '{"empathy": ["A"], "fit": "B"}',
        'Sure! {"empathy": "A", "fit": "B"}',
    ],
)
def test_what_is_no_verdict_is_none(answer):
    assert parse_verdict(answer) is None


def test_a_fenced_verdict_is_one():
    assert parse_verdict('```json\n{"empathy": "tie", "fit": "B"}\n```') == {"empathy": 0.5, "fit": 0.0}


def test_nonsense_and_failures_are_counted_and_their_replies_left_out(monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    lock = threading.Lock()
    state = {"bad": 0}

    def spoil(number, text):
        with lock:
            if number > 110 and state["bad"] < 6:
                state["bad"] += 1
                return (200, "I like both!") if state["bad"] % 2 else (500, "broken")
        return 200, text

    datamodule, split, predictions = given()
    with serving(fair, spoil) as (url, _):
        found = judge_replies(Judge("planted", url, max_retries=0, num_workers=1), datamodule, split, predictions)
    facts = found["judge"]
    assert (facts["no_verdict"], facts["failed"]) == (3, 3)
    without = [item for item in predictions if not item["scores"]]
    assert 3 <= len(without) == facts["left_out"] == len(predictions) - facts["pairs"]
    assert "3 questions failed (the last one: 500" in judge_lines(found)[-1]


def test_a_judge_who_answers_nothing_useful_is_refused():
    found = r"has given no pair a verdict in both orders: 0 questions failed, \d+ answers"
    with (
        serving(fair, lambda number, text: (200, "Both are fine.")) as (url, _),
        pytest.raises(MsencError, match=found),
    ):
        judge_replies(Judge("planted", url), *given())


@pytest.mark.parametrize("status", [401, 404, 301])
def test_what_every_question_would_meet_is_refused_at_once_without_the_key(status):
    found = rf"the judge refuses to answer: {status} .*OPENAI_API_KEY"
    with (
        serving(fair, lambda number, text: (status, "wrong key secret-key")) as (url, received),
        pytest.raises(MsencError, match=found) as refusal,
    ):
        judge_replies(Judge("planted", url), *given())
    assert len(received) == 1
    assert "secret-key" not in str(refusal.value)


def test_a_busy_server_is_asked_again(monkeypatch):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    with serving(fair, lambda number, text: (429, "busy") if number == 1 else (200, text)) as (url, _):
        found = judge_replies(Judge("planted", url), *given())
    assert waits == [0.5]
    assert found["judge"]["failed"] == 0


def test_a_server_that_is_not_there_is_said(monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with serving(fair) as (url, _):
        pass
    with pytest.raises(MsencError, match=r"questions failed \(.*Is the server running there\?\)"):
        judge_replies(Judge("planted", url, max_retries=0), *given())


def test_what_was_answered_is_not_asked_again(tmp_path):
    with serving(fair) as (url, received):
        first = judge_replies(Judge("planted", url, cache=tmp_path), *given())
        asked = len(received)
        again = judge_replies(Judge("planted", url, cache=tmp_path), *given())
        assert len(received) == asked
        assert first["judge"].pop("asked") == asked
        assert again["judge"].pop("asked") == 0
        assert again == first
        files = sorted(tmp_path.glob("*/*.json"))
        files[0].write_text("{")  # damaged: asked again
        judge_replies(Judge("planted", url, cache=tmp_path), *given())
        assert len(received) == asked + 1
        judge_replies(Judge("another", url, cache=tmp_path), *given())
        assert len(received) == 2 * asked + 1
    assert not any("secret-key" in file.read_text() for file in tmp_path.glob("*/*.json"))
    assert received[0][1]["Authorization"] == "Bearer secret-key"
    body = received[0][2]
    assert (body["temperature"], body["model"], body["messages"][0]["role"]) == (0, "planted", "system")


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({}, "expected either metric_settings.judge.model=NAME"),
        ({"model": "m", "name_or_path": "f"}, "expected either metric_settings.judge.model=NAME"),
        ({"model": "m", "base_url": "localhost"}, r"judge\.base_url: found .*localhost.*, expected an address"),
        ({"name_or_path": "/no/such"}, "cannot load"),
    ],
)
def test_a_judge_that_cannot_be_is_refused(settings, found):
    with pytest.raises(MsencError, match=found):
        Judge(**settings)


def test_an_llm_of_a_folder_is_asked_in_its_chat_template(tiny_models, monkeypatch):
    monkeypatch.setattr("msenc.evaluation.metrics.judge.MAX_ANSWER_TOKENS", 3)
    judge = Judge(name_or_path=str(tiny_models["llama"]))
    answer = judge([{"role": "system", "content": "Say A."}, {"role": "user", "content": "Hi"}])
    assert isinstance(answer, str)
    assert judge([{"role": "system", "content": "Say A."}, {"role": "user", "content": "Hi"}]) == answer
    with pytest.raises(MsencError, match=r"no pair a verdict in both orders: 0 questions failed, \d+ answers"):
        judge_replies(judge, *_few(given()))


def _few(arguments):
    datamodule, split, predictions = arguments
    return datamodule, split, predictions[:2]


def test_evaluate_judges_a_run_and_another_one_as_the_reference(short_run, compose, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MSENC_CACHE", str(tmp_path / "cache"))
    run = shutil.copytree(short_run, tmp_path / "judged")
    few = [f"run_dir={run}", "limit=3", "decoding.max_new_tokens=6"]
    with serving(first_place) as (url, received):
        judged = [
            *few,
            "metrics=[bleu,judge]",
            "metric_settings.judge.model=planted",
            f"metric_settings.judge.base_url={url}",
        ]
        (found,) = evaluate(compose(judged, "evaluate"))
        printed = capsys.readouterr().out
        assert "Judged by planted" in printed
        assert "its bias, on 48 built-in pairs (50 % is none): the first place" in printed
        (folder,) = run.glob("evaluation/*-test-*")
        assert read_metrics(folder)["judge/empathy"] == found["judge/empathy"]
        assert "judge/fit" in read_predictions(folder)[0]["scores"]
        asked = len(received)
        evaluate(compose([*judged, "overwrite=true"], "evaluate"))
        assert len(received) == asked
        # Against itself: each pair has equal replies, so that places decide.
        (own,) = evaluate(compose([*judged, f"metric_settings.judge.against={run}"], "evaluate"))
        assert own["judge"]["against"] == "another system's replies"
        assert own["judge/empathy"] == 0.5
    with pytest.raises(MsencError, match=r"judge\.against=.*found 0 evaluations of val there"):
        read_replies(run, "val", read_predictions(folder))
    with pytest.raises(MsencError, match=r"judge\.against=/no/such: no such folder"):
        evaluate(compose([*judged, "metric_settings.judge.against=/no/such"], "evaluate"))
