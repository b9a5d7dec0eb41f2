"""The task `scene_graph`: it predicts the set of triplets of an image, with the boxes of subjects and objects."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Optional

import torch

from narvl_plugin.ctc import BoxSets
from narvl_plugin.ctc.box_sets import EDGES, Parts
from narvl_plugin.data.boxes import GOOD_IOU, from_bins, iou
from narvl_plugin.data.collate import pad_tokens
from narvl_plugin.data.scene_graph import MOST_TRIPLETS, GraphNames, SceneGraphDataset, triplets_in
from narvl_plugin.data.triplets import Instance, Triplet, read_triplets, write_triplets
from narvl_plugin.data.tsv import TsvFile
from narvl_plugin.errors import BadRow, InputError
from narvl_plugin.scoring.regions import all_paired
from narvl_plugin.scoring.triplets import is_exact, recalls
from narvl_plugin.tasks.base import Hypotheses, Search
from narvl_plugin.tasks.box_sets import BoxSetTask, next_edges
from narvl_plugin.tasks.boxes import BoxTaskConfig
from narvl_plugin.tasks.sets import ElementOrder

SIDES = 2
"""Number of parts of a triplet: the subject with its box, and the relation and object with the object's box."""
RANKS = (5, 10)
"""The K of R@K in validation."""


@dataclass
class SceneGraphConfig(BoxTaskConfig):
    """Options of the task `scene_graph`."""

    selected_cols: str = field(
        default="0,3,2", metadata={"help": "TSV columns (from 0) of id, image and triplets, in this order"}
    )
    names_file: Optional[str] = field(
        default=None,
        metadata={
            "help": "JSON file with the nouns and relations that may occur, in the form of VG-SGG-dicts.json: an "
            "object with label_to_idx and predicate_to_idx"
        },
    )
    eval_acc: bool = field(
        default=False,
        metadata={
            "help": "generate in validation and log the share of exact graphs as `score` (for "
            "--best-checkpoint-metric), and R@5 and R@10 as `r_5` and `r_10`"
        },
    )
    eval_args: str = field(
        default='{"beam": 5, "unnormalized": true}',
        metadata={"help": "options of the generator in validation, as JSON; a student's is beam"},
    )
    element_order: ElementOrder = field(
        default=ElementOrder.reading,
        metadata={
            "help": "order of the triplets in the targets of training: from top to bottom, or a new random one in each "
            "epoch. It matters to teachers, and to --criterion qset with --order given"
        },
    )


class SceneGraphTask(BoxSetTask):
    """The set of triplets; see SceneGraphDataset for the columns.

    Outputs are always whole triplets of listed names, all different, whose boxes have ordered edges, and at most
    `MOST_TRIPLETS`.
    """

    name = "scene_graph"
    verb = "graph"
    text_column = None  # all rows ask the same
    config_class = SceneGraphConfig
    validation_metrics = ("score", "r_5", "r_10")
    dataset_class = SceneGraphDataset
    target_place = 2
    empty_is_answer = True
    cfg: SceneGraphConfig

    def __init__(self, cfg: SceneGraphConfig, **kwargs: Any) -> None:
        super().__init__(cfg, **kwargs)
        if not cfg.names_file:
            raise InputError("--names-file: is not given; give the list of nouns and relations")
        if cfg.num_bins < 2:
            raise InputError(f"--num-bins {cfg.num_bins}: expected 2 or more, by which boxes differ")
        try:
            self.names = GraphNames.of_file(cfg.names_file, self.codec)
        except BadRow as error:
            raise InputError(f"--names-file {error}") from error
        bins = {"first_bin": self._first_bin, "num_bins": self.codec.num_bins}
        self.graphs = BoxSets.of(self.names.sides, **bins, most=MOST_TRIPLETS)

    @property
    def bins(self) -> None:  # type: ignore[override]
        """None: outputs are not boxes alone."""
        return

    @property
    def _first_bin(self) -> int:
        return self.codec.dictionary.index("<bin_0>")

    def build_dataset(self, tsv: TsvFile, split: str) -> SceneGraphDataset:
        """Return the data set of a split's file."""
        return SceneGraphDataset(
            tsv,
            self.options,
            split,
            max_image_size=self.cfg.max_image_size,
            names=self.names,
            random_order=self.cfg.element_order == ElementOrder.random,
        )

    def elements(self, tokens: list[int]) -> list[tuple[int, ...]]:
        """Return the triplets of a target, see `CommonTask.elements`."""
        runs = self._runs(tokens)
        return [sum(runs[place : place + 2 * SIDES], ()) for place in range(0, len(runs), 2 * SIDES)]

    # --- Search ------------------------------------------------------------------------------------------------------

    def path_options(self, args: Any) -> dict[str, Any]:
        """Return how a student finds the most probable graphs."""
        return {"beam_size": getattr(args, "beam", 1), "constraint": self.graphs}

    def beam_searches(self, frequencies: Path | None) -> dict[str, Search]:
        """Return the decoding methods of students beside greedy search; see `ways_to_decode`."""
        return {"probably exact": Search({"beam": 5}, {})}

    @property
    def longest_output(self) -> int:
        """The number of tokens of the longest graph."""
        return MOST_TRIPLETS * sum(max(map(len, names)) + EDGES for names in self.names.sides)

    def allowed_tokens(self, tokens: list[int]) -> list[int]:
        """Return the tokens that may follow the tokens of a teacher's output; none if no set of triplets begins so."""
        first, number = self._first_bin, self.codec.num_bins
        runs = self._runs(tokens)
        in_box = bool(runs) and len(runs) % 2 == 0 and len(runs[-1]) < EDGES
        part = (len(runs) - in_box) // 2
        side, element = part % SIDES, part - part % SIDES
        name = runs[2 * part] if len(runs) > 2 * part else ()
        following = self.names.following[side].get(name)
        if following is None or part // SIDES == MOST_TRIPLETS:
            return [] if name else [self.target_dictionary.eos()]
        found = [] if in_box else sorted(following)
        if not name and side == 0:
            return [self.target_dictionary.eos(), *found]
        if not self.names.is_name(side, name):
            return found
        box = [token - first for token in runs[-1]] if in_box else []
        # The last box tells a triplet from others that begin like it.
        begin = runs[2 * element : 2 * part + 1]
        others = [
            [token - first for token in runs[2 * (other + SIDES) - 1]]
            for other in range(0, element if side == SIDES - 1 else 0, SIDES)
            if runs[2 * other : 2 * (other + SIDES) - 1] == begin
        ]
        return found + [first + edge for edge in next_edges(box, others, number)]

    def _runs(self, tokens: Sequence[int]) -> list[tuple[int, ...]]:
        """Split tokens into names and boxes in turn."""
        bins = range(self._first_bin, self._first_bin + self.codec.num_bins)
        return [tuple(run) for _, run in groupby(tokens, key=lambda token: token in bins)]

    # --- Scores of outputs -------------------------------------------------------------------------------------------

    def _parts(self, outputs: Sequence[torch.Tensor]) -> Parts:
        """Split H outputs, (T,) each, into names and boxes, without `</s>`."""
        eos = self.target_dictionary.eos()
        return self._whole(pad_tokens(outputs, eos), torch.tensor([int((one != eos).sum()) for one in outputs]))

    def _whole(self, tokens: torch.Tensor, lengths: torch.Tensor) -> Parts:
        """Split outputs into names and boxes, and tell those that are whole triplets: (M, T), (M,)."""
        parts = self.graphs.parts(tokens, lengths)
        return parts._replace(whole=parts.whole & (parts.numbers % SIDES == 0))

    @staticmethod
    def _agree(one: Parts, other: Parts) -> torch.Tensor:
        """Return whether triplets agree, by names and by the overlap of both boxes.

        Args:
            one: M outputs.
            other: H outputs.

        Returns:
            (M, H, K, K) bool, for K triplets, the most of all outputs; False for triplets that are not there.
        """
        most = min(max([SIDES, *one.numbers.tolist(), *other.numbers.tolist()]) // SIDES, MOST_TRIPLETS)
        by_triplet = [[part.unflatten(1, (-1, SIDES))[:, :most] for part in parts] for parts in (one[:2], other[:2])]
        names, boxes = zip(*by_triplet, strict=True)
        same = (names[0][:, None, :, None] == names[1][None, :, None, :]).flatten(-2).all(-1)
        good = (iou(boxes[0][:, None, :, None], boxes[1][None, :, None, :]) >= GOOD_IOU).all(-1)
        there = [torch.arange(most) < parts.numbers[:, None] // SIDES for parts in (one, other)]
        return same & good & there[0][:, None, :, None] & there[1][None, :, None, :]

    def _exact(self, one: Parts, other: Parts) -> torch.Tensor:
        """Return whether graphs agree: (M, H) bool."""
        paired = all_paired(self._agree(one, other), one.numbers[:, None] // SIDES, other.numbers[None] // SIDES)
        return paired & one.whole[:, None] & other.whole[None]

    def agreement(self, outputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return whether each two of H outputs are the same graph: (H, H), 1 or 0."""
        parts = self._parts(outputs)
        return self._exact(parts, parts).float()

    def output_scores(
        self, outputs: torch.Tensor, lengths: torch.Tensor, targets: torch.Tensor, target_lengths: torch.Tensor
    ) -> torch.Tensor:
        """Return 1 for exact graphs and 0 for others: (B, M, T), (B, M), (B, K, S), (B, K) -> (B, M)."""
        rows = zip(outputs.cpu(), lengths.cpu(), targets[:, :1].cpu(), target_lengths[:, :1].cpu(), strict=True)
        scores = [self._exact(self._whole(*row[:2]), self._whole(*row[2:]))[:, 0] for row in rows]
        return torch.stack(scores).float().to(outputs.device) if scores else outputs.new_zeros(lengths.shape).float()

    def element_scores(self, outputs: torch.Tensor, lengths: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Return the probability of each triplet of an output: the share of drawn graphs with a triplet that agrees.

        Args:
            outputs: (M, T), drawn outputs. Those that are no whole triplets are left out.
            lengths: (M,).
            tokens: (S,), the output, K triplets.

        Returns:
            (K,), from 0 to 1.
        """
        parts = self._whole(outputs, lengths)
        return self._shares(parts, parts.whole.float(), tokens) / parts.whole.sum().clamp(min=1)

    def _shares(self, parts: Parts, weights: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Return the weight of the graphs with a triplet that agrees: weights (M,), tokens (S,) -> (K,)."""
        asked = self._whole(tokens[None], torch.tensor([len(tokens)]))
        number = int(asked.numbers[0]) // SIDES
        return weights @ self._agree(parts, asked)[:, 0].any(1)[:, :number].float()

    def element_shares(
        self, outputs: Sequence[torch.Tensor], weights: torch.Tensor, tokens: torch.Tensor
    ) -> list[float]:
        """Return the weight of the graphs with a triplet that agrees, for each triplet."""
        parts = self._parts(outputs)
        return self._shares(parts, weights * parts.whole, tokens).tolist()

    def is_invalid(self, tokens: torch.Tensor) -> bool:
        """Return whether tokens (T,) are no set of triplets of listed names, or a box's edges are out of order."""
        said = tokens[tokens != self.target_dictionary.eos()][None].cpu()
        return not bool(self.graphs.accepts(said, torch.tensor([said.size(1)])))

    def triplets(
        self, tokens: torch.Tensor, width_ratio: torch.Tensor, height_ratio: torch.Tensor
    ) -> list[Triplet] | None:
        """Return the triplets that tokens spell, with boxes in pixels of the image as it came.

        Args:
            tokens: (T,).
            width_ratio: by how much the width of the image was multiplied, a number.
            height_ratio: by how much its height was multiplied, a number.

        Returns:
            The triplets, or None for tokens that are no output of the task.
        """
        found = triplets_in(self.codec.decode(tokens))
        if found is None:
            return None
        ratios = torch.stack([width_ratio, height_ratio]).cpu().repeat(2)

        def instance(noun: str, box: tuple[int, ...]) -> Instance:
            resized = from_bins(torch.tensor(box), side=self.cfg.max_image_size, num_bins=self.cfg.num_bins)
            left, upper, right, lower = (resized / ratios).tolist()
            return Instance(noun, (left, upper, right, lower))

        return [
            Triplet(instance(one.subject, one.subject_box), one.relation, instance(one.object, one.object_box))
            for one in found
        ]

    def triplets_of_best(self, sample: dict[str, Any], hypotheses: Hypotheses) -> list[list[Triplet] | None]:
        """Return the triplets of the best hypotheses of the B samples, in pixels of the original images."""
        ratios = sample["w_resize_ratios"].cpu(), sample["h_resize_ratios"].cpu()
        return [self.triplets(beam[0]["tokens"], *ratio) for beam, *ratio in zip(hypotheses, *ratios, strict=True)]

    def validation_scores(self, sample: dict[str, Any], hypotheses: Hypotheses) -> dict[str, list[float]]:
        """Return for each hypothesis whether it is exact, and R@K of those with true triplets."""
        found: dict[str, list[float]] = {name: [] for name in self.validation_metrics}
        rows = zip(self.triplets_of_best(sample, hypotheses), sample["graphs"], sample["where"], strict=True)
        for predicted, column, where in rows:
            true = read_triplets(column, where)
            found["score"].append(float(predicted is not None and is_exact(predicted, true)))
            for name, recall in zip(("r_5", "r_10"), recalls(predicted or [], true, RANKS), strict=True):
                found[name] += [recall] if true else []
        return found

    def written_targets(self, sample: dict[str, Any], hypotheses: Hypotheses) -> list[str | None]:
        """Return the best graphs as columns of triplets, in pixels of the original images."""
        written: list[str | None] = []
        rows = zip(self.triplets_of_best(sample, hypotheses), self.sizes_of_images(sample), strict=True)
        for triplets, size in rows:
            try:
                written.append(None if triplets is None else write_triplets(_clipped(triplets, size)))
            except ValueError:  # an empty box, or triplets that differ by less than the column can tell
                written.append(None)
        return written


def _clipped(triplets: Sequence[Triplet], size: tuple[int, int]) -> list[Triplet]:
    """Return triplets with edges moved into an image of some width and height."""

    def clipped(instance: Instance) -> Instance:
        x0, y0, x1, y1 = (min(max(edge, 0.0), most) for edge, most in zip(instance.box, size * 2, strict=True))
        return instance._replace(box=(x0, y0, x1, y1))

    return [Triplet(clipped(one.subject), one.relation, clipped(one.object)) for one in triplets]
