"""Bytes of a checkpoint, and seconds to write and read it, against saving everything: python benchmarks/checkpoint.py.

An LLM of 134.5M parameters with LoRA: SmolLM2 from MSENC_MODELS where it is, else a random one of its shape. One
optimizer step is taken, so that the optimizer has a state; then its checkpoint is written as a run writes it, and, for
comparison, with all the LLM's weights in it, as Lightning does by itself.
"""

import os
import tempfile
from pathlib import Path
from typing import Any

import lightning as L
import torch
from measure import interleave, parser, print_table, summarise, write_json
from torch import Tensor

from msenc.data.loader import EpochLoader
from msenc.models.conversation import ConversationModel
from msenc.models.llm import load_llm
from msenc.training.checkpoints import CheckpointFiles, Checkpoints, read_checkpoint, write_checkpoint
from msenc.training.module import ConversationModule

LORA = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0}
SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
SMALL = {**SMOLLM2, "vocab_size": 4096, "num_hidden_layers": 4}


def llm_folder(folder: Path, is_quick: bool) -> Path:
    """The real weights, or random ones of the same shape (quick: fewer layers, a narrower vocabulary)."""
    real = Path(os.environ.get("MSENC_MODELS", "nowhere")).expanduser() / "smollm2-135m-instruct"
    if real.is_dir() and not is_quick:
        return real
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(**(SMALL if is_quick else SMOLLM2))).save_pretrained(folder / "llm")
    return folder / "llm"


class OneStep(ConversationModule):
    """Takes a step without data: the gradient is of no consequence here."""

    def training_step(self, batch: Tensor) -> Tensor:
        """Any loss will do."""
        return sum(p.square().sum() for p in self.parameters() if p.requires_grad)


def num_bytes(value: Any) -> int:
    """Bytes of all tensors in nested containers."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(num_bytes(v) for v in value.values())
    return sum(num_bytes(v) for v in value) if isinstance(value, list | tuple) else 0


def measure(folder: Path, is_quick: bool, repetitions: int = 2) -> dict[str, Any]:
    """Train a step, save, and measure.

    Args:
        folder: for what is written.
        is_quick: a small LLM.
        repetitions: of each write and read.
    """
    module = OneStep(
        ConversationModel(load_llm(str(llm_folder(folder, is_quick)), lora=LORA), {}),
        lambda parameters: torch.optim.AdamW(parameters, lr=1e-4),
    )
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[Checkpoints(str(folder), monitor=None)],
        plugins=[CheckpointFiles()],
        limit_val_batches=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module, EpochLoader([0], lambda epoch: [[0]], torch.tensor))
    path = folder / "last.ckpt"
    saved = read_checkpoint(path)
    everything = {**saved, "state_dict": module.state_dict()}
    whole = folder / "everything.ckpt"
    write_checkpoint(everything, whole)
    trainable = num_bytes(saved["state_dict"])
    optimizer = num_bytes([o["state"] for o in saved["optimizer_states"]])
    variants = {
        "save": lambda: write_checkpoint(saved, folder / "again.ckpt"),
        "save everything": lambda: write_checkpoint(everything, whole),
        "load": lambda: read_checkpoint(path),
        "load everything": lambda: read_checkpoint(whole),
    }
    times = summarise(interleave(variants, repetitions), base="save")["seconds"]
    return {
        "parameters": sum(p.numel() for p in module.parameters()),
        "trainable_parameters": sum(p.numel() for p in module.parameters() if p.requires_grad),
        "bytes": {
            "checkpoint": path.stat().st_size,
            "trainable_tensors": trainable,
            "optimizer_state": optimizer,
            "everything": whole.stat().st_size,
        },
        "ratios": {
            "checkpoint_to_what_trains": path.stat().st_size / (trainable + optimizer),
            "everything_to_checkpoint": whole.stat().st_size / path.stat().st_size,
            **{what: times[f"{what} everything"]["median"] / times[what]["median"] for what in ("save", "load")},
        },
        "seconds": times,
    }


def main() -> None:
    arguments = parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), arguments.quick, arguments.repetitions)
    size, ratios, times = result["bytes"], result["ratios"], result["seconds"]
    rows = [["MB", size["checkpoint"] / 1e6, size["everything"] / 1e6, ratios["everything_to_checkpoint"]]]
    for what in ("save", "load"):
        both = [times[name] for name in (what, f"{what} everything")]
        rows.append(
            [f"{what}, s", *(f"{t['median']:.3f} ({t['min']:.3f} to {t['max']:.3f})" for t in both), ratios[what]]
        )
    title = f"{result['parameters']:,} parameters, {result['trainable_parameters']:,} of them train"
    print_table(title, ["", "checkpoint", "everything", "ratio"], rows)
    print(f"checkpoint / (trainable tensors + optimizer state): {ratios['checkpoint_to_what_trains']:.3f}")
    write_json(arguments.json, result)


if __name__ == "__main__":
    main()
