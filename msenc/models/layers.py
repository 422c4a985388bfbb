"""Several layers of an encoder as one stream: their features side by side in each frame, (T, K*D)."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np  # for its name alone: configs are checked by these functions before --help, too

from msenc.files.kinds import short
from msenc.types import MsencError


def layers_of(encoder: Mapping[str, Any], place: str = "layers") -> tuple[int, ...]:
    """The layers that an encoder's settings ask for, in their order; none where its features are those of one output.

    Args:
        encoder: its config, or what a stream was made with.
        place: of the config, for messages.

    Raises:
        MsencError: no layer, what is no number of one, or one twice.

    Example:
        >>> layers_of({"name_or_path": "openai/whisper-base", "layers": [2, 4, -1]})
        (2, 4, -1)
    """
    layers = encoder.get("layers")
    if layers is None:
        return ()
    if not layers or not isinstance(layers, Sequence) or any(type(layer) is not int for layer in layers):
        raise MsencError(f"{place}.layers: found {short(layers)}, expected numbers of layers, or null for one output.")
    if twice := [layer for layer in dict.fromkeys(layers) if list(layers).count(layer) > 1]:
        raise MsencError(f"{place}.layers: found layer {twice[0]} twice, expected each once.")
    return tuple(layers)


def num_outputs(encoder: Mapping[str, Any]) -> int:
    """How many outputs of an encoder stand side by side in its features: K."""
    return len(layers_of(encoder)) or 1


def without_absent(encoder: Mapping[str, Any]) -> dict[str, Any]:
    """An encoder's settings as they were before layers could be chosen, where none are: so that hashes stay."""
    return {key: value for key, value in encoder.items() if (key, value) != ("layers", None)}


def holds(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether features made with some settings have what others ask for: all that they say, or more layers.

    Args:
        stored: what a stream was made with, its width ``dim`` among it.
        wanted: likewise.
    """
    there, asked = layers_of(stored), layers_of(wanted)
    if not asked or not set(asked) <= set(there):
        return dict(stored) == dict(wanted)
    width = wanted["dim"] // len(asked)
    return dict(stored) == {**wanted, "layers": list(there), "dim": width * len(there)}


def select_layers(frames: "np.ndarray", stored: Sequence[int], wanted: Sequence[int]) -> "np.ndarray":
    """Of the stored layers those that are wanted: (T, stored*D) -> (T, wanted*D); no copy if it is all of them.

    Example:
        >>> import numpy as np
        >>> select_layers(np.array([[1, 2, 3, 4, 5, 6]]), (0, 2, -1), (-1, 0)).tolist()
        [[5, 6, 1, 2]]
    """
    if tuple(stored) == tuple(wanted):
        return frames
    places = [stored.index(layer) for layer in wanted]
    layers = frames.reshape(len(frames), len(stored), -1)[:, places]  # (T, wanted, D)
    return layers.reshape(len(frames), -1)
