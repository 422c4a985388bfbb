"""Runs -> one table: python report.py sweep_dir=FOLDER [split=test]."""

import hydra
from omegaconf import DictConfig

from msenc.config import readable_errors, register_schemas

register_schemas()


@hydra.main(version_base="1.3", config_path="configs", config_name="report")
def main(cfg: DictConfig) -> None:
    """Summarise all runs below a folder."""
    from msenc.pipelines.report import report  # imported here: --help must not wait for torch

    report(cfg)


if __name__ == "__main__":
    with readable_errors():
        main()
