"""The table of all systems: what is measured of each, and that it is of the same rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partialmethod
from pathlib import Path

import pytest
import torch
from torch import nn

from narvl_plugin.bench.stages import STAGES
from narvl_plugin.bench.systems import BATCHES, compare, table
from narvl_plugin.export import export


@pytest.mark.integration
def test_every_system_is_measured(
    make_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch._dynamo.config, "fail_on_cache_limit_hit", True)  # or layers would run uncompiled
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager"))  # in seconds
    student = make_model("narvl_tiny", "qctc", "--num-queries", 16, updates=30)
    teacher = make_model("ofa_tiny", "cross_entropy", updates=2)
    export(student, tmp_path / "graph", to="torch-export")
    out = tmp_path / "bench" / "models.json"
    options = {"images": 4, "warmup": 1, "repeats": 2, "exported": [tmp_path / "graph"], "compiled": True}
    result = compare(out, teacher=teacher, student=student, data=tmp_path / "train.tsv", **options)
    assert json.loads(out.read_text()) == result
    assert "<svg" in out.with_suffix(".svg").read_text()
    own = ["teacher_beam5", "teacher_greedy", "student_greedy", "student_beam5"]
    names = [*own, *(f"{name}_compiled" for name in own), "student_torch-export"]
    assert list(result["systems"]) == names
    for name, found in result["systems"].items():
        assert found["p50_ms"] > 0 and found["n"] == 8 and found["spread_ms"] >= 0
        assert set(found["images_per_second"]) == {str(size) for size in BATCHES}
        assert ("stages" in found) == (name != "student_torch-export")
        assert list(found.get("stages", STAGES)) == list(STAGES)
        assert found["encoder_share"] > 0
    qualities = {name: found["quality"] for name, found in result["systems"].items()}
    assert qualities["teacher_beam5_compiled"] == pytest.approx(qualities["teacher_beam5"])
    assert qualities["student_greedy_compiled"] == pytest.approx(qualities["student_greedy"])
    lines = table(result).splitlines()
    assert len([line for line in lines if line.startswith("| student_greedy |")]) == 2
    assert lines[0].endswith("| of teacher_beam5 | of teacher_greedy |")
