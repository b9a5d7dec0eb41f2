"""fairseq's trainer with what trainings of our tasks need: stand-in batches, averaged weights, planned schedules."""

from __future__ import annotations

import logging
import math
import os
from typing import Any

from fairseq import trainer
from fairseq.file_io import PathManager

from narvl_plugin.checkpoints.reading import existing, read_checkpoint
from narvl_plugin.compat.programs import namespaces_of
from narvl_plugin.data.dataset import STAND_IN, check_limits
from narvl_plugin.data.for_fairseq import FairseqRows
from narvl_plugin.errors import InputError
from narvl_plugin.training.ema import build_ema
from narvl_plugin.training.resuming import check_resumed
from narvl_plugin.training.schedule import WarmupRatioSchedule, planned_updates

logger = logging.getLogger(__name__)


class NarvlTrainer(trainer.Trainer):
    """fairseq's trainer, which for datasets of other plugins and of fairseq does what it does without this class.

    `stand_in` is a training batch that counts nothing, for a process that has no batch for the last update of an epoch.
    """

    stand_in: dict[str, Any] | None = None

    def get_train_iterator(self, *args: Any, **kwargs: Any) -> Any:
        """Return the iterator of an epoch's batches, and tell task and schedule how long the training is.

        Raises InputError for limits of validation's batches that leave no room for a row: before the first update,
        where fairseq would find out after an epoch of training.
        """
        self.task.last_epoch = self.cfg.optimization.max_epoch or math.inf
        iterator = super().get_train_iterator(*args, **kwargs)
        is_ours = isinstance(getattr(iterator, "dataset", None), FairseqRows)
        limits = self.cfg.dataset
        if is_ours and not limits.disable_validation:
            check_limits(limits.max_tokens_valid, limits.batch_size_valid, "-valid")
        self.stand_in = self._dummy_batch | {STAND_IN: True} if is_ours else None
        schedule = self.lr_scheduler
        if isinstance(schedule, WarmupRatioSchedule) and not schedule.is_planned:
            updates = planned_updates(self, iterator)
            if updates:
                schedule.plan(updates)
        return iterator

    def train_step(self, samples: list[Any], raise_oom: bool = False) -> Any:
        """Update the weights by some batches; an empty one is replaced by `stand_in`.

        fairseq would forget the sample size of the first of two batches with that of an empty second, while the first
        one's gradient counts. After a validation it would train, for the empty one, on a batch of that.
        """
        if self.stand_in is not None:
            samples = [sample or self.stand_in for sample in samples]
        return super().train_step(samples, raise_oom)

    def load_checkpoint(
        self,
        filename: str,
        reset_optimizer: bool = False,
        reset_lr_scheduler: bool = False,
        optimizer_overrides: dict[str, Any] | None = None,
        reset_meters: bool = False,
    ) -> dict[str, Any] | None:
        """Load a checkpoint; averaged weights go on where the optimizer does, and start anew where it does.

        fairseq raises KeyError('model') for a checkpoint without averaged weights, and takes a teacher's for those of
        the student that starts from it.

        Raises InputError where the training began with another model, criterion, optimizer or schedule (fairseq would
        stop at the first update, in an error about sizes of tensors), and for a folder (it would start anew).
        """
        if os.path.isdir(filename):
            existing(filename)
        if not reset_optimizer and PathManager.isfile(filename):
            state = read_checkpoint(PathManager.get_local_path(filename))
            check_resumed(filename, state, self.cfg, reset_lr_scheduler)
        resets = (reset_optimizer, reset_lr_scheduler, optimizer_overrides, reset_meters)
        ema = self.cfg.ema
        store_ema, ema.store_ema = ema.store_ema, False  # or fairseq would restore it in its way
        try:
            extra_state: dict[str, Any] | None = super().load_checkpoint(filename, *resets)
        except AssertionError as error:  # of an optimizer with --fp16 and one without, both of which it names
            raise InputError(f"{filename}: {error}") from error
        finally:
            ema.store_ema = store_ema
        if store_ema and extra_state and "ema" in extra_state and not reset_optimizer:
            self.ema.restore(extra_state["ema"])
            if ema.ema_fp32:
                self.ema.build_fp32_params(extra_state.get("ema_fp32_params"))
        return extra_state

    def _build_ema(self) -> None:
        """Build the averaged model of --store-ema as `AveragedModel`."""
        if self.cfg.ema.store_ema:
            self._ema = build_ema(self._model, self.cfg.ema, self.device)
            logger.info("the averaged weights of --store-ema start from the model's")


def use_trainer() -> None:
    """Put `NarvlTrainer` in the place of fairseq's trainer, also where the program that trains has imported that one.

    A program that imports it later takes the name from `fairseq.trainer`.
    """
    for names in (vars(trainer), *namespaces_of("fairseq_cli.train")):
        names["Trainer"] = NarvlTrainer
