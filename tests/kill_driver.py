"""Runs trainings in processes of their own and ends them at chosen moments: ``python kill_driver.py SPEC RESULT``.

The imports are paid once, here; every start is a fork. SPEC is a JSON list of runs: ``folder``, ``first`` and ``again``
(arguments of train.py for the first start and for those after a kill), and ``moments``, one per start but the last;
with ``is_sweep`` they are those of a multirun. ``processes`` has the number of processes of each start, as if torchrun
had started them; the last number serves all later starts. With ``measures``, the peak of each one's memory is found,
without what they have from here.
RESULT gets, per run, how each start ended, what it said, and what lay in the folder then.
"""

import ctypes
import json
import os
import signal
import socket
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import torch
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from lightning.fabric.utilities import rank_zero as of_fabric
from lightning.pytorch.utilities import rank_zero_only

from msenc.config.schema import register_schemas
from msenc.pipelines import evaluate as evaluation
from msenc.pipelines import train as training
from msenc.runs.overrides import resumed_arguments
from msenc.training import align as alignment
from msenc.training import checkpoints, sharding
from msenc.training.module import ConversationModule
from msenc.work.console import console
from msenc.work.signals import STOPPED

MMAP_THRESHOLD = -3  # of glibc's mallopt

CONFIGS = Path(__file__).parents[1] / "configs"


def end(kind: str) -> None:
    """Die at once; or be asked to end, as a cluster does: every process of the job."""
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    os.killpg(os.getpgrp(), {"stop": signal.SIGTERM, "usr1": signal.SIGUSR1, "usr2": signal.SIGUSR2}[kind])


def plant(moment: str | None, witness: Path) -> None:
    """Let this process end at a moment: ``kind place [number ...]``; and note every batch that it begins."""
    kind, place, *numbers = moment.split() if moment else (None, None)
    numbers = [int(n) if n.isdecimal() else n for n in numbers]
    seen = {"write": 0}

    def on_train_batch_start(self, batch, batch_idx):
        line = [self.trainer.current_epoch, batch_idx, self.trainer.global_step, [id for id, _ in batch.target_ids]]
        with witness.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if place == "batch" and numbers == [self.trainer.current_epoch, batch_idx]:
            end(kind)
        if place == "job" and numbers == [HydraConfig.get().job.num, batch_idx]:
            end(kind)

    def on_validation_batch_start(self, batch, batch_idx, dataloader_idx=0):
        if place == "validation" and not self.trainer.sanity_checking and numbers == [self.trainer.current_epoch]:
            end(kind)

    def on_train_epoch_end(self):
        if place == "epoch_end" and numbers == [self.trainer.current_epoch]:
            end(kind)

    def on_train_epoch_start(self):
        if place == "epoch_start" and numbers == [self.trainer.current_epoch]:
            end(kind)

    for hook in (on_train_batch_start, on_validation_batch_start, on_train_epoch_end, on_train_epoch_start):
        setattr(ConversationModule, hook.__name__, hook)

    save, link, evaluate, write_json = torch.save, os.link, evaluation.evaluate_split, training.write_json

    def half_save(checkpoint, file, **options):
        save(checkpoint, file, **options)
        name = getattr(file, "name", "")
        seen["write"] += ".last.ckpt.partial" in name
        if (place, numbers) == ("write", [seen["write"]]) or (place == "best" and "best" in name):
            file.flush()
            file.truncate(file.tell() // 2)
            end(kind)

    def link_only(source, target):
        link(source, target)
        if place == "link":
            end(kind)

    def half_exchange(new, place_of):
        is_second = place_of.with_name("previous.ckpt").exists()
        if place == "exchange" and place_of.name == f"{numbers[0]}.ckpt" and is_second:
            if place_of.exists():
                place_of.rename(place_of.with_name(f".{place_of.name}.old"))
            end(kind)
        exchange(new, place_of)

    exchange, sharding._exchange = sharding._exchange, half_exchange

    def no_evaluation(*args):
        return end(kind) if place == "evaluation" else evaluate(*args)

    def no_metrics(path, value):
        return end(kind) if place == "outcome" and path.name == "metrics.json" else write_json(path, value)

    calibrate = training.calibrate_connectors

    def calibrate_late(*given):
        if place == "setup":
            end(kind)
        calibrate(*given)

    training.calibrate_connectors = calibrate_late
    fit = alignment.fit

    def fit_until(*given):
        *others, on_step = given

        def counted(step, *rest):
            with witness.with_suffix(".aligned").open("a") as file:
                file.write(f"{step}\n")
            on_step(step, *rest)
            if (place, numbers) == ("align", [step]):
                end(kind)

        fit(*others, counted)

    alignment.fit, alignment.SAVE_EVERY = fit_until, 10
    checkpoints.torch.save, checkpoints.os.link = half_save, link_only
    evaluation.evaluate_split, training.write_json = no_evaluation, no_metrics


def start(arguments: list[str], moment: str | None, run: dict, number: int) -> dict:
    """One start, in processes of its own."""
    said = Path(f"{run['folder']}.{number}.txt")
    counts = run.get("processes", [1])
    num_processes = counts[min(number, len(counts) - 1)]
    if "processes" in run:
        arguments = [*arguments, f"trainer.devices={num_processes}"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids: list[int] = []
    for rank in range(num_processes):
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, pids[0] if pids else 0)
            if num_processes > 1:
                be_started(rank, num_processes, port)
            work(arguments, moment, run, said.with_suffix(f".{rank}.txt") if rank else said)
        os.setpgid(pid, pids[0] if pids else pid)
        pids.append(pid)
    ended: dict[int, int] = {}
    peaks = {kind: dict.fromkeys(pids, 0) for kind in ("VmRSS", "RssAnon")}
    before = memory_of(os.getpid(), "RssAnon")  # files that it has mapped, a fork only maps when it reads them
    while len(ended) < num_processes:
        pid, status = os.waitpid(-pids[0], os.WNOHANG if run.get("measures") else 0)
        if pid == 0:
            for kind, found in peaks.items():
                found.update({pid: max(peak, memory_of(pid, kind) - before) for pid, peak in found.items()})
            time.sleep(0.005)
            continue
        ended[pid] = status
        if status and os.waitstatus_to_exitcode(status) != STOPPED and len(ended) < num_processes:
            os.killpg(pids[0], signal.SIGKILL)  # as torchrun does
    status = next((status for status in ended.values() if status), 0)
    folder = Path(run["folder"])
    record = folder / "run.json"
    return {
        "moment": moment,
        "signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else None,
        "status": os.WEXITSTATUS(status) if os.WIFEXITED(status) else None,
        "said": said.read_text(),
        "files": sorted(p.name for p in (folder / "checkpoints").glob("*")),
        "peaks": {kind: list(found.values()) for kind, found in peaks.items()},
        "record": json.loads(record.read_text()) if record.is_file() else None,
    }


def memory_of(pid: int, kind: str) -> int:
    """Bytes that a process holds, by a kind of Linux (VmRSS: all, RssAnon: of no file); 0 once it has ended."""
    with suppress(OSError):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(kind))
    return 0


def be_started(rank: int, num_processes: int, port: int) -> None:
    """What torchrun tells a process, and what modules have read of it when they were imported."""
    os.environ |= {
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "driver"},
        **{name: str(rank) for name in ("RANK", "LOCAL_RANK")},
        **{name: str(num_processes) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")},
        "GROUP_RANK": "0",
    }
    rank_zero_only.rank = of_fabric.rank_zero_only.rank = rank
    console.quiet = rank > 0


def work(arguments: list[str], moment: str | None, run: dict, said: Path) -> NoReturn:
    """What one process does, from its fork to its end."""
    with said.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if run.get("measures"):  # what is freed is returned at once, so that memory is what is allocated
        ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 2**16)
    status = 1
    try:
        plant(moment, Path(f"{run['folder']}.batches"))
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            hydra = GlobalHydra.instance().hydra
            call = hydra.multirun if run.get("is_sweep") else hydra.run
            call("train", training.train, resumed_arguments(arguments), False)
        status = 0
    except SystemExit as e:
        status = e.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(status)


def main() -> None:
    register_schemas()
    runs = json.loads(Path(sys.argv[1]).read_text())
    results = []
    for run in runs:
        starts = []
        for number, moment in enumerate([*run["moments"], None]):
            starts.append(start(run["again"] if number else run["first"], moment, run, number))
        results.append(starts)
    Path(sys.argv[2]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
