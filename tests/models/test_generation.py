import dataclasses
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from random_dialogues import NUM_QUERIES, draw_dialogue
from tiny_models import build_conversation
from transformers import GenerationConfig

from msenc.data.collate import collate, dialogue_rows
from msenc.models.generation import DECODING_KEYS, Wanted, read_decoding, write_from_rows, write_from_trunks
from msenc.types import MsencError

FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]
END = 196
"""A token that the random LLMs write now and then."""
GREEDY = {"max_new_tokens": 10, "batch_size": 8}
SAMPLED = {**GREEDY, "do_sample": True, "temperature": 0.7, "top_k": 6}


def read(**settings):
    return read_decoding(settings, END, 0, seed=1)


def draw_trunks(seed=0, num=3, vocab=50):
    """Whole dialogues as right-padded rows, a reply wanted to every turn, and each history alone in a batch."""
    rng = np.random.default_rng(seed)
    drawn = [draw_dialogue(rng, int(rng.integers(3, 7)), f"d{i}", vocab=vocab) for i in range(num)]
    rows, wanted, alone = [], [], []
    for b, (tokens, features) in enumerate(drawn):
        samples = dialogue_rows(tokens, 10**6, NUM_QUERIES, "sample", with_targets=False)
        for turn, row in enumerate(samples, start=1):
            wanted.append(Wanted(tokens.id, turn, 0, b, row.trunk, tokens.responses[turn - 1]))
            alone.append(collate([tokens], [features], [[row]], NUM_QUERIES, padding_side="left"))
        rows.append(samples[-1:])
    return collate([t for t, _ in drawn], [f for _, f in drawn], rows, NUM_QUERIES), wanted, alone


def plain_generate(model, batch, **settings):
    """What transformers itself writes to one history without padding."""
    with torch.inference_mode():
        return model.llm.generate(
            inputs_embeds=model.embed(batch),
            attention_mask=torch.ones(batch.input_ids.shape, dtype=torch.long),
            generation_config=GenerationConfig(**settings, eos_token_id=END, pad_token_id=0),
        )


def greedily(model, batch):
    ids = plain_generate(model, batch, max_new_tokens=10)[0].tolist()
    return ids[: ids.index(END)] if END in ids else ids


def test_the_output_layer_gets_last_tokens_as_one_block(tiny_models, monkeypatch):
    """Of a view of many rows, torch makes a product for each row."""
    model = build_conversation(tiny_models["llama"]).eval()
    weight = model.llm.get_output_embeddings().weight
    seen = []

    def linear(x, w, b=None):
        if w is weight:
            seen.append((x.shape, x.is_contiguous()))
        return original(x, w, b)

    original = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    batch, wanted, _ = draw_trunks()
    write_from_trunks(model, batch, wanted, read(**GREEDY))
    assert len({shape for shape, _ in seen}) > 1
    assert all(is_one for _, is_one in seen)


# ------------------------------------------------------------------------------------------------ greedy


@pytest.mark.parametrize("family", FAMILIES)
def test_replies_from_shared_trunks_equal_plain_generate(tiny_models, family):
    model = build_conversation(tiny_models[family]).eval()
    batch, wanted, alone = draw_trunks()
    expected = [greedily(model, one) for one in alone]
    for batch_size in (1, 3, 100):
        found = write_from_trunks(model, batch, wanted, read(**{**GREEDY, "batch_size": batch_size}))
        assert found == expected
    assert len(set(map(tuple, expected))) > len(expected) // 2
    assert len({w.cut for w in wanted}) > 5
    assert len({len(w.response) for w in wanted}) > 1
    backwards = write_from_trunks(model, batch, wanted[::-1], read(**GREEDY))
    assert backwards[::-1] == expected


def test_replies_follow_the_scores_of_a_forward(tiny_models):
    model = build_conversation(tiny_models["llama"]).eval()
    batch, wanted, alone = draw_trunks()
    for one, reply in zip(alone, write_from_trunks(model, batch, wanted, read(**GREEDY)), strict=True):
        with torch.inference_mode():
            new = model.llm.get_input_embeddings()(torch.tensor([reply], dtype=torch.long))
            logits = model.llm(inputs_embeds=torch.cat([model.embed(one), new], 1)).logits[0, -len(reply) - 1 :]
        best = logits.argmax(-1).tolist()
        assert best[:-1] == reply
        assert best[-1] == END or len(reply) == 10


@pytest.mark.parametrize("attention", ["auto", "eager"])
def test_either_attention_kernel_respects_the_gap(tiny_models, attention):
    model = build_conversation(tiny_models["llama"], attn_implementation=attention).eval()
    batch, wanted, alone = draw_trunks(seed=1)
    assert write_from_trunks(model, batch, wanted, read(**GREEDY)) == [greedily(model, one) for one in alone]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_wrong_cut_is_seen(tiny_models, family):
    model = build_conversation(tiny_models[family]).eval()
    batch, wanted, _ = draw_trunks()
    right = write_from_trunks(model, batch, wanted, read(**GREEDY))
    for shift in (-1, 1):
        # The last history of a row has nothing behind it.
        shifted = [dataclasses.replace(w, cut=w.cut + shift) if w.turn < 2 else w for w in wanted]
        wrong = write_from_trunks(model, batch, shifted, read(**GREEDY))
        assert any(a != b for a, b, w in zip(right, wrong, wanted, strict=True) if w.turn < 2)
        assert all(a == b for a, b, w in zip(right, wrong, wanted, strict=True) if w.turn >= 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shifted_position_is_seen(tiny_models, family, monkeypatch):
    model = build_conversation(tiny_models[family]).eval()
    batch, wanted, _ = draw_trunks()
    right = write_from_trunks(model, batch, wanted, read(**GREEDY))
    generate = model.llm.generate

    def with_positions(place):
        def call(**inputs):
            return generate(**inputs, position_ids=place(inputs["attention_mask"]))

        monkeypatch.setattr(model.llm, "generate", call)
        return write_from_trunks(model, batch, wanted, read(**GREEDY))

    def counted(mask):
        return (mask.cumsum(-1) - 1).clamp(min=0)

    assert with_positions(counted) == right
    assert with_positions(lambda mask: counted(mask) + 1) != right
    # counting the gap between history and response prompt as tokens
    assert with_positions(lambda mask: torch.arange(mask.shape[1]).expand_as(mask)) != right


def test_each_trunk_passes_the_llm_once(tiny_models):
    model = build_conversation(tiny_models["llama"]).eval()
    batch, wanted, _ = draw_trunks()
    seen = []
    first_layer = model.llm.get_base_model().model.layers[0]
    first_layer.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[:2])))
    write_from_trunks(model, batch, wanted, read(**{**GREEDY, "batch_size": 4, "min_new_tokens": 10}))
    assert seen[0] == (3, max(w.cut for w in wanted))
    num_batches = -(-len(wanted) // 4)
    assert num_batches > 2
    # then per batch the response prompts, and each new token but the last
    assert len(seen) == 1 + num_batches * 10
    assert max(length for _, length in seen[1:]) == max(len(w.response) for w in wanted)
    assert sum(rows for rows, _ in seen[1:]) == len(wanted) * 10


def test_left_padded_rows_give_the_same(tiny_models):
    model = build_conversation(tiny_models["llama"]).eval()
    rng = np.random.default_rng(3)
    drawn = [draw_dialogue(rng, 5, f"d{i}") for i in range(3)]
    rows = [dialogue_rows(tokens, 10**6, NUM_QUERIES, "sample", with_targets=False) for tokens, _ in drawn]
    dialogues, features = [t for t, _ in drawn], [f for _, f in drawn]
    batch = collate(dialogues, features, rows, NUM_QUERIES, padding_side="left")
    wanted = [
        Wanted(tokens.id, turn, 0, 0, row.trunk, tokens.responses[turn - 1])
        for tokens, found in zip(dialogues, rows, strict=True)
        for turn, row in enumerate(found, start=1)
    ]
    expected = [
        greedily(model, collate([d], [f], [[row]], NUM_QUERIES))
        for d, f, found in zip(dialogues, features, rows, strict=True)
        for row in found
    ]
    assert len({w.cut for w in wanted}) > 5
    assert write_from_rows(model, batch, wanted, read(**GREEDY)) == expected


def test_a_reply_stops_at_the_end_token(tiny_models):
    model = build_conversation(tiny_models["llama"]).eval()
    batch, wanted, _ = draw_trunks()
    free = write_from_trunks(model, batch, wanted, read(**GREEDY, min_new_tokens=10))
    assert all(len(reply) == 10 for reply in free)
    end = free[0][3]
    stopped = write_from_trunks(model, batch, wanted, read_decoding(GREEDY, end, 0, 1))
    assert len(stopped[0]) < 10
    assert all(end not in reply for reply in stopped)
    longest = max(len(reply) for reply in stopped)
    assert longest == 10  # the others go on


# ------------------------------------------------------------------------------------------------ settings

CHANGES = [
    {"num_beams": 3},
    {"num_beams": 3, "length_penalty": 3.0, "early_stopping": True},
    {"repetition_penalty": 1.5},
    {"no_repeat_ngram_size": 1},
    {"min_new_tokens": 10},
    {"do_sample": True},
    {"do_sample": True, "temperature": 2},
    {"do_sample": True, "top_k": 3},
    {"do_sample": True, "top_p": 0.5},
    {"do_sample": True, "min_p": 0.3},
    {"do_sample": True, "typical_p": 0.5},
]


def test_every_setting_does_something_and_fits_a_batch(tiny_models):
    model = build_conversation(tiny_models["llama"]).eval()
    batch, wanted, alone = draw_trunks()
    plain = {
        is_sampled: write_from_trunks(model, batch, wanted, read(**GREEDY, do_sample=is_sampled))
        for is_sampled in (False, True)
    }
    for change in CHANGES:
        decoding = read(**{**GREEDY, **change})
        together = write_from_trunks(model, batch, wanted, decoding)
        assert together == [write_from_rows(model, b, [w], decoding)[0] for b, w in zip(alone, wanted, strict=True)]
        assert together != plain[change.get("do_sample", False)] or change == {"do_sample": True}
    assert plain[True] != plain[False]
    assert {key for change in CHANGES for key in change} | GREEDY.keys() == set(DECODING_KEYS)


@pytest.mark.parametrize("change", [c for c in CHANGES if "do_sample" not in c and len(c) == 1])
def test_settings_mean_what_they_mean_to_transformers(tiny_models, change):
    model = build_conversation(tiny_models["llama"]).eval()
    batch, wanted, alone = draw_trunks()
    found = write_from_trunks(model, batch, wanted, read(**GREEDY, **change))
    with pytest.warns() if {"repetition_penalty", "no_repeat_ngram_size"} & change.keys() else nullcontext():
        expected = [plain_generate(model, one, max_new_tokens=10, **change)[0].tolist() for one in alone]
    assert found == [ids[: ids.index(END)] if END in ids else ids for ids in expected]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_length": 30}, r"decoding\.max_length: no such setting\. Expected some of batch_size, do_sample"),
        ({"max_new_tokens": None}, r"decoding\.max_new_tokens: found None, expected a whole number of 1 or more"),
        ({"batch_size": 0}, r"decoding\.batch_size: found 0, expected"),
        ({"do_sample": True, "num_beams": 2}, r"do_sample=true draws one token at a time, so num_beams must be 1"),
        (
            {"temperature": 0.8},
            r"decoding\.temperature=0\.8 has no effect .* Set do_sample=true, or temperature=null",
        ),
        ({"do_sample": True, "temperature": 0}, r"decoding\.temperature=0: .*strictly positive"),
        ({"repetition_penalty": "much"}, r"decoding\.repetition_penalty=much: "),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(MsencError, match=message):
        read(**{**GREEDY, **settings})


def test_absent_settings_and_zeros_leave_the_distribution_alone():
    assert read(**GREEDY, do_sample=True, top_k=0, no_repeat_ngram_size=0, top_p=None).processors == ()


# ------------------------------------------------------------------------------------------------ sampling


def chi_square(counts, probabilities):
    expected = counts.sum() * probabilities
    return ((counts - expected) ** 2 / expected).sum().item()


def test_draws_follow_the_distribution_that_transformers_warps(tiny_models):
    model = build_conversation(tiny_models["llama"]).eval()
    batch, wanted, alone = draw_trunks()
    first = wanted[3]
    num = 4000
    copies = [dataclasses.replace(first, alternative=i) for i in range(num)]
    decoding = read(do_sample=True, temperature=0.7, top_k=6, top_p=0.97, max_new_tokens=1, batch_size=num)
    drawn = write_from_trunks(model, batch, copies, decoding)
    counts = torch.bincount(torch.tensor([reply[0] if reply else END for reply in drawn])).double()

    def warped(**settings):
        out = plain_generate(
            model,
            alone[3],
            max_new_tokens=1,
            do_sample=True,
            output_scores=True,
            return_dict_in_generate=True,
            **settings,
        )
        return out.scores[0][0].double().softmax(-1)

    probabilities = warped(temperature=0.7, top_k=6, top_p=0.97)
    (possible,) = probabilities.nonzero(as_tuple=True)
    assert 4 <= len(possible) <= 6
    counts = torch.nn.functional.pad(counts, (0, len(probabilities) - len(counts)))
    assert counts[possible].sum() == num  # what was cut off is never drawn
    assert chi_square(counts[possible], probabilities[possible]) < 20.5  # 0.1 % of fair draws exceed it, 5 degrees
    other = warped(temperature=1.0, top_k=6, top_p=1.0)
    assert chi_square(counts[possible], other[possible]) > 50


def test_a_draw_depends_on_nothing_but_its_own_stream(tiny_models):
    model = build_conversation(tiny_models["llama"]).eval()
    batch, wanted, alone = draw_trunks()
    state = torch.get_rng_state()
    whole = write_from_trunks(model, batch, wanted, read(**SAMPLED))
    assert torch.equal(torch.get_rng_state(), state)
    assert len({len(reply) for reply in whole}) > 2  # some end early, and the others go on undisturbed
    for batch_size in (1, 3):
        assert write_from_trunks(model, batch, wanted, read(**{**SAMPLED, "batch_size": batch_size})) == whole
    assert write_from_trunks(model, batch, wanted[::-1], read(**SAMPLED))[::-1] == whole
    assert write_from_trunks(model, batch, wanted[1::2], read(**SAMPLED)) == whole[1::2]
    assert [write_from_rows(model, b, [w], read(**SAMPLED))[0] for b, w in zip(alone, wanted, strict=True)] == whole
    short = write_from_trunks(model, batch, wanted, read(**{**SAMPLED, "max_new_tokens": 4}))
    assert short == [reply[:4] for reply in whole]


def test_seed_dialogue_turn_and_number_each_change_the_draws(tiny_models):
    model = build_conversation(tiny_models["llama"]).eval()
    batch, wanted, _ = draw_trunks()
    decoding = read(**{**SAMPLED, "temperature": 3.0, "top_k": 0})
    base = write_from_trunks(model, batch, wanted, decoding)
    assert base == write_from_trunks(model, batch, wanted, decoding)
    for change in ({"dialogue": "other"}, {"turn": 9}, {"alternative": 1}):
        others = [dataclasses.replace(w, **change) for w in wanted]
        found = write_from_trunks(model, batch, others, decoding)
        assert all(a != b for a, b in zip(base, found, strict=True))
    reseeded = write_from_trunks(model, batch, wanted, dataclasses.replace(decoding, seed=2))
    assert all(a != b for a, b in zip(base, reseeded, strict=True))


# ------------------------------------------------------------------------------------------------ refusals


def test_a_sliding_window_that_is_too_short_is_refused(tiny_models):
    model = build_conversation(tiny_models["mistral"]).eval()
    batch, wanted, alone = draw_trunks()
    needed = max(w.cut for w in wanted) + max(len(w.response) for w in wanted) + 10
    model.llm.config.sliding_window = needed
    fits = write_from_trunks(model, batch, wanted, read(**GREEDY))
    assert fits == [greedily(model, one) for one in alone]
    model.llm.config.sliding_window = needed - 1
    with pytest.raises(
        MsencError, match=rf"sliding window of {needed - 1} tokens, .* take up to {needed}.*layout=sample"
    ):
        write_from_trunks(model, batch, wanted, read(**GREEDY))

    # The way out works: one's own history, with the window the LLM was made with.
    model.llm.config.sliding_window = 8
    found = [write_from_rows(model, b, [w], read(**GREEDY))[0] for b, w in zip(alone, wanted, strict=True)]
    assert found == [greedily(model, one) for one in alone]
    assert found != fits


def test_an_llm_without_keys_and_values_per_token_is_refused(tmp_path):
    from transformers import Lfm2Config, Lfm2ForCausalLM

    config = Lfm2Config(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        layer_types=["conv", "full_attention"],
    )
    Lfm2ForCausalLM(config).save_pretrained(tmp_path)
    model = build_conversation(tmp_path, lora=None).eval()
    batch, wanted, alone = draw_trunks()
    with pytest.raises(MsencError, match=r"cache is a LinearAttention.*cannot be cut .*layout=sample"):
        write_from_trunks(model, batch, wanted, read(**GREEDY))
    assert write_from_rows(model, alone[0], wanted[:1], read(**GREEDY)) == [greedily(model, alone[0])]


def test_a_reply_stops_at_each_end_token_that_the_llm_names(tiny_models):
    model = build_conversation(tiny_models["llama"]).eval()
    batch, wanted, _ = draw_trunks()
    before = write_from_trunks(model, batch, wanted, read(**GREEDY))
    other = next(reply[2] for reply in before if len(reply) > 4)
    model.llm.generation_config.eos_token_id = [END, other]
    after = write_from_trunks(model, batch, wanted, read(**GREEDY))
    assert after == [reply[: reply.index(other)] if other in reply else reply for reply in before]
    assert after != before
