"""Runs -> tables, tests and a page: python report.py sweep_dir=FOLDER [split=test]."""

from msenc.commands import run

if __name__ == "__main__":
    run("report")
