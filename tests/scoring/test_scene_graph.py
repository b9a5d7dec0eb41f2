"""The scorer of scene graphs, on texts as models predict them."""

import pytest

from narvl_plugin.data.triplets import Instance, Triplet
from narvl_plugin.scoring.scene_graph import SceneGraphConfig, SceneGraphScorer
from narvl_plugin.scoring.triplets import is_exact, recalls

DOG, MAT = "dog<bin_0><bin_0><bin_5><bin_5>", "mat<bin_5><bin_5><bin_9><bin_9>"
ON, UNDER = f"{DOG} on {MAT}", f"{MAT} left_of {DOG}"


def scorer(*pairs: tuple[str, str]) -> SceneGraphScorer:
    found = SceneGraphScorer(SceneGraphConfig())
    for reference, hypothesis in pairs:
        found.add_string(reference, hypothesis)
    return found


def test_scores_are_those_of_triplets() -> None:
    found = scorer((f"{ON} {UNDER}", f"{UNDER} {ON}"), (ON, UNDER), ("", ""), ("", ON))
    scores = found.scores()
    assert (found.score(), scores.recall, scores.mean_recall) == (0.5, {5: 0.5, 10: 0.5}, {5: 0.75, 10: 0.75})
    assert found.result_string() == (
        "exact graphs 0.5000, R@5 0.5000, R@10 0.5000, mR@5 0.7500, mR@10 0.7500, 4 rows, 0 hypotheses are no triplets"
    )


def test_what_is_no_graph_is_never_exact() -> None:
    found = scorer((ON, ON), ("", "dog"))
    assert found.score() == 0.5
    assert found.result_string().endswith("2 rows, 1 hypotheses are no triplets")


def test_a_reference_must_be_triplets() -> None:
    with pytest.raises(ValueError, match="reference 1 is 'dog', and not triplets; score with --task scene_graph"):
        scorer(("dog", ON)).scores()


def test_one_image_is_exact_or_recalled_in_part() -> None:
    dog, mat = Instance("dog", (0, 0, 5, 5)), Instance("mat", (5, 5, 9, 9))
    on, under = Triplet(dog, "on", mat), Triplet(mat, "left of", dog)
    assert is_exact([on, under], [under, on]) and is_exact([], [])
    assert not is_exact([on], [on, under]) and not is_exact([on], [])
    assert recalls([under, on], [on], (1, 2)) == [0, 1]
    assert recalls([on], [], (5,)) == [0]
