"""A training that is killed and started again goes on bit by bit as if nothing had happened."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from narvl_plugin.checkpoints.reading import read_checkpoint
from narvl_plugin.errors import BadRow

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


@pytest.mark.integration
def test_the_skip_budget_is_that_of_all_parts_of_a_training(
    options: list[object], train: Callable[..., Losses], tmp_path: Path
) -> None:
    """A training that goes on does not get it anew, also on files that have moved; a larger one lets it go on."""
    for name, row in (("one.tsv", 3), ("two.tsv", 2)):
        lines = (tmp_path / name).read_text().splitlines()
        lines[row - 1] = "x\tx\ta cat\t\tbm90IGFuIGltYWdl"
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("one.tsv", "two.tsv", "valid.tsv"):
        shutil.copy(tmp_path / name, moved)
    here, *others = options
    there = str(here).replace(str(tmp_path), str(moved))

    def run(data: object, limit: int, epochs: int, *more: object, folder: str = "run") -> int:
        """Train until an epoch (odd ones read one.tsv, even ones two.tsv), and return how many rows are counted."""
        settings = ["--skip-bad-rows", limit, "--max-epoch", epochs, "--batch-size", 4, "--disable-validation"]
        train(data, *others, *settings, "--num-workers", epochs % 2, "--save-dir", tmp_path / folder, *more)
        state = read_checkpoint(tmp_path / folder / "checkpoint_last.pt")
        return len(state["extra_state"]["CaptionTask"]["skipped_rows"])

    assert run(here, 1, 1) == 1
    for data in (here, there):
        with pytest.raises(BadRow, match=r"two.tsv:2: .*\(now 1\)"):
            run(data, 1, 2)
    assert run(there, 2, 2) == 2
    assert run(there, 2, 4) == 2
    last = tmp_path / "run" / "checkpoint_last.pt"
    assert run(here, 1, 1, "--finetune-from-model", last, folder="other") == 1
