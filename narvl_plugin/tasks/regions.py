"""The task `regions`: it predicts the boxes of all image regions that a phrase describes. There may be none."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import pad

from narvl_plugin.ctc import BoxSets
from narvl_plugin.data.boxes import GOOD_IOU, NO_BOX, boxes_in, iou
from narvl_plugin.data.collate import pad_tokens
from narvl_plugin.data.regions import MOST_BOXES, RegionsDataset
from narvl_plugin.data.tsv import TsvFile
from narvl_plugin.scoring.regions import all_found, f1
from narvl_plugin.tasks.base import Hypotheses, Search
from narvl_plugin.tasks.box_sets import BoxSetTask, next_edges
from narvl_plugin.tasks.boxes import BoxTaskConfig
from narvl_plugin.tasks.sets import ElementOrder

SIZE = 4
"""Number of tokens of a box."""


@dataclass
class RegionsConfig(BoxTaskConfig):
    """Options of the task `regions`."""

    selected_cols: str = field(
        default="0,4,2,3", metadata={"help": "TSV columns (from 0) of id, image, text and boxes, in this order"}
    )
    eval_acc: bool = field(
        default=False,
        metadata={
            "help": "generate in validation and log the share of rows whose boxes are all found, and no other, as "
            "`score` (for --best-checkpoint-metric), the mean F1 as `mean_f1`, and the share of rows for which the "
            "model rightly predicts no box, `n_acc`, or some box, `t_acc`"
        },
    )
    eval_args: str = field(
        default='{"beam": 5}',
        metadata={"help": "options of the generator in validation, as JSON; a student's is beam"},
    )
    element_order: ElementOrder = field(
        default=ElementOrder.reading,
        metadata={
            "help": "order of the boxes in the targets of training: from top to bottom, or a new random one in each "
            "epoch. It matters to teachers, and to --criterion qset with --order given"
        },
    )


class RegionsTask(BoxSetTask):
    """The set of all boxes; see RegionsDataset for the columns.

    Outputs are always whole boxes, all different, with their edges in order, and at most `MOST_BOXES`. For any boxes to
    fit, a student needs 39 queries: 4 for the bins of each of 5 boxes, and 19 for blanks between equal bins.
    """

    name = "regions"
    config_class = RegionsConfig
    validation_metrics = ("score", "mean_f1", "n_acc", "t_acc")
    dataset_class = RegionsDataset
    empty_is_answer = True
    longest_output = SIZE * MOST_BOXES
    cfg: RegionsConfig

    def build_dataset(self, tsv: TsvFile, split: str) -> RegionsDataset:
        """Return the data set of a split's file."""
        return RegionsDataset(
            tsv,
            self.options,
            split,
            max_image_size=self.cfg.max_image_size,
            random_order=self.cfg.element_order == ElementOrder.random,
        )

    def elements(self, tokens: list[int]) -> list[tuple[int, ...]]:
        """Return the boxes of a target, see `CommonTask.elements`."""
        return [tuple(tokens[place : place + SIZE]) for place in range(0, len(tokens), SIZE)]

    # --- Search ------------------------------------------------------------------------------------------------------

    def path_options(self, args: Any) -> dict[str, Any]:
        """Return how a student finds the most probable sets of boxes."""
        sets = BoxSets.of(first_bin=self.bins.first, num_bins=self.bins.number, most=MOST_BOXES)
        return {"beam_size": getattr(args, "beam", 1), "constraint": sets}

    def beam_searches(self, frequencies: Path | None) -> dict[str, Search]:
        """Return the decoding methods of students beside greedy search; see `ways_to_decode`."""
        return {"probably right": Search({"beam": 5}, {})}

    def allowed_tokens(self, tokens: list[int]) -> list[int]:
        """Return the tokens that may follow the tokens of a teacher's output; none if no set of boxes begins so."""
        first, number, _ = self.bins
        bins = [token - first for token in tokens]
        if not all(0 <= one < number for one in bins):
            return []
        *said, box = [bins[place : place + SIZE] for place in range(0, len(bins) + 1, SIZE)]
        end = [] if box else [self.target_dictionary.eos()]
        if len(said) == MOST_BOXES:
            return end
        return end + [first + edge for edge in next_edges(box, said, number)]

    # --- Scores of outputs -------------------------------------------------------------------------------------------

    def _sets(self, tokens: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Read tokens as sets of boxes, in bins.

        Args:
            tokens: (…, T).
            lengths: (…).

        Returns:
            The boxes (…, MOST_BOXES, 4), their numbers (…), and whether the tokens are whole boxes, (…) bool.
        """
        longest = self.longest_output
        first, number, _ = self.bins
        bins = pad(tokens, (0, longest - tokens.size(-1))) - first
        is_said = torch.arange(longest, device=tokens.device) < lengths[..., None]
        are_bins = (((bins >= 0) & (bins < number)) | ~is_said).all(-1)
        are_whole = (lengths % SIZE == 0) & (lengths <= longest)
        return bins.unflatten(-1, (MOST_BOXES, SIZE)), lengths // SIZE, are_bins & are_whole

    def _sets_of(self, outputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Read H outputs, (T,) each, as sets of boxes, without `</s>`; see `_sets`."""
        eos = self.target_dictionary.eos()
        return self._sets(pad_tokens(outputs, eos), torch.tensor([int((tokens != eos).sum()) for tokens in outputs]))

    def agreement(self, outputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return whether each two of H outputs can be matched box by box: (H, H), 1 or 0."""
        boxes, numbers, are_sets = self._sets_of(outputs)
        agree = all_found(boxes[:, None], numbers[:, None], boxes[None], numbers[None])
        return (agree & are_sets[:, None] & are_sets).float()

    def output_scores(
        self, outputs: torch.Tensor, lengths: torch.Tensor, targets: torch.Tensor, target_lengths: torch.Tensor
    ) -> torch.Tensor:
        """Return 1 for right sets and 0 for others: (B, M, T), (B, M), (B, K, S), (B, K) -> (B, M)."""
        boxes, numbers, are_sets = self._sets(outputs, lengths)
        true, true_numbers, _ = self._sets(targets[:, :1], target_lengths[:, :1])
        return (are_sets & all_found(boxes, numbers, true, true_numbers)).float()

    def element_scores(self, outputs: torch.Tensor, lengths: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Return the probability of each box of an output: the share of drawn sets with a box that overlaps it well.

        Args:
            outputs: (M, T), drawn outputs. Those that are no sets are left out.
            lengths: (M,).
            tokens: (S,), the output, K boxes.

        Returns:
            (K,), from 0 to 1.
        """
        boxes, numbers, are_sets = self._sets(outputs, lengths)
        return self._shares(boxes, numbers, are_sets.float(), tokens) / are_sets.sum().clamp(min=1)

    def _shares(
        self, boxes: torch.Tensor, numbers: torch.Tensor, weights: torch.Tensor, tokens: torch.Tensor
    ) -> torch.Tensor:
        """Return the weight of the sets with a box that overlaps well: (M, MOST_BOXES, 4), (M,), (M,), (S,) -> (K,)."""
        asked = (tokens - self.bins.first).unflatten(0, (-1, SIZE))
        good = iou(boxes[:, None], asked[None, :, None]) >= GOOD_IOU  # (M, K, MOST_BOXES)
        is_box = torch.arange(MOST_BOXES) < numbers[:, None]
        return weights @ (good & is_box[:, None]).any(2).float()

    def element_shares(
        self, outputs: Sequence[torch.Tensor], weights: torch.Tensor, tokens: torch.Tensor
    ) -> list[float]:
        """Return the weight of the sets with a box that overlaps well, for each box; none if the first is no set."""
        boxes, numbers, are_sets = self._sets_of(outputs)
        return self._shares(boxes, numbers, weights * are_sets, tokens).tolist() if bool(are_sets[0]) else []

    def is_invalid(self, tokens: torch.Tensor) -> bool:
        """Return whether tokens (T,) are no set of boxes, or a box's edges are out of order."""
        boxes = boxes_in(self.codec.decode(tokens))
        if boxes is None or len(boxes) > MOST_BOXES or len(set(map(tuple, boxes))) < len(boxes):
            return True
        return any(box[0] > box[2] or box[1] > box[3] for box in boxes)

    def validation_scores(self, sample: dict[str, Any], hypotheses: Hypotheses) -> dict[str, list[float]]:
        """Return for each hypothesis whether its F1 is 1, its F1, and whether it rightly has any box or none."""
        found: dict[str, list[float]] = {name: [] for name in self.validation_metrics}
        for boxes, true in zip(self.boxes_of_best(sample, hypotheses), sample["region_coords"], strict=True):
            predicted = torch.tensor([NO_BOX] if boxes is None else boxes, dtype=torch.float64).reshape(-1, 4)
            score = f1(predicted, true.cpu())
            found["score"].append(float(score == 1))
            found["mean_f1"].append(score)
            found["t_acc" if len(true) else "n_acc"].append(float(bool(len(true)) == bool(len(predicted))))
        return found
