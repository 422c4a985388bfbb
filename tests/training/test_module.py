from functools import partial

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from random_dialogues import DIMS, NUM_QUERIES, draw_dialogue
from torch.utils.data import DataLoader

from msenc.data.collate import collate, dialogue_rows
from msenc.models.connector import QFormer, tie
from msenc.models.conversation import ConversationModel
from msenc.models.llm import load_llm
from msenc.training.module import ConversationModule
from msenc.training.schedules import epoch_decay, warmup_cosine
from msenc.types import MsencError

LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0}


def make_batches(sizes, seed=0, **options):
    """Batches of so many dialogues; the same dialogues in the same order, however they are cut."""
    rng = np.random.default_rng(seed)
    drawn = [draw_dialogue(rng, int(rng.integers(2, 7)), f"d{i}", **options) for i in range(sum(sizes))]
    batches, at = [], 0
    for size in sizes:
        chosen = drawn[at : at + size]
        at += size
        rows = [dialogue_rows(d, 10**6, NUM_QUERIES) for d, _ in chosen]
        batches.append(collate([d for d, _ in chosen], [f for _, f in chosen], rows, NUM_QUERIES, pack=True))
    return batches


def loader(batches):
    return DataLoader(batches, batch_size=None, collate_fn=lambda batch: batch)


def make_module(
    folder, freeze=False, lora=LORA, streams=("audio", "video"), lr=0.5, tied=False, width=8, optimizer=None
):
    torch.manual_seed(0)
    llm = load_llm(str(folder), freeze, lora)
    small = {"num_layers": 1, "hidden_dim": width, "num_heads": 2, "encoder_dim": 8, "dropout": 0.0}
    connectors = {s: QFormer(DIMS[s], 16, num_queries=2 if tied else NUM_QUERIES[s], **small) for s in streams}
    if tied:
        tie(connectors)
    return ConversationModule(
        ConversationModel(llm, connectors), optimizer or (lambda parameters: torch.optim.SGD(parameters, lr=lr))
    )


def make_trainer(folder, max_steps=1, **options):
    silent = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    options = {"enable_checkpointing": False, "max_epochs": -1, "max_steps": max_steps, **silent, **options}
    return L.Trainer(default_root_dir=folder, **options)


def fit(module, batches, folder, max_steps=1, **options):
    module.train()
    trainer = make_trainer(folder, max_steps, **options)
    trainer.fit(module, loader(batches))
    return trainer


def parameters_of(module):
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:.*in eval mode",
    "ignore:.*logging interval",
    "ignore:.*no `val_dataloader`",
)


# ------------------------------------------------------------------------------------------------ the rate


class Rates(Callback):
    """The rate of each step that is taken."""

    def __init__(self):
        self.of_steps = []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.of_steps.append(optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        (partial(epoch_decay, gamma=0.5), [0.4, 0.4, 0.2, 0.2, 0.1, 0.1]),
        (partial(warmup_cosine, warmup=1 / 3), [0, 0.2, 0.4, 0.4 * (2 + 2**0.5) / 4, 0.2, 0.4 * (2 - 2**0.5) / 4]),
        (None, [0.4] * 6),
    ],
)
def test_each_step_is_taken_at_the_rate_of_the_schedule(tiny_models, tmp_path, scheduler, expected, accumulated):
    module = ConversationModule(make_module(tiny_models["llama"]).model, partial(torch.optim.SGD, lr=0.4), scheduler)
    rates = Rates()
    options = {"max_steps": -1, "max_epochs": 3, "accumulate_grad_batches": accumulated, "callbacks": [rates]}
    fit(module, make_batches([1] * 2 * accumulated), tmp_path, **options)
    assert rates.of_steps == pytest.approx(expected)


# ------------------------------------------------------------------------------------------------ the step


def test_a_token_weighs_the_same_however_the_batch_is_cut(tiny_models, tmp_path):
    start = parameters_of(make_module(tiny_models["llama"]))
    results = []
    for sizes in ([4], [2, 2], [3, 1], [1, 1, 1, 1]):
        module = make_module(tiny_models["llama"])
        trainer = fit(module, make_batches(sizes), tmp_path, accumulate_grad_batches=len(sizes))
        assert trainer.global_step == 1
        results.append(parameters_of(module))
    moved = {name for name, p in start.items() if not torch.equal(p, results[0][name])}
    assert any("lora_B" in name for name in moved)
    assert any("connectors.video.core" in name for name in moved)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-4, atol=1e-6)


def test_the_last_step_of_an_epoch_may_see_fewer_batches(tiny_models, tmp_path):
    results = []
    for sizes, accumulate in (([4, 2], 1), ([2, 2, 2], 2)):
        module = make_module(tiny_models["llama"])
        trainer = fit(module, make_batches(sizes), tmp_path, max_steps=2, accumulate_grad_batches=accumulate)
        assert trainer.global_step == 2
        results.append(parameters_of(module))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)


def test_every_step_follows_the_gradient_of_the_mean_loss(tiny_models, tmp_path):
    module = make_module(tiny_models["llama"], lr=1.0)
    for batch in make_batches([3, 1]):
        before = parameters_of(module)
        module.zero_grad()
        module.train().model(batch).nll.mean().backward()
        gradients = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
        norm = torch.cat([g.flatten() for g in gradients.values()]).norm().item()
        module.zero_grad()
        # Clipped by just more than its norm, it stays whole: clipping sees the gradient per token, not that of the sum.
        fit(module, [batch], tmp_path, gradient_clip_val=1.01 * norm)
        after = parameters_of(module)
        for name, gradient in gradients.items():
            torch.testing.assert_close(before[name] - after[name], gradient, rtol=1e-3, atol=1e-6)


def test_validation_weighs_every_token_alike(tiny_models, tmp_path):
    module = make_module(tiny_models["llama"]).eval()
    batches = make_batches([1, 3, 1])
    with torch.no_grad():
        scores = [module.model(batch) for batch in batches]
    nll, correct = (torch.cat([getattr(s, name).float() for s in scores]) for name in ("nll", "correct"))
    assert len({s.nll.numel() for s in scores}) > 1
    trainer = make_trainer(tmp_path)
    trainer.validate(module, loader(batches), verbose=False)
    found = trainer.callback_metrics
    assert found["val/loss"].item() == pytest.approx(nll.mean().item(), rel=1e-5)
    assert found["val/perplexity"].item() == pytest.approx(nll.mean().exp().item(), rel=1e-5)
    assert found["val/token_accuracy"].item() == pytest.approx(correct.mean().item(), rel=1e-5)


# ------------------------------------------------------------------------------------------------ what trains


class Modes(Callback):
    """Whether the LLM was in training mode in each step, before and after validation."""

    def __init__(self):
        self.llm, self.connectors = [], []

    def on_train_batch_start(self, trainer, module, *_):
        self.llm.append({m.training for m in module.model.llm.modules()})
        self.connectors.append({m.training for m in module.model.connectors.modules()})


@pytest.mark.parametrize("freeze", [True, False])
def test_what_is_frozen_does_not_move_and_stays_in_eval_mode(tiny_models, tmp_path, freeze):
    module = make_module(tiny_models["llama"], freeze=freeze, streams=("audio",))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    modes = Modes()
    module.train()
    make_trainer(tmp_path, max_steps=3, callbacks=[modes], check_val_every_n_epoch=1, num_sanity_val_steps=1).fit(
        module, *(loader(make_batches([n], seed=n, streams=("audio",))) for n in (3, 2))
    )
    assert modes.llm == [{not freeze}] * 3
    assert modes.connectors == [{True}] * 3
    moved = {name for name, tensor in module.state_dict().items() if not torch.equal(tensor, before[name])}
    in_llm = {name for name in moved if name.startswith("model.llm.")}
    assert any(name.startswith("model.connectors.audio.") for name in moved)
    assert (module.model.trainable_parameters()["llm"] == 0) == freeze
    if freeze:
        assert in_llm == set()
    else:
        assert in_llm
        assert all("lora_" in name for name in in_llm)


def test_nothing_to_train_is_refused(tiny_models):
    module = make_module(tiny_models["llama"], freeze=True, streams=())
    with pytest.raises(MsencError, match=r"nothing to train: .*modality=text_audio.*model\.llm\.freeze=false"):
        module.configure_optimizers()


def test_one_batch_overfits(tiny_models, tmp_path):
    module = make_module(tiny_models["llama"], lora=None, optimizer=lambda p: torch.optim.Adam(p, lr=1e-2))
    batch = make_batches([2])[0]
    with torch.no_grad():
        before = module.model(batch).nll.mean().item()
    fit(module, [batch], tmp_path, max_steps=100)
    with torch.no_grad():
        after = module.model.eval()(batch)
    assert after.nll.mean().item() < 0.05 * before
    assert after.correct.all()


def test_the_same_seed_gives_the_same_loss(tiny_models, tmp_path):
    losses = []
    for seed in (1, 1, 2):
        module = make_module(tiny_models["llama"], lora={**LORA, "lora_dropout": 0.5})
        L.seed_everything(seed, verbose=False)
        trainer = fit(module, make_batches([2, 2]), tmp_path, max_steps=4)
        losses.append(trainer.callback_metrics["train/loss"].item())
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


# ------------------------------------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"freeze": True},
        {"lora": None},
        {"tied": True},
        {"tied": True, "freeze": True},
    ],
    ids=str,
)
def test_a_checkpoint_holds_what_trains_and_fills_another_module(tiny_models, tmp_path, options):
    module = make_module(tiny_models["llama"], **options)
    batch = make_batches([3])[0] if not options.get("tied") else tied_batch()
    trainer = fit(module, [batch], tmp_path, max_steps=2)
    path = tmp_path / "a.ckpt"
    trainer.save_checkpoint(path)

    saved = torch.load(path, weights_only=True)
    assert saved["msenc"] == {
        "base_name": str(tiny_models["llama"]),
        "base_fingerprint": module.model.base_fingerprint,
    }
    trainable = {name for name, p in module.named_parameters() if p.requires_grad}
    assert saved["state_dict"].keys() == trainable
    assert (sum(t.numel() for t in saved["state_dict"].values())) == sum(module.model.trainable_parameters().values())
    if options.get("freeze"):
        assert not any(name.startswith("model.llm.") for name in trainable)

    other = make_module(tiny_models["llama"], **options)
    if options.get("tied"):
        assert other.model.connectors["audio"].core is other.model.connectors["video"].core
    with torch.no_grad():
        wanted = module.model.eval()(batch).nll
        assert not torch.equal(other.model.eval()(batch).nll, wanted)
        other.on_load_checkpoint(saved)
        other.load_state_dict(saved["state_dict"], strict=False)
        assert torch.equal(other.model(batch).nll, wanted)


def tied_batch():
    queries = {"audio": 2, "video": 2}
    dialogue, features = draw_dialogue(np.random.default_rng(0), 4)
    return collate([dialogue], [features], [dialogue_rows(dialogue, 10**6, queries)], queries, pack=True)


def test_lightning_resumes_from_a_checkpoint(tiny_models, tmp_path):
    batches = make_batches([2])
    unbroken = make_module(tiny_models["llama"])
    fit(unbroken, batches, tmp_path, max_steps=4)
    first = make_module(tiny_models["llama"])
    fit(first, batches, tmp_path, max_steps=2).save_checkpoint(tmp_path / "a.ckpt")
    second = make_module(tiny_models["llama"])
    trainer = make_trainer(tmp_path, max_steps=4)
    second.train()
    trainer.fit(second, loader(batches), ckpt_path=tmp_path / "a.ckpt")
    assert trainer.global_step == 4
    torch.testing.assert_close(parameters_of(second), parameters_of(unbroken), rtol=0, atol=0)


def test_checkpoints_that_do_not_belong_are_refused(tiny_models, tmp_path):
    def checkpoint(**options):
        module = make_module(tiny_models["llama"], **options)
        saved = {"state_dict": module.state_dict()}
        module.on_save_checkpoint(saved)
        return saved

    module = make_module(tiny_models["llama"])
    module.on_load_checkpoint(checkpoint())

    others = checkpoint()
    others["msenc"] = {"base_fingerprint": "0123456789abcdef"}
    with pytest.raises(
        MsencError, match=r"base weights with fingerprint 0123456789abcdef, the LLM loaded here has \w+"
    ):
        module.on_load_checkpoint(others)
    with pytest.raises(MsencError, match="fingerprint None"):
        module.on_load_checkpoint({"state_dict": {}})
    with pytest.raises(MsencError, match=r"\d+ missing, e\.g\. model\.connectors\.video\."):
        module.on_load_checkpoint(checkpoint(streams=("audio",)))
    with pytest.raises(MsencError, match=r"\d+ missing, e\.g\. model\.llm\..*lora_A"):
        module.on_load_checkpoint(checkpoint(freeze=True))
    with pytest.raises(MsencError, match=r"\d+ unknown, e\.g\. model\.llm\..*lora_A"):
        make_module(tiny_models["llama"], freeze=True).on_load_checkpoint(checkpoint())
    with pytest.raises(MsencError, match=r"\d+ of another shape, e\.g\. model\.connectors\."):
        module.on_load_checkpoint(checkpoint(width=16))
