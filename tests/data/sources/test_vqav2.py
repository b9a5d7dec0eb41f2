"""VQA 2.0: whole rows, soft scores worked out by leaving each person out, and the list of frequent answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from narvl_plugin.data.plain_pickles import read_pickle
from narvl_plugin.data.sources.vqav2 import convert_vqav2, soft_scores
from narvl_plugin.data.sources.writing import ImageFolder
from narvl_plugin.data.vqa_answers import normalise_answer
from narvl_plugin.errors import BadRow, MissingInput

INFO = {
    "info": {"version": "2.0", "year": 2017, "url": "http://visualqa.org"},
    "license": {"name": "Creative Commons Attribution 4.0 International License"},
    "data_type": "mscoco",
}


def questions(subset: str, entries: Sequence[tuple[int, int, str]]) -> dict[str, Any]:
    """Return a file of questions."""
    found = [{"image_id": image, "question": text, "question_id": key} for key, image, text in entries]
    return {**INFO, "task_type": "Open-Ended", "data_subtype": subset, "questions": found}


def annotation(key: int, image: int, *answers: str) -> dict[str, Any]:
    """Return the annotation of a question; the first answer is the most frequent one."""
    people = [
        {"answer": answer, "answer_confidence": "yes", "answer_id": number}
        for number, answer in enumerate(answers, start=1)
    ]
    return {
        "question_type": "what is",
        "multiple_choice_answer": answers[0],
        "answers": people,
        "image_id": image,
        "answer_type": "other",
        "question_id": key,
    }


@pytest.fixture
def photos(photo: Callable[..., str], write_json: Callable[[str, Any], Path]) -> dict[str, str]:
    """Write the data set and return its photographs."""
    train = [(9000, 9, "What is\tthis?"), (9001, 9, "Is it&&red?"), (9002, 9, " \n"), (9003, 9, "Which letter?")]
    write_json("v2_OpenEnded_mscoco_train2014_questions.json", questions("train2014", train))
    people = [
        annotation(9001, 9, *["yes"] * 10),
        annotation(9000, 9, "hot dog", "Hot-Dog", "the dog", "dog.", "two dogs", "2 dogs", "2 dogs", *["hot dog"] * 3),
        annotation(9002, 9, *["no"] * 10),
        annotation(9003, 9, *["a"] * 10),
    ]
    write_json("v2_mscoco_train2014_annotations.json", {**INFO, "data_subtype": "train2014", "annotations": people})
    val = [(42000 + number, 42, "Is it?") for number in range(18)]
    write_json("v2_OpenEnded_mscoco_val2014_questions.json", questions("val2014", val))
    people = [
        annotation(42000 + number, 42, *(["Yes"] * 10 if number < 8 else ["Blue."] * 9 + ["x"])) for number in range(18)
    ]
    write_json("v2_mscoco_val2014_annotations.json", {**INFO, "data_subtype": "val2014", "annotations": people})
    test = [(1000, 1, "What is it?"), (2000, 2, "And this?")]
    write_json("v2_OpenEnded_mscoco_test2015_questions.json", questions("test2015", test))
    write_json("v2_OpenEnded_mscoco_test-dev2015_questions.json", questions("test-dev2015", test[1:]))
    names = ("train2014/COCO_train2014_000000000009", "val2014/COCO_val2014_000000000042")
    tests = ("test2015/COCO_test2015_000000000001", "test2015/COCO_test2015_000000000002")
    return {name.rpartition("_")[2].lstrip("0"): photo(f"{name}.jpg") for name in names + tests}


def test_rows(raw: Path, tmp_path: Path, photos: dict[str, str], read_rows: Callable[..., Any]) -> None:
    reports = [str(outcome) for outcome in convert_vqav2(raw, tmp_path, ImageFolder(raw))]
    assert read_rows(tmp_path / "train.tsv") == [
        ["9000", "9", "What is this?", "1.0|!+hot dog&&0.9|!+2 dogs&&0.6|!+dog", "", photos["9"]],
        ["9001", "9", "Is it red?", "1.0|!+yes", "", photos["9"]],
    ]
    val = read_rows(tmp_path / "val.tsv")
    assert val[0] == ["42000", "42", "Is it?", "1.0|!+yes", "", photos["42"]]
    assert val[17] == ["42017", "42", "Is it?", "1.0|!+blue&&0.3|!+x", "", photos["42"]]
    second = ["2000", "2", "And this?", "1.0|!+?", "", photos["2"]]
    assert read_rows(tmp_path / "test.tsv") == [["1000", "1", "What is it?", "1.0|!+?", "", photos["1"]], second]
    assert read_rows(tmp_path / "test-dev.tsv") == [second]
    assert reports[0].endswith(
        "train.tsv: 2 rows written, 2 texts cleaned of tabs, line ends or separators, 1 dropped (empty text), "
        "1 dropped (no answer)"
    )
    assert not (tmp_path / "trainval_ans2label.pkl").exists()


def test_frequent_answers_are_those_of_nine_questions_in_train_and_val(
    raw: Path, tmp_path: Path, photos: dict[str, str], read_rows: Callable[..., Any]
) -> None:
    answers, train, val = convert_vqav2(raw, tmp_path, ImageFolder(raw), splits=["train", "val"], answers=True)
    assert answers.counts == {"answers": 2}
    assert read_pickle(tmp_path / "trainval_ans2label.pkl") == {"blue": 0, "yes": 1}
    assert [row[0] for row in read_rows(train.path)] == ["9001"]
    assert train.counts is not None and train.counts["dropped (no answer in the list)"] == 3
    assert val.counts == {"rows written": 18}


@given(st.lists(st.sampled_from(["red", "Red.", "two", "2", "a", "blue"]), min_size=2, max_size=10))
def test_soft_scores_are_the_official_accuracy(answers: list[str]) -> None:
    scores = soft_scores(answers)
    normalised = [normalise_answer(answer) for answer in answers]
    assert scores.keys() == set(normalised) - {""}
    groups = list(combinations(normalised, len(answers) - 1))
    for answer, score in scores.items():
        assert score == pytest.approx(sum(min(1, group.count(answer) / 3) for group in groups) / len(groups))


def test_ten_people() -> None:
    scores = soft_scores(["a cat", *["dog"] * 2, *["cow"] * 3, *["hen"] * 4])
    assert {answer: round(score, 9) for answer, score in scores.items()} == {
        "cat": 0.3,
        "dog": 0.6,
        "cow": 0.9,
        "hen": 1,
    }


@pytest.mark.parametrize(
    "gone",
    ["v2_OpenEnded_mscoco_test-dev2015_questions.json", "v2_mscoco_val2014_annotations.json", "test2015"],
)
def test_missing_input_is_named_before_anything_is_written(
    raw: Path, tmp_path: Path, photos: dict[str, str], gone: str
) -> None:
    (raw / gone).rename(raw / "elsewhere")
    with pytest.raises(MissingInput, match=rf"{gone}: no such .*visualqa.org/download"):
        list(convert_vqav2(raw, tmp_path / "out", ImageFolder(raw)))
    assert not (tmp_path / "out").exists()


def test_splits_that_are_not_asked_for_need_no_files(raw: Path, tmp_path: Path, photos: dict[str, str]) -> None:
    for name in ("v2_mscoco_val2014_annotations.json", "test2015"):
        (raw / name).rename(raw / f"no {name}")
    list(convert_vqav2(raw, tmp_path, ImageFolder(raw), splits=["train"]))
    with pytest.raises(MissingInput, match="v2_mscoco_val2014_annotations.json"):
        list(convert_vqav2(raw, tmp_path, ImageFolder(raw), splits=["train"], answers=True))


@pytest.mark.parametrize(
    ("annotations", "message"),
    [
        ([], r"annotations.json:annotations: has no question_id 9000"),
        ([{"question_id": 9000, "multiple_choice_answer": "x", "answers": [{}]}], r"\[0\].answers\[0\]: has no field"),
    ],
)
def test_a_record_that_is_not_as_published_is_named(
    raw: Path,
    tmp_path: Path,
    photos: dict[str, str],
    write_json: Callable[[str, Any], Path],
    annotations: Any,
    message: str,
) -> None:
    write_json("v2_mscoco_train2014_annotations.json", {"annotations": annotations})
    with pytest.raises(BadRow, match=message):
        list(convert_vqav2(raw, tmp_path, ImageFolder(raw), splits=["train"]))
