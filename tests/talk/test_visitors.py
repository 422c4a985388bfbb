"""Many visitors at the page, and strangers at its door, by HTTP as a browser speaks it."""

import json
import os
import time
import zipfile
from pathlib import Path

import httpx
import numpy as np
import pytest

from msenc.config.schema import plain
from msenc.pipelines.respond import load_agent, respond
from msenc.raw.media import read_audio
from msenc.speech.wav import write_wav
from msenc.talk.address import Address, is_loopback
from msenc.talk.agent import MAX_CHARACTERS, MAX_TURNS, AbandonedError, Heard, Turn, read_talk
from msenc.types import MsencError

pytest.importorskip("gradio", reason="the page needs the extra talk")

from page import Visitor, as_file, bytes_below, load_page, served
from starlette.responses import Response
from starlette.testclient import TestClient

from msenc.talk.page import media_suffix
from msenc.talk.saved import read_saved
from msenc.talk.serve import Guard
from msenc.talk.visitors import Talk, Visitors

PASSWORD = "Mäuse, 7 = 'ja'"
DENIED = "Another site asked for this"


@pytest.fixture(scope="module")
def page(short_run, tmp_path_factory):
    """A page with a password and narrow limits: its address, and the folder of its temporary files."""
    folder = tmp_path_factory.mktemp("temporary")
    given = [f"page_password={PASSWORD}", "max_upload_mb=1", "max_total_mb=3", "speaker=User", "reply_as=Agent"]
    with served(short_run, folder, given) as (address, _):
        yield address, folder
    assert bytes_below(folder) == 0


@pytest.fixture
def visitor(page, request):
    name = "".join(c if c.isalnum() else "_" for c in request.node.name)[-60:]
    with Visitor(page[0], name, PASSWORD) as visitor:
        yield visitor


def ask(page, method="GET", path="/", password=PASSWORD, content=None, **headers):
    """A request as it is written, not as a client would put it right."""
    auth = None if password is None else ("any name", password)
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    with httpx.Client(base_url=page[0], auth=auth, trust_env=False, timeout=60) as client:
        request = client.build_request(method, "/", headers=headers, content=content)
        request.url = request.url.copy_with(raw_path=path.encode())
        return client.send(request, auth=auth)


def test_many_visitors_get_right_answers_and_nothing_is_mixed_up(short_run, tmp_path):
    found = load_page(short_run, tmp_path, 30, 60, [], wait_s=0)
    assert found["right"] == found["replies"] >= 50
    assert found["mixed up"] == 0
    assert found["gone in mid-turn"] > 5
    assert found["status of 300 MB"] == [413, 413]
    assert found["opening p95 s"] < found["turn p95 s"]
    assert found["memory growth, peak MiB"] < 300
    assert found["temporary files, peak MiB"] < 60


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "evil.example:7860", "10.1.2.3", "[::2]"])
def test_a_foreign_name_that_leads_here_is_refused(host, page):
    answer = ask(page, host=host)
    assert answer.status_code == 403
    assert "is no address of this page" in answer.text


@pytest.mark.parametrize("host", ["localhost", "localhost:80", "127.0.0.1:1", "[::1]:80"])
def test_a_tunnel_to_this_machine_is_let_through(host, page):
    assert ask(page, host=host).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://localhost:1"},
        {"sec_fetch_site": "cross-site"},
        {"sec_fetch_site": "same-site"},
    ],
)
@pytest.mark.parametrize(("method", "path"), [("POST", "/gradio_api/queue/join"), ("GET", "/config")])
def test_another_site_gets_nothing(method, path, headers, page):
    answer = ask(page, method, path, content=b"{}" if method == "POST" else None, **headers)
    assert answer.status_code == 403
    assert DENIED in answer.text


@pytest.mark.parametrize("password", [None, "", "wrong", PASSWORD.lower(), PASSWORD + " "])
@pytest.mark.parametrize("path", ["/", "/config", "/gradio_api/heartbeat/x", "/gradio_api/file=/etc/passwd"])
def test_without_the_password_nothing_is_shown(path, password, page):
    answer = ask(page, path=path, password=password)
    assert (answer.status_code, answer.headers["www-authenticate"][:5]) == (401, "Basic")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/gradio_api/info"),
        ("GET", "/gradio_api/openapi.json"),
        ("GET", "/gradio_api/runs"),
        ("GET", "/gradio_api/deep_link?session_hash=x"),
        ("GET", "/gradio_api/proxy=https://x.hf.space/"),
        ("GET", "/gradio_api/file=http://127.0.0.1:1/"),
        ("GET", "/gradio_api/file=/etc/passwd"),
        ("GET", "/gradio_api/file=../../../../etc/passwd"),
        ("GET", "/gradio_api/file={folder}/../../../../../../../../../etc/passwd"),
        ("GET", "/gradio_api/file=%2e%2e/%2e%2e/etc/passwd"),
        ("GET", "/assets/../../../../../../../../etc/passwd"),
        ("GET", "/static/%2e%2e/%2e%2e/%2e%2e/routes.py"),
        ("GET", "/monitoring/summary"),
        ("GET", "/monitoring"),
        ("POST", "/gradio_api/process_recording"),
        ("POST", "/gradio_api/component_server"),
        ("POST", "/gradio_api/run/on_send"),
        ("POST", "/gradio_api/call/on_send"),
        ("POST", "/gradio_api/run-history/connect"),
        ("POST", "/gradio_api/vibe-edit"),
        ("POST", "/login"),
        ("DELETE", "/"),
    ],
)
def test_what_the_page_does_not_ask_for_is_not_there(method, path, page):
    answer = ask(page, method, path.format(folder=page[1]), content=b"{}" if method == "POST" else None)
    assert answer.status_code in (403, 404)
    assert "root:" not in answer.text


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{",
        b"[" * 100_000,
        b'{"data": []}',
        b'{"data": [], "session_hash": "../x"}',
        b'{"data": [], "session_hash": ["x"]}',
        json.dumps({"session_hash": "x", "data": [as_file("http://127.0.0.1:1/x.wav")]}).encode(),
        json.dumps({"session_hash": "x", "data": [as_file("/etc/passwd")]}).encode(),
        json.dumps({"session_hash": "x", "data": [{"a": [as_file("uploads/../x")]}]}).encode(),
    ],
)
@pytest.mark.parametrize("path", ["/gradio_api/queue/join", "/gradio_api/run/predict"])
def test_a_call_that_is_none_gets_a_sentence(path, body, page):
    answer = ask(page, "POST", path, content=body, content_type="application/json")
    assert answer.status_code == 400
    assert answer.json()["detail"][-1] == "."


def test_a_call_may_not_be_endless(page):
    answer = ask(page, "POST", "/gradio_api/queue/join", content=(bytes(1 << 20) for _ in range(100)))
    assert answer.status_code == 413


@pytest.mark.parametrize(
    ("query", "content", "status"),
    [
        ("", b"", 400),
        ("?session_hash=../x", b"", 400),
        ("?session_hash=x", bytes(4 * 32_000 + 1), 413),
        ("?session_hash=x", (bytes(1 << 16) for _ in range(100)), 413),
    ],
)
def test_a_microphone_may_send_so_much_and_no_more(query, content, status, page):
    answer = ask(page, "POST", f"/talk/listen{query}", content=content)
    assert answer.status_code == status
    assert answer.json()["detail"][-1] == "."


def test_a_microphone_is_heard_by_whoever_has_the_password_and_from_this_page(page):
    pytest.importorskip("silero_vad")
    path = "/talk/listen?session_hash=x"
    assert ask(page, "POST", path, content=bytes(3072)).json() == {"speaking": False, "turns": []}
    assert ask(page, "POST", path, content=b"x").json() == {"speaking": False, "turns": []}  # half a sample
    assert ask(page, "POST", path, password=None, content=bytes(3072)).status_code == 401
    assert ask(page, "POST", path, content=bytes(3072), origin="http://evil.example").status_code == 403
    assert ask(page, "GET", path).status_code == 404


def test_turns_that_cannot_be_taken_get_a_sentence(visitor, page):
    assert "Nothing is said yet" in visitor.say("")
    assert "The text has 500,000 characters" in visitor.say("x" * 500_000)
    run, visitor.run = visitor.run, "/etc"
    assert "There is no such run here" in visitor.say("Hello!")
    visitor.run = run
    assert visitor.saved() is None
    assert visitor.say("Hello!") is not None
    assert visitor.saved() is not None


def test_clips_of_equal_content_belong_to_their_visitors(visitor, page, demo_home, tmp_path):
    clip = sorted((demo_home / "data" / "demo-raw").rglob("*.mp4"))[0]
    path = tmp_path / "hello.wav"
    write_wav(path, read_audio(clip, 16_000), 16_000)
    with Visitor(page[0], "the_other", PASSWORD) as other:
        first, second = (v.upload(path.read_bytes(), "hello.wav").json()[0] for v in (visitor, other))
        assert first != second
        visitor.say("How do I sound?", audio=first)
        visitor.call("on_new")
        other.say("How do I sound?", audio=second)
        (tmp_path / "talk.zip").write_bytes(other.saved())
    turns = read_saved(tmp_path / "talk.zip", tmp_path / "talk", 10**7)
    assert turns[0].audio.read_bytes() == path.read_bytes()
    assert not Path(first).exists()
    assert not Path(second).exists()


def test_an_upload_shown_as_a_page_runs_nothing(visitor):
    (path,) = visitor.upload(b"<script>alert(1)</script>", "x.html").json()
    assert visitor.http.get(f"/gradio_api/file={path}").headers["content-security-policy"].startswith("sandbox")


def test_a_clip_that_moves_while_it_is_asked_for_is_no_fault_of_the_page(tmp_path):
    visitors = Visitors(tmp_path, 1000)
    with visitors.incoming(1) as place:
        path = place / "spoken.wav"
        path.write_bytes(b"x")

    async def app(scope, receive, send):
        visitors.drop(path)
        await Response(status_code=500)(scope, receive, send)
        raise RuntimeError("does not exist")  # as Starlette's FileResponse, through its ServerErrorMiddleware

    guard = Guard(app, visitors, None, "127.0.0.1", None, 1000)
    assert TestClient(guard, base_url="http://localhost").get(f"/gradio_api/file={path}").status_code == 500


def test_space_is_limited_for_all_together(page):
    with Visitor(page[0], "greedy", PASSWORD) as greedy:
        answers = [greedy.upload(os.urandom(900_000), f"{n}.wav") for n in range(5)]
        assert [a.status_code for a in answers] == [200, 200, 200, 507, 507]
        assert "All visitors' talks and uploads together may take 3 MiB" in answers[-1].text
        assert bytes_below(page[1]) <= 3 << 20
        for answer in answers[:3]:  # they are of no use as audio, and a talk that does not take them leaves them
            assert "cannot be decoded" in greedy.say("Hello!", audio=answer.json()[0])
    for place in page[1].rglob("uploads/*"):
        os.utime(place, (1, 1))
    with Visitor(page[0], "patient", PASSWORD) as patient:  # what was not used for a while makes room
        assert patient.upload(os.urandom(900_000), "x.wav").status_code == 200
    for place in page[1].rglob("uploads/*"):
        os.utime(place, (1, 1))


@pytest.mark.parametrize("size", [1 << 20, (1 << 20) + 1, 5 << 20])
def test_an_upload_ends_at_the_limit_whatever_it_says(size, page):
    head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="x.wav"\r\n\r\n'
    body = head + bytes(size) + b"\r\n--x--\r\n"
    for content in (body, iter([body[:1000], body[1000:]])):
        answer = ask(
            page, "POST", "/gradio_api/upload", content=content, content_type="multipart/form-data; boundary=x"
        )
        assert answer.status_code == (200 if size <= 1 << 20 else 413), answer.text
        for place in page[1].rglob("uploads/*"):
            os.utime(place, (1, 1))


def test_a_continued_and_a_new_talk_take_the_old_ones_place(visitor, page):
    visitor.say("Hello!")
    talks = lambda: {path.name for path in page[1].glob("*/talks/*")}  # noqa: E731
    (old,) = talks()
    saved = visitor.saved()
    (path,) = visitor.upload(saved, "talk.json").json()
    assert "talk.json: 2 turns" in visitor.wait_for("on_continue", as_file(path), visitor.run)
    (new,) = talks()
    assert new != old
    assert not Path(path).exists()
    visitor.say("And now?")
    assert len(json.loads(visitor.saved())["turns"]) == 4
    for content, message in [
        (b"no talk", "cannot be read as JSON"),
        (b"[" * 100_000, "cannot be read as JSON"),
        (b'{"turns": 3}', "expected a list"),
        (b'{"turns": [{"speaker": "A", "text": "Hi", "audio": "/etc/passwd"}]}', "is not in the file"),
        (json.dumps({"turns": [{"speaker": "A", "text": "x" * 2001}]}).encode(), "at most 2,000 characters"),
        (json.dumps({"turns": [{"speaker": "A", "text": "x"}] * 101}).encode(), "at most 100 turns"),
        (b"PK\x05\x06" + bytes(18), "holds no talk.json"),
        (bytes(900_000), "cannot be read as JSON"),
    ]:
        (path,) = visitor.upload(content, "talk.json").raise_for_status().json()
        said = visitor.wait_for("on_continue", as_file(path), visitor.run)
        assert message in said, said
        assert str(page[1]) not in said
    assert len(json.loads(visitor.saved())["turns"]) == 4
    visitor.call("on_new")
    assert talks() == set()


def test_who_goes_in_mid_turn_leaves_no_half_a_turn(page):
    with Visitor(page[0], "hasty", PASSWORD) as hasty:
        hasty.say("Hello!")
        hasty.say_and_go("Nobody reads this.")
        hasty.say("Still here.")
        texts = [turn["text"] for turn in json.loads(hasty.saved())["turns"]]
    assert (texts[0], texts[2], len(texts)) == ("Hello!", "Still here.", 4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["host=0.0.0.0"], "whoever reaches this machine could open the page. Give page_password"),
        (["host=0.0.0.0", "page_password='  '"], "an empty password keeps nobody out"),
        (["host=''"], "host: found '', expected a text"),
        (["max_total_mb=0"], "max_total_mb: found 0"),
    ],
)
def test_a_page_for_others_is_not_served_by_mistake(overrides, message, compose, monkeypatch):
    monkeypatch.delenv("MSENC_PAGE_PASSWORD", raising=False)
    with pytest.raises(MsencError, match=message):
        respond(compose(["page=true", "speech=none", *overrides], "respond"))


def test_a_password_is_warned_with_and_written_nowhere(short_run, tmp_path):
    here = tmp_path / "here"
    here.mkdir()
    with served(short_run, here, ["host=0.0.0.0", f"page_password={PASSWORD}"]) as (address, _):
        assert ask((address, here), host="evil.example").status_code == 403
        assert ask((address, here), password=None).status_code == 401
        assert ask((address, here), host="192.0.2.7:80").status_code == 200
        assert not [p for p in here.rglob("*") if p.is_file() and PASSWORD.encode() in p.read_bytes()]


def test_sigterm_while_a_reply_is_written_leaves_nothing(short_run, tmp_path):
    with served(short_run, tmp_path, ["decoding.max_new_tokens=2000", "+decoding.min_new_tokens=2000"]) as (
        address,
        pid,
    ):
        visitor = Visitor(address, "waiting")
        visitor.open()
        visitor.say_and_go("Hello!")
        with Visitor(address, "next") as other:  # the first one's reply, of minutes, is not written to its end
            began = time.monotonic()
            other.wait_for("on_continue", None, other.run)
            assert time.monotonic() - began < 5
        visitor.join("on_send", visitor.run, "Hello again!", None, None, None)
        assert any(tmp_path.rglob("talks"))
        os.kill(pid, 15)
        os.kill(pid, 15)
    assert not [*tmp_path.glob("msenc-talk-*")]


def test_addresses_and_names():
    assert [is_loopback(h) for h in ("127.0.0.1", "127.9.9.9", "localhost", "0.0.0.0", "192.0.2.1", "")] == [
        *(True, True, True),
        *(False, False, False),
    ]
    assert Address("192.0.2.1").is_named("192.0.2.1:7860")
    assert not Address("0.0.0.0").is_named("evil.example")


def test_a_reply_that_nobody_waits_for_is_not_written(short_run, compose):
    agent = load_agent(short_run, plain(compose([], "respond")))
    asked = []

    def is_wanted():
        asked.append(1)
        return len(asked) < 4

    heard = [agent.hear(Turn("User", "Hello!"))]
    decoding = {"batch_size": 1, "max_new_tokens": 500, "min_new_tokens": 500}
    with pytest.raises(AbandonedError):
        agent.answer(heard, "Agent", decoding, is_wanted=is_wanted)
    assert len(asked) == 4


def test_limits_hold_for_every_way_in(short_run, compose, tmp_path):
    agent = load_agent(short_run, plain(compose([], "respond")))
    with pytest.raises(MsencError, match="a turn may have 2,000"):
        agent.hear(Turn("User", "x" * (MAX_CHARACTERS + 1)))
    path = tmp_path / "talk.json"
    for turns in ([{"speaker": "A", "text": "x"}] * (MAX_TURNS + 1), [{"speaker": "A" * 101, "text": "x"}]):
        path.write_text(json.dumps({"turns": turns}))
        with pytest.raises(MsencError, match=r"expected"):
            read_talk(path)


def test_a_turn_whose_talk_was_put_away_has_no_place(tmp_path):
    visitors = Visitors(tmp_path, 1000)
    moment = visitors.moment("a")
    talk = Talk(visitors.new_folder())
    assert visitors.replace("a", moment, None)  # "New talk" in the middle of the first turn
    assert not visitors.replace("a", moment, talk)
    assert not talk.folder.exists()
    assert visitors.talk("a") is None


def test_memory_and_disk_count_and_who_left_makes_room(tmp_path):
    visitors = Visitors(tmp_path, 10_000)
    heard = Heard(Turn("A", "x"), {"audio": np.zeros((1000, 2), np.float16)})
    for name in ("left", "here"):
        visitors.replace(name, visitors.moment(name), Talk(visitors.new_folder(), turns=(heard,)))
    assert visitors.used() == 8000
    with visitors.present("here"):
        visitors.make_room(4000)
        assert visitors.talk("left") is None
        assert visitors.used() == 4000
        (visitors.talk("here").folder / "x").write_bytes(bytes(3000))
        with pytest.raises(MsencError, match="together may take"):
            visitors.make_room(4000)
        visitors.sweep()
        assert visitors.talk("here") is not None
        with visitors.incoming(2000), pytest.raises(MsencError, match="together may take"):
            visitors.make_room(2000)


def test_who_left_a_while_ago_is_forgotten(tmp_path, monkeypatch):
    visitors = Visitors(tmp_path, 10_000)
    with visitors.present("a"):
        visitors.replace("a", visitors.moment("a"), Talk(visitors.new_folder()))
    visitors.sweep()
    assert len([*visitors.talks.iterdir()]) == 1
    later = time.monotonic() + 61
    monkeypatch.setattr("msenc.talk.visitors.time.monotonic", lambda: later)
    visitors.sweep()
    assert [*visitors.talks.iterdir()] == []


def test_an_archive_that_says_too_little_is_not_unpacked(tmp_path):
    path = tmp_path / "talk.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("talk.json", '{"turns": [' + " " * 1_000_000 + "]}")
    data = path.read_bytes()
    at = data.index(b"PK\x01\x02") + 24
    path.write_bytes(data[:at] + (100).to_bytes(4, "little") + data[at + 4 :])  # the size that it states
    with pytest.raises(MsencError, match=r"talk\.zip"):
        read_saved(path, tmp_path / "unpacked", 10_000)
    assert bytes_below(tmp_path / "unpacked") <= 10_000


def test_what_is_no_media_is_not_called_so():
    assert [media_suffix(Path(n)) for n in ("a.WAV", "a.mp4", "a.html", "a.svg", "a")] == [
        *(".wav", ".mp4", ".bin", ".bin", ".bin")
    ]
