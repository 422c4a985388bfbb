"""What stands between the network and the page: who may come in, what may be asked, and how much may be sent.

Gradio serves more than the page uses (an API, links to states, addresses that it fetches for others, recordings, a run
history). `Guard` lets through the requests that the page makes, and no others.
"""

import asyncio
import base64
import binascii
import hashlib
import hmac
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import gradio as gr
from gradio.route_utils import upload_fn
from gradio.routes import file_upload_statuses
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from msenc.pages.render import PAGES
from msenc.talk.address import Address
from msenc.talk.listening import MAX_PART_BYTES, Listeners
from msenc.talk.visitors import MAX_VISITORS, Visitors
from msenc.types import MsencError

MAX_WAITING = 50
"""Turns in the queue."""
MAX_BODY_BYTES = 4 << 20
"""Of a request that is no upload."""
ENVELOPE_BYTES = 64 << 10
"""What a form adds to a file."""
UPLOAD_S = 600.0
"""How long an upload may take."""

JOIN, CALL, UPLOAD, FILE, LISTEN = (
    "/gradio_api/queue/join",
    "/gradio_api/run/predict",
    "/gradio_api/upload",
    "/gradio_api/file=",
    "/talk/listen",
)
_GET = re.compile(
    r"/|/(assets|static|svelte)/.+|/(favicon\.ico|manifest\.json|theme\.css|robots\.txt|config/?)|/gradio_api/"
    r"(app_id|theme\.css|startup-events|upload_progress|queue/data|heartbeat/[\w-]{1,64}|file=.+)",
    re.ASCII | re.DOTALL,
)
_POST = re.compile(r"/gradio_api/(queue/join|run/predict|cancel|reset|upload)|/talk/listen", re.ASCII)
_SESSION = re.compile(r"[\w-]{1,64}", re.ASCII)

PAGE_POLICY = b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'self'"
"""Tells the browser to fetch nothing from elsewhere, whatever a model writes or a part of Gradio asks for."""
FILE_POLICY = b"sandbox; default-src 'none'; media-src 'self'"
"""What a visitor has uploaded runs nothing, whatever its name says that it is."""


def launch_page(page: gr.Blocks, config: Mapping[str, Any], visitors: Visitors, listeners: Listeners) -> str:
    """Serve the page, and return its address; `page.close()` ends it.

    Args:
        page: as `build_page` makes it.
        config: keys of `RespondConfig`.
        visitors: of the page.
        listeners: of the page.
    """
    guard = Middleware(
        Guard,
        visitors=visitors,
        listeners=listeners,
        host=config["host"],
        password=config["page_password"],
        max_upload=config["max_upload_mb"] << 20,
    )
    gr.set_static_paths([visitors.folder])  # shown from where they lie: Gradio would copy them, and keep the copies
    _, address, _ = page.queue(max_size=MAX_WAITING, api_open=False).launch(
        server_name=config["host"],
        server_port=config["port"],
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        ssr_mode=False,
        enable_monitoring=False,
        run_history=False,
        mcp_server=False,
        pwa=False,
        num_workers=0,
        root_path="",
        state_session_capacity=MAX_VISITORS,
        footer_links=[],
        max_file_size=f"{config['max_upload_mb']}mb",
        app_kwargs={"middleware": [guard]},
        theme=gr.themes.Default(primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        css_paths=PAGES / "talk.css",
        head=f"<script>{(PAGES / 'talk.js').read_text(encoding='utf-8')}</script>",
    )
    return address


class Guard:
    """ASGI middleware in front of Gradio.

    Args:
        app: what it guards.
        visitors: of the page.
        listeners: of the page.
        host: address that is served.
        password: asked of everyone; None asks nobody, and so does ``none``.
        max_upload: bytes of a file.
    """

    def __init__(
        self,
        app: ASGIApp,
        visitors: Visitors,
        listeners: Listeners,
        host: str,
        password: str | None,
        max_upload: int,
    ) -> None:
        self.app = app
        self.visitors = visitors
        self.listeners = listeners
        self.password = _digest(password) if password not in (None, "none") else None
        self.max_upload = max_upload
        self.address = Address(host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or let Gradio answer it."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close"})
            return
        request = Request(scope, receive)
        path = scope["path"]
        outgoing = _with_policies(send, FILE_POLICY if path.startswith(FILE) else PAGE_POLICY)
        refusal = self._refuse_stranger(request) or await self._ask_password(request) or self._refuse_unknown(request)
        if refusal is not None:
            await refusal(scope, receive, outgoing)
        elif path == UPLOAD:
            await (await self._upload(request))(scope, receive, outgoing)
        elif path == LISTEN:
            await (await self._listen(request))(scope, receive, outgoing)
        elif scope["method"] == "POST":
            await self._post(request, receive, outgoing)
        else:
            await self._get(request, receive, outgoing)

    # ------------------------------------------------------------------------------------------------ who

    def _refuse_stranger(self, request: Request) -> Response | None:
        """What a request that another site makes is told."""
        method, headers = request.method, request.headers
        host = headers.get("host", "")
        if not self.address.is_named(host):
            return _say(403, f"{host[:100]!r} is no address of this page. Open the one that respond.py printed.")
        origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
        is_link = method == "GET" and headers.get("sec-fetch-mode") == "navigate" and origin is None
        if origin is not None and origin.lower().partition("://")[2] != host.lower():
            return _say(403, "Another site asked for this, and is not answered.")
        if site not in ("same-origin", "none") and not is_link:
            return _say(403, "Another site asked for this, and is not answered.")
        return None

    def _refuse_unknown(self, request: Request) -> Response | None:
        """What a request that the page does not make is told."""
        path = request.scope["path"]
        allowed = {"GET": _GET, "HEAD": _GET, "POST": _POST}.get(request.method)
        if allowed is None or not allowed.fullmatch(path) or not self._is_file_of_a_visitor(path):
            return _say(404, "There is no such thing on this page.")
        return None

    def _is_file_of_a_visitor(self, path: str) -> bool:
        if not path.startswith(FILE):
            return True
        file = Path(path.removeprefix(FILE))
        try:
            return file.is_file() and file.resolve().is_relative_to(self.visitors.folder.resolve())
        except (OSError, ValueError):
            return False

    async def _ask_password(self, request: Request) -> Response | None:
        # Gradio asks itself for /startup-events when it begins; it does nothing.
        if self.password is None or request.scope["path"] == "/gradio_api/startup-events":
            return None
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if kind.lower() == "basic":
            try:
                password = base64.b64decode(given, validate=True).decode("utf-8").partition(":")[2]
            except (binascii.Error, UnicodeDecodeError):
                password = ""
            if hmac.compare_digest(_digest(password), self.password):
                return None
            await asyncio.sleep(1.0)  # who tries many shall take long
        response = _say(401, "This page asks for a password; any user name will do.")
        response.headers["WWW-Authenticate"] = 'Basic realm="Talk to a run", charset="UTF-8"'
        return response

    # ------------------------------------------------------------------------------------------------ what

    async def _get(self, request: Request, receive: Receive, send: Send) -> None:
        """Let Gradio answer; a stream to a visitor shows that the visitor is there."""
        path, scope = request.scope["path"], request.scope
        session = path.rpartition("/")[2] if "/heartbeat/" in path else None
        if path == "/gradio_api/queue/data":
            session = parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [""])[0]
            if not _SESSION.fullmatch(session):
                await _say(400, "There is no such visitor.")(scope, receive, send)
                return
        if session is None:
            try:
                await self.app(scope, receive, send)
            except RuntimeError:  # a clip went into its talk while it was asked for; the client is told
                if self._is_file_of_a_visitor(path):
                    raise
            return
        try:
            with self.visitors.present(session):
                await self.app(scope, receive, send)
        except MsencError as error:
            await _say(503, str(error))(scope, receive, send)

    async def _post(self, request: Request, receive: Receive, send: Send) -> None:
        """Read a call as a whole, look at the files that it names, and let Gradio answer."""
        scope, body = request.scope, bytearray()
        try:
            async for part in request.stream():
                body += part
                if len(body) > MAX_BODY_BYTES:
                    text = f"A turn may not take more than {MAX_BODY_BYTES >> 20} MiB of text."
                    await _say(413, text)(scope, receive, send)
                    return
        except ClientDisconnect:
            return
        if fault := self._fault_of(bytes(body), scope["path"]):
            await _say(400, fault)(scope, receive, send)
            return
        unread = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def again() -> Message:
            return unread.pop() if unread else await receive()

        is_full = False

        async def unless_full(message: Message) -> None:
            nonlocal is_full
            if message["type"] == "http.response.start" and scope["path"] == JOIN and message["status"] == 503:
                is_full = True
                text = f"{MAX_WAITING} are waiting for a reply, which is the most. Send it again in a moment."
                await _say(429, text)(scope, receive, send)
            elif not is_full:
                await send(message)

        await self.app(scope, again, unless_full)

    def _fault_of(self, body: bytes, path: str) -> str | None:
        """Why Gradio must not read a call: it would fetch whatever address is given as a file."""
        fault = "The page makes no such request."
        try:
            call = json.loads(body)
            session = call.get("session_hash")
        except (ValueError, RecursionError, AttributeError):
            return fault
        if (session is not None or path in (JOIN, CALL)) and not (
            isinstance(session, str) and _SESSION.fullmatch(session)
        ):
            return fault
        unread = [call]
        while unread:
            value = unread.pop()
            if isinstance(value, dict):
                file = value.get("path")
                if "path" in value and not (isinstance(file, str) and self.visitors.is_upload(Path(file))):
                    return "An uploaded file is not there any more. Remove it, and upload it again."
                unread += value.values()
            elif isinstance(value, list):
                unread += value
        return None

    async def _upload(self, request: Request) -> Response:
        """Take a file, in a folder that nobody else knows; the answer is its path, as Gradio's own."""
        most = self.max_upload + ENVELOPE_BYTES
        stated = request.headers.get("content-length", "")
        size = int(stated) if stated.isdecimal() and len(stated) < 20 else most
        too_large = PlainTextResponse(f"The file is larger than {self.max_upload >> 20} MiB, which is the most.", 413)
        if size > most:
            return too_large
        num_read = 0

        async def bounded() -> Message:
            nonlocal num_read
            message = await request.receive()
            num_read += len(message.get("body", b""))
            return message if num_read <= size else {"type": "http.disconnect"}

        upload_id = request.query_params.get("upload_id", "")[:64] or None
        try:
            with self.visitors.incoming(size) as place:
                async with asyncio.timeout(UPLOAD_S):
                    files, _, _ = await upload_fn(
                        Request(request.scope, bounded),
                        place,
                        self.max_upload,
                        upload_id,
                        upload_progress=file_upload_statuses if upload_id else None,
                    )
        except MsencError as error:
            return PlainTextResponse(str(error), 507)
        except (ClientDisconnect, TimeoutError, MultiPartException, HTTPException, TypeError, AttributeError) as error:
            is_over = num_read > size or "maximum allowed size" in str(getattr(error, "message", ""))
            broken = PlainTextResponse("The file did not arrive as a whole. Upload it again.", 400)
            return too_large if is_over else broken
        finally:
            if upload_id:
                asyncio.get_running_loop().call_later(60.0, file_upload_statuses.stop_tracking, upload_id)
        return JSONResponse(files)

    async def _listen(self, request: Request) -> Response:
        """Hear a part of an open microphone's sound; see `Listeners.hear`."""
        session = request.query_params.get("session_hash", "")
        if not _SESSION.fullmatch(session):
            return _say(400, "There is no such visitor.")
        samples = bytearray()
        try:
            async for part in request.stream():
                samples += part
                if len(samples) > MAX_PART_BYTES:
                    return _say(413, f"At most {MAX_PART_BYTES:,} bytes of sound may come at once.")
            return JSONResponse(await asyncio.to_thread(self.listeners.hear, session, bytes(samples)))
        except ClientDisconnect:
            return _say(400, "The sound did not arrive as a whole.")
        except MsencError as error:
            return _say(503, str(error))


def _say(status: int, text: str) -> Response:
    """A sentence where Gradio's page looks for it."""
    return JSONResponse({"detail": text, "error": text}, status)


def _digest(password: str) -> bytes:
    return hashlib.sha256(password.encode("utf-8", "surrogateescape")).digest()


def _with_policies(send: Send, policy: bytes) -> Send:
    headers = [(b"content-security-policy", policy), (b"x-content-type-options", b"nosniff")]

    async def send_with_policies(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", ()), *headers]
        await send(message)

    return send_with_policies
