"""Sets of regions: how well predicted boxes agree with those that a phrase describes, of which there may be none.

The scores are those of generalized grounding (GREC) on gRefCOCO. Predicted and true boxes are matched one to one, such
that as many pairs as possible have an IoU of at least 0.5.

Source: He et al., GREC: Generalized Referring Expression Comprehension, https://arxiv.org/abs/2308.16182. The authors'
program matches greedily by the generalized IoU, which is never larger than the IoU. So it may count fewer pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from scipy.optimize import linear_sum_assignment
from torch import Tensor

from narvl_plugin.data.boxes import GOOD_IOU, iou


class RegionScores(NamedTuple):
    """Scores of several rows, from 0 to 1.

    Attributes:
        precision: "Precision@(F1=1, IoU>=0.5)": the share of rows with F1 = 1, whose boxes are all found, and no other.
        mean_f1: the mean F1 of the rows.
        n_acc: "N-acc": of the rows without a true box, the share without a predicted one. None if there is no such row.
        t_acc: "T-acc": of the rows with true boxes, the share with a predicted one. None if there is no such row.
    """

    precision: float
    mean_f1: float
    n_acc: float | None
    t_acc: float | None


def matched(predicted: Tensor, true: Tensor) -> int:
    """Return the largest number of pairs of a predicted and a true box with a good IoU, each box in one pair at most.

    Args:
        predicted: (P, 4), x0, y0, x1, y1.
        true: (K, 4), in the same unit.
    """
    return most_pairs(iou(predicted[:, None], true[None]) >= GOOD_IOU)


def most_pairs(good: Tensor) -> int:
    """Return the largest number of good pairs, each element in one pair at most.

    Args:
        good: bool (P, K), whether a predicted and a true element are a good pair.
    """
    pairs = good.cpu().numpy()
    rows, columns = linear_sum_assignment(pairs, maximize=True)
    return int(pairs[rows, columns].sum())


def f1(predicted: Tensor, true: Tensor) -> float:
    """Return the F1 of predicted boxes: 2 TP / (2 TP + FP + FN), and 1 if there is no box at all.

    TP is the number of matched pairs, FP that of other predicted boxes, and FN that of other true boxes.

    Args:
        predicted: (P, 4), x0, y0, x1, y1.
        true: (K, 4), in the same unit.
    """
    boxes = len(predicted) + len(true)  # 2 TP + FP + FN
    return 2 * matched(predicted, true) / boxes if boxes else 1.0


def score_regions(predictions: Sequence[Tensor], references: Sequence[Tensor]) -> RegionScores:
    """Return the scores of the predicted boxes of B rows.

    Args:
        predictions: B tensors (P, 4), x0, y0, x1, y1, where P may be 0.
        references: B tensors (K, 4), in the same unit, where K may be 0.

    Raises:
        ValueError: if there are no rows, or another number of predictions than of references.
    """
    if not references:
        raise ValueError("no rows to score")
    found = [f1(predicted, true) for predicted, true in zip(predictions, references, strict=True)]
    pairs = list(zip(predictions, references, strict=True))
    without = [not len(predicted) for predicted, true in pairs if not len(true)]
    some = [len(predicted) > 0 for predicted, true in pairs if len(true)]
    return RegionScores(
        sum(score == 1 for score in found) / len(found),
        sum(found) / len(found),
        sum(without) / len(without) if without else None,
        sum(some) / len(some) if some else None,
    )
