"""Sets of regions: how well predicted boxes agree with those that a phrase describes, of which there may be none.

It also holds the fairseq scorer `regions`.

The scores are those of generalized grounding (GREC) on gRefCOCO. Predicted and true boxes are matched one to one, such
that as many pairs as possible have an IoU of at least 0.5.

Source: He et al., GREC: Generalized Referring Expression Comprehension, https://arxiv.org/abs/2308.16182. The authors'
program matches greedily by the generalized IoU, which is never larger than the IoU. So it may count fewer pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import permutations
from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from narvl_plugin.data.boxes import GOOD_IOU, NO_BOX, boxes_in, iou
from narvl_plugin.scoring.base import Scorer, ScorerConfig


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


def all_found(predicted: Tensor, numbers: Tensor, true: Tensor, true_numbers: Tensor) -> Tensor:
    """Tell whether all boxes can be matched in pairs, so that F1 = 1. There may be no box at all.

    All matchings are tried at once, so there may be a few boxes only.

    Args:
        predicted: (…, K, 4), x0, y0, x1, y1.
        numbers: (…), the number of predicted boxes, which are the first ones.
        true: (…, K, 4), in the same unit, broadcastable to `predicted`.
        true_numbers: (…), the number of true boxes.

    Returns:
        (…) bool.
    """
    good = iou(predicted[..., :, None, :], true[..., None, :, :]) >= GOOD_IOU
    return all_paired(good, numbers, true_numbers)


def all_paired(good: Tensor, numbers: Tensor, true_numbers: Tensor) -> Tensor:
    """Tell whether all predicted and all true elements can be matched in pairs. There may be no element at all.

    All matchings are tried at once, so there may be a few elements only.

    Args:
        good: (…, K, K) bool, whether a predicted element (row) may be matched with a true one (column).
        numbers: (…), the number of predicted elements, which are the first ones.
        true_numbers: (…), the number of true elements.

    Returns:
        (…) bool.
    """
    places = torch.arange(good.size(-1), device=good.device)
    is_said, is_true = (places < number[..., None] for number in (numbers, true_numbers))
    # Places without an element are matched with each other.
    good = torch.where(is_said[..., :, None], good & is_true[..., None, :], ~is_true[..., None, :])
    matchings = _matchings(good.size(-1)).to(good.device, non_blocking=True)
    good_pairs = good.flatten(-2).float() @ matchings
    return good_pairs.amax(-1) > good.size(-1) - 0.5


@cache
def _matchings(size: int) -> Tensor:
    """Return all ways to match `size` rows with as many columns: (size^2, size!), 1 for each pair that is matched."""
    orders = list(permutations(range(size)))
    pairs = torch.tensor([[row * size + column for row, column in enumerate(order)] for order in orders])
    return torch.zeros(size * size, len(orders)).scatter_(0, pairs.T, 1.0)


def boxes_of(text: str) -> Tensor:
    """Return the boxes of a text of `<bin_k>`, float (P, 4). A text of another form is one box that covers nothing."""
    boxes = boxes_in(text)
    return torch.tensor([NO_BOX] if boxes is None else boxes, dtype=torch.float32).reshape(-1, 4)


@dataclass
class RegionsConfig(ScorerConfig):
    """The scorer `regions` has no settings."""


class RegionsScorer(Scorer[RegionsConfig]):
    """fairseq scorer; reference and hypothesis are four `<bin_k>` for each box, and empty without a box.

    Any other hypothesis is wrong. A reference is rounded to bins, so a box close to the threshold may count differently
    than in validation.
    """

    def scores(self) -> RegionScores:
        """Return the scores of all rows.

        Raises:
            ValueError: for a reference that is not a set of boxes, and if there is nothing to score.
        """
        for number, text in enumerate(self.ref, start=1):
            if boxes_in(text) is None:
                raise ValueError(f"reference {number} is {text!r}, and not boxes of <bin_k>; score with --task regions")
        return score_regions([boxes_of(text) for text in self.pred], [boxes_of(text) for text in self.ref])

    def score(self) -> float:
        """Return the share of rows whose boxes are all found, and no other."""
        return self.scores().precision

    def result_string(self) -> str:
        """Format the scores and the number of hypotheses that are no boxes in one line."""
        scores = self.scores()
        invalid = sum(boxes_in(text) is None for text in self.pred)
        accuracies = [
            f"{name} {value:.4f}, "
            for name, value in (("N-acc", scores.n_acc), ("T-acc", scores.t_acc))
            if value is not None
        ]
        return (
            f"precision {scores.precision:.4f} at F1 = 1 and IoU {GOOD_IOU}, mean F1 {scores.mean_f1:.4f}, "
            f"{''.join(accuracies)}{len(self.ref)} rows, {invalid} hypotheses are no boxes"
        )
