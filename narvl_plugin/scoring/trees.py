"""How far a predicted tree is from the true one: the edit distance of unordered trees, level by level.

An edit inserts, deletes or relabels one node. The order of children does not count. Each level of a scene tree has its
own meaning: scene, region, object. So a node is matched with one of its level, below a pair of matched nodes, as in
Selkow's distance. The best matching of the children of two nodes is then an assignment problem.
`scipy.optimize.linear_sum_assignment` solves it exactly, from the objects up.

Without this restriction, the distance of unordered trees is NP-hard (Zhang, Statman and Shasha, 1992). Libraries for
ordered trees, such as `zss` and `apted`, would count another order as edits.

Source: Selkow, The tree-to-tree editing problem, Information Processing Letters 6, 1977.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment

from narvl_plugin.data.trees import Node


class TreeScores(NamedTuple):
    """Scores of several images.

    Attributes:
        exact: the share of images whose tree is the true one, from 0 to 1.
        edits: the mean edit distance.
        parsed: the share of outputs that are trees, from 0 to 1.
    """

    exact: float
    edits: float
    parsed: float


def size_of(tree: Node) -> int:
    """Return the number of nodes of a tree."""
    return 1 + sum(map(size_of, tree.children))


def edit_distance(predicted: Node | None, true: Node) -> int:
    """Return the least number of edits that make a tree the true one; see the module.

    Args:
        predicted: the tree; None is no tree, from which all nodes of the true one are inserted.
        true: the true tree.
    """
    if predicted is None:
        return size_of(true)
    children, others = predicted.children, true.children
    # Children without a partner are matched with nothing, which costs all of their nodes. A pair never costs more than
    # both alone, so that only as many as one side has in excess are left over.
    most = max(len(children), len(others))
    costs = np.zeros((most, most), dtype=int)
    for row in range(most):
        for column in range(most):
            if row < len(children) and column < len(others):
                costs[row, column] = edit_distance(children[row], others[column])
            else:
                costs[row, column] = size_of(children[row] if row < len(children) else others[column])
    return int(predicted.label != true.label) + int(costs[linear_sum_assignment(costs)].sum())


def score_trees(predictions: Sequence[Node | None], references: Sequence[Node]) -> TreeScores:
    """Return the scores of the predicted trees of B images.

    Args:
        predictions: B trees; None for an output that is no tree.
        references: the B true trees.

    Raises:
        ValueError: if there is no image, or another number of predictions than of references is given.
    """
    edits = [edit_distance(predicted, true) for predicted, true in zip(predictions, references, strict=True)]
    if not edits:
        raise ValueError("no trees to score against")
    return TreeScores(
        exact=fmean(one == 0 for one in edits),
        edits=fmean(edits),
        parsed=fmean(predicted is not None for predicted in predictions),
    )
