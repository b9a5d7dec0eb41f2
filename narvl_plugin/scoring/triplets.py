"""Scene graphs: how well predicted triplets agree with the true ones, as in scene graph detection (SGDet).

A predicted triplet is right for a true one if subject, relation and object have equal names, and both boxes have an IoU
of at least 0.5. Predicted triplets are in order, the surest first.

R@K is the share of an image's true triplets that are right for one of its first K predicted triplets, as a mean over
images. mR@K is the same for each relation alone, as a mean over the images that have it, and then over relations. So
rare relations count as much as frequent ones. Images without true triplets count in neither.

Sources: R@K is of Lu et al., Visual Relationship Detection with Language Priors, https://arxiv.org/abs/1608.00187. mR@K
is of Tang et al., Learning to Compose Dynamic Tree Structures, https://arxiv.org/abs/1812.01880. It averages over all
relations of a closed list; here, over those of the references.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor

from narvl_plugin.data.boxes import GOOD_IOU, iou
from narvl_plugin.data.triplets import Triplet
from narvl_plugin.scoring.regions import most_pairs

RANKS = (5, 10, 20, 50, 100)
"""The usual K of R@K and mR@K."""


class GraphScores(NamedTuple):
    """Scores of several images, from 0 to 1.

    Attributes:
        recall: "R@K" by K.
        mean_recall: "mR@K" by K.
        exact: the share of images whose predicted and true triplets can be paired one to one, with none left over.
    """

    recall: dict[int, float]
    mean_recall: dict[int, float]
    exact: float


def right(predicted: Sequence[Triplet], true: Sequence[Triplet]) -> Tensor:
    """Return whether each predicted triplet is right for each true one, bool (P, K)."""
    same = torch.tensor([[_names(one) == _names(other) for other in true] for one in predicted], dtype=torch.bool)
    found = same.reshape(len(predicted), len(true))
    for side in ("subject", "object"):
        found &= iou(_boxes(predicted, side)[:, None], _boxes(true, side)[None]) >= GOOD_IOU
    return found


def is_exact(predicted: Sequence[Triplet], true: Sequence[Triplet]) -> bool:
    """Return whether predicted and true triplets can be paired one to one, with none left over."""
    return len(predicted) == len(true) == most_pairs(right(predicted, true))


def recalls(predicted: Sequence[Triplet], true: Sequence[Triplet], ranks: Sequence[int] = RANKS) -> list[float]:
    """Return R@K of an image for each K; 0 without true triplets."""
    found = right(predicted, true)
    return [float(found[:rank].any(dim=0).sum()) / max(1, len(true)) for rank in ranks]


def score_triplets(
    predictions: Sequence[Sequence[Triplet]], references: Sequence[Sequence[Triplet]], ranks: Sequence[int] = RANKS
) -> GraphScores:
    """Return the scores of the predicted triplets of B images.

    Args:
        predictions: B lists of triplets, the surest first.
        references: B lists of triplets.
        ranks: the K of R@K and mR@K.

    Raises:
        ValueError: if no reference holds a triplet, or another number of predictions than of references is given.
    """
    recalls: dict[int, list[float]] = {rank: [] for rank in ranks}
    by_relation: dict[int, dict[str, list[float]]] = {rank: defaultdict(list) for rank in ranks}
    exact = []
    for predicted, true in zip(predictions, references, strict=True):
        found = right(predicted, true)
        exact.append(len(predicted) == len(true) == most_pairs(found))
        relations = Counter(triplet.relation for triplet in true)
        for rank in ranks if true else ():
            hits = found[:rank].any(dim=0).tolist()
            recalls[rank].append(sum(hits) / len(true))
            right_of = Counter(triplet.relation for triplet, hit in zip(true, hits, strict=True) if hit)
            for relation, number in relations.items():
                by_relation[rank][relation].append(right_of[relation] / number)
    if not any(references):
        raise ValueError("no triplets to score against")
    return GraphScores(
        {rank: fmean(recalls[rank]) for rank in ranks},
        {rank: fmean(map(fmean, by_relation[rank].values())) for rank in ranks},
        fmean(exact),
    )


def _names(triplet: Triplet) -> tuple[str, str, str]:
    return triplet.subject.noun, triplet.relation, triplet.object.noun


def _boxes(triplets: Sequence[Triplet], side: str) -> Tensor:
    """Return the boxes of the subjects or objects, float64 (N, 4)."""
    return torch.tensor([getattr(triplet, side).box for triplet in triplets], dtype=torch.float64).reshape(-1, 4)
