"""First turns for a visitor: openings of dialogues of the run's own data, with their clips where these are there."""

import os
from dataclasses import dataclass
from pathlib import Path

from msenc.store.shards import ShardReader
from msenc.training.restore import open_run
from msenc.types import MsencError

NUM_EXAMPLES = 3


@dataclass(frozen=True)
class Example:
    """A turn that the run's data hold.

    Args:
        text: what is said.
        clip: its media file, or None.
    """

    text: str
    clip: Path | None


def find_examples(run: Path, data_dir: str | None, num_examples: int = NUM_EXAMPLES) -> list[Example]:
    """Openings of the test dialogues, those with a clip first; of another split where there is no test split.

    Clips are taken from the folder of data alone, and only if the run reads any.

    Args:
        run: the run, or its export, which has no data.
        data_dir: see `open_run`.
        num_examples: at most.

    Returns:
        Empty where the data are not on this machine.
    """
    try:
        _, config = open_run(run, data_dir)
    except MsencError:
        return []
    data, found = config["data"], []
    # A run may be a stranger's: its config cannot put other files of this machine before the page's visitors.
    allowed = Path(data_dir or os.environ.get("MSENC_DATA", "data")).resolve()
    root = Path(data["root"]).resolve() if data["root"] and config["model"]["streams"] else None
    root = root if root is not None and root.is_relative_to(allowed) else None
    for split in ("test", "val", "train"):
        try:
            reader = ShardReader(Path(data["dir"]) / "turns", split, verify=False)
            for id in reader.ids[: 20 * num_examples]:
                opening = reader.read(id)["turns.json"]["utterances"][0]
                found.append(Example(opening["text"], _clip_of(opening.get("clip"), root)))
            break
        except (MsencError, OSError):
            continue
    return sorted(found, key=lambda example: example.clip is None)[:num_examples]


def _clip_of(clip: str | None, root: Path | None) -> Path | None:
    """A clip that is a file of its own and lies below the data's root."""
    path = root / clip if root is not None and clip is not None and "#" not in clip else None
    return path if path is not None and path.is_file() and path.resolve().is_relative_to(root) else None
