"""The common parts of single tasks and of a mixture of tasks: options, vocabulary, skip budget."""

from dataclasses import dataclass, field
from enum import StrEnum
from itertools import chain
from random import Random
from typing import Any, Optional

import torch
from omegaconf import MISSING, DictConfig, OmegaConf

from narvl_plugin.ctc import Automaton, set_of
from narvl_plugin.data.text import TextCodec, load_codec
from narvl_plugin.data.vocabulary import Vocabulary
from narvl_plugin.errors import InputError, SkipBudget
from narvl_plugin.models.interop import Use
from narvl_plugin.tasks.registry import TASKS

REQUIRED = {
    "data": ("the data argument", "the files to read"),
    "bpe_dir": ("--bpe-dir", "the folder of the vocabulary"),
}
"""Options without a default: the name in errors, and the value to give."""

MatmulPrecision = StrEnum("MatmulPrecision", ["highest", "high", "medium"])


@dataclass
class CommonConfig:
    """Options of every task, including the mixture of tasks."""

    _name: Optional[str] = None
    """fairseq's name of the task."""

    bpe_dir: str = field(
        default=MISSING,
        metadata={
            "help": "folder with spm.model, with dict.txt of the published checkpoints (GPT-2 BPE), or with vocab.json "
            "and merges.txt of their ports"
        },
    )
    num_bins: int = field(default=1000, metadata={"help": "number of <bin_k> symbols, for coordinates"})
    matmul_precision: MatmulPrecision = field(
        default=MatmulPrecision.highest,
        metadata={
            "help": "precision of float32 matrix products in training, as in "
            "torch.set_float32_matmul_precision; medium multiplies in bfloat16, on processors that have it"
        },
    )
    ema_eval: bool = field(
        default=False,
        metadata={
            "help": "generate with the averaged weights of a training with --store-ema (which validates with them)"
        },
    )
    skip_bad_rows: int = field(
        default=0,
        metadata={"help": "number of different bad rows to skip with a warning; one more is an error"},
    )
    allow_transfer: bool = field(
        default=False,
        metadata={
            "help": "start training (--finetune-from-model, --restore-file) from a checkpoint of another task or with "
            "another vocabulary; labels of both vocabularies are then matched by their numbers"
        },
    )


class CommonTask:
    """Base class of single tasks and of the mixture of tasks.

    Attributes:
        codec: converts text to tokens and back.
        skip_budget: counts bad rows; criterions use it, too.
    """

    cfg: CommonConfig

    def __init__(
        self, cfg: CommonConfig, *, codec: TextCodec | None = None, skip_budget: SkipBudget | None = None
    ) -> None:
        self.cfg = cfg
        self.datasets: dict[str, Any] = {}
        for name, (shown, what) in REQUIRED.items():
            missing = OmegaConf.is_missing(cfg, name) if isinstance(cfg, DictConfig) else getattr(cfg, name) == MISSING
            if missing or not getattr(cfg, name):
                raise InputError(f"{shown} is not given (task.{name} in a configuration); give {what}")
        self.codec: TextCodec = codec or load_codec(cfg.bpe_dir, cfg.num_bins)
        self.skip_budget = skip_budget or SkipBudget(cfg.skip_bad_rows)
        self.skip_budget.number_files(str(getattr(cfg, "data")).split(","))  # noqa: B009 - of every task, not of all

    def dataset(self, split: str) -> Any:
        """Return the data set of a split.

        Raises:
            KeyError: if the split is not loaded.
        """
        return self.datasets[split]

    @property
    def source_dictionary(self) -> Vocabulary:
        """Return the vocabulary; sources and targets share it, and it holds no blank."""
        return self.codec.dictionary

    @property
    def target_dictionary(self) -> Vocabulary:
        """Return the vocabulary; sources and targets share it, and it holds no blank."""
        return self.codec.dictionary

    @property
    def task_names(self) -> tuple[str, ...]:
        """Return the names of the tasks that a model of this task answers."""
        return (str(self.cfg._name),)

    def use_of(self, *, training: bool) -> Use:
        """Return the use of a model of this task. The origin of the model's weights must agree with it."""
        return Use(self.task_names, self.codec.checksum, training, self.cfg.allow_transfer, frozenset(TASKS))

    @property
    def scores_outputs(self) -> bool:
        """Return whether the task has `output_scores`."""
        return False

    def output_scores(
        self, outputs: torch.Tensor, lengths: torch.Tensor, targets: torch.Tensor, target_lengths: torch.Tensor
    ) -> torch.Tensor:
        """Return the scores of M outputs of each sample, given K targets any of which is correct.

        Training and confidence use these scores.

        Args:
            outputs: (B, M, T).
            lengths: (B, M).
            targets: (B, K, S).
            target_lengths: (B, K); -1 excludes a target.

        Returns:
            (B, M), from 0 to 1.

        Raises:
            NotImplementedError: if the task has no such score.
        """
        raise NotImplementedError(f"the task {self.cfg._name} has no score of outputs")

    def elements(self, tokens: list[int]) -> list[tuple[int, ...]]:
        """Return the elements of a target that is a set, in the target's order.

        Args:
            tokens: the target without `</s>`.

        Raises:
            InputError: if the task's targets are sequences.
        """
        raise InputError(f"--criterion qset: the targets of the task {self.cfg._name} are sequences; take qctc")

    def acceptor(self, tokens: list[int], window: int | None) -> Automaton:
        """Return the automaton of a target whose elements count in any order.

        Args:
            tokens: the target without `</s>`.
            window: restricts the orders, see `set_of`; None allows all.

        Raises:
            InputError: if the task's targets are sequences, or have no such restriction.
        """
        return set_of(self.elements(tokens), window=window)

    def in_random_order(self, tokens: list[int], draw: Random) -> list[int]:
        """Return a target with its elements in a random order.

        Raises:
            InputError: if the task's targets are sequences.
        """
        elements = self.elements(tokens)
        return list(chain(*draw.sample(elements, len(elements))))
