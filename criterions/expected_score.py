"""The expected score of a student's output as a loss, which several criterions add to their own.

Legend: B batch, N queries, V labels, K targets of a sample, T padded target length.
"""

from dataclasses import dataclass, field

from fairseq.tasks import FairseqTask
from torch import Tensor

from criterions.query_criterion import QueryCriterionConfig
from narvl_plugin.ctc import expected_output_score, outputs_of, sample_paths
from narvl_plugin.ctc.lattice import accumulation_dtype
from narvl_plugin.errors import InputError

PATHS_DRAWN = 16
"""Number of paths drawn of each sample to estimate the expected score of its output."""


@dataclass
class ScoredCriterionConfig(QueryCriterionConfig):
    """Options of a criterion that can learn the score of outputs."""

    score_weight: float = field(
        default=0.0,
        metadata={
            "help": "weight of 1 - the expected score of the output (of a box: the share with an IoU of at least "
            "0.5; of a caption: half of it CIDEr, and half whether all runs of four tokens occur in the training "
            "captions; of a set, graph or tree: whether it is right), in nats, estimated from paths drawn from the "
            "student; queries that mix two answers then settle on one of them (10 works well)"
        },
    )


def check_weights(**weights: float) -> None:
    """Check that no weight of a loss is negative.

    Args:
        **weights: the weights by the names of their options.

    Raises:
        ValueError: if a weight is negative.
    """
    for name, weight in weights.items():
        if weight < 0:
            raise ValueError(f"--{name.replace('_', '-')} {weight} must not be negative")


def check_scores(task: FairseqTask, score_weight: float) -> None:
    """Check that a task scores outputs, if a criterion is to learn their scores.

    Args:
        task: the task, or the mixture of tasks, of the training.
        score_weight: the weight of the score's loss.

    Raises:
        InputError: if it does not.
    """
    if score_weight and not task.scores_outputs:
        raise InputError(f"--score-weight: the task {', '.join(task.task_names)} has no score of outputs")


def score_losses(task: FairseqTask, logits: Tensor, targets: Tensor, target_lengths: Tensor, *, blank: int) -> Tensor:
    """Return 1 - the expected score of each sample's output, see `expected_output_score`.

    Samples of a member of a mixture that has no scores have no loss.

    Args:
        task: scores the outputs.
        logits: (B, N, V).
        targets: (B, K, T), right-padded.
        target_lengths: (B, K); -1 excludes a target.
        blank: the label of the blank.

    Returns:
        (B,).
    """
    if not task.scores_outputs:
        return logits.new_zeros(len(logits), dtype=accumulation_dtype(logits.dtype))
    outputs, lengths = outputs_of(sample_paths(logits, PATHS_DRAWN), blank=blank)
    scores = task.output_scores(outputs, lengths, targets, target_lengths)
    return 1 - expected_output_score(logits, outputs, lengths, scores, blank=blank)
