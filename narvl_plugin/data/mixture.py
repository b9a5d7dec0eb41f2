"""Rows of several tasks in one data set, whose batches are of one task each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from narvl_plugin.data.collate import Batch, Sample
from narvl_plugin.data.dataset import Rows, TsvDataset


class Mixture(Rows):
    """The rows of named members, one member after another; a batch is one member's, and names it as `member`.

    A weight is the number of passes over a member's rows in an epoch: of each member `round(weight * rows)` rows are
    drawn (at least one), in the order that the member gives for each pass, and the last pass may be a part. With
    shuffling members a part is therefore another random one in each epoch, and the batches take turns at random. All
    of it comes from numpy's generator, which fairseq seeds by seed and epoch, alike in all processes.
    """

    def __init__(self, members: Mapping[str, TsvDataset], weights: Mapping[str, float]) -> None:
        self.names = list(members)
        self.members = list(members.values())
        self.weights = [weights[name] for name in members]
        self._starts = np.cumsum([0, *map(len, self.members)])
        self._turns: int | None = None
        """Seed of the order of the batches; None for one member after another."""

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> tuple[int, Sample | None]:
        """Return the number of a row's member and its sample, or None for a bad row that is forgiven."""
        number = int(self._numbers(index))
        return number, self.members[number][int(index - self._starts[number])]

    def collater(self, samples: Sequence[tuple[int, Sample | None]]) -> Batch:
        """Return the batch of samples of one member."""
        if not samples:
            return {}
        number = samples[0][0]
        batch = self.members[number].collater([sample for _, sample in samples])
        return batch | {"member": self.names[number]} if batch else {}

    def ordered_indices(self) -> np.ndarray:
        """Return the rows that an epoch reads, member by member; for shuffling members draw the batches' order, too."""
        # fairseq seeds numpy while it calls this, and no longer when it calls batch_by_size.
        self._turns = None if self.can_reuse_epoch_itr_across_epochs else int(np.random.randint(2**31))
        return np.concatenate(
            [
                start + drawn(member, weight)
                for start, member, weight in zip(self._starts, self.members, self.weights, strict=False)
            ]
        )

    def groups(self, indices: np.ndarray) -> list[np.ndarray]:
        """Return the rows of each member among `indices`."""
        numbers = self._numbers(indices)
        return [indices[numbers == number] for number in range(len(self.members))]

    def arrange(self, batches: list[Any]) -> None:
        """Have the members' batches take turns at random, where they shuffle, in place."""
        if self._turns is not None:
            np.random.default_rng(self._turns).shuffle(batches)

    @property
    def can_reuse_epoch_itr_across_epochs(self) -> bool:
        """Say whether the batches hold for all epochs: if they do for each member."""
        return all(member.can_reuse_epoch_itr_across_epochs for member in self.members)

    def set_epoch(self, epoch: int) -> None:
        """Tell the members which epoch is read, counted from 1."""
        for member in self.members:
            member.set_epoch(epoch)

    def _numbers(self, indices: np.ndarray | int) -> np.ndarray:
        """Return the number of the member of each row."""
        return np.searchsorted(self._starts, indices, side="right") - 1


def drawn(member: TsvDataset, weight: float) -> np.ndarray:
    """Return the rows, int64 (R,), that so many passes over a data set read."""
    rows = rows_drawn(len(member), weight)
    passes = [member.ordered_indices() for _ in range(math.ceil(rows / len(member)))]
    return np.concatenate(passes)[:rows]


def rows_drawn(rows: int, weight: float) -> int:
    """Return how many rows so many passes over that many read, one at least."""
    return max(1, round(weight * rows))
