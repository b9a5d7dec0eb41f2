"""Signs of broken sentences, worked out by hand."""

from pathlib import Path

import pytest

from narvl_plugin.scoring import wording
from narvl_plugin.scoring.wording import KnownWording, captions_of, pattern, runs, scene_kinds

KINDS = {"dog": "<noun>", "cat": "<noun>", "red": "<colour>", "blue": "<colour>"}
KNOWN = KnownWording(["a dog on a red background", "a cat to the left of a dog"], KINDS)


def test_runs_hold_kinds_and_both_ends() -> None:
    assert list(runs(pattern("A red dog.", KINDS))) == [
        ("<start>", "a", "<colour>", "<noun>"),
        ("a", "<colour>", "<noun>", "<end>"),
    ]
    assert list(runs(pattern("dog", KINDS))) == [("<start>", "<noun>", "<end>")]
    assert list(runs(pattern("", KINDS))) == [("<start>", "<end>")]


@pytest.mark.parametrize(
    ("caption", "new"),
    [
        ("a cat on a blue background", False),  # other nouns and colours
        ("a dog to the left of a cat", False),
        ("a dog to the left of a", True),  # its end
        ("dog on a red background", True),  # its start
        ("a dog on on a red background", True),
        ("a dog to the red background", True),
        ("", True),
    ],
)
def test_a_caption_with_an_unknown_run_has_new_runs(caption: str, new: bool) -> None:
    assert KNOWN.of(caption).new_runs == new


@pytest.mark.parametrize(
    ("caption", "doubled", "cut"),
    [
        ("a dog on a red background", False, False),
        ("A dog on on a red background.", True, False),
        ("a dog a dog on a red background", True, False),
        ("a dog a cat a dog", False, False),
        ("a cat on a red", False, True),
        ("a cat to the left of a", False, True),
        ("a cat to the left of a cat", False, False),
        ("", False, True),
    ],
)
def test_doubled_words_and_cut_ends(caption: str, doubled: bool, cut: bool) -> None:
    assert KNOWN.of(caption)[1:3] == (doubled, cut)


def test_shares_are_of_all_captions() -> None:
    shares = KNOWN.mean(["a dog", "a a dog", *2 * ["a cat on a red background"]])
    assert shares == (0.5, 0.25, 0.0, 0.5)


def test_captions_are_read_from_rows_all_over_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "train.tsv"
    file.write_text("".join(f"{row}\t{row}\ta dog {row}&&a cat {row}\n" for row in range(6)) + "short\n")
    everything = captions_of(file)
    assert (len(everything), everything[:2]) == (12, ["a dog 0", "a cat 0"])
    monkeypatch.setattr(wording, "KNOWN_ROWS", 3)
    assert captions_of(file)[::2] == ["a dog 0", "a dog 2", "a dog 4"]


def test_kinds_of_the_scenes() -> None:
    kinds = scene_kinds()
    assert kinds["dog"] == kinds["dogs"] == kinds["mice"] == "<noun>"
    assert kinds["red"] == kinds["gray"] == "<colour>"
    assert "striped" not in kinds and "left" not in kinds


def test_the_pattern_of_a_caption_holds_kinds_in_place_of_words() -> None:
    kinds = {"dogs": "<noun>", "cats": "<noun>", "red": "<colour>"}
    assert pattern("Two red dogs, and cats", kinds) == ("two", "<colour>", "<noun>", "and", "<noun>")
