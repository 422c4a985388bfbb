"""Runs -> tables, tests and a page: python report.py sweep_dir=FOLDER [split=test]."""

import sys

import hydra
from omegaconf import DictConfig

from msenc.config.messages import readable_errors
from msenc.config.schema import register_schemas
from msenc.runs.overrides import read_arguments

register_schemas()


@hydra.main(version_base="1.3", config_path="configs", config_name="report")
def main(cfg: DictConfig) -> None:
    """Compare all runs in one or more folders."""
    from msenc.pipelines.report import report  # imported here: --help must not wait for torch

    with readable_errors():
        report(cfg)


if __name__ == "__main__":
    with readable_errors():
        sys.argv[1:] = read_arguments(sys.argv[1:])
        main()
