import os
from itertools import takewhile
from pathlib import Path

import numpy as np
import pytest
import torch
from random_dialogues import NUM_QUERIES, draw_dialogue
from tiny_models import build_conversation
from transformers import GenerationConfig

from msenc.data.collate import collate, dialogue_rows, history_starts
from msenc.evaluation.replies import decoding_for, write_replies
from msenc.models.conversation import ConversationModel
from msenc.models.generation import read_decoding
from msenc.models.llm import load_llm, load_tokenizer
from msenc.prompt import DialogueTokenizer, Prompt
from msenc.types import Dialogue, MsencError, Utterance

END = 196
GREEDY = {"max_new_tokens": 8, "batch_size": 5}
SAMPLED = {**GREEDY, "do_sample": True, "temperature": 2.0}


def read(seed=1, **settings):
    return read_decoding(settings, END, 0, seed)


def draw(seed=0, num=6, num_turns=(2, 9)):
    rng = np.random.default_rng(seed)
    return [draw_dialogue(rng, int(rng.integers(*num_turns)), f"d{i}") for i in range(num)]


def write(model, samples, decoding, budget=10**6, **options):
    found = write_all(model, samples, decoding, budget=budget, num_queries=NUM_QUERIES, **options)
    return {(samples[w.dialogue][0].id, w.turn, w.alternative): w.ids for w in found}


def write_all(model, samples, decoding, **options):
    return write_replies(model, [tokens for tokens, _ in samples], lambda i: samples[i][1], decoding, **options)


def one_at_a_time(model, samples, budget, num_queries=NUM_QUERIES, end=END, max_new_tokens=8):
    """What transformers itself writes to each history, without padding, batches or a shared cache."""
    replies, ends = {}, [end, model.llm.generation_config.eos_token_id]
    for tokens, features in samples:
        for row in dialogue_rows(tokens, budget, num_queries, "sample", with_targets=False):
            batch = collate([tokens], [features], [[row]], num_queries)
            with torch.inference_mode():
                ids = model.llm.generate(
                    inputs_embeds=model.embed(batch),
                    attention_mask=torch.ones(batch.input_ids.shape, dtype=torch.long),
                    generation_config=GenerationConfig(
                        max_new_tokens=max_new_tokens, eos_token_id=ends, pad_token_id=0
                    ),
                )[0].tolist()
            replies[(tokens.id, row.target_turns[0], 0)] = list(takewhile(lambda id: id not in ends, ids))
    return replies


# ------------------------------------------------------------------------------------------------ the same replies


@pytest.mark.parametrize("connector", ["qformer", "mlp"])
@pytest.mark.parametrize("budget", [10**6, 20, 6])
def test_replies_equal_those_written_one_at_a_time(tiny_models, budget, connector):
    model = build_conversation(tiny_models["llama"], connector=connector).eval()
    samples = draw(seed=budget % 97)
    starts = [history_starts(tokens.turn_tokens, budget) for tokens, _ in samples]
    assert any(len(set(s)) > 1 for s in starts) == (budget < 10**6)
    expected = one_at_a_time(model, samples, budget)
    assert len(set(map(tuple, expected.values()))) > len(expected) / 2
    for layout in ("dialogue", "sample"):
        for batch_size in (1, 4, 100):
            found = write(model, samples, read(**{**GREEDY, "batch_size": batch_size}), budget, layout=layout)
            assert found == expected, (layout, batch_size)
        assert write(model, samples[::-1], read(**GREEDY), budget, layout=layout) == expected


def test_draws_do_not_depend_on_batches_order_layout_or_the_other_dialogues(tiny_models):
    model = build_conversation(tiny_models["llama"]).eval()
    samples = draw(seed=1)
    whole = write(model, samples, read(**SAMPLED), budget=20)
    assert write(model, samples, read(**SAMPLED), budget=20) == whole
    assert write(model, samples, read(**SAMPLED), budget=20, layout="sample") == whole
    assert write(model, samples[::-1], read(**{**SAMPLED, "batch_size": 2}), budget=20) == whole
    alone = write(model, samples[2:3], read(**SAMPLED), budget=20)
    assert alone == {key: ids for key, ids in whole.items() if key[0] == "d2"}
    assert write(model, samples, read(**SAMPLED, seed=2), budget=20).keys() == whole.keys()
    assert write(model, samples, read(**SAMPLED, seed=2), budget=20) != whole


def test_replies_come_in_the_order_of_the_samples(tiny_models):
    model = build_conversation(tiny_models["llama"]).eval()
    samples = draw(seed=2)
    assert len({len(tokens.turns) for tokens, _ in samples}) > 2  # so that sorting by length reorders them
    found = write_all(model, samples, read(**GREEDY), budget=20, num_queries=NUM_QUERIES)
    expected = [(i, turn, 0) for i, (tokens, _) in enumerate(samples) for turn in range(1, len(tokens.turns))]
    assert [tuple(w[:3]) for w in found] == expected


# ------------------------------------------------------------------------------------------------ nothing twice


def test_a_trunk_is_encoded_once_and_an_utterance_connected_once(tiny_models):
    model = build_conversation(tiny_models["llama"]).eval()
    samples = [draw_dialogue(np.random.default_rng(3), 8, "long", present=1.0), *draw(seed=3, num=3, num_turns=(3, 5))]
    budget = 20
    starts = [history_starts(tokens.turn_tokens, budget) for tokens, _ in samples]
    num_trunks = sum(len(set(s)) for s in starts)
    assert len(set(starts[0])) > 1
    connected = dict.fromkeys(model.connectors, 0)
    for name, connector in model.connectors.items():
        connector.register_forward_pre_hook(
            lambda _, args, name=name: connected.update({name: connected[name] + len(args[0])})
        )
    passes = []
    layer = model.llm.get_base_model().model.layers[0]
    layer.register_forward_pre_hook(lambda _, args: passes.append(tuple(args[0].shape[:2])))
    widest = max(len(r) for tokens, _ in samples for r in tokens.responses)
    for batch_size in (2, 50):
        passes.clear()
        connected.update(dict.fromkeys(connected, 0))
        write(model, samples, read(**{**GREEDY, "batch_size": batch_size}), budget)
        assert sum(rows for rows, length in passes if length > widest) == num_trunks
        # the last turn of a dialogue is only a target
        read_turns = [
            {turn for target, start in enumerate(s, start=1) for turn in range(start, target)} for s in starts
        ]
        for name, number in connected.items():
            assert number == sum(
                samples[i][1][name][turn] is not None for i, turns in enumerate(read_turns) for turn in turns
            )


# ------------------------------------------------------------------------------------------------ some, or several


def test_one_turn_and_several_alternatives(tiny_models):
    model = build_conversation(tiny_models["llama"]).eval()
    samples = draw(seed=4, num=2, num_turns=(5, 6))
    last = [[len(tokens.turns) - 1] for tokens, _ in samples]
    whole = write(model, samples, read(**SAMPLED))
    several = write(model, samples, read(**SAMPLED), turns=last, num_replies=7)
    assert len(several) == 14
    assert len(set(map(tuple, several.values()))) == 14
    assert all(several[key] == ids for key, ids in whole.items() if key in several)
    assert write(model, samples, read(**SAMPLED), turns=last, num_replies=7, layout="sample") == several
    fewer = write(model, samples, read(**SAMPLED), turns=last, num_replies=2)
    assert fewer == {key: ids for key, ids in several.items() if key[2] < 2}


def test_several_replies_without_drawing_are_refused(tiny_models):
    model = build_conversation(tiny_models["llama"]).eval()
    with pytest.raises(MsencError, match=r"3 replies to one history: without do_sample=true they .* decoding=sample"):
        write(model, draw(num=1), read(**GREEDY), num_replies=3)


# ------------------------------------------------------------------------------------------------ real weights


@pytest.mark.real
def test_a_real_llm_writes_the_same_replies():
    folder = Path(os.environ.get("MSENC_MODELS", "")) / "smollm2-135m-instruct"
    if "MSENC_MODELS" not in os.environ or not folder.is_dir():
        pytest.skip(f"no {folder.name} in MSENC_MODELS")
    model = ConversationModel(load_llm(str(folder), freeze=True), {}).eval()
    prompt = Prompt(
        instruction="You are a friendly assistant. Continue the conversation with one short turn.\n",
        turn="{speaker}: {text}\n",
        response="{speaker}:",
        target="text",
        chat=True,
    )
    tokenizer = DialogueTokenizer(prompt, load_tokenizer(str(folder)))
    texts = [
        ["Hi! How was your trip?", "Long, but I saw the sea.", "Which sea?", "The Baltic. It was freezing.", "Ha!"],
        ["Did you feed the cat?", "Twice.", "Twice?"],
    ]
    samples = []
    for i, said in enumerate(texts):
        turns = tuple(Utterance(str(k), "Ana" if k % 2 else "Benedict", text) for k, text in enumerate(said))
        samples.append((tokenizer(Dialogue(f"real/test/{i}", "test", turns), [()] * len(said)), {}))
    settings = {"max_new_tokens": 8, "batch_size": 4}
    decoding = decoding_for(settings, tokenizer.tokenizer, seed=1)
    found = write_all(model, samples, decoding, budget=1000, num_queries={})
    expected = one_at_a_time(model, samples, 1000, {}, tokenizer.tokenizer.eos_token_id)
    assert {(samples[w.dialogue][0].id, w.turn, 0): w.ids for w in found} == expected
    assert len(set(map(tuple, expected.values()))) > 3
