"""What the datasets of all tasks share: rows of a TSV file as fairseq samples."""

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

# fairseq fills batches by tokens (--max-tokens, 12000 unless fairseq-generate is told otherwise). All rows
# count alike, about what a picture of 480 pixels has in patches, since pictures outweigh texts.
TOKENS_PER_ROW = 1000

STAND_IN = "stand_in"
"""Key of a batch that only keeps a process busy, and counts neither in the loss nor in what is logged."""


def check_limits(max_tokens: int | None, batch_size: int | None, flags: str = "") -> None:
    """Raise InputError for limits of a batch that leave no room for one row; `flags` is what the flags' names end in.

    fairseq would take limits of 0 and below for none.
    """
    if max_tokens is not None and max_tokens < TOKENS_PER_ROW:
        raise InputError(
            f"--max-tokens{flags} {max_tokens}: each row counts {TOKENS_PER_ROW} tokens, so that N rows need N * "
            f"{TOKENS_PER_ROW}; give {TOKENS_PER_ROW} or more, or give the number of rows by --batch-size{flags}"
        )
    if batch_size is not None and batch_size < 1:
        raise InputError(f"--batch-size{flags} {batch_size}: a batch needs 1 row or more")


@dataclass(frozen=True)
class DatasetOptions:
    """What turns rows into samples, the same for all splits and all tasks.

    max_src_length and max_tgt_length are in words. source_positions and target_positions are the longest texts, in
    tokens, that the model's encoder and decoder read, None where any will do: a student's decoder reads no text.
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
    """Rows that make samples, of which batches are made; `FairseqRows` shows them to fairseq."""

    def __len__(self) -> int:
        raise NotImplementedError

    def collater(self, samples: Sequence[Any]) -> Batch:
        """Return the batch of some samples."""
        raise NotImplementedError

    def ordered_indices(self) -> np.ndarray:
        """Return the rows that an epoch reads, in their order; numpy's generator is seeded for each epoch."""
        raise NotImplementedError

    def groups(self, indices: np.ndarray) -> list[np.ndarray]:
        """Return `indices` in groups whose rows may share a batch."""
        return [indices]

    def arrange(self, batches: list[Any]) -> None:
        """Put the batches of an epoch in the order in which they are read, in place."""

    @property
    def can_reuse_epoch_itr_across_epochs(self) -> bool:
        """Say whether the batches hold for all epochs."""
        raise NotImplementedError

    def set_epoch(self, epoch: int) -> None:
        """Note which epoch is read, counted from 1."""
        raise NotImplementedError


class TsvDataset(Rows):
    """One split of a task. Subclasses name the columns they read, in order, and turn a row's into a sample.

    The split "train" is shuffled as a whole before every epoch: its batches are made anew each time. Bad rows
    that the skip budget forgives are left out of their batch. Where that leaves nothing, a batch of the split
    "test" is empty, and fairseq-generate passes over it; fairseq's trainer cannot, so in other splits the file's
    first good row stands in, and the batch says so by the key `stand_in`.

    A batch also holds `target_lengths` and `target_needs`, what `target_sizes` counts of its B targets.
    """

    column_names: ClassVar[tuple[str, ...]]
    placeholders: ClassVar[Mapping[str, str]]
    """What a column may hold where nothing is known of it, by the column's name; a target is then not looked at."""
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
        """Return the selected columns' numbers by what the task reads there; raises InputError for another count."""
        if len(columns) != len(cls.column_names):
            raise InputError(
                f"--selected-cols {','.join(map(str, columns))}: names {len(columns)} columns, and this task "
                f"reads {len(cls.column_names)}: {', '.join(cls.column_names)}"
            )
        return dict(zip(cls.column_names, columns, strict=True))

    def make_sample(self, row: int, columns: list[str]) -> Sample:
        """Return the sample of one row; raises BadRow."""
        raise NotImplementedError

    def source_tokens(self, row: int, columns: list[str]) -> torch.Tensor:
        """Return the text that the encoder reads of a row, int64 (S,), with `<s>` and `</s>`; raises BadRow."""
        raise NotImplementedError

    def target_tokens(self, row: int, columns: list[str]) -> torch.Tensor:
        """Return what a model is to say for a row, int64 (T,), without `</s>` and without reading the image.

        Raises BadRow.
        """
        raise NotImplementedError

    def possible_targets(self, row: int, columns: list[str]) -> list[torch.Tensor]:
        """Return what a model is to say for a row, int64 (T,) each, in any of the epochs; raises BadRow."""
        return [self.target_tokens(row, columns)]

    def decoder_prompt(self, source: torch.Tensor) -> torch.Tensor:
        """Return what a teacher's decoder reads before the target, int64 (P,), of a source (S,): `<s>` alone."""
        return source[:1]

    def queries_needed(self, row: int) -> int:
        """Return how many queries a row takes in any of the epochs, without reading the image.

        Raises BadRow where its texts cannot be used.
        """
        columns = self.tsv[row]
        targets = [self.with_specials(tokens)[1:] for tokens in self.possible_targets(row, columns)]
        source = self.source_tokens(row, columns)
        prompt = self.decoder_prompt(source)
        self._check_lengths(row, source, [torch.cat([prompt, target[:-1]]) for target in targets])
        return max(self._sizes(targets)[1])

    def __getitem__(self, row: int) -> Sample | None:
        """Return a row's sample, or None for a bad row that the skip budget forgives."""
        try:
            sample = self.make_sample(row, self.tsv[row])
            # In the split "test" the decoder does not read the target, which may be all references joined.
            read = [] if self.split == "test" else [sample.get("first_reference", sample)["prev_output_tokens"]]
            self._check_lengths(row, sample["source"], read)
            return sample
        except BadRow as error:
            self.options.skip_budget.skip(error)
            return None

    def collater(self, samples: Sequence[Sample | None]) -> Batch:
        """Return the batch of the samples that are no None; raises InputError if the file has no good row."""
        kept = [sample for sample in samples if sample is not None]
        if kept:
            return self.make_batch(kept)
        # fairseq itself asks for the batch of no rows, to give every process as many batches.
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
        """Return `FILE:ROW`, the file's path as it was given and the row counted from 1."""
        return self.tsv.where(row)

    def with_specials(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return `<s>` tokens `</s>`, int64 (T + 2,)."""
        return torch.cat([self._bos, tokens, self._eos])

    def as_input(self, row: int, unique_id: str, source: torch.Tensor, image: torch.Tensor) -> Sample:
        """Return what samples of all tasks hold beside the target: what the encoder reads, and names of the row."""
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
        """Raise BadRow for texts that have more tokens than the model has places."""
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
        """Say that a training split's batches hold for one epoch only."""
        return not self.training

    def set_epoch(self, epoch: int) -> None:
        """Note which epoch is read, counted from 1."""
        self.epoch = epoch

    def ordered_indices(self) -> np.ndarray:
        """Return all rows, for training shuffled by numpy's generator, seeded by fairseq for each epoch."""
        return np.random.permutation(len(self)) if self.training else np.arange(len(self))
