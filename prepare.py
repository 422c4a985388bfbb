"""Raw clips and annotations -> shards: python prepare.py data=demo|meld [data.root=FOLDER] [modality=...].

With stage=audit: find defects in them.
"""

import sys

import hydra
from omegaconf import DictConfig

from msenc.config.messages import readable_errors
from msenc.config.schema import register_schemas
from msenc.runs.overrides import read_arguments
from msenc.work.threads import wait_passively

register_schemas()


@hydra.main(version_base="1.3", config_path="configs", config_name="prepare")
def main(cfg: DictConfig) -> None:
    """Prepare the missing parts of a data set."""
    from msenc.pipelines.prepare import prepare  # imported here: --help must not wait for torch

    with readable_errors():
        prepare(cfg)


if __name__ == "__main__":
    wait_passively()
    with readable_errors():
        sys.argv[1:] = read_arguments(sys.argv[1:])
        main()
