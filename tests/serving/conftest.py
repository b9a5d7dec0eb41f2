from __future__ import annotations

import http.client
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from narvl_plugin.bench.serving import FORM, Running, form, running_server


class Response(NamedTuple):
    """The status, the headers and the body of an answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Client:
    """Sends requests to a server."""

    def __init__(self, server: Running) -> None:
        self.pid, self.port = server

    def request(self, method: str, path: str, body: bytes = b"", kind: str = FORM, **headers: str) -> Response:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, path, body, {"Content-Type": kind, **headers})
        answer = connection.getresponse()
        found = Response(answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read())
        connection.close()
        return found

    def get(self, path: str) -> Response:
        return self.request("GET", path)

    def form(self, path: str, **fields: str | bytes) -> Response:
        return self.request("POST", path, form(**fields))

    def json(self, path: str, **fields: Any) -> Response:
        return self.request("POST", path, json.dumps(fields).encode(), "application/json")


@pytest.fixture(scope="session")
def start_server(several_tasks: Path) -> Iterator[Callable[..., Client]]:
    """Give a function that starts `narvl serve`, by default of a random student, until the tests end."""
    from contextlib import ExitStack

    with ExitStack() as servers:

        def start(*options: object, checkpoint: Path = several_tasks, **environment: str) -> Client:
            environment = {"OMP_NUM_THREADS": "1", **environment}
            return Client(
                servers.enter_context(running_server(checkpoint, "--device", "cpu", *options, environment=environment))
            )

        yield start
