"""The gate before Gradio: what the page needs passes, and everything else is refused.

Gradio has far more addresses than the page needs. Some open files, download addresses or write files that a request
names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_UPLOAD = 20 << 20
"""Largest file that a visitor may upload, in bytes."""
MAX_REQUEST = 64 << 10
"""Largest request that is no upload, in bytes; also what may surround the file in an upload."""

FILE = "/gradio_api/file="
JOIN = "/gradio_api/queue/join"
UPLOAD = "/gradio_api/upload"
READ = frozenset(
    {"/", "/config", "/theme.css", "/favicon.ico", "/manifest.json"}
    | {"/gradio_api/queue/data", "/gradio_api/upload_progress"}
)
READ_BELOW = ("/assets/", "/static/", "/gradio_api/heartbeat/")
WRITTEN = frozenset({JOIN, UPLOAD, "/gradio_api/cancel"})

HEADERS = {
    # The browser itself refuses to load anything from elsewhere. Gradio's page has scripts and styles in it.
    "content-security-policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; media-src 'self' data: blob:; "
    "font-src 'self' data:; worker-src 'self' blob:; frame-ancestors 'none'; base-uri 'self'; form-action 'self'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
LOOPBACK = ("127.0.0.1", "localhost", "::1")
LOCAL_HOST = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:\d+)?")
"""This machine in the header of a request."""


class Gate:
    """Passes on what the page needs."""

    def __init__(self, app: ASGIApp, uploads: Path, local: bool) -> None:
        """Guard an application.

        Args:
            app: Gradio.
            uploads: the folder of uploaded files, the only one whose files may be named in a request.
            local: whether the page is for this machine only; requests under another host's name are then refused, as
                they come from a page that has this machine's address under its own name.
        """
        self.app, self.uploads, self.local = app, uploads.resolve(), local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close"})
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                added = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *added]}
            await send(message)

        request = Request(scope, receive)
        status, reason = self._refusal(request)
        if not status and scope["path"] == JOIN:
            body = await request.body()
            receive = _again(body, receive)
            status, reason = self._body_refusal(body)
        if status:
            await PlainTextResponse(reason, status)(scope, receive, with_headers)
            return
        await self.app(scope, receive, with_headers)

    def _refusal(self, request: Request) -> tuple[int, str]:
        """Return the status and the reason to refuse a request with; 0 if it may pass."""
        path, method, host = request.url.path, request.method, request.headers.get("host", "")
        if self.local and not LOCAL_HOST.fullmatch(host):
            return 403, "This page is for its own machine only."
        origin = request.headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            return 403, "Other pages may not use this one."
        if method in ("GET", "HEAD"):
            if path.startswith(FILE):
                return (0, "") if self._is_upload(path.removeprefix(FILE)) else (403, "No such upload.")
            return (0, "") if path in READ or path.startswith(READ_BELOW) else (404, "Not found.")
        if method != "POST" or path not in WRITTEN:
            return 404, "Not found."
        length = request.headers.get("content-length", "")
        if not length.isdecimal():
            return 411, "The request does not tell its length."
        if int(length) > MAX_REQUEST + (MAX_UPLOAD if path == UPLOAD else 0):
            return 413, f"The request is too long; files may have {MAX_UPLOAD >> 20} MB."
        return 0, ""

    def _body_refusal(self, body: bytes) -> tuple[int, str]:
        """Return the status and the reason to refuse an event with: its files must be uploads."""
        try:
            paths = list(_paths(json.loads(body)))
        except (ValueError, RecursionError):
            return 400, "The event is not JSON."
        if not all(path is None or self._is_upload(path) for path in paths):
            return 403, "Only uploaded files can be used."
        return 0, ""

    def _is_upload(self, path: Any) -> bool:
        try:
            return isinstance(path, str) and Path(path).resolve().is_relative_to(self.uploads)
        except (OSError, ValueError):  # such as a name with a null byte
            return False


def _paths(value: Any) -> Iterator[Any]:
    """Yield each value with the key `path` in a JSON value, at any depth."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            if "path" in one:
                yield one["path"]
            waiting.extend(one.values())
        elif isinstance(one, list):
            waiting.extend(one)


def _again(body: bytes, receive: Receive) -> Receive:
    """Return a channel that first gives a body that has been read."""
    first = True

    async def give() -> Message:
        nonlocal first
        if first:
            first = False
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return give
