"""msenc push: a run's export -> a repository of the Hugging Face hub."""

from collections.abc import Sequence
from pathlib import Path

from msenc.report.card import write_card
from msenc.runs.hub import check_repo, is_part, send
from msenc.training.export import FORMAT_VERSION, read_export
from msenc.types import MsencError

USAGE = "msenc push RUN OWNER/NAME [--public]: expected a run, or its export, and a repository of the Hugging Face hub."


def push(arguments: Sequence[str]) -> str:
    """Send a run's export, with its model card, and return how to load it.

    Args:
        arguments: of the command line.

    Raises:
        MsencError: they are others than `USAGE` says, there is no export, or `send` refuses.
    """
    names = [argument for argument in arguments if argument != "--public"]
    if len(names) != 2 or any(name.startswith("-") for name in names):
        raise MsencError(USAGE)
    run, repo = Path(names[0]), names[1]
    check_repo(repo)
    is_run = (run / "run.json").is_file()
    export = run / "export" if is_run else run
    if (version := read_export(export)["format_version"]) != FORMAT_VERSION:
        raise MsencError(
            f"{export}: format_version {version} names models by the paths of the machine that wrote it. Only exports "
            f"of version {FORMAT_VERSION} are shared: train the run again."
        )
    if is_run:
        write_card(run, repo)
    if not (export / "README.md").is_file():
        raise MsencError(f"{export}: has no README.md, the model card. Push its run, which writes one, or write it.")
    left = [str(f.relative_to(export)) for f in sorted(export.rglob("*")) if f.is_file()]
    left = [file for file in left if not is_part(file)]
    if left:
        print(f"Not sent, since an export has none of them: {', '.join(left[:5])}{' ...' if len(left) > 5 else ''}")
    commit = send(export, repo, "--public" in arguments)
    return f'msenc.load("hub:{repo}@{commit}")'
