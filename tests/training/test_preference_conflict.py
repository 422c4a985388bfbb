"""A run that reads is taught to listen, in the generated world of the conflict test; what it knew has to be kept."""

import itertools

import torch
from conflict_world import PROMPT, SPECS, write_world

from msenc.data.conflict import find_conflicts
from msenc.data.datamodule import DialogueDataModule
from msenc.data.preferences import PreferenceDataModule
from msenc.evaluation.conflict import evaluate_conflict
from msenc.models.connector import Mlp
from msenc.models.conversation import ConversationModel
from msenc.models.llm import load_llm, load_tokenizer
from msenc.prompt import TOKEN_KINDS, DialogueTokenizer
from msenc.training.preference import PreferenceModule


def batches_of(datamodule):
    return list(datamodule._eval_loader("test", datamodule._eval_batches("test")))


def fit(module, loss, batches, steps):
    optimizer = torch.optim.AdamW(
        [
            {"params": module.model.llm.parameters(), "lr": 3e-4},
            {"params": module.model.connectors.parameters(), "lr": 1e-3},
        ]
    )
    for batch in itertools.islice(itertools.cycle(batches), steps):
        optimizer.zero_grad()
        loss(batch).backward()
        optimizer.step()


def measured(model, plain, batches, items):
    """The share of conflicts that follows the voice, and the loss of the data's voice descriptions."""
    (found,), _ = evaluate_conflict(model, plain, "test", items)
    kind = TOKEN_KINDS.index("description")
    with torch.no_grad():
        lost = torch.cat([model(batch).nll[batch.kinds == kind] for batch in batches])
    return found["follows_stream"], lost.mean().item()


def test_a_run_that_reads_learns_to_listen_and_keeps_its_voice_descriptions(tmp_path, demo_home):
    base = str(demo_home / "data" / "tiny-llm")
    tokenizer = DialogueTokenizer(PROMPT, load_tokenizer(base))
    world = write_world(tmp_path / "world", num=32, words_tell=True, is_planted=False, is_described=True)
    plain = DialogueDataModule(world, SPECS, tokenizer, batch_size=8)
    pairs = PreferenceDataModule(world, SPECS, tokenizer, pairs="conflict", labels=["Mood"], batch_size=8)
    for datamodule in (plain, pairs):
        datamodule.setup()
    items = find_conflicts(plain, "test", ["Mood"])
    torch.manual_seed(0)
    model = ConversationModel(load_llm(base), {"audio": Mlp(3, 96, num_queries=1, hidden_dim=32)}).eval()
    batches, silent = batches_of(plain), batches_of(plain)
    for batch in silent:
        for frames in batch.streams["audio"].features:
            frames.zero_()
    fit(PreferenceModule(model), lambda batch: model(batch).nll.mean(), silent, 60)
    followed, at_first = measured(model, plain, batches, items)
    assert followed < 0.1
    assert at_first < 0.1
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    lost = {}
    for rpo_alpha in (0.0, 1.0):
        model.load_state_dict(start, strict=False)
        module = PreferenceModule(model, rpo_alpha=rpo_alpha)
        module._start = {f"model.{name}": tensor for name, tensor in start.items()}
        fit(module, lambda batch, module=module: module.scores(batch)[0].mean(), batches_of(pairs), 80)
        followed, lost[rpo_alpha] = measured(model, plain, batches, items)
        assert followed > 0.9
    assert lost[1.0] < at_first + 0.1
    assert lost[0.0] > 4 * lost[1.0]
