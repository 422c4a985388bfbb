"""Runs trainings in processes of their own and ends them at chosen moments: ``python kill_driver.py SPEC RESULT``.

The imports are paid once, here; every start is a fork. SPEC is a JSON list of runs: ``folder``, ``first`` and ``again``
(arguments of train.py for the first start and for those after a kill), and ``moments``, one per start but the last;
with ``is_sweep`` they are those of a multirun.
RESULT gets, per run, how each start ended, what it said, and what lay in the folder then.
"""

import json
import os
import signal
import sys
import traceback
from pathlib import Path

import torch
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

from msenc.config.schema import register_schemas
from msenc.pipelines import evaluate as evaluation
from msenc.pipelines import train as training
from msenc.runs.overrides import resumed_arguments
from msenc.training import align as alignment
from msenc.training import checkpoints
from msenc.training.module import ConversationModule

CONFIGS = Path(__file__).parents[1] / "configs"


def end(kind: str) -> None:
    """Die at once; or be asked to end, as a cluster does: every process of the job."""
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    os.killpg(os.getpid(), {"stop": signal.SIGTERM, "usr1": signal.SIGUSR1, "usr2": signal.SIGUSR2}[kind])


def plant(moment: str | None, witness: Path) -> None:
    """Let this process end at a moment: ``kind place [number ...]``; and note every batch that it begins."""
    kind, place, *numbers = moment.split() if moment else (None, None)
    numbers = [int(n) for n in numbers]
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

    def half_save(checkpoint, file):
        save(checkpoint, file)
        seen["write"] += Path(file.name).name == ".last.ckpt.partial"
        if (place, numbers) == ("write", [seen["write"]]) or (place == "best" and "best" in file.name):
            file.flush()
            file.truncate(file.tell() // 2)
            end(kind)

    def link_only(source, target):
        link(source, target)
        if place == "link":
            end(kind)

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
    """One start in a process of its own."""
    said = Path(f"{run['folder']}.{number}.txt")
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        with said.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
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
    _, status = os.waitpid(pid, 0)
    folder = Path(run["folder"])
    record = folder / "run.json"
    return {
        "moment": moment,
        "signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else None,
        "status": os.WEXITSTATUS(status) if os.WIFEXITED(status) else None,
        "said": said.read_text(),
        "files": sorted(p.name for p in (folder / "checkpoints").glob("*")),
        "record": json.loads(record.read_text()) if record.is_file() else None,
    }


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
