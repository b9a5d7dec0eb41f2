"""Data sets and vocabularies in the form of fairseq. No other module of `data/` imports fairseq."""

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
        dictionary.add_symbol(symbol, overwrite=True)  # each line of dict.txt has a number of its own
    return dictionary


class FairseqRows(FairseqDataset):
    """The rows of a data set for fairseq. All rows count the same in a batch.

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
        """Return the number of tokens that a row counts in --max-tokens."""
        return TOKENS_PER_ROW

    def num_tokens_vec(self, indices: np.ndarray) -> np.ndarray:
        """Return the number of tokens that each row of `indices` counts in --max-tokens."""
        return np.full(len(indices), TOKENS_PER_ROW)

    def size(self, index: int) -> int:
        """Return the length of a row for fairseq's filter, which keeps all rows: texts were already cut to fit."""
        return 1

    def filter_indices_by_size(self, indices: np.ndarray, max_sizes: object) -> tuple[np.ndarray, list[int]]:
        """Return all of `indices`, and an empty list of those left out."""
        return indices, []

    def ordered_indices(self) -> np.ndarray:
        """Return the rows that an epoch reads, in order."""
        return self.rows.ordered_indices()

    def batch_by_size(self, indices: np.ndarray, *limits: object, **named_limits: object) -> list[Any]:
        """Return batches of the rows `indices`, in the order of the data set.

        Args:
            indices: numbers of the rows.
            *limits: fairseq's limits of a batch.
            **named_limits: fairseq's limits of a batch.
        """
        divide = super().batch_by_size
        groups = [group for group in self.rows.groups(indices) if len(group)]
        batches = [batch for group in groups for batch in divide(group, *limits, **named_limits)]
        self.rows.arrange(batches)
        return batches

    @property
    def can_reuse_epoch_itr_across_epochs(self) -> bool:
        """Whether all epochs read the same batches."""
        return self.rows.can_reuse_epoch_itr_across_epochs

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that is read, counted from 1. fairseq calls this before the workers start."""
        self.rows.set_epoch(epoch)
