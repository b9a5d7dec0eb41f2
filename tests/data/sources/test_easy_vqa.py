"""easy-VQA: whole rows of a small copy, the official numbers of the package, and what to do without it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from narvl_plugin.data.plain_pickles import read_pickle
from narvl_plugin.data.sources.easy_vqa import convert_easy_vqa, packaged_data
from narvl_plugin.data.sources.writing import ImageFolder
from narvl_plugin.errors import BadRow, MissingInput


@pytest.fixture
def photos(raw: Path, photo: Callable[..., str], write_json: Callable[[str, Any], Path]) -> dict[str, str]:
    """Write a small copy of the data set and return its images."""
    train = [["what is the blue shape?", "rectangle", 0], ["is there a circle?", "no", 1], ["what color?", "red", 10]]
    write_json("train/questions.json", train)
    write_json("test/questions.json", [["is it blue?", "yes", 0], ["", "no", 0]])
    (raw / "answers.txt").write_text("rectangle\nno\nred\nyes\n")
    return {
        name: photo(f"{name}.png") for name in ("train/images/0", "train/images/1", "train/images/10", "test/images/0")
    }


def test_rows(raw: Path, tmp_path: Path, photos: dict[str, str], read_rows: Callable[..., Any]) -> None:
    train, val, test, answers = convert_easy_vqa(raw, tmp_path, ImageFolder(raw))
    assert read_rows(train.path) == [
        ["train-1", "train-1", "is there a circle?", "1.0|!+no", "", photos["train/images/1"]],
    ]
    assert read_rows(val.path) == [
        ["train-0", "train-0", "what is the blue shape?", "1.0|!+rectangle", "", photos["train/images/0"]],
        ["train-2", "train-10", "what color?", "1.0|!+red", "", photos["train/images/10"]],
    ]
    assert read_rows(test.path) == [["test-0", "test-0", "is it blue?", "1.0|!+yes", "", photos["test/images/0"]]]
    assert test.counts == {"rows written": 1, "dropped (empty text)": 1}
    assert read_pickle(answers.path) == {"rectangle": 0, "no": 1, "red": 2, "yes": 3}


@pytest.mark.parametrize("gone", ["answers.txt", "test/questions.json", "train/images"])
def test_missing_input_is_named_before_anything_is_written(
    raw: Path, tmp_path: Path, photos: dict[str, str], gone: str
) -> None:
    (raw / gone).rename(raw / "elsewhere")
    with pytest.raises(MissingInput, match=rf"{gone}: no such .*pip install easy-vqa==1.0"):
        list(convert_easy_vqa(raw, tmp_path / "out", ImageFolder(raw)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "questions.json: is a dict, not a list"),
        ([["a?", "no", 1], ["a?", 1]], r"questions.json\[1\]: is \['a\?', 1\], not a question, an answer and a number"),
    ],
)
def test_a_question_that_is_not_as_published_is_named(
    raw: Path,
    tmp_path: Path,
    photos: dict[str, str],
    write_json: Callable[[str, Any], Path],
    content: Any,
    message: str,
) -> None:
    write_json("train/questions.json", content)
    with pytest.raises(BadRow, match=message):
        list(convert_easy_vqa(raw, tmp_path, ImageFolder(raw)))


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "meta_path", [])
    monkeypatch.delitem(sys.modules, "easy_vqa", raising=False)
    with pytest.raises(MissingInput, match="easy-VQA: its package is not installed; `pip install easy-vqa==1.0`"):
        packaged_data()


@pytest.mark.integration
def test_the_package_has_the_official_numbers(tmp_path: Path) -> None:
    pytest.importorskip("easy_vqa", reason="`pip install easy-vqa==1.0`")
    train, val, test, answers = convert_easy_vqa(packaged_data(), tmp_path, ImageFolder(packaged_data(), as_paths=True))
    assert train.counts is not None and val.counts is not None and test.counts is not None
    assert train.counts.keys() == val.counts.keys() == test.counts.keys() == {"rows written"}
    assert train.counts["rows written"] + val.counts["rows written"] == 38_575
    assert test.counts == {"rows written": 9_673}
    assert answers.counts == {"answers": 13}
    images = [{line.split("\t")[1] for line in out.path.read_text().splitlines()} for out in (train, val, test)]
    assert [len(names) for names in images] == [3_600, 400, 1_000]
    assert not images[0] & images[1]
