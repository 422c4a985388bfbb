"""Files of every kind that `benchmarks/media.py` writes: what is used and flagged, and that times are the file's."""

import os
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from media import RATE, Track, Video, cases, tone, write, write_two

from msenc.raw import media
from msenc.raw.annotations import read_table
from msenc.raw.audit import REASON_FLAGS, audit_dataset
from msenc.raw.container import Findings, MediaError, decode_packets, open_clip, part_of
from msenc.raw.media import iterate_frames, read_audio, read_frames
from msenc.raw.probe import probe_clip
from msenc.types import MsencError

CASES = {case.file: case for case in cases()}
GAPS = [file for file in CASES if file.startswith("gap")]
REAL = Path(os.environ.get("MSENC_SHARED", "")) / "data" / "real"


def level(samples: np.ndarray, hz: float, rate: int = RATE) -> float:
    """Amplitude of a tone in samples."""
    wave = np.exp(-2j * np.pi * hz * np.arange(len(samples)) / rate)
    return 2 * abs(np.mean(samples * wave))


def part(samples: np.ndarray, start_s: float, end_s: float) -> np.ndarray:
    return samples[round(start_s * RATE) : round(end_s * RATE)]


def test_there_are_as_many_kinds_as_names():
    assert len(CASES) == len(cases()) >= 45


@pytest.mark.parametrize("file", CASES)
def test_a_file_is_used_flagged_or_rejected(file, tmp_path):
    case = CASES[file]
    case.write(tmp_path / file)
    facts = probe_clip(tmp_path / file)
    assert (facts.audio, facts.video) == (case.audio, case.video)
    assert sorted(flag for flag, _ in facts.notes) == sorted(case.flags)


@pytest.mark.parametrize("file", GAPS)
def test_a_gap_stays_silent_and_what_follows_keeps_its_time(file, tmp_path):
    CASES[file].write(tmp_path / file)
    whole = read_audio(tmp_path / file, RATE)
    assert len(whole) == pytest.approx(9 * RATE, abs=0.1 * RATE)
    for samples, start_s in ((whole, 0.0), (read_audio(tmp_path / file, RATE, (2.0, 8.5)), 2.0)):
        assert level(part(samples, 2.1 - start_s, 2.9 - start_s), 440) == pytest.approx(0.4, abs=0.03)
        assert not part(samples, 3.2 - start_s, 5.9 - start_s).any()
        assert level(part(samples, 6.2 - start_s, 8.4 - start_s), 1760) == pytest.approx(0.4, abs=0.03)
    with pytest.raises(MediaError, match="silent"):
        read_audio(tmp_path / file, RATE, (3.5, 5.5))
    before_gap = read_audio(tmp_path / file, RATE, (2.5, 4.0))
    assert len(before_gap) == round(1.5 * RATE)
    assert not part(before_gap, 0.7, 1.5).any()


@pytest.mark.parametrize("file", ["late.mp4", "late.mkv", "late.ts", "late.m4a"])
def test_what_starts_late_is_late(file, tmp_path):
    CASES[file].write(tmp_path / file)
    samples = read_audio(tmp_path / file, RATE)
    assert not part(samples, 0, 1.4).any()
    assert level(part(samples, 1.6, 3.3), 440) == pytest.approx(0.4, abs=0.03)
    np.testing.assert_allclose(part(samples, 1, 2), read_audio(tmp_path / file, RATE, (1.0, 2.0)), atol=0.02)


def test_audio_video_and_cuts_keep_one_clock(tmp_path):
    path = tmp_path / "a.ts"  # both start at 1 s of a clock that starts anywhere
    write(path, Track([(0.0, tone(440, 1)), (1.0, tone(1760, 2))]), video=Video(start_s=0.5, seconds=2.5))
    samples, frames = read_audio(path, RATE), read_frames(path, 10)
    assert level(part(samples, 1.1, 1.9), 1760) > 0.35
    assert level(part(samples, 0.1, 0.9), 440) > 0.35
    greys = frames[:, -10:, -10:].mean(axis=(1, 2, 3))
    assert len(frames) == pytest.approx(30, abs=1)
    np.testing.assert_allclose(greys[:7], [40, 40, 40, 40, 40, 40, 43], atol=4)
    np.testing.assert_array_equal(read_frames(path, 10, (1.0, 2.0)), frames[10:20])
    times = [seconds for seconds, _ in iterate_frames(path, (0.0, None), 32)]
    assert times[0] == pytest.approx(0.5, abs=0.03)


def test_what_overlaps_is_heard_once_and_the_rest_keeps_its_time(tmp_path):
    CASES["overlap.ts"].write(tmp_path / "a.ts")
    samples = read_audio(tmp_path / "a.ts", RATE)
    assert len(samples) == pytest.approx(5.5 * RATE, abs=0.2 * RATE)  # the two clocks are 0.2 s apart
    assert level(part(samples, 2.5, 2.95), 440) > 0.35
    assert level(part(samples, 3.1, 5.4), 1760) > 0.35


def test_times_that_begin_anew_lose_nothing(tmp_path):
    write_two(tmp_path / "a.ts")
    samples, frames = read_audio(tmp_path / "a.ts", RATE), read_frames(tmp_path / "a.ts", 10)
    assert len(samples) == pytest.approx(6 * RATE, abs=0.2 * RATE)
    assert len(frames) == pytest.approx(60, abs=2)
    assert level(part(samples, 3.5, 5.8), 1760) > 0.35
    assert level(part(read_audio(tmp_path / "a.ts", RATE, (4.0, 5.0)), 0, 1), 1760) > 0.35
    np.testing.assert_array_equal(read_frames(tmp_path / "a.ts", 10, (4.0, 5.0)), frames[40:50])


@pytest.mark.parametrize(("file", "codec"), [("a.mkv", "aac"), ("a.mp4", "aac"), ("a.ts", "mp2"), ("a.mkv", "flac")])
def test_a_damaged_packet_costs_itself(file, codec, tmp_path):
    track = Track([(0.0, tone(3000, 30))], codec)
    write(tmp_path / file, track)
    good = read_audio(tmp_path / file, RATE)
    write(tmp_path / file, track, damage=lambda number, data: b"\x5a" * 60 if number == 200 else data)
    findings = Findings()
    samples = read_audio(tmp_path / file, RATE, findings=findings)
    assert findings.damaged >= 1
    assert len(samples) == len(good)
    differs = np.flatnonzero(np.abs(samples - good) > 0.1)  # a shift of one sample is 0.15
    assert 0 < differs[-1] - differs[0] < 0.3 * RATE


def test_whatever_a_decoder_raises_is_the_clips_own(tmp_path):
    frame = object()

    def decode(packet):
        if packet == 1:
            raise av.error.PermissionError(1, "Operation not permitted")
        return [frame]

    findings = Findings()
    stream = SimpleNamespace(codec_context=SimpleNamespace(decode=decode))
    assert list(decode_packets(stream, iter([0, 1, 2]), findings)) == [frame, frame]
    assert findings.damaged == 1
    CASES["a.wav"].write(tmp_path / "a.wav")
    for error in (PermissionError(1, "Operation not permitted"), MemoryError(), ValueError("?")):
        with pytest.raises(MediaError, match="clip corrupt"), open_clip(tmp_path / "a.wav"):
            raise error


def test_an_unreadable_file_is_refused(tmp_path, monkeypatch):
    CASES["a.wav"].write(tmp_path / "a.wav")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(MsencError, match="no permission to read this clip"):
        read_audio(tmp_path / "a.wav", RATE)


@pytest.mark.parametrize("file", ["rate.aac", "rate.mp3", "rate.ts"])
def test_a_change_of_format_inside_a_clip_is_read_through(file, tmp_path):
    CASES[file].write(tmp_path / file)
    samples = read_audio(tmp_path / file, RATE)
    assert level(part(samples, 0.5, 2.5), 440) > 0.35
    assert level(part(samples, 3.5, 5.5), 1760) > 0.35


@pytest.mark.parametrize("file", ["a.mpg", "a.vob"])
def test_a_part_of_a_program_stream_is_the_whole_cut(file, tmp_path):
    CASES[file].write(tmp_path / file)
    whole = read_audio(tmp_path / file, 16_000)
    for start_s, end_s in ((0.3, 0.9), (0.777, 1.5), (1.0, None)):
        end = None if end_s is None else round(16_000 * end_s)
        expected = whole[round(16_000 * start_s) : end]
        np.testing.assert_array_equal(read_audio(tmp_path / file, 16_000, (start_s, end_s)), expected)


@pytest.mark.skipif(not REAL.is_dir(), reason="needs real recordings in MSENC_SHARED")
def test_all_grid_clips_have_audio_and_so_have_their_parts():
    clips = sorted((REAL / "grid").glob("*.mpg"))
    assert clips
    for clip in clips:
        whole = read_audio(clip, 16_000)
        for start_s, end_s in ((0.5, 1.5), (1.0, 2.0), (1.234, 2.345)):
            expected = whole[round(16_000 * start_s) : round(16_000 * end_s)]
            np.testing.assert_array_equal(read_audio(Path(part_of(str(clip), start_s, end_s)), 16_000), expected)
            assert len(read_frames(clip, 25, (start_s, end_s))) == pytest.approx(25 * (end_s - start_s), abs=1)
        facts = probe_clip(Path(part_of(str(clip), 1.0, 2.0)))
        assert (facts.audio, facts.video) == (None, None)


def test_the_audit_of_a_mixed_folder_names_each_oddity_and_drops_what_cannot_be_used(tmp_path):
    root = tmp_path / "raw"
    root.mkdir()
    plain = [case for case in CASES.values() if (case.audio, case.video, case.flags) == (None, None, ())][:6]
    odd = [case for case in CASES.values() if case.flags or case.audio][::2][:20]
    assert (len(plain), len(odd)) == (6, 20)
    names = {f"{n}-{case.file}": case for n, case in enumerate(5 * plain + odd)}
    for number, (name, case) in enumerate(names.items()):
        case.write(root / name)
        with (root / name).open("ab") as file:
            file.write(bytes(0 if case in odd else number))  # no two clips alike
    rows = "".join(f"{name},dia{n // 5},A,words {n},train\n" for n, name in enumerate(names))
    (root / "utterances.csv").write_text("clip,dialogue,speaker,text,split\n" + rows)
    annotations = read_table(root / "utterances.csv", "mine", {"rule": "random"})
    audit = audit_dataset("mine", annotations, root, tmp_path / "out", num_workers=0)
    rejected = {(r.file, r.what): r.reason for r in audit.rejections}
    flags: dict[str, set[str]] = {}
    for flag in audit.flags:
        flags.setdefault(flag.file, set()).add(flag.flag)
    for name, case in names.items():
        assert (rejected.get((name, "audio")), rejected.get((name, "video"))) == (case.audio, case.video)
        expected = {*case.flags, *(REASON_FLAGS[reason] for reason in (case.audio, case.video) if reason)}
        assert flags.get(name, set()) - {"duplicate_clip"} == expected


@pytest.mark.parametrize("file", ["tracks.mkv", "tracks.mp4"])
def test_the_default_track_is_read(file, tmp_path):
    CASES[file].write(tmp_path / file)
    assert level(read_audio(tmp_path / file, RATE), 1760) > 0.35
    assert level(read_audio(tmp_path / f"{file}#track=1", RATE), 440) > 0.35
    with pytest.raises(MediaError, match="no such track"):
        read_audio(tmp_path / f"{file}#track=3", RATE)


def test_a_table_is_read_with_another_track_and_by_channels(tmp_path):
    table = tmp_path / "utterances.csv"
    table.write_text(
        "clip,dialogue,speaker,text,start,end,split\na.wav#channel=2,d,A,Hi,0.5,1,train\nb.mkv,d,B,Yes,,,train\n"
    )
    annotations = read_table(table, "mine", {"rule": "random"})
    clips = [[u.clip for u in a.dialogues[0].utterances] for a in (annotations, annotations.with_track(2))]
    assert clips == [
        ["a.wav#t=0.500,1.000&channel=2", "b.mkv"],
        ["a.wav#t=0.500,1.000&track=2&channel=2", "b.mkv#track=2"],
    ]
    alone = np.concatenate([tone(440, 1, (1, 0.5)), tone(1760, 1, (0, 1))], axis=1)
    write(tmp_path / "a.wav", Track([(0.0, alone)], "pcm_s16le"))
    samples = read_audio(tmp_path / "a.wav#channel=2", RATE)
    assert level(part(samples, 0, 1), 440) == pytest.approx(0.2, abs=0.01)
    np.testing.assert_array_equal(read_audio(tmp_path / clips[0][0], RATE), part(samples, 0.5, 1.0))
    with pytest.raises(MediaError, match="no such track"):
        read_audio(tmp_path / "a.wav#channel=3", RATE)


@pytest.mark.parametrize(
    ("file", "peak", "found"),
    [
        ("nan.wav", 0.4, "10 are no numbers"),
        ("scale.wav", 0.4, "up to 13,107.2 times full scale, divided by 32,768"),
        ("loud.wav", 1.0, "up to 1.6 times full scale, cut off"),
    ],
)
def test_floats_that_are_no_samples_do_not_drown_the_others(file, peak, found, tmp_path):
    CASES[file].write(tmp_path / file)
    findings = Findings()
    samples = read_audio(tmp_path / file, RATE, findings=findings)
    assert findings.notes == {"bad_samples": found}
    assert np.abs(samples).max() == pytest.approx(peak, abs=0.01)
    assert level(part(samples, 0.1, 1.9), 440) == pytest.approx(0.4 if peak < 1 else 1.185, abs=0.03)
    np.testing.assert_allclose(part(samples, 0.5, 1.0), read_audio(tmp_path / file, RATE, (0.5, 1.0)), atol=1e-6)


@pytest.mark.parametrize("suffix", ["wav", "m4a"])
def test_of_channels_that_cancel_out_the_loudest_is_read(suffix, tmp_path):
    CASES[f"inverted1.{suffix}"].write(tmp_path / f"a.{suffix}")
    assert level(read_audio(tmp_path / f"a.{suffix}", RATE), 440) == pytest.approx(0.4, abs=0.03)


def test_an_offset_is_neither_sound_nor_what_cancels_out(tmp_path):
    for file in ("lifted.wav", "apart.wav"):
        CASES[file].write(tmp_path / file)
    findings = Findings()
    samples = read_audio(tmp_path / "lifted.wav", RATE, findings=findings)
    assert findings.notes == {"dc_offset": "+0.40 of full scale"}
    assert level(samples, 440) == pytest.approx(0.2, abs=0.01)
    assert np.abs(read_audio(tmp_path / "apart.wav", RATE)).max() == pytest.approx(0.1, abs=0.01)


def test_what_begins_before_zero_is_heard_from_its_beginning(tmp_path):
    file = "early.ts"
    CASES[file].write(tmp_path / file)
    samples = read_audio(tmp_path / file, RATE)
    assert len(samples) == pytest.approx(2 * RATE, abs=0.05 * RATE)
    assert level(part(samples, 0.1, 0.9), 440) > 0.35
    assert level(part(samples, 1.1, 1.9), 1760) > 0.35
    np.testing.assert_allclose(part(samples, 0.5, 1.5), read_audio(tmp_path / file, RATE, (0.5, 1.5)), atol=0.02)


def test_one_speaker_per_channel_cancels_nothing(tmp_path):
    alone = np.concatenate([tone(440, 1, (1, 0)), tone(1760, 1, (0, 1))], axis=1)
    write(tmp_path / "a.wav", Track([(0.0, alone)], "pcm_s16le"))
    findings = Findings()
    samples = read_audio(tmp_path / "a.wav", RATE, findings=findings)
    assert not findings.notes
    assert level(part(samples, 0, 1), 440) == pytest.approx(level(part(samples, 1, 2), 1760)) == pytest.approx(0.2)


UPRIGHT = {  # where white, black and grey lie: rows, columns
    "turned-by-90-degrees.mp4": lambda picture: np.rot90(picture, 1),
    "turned-by-180-degrees.mp4": lambda picture: np.rot90(picture, 2),
    "turned-by-270-degrees.mp4": lambda picture: np.rot90(picture, 3),
    "mirrored.mp4": lambda picture: picture[:, ::-1],
    "tilted-by-30-degrees.mp4": lambda picture: picture,
}


@pytest.mark.parametrize("file", UPRIGHT)
def test_pictures_are_turned_as_the_file_says(file, tmp_path):
    CASES[file].write(tmp_path / file)
    stored = UPRIGHT[file](read_frames(tmp_path / file, 10)[0])
    assert stored.shape == (48, 64, 3)
    assert stored[2:20].min() > 200
    assert stored[28:, 2:28].max() < 60
    assert 20 < stored[28:, 36:].mean() < 80


@pytest.mark.parametrize("file", ["aspect.mp4", "aspect.mkv"])
def test_pixels_are_made_square(file, tmp_path):
    CASES[file].write(tmp_path / file)
    assert read_frames(tmp_path / file, 10).shape == (20, 48, 93, 3)


def test_of_interlaced_pictures_one_field_is_read(tmp_path):
    CASES["fields.mp4"].write(tmp_path / "a.mp4")
    picture = read_frames(tmp_path / "a.mp4", 10)[0].astype(int)
    assert np.abs(np.diff(picture[2:20, :, 0], axis=0)).max() < 60  # no line differs from the next by 255


@pytest.mark.parametrize("file", ["raw.h264", "raw.hevc", "raw.m2v"])
def test_pictures_without_times_follow_the_streams_rate(file, tmp_path):
    CASES[file].write(tmp_path / file)
    assert len(read_frames(tmp_path / file, 10)) == pytest.approx(20, abs=1)
    np.testing.assert_array_equal(read_frames(tmp_path / file, 10, (1.0, 1.5)), read_frames(tmp_path / file, 10)[10:15])


def test_a_seek_finds_a_key_frame_or_goes_back_to_the_start(tmp_path, monkeypatch):
    path = tmp_path / "a.ts"  # a transport stream has no index of key frames
    picture = Video(seconds=6, options=(("g", "40"),))
    write(path, Track([(0.0, tone(440, 6))]), video=picture)
    whole = read_frames(path, 10)
    for start_s in (0.5, 3.9, 4.1, 5.5):
        first = round(10 * start_s)
        np.testing.assert_array_equal(read_frames(path, 10, (start_s, start_s + 0.4)), whole[first : first + 4])


@pytest.mark.parametrize("version", [[2, media.VIDEO_LEADS_S], "1"])
def test_outcomes_of_another_version_are_not_reused(version, tmp_path, monkeypatch):
    from msenc.prepare import describe
    from msenc.raw import probe

    cache = tmp_path / "clips.jsonl"
    CASES["a.wav"].write(tmp_path / "a.wav")
    seen = []

    def look(path):
        seen.append(path)
        return probe_clip(path)

    for _ in range(2):
        probe.probe_clips(tmp_path, ["a.wav"], 0, cache, look)
    assert len(seen) == 1
    monkeypatch.setattr(probe, "PROBE_VERSION", version)
    probe.probe_clips(tmp_path, ["a.wav"], 0, cache, look)
    assert len(seen) == 2
    hashes = {"a.wav": "0" * 64}
    (tmp_path / describe.CACHE).write_text('{"sha256": "%s", "reason": "clip corrupt", "version": 1}\n' % ("0" * 64))
    assert len(describe.measure_items(hashes, tmp_path, tmp_path)) == 1
