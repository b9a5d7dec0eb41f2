"""gRefCOCO as the TSV of regions: phrases for no, one or several objects.

Official files and their places (RAW and IMAGES may be the same folder)::

    RAW/grefcoco/grefs(unc).json   from the download of https://github.com/henghuiding/gRefCOCO
    RAW/grefcoco/instances.json    the same
    IMAGES/train2014/COCO_train2014_000000000009.jpg …   train2014.zip, https://cocodataset.org/#download

`grefs(unc).json` holds a list of objects. Each has `ref_id`, `image_id`, `split`, `ann_id` and `sentences`. `ann_id` is
a list of the annotations that the sentences refer to, which is `[-1]` if there is none; it may also be a single number.
Some objects have no sentence. A sentence has `sent_id`, and its `sent` is the text in lower case without punctuation.
`file_name` is not that of the image: the image is found by its id in `instances.json`, as in RefCOCO.

A sentence is identified here by `REF_ID-SENT_ID`, since the sentences that come from RefCOCO keep its numbers, and may
share them with new ones.

Source: Liu et al., GRES: Generalized Referring Expression Segmentation, https://arxiv.org/abs/2306.00968.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from narvl_plugin.data.boxes import format_box
from narvl_plugin.data.regions import MOST_BOXES
from narvl_plugin.data.sources.instances import Instances, edges, inside
from narvl_plugin.data.sources.reading import Record, chosen_splits, need, not_as_published, pick_all, read_json
from narvl_plugin.data.sources.refcoco import FOLDER, SENTENCE
from narvl_plugin.data.sources.writing import Columns, Dropped, ImageFolder, Notes, Outcome, clean, write_split
from narvl_plugin.data.text import REFERENCE_SEPARATOR

SPLITS = ("train", "val", "testA", "testB")
NO_TARGET = [-1]
"""The `ann_id` of sentences that describe nothing in the image."""
REFERENCE = {"ref_id": int, "image_id": int, "ann_id": object, "split": str, "sentences": list}
DOWNLOAD = (
    "unpack grefs(unc).json and instances.json (github.com/henghuiding/gRefCOCO) and train2014.zip (cocodataset.org)"
)


@dataclass(frozen=True)
class Expression:
    """A sentence and all regions it refers to.

    Attributes:
        key: REF_ID-SENT_ID.
        text: the sentence.
        image: the image.
        boxes: x0, y0, x1, y1 in pixels for each region; they may exceed the image.
    """

    key: str
    text: str
    image: Record
    boxes: list[list[float]]


def convert_grefcoco(
    raw: Path, out: Path, images: ImageFolder, *, splits: Sequence[str] | None = None, cut_boxes: bool = False
) -> Iterator[Outcome]:
    """Write OUT/SPLIT.tsv for each split and yield its outcome; a row is one sentence.

    Boxes that exceed their image are clipped to it. If one is then empty, the row is dropped.

    Args:
        raw: the folder of the official files.
        out: the folder to write into.
        images: the images' folder, and their form in the rows.
        splits: the splits to write; all by default.
        cut_boxes: whether a row of more than `MOST_BOXES` boxes is written with the first of them, or dropped.

    Yields:
        The outcome of each file.

    Raises:
        MissingInput: if a file or folder does not exist; raised before anything is written.
        BadRow: if a record is not as published.
    """
    chosen = chosen_splits(splits, SPLITS)
    references, instances = raw / "grefcoco" / "grefs(unc).json", raw / "grefcoco" / "instances.json"
    need([references, instances], [images.folder / FOLDER], DOWNLOAD)
    load = cache(partial(load_expressions, references, instances))
    for split in chosen:
        yield write_split(
            out / f"{split}.tsv",
            partial(in_split, load, split),
            partial(expression_row, cut_boxes),
            inputs=[references, instances],
            images=images,
            settings={"cut_boxes": cut_boxes},
        )


def load_expressions(references: Path, instances: Path) -> dict[str, list[Expression]]:
    """Return all sentences by split."""
    known = Instances.read(instances)
    expressions: dict[str, list[Expression]] = {split: [] for split in SPLITS}
    for index, reference in enumerate(pick_all(read_json(references), REFERENCE, str(references))):
        where = f"{references}[{index}]"
        if reference["split"] not in SPLITS:
            not_as_published(where, f"split is {reference['split']!r:.40}, not one of {', '.join(SPLITS)}")
        image = known.image(reference["image_id"], where)
        boxes = [edges(known.bbox(key, where)) for key in annotations_of(reference["ann_id"], where)]
        for sentence in pick_all(reference["sentences"], SENTENCE, f"{where}.sentences"):
            key = f"{reference['ref_id']}-{sentence['sent_id']}"
            expressions[reference["split"]].append(Expression(key, sentence["sent"], image, boxes))
    return expressions


def annotations_of(ann_id: Any, where: str) -> list[int]:
    """Return the ids of an `ann_id`.

    Raises:
        BadRow: if it is neither a whole number nor a list of some.
    """
    ids = ann_id if isinstance(ann_id, list) else [ann_id]
    if not ids or not all(type(key) is int for key in ids):
        not_as_published(where, f"ann_id is {ann_id!r:.60}, not a list of whole numbers")
    return [] if ids == NO_TARGET else ids


def in_split(load: Callable[[], dict[str, list[Expression]]], split: str) -> list[Expression]:
    """Return the sentences of a split."""
    return load()[split]


def expression_row(cut_boxes: bool, expression: Expression, notes: Notes) -> Columns:
    """Return uniq-id, image-id, text, boxes x0,y0,x1,y1 in pixels joined by `&&`, image."""
    number = len(expression.boxes)
    if number > MOST_BOXES:
        if not cut_boxes:
            raise Dropped(f"more than {MOST_BOXES} boxes")
        notes[f"rows cut to their first {MOST_BOXES} boxes"] += 1
        notes["boxes cut"] += number - MOST_BOXES
    boxes = [inside(box, expression.image, notes) for box in expression.boxes[:MOST_BOXES]]
    return [
        expression.key,
        str(expression.image["id"]),
        clean(expression.text, notes),
        REFERENCE_SEPARATOR.join(map(format_box, boxes)),
        Path(FOLDER, expression.image["file_name"]),
    ]
