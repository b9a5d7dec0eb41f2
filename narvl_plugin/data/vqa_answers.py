"""Answers to visual questions in the one spelling that VQA's evaluation compares, and what it gives them.

Source: the processing that https://visualqa.org/evaluation.html describes, with the habits of the official program
where the page is silent.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import product

ARTICLES = frozenset(("a", "an", "the"))
_NUMBERS = "zero one two three four five six seven eight nine ten"
NUMBERS = {word: str(number) for number, word in enumerate(_NUMBERS.split())} | {"none": "0"}

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
"""Those whose spelling without apostrophes is no common word, as "well" is for "we'll"."""

_DIGITS_AROUND_COMMA = re.compile(r"\d,\d")
_MARKS = """;/[]"{}()=+\\_-><@`,?!"""
_FULL_STOP = re.compile(r"\.(?!\d)")


def _misspelt(contraction: str) -> list[str]:
    """Return a contraction in lower case with each choice of its apostrophes left out, but for none."""
    head, *tails = contraction.lower().split("'")
    choices = product(("", "'"), repeat=len(tails))
    return [head + "".join(map("".join, zip(marks, tails, strict=True))) for marks in choices][:-1]


CONTRACTIONS = {wrong: right for right in _CONTRACTIONS.split() for wrong in _misspelt(right)}
"""Contraction that lacks an apostrophe, in lower case -> how it is written."""


def normalise_answer(text: str) -> str:
    """Return an answer as VQA's evaluation compares it; apply it to the model's and to people's answers.

    In this order: line ends and tabs become spaces. Punctuation but for `'`, `:`, `.` and signs such as `$` or `%`
    goes: a mark that stands beside a space somewhere in the answer is removed, any other becomes a space, and where a
    comma stands between digits ("1,000"), all are removed. A full stop goes unless a digit follows it. Letters become
    small. "none" and the words zero to ten become digits; a, an and the go; contractions get their apostrophes
    ("dont", "don't"; "im" gives "I'm", with the official capital). Words end up one space apart.

    The official program leaves both sides as they are where all ten people agree, to the letter. Here they are
    normalised always, so that an answer's text alone decides; `official_accuracy` keeps to the program.
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
    """Return the mean of min(1, n / 3) over all groups that leave one of the people out, n of a group agreeing."""
    return (agreeing * min(1, (agreeing - 1) / 3) + (people - agreeing) * min(1, agreeing / 3)) / people


def official_accuracy(said: str, answers: Sequence[str]) -> float:
    """Return the accuracy, 0 to 1, that VQA's evaluation gives an answer, by those of (usually ten) people.

    Where all people agree, to the letter, the answer must be theirs, to the letter; else all are normalised.
    """
    said, *answers = (text.replace("\n", " ").replace("\t", " ").strip() for text in (said, *answers))
    if len(set(answers)) > 1:
        said, *answers = map(normalise_answer, (said, *answers))
    return leave_one_out(answers.count(said), len(answers))
