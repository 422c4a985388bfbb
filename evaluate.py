"""Evaluate finished runs: python evaluate.py run_dir=RUN [split=test] [decoding=greedy]."""

from msenc.commands import run

if __name__ == "__main__":
    run("evaluate")
