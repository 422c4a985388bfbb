"""Pre-train a world's LLM: for the demo, a small Llama on transcripts that spell out moods in words.

    transcripts in words -> tokenizer and Llama -> a transformers folder

It stands in for the knowledge of a large LLM: the language of the task, and the consequences of a mood. It has never
seen audio or video features. The connectors have to express as vectors what the transcripts express in words.
"""

import itertools
import json
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.nn.functional import cross_entropy

from msenc.data.collate import collate, dialogue_rows
from msenc.demo.frame import DrawnDialogue, draw_transcripts
from msenc.demo.table import find_world
from msenc.files import read_json, whole_folder
from msenc.models.attention import make_layout, register
from msenc.prompt import SLOTS, TOKEN_KINDS, DialogueTokenizer, Prompt, TokenizedDialogue
from msenc.types import Batch
from msenc.work.pool import lone_bar

# Few words of a reply depend on the history; without extra weight they would not be learned in a minute. A word
# that nothing reveals (see `silence`) has weight 1: its loss stays that of a coin and would drown the others. Only
# the last stage weights it, too: by then the others are learned, and the LLM is overconfident about it.
WEIGHTS = {
    "description": 2.0,
    "planted_text": 50.0,
    "planted_audio": 10.0,
    "planted_video": 10.0,
    "planted_both": 30.0,
}

PROMPT = Prompt(instruction="A conversation.\n", turn="{speaker}:{video}{audio} {text}\n", response="{speaker}:")
"""What the transcripts are written in: the words of ``prompt=default``. It does not follow the run's prompt, so that
every run starts from the same LLM."""

RECIPE = "recipe.json"
UNSEEN = 300
"""Number of held-out transcripts."""
LEARNED = 0.02
"""Nats per token below which a kind of planted words counts as learned; a guess costs 0.69. Connectors find the parity
on top of an LLM with 0.01 nats, and do not on top of one with 0.09."""
FIRST_LESSONS = 0.3
"""Share of the transcripts that are cut into pairs of turns."""
MISLEADING = 4
"""Oversampling of pairs whose turn answers about a place and asks about another."""
EASY_PAIRS = 0.33
"""Share that is read of the pairs whose reply holds neither the parity nor a place: these two are learned last."""

LAST_SILENCE = 0.5
"""Share of the last stage's dialogues in which no mood is written out, and of those in which no voice is."""
LAST_RATE = 0.05
"""Learning rate of the last stage, as a share of the others'."""
VERSION = 3
"""Version of this file's recipe, apart from its settings."""

SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


def pretrain(
    folder: str,
    num_dialogues: int,
    hidden_size: int = 96,
    num_layers: int = 3,
    num_heads: int = 4,
    vocab_size: int = 1024,
    batch_size: int = 8,
    learning_rate: float = 2e-3,
    silence: float = 0.25,
    seed: int = 1,
    attempts: int = 4,
    world: str = "demo",
) -> None:
    """Create the folder of a tiny LLM, atomically, unless it exists.

    The objective is the language model's: every token of the history counts, and every reply.

    Args:
        folder: to create, in ``save_pretrained``'s layout.
        num_dialogues: transcripts; they are drawn apart from every split of the demo.
        hidden_size: width H.
        num_layers: layers of the Llama.
        num_heads: attention heads.
        vocab_size: of the byte-level BPE tokenizer.
        batch_size: dialogues per step.
        learning_rate: of AdamW, one-cycle: once over pairs of turns, once over whole dialogues, and once over these
            with other silences at a lower rate (`LAST_RATE`).
        silence: share of the whole dialogues in which no mood is written out, and of those in which no voice is: the
            LLM has to do without a stream, too.
        seed: of transcripts, weights and silences.
        attempts: how often to begin anew, from other weights, where unseen transcripts show that a planted word was
            not learned; the best is kept.
        world: whose transcripts are read. Where a world writes no cue out, all its moods are silent: the LLM learns
            what the text tells, and how often each of the other words comes.

    Raises:
        MsencError: there is no such world.
    """
    # The demo's recipes name no world: there was no other when the first of them were written.
    recipe = {k: v for k, v in locals().items() if k != "folder" and (k, v) != ("world", "demo")} | {"version": VERSION}
    target = Path(folder)
    if target.is_dir():
        _note_other_recipe(target, recipe)
        return
    from transformers import LlamaConfig, LlamaForCausalLM

    drawn = draw_transcripts(find_world(world), num_dialogues + UNSEEN, seed)
    dialogues = drawn[:num_dialogues]
    tokenizer = train_tokenizer(dialogues, PROMPT, vocab_size)
    rng = random.Random(seed)
    first = round(FIRST_LESSONS * num_dialogues)
    tokenize = DialogueTokenizer(PROMPT, tokenizer)
    pairs = pairs_of_turns([tokenize_transcript(d, tokenize, 0.0, rng) for d in dialogues[:first]], rng)
    whole = [tokenize_transcript(d, tokenize, silence, rng) for d in dialogues[first:]]
    unseen = [tokenize_transcript(d, tokenize, 0.0, rng) for d in drawn[num_dialogues:]]
    doubts = [tokenize_transcript(d, tokenize, LAST_SILENCE, rng, weigh_untold=True) for d in dialogues[first:]]
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        max_position_embeddings=4096,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
        initializer_range=0.15,  # at this width, transformers' 0.02 costs several times the steps
    )
    llm, lowest = None, math.inf
    for attempt in range(attempts):
        with torch.random.fork_rng():
            torch.manual_seed(seed + 1000 * attempt)
            candidate = LlamaForCausalLM(config)
        _fit(candidate, pairs, "pairs of turns", batch_size, learning_rate)
        _fit(candidate, whole, "whole dialogues", batch_size, learning_rate)
        _fit(candidate, doubts, "unrevealed words", batch_size, LAST_RATE * learning_rate)
        # Whether the parity is found depends on the initial weights, and on rounding.
        loss = _planted_loss(candidate, unseen, batch_size)
        if loss < lowest:
            llm, lowest = candidate, loss
        if lowest < LEARNED:
            break
    if lowest >= LEARNED:
        Console().print(f"The tiny LLM has not learned all planted words: the worst kind costs {lowest:.2f} nats.")
    llm.set_attn_implementation("sdpa")
    with whole_folder(target) as partial:
        llm.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        (partial / RECIPE).write_text(json.dumps(recipe, indent=2) + "\n")


def _note_other_recipe(folder: Path, recipe: dict[str, Any]) -> None:
    path = folder / RECIPE
    made_by = read_json(path, dict[str, Any]) if path.is_file() else {}
    differ = [f"{k}={made_by.get(k)}, not {v}" for k, v in recipe.items() if made_by.get(k) != v]
    if differ:
        Console().print(f"{folder} was made with {'; '.join(differ)}. It is used as it is; remove it to recreate it.")


def train_tokenizer(dialogues: Sequence[DrawnDialogue], prompt: Prompt, vocab_size: int) -> Any:
    """A byte-level BPE over the transcripts: any text has tokens, and the transcripts' words mostly one each."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    def texts() -> list[str]:
        lines = [prompt.instruction]
        for demo in dialogues:
            labels = prompt.speaker_labels(demo.dialogue)
            for label, turn, utterance in zip(labels, demo.turns, demo.dialogue.utterances, strict=True):
                lines += prompt.turn_pieces(label, utterance.text, (), _slot_words(turn))
                lines.append(prompt.format_target(utterance)[0])
        return lines

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts(),
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL_TOKENS.values()),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    bos = SPECIAL_TOKENS["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL_TOKENS)


def _slot_words(turn: Any) -> dict[str, str]:
    return {stream: f" [{words}]" for stream, words in turn.told.items()}


def tokenize_transcript(
    demo: DrawnDialogue, tokenizer: DialogueTokenizer, silence: float, rng: random.Random, weigh_untold: bool = False
) -> TokenizedDialogue:
    """A transcript; in each stream nothing is said with the chance `silence`.

    What a silent stream would tell is not marked as planted, and has no weight, unless `weigh_untold`. A stream that
    the world never writes out is silent always.
    """
    said = [s for s in SLOTS if rng.random() >= silence and all(s in turn.told for turn in demo.turns)]
    words = [{stream: text for stream, text in _slot_words(turn).items() if stream in said} for turn in demo.turns]
    told = {"text", *said, *(["both"] if len(said) == len(SLOTS) else [])}
    utterances = [
        replace(u, marks=tuple(mark for mark in u.marks if weigh_untold or mark.kind in told))
        for u in demo.dialogue.utterances
    ]
    return tokenizer(replace(demo.dialogue, utterances=tuple(utterances)), [()] * len(words), words)


def _fit(
    llm: torch.nn.Module, dialogues: list[TokenizedDialogue], what: str, batch_size: int, learning_rate: float
) -> None:
    if not dialogues:
        return
    steps = math.ceil(len(dialogues) / batch_size)
    optimizer = torch.optim.AdamW(llm.parameters(), lr=learning_rate, weight_decay=0.1, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    llm.train()
    llm.set_attn_implementation(register())
    with lone_bar() as progress:
        task = progress.add_task("pre-training", total=steps)
        for step in range(steps):
            batch, logits = _run(llm, dialogues[step * batch_size : (step + 1) * batch_size])
            loss = _weighted_loss(logits, batch)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(llm.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            progress.update(task, advance=1, description=f"tiny LLM, {what}: loss {loss.item():.3f}")
    llm.eval()


@torch.inference_mode()
def _planted_loss(llm: torch.nn.Module, dialogues: list[TokenizedDialogue], batch_size: int) -> float:
    """The mean loss of the worst kind of planted words."""
    losses, kinds = [], []
    for at in range(0, len(dialogues), batch_size):
        batch, logits = _run(llm, dialogues[at : at + batch_size])
        losses.append(cross_entropy(logits[batch.predictors], batch.labels, reduction="none"))
        kinds.append(batch.kinds)
    loss, kind = torch.cat(losses), torch.cat(kinds)
    planted = [k for k, name in enumerate(TOKEN_KINDS) if name.startswith("planted") and (kind == k).any()]
    return max((loss[kind == k].mean().item() for k in planted), default=0.0)


def _run(llm: torch.nn.Module, dialogues: list[TokenizedDialogue]) -> tuple[Batch, torch.Tensor]:
    """The packed batch of whole dialogues, and its logits (L, V)."""
    rows = [dialogue_rows(d, budget=10**9, num_queries={}) for d in dialogues]
    batch = collate(dialogues, [{} for _ in dialogues], rows, num_queries={}, pack=True)
    layout = make_layout(batch.segments, batch.input_ids.device)
    logits = llm(
        input_ids=batch.input_ids,
        attention_mask=layout.mask,
        position_ids=batch.position_ids,
        use_cache=False,
        layout=layout,
    ).logits[0]
    return batch, logits


def _weighted_loss(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Mean loss over the trunk's own tokens and the targets, each weighted by `WEIGHTS`."""
    trunks = torch.cat([torch.arange(s.start, s.start + s.trunk - 1) for s in batch.segments])
    predictors = torch.cat([trunks, batch.predictors])
    wanted = torch.cat([batch.input_ids[0, trunks + 1], batch.labels])
    weights = torch.tensor([WEIGHTS.get(kind, 1.0) for kind in TOKEN_KINDS])[batch.kinds]
    weights = torch.cat([torch.ones(len(trunks)), weights])
    nll = cross_entropy(logits[predictors], wanted, reduction="none")
    return (nll * weights).sum() / weights.sum()


def pairs_of_turns(dialogues: Sequence[TokenizedDialogue], rng: random.Random) -> list[TokenizedDialogue]:
    """Turns with their replies, each as a dialogue of its own: the parity alone first, then among the others.

    A turn that answers about a place, tells of another and asks about that one is rare, and read several times: its own
    answer, a word before the place, is the easier one to repeat.
    """
    parity, place = TOKEN_KINDS.index("planted_both"), TOKEN_KINDS.index("planted_text")
    pairs = [
        replace(
            dialogue,
            turns=dialogue.turns[at : at + 2],
            responses=(response,),
            targets=(target,),
            turn_tokens=dialogue.turn_tokens[at : at + 2],
        )
        for dialogue in dialogues
        for at, (response, target) in enumerate(zip(dialogue.responses, dialogue.targets, strict=True))
    ]
    mixed = [p for p in pairs if {parity, place} & set(p.targets[0].kinds) or rng.random() < EASY_PAIRS]
    misleading = [
        pair
        for before, pair in itertools.pairwise(pairs)
        if before.id == pair.id and place in before.targets[0].kinds and place in pair.targets[0].kinds
    ]
    mixed += misleading * MISLEADING
    rng.shuffle(mixed)
    return [p for p in pairs if parity in p.targets[0].kinds] + mixed
