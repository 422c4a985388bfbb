"""``python -m msenc`` is ``msenc``."""

from msenc.commands import main

main()
