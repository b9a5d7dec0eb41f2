"""What data sets of regions share: boxes in pixels of the original image, and as bins of the resized one."""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch

from narvl_plugin.data.boxes import check_units, inside_image, may_be_percent, parse_box, parse_edges, to_bins
from narvl_plugin.data.collate import Batch, Sample
from narvl_plugin.data.dataset import DatasetOptions, TsvDataset
from narvl_plugin.data.images import image_size
from narvl_plugin.data.text import PROMPTS, clean_caption
from narvl_plugin.data.tsv import TsvFile
from narvl_plugin.errors import BadRow

logger = logging.getLogger(__name__)

BOXES_LOOKED_AT = 200
"""Number of first rows whose boxes are checked to be in pixels."""
IMAGES_LOOKED_AT = 8
"""Number of their images whose size is read for this check."""


class GroundingDataset(TsvDataset):
    """Rows of (id, image, text, boxes), selected in this order. The target is four `<bin_k>` for each box.

    A coordinate x of the resized image has the bin k = round(x / max_image_size * (num_bins - 1)).

    A batch also holds `region_coords`, the boxes in pixels of the original images, float64, as subclasses describe
    them, and the factors `w_resize_ratios` (B,) and `h_resize_ratios` (B,), which scale them to the resized images.

    Attributes:
        prompt: the key of `PROMPTS`.
        max_image_size: side that the bins cover, in pixels.
        first_bin: the label of the first bin.

    Raises:
        InputError: if the boxes are not in pixels, see `check_units`.
    """

    prompt: ClassVar[str]

    def __init__(self, tsv: TsvFile, options: DatasetOptions, split: str, *, max_image_size: int) -> None:
        super().__init__(tsv, options, split)
        self.max_image_size = max_image_size
        self.first_bin = options.codec.dictionary.index("<bin_0>")
        self._turned_seen = multiprocessing.Value("b", 0)  # shared with the workers: only one of them warns
        if isinstance(tsv, TsvFile):  # the boxes of a table are placeholders
            self._check_units()

    def parse(self, column: str, where: str, parse_one: Callable[[str, str], torch.Tensor]) -> torch.Tensor:
        """Return the boxes of a column, float32 (…, 4).

        Args:
            column: the column.
            where: FILE:ROW, for errors.
            parse_one: converts the text of a box to four numbers, and raises BadRow if it cannot.

        Raises:
            BadRow: if the column cannot be used.
        """
        raise NotImplementedError

    def join(self, boxes: list[torch.Tensor]) -> torch.Tensor | list[torch.Tensor]:
        """Return the boxes (…, 4) of B rows as the `region_coords` of their batch."""
        raise NotImplementedError

    def in_order(self, row: int, bins: torch.Tensor) -> torch.Tensor:
        """Return the boxes of a row's target, int64 (…, 4), in the order in which this epoch learns them.

        Args:
            row: number of the row.
            bins: int64 (…, 4), the boxes in the column's order.
        """
        return bins

    def make_sample(self, row: int, columns: list[str]) -> Sample:
        """Return the sample of one row.

        Raises:
            BadRow: if the text, the boxes or the image cannot be used.
        """
        unique_id, image, *_, column = columns
        where = self.tsv.where(row)
        source = self.source_tokens(row, columns)
        pixels, maybe_size, turned = self.read_image.read(image, where)
        if turned:
            self._warn_of_turned_image(where)
        size = self._known(maybe_size, where)
        boxes = self._boxes(column, size, where)
        ratios = self._ratios(size)
        return (
            self.as_input(row, unique_id, source, pixels)
            | self.as_target(self.spell(row, column, boxes * ratios.repeat(2)))
            | {"region_coord": boxes, "w_resize_ratio": ratios[0], "h_resize_ratio": ratios[1]}
        )

    def source_tokens(self, row: int, columns: list[str]) -> torch.Tensor:
        """Return the question that the encoder reads, int64 (S,).

        Raises:
            BadRow: if the text has no words.
        """
        text = columns[2]
        words = clean_caption(text, self.options.max_src_length)
        if not words:
            raise BadRow(f"{self.tsv.where(row)}: the text {text!r} has no words{self.tsv.advice}")
        return self.with_specials(self.options.codec.encode(PROMPTS[self.prompt].format(text=words)))

    def target_tokens(self, row: int, columns: list[str]) -> torch.Tensor:
        """Return the bins of a row, four for each box, int64 (T,).

        Raises:
            BadRow: if the boxes or the image cannot be used.
        """
        _, image, *_, column = columns
        where = self.tsv.where(row)
        size = self._known(image_size(self.read_image.read_bytes(image, where), where), where)
        return self.spell(row, column, self._boxes(column, size, where) * self._ratios(size).repeat(2))

    def make_batch(self, samples: Sequence[Sample]) -> Batch:
        """Return the batch of some samples, with the boxes that the class describes."""
        # The boxes are float64: with --fp16 and --bf16 fairseq would round float32, and bf16 errs by pixels.
        boxes = self.join([sample["region_coord"].double() for sample in samples])
        ratios = {
            f"{key}s": torch.stack([sample[key] for sample in samples]).double()
            for key in ("w_resize_ratio", "h_resize_ratio")
        }
        return super().make_batch(samples) | {"region_coords": boxes} | ratios

    def _check_units(self) -> None:
        """Raise InputError, or warn, if the first boxes are not in pixels. Most files pass at the first row."""
        boxes: list[torch.Tensor] = []
        sizes: list[tuple[int, int]] = []
        for row in range(min(len(self), BOXES_LOOKED_AT)):
            where = self.tsv.where(row)
            try:
                _, image, *_, column = self.tsv[row]
                boxes.append(self.parse(column, where, parse_edges).reshape(-1, 4))
                if not may_be_percent(boxes[-1]):
                    return
                if len(boxes[-1]) and len(sizes) < IMAGES_LOOKED_AT:
                    sizes.append(self._known(image_size(self.read_image.read_bytes(image, where), where), where))
            except BadRow:
                continue  # reported when the row is read
        if boxes:
            check_units(torch.cat(boxes), sizes, self.tsv.path)

    def _warn_of_turned_image(self, where: str) -> None:
        with self._turned_seen.get_lock():
            if self._turned_seen.value:
                return
            self._turned_seen.value = 1
        logger.warning(
            "%s: EXIF turns the image, which is read as it lies in the file, here and in all such rows; if the box was "
            "drawn on the turned image, save the turned image without EXIF",
            where,
        )

    @staticmethod
    def _known(size: tuple[int, int] | None, where: str) -> tuple[int, int]:
        if size is None:
            raise BadRow(
                f"{where}: the image column holds features that do not tell the size of the image that the box is "
                "drawn on; make them by narvl features"
            )
        return size

    def _boxes(self, column: str, size: tuple[int, int], where: str) -> torch.Tensor:
        def parse_one(text: str, where: str) -> torch.Tensor:
            return inside_image(parse_box(text, where), size, where)

        return self.parse(column, where, parse_one)

    def _ratios(self, size: tuple[int, int]) -> torch.Tensor:
        return self.options.patch_image_size / torch.tensor(size, dtype=torch.float32)

    def spell(self, row: int, column: str, resized_boxes: torch.Tensor) -> torch.Tensor:
        """Return the target of a row, int64 (T,).

        Args:
            row: number of the row.
            column: the column.
            resized_boxes: (…, 4), its boxes in pixels of the resized image.
        """
        return self.first_bin + self.in_order(row, self.bins_of(resized_boxes)).flatten()

    def bins_of(self, resized_boxes: torch.Tensor) -> torch.Tensor:
        """Return the bins of boxes in pixels of the resized image, (…, 4) each."""
        return to_bins(resized_boxes, side=self.max_image_size, num_bins=self.options.codec.num_bins)
