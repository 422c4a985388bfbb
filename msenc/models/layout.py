"""Runs an LLM over a batch, and tests on a small copy which LLMs can run over packed rows.

LLM, embeddings, Batch -> logits; LLM -> the lengths up to which a packed row gives what single samples give

Names and configs in transformers do not tell whether a family's attention follows a mask, reads position ids, and
attends to nothing else. So a small copy of the LLM (a few layers and heads, random
weights) computes packed rows and their samples one by one, and the results have to agree.
"""

import copy
import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from msenc.models.attention import NAME, make_layout
from msenc.models.pretrained import quiet
from msenc.types import Batch, MsencError, Segment

WAY_OUT = "Train this LLM with model.layout=sample."

SPAN = 16
"""Tokens of the longest sample that the copy computes; its windows are as long, and the packed line is longer."""
SEGMENTS = (Segment(0, 13, ((4, 5), (3, 13))), Segment(20, 12, ((5, 3), (4, 12))))
"""Trunks and branches of the line: samples of 9 to 16 tokens."""
TOLERANCE = 1e-3
"""Relative: float32 gives 1e-6, a wrong mask or position 1e-1."""

LARGEST = 250_000_000
"""Maximum number of parameters of a copy."""

LIMITS = re.compile(r"window(?!_layers)|chunk_size|local_attention$|index_topk|max_position_embeddings|n_positions")
"""Config keys of lengths that a layer looks back, or that positions reach."""
WIDE = re.compile(r"intermediate|ffn|inner|mlp_hidden|d_ff")
"""Config keys of the width of feed-forward layers."""
PERIODS = re.compile(r"interval|period|pattern|offset|freq|every|first_k")
"""Config keys of counts of layers after which another kind comes."""


def reads_positions(llm: nn.Module) -> bool:
    """Whether an LLM accepts position ids; otherwise it counts a row's tokens itself."""
    return "position_ids" in inspect.signature(_without_adapters(llm).forward).parameters


def attend_causally(llm: nn.Module, embeds: Tensor, batch: Batch) -> Tensor:
    """Logits of right-padded rows (B, L, V), by the LLM's own mask."""
    positions = {"position_ids": batch.position_ids} if reads_positions(llm) else {}
    return llm(inputs_embeds=embeds, attention_mask=batch.attention_mask, use_cache=False, **positions).logits


def attend_by_layout(llm: nn.Module, embeds: Tensor, batch: Batch, kernel: str) -> Tensor:
    """Logits of packed rows (1, L, V).

    Args:
        llm: one that has passed `check_layout`.
        embeds: (1, L, H).
        batch: packed.
        kernel: one of `attention.KERNELS`.

    Raises:
        MsencError: not every layer attends by the layout.
    """
    layout = make_layout(batch.segments, embeds.device, kernel)
    inputs = {"inputs_embeds": embeds, "position_ids": batch.position_ids, "use_cache": False}
    if llm.config._attn_implementation != NAME:  # eager: it adds its mask to the scores
        mask = torch.zeros(layout.mask.shape, dtype=embeds.dtype, device=embeds.device)
        return llm(**inputs, attention_mask=mask.masked_fill(~layout.mask, torch.finfo(mask.dtype).min)).logits
    try:
        logits = llm(**inputs, attention_mask=layout.mask, layout=layout).logits
    except TypeError as e:
        if "layout" not in str(e):
            raise
        layout.calls, logits = 0, None  # for an LLM that does not pass keywords on
    num_layers = llm.config.num_hidden_layers
    if layout.calls < num_layers:
        raise MsencError(
            f"{_family(llm)}: only {layout.calls} of {num_layers} layers follow the dialogue layout's mask. {WAY_OUT}"
        )
    return logits


def check_layout(llm: nn.Module) -> tuple[str, dict[str, int]]:
    """Find the kernel with which packed rows give the same results as single samples.

    Args:
        llm: as `load_llm` gives it. Its weights are read only where no small copy of it can be made.

    Returns:
        The kernel (``auto`` unless the LLM has shown that it needs a certain one); and config key -> the number of
        tokens up to which a sample may reach (a sliding window, a table of positions).

    Raises:
        MsencError: they do not.
    """
    base = _without_adapters(llm)
    if not reads_positions(llm):
        raise MsencError(f"{_family(llm)} accepts no position ids, which the dialogue layout needs. {WAY_OUT}")
    # On a CPU, where flex_attention would be compiled for each length; the mask is the same.
    asked = llm.attention_kernel
    tried = {"auto": ("split", "dense"), "flex_attention": ("dense",)}.get(asked, (asked,))
    config = base.config
    for kernel in tried:
        with suppress(MsencError) if kernel != tried[-1] else nullcontext():
            limits = _find_limits(_Keyed.of(config), config._attn_implementation, kernel)
            if limits is None:  # no copy: the LLM itself shows it, unless it is shapes alone
                limits = next((limits for _, limits in _small_configs(config)), {})
                if not base.get_input_embeddings().weight.is_meta:
                    with torch.no_grad():
                        _compare(base, kernel)
            return (asked if kernel == tried[0] else kernel), dict(limits)
    raise AssertionError("the last kernel has returned or raised")


@dataclass(frozen=True)
class _Keyed:
    """A config that is hashed by its content."""

    content: str
    config: Any = field(compare=False)

    @staticmethod
    def of(config: Any) -> "_Keyed":
        return _Keyed(config.to_json_string(use_diff=False), copy.deepcopy(config))


@lru_cache(maxsize=64)
def _find_limits(keyed: _Keyed, attention: str, kernel: str) -> Mapping[str, int] | None:
    """What of the lengths in a config limits packed samples; None where no copy can be made."""
    with _aside():
        small = _small_copy(keyed.config, attention)
        if small is None:
            return None
        _compare(small.llm, kernel)
        return {k: v for k, v in small.limits.items() if not _reaches_further(small.config, k, attention, kernel)}


def choose_attention(config: Any) -> str:
    """What computes an LLM's attention: ours, or its own (``eager``) where ours would not compute the same.

    Args:
        config: of the LLM.

    Raises:
        MsencError: it is not causal.
    """
    return _choose(_Keyed.of(config))


@lru_cache(maxsize=64)
def _choose(keyed: _Keyed) -> str:
    with _aside():
        own = _small_copy(keyed.config, "eager")
        if own is None:
            return NAME
        line = torch.randn(1, SPAN, own.llm.get_input_embeddings().weight.shape[1])
        whole, part = (_logits_alone(own.llm, line[:, :n]) for n in (SPAN, SPAN - 4))
        if not _distance(whole[:-4], part) < TOLERANCE:
            raise MsencError(
                f"{_family(own.llm)}: its tokens attend to later tokens, so it cannot learn to generate replies. "
                "Choose a causal language model."
            )
        with suppress(Exception):  # whatever it says of an attention that it does not know, or of what ours lacks
            ours = _build(own.config, NAME)
            # Some families have an attention of their own whatever they are told, and take a mask there.
            ours_takes_less = _takes_mask(own.llm) and not _takes_mask(ours)
            if _distance(_logits_alone(ours, line), whole) < TOLERANCE and not ours_takes_less:
                return NAME
        return "eager"


@dataclass
class _Small:
    """A small copy: the model, its config, and the original's lengths that it holds at `SPAN`."""

    llm: nn.Module
    config: Any
    limits: dict[str, int]


@contextmanager
def _aside() -> Iterator[None]:
    """Leaves the run's random generators alone, and prints nothing."""
    with torch.random.fork_rng(devices=[]), quiet(hide_bars=True), torch.no_grad(), torch.device("cpu"):
        torch.manual_seed(0)
        yield


def _small_copy(config: Any, attention: str) -> _Small | None:
    """The smallest copy that can be built and run; None if there is none of a bearable size."""
    for small, limits in _small_configs(config):
        with suppress(Exception):  # whatever a model says of sizes that do not go together
            with torch.device("meta"):
                size = sum(p.numel() for p in _build(small, "eager").parameters())
            if size <= LARGEST:
                llm = _build(small, attention)
                _samples(llm)
                return _Small(llm, small, limits)
    return None


def _compare(llm: nn.Module, kernel: str) -> None:
    family = _family(llm)
    try:
        apart = _distance(_packed(llm, kernel), _samples(llm))
    except MsencError:
        raise
    except Exception as e:  # a model of any family, given a mask that it may never have been given
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise MsencError(f"{family} does not accept the mask of the dialogue layout ({reason}). {WAY_OUT}") from e
    # A copy is in float32. What rounding makes of layers of a narrower type is still far from a wrong mask.
    if not apart < max(TOLERANCE, 8 * torch.finfo(llm.dtype).eps):
        raise MsencError(
            f"{family} does not follow the dialogue layout: its results for packed samples have a relative "
            f"error of {apart:.1g}. {WAY_OUT}"
        )


def _takes_mask(llm: nn.Module) -> bool:
    with suppress(MsencError):
        _compare(llm, "dense")
        return True
    return False


def _reaches_further(config: Any, key: str, attention: str, kernel: str) -> bool:
    """Whether samples that are longer than a limit are still computed alike: then it limits nothing."""
    try:
        llm = _build(_changed(config, {key: SPAN // 2}), attention)
        return _distance(_packed(llm, kernel), _samples(llm)) < TOLERANCE
    except Exception:  # a table of positions that has ended
        return False


def _line(llm: nn.Module) -> tuple[Batch, Tensor]:
    """A packed batch of `SEGMENTS`, and its embeddings (1, L, H)."""
    positions: list[int] = []
    for segment in SEGMENTS:
        positions += range(segment.trunk)
        for tokens, cut in segment.branches:
            positions += range(cut, cut + tokens)
    weight = llm.get_input_embeddings().weight
    drawn = torch.randn(len(positions), weight.shape[1], generator=torch.Generator().manual_seed(0))
    place = torch.tensor([positions], device=weight.device)
    return _batch(place, list(SEGMENTS)), drawn[None].to(weight)


def _batch(positions: Tensor, segments: list[Segment] | None) -> Batch:
    none = torch.empty(0, dtype=torch.long)
    mask = None if segments else torch.ones_like(positions, dtype=torch.bool)
    return Batch(torch.zeros_like(positions), positions, segments, mask, none, none, none, none, {}, [])


def _places() -> Iterator[tuple[list[int], int]]:
    """Per sample: the places of its tokens in the line, and how many of the last are its own."""
    for segment in SEGMENTS:
        end = segment.start + segment.trunk
        for tokens, cut in segment.branches:
            yield [*range(segment.start, segment.start + cut), *range(end, end + tokens)], tokens
            end += tokens


def _logits_alone(llm: nn.Module, embeds: Tensor) -> Tensor:
    """Embeddings (1, L, H) of one row -> (L, V)."""
    positions = torch.arange(embeds.shape[1], device=embeds.device)[None]
    return attend_causally(llm, embeds, _batch(positions, None))[0]


def _samples(llm: nn.Module) -> Tensor:
    """Logits of the branches' tokens, each sample computed alone."""
    _, embeds = _line(llm)
    return torch.cat([_logits_alone(llm, embeds[:, places])[-own:] for places, own in _places()])


def _packed(llm: nn.Module, kernel: str) -> Tensor:
    """Logits of the branches' tokens, computed in the line."""
    batch, embeds = _line(llm)
    logits = attend_by_layout(llm, embeds, batch, kernel)[0]
    return torch.cat([logits[places[-own:]] for places, own in _places()])


def _distance(one: Tensor, other: Tensor) -> float:
    """Norm of the difference, relative to the second argument."""
    return ((one - other).float().norm() / other.float().norm()).item()


def _build(config: Any, attention: str) -> nn.Module:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = copy.deepcopy(config)  # a model keeps the one that it was given
    llm = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention).eval()
    for _, parameter in sorted(llm.named_parameters()):
        if parameter.dim() > 1:  # as models begin, attention is nearly even, and what is seen makes little difference
            nn.init.normal_(parameter, std=1.5 * parameter.shape[-1] ** -0.5)
    return llm


def _small_configs(config: Any) -> Iterator[tuple[Any, dict[str, int]]]:
    """Copies of a config for models that take milliseconds, the smallest first, and the limits of the original."""
    known = config.get_text_config().to_dict()
    limits = {k: v for k, v in known.items() if LIMITS.search(k) and isinstance(v, int) and v > 0}
    for most_heads, fewer_layers, narrower in product((2, 4, None), (True, False), (True, False)):
        with suppress(Exception):  # a config that checks its own sizes
            small = _shrunk(config, most_heads, fewer_layers, narrower)
            yield _changed(small, dict.fromkeys(limits, SPAN)), limits


def _changed(config: Any, changes: Mapping[str, Any]) -> Any:
    """A copy with other values, of its text part where it has several."""
    content = copy.deepcopy(config.to_dict())
    for key in ("quantization_config", "dtype", "torch_dtype"):
        content.pop(key, None)
    text = config.get_text_config()
    if text is config:
        content.update(changes)
    else:
        name = next(k for k, v in vars(config).items() if v is text)
        content[name] = _changed(text, changes).to_dict()
    return type(config).from_dict(content)


def _shrunk(config: Any, most_heads: int | None, fewer_layers: bool, narrower: bool) -> Any:
    known = config.to_dict()
    changes = _few_words(known)
    for name, part in vars(config).items():
        if hasattr(part, "get_text_config"):
            changes[name] = _shrunk(part, most_heads, fewer_layers, narrower).to_dict()
    if getattr(config, "hidden_size", None) and getattr(config, "num_attention_heads", None):
        changes |= _fewer_heads(config, known, most_heads)
    if fewer_layers and getattr(config, "num_hidden_layers", None):
        changes |= _fewer_layers(config, known)
    if narrower:
        changes |= {k: 32 for k, v in known.items() if WIDE.search(k) and isinstance(v, int) and v > 32}
    return type(config).from_dict({**copy.deepcopy(known), **changes})


def _few_words(known: Mapping[str, Any]) -> dict[str, Any]:
    words = {k: 128 for k, v in known.items() if k.startswith("vocab_size") and v}
    ids = {k: min(v, 1) for k, v in known.items() if k.endswith("token_id") and isinstance(v, int)}
    return {**words, **ids}


def _fewer_heads(config: Any, known: Mapping[str, Any], most: int | None) -> dict[str, Any]:
    """Changes to few heads of the same width: at most `most` key heads, and queries of each."""
    heads, hidden = config.num_attention_heads, config.hidden_size
    key_heads = next((known[k] for k in ("num_key_value_heads", "num_kv_heads") if known.get(k)), heads)
    few_keys = min(key_heads, most or key_heads)
    few = few_keys * min(heads // key_heads, most or heads)
    few_hidden = few * (hidden // heads)
    changes = {}
    for key, value in known.items():
        if not isinstance(value, int) or isinstance(value, bool) or LIMITS.search(key):
            continue
        if value == hidden:
            changes[key] = few_hidden
        elif WIDE.search(key) and value % hidden == 0:
            changes[key] = value // hidden * few_hidden
        elif "head" in key and "dim" not in key and value in (heads, key_heads):
            changes[key] = few if value == heads and not re.search("key_value|kv", key) else few_keys
    return changes


def _fewer_layers(config: Any, known: Mapping[str, Any]) -> dict[str, Any]:
    """Changes to the first layers, as many as there are kinds of."""
    num = config.num_hidden_layers
    lists = {k: v for k, v in known.items() if isinstance(v, list) and len(v) == num}
    kinds = [str([values[i] for values in lists.values()]) for i in range(num)]
    few = max(2, *(kinds.index(kind) + 1 for kind in kinds))
    periods = [v for k, v in known.items() if PERIODS.search(k) and isinstance(v, int) and not isinstance(v, bool)]
    few = min(num, max([few, *(p + 1 for p in periods if p <= 8)]))
    mapped = getattr(config, "attribute_map", {}).get("num_hidden_layers", "num_hidden_layers")
    return {mapped if mapped in known else "num_hidden_layers": few, **{k: v[:few] for k, v in lists.items()}}


def _without_adapters(llm: nn.Module) -> nn.Module:
    return llm.get_base_model() if hasattr(llm, "get_base_model") else llm


def _family(llm: nn.Module) -> str:
    return type(_without_adapters(llm)).__name__
