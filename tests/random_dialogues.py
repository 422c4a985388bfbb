"""Random dialogues in tokens, with features: what `collate` takes, without a tokenizer or a prompt."""

import numpy as np

from msenc.prompt import SLOTS, TOKEN_KINDS, Slot, Target, TokenizedDialogue

NUM_QUERIES = {"audio": 2, "video": 3}
DIMS = {"audio": 5, "video": 6}


def draw_dialogue(rng, num_turns, name="d", streams=SLOTS, vocab=50, present=0.7):
    """(TokenizedDialogue, features); each turn has each stream with probability `present`.

    What is not of a stream depends on `rng` alone, whatever `streams` are.
    """

    def ids(low, high):
        return tuple(rng.integers(3, vocab, size=rng.integers(low, high)).tolist())

    turns, turn_tokens, targets, responses = [], [], [], []
    features = {stream: [] for stream in streams}
    instruction = ids(1, 4)
    for turn in range(num_turns):
        head, tail = ids(1, 3), ids(1, 7)
        slots = []
        for stream in SLOTS:
            has = rng.random() < present
            frames = rng.normal(size=(int(rng.integers(1, 5)), DIMS[stream])).astype(np.float16)
            if stream in streams:
                features[stream].append(frames if has else None)
                slots += [Slot(stream)] * has
        turns.append((head, *slots, tail))
        turn_tokens.append(len(head) + len(tail))
        if turn:
            reply = (*ids(1, 7), 2)
            kinds = rng.integers(0, len(TOKEN_KINDS), size=len(reply)).tolist()
            targets.append(Target(reply, tuple(kinds)))
            responses.append(ids(1, 4))
    tokens = TokenizedDialogue(name, instruction, tuple(turns), tuple(responses), tuple(targets), tuple(turn_tokens))
    return tokens, features
