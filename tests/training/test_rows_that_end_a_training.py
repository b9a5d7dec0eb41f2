"""Rows that would end a training are found at its start, in all of its files; what a loss leaves out ends none."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from fairseq import trainer

from narvl_plugin.checkpoints.reading import read_checkpoint
from narvl_plugin.data import survey
from narvl_plugin.errors import BadRow, InputError

pytestmark = pytest.mark.integration

Losses = dict[int, float]
Train = Callable[..., Losses]
FIT = "a red square"
TOO_LONG = "a red square on a wall and a blue hat on a tree"
WORD = "abcdefghij" * 200


@pytest.fixture
def start(
    train: Train, options: list[object], data: str, tmp_path: Path, caption_rows: list[list[str]]
) -> Callable[..., Losses]:
    """Give a function that trains a tiny model, a student of 8 queries, for two epochs anew on given captions."""

    def run(
        *more: object,
        one: list[str] | None = None,
        two: list[str] | None = None,
        valid: list[str] | None = None,
        student: bool = True,
        anew: bool = True,
        data: str = "",
    ) -> Losses:
        names = []
        for name, captions in (("one", one), ("two", two), ("valid", valid)) if not data else ():
            columns = zip(captions or 4 * [FIT], caption_rows, strict=False)
            lines = ["\t".join([row[0], row[1], caption, "", row[4]]) + "\n" for caption, row in columns]
            (tmp_path / f"{name}.tsv").write_text("".join(lines))
            names.append(str(tmp_path / f"{name}.tsv"))
        if anew:
            shutil.rmtree(tmp_path / "saved", ignore_errors=True)
        model = options.index("--arch")
        of_student = ["--arch", "narvl_tiny", "--num-queries", 8, "--criterion", "qctc"]
        of_teacher = ["--arch", "ofa_tiny", "--max-positions", 64, "--token-bucket-size", 16]
        of_teacher += ["--criterion", "label_smoothed_cross_entropy"]
        return train(
            *(data or ",".join(names), *options[1:model]),
            *(*(of_student if student else of_teacher), *options[model + 6 :]),
            *("--max-epoch", 2, "--batch-size", 2, "--save-dir", tmp_path / "saved", "--num-workers", 0, *more),
        )

    return run


@pytest.mark.parametrize("keep", [[], ["--keep-eos"]])
@pytest.mark.parametrize("valid", [[FIT, TOO_LONG, FIT], [TOO_LONG], [f"{TOO_LONG}&&{FIT}", FIT]])
def test_validation_leaves_out_and_counts_targets_that_need_more_queries_than_there_are(
    valid: list[str],
    keep: list[str],
    start: Callable[..., Losses],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO):
        assert len(start(*keep, valid=valid)) == 4
    need = 13 + len(keep)
    told = f"valid.tsv: 1 of {len(valid)} targets do not fit the model's 8 queries, and are left out of the loss"
    assert sum(f"{told}; the longest needs {need} (see --num-queries)" in line for line in caplog.messages) == 1
    counted = [line for line in caplog.messages if '"valid_did_not_fit"' in line]
    assert len(counted) == 2
    assert all('"valid_did_not_fit": "1"' in line for line in counted)
    assert read_checkpoint(tmp_path / "saved" / "checkpoint_last.pt")["extra_state"]["train_iterator"]["epoch"] == 3


def test_any_reference_takes_a_row_one_of_whose_references_is_too_long(start: Callable[..., Losses]) -> None:
    """Whichever reference an epoch names; with a long word, too."""
    captions = [f"{TOO_LONG}&&{FIT}", f"{FIT}&&{TOO_LONG}&&{WORD} {WORD}"]
    assert len(start("--any-reference", one=captions, two=captions)) == 2
    with pytest.raises(InputError, match=r"^1 of 10 rows cannot be used.*one.tsv:1: target needs 13 queries but"):
        start("--any-reference", one=[f"{TOO_LONG}&&{TOO_LONG}", FIT])


@pytest.mark.parametrize(
    ("more", "files", "first"),
    [
        ([], {"one": [FIT, TOO_LONG]}, "one.tsv:2: target needs 13 queries but the model has 8; raise --num-queries"),
        ([], {"two": [FIT, FIT, FIT, TOO_LONG]}, "two.tsv:4: target needs 13 queries"),
        ([], {"one": [f"{FIT}&&{FIT}&&{TOO_LONG}"]}, "one.tsv:1: target needs 13 queries"),
        (["--keep-eos"], {"one": ["a cat a cat a cat a cat"]}, "one.tsv:1: target needs 9 queries"),
        ([], {"two": [FIT, "&&"]}, "two.tsv:2: the caption '&&' has no words"),
        ([], {"valid": [FIT, FIT, ""]}, "valid.tsv:3: the caption '' has no words"),
    ],
)
def test_a_training_that_is_known_to_fail_does_not_start(
    more: list[str],
    files: dict[str, list[str]],
    first: str,
    start: Callable[..., Losses],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    updates: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "train_step", lambda *_, **__: updates.append(1))
        with pytest.raises(InputError, match="--skip-bad-rows") as raised:  # fairseq itself reads the first batches
            start(*more, **files)
    assert first in str(raised.value)
    assert updates == []
    assert len(start(*more, "--skip-bad-rows", 1, **files)) > 0


def test_what_a_sample_missed_draws_on_the_skip_budget(
    start: Callable[..., Losses], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is said to be a sample. The rows that it holds say how many there may be in all."""
    monkeypatch.setattr(survey, "ROWS_LOOKED_AT", 2)  # the first and the last
    missed = [FIT, FIT, TOO_LONG, FIT]
    with caplog.at_level(logging.INFO):
        assert len(start("--skip-bad-rows", 1, two=missed)) == 4
    assert any("0 of 2 targets of a sample of 2 of its 4 rows do not fit" in line for line in caplog.messages)
    assert any("skipped bad row 1 of at most 1" in line and "two.tsv:3" in line for line in caplog.messages)
    with pytest.raises(BadRow, match=r"two.tsv:3: target needs 13 queries.*--skip-bad-rows"):
        start(two=missed)
    with pytest.raises(InputError, match=r"^2 of 6 rows cannot be used, probably 4 of all 12, .*--skip-bad-rows 4\."):
        start(one=4 * [TOO_LONG])


@pytest.mark.parametrize("split", ["one", "valid"])
def test_a_word_of_two_thousand_letters_is_refused_with_file_and_row(
    split: str, start: Callable[..., Losses], caplog: pytest.LogCaptureFixture
) -> None:
    """As the target of a teacher, which reads it; the student's needs more queries than there are."""
    captions = {split: [FIT, f"a {WORD}"]}
    told = rf"{split}.tsv:2: the target has [\d,]+ tokens, and the model reads at most 64; shorten it, or keep fewer"
    with pytest.raises(InputError, match=told):
        start(student=False, **captions)
    with caplog.at_level(logging.WARNING):
        assert len(start("--skip-bad-rows", 1, student=False, **captions)) > 0
    assert any(f"{split}.tsv:2: the target has" in line and "skipped" in line for line in caplog.messages)


def test_a_row_counts_once_in_however_many_of_the_files_it_is(start: Callable[..., Losses], tmp_path: Path) -> None:
    """As it draws on the skip budget once: a file that two epochs read, or that is validated on, too."""
    start("--skip-bad-rows", 1, one=[FIT, "&&", FIT])
    one, valid = tmp_path / "one.tsv", tmp_path / "valid.tsv"
    for data in (f"{one},{one},{valid}", f"{valid},{one},{one}"):
        assert len(start("--skip-bad-rows", 1, data=data)) > 0
        with pytest.raises(InputError, match="one.tsv:2: the caption"):
            start(data=data)


def test_files_of_epochs_that_are_not_trained_are_not_looked_at(start: Callable[..., Losses]) -> None:
    assert len(start("--max-epoch", 1, two=[FIT, TOO_LONG])) == 2
    with pytest.raises(InputError, match=r"two.tsv:2: target needs 13 queries"):
        start("--max-epoch", 2, two=[FIT, TOO_LONG])


def test_a_training_that_goes_on_counts_rows_that_were_skipped_before(start: Callable[..., Losses]) -> None:
    skip_one = ("--skip-bad-rows", 1, "--max-epoch")
    start(*skip_one, 1, one=[FIT, TOO_LONG])
    assert len(start(*skip_one, 3, one=[FIT, TOO_LONG], anew=False)) > 0
    told = r"^1 of 8 rows cannot be used, besides 1 that were skipped .*--skip-bad-rows 2\. .*two.tsv:1: target"
    with pytest.raises(InputError, match=told):
        start(*skip_one, 4, one=[FIT], two=[TOO_LONG, FIT, FIT, FIT], anew=False)


def test_a_teacher_reads_all_references_even_where_any_will_do(start: Callable[..., Losses]) -> None:
    captions = [FIT, FIT, FIT, f"{FIT}&&{FIT}&&a {WORD}"]
    with pytest.raises(InputError, match=r"^1 of 12 rows cannot be used.*one.tsv:4: the target has [\d,]+ tokens"):
        start("--any-reference", one=captions, student=False)
