"""GQA's balanced questions as OFA's vqa_gen TSV.

Official files and their places (RAW and IMAGES may be the same folder)::

    RAW/train_balanced_questions.json     from questions1.2.zip, https://cs.stanford.edu/people/dorarad/gqa/download.html
    RAW/val_balanced_questions.json       the same
    RAW/testdev_balanced_questions.json   the same
    IMAGES/images/2370799.jpg …           images.zip

A file holds an object from question id to a question with `imageId`, `question`, `answer` and many other fields.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from narvl_plugin.data.sources.reading import Record, chosen_splits, need, not_as_published, pick, read_json
from narvl_plugin.data.sources.writing import Columns, ImageFolder, Notes, Outcome, clean, join_answers, write_split

SPLITS = ("train", "val", "testdev")
DOWNLOAD = "unpack questions1.2.zip and images.zip (cs.stanford.edu/people/dorarad/gqa/download.html)"
QUESTION = {"imageId": str, "question": str, "answer": str}


def convert_gqa(raw: Path, out: Path, images: ImageFolder, *, splits: Sequence[str] | None = None) -> Iterator[Outcome]:
    """Write OUT/{train,val,testdev}.tsv and yield the outcome of each; every answer has confidence 1.

    Args:
        raw: the folder of the official files.
        out: the folder to write into.
        images: the images' folder, and their form in the rows.
        splits: the splits to write; all by default.

    Yields:
        The outcome of each file.

    Raises:
        MissingInput: if a file or folder does not exist; raised before anything is written.
        BadRow: if a record is not as published.
    """
    files = {split: raw / f"{split}_balanced_questions.json" for split in chosen_splits(splits, SPLITS)}
    need(files.values(), [images.folder / "images"], DOWNLOAD)
    for split, file in files.items():
        yield write_split(out / f"{split}.tsv", partial(load, file), question_row, inputs=[file], images=images)


def load(file: Path, fields: Mapping[str, type] = QUESTION) -> list[tuple[str, Record]]:
    """Return a file's questions, with `fields`, and their ids."""
    questions = read_json(file, object_hook=partial(without_meaning, fields))
    if not isinstance(questions, dict):
        not_as_published(str(file), f"is a {type(questions).__name__}, not an object from question id to question")
    return [(key, pick(question, fields, f"{file}:{key}")) for key, question in questions.items()]


def without_meaning(fields: Mapping[str, type], found: Record) -> Record:
    """Reduce a question to the fields used while the file is read: all fields of train would take gigabytes."""
    return {name: found[name] for name in fields if name in found} if "imageId" in found else found


def question_row(entry: tuple[str, Record], notes: Notes) -> Columns:
    """Return question-id, image-id, question, weighted answer, objects, image."""
    key, question = entry
    return [
        clean(key, notes),
        clean(question["imageId"], notes),
        clean(question["question"], notes),
        join_answers({question["answer"]: 1.0}, notes),
        "",
        Path("images", f"{question['imageId']}.jpg"),
    ]
