"""Soft accuracy of answers, normalised as by the VQA challenge; and the fairseq scorer `vqa`."""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from fairseq.dataclass import FairseqDataclass
from fairseq.scoring import BaseScorer, register_scorer

from narvl_plugin.data.vqa_gen import parse_answers
from narvl_plugin.errors import BadRow, InputError

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_NUMBER_COMMA = re.compile(r"\d,\d")
_LONE_PERIOD = re.compile(r"\.(?!\d)")
_ARTICLES = ("a", "an", "the")
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_DIGITS)}
_CONTRACTED = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
    "he'd've he's how'd how'll how's isn't it'd it'd've it'll let's ma'am might've mightn't mightn't've must've "
    "mustn't needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd "
    "somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've "
    "something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas "
    "wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've "
    "who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd "
    "you'd've you'll you're you've"
)
_CONTRACTIONS = {word.replace("'", ""): word for word in _CONTRACTED.split()}


def normalise_answer(text: str) -> str:
    """Return an answer as the VQA challenge compares it (https://visualqa.org/evaluation.html).

    Lower case, numbers from none to ten as digits, contractions with their apostrophes, no articles, no periods but
    those of decimals, no other punctuation: what stands at a word's edge goes, what joins two words parts them.
    """
    text = " ".join(text.split())
    has_number_comma = _NUMBER_COMMA.search(text) is not None
    cleaned = text
    for mark in _MARKS:
        at_edge = f"{mark} " in text or f" {mark}" in text or has_number_comma
        cleaned = cleaned.replace(mark, "" if at_edge else " ")
    words = (_NUMBERS.get(word, word) for word in _LONE_PERIOD.sub("", cleaned).lower().split())
    return " ".join(_CONTRACTIONS.get(word.replace("'", ""), word) for word in words if word not in _ARTICLES)


def soft_accuracy(said: str, answers: Mapping[str, float]) -> float:
    """Return the confidence of an answer among the right ones, 0 if it is none of them.

    Confidences of answers that are the same once normalised add up, to 1 at most: with OFA's 0.3, 0.6, 0.9 and 1 for
    one, two, three and more of ten annotators this is the challenge's own accuracy.
    """
    said = normalise_answer(said)
    return min(1.0, sum(confidence for answer, confidence in answers.items() if normalise_answer(answer) == said))


def answer_type(answers: Mapping[str, float]) -> str:
    """Return `yes/no`, `number` or `other`, the type of a question by its best answer, as VQA v2 names types."""
    best = normalise_answer(max(answers, key=answers.__getitem__))
    if best in ("yes", "no"):
        return "yes/no"
    return "number" if re.fullmatch(r"\d+(\.\d+)?", best) else "other"


@dataclass
class VqaConfig(FairseqDataclass):
    """The scorer `vqa` has no settings."""


@register_scorer("vqa", dataclass=VqaConfig)
class VqaScorer(BaseScorer):
    """fairseq scorer: the reference string is a column of answers, `confidence|!+answer&&…`."""

    def accuracies(self) -> dict[str, list[float]]:
        """Return the soft accuracy of each question by its type; raises InputError for unreadable references."""
        scores = defaultdict(list)
        for number, (reference, said) in enumerate(zip(self.ref, self.pred, strict=True), start=1):
            try:
                answers = parse_answers(reference, f"reference {number}")
            except BadRow as error:
                raise InputError(
                    f"{error}; references must come from the split test, and the vocabulary of --bpe-dir must be "
                    "trained on the column of answers, too, so that it can spell it"
                ) from error
            scores[answer_type(answers)].append(soft_accuracy(said, answers))
        if not scores:
            raise ValueError("no answers to score")
        return dict(scores)

    def score(self) -> float:
        """Give the mean soft accuracy, by which question answering is judged."""
        return _mean([score for scores in self.accuracies().values() for score in scores])

    def result_string(self) -> str:
        """Write the soft accuracy of all questions and of each type in one line."""
        by_type = sorted(self.accuracies().items())
        parts = [f"{name} {_mean(scores):.4f} ({len(scores)})" for name, scores in by_type]
        return f"soft accuracy {self.score():.4f} ({len(self.ref)} questions), {', '.join(parts)}"


def _mean(scores: list[float]) -> float:
    return sum(scores) / len(scores)
