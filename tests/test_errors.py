"""The budget of bad rows: each row counts once, in all processes and parts of a run together."""

from __future__ import annotations

import multiprocessing

import pytest

from narvl_plugin.errors import BadRow, InputError, MissingInput, SkipBudget, check_arguments


def bad(file: str, row: int, reason: str = "has no words") -> BadRow:
    """Return an error about a row."""
    return BadRow(f"{file}:{row}: {reason}")


def test_a_row_counts_once_whatever_is_wrong_with_it() -> None:
    budget = SkipBudget(2)
    for reason in ("the image is not readable", "the caption '12: a: b:3: c' has no words"):
        for file in ("a/train.tsv", "b/train.tsv"):
            budget.skip(bad(file, 3, reason))
    assert budget.count == 2
    with pytest.raises(BadRow, match=r"a/train.tsv:4: .*--skip-bad-rows \(now 2\)"):
        budget.skip(bad("a/train.tsv", 4))


def test_names_with_a_colon_do_not_hide_rows() -> None:
    budget = SkipBudget(1)
    budget.skip(bad("my data: new/train.tsv", 1))
    with pytest.raises(BadRow):
        budget.skip(bad("my data: new/train.tsv", 2))
    budget = SkipBudget(1)
    budget.skip(BadRow("my: pictures/a.jpg: the image is not readable"))
    with pytest.raises(BadRow):
        budget.skip(BadRow("my: pictures/b.jpg: the image is not readable"))


def test_forked_processes_draw_on_one_budget() -> None:
    budget = SkipBudget(3)
    fork = multiprocessing.get_context("fork")
    for rows in ([1, 2], [2, 3]):
        worker = fork.Process(target=lambda rows=rows: [budget.skip(bad("a", row)) for row in rows])
        worker.start()
        worker.join()
        assert worker.exitcode == 0
    assert budget.count == 3
    with pytest.raises(BadRow):
        budget.skip(bad("a", 4))


def first_part(limit: int) -> list[int]:
    """Skip two rows, and return what a checkpoint keeps of them."""
    budget = SkipBudget(limit)
    budget.number_files(["disk1/train.tsv", "disk1/valid.tsv"])
    budget.skip(bad("disk1/train.tsv", 1))
    budget.skip(bad("disk1/valid.tsv", 1))
    return budget.skipped


def test_a_budget_is_not_granted_anew_and_knows_its_rows_in_files_that_moved() -> None:
    budget = SkipBudget(3)
    budget.number_files(["disk2/train.tsv", "disk2/valid.tsv"])
    budget.skip(bad("disk2/train.tsv", 1))  # as the first batch is read before the checkpoint
    budget.restore(first_part(2))
    assert budget.count == 2
    for file in ("disk2/train.tsv", "disk2/valid.tsv"):
        budget.skip(bad(file, 1))
    assert budget.count == 2
    budget.skip(bad("disk2/train.tsv", 2))
    assert budget.count == 3
    with pytest.raises(BadRow, match="now 3"):
        budget.skip(bad("disk2/train.tsv", 3))


def test_a_lower_limit_is_kept_as_soon_as_a_row_is_bad() -> None:
    budget = SkipBudget(1)
    budget.restore(first_part(2))
    with pytest.raises(BadRow, match="now 1"):
        budget.skip(bad("disk1/train.tsv", 1))


def test_rows_that_are_not_met_again_are_charged() -> None:
    budget = SkipBudget(3)
    budget.charge(2)
    budget.skip(bad("a", 1))
    with pytest.raises(BadRow):
        budget.skip(bad("a", 2))
    with pytest.raises(InputError, match="--skip-bad-rows 1: 2 rows were skipped before"):
        SkipBudget(1).charge(2)


@pytest.mark.parametrize("kind", [InputError, MissingInput, BadRow])
def test_messages_hold_no_commands_to_a_terminal(kind: type[InputError]) -> None:
    name = "a\x1b]0;title\x07\x9b31m\u202egpj\ud800.tsv"
    assert str(kind(f"{name}:3: {'é漢 €'}\tb")) == "a?]0;title??31m?gpj?.tsv:3: é漢 €\tb"


@pytest.mark.parametrize("word", ["--data=\udcff", "\ud800"])
def test_arguments_that_are_not_utf_8_are_refused(word: str) -> None:
    check_arguments(["--data", "café ☃ 🐕"])
    with pytest.raises(InputError, match=r"the argument .*\\ud.* cannot be read as UTF-8; rename it"):
        check_arguments(["--data", word])


def test_arguments_in_a_locale_without_utf_8_are_refused_for_that() -> None:
    with pytest.raises(InputError, match="cannot be read as UTF-8; the locale has no UTF-8: set LC_ALL=C.UTF-8"):
        check_arguments(["caf\udcc3\udca9.tsv"])  # the bytes of é, as ASCII reads them
