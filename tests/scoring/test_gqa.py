"""The scorer of GQA, by hand."""

import pytest
from fairseq import scoring

from narvl_plugin.errors import InputError


def test_fairseq_builds_the_scorer_by_name() -> None:
    scorer = scoring._build_scorer("gqa")
    scorer.add_string("1.0|!+left", " Left")
    scorer.add_string("1.0|!+t-shirt", "t shirt")  # no normalisation of VQA's
    scorer.add_string("0.3|!+cat&&0.9|!+dog", "dog")
    scorer.add_string("0.3|!+cat&&0.9|!+dog", "cat")
    assert scorer.score() == pytest.approx(2 / 4)
    assert scorer.result_string() == "accuracy 0.5000 (4 questions)"


def test_what_cannot_be_scored_is_named() -> None:
    scorer = scoring._build_scorer("gqa")
    with pytest.raises(ValueError, match="no answers to score"):
        scorer.score()
    scorer.add_string("left", "left")
    with pytest.raises(InputError, match="reference 1: the answers 'left' cannot be read.*vocabulary of --bpe-dir"):
        scorer.score()
