"""Prediction files in the benchmarks' formats: written from the output of fairseq-generate, and read back.

All are a JSON list with an object for each official id::

    caption        [{"image_id": 42, "caption": "a dog"}, …]                   COCO's results format
    vqa            [{"question_id": 42000, "answer": "yes"}, …]                VQA's
    gqa            [{"questionId": "05515938", "prediction": "left"}, …]       GQA's
    refcoco        [{"sent_id": 50, "box": [x0, y0, x1, y1]}, …]               ours
    grefcoco       [{"id": "135-400", "boxes": [[x0, y0, x1, y1], …]}, …]      ours; the id is REF_ID-SENT_ID
    snli_ve        [{"pairID": "4705552913.jpg#2r1n", "label": "neutral"}, …]  ours
    visual_genome  [{"image_id": 42, "triplets": […]}, …]                      ours

Our formats are for benchmarks without an evaluation server and an official format. Boxes are in pixels of the original
image. A hypothesis that is not a box, a list of boxes or a label counts as wrong. Its box is null, its boxes are null,
or its label is the predicted text. One that is not triplets has none, as all images of Visual Genome have some.

Triplets are ranked by their order. fairseq-generate writes no probabilities of triplets, so they keep the order of its
hypothesis. A triplet is such as::

    {"subject": "dog", "subject_box": [1, 4, 9, 13], "relation": "on", "object": "mat", "object_box": [0, 9, 15, 16]}
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from narvl_plugin.data.boxes import bins_in, boxes_in, from_bins, is_box
from narvl_plugin.data.images import ImageReader, image_size
from narvl_plugin.data.scene_graph import triplets_in
from narvl_plugin.data.sources.reading import check_size
from narvl_plugin.data.text import ENTAILMENT_ANSWERS
from narvl_plugin.data.triplets import MOST_TRIPLETS
from narvl_plugin.data.tsv import TsvFile
from narvl_plugin.errors import BadRow, InputError, MissingInput
from narvl_plugin.scoring.tokenization import one_line
from narvl_plugin.whole_files import require_writable, write_whole

logger = logging.getLogger(__name__)

UNIQUE_ID, IMAGE_ID = 0, 1
IMAGE = 4
"""Columns of a TSV file; the column of the image is that of grounding."""

SIZES_MARK = b"O-\t"
"""The beginning of the line with the sizes."""
MAX_SIZES_LINE, MAX_SIZE = 1_000, 1_000_000
LABELS = {said: label for label, said in ENTAILMENT_ANSWERS.items()}
_DETOKENIZED = re.compile(r"D-(?P<id>[^\t]+)\t[^\t]*\t(?P<text>.*)")
# Python's int also accepts underscores, signs, spaces and the digits of other scripts; it reads 79_1 as 791.
_WHOLE_NUMBER = re.compile("[0-9]{1,18}")
MOST_PREDICTED_BOXES = 1000
"""Largest number of boxes of a prediction."""
TRIPLET = {"subject": str, "subject_box": list, "relation": str, "object": str, "object_box": list}
"""The fields of a predicted triplet."""


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_box(value: Any) -> bool:
    """Tell whether a value is a box or null."""
    return value is None or is_box(value)


def _is_boxes(value: Any) -> bool:
    """Tell whether a value is a list of boxes or null."""
    return value is None or (isinstance(value, list) and len(value) <= MOST_PREDICTED_BOXES and all(map(is_box, value)))


def _is_triplets(value: Any) -> bool:
    """Tell whether a value is a list of triplets."""
    return isinstance(value, list) and len(value) <= MOST_TRIPLETS and all(map(_is_triplet, value))


def _is_triplet(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and all(isinstance(value.get(name), kind) for name, kind in TRIPLET.items())
        and is_box(value["subject_box"])
        and is_box(value["object_box"])
    )


@dataclass(frozen=True)
class Form:
    """The format of one object in a file of predictions.

    Attributes:
        key: the field of the official id.
        key_type: int or str.
        value: the field of the prediction.
        source: the command `narvl data SOURCE` writes TSV files with these ids.
        column: the TSV column that holds the official id.
        image: the TSV column that holds the image.
        is_value: whether a value of JSON is a prediction.
    """

    key: str
    key_type: type
    value: str
    source: str
    column: int = UNIQUE_ID
    image: int = IMAGE
    is_value: Callable[[Any], bool] = _is_text

    def official(self, key: str, where: str) -> int | str:
        """Return a TSV file's id in the benchmark's format.

        Raises:
            BadRow: if it cannot be one of the benchmark's ids.
        """
        if self.key_type is str:
            return key
        if not _WHOLE_NUMBER.fullmatch(key):
            raise BadRow(
                f"{where}: {key!r:.40} is no {self.key}, which are whole numbers; check --task, or generate from a "
                f"file of `narvl data {self.source}`, whose column {self.column} (from 0) holds them"
            )
        return int(key)


FORMS = {
    "caption": Form("image_id", int, "caption", "coco", IMAGE_ID),
    "vqa": Form("question_id", int, "answer", "vqav2"),
    "gqa": Form("questionId", str, "prediction", "gqa"),
    "refcoco": Form("sent_id", int, "box", "refcoco", is_value=_is_box),
    "grefcoco": Form("id", str, "boxes", "grefcoco", is_value=_is_boxes),
    "snli_ve": Form("pairID", str, "label", "snli-ve"),
    "visual_genome": Form("image_id", int, "triplets", "visual-genome", image=3, is_value=_is_triplets),
}
OF_BINS = ("refcoco", "grefcoco", "visual_genome")
"""The tasks whose hypotheses hold `<bin_k>`."""


@dataclass(frozen=True)
class BinSizes:
    """The sizes that define `<bin_k>`: the options of the training.

    Attributes:
        num_bins: --num-bins.
        max_image_size: --max-image-size, in pixels.
        patch_image_size: --patch-image-size, in pixels.
    """

    num_bins: int = 1000
    max_image_size: int = 512
    patch_image_size: int = 512

    @classmethod
    def of(cls, generated: Path, given: Mapping[str, int | None]) -> BinSizes:
        """Return the sizes with which a file was generated; the file holds them (`compat.write_sizes_of_bins`).

        A program's whole output may begin with log lines. A file of several shards holds the sizes of each.

        Args:
            generated: the file that fairseq-generate wrote.
            given: the caller's sizes by name; they take precedence, with a warning if they differ.

        Returns:
            The sizes.

        Raises:
            MissingInput: if there is no such file.
            InputError: if neither the file nor the caller gives a size, or the sizes of the file's parts differ.
        """
        try:
            with generated.open("rb") as stream:
                lines = {line[:MAX_SIZES_LINE].strip() for line in stream if line.startswith(SIZES_MARK)}
        except FileNotFoundError as error:
            raise MissingInput(f"{generated}: no such file; run fairseq-generate --results-path") from error
        if len(lines) > 1:
            shown = "; ".join(sorted(line.decode(errors="replace") for line in lines))
            raise InputError(f"{generated}: its parts were generated with other sizes ({shown:.300}); generate again")
        try:
            said = dict(json.loads(lines.pop().removeprefix(SIZES_MARK))) if lines else {}
        except (ValueError, TypeError, RecursionError) as error:
            raise InputError(f"{generated}: its line O- has no JSON object ({error})") from error
        sizes = {}
        for field in fields(cls):
            written, option = said.get(field.name), "--" + field.name.replace("_", "-")
            chosen = written if given.get(field.name) is None else given[field.name]
            if type(chosen) is not int or not 1 <= chosen <= MAX_SIZE:
                raise InputError(
                    f"{generated}: does not say the {option} that it was generated with; give {option} as in training"
                )
            if written not in (None, chosen):
                logger.warning("%s: was generated with %s %s, now %s %s", generated, option, written, option, chosen)
            sizes[field.name] = chosen
        return cls(**sizes)

    def box(self, text: str, size: tuple[int, int]) -> list[float] | None:
        """Return the box of a text, in pixels of the original image.

        Args:
            text: the text, four `<bin_k>` or anything else.
            size: the width and height of the image.

        Returns:
            The edges x0, y0, x1, y1; None if the text is not a box.
        """
        bins = bins_in(text)
        return None if bins is None else self._in_pixels(bins, size)

    def boxes(self, text: str, size: tuple[int, int]) -> list[list[float]] | None:
        """Return all boxes of a text, in pixels of the original image.

        Args:
            text: the text, four `<bin_k>` for each box, or anything else.
            size: the width and height of the image.

        Returns:
            The edges x0, y0, x1, y1 of each box; None if the text is not boxes.
        """
        found = boxes_in(text)
        return None if found is None else [self._in_pixels(bins, size) for bins in found]

    def triplets(self, text: str, size: tuple[int, int]) -> list[dict[str, Any]]:
        """Return the triplets of a text, with boxes in pixels of the original image.

        Args:
            text: the text in the form of the task `scene_graph`, or anything else.
            size: the width and height of the image.

        Returns:
            The fields `TRIPLET` of each triplet; none if the text is not triplets.
        """
        records = [one._asdict() for one in triplets_in(text) or []]
        for record in records:
            record |= {name: self._in_pixels(record[name], size) for name in ("subject_box", "object_box")}
        return records

    def _in_pixels(self, bins: Sequence[int], size: tuple[int, int]) -> list[float]:
        resized = from_bins(torch.tensor(bins), side=self.max_image_size, num_bins=self.num_bins)
        edges = (resized * torch.tensor(size).repeat(2) / self.patch_image_size).tolist()
        return [round(edge, 2) for edge in edges]


def form_of(task: str) -> Form:
    """Return the form of a task's predictions.

    Raises:
        InputError: for an unknown task.
    """
    if task not in FORMS:
        raise InputError(f"--task {task}: choose one of {', '.join(FORMS)}")
    return FORMS[task]


def read_generated(path: Path) -> dict[str, str]:
    """Read the outputs in a file written by fairseq-generate.

    Args:
        path: the file.

    Returns:
        The best hypothesis by sample id.

    Raises:
        MissingInput: if there is no such file.
        InputError: if it holds no output, or is not UTF-8.
    """
    try:
        content = path.read_bytes().decode()  # read_text would also end lines at "\r"
    except FileNotFoundError as error:
        raise MissingInput(f"{path}: no such file; run fairseq-generate --results-path {path.parent}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 text ({error}); run fairseq-generate again") from error
    texts: dict[str, str] = {}
    for line in content.split("\n"):  # splitlines would also cut at characters that a text may hold
        match = _DETOKENIZED.fullmatch(line)
        if match:
            texts.setdefault(match["id"], match["text"].strip())
    if not texts:
        raise InputError(f"{path}: holds no D- lines; run fairseq-generate again, without --quiet")
    return texts


def write_predictions(generated: Path, out: Path, *, task: str, data: Path, bins: BinSizes) -> int:
    """Write the outputs of fairseq-generate as the task's file of predictions.

    Args:
        generated: generate-test.txt.
        out: the JSON file.
        task: one of `FORMS`.
        data: the TSV file that was generated from; it holds the official ids and the sizes of images.
        bins: the sizes of bins; only boxes need them.

    Returns:
        The number of predictions.

    Raises:
        InputError: if a file is missing, the files do not belong together, or a row has no hypothesis.
        BadRow: if an id is not one of the benchmark's or belongs to two rows, or an image cannot be read.
    """
    require_writable(out)
    form = form_of(task)
    said = read_generated(generated)
    tsv = TsvFile(data, (UNIQUE_ID, IMAGE_ID))
    rows = [tsv[row] for row in range(len(tsv))]
    keys = official_ids(said, rows, form.column, f"{generated}, {data}")
    # The first sample of an id counts. A text is one line, because evaluations may cut captions at line ends.
    texts = {keys[sample]: one_line(text) for sample, text in reversed(said.items())}
    wanted = dict.fromkeys(columns[form.column] for columns in rows)
    unsaid = [key for key in wanted if key not in texts]
    if unsaid:
        raise InputError(
            f"{generated}: {len(unsaid)} of the {len(wanted)} ids of {data} have no hypothesis, such as {unsaid[0]}; "
            "generate again, as benchmarks refuse incomplete files"
        )
    row_of = rows_by_id(rows, form, tsv)
    values: dict[str, Any] = texts
    if task == "snli_ve":
        values = {key: LABELS.get(text, text) for key, text in texts.items()}
    elif task in OF_BINS:
        images = TsvFile(data, (form.image,))
        read = {"refcoco": bins.box, "grefcoco": bins.boxes, "visual_genome": bins.triplets}[task]
        values = {key: read(text, _size(images, row_of[key])) for key, text in texts.items()}
    records = [{form.key: form.official(key, tsv.where(row)), form.value: values[key]} for key, row in row_of.items()]
    write_whole(out, json.dumps(records) + "\n")
    return len(records)


def rows_by_id(rows: Sequence[Sequence[str]], form: Form, tsv: TsvFile) -> dict[str, int]:
    """Return the row (from 0) of each id in the TSV file; the row of an image id is its first.

    Args:
        rows: the unique id and the image id of each row.
        form: the form of the task's predictions.
        tsv: the TSV file, for errors.

    Returns:
        The rows by id.

    Raises:
        BadRow: if an id is not one of the benchmark's, or two rows have equal ids, such as 7 and 007.
    """
    row_of: dict[str, int] = {}
    first_with: dict[int | str, int] = {}
    for row, columns in enumerate(rows):
        key = columns[form.column]
        if form.column == IMAGE_ID and key in row_of:
            continue  # images may have several captions, each in a row
        official = form.official(key, tsv.where(row))
        first = first_with.setdefault(official, row)
        if first != row:
            other = rows[first][form.column]
            raise BadRow(
                f"{tsv.where(row)}: {key!r:.40} is the {form.key} {official}, as {other!r:.40} of row {first + 1} is; "
                "leave one of the rows out, and generate again"
            )
        row_of[key] = row
    return row_of


def official_ids(samples: Collection[str], rows: Sequence[Sequence[str]], official: int, where: str) -> dict[str, str]:
    """Return the official id of each sample id.

    A sample id may be the unique id or the image id of its row (--selected-cols).

    Args:
        samples: the sample ids.
        rows: the unique id and the image id of each row.
        official: the column of the official id, one of these two.
        where: the files, for errors.

    Returns:
        The official ids by sample id.

    Raises:
        InputError: if a sample belongs to no row, or its row is ambiguous.
    """
    readings = []
    for column in (UNIQUE_ID, IMAGE_ID):
        pairs = {(ids[column], ids[official]) for ids in rows if ids[column] in samples}
        reading = dict(pairs)
        if len(reading) == len(pairs) == len(samples):
            readings.append(reading)
    if not readings:
        known = {key for ids in rows for key in ids}
        unknown = [sample for sample in samples if sample not in known]
        if unknown:
            raise InputError(
                f"{where}: {len(unknown)} of {len(samples)} sample ids belong to no row, such as {unknown[0]}; "
                "generate from this file"
            )
        raise InputError(
            f"{where}: sample ids belong to several rows, as image ids do where an image has several; generate with "
            f"--selected-cols {UNIQUE_ID},…, whose first column holds the unique ids"
        )
    if readings[0] != readings[-1]:
        raise InputError(
            f"{where}: all sample ids are unique ids, and image ids of other rows, too; their rows are ambiguous; "
            f"write other ids into column {UNIQUE_ID}, and generate again"
        )
    return readings[0]


def read_predictions(file: Path, task: str) -> dict[int | str, Any]:
    """Return the predictions of a file by official id; each is a value that the task's form allows.

    Raises:
        MissingInput: if there is no such file.
        InputError: if it has another form, or an id twice.
    """
    form = form_of(task)
    try:
        check_size(file)
        records = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MissingInput(f"{file}: no such file; write it by narvl predictions") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: is not JSON ({error})") from error
    expected = f"an object with {form.key} ({form.key_type.__name__}) and {form.value}, as --task {task} has"
    if not isinstance(records, list):
        raise InputError(f"{file}: is a {type(records).__name__}, not a list; each entry is {expected}")
    predictions: dict[int | str, Any] = {}
    for index, record in enumerate(records):
        key: Any = record.get(form.key) if isinstance(record, dict) else None
        is_key = isinstance(key, form.key_type) and not isinstance(key, bool)  # true is an int, equal to 1
        if not is_key or form.value not in record or not form.is_value(record[form.value]):
            raise InputError(f"{file}[{index}]: is {json.dumps(record):.80}, not {expected}")
        if key in predictions:
            raise InputError(f"{file}[{index}]: {form.key} {key} has a prediction already")
        predictions[key] = record[form.value]
    return predictions


def _size(images: TsvFile, row: int) -> tuple[int, int]:
    where = images.where(row)
    reader = ImageReader(1, folder=Path(images.path).parent)
    size = image_size(reader.read_bytes(images[row][0], where), where)
    if size is None:
        raise BadRow(f"{where}: the image column holds features that do not tell the size of the image")
    return size
