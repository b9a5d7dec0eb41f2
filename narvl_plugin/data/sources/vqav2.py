"""VQA 2.0 as OFA's vqa_gen TSV, and the list of its most frequent answers.

Official files and their places (RAW and IMAGES may be the same folder)::

    RAW/v2_OpenEnded_mscoco_train2014_questions.json      from v2_Questions_Train_mscoco.zip, https://visualqa.org/download
    RAW/v2_OpenEnded_mscoco_val2014_questions.json        v2_Questions_Val_mscoco.zip
    RAW/v2_OpenEnded_mscoco_test2015_questions.json       v2_Questions_Test_mscoco.zip
    RAW/v2_OpenEnded_mscoco_test-dev2015_questions.json   the same
    RAW/v2_mscoco_train2014_annotations.json              v2_Annotations_Train_mscoco.zip
    RAW/v2_mscoco_val2014_annotations.json                v2_Annotations_Val_mscoco.zip
    IMAGES/train2014/COCO_train2014_000000000009.jpg …    train2014.zip, https://cocodataset.org/#download
    IMAGES/val2014/COCO_val2014_000000000042.jpg …        val2014.zip
    IMAGES/test2015/COCO_test2015_000000000001.jpg …      test2015.zip

A questions file holds `questions`, each with `question_id`, `image_id` and `question`. An annotations file holds
`annotations`, each with `question_id`, the `answers` of ten people (each with `answer`) and their most frequent one,
`multiple_choice_answer`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path

from narvl_plugin.data.plain_pickles import read_pickle
from narvl_plugin.data.sources.reading import (
    Record,
    chosen_splits,
    need,
    not_as_published,
    pick,
    pick_all,
    read_json,
)
from narvl_plugin.data.sources.writing import (
    Columns,
    Dropped,
    ImageFolder,
    Notes,
    Outcome,
    clean,
    join_answers,
    write_answers,
    write_split,
)
from narvl_plugin.data.vqa_answers import leave_one_out, normalise_answer

SPLITS = {"train": "train2014", "val": "val2014", "test": "test2015", "test-dev": "test-dev2015"}
"""TSV file -> the name in the official files."""

ANSWERED = ("train", "val")
MIN_QUESTIONS = 9
"""The least number of questions whose most frequent answer it is; train and val have 3,129 such answers."""

SECRET = "1.0|!+?"
"""Answer column of the tests, whose answers are not published. It is well formed; no normalised answer is `?`."""

DOWNLOAD = "unpack the questions' and annotations' archives (visualqa.org/download) and the images' (cocodataset.org)"
QUESTION = {"question_id": int, "image_id": int, "question": str}
ANNOTATION = {"question_id": int, "multiple_choice_answer": str, "answers": list}


def convert_vqav2(
    raw: Path, out: Path, images: ImageFolder, *, splits: Sequence[str] | None = None, answers: bool = False
) -> Iterator[Outcome]:
    """Write OUT/{train,val,test,test-dev}.tsv and yield the outcome of each.

    With `answers`, OUT/trainval_ans2label.pkl is written as well. Then train has only questions with an answer in that
    list, because a model that is restricted to it could learn nothing from the others.

    Args:
        raw: the folder of the official files.
        out: the folder to write into.
        images: the images' folder, and their form in the rows.
        splits: the splits to write; all by default.
        answers: whether to write the list of answers.

    Yields:
        The outcome of each file.

    Raises:
        MissingInput: if a file or folder does not exist; raised before anything is written.
        BadRow: if a record is not as published.
    """
    chosen = chosen_splits(splits, SPLITS)
    inputs = {split: [questions_file(raw, split)] for split in chosen}
    for split in ANSWERED:
        if split in inputs:
            inputs[split].append(annotations_file(raw, split))
    annotated = [annotations_file(raw, split) for split in ANSWERED if answers]
    need(
        [*chain.from_iterable(inputs.values()), *annotated],
        [images.folder / image_folder(split) for split in chosen],
        DOWNLOAD,
    )
    only: dict[str, frozenset[str]] = {}
    if answers:
        answer_list = write_answers(out, partial(frequent_answers, annotated))
        yield answer_list
        if "train" in inputs:
            only["train"] = frozenset(read_pickle(answer_list.path))
            inputs["train"].append(answer_list.path)
    for split, files in inputs.items():
        yield write_split(
            out / f"{split}.tsv",
            partial(load, raw, split),
            partial(question_row, image_folder(split), only.get(split)),
            inputs=files,
            images=images,
        )


def questions_file(raw: Path, split: str) -> Path:
    """Return the path of a split's questions."""
    return raw / f"v2_OpenEnded_mscoco_{SPLITS[split]}_questions.json"


def annotations_file(raw: Path, split: str) -> Path:
    """Return the path of a split's answers."""
    return raw / f"v2_mscoco_{SPLITS[split]}_annotations.json"


def image_folder(split: str) -> str:
    """Return the name of a split's image folder; test-dev is a part of test."""
    return SPLITS[split].replace("test-dev", "test")


def load(raw: Path, split: str) -> list[Record]:
    """Return a split's questions with the people's `answers`, None if these are not published."""
    file = questions_file(raw, split)
    found = pick(read_json(file), {"questions": list}, str(file))["questions"]
    questions = pick_all(found, QUESTION, f"{file}:questions")
    if split not in ANSWERED:
        return [{**question, "answers": None} for question in questions]
    annotations = annotations_file(raw, split)
    answers = {found["question_id"]: found["answers"] for found in load_annotations(annotations)}
    for question in questions:
        if question["question_id"] not in answers:
            not_as_published(f"{annotations}:annotations", f"has no question_id {question['question_id']}")
        question["answers"] = answers[question["question_id"]]
    return questions


def load_annotations(file: Path, fields: Mapping[str, type] = ANNOTATION) -> list[Record]:
    """Return the annotations of a file, with `fields`; their `answers` are a list of strings."""
    where = f"{file}:annotations"
    annotations = pick_all(pick(read_json(file), {"annotations": list}, str(file))["annotations"], fields, where)
    for index, annotation in enumerate(annotations):
        people = pick_all(annotation["answers"], {"answer": str}, f"{where}[{index}].answers")
        annotation["answers"] = [person["answer"] for person in people]
    return annotations


def question_row(folder: str, only: frozenset[str] | None, question: Record, notes: Notes) -> Columns:
    """Return question-id, image-id, question, weighted answers, objects, image.

    Raises:
        Dropped: if the question has no answer of `only`.
    """
    number = question["image_id"]
    scores = soft_scores(question["answers"] or [])
    if only is not None and only.isdisjoint(scores):
        raise Dropped("no answer in the list")
    return [
        str(question["question_id"]),
        str(number),
        clean(question["question"], notes),
        SECRET if question["answers"] is None else join_answers(scores, notes),
        "",
        Path(folder, f"COCO_{folder}_{number:012d}.jpg"),
    ]


def soft_scores(answers: Sequence[str]) -> dict[str, float]:
    """Return the official accuracy of each answer that people gave, after normalisation; empty answers are left out.

    In a group of people, an answer that n of them gave is worth min(1, n / 3). As in the official evaluation, this is
    averaged over all groups that leave one person out. Ten people thus give 0.3, 0.6 and 0.9 for one, two and three,
    and 1 for more.
    """
    people = len(answers)
    counts = Counter(answer for answer in map(normalise_answer, answers) if answer)
    return {answer: leave_one_out(n, people) for answer, n in counts.items()}


def frequent_answers(files: Sequence[Path]) -> list[str]:
    """Return the normalised answers that are the most frequent one of `MIN_QUESTIONS` questions, by frequency."""
    counts = Counter(
        normalise_answer(annotation["multiple_choice_answer"])
        for file in files
        for annotation in load_annotations(file)
    )
    frequent = [answer for answer, questions in counts.items() if answer and questions >= MIN_QUESTIONS]
    return sorted(frequent, key=lambda answer: (-counts[answer], answer))
