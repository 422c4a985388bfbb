"""Hostile clips among good ones: the preparation ends, lists them, and opens nothing but the clips."""

import struct
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
from media import RATE, Track, Video, noise, one_bad, tone, write, write_endless_flac, write_endless_wav

from msenc.models.encoders import LogMel, Pixels
from msenc.prepare.dataset import prepare_dataset
from msenc.prepare.features import StreamRecipe
from msenc.raw.annotations import read_table
from msenc.raw.audit import audit_dataset
from msenc.raw.container import MediaError
from msenc.raw.media import read_audio, read_frames, read_properties

LOGMEL = {"sample_rate": 16000, "n_fft": 512, "hop_s": 0.05, "num_mels": 8}
PIXELS = {"fps": 2, "size": 4}
STREAMS = [
    StreamRecipe("audio", "logmel", 8, partial(LogMel, **LOGMEL), LOGMEL),
    StreamRecipe("video", "pixels", 16, partial(Pixels, **PIXELS), PIXELS),
]
LISTS = {
    "a.m3u8": "#EXTM3U\n#EXTINF:2,\n{secret}\n#EXT-X-ENDLIST\n",
    "b.mp4": "#EXTM3U\n#EXTINF:2,\n{secret}\n#EXT-X-ENDLIST\n",
    "c.ffconcat": "ffconcat version 1.0\nfile {secret}\n",
    "d.wav": "ffconcat version 1.0\nfile {secret}\n",
    "e.mpd": '<?xml version="1.0"?><MPD><Period><BaseURL>{secret}</BaseURL></Period></MPD>',
    "f.mkv": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"></MPD>',
    "g.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 5004 RTP/AVP 0\n",
    "h.mp3": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 5004 RTP/AVP 0\n",
    "i.pls": "[playlist]\nFile1={secret}\n",
    "j.asx": '<asx version="3.0"><entry><ref href="{secret}"/></entry></asx>',
}
OTHERS = {  # formats of FFmpeg's that hold no media of their own, by content or by name
    "k.srt": "1\n00:00:00,000 --> 00:00:01,000\nHello\n",
    "l.ass": "[Script Info]\nScriptType: v4.00+\n[Events]\nDialogue: 0,0:00:00.00,0:00:01.00,x,,0,0,0,,Hi\n",
    "m.lavfi": "sine=frequency=440",
    "n%03d.png": "no picture",
    "o.txt": "http://127.0.0.1:9/a.mp4",
}


def write_wav_header(path: Path, rate: int, num_bytes: int = 32000) -> None:
    body = b"fmt " + struct.pack("<IHHIIHH", 16, 1, 1, rate, (2 * rate) & 0xFFFFFFFF, 2, 16)
    body += b"data" + struct.pack("<I", num_bytes) + b"\x01\x10" * (num_bytes // 2)
    path.write_bytes(b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WAVE" + body)


def write_huge(path: Path) -> None:
    """Pictures of 20,000 x 20,000 pixels in some kilobytes."""
    write(path, Track([(0.0, tone(440, 1))]), video=Video("mjpeg", seconds=0.5))
    size = struct.pack(">HH", 48, 64)
    data = path.read_bytes()
    assert data.count(b"\xff\xc0\x00\x11\x08" + size) == 5
    path.write_bytes(
        data.replace(b"\xff\xc0\x00\x11\x08" + size, b"\xff\xc0\x00\x11\x08" + struct.pack(">HH", 20_000, 20_000))
    )


@pytest.fixture
def root(tmp_path) -> Path:
    root = tmp_path / "raw"
    root.mkdir()
    secret = tmp_path / "secret.ts"  # outside of data.root
    write(secret, Track([(0.0, tone(440, 2))]), video=Video())
    for number in range(4):
        write(root / f"good{number}.mp4", Track([(0.0, tone(440 + number, 1))]), video=Video(seconds=1))
    for name, text in (LISTS | OTHERS).items():
        (root / name).write_text(text.format(secret=secret))
    write_wav_header(root / "slow.wav", 1)
    write_wav_header(root / "fast.wav", 2**31 - 1)
    write_wav_header(root / "none.wav", 0)
    write_huge(root / "huge.mkv")
    write_endless_flac(root / "endless.flac")
    write_endless_wav(root / "endless.wav")
    write(root / "damaged.mkv", Track([(0.0, noise(6))]), video=Video(seconds=6), damage=one_bad)
    (root / "link.mp4").symlink_to(secret)
    (root / "broken.mp4").symlink_to(tmp_path / "nothing")
    return root


def table(root: Path, names: list[str]) -> Path:
    rows = "".join(
        f'"{name}",dia{n // 2},A,words {n},{"test" if n == 0 else "train"}\n' for n, name in enumerate(names)
    )
    rows = rows.replace(",dia0,A,words 1,train", ",dia0,A,words 1,test")
    (root / "utterances.csv").write_text("clip,dialogue,speaker,text,split\n" + rows)
    return root / "utterances.csv"


def test_a_preparation_with_hostile_clips_ends_and_lists_them(root, tmp_path):
    names = [*sorted(path.name for path in root.iterdir()), "http://127.0.0.1:9/a.mp4", "x" * 300 + ".mp4"]
    annotations = read_table(table(root, names), "mine", {"rule": "random"})
    clip_of = {f"{d.id}/utt{u.id}": u.clip for d in annotations.dialogues for u in d.utterances}
    manifest = prepare_dataset("mine", annotations, root, tmp_path / "out", STREAMS, num_workers=0)
    audit = audit_dataset("mine", annotations, root, tmp_path / "out", num_workers=0)
    reasons = {clip_of[r.id]: r.reason for r in audit.rejections if r.what == "audio"}
    assert {name for name in names if name not in reasons} == {
        *(f"good{n}.mp4" for n in range(4)),
        *("link.mp4", "huge.mkv", "endless.flac", "endless.wav", "damaged.mkv"),
    }
    assert {reasons[name] for name in LISTS} == {"playlist"}
    assert {reasons[name] for name in OTHERS} == {"clip corrupt"}
    assert reasons["slow.wav"] == reasons["fast.wav"] == "bad sample rate"
    assert reasons["broken.mp4"] == reasons["http://127.0.0.1:9/a.mp4"] == "clip missing"
    video = {clip_of[r.id]: r.reason for r in audit.rejections if r.what == "video"}
    assert video["huge.mkv"] in ("clip too large", "clip corrupt")
    assert sum(n for reason, n in manifest.rejected.items() if "playlist" in reason) == 2 * len(LISTS)
    assert {flag.file for flag in audit.flags if flag.flag == "playlist"} == {*LISTS}
    assert {flag.file for flag in audit.flags if flag.flag == "damaged_packets"} >= {"damaged.mkv"}
    listed = (tmp_path / "out" / "rejected.csv").read_text(encoding="utf-8")
    assert all(name in listed for name in (*LISTS, *OTHERS, "slow.wav", "fast.wav", "broken.mp4"))
    turns = sum(stream.utterances.get("train", 0) for name, stream in manifest.streams.items() if "logmel" in name)
    assert turns == len(names) - len(reasons) - sum(clip_of[f"mine/test/dia0/utt{n}"] not in reasons for n in (0, 1))


@pytest.mark.parametrize("name", [*LISTS, *OTHERS])
def test_nothing_beside_the_clip_is_opened(name, root, tmp_path):
    """Whatever a clip names, FFmpeg opens no file of it: what it named may as well be gone."""
    for read in (lambda p: read_audio(p, RATE), lambda p: read_frames(p, 3), read_properties):
        with pytest.raises(MediaError, match=r"playlist|clip corrupt"):
            read(root / name)


def test_a_clip_without_stated_length_keeps_the_limit(tmp_path):
    path = tmp_path / "a.flac"
    write_endless_flac(path)
    with av.open(str(path)) as file:
        assert file.duration is None
    assert len(read_audio(path, 16_000, max_s=2.5)) > 30_000
    with pytest.raises(MediaError, match="clip too long"):
        read_audio(path, 16_000, max_s=1.5)
    assert len(read_audio(path, 16_000, (0.5, 1.0), max_s=1.5)) == 8000  # of a part, its own length counts
    film = tmp_path / "a.mkv"
    write(film, video=Video(seconds=3))
    with pytest.raises(MediaError, match="clip too long"):
        read_frames(film, 10, max_s=2.0)


def test_a_gap_is_within_the_limit_too(tmp_path):
    path = tmp_path / "a.mkv"  # two seconds of sound that last half an hour
    write(path, Track([(0.0, tone(440, 1)), (1800.0, tone(440, 1))], "pcm_s16le"))
    assert len(read_audio(path, 1000)) == 1_801_000
    with pytest.raises(MediaError, match="clip too long"):
        read_audio(path, 1000, max_s=60)


def test_frames_are_within_the_memory(tmp_path, monkeypatch):
    write(tmp_path / "a.mp4", video=Video())
    monkeypatch.setattr("msenc.raw.media.MAX_FRAME_BYTES", 10 * 64 * 48 * 3)
    assert len(read_frames(tmp_path / "a.mp4", 5)) == 10
    with pytest.raises(MediaError, match="clip too large"):
        read_frames(tmp_path / "a.mp4", 10)
    assert np.array(read_frames(tmp_path / "a.mp4", 10, (0.0, 1.0))).shape == (10, 48, 64, 3)
