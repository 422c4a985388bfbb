import builtins
import math
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from clips import write_media

from msenc.raw import media
from msenc.raw.container import MediaError, part_of, split_part
from msenc.raw.media import read_audio, read_frames, read_properties
from msenc.types import MsencError

RATE = 16000
TICKS = 600  # per second, of the pictures' clock


def tone(seconds: float, hz: float = 440.0, peak: float = 0.5) -> np.ndarray:
    return (peak * np.sin(2 * np.pi * hz * np.arange(int(RATE * seconds)) / RATE)).astype(np.float32)


def write_clip(path: Path, sound: np.ndarray | None, pictures: dict[int, int] | None, options=None) -> Path:
    """An MP4 with AAC sound (S,) and H.264 pictures: presentation tick -> grey level, each 32 x 32."""
    with av.open(str(path), "w", format="mp4", options=options or {}) as container:
        video = audio = None
        if pictures is not None:
            video = container.add_stream("libx264", rate=TICKS, options={"crf": "1"})
            video.width = video.height = 32
            video.pix_fmt = "yuv420p"
            video.time_base = video.codec_context.time_base = Fraction(1, TICKS)
        if sound is not None:
            audio = container.add_stream("aac", rate=RATE, layout="mono")
        for tick, grey in (pictures or {}).items():
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), grey, np.uint8), format="rgb24")
            frame.pts, frame.time_base = tick, Fraction(1, TICKS)
            container.mux(video.encode(frame))
        if sound is not None:
            frame = av.AudioFrame.from_ndarray(sound[None], format="fltp", layout="mono")
            frame.sample_rate, frame.pts = RATE, 0
            container.mux(audio.encode(frame))
        for stream in (video, audio):
            if stream is not None:
                container.mux(stream.encode(None))
    return path


def steady(seconds: float, fps: int = 12) -> dict[int, int]:
    return {i * TICKS // fps: 20 * i % 250 for i in range(int(seconds * fps))}


def reason(read, path: Path, rate: float) -> str:
    with pytest.raises(MediaError) as caught:
        read(path, rate)
    return caught.value.reason


def test_sound_keeps_length_pitch_and_level(tmp_path):
    path = write_clip(tmp_path / "a.mp4", tone(1.0), steady(1))
    for rate in (16000, 8000):
        samples = read_audio(path, rate)
        assert samples.dtype == np.float32
        assert samples.shape == pytest.approx((rate,), rel=0.1)
        assert np.abs(samples).max() == pytest.approx(0.5, abs=0.05)
        spectrum = np.abs(np.fft.rfft(samples))
        assert np.argmax(spectrum) * rate / len(samples) == pytest.approx(440, abs=2)


@pytest.mark.parametrize(("name", "codec"), [("a.wav", "pcm_s16le"), ("a.flac", "flac")])
def test_stereo_sound_files_are_mixed_to_mono(tmp_path, name, codec):
    with av.open(str(tmp_path / name), "w") as container:
        stream = container.add_stream(codec, rate=RATE, layout="stereo", format="s16")
        stereo = np.stack([tone(0.5), np.zeros(RATE // 2, np.float32)], axis=1)
        packed = (stereo * 32767).astype(np.int16).reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(packed, format="s16", layout="stereo")
        frame.sample_rate, frame.pts = RATE, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    samples = read_audio(tmp_path / name, RATE)
    np.testing.assert_allclose(samples, tone(0.5) / 2, atol=2e-3)


def test_pictures_are_sampled_by_time(tmp_path):
    frames = read_frames(write_clip(tmp_path / "a.mp4", None, steady(2)), fps=3)
    assert frames.shape == (6, 32, 32, 3)
    assert frames.dtype == np.uint8
    # at 12 a second, every fourth
    np.testing.assert_allclose(frames.mean(axis=(1, 2, 3)), [0, 80, 160, 240, 70, 150], atol=4)


def test_a_variable_frame_rate_keeps_its_timing(tmp_path):
    # shown from 0, 0.1, 0.15, 0.9 and 1.0 s on; the last for as long as FFmpeg says, the one before for 0.75 s
    path = write_clip(tmp_path / "a.mp4", None, {0: 10, 60: 60, 90: 110, 540: 160, 600: 210})
    frames = read_frames(path, fps=10)
    levels = frames.mean(axis=(1, 2, 3))
    np.testing.assert_allclose(levels[:11], [10, 60, 110, 110, 110, 110, 110, 110, 110, 160, 210], atol=4)


def test_sampling_faster_than_the_pictures_repeats_them(tmp_path):
    path = write_clip(tmp_path / "a.mp4", None, {0: 50, 300: 150})
    levels = read_frames(path, fps=8).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(levels[:5], [50, 50, 50, 50, 150], atol=4)


def test_a_short_clip_has_one_picture(tmp_path):
    assert len(read_frames(write_clip(tmp_path / "a.mp4", None, {0: 50}), fps=1)) == 1


def test_only_kept_pictures_are_converted(tmp_path, monkeypatch):
    converted = []

    class Counting:
        """A decoded picture that reports its conversion."""

        def __init__(self, frame):
            self.frame = frame

        def __getattr__(self, name):
            return getattr(self.frame, name)

        def to_ndarray(self, **options):
            converted.append(self.frame.pts)
            return self.frame.to_ndarray(**options)

    original = media._decode_pictures
    monkeypatch.setattr(media, "_decode_pictures", lambda *given: map(Counting, original(*given)))
    path = write_clip(tmp_path / "a.mp4", None, steady(2))
    assert len(read_frames(path, fps=3)) == 6
    assert len(converted) == 6
    converted.clear()
    assert len(read_frames(path, fps=48)) == 93  # the last picture lasts one tick
    assert len(converted) == 24  # once each, though kept four times


@pytest.mark.parametrize("fps", [3, 7.3, 24])
@pytest.mark.parametrize("ticks", [25, 40])
def test_pictures_that_nothing_needs_are_not_decoded(tmp_path, monkeypatch, fps, ticks):
    """Sampled pictures are those of a decoder that left out none, also where half of all are left out."""
    path, rng = tmp_path / "a.mp4", np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=TICKS, options={"bf": "3", "g": "50"})
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        video.time_base = video.codec_context.time_base = Fraction(1, TICKS)
        noise = rng.integers(0, 255, (48, 200, 3), dtype=np.uint8)
        for i in range(72):  # a picture that moves, at times that are not all alike
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(noise[:, i : i + 64]), format="rgb24")
            frame.pts, frame.time_base = i * ticks + 3 * (i % 5), Fraction(1, TICKS)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
    original, decoded, everything = media._decode_pictures, [], []

    def decode(stream, packets, is_needed, findings):
        for frame in original(stream, packets, (lambda *_: True) if everything else is_needed, findings):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(media, "_decode_pictures", decode)
    for span in (None, (0.31, 2.2)):
        found, counts = [], []
        for everything[:] in ([True], []):
            decoded.clear()
            found.append(read_frames(path, fps, span))
            counts.append(len(decoded))
            assert decoded == sorted(decoded)
        np.testing.assert_array_equal(*found)
        assert len({picture.tobytes() for picture in found[0]}) > 4
        if fps == 3:
            assert counts[1] < 0.75 * counts[0]


def test_what_a_clip_lacks_is_told(tmp_path):
    silent_film = write_clip(tmp_path / "film.mp4", None, steady(1))
    radio = write_clip(tmp_path / "radio.mp4", tone(1), None)
    mute = write_clip(tmp_path / "mute.mp4", np.zeros(RATE, np.float32), steady(1))
    faint = write_clip(tmp_path / "faint.mp4", tone(1, peak=1e-6), None)
    text = tmp_path / "text.mp4"
    text.write_text("Not a clip at all. " * 200)
    empty = tmp_path / "empty.mp4"
    empty.touch()
    assert reason(read_audio, silent_film, RATE) == "no sound"
    assert reason(read_frames, radio, 3) == "no picture"
    assert reason(read_audio, mute, RATE) == "silent"
    assert reason(read_audio, faint, RATE) == "silent"
    assert len(read_frames(mute, 3)) == 3
    for read, rate in ((read_audio, RATE), (read_frames, 3)):
        assert reason(read, text, rate) == "clip corrupt"
        assert reason(read, empty, rate) == "clip corrupt"
        assert reason(read, tmp_path / "none.mp4", rate) == "clip missing"
        assert reason(read, tmp_path, rate) == "clip missing"


def test_a_picture_stored_on_its_side_is_turned_upright(tmp_path):
    for rotation, shape, bright in ((90, (48, 32), (slice(None), slice(20, 32))), (180, (32, 48), (slice(20, 32),))):
        frames = read_frames(write_media(tmp_path / "a.mp4", rotation=rotation, ticks=(2, 3)), fps=12)
        assert frames.shape == (4, *shape, 3)  # the first one, at the second tick, stands before as well
        # the white upper half goes to the right, or to the bottom
        white = np.zeros(shape, bool)
        white[bright] = True
        assert (frames[0][white] > 220).all()
        assert (frames[0][~white] < 220).mean() > 0.7
        assert read_properties(tmp_path / "a.mp4").rotation % 360 in (90, 180, 270)


def test_headers_tell_what_is_odd(tmp_path):
    plain = read_properties(write_media(tmp_path / "plain.mp4"))
    assert (plain.sample_rate, plain.channels, plain.rotation, plain.is_variable) == (16000, 1, 0, False)
    assert plain.duration_s == pytest.approx(0.5, abs=0.1)
    assert "mp4" in plain.formats
    assert read_properties(write_media(tmp_path / "a.mp4", channels="5.1")).channels == 6
    assert read_properties(write_media(tmp_path / "a.mp4", rate=8000)).sample_rate == 8000
    assert read_properties(write_media(tmp_path / "a.mp4", ticks=(0, 1, 7, 8, 30))).is_variable
    assert read_properties(write_media(tmp_path / "a.mp4", with_sound=False)).channels == 0
    radio = read_properties(write_media(tmp_path / "a.mp4", container="wav", with_picture=False))
    assert (radio.formats, radio.is_variable) == (("wav",), False)


def test_surround_sound_is_mixed_down(tmp_path):
    path = write_media(tmp_path / "a.mp4", channels="5.1", seconds=1.0)
    samples = read_audio(path, 16000)
    assert len(samples) == pytest.approx(16000, rel=0.1)
    assert 0.1 < np.abs(samples).max() <= 1


def test_a_title_in_any_encoding_is_no_reason_to_drop_a_clip(tmp_path):
    path = tmp_path / "a.mp4"
    write_clip(path, tone(1.0), steady(1))
    data = path.read_bytes()
    assert b"Lavf" in data
    path.write_bytes(data.replace(b"Lavf", b"\x92\xe9\x80\xff"))  # the writer's name, in no encoding at all
    assert len(read_audio(path, RATE)) > 0.9 * RATE
    assert len(read_frames(path, 3)) == 3


@pytest.mark.parametrize("options", [{}, {"movflags": "faststart"}], ids=["index at the end", "index first"])
def test_a_truncated_clip_is_corrupt(tmp_path, options):
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 4 * RATE).astype(np.float32)
    path = write_clip(tmp_path / "a.mp4", noise, steady(4), options)
    assert len(read_frames(path, 3)) == 12
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 10])
    assert reason(read_audio, path, RATE) == "clip corrupt"
    assert reason(read_frames, path, 3) == "clip corrupt"


def test_without_pyav_the_extra_is_named(tmp_path, monkeypatch):
    original = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == "av":
            raise ImportError("No module named 'av'")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MsencError, match=r"needs a package, .*No module named 'av'.*pip install -e '\.\[media\]'"):
        read_audio(tmp_path / "a.mp4", RATE)


def write_long(path: Path, audio_codec: str, rate: int) -> None:
    """Ten seconds of rising sound; pictures whose grey tells their number, ten a second, a key frame every 2 s."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=10, options={"g": "20", "crf": "1"})
        video.width = video.height = 32
        video.pix_fmt = "yuv420p"
        sound = container.add_stream(audio_codec, rate=rate, layout="mono")
        for number in range(100):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 50 + number, np.uint8), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 10)
            container.mux(video.encode(frame))
        seconds = np.arange(10 * rate) / rate
        chirp = (0.4 * np.sin(2 * np.pi * (200 * seconds + 20 * seconds**2))).astype(np.float32)
        frame = av.AudioFrame.from_ndarray(chirp[None], format="fltp", layout="mono")
        frame.sample_rate, frame.pts = rate, 0
        container.mux(sound.encode(frame))
        for stream in (video, sound):
            container.mux(stream.encode(None))


@pytest.mark.parametrize(
    ("name", "codec", "rate"),
    [("a.mp4", "aac", 44100), ("a.mkv", "libopus", 48000), ("a.mkv", "aac", 44100), ("a.ts", "aac", 44100)],
)
def test_a_span_is_what_the_whole_has_there(tmp_path, name, codec, rate):
    path = tmp_path / name
    write_long(path, codec, rate=rate)
    whole = read_audio(path, RATE)
    clock = 0 if name == "a.mp4" else RATE // 1000  # samples in one tick of clocks that count milliseconds
    for start_s, end_s in ((0.0, 1.0), (0.1, 0.4), (3.217, 4.5), (7.0, 7.01), (8.5, None)):
        part = read_audio(path, RATE, (start_s, end_s))
        expected = whole[round(start_s * RATE) : None if end_s is None else round(end_s * RATE)]
        assert len(part) == pytest.approx(len(expected), abs=clock + 1)
        errors = [
            np.abs(a[: len(b)] - b[: len(a)]).max()
            for shift in range(clock + 1)
            for a, b in ((part[shift:], expected), (part, expected[shift:]))
            if len(a) and len(b)
        ]
        assert min(errors) < 0.05  # half a sample of 600 Hz at this level; a whole one is 0.09


def test_pictures_of_a_span_are_those_of_the_whole(tmp_path):
    write_long(tmp_path / "a.mp4", "aac", 44100)
    whole = read_frames(tmp_path / "a.mp4", 10)
    for start_s, end_s in ((0.0, 0.5), (3.0, 5.0), (4.95, 5.35), (9.5, None)):
        part = read_frames(tmp_path / "a.mp4", 10, (start_s, end_s))
        first = int(start_s * 10 + 1e-6)
        assert len(part) == math.ceil(((end_s or 10) - start_s) * 10 - 1e-6)
        np.testing.assert_array_equal(part, whole[first : first + len(part)])


def test_a_part_of_a_recording_is_read_like_a_span(tmp_path):
    path = write_media(tmp_path / "a.mp4", seconds=2, ticks=tuple(range(24)))
    part = tmp_path / part_of("a.mp4", 0.5, 1.25)
    np.testing.assert_array_equal(read_audio(part, 8000), read_audio(path, 8000, (0.5, 1.25)))
    assert len(read_audio(part, 8000)) == 6000
    np.testing.assert_array_equal(read_frames(part, 12), read_frames(path, 12, (0.5, 1.25)))
    assert len(read_frames(part, 12)) == 9
    with pytest.raises(MediaError, match="clip missing"):
        read_audio(tmp_path / part_of("b.mp4", 0, 1), 8000)
    assert split_part("a#t=x,1.mp4") == ("a#t=x,1.mp4", None)  # any other name is a file's


def test_a_span_decodes_little_of_what_stands_before(tmp_path, monkeypatch):
    write_long(tmp_path / "a.mp4", "aac", 44100)
    decoded = []
    original = media.decode_packets

    def count(*arguments):
        for frame in original(*arguments):
            decoded.append(frame.time)
            yield frame

    monkeypatch.setattr(media, "decode_packets", count)
    read_frames(tmp_path / "a.mp4", 10, (9.0, 9.2))
    read_audio(tmp_path / "a.mp4", RATE, (9.0, 9.2))
    assert min(decoded) >= 8


@pytest.mark.parametrize("read", [read_audio, read_frames])
def test_a_span_behind_the_end_has_nothing(tmp_path, read):
    write_long(tmp_path / "a.mp4", "aac", 44100)
    with pytest.raises(MediaError, match=r"no sound|no picture"):
        read(tmp_path / "a.mp4", 10 if read is read_frames else RATE, (30.0, 31.0))
