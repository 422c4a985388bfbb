"""Train one run, or a sweep: python train.py [-m] [modality=...] [key=value ...]. See configs/train.yaml."""

from msenc.work.signals import listen_from_start

listen_from_start()  # before the other imports, which take a second or, from a busy network disk, a minute

import sys

import hydra
from omegaconf import DictConfig

from msenc.config.messages import readable_errors
from msenc.config.schema import register_schemas
from msenc.runs.overrides import read_arguments, resumed_arguments, spelt_out
from msenc.work.threads import wait_passively

register_schemas()


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def main(cfg: DictConfig) -> float | None:
    """Compose, train, evaluate."""
    from msenc.pipelines.train import train  # imported here: --help must not wait for torch

    with readable_errors():
        return train(cfg)


if __name__ == "__main__":
    wait_passively()
    with readable_errors():
        sys.argv[1:] = resumed_arguments(read_arguments(spelt_out(sys.argv[1:])))
        main()
