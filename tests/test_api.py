"""`import msenc`: a run is trained, loaded and talked to; an export replies as its run does, also elsewhere."""

import shutil
import subprocess
import sys
import wave
from pathlib import Path

import pytest
from conftest import SMALL_DEMO

import msenc
from msenc.api import Run
from msenc.talk.agent import Turn
from msenc.types import MsencError

SHORT = ["decoding.max_new_tokens=8"]


@pytest.fixture(scope="module")
def agent(short_run):
    return msenc.load(short_run, SHORT)


@pytest.fixture(scope="module")
def clip(demo_home):
    return sorted((demo_home / "data" / "demo-raw").rglob("*.mp4"))[0]


def test_a_run_is_trained_and_loaded(demo_home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    steps = ["trainer.max_steps=2", "trainer.max_epochs=1", "evaluate=val", "control=shuffle", *SHORT]
    run = msenc.train(["modality=text_audio", *SMALL_DEMO, *steps, "resume=auto"])
    assert (run.folder / "run.json").is_file()
    assert run.metrics["targets"] == 14
    assert "control/delta" not in run.metrics
    assert msenc.train(["modality=text_audio", *SMALL_DEMO, *steps, "resume=auto"]).folder == run.folder
    assert msenc.load(run, SHORT).reply("Hello!").speaker


def test_a_reply_is_that_of_the_command(agent, short_run, clip, call_script, tmp_path):
    from msenc.files import read_json

    reply = agent.reply("How do I look?", video=clip)
    call_script(
        "respond.py", f"run_dir={short_run}", "text=How do I look?", f"video={clip}", f"out={tmp_path / 'A'}", *SHORT
    )
    written = read_json(tmp_path / "A" / "reply.json")["replies"][0]
    assert (reply.text, reply.description, reply.speaker) == (
        written["text"],
        written["description"],
        written["speaker"],
    )
    assert reply.notices == ()
    with wave.open(str(reply.save(tmp_path / "B.wav"))) as ours, wave.open(str(tmp_path / "A" / "reply.wav")) as its:
        assert ours.getparams() == its.getparams()
        assert ours.readframes(10**7) == its.readframes(10**7)


def test_an_export_replies_as_its_run_does_when_the_run_is_gone(agent, short_run, clip, tmp_path):
    elsewhere = tmp_path / "shared" / "agent"
    shutil.copytree(short_run / "export", elsewhere)
    copied = msenc.load(elsewhere, SHORT)
    for question in ({"text": "Hello there."}, {"text": "How do I sound?", "video": clip}):
        ours, its = agent.reply(**question), copied.reply(**question)
        assert (ours.text, ours.description, ours.speaker) == (its.text, its.description, its.speaker)


def test_an_export_is_told_where_its_models_lie(agent, short_run, demo_home):
    named = {"base": demo_home / "data" / "tiny-llm", "encoders": {"audio": demo_home, "video": demo_home}}
    with pytest.raises(MsencError, match=r"^encoders\.audio: sets one path of an encoder, and this one has no model"):
        msenc.load(short_run / "export", SHORT, **named)
    with pytest.raises(MsencError, match=r"encoders\.text: .* has no such stream, only audio, video"):
        msenc.load(short_run / "export", [*SHORT, "encoders.text=FOLDER", f"base={demo_home}"])
    for key in ("base=FOLDER", "encoders.audio=FOLDER"):
        with pytest.raises(MsencError, match=r"is of an export, and .* is a run"):
            msenc.load(short_run, [*SHORT, key])


def test_a_talk_remembers_its_turns(agent, clip):
    talk = agent.talk()
    first = talk.say("Hello.", video=clip)
    second = talk.say("And now?")
    assert [turn.text for turn in talk.turns] == ["Hello.", first.text, "And now?", second.text]
    assert len({turn.speaker for turn in talk.turns}) == 2
    with pytest.raises(MsencError, match="there is no such file"):
        talk.say("And this?", audio="absent.wav")
    assert len(talk.turns) == 4
    by_hand = agent.reply("And now?", history=[talk.turns[0], vars(talk.turns[1])])
    assert by_hand.text == second.text


def test_a_notebook_shows_words_and_sound_and_runs_nothing(agent):
    reply = agent.reply("Hello!", speaker="Ann", reply_as="<script>")
    shown = reply._repr_html_()
    assert "<script>" not in shown
    assert "&lt;script&gt;" in shown
    assert ('<audio controls src="data:audio/wav;base64,' in shown) == (reply.sound is not None)


def test_without_a_synthesizer_there_is_no_sound(short_run, tmp_path):
    reply = msenc.load(short_run, [*SHORT, "speech=null"]).reply("Hello!")
    assert reply.sound is None
    with pytest.raises(MsencError, match="no sound"):
        reply.save(tmp_path / "A.wav")


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda agent: msenc.load("nowhere"), "run_dir=nowhere: does not exist"),
        (lambda agent: msenc.load(Run(Path("gone"), None, {})), "run_dir=gone: does not exist"),
        (lambda agent: msenc.train(["modalty=text"]), "modalty: no such key. Did you mean 'modality'?"),
        (lambda agent: msenc.train(["sweep=modality"]), "trains one run"),
        (lambda agent: msenc.train(["-m", "seed=1,2"]), "trains one run"),
        (lambda agent: msenc.train(["seed"]), "'seed': no value"),
        (lambda agent: agent.reply(), "There is no turn to answer"),
        (lambda agent: agent.reply("Hi", history=[3]), "history, turns[0]: "),
        (lambda agent: agent.reply("Hi", history=[{"who": "A"}]), "history, turns[0]"),
        (lambda agent: agent.reply("Hi", history=[{"speaker": "A", "text": 5}]), "history, turns[0].text: "),
        (lambda agent: agent.reply("Hi", history=[{"speaker": "A", "text": "a" * 3000}]), "at most 2,000 characters"),
        (lambda agent: agent.reply("Hi", history=[Turn("A", "a")] * 101), "at most 100 turns"),
        (lambda agent: agent.reply("Hi", history="absent.json"), "absent.json"),
    ],
)
def test_what_cannot_be_done_is_refused(agent, call, said):
    with pytest.raises(MsencError) as refused:
        call(agent)
    assert said in str(refused.value)


def test_importing_it_imports_nothing_heavy():
    code = "import sys, msenc; assert not {'torch', 'hydra'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
