"""The scorer of grounding, by hand."""

import pytest
from fairseq import scoring

from narvl_plugin.data.boxes import overlaps

WHOLE = "<bin_0><bin_0><bin_10><bin_10>"


def test_overlaps_are_those_of_areas() -> None:
    found = overlaps([[0, 0, 4, 2], None, [0, 0, 2, 2]], [[0, 0, 2, 2], [0, 0, 2, 2], [1, 1, 3, 3]])
    assert found == pytest.approx([1 / 2, 0, 1 / 7])


def test_fairseq_builds_the_scorer_by_name() -> None:
    scorer = scoring._build_scorer("grounding")
    scorer.add_string(WHOLE, WHOLE)
    scorer.add_string(WHOLE, "<bin_0><bin_0><bin_10><bin_5>")  # half of it: right at the border
    scorer.add_string(WHOLE, "<bin_0><bin_0><bin_10><bin_4>")
    scorer.add_string(WHOLE, "<bin_0><bin_0><bin_10>")
    scorer.add_string(WHOLE, WHOLE + "<bin_3>")
    assert scorer.score() == pytest.approx(2 / 5)
    assert scorer.result_string() == ("accuracy 0.4000 at IoU 0.5, mean IoU 0.3800 (5 boxes, 2 hypotheses are no box)")


def test_what_cannot_be_scored_is_named() -> None:
    scorer = scoring._build_scorer("grounding")
    with pytest.raises(ValueError, match="no boxes to score"):
        scorer.score()
    scorer.add_string("a dog", WHOLE)
    with pytest.raises(ValueError, match="reference 1 is 'a dog', and not four <bin_k>"):
        scorer.score()
