"""Exports on the Hugging Face hub: sent there, and fetched from there into its local cache.

What is fetched is a stranger's folder like any other: whoever opens it holds it to the same checks.
"""

import json
import os
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from tempfile import gettempdir
from typing import Any

from msenc.config.stored import strings_of
from msenc.files import check_no_way_out, reason_of
from msenc.types import MsencError

HUB = "hub:"
"""Before the name of a repository, where else a folder is named."""

FILES = (
    *("README.md", "export.json", "connectors.safetensors"),
    *("adapter/adapter_config.json", "adapter/adapter_model.safetensors"),
    *("llm/*.json", "llm/*.safetensors", "llm/*.jinja", "llm/merges.txt", "llm/vocab.txt", "llm/*.model"),
)
"""What an export has, as patterns: nothing else is sent or fetched."""

WORDS = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", ".model", ".safetensors")
"""Ends of files in which any text may be a token, or which are no text."""

_REPO = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)


def fetched(place: str | Path) -> Path:
    """A folder as it is; of ``hub:OWNER/NAME[@REVISION]``, the local copy of the export there.

    What the cache has of a commit is not asked for again, and is taken where there is no network.

    Raises:
        MsencError: no such repository or revision, none that the token of ``HF_TOKEN`` may read, or not reachable.
    """
    if not str(place).startswith(HUB):
        return Path(place)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RevisionNotFoundError

    from msenc.models.pretrained import look_for_hub

    name, at, revision = str(place).removeprefix(HUB).partition("@")
    check_repo(name)
    look_for_hub()
    if at and not revision:
        raise MsencError(f"{place}: no revision after the @. Name a commit, a tag or a branch, or leave the @ out.")
    try:
        folder = Path(
            snapshot_download(name, revision=revision or None, allow_patterns=list(FILES), token=_token() or False)
        )
    except RevisionNotFoundError as error:
        raise MsencError(f"{place}: {name} is there, but has no revision {revision}. Name another.") from error
    except Exception as error:  # of the hub's client, its HTTP library, and the disk
        raise MsencError(f"{place}: cannot be fetched ({_said(error)}).") from error
    if not (folder / "export.json").is_file():
        raise MsencError(f"{place}: has no export.json, so it is no export of msenc. Name one that msenc push sent.")
    return folder


def send(folder: Path, repo: str, is_public: bool = False) -> str:
    """Send an export to the hub, as one commit, and return the commit's hash.

    Args:
        folder: the export. Of its files only those of `FILES` are sent.
        repo: OWNER/NAME; made if it is not there, and then private unless `is_public`. Of its files those of an
            earlier export that this one lacks are removed, and others stay.
        is_public: anyone may read it.

    Raises:
        MsencError: no token in ``HF_TOKEN``, a file with a path of this machine, a repository that is public unasked,
            or the hub refuses.
    """
    from huggingface_hub import HfApi

    check_repo(repo)
    token = _token()
    if token is None:
        raise MsencError(
            "HF_TOKEN: no value. Put a token that may write to the repository into this variable of the environment; "
            "no other place is looked at."
        )
    check_no_way_out(folder)
    files = [file.relative_to(folder).as_posix() for file in sorted(folder.rglob("*")) if file.is_file()]
    files = [file for file in files if is_part(file)]
    for file in files:
        _check_no_path(folder / file)
    try:
        api = HfApi(token=token)
        api.create_repo(repo, private=not is_public, exist_ok=True)
        if not is_public and not api.model_info(repo).private:
            raise MsencError(f"{repo}: is public, so anyone could read what is sent. If you want that: --public")
        sent = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            allow_patterns=files,
            delete_patterns=list(FILES),
            commit_message="An export of msenc",
        )
    except MsencError:
        raise
    except Exception as error:
        raise MsencError(f"{repo}: cannot be sent ({_said(error)}).") from error
    return sent.oid


def is_part(file: str) -> bool:
    """Whether a file, by its path in the export, is one of `FILES`.

    Example:
        >>> [is_part(file) for file in ("export.json", "llm/config.json", "llm/a/b.json", "reply.wav")]
        [True, True, False, False]
    """
    return any(fnmatch(file, pattern) and file.count("/") == pattern.count("/") for pattern in FILES)


def check_repo(name: str) -> None:
    """Refuse what is no name of a repository.

    Raises:
        MsencError: it is none.
    """
    if not _REPO.fullmatch(name):
        raise MsencError(f"{name!r}: no repository of the hub. Expected OWNER/NAME, such as anna/my-agent.")


def _token() -> str | None:
    return os.environ.get("HF_TOKEN", "").strip() or None


def _said(error: Exception) -> str:
    """Why the hub's client failed, in one line, without the token."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if isinstance(error, RepositoryNotFoundError | GatedRepoError):
        return (
            "there is no such repository, or HF_TOKEN may not read it: check the name, and for a private one set "
            "HF_TOKEN in the environment"
        )
    said = [reason_of(e) for e in (error, error.__cause__) if isinstance(e, Exception)]
    text = " ".join(filter(None, said))[:300] or type(error).__name__
    token = _token()
    return text.replace(token, "***") if token else text


def _check_no_path(file: Path) -> None:
    """Refuse to send a text with a path of this machine in it, and so a user's name."""
    if file.name.endswith(WORDS):
        return
    text = file.read_text("utf-8", "replace")
    known = {Path.home(), Path.cwd(), file.resolve().parents[1], Path(gettempdir()).resolve()}
    found = next((f"{path}/" for path in sorted(known) if len(path.parts) > 1 and f"{path}/" in f"{text}/"), None)
    if file.name == "export.json" and found is None:
        found = next((text for _, text in _settings(json.loads(text)) if Path(text).is_absolute()), None)
    if found is not None:
        raise MsencError(
            f"{file}: holds {found}, a path of this machine, and nothing is sent. Put another text in its place, in "
            "JSON null (whoever loads it then gives base=FOLDER or encoders.STREAM=FOLDER), and push again."
        )


def _settings(content: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Texts of an export.json that are no words for the LLM."""
    return strings_of({key: value for key, value in content.items() if key != "prompt"})
