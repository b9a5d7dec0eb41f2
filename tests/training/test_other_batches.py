"""A training that goes on amid an epoch with other batches says in a line why it cannot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from narvl_plugin.checkpoints.reading import read_checkpoint
from narvl_plugin.errors import InputError

Losses = dict[int, float]


@pytest.mark.integration
def test_larger_batches_amid_an_epoch(options: list[object], train: Callable[..., Losses], tmp_path: Path) -> None:
    """Three of five batches of two rows were read; of batches of four, there are three."""
    options += ["--disable-validation", "--save-dir", tmp_path / "run", "--max-epoch", 1]
    train(*options, "--batch-size", 2, "--max-update", 3, "--save-interval-updates", 3)
    message = r"after 3 batches of epoch 1, but the epoch now has only 3 \(batches of 4, was 2\); keep .*--reset-dat"
    with pytest.raises(InputError, match=message):
        train(*options, "--batch-size", 4)

    state = read_checkpoint(tmp_path / "run" / "checkpoint_last.pt")
    for name in ("rows", "rows_read", "batch_size", "processes"):  # which older checkpoints lack
        del state["extra_state"]["train_iterator"][name]
    torch.save(state, tmp_path / "run" / "older.pt")
    older = ["--restore-file", tmp_path / "run" / "older.pt"]
    with pytest.raises(
        InputError, match=r"after 3 batches of epoch 1, but the epoch now has only 2 \(with other batches\); keep"
    ):
        train(*options, "--batch-size", 5, *older)
    anew = train(*options, "--batch-size", 5, *older, "--reset-dataloader", "--save-dir", tmp_path / "1")
    assert list(anew) == [4, 5]
    assert list(train(*options, "--batch-size", 2, *older, "--save-dir", tmp_path / "2")) == [4, 5]
