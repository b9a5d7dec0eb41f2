"""Scores of scene graphs, by hand and against a plain restatement of the definitions."""

from collections.abc import Sequence
from itertools import permutations
from random import Random

import pytest

from narvl_plugin.data.boxes import overlaps
from narvl_plugin.data.triplets import Instance, Triplet
from narvl_plugin.scoring.triplets import RANKS, right, score_triplets

Box = tuple[float, float, float, float]
A, B, C = (0, 0, 10, 10), (20, 0, 30, 10), (0, 20, 10, 30)
HALF_OF_A, LESS_THAN_HALF = (0, 0, 10, 5), (0, 0, 10, 4.9)


def on(subject: Box, other: Box, relation: str = "on", nouns: tuple[str, str] = ("dog", "mat")) -> Triplet:
    return Triplet(Instance(nouns[0], subject), relation, Instance(nouns[1], other))


@pytest.mark.parametrize(
    ("predicted", "expected"),
    [
        (on(A, B), True),
        (on(HALF_OF_A, B), True),  # an IoU of 0.5 is good
        (on(LESS_THAN_HALF, B), False),
        (on(A, C), False),
        (on(B, A), False),
        (on(A, B, "under"), False),
        (on(A, B, nouns=("cat", "mat")), False),
        (on(A, B, nouns=("dog", "rug")), False),
        (on(B, A, nouns=("mat", "dog")), False),
    ],
)
def test_a_triplet_is_right_by_its_names_and_both_boxes(predicted: Triplet, expected: bool) -> None:
    assert right([predicted], [on(A, B)]).tolist() == [[expected]]


def test_recall_counts_the_first_k() -> None:
    wrong = [on(C, C)] * 5
    scores = score_triplets([[on(A, B), *wrong, on(A, B, "near")]], [[on(A, B), on(A, B, "near")]])
    assert scores.recall == {5: 0.5, 10: 1, 20: 1, 50: 1, 100: 1}
    assert tuple(scores.recall) == tuple(scores.mean_recall) == RANKS


def test_recall_is_the_mean_over_images_not_over_triplets() -> None:
    three = [on(A, B), on(A, B, "near"), on(A, C)]
    scores = score_triplets([three, []], [three, [on(A, B)]], ranks=(1, 5))
    assert scores.recall == {1: pytest.approx((1 / 3 + 0) / 2), 5: 0.5}


def test_mean_recall_weighs_relations_alike() -> None:
    # "on": half of the first image, all of the second. "near": none of the first image.
    references = [[on(A, B), on(A, C), on(A, B, "near")], [on(A, B)]]
    scores = score_triplets([[on(A, B)], [on(A, B)]], references)
    assert scores.mean_recall[5] == pytest.approx((0.75 + 0) / 2)
    assert scores.recall[5] == pytest.approx((1 / 3 + 1) / 2)


@pytest.mark.parametrize(
    ("predicted", "true", "expected"),
    [
        ([on(A, C), on(A, B)], [on(A, B), on(A, C)], 1),
        ([on(A, B)], [on(A, B), on(A, C)], 0),
        ([on(A, B), on(A, C)], [on(A, B)], 0),
        ([on(A, B), on(HALF_OF_A, B)], [on(A, B), on(A, C)], 0),  # two for one
        ([], [], 1),
        ([on(A, B)], [], 0),
        ([], [on(A, B)], 0),
    ],
)
def test_exact_graphs(predicted: list[Triplet], true: list[Triplet], expected: int) -> None:
    # A second image gives a graph to score against.
    assert score_triplets([predicted, [on(C, C)]], [true, [on(C, C)]]).exact == (expected + 1) / 2


def test_exact_graphs_need_the_best_pairing() -> None:
    """The first prediction is right for both true triplets, the second one only for the first of them."""
    wide, narrow = (0, 0, 16, 10), (0, 0, 6, 10)
    true = [on(A, B), on(wide, B)]
    predicted = [on(A, B), on(narrow, B)]
    assert right(predicted, true).tolist() == [[True, True], [True, False]]
    assert score_triplets([predicted], [true]).exact == 1


def test_images_without_triplets_count_for_exact_graphs_alone() -> None:
    scores = score_triplets([[on(A, B)], []], [[on(A, B)], []])
    assert scores.recall[5] == scores.mean_recall[5] == scores.exact == 1


def test_what_cannot_be_scored_is_refused() -> None:
    for references in ([], [[]]):
        with pytest.raises(ValueError, match="no triplets to score against"):
            score_triplets([[]] * len(references), references)
    with pytest.raises(ValueError, match="zip"):
        score_triplets([[]], [[on(A, B)], []])


def plain_right(predicted: Triplet, true: Triplet) -> bool:
    names = [(one.subject.noun, one.relation, one.object.noun) for one in (predicted, true)]
    boxes = [(predicted.subject.box, true.subject.box), (predicted.object.box, true.object.box)]
    return names[0] == names[1] and all(overlaps([one], [other])[0] >= 0.5 for one, other in boxes)


def plain_exact(predicted: Sequence[Triplet], true: Sequence[Triplet]) -> bool:
    return len(predicted) == len(true) and any(all(map(plain_right, order, true)) for order in permutations(predicted))


def test_scores_are_those_of_the_definitions() -> None:
    random = Random(2)

    def graph(size: int) -> list[Triplet]:
        corners = [(random.randint(0, 4), random.choice((0, 3))) for _ in range(2 * size)]
        boxes = [(x, y, x + random.randint(6, 10), y + random.randint(6, 10)) for x, y in corners]
        return [
            on(one, other, random.choice(("on", "near")), (random.choice(("dog", "cat")), "mat"))
            for one, other in zip(boxes[::2], boxes[1::2], strict=True)
        ]

    predictions = [graph(random.randint(0, 4)) for _ in range(300)]
    references = [graph(random.randint(0, 3)) for _ in predictions]
    scores = score_triplets(predictions, references, ranks=(1, 2, 5))
    pairs = list(zip(predictions, references, strict=True))
    assert scores.exact == pytest.approx(sum(plain_exact(*pair) for pair in pairs) / 300)
    assert 10 / 300 < scores.exact < 1
    for rank in (1, 2, 5):
        found = [
            (number, one.relation, any(plain_right(other, one) for other in predicted[:rank]))
            for number, (predicted, true) in enumerate(pairs)
            for one in true
        ]
        images = {number for number, *_ in found}

        def share(hits: list[bool]) -> float:
            return sum(hits) / len(hits)

        recalls = [share([hit for image, _, hit in found if image == number]) for number in images]
        assert scores.recall[rank] == pytest.approx(sum(recalls) / len(images))
        means = []
        for name in ("on", "near"):
            having = {number for number, relation, _ in found if relation == name}
            means.append(
                sum(share([h for n, r, h in found if n == number and r == name]) for number in having) / len(having)
            )
        assert scores.mean_recall[rank] == pytest.approx(sum(means) / 2)
    assert scores.recall[1] < scores.recall[2] < scores.recall[5]
