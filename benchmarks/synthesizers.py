"""Synthesizers side by side: words, predicted opinion, adherence to the description, speakers, speed.

python benchmarks/synthesizers.py --whisper FOLDER                            # eSpeak NG, Hibari, Kokoro; 12 sentences
python benchmarks/synthesizers.py --whisper FOLDER --speech espeak --sentences 50

Needs the packages of the metrics mos and speaker_similarity (docs/speech.md), and those of the synthesizers.
"""

import statistics
from random import Random
from typing import Any

import numpy as np
import soxr
from measure import parser, print_table, write_json
from speech import NODES, SENTENCES, Take, first_sound_s, measure_attributes, real_time_factor, recogniser, synthesizer

from msenc.evaluation.metrics.sound import PredictedMos, speaker_similarity
from msenc.raw.speakers import Resemblyzer
from msenc.speech.description import VOCABULARY
from msenc.types import VoiceAttributes

CAST = {"Anna": "woman", "Ben": "man", "Clara": "woman", "David": "man"}

COLUMNS = {
    "wer": "word error rate",
    "mos": "MOS (DNSMOS)",
    "adherence": "adherence",
    "same": "similarity, same speaker",
    "others": "... others",
    "real_time_factor": "real-time factor",
    "first_sound_s": "first sound, s",
}


def cast_takes(sentences: tuple[str, ...], is_varied: bool) -> list[Take]:
    """Every sentence by a speaker of `CAST` in turn, plainly or each in a voice of its own but for gender and noise."""
    rng, takes = Random(0), []
    for index, sentence in enumerate(sentences):
        speaker, gender = list(CAST.items())[index % len(CAST)]
        words = {n: rng.choice(words) for n, words in VOCABULARY.items() if n not in ("gender", "noise")}
        takes.append(Take(sentence, VoiceAttributes(gender, **(words if is_varied else {})), speaker))
    return takes


def compare(speech: str, sentences: tuple[str, ...], whisper: str, repetitions: int) -> dict[str, Any]:
    """The columns of one synthesizer."""
    import jiwer
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    speak, listen, predict, embed = synthesizer(speech), recogniser(whisper), PredictedMos(), Resemblyzer()
    normalise = EnglishTextNormalizer({})

    def sounds(takes: list[Take], rate: int) -> list[np.ndarray]:
        return [soxr.resample(samples, own, rate) for samples, own in (speak(*take) for take in takes)]

    plain = sounds(cast_takes(sentences, False), listen.sample_rate)
    heard = [listen.text(samples) for samples in plain]
    varied = cast_takes(sentences, True)
    vectors = [embed(samples) for samples in sounds(varied, embed.sample_rate)]
    alike = speaker_similarity(vectors, ["one"] * len(varied), [take.speaker for take in varied])
    shares, _ = measure_attributes(sentences, speech, 1)
    return {
        "wer": jiwer.wer([normalise(s) for s in sentences], [normalise(words) for words in heard]),
        "mos": statistics.mean(predict(samples)["overall"] for samples in plain),
        "adherence": statistics.mean(share["agreement"] for share in shares.values() if "agreement" in share),
        "same": alike["speech/speaker_similarity/same"],
        "others": alike["speech/speaker_similarity/others"],
        "real_time_factor": real_time_factor(speech, sentences),
        "first_sound_s": statistics.median(first_sound_s(speech, repetitions)),
    }


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--speech", nargs="+", choices=NODES, default=list(NODES), help="default: all")
    arguments.add_argument("--sentences", type=int, default=12, metavar="N", help="default: %(default)s, at least 8")
    arguments.add_argument("--whisper", metavar="FOLDER", required=True, help="a local Whisper")
    options = arguments.parse_args()
    sentences = SENTENCES[: 8 if options.quick else max(options.sentences, 8)]
    results = {}
    for speech in options.speech:
        results[speech] = compare(speech, sentences, options.whisper, 2 if options.quick else 10)
        write_json(options.json, {"sentences": len(sentences), "speech": results})  # what is done is kept
    rows = [(name, *(f"{found[key]:.3f}" for key in COLUMNS)) for name, found in results.items()]
    print_table(f"{len(sentences)} sentences", ("", *COLUMNS.values()), rows)


if __name__ == "__main__":
    main()
