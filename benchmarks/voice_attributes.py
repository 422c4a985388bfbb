"""Are voice attributes measured right? On the demo, whose truth is known, and on neural speech with known settings.

python benchmarks/voice_attributes.py                       # the prepared demo's clips: data/demo-raw
python benchmarks/voice_attributes.py --kokoro FOLDER       # also speech of a local Kokoro model (needs onnxruntime)
"""

import csv
import json
import os
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from measure import parser, print_table, write_json

from msenc.demo.world import ANSWERS, SPEAKERS
from msenc.prepare.describe import describe_dialogues
from msenc.raw.annotations import MELD_FILES, read_meld
from msenc.speech.attributes import VoiceSettings, estimate_gender, measured_values
from msenc.speech.synthesizers.libespeak import to_phonemes
from msenc.speech.voice import VoiceMeasures, count_syllables, measure
from msenc.store.labels import VOICE_TURNS
from msenc.types import UNKNOWN, Dialogue, Rejection

PITCH_WORDS = dict(zip(ANSWERS["voice"].words, ("low", "high"), strict=True))

# ---------------------------------------------------------------------------------------------------- demo


def demo_truth(root: Path) -> dict[str, dict[str, str]]:
    """Utterance id -> what its speech was synthesised with: pitch, range and gender."""
    truth = {}
    for split, (name, _) in MELD_FILES.items():
        with (root / name).open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                truth[f"demo/{split}/dia{row['Dialogue_ID']}/utt{row['Utterance_ID']}"] = {
                    "pitch": PITCH_WORDS[row["Pitch"]],
                    "range": row["Range"],
                    "gender": SPEAKERS[row["Speaker"]].person.split()[-1],
                    "speaker": row["Speaker"],
                }
    return truth


def measure_demo(root: Path, num_workers: int, limit: int | None = None) -> tuple[list[Dialogue], dict[str, Any]]:
    """Dialogues and, per utterance id, its line of ``voice-turns.jsonl``."""
    dialogues = read_meld(root, "demo").dialogues
    if limit is not None:
        kept: Counter[str] = Counter()
        dialogues = [d for d in dialogues if (kept.update([d.split]) or kept[d.split] <= limit)]
    rejections: list[Rejection] = []
    with tempfile.TemporaryDirectory() as folder:
        describe_dialogues(dialogues, root, Path(folder), VoiceSettings(levels=2), num_workers, rejections)
        lines = (Path(folder) / VOICE_TURNS).read_text(encoding="utf-8").splitlines()
    return dialogues, {line["id"]: line for line in map(json.loads, lines)}


def measures_of(line: dict[str, Any]) -> VoiceMeasures:
    """The measures in a line of the describe stage, but for the rate, which it has put in its words."""
    return VoiceMeasures(**{key: line[key] for key in VoiceMeasures.__dataclass_fields__})


def accuracies(turns: dict[str, Any], truth: dict[str, dict[str, str]]) -> dict[str, dict[str, dict[str, float]]]:
    """Attribute -> split -> share right, share of unknown, share of the majority, clips.

    An unknown word is not right. The gender, which the demo gives, is estimated here: from one clip, and from all clips
    of a speaker in a dialogue, as the describe stage does.
    """
    cells: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    speakers: dict[tuple[str, str], list[str]] = defaultdict(list)
    for id, line in turns.items():
        split = id.split("/")[1]
        for name in ("pitch", "range"):
            cells[name, split].append((line["measured"][name], truth[id][name]))
        cells["gender, from one clip", split].append((estimate_gender([measures_of(line)]), truth[id]["gender"]))
        speakers[id.rpartition("/")[0], truth[id]["speaker"]].append(id)
    for ids in speakers.values():
        estimated = estimate_gender([measures_of(turns[id]) for id in ids])
        cells["gender, by speaker", ids[0].split("/")[1]] += [(estimated, truth[id]["gender"]) for id in ids]
    result: dict[str, dict[str, dict[str, float]]] = defaultdict(dict)
    for (name, split), pairs in cells.items():
        result[name][split] = {
            "right": sum(a == b for a, b in pairs) / len(pairs),
            "unknown": sum(a == UNKNOWN for a, _ in pairs) / len(pairs),
            "majority": Counter(b for _, b in pairs).most_common(1)[0][1] / len(pairs),
            "clips": len(pairs),
        }
    return result


def predictability(
    dialogues: Sequence[Dialogue], turns: dict[str, Any], truth: dict[str, dict[str, str]]
) -> dict[str, dict[str, float]]:
    """How well the speaker foretells an attribute on the test split, learned on train: majority word per speaker.

    The speaker's name, and the number that a prompt shows (order of appearance in the dialogue), for the measured
    words and for the truth.
    """
    rows: dict[str, list[tuple[str, str, str, str]]] = defaultdict(list)  # (split, name, number, word)
    for dialogue in dialogues:
        numbers: dict[str, str] = {}
        for utterance in dialogue.utterances:
            number = numbers.setdefault(utterance.speaker, str(len(numbers)))
            id = f"{dialogue.id}/utt{utterance.id}"
            key = (dialogue.split, utterance.speaker, number)
            for attribute, word in turns[id]["measured"].items():
                rows[attribute].append((*key, word))
            for attribute, word in truth[id].items():
                if attribute == "speaker":
                    continue
                rows[f"{attribute}, truth"].append((*key, word))
    result = {}
    for attribute, cells in sorted(rows.items()):
        if {c[3] for c in cells} == {UNKNOWN}:
            continue
        train, test = ([c for c in cells if c[0] == split] for split in ("train", "test"))
        result[attribute] = {
            "majority": _foretold(train, test, lambda c: ""),
            "speaker's name": _foretold(train, test, lambda c: c[1]),
            "speaker's number": _foretold(train, test, lambda c: c[2]),
        }
    return result


def _foretold(train: list, test: list, key: Callable[[Any], str]) -> float:
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for cell in train:
        counts[key(cell)][cell[3]] += 1
    return sum(counts[key(c)].most_common(1)[0][0] == c[3] for c in test if counts[key(c)]) / len(test)


# ---------------------------------------------------------------------------------------------------- Kokoro

KOKORO_RATE = 24_000
WOMEN = ("af_heart", "af_bella", "af_sarah", "bf_emma", "bf_alice", "af_kore")
MEN = ("am_michael", "am_adam", "am_fenrir", "bm_george", "bm_lewis", "am_liam")
SPEEDS = (0.75, 1.0, 1.35)
PITCH_FACTORS = (0.85, 1.0, 1.18)
SENTENCES = (
    "I did not expect to see you here today, but it is a lovely surprise.",
    "The train leaves at seven in the morning, so we have to get up early.",
    "Could you please tell me where the library is, and when it opens?",
    "She put the letter on the kitchen table and walked out into the garden.",
)


@cache
def _kokoro(folder: Path) -> tuple[Any, dict[str, int]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    return onnxruntime.InferenceSession(str(folder / "model.onnx"), options), vocabulary


def render(folder: Path, phonemes: str, voice: str, speed: float = 1.0, pitch: float = 1.0) -> np.ndarray:
    """Speech of a local Kokoro model, float32 (S,) at 16 kHz.

    Args:
        folder: holds ``model.onnx``, ``vocab.json`` and ``voices/``.
        phonemes: IPA of eSpeak NG.
        voice: a file in ``voices/``.
        speed: 1 is the voice's own.
        pitch: factor on all frequencies: the sound is resampled, and spoken slower by as much before.
    """
    import soxr

    session, vocabulary = _kokoro(folder)
    for old, new in (("r", "ɹ"), ("x", "k"), ("ɬ", "l"), ("ʲ", "j")):
        phonemes = phonemes.replace(old, new)
    tokens = [vocabulary[p] for p in phonemes if p in vocabulary]
    styles = np.fromfile(folder / "voices" / f"{voice}.bin", np.float32).reshape(-1, 256)
    inputs = {
        "tokens": np.array([[0, *tokens, 0]], np.int64),
        "style": styles[len(tokens)][None],
        "speed": np.array([speed / pitch], np.float32),
    }
    samples = np.asarray(session.run(None, inputs)[0], np.float32).reshape(-1)
    return soxr.resample(samples, KOKORO_RATE * pitch, 16_000)


def order_kept(groups: Sequence[Sequence[float | None]]) -> float:
    """Share of pairs of neighbours' values, one of each of two groups, that rise as the groups do; None counts as not.

    Example:
        >>> order_kept([[1.0, 2.0], [3.0, 4.0]])
        1.0
    """
    pairs = [(a, b) for low, high in combinations(groups, 2) for a, b in zip(low, high, strict=True)]
    return sum(a is not None and b is not None and a < b for a, b in pairs) / len(pairs)


def kokoro_orders(
    folder: Path, women: Sequence[str] = WOMEN, men: Sequence[str] = MEN, sentences: Sequence[str] = SENTENCES
) -> dict[str, float]:
    """Share of pairs of renderings, equal but for one setting, whose measure rises as the setting does; and genders."""
    phonemes = to_phonemes(list(sentences))

    def values(ipa: str, voice: str, **settings: float) -> tuple[VoiceMeasures, dict[str, float | None]]:
        measures = measure(render(folder, ipa, voice, **settings))
        return measures, measured_values(measures, count_syllables(ipa))

    rates, pitches, f0, heard = [], [], {}, {}
    for voice in (*women, *men):
        plain = [values(ipa, voice) for ipa in phonemes]
        heard[voice] = [measures for measures, _ in plain]
        f0[voice] = [measures.f0_hz for measures in heard[voice]]
        for ipa, (_, middle) in zip(phonemes, plain, strict=True):
            spoken = {1.0: middle} | {s: values(ipa, voice, speed=s)[1] for s in SPEEDS if s != 1.0}
            rates.append(order_kept([[spoken[s]["rate"]] for s in SPEEDS]))
            spoken = {1.0: middle} | {p: values(ipa, voice, pitch=p)[1] for p in PITCH_FACTORS if p != 1.0}
            pitches.append(order_kept([[spoken[p]["pitch"]] for p in PITCH_FACTORS]))
    estimated = {voice: estimate_gender(heard[voice]) for voice in f0}
    is_woman = {voice: voice in women for voice in f0}
    return {
        "rate: pairs in order": float(np.mean(rates)),
        "pitch: pairs in order": float(np.mean(pitches)),
        "gender: women above men": float(np.mean([order_kept([f0[man], f0[woman]]) for man in men for woman in women])),
        "gender: right, by voice": float(np.mean([estimated[v] == ("man", "woman")[is_woman[v]] for v in f0])),
        "gender: wrong, by voice": float(np.mean([estimated[v] == ("woman", "man")[is_woman[v]] for v in f0])),
    }


# ---------------------------------------------------------------------------------------------------- tables


def main() -> None:
    arguments = parser(__doc__)
    data = Path(os.environ.get("MSENC_DATA", "data"))
    arguments.add_argument(
        "--root", type=Path, default=data / "demo-raw", help="the demo's raw clips; default: %(default)s"
    )
    arguments.add_argument("--kokoro", type=Path, metavar="FOLDER", help="a local Kokoro model")
    arguments.add_argument("--workers", type=int, default=2, metavar="N", help="processes; default: %(default)s")
    options = arguments.parse_args()

    start = time.perf_counter()
    dialogues, turns = measure_demo(options.root, options.workers, 16 if options.quick else None)
    seconds = time.perf_counter() - start
    truth = demo_truth(options.root)
    right = accuracies(turns, truth)
    print_table(
        f"Share right on the demo, bins fitted on train ({len(turns):,} clips)",
        ("attribute", "split", "right", "unknown", "majority", "clips"),
        [
            (name, split, *(f"{cell[k]:.1%}" for k in ("right", "unknown", "majority")), cell["clips"])
            for name, by_split in right.items()
            for split, cell in by_split.items()
        ],
    )
    foretold = predictability(dialogues, turns, truth)
    print_table(
        "Test clips whose word the speaker alone foretells (learned on train)",
        ("attribute", "majority", "speaker's name", "speaker's number"),
        [(name, *(f"{share:.1%}" for share in shares.values())) for name, shares in foretold.items()],
    )
    results: dict[str, Any] = {"right": right, "foretold": foretold, "seconds": seconds}
    if options.kokoro:
        voices = {"women": WOMEN[:2], "men": MEN[:2], "sentences": SENTENCES[:1]} if options.quick else {}
        results["kokoro"] = kokoro_orders(options.kokoro, **voices)
        print_table("Kokoro speech", ("", "share"), [(k, f"{v:.1%}") for k, v in results["kokoro"].items()])
    write_json(options.json, results)


if __name__ == "__main__":
    main()
