"""Captioning: from an image and a fixed question to a caption."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from narvl_plugin.data.collate import Batch, Sample, pad_tokens
from narvl_plugin.data.dataset import DatasetOptions, TsvDataset
from narvl_plugin.data.text import PROMPTS, REFERENCE_SEPARATOR, clean_target, split_references
from narvl_plugin.data.tsv import TsvFile
from narvl_plugin.errors import BadRow


class CaptionDataset(TsvDataset):
    """Rows of (id, image, caption), selected in this order from the TSV file.

    Legend: B batch, K references, T target.

    In training, captions are cut to `max_tgt_length` words, and each epoch learns another one of several references
    joined by `&&`. With `any_reference` the batch also holds all of them as `alternatives` (B, K, T), padded, and
    `target_needs` counts the queries of the reference that needs the fewest. With `max_references`, training takes the
    first references of each row alone.

    In evaluation, the target is the text of all references, uncut and joined. The batch also holds `references` (lists
    of texts), `target_texts` (the targets as text) and `first_reference` (the target of the loss and its counts).

    Attributes:
        any_reference: whether a student may learn any of the references.
        max_references: the number of references of a row in training, the first of them; 0 takes all.
    """

    column_names = ("id", "image", "caption")
    placeholders = {"caption": "an image"}

    def __init__(
        self,
        tsv: TsvFile,
        options: DatasetOptions,
        split: str,
        *,
        any_reference: bool = False,
        max_references: int = 0,
    ) -> None:
        super().__init__(tsv, options, split)
        self.any_reference = any_reference
        self.max_references = max_references
        self._source = self.with_specials(options.codec.encode(PROMPTS["caption"]))

    def make_sample(self, row: int, columns: list[str]) -> Sample:
        """Return the sample of one row.

        Raises:
            BadRow: if the caption is empty or the image cannot be read.
        """
        unique_id, image, caption = columns
        references = self._references(row, caption)
        max_words = self.options.max_tgt_length
        sample = self.as_input(row, unique_id, self._source, self.read_image(image, self.tsv.where(row)))
        if self.training:
            sample |= self.as_target(self.target_tokens(row, columns))
            if self.any_reference:
                sample["alternatives"] = [self._target(clean_target(text, max_words))["target"] for text in references]
            return sample
        cleaned = [clean_target(reference) for reference in references]
        return (
            sample
            | self._target(REFERENCE_SEPARATOR.join(cleaned))
            | {
                "references": cleaned,
                "target_text": REFERENCE_SEPARATOR.join(cleaned),
                "first_reference": self._target(clean_target(references[0], max_words)),
            }
        )

    def source_tokens(self, row: int, columns: list[str]) -> torch.Tensor:
        """Return the question about all images, int64 (S,)."""
        return self._source

    def target_tokens(self, row: int, columns: list[str]) -> torch.Tensor:
        """Return the tokens of the caption that this epoch learns, int64 (T,). In evaluation it is the first one.

        Raises:
            BadRow: if the caption is empty.
        """
        references = self._references(row, columns[-1])
        # Each epoch takes another reference, and rows of one epoch take references of different numbers.
        chosen = (row + self.epoch) % len(references) if self.training else 0
        return self._tokens(references[chosen])

    def possible_targets(self, row: int, columns: list[str]) -> list[torch.Tensor]:
        """Return the tokens of the captions that training may learn, int64 (T,) each.

        With `any_reference`, a student needs room only for the shortest. A teacher learns another one in each epoch in
        any case.

        Raises:
            BadRow: if the caption is empty.
        """
        if not self.training:
            return [self.target_tokens(row, columns)]
        targets = [self._tokens(reference) for reference in self._references(row, columns[-1])]
        if self.any_reference and self.options.target_positions is None:
            return [min(targets, key=lambda tokens: self._sizes([tokens])[1])]
        return targets

    def all_references(self) -> Iterator[list[str]]:
        """Yield the cleaned references of every row that has any, without reading the images."""
        for row in range(len(self)):
            try:
                caption = self.tsv[row][-1]
            except BadRow:
                continue  # reported when the row is read
            if references := [clean_target(reference) for reference in split_references(caption)]:
                yield references

    def learned_references(self) -> Iterator[list[list[int]]]:
        """Yield the tokens of the references that training uses of every row that has any, without reading images."""
        for row in range(len(self)):
            try:
                references = self._references(row, self.tsv[row][-1])
            except BadRow:
                continue  # reported when the row is read
            yield [self._tokens(reference).tolist() for reference in references]

    def _references(self, row: int, caption: str) -> list[str]:
        references = split_references(caption)
        if not references:
            raise BadRow(f"{self.tsv.where(row)}: the caption {caption!r} has no words{self.tsv.advice}")
        return references[: self.max_references or None] if self.training else references

    def _tokens(self, reference: str) -> torch.Tensor:
        return self.options.codec.encode(f" {clean_target(reference, self.options.max_tgt_length)}")

    def _target(self, text: str) -> Sample:
        return self.as_target(self.options.codec.encode(f" {text}"))

    def make_batch(self, samples: Sequence[Sample]) -> Batch:
        """Return the batch of some samples, with the references that the class describes."""
        batch = super().make_batch(samples)
        pad = self.options.codec.dictionary.pad()
        if self.training and self.any_reference:
            most = max(len(sample["alternatives"]) for sample in samples)
            none = torch.empty(0, dtype=torch.int64)
            rows = [row for sample in samples for row in (sample["alternatives"] + most * [none])[:most]]
            batch["alternatives"] = pad_tokens(rows, pad).view(len(samples), most, -1)
            batch["target_needs"] = [min(self._sizes(sample["alternatives"])[1]) for sample in samples]
        if not self.training:
            firsts = [sample["first_reference"] for sample in samples]
            lengths, needs = self._sizes([first["target"] for first in firsts])
            batch["references"] = [sample["references"] for sample in samples]
            batch["target_texts"] = [sample["target_text"] for sample in samples]
            batch["first_reference"] = {key: pad_tokens([first[key] for first in firsts], pad) for key in firsts[0]}
            tokens = sum(len(first["target"]) for first in firsts)
            batch["first_reference"] |= {"ntokens": tokens, "target_lengths": lengths, "target_needs": needs}
        return batch
