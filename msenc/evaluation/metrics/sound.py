"""Audio quality of spoken replies: predicted opinion scores, and speaker consistency."""

import math
from collections.abc import Hashable, Sequence
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from msenc.types import MsencError, needing

SOUND_METRICS = ("mos", "speaker_similarity")


class PredictedMos:
    """DNSMOS P.835 (arXiv 2110.01763): predicted listener opinion, from 1 (bad) to 5 (excellent).

    Runs the model in the wheel of the package speechmos by onnxruntime; the package itself is not imported, as it
    would need librosa. Its overall score, SIG and BAK are the package's own.

    Args:
        device: where it runs; on the CPU as well if the installed onnxruntime cannot use a GPU.

    Raises:
        MsencError: the weights, or onnxruntime, are missing.
    """

    sample_rate = 16_000
    _PART_S = 9.01  # the model's input length
    _CURVES = (  # the model's outputs -> the listeners' scale, highest power first
        ("sig", (-0.08397278, 1.22083953, 0.0052439)),
        ("bak", (-0.13166888, 1.60915514, -0.39604546)),
        ("overall", (-0.06766283, 1.11546468, 0.04602535)),
    )

    def __init__(self, device: str = "cpu") -> None:
        spec = find_spec("speechmos")
        if spec is None:
            raise MsencError(
                "metric mos: the weights in the package speechmos are missing. Install it without its dependencies: "
                "pip install --no-deps -c constraints.txt speechmos; or remove mos from speech_metrics."
            )
        with needing("the metric mos", "kokoro"):
            import onnxruntime
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        path = Path(spec.submodule_search_locations[0]) / "dnsmos_models" / "sig_bak_ovr.onnx"
        kind, _, number = device.partition(":")
        providers: list[Any] = ["CPUExecutionProvider"]
        if kind == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            providers.insert(0, ("CUDAExecutionProvider", {"device_id": int(number or 0)}))
        self.session = onnxruntime.InferenceSession(str(path), options, providers=providers)

    def __call__(self, samples: np.ndarray) -> dict[str, float]:
        """Quality of speech (``sig``), background (``bak``) and overall (``overall``); short audio is repeated.

        Args:
            samples: float32 (S,) at `sample_rate`, in [-1, 1].
        """
        rate, size = self.sample_rate, int(self._PART_S * self.sample_rate)
        while len(samples) < size:
            samples = np.tile(samples, 2)
        # Cut with the reference's rounding, which occasionally skips a part.
        cuts = [(s * rate, int((s + self._PART_S) * rate)) for s in range(int(len(samples) // rate - self._PART_S) + 1)]
        parts = [samples[start:end] for start, end in cuts if end - start >= size]
        raw = [self.session.run(None, {"input_1": part[None].astype(np.float32)})[0][0] for part in parts]
        return {
            name: float(np.mean([np.polyval(curve, row[index]) for row in raw]))
            for index, (name, curve) in enumerate(self._CURVES)
        }


def speaker_similarity(
    vectors: Sequence[np.ndarray], dialogues: Sequence[Hashable], speakers: Sequence[str]
) -> dict[str, float]:
    """Mean cosine similarity of two replies' voices in one dialogue, for the same and for different speakers.

    Args:
        vectors: (E,) each, of length 1: the voice of each reply.
        dialogues: of each.
        speakers: of each.

    Returns:
        ``speech/speaker_similarity/same`` and ``.../others``; omitted if there is no pair.

    Example:
        >>> a, b = np.array([1.0, 0.0]), np.array([0.6, 0.8])
        >>> speaker_similarity([a, a, b], ["d", "d", "d"], ["Ana", "Ana", "Leo"])
        {'speech/speaker_similarity/same': 1.0, 'speech/speaker_similarity/others': 0.6}
    """
    found: dict[str, list[float]] = {"same": [], "others": []}
    members: dict[Hashable, list[int]] = {}
    for index, dialogue in enumerate(dialogues):
        members.setdefault(dialogue, []).append(index)
    for own in members.values():
        for one, other in combinations(own, 2):
            kind = "same" if speakers[one] == speakers[other] else "others"
            found[kind].append(float(vectors[one] @ vectors[other]))
    return {f"speech/speaker_similarity/{k}": math.fsum(v) / len(v) for k, v in found.items() if v}
