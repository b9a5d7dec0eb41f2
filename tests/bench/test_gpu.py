"""The benchmark of a GPU, on the CPU with a small model: all parts run, and what follows from their numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch.utils.flop_counter import FlopCounterMode

from narvl_plugin.bench.gpu import DISTINCT, Scale, add_shares, fitting, measure, table, write_images
from narvl_plugin.bench.training import TrainingStep

TINY = Scale(size="nano", side=64, repeats=1, labels=500, batches=(2,), training_batch=2, waits=2)
PARTS = ["loss", "matrix", "one_image", "batches", "training", "input"]


@pytest.mark.integration
def test_all_parts_run_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    result = measure(out, TINY, device="cpu", seconds=10_000)
    assert json.loads(out.read_text()) == json.loads(json.dumps(result))
    parts = result["parts"]
    assert list(parts) == PARTS
    assert not any("skipped" in part for part in parts.values())
    assert parts["loss"]["query_ctc"]["error"] < 1e-5
    image = parts["one_image"]
    assert image["captured"] == {"student": 0, "encoder": 0, "teacher": 0}  # which needs a GPU
    assert image["floor_ms"] > 0
    assert image["bound"] == pytest.approx(image["ms"]["teacher"] / image["ms"]["encoder"])
    captured = image["ms"]["teacher_captured"] / image["ms"]["student_captured"]
    assert image["speed_up_captured"] == pytest.approx(captured)
    assert 0 < parts["batches"]["share_of_rate"]["2"] < 1
    assert parts["training"]["largest_batch"] is None
    assert 0 < parts["training"]["batch_2"]["share_of_rate"] < 1
    with FlopCounterMode(display=False) as forward:
        TrainingStep("nano", side=64, batch=1).forward()
    # Forward and both gradients take three times the forward pass; the backbone of this size is frozen.
    assert 1.5 < parts["training"]["gflop_of_sample"] / (forward.get_total_flops() / 1e9) < 3
    assert parts["input"]["batches"] == 2
    assert 0 <= parts["input"]["share"] < 1
    text = table(result)
    assert all(f"| {part} |" in text for part in PARTS)


def test_parts_that_might_not_end_in_time_are_left_out(tmp_path: Path) -> None:
    result = measure(tmp_path / "gpu.json", TINY, device="cpu", seconds=5)
    assert list(result["parts"]) == PARTS
    assert result["parts"]["matrix"]["skipped"].endswith("of 5 s were left, and it may take 10")
    assert all("skipped" in part for part in result["parts"].values())
    assert "may take 75" in table(result)


def test_shares_follow_from_the_rate() -> None:
    parts = {
        "matrix": {"gflops": 1000.0},
        "one_image": {"gflop": 10.0},
        "batches": {"gflop": 10.0, "images_per_second": {"32": 50.0}},
        "training": {"gflop_of_sample": 20.0, "largest_batch": None, "batch_8": {"samples_per_second": 10.0}},
        "input": {"skipped": "no time"},
    }
    add_shares(parts)
    assert parts["one_image"]["floor_ms"] == pytest.approx(10)
    assert parts["batches"]["share_of_rate"] == {"32": pytest.approx(0.5)}
    assert parts["training"]["batch_8"]["share_of_rate"] == pytest.approx(0.2)


def test_the_largest_batch_follows_from_two_small_ones() -> None:
    assert fitting({8: 100, 16: 180}, total=1000) == 98  # 20 and 10 a sample


def test_images_repeat(tmp_path: Path) -> None:
    rows = [line.split("\t") for line in write_images(tmp_path / "train.tsv", DISTINCT + 2).read_text().splitlines()]
    assert len(rows) == DISTINCT + 2
    assert rows[0][4] == rows[DISTINCT][4] != rows[1][4]
