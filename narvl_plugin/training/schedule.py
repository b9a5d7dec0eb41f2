"""The learning-rate schedule `polynomial_decay_ratio`: fairseq's `polynomial_decay` with a warm-up ratio.

It has its own name because fairseq-hydra-train checks the options of `polynomial_decay` before it imports any plugin.
"""

import math
from dataclasses import dataclass, field
from typing import Optional

from fairseq.data.iterators import EpochBatchIterator
from fairseq.optim import FairseqOptimizer
from fairseq.optim.lr_scheduler import register_lr_scheduler
from fairseq.optim.lr_scheduler.polynomial_decay_schedule import (
    PolynomialDecayLRSchedule,
    PolynomialDecayLRScheduleConfig,
)
from fairseq.trainer import Trainer
from omegaconf import II

from narvl_plugin.data.dataset import TOKENS_PER_ROW
from narvl_plugin.errors import InputError


@dataclass
class WarmupRatioConfig(PolynomialDecayLRScheduleConfig):
    """Options of `polynomial_decay_ratio`: fairseq's, and a warm-up ratio with OFA's name."""

    warmup_ratio: float = field(
        default=0.0,
        metadata={"help": "share of --total-num-update over which the learning rate rises; or give --warmup-updates"},
    )
    total_num_update: Optional[float] = field(
        default=II("optimization.max_update"),
        metadata={
            "help": "number of updates after which the learning rate reaches its end; by default --max-update, or "
            "without it the updates of --max-epoch"
        },
    )


@register_lr_scheduler("polynomial_decay_ratio", dataclass=WarmupRatioConfig)
class WarmupRatioSchedule(PolynomialDecayLRSchedule):
    """Linear warm-up over a number or a share of all updates, then polynomial decay over the rest.

    Checkpoints store nothing of it. The options determine the rates, so a resumed training has the same rates.

    Raises:
        InputError: if the share is outside [0, 1), or given together with a number of updates.
    """

    def __init__(self, cfg: WarmupRatioConfig, optimizer: FairseqOptimizer) -> None:
        self.warmup_ratio = float(cfg.warmup_ratio)
        if not 0 <= self.warmup_ratio < 1:
            raise InputError(f"--warmup-ratio {self.warmup_ratio}: expected a share of all updates, from 0 to below 1")
        if self.warmup_ratio and cfg.warmup_updates:
            raise InputError(
                f"--warmup-ratio {self.warmup_ratio} and --warmup-updates {cfg.warmup_updates} both say how long the "
                "warm-up is; give one"
            )
        self.is_planned = bool(cfg.total_num_update)
        if not self.is_planned:
            cfg.total_num_update = math.inf  # until `plan`
        super().__init__(cfg, optimizer)
        if cfg.total_num_update is not None and self.is_planned:
            self.plan(cfg.total_num_update)

    def plan(self, total_num_update: float) -> None:
        """Set the number of updates of the schedule."""
        self.is_planned = True
        self.total_num_update = total_num_update
        if self.warmup_ratio:
            self.cfg.warmup_updates = round(self.warmup_ratio * total_num_update)

    def step_begin_epoch(self, epoch: int) -> float:
        """Return the rate at the start of an epoch; raise InputError if the number of updates is unknown."""
        if not self.is_planned:
            raise InputError(
                "--lr-scheduler polynomial_decay_ratio: the number of updates is unknown; give --max-update, "
                "--total-num-update or --max-epoch"
            )
        return float(super().step_begin_epoch(epoch))


def planned_updates(trainer: Trainer, iterator: EpochBatchIterator) -> int:
    """Return the number of updates by --max-update, or else by --max-epoch; 0 without both.

    If epochs read different files, `rows_in_epoch` of the task returns the number of rows of each.

    Args:
        trainer: the trainer, with its configuration and task.
        iterator: the iterator of an epoch's batches.
    """
    cfg = trainer.cfg
    if cfg.optimization.max_update:
        return int(cfg.optimization.max_update)
    frequencies = list(cfg.optimization.update_freq)
    limits = (cfg.dataset.batch_size, (cfg.dataset.max_tokens or 0) // TOKENS_PER_ROW)
    batch_size = min(limit for limit in limits if limit)

    def batches(epoch: int) -> int:
        """Return the number of batches of one process."""
        if not trainer.task.has_sharded_data("train"):
            return len(iterator)
        return math.ceil(math.ceil(trainer.task.rows_in_epoch(epoch) / batch_size) / iterator.num_shards)

    epochs = range(1, (cfg.optimization.max_epoch or 0) + 1)
    return sum(math.ceil(batches(epoch) / frequencies[min(epoch, len(frequencies)) - 1]) for epoch in epochs)
