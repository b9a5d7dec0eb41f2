"""The gate before Gradio: what the page needs passes, and a visitor can name no file and no address."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio", reason="the page needs the package gradio")

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from narvl_plugin.demo.gate import JOIN, MAX_REQUEST, MAX_UPLOAD, UPLOAD, Gate

HERE = "http://127.0.0.1:7860"


@pytest.fixture
def uploads(tmp_path: Path) -> Path:
    (tmp_path / "secret.png").write_bytes(b"secret")
    folder = tmp_path / "uploads"
    folder.mkdir()
    (folder / "mine.png").write_bytes(b"mine")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    return folder


@pytest.fixture
def visitor(uploads: Path) -> TestClient:
    """A visitor of an application that answers everything with what it received."""

    async def passed(request: Request) -> PlainTextResponse:
        return PlainTextResponse(await request.body())

    app = Starlette(routes=[Route("/{path:path}", passed, methods=["GET", "POST", "PUT"])])
    return TestClient(Gate(app, uploads, local=True), base_url=HERE)


@pytest.mark.parametrize("path", ["/", "/assets/index.js", "/static/a.css", "/theme.css", "/gradio_api/queue/data"])
def test_the_page_and_what_it_loads_pass_and_load_nothing_from_elsewhere(visitor: TestClient, path: str) -> None:
    answer = visitor.get(path)
    assert answer.status_code == 200
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert "http" not in answer.headers["content-security-policy"]


@pytest.mark.parametrize(
    "path",
    [
        *("/gradio_api/proxy=https://example.org", "/gradio_api/info", "/gradio_api/openapi.json", "/docs"),
        *("/gradio_api/run/answer", "/gradio_api/call/answer", "/gradio_api/vibe-code", "/gradio_api/runs"),
        *("/gradio_api/component_server", "/gradio_api/file/etc/passwd", "/monitoring", "/gradio_api/deep_link"),
    ],
)
def test_other_addresses_of_gradio_are_not_there(visitor: TestClient, path: str) -> None:
    for method in ("GET", "POST", "PUT", "DELETE"):
        assert visitor.request(method, path).status_code == 404


def test_files_are_those_that_visitors_uploaded(visitor: TestClient, uploads: Path) -> None:
    assert visitor.get(f"/gradio_api/file={uploads}/mine.png").status_code == 200
    for path in (
        *("/etc/passwd", "https://example.org/a.png", "//example.org/a.png", "mine.png", "a%00b", "%2e%2e/secret.png"),
        *(f"{uploads}/../secret.png", f"{uploads}/%2e%2e/secret.png", f"{uploads}/link.png", f"{uploads}2/a.png"),
    ):
        assert visitor.get(f"/gradio_api/file={path}").status_code == 403, path


def event(path: Any) -> dict[str, Any]:
    return {"data": [{"path": path, "meta": {"_type": "gradio.FileData"}}, "caption"], "session_hash": "a"}


def test_events_name_uploads_only(visitor: TestClient, uploads: Path) -> None:
    good = event(f"{uploads}/mine.png")
    answer = visitor.post(JOIN, json=good)
    assert answer.status_code == 200 and answer.json() == good, "the body is handed on as it came"
    for path in ("/etc/passwd", "https://example.org/a.png", f"{uploads}/../secret.png", f"{uploads}/link.png", 3, [1]):
        assert visitor.post(JOIN, json=event(path)).status_code == 403, path
    nested = {"event_data": {"a": [[{"b": event("https://example.org/a.png")}]]}}
    assert visitor.post(JOIN, json=nested).status_code == 403
    twice = f'{{"path": "{uploads}/mine.png", "path": "/etc/passwd"}}'
    assert visitor.post(JOIN, content=twice).status_code == 403


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[" * 60_000])
def test_events_that_are_no_json_are_refused(visitor: TestClient, body: bytes) -> None:
    assert visitor.post(JOIN, content=body).status_code == 400


def test_long_requests_are_refused_before_they_are_read(visitor: TestClient) -> None:
    assert visitor.post(JOIN, content=json.dumps("a" * MAX_REQUEST)).status_code == 413
    assert visitor.post(UPLOAD, content=b"a" * (2 * MAX_REQUEST)).status_code == 200
    too_long = {"content-length": str(MAX_UPLOAD + MAX_REQUEST + 1)}
    assert visitor.post(UPLOAD, content=b"a", headers=too_long).status_code == 413
    assert visitor.post(UPLOAD, content=iter([b"a"])).status_code == 411


def test_pages_of_others_cannot_use_it(visitor: TestClient, uploads: Path) -> None:
    good = event(f"{uploads}/mine.png")
    assert visitor.post(JOIN, json=good, headers={"origin": HERE}).status_code == 200
    for origin in ("http://example.org", "null", "http://127.0.0.1:80", "http://127.0.0.1:7860.example.org"):
        assert visitor.post(JOIN, json=good, headers={"origin": origin}).status_code == 403, origin
    assert visitor.get("/", headers={"host": "example.org"}).status_code == 403
    assert visitor.get("/", headers={"host": "[::1]:7860"}).status_code == 200
    assert visitor.get("/", headers={"host": "["}).status_code == 403


def test_for_other_machines_it_has_any_name(uploads: Path) -> None:
    app = Starlette(routes=[Route("/", lambda request: PlainTextResponse("page"))])
    everyone = TestClient(Gate(app, uploads, local=False), base_url="http://192.168.0.7:7860")
    assert everyone.get("/").text == "page"


def test_there_are_no_websockets(visitor: TestClient) -> None:
    from starlette.websockets import WebSocketDisconnect

    with pytest.raises(WebSocketDisconnect), visitor.websocket_connect("/"):
        pass
