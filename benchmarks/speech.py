"""Does speech sound as its voice description says? Attributes, intelligibility and speed of a synthesizer.

python benchmarks/speech.py                                    # eSpeak NG, 50 sentences
python benchmarks/speech.py --speech kokoro --sentences 20     # the local model in MSENC_MODELS/kokoro-82m
python benchmarks/speech.py --whisper FOLDER                   # also the word error rate, by a local Whisper
"""

import multiprocessing
import os
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any, NamedTuple

from measure import parser, print_table, write_json
from rich.progress import track

from msenc.config.build import build
from msenc.speech.attributes import VoiceSettings, attributes_of, fit_bins, measured_values
from msenc.speech.description import VOCABULARY
from msenc.speech.synthesizers.libespeak import to_phonemes
from msenc.speech.voice import count_syllables, measure
from msenc.types import VoiceAttributes

NODES = {
    "espeak": {"_target_": "msenc.speech.synthesizers.espeak.ESpeak"},
    "hibari": {"_target_": "msenc.speech.synthesizers.hibari.Hibari", "voices": {"woman": ["heart"], "man": ["heart"]}},
    "kokoro": {
        "_target_": "msenc.speech.synthesizers.kokoro.Kokoro",
        "folder": str(Path(os.environ.get("MSENC_MODELS", "models")) / "kokoro-82m"),
    },
}
SPEAKERS = ("Anna", "Ben", "Clara", "David", "Elena", "Felix", "Grace", "Hugo")
PAUSE_EDGES = (0.03, 0.18)
"""Shares; no quantiles: a third of the sentences has no pause at all, and as many share the lowest value."""

ATTRIBUTES = tuple(name for name in VOCABULARY if name != "gender")
REPLY = "That is wonderful news. I have been waiting for it since the morning. When can we start?"

SENTENCES = (
    "I did not expect to see you here today, but it is a lovely surprise.",
    "The train leaves at seven in the morning, so we have to get up early.",
    "Could you please tell me where the library is, and when it opens?",
    "She put the letter on the kitchen table and walked out into the garden.",
    "My brother has lived in the mountains for almost eleven years.",
    "We can take the bus, or we can walk along the river if you like.",
    "There was a small dog waiting in front of the bakery all afternoon.",
    "He said that the meeting would be over before lunch, but it was not.",
    "Do you remember the song that we used to sing on rainy days?",
    "The old clock in the hall has not been working since last winter.",
    "I would rather stay at home tonight and read a good book.",
    "Nobody knew why the lights in the theatre went out so suddenly.",
    "You should bring a warm coat, because the evenings are cold up there.",
    "Her grandmother taught her how to bake bread when she was nine.",
    "They painted the whole house yellow, and now it looks much brighter.",
    "If you see him at the market, tell him that I called twice.",
    "The children built a castle out of sand and wet stones.",
    "I am sorry that I forgot your birthday, it will not happen again.",
    "Our teacher told us a long story about a ship that never came back.",
    "Please close the window, the neighbours are having a party again.",
    "It took them three days to find the road through the forest.",
    "What a beautiful morning, the whole valley is covered in snow!",
    "The doctor gave me some medicine and told me to rest for a week.",
    "We were late for the concert, but they let us in during the break.",
    "Have you ever eaten soup made of pumpkin and roasted apples?",
    "The museum is closed on Mondays, so we went to the park instead.",
    "He keeps a photograph of his first car in his wallet.",
    "I think that the answer is simpler than most people believe.",
    "A stranger helped me carry the heavy boxes up to the fourth floor.",
    "The farmer sold his horses and bought a second hand tractor.",
    "When the music stopped, everyone turned around and looked at the door.",
    "She works at a hospital near the station, mostly at night.",
    "You can borrow my bicycle as long as you bring it back by Friday.",
    "The river was so clear that we could see the fish between the stones.",
    "I have been thinking about what you told me yesterday evening.",
    "There is nothing better than a cup of tea after a long walk.",
    "The captain asked the passengers to remain in their seats.",
    "They have two daughters who both study music in another city.",
    "Turn left at the church, then follow the road until you see a bridge.",
    "My phone fell into the water, and now it does not turn on anymore.",
    "Is there enough milk in the kitchen, or should I buy some?",
    "The cat sleeps on the roof of the garage whenever the sun is out.",
    "He promised to write every month, and so far he has.",
    "We planted three trees behind the school last spring.",
    "The price of the tickets has gone up again since the summer.",
    "I could not hear a word, because the wind was so loud.",
    "Somebody left a green umbrella under the chair in the corner.",
    "It is getting dark, so let us find a place to put up the tent.",
    "She laughed so much that she had to sit down on the stairs.",
    "The bridge was built by hand more than two hundred years ago.",
)


class Take(NamedTuple):
    """One sentence to be spoken."""

    sentence: str
    voice: VoiceAttributes
    speaker: str


class Heard(NamedTuple):
    """What was measured of a take; the words only where a recogniser listened."""

    values: dict[str, float | None]
    words: str | None


# ---------------------------------------------------------------------------------------------------- speaking


@cache
def synthesizer(name: str) -> Any:
    return build(NODES[name], "speech")


@cache
def remembering_synthesizer(name: str) -> Any:
    """One whose model is not asked the same thing twice: many takes differ in what is done to the sound afterwards."""
    speak = build(NODES[name], "speech")
    if name == "kokoro":
        run, outputs = speak.session.run, {}

        def remember(names: None, inputs: Mapping[str, Any]) -> Any:
            key = tuple(value.tobytes() for value in inputs.values())
            if key not in outputs:
                outputs[key] = run(names, inputs)
            return outputs[key]

        speak.session = SimpleNamespace(run=remember)
    return speak


@cache
def recogniser(folder: str) -> Any:
    from msenc.models.recognition import Recogniser

    return Recogniser(folder)


def hear(take: Take, speech: str, whisper: str | None) -> Heard:
    samples, sample_rate = remembering_synthesizer(speech)(*take)
    words = None
    if whisper:
        import soxr

        listen = recogniser(whisper)
        words = listen.text(soxr.resample(samples, sample_rate, listen.sample_rate))
    values = measured_values(measure(samples, sample_rate), count_syllables(to_phonemes([take.sentence])[0]))
    return Heard(values, words)


def hear_all(takes: Sequence[Take], speech: str, whisper: str | None, num_workers: int, title: str) -> list[Heard]:
    with ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(hear, take, speech, whisper) for take in takes]
        return [future.result() for future in track(futures, title)]


def takes_of(sentences: Sequence[str]) -> dict[tuple[str, str], list[Take]]:
    """(attribute, word) -> every sentence with that word and nothing else but a gender, which alternates."""
    takes: dict[tuple[str, str], list[Take]] = {}
    for attribute, words in VOCABULARY.items():
        for word in words:
            takes[attribute, word] = []
            for index, sentence in enumerate(sentences):
                voice = VoiceAttributes(gender=VOCABULARY["gender"][index % 2])
                voice = replace(voice, **{attribute: word})
                takes[attribute, word].append(Take(sentence, voice, SPEAKERS[index % len(SPEAKERS)]))
    return takes


# ---------------------------------------------------------------------------------------------------- figures


def share_in_order(low: Iterable[float | None], high: Iterable[float | None]) -> float:
    """Share of sentences whose value is lower with the first word than with the last; an unmeasured one is not.

    Example:
        >>> share_in_order([1.0, 2.0, None], [2.0, 1.0, 3.0])
        0.3333333333333333
    """
    pairs = list(zip(low, high, strict=True))
    return sum(a is not None and b is not None and a < b for a, b in pairs) / len(pairs)


def agreement(attribute: str, heard: Mapping[str, Sequence[Heard]], genders: Sequence[str]) -> float:
    """Share of sentences whose measured word is the one asked for; bins fitted on every other sentence of each gender.

    Args:
        attribute: any but the gender.
        heard: word -> the sentences spoken so.
        genders: of each sentence's voice.
    """
    voices = [
        (index, word, SimpleNamespace(values=one.values, gender=genders[index]))
        for word, sentences in heard.items()
        for index, one in enumerate(sentences)
    ]
    given = VoiceSettings(edges={"pauses": PAUSE_EDGES})
    bins = fit_bins((voice for index, _, voice in voices if index // 2 % 2 == 0), given)
    right = [
        getattr(attributes_of(voice.values, voice.gender, bins), attribute) == word
        for index, word, voice in voices
        if index // 2 % 2
    ]
    return sum(right) / len(right)


def first_sound_s(speech: str, repetitions: int) -> list[float]:
    """Seconds until the first sentence of a reply is there; the synthesizer is loaded before."""
    speak, seconds = synthesizer(speech), []
    voice = VoiceAttributes(gender="woman")
    next(speak.stream(REPLY, voice, "Anna"))
    for _ in range(repetitions):
        start = time.perf_counter()
        next(speak.stream(REPLY, voice, "Anna"))
        seconds.append(time.perf_counter() - start)
    return seconds


def real_time_factor(speech: str, sentences: Sequence[str]) -> float:
    """Seconds to speak per second of sound, one sentence after another on one core."""
    speak, spoken_s, sound_s = synthesizer(speech), 0.0, 0.0
    speak(REPLY, VoiceAttributes(), "Anna")
    for sentence, speaker in zip(sentences, SPEAKERS, strict=False):
        start = time.perf_counter()
        samples, sample_rate = speak(sentence, VoiceAttributes(), speaker)
        spoken_s += time.perf_counter() - start
        sound_s += len(samples) / sample_rate
    return spoken_s / sound_s


def random_voices(sentences: Sequence[str], rng: Random) -> list[Take]:
    """Every sentence with a word for each attribute; the noise aside, which hides words from the recogniser too."""
    return [
        Take(
            sentence,
            VoiceAttributes(**{n: rng.choice(words) for n, words in VOCABULARY.items() if n != "noise"}),
            SPEAKERS[index % len(SPEAKERS)],
        )
        for index, sentence in enumerate(sentences)
    ]


def measure_attributes(
    sentences: Sequence[str], speech: str, num_workers: int
) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
    """Per attribute the share in order and the agreement; and all values."""
    takes = takes_of(sentences)
    in_order = [(key, index) for index in range(len(sentences)) for key in takes]  # what is alike, one after another
    spoken = hear_all([takes[k][i] for k, i in in_order], speech, None, num_workers, "voices")
    heard = {key: [h for (k, _), h in zip(in_order, spoken, strict=True) if k == key] for key in takes}
    genders = [take.voice.gender for take in takes["pitch", "low"]]
    shares = {}
    for attribute in ATTRIBUTES:
        words = VOCABULARY[attribute]
        low, high = ([h.values[attribute] for h in heard[attribute, word]] for word in words[::2])
        agrees = agreement(attribute, {word: heard[attribute, word] for word in words}, genders)
        shares[attribute] = {"in order": share_in_order(low, high), "agreement": agrees}
    woman, man = ([h.values["pitch"] for h in heard["gender", word]] for word in VOCABULARY["gender"])
    shares["gender"] = {"in order": share_in_order(man, woman)}
    return shares, {f"{name}={word}": [h.values for h in group] for (name, word), group in heard.items()}


def measure_words(sentences: Sequence[str], speech: str, whisper: str, num_workers: int) -> dict[str, Any]:
    """Word error rates (both sides by Whisper's own normaliser) and what was understood, plain and in random voices."""
    import jiwer
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    normalise = EnglishTextNormalizer({})  # contractions and numbers; British spellings stay
    plain = [t._replace(voice=VoiceAttributes(t.voice.gender)) for t in takes_of(sentences)["pitch", "medium"]]
    results: dict[str, Any] = {}
    for name, group in {"wer": plain, "wer, random voices": random_voices(sentences, Random(0))}.items():
        words = [h.words or "" for h in hear_all(group, speech, whisper, num_workers, name)]
        results[name] = jiwer.wer([normalise(s) for s in sentences], [normalise(w) for w in words])
        results[f"{name}: understood"] = words
    return results


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--speech", choices=NODES, default="espeak", help="default: %(default)s")
    arguments.add_argument("--sentences", type=int, default=len(SENTENCES), metavar="N", help="default: %(default)s")
    arguments.add_argument("--whisper", metavar="FOLDER", help="a local Whisper")
    arguments.add_argument("--skip-attributes", action="store_true", help="words and speed alone")
    arguments.add_argument("--workers", type=int, default=2, metavar="N", help="processes; default: %(default)s")
    options = arguments.parse_args()
    sentences = SENTENCES[: 4 if options.quick else options.sentences]

    results: dict[str, Any] = {"speech": options.speech, "sentences": len(sentences)}
    if not options.skip_attributes:
        shares, values = measure_attributes(sentences, options.speech, options.workers)
        results |= {"attributes": shares, "values": values}
        print_table(
            f"{options.speech}: attributes of {len(sentences)} sentences",
            ("attribute", "first word below last", "measured as asked"),
            [(n, f"{v['in order']:.1%}", f"{v['agreement']:.1%}" if len(v) > 1 else "") for n, v in shares.items()],
        )
    if options.whisper:
        results |= measure_words(sentences, options.speech, options.whisper, options.workers)
    results["real-time factor"] = real_time_factor(options.speech, sentences)
    seconds = first_sound_s(options.speech, 2 if options.quick else 10)
    results["first sound, s (median)"] = statistics.median(seconds)
    results["first sound, s"] = seconds
    rows = [(name, f"{value:.3f}") for name, value in results.items() if isinstance(value, float)]
    print_table(f"{options.speech}: words and speed", ("", "value"), rows)
    write_json(options.json, results)


if __name__ == "__main__":
    main()
