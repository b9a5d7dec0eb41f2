"""The benchmark of a training's step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from narvl_plugin.bench.training import StepCost, TrainingStep, Wait, step_costs, table, wait_for_batches
from narvl_plugin.errors import InputError


def test_parts_of_steps_are_timed() -> None:
    steps = {
        "plain": TrainingStep("nano", side=64, batch=2, features=True),
        "checkpoints": TrainingStep(
            "nano", side=64, batch=2, optimizer="fused_adam", checkpoint_activations=True, bfloat16=True
        ),
    }
    weight = steps["checkpoints"].student.decoder.query_embed.weight
    before = weight.detach().clone()
    costs = step_costs(steps, repeats=1, threads=1)
    assert not torch.equal(weight, before)
    for cost in costs.values():
        assert min(cost.parts.values()) > 0
    assert costs["checkpoints"].kept_mb < costs["plain"].kept_mb / 2


def test_shares_and_rates_follow_from_the_times() -> None:
    cost = StepCost(forward=10.0, loss=1.0, backward=20.0, optimizer=9.0, kept_mb=3.0, batch=4)
    assert cost.samples_per_second == pytest.approx(100)
    faster = StepCost(forward=10.0, loss=1.0, backward=5.0, optimizer=4.0, kept_mb=3.0, batch=4)
    text = table({"adam": cost, "fused_adam": faster})
    assert "backward 20.0 ms (50.0%)" in text
    assert "200.00 samples/s (2.000 of adam)" in text
    assert Wait(wait=1.0, step=3.0, batches=5).share == 0.25


def test_waiting_is_measured_on_a_file(
    write_tsv: Callable[..., Path], caption_rows: list[list[str]], vocabulary: Path
) -> None:
    data = write_tsv("train.tsv", caption_rows)
    found = wait_for_batches(data, task="caption", bpe_dir=vocabulary, side=32, batch=2, batches=5)
    assert found.batches == len(caption_rows) // 2 - 1
    assert found.wait >= 0
    assert found.step > 0
    with pytest.raises(InputError, match="a single batch"):
        wait_for_batches(data, task="caption", bpe_dir=vocabulary, side=32, batch=6)
    with pytest.raises(InputError, match="--task captions: choose one of caption"):
        wait_for_batches(data, task="captions", bpe_dir=vocabulary)
