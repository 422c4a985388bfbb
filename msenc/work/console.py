"""Terminal output: one console, paths as a user would type them, without noise from libraries."""

import logging
import warnings
from pathlib import Path
from typing import Any

from rich.console import Console

from msenc.work.command import as_typed
from msenc.work.processes import is_first_process


class _Console(Console):
    """Names commands as they were called."""

    def print(self, *objects: Any, **kwargs: Any) -> None:
        super().print(*(as_typed(o) if isinstance(o, str) else o for o in objects), **kwargs)


# Only the first process of a run prints. Names and texts of data may hold what rich takes for markup or emoji
# ([red], :cat:): nothing printed here is read as such, and colours are given as `style`.
console = _Console(quiet=not is_first_process(), markup=False, emoji=False)


def quieten() -> None:
    """Suppress warnings of libraries about each other, and about deliberate choices of the configs."""
    from transformers.utils import logging as transformers_logging  # here: a report does without transformers

    # Lightning lists devices it does not use and advertises; what matters is printed by msenc.
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    transformers_logging.disable_progress_bar()
    # Between libraries: PEFT asks transformers by an old name, Lightning torch by an old call.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
    warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\).*")
    # Deliberate choices of the configs: small data loads in the process itself, frozen parts are in eval mode.
    warnings.filterwarnings("ignore", message=r".*Found \d+ module\(s\) in eval mode.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings(
        "ignore", message=".*The number of training batches .* is smaller than the logging interval.*"
    )


def shown(path: Path) -> Path:
    """A path as a user would type it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
