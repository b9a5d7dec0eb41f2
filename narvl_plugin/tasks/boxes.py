"""What tasks whose outputs are boxes share: options, the labels of coordinates, and boxes in pixels."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from narvl_plugin.data.boxes import boxes_in, from_bins, inside_image
from narvl_plugin.data.grounding import GroundingDataset
from narvl_plugin.data.text import REFERENCE_SEPARATOR
from narvl_plugin.data.tsv import TsvFile
from narvl_plugin.errors import BadRow, InputError
from narvl_plugin.tasks.base import BaseTask, BaseTaskConfig, Bins, Hypotheses

Edges = list[float]
"""Left, upper, right and lower edge of a box."""


@dataclass
class BoxTaskConfig(BaseTaskConfig):
    """Options of tasks whose outputs are boxes."""

    patch_image_size: int = field(default=512, metadata={"help": "side of the square image, in pixels"})
    max_image_size: int = field(
        default=512, metadata={"help": "side, in pixels, that the <bin_k> cover; at least --patch-image-size"}
    )
    eval_acc: bool = False


class BoxTask(BaseTask):
    """A task whose outputs are boxes, each four `<bin_k>`."""

    text_column: ClassVar[str | None] = "text"
    dataset_class: ClassVar[type[GroundingDataset]]
    target_place = 3
    cfg: BoxTaskConfig

    def __init__(self, cfg: BoxTaskConfig, **kwargs: Any) -> None:
        if cfg.patch_image_size > cfg.max_image_size:
            raise InputError(
                f"--patch-image-size {cfg.patch_image_size} is larger than --max-image-size {cfg.max_image_size}; no "
                "bins would cover the right and lower part of the image"
            )
        super().__init__(cfg, **kwargs)

    @property
    def generates_in_validation(self) -> bool:
        """Return whether validation generates boxes (--eval-acc)."""
        return self.cfg.eval_acc

    def build_dataset(self, tsv: TsvFile, split: str) -> GroundingDataset:
        """Return the data set of a split's file."""
        return self.dataset_class(tsv, self.options, split, max_image_size=self.cfg.max_image_size)

    @property
    def bins(self) -> Bins:
        """The labels of box coordinates."""
        return Bins(self.codec.dictionary.index("<bin_0>"), self.codec.num_bins, self.cfg.max_image_size)

    def boxes(self, tokens: torch.Tensor, width_ratio: torch.Tensor, height_ratio: torch.Tensor) -> list[Edges] | None:
        """Return the boxes that tokens spell, in pixels of the image as it came.

        Args:
            tokens: (T,).
            width_ratio: by how much the width of the image was multiplied, a number.
            height_ratio: by how much its height was multiplied, a number.

        Returns:
            Left, upper, right and lower edge of each box, or None for tokens that are no output of the task.
        """
        boxes = boxes_in(self.codec.decode(tokens))
        if boxes is None or not (self.predicts_sets or len(boxes) == 1):
            return None
        ratios = torch.stack([width_ratio, height_ratio]).cpu().repeat(2)
        bins = torch.tensor(boxes, dtype=torch.int64).reshape(-1, 4)
        resized = from_bins(bins, side=self.cfg.max_image_size, num_bins=self.cfg.num_bins)
        edges: list[Edges] = (resized / ratios).tolist()
        return edges

    def boxes_of_best(self, sample: dict[str, Any], hypotheses: Hypotheses) -> list[list[Edges] | None]:
        """Return the boxes of the best hypotheses of the B samples, in pixels of the original images; see `boxes`."""
        ratios = sample["w_resize_ratios"].cpu(), sample["h_resize_ratios"].cpu()
        return [self.boxes(beam[0]["tokens"], *ratio) for beam, *ratio in zip(hypotheses, *ratios, strict=True)]

    def written_targets(self, sample: dict[str, Any], hypotheses: Hypotheses) -> list[str | None]:
        """Return the best boxes as `x0,y0,x1,y1` in pixels of the original images, joined by `&&`."""
        written: list[str | None] = []
        rows = zip(self.boxes_of_best(sample, hypotheses), self.sizes_of_images(sample), sample["where"], strict=True)
        for boxes, size, where in rows:
            texts = [None] if boxes is None else [self.as_column(box, size, where) for box in boxes]
            written.append(None if None in texts else REFERENCE_SEPARATOR.join(filter(None, texts)))
        return written

    def sizes_of_images(self, sample: dict[str, Any]) -> list[tuple[int, int]]:
        """Return the width and height of the B images of a batch, in pixels."""
        ratios = torch.stack([sample["w_resize_ratios"], sample["h_resize_ratios"]], dim=1)
        sizes = (self.cfg.patch_image_size / ratios).round().int().tolist()
        return [(width, height) for width, height in sizes]

    @staticmethod
    def as_column(box: Edges, size: tuple[int, int], where: str) -> str | None:
        """Return a box in pixels as `x0,y0,x1,y1`; None if the box is empty or lies outside the image.

        Args:
            box: its edges.
            size: the width and height of the image, in pixels.
            where: FILE:ROW.
        """
        try:
            edges = inside_image(torch.tensor(box), size, where).tolist()
        except BadRow:
            return None
        return ",".join(f"{edge:.6g}" for edge in edges)
