"""The demo: conversations with a known answer, drawn by chance and written as a MELD-shaped folder of clips.

`draw_dialogues` decides the words and the hidden states; `write_demo` gives them voices and faces. What the hidden
states are, and the lowest loss that each modality can reach, is derived in docs/demo-data.md.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from msenc.demo.face import Look, draw_face
from msenc.demo.frame import (
    DRAW,
    FPS,
    SAMPLE_RATE,
    DrawnDialogue,
    World,
    chance,
    clip_path,
    draw_split,
    draw_transcripts,
    pick,
    write_folder,
)
from msenc.demo.ideal import Belief
from msenc.raw.container import load_av
from msenc.speech.synthesizers.libespeak import VoiceSettings, load_espeak, speak_in_turn
from msenc.types import SPLITS, Dialogue, Mark, Utterance

VERSION = 2  # of the generator: raised whenever equal settings give other data

DEMO_COLUMNS = ("Pitch", "Range", "Face")

INSIDE = ("kitchen", "bedroom", "library", "office")
OUTSIDE = ("garden", "forest", "park", "desert")
_STATEMENTS = ("I am in the {}.", "This is the {}.", "Here is the {}.")
_OPENINGS = ("Hello.", "Hi.", "Hey.")
_DESCRIPTION = "{} speaks with {} intonation"

QUESTIONS = {
    "voice": ("How do I sound?", "How is my voice?", "What do you hear?"),
    "face": ("How do I look?", "How is my face?", "What do you see?"),
    "match": ("Do face and voice agree?", "Does my voice fit my face?"),
    "place": ("Am I inside or outside?", "Inside or outside?"),
}
_QUESTION_SHARES = {"voice": 0.3, "face": 0.3, "match": 0.25, "place": 0.15}


@dataclass(frozen=True)
class _Answer:
    """How a kind of question is answered: a frame, and the word that decides for bit 0 and for bit 1."""

    frames: tuple[str, ...]
    words: tuple[str, str]


ANSWERS = {
    "voice": _Answer(("You sound {}.", "Your voice is {}.", "I hear you are {}."), ("calm", "excited")),
    "face": _Answer(("You look {}.", "Your face is {}.", "I see you are {}."), ("sad", "happy")),
    "match": _Answer(("They {}.", "The two {}.", "I think they {}."), ("differ", "agree")),
    "place": _Answer(("You are {}.", "That is {}.", "It is {}."), ("outside", "inside")),
}
RANGE_WORDS = ("flat", "expressive")


@dataclass(frozen=True)
class _Speaker:
    """A voice and a face that belong to a name. `low` and `high` are eSpeak's pitch for calm and for excited."""

    person: str
    voice: str
    low: int
    high: int
    look: Look


def _speakers() -> dict[str, _Speaker]:
    # A voice serves two names, at slightly other pitches. Voices with breath (f2, f3, f5) are left out: their noise
    # differs from one process to the next.
    voices = (("f1", "m1"), ("f4", "m2"), ("linda", "m3"), ("steph", "m4"))
    women = ("Anna", "Clara", "Elena", "Grace", "Ida", "Laura", "Mina", "Nora")
    men = ("Ben", "Carl", "David", "Felix", "Hugo", "Jonas", "Leo", "Oscar")
    skins = ((236, 196, 170), (141, 93, 60), (255, 219, 190), (200, 150, 110))
    hairs = ((60, 40, 30), (25, 20, 20), (200, 150, 60), (120, 60, 30), (150, 145, 140))
    cast = {}
    for index, (woman, man) in enumerate(zip(women, men, strict=True)):
        female, male = voices[index % 4]
        shift = 3 if index < 4 else -3
        width = 18.5 + 0.3 * index
        look = Look(skins[index % 4], hairs[index % 5], long_hair=True, width=width)
        cast[woman] = _Speaker("a woman", f"en-us+{female}", 5 + shift, 88 + shift, look)
        look = Look(skins[(index + 1) % 4], hairs[(index + 2) % 5], long_hair=False, width=width)
        cast[man] = _Speaker("a man", f"en-us+{male}", 8 + shift, 94 + shift, look)
    return cast


SPEAKERS = _speakers()


@dataclass(frozen=True)
class DemoTurn:
    """The hidden states of one turn.

    Args:
        is_excited: the voice is high (excited) or low (calm); only the audio shows it.
        is_happy: the face is happy or sad; only the video shows it.
        is_expressive: the voice's pitch range is wide or narrow, as the turn's own description says.
        is_inside: whether the place named in the turn's text is indoors.
        question: what the turn asks: ``voice``, ``face``, ``match``, ``place``, or None in the last turn.
    """

    is_excited: bool
    is_happy: bool
    is_expressive: bool
    is_inside: bool
    question: str | None

    @property
    def told(self) -> dict[str, str]:
        """What a transcript writes in place of a stream."""
        return state_words(self)


def draw_dialogues(split: str, num: int, seed: int) -> list[DrawnDialogue]:
    """Draw the words and hidden states of a split's first `num` dialogues; no media.

    A dialogue depends on seed, split and its number alone, so a smaller split is the beginning of a larger one.

    Args:
        split: ``train``, ``val`` or ``test``.
        num: number of dialogues.
        seed: not negative.

    Raises:
        MsencError: for another split, or a negative seed.

    Example:
        >>> first = draw_dialogues("train", 1, seed=0)[0]
        >>> first.dialogue.id, len(first.turns) == len(first.dialogue.utterances)
        ('demo/train/dia0', True)
    """
    return draw_split(DEMO, split, num, seed)


def transcripts(num: int, seed: int) -> list[DrawnDialogue]:
    """Dialogues from a stream of chance of their own, for pre-training an LLM on text with `state_words`.

    They share no dialogue with any split, carry the ids ``demo/transcripts/dia<N>``, and have no clips.
    """
    return draw_transcripts(DEMO, num, seed)


def state_words(turn: DemoTurn) -> dict[str, str]:
    """A turn's fresh states in words, by the stream that shows them.

    Example:
        >>> state_words(DemoTurn(True, False, True, True, "voice"))
        {'audio': 'excited voice', 'video': 'sad face'}
    """
    return {
        "audio": f"{ANSWERS['voice'].words[turn.is_excited]} voice",
        "video": f"{ANSWERS['face'].words[turn.is_happy]} face",
    }


def steady_dialogue(number: int, seed: int, turns: tuple[int, int]) -> DrawnDialogue:
    """A dialogue from another stream of chance, whose speakers keep their mood; it has no clips.

    Args:
        number: of the dialogue; its id is ``demo/raw/dia<N>``.
        seed: not negative.
        turns: fewest turns, and one more than the most.
    """
    return _draw_dialogue("raw", number, seed, turns, is_steady=True)


def _draw_dialogue(
    stream: str,
    number: int,
    seed: int,
    bounds: tuple[int, int] = (3, 7),
    is_steady: bool = False,
    tells_mood: bool = False,
) -> DrawnDialogue:
    rng = chance(seed, stream, number, 0, DRAW)
    names = rng.choice(list(SPEAKERS), size=2, replace=False)
    num_turns = int(rng.integers(*bounds))
    utterances: list[Utterance] = []
    turns: list[DemoTurn] = []
    for index in range(num_turns):
        speaker = str(names[index % 2])
        is_excited, is_happy, is_inside, chance_range = (bool(bit) for bit in rng.integers(0, 2, size=4))
        if is_steady and index >= 2:
            is_excited, is_happy = turns[index - 2].is_excited, turns[index - 2].is_happy
        question = str(rng.choice(list(_QUESTION_SHARES), p=list(_QUESTION_SHARES.values())))
        statement = pick(rng, _STATEMENTS).format(pick(rng, INSIDE if is_inside else OUTSIDE))
        asked = pick(rng, QUESTIONS[question])
        if index == num_turns - 1:
            question = asked = None
        if index == 0:
            opening, is_expressive, marks = pick(rng, _OPENINGS), chance_range, ()
        else:
            opening, is_expressive, marks = _answer(turns[-1], rng, SPEAKERS[speaker].person)
        turn = DemoTurn(is_excited, is_happy, is_expressive, is_inside, question)
        # As transcripts write it, so that the LLM can read it.
        note = "".join(f"[{words}] " for words in reversed(turn.told.values())) if tells_mood else ""
        marks = tuple(
            replace(m, start=m.start + len(note), end=m.end + len(note)) if m.field == "text" else m for m in marks
        )
        utterances.append(
            Utterance(
                id=str(index),
                speaker=speaker,
                text=note + " ".join(part for part in (opening, statement, asked) if part),
                description=_DESCRIPTION.format(SPEAKERS[speaker].person, RANGE_WORDS[is_expressive]),
                clip=clip_path(stream, number, index),
                marks=marks,
            )
        )
        turns.append(turn)
    split = stream if stream in SPLITS else "train"
    return DrawnDialogue(Dialogue(f"demo/{stream}/dia{number}", split, tuple(utterances)), tuple(turns))


def _answer(asker: DemoTurn, rng: np.random.Generator, person: str) -> tuple[str, bool, tuple[Mark, ...]]:
    """The answer's words, whether its own voice is expressive, and the planted spans of the reply."""
    agree = asker.is_excited == asker.is_happy
    # question -> (bit of the words, what tells it), (bit of the description, what tells it; None: the words do)
    said, heard = {
        "voice": ((asker.is_excited, "audio"), (asker.is_happy, "video")),
        "face": ((asker.is_happy, "video"), (asker.is_excited, "audio")),
        "match": ((agree, "both"), (agree, None)),
        "place": ((asker.is_inside, "text"), (asker.is_inside, None)),
    }[asker.question]
    answer = ANSWERS[asker.question]
    frame = pick(rng, answer.frames)
    marks = [_mark(said[1], "text", frame.index("{}"), answer.words[said[0]])]
    if heard[1] is not None:
        start = _DESCRIPTION.format(person, "{}").index("{}")
        marks.append(_mark(heard[1], "description", start, RANGE_WORDS[heard[0]]))
    return frame.format(answer.words[said[0]]), heard[0], tuple(marks)


def _mark(kind: str, field: str, start: int, word: str) -> Mark:
    return Mark(kind, field, start, start + len(word))


def write_demo(root: Path, sizes: dict[str, int], seed: int, num_workers: int, words_tell_mood: bool = False) -> None:
    """Write the demo as a folder in MELD's shape: three CSV files and a clip per utterance.

    The folder appears at `root` when it is whole and not before. A folder with equal settings is left as it is.

    Args:
        root: the folder to write.
        sizes: dialogues per split: ``{"train": 600, "val": 60, "test": 150}``.
        seed: not negative.
        num_workers: processes that draw and speak; 0 does it in this one. The data does not depend on it.
        words_tell_mood: a flaw on purpose: each turn begins with a note in words of its voice and its face, so that a
            model can know them without hearing or seeing them.

    Raises:
        MsencError: if `root` holds something else, the sizes are wrong, a package is missing, or writing fails.
    """
    world, flaw = DEMO, {}
    if words_tell_mood:
        world, flaw = replace(DEMO, draw=partial(_draw_dialogue, tells_mood=True)), {"words_tell_mood": True}
    write_folder(world, root, "demo.json", {"version": VERSION, "seed": seed, **flaw}, sizes, num_workers)


def check_packages() -> None:
    """Refuse, with the name of the extra, where a package that speaks or writes clips is missing."""
    load_espeak()
    load_av()


def _render(
    utterance: Utterance, turn: DemoTurn, sound: np.random.Generator, picture: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    speaker = SPEAKERS[utterance.speaker]
    samples = _say(utterance.text, speaker, turn, sound)
    return draw_face(speaker.look, turn.is_happy, len(samples) * FPS // SAMPLE_RATE, FPS, picture), samples


def _say(text: str, speaker: _Speaker, turn: DemoTurn, rng: np.random.Generator) -> np.ndarray:
    """One turn's sound, float32, (N,), whose length and loudness tell nothing of how it is spoken.

    eSpeak's pitch and range change the length of what it says by some percent, and its loudness by half. So the
    speech is stretched to the length that text and voice alone give, and scaled to one energy.
    """
    import soxr

    jitter = rng.integers(-4, 5, size=2)
    pitch = (speaker.high if turn.is_excited else speaker.low) + jitter[0]
    pitch_range = (85 if turn.is_expressive else 10) + jitter[1]
    # In this order, so that what the first leaves in eSpeak, and the length, know nothing of the states.
    neutral_voice = VoiceSettings(speaker.voice)
    voice = VoiceSettings(speaker.voice, int(np.clip(pitch, 0, 99)), int(pitch_range))
    (neutral, speech), rate = speak_in_turn(text, [neutral_voice, voice])
    length = round(len(_trim(neutral)) * SAMPLE_RATE / rate)
    speech = _trim(speech)
    speech = soxr.resample(speech, len(speech), length)[:length]
    speech *= 0.08 / math.sqrt(float(np.mean(speech.astype(np.float64) ** 2)))

    margin = round(0.05 * SAMPLE_RATE)
    num_frames = math.ceil((length + 2 * margin) * FPS / SAMPLE_RATE)
    samples = np.zeros(math.ceil(num_frames * SAMPLE_RATE / FPS), dtype=np.float32)
    samples[margin : margin + len(speech)] = np.clip(speech, -1, 1)
    return samples


def _trim(samples: np.ndarray) -> np.ndarray:
    """Without the silence at both ends."""
    loud = np.flatnonzero(np.abs(samples) > 0.02 * np.abs(samples).max())
    return samples[loud[0] : loud[-1] + 1]


def _annotate(turn: DemoTurn) -> tuple[str, str]:
    return ("joy", "positive") if turn.is_happy else ("sadness", "negative")


def _hidden(turn: DemoTurn) -> tuple[str, str, str]:
    return (
        ANSWERS["voice"].words[turn.is_excited],
        RANGE_WORDS[turn.is_expressive],
        ANSWERS["face"].words[turn.is_happy],
    )


def _read_bits(row: Mapping[str, str]) -> tuple[bool, bool]:
    return row["Pitch"] == ANSWERS["voice"].words[1], row["Face"] == ANSWERS["face"].words[1]


DEMO = World(
    name="demo",
    columns=DEMO_COLUMNS,
    draw=_draw_dialogue,
    render=_render,
    annotate=_annotate,
    hidden=_hidden,
    read_bits=_read_bits,
    belief=Belief(prior=((0.25, 0.25), (0.25, 0.25)), both=((1, 0), (0, 1))),  # they agree, or differ
    check=check_packages,
)
