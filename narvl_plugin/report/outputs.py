"""The files of a run: training logs, test rows with their images, and the row of each output."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from narvl_plugin.data.images import ImageReader, open_image
from narvl_plugin.data.text import REFERENCE_SEPARATOR
from narvl_plugin.data.tsv import TsvFile
from narvl_plugin.errors import BadRow, InputError
from narvl_plugin.report.subjects.base import Row, RowT, TaskReport

logger = logging.getLogger(__name__)

LARGEST_VALUE = 1e30  # of a curve


def read_rows(path: Path, subject: TaskReport[RowT]) -> list[RowT]:
    """Read the rows of a test file without their images; unusable rows are left out with a warning.

    Args:
        path: the TSV file.
        subject: the task.

    Returns:
        The rows.

    Raises:
        MissingInput: if there is no such file.
        InputError: if the file has no usable row.
    """
    tsv = TsvFile(path, subject.columns)
    rows = []
    for number in range(len(tsv)):
        try:
            rows.append(subject.read(number, tsv[number], tsv.where(number)))
        except BadRow as error:
            logger.warning("left out: %s", error)
    if not rows:
        raise InputError(f"{path}: no row can be used; check that it is a test file of {subject.task}")
    return rows


def outputs_by_row(outputs: Mapping[str, str], rows: Sequence[Row], path: Path) -> dict[int, str]:
    """Assign outputs to the numbers of their rows; sample ids are unique ids or, for captions, image ids.

    Args:
        outputs: the outputs by sample id.
        rows: the rows of the test file.
        path: the file of the outputs, for errors.

    Returns:
        The outputs by row number.

    Raises:
        InputError: if an id belongs to no row, or to several.
    """
    for names in zip(*(row.ids for row in rows), strict=True):
        numbers = dict(zip(names, (row.number for row in rows), strict=True))
        if outputs.keys() <= numbers.keys():
            break
    unknown = [key for key in outputs if key not in numbers]
    if unknown:
        raise InputError(
            f"{path}: {len(unknown)} of {len(outputs)} outputs belong to no row of the test file, such "
            f"as {unknown[0]}; generate again from the same test file"
        )
    if len(numbers) != len(rows):
        raise InputError(
            f"{path}: {len(rows)} rows of the test file share {len(numbers)} ids; make its ids unique, or, for "
            f"captions, join the references of one image by {REFERENCE_SEPARATOR} in one row"
        )
    return {numbers[key]: text for key, text in outputs.items()}


def read_images(tsv_path: Path, column: int, rows: Sequence[int], side: int) -> list[Image.Image]:
    """Return the images of some rows, scaled down to at most ``side`` pixels a side.

    Args:
        tsv_path: the TSV file.
        column: the column with the images, from 0.
        rows: the numbers of the rows, from 0.
        side: the largest side in pixels.

    Returns:
        The images.

    Raises:
        BadRow: if a row holds no image.
    """
    tsv = TsvFile(tsv_path, [column])
    reader = ImageReader(side, folder=tsv_path.parent)
    images = []
    for row in rows:
        image = open_image(reader.read_bytes(tsv[row][0], tsv.where(row)), tsv.where(row))
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        images.append(image)
    return images


@dataclass
class TrainingLog:
    """Curves of one training run: points (updates, value) by name, such as ``loss`` or ``valid_loss``."""

    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)

    def add(self, name: str, updates: int, value: Any) -> None:
        """Add a point, unless its value is not a number that a chart can show."""
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            return
        if abs(number) < LARGEST_VALUE:
            self.curves.setdefault(name, []).append((updates, number))


def read_training_log(path: Path) -> TrainingLog:
    """Read a log of fairseq-train (``--log-format json --log-file``); other lines are ignored.

    fairseq reopens the file at every epoch and validation, so each line occurs many times.
    """
    log = TrainingLog()
    for line in dict.fromkeys(path.read_text(encoding="utf-8", errors="replace").splitlines()):
        if not line.startswith("{"):
            continue
        try:
            record = json.loads(line)
            updates = record.get("valid_num_updates", record.get("num_updates"))
            number = int(float(updates))
        except (ValueError, TypeError, OverflowError, RecursionError):  # a killed run leaves an incomplete line
            continue
        names = [name for name in record if "valid_num_updates" not in record or name.startswith("valid_")]
        for name in names:
            log.add(name, number, record[name])
    # A resumed training repeats some updates; the later values are those of the model.
    log.curves = {name: sorted(dict(points).items()) for name, points in log.curves.items()}
    return log
