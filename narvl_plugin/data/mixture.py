"""Rows of several tasks in one data set, with one task per batch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from narvl_plugin.data.collate import Batch, Sample
from narvl_plugin.data.dataset import Rows, TsvDataset


class Mixture(Rows):
    """The rows of named members, one member after another.

    Each batch is of one member, whose name it holds as `member`.

    An epoch reads `round(weight * rows)` rows of each member, at least one. They are full passes in the member's order
    and perhaps a part of another pass. For members that shuffle, the part is therefore random in each epoch, and
    batches of the members alternate at random. All random numbers come from numpy's generator, which fairseq seeds by
    seed and epoch. They are the same in all processes.

    Args:
        members: the data sets by name.
        weights: the number of passes over each member's rows in an epoch.

    Attributes:
        names: the names of the members.
        members: the data sets of the members.
        weights: the weights of the members.
    """

    def __init__(self, members: Mapping[str, TsvDataset], weights: Mapping[str, float]) -> None:
        self.names = list(members)
        self.members = list(members.values())
        self.weights = [weights[name] for name in members]
        self._starts = np.cumsum([0, *map(len, self.members)])
        self._turns: int | None = None  # seed of the order of the batches; None for one member after another

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> tuple[int, Sample | None]:
        """Return the number of a row's member, and its sample or None for a bad row within the skip budget."""
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
        """Return the rows that an epoch reads, member by member, and draw the order of the batches."""
        # fairseq seeds numpy for this call, but not for its later call of batch_by_size.
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
        """Shuffle the batches of all members in place, if the members shuffle."""
        if self._turns is not None:
            np.random.default_rng(self._turns).shuffle(batches)

    @property
    def can_reuse_epoch_itr_across_epochs(self) -> bool:
        """Whether all epochs read the same batches, which holds if it does for each member."""
        return all(member.can_reuse_epoch_itr_across_epochs for member in self.members)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that is read, counted from 1, in all members."""
        for member in self.members:
            member.set_epoch(epoch)

    def _numbers(self, indices: np.ndarray | int) -> np.ndarray:
        """Return the number of the member of each row."""
        return np.searchsorted(self._starts, indices, side="right") - 1


def drawn(member: TsvDataset, weight: float) -> np.ndarray:
    """Return the rows, int64 (R,), that `weight` passes over a data set read."""
    rows = rows_drawn(len(member), weight)
    passes = [member.ordered_indices() for _ in range(math.ceil(rows / len(member)))]
    return np.concatenate(passes)[:rows]


def rows_drawn(rows: int, weight: float) -> int:
    """Return the number of rows that `weight` passes over `rows` rows read, at least one."""
    return max(1, round(weight * rows))
