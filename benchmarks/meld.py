"""Dialogues with MELD's real lengths, in tokens and frames of random content: what benchmarks are measured on."""

import os
from pathlib import Path

import numpy as np

from msenc.data.collate import Features
from msenc.prompt import TOKEN_KINDS, Slot, Target, TokenizedDialogue
from msenc.raw.annotations import read_meld
from msenc.types import Dialogue, Utterance

RATES = {"audio": 50, "video": 3}
"""Frames per second that msenc stores of WavLM's and CLIP's features."""

DIMS = {"audio": 1024, "video": 512}
CHARACTERS_PER_TOKEN = 4
DESCRIPTION_TOKENS = 12


def meld_dialogues(number: int, split: str = "train", longest: bool = False) -> list[Dialogue]:
    """Dialogues of two turns or more, evenly over the distribution of their numbers of turns.

    With `longest`, those of the most turns in all splits.
    They are MELD's, where MSENC_SHARED names a folder with its CSV files, else drawn to the same statistics.
    """
    shared = os.environ.get("MSENC_SHARED")
    if shared:
        known = [d for d in read_meld(Path(shared) / "data" / "meld").dialogues if d.num_samples]
        known = [d for d in known if longest or d.split == split]
    else:
        rng = np.random.default_rng(0)
        known = [_draw_dialogue(f"meld/{split}/dia{i}", split, rng) for i in range(1000)]
    # Neighbours in this order would have neighbouring ids, and so topics and speakers, were it not shuffled first.
    known = [known[i] for i in np.random.default_rng(1).permutation(len(known))]
    known.sort(key=lambda d: d.num_samples)
    if longest:
        return known[-number:]
    return [known[int((i + 0.5) / number * len(known))] for i in range(number)]


def _draw_dialogue(id: str, split: str, rng: np.random.Generator) -> Dialogue:
    turns = int(np.clip(rng.gamma(2.9, 3.4), 2, 24))
    # median 2.46 s, 99th percentile 11.8 s; about 8 words
    lengths = np.clip(2.46 * np.exp(0.674 * rng.standard_normal(turns)), 0.3, 41)
    texts = [" ".join(rng.choice(["so", "well", "you", "know", "what"], rng.integers(1, 16))) for _ in lengths]
    utterances = tuple(
        Utterance(str(k), f"S{k % 3}", text, None, 0.0, float(length))
        for k, (text, length) in enumerate(zip(texts, lengths, strict=True))
    )
    return Dialogue(id, split, utterances)


def num_frames(utterance: Utterance, rate: int) -> int:
    """Frames of an utterance; what the annotations say of its length is held between 0.3 s and 41 s."""
    return max(round(rate * float(np.clip(utterance.end_s - utterance.start_s, 0.3, 41))), 1)


def random_tokens(dialogue: Dialogue, rng: np.random.Generator, vocab: int) -> tuple[TokenizedDialogue, Features]:
    """A dialogue's layout and features: lengths from its text and times, content random.

    A turn is a speaker (3 tokens), a slot per stream, and a token per four characters; a reply is the turn's text and a
    voice description of 12 tokens.
    """

    def ids(count: int) -> tuple[int, ...]:
        return tuple(rng.integers(3, vocab, count).tolist())

    counts = [-(-len(u.text) // CHARACTERS_PER_TOKEN) for u in dialogue.utterances]
    turns = tuple((ids(3), Slot("video"), Slot("audio"), ids(n)) for n in counts)
    targets = []
    for n in counts[1:]:
        reply = (*ids(n + DESCRIPTION_TOKENS), 2)
        kinds = ("reply",) * n + ("description",) * DESCRIPTION_TOKENS + ("end",)
        targets.append(Target(reply, tuple(TOKEN_KINDS.index(kind) for kind in kinds)))
    tokens = TokenizedDialogue(
        id=dialogue.id,
        instruction=ids(4),
        turns=turns,
        responses=tuple(ids(3) for _ in targets),
        targets=tuple(targets),
        turn_tokens=tuple(3 + n for n in counts),
    )
    features = {
        stream: [
            rng.standard_normal((num_frames(u, rate), DIMS[stream]), dtype=np.float32).astype(np.float16)
            for u in dialogue.utterances
        ]
        for stream, rate in RATES.items()
    }
    return tokens, features
