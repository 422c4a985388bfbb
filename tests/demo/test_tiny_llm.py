import math
import random

import pytest
import torch

from msenc.config.build import build
from msenc.config.schema import plain
from msenc.demo.tiny_llm import (
    MISLEADING,
    PROMPT,
    pairs_of_turns,
    pretrain,
    tokenize_transcript,
    train_tokenizer,
)
from msenc.demo.world import state_words, transcripts
from msenc.models.llm import fingerprint, load_llm, load_tokenizer
from msenc.prompt import TOKEN_KINDS, DialogueTokenizer
from msenc.types import MsencError

SMALL = {"num_dialogues": 16, "hidden_size": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 400, "attempts": 1}


def test_the_folder_depends_on_the_seed_alone(tmp_path):
    prints = []
    for name, seed, noise in (("a", 1, 1), ("b", 1, 2), ("c", 2, 1)):
        torch.manual_seed(noise)
        random.seed(noise)
        before = torch.get_rng_state()
        pretrain(tmp_path / name, seed=seed, **SMALL)
        assert torch.equal(torch.get_rng_state(), before)
        prints.append(load_llm(str(tmp_path / name)).base_fingerprint)
    assert prints[0] == prints[1] != prints[2]
    vocabularies = [load_tokenizer(str(tmp_path / name)).get_vocab() for name in "ab"]
    assert vocabularies[0] == vocabularies[1]


def test_pretraining_lowers_the_loss_of_unseen_transcripts(tmp_path):
    pretrain(tmp_path / "llm", **{**SMALL, "num_dialogues": 300, "hidden_size": 48, "num_layers": 2})
    llm, tokenizer = load_llm(str(tmp_path / "llm")), load_tokenizer(str(tmp_path / "llm"))
    unseen = transcripts(310, seed=1)[300:]
    losses = []
    for demo in unseen:
        text = PROMPT.instruction
        labels = PROMPT.speaker_labels(demo.dialogue)
        for label, turn, utterance in zip(labels, demo.turns, demo.dialogue.utterances, strict=True):
            words = {stream: f" [{said}]" for stream, said in state_words(turn).items()}
            text += "".join(PROMPT.turn_pieces(label, utterance.text, (), words))
        ids = torch.tensor([tokenizer(text).input_ids])
        with torch.no_grad():
            losses.append(llm(ids, labels=ids).loss.item())
    assert sum(losses) / len(losses) < 0.5 * math.log(len(tokenizer))


def test_an_end_in_the_middle_leaves_no_folder(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def die(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", die)
        with pytest.raises(Killed):
            pretrain(tmp_path / "llm", **SMALL)
    assert not (tmp_path / "llm").exists()
    (tmp_path / ".llm.partial").mkdir()
    (tmp_path / ".llm.partial" / "left.txt").write_text("by a process that was killed while it wrote")
    pretrain(tmp_path / "llm", **SMALL)
    assert [p.name for p in tmp_path.iterdir()] == ["llm"]
    assert not (tmp_path / "llm" / "left.txt").exists()
    assert len(fingerprint(load_llm(str(tmp_path / "llm")))) == 16


def test_any_text_has_tokens_and_comes_back():
    tokenizer = train_tokenizer(transcripts(20, seed=1), PROMPT, 400)
    rng = random.Random(0)
    for _ in range(100):
        text = "".join(chr(rng.choice([rng.randrange(32, 127), rng.randrange(160, 0x2FFF)])) for _ in range(20))
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert tokenizer("Hi").input_ids[0] == tokenizer.bos_token_id
    # the words that decide are one token each, so that one position decides a bit
    big = train_tokenizer(transcripts(300, seed=1), PROMPT, 1024)
    for word in ("calm", "excited", "sad", "happy", "inside", "outside", "flat", "expressive"):
        assert len(big(f" {word}", add_special_tokens=False).input_ids) == 1, word


def test_transcripts_share_no_tokens_with_slots(tmp_path):
    tokenizer = train_tokenizer(transcripts(20, seed=1), PROMPT, 400)
    demo = transcripts(1, seed=1)[0]
    words = [{stream: f" [{said}]" for stream, said in state_words(turn).items()} for turn in demo.turns]
    tokens = DialogueTokenizer(PROMPT, tokenizer)(demo.dialogue, [()] * len(words), words)
    for block, said, utterance in zip(tokens.turns, words, demo.dialogue.utterances, strict=True):
        text = "".join(tokenizer.decode(list(piece)) for piece in block)
        assert text == f"{utterance.speaker}:{said['video']}{said['audio']} {utterance.text}\n"
    # written-out moods do not count against the history's budget, as slots do not
    assert tokens.turn_tokens == DialogueTokenizer(PROMPT, tokenizer)(demo.dialogue, [()] * len(words)).turn_tokens


def test_its_prompt_is_the_default_one(compose):
    assert build(plain(compose(["modality=text"]).prompt), "prompt") == PROMPT


def test_another_recipe_for_a_folder_that_is_there_is_said(tmp_path, capsys):
    pretrain(tmp_path / "llm", **SMALL)
    before = load_llm(str(tmp_path / "llm")).base_fingerprint
    capsys.readouterr()
    pretrain(tmp_path / "llm", **SMALL)
    assert capsys.readouterr().out == ""
    pretrain(tmp_path / "llm", **{**SMALL, "seed": 5})
    assert "seed=1, not 5" in " ".join(capsys.readouterr().out.split())
    assert load_llm(str(tmp_path / "llm")).base_fingerprint == before


def test_pairs_are_a_turn_and_its_reply_with_the_parity_alone_first():
    demos = transcripts(60, seed=1)
    tokenize = DialogueTokenizer(PROMPT, train_tokenizer(demos, PROMPT, 400))
    dialogues = [tokenize_transcript(d, tokenize, 0.0, random.Random(1)) for d in demos]
    pairs = pairs_of_turns(dialogues, random.Random(1))
    whole = [(d.turns[at], d.targets[at]) for d in dialogues for at in range(len(d.targets))]
    assert all(len(p.targets) == len(p.responses) == 1 and len(p.turns) == len(p.turn_tokens) == 2 for p in pairs)
    assert all((p.turns[0], p.targets[0]) in whole for p in pairs)
    parity, place = (TOKEN_KINDS.index(f"planted_{kind}") for kind in ("both", "text"))
    num_parity = sum(parity in target.kinds for _, target in whole)
    kinds = [set(p.targets[0].kinds) for p in pairs]
    assert all(parity in k for k in kinds[:num_parity])
    # then all kinds among each other, no pair of the hard ones left out
    assert sum(parity in k for k in kinds[num_parity:]) == num_parity
    # and the misleading ones, whose turn answers about another place, several times
    in_a_row = [
        (d.turns[at], d.targets[at])
        for d in dialogues
        for at in range(1, len(d.targets))
        if all(place in target.kinds for target in d.targets[at - 1 : at + 1])
    ]
    assert in_a_row
    assert all(sum((p.turns[0], p.targets[0]) == one for p in pairs) == 1 + MISLEADING for one in in_a_row)
    total = sum(place in target.kinds for _, target in whole) + MISLEADING * len(in_a_row)
    assert sum(place in k for k in kinds) == total
    assert any(not {parity, place} & k for k in kinds)


def test_what_nothing_tells_carries_no_weight_before_the_last_lesson():
    demos = transcripts(60, seed=1)
    tokenize = DialogueTokenizer(PROMPT, train_tokenizer(demos, PROMPT, 400))
    rng, seen = random.Random(1), set()
    for demo in demos:
        full, some = (tokenize_transcript(demo, tokenize, silence, rng) for silence in (0.0, 0.5))
        last = tokenize_transcript(demo, tokenize, 0.5, rng, weigh_untold=True)
        assert last.targets == full.targets
        text = tokenize.tokenizer.decode([i for block in some.turns for piece in block for i in piece])
        told = {stream for stream in ("audio", "video") if f"{ {'audio': 'voice', 'video': 'face'}[stream] }]" in text}
        seen.add(frozenset(told))
        known = {"text", *told} | ({"both"} if len(told) == 2 else set())
        for before, after in zip(full.targets, some.targets, strict=True):
            assert after.ids == before.ids
            wanted = {TOKEN_KINDS[k] for k in before.kinds}
            wanted -= {f"planted_{kind}" for kind in {"audio", "video", "both"} - known}
            assert {k for k in map(TOKEN_KINDS.__getitem__, after.kinds) if "planted" in k} == {
                k for k in wanted if "planted" in k
            }
    assert len(seen) == 4


def test_it_says_when_planted_words_were_not_learned(tmp_path, monkeypatch, capsys):
    pretrain(tmp_path / "a", **SMALL)
    assert "has not learned all planted words" in " ".join(capsys.readouterr().out.split())
    monkeypatch.setattr("msenc.demo.tiny_llm.LEARNED", math.inf)
    pretrain(tmp_path / "b", **SMALL)
    assert "has not learned" not in capsys.readouterr().out


def test_attempts_begin_anew_and_the_best_is_kept(tmp_path, monkeypatch):
    for name, attempts, losses in (("first", 1, [0.3]), ("second", 3, [0.4, 0.3, 0.5]), ("learned", 9, [0.4, 0.01])):
        measured = iter(losses)
        monkeypatch.setattr("msenc.demo.tiny_llm._planted_loss", lambda *_, m=measured: next(m))
        pretrain(tmp_path / name, **{**SMALL, "attempts": attempts})
    first, second, learned = (load_llm(str(tmp_path / n)).base_fingerprint for n in ("first", "second", "learned"))
    assert first != second == learned


def test_what_is_not_told_is_the_last_lesson_at_a_low_rate(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(
        "msenc.demo.tiny_llm._fit", lambda llm, lessons, what, size, rate: given.append((lessons, rate))
    )
    monkeypatch.setattr("msenc.demo.tiny_llm._planted_loss", lambda *_: 0.0)
    monkeypatch.setattr("msenc.demo.tiny_llm.LAST_SILENCE", 1.0)
    pretrain(tmp_path / "llm", **{**SMALL, "num_dialogues": 60}, silence=1.0, learning_rate=1e-3)
    (_, first), (whole, second), (doubts, last) = given
    assert (first, second, last) == (1e-3, 1e-3, pytest.approx(5e-5))
    assert [[t.ids for t in d.targets] for d in doubts] == [[t.ids for t in d.targets] for d in whole]
    both = TOKEN_KINDS.index("planted_both")
    assert [any(both in t.kinds for d in lesson for t in d.targets) for lesson in (whole, doubts)] == [False, True]


def test_one_transcript_is_enough_to_run(tmp_path):
    pretrain(tmp_path / "llm", **{**SMALL, "num_dialogues": 1})
    assert (tmp_path / "llm").is_dir()


def test_of_another_world_it_reads_no_cue_and_is_judged_by_the_text(tmp_path, monkeypatch):
    given, judged = [], []
    monkeypatch.setattr("msenc.demo.tiny_llm._fit", lambda llm, lessons, *_: given.append(lessons))
    monkeypatch.setattr("msenc.demo.tiny_llm._planted_loss", lambda llm, unseen, _: judged.append(unseen) or 0.0)
    pretrain(tmp_path / "llm", **{**SMALL, "num_dialogues": 60}, world="beats")
    tokenizer = load_tokenizer(str(tmp_path / "llm"))
    pairs, whole, doubts = given
    for lesson in given:
        for dialogue in lesson:
            text = "".join(tokenizer.decode(list(piece)) for block in dialogue.turns for piece in block)
            assert "[" not in text
            assert ": " in text

    def planted(dialogues):
        return {TOKEN_KINDS[k] for d in dialogues for t in d.targets for k in t.kinds if "planted" in TOKEN_KINDS[k]}

    assert planted(pairs) == planted(whole) == planted(judged[0]) == {"planted_text"}
    assert planted(doubts) == {"planted_text", "planted_audio", "planted_video", "planted_both"}
    assert '"world": "beats"' in (tmp_path / "llm" / "recipe.json").read_text()


def test_a_recipe_of_the_demo_names_no_world(tmp_path):
    pretrain(tmp_path / "llm", **SMALL)
    assert "world" not in (tmp_path / "llm" / "recipe.json").read_text()
    with pytest.raises(MsencError, match="'beets'; expected one of demo, beats, graded"):
        pretrain(tmp_path / "other", **SMALL, world="beets")
