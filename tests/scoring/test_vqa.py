"""Soft accuracy: the challenge's normalisation and accuracy, and the scorer."""

from itertools import combinations

import pytest
from fairseq import scoring
from hypothesis import given
from hypothesis import strategies as st

from narvl_plugin.data.vqa_answers import normalise_answer
from narvl_plugin.errors import InputError
from narvl_plugin.scoring.vqa import answer_type, soft_accuracy


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("Yes", "yes"),
        (" on  the\tbench ", "on bench"),
        ("a", ""),
        ("an apple", "apple"),
        ("two", "2"),
        ("none", "0"),
        ("Ten dogs", "10 dogs"),
        ("twenty", "twenty"),
        ("yes!", "yes"),  # an edge of the text: parted by nothing, so a space goes for it
        ("left/right", "left right"),
        ("t-shirt", "t shirt"),
        ("red, white", "red white"),
        ("1,000", "1000"),
        ("1.5", "1.5"),
        ("st. john", "st john"),
        ("the end.", "end"),
        ("dont", "don't"),
        ("don't", "don't"),
        ("couldntve", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("5 oclock", "5 o'clock"),
        ("well", "well"),
    ],
)
def test_answers_are_normalised_as_by_the_challenge(text: str, normalised: str) -> None:
    assert normalise_answer(text) == normalised


@given(st.integers(0, 10))
def test_with_ofas_confidences_it_is_the_challenges_accuracy(said_by: int) -> None:
    # The challenge averages, over all ways to leave one of ten annotators out, min(1, agreeing others / 3).
    annotators = [True] * said_by + [False] * (10 - said_by)
    official = sum(min(1, sum(nine) / 3) for nine in combinations(annotators, 9)) / 10
    confidence = {0: 0.0, 1: 0.3, 2: 0.6, 3: 0.9}.get(said_by, 1.0)
    assert soft_accuracy("red", {"red": confidence, "blue": 0.3}) == pytest.approx(official)


def test_spellings_of_one_answer_add_up() -> None:
    answers = {"2": 0.6, "Two": 0.3, "three": 0.3}
    assert soft_accuracy("two.", answers) == pytest.approx(0.9)  # two annotators and one make three
    assert soft_accuracy("3", answers) == pytest.approx(0.3)
    assert soft_accuracy("four", answers) == 0
    assert soft_accuracy("red", {"red": 1.0, "a red": 0.6}) == 1


@pytest.mark.parametrize(
    ("answers", "kind"),
    [
        ({"no": 1.0}, "yes/no"),
        ({"maybe": 0.3, "Yes": 0.9}, "yes/no"),
        ({"two": 1.0}, "number"),
        ({"1.5": 1.0}, "number"),
        ({"2 dogs": 1.0}, "other"),
    ],
)
def test_types_are_told_by_the_best_answer(answers: dict[str, float], kind: str) -> None:
    assert answer_type(answers) == kind


def test_fairseq_builds_the_scorer_by_name() -> None:
    scorer = scoring._build_scorer("vqa")
    scorer.add_string("1.0|!+yes", "Yes.")
    scorer.add_string("0.9|!+no&&0.3|!+yes", "yes")
    scorer.add_string("0.6|!+two", "2")
    scorer.add_string("1.0|!+red&&0.6|!+dark red", "blue")
    assert scorer.score() == pytest.approx((1 + 0.3 + 0.6 + 0) / 4)
    assert scorer.result_string() == (
        "soft accuracy 0.4750 (4 questions), number 0.6000 (1), other 0.0000 (1), yes/no 0.6500 (2)"
    )


def test_an_answer_that_stands_there_twice_counts_once_with_its_highest_confidence() -> None:
    for column, accuracy in (("1.0|!+yes&&0.3|!+yes", 1), ("0.3|!+yes&&0.3|!+yes", 0.3)):
        scorer = scoring._build_scorer("vqa")
        scorer.add_string(column, "yes")
        assert scorer.score() == pytest.approx(accuracy)


def test_what_cannot_be_scored_is_named() -> None:
    scorer = scoring._build_scorer("vqa")
    with pytest.raises(ValueError, match="no answers to score"):
        scorer.score()
    scorer.add_string("1.0|!+yes", "yes")
    scorer.add_string("<unk>red", "red")
    with pytest.raises(InputError, match="reference 2: the answers '<unk>red' cannot be read.*vocabulary of --bpe-dir"):
        scorer.score()
