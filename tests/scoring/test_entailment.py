"""The scorer of visual entailment, by hand."""

import pytest
from fairseq import scoring


def test_fairseq_builds_the_scorer_by_name() -> None:
    scorer = scoring._build_scorer("entailment")
    for reference, said in (("yes", "yes"), ("yes", "no"), ("no", "no"), ("maybe", "yes"), ("maybe", "yes no")):
        scorer.add_string(reference, said)
    assert scorer.score() == pytest.approx(2 / 5)
    assert scorer.result_string() == (
        "accuracy 0.4000 (5 rows); yes: 1 yes, 1 no, 0 maybe, 0 other; no: 0 yes, 1 no, 0 maybe, 0 other; "
        "maybe: 1 yes, 0 no, 0 maybe, 1 other"
    )


def test_what_cannot_be_scored_is_named() -> None:
    scorer = scoring._build_scorer("entailment")
    with pytest.raises(ValueError, match="no answers to score"):
        scorer.score()
    scorer.add_string("a dog", "yes")
    with pytest.raises(ValueError, match="the reference 'a dog' is none of yes, no, maybe"):
        scorer.score()
