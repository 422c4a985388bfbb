"""moto's S3 in this process, which breaks reads of shards on demand."""

import os
import threading
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import fsspec
import pytest


class Storage:
    """A WSGI application: moto's, but the next reads of shards fail as `faults` says; `asked` holds all of these reads.

    ``500``: an internal error; ``cut``: half of the bytes, then none; ``stall``: half of the bytes, and silence.
    """

    def __init__(self, app: Any) -> None:
        self.app = app
        self.faults: list[str] = []
        self.asked: list[str] = []
        self.over = threading.Event()

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if environ["REQUEST_METHOD"] != "GET" or not path.endswith(".tar"):
            return self.app(environ, start_response)
        self.asked.append(path)
        fault = self.faults.pop(0) if self.faults else None
        if fault == "500":
            start_response("500 Internal Server Error", [("Content-Type", "application/xml")])
            return [b"<Error><Code>InternalError</Code><Message>secret-key</Message></Error>"]
        body = b"".join(self.app(environ, start_response))
        return [body] if fault is None else self._half(body, fault)

    def _half(self, body: bytes, fault: str) -> Iterator[bytes]:
        yield body[: len(body) // 2]
        if fault == "stall":
            self.over.wait(60)


@contextmanager
def serve_s3(patch: pytest.MonkeyPatch) -> Iterator[Storage]:
    """S3 for the whole process until the block ends: where the environment says, with the bucket ``bucket``."""
    pytest.importorskip("s3fs", reason="s3fs is absent (extra s3)")
    moto = pytest.importorskip("moto.moto_server.werkzeug_app", reason="moto or flask is absent (extra dev)")
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        def log_request(self, *args: Any) -> None:
            pass

    storage = Storage(moto.DomainDispatcherApplication(moto.create_backend_app))
    server = make_server("127.0.0.1", 0, storage, threaded=True, request_handler=Quiet)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    patch.setenv("NO_PROXY", "127.0.0.1")
    patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    patch.setenv("AWS_ACCESS_KEY_ID", "test")
    patch.setenv("AWS_SECRET_ACCESS_KEY", "secret-key")
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    patch.setenv("AWS_CONFIG_FILE", "/dev/null")
    patch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    system = fsspec.get_filesystem_class("s3")
    system.clear_instance_cache()  # it knows the server of an earlier test
    try:
        reset = urllib.request.Request(f"{os.environ['AWS_ENDPOINT_URL']}/moto-api/reset", method="POST")
        urllib.request.urlopen(reset).close()  # what moto stores is of the process
        fsspec.filesystem("s3").mkdir("bucket")
        yield storage
    finally:
        storage.over.set()
        server.shutdown()
        thread.join()
        server.server_close()
        system.clear_instance_cache()
