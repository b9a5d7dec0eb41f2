"""COCO's instances.json, which several data sets refer to, and boxes on their way into a column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from narvl_plugin.data.boxes import is_box
from narvl_plugin.data.sources.reading import Record, not_as_published, pick, pick_all, read_json
from narvl_plugin.data.sources.writing import Dropped, Notes

IMAGE = {"id": int, "file_name": str, "width": int, "height": int}
ANNOTATION = {"id": int, "bbox": list}


@dataclass(frozen=True)
class Instances:
    """The images and the annotated boxes of an instances.json.

    Attributes:
        file: the file.
        images: `id`, `file_name`, `width` and `height` of an image by its id.
        bboxes: x, y, width, height in pixels by the annotation's id; not checked yet.
    """

    file: Path
    images: Mapping[int, Record]
    bboxes: Mapping[int, list[Any]]

    @classmethod
    def read(cls, file: Path) -> Instances:
        """Read the file.

        Raises:
            BadRow: if a record is not as published.
        """
        found = pick(read_json(file), {"images": list, "annotations": list}, str(file))
        images = pick_all(found["images"], IMAGE, f"{file}:images")
        annotations = pick_all(found["annotations"], ANNOTATION, f"{file}:annotations")
        return cls(
            file,
            {image["id"]: image for image in images},
            {annotation["id"]: annotation["bbox"] for annotation in annotations},
        )

    def image(self, key: int, where: str) -> Record:
        """Return an image.

        Args:
            key: its id.
            where: FILE:KEY of what refers to it, for errors.

        Raises:
            BadRow: if it does not exist.
        """
        if key not in self.images:
            not_as_published(where, f"image_id {key} is not among the images of {self.file}")
        return self.images[key]

    def bbox(self, key: int, where: str) -> list[float]:
        """Return x, y, width, height of an annotation, in pixels.

        Args:
            key: its id.
            where: FILE:KEY of what refers to it, for errors.

        Raises:
            BadRow: if it does not exist, or is no box.
        """
        if key not in self.bboxes:
            not_as_published(where, f"ann_id {key} is not among the annotations of {self.file}")
        bbox = self.bboxes[key]
        if not is_box(bbox):
            not_as_published(f"{self.file}:annotations", f"id {key} has bbox {bbox!r:.60}, not 4 numbers of pixels")
        return bbox


def edges(bbox: Sequence[float]) -> list[float]:
    """Return COCO's x, y, width, height as x0, y0, x1, y1."""
    x, y, width, height = bbox
    return [x, y, x + width, y + height]


def inside(box: Sequence[float], image: Record, notes: Notes) -> list[float]:
    """Return a box, rounded to two decimals, as far as it lies within the image. Boxes that change are counted.

    Args:
        box: x0, y0, x1, y1 in pixels.
        image: the image, with `width` and `height`.
        notes: the counts.

    Raises:
        Dropped: if the box is empty within the image.
    """
    whole = [round(edge, 2) for edge in box]
    limits = [image["width"], image["height"]] * 2
    clipped = [min(max(edge, 0), limit) for edge, limit in zip(whole, limits, strict=True)]
    if not (clipped[0] < clipped[2] and clipped[1] < clipped[3]):
        raise Dropped("box empty or outside the image")
    if clipped != whole:
        notes["boxes clipped"] += 1
    return clipped
