"""`narvl bench serve`: real servers beside one process, and the check of each answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from narvl_plugin.bench.serving import Received, Sent, _checked, serving, table
from narvl_plugin.errors import InputError


@pytest.mark.integration
def test_servers_are_measured_beside_one_process(several_tasks: Path, tmp_path: Path) -> None:
    out = tmp_path / "serve.json"
    result = serving(out, student=several_tasks, images=6, requests=20, clients=3, bad=0.2, repeats=1)
    assert json.loads(out.read_text()) == result
    for name, measured in result["systems"].items():
        statuses = measured["statuses"]
        assert statuses["200"] == 16 and sum(statuses.values()) == 20
        assert [measured[count] for count in ("lost", "unexpected_statuses", "other_answers")] == [0, 0, 0]
        assert 0 < measured["p50_ms"] <= measured["p95_ms"]
        assert result["of_one_process"][name] > 0
    assert len(table(result).splitlines()) == 5


def test_lost_and_wrong_answers_are_counted() -> None:
    sent = [Sent("a", "", b""), Sent("b", "", b""), Sent("a", "", b""), Sent("a", "", b""), Sent("", "", b"", 422)]
    received = [
        Received(200, "cat", 0.5, 0.1),  # as expected
        Received(200, "cat", 0.5, 0.1),  # the answer to another image
        Received(200, "cat", 0.4, 0.1),  # the same text, with another confidence
        Received(0, "", 0.0, 0.0),  # lost
        Received(200, "dog", 0.5, 0.1),  # a bad request that was answered
    ]
    found = _checked(sent, received, {"a": ("cat", 0.5), "b": ("dog", 0.5)})
    assert found == {"statuses": {"0": 1, "200": 4}, "lost": 1, "unexpected_statuses": 1, "other_answers": 2}


def test_a_server_that_does_not_start_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone.pt: no such checkpoint"):
        serving(tmp_path / "out.json", student=tmp_path / "gone.pt", images=1, requests=1)
