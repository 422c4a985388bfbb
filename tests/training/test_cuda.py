"""What only a GPU can show; ``sh benchmarks/gpu.sh`` runs these, and the benchmarks, where there is one."""

import math

import pytest
import torch
from lightning.fabric.utilities import move_data_to_device
from test_module import LORA, fit, make_batches, make_module

from msenc.files import read_json
from msenc.models import flash
from msenc.models.attention import layout_attention, make_layout
from msenc.models.conversation import ConversationModel
from msenc.models.llm import load_llm
from msenc.training.checkpoints import random_state, set_random_state
from msenc.types import Segment

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine"),
]


ROWS = {
    "trunks alone": [Segment(0, 33, ()), Segment(33, 1, ())],
    "one branch": [Segment(0, 40, ((7, 12),))],
    "dialogues": [Segment(0, 200, ((30, 20), (1, 150), (65, 200))), Segment(496, 17, ((9, 17),)), Segment(522, 64, ())],
}


def attend(kernel, segments, dtype):
    generator = torch.Generator().manual_seed(0)
    shape = (1, segments[-1].stop)
    given = [torch.randn(*shape, heads, 64, generator=generator) for heads in (4, 2, 2, 4)]
    query, key, value, grad = (t.to("cuda", dtype).transpose(1, 2) for t in given)
    states = [t.detach().requires_grad_() for t in (query, key, value)]
    layout = make_layout(segments, torch.device("cuda"), kernel)
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 2, True
    out, _ = layout_attention(module, *states, layout.mask, layout=layout)
    out.backward(grad.transpose(1, 2))
    return [out.detach(), *(state.grad for state in states)]


def test_the_flash_kernel_works_here():
    assert flash.works(torch.device("cuda"))
    assert make_layout(ROWS["dialogues"], torch.device("cuda")).kernel == "split"


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kernel", ["split", "flex_attention"])
def test_kernels_in_half_precision_are_as_near_to_the_exact_result_as_dense_is(kernel, rows):
    segments = ROWS[rows]
    exact = attend("dense", segments, torch.float32)
    for found, usual, expected in zip(
        attend(kernel, segments, torch.bfloat16), attend("dense", segments, torch.bfloat16), exact, strict=True
    ):
        error, bound = ((tensor.float() - expected).abs().max() for tensor in (found, usual))
        assert error <= 4 * bound + 1e-3


def losses(tiny_models, folder, precision):
    module = make_module(tiny_models["llama"], lr=0.1)
    seen = []
    step = module.training_step
    module.training_step = lambda batch: seen.append(step(batch)) or seen[-1]
    fit(module, make_batches([3, 3]), folder, 2, accelerator="gpu", devices=1, precision=precision)
    return [loss.item() for loss in seen]


def test_a_step_in_bf16_mixed_is_near_one_in_float32(tiny_models, tmp_path):
    exact = losses(tiny_models, tmp_path, "32-true")
    assert losses(tiny_models, tmp_path, "bf16-mixed") == pytest.approx(exact, rel=0.02)
    assert [1024 * loss for loss in losses(tiny_models, tmp_path, "16-mixed")] == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_quantized_weights_train_on_a_gpu_as_on_a_cpu(tiny_models, bits):
    pytest.importorskip("bitsandbytes")
    (batch,) = make_batches([2], streams=())
    losses, gradients = [], []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        llm = load_llm(str(tiny_models["llama"]), lora=LORA, quantization=bits)
        model = ConversationModel(llm, {}).to(device).train()
        loss = model(move_data_to_device(batch, torch.device(device))).nll.mean()
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten().cpu() for p in model.trainable().values()]))
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert torch.cosine_similarity(*gradients, dim=0) > 0.95


def test_random_numbers_of_the_gpu_are_part_of_a_checkpoint():
    state = random_state()
    first = torch.rand(5, device="cuda")
    set_random_state(state)
    assert torch.equal(torch.rand(5, device="cuda"), first)


def test_a_run_on_a_gpu_is_measured_as_it_was_trained(train):
    run = train(["trainer=gpu", "trainer.max_steps=8", "evaluate=val", "decoding.max_new_tokens=4"])
    facts = read_json(run.folder / "run.json")
    assert torch.cuda.get_device_name() in facts["machine"]
    assert facts["peak_gpu_memory_mib"] > 0
    (metrics,) = (run.folder / "evaluation").glob("*/metrics.json")
    assert math.isclose(read_json(metrics)["nll"], facts["best_loss"], abs_tol=1e-3)
