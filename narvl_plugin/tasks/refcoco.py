"""The task `refcoco`: it predicts the box of the image region that a phrase describes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from narvl_plugin.ctc import BoxSets
from narvl_plugin.data.boxes import GOOD_IOU, bins_in, iou, overlaps
from narvl_plugin.data.refcoco import RefcocoDataset
from narvl_plugin.tasks.base import Hypotheses, Search
from narvl_plugin.tasks.boxes import BoxTask, BoxTaskConfig

BOXES_COMPARED = 64
"""Number of boxes that compete for the largest expected IoU. Fewer boxes give worse results (docs/results/log.md)."""


@dataclass
class RefcocoConfig(BoxTaskConfig):
    """Options of the task `refcoco`."""

    selected_cols: str = field(
        default="0,4,2,3", metadata={"help": "TSV columns (from 0) of id, image, text and box, in this order"}
    )
    eval_acc: bool = field(
        default=False,
        metadata={
            "help": "generate in validation and log the share of boxes with IoU of at least 0.5 as `score` (for "
            "--best-checkpoint-metric), `mean_iou`, and the share of hypotheses that are not a box as `no_box`"
        },
    )
    eval_args: str = field(
        default='{"beam": 5, "min_len": 4, "max_len_a": 0, "max_len_b": 4}',
        metadata={"help": "options of the generator in validation, as JSON; a student's is beam"},
    )


class RefcocoTask(BoxTask):
    """Grounding; see RefcocoDataset for the columns.

    A student needs 7 queries: 4 for the bins, and 3 for blanks between equal bins.
    """

    name = "refcoco"
    verb = "locate"
    config_class = RefcocoConfig
    validation_metrics = ("score", "mean_iou", "no_box")
    dataset_class = RefcocoDataset
    scores_outputs = True
    cfg: RefcocoConfig

    def path_options(self, args: Any) -> dict[str, Any]:
        """Return how a student finds the most probable boxes whose edges are in order."""
        boxes = BoxSets.of(first_bin=self.bins.first, num_bins=self.bins.number, least=1, most=1)
        return {"beam_size": getattr(args, "beam", 1), "constraint": boxes}

    def choice_options(self, args: Any) -> dict[str, Any]:
        """Return how a student chooses its box: the box with the largest expected IoU among the most probable ones.

        With --beam 1, it is the box of the most probable path.
        """
        beam = getattr(args, "beam", 1)
        return {
            "beam_size": beam if beam == 1 else max(beam, BOXES_COMPARED),
            "agreement": self.agreement,
            "output_scores": self.output_scores,
        }

    def beam_searches(self, frequencies: Path | None) -> dict[str, Search]:
        """Return the decoding methods of students beside greedy search; see `ways_to_decode`."""
        return {"expected IoU": Search({"beam": 5}, {})}

    def is_invalid(self, tokens: torch.Tensor) -> bool:
        """Return whether tokens (T,) are not a box, or a box whose edges are out of order."""
        bins = bins_in(self.codec.decode(tokens))
        return bins is None or bins[0] > bins[2] or bins[1] > bins[3]

    def agreement(self, outputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the pairwise IoU of H boxes, the first four tokens of each output: (H, H)."""
        boxes = torch.stack([tokens[:4] for tokens in outputs]) - self.target_dictionary.index("<bin_0>")
        return iou(boxes[:, None], boxes)

    def output_scores(
        self, outputs: torch.Tensor, lengths: torch.Tensor, targets: torch.Tensor, target_lengths: torch.Tensor
    ) -> torch.Tensor:
        """Return 1 for good boxes and 0 for others: (B, M, T), (B, M), (B, K, S), (B, K) -> (B, M).

        The IoU itself would favour one box around two regions that match the phrase.
        """
        if outputs.size(2) < 4:
            return torch.zeros(outputs.shape[:2], device=outputs.device)
        first = self.target_dictionary.index("<bin_0>")
        boxes, target = outputs[..., :4] - first, targets[:, :1, :4] - first
        are_bins = ((boxes >= 0) & (boxes < self.codec.num_bins)).all(2) & (lengths == 4)
        return (are_bins & (iou(boxes, target) >= GOOD_IOU)).float()

    def confidence(self, beam: list[dict[str, Any]]) -> float:
        """Return the probability that the best box is good: that of all boxes in the beam that overlap well with it."""
        if "confidence" in beam[0]:
            return float(beam[0]["confidence"])
        boxes = [hypothesis for hypothesis in beam if bins_in(self.codec.decode(hypothesis["tokens"])) is not None]
        if not boxes or boxes[0] is not beam[0]:
            return 0.0
        weights = torch.stack([hypothesis["positional_scores"].sum() for hypothesis in boxes]).exp()
        good = self.agreement([hypothesis["tokens"] for hypothesis in boxes])[0] >= GOOD_IOU
        return float(weights[good].sum())

    def validation_scores(self, sample: dict[str, Any], hypotheses: Hypotheses) -> dict[str, list[float]]:
        """Return for each hypothesis whether its box is good, the IoU, and whether it is not a box."""
        boxes = [found[0] if found else None for found in self.boxes_of_best(sample, hypotheses)]
        scores = overlaps(boxes, sample["region_coords"].tolist())
        return {
            "score": [float(score >= GOOD_IOU) for score in scores],
            "mean_iou": scores,
            "no_box": [float(box is None) for box in boxes],
        }
