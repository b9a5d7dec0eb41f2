"""The share of broken captions, worked out by hand."""

import pytest

from narvl_plugin.scoring.broken import broken_share, known_runs, pattern, runs, scene_kinds

KINDS = {"dog": "<noun>", "cat": "<noun>", "red": "<colour>", "blue": "<colour>"}
KNOWN = known_runs(["a dog on a red background", "a cat to the left of a dog"], KINDS)


def test_runs_hold_kinds_and_both_ends() -> None:
    assert list(runs("A red dog.", KINDS)) == [
        ("<start>", "a", "<colour>", "<noun>"),
        ("a", "<colour>", "<noun>", "<end>"),
    ]
    assert list(runs("dog", KINDS)) == [("<start>", "<noun>", "<end>")]
    assert list(runs("", KINDS)) == [("<start>", "<end>")]


@pytest.mark.parametrize(
    ("caption", "broken"),
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
def test_a_caption_with_an_unknown_run_is_broken(caption: str, broken: bool) -> None:
    assert broken_share([caption], KNOWN, KINDS) == broken


def test_the_share_is_of_all_captions() -> None:
    assert broken_share(["a dog", *3 * ["a cat on a red background"]], KNOWN, KINDS) == 0.25


def test_kinds_of_the_scenes() -> None:
    kinds = scene_kinds()
    assert kinds["dog"] == kinds["dogs"] == kinds["mice"] == "<noun>"
    assert kinds["red"] == kinds["gray"] == "<colour>"
    assert "striped" not in kinds and "left" not in kinds


def test_the_pattern_of_a_caption_holds_kinds_in_place_of_words() -> None:
    kinds = {"dogs": "<noun>", "cats": "<noun>", "red": "<colour>"}
    assert pattern("Two red dogs, and cats", kinds) == ("two", "<colour>", "<noun>", "and", "<noun>")
