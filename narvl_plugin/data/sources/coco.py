"""COCO captions in Karpathy's splits, as OFA's caption TSV.

Official files and their places (RAW and IMAGES may be the same folder)::

    RAW/dataset_coco.json                            from caption_datasets.zip,
                                                     https://cs.stanford.edu/people/karpathy/deepimagesent/
    IMAGES/train2014/COCO_train2014_000000000009.jpg …   train2014.zip, https://cocodataset.org/#download
    IMAGES/val2014/COCO_val2014_000000000042.jpg …       val2014.zip

The JSON file holds `images`, each with `cocoid`, `filepath` (the folder), `filename`, `split` and about five
`sentences`, whose `raw` is the original text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from narvl_plugin.data.sources.reading import Record, chosen_splits, need, pick, pick_all, read_json
from narvl_plugin.data.sources.writing import Columns, ImageFolder, Notes, Outcome, join_texts, write_split

SPLITS = {"train": ("train", "restval"), "val": ("val",), "test": ("test",)}
"""TSV file -> Karpathy's names; as is usual, train includes his `restval`."""

FOLDERS = ("train2014", "val2014")
DOWNLOAD = (
    "unpack dataset_coco.json from caption_datasets.zip (cs.stanford.edu/people/karpathy/deepimagesent) and "
    "train2014.zip and val2014.zip (cocodataset.org)"
)
IMAGE = {"cocoid": int, "filepath": str, "filename": str, "split": str, "sentences": list}
SENTENCE = {"sentid": int, "raw": str}

Entry = tuple[int, Record, list[str]]
"""Id, image, captions of one row."""


def convert_coco(
    raw: Path, out: Path, images: ImageFolder, *, splits: Sequence[str] | None = None, join_captions: bool = False
) -> Iterator[Outcome]:
    """Write OUT/{train,val,test}.tsv and yield the outcome of each.

    A row of val and test has all captions of an image, joined by `&&`, and the image's id twice. A row of train has one
    caption and its id; with `join_captions`, it has the form of val.

    Args:
        raw: the folder of the official file.
        out: the folder to write into.
        images: the images' folder, and their form in the rows.
        splits: the splits to write; all by default.
        join_captions: whether to also join the captions of train.

    Yields:
        The outcome of each file.

    Raises:
        MissingInput: if a file or folder does not exist; raised before anything is written.
        BadRow: if a record is not as published.
    """
    file = raw / "dataset_coco.json"
    chosen = chosen_splits(splits, SPLITS)
    need([file], [images.folder / folder for folder in FOLDERS], DOWNLOAD)

    load = cache(partial(load_images, file))
    for split in chosen:
        joined = join_captions or split != "train"
        yield write_split(
            out / f"{split}.tsv",
            partial(in_split, load, split, joined),
            caption_row,
            inputs=[file],
            images=images,
            settings={"joined": joined},
        )


def load_images(file: Path) -> list[Record]:
    """Return the images of all splits with their sentences."""
    return images_in(read_json(file), file)


def images_in(content: Any, file: Path) -> list[Record]:
    """Return the images of all splits with their sentences from the content of dataset_coco.json."""
    images = pick_all(pick(content, {"images": list}, str(file))["images"], IMAGE, f"{file}:images")
    for index, image in enumerate(images):
        image["sentences"] = pick_all(image["sentences"], SENTENCE, f"{file}:images[{index}].sentences")
    return images


def in_split(images: Callable[[], list[Record]], split: str, joined: bool) -> list[Entry]:
    """Return the images of a split with their captions, or each caption separately."""
    entries: list[Entry] = []
    for image in images():
        if image["split"] in SPLITS[split]:
            captions = [(sentence["sentid"], sentence["raw"]) for sentence in image["sentences"]]
            if joined:
                entries.append((image["cocoid"], image, [text for _, text in captions]))
            else:
                entries += [(sentid, image, [text]) for sentid, text in captions]
    return entries


def caption_row(entry: Entry, notes: Notes) -> Columns:
    """Return uniq-id, image-id, captions, objects, image."""
    key, image, captions = entry
    path = Path(image["filepath"], image["filename"])
    return [str(key), str(image["cocoid"]), join_texts(captions, notes), "", path]
