"""Rows on their way into a TSV file: separators, images, and files with nothing in them."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from narvl_plugin.data.images import ImageReader
from narvl_plugin.data.plain_pickles import read_pickle
from narvl_plugin.data.resumable import StalePart
from narvl_plugin.data.sources.writing import (
    CLEANED,
    Columns,
    Dropped,
    ImageFolder,
    Notes,
    Outcome,
    join_answers,
    join_texts,
    tidy,
    write_answers,
    write_split,
)
from narvl_plugin.errors import InputError
from narvl_plugin.whole_files import sole_writer

RISKY = st.text(alphabet=st.sampled_from("ab &|!+\t\n\r\ud800é"), max_size=12)


@given(st.lists(RISKY, min_size=1, max_size=4))
def test_joined_texts_come_apart_as_they_were(texts: list[str]) -> None:
    tidied = [text for text in (tidy(text, Counter()) for text in texts) if text]
    if not tidied:
        with pytest.raises(Dropped, match="empty text"):
            join_texts(texts, Counter())
        return
    joined = join_texts(texts, Counter())
    assert joined.split("&&") == tidied
    assert not set("\t\n\r") & set(joined)
    joined.encode("utf-8")


@given(st.dictionaries(RISKY, st.sampled_from([0.3, 0.6, 0.9, 1.0]), max_size=4))
def test_joined_answers_come_apart_as_they_were(answers: dict[str, float]) -> None:
    kept = [(tidy(answer, Counter()), value) for answer, value in answers.items() if tidy(answer, Counter())]
    if not kept:
        with pytest.raises(Dropped, match="no answer"):
            join_answers(answers, Counter())
        return
    parts = [part.split("|!+") for part in join_answers(answers, Counter()).split("&&")]
    assert [(answer, float(value)) for value, answer in parts] == sorted(kept, key=lambda pair: -pair[1])


def test_only_changed_texts_are_counted() -> None:
    notes: Notes = Counter()
    assert tidy(" R&B, 2 | 3 !+ ", notes) == "R&B, 2 | 3 !+" and not notes
    assert tidy("R&&B", notes) == "R B" and notes == {CLEANED: 1}


def write(path: Path, names: list[str], images: ImageFolder) -> Outcome:
    """Write a file with a row for each image."""

    def row(name: str, notes: Notes) -> Columns:
        return [name, Path(name)]

    return write_split(path, lambda: names, row, inputs=[Path(__file__)], images=images)


@pytest.fixture
def names(raw: Path, photo: Callable[..., str]) -> list[str]:
    """Write a good image and two bad ones; the fourth is missing."""
    photo("a/good.jpg", size=(64, 64))
    whole = (raw / "a/good.jpg").read_bytes()
    (raw / "a/cut.jpg").write_bytes(whole[: len(whole) - 40])
    (raw / "a/text.jpg").write_text("no picture")
    return ["a/good.jpg", "a/cut.jpg", "a/text.jpg", "a/gone.jpg"]


def test_images_are_the_bytes_of_their_files(
    raw: Path, tmp_path: Path, names: list[str], read_rows: Callable[..., Any]
) -> None:
    outcome = write(tmp_path / "a.tsv", names, ImageFolder(raw))
    assert outcome.counts == {"rows written": 3, "dropped (missing image)": 1}
    for name, image in read_rows(tmp_path / "a.tsv"):
        assert base64.b64decode(image) == (raw / name).read_bytes()


def test_images_that_cannot_be_read_are_dropped_if_asked_for(
    raw: Path, tmp_path: Path, names: list[str], read_rows: Callable[..., Any]
) -> None:
    outcome = write(tmp_path / "a.tsv", names, ImageFolder(raw, check=True))
    assert outcome.counts == {"rows written": 1, "dropped (unreadable image)": 2, "dropped (missing image)": 1}
    assert [name for name, _ in read_rows(tmp_path / "a.tsv")] == ["a/good.jpg"]


def test_links_out_of_the_folder_lead_to_images_alone(
    raw: Path, tmp_path: Path, names: list[str], read_rows: Callable[..., Any]
) -> None:
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "outside.jpg").write_bytes((raw / "a/good.jpg").read_bytes())
    (raw / "stolen.jpg").symlink_to(tmp_path / "secret")
    (raw / "linked.jpg").symlink_to(tmp_path / "outside.jpg")
    outcome = write(tmp_path / "a.tsv", ["stolen.jpg", "linked.jpg"], ImageFolder(raw))
    assert outcome.counts == {"rows written": 1, "dropped (unreadable image)": 1}
    assert [name for name, _ in read_rows(tmp_path / "a.tsv")] == ["linked.jpg"]


def test_paths_are_found_from_the_tsv_file_even_through_links(
    raw: Path, tmp_path: Path, names: list[str], read_rows: Callable[..., Any]
) -> None:
    (tmp_path / "disk/deep").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "disk/deep")
    path = tmp_path / "out" / "a.tsv"
    outcome = write(path, names, ImageFolder(raw, as_paths=True))
    assert outcome.counts == {"rows written": 3, "dropped (missing image)": 1}
    assert read_rows(path)[0] == ["a/good.jpg", "../../raw/a/good.jpg"]
    assert ImageReader(16, folder=path.parent)(read_rows(path)[0][1], "here").shape == (3, 16, 16)


@pytest.mark.parametrize("name", ["/etc/passwd", "../secret.jpg", "a/../../secret.jpg", "a\tb.jpg"])
def test_paths_out_of_the_folder_are_refused(raw: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "secret.jpg").write_text("secret")
    with pytest.raises(InputError, match="refused, because it is no plain path of an image"):
        write(tmp_path / "a.tsv", [name], ImageFolder(raw))


def test_a_file_without_rows_is_an_error_and_leaves_nothing(raw: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(InputError, match=r"a.tsv: no row to write \(2 dropped \(missing image\)\); check .*raw"):
        write(out / "a.tsv", ["x.jpg", "y.jpg"], ImageFolder(raw))
    with pytest.raises(InputError, match=r"no row to write \(no entry of this split\)"):
        write(out / "a.tsv", [], ImageFolder(raw))
    assert not list(out.iterdir())


def test_an_unfinished_file_of_other_settings_is_refused(
    raw: Path, tmp_path: Path, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("narvl_plugin.data.sources.writing.BATCH_ROWS", 1)
    with pytest.raises(InputError, match="refused"):
        write(tmp_path / "a.tsv", [names[0], "/stops.jpg"], ImageFolder(raw))
    with pytest.raises(StalePart, match="check_images=False, now check_images=True"):
        write(tmp_path / "a.tsv", names, ImageFolder(raw, check=True))
    with pytest.raises(StalePart, match="image_paths=None, now image_paths='raw'"):
        write(tmp_path / "a.tsv", names, ImageFolder(raw, as_paths=True))


def test_a_second_process_is_refused_before_it_reads_its_inputs(raw: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    with sole_writer(path), pytest.raises(InputError, match="a.tsv: process .* is writing it"):
        write_split(
            path,
            lambda: pytest.fail("not to be loaded"),
            lambda entry, notes: [entry],
            inputs=[Path(__file__)],
            images=ImageFolder(raw),
        )


def test_answers_are_a_plain_dict(tmp_path: Path) -> None:
    outcome = write_answers(tmp_path / "out", lambda: ["yes", "no"])
    assert read_pickle(outcome.path) == {"yes": 0, "no": 1}
    assert str(outcome) == f"{tmp_path / 'out' / 'trainval_ans2label.pkl'}: 2 answers"
    assert write_answers(tmp_path / "out", lambda: pytest.fail("not to be loaded again")).counts is None
