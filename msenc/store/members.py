"""The members of a sample <-> bytes, and what all that reads turns and features may rely on."""

import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from msenc.files import hold, parse_json
from msenc.files.kinds import fits_json, is_below, is_name, short
from msenc.types import Dialogue, MsencError

INFINITY = 0x7C00
"""Bits of float16 without the sign; what lies above is no number."""


def encode_member(name: str, value: Any) -> bytes:
    """The bytes of a member; its name ends in ``.json`` (plain values) or ``.npy`` (an array)."""
    if name.endswith(".json"):
        return json.dumps(value, ensure_ascii=False).encode()
    if name.endswith(".npy"):
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, np.ascontiguousarray(value), allow_pickle=False)
        return buffer.getvalue()
    raise ValueError(f"member {name!r}: expected a name that ends in .json or .npy")


def decode_member(name: str, data: np.ndarray) -> Any:
    """What `encode_member` made bytes (uint8) of; an array shares their memory.

    Raises:
        MsencError: the bytes are no such member.
    """
    if name.endswith(".json"):
        return parse_json(data.tobytes(), name, object)
    header = io.BytesIO(memoryview(data)[:4096])
    try:
        version = np.lib.format.read_magic(header)
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(header)
        if version != (1, 0) or is_fortran or dtype.hasobject or min(shape, default=0) < 0:
            raise ValueError(f"version {version}, {dtype}, {'columns' if is_fortran else 'rows'} first")
        return np.frombuffer(data, dtype, offset=header.tell()).reshape(shape)  # no copy
    except Exception as error:  # numpy raises half a dozen types for what is no header
        raise MsencError(f"{name}: found no array ({error}), expected what prepare.py writes.") from error


def check_turns(turns: Any, id: str, split: str, number: int) -> None:
    """Refuse what is not the dialogue that the index says, or none that `Dialogue.from_json` and a prompt can read.

    Args:
        turns: what stands in ``turns.json``.
        id: of the dialogue.
        split: likewise.
        number: of its utterances.

    Raises:
        MsencError: names the place.
    """
    if not fits_json(turns, Dialogue):
        hold(turns, Dialogue, "turns.json")
    found = (turns["id"], turns["split"], len(turns["utterances"]))
    if found != (id, split, number):
        raise MsencError(f"turns.json: found {short(found)}, the index says {short((id, split, number))}.")
    utterances = turns["utterances"]
    files = [name for u in utterances for key in ("clip", "audio") if (name := u.get(key)) is not None]
    texts = [utterance["text"] for utterance in utterances]
    ids = [utterance["id"] for utterance in utterances]
    if len({*ids}) < len(ids):
        twice = next(id for place, id in enumerate(ids) if id in ids[:place])
        raise MsencError(f"turns.json: found two utterances {short(twice)}, expected each id once.")
    said = [words for u in utterances if (words := u.get("description")) is not None]
    are_sound = all(texts) and not any(map(str.isspace, texts)) and all(map(is_below, files))
    are_sound &= all(map(_is_description, said))
    # All of them are looked at in one go; one by one, only to name the place.
    if are_sound and all(is_name(u["id"]) and not u.get("marks") for u in utterances):
        return
    for place, utterance in enumerate(utterances):
        text, marks = utterance["text"], utterance.get("marks")
        away = [k for k in ("clip", "audio") if utterance.get(k) is not None and not is_below(utterance[k])]
        if not is_name(utterance["id"]):
            fault = "id", utterance["id"], "a name"
        elif not text or text.isspace():
            fault = "text", text, "words"
        elif utterance.get("description") is not None and not _is_description(utterance["description"]):
            fault = "description", utterance["description"], "words without brackets, in which a target has it, or null"
        elif away:
            fault = away[0], utterance[away[0]], "a path below the folder of the clips"
        elif marks and not all(_is_mark(mark, text, utterance.get("description")) for mark in marks):
            fault = "marks", str(marks), "spans within the text or the description"
        else:
            continue
        raise MsencError(f"turns.json, utterances[{place}].{fault[0]}: found {short(fault[1])}, expected {fault[2]}.")


def _is_description(words: str) -> bool:
    return words.strip() != "" and "(" not in words and ")" not in words


def _is_mark(mark: dict[str, Any], text: str, description: str | None) -> bool:
    of = {"text": text, "description": description}.get(mark["field"])
    is_span = of is not None and 0 <= mark["start"] <= mark["end"] <= len(of)
    return is_span and mark["kind"] in ("text", "audio", "video", "both") and mark.get("bits", 1.0) >= 0


def check_features(features: Any, offsets: np.ndarray, lengths: Sequence[int]) -> None:
    """Refuse features that are not the index's, or hold NaN or infinity.

    Args:
        features: (sum of T, D), or None where there are none.
        offsets: (U+1,) where each utterance begins.
        lengths: (U,) frames of each, by the index.

    Raises:
        MsencError: says what was found.
    """
    if offsets.shape != (len(lengths) + 1,) or offsets.dtype.kind != "i" or offsets[0] != 0:
        raise MsencError(f"offsets.npy: found {offsets.dtype} {offsets.shape}, expected {len(lengths) + 1} of int64.")
    if np.diff(offsets).tolist() != list(lengths):
        raise MsencError("offsets.npy: found other lengths than the index says.")
    if features is None or features.ndim != 2 or features.dtype != np.float16 or len(features) != offsets[-1]:
        found = "none" if features is None else f"{features.dtype} {features.shape}"
        raise MsencError(f"features.npy: found {found}, expected float16 ({offsets[-1]}, D).")
    if not _is_finite(features):
        bad = ~np.isfinite(features).all(axis=1)
        where = int(np.searchsorted(offsets, bad.argmax(), side="right")) - 1
        raise MsencError(f"features.npy: found NaN or infinity in {bad.sum():,} frames, first in utterance {where}.")


def _is_finite(features: np.ndarray) -> bool:
    # Whole numbers are compared ten times as fast as halves: the first maximum is of those without sign, the second of
    # those with.
    return features.size == 0 or bool(
        features.view(np.int16).max() < INFINITY and features.view(np.uint16).max() < INFINITY | 0x8000
    )
