import json
import os
import wave
from pathlib import Path

import jiwer
import numpy as np
import pytest

from msenc.config.schema import plain
from msenc.pipelines.respond import load_agent, respond
from msenc.runs.record import read_run
from msenc.speech.synthesizers.espeak import ESpeak
from msenc.speech.wav import write_wav
from msenc.talk.agent import Turn, choose_speakers, read_talk
from msenc.training.assembly import build_datamodule
from msenc.types import MsencError


@pytest.fixture
def run(short_run):
    return short_run


@pytest.fixture
def clips(demo_home):
    return sorted((demo_home / "data" / "demo-raw").rglob("*.mp4"))


def answer(compose, run, out, *overrides):
    respond(compose([f"run_dir={run}", f"out={out}", "decoding.max_new_tokens=8", *overrides], "respond"))
    return json.loads((out / "reply.json").read_text(encoding="utf-8"))


def test_a_clip_has_the_features_of_the_shards_bit_by_bit(run, compose):
    config = plain(compose([f"run_dir={run}"], "respond"))
    agent = load_agent(run, config)
    cfg = read_run(run)[1]
    cfg.paths.output_dir = str(run)
    own = plain(cfg)
    datamodule = build_datamodule(own, "")
    datamodule.setup()
    dataset, root = datamodule.dataset("test"), Path(own["data"]["root"])
    checked = 0
    for index in range(len(dataset)):
        _, features = dataset[index]
        for turn, utterance in enumerate(dataset.dialogue(index).utterances):
            heard = agent.hear(Turn(utterance.speaker, utterance.text, video=root / utterance.clip))
            for stream in ("audio", "video"):
                stored = features[stream][turn]
                if stored is None:
                    assert stream not in heard.features
                else:
                    np.testing.assert_array_equal(heard.features[stream], stored)
                    checked += 1
    assert checked > 20


def test_text_alone_is_answered_and_what_is_missing_is_said(run, compose, tmp_path):
    reply = answer(compose, run, tmp_path / "out", "text='Hello!'")
    user, agent = read_run(run)[0]["speakers"]
    assert reply["history"] == [{"speaker": user, "text": "Hello!"}]
    assert reply["replies"][0]["speaker"] == agent != user
    assert {n.split(",")[0] for n in reply["notices"]} == {
        "The run was trained with audio",
        "The run was trained with video",
    }
    assert set(reply["replies"][0]["attributes"]) >= {"gender", "pitch", "rate"}


def test_a_history_is_read_and_alternatives_are_written(run, compose, clips, tmp_path):
    turns = [
        {"speaker": "Anna", "text": "Hello.", "video": str(clips[0])},
        {"speaker": "Ben", "text": "Good morning!"},
        {"speaker": "Anna", "text": "How do I look?", "audio": str(clips[1])},
    ]
    path = tmp_path / "talk.json"
    path.write_text(json.dumps({"turns": turns}), encoding="utf-8")
    reply = answer(compose, run, tmp_path / "out", f"history={path}", "decoding=sample", "num_replies=3")
    assert [t["speaker"] for t in reply["history"]] == ["Anna", "Ben", "Anna"]
    assert [r["speaker"] for r in reply["replies"]] == ["Ben"] * 3
    spoken = {n: one for n, one in enumerate(reply["replies"], start=1) if any(c.isalnum() for c in one["text"])}
    assert spoken
    assert {n for n, one in enumerate(reply["replies"], start=1) if "sound" in one} == set(spoken)
    for number, one in spoken.items():
        assert one["sound"] == f"reply-{number}.wav"
        with wave.open(str(tmp_path / "out" / one["sound"])) as file:
            assert file.getnframes() / file.getframerate() == pytest.approx(one["sound_s"], abs=1e-3)


@pytest.mark.real
def test_words_are_recognised_where_none_are_given(run, compose, clips, tmp_path):
    whisper = Path(os.environ.get("MSENC_MODELS", "nowhere")) / "whisper-base"
    if not whisper.is_dir():
        pytest.skip("MSENC_MODELS names no folder with whisper-base")
    said = "There was a small dog waiting in front of the bakery all afternoon."
    write_wav(tmp_path / "said.wav", *ESpeak()(said, "a man speaks slowly"))
    reply = answer(compose, run, tmp_path / "a", f"audio={tmp_path / 'said.wav'}", f"recogniser={whisper}")
    text = reply["history"][0]["text"]
    assert jiwer.wer(said.lower(), text.lower()) < 0.3
    assert f"Recognised: {text}" in reply["notices"]
    assert reply["seconds"]["recognition"] > 0
    # a video's own sound where no other is given, and the other where it is
    by_video = answer(compose, run, tmp_path / "v", f"video={clips[0]}", f"recogniser={whisper}")["history"][0]["text"]
    by_audio = answer(compose, run, tmp_path / "w", f"audio={clips[0]}", f"recogniser={whisper}")["history"][0]["text"]
    assert by_video == by_audio
    both = answer(
        compose, run, tmp_path / "b", f"video={clips[0]}", f"audio={tmp_path / 'said.wav'}", f"recogniser={whisper}"
    )
    assert both["history"][0]["text"] == text != by_video
    # in a history of three turns, only where words are missing
    turns = [
        {"speaker": "Anna", "text": "Hello.", "audio": str(tmp_path / "said.wav")},
        {"speaker": "Ben", "text": "Hi!"},
        {"speaker": "Anna", "audio": "said.wav"},
    ]
    (tmp_path / "talk.json").write_text(json.dumps({"turns": turns}), encoding="utf-8")
    reply = answer(compose, run, tmp_path / "h", f"history={tmp_path / 'talk.json'}", f"recogniser={whisper}")
    assert [t["text"] for t in reply["history"]] == ["Hello.", "Hi!", text]


def test_speakers_take_turns():
    before = [Turn("Ben"), Turn("Anna")]
    assert choose_speakers([], True, None, None) == ("User", "Agent")
    assert choose_speakers([], True, "Agent", None) == ("Agent", "User")
    assert choose_speakers(before, False, None, None) == ("Anna", "Ben")
    assert choose_speakers(before, True, None, None) == ("Ben", "Anna")
    assert choose_speakers(before, True, "Anna", None) == ("Anna", "Ben")
    assert choose_speakers(before[1:], True, None, None) == ("User", "Anna")
    assert choose_speakers([], True, None, None, ("Ana", "Leo")) == ("Ana", "Leo")
    assert choose_speakers([], True, "Leo", None, ("Ana", "Leo")) == ("Leo", "Ana")
    assert choose_speakers(before[1:], True, None, None, ("Anna", "Leo")) == ("Leo", "Anna")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["text=''"], "Nothing is said"),
        ([], "There is no turn to answer"),
        (["audio=nowhere.wav", "text=Hi"], r"audio=nowhere.wav: there is no such file"),
        (["audio={text}", "text=Hi"], "it cannot be decoded as sound or video"),
        (["video={clip}", "text=Hi", "max_clip_s=0.1"], "lasts longer than 0.1 s, which is the most for a turn"),
        (["audio={clip}", "recogniser={text}"], "what recognises it cannot be loaded. Give text="),
        (["history={text}"], "cannot be read as JSON"),
        (["text=Hi", "num_replies=2"], "decoding=sample"),
        (["text=Hi", "run_dir={text}"], "run_dir="),
    ],
    ids=["no words", "nothing", "absent", "no clip", "long", "no recogniser", "no history", "alternatives", "no run"],
)
def test_what_cannot_be_answered_is_refused(overrides, message, run, compose, clips, tmp_path):
    (tmp_path / "text.wav").write_text("no sound", encoding="utf-8")
    given = [o.format(text=tmp_path / "text.wav", clip=clips[0]) for o in overrides]
    with pytest.raises(MsencError, match=message):
        answer(compose, run, tmp_path / "out", *given)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"turns": 3}', ", turns: found 3, expected a list"),
        ('{"turns": [{"text": "Hi"}]}', r", turns\[0\]: found no speaker"),
        (
            '{"turns": [{"speaker": "A", "txt": "Hi"}]}',
            r", turns\[0\]: found the key 'txt', expected none but speaker, text",
        ),
        ('{"turns": [{"speaker": "A", "text": 3}]}', r", turns\[0\]\.text: found 3"),
    ],
)
def test_a_history_that_is_none_is_refused(content, message, tmp_path):
    path = tmp_path / "talk.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(MsencError, match=message):
        read_talk(path)


def test_what_is_typed_needs_no_second_quotes(run, call_script, tmp_path):
    call_script(
        "respond.py", f"run_dir={run}", "text=That's amazing, isn't it?", "speech=none", f"out={tmp_path / 'out'}"
    )
    reply = json.loads((tmp_path / "out" / "reply.json").read_text(encoding="utf-8"))
    assert reply["history"][0]["text"] == "That's amazing, isn't it?"
    assert not (tmp_path / "out" / "reply.wav").exists()
    with pytest.raises(SystemExit, match="holds a reply already"):
        call_script("respond.py", f"run_dir={run}", "text=Hi", f"out={tmp_path / 'out'}")
