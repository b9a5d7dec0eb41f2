"""An update is the same whether its rows come as one batch, as several, or as those of several processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Losses = dict[int, float]

# No dropout: fairseq seeds it by the update alone, so that every batch of an update, in whatever process, draws the
# same mask for its first row. The frozen trunk leaves no batch norm that would see a batch as a whole.
# Epochs of 9 and 7 rows make 3 + 2 updates of 4 rows; as single rows neither fills four batches to the end.
WITHOUT_CHANCE = ("--dropout", 0, "--num-workers", 0, "--max-epoch", 4, "--batch-size-valid", 2)
SAVING = ("--save-interval", 100, "--save-interval-updates", 2)
UPDATES = list(range(1, 11))


@pytest.mark.integration
@pytest.mark.parametrize(("batch_size", "update_freq"), [(2, 2), (1, 4)])
def test_several_batches_for_an_update_are_one_large_batch(
    batch_size: int, update_freq: int, options: list[object], train: Callable[..., Losses], tmp_path: Path
) -> None:
    options += WITHOUT_CHANCE
    whole = train(*options, "--batch-size", 4, "--save-dir", tmp_path / "whole")
    cut = ["--batch-size", batch_size, "--update-freq", update_freq]
    assert list(whole) == UPDATES
    assert train(*options, *cut, "--save-dir", tmp_path / "parts") == pytest.approx(whole, rel=1e-5)


@pytest.mark.integration
def test_two_processes_are_one_with_a_larger_batch_also_after_a_kill(
    options: list[object],
    train: Callable[..., Losses],
    train_in_processes: Callable[..., list[Losses]],
    last_state: Callable[[Path], dict[str, Any]],
    differences: Callable[[Any, Any], list[str]],
    tmp_path: Path,
) -> None:
    options += [*WITHOUT_CHANCE, *SAVING]
    whole = train(*options, "--batch-size", 4, "--save-dir", tmp_path / "whole")
    assert list(whole) == UPDATES

    options += ["--batch-size", 1, "--update-freq", 2]
    unbroken = tmp_path / "unbroken"
    own, other = train_in_processes(*options, "--save-dir", unbroken, processes=2)
    assert own == other
    assert own == pytest.approx(whole, rel=1e-5)
    # A row that validation counts twice would show: fairseq fills up the third batch of the five rows.
    expected = last_state(tmp_path / "whole")["val_loss"]
    assert last_state(unbroken)["val_loss"] == pytest.approx(expected, abs=2e-3)

    broken = tmp_path / "broken"
    train_in_processes(*options, "--save-dir", broken, processes=2, killed_after=5)
    resumed, _ = train_in_processes(*options, "--save-dir", broken, processes=2)
    assert resumed == {update: own[update] for update in range(5, 11)}
    assert differences(last_state(unbroken), last_state(broken)) == []


@pytest.mark.integration
@pytest.mark.parametrize(("arch", "criterion"), [("narvl_tiny", "qctc"), ("ofa_tiny", "label_smoothed_cross_entropy")])
def test_mixed_precision_learns_on_a_cpu(
    arch: str, criterion: str, options: list[object], train: Callable[..., Losses], tmp_path: Path
) -> None:
    options = [word for word in options if arch == "narvl_tiny" or word not in ("--num-queries", 20)]
    options += ["--arch", arch, "--criterion", criterion, "--amp", "--batch-size", 4, "--num-workers", 0]
    losses = list(train(*options, "--max-update", 40, "--save-dir", tmp_path / "out", "--no-save").values())
    assert len(losses) == 40
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
