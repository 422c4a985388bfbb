"""Let a trained run reply, in words and sound: python respond.py run_dir=RUN text="Hello!" [audio=...] [video=...]."""

import sys

import hydra
from omegaconf import DictConfig

from msenc.config.messages import readable_errors
from msenc.config.schema import register_schemas
from msenc.runs.overrides import read_arguments
from msenc.work.threads import wait_passively

register_schemas()

LITERAL = ("text", "audio", "video", "history", "speaker", "reply_as", "out", "runs_dir", "run_dir", "page_password")
"""Keys whose values are typed without Hydra's quotes."""


@hydra.main(version_base="1.3", config_path="configs", config_name="respond")
def main(cfg: DictConfig) -> None:
    """Answer one turn."""
    from msenc.pipelines.respond import respond  # imported here: --help must not wait for torch

    with readable_errors():
        respond(cfg)


if __name__ == "__main__":
    wait_passively()
    with readable_errors():
        sys.argv[1:] = read_arguments(sys.argv[1:], LITERAL)
        main()
