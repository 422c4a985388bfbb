"""Connectors: an utterance's features -> a fixed number of vectors that the LLM reads in place of token embeddings.

Each is a module ``(features (N, T, D), mask (N, T) bool, True = real) -> (N, Q, H)``, whose output for an utterance
depends neither on padding nor on the other utterances of the batch.

With ``normalize=True``, a connector standardizes its input, and its output has the scale of the LLM's token embeddings
(see `calibrate`).
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from torch import Tensor, nn

from msenc.files import read_json
from msenc.files.kinds import Name
from msenc.models.pretrained import load_error, load_torch_file, look_for_hub, name_some, split_revision
from msenc.types import MsencError

# Of checkpoints whose Q-Former also reads text: the layers' second feed-forward, which queries never pass.
TEXT_PATH = re.compile(r"qformer\.encoder\.layer\.\d+\.(intermediate|output)\.")


WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
"""Names of weight files; if the weights are split, ``<name>.index.json`` is their index."""


WHITENED = 1.0
"""Of the mean power of a direction: what is added to each before it is divided out. With 0.1, what is faint in a
log-mel spectrogram became so loud that connectors lost in the first epoch what tells utterances apart (docs/log.md)."""


class Connector(nn.Module):
    """Features (N, T, D), mask (N, T) -> (N, Q, H): base class with the input and output layers of all connectors.

    Args:
        in_dim: width D of the features.
        num_queries: Q, vectors per utterance.
        normalize: standardize the features, and scale the output to the LLM's token embeddings (see `calibrate`).
    """

    out_norm: nn.Module

    def __init__(self, in_dim: int, num_queries: int, normalize: bool) -> None:
        super().__init__()
        self.num_queries = num_queries
        self.in_norm = Standardize(in_dim) if normalize else nn.Identity()
        self.mixture: nn.Module = nn.Identity()

    def take_layers(self, layers: Sequence[int]) -> None:
        """Read several layers of an encoder, side by side in (N, T, K*D), and mix them to the (N, T, D) of `in_dim`.

        Args:
            layers: their numbers, for those who read the weights.
        """
        is_standardized = isinstance(self.in_norm, Standardize)
        if is_standardized:
            self.in_norm = Standardize(len(layers) * len(self.in_norm.shift))
        self.mixture = LayerMixture(layers, normalize=not is_standardized)

    def prepared(self, features: Tensor) -> Tensor:
        """What `connect` reads: (..., D) standardized; of several layers, (..., K*D), their mixture."""
        return self.mixture(self.in_norm(features))

    @property
    def first(self) -> nn.Linear:
        """The linear map applied to the features."""
        return self.in_proj

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        """Connect each utterance. A row without a real frame gives the same finite vectors whatever its padding.

        Args:
            features: (N, T, D), T at least 1; after `take_layers`, (N, T, K*D).
            mask: (N, T) bool, True for real frames.

        Returns:
            (N, Q, H).
        """
        return self.out_norm(self.connect(self.prepared(_real(features, mask)), mask))

    def connect(self, features: Tensor, mask: Tensor) -> Tensor:
        """The part between input and output layers: (N, T, D), (N, T) -> (N, Q, H)."""
        raise NotImplementedError


class QFormer(Connector):
    """Features (N, T, D), mask (N, T) -> (N, Q, H): learned queries attend to the frames (BLIP-2's Q-Former).

    Linear to `encoder_dim`, Q-Former, linear to `out_dim`, both without bias. Frames have no position encodings: the
    queries see a set, which is ordered only if the features themselves encode time.

    The key biases of attention have a gradient of zero in exact arithmetic (softmax ignores terms common to all keys),
    so theirs is rounding noise, which is expected.

    Args:
        in_dim: width D of the features.
        out_dim: width H of the LLM.
        num_queries: Q, vectors per utterance.
        num_layers: layers of the Q-Former.
        hidden_dim: its width.
        num_heads: its attention heads.
        intermediate_dim: width of its feed-forward; four times `hidden_dim` if None.
        cross_attention_frequency: layers 0, k, 2k, ... attend to the frames.
        encoder_dim: width of the Q-Former's input frames.
        dropout: of hidden states and attention.
        init: a folder or hub id of a BLIP-2 checkpoint, of which only the Q-Former and query tokens are
            read; None: random.
        freeze_core: the Q-Former and its queries do not train; the two linear maps do.
        normalize: standardize the features, and scale the output to the LLM's token embeddings (see `calibrate`).

    Source: Li et al., BLIP-2 (arXiv 2301.12597), section 3.1; the linear maps as in arXiv 2509.14627.

    Example:
        >>> connector = QFormer(8, 24, num_queries=4, num_layers=2, hidden_dim=16, num_heads=2, encoder_dim=8)
        >>> connector(torch.zeros(3, 5, 8), torch.ones(3, 5, dtype=torch.bool)).shape
        torch.Size([3, 4, 24])
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        num_queries: int = 32,
        num_layers: int = 12,
        hidden_dim: int = 768,
        num_heads: int = 12,
        intermediate_dim: int | None = None,
        cross_attention_frequency: int = 2,
        encoder_dim: int = 1408,
        dropout: float = 0.1,
        init: str | None = None,
        freeze_core: bool = False,
        normalize: bool = False,
    ) -> None:
        super().__init__(in_dim, num_queries, normalize)
        self.in_proj = nn.Linear(in_dim, encoder_dim, bias=False)
        self.core = QFormerCore(
            num_queries=num_queries,
            num_layers=num_layers,
            hidden_dim=hidden_dim,
            num_heads=num_heads,
            intermediate_dim=intermediate_dim,
            cross_attention_frequency=cross_attention_frequency,
            encoder_dim=encoder_dim,
            dropout=dropout,
            init=init,
            freeze=freeze_core,
        )
        self.out_proj = nn.Linear(hidden_dim, out_dim, bias=False)
        self.out_norm = EmbeddingScale(out_dim) if normalize else nn.Identity()

    def connect(self, features: Tensor, mask: Tensor) -> Tensor:
        """See `Connector`."""
        return self.out_proj(self.core(self.in_proj(features), mask))


class QFormerCore(nn.Module):
    """Frames (N, T, E), mask (N, T) -> (N, Q, hidden_dim): the part of `QFormer` that streams may share.

    Its tensors are named as in a BLIP-2 checkpoint: ``query_tokens`` and ``qformer.*``. Arguments as in `QFormer`;
    `freeze` is its `freeze_core`.
    """

    def __init__(
        self,
        num_queries: int,
        num_layers: int,
        hidden_dim: int,
        num_heads: int,
        cross_attention_frequency: int,
        encoder_dim: int,
        dropout: float,
        intermediate_dim: int | None = None,
        init: str | None = None,
        freeze: bool = False,
    ) -> None:
        super().__init__()
        self.settings = {
            "num_queries": num_queries,
            "num_layers": num_layers,
            "hidden_dim": hidden_dim,
            "num_heads": num_heads,
            "intermediate_dim": intermediate_dim or 4 * hidden_dim,
            "cross_attention_frequency": cross_attention_frequency,
            "encoder_dim": encoder_dim,
            "dropout": dropout,
            "init": init,
            "freeze": freeze,
        }
        from transformers import Blip2QFormerConfig, Blip2QFormerModel

        if hidden_dim % num_heads:
            raise MsencError(
                f"QFormer: hidden_dim {hidden_dim} is not divisible by num_heads {num_heads}. Change one of them."
            )
        config = Blip2QFormerConfig(
            hidden_size=hidden_dim,
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            intermediate_size=self.settings["intermediate_dim"],
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            cross_attention_frequency=cross_attention_frequency,
            encoder_hidden_size=encoder_dim,
            # BERT's 0.02 suits widths near 768: in a narrow Q-Former it makes attention's values so small that next
            # to nothing of the frames (1 % of the output at 64) reaches the queries, and learning starts slowly.
            initializer_range=hidden_dim**-0.5,
        )
        # Random, not zero: equal queries would stay equal, as nothing else distinguishes them.
        self.query_tokens = nn.Parameter(torch.randn(1, num_queries, hidden_dim) * config.initializer_range)
        self.qformer = Blip2QFormerModel(config)
        if init is not None:
            load_blip2(self, init)
        self.freeze = freeze
        if freeze:
            self.requires_grad_(False)
            self.eval()

    def train(self, mode: bool = True) -> "QFormerCore":
        """A frozen core stays in eval mode."""
        return super().train(mode and not self.freeze)

    def forward(self, frames: Tensor, mask: Tensor) -> Tensor:
        """Attend to the real frames; (N, T, E), (N, T) -> (N, Q, hidden_dim)."""
        return self.qformer(
            query_embeds=self.query_tokens.expand(len(frames), -1, -1),
            encoder_hidden_states=frames,
            encoder_attention_mask=mask,
        ).last_hidden_state


class Mlp(Connector):
    """Features (N, T, D), mask (N, T) -> (N, Q, H): means over Q equal spans of time, each through an MLP.

    Query q is computed from the mean of the frames between q/Q and (q+1)/Q of the utterance; a frame on an edge counts
    proportionally in both spans, and an utterance of fewer than Q frames repeats them. Preserves temporal order.

    Args:
        in_dim: width D of the features.
        out_dim: width H of the LLM.
        num_queries: Q, vectors per utterance.
        hidden_dim: width between the two linear maps.
        normalize: standardize the features, and scale the output to the LLM's token embeddings (see `calibrate`).

    Example:
        >>> Mlp(8, 24)(torch.zeros(3, 5, 8), torch.ones(3, 5, dtype=torch.bool)).shape
        torch.Size([3, 8, 24])
    """

    def __init__(
        self, in_dim: int, out_dim: int, num_queries: int = 8, hidden_dim: int = 512, normalize: bool = False
    ) -> None:
        super().__init__(in_dim, num_queries, normalize)
        self.layers = nn.Sequential(nn.Linear(in_dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, out_dim))
        self.out_norm = EmbeddingScale(out_dim) if normalize else nn.Identity()

    @property
    def first(self) -> nn.Linear:
        """The linear map applied to the features."""
        return self.layers[0]

    def connect(self, features: Tensor, mask: Tensor) -> Tensor:
        """See `Connector`; a row without a real frame counts as one frame of zeros."""
        return self.layers(span_weights(mask, self.num_queries).to(features.dtype) @ features)


class ConvBlock(nn.Module):
    """Frames (N, T, E) -> (N, T, E): x + linear(GELU(convolution over time of the normalized x)), without biases.

    Args:
        dim: E.
        kernel: width of the convolution in frames; odd.
    """

    def __init__(self, dim: int, kernel: int) -> None:
        super().__init__()
        self.mix = nn.Conv1d(dim, dim, kernel, padding=kernel // 2, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, frames: Tensor, mask: Tensor) -> Tensor:
        """Padding is set to zero before each convolution, so it does not affect its neighbours."""
        mixed = self.mix((_unit(frames) * mask[..., None]).transpose(1, 2)).transpose(1, 2)
        return (frames + self.out(nn.functional.gelu(mixed))) * mask[..., None]


class ConvConnector(Connector):
    """Features (N, T, D), mask (N, T) -> (N, Q, H): convolutions over time, then each query pools the frames.

    Initially the output has no component common to all utterances: standardized features have zero mean, no layer has
    a bias, and a query's own vector decides where it attends but is not part of the output. So most of the output
    differs between utterances, even at rates at which a Q-Former becomes constant (docs/connectors.md). Convolutions
    capture rhythm and motion, which a set of frames lacks.

    Args:
        in_dim: width D of the features.
        out_dim: width H of the LLM.
        num_queries: Q, vectors per utterance.
        hidden_dim: width E between input and output layers.
        num_blocks: convolution blocks.
        kernel: width of each convolution in frames; odd.
        pooling: ``attention``: each query weights frames by content and position in the utterance; ``spans``: means
            over Q equal spans of time.
        normalize: standardize the features, and scale the output to the LLM's token embeddings (see `calibrate`).

    Source: attentive pooling as in Okabe et al. (arXiv 1803.10963), a head per query; residual convolutions.

    Example:
        >>> ConvConnector(8, 24)(torch.zeros(3, 5, 8), torch.ones(3, 5, dtype=torch.bool)).shape
        torch.Size([3, 4, 24])
    """

    PLACES = 16
    """Cosines over the utterance that encode a frame's position in it."""

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        num_queries: int = 4,
        hidden_dim: int = 128,
        num_blocks: int = 2,
        kernel: int = 5,
        pooling: str = "attention",
        normalize: bool = True,
    ) -> None:
        super().__init__(in_dim, num_queries, normalize)
        if pooling not in ("attention", "spans"):
            raise MsencError(f"model.connector.pooling: found {pooling!r}, expected attention or spans.")
        if kernel < 1 or kernel % 2 == 0:
            raise MsencError(f"model.connector.kernel: found {kernel}, expected an odd number of frames.")
        self.in_proj = nn.Linear(in_dim, hidden_dim, bias=False)
        self.blocks = nn.ModuleList(ConvBlock(hidden_dim, kernel) for _ in range(num_blocks))
        self.pooling = pooling
        if pooling == "attention":
            self.content = nn.Linear(hidden_dim, num_queries, bias=False)
            self.place = nn.Parameter(0.1 * torch.randn(num_queries, self.PLACES))
            self.value = nn.Parameter(torch.randn(num_queries, hidden_dim, hidden_dim) * hidden_dim**-0.5)
        self.up = nn.Linear(hidden_dim, 2 * hidden_dim, bias=False)
        self.down = nn.Linear(2 * hidden_dim, hidden_dim, bias=False)
        self.out_proj = nn.Linear(hidden_dim, out_dim, bias=False)
        self.out_norm = EmbeddingScale(out_dim) if normalize else nn.Identity()

    def connect(self, features: Tensor, mask: Tensor) -> Tensor:
        """See `Connector`."""
        frames = self.in_proj(features) * mask[..., None]  # (N, T, E)
        for block in self.blocks:
            frames = block(frames, mask)
        if self.pooling == "spans":
            pooled = span_weights(mask, self.num_queries).to(frames.dtype) @ frames  # (N, Q, E)
        else:
            pooled = torch.einsum("nqe,qef->nqf", self._weights(frames, mask) @ frames, self.value)
        hidden = nn.functional.gelu(self.up(_unit(pooled)))
        return self.out_proj(pooled + self.down(hidden))

    def _weights(self, frames: Tensor, mask: Tensor) -> Tensor:
        """(N, Q, T): how much each query takes of each frame."""
        place = (mask.cumsum(1).float() - 0.5) / mask.sum(1, keepdim=True).clamp_min(1)  # (N, T), 0 to 1
        # From 1 on: a wave of no frequency would raise all frames' scores alike, which a softmax does not see.
        waves = torch.cos(
            torch.pi * place[..., None] * torch.arange(1, self.PLACES + 1, device=mask.device)
        )  # (N, T, P)
        scores = self.content(_unit(frames)) + waves.to(frames.dtype) @ self.place.T  # (N, T, Q)
        return scores.masked_fill(~mask[..., None], torch.finfo(scores.dtype).min).softmax(1).transpose(1, 2)


def _unit(vectors: Tensor) -> Tensor:
    return nn.functional.rms_norm(vectors, vectors.shape[-1:])


class Standardize(nn.Module):
    """Features (..., D) -> (x - shift) * scale, per dimension. Does nothing until it is fitted; then trains on.

    Both are parameters, so that they go where the connector's weights go, into checkpoints first of all.

    Example:
        >>> norm = Standardize(2)
        >>> norm.fit([torch.tensor([[0.0, 5.0], [4.0, 5.0]])])
        >>> norm(torch.tensor([[4.0, 5.0]])).tolist()
        [[1.0, 0.0]]
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(dim))
        self.scale = nn.Parameter(torch.ones(dim))

    @torch.no_grad()
    def fit(self, utterances: Iterable[Tensor]) -> None:
        """Take mean and standard deviation of the frames (T, D) of utterances; a constant dimension becomes 0."""
        count, total, squares = 0, torch.zeros(()), torch.zeros(())
        for frames in utterances:
            frames = frames.double()
            count += len(frames)
            total = total + frames.sum(0)
            squares = squares + frames.square().sum(0)
        if not count:
            return
        mean = total / count
        std = (squares / count - mean.square()).clamp_min(0).sqrt()
        self.shift.copy_(mean)
        self.scale.copy_(1 / std.clamp_min(1e-2 * std.mean().item() + 1e-6))

    def forward(self, features: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return (features - self.shift) * self.scale


class LayerMixture(nn.Module):
    """Layers of an encoder side by side (..., K*D) -> their mean (..., D) by learned weights that add up to 1.

    The weights are a softmax, at first all equal. Layers differ in scale, by which alone one could outweigh the others:
    they come standardized, or each frame of each layer is normalized here.

    Args:
        layers: the layers' numbers, in order.
        normalize: each frame of a layer to mean 0 and variance 1.

    Source: Yang et al., SUPERB (arXiv 2105.01051), section 3; there the softmax is of the parameters themselves, and
    training a hundred times as long.

    Example:
        >>> LayerMixture([2, 4], normalize=False)(torch.tensor([[1.0, 2.0, 3.0, 6.0]])).tolist()
        [[2.0, 4.0]]
    """

    GAIN = 10.0
    """Of the parameters in the softmax: Adam moves each by about the learning rate in a step, whatever it is for."""

    def __init__(self, layers: Sequence[int], normalize: bool) -> None:
        super().__init__()
        self.layers = tuple(layers)
        self.normalize = normalize
        self.logits = nn.Parameter(torch.zeros(len(layers)))

    def forward(self, features: Tensor) -> Tensor:
        """(..., K*D) -> (..., D)."""
        layers = features.unflatten(-1, (len(self.layers), -1))  # (..., K, D)
        if self.normalize:
            layers = nn.functional.layer_norm(layers, layers.shape[-1:])
        return (self.GAIN * self.logits).softmax(0) @ layers


def layer_weights(connectors: Mapping[str, nn.Module]) -> dict[str, dict[int, float]]:
    """Stream -> layer -> its weight, of connectors that mix layers; where weights are shared out, in all processes."""
    found = {}
    for stream, connector in connectors.items():
        if isinstance(mixture := getattr(connector, "mixture", None), LayerMixture):
            logits = mixture.logits.detach()
            logits = logits.full_tensor() if hasattr(logits, "full_tensor") else logits
            weights = (mixture.GAIN * logits.float()).softmax(0).tolist()
            found[stream] = dict(zip(mixture.layers, weights, strict=True))
    return found


class EmbeddingScale(nn.Module):
    """Vectors (..., H) -> the same directions, each with a root mean square of 1, times a gain per dimension."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(dim))

    def forward(self, vectors: Tensor) -> Tensor:
        """(..., H) -> (..., H), in the input's type; computed in float32."""
        return (nn.functional.rms_norm(vectors.float(), self.gain.shape) * self.gain).to(vectors.dtype)


def calibrate(connector: nn.Module, utterances: Iterable[Tensor], embeddings: Tensor) -> None:
    """Calibrate a connector built with ``normalize=True``, once, before it trains; leave others unchanged.

    By far the larger part of most features is common to all utterances. It drives the whole connector to one common
    output, a soft prompt, before it learns to distinguish them; standardization removes that part. Of
    the rest, a few directions (speaker, image brightness) have most of the power, and cues
    little: the first linear map scales strong directions alike and raises faint ones (`whiten`). And an
    LLM reads its inputs relative to the vectors that it adds to them, so a connector's output has the root mean square
    of a token embedding, and keeps it: it cannot grow without bound in one direction.

    Args:
        connector: changed in place.
        utterances: features (T, D) of training utterances; (T, K*D) where the connector takes several layers.
        embeddings: (V, H) of the LLM's tokens.
    """
    if isinstance(connector.in_norm, Standardize):
        known = list(utterances)
        connector.in_norm.fit(known)
        with torch.no_grad():
            whiten(connector.first, [connector.prepared(frames.float()) for frames in known])
            connector.out_norm.gain.fill_(embeddings.float().square().mean().sqrt())


@torch.no_grad()
def whiten(linear: nn.Linear, utterances: Sequence[Tensor]) -> None:
    """Equalize the power of a linear map's input directions; the power of its output stays the same.

    Its weight W becomes W (C + s I)^(-1/2), with the covariance C of the frames and s its mean eigenvalue times
    `WHITENED`: much stronger directions are scaled down to the same power, weaker ones keep their order. This is only
    an initialization.

    Args:
        linear: changed in place; its bias stays.
        utterances: its inputs (T, D), of mean 0.
    """
    count = sum(len(frames) for frames in utterances)
    if not count:
        return
    covariance = sum(frames.T @ frames for frames in utterances) / count  # (D, D)
    power, directions = torch.linalg.eigh(covariance.double())
    power = power.clamp_min(0)
    if power.mean() == 0:
        return
    raised = (directions * (power + WHITENED * power.mean()).rsqrt()) @ directions.T
    weight = linear.weight.double()
    white = weight @ raised.to(weight.device)
    before, after = ((w @ covariance.to(w)) * w for w in (weight, white))  # each sums to the output's power
    linear.weight.copy_(white * (before.sum() / after.sum()).sqrt())


def span_weights(mask: Tensor, num_spans: int) -> Tensor:
    """Weights (N, Q, T) float32 that average the real frames over `num_spans` equal spans.

    Example:
        >>> (3 * span_weights(torch.tensor([[True, True, True, False]]), 2)).round().tolist()
        [[[2.0, 1.0, 0.0, 0.0], [0.0, 1.0, 2.0, 0.0]]]
    """
    # float32 whatever the default is: bfloat16, exact only up to 256, would misplace the spans of a long clip.
    place = mask.cumsum(1).float() - 1  # (N, T): which real frame this is
    span = mask.sum(1).float()[:, None, None] / num_spans  # (N, 1, 1): frames of a span
    start = torch.arange(num_spans, device=mask.device).float()[None, :, None] * span  # (N, Q, 1)
    place = place[:, None, :]  # (N, 1, T)
    overlap = torch.minimum(start + span, place + 1) - torch.maximum(start, place)  # (N, Q, T)
    return overlap.clamp_min(0) * mask[:, None, :] / span.clamp_min(1e-6)


def tie(connectors: Mapping[str, nn.Module]) -> None:
    """Make all streams share the first one's core (Q-Former and queries); each keeps its own linear maps.

    Args:
        connectors: stream name -> `QFormer`, changed in place.

    Raises:
        MsencError: when a connector has no core, or its core's settings differ.
    """
    names = list(connectors)
    for name in names:
        if not isinstance(getattr(connectors[name], "core", None), QFormerCore):
            raise MsencError(
                f"connectors cannot be tied: {name}'s is a {type(connectors[name]).__name__}, which has no Q-Former to"
                " share. Use the connector qformer for every stream, or tie none."
            )
    for name in names[1:]:
        first, own = connectors[names[0]].core.settings, connectors[name].core.settings
        different = [f"{key} {first[key]!r} and {own[key]!r}" for key in first if first[key] != own[key]]
        if different:
            raise MsencError(
                f"connectors cannot be tied: the Q-Formers of {names[0]} and {name} differ in {', '.join(different)}."
                " Give them the same settings, or tie none."
            )
    for name in names[1:]:
        connectors[name].core = connectors[names[0]].core


def load_blip2(core: QFormerCore, name_or_path: str) -> None:
    """Fill a core from the Q-Former of a BLIP-2 checkpoint; no other tensor is read.

    Args:
        core: changed in place.
        name_or_path: a folder or hub id with weights (safetensors or bin; safetensors if there are both), in one
            file or several; of these, only the files that hold Q-Former tensors are opened (or downloaded).

    Raises:
        MsencError: no such checkpoint, or its Q-Former has other shapes; names the tensors.
    """
    from safetensors import SafetensorError
    from transformers import Blip2QFormerConfig

    wanted = core.state_dict()
    try:
        config = _read_json(name_or_path, "config.json", _Blip2).get("qformer_config", {})
        found: dict[str, Tensor] = {}
        for file in _files_of(name_or_path):
            found |= _qformer_tensors(file)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise load_error("QFormer", name_or_path, error) from error

    both = sorted(found.keys() & wanted.keys())
    faults = {
        "missing there": sorted(wanted.keys() - found.keys()),
        "unknown here": sorted(found.keys() - wanted.keys()),
        "of another shape": [
            f"{name} {tuple(found[name].shape)} for {tuple(wanted[name].shape)}"
            for name in both
            if found[name].shape != wanted[name].shape
        ],
    }
    lines = [f"{len(names)} tensors {kind}: {name_some(names)}" for kind, names in faults.items() if names]
    num_heads = config.get("num_attention_heads", Blip2QFormerConfig().num_attention_heads)
    if num_heads != core.settings["num_heads"]:  # no tensor's shape tells it
        lines.append(f"num_heads {num_heads} there, {core.settings['num_heads']} here")
    if lines:
        raise MsencError(
            f"QFormer: the Q-Former of {name_or_path!r} does not fit the connector's settings"
            f" ({', '.join(f'{k}={v}' for k, v in core.settings.items() if k not in ('init', 'freeze', 'dropout'))}).\n"
            + "".join(f"  {line}\n" for line in lines)
            + "  do: give the connector the checkpoint's sizes (defaults are those of Salesforce/blip2-opt-2.7b), or"
            " init=null"
        )
    core.load_state_dict(found)


def _qformer_tensors(file: Path) -> dict[str, Tensor]:
    from safetensors import safe_open

    if file.suffix != ".safetensors":
        return {name: tensor for name, tensor in load_torch_file(file).items() if _is_qformer(name)}
    with safe_open(file, framework="pt") as tensors:
        names = [key for key in tensors.keys() if _is_qformer(key)]  # noqa: SIM118 (not a mapping)
        return {name: tensors.get_tensor(name) for name in names}


def _files_of(name_or_path: str) -> list[Path]:
    """The weight files that hold Q-Former tensors."""
    for weights in WEIGHT_FILES:
        index = None
        with suppress(FileNotFoundError, EntryNotFoundError):
            index = _read_json(name_or_path, f"{weights}.index.json", _WeightIndex)
        if index is not None:
            files = sorted({file for name, file in index["weight_map"].items() if _is_qformer(name)})
            return [_fetch(name_or_path, file) for file in files]
        with suppress(FileNotFoundError, EntryNotFoundError):
            return [_fetch(name_or_path, weights)]
    raise FileNotFoundError(f"none of {', '.join(WEIGHT_FILES)}, nor an index of several such files")


class _WeightIndex(TypedDict):
    weight_map: dict[str, Name]


class _Blip2(TypedDict):
    qformer_config: NotRequired[dict[str, Any]]


def _read_json(name_or_path: str, file: str, kind: Any) -> dict[str, Any]:
    return read_json(_fetch(name_or_path, file), kind)


def _fetch(name_or_path: str, file: str) -> Path:
    name, revision = split_revision(name_or_path)
    folder = Path(name)
    if not folder.is_dir():
        look_for_hub()
        return Path(hf_hub_download(name, file, revision=revision))
    if not (folder / file).is_file():
        raise FileNotFoundError(f"no {file} in the folder")
    return folder / file


def _is_qformer(name: str) -> bool:
    return name == "query_tokens" or (name.startswith("qformer.") and not TEXT_PATH.match(name))


def _real(features: Tensor, mask: Tensor) -> Tensor:
    # An attention weight of zero does not stop a NaN, so padding is overwritten as well as masked.
    return features.masked_fill(~mask[..., None], 0)
