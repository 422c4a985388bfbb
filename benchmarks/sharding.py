"""Peak memory of each process that trains LoRA on an LLM of 1.1 billion parameters: one process, and two that share it.

    python benchmarks/sharding.py FOLDER [--quick] [--json FILE]

FOLDER gets the LLM, with random weights (2.2 GB; kept for the next time). Data: the demo in MSENC_DATA, made if absent.
Memory is what a process holds, of files what it has mapped and read, with an allocator that returns what is freed.
"""

import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from measure import parser, print_table, write_json

ROOT = Path(__file__).parents[1]
SIZES = {
    "1.1B": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32},
    "quick": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4},
}
COMMON = [
    *("modality=text", "model/llm=smollm2", "model.llm.dtype=bfloat16", "model.llm.gradient_checkpointing=true"),
    *("data.batch_size=2", "data.max_history_tokens=64", "data.val=null", "evaluate=null"),
    *("trainer.max_steps=1", "callbacks.average=null", "callbacks.progress=null"),
]
CASES = {
    "one process": [],
    "two processes": ["trainer=fsdp2", "trainer.accelerator=cpu", "trainer.precision=32-true"],
}


def main() -> None:
    arguments = parser(__doc__, repetitions=1)
    arguments.add_argument("folder", type=Path)
    given = arguments.parse_args()
    llm = given.folder / ("quick" if given.quick else "1.1B")
    if not llm.exists():
        write_llm(llm)
    nothing = max(peaks([sys.executable, "-c", "import msenc.pipelines.train"]))
    found = {}
    with TemporaryDirectory() as runs:
        for case, overrides in CASES.items():
            command = [sys.executable, "train.py", *COMMON, *overrides, f"model.llm.name_or_path={llm}"]
            found[case] = [peak - nothing for peak in peaks([*command, f"paths.runs_dir={runs}"])]
    alone = max(found["one process"])
    rows = [[case, " and ".join(f"{peak:,.0f}" for peak in own), max(own) / alone] for case, own in found.items()]
    weights = sum(file.stat().st_size for file in llm.glob("*.safetensors")) / 2**20
    print_table(f"Peak MiB of each process, without imports; {weights:,.0f} MiB of weights", ["", "MiB", "x one"], rows)
    write_json(given.json, {"weights_mib": weights, "peaks_mib": found, "ratio": rows[-1][-1]})


def write_llm(folder: Path) -> None:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    data = Path(os.environ.get("MSENC_DATA", "data"))
    if not (data / "tiny-llm").exists():
        subprocess.run([sys.executable, "prepare.py"], cwd=ROOT, check=True)
    tokenizer = AutoTokenizer.from_pretrained(data / "tiny-llm")
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    size = SIZES[folder.name]
    torch.set_default_dtype(torch.bfloat16)
    llm = LlamaForCausalLM(LlamaConfig(vocab_size=32000, num_key_value_heads=4, **size, **special))
    llm.save_pretrained(folder, max_shard_size="1GB")
    tokenizer.save_pretrained(folder)


def peaks(command: list[str]) -> list[float]:
    """MiB of the command's process and of those that it starts, as far as they import as much as it does."""
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    started = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    found: dict[int, float] = {}
    while started.poll() is None:
        for pid in tree(started.pid):
            found[pid] = max(found.get(pid, 0), held(pid))
        time.sleep(0.01)
    if started.returncode:
        sys.exit(started.stderr.read())
    return [peak for peak in found.values() if peak > found[started.pid] / 4]


def tree(pid: int) -> list[int]:
    children: list[int] = []
    with suppress(OSError):
        children = [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()]
    return [pid, *(inner for child in children for inner in tree(child))]


def held(pid: int) -> float:
    with suppress(OSError):
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
        return sum(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))
    return 0.0


if __name__ == "__main__":
    main()
