"""A training on several machines, each a torchrun on this one, is that of one process; it ends if a process does."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

Losses = dict[int, float]
STEPS = ("wps", "wpb", "bsz", "ppl")  # the last has a power of the loss


def words_of(log: Path, kind: str) -> list[str]:
    """Return the words that LAUNCHER printed after some word."""
    lines = [line.split() for line in log.read_text().splitlines()]
    return [word for line in lines if line[:1] == [kind] for word in line[1:]]


def validations(log: Path) -> list[dict[str, float]]:
    """Return the numbers of each validation in a log, without those of time and of the sizes of steps."""
    found = re.findall(r"\| INFO \| valid \| (\{.*\})", log.read_text())
    numbers = [{name: float(value) for name, value in json.loads(line).items()} for line in found]
    steps = {f"valid_{name}" for name in STEPS}
    return [{name: number for name, number in each.items() if name not in steps} for each in numbers]


@pytest.mark.integration
@pytest.mark.parametrize(
    ("backend", "more"),
    [
        ("legacy_ddp", []),
        ("pytorch_ddp", ["--any-reference", "--bigram-weight", 0.5, "--checkpoint-activations"]),
        ("pytorch_ddp", ["--arch", "ofa_tiny", "--criterion", "adjust_label_smoothed_cross_entropy"]),
    ],
    ids=["legacy_ddp", "student", "teacher"],
)
def test_two_nodes_are_one_process_with_twice_the_batch(
    backend: str,
    more: list[object],
    options: list[object],
    train_in_processes: Callable[..., list[Losses]],
    train_on_nodes: Callable[..., Any],
    last_state: Callable[[Path], dict[str, Any]],
    tmp_path: Path,
) -> None:
    """Epochs of 9 and 7 rows leave a process without a batch in their last update, as 5 rows do in validation."""
    # legacy_ddp also decays weights that have no gradient, which one process leaves as they are.
    options += ["--dropout", 0, "--num-workers", 0, "--max-epoch", 2, "--weight-decay", 0, "--batch-size-valid", 2]
    options += ["--eval-cider", "--best-checkpoint-metric", "cider", "--maximize-best-checkpoint-metric"]
    if "ofa_tiny" in more:
        options = [word for word in options if word not in ("--num-queries", 20)]
    options += more
    (whole,) = train_in_processes(*options, "--batch-size", 4, "--save-dir", tmp_path / "whole")
    nodes = train_on_nodes(*options, "--batch-size", 2, "--ddp-backend", backend, "--save-dir", tmp_path / "nodes")
    own, other = nodes.losses()
    assert list(whole) == list(range(1, 6))
    assert own == other
    assert own == pytest.approx(whole, rel=1e-5)
    expected, found = last_state(tmp_path / "whole"), last_state(tmp_path / "nodes")
    for name, weight in expected["weights"].items():
        # Where a gradient is nearly 0, Adam makes steps of its rounding errors.
        torch.testing.assert_close(found["weights"][name], weight, rtol=1e-5, atol=5e-5)

    read = [words_of(log, "TRAIN") for log in nodes.logs]
    assert sorted(map(int, read[0] + read[1])) == list(range(16))
    validated = [words_of(log, "VALID") for log in nodes.logs]
    assert sorted(map(int, validated[0] + validated[1])) == sorted(2 * list(range(16, 21)))
    assert all(read) and all(validated)

    (first,) = [log for log in nodes.logs if words_of(log, "SAVE")]  # which writes all checkpoints
    scores, scores_of_one = validations(first), validations(tmp_path / "rank0.log")
    assert len(scores) == len(scores_of_one) == 2
    for each, alone in zip(scores, scores_of_one, strict=True):
        assert each == pytest.approx(alone, rel=1e-4, abs=1e-4)
        assert "valid_cider" in each


@pytest.mark.integration
def test_a_killed_process_ends_all_nodes_and_the_next_start_goes_on_bit_by_bit(
    options: list[object],
    train_on_nodes: Callable[..., Any],
    last_state: Callable[[Path], dict[str, Any]],
    differences: Callable[[Any, Any], list[str]],
    measured: Callable[[str, str, float], None],
    tmp_path: Path,
) -> None:
    options += ["--num-workers", 1, "--max-epoch", 3, "--batch-size", 2]
    options += ["--save-interval", 100, "--save-interval-updates", 2]
    unbroken, _ = train_on_nodes(*options, "--save-dir", tmp_path / "unbroken").losses()
    assert list(unbroken) == list(range(1, 9))

    options += ["--save-dir", tmp_path / "broken"]
    for killed, update in ((1, 3), (0, 5)):  # either of the processes may be the first, which writes checkpoints
        nodes = train_on_nodes(*options, killed_after={killed: update})
        nodes.wait_for_a_kill()
        begun = time.monotonic()
        assert all(nodes.wait(60))
        measured("processes of a training", "seconds from a kill to the end of all", time.monotonic() - begun)
        survivor = nodes.logs[1 - killed].read_text()
        assert "error: another process of this training has ended or does not answer" in survivor, survivor[-3000:]
        assert "Signal 9 (SIGKILL)" in nodes.logs[killed].read_text()

    resumed, other = train_on_nodes(*options).losses()
    assert resumed == other == {update: unbroken[update] for update in range(5, 9)}
    assert differences(last_state(tmp_path / "unbroken"), last_state(tmp_path / "broken")) == []
