"""A stand-in of the Hugging Face hub's HTTP API for models, on this machine's loopback: repositories of commits."""

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

from local_server import running

TOKEN = "hf_token-of-the-test"


class Repo:
    """Commits by their hashes, each file name -> content; `main` is the newest."""

    def __init__(self, private: bool) -> None:
        self.private = private
        self.commits: dict[str, dict[str, bytes]] = {"0" * 40: {}}

    @property
    def main(self) -> str:
        return list(self.commits)[-1]

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[self.main]

    def commit(self, files: dict[str, bytes]) -> str:
        name = hashlib.sha1(repr((len(self.commits), sorted(files.items()))).encode()).hexdigest()
        self.commits[name] = files
        return name


class HubServer(ThreadingHTTPServer):
    """Serves `repos` at `url`; only with `TOKEN` may one write, or read what is private. `asked` has each request."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, Repo] = {}
        self.stored: dict[str, bytes] = {}  # LFS
        self.asked: list[str] = []


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._route()

    do_HEAD = do_POST = do_PUT = do_GET

    def _route(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(f"{self.command} {path}")
        self.may = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if path.startswith("/stored/"):
            self.server.stored[path.removeprefix("/stored/")] = body
            return self._json({})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        name, _, rest = path.removeprefix("/api/models").lstrip("/").partition("/")
        short, _, rest = rest.partition("/")
        is_lfs = short.endswith(".git")
        repo = self.server.repos.get(f"{name}/{short.removesuffix('.git')}")
        if repo is None or (repo.private and not self.may):
            return self._refuse(401, "RepoNotFound")
        if self.command in ("POST", "PUT") and not self.may:
            return self._refuse(403, "Forbidden")
        if is_lfs:
            return self._json({"objects": [self._action(o) for o in json.loads(body)["objects"]]})
        what, _, rest = rest.partition("/")
        revision, _, file = rest.partition("/")
        commit = {"": repo.main, "main": repo.main}.get(revision, revision)
        if commit not in repo.commits:
            return self._refuse(404, "RevisionNotFound")
        files = repo.commits[commit]
        if what in ("", "revision"):
            siblings = [{"rfilename": path} for path in files]
            about = {"id": f"{name}/{short}", "sha": commit, "private": repo.private, "siblings": siblings, "tags": []}
            return self._json(about)
        if what == "tree":
            return self._json([_entry(path, content) for path, content in files.items()])
        if what == "preupload":
            mode = {False: "regular", True: "lfs"}
            asked = json.loads(body)["files"]
            modes = [{"uploadMode": mode[f["path"].endswith(".safetensors")], "shouldIgnore": False} for f in asked]
            return self._json({"files": [{"path": f["path"], **m} for f, m in zip(asked, modes, strict=True)]})
        if what == "commit":
            return self._commit(repo, body)
        if what == "resolve" and file in files:
            headers = {"X-Repo-Commit": commit, "ETag": f'"{_oid(files[file])}"'}
            return self._answer(200, files[file], headers)
        return self._refuse(404, "EntryNotFound")

    def _create(self, asked: dict) -> None:
        if not self.may:
            return self._refuse(401, "Unauthorized")
        name = f"{asked['organization'] or 'me'}/{asked['name']}"
        if name in self.server.repos:
            return self._answer(409, json.dumps({"error": "taken", "url": f"{self.server.url}/{name}"}).encode())
        self.server.repos[name] = Repo(asked.get("visibility") == "private" or asked.get("private") is True)
        return self._json({"url": f"{self.server.url}/{name}", "id": name})

    def _action(self, wanted: dict) -> dict:
        return {**wanted, "actions": {"upload": {"href": f"{self.server.url}/stored/{wanted['oid']}"}}}

    def _commit(self, repo: Repo, body: bytes) -> None:
        files = dict(repo.files)
        for line in filter(None, body.split(b"\n")):
            key, value = (entry := json.loads(line))["key"], entry["value"]
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.server.stored[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        name = repo.commit(files)
        self._json({"success": True, "commitOid": name, "commitUrl": f"{self.server.url}/me/x/commit/{name}"})

    def _refuse(self, status: int, code: str) -> None:
        self._answer(status, json.dumps({"error": code}).encode(), {"X-Error-Code": code})

    def _json(self, value: object) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


def _oid(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _entry(path: str, content: bytes) -> dict:
    entry = {"type": "file", "path": path, "size": len(content), "oid": _oid(content)[:40]}
    lfs = {"oid": _oid(content), "size": len(content), "pointerSize": 100}
    return entry | ({"lfs": lfs} if path.endswith(".safetensors") else {})


@contextmanager
def serve_hub() -> Iterator[HubServer]:
    """The hub, until the block ends."""
    with running(HubServer()) as server:
        yield server
