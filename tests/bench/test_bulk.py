"""`narvl bench bulk`: both engines beside each other, each in a process of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from narvl_plugin.bench.bulk import bulk, table
from narvl_plugin.errors import InputError


@pytest.mark.integration
def test_both_engines_are_measured(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="pip install 'narvl[ray]'")
    out = tmp_path / "bulk.json"
    result = bulk(out, images=20, repeats=1)
    assert json.loads(out.read_text()) == result
    speeds = result["images_per_second"]
    assert result["time_ratio"] == pytest.approx(speeds["local"] / speeds["ray"])
    assert result["start_seconds"]["local"] < 0.1 < result["start_seconds"]["ray"]
    assert 0 < result["memory_mb"]["local"] < result["memory_mb"]["ray"]
    assert len(table(result).splitlines()) == 4


def test_a_run_that_fails_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="local: failed .*gone.pt: no such checkpoint"):
        bulk(tmp_path / "bulk.json", student=tmp_path / "gone.pt", images=1, repeats=1)
