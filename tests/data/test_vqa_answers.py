"""Normalisation of answers: the cases of the official description, and its program's known habits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from narvl_plugin.data.vqa_answers import CONTRACTIONS, normalise_answer, official_accuracy


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Yes", "yes"),
        ("  Dark\n Blue\t", "dark blue"),
        # Periods go, but for decimals.
        ("U.S.A.", "usa"),
        ("2.5", "2.5"),
        ("a man.", "man"),
        (".5", ".5"),
        # Numbers, articles.
        ("two", "2"),
        ("Ten", "10"),
        ("none", "0"),
        ("eleven", "eleven"),
        ("on the table", "on table"),
        ("an apple and a pear", "apple and pear"),
        ("the", ""),
        # Contractions.
        ("dont know", "don't know"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("im not sure", "I'm not sure"),
        ("5 oclock", "5 o'clock"),
        ("don't", "don't"),
        ("well", "well"),
        ("its", "its"),
        # Apostrophes and colons stay; commas between digits vanish; other marks part words or vanish.
        ("girl's", "girl's"),
        ("2:50 pm", "2:50 pm"),
        ("100,978", "100978"),
        ("black/white", "black white"),
        ("t-shirt", "t shirt"),
        ("yes, it is", "yes it is"),
        ("red,blue", "red blue"),
        ("$5", "$5"),
        # A mark beside a space anywhere is removed everywhere; a comma between digits removes all marks.
        ("red-hot - dog", "redhot dog"),
        ("1,000-2,000", "10002000"),
        ("really?", "really"),
        ("(left)", "left"),
        ("", ""),
        ("?!", ""),
    ],
)
def test_known_cases(answer: str, expected: str) -> None:
    assert normalise_answer(answer) == expected


def test_contractions_only_gain_apostrophes() -> None:
    for wrong, right in CONTRACTIONS.items():
        assert wrong.replace("'", "") == right.replace("'", "").lower()
        assert wrong.count("'") < right.count("'")
    words = {"well", "were", "wed", "shed", "shell", "hell", "hed", "id", "ill", "its", "lets"}
    assert words & CONTRACTIONS.keys() <= {"hed"}


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=30))
def test_gives_words_one_space_apart_on_one_line(text: str) -> None:
    assert normalise_answer(text) == " ".join(normalise_answer(text).split())


@given(st.lists(st.sampled_from(["red", "Red.", "two", "2", "a", "blue"]), min_size=2, max_size=10), st.data())
def test_official_accuracy_leaves_each_person_out(answers: list[str], data: st.DataObject) -> None:
    said = data.draw(st.sampled_from(["Red", "2", "two", "the", "blue", "x", *answers]))
    spelt = list if len(set(answers)) == 1 else lambda texts: [normalise_answer(text) for text in texts]
    groups = [answers[:place] + answers[place + 1 :] for place in range(len(answers))]
    scores = [min(1, spelt(group).count(spelt([said])[0]) / 3) for group in groups]
    assert official_accuracy(said, answers) == pytest.approx(sum(scores) / len(scores))


def test_unanimous_answers_are_compared_to_the_letter() -> None:
    assert official_accuracy("Hot-Dog ", ["Hot-Dog"] * 10) == 1
    assert official_accuracy("hot dog", ["Hot-Dog"] * 10) == 0
    assert official_accuracy("hot dog", ["Hot-Dog"] * 9 + ["cat"]) == 1
