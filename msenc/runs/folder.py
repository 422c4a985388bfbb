"""A run's folder: determined by its first process, once the run's identity is known."""

from datetime import datetime
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, read_write

from msenc.files import write_text
from msenc.runs.find import find_run
from msenc.runs.overrides import task_overrides
from msenc.runs.sweep import job_folder
from msenc.work.processes import is_first_process, told_by_the_first


def settle_folder(cfg: DictConfig, hydra: DictConfig, identity: str, num_processes: int) -> Path:
    """Determine the run's folder, without creating it. All processes get the first one's answer.

    Args:
        cfg: of the run; its ``paths.output_dir`` becomes the folder.
        hydra: Hydra's own config.
        identity: by which ``resume=auto`` finds an earlier run.
        num_processes: that train the run together.
    """
    folder = _chosen(cfg, hydra)
    if is_first_process():
        if cfg.resume not in (None, "auto"):
            folder = Path(cfg.resume)
        elif cfg.resume == "auto" and not (folder and (folder / "run.json").is_file()):
            folder = find_run(places_of_runs(cfg, hydra), identity) or folder
        folder = folder or _new(cfg, hydra)
    if num_processes > 1:
        folder = Path(told_by_the_first("run folder", str(folder)))
        with read_write(HydraConfig.get()):  # Lightning starts other processes with this one's
            HydraConfig.get().run.dir = str(folder)
    cfg.paths.output_dir = str(folder)
    return folder


def write_config(folder: Path, cfg: DictConfig, overrides: list[str]) -> None:
    """Write the config and its overrides to a run's folder."""
    write_text(folder / ".hydra" / "config.yaml", OmegaConf.to_yaml(cfg))
    write_text(folder / ".hydra" / "overrides.yaml", OmegaConf.to_yaml(OmegaConf.create(overrides)))


def places_of_runs(cfg: DictConfig, hydra: DictConfig) -> list[Path]:
    """Where a repeated command looks for its run: all runs, and the sweep's folder, which may be elsewhere."""
    places = [Path(cfg.paths.runs_dir)]
    return [*places, Path(hydra.sweep.dir)] if hydra.mode is RunMode.MULTIRUN else places


def _chosen(cfg: DictConfig, hydra: DictConfig) -> Path | None:
    """The folder that the command names: ``hydra.run.dir`` or ``hydra.sweep.subdir``, or else ``paths.output_dir``."""
    folder, at_first = Path(hydra.runtime.output_dir), hydra.sweep.dir if hydra.mode is RunMode.MULTIRUN else "."
    if folder.resolve() != Path(at_first).resolve():
        return folder
    return None if cfg.paths.output_dir is None else Path(cfg.paths.output_dir)


def _new(cfg: DictConfig, hydra: DictConfig) -> Path:
    if hydra.mode is RunMode.MULTIRUN:
        return job_folder(Path(hydra.sweep.dir), hydra.job.num, task_overrides(hydra))
    return Path(cfg.paths.runs_dir) / "single" / f"{datetime.now():%Y-%m-%d_%H-%M-%S-%f}"
