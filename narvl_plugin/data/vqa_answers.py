"""Normalised answers to visual questions, and their accuracy in VQA's evaluation.

Source: https://visualqa.org/evaluation.html and, where the page gives no details, the official program.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import product

ARTICLES = frozenset(("a", "an", "the"))
"""Words that are removed."""
_NUMBERS = "zero one two three four five six seven eight nine ten"
NUMBERS = {word: str(number) for number, word in enumerate(_NUMBERS.split())} | {"none": "0"}
"""Word -> its digits."""

_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's I'd've I'm I've isn't it'd it'd've it'll ma'am might've mightn't mightn't've
    must've mustn't needn't not've o'clock oughtn't shan't she'd've she's should've shouldn't shouldn't've
    somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've
    something'll something's that'd that'd've that's there'd there'd've there're there's they'd they'd've they'll
    they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's
    where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all
    y'all'd've y'all'll you'd you'd've you'll you're you've
"""
"""Contractions whose spelling without apostrophes is not a common word, as "well" is for "we'll"."""

_DIGITS_AROUND_COMMA = re.compile(r"\d,\d")
_MARKS = """;/[]"{}()=+\\_-><@`,?!"""
_FULL_STOP = re.compile(r"\.(?!\d)")


def _misspelt(contraction: str) -> list[str]:
    """Return the spellings of a contraction in lower case that lack one or more of its apostrophes."""
    head, *tails = contraction.lower().split("'")
    choices = product(("", "'"), repeat=len(tails))
    return [head + "".join(map("".join, zip(marks, tails, strict=True))) for marks in choices][:-1]


CONTRACTIONS = {wrong: right for right in _CONTRACTIONS.split() for wrong in _misspelt(right)}
"""Contraction that lacks an apostrophe, in lower case -> its correct spelling."""


def normalise_answer(text: str) -> str:
    """Return an answer as VQA's evaluation compares it. Apply it to the answers of the model and of people.

    The steps, in order:

    1. Line ends and tabs become spaces.
    2. Punctuation except `'`, `:`, `.` and signs such as `$` or `%` is removed. A mark that is beside a space anywhere
       in the answer is deleted, and any other becomes a space. If a comma is between digits ("1,000"), all marks are
       deleted.
    3. A full stop is removed unless a digit follows.
    4. Letters become lower case.
    5. "none" and the words zero to ten become digits.
    6. The articles a, an and the are removed.
    7. Contractions get their apostrophes ("dont" becomes "don't", and "im" becomes "I'm" with the official capital).
    8. Words are joined by single spaces.

    The official program does not normalise if all ten people give exactly the same answer. This function always
    normalises: its result depends on the answer alone. `official_accuracy` follows the official program.
    """
    text = " ".join(text.split())
    removes_all = _DIGITS_AROUND_COMMA.search(text) is not None
    without = text
    for mark in _MARKS:
        beside_space = f"{mark} " in text or f" {mark}" in text
        without = without.replace(mark, "" if removes_all or beside_space else " ")
    words = _FULL_STOP.sub("", without).lower().split()
    words = [NUMBERS.get(word, word) for word in words]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def leave_one_out(agreeing: int, people: int) -> float:
    """Return the mean of min(1, n / 3) over all groups that leave out one person.

    Args:
        agreeing: number of people who gave the answer. n of them are in a group.
        people: number of all people.
    """
    return (agreeing * min(1, (agreeing - 1) / 3) + (people - agreeing) * min(1, agreeing / 3)) / people


def official_accuracy(said: str, answers: Sequence[str]) -> float:
    """Return the accuracy of an answer in VQA's evaluation, from 0 to 1.

    If all people give exactly the same answer, only this answer is correct. Otherwise all answers are normalised.

    Args:
        said: the answer of the model.
        answers: the answers of (usually ten) people.
    """
    said, *answers = (text.replace("\n", " ").replace("\t", " ").strip() for text in (said, *answers))
    if len(set(answers)) > 1:
        said, *answers = map(normalise_answer, (said, *answers))
    return leave_one_out(answers.count(said), len(answers))
