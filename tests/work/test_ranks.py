"""The first process of a run is known without waiting for Lightning, and what worker processes import stays light."""

import subprocess
import sys

import pytest
from lightning.fabric.utilities.rank_zero import _get_rank, rank_zero_only

from msenc.work.processes import RANKS, is_first_process


@pytest.mark.parametrize(
    "given", [{}, *({name: number} for name in RANKS for number in "01"), {RANKS[0]: "1", RANKS[1]: "0"}]
)
def test_before_lightning_is_imported_its_variables_say_the_rank(given, monkeypatch):
    for name in RANKS:
        monkeypatch.delenv(name, raising=False)
    for name, number in given.items():
        monkeypatch.setenv(name, number)
    expected = (_get_rank() or 0) == 0
    monkeypatch.setattr(rank_zero_only, "rank", 0 if not expected else 1)
    assert is_first_process() is not expected  # once it is imported, or the trainer has begun, it says
    monkeypatch.delattr(rank_zero_only, "rank")
    assert is_first_process() is expected


def test_a_process_that_speaks_replies_waits_for_no_lightning():
    code = "import sys, msenc.evaluation.spoken; sys.exit(str({'lightning', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "set()"
