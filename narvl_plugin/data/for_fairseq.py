"""Data sets and vocabularies as fairseq wants them: the one module of `data/` that imports fairseq."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from narvl_plugin.data.collate import Batch
from narvl_plugin.data.dataset import TOKENS_PER_ROW, Rows
from narvl_plugin.data.vocabulary import SPECIALS, Vocabulary
from narvl_plugin.importing import leaving_logging_alone

with leaving_logging_alone():
    from fairseq.data import Dictionary, FairseqDataset


def fairseq_dictionary(vocabulary: Vocabulary) -> Dictionary:
    """Return a vocabulary as a dictionary of fairseq."""
    dictionary = Dictionary()
    for symbol in vocabulary.symbols[len(SPECIALS) :]:
        dictionary.add_symbol(symbol, overwrite=True)  # each has a number of its own
    return dictionary


class FairseqRows(FairseqDataset):  # type: ignore[misc]  # fairseq's classes have no types
    """The rows of a data set, which all count alike in a batch.

    Attributes:
        rows: the data set.
    """

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]

    def collater(self, samples: Sequence[Any]) -> Batch:
        """Return the batch of some samples."""
        return self.rows.collater(samples)

    def num_tokens(self, index: int) -> int:
        """Return what a row counts against --max-tokens."""
        return TOKENS_PER_ROW

    def num_tokens_vec(self, indices: np.ndarray) -> np.ndarray:
        """Return what each row of `indices` counts against --max-tokens."""
        return np.full(len(indices), TOKENS_PER_ROW)

    def size(self, index: int) -> int:
        """Return a row's length for fairseq's filter by length, which no row needs: texts are cut to fit."""
        return 1

    def filter_indices_by_size(self, indices: np.ndarray, max_sizes: object) -> tuple[np.ndarray, list[int]]:
        """Return all of `indices`, and that none is left out."""
        return indices, []

    def ordered_indices(self) -> np.ndarray:
        """Return the rows that an epoch reads, in their order."""
        return self.rows.ordered_indices()

    def batch_by_size(self, indices: np.ndarray, *limits: object, **named_limits: object) -> list[Any]:
        """Return the batches of the rows `indices`, within fairseq's limits, in the order of the data set."""
        divide = super().batch_by_size
        groups = [group for group in self.rows.groups(indices) if len(group)]
        batches = [batch for group in groups for batch in divide(group, *limits, **named_limits)]
        self.rows.arrange(batches)
        return batches

    @property
    def can_reuse_epoch_itr_across_epochs(self) -> bool:
        """Say whether the batches hold for all epochs."""
        return self.rows.can_reuse_epoch_itr_across_epochs

    def set_epoch(self, epoch: int) -> None:
        """Note which epoch is read, counted from 1; fairseq calls it before the workers start."""
        self.rows.set_epoch(epoch)
