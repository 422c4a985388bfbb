"""Evaluate finished runs: python evaluate.py run_dir=RUN [split=test] [decoding=greedy]."""

import sys

import hydra
from omegaconf import DictConfig

from msenc.config.messages import readable_errors
from msenc.config.schema import register_schemas
from msenc.runs.overrides import read_arguments
from msenc.work.threads import wait_passively

register_schemas()


@hydra.main(version_base="1.3", config_path="configs", config_name="evaluate")
def main(cfg: DictConfig) -> None:
    """Score a split with each run's own config and weights."""
    from msenc.pipelines.evaluate import evaluate  # imported here: --help must not wait for torch

    with readable_errors():
        evaluate(cfg)


if __name__ == "__main__":
    wait_passively()
    with readable_errors():
        sys.argv[1:] = read_arguments(sys.argv[1:])
        main()
