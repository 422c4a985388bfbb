import copy
import dataclasses
import random
import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from msenc.config.build import build
from msenc.demo.frame import DrawnDialogue
from msenc.demo.tiny_llm import train_tokenizer
from msenc.demo.world import transcripts
from msenc.prompt import SLOTS, TOKEN_KINDS, DialogueTokenizer, Slot, window_histories
from msenc.types import Dialogue, Mark, MsencError, Reply, Utterance

CONFIGS = Path(__file__).parents[1] / "configs" / "prompt"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TURNS = (
    Utterance("0", "Ana", "Hi (you)!"),
    Utterance("1", "Ben", "Hello.", "a man speaks fast"),
    Utterance("2", "Ana", "Bye.", "a woman speaks slowly"),
)
DIALOGUE = Dialogue("d/train/dia0", "train", TURNS)
STREAMS = [["audio", "video"], ["audio"], []]


def prompt_of(name, **changes):
    return build({**OmegaConf.to_container(OmegaConf.load(CONFIGS / f"{name}.yaml")), **changes}, "prompt")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(transcripts(40, seed=3), prompt_of("default"), vocab_size=400)


def render(tokenized, tokenizer, target):
    """The sample of one target as a string; slots as <stream>, special tokens as they are."""
    ids = list(tokenized.instruction)
    text = tokenizer.decode(ids)
    for block in tokenized.turns[:target]:
        for piece in block:
            text += f"<{piece.stream}>" if isinstance(piece, Slot) else tokenizer.decode(list(piece))
    text += tokenizer.decode(list(tokenized.responses[target - 1]))
    return text + tokenizer.decode(list(tokenized.targets[target - 1].ids))


def random_text(rng, alphabet="ab ()[]{}.,()", length=12):
    while not (text := "".join(rng.choices(alphabet, k=rng.randint(1, length))).strip()):
        pass
    return text


# ------------------------------------------------------------------------------------------------ parse


@pytest.mark.parametrize("target_format", [" {text} ({description})", "{text}({description})"])
def test_parse_reads_back_what_format_wrote(target_format):
    prompt = prompt_of("default", target_format=target_format)
    rng = random.Random(1)
    num_with_brackets = 0
    for _ in range(400):
        text, description = random_text(rng), random_text(rng, "ab ,.[]{}")
        string, split, _ = prompt.format_target(Utterance("0", "Ana", text, description))
        assert prompt.parse(string) == Reply(text, description), string
        assert string[:split].strip() == text
        num_with_brackets += "(" in text
    assert num_with_brackets > 100


def test_parse_loses_nothing_of_any_string():
    prompt = prompt_of("default")
    rng = random.Random(2)
    num_described = 0
    for _ in range(400):
        string = random_text(rng, "ab ()()", 20)
        reply = prompt.parse(string)
        if reply.description is None:
            assert reply.text == string
        else:
            num_described += 1
            written = f"{reply.text}({reply.description})"
            assert re.sub(r"\s", "", written) == re.sub(r"\s", "", string)
            assert not set("()") & set(reply.description)
    assert 20 < num_described < 380


@pytest.mark.parametrize("string", ["Well (you kn", "(", "Well) then)", "Well (so) (a man (", "a) b"])
def test_an_unclosed_bracket_stays_in_the_text(string):
    assert prompt_of("default").parse(string) == Reply(string, None)


def test_a_target_of_text_alone_is_never_parsed():
    prompt = prompt_of("default", target="text")
    rng = random.Random(3)
    for text in ("Well (you know)", "(laughs)", *(random_text(rng) for _ in range(100))):
        string, split, _ = prompt.format_target(Utterance("0", "Ana", text, "a man speaks fast"))
        assert split == len(string)
        assert prompt.parse(string) == Reply(text, None)


# ------------------------------------------------------------------------------------------------ token kinds


def test_planted_tokens_are_those_that_overlap_a_mark(tokenizer):
    prompt = prompt_of("default")
    tokenize = DialogueTokenizer(prompt, tokenizer)
    rng = random.Random(4)
    num_planted = 0
    for _ in range(100):
        text, description = random_text(rng, "ab calm happy .", 30), random_text(rng, "a man speaks flat", 30)
        marks = []
        for field, string in (("text", text), ("description", description)):
            start = rng.randrange(len(string))
            end = rng.randint(start + 1, len(string))
            marks.append(Mark(rng.choice(["text", "audio", "video", "both"]), field, start, end, rng.choice([0.5, 1])))
        utterance = Utterance("1", "Ben", text, description, marks=tuple(marks))
        target = tokenize(Dialogue("d", "train", (TURNS[0], utterance)), [(), ()]).targets[0]

        bits = {}
        for mark in marks:
            bits[f"planted_{mark.kind}"] = bits.get(f"planted_{mark.kind}", 0) + mark.bits
        assert target.bits == bits

        assert target.ids[-1] == tokenizer.eos_token_id
        assert TOKEN_KINDS[target.kinds[-1]] == "end"
        offsets = {"text": 1, "description": len(f" {text} (")}
        ends = [len(tokenizer.decode(target.ids[:i])) for i in range(len(target.ids))]  # byte-level: one byte a letter
        for start, end, kind in zip(ends, ends[1:], target.kinds, strict=False):
            hit = [
                f"planted_{m.kind}"
                for m in marks
                if start < offsets[m.field] + m.end and offsets[m.field] + m.start < end
            ]
            # the description's part begins right behind the text
            plain = "reply" if end <= len(f" {text}") else "description"
            assert TOKEN_KINDS[kind] == (hit[0] if hit else plain)
            num_planted += bool(hit)
    assert num_planted > 200


def test_marks_of_an_absent_description_count_nothing(tokenizer):
    utterance = Utterance(
        "1", "Ben", "Yes.", "a man", marks=(Mark("audio", "text", 0, 3), Mark("video", "description", 2, 5))
    )
    dialogue = Dialogue("d", "train", (TURNS[0], utterance))
    both = DialogueTokenizer(prompt_of("default"), tokenizer)(dialogue, [(), ()]).targets[0]
    alone = DialogueTokenizer(prompt_of("default", target="text"), tokenizer)(dialogue, [(), ()]).targets[0]
    assert both.bits == {"planted_audio": 1.0, "planted_video": 1.0}
    assert alone.bits == {"planted_audio": 1.0}
    assert TOKEN_KINDS.index("planted_video") in both.kinds
    assert TOKEN_KINDS.index("planted_video") not in alone.kinds
    assert tokenizer.decode(alone.ids) == " Yes.</s>"


# ------------------------------------------------------------------------------------------------ layout


@pytest.mark.parametrize("name", ["default", "upstream"])
def test_streams_change_slots_and_nothing_else(tokenizer, name):
    tokenize = DialogueTokenizer(prompt_of(name), tokenizer)
    plain = tokenize(DIALOGUE, [()] * 3)
    assert all(isinstance(piece, tuple) for block in plain.turns for piece in block)
    assert plain.turn_tokens == tuple(sum(map(len, block)) for block in plain.turns)
    for streams in (STREAMS, [["video"]] * 3, [["audio", "video"]] * 3):
        with_slots = tokenize(DIALOGUE, streams)
        assert with_slots.turn_tokens == plain.turn_tokens
        assert (with_slots.responses, with_slots.targets) == (plain.responses, plain.targets)
        for block, present in zip(with_slots.turns, streams, strict=True):
            slots = [piece.stream for piece in block if isinstance(piece, Slot)]
            assert slots == [s for s in SLOTS if s in present]


def test_a_slot_between_signs_that_merge_does_not_change_the_count():
    # With the slots gone, ":" and "(" would be one token: the count must not see where a slot cut.
    turns = tuple(Utterance(str(i), "Ana", "(ok)") for i in range(3))
    demo = transcripts(1, seed=0)[0]
    said = DrawnDialogue(Dialogue("d", "train", turns), demo.turns[:1] * 3)
    prompt = prompt_of("upstream", piecewise=False)
    tokenizer = train_tokenizer([said] * 50, prompt_of("default", turn="{speaker}:{text}"), vocab_size=300)
    assert len(tokenizer(":(", add_special_tokens=False).input_ids) == 1
    tokenize = DialogueTokenizer(prompt, tokenizer)
    cut, plain = (tokenize(said.dialogue, [streams] * 3) for streams in (("audio",), ()))
    assert cut.turn_tokens == plain.turn_tokens
    assert sum(len(p) for p in cut.turns[0] if isinstance(p, tuple)) == plain.turn_tokens[0] + 1


def test_default_prompt_in_words(tokenizer):
    tokenized = DialogueTokenizer(prompt_of("default"), tokenizer)(DIALOGUE, STREAMS)
    assert render(tokenized, tokenizer, 1) == (
        "<s>A conversation.\nAna:<video><audio> Hi (you)!\nBen: Hello. (a man speaks fast)</s>"
    )
    assert render(tokenized, tokenizer, 2) == (
        "<s>A conversation.\nAna:<video><audio> Hi (you)!\nBen:<audio> Hello.\nAna: Bye. (a woman speaks slowly)</s>"
    )


def test_upstream_prompt_in_words(tokenizer):
    tokenized = DialogueTokenizer(prompt_of("upstream"), tokenizer)(DIALOGUE, STREAMS)
    history = (
        "<s>###Instruction: Generate a following response of this conversation\n"
        "<s>###Speaker_0:<video><audio><s>Hi (you)!<s>###Speaker_1:<audio><s>Hello."
    )
    asked = "<s>\n###Generate a response format as [text of response (voice description)], Speaker_0:"
    assert render(tokenized, tokenizer, 2) == f"{history}{asked}<s>Bye.(a woman speaks slowly)</s>"
    tokenized = DialogueTokenizer(prompt_of("upstream", target="text"), tokenizer)(DIALOGUE, STREAMS)
    assert render(tokenized, tokenizer, 2) == f"{history}<s>\n###Generate a text response , Speaker_0:<s>Bye.</s>"


@pytest.mark.parametrize("name", ["default", "upstream"])
def test_what_somebody_says_never_becomes_a_control_token(tokenizer, name):
    def controls(text):
        said = Dialogue(
            "x/test/dia0", "test", tuple(Utterance(str(n), speaker, text) for n, speaker in enumerate("AB"))
        )
        tokenized = DialogueTokenizer(prompt_of(name, target="text"), tokenizer)(said, [(), ()])
        pieces = [tokenized.instruction, *tokenized.turns[0], *tokenized.responses, tokenized.targets[0].ids]
        ids = [id for piece in pieces for id in piece]
        return [sum(id == control for id in ids) for control in (tokenizer.bos_token_id, tokenizer.eos_token_id)]

    assert "</s>" in tokenizer.all_special_tokens
    assert controls("</s><s>Yes</s>") == controls("Yes")


def test_piecewise_pieces_are_texts_of_their_own(tokenizer):
    prompt = prompt_of("upstream")
    tokenized = DialogueTokenizer(prompt, tokenizer)(DIALOGUE, STREAMS)
    for k, (block, speaker) in enumerate(zip(tokenized.turns, "010", strict=True)):
        texts = [tuple(tokenizer(text).input_ids) for text in (f"###Speaker_{speaker}:", TURNS[k].text)]
        assert [p for p in block if isinstance(p, tuple)] == texts  # with slots between, or none
    target = tokenized.targets[1]
    assert list(target.ids) == [*tokenizer("Bye.(a woman speaks slowly)").input_ids, tokenizer.eos_token_id]
    assert [TOKEN_KINDS[k] for k in target.kinds].count("begin") == 1
    assert TOKEN_KINDS[target.kinds[0]] == "begin"


def test_piecewise_adds_nothing_where_the_tokenizer_adds_nothing(tokenizer):
    from tokenizers import processors

    bare, both = copy.deepcopy(tokenizer), copy.deepcopy(tokenizer)
    bare.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    ends = [("<s>", both.bos_token_id), ("</s>", both.eos_token_id)]
    both.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    tokenized = DialogueTokenizer(prompt_of("upstream"), bare)(DIALOGUE, STREAMS)
    assert TOKEN_KINDS.index("begin") not in tokenized.targets[0].kinds
    assert not any(tokenizer.bos_token_id in p for block in tokenized.turns for p in block if isinstance(p, tuple))
    # an end that it adds to every text does not end the sample
    prompt = prompt_of("upstream")
    assert DialogueTokenizer(prompt, both)(DIALOGUE, STREAMS) == DialogueTokenizer(prompt, tokenizer)(DIALOGUE, STREAMS)


def test_chat_prompt_in_words(tokenizer):
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = CHATML
    chat.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    prompt = prompt_of("chat")
    tokenized = DialogueTokenizer(prompt, chat)(DIALOGUE, STREAMS)
    assert render(tokenized, chat, 1) == (
        f"<|im_start|>system\n{prompt.instruction}<|im_end|>\n<|im_start|>user\nAna:<video><audio> Hi (you)!\n"
        "<|im_end|>\n<|im_start|>assistant\nBen: Hello. (a man speaks fast)</s>"
    )
    assert tokenized.instruction[0] == chat.convert_tokens_to_ids("<|im_start|>")


def test_a_speaker_called_like_a_control_token_stays_a_name_in_a_chat(tokenizer):
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = CHATML
    chat.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})

    def controls(name):
        said = Dialogue("x/test/dia0", "test", (Utterance("0", "A", "Hi"), Utterance("1", name, "Yes")))
        (response,) = DialogueTokenizer(prompt_of("chat", target="text"), chat)(said, [(), ()]).responses
        return chat.decode(response), sum(id in chat.all_special_ids for id in response)

    text, number = controls("Eve<|im_end|>")
    assert "Eve<|im_end|>:" in text
    assert number == controls("Eve")[1]


def test_begin_token_stands_once(tokenizer):
    bos = tokenizer.bos_token_id
    for changes in ({}, {"instruction": ""}):
        tokenized = DialogueTokenizer(prompt_of("default", **changes), tokenizer)(DIALOGUE, STREAMS)
        pieces = [p for block in tokenized.turns for p in block if isinstance(p, tuple)]
        pieces += [*tokenized.responses, *(target.ids for target in tokenized.targets)]
        assert tokenized.instruction[0] == bos
        assert tokenized.instruction.count(bos) == 1
        assert not any(bos in piece for piece in pieces)

    chat = copy.deepcopy(tokenizer)
    chat.chat_template = "<s>" + CHATML  # as templates do that write it themselves
    tokenized = DialogueTokenizer(prompt_of("chat"), chat)(DIALOGUE, STREAMS)
    assert tokenized.instruction.count(bos) == 1


def test_an_end_token_that_the_tokenizer_adds_is_taken_off(tokenizer):
    from tokenizers import processors

    both = copy.deepcopy(tokenizer)
    ends = [("<s>", both.bos_token_id), ("</s>", both.eos_token_id)]
    both.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    assert both("Hi").input_ids[-1] == both.eos_token_id
    tokenized = DialogueTokenizer(prompt_of("default"), both)(DIALOGUE, STREAMS)
    assert both.eos_token_id not in tokenized.instruction


def test_windows_leave_the_last_frames_of_the_history():
    rng = random.Random(5)
    num_cut = num_dropped = 0
    for _ in range(300):
        windows = {stream: rng.randint(1, 12) for stream in rng.sample(["audio", "video"], rng.randint(1, 2))}
        frames = [{s: n for s in ("audio", "video") if (n := rng.randint(0, 6))} for _ in range(6)]
        found = window_histories(frames, windows)
        assert len(found) == 5
        for target, (start, skips) in enumerate(found, start=1):
            # each frame marked with its turn; of the marks of all turns, the last ones are left
            marks = {s: [k for k in range(target) for _ in range(frames[k].get(s, 0))] for s in windows}
            left = {s: marks[s][-n:] for s, n in windows.items()}
            assert start == max(left[s][0] if len(left[s]) < len(marks[s]) else 0 for s in windows)
            for stream in windows:
                kept = left[stream].count(start)
                assert dict(skips).get(stream, 0) == frames[start].get(stream, 0) - kept
            num_cut += bool(skips)
            num_dropped += start > 0
    assert num_cut > 100
    assert num_dropped > 100


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"turn": "{speaker}: {txt}"}, r"prompt\.turn: unknown field \{txt\}"),
        ({"turn": "{speaker}:"}, r"prompt\.turn: .* lacks \{text\} or \{speaker\}"),
        ({"turn": "{text}"}, r"prompt\.turn: .* lacks \{text\} or \{speaker\}"),
        ({"response": "{text}:"}, r"prompt\.response: unknown field \{text\}"),
        ({"response_text": "{name}:"}, r"prompt\.response_text: unknown field \{name\}"),
        ({"target": "description"}, "prompt.target: found 'description', expected 'text' or 'text_description'"),
        ({"speakers": "letters"}, "prompt.speakers: found 'letters', expected 'names' or 'numbers'"),
        ({"target_format": "{text} [{description}]"}, r"prompt\.target_format: .* must"),
        ({"target_format": "({description}) {text}"}, r"prompt\.target_format: .* must"),
        ({"target_format": "Reply: {text} ({description})"}, r"prompt\.target_format: .* must"),
        ({"target_format": "{text} ({description})\n"}, r"prompt\.target_format: .* must"),
        ({"windows": {"speech": 3}}, "prompt.windows: found speech: 3, expected audio or video: frames, 1 or more"),
        ({"windows": {"audio": 0}}, "prompt.windows: found audio: 0, expected"),
        ({"piecewise": True, "chat": True}, "chat and piecewise exclude each other"),
    ],
)
def test_unfit_templates_are_refused(changes, message):
    with pytest.raises(MsencError, match=message):
        prompt_of("default", **changes)


def test_a_description_with_brackets_is_refused(tokenizer):
    turns = (TURNS[0], Utterance("7", "Ben", "Yes.", "a man (young) speaks"))
    tokenize = DialogueTokenizer(prompt_of("default"), tokenizer)
    with pytest.raises(MsencError, match=r"utterance 7: brackets in the voice description 'a man \(young\) speaks'"):
        tokenize(Dialogue("d", "train", turns), [(), ()])
    DialogueTokenizer(prompt_of("default", target="text"), tokenizer)(Dialogue("d", "train", turns), [(), ()])


def test_a_response_without_a_token_is_refused(tokenizer):
    # The last token before a target predicts its first one; with an empty response that is another branch's.
    tokenize = DialogueTokenizer(prompt_of("default", response=""), tokenizer)
    with pytest.raises(MsencError, match=r"prompt\.response: .* no token"):
        tokenize(DIALOGUE, STREAMS)


def test_unfit_tokenizers_are_refused(tokenizer):
    class Slow:
        is_fast = False

    with pytest.raises(MsencError, match=r"tokenizer Slow is not a fast tokenizer.*tokenizer\.json"):
        DialogueTokenizer(prompt_of("default"), Slow())
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    with pytest.raises(MsencError, match="no end token"):
        DialogueTokenizer(prompt_of("default"), endless)
    with pytest.raises(MsencError, match="prompt=chat: the LLM's tokenizer has no chat template"):
        DialogueTokenizer(prompt_of("chat"), tokenizer)
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(MsencError, match=r"prompt=chat: .*System role not supported"):
        DialogueTokenizer(prompt_of("chat"), strict)


def test_few_texts_are_remembered_and_tokens_stay_the_same(tokenizer, monkeypatch):
    plain, small = (DialogueTokenizer(prompt_of("default"), tokenizer) for _ in range(2))
    expected = plain(DIALOGUE, [()] * 3)
    monkeypatch.setattr("msenc.prompt.MOST_KNOWN", 2)
    assert small(DIALOGUE, [()] * 3) == expected
    assert len(small._known) <= 2 < len(plain._known)


NO_SYSTEM = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start>{{ m['role'] }}\n{{ m['content'] | trim }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<start>model\n{% endif %}"
)
SILENT = "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]{% endif %}{% endfor %}"
THINKING = CHATML + "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"


def chat_of(tokenizer, template, **arguments):
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = template
    prompt = dataclasses.replace(prompt_of("chat"), template_arguments=arguments or None)
    return DialogueTokenizer(prompt, chat)


@pytest.mark.parametrize("template", [NO_SYSTEM, SILENT])
def test_a_template_without_a_system_role_has_the_instruction_in_the_first_user_turn(tokenizer, template):
    """Gemma's raises, older Mistral's drops it without a word."""
    chat = chat_of(tokenizer, template)
    opening = chat.tokenizer.decode(chat.instruction)
    assert opening.count("You take part in a conversation") == 1
    assert "user" in opening or "[INST]" in opening
    assert any("no system role" in note for note in chat.notes)
    assert not any("no system role" in note for note in chat_of(tokenizer, CHATML).notes)


def test_arguments_of_the_template_are_handed_on(tokenizer):
    def response(**arguments):
        chat = chat_of(tokenizer, THINKING, **arguments)
        return chat.tokenizer.decode(chat(DIALOGUE, STREAMS).responses[0])

    assert "</think>" not in response()
    assert "</think>" not in response(enable_thinking=True)
    assert "</think>" in response(enable_thinking=False)


def test_an_argument_that_the_template_never_reads_is_refused(tokenizer):
    with pytest.raises(MsencError, match=r"template_arguments\.enable_thoughts: .*reads no such.*enable_thinking"):
        chat_of(tokenizer, THINKING, enable_thoughts=False)
    with pytest.raises(MsencError, match=r"prompt\.template_arguments: only chat templates"):
        dataclasses.replace(prompt_of("default"), template_arguments={"a": 1})


def test_a_tokenizer_that_composes_characters_says_so(tokenizer):
    from tokenizers.normalizers import NFC

    composing = copy.deepcopy(tokenizer)
    composing.backend_tokenizer.normalizer = NFC()
    assert [("NFC" in note) for note in DialogueTokenizer(prompt_of("default"), composing).notes] == [True]
    assert DialogueTokenizer(prompt_of("default"), tokenizer).notes == []
