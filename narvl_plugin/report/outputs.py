"""What a run leaves on disk, read back: training logs, the test pictures, and whose the captions are."""

import base64
import io
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from narvl_plugin.data.images import ImageReader, open_image
from narvl_plugin.data.text import REFERENCE_SEPARATOR, split_references
from narvl_plugin.data.tsv import TsvFile
from narvl_plugin.errors import BadRow, InputError

logger = logging.getLogger(__name__)

CAPTION_COLUMNS = (0, 1, 2, 3)  # uniq-id, image-id, caption, objects
IMAGE_COLUMN = (4,)


@dataclass(frozen=True)
class TestPicture:
    """A row of the test file, less its picture: row number from 0, ids, references, nouns in the picture."""

    row: int
    unique_id: str
    image_id: str
    references: list[str]
    objects: list[str]


def read_test_pictures(path: Path) -> list[TestPicture]:
    """Read ids, references and objects of a caption TSV; rows without them are left out.

    Raises:
        MissingInput, InputError: when there is no such file, or no usable row in it.
    """
    tsv = TsvFile(path, CAPTION_COLUMNS)
    pictures = []
    for row in range(len(tsv)):
        try:
            unique_id, image_id, caption, objects = tsv[row]
        except BadRow as error:
            logger.warning("left out: %s", error)
            continue
        references = split_references(caption)
        nouns = [noun.strip() for noun in objects.split(REFERENCE_SEPARATOR) if noun.strip()]
        if references:
            pictures.append(TestPicture(row, unique_id, image_id, references, nouns))
        else:
            logger.warning("left out: %s: the caption has no words", tsv.where(row))
    if not pictures:
        raise InputError(f"{path}: no row has a caption to compare with; check that it is a caption TSV")
    return pictures


def captions_by_row(captions: Mapping[str, str], pictures: list[TestPicture], path: Path) -> dict[int, str]:
    """Give captions the row numbers of their pictures; sample ids are unique ids or image ids.

    Raises:
        InputError: naming ``path``, when an id belongs to no picture, or image ids to several.
    """
    by_unique_id = {picture.unique_id: picture.row for picture in pictures}
    by_image_id = {picture.image_id: picture.row for picture in pictures}
    rows = by_unique_id if captions.keys() <= by_unique_id.keys() else by_image_id
    unknown = [key for key in captions if key not in rows]
    if unknown:
        raise InputError(
            f"{path}: {len(unknown)} of {len(captions)} captions belong to no picture of the test file, such "
            f"as {unknown[0]}; generate again from the same test file"
        )
    if len(rows) != len(pictures):
        raise InputError(
            f"{path}: {len(pictures)} rows of the test file share {len(rows)} ids; make its ids unique, or "
            f"join the references of one picture by {REFERENCE_SEPARATOR} in one row"
        )
    return {rows[key]: text for key, text in captions.items()}


def picture_data_uris(tsv_path: Path, rows: list[int], side: int) -> list[str]:
    """Give the pictures of some rows as data URIs, scaled down to at most ``side`` pixels a side.

    Raises:
        BadRow: when a row holds no picture.
    """
    tsv = TsvFile(tsv_path, IMAGE_COLUMN)
    reader = ImageReader(side, folder=tsv_path.parent)
    uris = []
    for row in rows:
        image = open_image(reader.read_bytes(tsv[row][0], tsv.where(row)), tsv.where(row))
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=90)
        uris.append(f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}")
    return uris


@dataclass
class TrainingLog:
    """Curves of one training run: points (updates, value) by name, such as ``loss`` or ``valid_loss``."""

    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)

    def add(self, name: str, updates: int, value: Any) -> None:
        """Add a point, unless its value is no finite number."""
        try:
            number = float(value)
        except (TypeError, ValueError):
            return
        if math.isfinite(number):
            self.curves.setdefault(name, []).append((updates, number))


def read_training_log(path: Path) -> TrainingLog:
    """Read a log of fairseq-train (``--log-format json --log-file``); other lines are passed over.

    fairseq opens the file once more at every epoch and validation, so that each line comes many times over.
    """
    log = TrainingLog()
    for line in dict.fromkeys(path.read_text(encoding="utf-8", errors="replace").splitlines()):
        if not line.startswith("{"):
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # a killed run leaves half a line
            continue
        if "valid_num_updates" in record:
            updates, names = (
                record["valid_num_updates"],
                [name for name in record if name.startswith("valid_")],
            )
        elif "num_updates" in record:
            updates, names = record["num_updates"], list(record)
        else:
            continue
        for name in names:
            log.add(name, int(float(updates)), record[name])
    # A training that was stopped does some updates again: the later values are those of the model.
    log.curves = {name: sorted(dict(points).items()) for name, points in log.curves.items()}
    return log
