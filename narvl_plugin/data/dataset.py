"""The base of the data sets of all tasks: rows of a TSV file as samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch.utils.data import Dataset

from narvl_plugin.data.collate import Batch, Sample, collate, target_sizes
from narvl_plugin.data.images import ImageReader
from narvl_plugin.data.text import TextCodec
from narvl_plugin.data.tsv import TsvFile
from narvl_plugin.errors import BadRow, InputError, SkipBudget

TOKENS_PER_ROW = 1000
"""Number of tokens that each row counts in fairseq's --max-tokens, whose default in fairseq-generate is 12000.

Images outweigh texts, so all rows count the same: about the number of patches of an image of 480 pixels.
"""

STAND_IN = "stand_in"
"""Key of a batch that only keeps a process busy. It counts neither in the loss nor in logs."""


def check_limits(max_tokens: int | None, batch_size: int | None, flags: str = "") -> None:
    """Check that the limits of a batch leave room for a row. fairseq ignores limits of 0 and below.

    Args:
        max_tokens: largest number of tokens, or None.
        batch_size: largest number of rows, or None.
        flags: suffix of the flags' names, for errors.

    Raises:
        InputError: if a limit is too small.
    """
    if max_tokens is not None and max_tokens < TOKENS_PER_ROW:
        raise InputError(
            f"--max-tokens{flags} {max_tokens}: each row counts {TOKENS_PER_ROW} tokens, and N rows need N * "
            f"{TOKENS_PER_ROW}; give {TOKENS_PER_ROW} or more, or give the number of rows by --batch-size{flags}"
        )
    if batch_size is not None and batch_size < 1:
        raise InputError(f"--batch-size{flags} {batch_size}: a batch needs 1 row or more")


@dataclass(frozen=True)
class DatasetOptions:
    """Options that turn rows into samples, for all splits and all tasks.

    Attributes:
        codec: converts text to tokens.
        patch_image_size: side of the square image, in pixels.
        max_src_length: longest input text, in words.
        max_tgt_length: longest target, in words.
        imagenet_normalisation: whether images are normalised by ImageNet's mean and deviation.
        skip_budget: counts the bad rows that are skipped.
        source_positions: longest text that the encoder reads, in tokens. None for any length.
        target_positions: longest text that the decoder reads, in tokens. None for any length, as for students.
    """

    codec: TextCodec
    patch_image_size: int
    max_src_length: int
    max_tgt_length: int
    imagenet_normalisation: bool
    skip_budget: SkipBudget
    source_positions: int | None = None
    target_positions: int | None = None


class Rows(Dataset[Any]):
    """Rows that become samples and batches. `FairseqRows` adapts them to fairseq."""

    def __len__(self) -> int:
        raise NotImplementedError

    def collater(self, samples: Sequence[Any]) -> Batch:
        """Return the batch of some samples."""
        raise NotImplementedError

    def ordered_indices(self) -> np.ndarray:
        """Return the rows that an epoch reads, in order. numpy's generator is seeded for each epoch."""
        raise NotImplementedError

    def groups(self, indices: np.ndarray) -> list[np.ndarray]:
        """Return `indices` in groups whose rows may share a batch."""
        return [indices]

    def arrange(self, batches: list[Any]) -> None:
        """Put the batches of an epoch in reading order, in place."""

    @property
    def can_reuse_epoch_itr_across_epochs(self) -> bool:
        """Whether all epochs read the same batches."""
        raise NotImplementedError

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that is read, counted from 1."""
        raise NotImplementedError


class TsvDataset(Rows):
    """One split of a task. Subclasses name the columns that they read and turn them into a sample.

    Legend: B batch, S source, T target, P prompt.

    The split "train" is shuffled and divided into batches before every epoch. Bad rows within the skip budget are left
    out of their batch. A batch without any good row is empty in the split "test", and fairseq-generate skips it. In
    other splits it holds the file's first good row and has the key `stand_in`, since fairseq's trainer needs a row.

    A batch also holds `target_lengths` and `target_needs`, the counts of `target_sizes` for its B targets.

    Attributes:
        column_names: the names of the columns, in order.
        placeholders: by column, a value for inference without this column. A target with it has no meaning.
        source_length_options: the options that shorten the source, for errors.
        tsv: the file.
        options: the options.
        split: the name of the split.
        training: whether the split is "train".
        needs_full_batches: whether batches must not be empty.
        epoch: the epoch that is read, counted from 1.
        read_image: reads the image column.
    """

    column_names: ClassVar[tuple[str, ...]]
    placeholders: ClassVar[Mapping[str, str]]
    source_length_options: ClassVar[str] = "--max-src-length"

    def __init__(self, tsv: TsvFile, options: DatasetOptions, split: str) -> None:
        self.columns_by_name(tsv.columns)
        self.tsv = tsv
        self.options = options
        self.split = split
        self.training = split == "train"
        self.needs_full_batches = split != "test"
        self.epoch = 1
        self.read_image = ImageReader(
            options.patch_image_size,
            imagenet_normalisation=options.imagenet_normalisation,
            folder=Path(tsv.path).parent,
        )
        dictionary = options.codec.dictionary
        self._bos = torch.tensor([dictionary.bos()])
        self._eos = torch.tensor([dictionary.eos()])

    @classmethod
    def columns_by_name(cls, columns: Sequence[int]) -> dict[str, int]:
        """Return the numbers of the selected columns by the task's names.

        Raises:
            InputError: if the task reads another number of columns.
        """
        if len(columns) != len(cls.column_names):
            raise InputError(
                f"--selected-cols {','.join(map(str, columns))}: names {len(columns)} columns, and this task "
                f"reads {len(cls.column_names)}: {', '.join(cls.column_names)}"
            )
        return dict(zip(cls.column_names, columns, strict=True))

    def make_sample(self, row: int, columns: list[str]) -> Sample:
        """Return the sample of one row.

        Args:
            row: number of the row.
            columns: its selected columns.

        Raises:
            BadRow: if the row cannot be used.
        """
        raise NotImplementedError

    def source_tokens(self, row: int, columns: list[str]) -> torch.Tensor:
        """Return the text that the encoder reads, int64 (S,), with `<s>` and `</s>`.

        Raises:
            BadRow: if the row cannot be used.
        """
        raise NotImplementedError

    def target_tokens(self, row: int, columns: list[str]) -> torch.Tensor:
        """Return the target of a row, int64 (T,), without `</s>`. The image is not decoded.

        Raises:
            BadRow: if the row cannot be used.
        """
        raise NotImplementedError

    def possible_targets(self, row: int, columns: list[str]) -> list[torch.Tensor]:
        """Return the targets of a row in any of the epochs, int64 (T,) each.

        Raises:
            BadRow: if the row cannot be used.
        """
        return [self.target_tokens(row, columns)]

    def decoder_prompt(self, source: torch.Tensor) -> torch.Tensor:
        """Return the prompt of a teacher's decoder, int64 (P,), for a source (S,): `<s>` alone."""
        return source[:1]

    def min_queries(self, row: int) -> int:
        """Return the largest number of queries that a row needs in any of the epochs. The image is not decoded.

        Raises:
            BadRow: if its texts cannot be used.
        """
        columns = self.tsv[row]
        targets = [self.with_specials(tokens)[1:] for tokens in self.possible_targets(row, columns)]
        source = self.source_tokens(row, columns)
        prompt = self.decoder_prompt(source)
        self._check_lengths(row, source, [torch.cat([prompt, target[:-1]]) for target in targets])
        return max(self._sizes(targets)[1])

    def sample(self, row: int) -> Sample:
        """Return the sample of a row.

        Raises:
            BadRow: if the row cannot be used.
        """
        sample = self.make_sample(row, self.tsv[row])
        # In the split "test" the decoder does not read the target, which may join all references.
        read = [] if self.split == "test" else [sample.get("first_reference", sample)["prev_output_tokens"]]
        self._check_lengths(row, sample["source"], read)
        return sample

    def __getitem__(self, row: int) -> Sample | None:
        """Return the sample of a row, or None for a bad row within the skip budget."""
        try:
            return self.sample(row)
        except BadRow as error:
            self.options.skip_budget.skip(error)
            return None

    def collater(self, samples: Sequence[Sample | None]) -> Batch:
        """Return the batch of the samples that are not None.

        Raises:
            InputError: if the file has no good row.
        """
        kept = [sample for sample in samples if sample is not None]
        if kept:
            return self.make_batch(kept)
        # fairseq itself asks for batches without rows, to give all processes the same number of batches.
        if samples and self.needs_full_batches:
            return self.make_batch([self._first_good_sample()]) | {STAND_IN: True}
        return {}

    def make_batch(self, samples: Sequence[Sample]) -> Batch:
        """Return the batch of one or more samples."""
        lengths, needs = self._sizes([sample["target"] for sample in samples])
        batch = collate(samples, pad=self.options.codec.dictionary.pad())
        return batch | {"target_lengths": lengths, "target_needs": needs}

    def _first_good_sample(self) -> Sample:
        for row in range(len(self)):
            sample = self[row]
            if sample is not None:
                return sample
        raise InputError(f"{self.tsv.path}: none of its {len(self)} rows can be used")

    def __len__(self) -> int:
        return len(self.tsv)

    def where(self, row: int) -> str:
        """Return `FILE:ROW`, with the path as it was given and rows counted from 1."""
        return self.tsv.where(row)

    def with_specials(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return `<s>` tokens `</s>`, int64 (T + 2,)."""
        return torch.cat([self._bos, tokens, self._eos])

    def as_input(self, row: int, unique_id: str, source: torch.Tensor, image: torch.Tensor) -> Sample:
        """Return the entries that samples of all tasks share: the encoder's input and names of the row.

        Args:
            row: number of the row.
            unique_id: id of the row.
            source: (S,), the text.
            image: image (3, h, w) or features (C, h, w).
        """
        return {
            "id": unique_id,
            "where": self.where(row),
            "source": source,
            "patch_image": image,
            "patch_mask": torch.tensor([True]),
        }

    def as_target(self, tokens: torch.Tensor) -> Sample:
        """Return `target` (tokens, `</s>`) and `prev_output_tokens` (`<s>`, tokens), int64 (T + 1,) each."""
        whole = self.with_specials(tokens)
        return {"target": whole[1:], "prev_output_tokens": whole[:-1]}

    def _sizes(self, targets: Sequence[torch.Tensor]) -> tuple[list[int], list[int]]:
        dictionary = self.options.codec.dictionary
        return target_sizes(targets, pad=dictionary.pad(), eos=dictionary.eos())

    def _check_lengths(self, row: int, source: torch.Tensor, targets: Sequence[torch.Tensor]) -> None:
        """Raise BadRow if a text has more tokens than the model has positions."""
        longest = max(map(len, targets), default=0)
        for name, length, places, option in (
            ("text", len(source), self.options.source_positions, self.source_length_options),
            ("target", longest, self.options.target_positions, "--max-tgt-length"),
        ):
            if places is not None and length > places:
                raise BadRow(
                    f"{self.where(row)}: the {name} has {length:,} tokens, and the model reads at most {places:,}; "
                    f"shorten it, or keep fewer words with {option}"
                )

    @property
    def can_reuse_epoch_itr_across_epochs(self) -> bool:
        """Whether all epochs read the same batches. In training they do not."""
        return not self.training

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that is read, counted from 1."""
        self.epoch = epoch

    def ordered_indices(self) -> np.ndarray:
        """Return all rows. In training numpy's generator, which fairseq seeds for each epoch, shuffles them."""
        return np.random.permutation(len(self)) if self.training else np.arange(len(self))
