"""RefCOCO, RefCOCO+ and RefCOCOg as OFA's refcoco TSV.

Official files and their places (RAW and IMAGES may be the same folder)::

    RAW/refcoco/refs(unc).p       from refcoco.zip, https://github.com/lichengunc/refer
    RAW/refcoco/refs(google).p    the same
    RAW/refcoco/instances.json    the same
    RAW/refcoco+/refs(unc).p      refcoco+.zip
    RAW/refcoco+/instances.json   the same
    RAW/refcocog/refs(umd).p      refcocog.zip
    RAW/refcocog/refs(google).p   the same
    RAW/refcocog/instances.json   the same
    IMAGES/train2014/COCO_train2014_000000000009.jpg …   train2014.zip, https://cocodataset.org/#download

A `refs` file is a pickle, written by Python 2, of a list of objects. Each has `image_id`, `ann_id`, `split` and several
`sentences` that refer to it. Their `sent` is the text in lower case without punctuation. `instances.json` holds COCO's
`images` (`id`, `file_name`, `width`, `height`) and `annotations` (`id`, `bbox` as x, y, width, height).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from narvl_plugin.data.boxes import format_box
from narvl_plugin.data.plain_pickles import read_pickle
from narvl_plugin.data.sources.instances import Instances, edges, inside
from narvl_plugin.data.sources.reading import Record, chosen_splits, need, pick_all
from narvl_plugin.data.sources.writing import Columns, ImageFolder, Notes, Outcome, clean, write_split
from narvl_plugin.errors import InputError

SPLITS = {
    ("refcoco", "unc"): ("train", "val", "testA", "testB"),
    ("refcoco", "google"): ("train", "val", "test"),
    ("refcoco+", "unc"): ("train", "val", "testA", "testB"),
    ("refcocog", "umd"): ("train", "val", "test"),
    ("refcocog", "google"): ("train", "val"),
}
"""(Data set, author of the split) -> its splits; papers report the first of each data set."""

FOLDER = "train2014"
REFERENCE = {"image_id": int, "ann_id": int, "split": str, "sentences": list}
SENTENCE = {"sent_id": int, "sent": str}


@dataclass(frozen=True)
class Region:
    """A sentence and the region it refers to.

    Attributes:
        sentence: the sentence.
        image: the image.
        bbox: x, y, width, height in pixels.
    """

    sentence: Record
    image: Record
    bbox: list[float]


def convert_refcoco(
    raw: Path,
    out: Path,
    images: ImageFolder,
    *,
    name: str = "refcoco",
    split_by: str | None = None,
    splits: Sequence[str] | None = None,
) -> Iterator[Outcome]:
    """Write OUT/SPLIT.tsv for each split and yield its outcome; a row is one sentence.

    Boxes that exceed their image are clipped to it, and dropped if they are then empty.

    Args:
        raw: the folder of the official files.
        out: the folder to write into.
        images: the images' folder, and their form in the rows.
        name: refcoco, refcoco+ or refcocog.
        split_by: unc, google or umd; by default unc for refcoco and refcoco+, umd for refcocog.
        splits: the splits to write; all by default.

    Yields:
        The outcome of each file.

    Raises:
        MissingInput: if a file or folder does not exist; raised before anything is written.
        InputError: for an unknown data set or split, and for a file that is damaged or tries to run code.
        BadRow: if a record is not as published.
    """
    choices = {by: its_splits for (known, by), its_splits in SPLITS.items() if known == name}
    if not choices:
        raise InputError(f"--name {name}: choose one of {', '.join(dict.fromkeys(known for known, _ in SPLITS))}")
    split_by = split_by or next(iter(choices))
    if split_by not in choices:
        raise InputError(f"--split-by {split_by}: {name} was split by {' and '.join(choices)}")
    chosen = chosen_splits(splits, choices[split_by])
    references, instances = raw / name / f"refs({split_by}).p", raw / name / "instances.json"
    download = f"unpack {name}.zip (github.com/lichengunc/refer) and train2014.zip (cocodataset.org)"
    need([references, instances], [images.folder / FOLDER], download)
    regions = cache(partial(load_regions, references, instances))
    for split in chosen:
        yield write_split(
            out / f"{split}.tsv",
            partial(in_split, regions, split),
            region_row,
            inputs=[references, instances],
            images=images,
        )


def load_regions(references: Path, instances: Path) -> dict[str, list[Region]]:
    """Return all sentences by split."""
    known = Instances.read(instances)
    regions: dict[str, list[Region]] = {}
    for index, reference in enumerate(pick_all(read_pickle(references), REFERENCE, str(references))):
        where = f"{references}[{index}]"
        image, box = known.image(reference["image_id"], where), known.bbox(reference["ann_id"], where)
        for sentence in pick_all(reference["sentences"], SENTENCE, f"{where}.sentences"):
            regions.setdefault(reference["split"], []).append(Region(sentence, image, box))
    return regions


def in_split(regions: Callable[[], dict[str, list[Region]]], split: str) -> list[Region]:
    """Return the sentences of a split."""
    return regions().get(split, [])


def region_row(region: Region, notes: Notes) -> Columns:
    """Return uniq-id, image-id, text, x0,y0,x1,y1 in pixels, image."""
    return [
        str(region.sentence["sent_id"]),
        str(region.image["id"]),
        clean(region.sentence["sent"], notes),
        format_box(inside(edges(region.bbox), region.image, notes)),
        Path(FOLDER, region.image["file_name"]),
    ]
