"""fairseq's trainer with additions for our tasks: stand-in batches, averaged weights, planned schedules."""

from __future__ import annotations

import logging
import math
import os
from typing import Any

from fairseq import trainer
from fairseq.file_io import PathManager

from narvl_plugin.checkpoints.finding import existing
from narvl_plugin.checkpoints.reading import read_checkpoint
from narvl_plugin.compat.programs import namespaces_of
from narvl_plugin.data.dataset import STAND_IN, check_limits
from narvl_plugin.data.for_fairseq import FairseqRows
from narvl_plugin.errors import InputError
from narvl_plugin.tasks.trained import TrainedTask
from narvl_plugin.training.ema import build_ema
from narvl_plugin.training.resuming import check_resumed
from narvl_plugin.training.schedule import WarmupRatioSchedule, planned_updates

logger = logging.getLogger(__name__)


class NarvlTrainer(trainer.Trainer):
    """fairseq's trainer with additions for our tasks. For other data sets, it behaves like fairseq's.

    Attributes:
        stand_in: a training batch of weight 0, for a process without a batch in the last update of an epoch.
    """

    stand_in: dict[str, Any] | None = None

    def __init__(self, cfg: Any, task: Any, *args: Any, **kwargs: Any) -> None:
        """Build the trainer. With pytorch_ddp, our models need no --find-unused-parameters.

        Some weights serve no text (those of OFA's images as codes), others only some tasks. They get no gradient, at
        which pytorch_ddp, fairseq's default, would stop in the second update.
        """
        if isinstance(task, TrainedTask):
            cfg.distributed_training.find_unused_parameters = True
        super().__init__(cfg, task, *args, **kwargs)

    def get_train_iterator(self, *args: Any, **kwargs: Any) -> Any:
        """Return the iterator of an epoch's batches, and set the length of the training in task and schedule.

        Raises:
            InputError: if the limits of validation batches leave no room for a row. fairseq would detect this only
                after an epoch of training.
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
        """Update the weights with some batches. `stand_in` replaces an empty batch.

        If the second of two batches is empty, fairseq would lose the sample size of the first, but not its gradient.
        After a validation, fairseq would replace the empty batch by a validation batch and train on it.
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
        """Load a checkpoint. Averaged weights resume if the optimizer does; else they start again.

        fairseq raises KeyError('model') for a checkpoint without averaged weights. It would also restore a teacher's
        averaged weights for a student that starts from the teacher.

        Raises:
            InputError: if the training began with another model, criterion, optimizer or schedule. fairseq would stop
                at the first update, with an error about sizes of tensors.
            MissingInput: if the file is a folder, and not of a port. fairseq would start a new training.
        """
        if os.path.isdir(filename):
            filename = str(existing(filename))  # of a port
        if not reset_optimizer and PathManager.isfile(filename):
            state = read_checkpoint(PathManager.get_local_path(filename))
            check_resumed(filename, state, self.cfg, reset_lr_scheduler)
        resets = (reset_optimizer, reset_lr_scheduler, optimizer_overrides, reset_meters)
        ema = self.cfg.ema
        store_ema, ema.store_ema = ema.store_ema, False  # else fairseq would restore it itself
        try:
            extra_state: dict[str, Any] | None = super().load_checkpoint(filename, *resets)
        except AssertionError as error:  # its text names optimizers with and without --fp16
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
            logger.info("the averaged weights of --store-ema start from the weights of the model")


def use_trainer() -> None:
    """Replace fairseq's trainer by `NarvlTrainer`, even if the training program has already imported it.

    A program that imports it later takes the name from `fairseq.trainer`.
    """
    for names in (vars(trainer), *namespaces_of("fairseq_cli.train")):
        names["Trainer"] = NarvlTrainer
