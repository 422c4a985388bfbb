"""Hints for misspelt names."""

import difflib
from typing import Any

MANY_NAMES = 20


def nearest(name: str, valid: Any) -> str:
    """A hint for a misspelt name: the nearest valid one, and all of them unless they are many.

    Example:
        >>> nearest("freze", ["freeze", "lora"])
        " Did you mean 'freeze'? Valid: freeze, lora."
    """
    names = sorted(str(v) for v in valid)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    is_enough = not names or (close and len(names) > MANY_NAMES)
    return hint if is_enough else f"{hint} Valid: {', '.join(names)}."


def no_layers(key: str, target: str) -> str:
    """What to say of layers that are asked of an encoder without them.

    Args:
        key: ``model.streams.<stream>.encoder.layers``.
        target: the encoder's class.
    """
    return (
        f"{key}: {target.rpartition('.')[2]} has no layers to choose among. Encoders that have: "
        "model/audio=whisper|wavlm|wav2vec2, model/video=clip."
    )
