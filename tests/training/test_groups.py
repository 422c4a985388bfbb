"""Groups of parameters and weights of the loss: what trains how, and what counts how much."""

import csv

import pytest
import torch
from test_module import fit, make_batches, make_module, make_trainer, parameters_of
from torch import nn
from transformers import get_cosine_schedule_with_warmup

from msenc.config.checks import check_targets
from msenc.config.schema import plain
from msenc.files import read_json
from msenc.models.groups import REST, flatten_groups, partition
from msenc.prompt import TOKEN_KINDS
from msenc.runs.identity import run_settings
from msenc.training.assembly import GIVEN
from msenc.training.module import ConversationModule
from msenc.training.schedules import warmup_cosine
from msenc.types import MsencError

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:.*in eval mode",
    "ignore:.*logging interval",
    "ignore:.*no `val_dataloader`",
)

FAST = ["trainer.max_steps=2", "data.batch_size=8", "evaluate=null", "trainer.log_every_n_steps=1"]


def named(*names):
    return {name: nn.Parameter(torch.zeros(2)) for name in names}


MODEL = named("llm.q.lora_A", "llm.norm.weight", "connectors.audio.core.bias", "connectors.video.in_proj.bias")


def names_of(groups):
    return {group.name: list(group.parameters) for group in groups}


# ------------------------------------------------------------------------------------------------ what is in a group


def test_parts_and_patterns_pick_parameters_and_the_rest_comes_first():
    assert names_of(partition(MODEL, {})) == {REST: list(MODEL)}
    found = partition(MODEL, {"connector.audio": {"lr": 1.0}, "norms": {"pattern": "*norm*"}})
    assert names_of(found) == {
        REST: ["llm.q.lora_A", "connectors.video.in_proj.bias"],
        "connector.audio": ["connectors.audio.core.bias"],
        "norms": ["llm.norm.weight"],
    }
    assert next(iter(names_of(found))) == REST
    whole = partition(MODEL, {"llm": {}, "connectors": {}})
    assert names_of(whole) == {"llm": list(MODEL)[:2], "connectors": list(MODEL)[2:]}
    assert partition({}, {}) == []
    apart = partition(MODEL, {"connectors": {"lr": 1.0}, "connector.audio": {"lr": 2.0}})
    assert names_of(apart) == {
        REST: list(MODEL)[:2],
        "connectors": ["connectors.video.in_proj.bias"],
        "connector.audio": ["connectors.audio.core.bias"],
    }


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (
            {"connectors": {}, "biases": {"pattern": "*.bias"}},
            r"2 parameters are in several groups, e\.g\. connectors\.audio\.core\.bias in connectors and biases",
        ),
        ({"a": {"pattern": "llm*"}, "b": {"pattern": "*norm*"}}, r"1 parameters .* llm\.norm\.weight in a and b"),
        (
            {"wide": {"pattern": "*lora_B*"}},
            r"groups\.wide: no trainable parameter matches '\*lora_B\*'.* names: llm\.q\.lora_A, connectors\.aud",
        ),
    ],
)
def test_a_group_that_is_empty_or_overlaps_is_refused(groups, message):
    with pytest.raises(MsencError, match=message):
        partition(MODEL, groups)


def test_parts_that_a_row_of_a_sweep_lacks_are_left_out(tiny_models):
    frozen = make_module(tiny_models["llama"], freeze=True).model.trainable()
    assert list(names_of(partition(frozen, {"llm": {"lr": 1.0}, "connectors": {"lr": 2.0}}))) == ["connectors"]
    text = {name: p for name, p in MODEL.items() if name.startswith("llm.")}
    groups = {"llm": {"lr": 1.0}, "connectors": {"lr": 2.0}, "connector.video": {"lr": 3.0}}
    assert list(names_of(partition(text, groups))) == ["llm"]
    assert partition({}, groups) == []


def test_a_tied_core_is_in_the_group_of_its_first_stream(tiny_models):
    module = make_module(tiny_models["llama"], tied=True)
    found = names_of(partition(module.model.trainable(), {"connector.audio": {}, "connector.video": {}}))
    assert any(".core." in name for name in found["connector.audio"])
    assert not any(".core." in name for name in found["connector.video"])


# ------------------------------------------------------------------------------------------------ what may be written


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("groups.connectrs.lr=1", r"optimizer\.groups\.connectrs: .* Did you mean 'connectors'\?"),
        (
            "groups.biases.lr=1",
            r"groups\.biases: no such part.* needs a pattern .* optimizer\.groups\.biases\.pattern=",
        ),
        ("groups.llm.l=1", r"groups\.llm\.l: no such setting\. Did you mean 'lr'\?"),
        ("groups.llm.weight_decy=1", r"groups\.llm\.weight_decy: .*'weight_decay'"),
        ("groups.llm.momentum=1", r"groups\.llm\.momentum: no such setting"),
        ("groups.llm.params=1", r"groups\.llm\.params: no such setting"),
        ("groups.llm.lr=-1", r"groups\.llm\.lr=-1: expected a number that is 0 or more"),
        ("groups.llm.lr=inf", r"groups\.llm\.lr=inf: expected a number"),
        ("groups.llm.lr=fast", r"groups\.llm\.lr: found 'fast', expected a number"),
        ("groups.llm.warmup=2", r"groups\.llm\.warmup=2: expected a number that is from 0 to 1"),
        ("groups.llm=3", r"groups\.llm: found 3, expected settings"),
        ("groups.llm.pattern='*'", r"groups\.llm\.pattern: llm is a part of the model"),
        ("groups.mine.pattern=3", r"groups\.mine\.pattern: found 3, expected a pattern"),
        ("groups.connector.vidoe.lr=1 modality=text_audio", r"connector\.vidoe: no such part.* Did you mean 'conn"),
        ("groups.connector.lr=1", r"groups\.connector\.lr: .*expected settings"),
        (
            "groups.llm.warmup=0.1 scheduler=epoch_decay",
            r"groups\.llm\.warmup: the scheduler \(msenc\.training\.schedules\.epoch",
        ),
        ("groups.llm.warmup=0.1 scheduler=null", r"groups\.llm\.warmup: the scheduler \(none\) has no warm-up"),
    ],
)
def test_a_group_that_cannot_be_meant_is_refused_before_anything_is_loaded(overrides, message, compose):
    given = [o if o.startswith(("modality", "scheduler")) else f"optimizer.{o}" for o in overrides.split()]
    if "scheduler=null" in given:
        given[given.index("scheduler=null")] = "~scheduler"
    with pytest.raises(MsencError, match=message):
        check_targets(plain(compose(given)), GIVEN)


@pytest.mark.parametrize("optimizer", ["adamw", "adam"])
def test_an_override_adds_a_group_without_a_plus(optimizer, compose):
    overrides = [
        f"optimizer={optimizer}",
        "optimizer.groups.connector.audio.lr=3e-4",
        "optimizer.groups.biases={pattern:'llm*bias',weight_decay:0,betas:[0.9,0.98]}",
        "loss.weights.planted_audio=8",
    ]
    config = plain(compose(overrides))
    assert check_targets(config, GIVEN) > 0
    assert flatten_groups(config["optimizer"]["groups"]) == {
        **({"connectors": {"lr": 1e-3}} if optimizer == "adamw" else {}),
        "connector.audio": {"lr": 3e-4},
        "biases": {"pattern": "llm*bias", "weight_decay": 0, "betas": [0.9, 0.98]},
    }
    assert config["loss"]["weights"] == {"planted_audio": 8.0}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("planted_adio=8", r"loss\.weights\.planted_adio: no such kind of token\. Did you mean 'planted_audio'\?"),
        ("end=-1", r"loss\.weights\.end=-1\.0: expected a number that is 0 or more"),
        ("end=nan", r"loss\.weights\.end=nan: expected"),
        ("={" + ",".join(f"{kind}:0" for kind in TOKEN_KINDS) + "}", "every kind of token weighs 0"),
    ],
)
def test_weights_that_cannot_be_meant_are_refused(override, message, compose):
    override = f"loss.weights{override}" if override.startswith("=") else f"loss.weights.{override}"
    with pytest.raises(MsencError, match=message):
        check_targets(plain(compose([override])), GIVEN)


def test_weights_under_which_nothing_of_the_data_counts_are_refused(train):
    zero = [f"loss.weights.{kind}=0" for kind in TOKEN_KINDS if kind != "begin"]
    with pytest.raises(MsencError, match=r"kinds reply, description, end, planted_text.* all with weight 0"):
        train([*FAST, "modality=text", *zero])


def test_runs_from_before_groups_and_weights_are_the_same_runs(compose):
    now = run_settings(compose(["optimizer.groups.connectors=null"]))
    assert "groups" not in now["optimizer"]
    assert "loss" not in now
    for other in ("optimizer.groups.llm.lr=1", "loss.weights.end=2"):
        assert run_settings(compose(["optimizer.groups.connectors=null", other])) != now
    assert run_settings(compose([])) != now


# ------------------------------------------------------------------------------------------------ how groups train


def sgd(groups):
    return torch.optim.SGD(groups, lr=0.5)


def grouped(folder, groups, weights=None, **options):
    module = make_module(folder, optimizer=sgd, **options)
    return ConversationModule(module.model, sgd, groups=groups, loss_weights=weights)


def test_each_group_trains_at_its_own_rate(tiny_models, tmp_path):
    batches = make_batches([3])
    start = parameters_of(grouped(tiny_models["llama"], {}))
    plain_module = grouped(tiny_models["llama"], {})
    fit(plain_module, batches, tmp_path)
    module = grouped(tiny_models["llama"], {"llm": {"lr": 0.25}, "connector.audio": {"lr": 0.0}})
    fit(module, batches, tmp_path)
    moved = {"llm": 0.5, "connectors.audio": 0.0, "connectors.video": 1.0}
    whole, found = parameters_of(plain_module), parameters_of(module)
    assert any(not torch.equal(whole[name], start[name]) for name in start if ".audio." in name)
    for name, begin in start.items():
        (share,) = (share for part, share in moved.items() if name.startswith(f"model.{part}"))
        torch.testing.assert_close(found[name] - begin, share * (whole[name] - begin), rtol=1e-4, atol=1e-7)


def test_the_norms_of_gradients_are_logged_by_part_before_they_are_clipped(tiny_models, tmp_path):
    (batch,) = make_batches([3])
    module = grouped(tiny_models["llama"], {"out": {"pattern": "*.out_proj.*"}})
    module.train().model(batch).nll.mean().backward()
    expected = {}
    for name, parameter in module.model.named_parameters():
        if parameter.grad is not None:
            part = "llm" if name.startswith("llm") else f"connector.{name.split('.')[1]}"
            key = "out" if ".out_proj." in name else part
            expected[f"grad_norm/{key}"] = expected.get(f"grad_norm/{key}", 0) + parameter.grad.square().sum().item()
    module.zero_grad()
    found = fit(module, [batch], tmp_path, gradient_clip_val=1e-3).callback_metrics
    assert expected.keys() == {
        "grad_norm/llm",
        "grad_norm/connector.audio",
        "grad_norm/connector.video",
        "grad_norm/out",
    }
    assert {k: v.item() for k, v in found.items() if k.startswith("grad_norm/")} == pytest.approx(
        {k: v**0.5 for k, v in expected.items()}, rel=1e-3
    )


@pytest.mark.parametrize(("warmup", "total"), [(0.1, 57), (0.0, 10), (1.0, 7)])
def test_a_warm_up_of_a_groups_own(warmup, total):
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [{"params": parameters[:1]}, {"params": parameters[1:], "lr": 0.3, "warmup": 0.5}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    schedule = warmup_cosine(optimizer, total, 1, warmup)
    references = []
    for share, rate in ((warmup, 0.1), (0.5, 0.3)):
        stepper = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=rate)
        references.append((stepper, get_cosine_schedule_with_warmup(stepper, round(share * total), total)))
    for _ in range(total + 2):
        assert schedule.get_last_lr() == [reference.get_last_lr()[0] for _, reference in references]
        for stepper, scheduler in ((optimizer, schedule), *references):
            stepper.step()
            scheduler.step()


def test_a_run_says_which_groups_it_has_nothing_of(train, capsys):
    groups = ["optimizer.groups.connectors.lr=0.003", "optimizer.groups.llm.lr=0.01"]
    train([*FAST, "modality=text", *groups])
    said = " ".join(capsys.readouterr().out.split())
    assert "optimizer.groups.connectors: no part of it trains in this run, so it is ignored." in said
    assert "optimizer.groups.llm: nothing" not in said


def test_a_run_prints_and_records_its_groups(train, capsys):
    run = train(
        [
            *FAST,
            "modality=text_audio",
            "optimizer.lr=0.01",
            "optimizer.groups.connectors={lr:0.003,weight_decay:0,warmup:0.5}",
        ]
    )
    said = capsys.readouterr().out
    record = read_json(run.folder / "run.json")
    first, second = record["parameter_groups"]
    counts = record["trainable_parameters"]
    rest = {"name": "all others", "parameters": counts["llm"], "lr": 0.01, "weight_decay": 0.01, "warmup": 0.1}
    own = {"name": "connectors", "parameters": counts["connector.audio"], "lr": 0.003, "weight_decay": 0, "warmup": 0.5}
    assert {k: first[k] for k in rest} == rest
    assert {k: second[k] for k in own} == own
    line = next(line for line in said.splitlines() if line.strip().startswith("connectors"))
    assert line.split()[1:] == [str(second["tensors"]), f"{own['parameters']:,}", "0.003", "0", "0.5"]
    with (run.folder / "logs" / "csv" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    assert len(rows) == 2
    assert all(float(row[f"grad_norm/{part}"]) > 0 for row in rows for part in ("llm", "connector.audio"))
    saved = torch.load(run.folder / "checkpoints" / "last.ckpt", weights_only=True)["optimizer_states"][0]
    assert [group.get("name") for group in saved["param_groups"]] == [None, "connectors"]


# ------------------------------------------------------------------------------------------------ weights of the loss


def mixed_batches(sizes):
    """Batches whose tokens are of two kinds, by turns."""
    batches = make_batches(sizes)
    for batch in batches:
        batch.kinds = torch.arange(len(batch.labels)) % 2
    return batches


def test_a_step_follows_the_weighted_mean_however_the_batch_is_cut(tiny_models, tmp_path):
    weights = {"reply": 3.0, "description": 0.5}
    (batch,) = mixed_batches([4])
    module = grouped(tiny_models["llama"], {})
    nll = module.train().model(batch).nll
    factor = torch.tensor([3.0, 0.5])[batch.kinds]
    expected_loss = (nll * factor).sum() / factor.sum()
    assert abs(expected_loss - nll.mean()) > 1e-4
    expected_loss.backward()
    expected = {f"model.{n}": p - 0.5 * p.grad for n, p in module.model.named_parameters() if p.grad is not None}
    results = []
    kinds = batch.kinds
    for sizes in ([4], [3, 1]):
        cut = make_batches(sizes)
        for part in cut:
            part.kinds, kinds = kinds[: len(part.labels)], kinds[len(part.labels) :]
        kinds = batch.kinds
        module = grouped(tiny_models["llama"], {}, weights)
        trainer = fit(module, cut, tmp_path, accumulate_grad_batches=len(sizes))
        assert trainer.callback_metrics["train/loss"].item() == pytest.approx(expected_loss.item(), rel=1e-5)
        results.append(parameters_of(module))
    for found in results:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_without_weights_nothing_changes_and_a_weight_of_one_is_none(tiny_models, tmp_path):
    results = []
    for make in (lambda f: make_module(f, optimizer=sgd), lambda f: grouped(f, {}, {"reply": 1.0})):
        module = make(tiny_models["llama"])
        trainer = fit(module, make_batches([3, 2]), tmp_path, max_steps=2)
        results.append((parameters_of(module), trainer.callback_metrics["train/loss"]))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    # What training did before there were weights: the sum of losses over the number of tokens, by hand.
    module = make_module(tiny_models["llama"], optimizer=sgd).train()
    for batch in make_batches([3, 2]):
        module.zero_grad()
        nll = module.model(batch).nll
        nll.sum().backward()
        for parameter in module.model.trainable().values():
            parameter.grad.mul_(1 / torch.tensor(float(nll.numel())))
            parameter.data.add_(parameter.grad, alpha=-0.5)
    torch.testing.assert_close(parameters_of(module), results[0][0], rtol=0, atol=0)


def test_a_step_without_a_token_that_counts_changes_nothing(tiny_models, tmp_path):
    (batch,) = make_batches([2])
    batch.kinds = torch.zeros(len(batch.labels), dtype=torch.long)
    module = grouped(tiny_models["llama"], {}, {"reply": 0.0})
    start = parameters_of(module)
    trainer = fit(module, [batch], tmp_path)
    assert trainer.callback_metrics["train/loss"].item() == 0
    torch.testing.assert_close(parameters_of(module), start, rtol=0, atol=0)


def test_validation_has_no_weights(tiny_models, tmp_path):
    losses = []
    for weights in ({}, {"reply": 5.0}):
        trainer = make_trainer(tmp_path)
        batches = torch.utils.data.DataLoader(mixed_batches([2]), batch_size=None, collate_fn=lambda b: b)
        trainer.validate(grouped(tiny_models["llama"], {}, weights).eval(), batches, verbose=False)
        losses.append(trainer.callback_metrics["val/loss"].item())
    assert losses[0] == losses[1]


def test_a_run_records_its_weights(train):
    plain_run = train([*FAST, "modality=text"], "plain")
    run = train([*FAST, "modality=text", "loss.weights.planted_text=8", "loss.weights.description=0.5"], "weighted")
    assert read_json(plain_run.folder / "run.json")["loss_weights"] is None
    assert read_json(run.folder / "run.json")["loss_weights"] == {"planted_text": 8.0, "description": 0.5}
    assert run.loss != plain_run.loss
