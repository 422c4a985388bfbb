"""CPU seconds of an epoch: the dialogue layout against TRL's SFTTrainer, on the same targets.

    OMP_NUM_THREADS=1 python benchmarks/sft_trainer.py [--quick] [--repetitions N] [--json FILE]
    OMP_NUM_THREADS=1 python benchmarks/sft_trainer.py --longest --dialogues 3
    OMP_NUM_THREADS=1 python benchmarks/sft_trainer.py --llm smollm2 --dialogues 4 --repetitions 2

Needs the extra ``peers``. Text alone, dialogues of MELD's lengths (see meld.py), a random Llama of the demo's size
that trains in full, or of SmolLM2-135M's with LoRA; float32, AdamW, one process, one thread. An epoch is everything
that a trainer does in it but writing, and its share of the set-up (``--epochs``). TRL gets a tokenized sample per
target, its history and its reply, in as many steps. That all compute the same loss for as many tokens is checked (to
1e-4) with the weights at the start, where a learning rate of 0 leaves them.

- ``dialogue``: msenc, packed dialogues, trained by Lightning.
- ``padded``: SFTTrainer's default batches, without recomputed activations and bfloat16, which are its defaults, too.
- ``grouped``: with ``train_sampling_strategy=group_by_length``.
- ``padding-free``: with ``padding_free=True``: samples on one line, each attending to itself.
- ``floor``: forward, backward and AdamW on as many tokens and targets as ``dialogue``, as plain causal sequences,
  without a trainer.
"""

import copy
import logging
import math
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lora_step import NO_BUDGET, without_media
from measure import interleave, parser, print_table, summarise, time_rows, write_json
from meld import meld_dialogues, random_tokens
from torch.utils.data import DataLoader
from training_step import floor_batch

from msenc.data.collate import collate, dialogue_rows
from msenc.models.attention import register
from msenc.models.conversation import ConversationModel
from msenc.prompt import TokenizedDialogue
from msenc.training.module import ConversationModule
from msenc.types import Batch, needing

SIZES = {
    "tiny": {"vocab_size": 1024, "hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4},
    "smollm2": {"vocab_size": 49152, "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9},
}
LORA = {"smollm2": {"r": 8, "lora_alpha": 32, "target_modules": "all-linear"}}
OPTIMIZER = partial(torch.optim.AdamW, lr=0.0, weight_decay=0.0)
TRL = {
    "padded": {},
    "grouped": {"train_sampling_strategy": "group_by_length"},
    "padding-free": {"padding_free": True},
}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--llm", choices=SIZES, default="tiny", help="its shape; default: %(default)s")
    arguments.add_argument("--dialogues", type=int, default=16, metavar="N", help="default: %(default)s")
    arguments.add_argument("--per-step", type=int, default=4, metavar="N", help="dialogues; default: %(default)s")
    arguments.add_argument("--epochs", type=int, default=3, metavar="N", help="of each run; default: %(default)s")
    arguments.add_argument("--longest", action="store_true", help="the dialogues of most turns")
    given = arguments.parse_args()
    torch.set_num_threads(1)
    number = 2 if given.quick else given.dialogues
    with tempfile.TemporaryDirectory() as folder:
        results = measure(
            Path(folder), given.llm, number, given.per_step, given.longest, given.repetitions, given.epochs
        )
    counts = results["counts"]
    print_table(
        f"An epoch, {given.llm}: {number} dialogues of {counts['turns']} turns, {counts['targets']} targets, "
        f"{counts['steps']} steps; {counts['tokens']:,} tokens, as single samples {counts['tokens of samples']:,}",
        ["variant", "median CPU s", "fastest", "slowest", "x dialogue"],
        time_rows(results, "dialogue"),
    )
    write_json(given.json, results)


def measure(
    folder: Path, size: str, number: int, per_step: int, longest: bool, repetitions: int, epochs: int = 1
) -> dict[str, Any]:
    """Check that all losses are equal, and time an epoch of each."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    rng = np.random.default_rng(0)
    dialogues = meld_dialogues(number, longest=longest)
    drawn = [without_media(random_tokens(d, rng, SIZES[size]["vocab_size"])[0]) for d in dialogues]
    per_batch = [drawn[at : at + per_step] for at in range(0, number, per_step)]
    samples = [sample for tokens in drawn for sample in samples_of(tokens)]
    llm = make_llm(size)
    model = ConversationModel(llm, {})
    batch_size = math.ceil(len(samples) / len(per_batch))
    trainers = {
        name: make_trainer(folder / name, copy.deepcopy(llm), samples, batch_size, epochs, options)
        for name, options in TRL.items()
    }
    batches = [pack(tokens) for tokens in per_batch]
    totals = {"dialogue": total_of(model.train(), batches), **{n: total_of_trl(t) for n, t in trainers.items()}}
    for name, (loss, targets) in totals.items():
        expected, tokens = totals["dialogue"]
        assert targets == tokens, f"{name}: {targets} target tokens, expected {tokens}"
        assert abs(loss / expected - 1) < 1e-4, f"{name}: loss {loss}, expected {expected}"
    variants = {
        "dialogue": lambda: fit(model, per_batch, epochs, folder),
        **{name: trainer.train for name, trainer in trainers.items()},
        "floor": partial(run_floor, model, [floor_batch(batch) for batch in batches] * epochs),
    }
    counts = {
        "turns": " to ".join(str(f([len(d.utterances) for d in dialogues])) for f in (min, max)),
        "targets": len(samples),
        "steps": len(batches),
        "tokens": sum(batch.input_ids.numel() for batch in batches),
        "tokens of samples": sum(len(sample["input_ids"]) for sample in samples),
    }
    per_run = interleave(variants, repetitions, clock=time.process_time)
    seconds = {name: [value / epochs for value in values] for name, values in per_run.items()}
    losses = {name: loss for name, (loss, _) in totals.items()}
    return {**summarise(seconds, "dialogue"), "counts": counts, "losses": losses}


def make_llm(size: str) -> Any:
    """A random Llama, the same on every call; of its adapters, both factors are."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    width = SIZES[size]["hidden_size"]
    config = LlamaConfig(
        **SIZES[size],
        intermediate_size=round(width * 8 / 3 / 32) * 32,
        num_key_value_heads=3 if size == "smollm2" else None,
        tie_word_embeddings=True,
        attn_implementation=register(),
    )
    llm: Any = LlamaForCausalLM(config)
    if size in LORA:
        llm = get_peft_model(llm, LoraConfig(task_type="CAUSAL_LM", **LORA[size]))
        for name, parameter in llm.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=1e-3)
    llm.base_name, llm.base_fingerprint, llm.attention_kernel = "random", "random", "auto"
    return llm


# ---------------------------------------------------------------------------------------------------- msenc


def pack(tokens: Sequence[TokenizedDialogue]) -> Batch:
    """As msenc's loader does it for each step."""
    rows = [dialogue_rows(one, NO_BUDGET, {}) for one in tokens]
    return collate(list(tokens), [{} for _ in tokens], rows, {}, pack=True)


def total_of(model: ConversationModel, batches: Sequence[Batch]) -> tuple[float, int]:
    """Summed loss of the target tokens, and their number."""
    with torch.no_grad():
        losses = torch.cat([model(batch).nll for batch in batches])
    return losses.double().sum().item(), len(losses)


def fit(model: ConversationModel, per_batch: Sequence[Sequence[TokenizedDialogue]], epochs: int, folder: Path) -> None:
    """Epochs under Lightning, as train.py does it without validation and checkpoints."""
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of loaders without workers, and the like
        trainer.fit(ConversationModule(model.train(), OPTIMIZER), DataLoader(per_batch, None, collate_fn=pack))


def run_floor(model: ConversationModel, batches: Sequence[Batch]) -> None:
    optimizer = OPTIMIZER([p for p in model.parameters() if p.requires_grad])
    for batch in batches:
        optimizer.zero_grad()
        model(batch).nll.sum().backward()
        optimizer.step()


# ---------------------------------------------------------------------------------------------------- TRL


def samples_of(tokens: TokenizedDialogue) -> list[dict[str, list[int]]]:
    """A sample per target, as msenc's ``layout=sample`` has it."""
    found = []
    for turn in range(1, len(tokens.turns)):
        row = collate([tokens], [{}], [dialogue_rows(tokens, NO_BUDGET, {}, "sample", [turn])], {}, pack=False)
        labels = torch.full_like(row.input_ids[0], -100)
        labels[row.predictors + 1] = row.labels
        found.append({"input_ids": row.input_ids[0].tolist(), "labels": labels.tolist()})
    return found


def make_trainer(
    folder: Path,
    llm: Any,
    samples: list[dict[str, list[int]]],
    batch_size: int,
    epochs: int,
    options: Mapping[str, Any],
) -> Any:
    """TRL's trainer as msenc trains: float32 on a CPU, and nothing written."""
    with needing("this benchmark", "peers"):
        from datasets import Dataset
        from transformers import PreTrainedTokenizerFast, PrinterCallback
        from trl import SFTConfig, SFTTrainer
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 2}, "<pad>"))  # no text is tokenized
    llm.set_attn_implementation("sdpa")
    config = SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=batch_size,
        num_train_epochs=epochs,
        learning_rate=0.0,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **options,
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")
    trainer = SFTTrainer(llm, config, train_dataset=Dataset.from_list(samples), processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    return trainer


def total_of_trl(trainer: Any) -> tuple[float, int]:
    """As `total_of`."""
    loss, targets = 0.0, 0
    with torch.no_grad():
        for inputs in trainer.get_train_dataloader():
            targets += int((inputs["labels"][:, 1:] != -100).sum())
            loss += trainer.compute_loss(trainer.model, dict(inputs), num_items_in_batch=1).item()
    return loss, targets


if __name__ == "__main__":
    main()
