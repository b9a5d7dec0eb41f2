"""A training that is killed and started again goes on bit by bit as if nothing had happened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Losses = dict[int, float]


@pytest.mark.integration
def test_a_killed_training_goes_on_bit_by_bit(
    options: list[object],
    train: Callable[..., Losses],
    train_in_processes: Callable[..., list[Losses]],
    last_state: Callable[[Path], dict[str, Any]],
    differences: Callable[[Any, Any], list[str]],
    tmp_path: Path,
) -> None:
    # Epochs 1 and 3 read 9 rows, 2 and 4 read 7: 5 + 4 + 5 + 4 updates of two rows. Checkpoints fall amid epochs.
    options += [
        *("--batch-size", 2, "--num-workers", 1, "--any-reference", "--dropout", 0.2, "--encoder-drop-path-rate", 0.1),
        *("--lr-scheduler", "polynomial_decay_ratio", "--warmup-ratio", 0.25, "--max-epoch", 4),
        *("--store-ema", "--ema-decay", 0.9, "--freeze-embedding"),
        *("--save-interval", 100, "--save-interval-updates", 4),
    ]
    unbroken = train(*options, "--save-dir", tmp_path / "unbroken")
    assert list(unbroken) == list(range(1, 19))

    broken = tmp_path / "broken"
    (first,) = train_in_processes(*options, "--save-dir", broken, killed_after=11)
    assert first == {update: unbroken[update] for update in range(1, 12)}
    (second,) = train_in_processes(*options, "--save-dir", broken)
    assert second == {update: unbroken[update] for update in range(9, 19)}
    assert differences(last_state(tmp_path / "unbroken"), last_state(broken)) == []
