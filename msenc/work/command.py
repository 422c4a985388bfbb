"""What the commands are called: ``python train.py`` in a checkout, ``msenc train`` where msenc is installed."""

import re
import sys
from pathlib import Path

_SCRIPT = re.compile(r"(?<![\w/-])(?:python )?(train|prepare|evaluate|report|respond)\.py\b")


def as_typed(text: str) -> str:
    r"""A message that names scripts, with the names by which this process's own command was called.

    Example:
        >>> as_typed("Evaluate it: python evaluate.py run_dir=A")  # as here, in a checkout
        'Evaluate it: python evaluate.py run_dir=A'
        >>> _SCRIPT.sub(r"msenc \1", "Evaluate it: python evaluate.py run_dir=A, as train.py does; see a/train.py")
        'Evaluate it: msenc evaluate run_dir=A, as msenc train does; see a/train.py'
    """
    program = Path(sys.argv[0])
    is_installed = program.stem == "msenc" or (program.name == "__main__.py" and program.parent.name == "msenc")
    return _SCRIPT.sub(r"msenc \1", text) if is_installed else text
