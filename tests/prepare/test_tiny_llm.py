import math
import random

import pytest
import torch

from msenc.config import build, plain
from msenc.models.llm import fingerprint, load_llm, load_tokenizer
from msenc.prepare.demo import state_words, transcripts
from msenc.prepare.tiny_llm import PROMPT, pretrain, train_tokenizer
from msenc.prompt import DialogueTokenizer

SMALL = {"num_dialogues": 16, "hidden_size": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 400}


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
    (tmp_path / "llm.partial").mkdir()
    (tmp_path / "llm.partial" / "left.txt").write_text("by a process that was killed while it wrote")
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
    assert build(plain(compose(["modality=text"]).prompt)) == PROMPT


def test_another_recipe_for_a_folder_that_is_there_is_said(tmp_path, capsys):
    pretrain(tmp_path / "llm", **SMALL)
    before = load_llm(str(tmp_path / "llm")).base_fingerprint
    capsys.readouterr()
    pretrain(tmp_path / "llm", **SMALL)
    assert capsys.readouterr().out == ""
    pretrain(tmp_path / "llm", **{**SMALL, "seed": 5})
    assert "seed=1, not 5" in " ".join(capsys.readouterr().out.split())
    assert load_llm(str(tmp_path / "llm")).base_fingerprint == before
