"""GQA's balanced questions: whole rows and bad files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from narvl_plugin.data.sources.gqa import convert_gqa
from narvl_plugin.data.sources.writing import ImageFolder
from narvl_plugin.errors import BadRow, MissingInput


def entry(image: str, question: str, answer: str) -> dict[str, Any]:
    """Return a question with all that GQA says about it."""
    return {
        "semantic": [{"operation": "select", "dependencies": [], "argument": "sky (2486325)"}],
        "entailed": ["02930160"],
        "equivalent": ["02930152"],
        "question": question,
        "imageId": image,
        "isBalanced": True,
        "groups": {"global": None, "local": "06-sky_dark"},
        "answer": answer,
        "semanticStr": "select: sky (2486325)->verify color: dark [0]",
        "annotations": {"answer": {}, "question": {"2": "2486325"}, "fullAnswer": {"2": "2486325"}},
        "types": {"detailed": "verifyAttr", "semantic": "attr", "structural": "verify"},
        "fullAnswer": "Yes, the sky is dark.",
    }


@pytest.fixture
def photos(photo: Callable[..., str], write_json: Callable[[str, Any], Path]) -> dict[str, str]:
    """Write the data set and return its photographs."""
    train = {"02930152": entry("2354786", "Is the sky dark?", "yes"), "07333408": entry("99", "Who is it?", "man")}
    write_json("train_balanced_questions.json", train)
    val = {"05515938": entry("n161313", "On which side?", "left"), "0": entry("n161313", "", "x")}
    write_json("val_balanced_questions.json", val)
    write_json("testdev_balanced_questions.json", {"20": entry("n161313", "Is it?", "no")})
    return {name: photo(f"images/{name}.jpg") for name in ("2354786", "n161313")}


def test_rows(raw: Path, tmp_path: Path, photos: dict[str, str], read_rows: Callable[..., Any]) -> None:
    train, val, testdev = convert_gqa(raw, tmp_path, ImageFolder(raw))
    assert read_rows(train.path) == [["02930152", "2354786", "Is the sky dark?", "1.0|!+yes", "", photos["2354786"]]]
    assert read_rows(val.path) == [["05515938", "n161313", "On which side?", "1.0|!+left", "", photos["n161313"]]]
    assert read_rows(testdev.path) == [["20", "n161313", "Is it?", "1.0|!+no", "", photos["n161313"]]]
    assert train.counts == {"rows written": 1, "dropped (missing image)": 1}
    assert val.counts == {"rows written": 1, "dropped (empty text)": 1}
    assert [outcome.path.name for outcome in (train, val, testdev)] == ["train.tsv", "val.tsv", "testdev.tsv"]


@pytest.mark.parametrize("gone", ["images", "testdev_balanced_questions.json"])
def test_missing_input_is_named_before_anything_is_written(
    raw: Path, tmp_path: Path, photos: dict[str, str], gone: str
) -> None:
    (raw / gone).rename(raw / "elsewhere")
    with pytest.raises(MissingInput, match=rf"{gone}: no such .*unpack questions1.2.zip"):
        list(convert_gqa(raw, tmp_path / "out", ImageFolder(raw)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "questions.json: is a list, not an object from question id to question"),
        ({"7": {"imageId": "1", "question": "Is it?", "isBalanced": True}}, "questions.json:7: has no field 'answer'"),
        ({"7": {"imageId": 1, "question": "Is it?", "answer": "x"}}, "questions.json:7: imageId is 1, not of type str"),
    ],
)
def test_a_record_that_is_not_as_published_is_named(
    raw: Path,
    tmp_path: Path,
    photos: dict[str, str],
    write_json: Callable[[str, Any], Path],
    content: Any,
    message: str,
) -> None:
    write_json("train_balanced_questions.json", content)
    with pytest.raises(BadRow, match=message):
        list(convert_gqa(raw, tmp_path, ImageFolder(raw)))
