"""Encoders: a clip's waveform or frames -> features, one vector per time step. Used by prepare, never in training.

`LogMel` and `Pixels` need no weights and are deterministic; the others wrap transformers models.
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Literal, Protocol

import numpy as np
import torch
from torch.nn import functional as F

from msenc.models.layers import layers_of
from msenc.models.pretrained import load_pretrained, to_dtype
from msenc.types import MsencError

MAX_OBLONG = 8  # of frames that are enlarged whole, though their middle is all that is kept
# Clips share a batch while the shortest has at least this share of the longest one's length.
SIMILAR = 0.8


class Encoder(Protocol):
    """Clips -> features (T, D), one array per clip, independent of which clips are encoded together.

    An encoder that takes `layers` gives the outputs of these side by side, and `dim` is the width of all together.

    An audio encoder has `sample_rate` (Hz) and takes float32 clips (S,), mono, in -1..1; a video encoder has
    `fps` and takes uint8 clips (T, height, width, 3), RGB frames already sampled at that rate.
    """

    kind: Literal["audio", "video"]
    dim: int

    def encode(self, clips: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Features (T, D) of each clip, float32."""
        ...


class AudioEncoder(Encoder, Protocol):
    """An audio encoder."""

    sample_rate: int


class VideoEncoder(Encoder, Protocol):
    """A video encoder."""

    fps: float


class LogMel:
    """Waveform (S,) -> log-mel spectrogram (T, num_mels): power per mel band in dB, as (dB + 40) / 20.

    The default window is 64 ms: its frequency resolution (15.6 Hz bins, a main lobe of about 60 Hz) separates the
    harmonics of a voice from 80 Hz upwards, and 80 bands are close enough (20 Hz apart at the low end) to resolve
    them: two semitones of pitch change some band by 15 dB or more, with 40 bands, or with the 25 ms that are usual
    for speech recognition, by 2 dB or less in low voices. The scale is fixed, not fitted to each clip, so
    level and pitch compare between clips: 0 dB is a sine of amplitude 1, and the floor is at -80 dB, which gives -2;
    speech lies about -1..1.

    Args:
        sample_rate: Hz.
        n_fft: length of the Hann window and of the transform, in waveform values.
        hop_s: seconds from frame to frame. Frame t is centred at t * hop_s.
        num_mels: triangular bands, equally spaced in mel (HTK's formula), peak 1.
        min_hz: lower edge of the first band.
        max_hz: upper edge of the last band; None: half the sample rate.

    Example:
        >>> LogMel().encode([np.zeros(16000, np.float32)])[0].shape
        (50, 80)
    """

    kind: Literal["audio"] = "audio"

    def __init__(
        self,
        sample_rate: int = 16000,
        n_fft: int = 1024,
        hop_s: float = 0.02,
        num_mels: int = 80,
        min_hz: float = 40.0,
        max_hz: float | None = None,
    ) -> None:
        self.sample_rate = sample_rate
        self.dim = num_mels
        self.n_fft = n_fft
        self.hop = round(hop_s * sample_rate)
        if self.hop < 1:
            raise MsencError(
                f"LogMel: hop_s {hop_s} is shorter than one sampling period at {sample_rate} Hz. Give a longer hop."
            )
        self.window = torch.hann_window(n_fft)
        self.bands = mel_bands(sample_rate, n_fft, num_mels, min_hz, max_hz or sample_rate / 2)

    def encode(self, clips: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Features (ceil(S / hop), num_mels) of each clip, float32."""
        return [self._encode_one(_checked_sound(clip, i, self)) for i, clip in enumerate(clips)]

    def _encode_one(self, clip: np.ndarray) -> np.ndarray:
        spectrum = torch.stft(
            torch.from_numpy(clip),
            self.n_fft,
            self.hop,
            window=self.window,
            center=True,
            pad_mode="constant",  # a clip may be shorter than the window, which reflection padding does not allow
            return_complex=True,
        )
        spectrum = spectrum[:, : math.ceil(len(clip) / self.hop)]  # frames whose centre lies in the clip
        # By half the window's sum: a sine's peak is its amplitude, whatever n_fft.
        power = (spectrum.abs() / (self.window.sum() / 2)).square()  # (n_fft // 2 + 1, T)
        decibels = 10 * torch.log10((power.T @ self.bands).clamp_min(1e-8))  # (T, num_mels)
        return ((decibels + 40) / 20).numpy()


def mel_bands(sample_rate: int, n_fft: int, num_mels: int, min_hz: float, max_hz: float) -> torch.Tensor:
    """Triangular bands over a transform's bins, equally spaced in mel = 2595 log10(1 + Hz / 700) (HTK).

    Returns:
        Weights (n_fft // 2 + 1, num_mels), each band's peak 1.

    Raises:
        MsencError: the edges are out of order, or the bins are so coarse that a band would have none.
    """
    if not 0 <= min_hz < max_hz <= sample_rate / 2:
        raise MsencError(
            f"LogMel: bands from {min_hz} to {max_hz} Hz at {sample_rate} Hz: expected"
            f" 0 <= min_hz < max_hz <= {sample_rate / 2}."
        )
    low, high = (2595 * math.log10(1 + hz / 700) for hz in (min_hz, max_hz))
    mel = torch.linspace(low, high, num_mels + 2, dtype=torch.float64)
    edges = 700 * (10 ** (mel / 2595) - 1)
    bins = torch.linspace(0, sample_rate / 2, n_fft // 2 + 1, dtype=torch.float64)[:, None]
    rising = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    bands = torch.minimum(rising, falling).clamp_min(0)  # (n_fft // 2 + 1, num_mels)
    num_empty = int((bands.sum(0) == 0).sum())
    if num_empty:
        raise MsencError(
            f"LogMel: {num_empty} of {num_mels} bands contain no bin of a transform of length {n_fft} at {sample_rate}"
            " Hz. Give a longer n_fft or fewer num_mels."
        )
    return bands.float()


class SpeechEncoder:
    """Waveform (S,) -> hidden states (T, D) of WavLM, wav2vec2 or HuBERT, 50 frames per second.

    Padding does not change features: models that normalise over the whole clip in their first convolution (`group`
    norm, as wav2vec2-base and HuBERT-base) see padding even through a mask, so only clips of equal length share a
    batch; the others (`layer` norm, as WavLM-large) get clips of similar length, and a mask. Clips shorter than the
    convolutions' receptive field (25 ms) are zero-padded to it.

    Args:
        name_or_path: a folder or a hub id, with its feature extractor.
        layer: 0 is the input of the first layer, k the output of layer k; negative numbers count from the last
            layer, whose output is taken after the model's final norm, if it has one.
        layers: several of these side by side, (T, K*D), instead of `layer`.
        batch_s: seconds of audio in a batch, including padding; a longer clip is encoded alone.
        device: where the model runs.
        dtype: float32, bfloat16 or float16.
    """

    kind: Literal["audio"] = "audio"

    def __init__(
        self,
        name_or_path: str,
        layer: int = -1,
        layers: Sequence[int] | None = None,
        batch_s: float = 60.0,
        device: str = "cpu",
        dtype: str = "float32",
    ) -> None:
        from transformers import AutoConfig, AutoFeatureExtractor, AutoModel

        config = load_pretrained(AutoConfig, name_or_path)
        if not hasattr(config, "feat_extract_norm") or getattr(config, "add_adapter", False):
            raise MsencError(
                f"SpeechEncoder: {name_or_path!r} is a model of type {config.model_type!r}"
                f"{' with an adapter' if hasattr(config, 'feat_extract_norm') else ''}. Expected WavLM, wav2vec2 or"
                " HuBERT without adapter layers; Whisper has its own encoder class (WhisperEncoder)."
            )
        self.extractor = load_pretrained(AutoFeatureExtractor, name_or_path)
        # WavLM's gated position bias has no sdpa kernel in transformers.
        attention = {"attn_implementation": "eager"} if config.model_type == "wavlm" else {}
        model = load_pretrained(
            AutoModel, name_or_path, may_miss=("masked_spec_embed",), dtype=to_dtype(dtype), **attention
        )
        self.model = model.to(device).eval()
        self.layers = _layer_indices(layer, layers, config.num_hidden_layers, name_or_path)
        self.dim = config.hidden_size * len(self.layers)
        self.sample_rate = self.extractor.sampling_rate
        self.batch_s = batch_s
        self.convolutions = list(zip(config.conv_kernel, config.conv_stride, strict=True))
        self.is_masked = config.feat_extract_norm == "layer" and not getattr(config, "conv_pos_batch_norm", False)

    def encode(self, clips: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Features (T, D) of each clip, float32."""
        shortest = self._field()
        sounds = [_checked_sound(clip, i, self) for i, clip in enumerate(clips)]
        sounds = [np.pad(sound, (0, max(shortest - len(sound), 0))) for sound in sounds]
        features: list[np.ndarray] = [np.empty(0)] * len(sounds)
        similar = SIMILAR if self.is_masked else 1.0
        for batch in similar_batches([len(s) for s in sounds], self.batch_s * self.sample_rate, similar):
            hidden = self._forward([sounds[i] for i in batch])  # (N, T, D)
            for row, i in zip(hidden, batch, strict=True):
                features[i] = row[: self._num_frames(len(sounds[i]))].copy()
        return features

    @torch.inference_mode()
    def _forward(self, sounds: list[np.ndarray]) -> np.ndarray:
        inputs = self.extractor(
            sounds, sampling_rate=self.sample_rate, padding=True, return_attention_mask=True, return_tensors="pt"
        ).to(self.model.device)
        values = inputs["input_values"].to(self.model.dtype)
        is_padded = len({len(sound) for sound in sounds}) > 1
        mask = inputs["attention_mask"] if is_padded else None
        with warnings.catch_warnings():
            # WavLM passes torch a boolean mask with its float position bias: deprecated, but correct.
            warnings.filterwarnings("ignore", "Support for mismatched key_padding_mask")
            output = self.model(values, attention_mask=mask, output_hidden_states=True)
        states = [*output.hidden_states[: self.model.config.num_hidden_layers], output.last_hidden_state]
        return _side_by_side([states[layer] for layer in self.layers])

    def _field(self) -> int:
        samples = 1
        for kernel, stride in reversed(self.convolutions):
            samples = (samples - 1) * stride + kernel
        return samples

    def _num_frames(self, samples: int) -> int:
        for kernel, stride in self.convolutions:
            samples = (samples - kernel) // stride + 1
        return samples


class WhisperEncoder:
    """Waveform (S,) -> hidden states (ceil(S / 320), D) of Whisper's encoder, 50 frames per second.

    Whisper was trained on windows of 30 s only, clips padded with silence. ``window="full"`` does the same and drops
    the frames of the padding: the features that Whisper's decoder sees. ``window="short"`` runs the encoder on the
    clip's own frames (positions cut to its length): several times faster on short clips, but the frames no longer
    attend to the silence, and their cosine with the full ones is about 0.95 on speech. Use one mode for a whole data
    set. Longer clips are encoded in consecutive windows of 30 s.

    Args:
        name_or_path: a folder or a hub id, with its feature extractor; the decoder is discarded.
        layer: 0 is the input of the first layer, k the output of layer k; negative numbers count from the last
            layer, whose output is taken after the encoder's final norm.
        layers: several of these side by side, (T, K*D), instead of `layer`.
        window: ``full`` or ``short``.
        batch_s: seconds of audio in a batch, including padding.
        device: where the model runs.
        dtype: float32, bfloat16 or float16.
    """

    kind: Literal["audio"] = "audio"

    def __init__(
        self,
        name_or_path: str,
        layer: int = -1,
        layers: Sequence[int] | None = None,
        window: Literal["full", "short"] = "full",
        batch_s: float = 120.0,
        device: str = "cpu",
        dtype: str = "float32",
    ) -> None:
        from transformers import AutoConfig, AutoFeatureExtractor, WhisperModel

        if window not in ("full", "short"):
            raise MsencError(f"WhisperEncoder: window {window!r}: expected full or short.")
        config = load_pretrained(AutoConfig, name_or_path)
        if config.model_type != "whisper":
            raise MsencError(
                f"WhisperEncoder: {name_or_path!r} is a model of type {config.model_type!r}: expected a Whisper model."
                " WavLM, wav2vec2 and HuBERT load with SpeechEncoder."
            )
        self.extractor = load_pretrained(AutoFeatureExtractor, name_or_path)
        model = load_pretrained(WhisperModel, name_or_path, dtype=to_dtype(dtype))
        self.model = model.encoder.to(device).eval()
        self.layers = _layer_indices(layer, layers, config.encoder_layers, name_or_path)
        self.dim = config.d_model * len(self.layers)
        self.sample_rate = self.extractor.sampling_rate
        self.window = window
        self.batch_s = batch_s
        self.frame_samples = self.extractor.hop_length * self.model.conv2.stride[0]
        self.window_samples = config.max_source_positions * self.frame_samples

    def encode(self, clips: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Features (T, D) of each clip, float32."""
        pieces: list[tuple[int, np.ndarray]] = []
        for i, clip in enumerate(clips):
            sound = _checked_sound(clip, i, self)
            pieces += [(i, sound[s : s + self.window_samples]) for s in range(0, len(sound), self.window_samples)]
        num_frames = [math.ceil(len(piece) / self.frame_samples) for _, piece in pieces]
        full = self.window_samples // self.frame_samples
        lengths = [full if self.window == "full" else n for n in num_frames]

        encoded: list[np.ndarray] = [np.empty(0)] * len(pieces)
        budget = self.batch_s * self.sample_rate / self.frame_samples
        for batch in similar_batches(lengths, budget, similar=1.0):
            hidden = self._forward([pieces[p][1] for p in batch], lengths[batch[0]])  # (N, T, D)
            for row, p in zip(hidden, batch, strict=True):
                encoded[p] = row[: num_frames[p]]
        return [
            np.concatenate([e for (j, _), e in zip(pieces, encoded, strict=True) if j == i]) for i in range(len(clips))
        ]

    @torch.inference_mode()
    def _forward(self, sounds: list[np.ndarray], num_frames: int) -> np.ndarray:
        """Hidden states (N, num_frames, D): the model's own forward, at any length up to its window."""
        mel = self.extractor(
            sounds,
            sampling_rate=self.sample_rate,
            padding="max_length",
            max_length=self.window_samples,
            return_tensors="pt",
        )["input_features"]
        mel = mel[..., : num_frames * self.model.conv2.stride[0]].to(self.model.device, self.model.dtype)
        hidden = F.gelu(self.model.conv2(F.gelu(self.model.conv1(mel)))).transpose(1, 2)  # (N, T, D)
        hidden = hidden + self.model.embed_positions.weight[:num_frames]
        states = [hidden]
        for layer in self.model.layers[: max(self.layers)]:
            states.append(layer(states[-1], None))
        if max(self.layers) == len(self.model.layers):
            states[-1] = self.model.layer_norm(states[-1])
        return _side_by_side([states[layer] for layer in self.layers])


class Pixels:
    """Frames (T, height, width, 3) -> brightness on a small grid (T, size * size), row by row.

    Each value is the mean brightness (Rec. 601 luma) of its cell's area, as (0..1 - 0.5) / 0.25. Frames that are
    not square are squeezed. No weights; deterministic.

    Args:
        fps: frames per second that the clips are sampled at.
        size: cells per side.

    Example:
        >>> Pixels(size=2).encode([np.full((5, 48, 64, 3), 255, np.uint8)])[0][0]
        array([2., 2., 2., 2.], dtype=float32)
    """

    kind: Literal["video"] = "video"

    def __init__(self, fps: float = 3.0, size: int = 16) -> None:
        self.fps = fps
        self.size = size
        self.dim = size * size

    def encode(self, clips: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Features (T, size * size) of each clip, float32."""
        return [self._encode_one(_checked_frames(clip, i, self)) for i, clip in enumerate(clips)]

    def _encode_one(self, clip: np.ndarray) -> np.ndarray:
        rows, columns = area_weights(clip.shape[1], self.size), area_weights(clip.shape[2], self.size)
        luma = np.array([0.299, 0.587, 0.114]) / 255
        # Frame by frame: a clip of large frames as floats would not fit into memory.
        grid = np.stack([rows @ (frame @ luma) @ columns.T for frame in clip])  # (T, size, size)
        return ((grid - 0.5) / 0.25).reshape(len(clip), -1).astype(np.float32)


def area_weights(length: int, size: int) -> np.ndarray:
    """Weights (size, length) that average `length` pixels over `size` equal parts, pixels on an edge shared.

    Example:
        >>> area_weights(3, 2).round(2).tolist()
        [[0.67, 0.33, 0.0], [0.0, 0.33, 0.67]]
    """
    part = length / size
    start = np.arange(size)[:, None] * part
    pixel = np.arange(length)[None]
    overlap = np.minimum(start + part, pixel + 1) - np.maximum(start, pixel)
    return np.clip(overlap, 0, None) / part


class ClipVision:
    """Frames (T, height, width, 3) -> CLIP's image embeddings (T, D), one per frame.

    Preprocessing is the checkpoint's own (CLIP: shorter side to 224 by bicubic resampling, centre crop, normalised),
    by Pillow wherever it runs, so that features do not depend on which image library is installed.

    Args:
        name_or_path: a folder or a hub id of a CLIP model, or of its vision half, with its image processor.
        layers: instead of the embeddings, the class token's vectors after several layers side by side, (T, K*D), where
            D is the width of the layers: k is after layer k, negative numbers count from the last one, whose output
            is taken after the final norm. There is no 0: the class token enters the first one the same for all images.
        fps: frames per second that the clips are sampled at.
        batch_frames: frames in a batch.
        device: where the model runs.
        dtype: float32, bfloat16 or float16.
    """

    kind: Literal["video"] = "video"

    def __init__(
        self,
        name_or_path: str,
        layers: Sequence[int] | None = None,
        fps: float = 3.0,
        batch_frames: int = 64,
        device: str = "cpu",
        dtype: str = "float32",
    ) -> None:
        from transformers import AutoConfig, CLIPImageProcessorPil, CLIPVisionModelWithProjection

        config = load_pretrained(AutoConfig, name_or_path)
        if config.model_type not in ("clip", "clip_vision_model"):
            raise MsencError(
                f"ClipVision: {name_or_path!r} is a model of type {config.model_type!r}: expected a CLIP model."
            )
        self.processor = load_pretrained(CLIPImageProcessorPil, name_or_path)
        model = load_pretrained(CLIPVisionModelWithProjection, name_or_path, dtype=to_dtype(dtype))
        self.model = model.to(device).eval()
        self.layers: list[int] = []
        self.dim = model.config.projection_dim
        if layers is not None:
            self.layers = _layer_indices(-1, layers, model.config.num_hidden_layers, name_or_path, first=1)
            self.dim = model.config.hidden_size * len(self.layers)
        self.fps = fps
        self.batch_frames = batch_frames

    def encode(self, clips: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Features (T, D) of each clip, float32."""
        frames = [frame for i, clip in enumerate(clips) for frame in _checked_frames(clip, i, self)]
        if not frames:
            return []
        starts = range(0, len(frames), self.batch_frames)
        features = np.concatenate([self._forward(frames[s : s + self.batch_frames]) for s in starts])
        return np.split(features, np.cumsum([len(clip) for clip in clips])[:-1])

    @torch.inference_mode()
    def _forward(self, frames: list[np.ndarray]) -> np.ndarray:
        if self.processor.do_center_crop:
            frames = [_middle(frame) for frame in frames]
        pixels = self.processor(frames, input_data_format="channels_last", return_tensors="pt")["pixel_values"]
        pixels = pixels.to(self.model.device, self.model.dtype)
        if not self.layers:
            return _side_by_side([self.model(pixels).image_embeds])
        states = [state[:, 0] for state in self.model(pixels, output_hidden_states=True).hidden_states]
        states[-1] = self.model.vision_model.post_layernorm(states[-1])
        return _side_by_side([states[layer] for layer in self.layers])


def similar_batches(lengths: Sequence[int], budget: float, similar: float) -> Iterator[list[int]]:
    """Group clips by length, longest first, so that a padded batch stays within a budget.

    Args:
        lengths: length of each clip.
        budget: most of (clips * longest) in a batch; a clip that exceeds it goes alone.
        similar: least share of the batch's longest length that a clip may have; 1: equal lengths only.

    Yields:
        Indices of the clips of one batch; each clip is in one batch.

    Example:
        >>> list(similar_batches([10, 2, 9, 10], budget=20, similar=0.8))
        [[0, 3], [2], [1]]
    """
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        longest = lengths[batch[0]] if batch else lengths[i]
        if batch and ((len(batch) + 1) * longest > budget or lengths[i] < similar * longest):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _layer_indices(layer: int, layers: Sequence[int] | None, num_layers: int, name: str, first: int = 0) -> list[int]:
    """The layer, or layers, as numbers from `first` on."""
    if layers is not None and layer != -1:
        raise MsencError(f"layer={layer} and layers={list(layers)}: found both, expected one of them. Leave out layer.")
    found: dict[int, int] = {}
    for given in layers_of({"layers": [layer] if layers is None else layers}, "encoder"):
        index = given + num_layers + 1 if given < 0 else given
        if not first <= index <= num_layers:
            start = "0 is the input of the first" if first == 0 else "1 is the output of the first"
            raise MsencError(
                f"layer {given} of {name!r} does not exist: it has {num_layers} layers, so expected"
                f" {first - num_layers - 1}..{num_layers} ({start})."
            )
        if index in found:
            raise MsencError(f"layers={list(layers or [])}: {found[index]} and {given} are one layer of {name!r}.")
        found[index] = given
    return list(found)


def _side_by_side(states: Sequence[torch.Tensor]) -> np.ndarray:
    """(..., D) of each layer -> (..., K*D) float32."""
    return torch.cat([state.float() for state in states], dim=-1).cpu().numpy()


def _checked_sound(clip: np.ndarray, index: int, encoder: AudioEncoder) -> np.ndarray:
    is_sound = clip.ndim == 1 and clip.size > 0 and np.issubdtype(clip.dtype, np.floating)
    if not is_sound or not np.isfinite(clip).all():
        found = f"{clip.dtype} {clip.shape}" + (" with values that are not finite" if is_sound else "")
        raise MsencError(
            f"{type(encoder).__name__}: clip {index} of the batch is {found}: expected a mono waveform, float32 (S,),"
            f" at {encoder.sample_rate} Hz, not empty. Decode it again, or remove the utterance's audio."
        )
    return np.ascontiguousarray(clip, dtype=np.float32)


def _middle(frame: np.ndarray) -> np.ndarray:
    """The middle of a frame (h, w, 3) at most so oblong: what its centre crop leaves, before the whole is enlarged.

    A line of 10,000 pixels, with its shorter side made 224, would take 1.5 GB.
    """
    longest = MAX_OBLONG * min(frame.shape[:2])
    first_row, first_column = (max(side - longest, 0) // 2 for side in frame.shape[:2])
    return frame[first_row : first_row + longest, first_column : first_column + longest]


def _checked_frames(clip: np.ndarray, index: int, encoder: VideoEncoder) -> np.ndarray:
    if clip.ndim != 4 or clip.shape[-1] != 3 or clip.dtype != np.uint8 or clip.size == 0:
        raise MsencError(
            f"{type(encoder).__name__}: clip {index} of the batch is {clip.dtype} {clip.shape}: expected RGB frames,"
            f" uint8 (frames, height, width, 3), at {encoder.fps} per second, not empty. Decode it again, or"
            " remove the utterance's video."
        )
    return clip
