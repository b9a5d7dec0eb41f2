"""Scores of sets of boxes, by hand, by all matchings, and in any order."""

from collections.abc import Sequence
from itertools import combinations, permutations
from random import Random

import pytest
import torch
from torch import Tensor

from narvl_plugin.data.boxes import iou
from narvl_plugin.scoring.regions import RegionsConfig, RegionsScorer, all_found, f1, matched, score_regions

A, B, C = (0, 0, 10, 10), (20, 0, 30, 10), (0, 20, 10, 30)
HALF_OF_A, LESS_THAN_HALF = (0, 0, 10, 5), (0, 0, 10, 4.9)


def boxes(*edges: Sequence[float]) -> Tensor:
    return torch.tensor(edges, dtype=torch.float64).reshape(-1, 4)


@pytest.mark.parametrize(
    ("predicted", "true", "expected"),
    [
        ((), (), 1),
        ((A,), (), 0),
        ((), (A,), 0),
        ((A,), (A,), 1),
        ((A,), (B,), 0),
        ((HALF_OF_A,), (A,), 1),  # an IoU of 0.5 is good
        ((LESS_THAN_HALF,), (A,), 0),
        ((B, A), (A, B), 1),
        ((A,), (A, B), 2 / 3),
        ((A, B), (A,), 2 / 3),
        ((A, A), (A,), 2 / 3),  # a true box is found once
        ((A, C), (A, B), 1 / 2),
        ((A, B, C), (A,), 1 / 2),
        (((10, 10, 0, 0),), (A,), 0),  # exchanged edges cover nothing
        (((0, 0, 0, 0),), (), 0),
    ],
)
def test_f1(predicted: Sequence[Sequence[float]], true: Sequence[Sequence[float]], expected: float) -> None:
    assert f1(boxes(*predicted), boxes(*true)) == pytest.approx(expected)


def test_the_best_pair_is_given_up_for_a_second_pair() -> None:
    """The first prediction overlaps both, and equals the one that alone is good for the second."""
    true = boxes((0, 0, 10, 10), (0, 0, 16, 10))
    predicted = boxes((0, 0, 10, 10), (0, 0, 6, 10))
    overlap = iou(predicted[:, None], true[None])
    assert (overlap >= 0.5).tolist() == [[True, True], [True, False]]
    assert overlap[0].argmax() == 0
    assert matched(predicted, true) == 2


def some_boxes(random: Random, number: int) -> Tensor:
    """Return boxes of 6 to 10 pixels at a few places, so that many overlap well."""
    corners = [(random.randint(0, 4), random.choice((0, 3))) for _ in range(number)]
    return boxes(*((x, y, x + random.randint(6, 10), y + random.randint(6, 10)) for x, y in corners))


def most_pairs(predicted: Tensor, true: Tensor) -> int:
    """Return the largest number of good pairs by trying all matchings."""
    few, many = sorted((predicted, true), key=len)
    good = [[float(iou(one, other)) >= 0.5 for other in many] for one in few]
    for number in range(len(few), 0, -1):
        for chosen in combinations(range(len(few)), number):
            for partners in permutations(range(len(many)), number):
                if all(good[one][other] for one, other in zip(chosen, partners, strict=True)):
                    return number
    return 0


def test_matchings_are_the_largest_of_all_and_order_does_not_matter() -> None:
    random = Random(1)
    seen = set()
    for _ in range(150):
        predicted, true = some_boxes(random, random.randint(0, 4)), some_boxes(random, random.randint(0, 4))
        expected = most_pairs(predicted, true)
        seen.add(expected)
        assert matched(predicted, true) == expected
        score = f1(predicted, true)
        if len(predicted) + len(true):
            false = len(predicted) - expected + len(true) - expected
            assert score == pytest.approx(2 * expected / (2 * expected + false))
        for _ in range(3):
            order = random.sample(range(len(predicted)), len(predicted))
            other = random.sample(range(len(true)), len(true))
            assert f1(predicted[order], true[other]) == score
    assert seen == {0, 1, 2, 3, 4}


def test_scores_of_rows() -> None:
    predictions = [boxes(), boxes(A), boxes(B, A), boxes(A, C), boxes(), boxes(B), boxes()]
    references = [boxes(), boxes(), boxes(A, B), boxes(A, B), boxes(A), boxes(A), boxes()]
    scores = score_regions(predictions, references)
    assert scores.precision == pytest.approx(3 / 7)
    assert scores.mean_f1 == pytest.approx((1 + 0 + 1 + 0.5 + 0 + 0 + 1) / 7)
    assert scores.n_acc == pytest.approx(2 / 3)
    assert scores.t_acc == pytest.approx(3 / 4)


def test_scores_of_a_kind_of_rows_that_is_missing_are_none() -> None:
    assert score_regions([boxes(A)], [boxes(A)]) == (1, 1, None, 1)
    assert score_regions([boxes(A)], [boxes()]) == (0, 0, 0, None)


def test_what_cannot_be_scored_is_refused() -> None:
    with pytest.raises(ValueError, match="no rows to score"):
        score_regions([], [])
    with pytest.raises(ValueError, match="zip"):
        score_regions([boxes(A)], [boxes(A), boxes(B)])


def test_all_sets_at_once_are_matched_as_one_by_one() -> None:
    random = Random(2)
    sets = [some_boxes(random, random.randint(0, 3)) for _ in range(40)]
    padded = torch.stack([torch.cat([one, boxes(*[A] * (3 - len(one)))]) for one in sets])
    numbers = torch.tensor([len(one) for one in sets])
    found = all_found(padded[:, None], numbers[:, None], padded[None], numbers[None])
    assert found.tolist() == [[f1(one, other) == 1 for other in sets] for one in sets]
    assert found.diagonal().all() and 40 < found.sum() < 1600


def scorer_of(*pairs: tuple[str, str]) -> RegionsScorer:
    scorer = RegionsScorer(RegionsConfig())
    for reference, hypothesis in pairs:
        scorer.add_string(reference, hypothesis)
    return scorer


def test_the_scorer_reads_boxes_of_bins() -> None:
    one, other = "<bin_0><bin_0><bin_4><bin_4>", "<bin_5> <bin_5> <bin_9> <bin_9>"
    scorer = scorer_of(
        (one + other, other + one), ("", ""), ("", one), (one, ""), (one, "<bin_0><bin_1>"), ("", "a box")
    )
    assert scorer.score() == pytest.approx(2 / 6)
    assert scorer.result_string() == (
        "precision 0.3333 at F1 = 1 and IoU 0.5, mean F1 0.3333, N-acc 0.3333, T-acc 0.6667, 6 rows, 2 hypotheses are "
        "no boxes"
    )
    assert "T-acc" not in scorer_of(("", "")).result_string()


def test_the_scorer_refuses_references_that_are_no_boxes() -> None:
    with pytest.raises(ValueError, match="reference 2 is 'a cat', and not boxes of <bin_k>; score with --task regions"):
        scorer_of(("", ""), ("a cat", "")).score()
