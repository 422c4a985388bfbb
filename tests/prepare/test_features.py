import os
import signal
import subprocess
import sys
import time
import wave
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import av
import numpy as np
import pytest

from msenc.prepare import features as stage
from msenc.prepare.features import StreamRecipe, feature_items, make_extract, read_features
from msenc.raw.hashes import hash_clips
from msenc.store.shards import ShardReader, write_stream
from msenc.types import Dialogue, MsencError, Rejection, Utterance
from msenc.work.items import read_result, run_items

RATE = 8000


class Energies:
    """Energy of each stretch of 100 ms, times 1 and times `scale`."""

    kind, dim, sample_rate = "audio", 2, RATE

    def __init__(self, scale: float = 2.0):
        self.scale = scale

    def encode(self, clips: Sequence[np.ndarray]) -> list[np.ndarray]:
        size = RATE // 10
        stretches = [clip[: len(clip) // size * size].reshape(-1, size) for clip in clips]
        energies = [(s**2).mean(axis=1, keepdims=True) for s in stretches]
        return [energy * np.array([1.0, self.scale]) for energy in energies]  # (T, 2)


class Brightness:
    """Mean colour of each picture."""

    kind, dim, fps = "video", 3, 5.0

    def encode(self, clips: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [clip.mean(axis=(1, 2)) / 255 for clip in clips]


class Wide(Energies):
    """Says another width than it gives."""

    dim = 5


class Dying(Energies):
    """Its process ends without a word, as when memory runs out."""

    def encode(self, clips):
        os.kill(os.getpid(), signal.SIGKILL)


class Waiting(Energies):
    """Never done; says in a file which process waits."""

    def __init__(self, folder: Path):
        self.folder = folder

    def encode(self, clips):
        (self.folder / str(os.getpid())).touch()
        time.sleep(600)


def refuse() -> None:
    raise MsencError("model id 'no/such' cannot be loaded")


def write_clip(path: Path, seconds: float, peak: float, with_picture: bool = True) -> None:
    with av.open(str(path), "w") as container:
        streams = []
        audio = container.add_stream("aac", rate=RATE, layout="mono")
        if with_picture:
            video = container.add_stream("libx264", rate=10)
            video.width = video.height = 16
            video.pix_fmt = "yuv420p"
            streams.append(video)
            for i in range(int(10 * seconds)):
                picture = np.full((16, 16, 3), 10 * i, np.uint8)
                container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        sound = (peak * np.sin(np.arange(int(RATE * seconds)))).astype(np.float32)
        frame = av.AudioFrame.from_ndarray(sound[None], format="fltp", layout="mono")
        frame.sample_rate, frame.pts = RATE, 0
        container.mux(audio.encode(frame))
        for stream in (audio, *streams):
            container.mux(stream.encode(None))


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("clips")
    for d in range(12):
        for u in range(2):
            write_clip(root / f"dia{d}_utt{u}.mp4", 0.3 + 0.1 * d + 0.2 * u, 0.1 + 0.05 * d, with_picture=d != 3)
    (root / "broken.mp4").write_text("no clip " * 100)
    write_clip(root / "mute.mp4", 1.0, 0.0)
    with wave.open(str(root / "blip.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(np.resize(np.array([9000, -9000], "<i2"), RATE // 50).tobytes())
    return root


def dialogue(d: int, *clips: str | None) -> Dialogue:
    clips = clips or (f"dia{d}_utt0.mp4", f"dia{d}_utt1.mp4")
    turns = tuple(Utterance(str(u), "Ana", "Hi", clip=clip) for u, clip in enumerate(clips))
    return Dialogue(f"demo/train/dia{d}", "train", turns)


def recipe(make=Energies, kind="audio", dim=None) -> StreamRecipe:
    return StreamRecipe(kind, "test", dim or {"audio": 2, "video": 3}[kind], make, {})


def run(root, dialogues, make=Energies, kind="audio", num_workers=0, folder=None) -> tuple[list, list[Rejection]]:
    """Samples of the stream, and what was rejected."""
    with TemporaryDirectory() as other:
        folder, rejections = folder or Path(other), []
        items = items_of(root, dialogues, recipe(make, kind))
        run_items(items, folder, partial(make_extract, root, recipe(make, kind)), num_workers, f"{kind} features")
        return list(read_features(items, folder, rejections)), rejections


def items_of(root, dialogues, made_by):
    with TemporaryDirectory() as folder:
        hashes = hash_clips(root, (u.clip for d in dialogues for u in d.utterances), Path(folder), 1)
    return feature_items(dialogues, made_by, hashes)


def test_features_of_a_dialogue_are_joined_with_offsets(root):
    ((id, split, members),), rejections = run(root, [dialogue(5)])
    features, offsets = members["features.npy"], members["offsets.npy"]
    assert (id, split, rejections) == ("demo/train/dia5", "train", [])
    assert features.dtype == np.float16
    assert offsets.dtype == np.int64
    assert offsets[0] == 0
    assert np.diff(offsets) == pytest.approx([8, 10], abs=1)
    assert features.shape == (offsets[-1], 2)
    energy = 0.35**2 / 2
    assert features[2:6, 0].astype(float) == pytest.approx(energy, rel=0.1)
    np.testing.assert_allclose(features[:, 1], 2 * features[:, 0], rtol=2e-3)


def test_video_is_read_at_the_encoders_rate(root):
    ((_, _, members),), _ = run(root, [dialogue(5)], Brightness, "video")
    assert np.diff(members["offsets.npy"]).tolist() == [4, 5]
    assert members["features.npy"][:4, 0].astype(float) * 255 == pytest.approx([0, 20, 40, 60], abs=4)


def test_what_lacks_the_stream_has_no_length_and_is_listed(root):
    dialogues = [dialogue(0, "dia0_utt0.mp4", "broken.mp4", None, "mute.mp4", "blip.wav", "gone.mp4"), dialogue(3)]
    results, rejections = run(root, dialogues)
    assert (np.diff(results[0][2]["offsets.npy"]) == 0).tolist() == [False, True, True, True, True, True]
    assert [(r.id, r.what, r.reason, r.file) for r in rejections] == [
        ("demo/train/dia0/utt1", "audio", "clip corrupt", "broken.mp4"),
        ("demo/train/dia0/utt2", "audio", "clip missing", ""),
        ("demo/train/dia0/utt3", "audio", "silent", "mute.mp4"),
        ("demo/train/dia0/utt4", "audio", "clip too short", "blip.wav"),
        ("demo/train/dia0/utt5", "audio", "clip missing", "gone.mp4"),
    ]
    results, rejections = run(root, [dialogue(3)], Brightness, "video")
    assert results[0][2]["features.npy"].shape == (0, 3)
    assert [r.reason for r in rejections] == ["no picture", "no picture"]


def test_order_and_result_do_not_depend_on_the_number_of_workers(root, tmp_path):
    dialogues = [dialogue(d) for d in (7, 2, 9, 0, 11, 4, 3, 1, 10, 8, 6, 5)] + [dialogue(12, "broken.mp4", "mute.mp4")]
    make = partial(Energies, scale=3.0)
    hashes = []
    for num_workers in (0, 1, 2):
        samples, rejections = run(root, dialogues, make, num_workers=num_workers)
        index = write_stream(tmp_path / "audio-energies", samples, {})
        hashes.append((index["hash"], rejections))
        assert [s["id"] for s in index["samples"]] == [d.id for d in dialogues]
    assert hashes[0] == hashes[1] == hashes[2]
    assert len(ShardReader(tmp_path / "audio-energies", "train").read("demo/train/dia12")["features.npy"]) == 0


@pytest.mark.parametrize(("name", "value"), [("MAX_BATCH_BYTES", 20_000), ("MAX_BATCH_CLIPS", 2)])
def test_a_batch_is_bounded_and_bounds_change_nothing(root, monkeypatch, name, value):
    sizes = []

    class Watching(Energies):
        def encode(self, clips):
            sizes.append(len(clips))
            return super().encode(clips)

    dialogues = [dialogue(0, *(f"dia{d}_utt0.mp4" for d in range(6)))]
    whole, _ = run(root, dialogues, Watching)
    monkeypatch.setattr(stage, name, value)
    parts, _ = run(root, dialogues, Watching)
    assert sizes[0] == 6
    assert len(sizes) > 3
    np.testing.assert_array_equal(whole[0][2]["features.npy"], parts[0][2]["features.npy"])


def test_items_are_neighbouring_dialogues_and_know_what_they_are_made_of(root, monkeypatch, tmp_path):
    monkeypatch.setattr(stage, "MIN_ITEM_UTTERANCES", 4)
    dialogues = [dialogue(d) for d in range(5)]
    items = items_of(root, dialogues, recipe())
    assert [(item.id, item.size) for item in items] == [
        ("demo/train/dia0 .. demo/train/dia1", 4),
        ("demo/train/dia2 .. demo/train/dia3", 4),
        ("demo/train/dia4", 2),
    ]
    keys = [item.key for item in items]
    assert [item.key for item in items_of(root, dialogues, recipe(dim=3))] != keys
    assert [item.key for item in items_of(root, dialogues, StreamRecipe("audio", "a", 2, Energies, {"a": 1}))] != keys
    moved = items_of(root, [*dialogues[:3], dialogue(3, "dia7_utt0.mp4", "dia7_utt1.mp4"), dialogues[4]], recipe())
    assert [a.key == b for a, b in zip(moved, keys, strict=True)] == [True, False, True]
    run(root, dialogues, folder=tmp_path)
    assert read_result(items[2], tmp_path)["offsets.npy"].shape == (3,)


def test_the_next_clips_are_decoded_while_some_are_encoded(root, monkeypatch):
    monkeypatch.setattr(stage, "MAX_BATCH_CLIPS", 1)
    decoded, seen = [], []

    def read(path, sample_rate, max_s):
        decoded.append(path.name)
        return np.ones(RATE, np.float32)

    class Waits(Energies):
        """Encodes for as long as it takes to decode what comes next."""

        def encode(self, clips):
            seen.append(len(decoded))
            wait_until(lambda: len(decoded) > len(seen) or len(seen) == 3)
            return super().encode(clips)

    monkeypatch.setattr(stage, "read_audio", read)
    run(root, [dialogue(0, "a", "b", "c")], Waits)
    assert decoded == ["a", "b", "c"]
    assert len(seen) == 3


@pytest.mark.parametrize("scale", [1e9, float("nan"), float("inf")])
def test_what_float16_cannot_hold_is_refused(root, scale):
    with pytest.raises(MsencError, match=r"demo/train/dia5/utt0: encoder Energies .* float16"):
        run(root, [dialogue(5)], partial(Energies, scale=scale))


def test_another_width_is_refused(root):
    with pytest.raises(MsencError, match=r"the encoder 'test' gives features 5 wide, the config says dim=2\. Set"):
        run(root, [dialogue(5)], Wide)
    with pytest.raises(MsencError, match=r"encoder Wide gave features of shape \(\d+, 2\); expected \(T, 5\)"):
        make_extract(root, recipe(Wide, dim=5))([dialogue(5)])


def test_errors_of_workers_arrive_whole(root):
    with pytest.raises(MsencError, match="model id 'no/such' cannot be loaded"):
        run(root, [dialogue(5), dialogue(6)], refuse, num_workers=1)
    with pytest.raises(
        MsencError, match=r"audio features: a worker process died on demo/train/dia5 \.\. .*dia6; .* set fewer"
    ):
        run(root, [dialogue(5), dialogue(6)], Dying, num_workers=1)


def test_workers_end_with_a_killed_parent(root, tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from functools import partial; from pathlib import Path; from test_features import Waiting, dialogue, run\n"
        "if __name__ == '__main__':\n"
        "    run(Path(sys.argv[2]), [dialogue(5)], partial(Waiting, Path(sys.argv[3])), num_workers=1)\n"
    )
    (tmp_path / "main.py").write_text(code)
    (tmp_path / "pids").mkdir()
    arguments = [str(tmp_path / "main.py"), str(Path(__file__).parent), str(root), str(tmp_path / "pids")]
    parent = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until(lambda: any((tmp_path / "pids").iterdir()))
    parent.kill()
    parent.wait()
    worker = int(next((tmp_path / "pids").iterdir()).name)
    wait_until(lambda: not is_running(worker))


def is_running(pid: int) -> bool:
    """Whether the process lives; a zombie that nobody collects does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(is_so, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.05)
