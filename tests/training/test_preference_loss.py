"""The loss of preferences: against TRL's, against single samples, and however a step is cut."""

import copy
import dataclasses
import warnings
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from random_dialogues import NUM_QUERIES, draw_dialogue
from test_module import fit, parameters_of
from tiny_models import build_conversation
from torch.nn.functional import logsigmoid

from msenc.data.collate import dialogue_rows
from msenc.data.loader import collate_units
from msenc.prompt import Target
from msenc.training.preference import PreferenceModule, preference_loss
from msenc.types import MsencError

LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.3}

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:.*in eval mode",
    "ignore:.*logging interval",
    "ignore:.*no `val_dataloader`",
)


def draw(num, seed=0, streams=("audio", "video"), most=2):
    """Dialogues in which targets have up to `most` rejected replies."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(num):
        tokens, features = draw_dialogue(rng, int(rng.integers(2, 6)), f"d{number}", streams=streams)
        rejected = []
        for _ in tokens.targets:
            ids = [
                (*rng.integers(3, 50, rng.integers(1, 7)).tolist(), 2) for _ in range(int(rng.integers(1, most + 1)))
            ]
            rejected.append(tuple(Target(i, (0,) * len(i)) for i in ids))
        found.append((dataclasses.replace(tokens, rejected=tuple(rejected)), features))
    return found


def batch_of(drawn, layout="dialogue"):
    return collate_units([(tokens, features, None) for tokens, features in drawn], 10**6, NUM_QUERIES, layout)


def make_module(model, **options):
    return PreferenceModule(model, partial(torch.optim.SGD, lr=0.5), **options)


def started(model, seed=1, **options):
    """A module some steps after its start: all that trains has moved, and it knows from where."""
    module = make_module(model, **options).train()
    module._start = parameters_of(module)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return module


def gradients(module):
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def distance(one, other):
    """Norm of the difference of two whole gradients, relative to the first."""
    assert one.keys() == other.keys()
    square = sum((one[n] - other[n]).double().square().sum() for n in one)
    return (square / sum(g.double().square().sum() for g in one.values())).sqrt().item()


# ------------------------------------------------------------------------------------------------ against TRL


def trl_trainer(folder, llm, **options):
    trl = pytest.importorskip("trl", reason="needs the extra peers")
    datasets = pytest.importorskip("datasets", reason="needs the extra peers")
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 2}, "<pad>"))  # no text is tokenized
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")
    config = trl.DPOConfig(
        output_dir=str(folder),
        max_length=None,
        bf16=False,
        use_cpu=True,
        report_to="none",
        remove_unused_columns=False,
        gradient_checkpointing=False,
        **options,
    )
    rows = datasets.Dataset.from_list([{"prompt": "</s>", "chosen": "</s>", "rejected": "</s>"}])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own
        return trl, trl.DPOTrainer(llm, args=config, train_dataset=rows, processing_class=tokenizer)


def single_pairs(drawn):
    """TRL's form of the same pairs: the prompt of the single sample, and two replies."""
    found = []
    for tokens, _ in drawn:
        for turn in range(1, len(tokens.turns)):
            (row,) = dialogue_rows(tokens, 10**6, {}, "sample", [turn], with_targets=False)
            for rejected in tokens.rejected[turn - 1]:
                found.append(
                    {
                        "prompt_ids": row.ids,
                        "chosen_ids": list(tokens.targets[turn - 1].ids),
                        "rejected_ids": list(rejected.ids),
                    }
                )
    return found


@pytest.mark.filterwarnings("ignore")  # other libraries' own
@pytest.mark.parametrize(
    ("loss_type", "label_smoothing", "rpo_alpha"), [("sigmoid", 0.0, 0.0), ("robust", 0.2, 0.0), ("sigmoid", 0.0, 0.7)]
)
def test_loss_and_gradients_are_those_of_trl(tiny_models, tmp_path, loss_type, label_smoothing, rpo_alpha):
    beta = 0.3
    drawn = draw(4, streams=())
    model = build_conversation(tiny_models["llama"], streams=(), lora=LORA)
    llm = copy.deepcopy(model.llm)
    llm.set_attn_implementation("sdpa")
    types = {"loss_type": [loss_type]}
    if rpo_alpha:
        types = {"loss_type": [loss_type, "sft"], "loss_weights": [1.0, rpo_alpha]}
    trl, trainer = trl_trainer(tmp_path, llm, beta=beta, label_smoothing=label_smoothing, **types)
    module = started(model, beta=beta, label_smoothing=label_smoothing, rpo_alpha=rpo_alpha)
    losses, measured, _ = module.scores(batch_of(drawn))
    losses.mean().backward()
    mine = {name.removeprefix("model.llm."): gradient for name, gradient in gradients(module).items()}
    assert sum("lora_" in name for name in mine) == len(mine) > 0

    with torch.no_grad():  # TRL's reference is its adapter as it was
        for name, parameter in llm.named_parameters():
            if name in mine:
                parameter.copy_(model.llm.get_parameter(name))
    collator = trl.trainer.dpo_trainer.DataCollatorForPreference(pad_token_id=0)
    pairs = single_pairs(drawn)
    assert len(pairs) == len(losses) > 10
    # TRL's "sft" is the mean over a batch's tokens, ours over each reply's: the same in batches of one pair.
    parts = [[pair] for pair in pairs] if rpo_alpha else [pairs]
    loss = sum(trainer.compute_loss(trainer.model.train(), collator(part)) for part in parts) / len(parts)
    loss.backward()
    theirs = {name: p.grad for name, p in llm.named_parameters() if p.grad is not None}
    assert losses.mean().item() == pytest.approx(loss.item(), rel=1e-5)
    assert distance(theirs, mine) < 1e-5
    logged = {name: np.mean(values) for name, values in trainer._metrics["train"].items()}
    for name, value in zip(module.measured, measured.mean(0).tolist(), strict=True):
        assert value == pytest.approx(logged[name], rel=1e-4, abs=1e-5), name
    assert 0 < logged["rewards/accuracies"] < 1


def test_the_chosen_reply_has_a_loss_of_its_own_with_its_description_and_end(tiny_models):
    drawn = draw(4, most=3)
    model = build_conversation(tiny_models["llama"], lora=LORA)
    batch = batch_of(drawn)
    module = started(model)
    losses, _, nll = module.scores(batch)
    module.rpo_alpha = 0.5
    both, _, _ = module.scores(batch)
    targets = [t for tokens, _ in drawn for t, said in zip(tokens.targets, tokens.rejected, strict=True) for _ in said]
    own = torch.stack([nll[batch.targets == chosen].mean() for chosen, _ in batch.pairs])
    assert [int((batch.targets == chosen).sum()) for chosen, _ in batch.pairs] == [len(t.ids) for t in targets]
    assert len({len(t.ids) for t in targets}) > 1
    torch.testing.assert_close(both - losses, 0.5 * own, rtol=1e-4, atol=1e-5)


def test_replies_in_no_pair_have_their_own_loss_alone(tiny_models):
    drawn = draw(4, most=2)
    some = [(dataclasses.replace(t, rejected=((), *t.rejected[1:])), features) for t, features in drawn]
    batch = batch_of(some)
    module = started(build_conversation(tiny_models["llama"], lora=LORA), rpo_alpha=0.5)
    losses, measured, nll = module.scores(batch)
    kept = sorted(set(range(len(batch.target_ids))) - set(batch.pairs.flatten().tolist()))
    assert len(kept) == len(drawn)
    assert len(measured) == len(batch.pairs) == len(losses) - len(kept) > 0
    own = torch.stack([nll[batch.targets == target].mean() for target in kept])
    torch.testing.assert_close(losses[len(batch.pairs) :], 0.5 * own)
    pairs_alone, _, _ = module.scores(batch_of(drawn))
    assert len(pairs_alone) == sum(len(said) for t, _ in drawn for said in t.rejected)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_the_loss_of_a_flipped_label_is_weighed_by_its_probability(label_smoothing):
    margins = torch.tensor([-2.0, 0.0, 3.0], dtype=torch.float64, requires_grad=True)
    loss = preference_loss(margins, 0.5, label_smoothing)
    # Over labels of which so many are flipped, its mean is the loss of those that are not.
    flipped = preference_loss(-margins, 0.5, label_smoothing)
    mean = (1 - label_smoothing) * loss + label_smoothing * flipped
    torch.testing.assert_close(mean, -logsigmoid(0.5 * margins))


# ------------------------------------------------------------------------------------------------ the reference


def test_the_reference_of_a_new_adapter_is_the_model_without_it(tiny_models):
    model = build_conversation(tiny_models["llama"], lora=LORA)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(parameter)
        elif "connectors" in name:
            parameter.requires_grad = False
    module, batch = started(model), batch_of(draw(3))
    now = model(batch).nll
    with model.llm.disable_adapter(), torch.no_grad():
        without = model(batch).nll
    with module.reference():
        assert torch.equal(model(batch).nll, without)
    assert torch.equal(model(batch).nll, now)
    assert not torch.allclose(now, without, atol=0.1)


@pytest.mark.parametrize("lora", [LORA, None])
def test_rewards_are_zero_at_the_start_whatever_trains_and_drops_out(tiny_models, lora):
    module = make_module(build_conversation(tiny_models["llama"], lora=lora, dropout=0.3)).train()
    module._start = parameters_of(module)
    losses, measured, _ = module.scores(batch_of(draw(3)))
    assert losses.tolist() == pytest.approx([np.log(2)] * len(losses))
    assert not measured[:, :4].any()


def test_half_precision_holds_no_weights_of_the_reference(tiny_models):
    module, batch = started(build_conversation(tiny_models["llama"], lora=LORA), beta=0.3), batch_of(draw(3))
    other = copy.deepcopy(module)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if name in other._start:
                parameter.copy_(other._start[name])
    with torch.autocast("cpu", torch.bfloat16):
        losses, _, nll = module.scores(batch)
        losses.mean().backward()
    found = gradients(module)
    assert found.keys() == module._start.keys()
    module.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            before = _sums_of(other.model(batch).nll, batch)
        now = module.model(batch).nll
        assert torch.equal(now, nll)
        chosen, rejected = (_sums_of(now, batch) - before)[batch.pairs].unbind(1)
        (-logsigmoid(0.3 * (rejected - chosen))).mean().backward()  # of what is negative log probability
    for name, gradient in gradients(module).items():
        # Not entry by entry: some processors add halves in another order. A key's bias has no gradient but noise.
        assert (found[name] - gradient).norm() < 0.01 * gradient.norm() + 1e-4, name


def _sums_of(nll, batch):
    return torch.stack([nll[batch.targets == target].sum() for target in range(len(batch.target_ids))])


def test_a_checkpoint_without_the_start_is_refused(tiny_models, tmp_path):
    module = started(build_conversation(tiny_models["llama"], lora=LORA))
    checkpoint = {"state_dict": module.state_dict(), "optimizer_states": []}
    module.on_save_checkpoint(checkpoint)
    other = make_module(build_conversation(tiny_models["llama"], lora=LORA))
    other.on_load_checkpoint(checkpoint)
    assert all(torch.equal(other._start[name], tensor) for name, tensor in module._start.items())
    weights = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(weights)
    assert "reference" not in weights
    name = min(checkpoint["reference"])
    for broken in ({}, {**checkpoint["reference"], name: torch.zeros(1)}):
        with pytest.raises(MsencError, match="has no start to compare with"):
            other.on_load_checkpoint({**checkpoint, "reference": broken})


# ------------------------------------------------------------------------------------------------ the layout


def test_branches_of_one_trunk_are_single_samples(tiny_models):
    drawn = draw(4, most=3)
    module = started(build_conversation(tiny_models["llama"], lora=LORA).double(), beta=0.3)
    module._start = {name: tensor.double() for name, tensor in module._start.items()}
    results = []
    for layout in ("dialogue", "sample"):
        module.zero_grad()
        batch = batch_of(drawn, layout)
        losses, measured, _ = module.scores(batch)
        losses.sum().backward()
        results.append((losses.detach(), measured, gradients(module), [batch.target_ids[c] for c, _ in batch.pairs]))
    torch.testing.assert_close(results[0][:2], results[1][:2], rtol=1e-6, atol=1e-8)
    assert distance(results[0][2], results[1][2]) < 1e-6
    assert results[0][3] == results[1][3]
    assert len(results[0][0]) == sum(len(said) for tokens, _ in drawn for said in tokens.rejected) > 10


def test_a_pair_weighs_the_same_however_the_step_is_cut(tiny_models, tmp_path):
    drawn = draw(4)
    results = []
    for sizes in ([4], [2, 2], [3, 0, 1]):
        module = make_module(build_conversation(tiny_models["llama"], lora=LORA), beta=0.3)
        at = np.cumsum([0, *sizes])
        batches = [batch_of(drawn[a:b]) for a, b in pairwise(at)]
        trainer = fit(module, batches, tmp_path, accumulate_grad_batches=len(sizes))
        assert trainer.global_step == 1
        logged = {name: trainer.callback_metrics[f"train/{name}"].item() for name in ("loss", *module.measured)}
        results.append((parameters_of(module), logged))
    moved = {name for name, p in module._start.items() if not torch.equal(p, results[0][0][name])}
    assert any("lora_B" in name for name in moved)
    assert any("connectors.video" in name for name in moved)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-4, atol=1e-6)


def test_steps_follow_the_reply_that_is_preferred(tiny_models, tmp_path):
    drawn = draw(3, most=1)
    batch = batch_of(drawn)
    module = make_module(build_conversation(tiny_models["llama"], lora=LORA), beta=0.5)
    fit(module, [batch] * 20, tmp_path, max_steps=20)
    _, measured, _ = module.scores(batch)
    chosen, rejected, accuracies, *_ = measured.mean(0).tolist()
    assert accuracies == 1.0
    assert chosen > rejected
    swapped = [
        (dataclasses.replace(t, targets=tuple(r for (r,) in t.rejected), rejected=tuple((c,) for c in t.targets)), f)
        for t, f in drawn
    ]
    assert module.scores(batch_of(swapped))[1].mean(0)[2] == 0.0
