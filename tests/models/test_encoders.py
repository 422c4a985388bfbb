import os
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import is_offline_mode
from tiny_models import save_clip, save_speech_encoder, save_whisper

from msenc.models.encoders import ClipVision, LogMel, Pixels, SpeechEncoder, WhisperEncoder, mel_bands, similar_batches
from msenc.models.pretrained import load_pretrained, look_for_hub
from msenc.types import MsencError

RATE = 16000


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def noise(*lengths, seed=0):
    generator = np.random.default_rng(seed)
    return [(0.1 * generator.standard_normal(n)).astype(np.float32) for n in lengths]


def voice(pitch_hz, seconds=0.5, level=0.1):
    """Harmonics of a pitch, falling by 6 dB per octave."""
    time = np.arange(int(seconds * RATE)) / RATE
    tones = [np.sin(2 * np.pi * k * pitch_hz * time + k) / k for k in range(1, int(4000 / pitch_hz))]
    return (level * np.sum(tones, axis=0)).astype(np.float32)


def movie(frames, height=48, width=64, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def assert_company_changes_nothing(encoder, clips, atol):
    together = encoder.encode(clips)
    assert len(together) == len(clips)
    for clip, features in zip(clips, together, strict=True):
        assert features.dtype == np.float32
        assert features.shape[1] == encoder.dim
        np.testing.assert_allclose(features, encoder.encode([clip])[0], atol=atol, rtol=0)
    assert encoder.encode([]) == []
    return together


# Log-mel


def test_logmel_has_a_frame_for_each_hop_of_the_clip():
    clips = noise(1, 319, 320, 321, 16000)
    features = assert_company_changes_nothing(LogMel(), clips, atol=0)
    assert [f.shape for f in features] == [(1, 80), (1, 80), (1, 80), (2, 80), (50, 80)]


@pytest.mark.parametrize("n_fft", [512, 1024, 2048])
def test_logmel_reads_level_in_decibels(n_fft):
    encoder = LogMel(n_fft=n_fft)
    sine = np.sin(2 * np.pi * 1000 * np.arange(RATE) / RATE).astype(np.float32)
    peak = encoder.encode([sine])[0][10:40].max(1)
    np.testing.assert_allclose(peak, 2.0, atol=0.15)  # 0 dB within 3 dB
    softer = encoder.encode([sine * 0.1])[0][10:40].max(1)
    np.testing.assert_allclose(peak - softer, 1.0, atol=1e-3)  # -20 dB
    assert (encoder.encode([np.zeros(RATE, np.float32)])[0] == -2).all()


def test_logmel_shows_the_pitch_of_a_voice():
    # Neighbouring pitches, two semitones apart, over a voice's whole range: some low band moves by 10 dB or more.
    voices = [voice(p) for p in 80 * 2 ** (np.arange(0, 28, 2) / 12)]

    def steps(encoder):
        means = [f[5:20, :24].mean(0) for f in encoder.encode(voices)]
        return [np.abs(a - b).max() for a, b in pairwise(means)]

    assert min(steps(LogMel())) > 0.5
    assert min(steps(LogMel(n_fft=400, num_mels=24))) < 0.1  # a window for words


def test_logmel_takes_the_published_sizes():
    assert LogMel(n_fft=1024, num_mels=128, min_hz=0).encode(noise(1600))[0].shape == (5, 128)


def test_logmel_bands_that_hold_no_bin_are_refused():
    with pytest.raises(MsencError, match=r"of 128 bands contain no bin of a transform of length 256"):
        LogMel(n_fft=256, num_mels=128)
    with pytest.raises(MsencError, match=r"expected 0 <= min_hz < max_hz <= 8000"):
        LogMel(max_hz=9000)
    with pytest.raises(MsencError, match="shorter than one sampling period"):
        LogMel(hop_s=1e-6)


def test_mel_bands_cover_what_lies_between_their_edges():
    bands = mel_bands(RATE, 1024, 40, 40.0, 8000.0)
    inside = bands[8:470].sum(1)
    assert inside.min() > 0.9
    assert inside.max() < 1.1
    assert bands.max() <= 1


@pytest.mark.parametrize(
    ("clip", "found"),
    [
        (np.zeros(0, np.float32), r"float32 \(0,\)"),
        (np.zeros((2, 9), np.float32), r"float32 \(2, 9\)"),
        (np.zeros(9, np.int16), r"int16 \(9,\)"),
        (np.array([0, np.nan], np.float32), "not finite"),
    ],
)
def test_what_is_no_mono_sound_is_refused(clip, found):
    with pytest.raises(MsencError, match=rf"LogMel: clip 1 of the batch is .*{found}.*expected a mono waveform"):
        LogMel().encode([*noise(100), clip])


# Pixels


def test_pixels_average_areas():
    encoder = Pixels(size=2)
    frame = np.zeros((1, 4, 6, 3), np.uint8)
    frame[:, :2, :3] = 255  # top left
    np.testing.assert_allclose(encoder.encode([frame])[0], [[2, -2, -2, -2]], atol=1e-6)
    # A middle column that two cells share.
    frame = np.zeros((1, 2, 3, 3), np.uint8)
    frame[:, :, 1] = 255
    np.testing.assert_allclose(encoder.encode([frame])[0], [[-2 + 4 / 3] * 4], atol=1e-6)


def test_pixels_of_any_size_and_company():
    clips = [movie(3), movie(1, 16, 16), movie(2, 7, 5)]
    features = assert_company_changes_nothing(Pixels(size=16), clips, atol=0)
    assert [f.shape for f in features] == [(3, 256), (1, 256), (2, 256)]
    assert all(np.abs(f).max() <= 2 for f in features)


@pytest.mark.parametrize(
    "clip", [np.zeros((0, 4, 4, 3), np.uint8), np.zeros((2, 4, 4), np.uint8), np.zeros((2, 4, 4, 3), np.float32)]
)
def test_what_is_no_rgb_clip_is_refused(clip):
    with pytest.raises(MsencError, match=r"Pixels: clip 0 of the batch is .*expected RGB frames, uint8"):
        Pixels().encode([clip])


# Speech encoders


@pytest.fixture(scope="module")
def speech_folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speech")
    kinds = [(f, n) for f in ("WavLM", "Wav2Vec2", "Hubert") for n in ("layer", "group")]
    return {(f, n): str(save_speech_encoder(folder / f"{f}-{n}", f, n)) for f, n in kinds}


@pytest.mark.parametrize("norm", ["layer", "group"])
@pytest.mark.parametrize("family", ["WavLM", "Wav2Vec2", "Hubert"])
def test_speech_features_do_not_depend_on_the_batch(speech_folders, family, norm):
    encoder = SpeechEncoder(speech_folders[family, norm])
    clips = noise(8000, 7000, 100, 8000, 7600, 6500)
    features = assert_company_changes_nothing(encoder, clips, atol=2e-5)
    assert [len(f) for f in features] == [24, 21, 1, 24, 23, 20]
    assert np.std(features[0], axis=0).min() > 1e-3


@pytest.mark.parametrize(("norm", "num_forwards"), [("layer", 2), ("group", 5)])
def test_speech_clips_share_a_batch_where_padding_allows(speech_folders, norm, num_forwards):
    encoder = SpeechEncoder(speech_folders["WavLM", norm])
    calls = []
    forward = encoder._forward
    encoder._forward = lambda sounds: calls.append(len(sounds)) or forward(sounds)
    encoder.encode(noise(8000, 7000, 100, 8000, 7600, 6500))
    assert len(calls) == num_forwards


@pytest.mark.parametrize("norm", ["layer", "group"])
def test_speech_features_equal_the_models_own(speech_folders, norm):
    from transformers import AutoFeatureExtractor, AutoModel

    folder = speech_folders["Wav2Vec2", norm]
    model, extractor = AutoModel.from_pretrained(folder).eval(), AutoFeatureExtractor.from_pretrained(folder)
    clip = noise(8000)[0]
    with torch.inference_mode():
        output = model(
            extractor(clip, sampling_rate=RATE, return_tensors="pt")["input_values"], output_hidden_states=True
        )
    for layer, hidden in ((-1, output.last_hidden_state), (2, output.last_hidden_state), (1, output.hidden_states[1])):
        features = SpeechEncoder(folder, layer=layer).encode([clip])[0]
        np.testing.assert_allclose(features, hidden[0].numpy(), atol=2e-5)
    np.testing.assert_allclose(
        SpeechEncoder(folder, layer=-3).encode([clip])[0], output.hidden_states[0][0].numpy(), atol=2e-5
    )


def test_a_layer_that_is_not_there_is_refused(speech_folders):
    with pytest.raises(MsencError, match=r"layer 3 of .* does not exist: it has 2 layers, so expected -3\.\.2"):
        SpeechEncoder(speech_folders["WavLM", "layer"], layer=3)


def test_an_unknown_dtype_is_refused(speech_folders):
    with pytest.raises(MsencError, match=r"dtype 'float64': expected one of float32, bfloat16, float16"):
        SpeechEncoder(speech_folders["WavLM", "layer"], dtype="float64")


def test_speech_in_bfloat16_stays_near(speech_folders):
    folder = speech_folders["WavLM", "layer"]
    clip = noise(8000)
    exact, rough = SpeechEncoder(folder).encode(clip)[0], SpeechEncoder(folder, dtype="bfloat16").encode(clip)[0]
    assert rough.dtype == np.float32
    assert np.abs(exact - rough).max() < 0.2


# Whisper, at a window of 2 s


@pytest.fixture(scope="module")
def whisper_folder(tmp_path_factory):
    return str(save_whisper(tmp_path_factory.mktemp("whisper")))


@pytest.mark.parametrize("window", ["full", "short"])
def test_whisper_features_do_not_depend_on_the_batch(whisper_folder, window):
    encoder = WhisperEncoder(whisper_folder, window=window)
    # 80000 samples are 5 s: three windows, of 2, 2 and 1 s.
    features = assert_company_changes_nothing(encoder, noise(8000, 1, 321, 8000, 80000), atol=2e-5)
    assert [len(f) for f in features] == [25, 1, 2, 25, 250]


def test_whisper_features_equal_the_models_own(whisper_folder):
    from transformers import AutoFeatureExtractor, WhisperModel

    model = WhisperModel.from_pretrained(whisper_folder).eval()
    extractor = AutoFeatureExtractor.from_pretrained(whisper_folder)
    clip = noise(8000)[0]
    with torch.inference_mode():
        mel = extractor(clip, sampling_rate=RATE, return_tensors="pt")["input_features"]
        output = model.encoder(mel, output_hidden_states=True)
    for layer in (0, 1, 2, -1):
        features = WhisperEncoder(whisper_folder, layer=layer).encode([clip])[0]
        np.testing.assert_allclose(features, output.hidden_states[layer][0, :25].numpy(), atol=2e-5)


LAYERS = {
    "Whisper": lambda folders, **chosen: WhisperEncoder(folders["Whisper"], **chosen),
    "WavLM": lambda folders, **chosen: SpeechEncoder(folders["WavLM", "layer"], **chosen),
    "wav2vec2": lambda folders, **chosen: SpeechEncoder(folders["Wav2Vec2", "group"], **chosen),
}


@pytest.mark.parametrize("kind", sorted(LAYERS))
def test_layers_stand_side_by_side_in_the_order_asked_for(speech_folders, whisper_folder, kind):
    folders = {**speech_folders, "Whisper": whisper_folder}
    clips = noise(8000, 4321)
    encoder = LAYERS[kind](folders, layers=[2, 0, -2])
    assert encoder.dim == 3 * 16
    together = assert_company_changes_nothing(encoder, clips, atol=2e-5)
    for place, layer in enumerate((2, 0, 1)):
        alone = LAYERS[kind](folders, layer=layer)
        for both, one in zip(together, alone.encode(clips), strict=True):
            np.testing.assert_allclose(both[:, 16 * place : 16 * (place + 1)], one, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("chosen", "found"),
    [
        ({"layers": [0, 3]}, r"layer 3 of .* does not exist: it has 2 layers, so expected -3\.\.2"),
        ({"layers": [2, -1]}, r"layers=\[2, -1\]: 2 and -1 are one layer of "),
        ({"layers": [1, 1]}, r"found layer 1 twice"),
        ({"layers": []}, r"found a list of 0, expected numbers of layers"),
        ({"layers": [1], "layer": 1}, r"layer=1 and layers=\[1\]: found both"),
    ],
)
@pytest.mark.parametrize("kind", ["Whisper", "WavLM"])
def test_layers_that_cannot_be_are_refused(speech_folders, whisper_folder, kind, chosen, found):
    with pytest.raises(MsencError, match=found):
        LAYERS[kind]({**speech_folders, "Whisper": whisper_folder}, **chosen)


def test_whispers_short_window_is_the_full_one_on_full_clips_only(whisper_folder):
    full, short = WhisperEncoder(whisper_folder), WhisperEncoder(whisper_folder, window="short")
    long, brief = noise(32000, 8000)
    np.testing.assert_allclose(full.encode([long])[0], short.encode([long])[0], atol=2e-5)
    assert np.abs(full.encode([brief])[0] - short.encode([brief])[0]).max() > 1e-3


def test_speech_encoders_refuse_each_others_models(speech_folders, whisper_folder):
    with pytest.raises(MsencError, match=r"is a model of type 'whisper'\. Expected WavLM, wav2vec2 or HuBERT"):
        SpeechEncoder(whisper_folder)
    with pytest.raises(MsencError, match="is a model of type 'wavlm': expected a Whisper model"):
        WhisperEncoder(speech_folders["WavLM", "layer"])
    with pytest.raises(MsencError, match="window 'long': expected"):
        WhisperEncoder(whisper_folder, window="long")


# CLIP


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return str(save_clip(tmp_path_factory.mktemp("clip")))


def test_clip_features_do_not_depend_on_the_batch(clip_folder):
    encoder = ClipVision(clip_folder, batch_frames=4)
    features = assert_company_changes_nothing(encoder, [movie(3), movie(5, 30, 20), movie(1, 224, 224)], atol=2e-5)
    assert [f.shape for f in features] == [(3, 12), (5, 12), (1, 12)]


def test_clips_layers_are_the_models_own_class_tokens(clip_folder):
    from transformers import CLIPVisionModelWithProjection

    encoder = ClipVision(clip_folder, layers=[1, -1])
    assert encoder.dim == 2 * 16
    seen = []
    encoder.model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    (features,) = encoder.encode([movie(2)])
    model = CLIPVisionModelWithProjection.from_pretrained(clip_folder).eval()
    with torch.inference_mode():
        output = model(seen[0], output_hidden_states=True)
        np.testing.assert_allclose(features[:, :16], output.hidden_states[1][:, 0].numpy(), atol=2e-5)
        projected = model.visual_projection(torch.from_numpy(features[:, 16:]))
    np.testing.assert_allclose(projected.numpy(), output.image_embeds.numpy(), atol=2e-5)
    with pytest.raises(MsencError, match=r"layer 0 of .* does not exist: it has 2 layers, so expected -2\.\.2 \(1 is"):
        ClipVision(clip_folder, layers=[0, 1])


def test_of_an_oblong_picture_its_middle_is_enlarged_and_no_more(clip_folder):
    wide = movie(1, 4, 400)
    middle = wide[:, :, 184:216]
    encoder = ClipVision(clip_folder)
    processor, sizes = encoder.processor, []

    class Seeing:
        do_center_crop = True

        def __call__(self, frames, **options):
            sizes.extend(frame.shape for frame in frames)
            return processor(frames, **options)

    whole, cut = (processor([f[0]], input_data_format="channels_last", return_tensors="pt") for f in (wide, middle))
    np.testing.assert_allclose(whole["pixel_values"], cut["pixel_values"], atol=1e-5)
    encoder.processor = Seeing()
    features = encoder.encode([wide, wide.transpose(0, 2, 1, 3), middle])
    assert sizes == [(4, 32, 3), (32, 4, 3), (4, 32, 3)]
    np.testing.assert_allclose(features[0], features[2], atol=2e-5)


def test_clip_preprocesses_as_published(clip_folder):
    from PIL import Image

    frame = movie(1, 50, 80)[0]
    encoder = ClipVision(clip_folder)
    seen = []
    encoder.model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    encoder.encode([frame[None]])
    # Shorter side to 224, the longer in proportion (358); the middle 224.
    image = np.asarray(Image.fromarray(frame).resize((358, 224), Image.Resampling.BICUBIC))[:, 67:291] / 255
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    np.testing.assert_allclose(seen[0][0].permute(1, 2, 0).numpy(), (image - mean) / std, atol=1e-5)


def test_clip_refuses_another_model(whisper_folder):
    with pytest.raises(MsencError, match="is a model of type 'whisper': expected a CLIP model"):
        ClipVision(whisper_folder)


# Loading, batching


def test_a_model_that_is_not_there_is_refused_with_what_to_do(tmp_path):
    with pytest.raises(MsencError) as refusal:
        SpeechEncoder(str(tmp_path / "absent"))
    for part in ("absent", "tried: as a folder (there is none of this name) and as a hub id", "expected:", "do:"):
        assert part in str(refusal.value)
    with pytest.raises(MsencError, match="tried: as a folder\n"):
        WhisperEncoder(str(tmp_path))


def test_a_hub_id_offline_is_refused(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(MsencError, match=r"cannot load 'example/no-such-model'"):
        ClipVision("example/no-such-model")


@pytest.fixture
def endpoint(monkeypatch):
    """``endpoint(URL)``: the hub is there, and nobody has looked whether it can be reached."""

    def call(url):
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        look_for_hub.cache_clear()

    yield call
    look_for_hub.cache_clear()


def test_a_hub_out_of_reach_is_looked_for_once(endpoint, caplog):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint(url := f"http://127.0.0.1:{free.getsockname()[1]}")
    for _ in range(2):
        with pytest.raises(MsencError, match=r"cannot load 'example/no-such-model'"):
            ClipVision("example/no-such-model")
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"{url} cannot be reached (ConnectError): models come from its local cache alone."]
    assert os.environ["HF_HUB_OFFLINE"] == "1"  # for processes that this one starts


def test_a_hub_that_answers_anything_is_asked(endpoint):
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        endpoint(f"http://127.0.0.1:{server.server_port}")
        look_for_hub()
    look_for_hub()  # it is gone, and is not asked again
    assert not is_offline_mode()
    assert os.environ["HF_HUB_OFFLINE"] == "0"


def test_weights_that_lack_tensors_are_refused(clip_folder, tmp_path):
    from safetensors.torch import load_file, save_file
    from transformers import CLIPVisionModelWithProjection

    for file in Path(clip_folder).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["visual_projection.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MsencError, match=r"its weights lack 1 tensors \(visual_projection.weight\)"):
        load_pretrained(CLIPVisionModelWithProjection, str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(MsencError, match="CLIPVisionModelWithProjection: cannot load"):
        load_pretrained(CLIPVisionModelWithProjection, str(tmp_path))


def test_loading_says_nothing_and_leaves_logging_as_it_was(clip_folder, capfd):
    from transformers.utils import logging

    logging.enable_progress_bar()
    before = logging.get_verbosity()
    ClipVision(clip_folder)
    assert capfd.readouterr().err == ""
    assert logging.get_verbosity() == before
    assert logging.is_progress_bar_enabled()


def test_similar_batches_hold_each_clip_once_within_the_budget():
    lengths = np.random.default_rng(0).integers(1, 100, 50).tolist()
    batches = list(similar_batches(lengths, budget=200, similar=0.8))
    assert sorted(i for batch in batches for i in batch) == list(range(50))
    for batch in batches:
        own = [lengths[i] for i in batch]
        assert len(own) * max(own) <= 200 or len(own) == 1
        assert min(own) >= 0.8 * max(own)


def test_the_module_imports_without_transformers():
    code = "import sys, msenc.models.encoders; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.real
@pytest.mark.skipif(
    not (Path(os.environ.get("MSENC_MODELS", "")) / "whisper-base").is_dir() or "MSENC_MODELS" not in os.environ,
    reason="needs whisper-base in MSENC_MODELS",
)
def test_whisper_base_as_published():
    folder = str(Path(os.environ["MSENC_MODELS"]) / "whisper-base")
    clips = [voice(120, seconds=2.0), voice(220, seconds=1.0)]
    full = assert_company_changes_nothing(WhisperEncoder(folder), clips, atol=1e-3)
    assert [f.shape for f in full] == [(100, 512), (50, 512)]
    short = WhisperEncoder(folder, window="short").encode(clips)
    for a, b in zip(full, short, strict=True):
        cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        assert 0.5 < cosine.mean() < 0.9999


@pytest.mark.real
@pytest.mark.skipif(
    not (Path(os.environ.get("MSENC_MODELS", "")) / "whisper-base").is_dir() or "MSENC_MODELS" not in os.environ,
    reason="needs whisper-base in MSENC_MODELS",
)
def test_layers_of_whisper_base_are_its_hidden_states():
    from transformers import AutoFeatureExtractor, WhisperModel

    folder = str(Path(os.environ["MSENC_MODELS"]) / "whisper-base")
    clip = voice(150, seconds=1.0)
    model, extractor = WhisperModel.from_pretrained(folder).eval(), AutoFeatureExtractor.from_pretrained(folder)
    with torch.inference_mode():
        mel = extractor(clip, sampling_rate=RATE, return_tensors="pt")["input_features"]
        states = model.encoder(mel, output_hidden_states=True).hidden_states
    encoder = WhisperEncoder(folder, layers=[0, 3, -1])
    (features,) = encoder.encode([clip])
    assert features.shape == (50, 3 * 512)
    for place, layer in enumerate((0, 3, 6)):
        own = features[:, 512 * place : 512 * (place + 1)]
        np.testing.assert_allclose(own, states[layer][0, :50].numpy(), atol=2e-3)
    assert np.abs(features).max() < np.finfo(np.float16).max
