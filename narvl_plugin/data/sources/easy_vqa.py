"""easy-VQA (coloured shapes, 13 answers) as OFA's vqa_gen TSV, and the list of its answers.

Its files come with the package `easy-vqa` (1.0, MIT), whose folder `data` is the RAW folder::

    RAW/answers.txt             one answer a line
    RAW/train/questions.json    38,575 questions
    RAW/train/images/0.png …    4,000 images
    RAW/test/questions.json     9,673 questions
    RAW/test/images/0.png …     1,000 images

A questions file holds a list of lists: question, answer, number of the image. Train and test are the official ones.
There is no official validation split. Each tenth image of train (whose number ends in 0) goes to validation with all
its questions, so no image is in both splits.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from narvl_plugin.data.sources.reading import chosen_splits, need, not_as_published, read_json
from narvl_plugin.data.sources.writing import (
    Columns,
    ImageFolder,
    Notes,
    Outcome,
    clean,
    join_answers,
    write_answers,
    write_split,
)
from narvl_plugin.errors import MissingInput

SPLITS = {"train": "train", "val": "train", "test": "test"}
"""TSV file -> official split."""

VALIDATION_STEP = 10
INSTALL = "`pip install easy-vqa==1.0`, or name a copy of its folder `data` with --raw"

Question = tuple[str, str, str, int]
"""Id, question, answer, number of the image."""


def packaged_data() -> Path:
    """Return the data's folder in the installed package.

    Raises:
        MissingInput: if the package is not installed.
    """
    package = importlib.util.find_spec("easy_vqa")
    if package is None or package.origin is None:
        raise MissingInput(f"easy-VQA: its package is not installed; {INSTALL}")
    return Path(package.origin).parent / "data"


def convert_easy_vqa(
    raw: Path, out: Path, images: ImageFolder, *, splits: Sequence[str] | None = None
) -> Iterator[Outcome]:
    """Write OUT/{train,val,test}.tsv and OUT/trainval_ans2label.pkl and yield the outcome of each.

    Args:
        raw: the folder of the files.
        out: the folder to write into.
        images: the images' folder, and their form in the rows.
        splits: the splits to write; all by default.

    Yields:
        The outcome of each file.

    Raises:
        MissingInput: if a file or folder does not exist; raised before anything is written.
        BadRow: if a question is not as published.
    """
    chosen = chosen_splits(splits, SPLITS)
    answers = raw / "answers.txt"
    files = {split: raw / SPLITS[split] / "questions.json" for split in chosen}
    need([answers, *files.values()], [images.folder / SPLITS[split] / "images" for split in chosen], INSTALL)
    for split, file in files.items():
        yield write_split(
            out / f"{split}.tsv",
            partial(load, file, split),
            partial(question_row, SPLITS[split]),
            inputs=[file],
            images=images,
        )
    yield write_answers(out, lambda: answers.read_text(encoding="utf-8").split())


def load(file: Path, split: str) -> list[Question]:
    """Return the questions of a split."""
    questions = read_json(file)
    if not isinstance(questions, list):
        not_as_published(str(file), f"is a {type(questions).__name__}, not a list")
    found = []
    for index, entry in enumerate(questions):
        match entry:
            case [str(question), str(answer), int(number)]:
                found.append((f"{SPLITS[split]}-{index}", question, answer, number))
            case _:
                not_as_published(f"{file}[{index}]", f"is {entry!r:.60}, not a question, an answer and a number")
    if SPLITS[split] == "test":
        return found
    return [question for question in found if (question[-1] % VALIDATION_STEP == 0) == (split == "val")]


def question_row(official_split: str, entry: Question, notes: Notes) -> Columns:
    """Return question-id, image-id, question, weighted answer, objects, image."""
    key, question, answer, number = entry
    return [
        key,
        f"{official_split}-{number}",
        clean(question, notes),
        join_answers({answer: 1.0}, notes),
        "",
        Path(official_split, "images", f"{number}.png"),
    ]
