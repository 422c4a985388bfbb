import pytest
import torch
from lightning.pytorch.callbacks import Callback
from test_module import fit, loader, make_batches, make_module, make_trainer, parameters_of

from msenc.data.loader import EpochLoader
from msenc.training.averaging import AVERAGE, AverageWeights, learned_state
from msenc.training.checkpoints import CheckpointFiles, Checkpoints
from msenc.training.restore import load_checkpoint
from msenc.types import MsencError

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:.*in eval mode",
    "ignore:.*logging interval",
    "ignore:.*no `val_dataloader`",
)


class Trace(Callback):
    """The weights after each step, and those that are validated."""

    def __init__(self):
        self.after_steps, self.validated = [], []

    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_step > len(self.after_steps):
            self.after_steps.append(parameters_of(module))

    def on_validation_epoch_start(self, trainer, module):
        self.validated.append(parameters_of(module))


def averaged(steps, eta):
    average = {}
    for t, weights in enumerate(steps, start=1):
        share = (eta + 1) / (t + eta)
        average = {name: (1 - share) * average.get(name, 0) + share * w for name, w in weights.items()}
    return average


def check_same(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("eta", "accumulated"), [(0, 1), (8, 1), (8, 2)])
def test_the_average_is_validated_and_kept_and_training_does_not_know_of_it(tiny_models, tmp_path, eta, accumulated):
    batches, trace = make_batches([1] * 4 * accumulated), Trace()
    options = {"max_steps": -1, "max_epochs": 2, "accumulate_grad_batches": accumulated}
    alone = make_module(tiny_models["llama"])
    fit(alone, batches, tmp_path / "alone", **options)

    module = make_module(tiny_models["llama"])
    callbacks = [Checkpoints(str(tmp_path)), trace, AverageWeights(eta)]
    options |= {"callbacks": callbacks, "plugins": [CheckpointFiles()], "enable_checkpointing": True}
    trainer = make_trainer(tmp_path, num_sanity_val_steps=0, **options)
    module.train()
    in_order = EpochLoader(batches, lambda epoch: [[i] for i in range(len(batches))], lambda units: units[0])
    trainer.fit(module, in_order, loader(make_batches([2], seed=1)))

    assert len(trace.after_steps) == 8
    check_same(parameters_of(module), parameters_of(alone))
    for epoch, validated in enumerate(trace.validated, start=1):
        check_same(validated, averaged(trace.after_steps[: 4 * epoch], eta))
    last, best = (torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("last", "best"))
    check_same(last["state_dict"], trace.after_steps[-1])
    check_same(learned_state(last), averaged(trace.after_steps, eta))
    assert AVERAGE not in best
    assert any(all(torch.equal(best["state_dict"][n], v[n]) for n in v) for v in trace.validated)
    (tmp_path / "run").mkdir()
    used = make_module(tiny_models["llama"])
    load_checkpoint(used, tmp_path / "run", str(tmp_path / "last.ckpt"))
    check_same(parameters_of(used), averaged(trace.after_steps, eta))


def test_an_average_that_cannot_be_meant_is_refused():
    with pytest.raises(MsencError, match=r"callbacks\.average\.eta=-1: expected 0 or more"):
        AverageWeights(-1)
