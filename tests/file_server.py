"""A web server on this machine's loopback that serves a folder, counts what is asked of it, and fails on demand."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from local_server import running


class FileServer(ThreadingHTTPServer):
    """Serves `folder` at `url`; `asked` holds the path of each GET; what is in `cut` is sent half.

    With a `dataset` (owner/name) it answers as the Hugging Face hub does about that dataset, which is the folder.
    """

    daemon_threads = True

    def __init__(self, folder: Path, dataset: str | None = None) -> None:
        handler = _Handler if dataset is None else _HubHandler
        super().__init__(("127.0.0.1", 0), partial(handler, directory=str(folder)))
        self.dataset = dataset
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.asked: list[str] = []
        self.cut: set[str] = set()


class _Handler(SimpleHTTPRequestHandler):
    server: FileServer

    def do_GET(self) -> None:
        self.server.asked.append(self.path.lstrip("/"))
        super().do_GET()

    def copyfile(self, source, outputfile) -> None:
        data = source.read()
        outputfile.write(data[: len(data) // 2] if self.server.asked[-1] in self.server.cut else data)

    def log_message(self, *args) -> None:
        pass


class _HubHandler(_Handler):
    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        api, files = f"/api/datasets/{self.server.dataset}", f"/datasets/{self.server.dataset}/resolve/"
        if path.startswith(files):
            self.path = "/" + path.removeprefix(files).partition("/")[2]  # after the revision
            super().do_GET()
        elif path.startswith(f"{api}/tree/main"):
            self._answer(self._tree(Path(self.directory)))
        elif path == api:
            self._answer({"id": self.server.dataset, "sha": "0" * 40, "siblings": [], "tags": [], "private": False})
        else:
            self.send_error(404)

    def _tree(self, folder: Path) -> list[dict]:
        return [
            {"type": "file", "path": str(path.relative_to(folder)), "size": path.stat().st_size, "oid": "0" * 40}
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        ]

    def _answer(self, value) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def serve(folder: Path, dataset: str | None = None) -> Iterator[FileServer]:
    """Serve a folder until the block ends; leaving it earlier by `shutdown` and `server_close` is allowed."""
    with running(FileServer(folder, dataset)) as server:
        yield server
