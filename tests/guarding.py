"""The guard under which tests open what a stranger may have left, and such a run; fixtures of tests/security."""

import io
import socket
import sys
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from msenc.types import MsencError

ARCHIVE = Path(__file__).parent / "old_run.tar.xz"
STARTS = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "pty.spawn")
"""Audit events (https://docs.python.org/3/library/audit_events.html) of other programs."""
CONNECTS = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto")


class Guard:
    """Watches this process: what it starts, where it connects to, which modules it imports.

    Args:
        folder: where the files of a case lie; `marker` is what its code would write.
    """

    def __init__(self, folder: Path) -> None:
        self.marker = folder / "executed"
        self.seen: list[tuple[str, str]] = []
        self.imported: list[str] = []
        self.is_on = False
        sys.addaudithook(self._hear)  # for the life of the process; it is deaf when it is off

    def _hear(self, event: str, arguments: tuple) -> None:
        if not self.is_on:
            return
        if event.startswith(STARTS) or event in CONNECTS:
            self.seen.append((event, repr(arguments)))
        elif event == "import":
            self.imported.append(arguments[0])

    @contextmanager
    def on(self) -> Iterator[None]:
        """Nothing of a stranger's runs in the body: no marker, no program, no connection."""
        self.seen.clear()
        self.imported.clear()
        self.is_on = True
        try:
            yield
        finally:
            self.is_on = False
            # what the case wrote stays for the next one to trip over, so it is removed first
            executed = self.marker.exists()
            self.marker.unlink(missing_ok=True)
            assert not executed, "code of a stranger's was executed"
            assert self.seen == []

    def refuses(self, call: Callable[[], object]) -> str:
        """Call it under guard; the refusal, which is msenc's own, of a few lines."""
        with self.on():
            try:
                found = call()
            except MsencError as error:
                text = str(error)
            else:
                pytest.fail(f"not refused: {found!r}")
        assert len(text.splitlines()) <= 6
        assert "Traceback" not in text
        return text


_guards: list[Guard] = []


@pytest.fixture
def guard(tmp_path, monkeypatch) -> Guard:
    """A guard; who asks on the terminal is told yes, as a hasty user would."""
    if not _guards:
        _guards.append(Guard(tmp_path))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 20))
    _guards[0].marker = tmp_path / "executed"
    return _guards[0]


@pytest.fixture
def payload(guard) -> str:
    """Python code that leaves the marker."""
    return f"open({str(guard.marker)!r}, 'w').close()\n"


@pytest.fixture
def stored_run(tmp_path, monkeypatch, home) -> Path:
    """The folder of a small run with its data, both writable, in a current folder of its own."""
    with tarfile.open(ARCHIVE) as file:
        file.extractall(tmp_path, filter="data")
    monkeypatch.delenv("MSENC_DATA")
    monkeypatch.delenv("MSENC_RUNS")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs" / "single" / "old"


@pytest.fixture
def no_server() -> Iterator[str]:
    """The address of a server that must not be asked: what connects to it is counted by the guard."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
