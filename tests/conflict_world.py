"""A generated world in which the voice of a turn, and where wanted its words, tell a mood that the reply names."""

import numpy as np

from msenc.data.dataset import StreamSpec
from msenc.prompt import Prompt
from msenc.store.labels import write_labels
from msenc.store.manifest import DatasetManifest, SplitCounts, StreamInfo
from msenc.store.shards import write_stream
from msenc.types import Dialogue, Mark, Utterance

SPECS = {"audio": StreamSpec("level", 3, 1)}
PROMPT = Prompt(instruction="A talk.\n", turn="{speaker}:{video}{audio} {text}\n", response="{speaker}:")
MOODS = ("sad", "happy")


def write_world(folder, num=24, words_tell=False, is_planted=True, is_described=False, is_spoken=True, more=None):
    """Every first turn has a mood; its voice's level tells it, and the reply names it; `more` is said after that."""
    rng = np.random.default_rng(1)
    turns, audio, labels = [], [], {}
    for number in range(num):
        mood = int(rng.integers(2))
        asked = f"I feel {MOODS[mood]}." if words_tell else "Here I am."
        reply = f"You are {MOODS[mood]}."
        utterances = (
            Utterance("0", f"Speaker {number % 3}", asked),
            Utterance(
                "1",
                "Ben",
                reply if is_planted else f"{reply[:-1]}, number {number}.",
                description=f"a man speaks {('slowly', 'fast')[mood]}" if is_described else None,
                marks=(Mark("audio", "text", 8, 8 + len(MOODS[mood])),) if is_planted else (),
            ),
        )
        if more is not None:
            utterances += (Utterance("2", "Speaker 9", more),)
        dialogue = Dialogue(f"world/test/dia{number}", "test", utterances)
        turns.append((dialogue.id, "test", {"turns.json": dialogue.to_json()}))
        frames = np.full((4 + number % 3, 3), 2.0 * mood - 1, np.float16)
        offsets = np.array([0, *[len(frames)] * len(utterances)])
        audio.append((dialogue.id, "test", {"features.npy": frames, "offsets.npy": offsets}))
        labels[f"{dialogue.id}/utt0"] = {"Mood": MOODS[mood], "Take": str(number)}
    hashes = {"turns": write_stream(folder / "turns", turns, {})["hash"]}
    streams = {"turns": StreamInfo("text", None, None, {}, hashes["turns"], {"test": len(utterances) * num})}
    if is_spoken:
        hashes["audio-level"] = write_stream(folder / "audio-level", audio, {})["hash"]
        streams["audio-level"] = StreamInfo("audio", "level", 3, {}, hashes["audio-level"], {"test": num})
    DatasetManifest(
        name="world",
        splits={"test": SplitCounts(num, len(utterances) * num, num, 0.0)},
        streams=streams,
        settings={},
        turns_hash=hashes["turns"],
    ).write(folder)
    write_labels(folder, labels)
    return folder
