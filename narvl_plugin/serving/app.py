"""The routes of the server."""

from __future__ import annotations

import hmac
import time
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from narvl_plugin.serving.messages import OK
from narvl_plugin.serving.pool import Pool, Unavailable
from narvl_plugin.serving.requests import FORM, JSON, read_question
from narvl_plugin.serving.schemas import Prediction, Problem, request_schema

RETRY_AFTER = {"Retry-After": "1"}
"""Seconds after which a client may try again, where the server is too busy."""
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
"""Limits of the histogram of latencies."""
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
"""Limits of the histogram of batch sizes."""
REASONS = {
    400: "The body is not readable.",
    401: "The key is missing or wrong.",
    413: "The body is too large.",
    415: "The content type is neither a form nor JSON.",
    422: "A field or the image cannot be used.",
    503: "Too many requests, or a worker ended. Try again after the seconds of Retry-After.",
}
"""What the statuses other than 200 mean."""
SUMMARIES = {
    "caption": "Describe an image in a sentence.",
    "answer": "Answer a question about an image.",
    "locate": "Find the region of an image that a text describes.",
    "regions": "Find all regions of an image that a text describes.",
    "graph": "Find the relations of the objects in an image.",
    "tree": "Find the regions of a scene, and the objects in each, as a tree.",
    "entails": "Tell whether an image shows what a statement says: yes, no or maybe.",
}


@dataclass(frozen=True)
class Limits:
    """What a request may hold.

    Attributes:
        max_queue: the number of requests that may be under way.
        max_bytes: the largest body.
        max_text: the largest number of characters of a text.
    """

    max_queue: int
    max_bytes: int
    max_text: int


class Metrics:
    """What `/metrics` tells."""

    def __init__(self, service: Service) -> None:
        self.registry = CollectorRegistry()
        own: Any = {"registry": self.registry}
        self.requests = Counter("narvl_requests", "Requests by verb and HTTP status.", ["verb", "status"], **own)
        self.seconds = Histogram(
            "narvl_request_seconds", "Time from a request to its answer.", ["verb"], buckets=SECONDS, **own
        )
        self.batches = Histogram("narvl_batch_size", "Images that were predicted together.", buckets=SIZES, **own)
        pool = service.pool
        Gauge("narvl_queue_length", "Requests that no worker has yet.", **own).set_function(lambda: pool.waiting)
        Gauge("narvl_requests_under_way", "Requests without an answer.", **own).set_function(lambda: service.under_way)
        Gauge("narvl_workers_ready", "Workers that can answer.", **own).set_function(lambda: pool.ready)
        Gauge("narvl_worker_restarts", "Workers that were replaced.", **own).set_function(lambda: pool.restarts)


class Gate:
    """Lets only requests with the key pass, and counts those of verbs."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service
        self.expected = None if service.key is None else f"Bearer {service.key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        verb = scope["path"].removeprefix("/")
        if verb not in self.service.pool.verbs:
            await self._pass(scope, receive, send)
            return
        start, status = time.perf_counter(), "500"

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            await self._pass(scope, receive, watch)
        finally:
            self.service.metrics.requests.labels(verb, status).inc()
            self.service.metrics.seconds.labels(verb).observe(time.perf_counter() - start)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.expected is not None and scope["path"] != "/health":
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self.expected):
                refused = JSONResponse(
                    {"detail": "the key is missing or wrong; send the header Authorization: Bearer KEY"},
                    401,
                    {"WWW-Authenticate": "Bearer"},
                )
                await refused(scope, receive, send)
                return
        await self.app(scope, receive, send)


class Service:
    """Answers the requests of all routes.

    Attributes:
        pool: the workers.
        limits: what a request may hold.
        key: the key that requests need, None where they need none.
        under_way: the number of requests of verbs that have no answer yet.
        metrics: what `/metrics` tells.
    """

    def __init__(self, pool: Pool, limits: Limits, key: str | None) -> None:
        self.pool, self.limits, self.key = pool, limits, key
        self.under_way = 0
        self.metrics = Metrics(self)
        self._schemas = {verb: request_schema(verb, limits.max_text) for verb in pool.verbs}

    async def predict(self, request: Request) -> Response:
        """Answer a request of a verb.

        Raises:
            HTTPException: if it cannot be answered.
        """
        if self.under_way >= self.limits.max_queue:
            raise HTTPException(503, f"{self.under_way} requests are under way; try again later", RETRY_AFTER)
        verb = request.url.path.removeprefix("/")
        self.under_way += 1
        try:
            question = await read_question(request, verb, self._schemas[verb], self.limits.max_bytes)
            answer = await self.pool.ask(question)
        except Unavailable as error:
            raise HTTPException(503, str(error), RETRY_AFTER) from error
        finally:
            self.under_way -= 1
        if answer.batch:
            self.metrics.batches.observe(answer.batch)
        if answer.status != OK:
            raise HTTPException(answer.status, answer.body.decode())
        return Response(answer.body, media_type=JSON)

    async def health(self) -> Response:
        """Tell whether a worker can answer."""
        ready = self.pool.ready
        return JSONResponse({"workers_ready": ready}, 200 if ready else 503)

    async def tell_metrics(self) -> Response:
        """Return the metrics in Prometheus's format."""
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def index(self) -> Response:
        """Tell what is there."""
        return PlainTextResponse(f"narvl: {self.addresses()}; GET /health, /metrics, /openapi.json\n")

    def addresses(self) -> str:
        """Return the addresses of the verbs in words."""
        return "POST " + ", ".join(f"/{verb}" for verb in self.pool.verbs)

    async def not_found(self, request: Request, error: Exception) -> Response:
        """Tell which addresses there are."""
        return JSONResponse({"detail": f"there is no such address; {self.addresses()}"}, 404)

    async def failed(self, request: Request, error: Exception) -> Response:
        """Tell that the server has an error; uvicorn logs it."""
        return JSONResponse({"detail": "the server failed to answer this request"}, 500)

    def app(self) -> FastAPI:
        """Return the routes.

        There is no page of documentation, which would load scripts from elsewhere: `/openapi.json` alone.
        """
        app = FastAPI(title="narvl", docs_url=None, redoc_url=None, redirect_slashes=False)
        responses: dict[int | str, dict[str, Any]] = {200: {"model": Prediction}}
        responses |= {status: {"model": Problem, "description": reason} for status, reason in REASONS.items()}
        for verb, schema in self._schemas.items():
            described = schema.model_json_schema()
            form = {**described, "properties": dict(described["properties"])}
            form["properties"]["image"] = {"type": "string", "format": "binary"}
            app.add_api_route(
                f"/{verb}",
                self.predict,
                methods=["POST"],
                operation_id=verb,
                summary=SUMMARIES[verb],
                description="Send the file of an image in a form, or as base64 in JSON.",
                response_model=None,
                responses=responses,
                openapi_extra={
                    "requestBody": {"required": True, "content": {FORM: {"schema": form}, JSON: {"schema": described}}}
                },
            )
        for path, route in (("/", self.index), ("/health", self.health), ("/metrics", self.tell_metrics)):
            app.add_api_route(path, route, methods=["GET"], response_model=None)
        app.add_exception_handler(404, self.not_found)
        app.add_exception_handler(Exception, self.failed)
        app.add_middleware(Gate, service=self)
        return app
