"""The task `multitask`: one model for several tasks, each with its own files, options and queries."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from omegaconf import MISSING, OmegaConf

from narvl_plugin.data.mixture import Mixture, rows_drawn
from narvl_plugin.data.survey import Survey
from narvl_plugin.errors import InputError
from narvl_plugin.importing import leaving_logging_alone
from narvl_plugin.models.ofa import OfaModel
from narvl_plugin.tasks.common import CommonConfig
from narvl_plugin.tasks.members import read_members
from narvl_plugin.tasks.trained import Step, TrainedSingleTask, TrainedTask

with leaving_logging_alone():
    from fairseq.criterions import FairseqCriterion
    from fairseq.dataclass import FairseqDataclass
    from fairseq.logging import metrics
    from fairseq.tasks import TASK_REGISTRY


@dataclass
class MultitaskConfig(CommonConfig):
    """Options of the task `multitask`. A file holds the options of its members."""

    data: str = field(
        default=MISSING,
        metadata={
            "help": "YAML file of the members: NAME: and below it the options of a task (data, selected_cols, ...), "
            "num_queries, and, if need be, weight (passes over its training file in an epoch, 1) and task (NAME)"
        },
    )


class MultitaskTask(TrainedTask):
    """Trains on a mixture of single tasks, its members, and validates each member with its own scores.

    A batch belongs to one member. A student predicts it with the queries of that member. Training and validation log
    the values of each member's own task after its name: `refcoco_loss`, `refcoco_score`. Checkpoints hold the members'
    options as `task_state.members`. Generation uses the single task.
    """

    cfg: MultitaskConfig

    def __init__(self, cfg: MultitaskConfig, **kwargs: Any) -> None:
        super().__init__(cfg, **kwargs)
        self.members = {member.name: member for member in read_members(cfg.data, cfg)}
        self.tasks: dict[str, TrainedSingleTask] = {}
        self._answering: TrainedSingleTask | None = None
        for name, member in self.members.items():
            task_class = TASK_REGISTRY[member.options._name]
            with self._blaming(name):
                self.tasks[name] = task_class(member.options, codec=self.codec, skip_budget=self.skip_budget)
            self.tasks[name].score_prefix = f"{name}_"

    @contextmanager
    def _blaming(self, name: str) -> Iterator[None]:
        """Add the member's name to errors about its options."""
        try:
            yield
        except InputError as error:
            raise InputError(f"{self.cfg.data}: member {name}: {error}") from error

    @property
    def task_names(self) -> tuple[str, ...]:
        """Return the names of the members' tasks."""
        return tuple(str(member.options._name) for member in self.members.values())

    @property
    def scores_outputs(self) -> bool:
        """Return whether the member whose batch is trained on scores outputs; between batches, whether any does."""
        tasks = [self._answering] if self._answering else list(self.tasks.values())
        return any(task.scores_outputs for task in tasks)

    def output_scores(
        self, outputs: torch.Tensor, lengths: torch.Tensor, targets: torch.Tensor, target_lengths: torch.Tensor
    ) -> torch.Tensor:
        """Return the scores by the member whose batch is trained on, see the base class."""
        assert self._answering is not None
        return self._answering.output_scores(outputs, lengths, targets, target_lengths)

    @contextmanager
    def _answers(self, member: str) -> Iterator[TrainedSingleTask]:
        """Let a member score the outputs meanwhile."""
        self._answering = self.tasks[member]
        try:
            yield self._answering
        finally:
            self._answering = None

    def state_dict(self) -> dict[str, Any]:
        """Return the task's part of a checkpoint: the options of each member, as plain values."""
        options = {name: member.options for name, member in self.members.items()}
        return {"members": {name: OmegaConf.to_container(cfg, enum_to_str=True) for name, cfg in options.items()}}

    def has_sharded_data(self, split: str) -> bool:
        """Return whether epochs read different files of a member."""
        return any(task.has_sharded_data(split) for task in self.tasks.values())

    def rows_in_epoch(self, epoch: int) -> int:
        """Return the number of rows that are drawn in an epoch."""
        rows = {name: task.rows_in_epoch(epoch) for name, task in self.tasks.items()}
        return sum(rows_drawn(count, self.members[name].weight) for name, count in rows.items())

    def load_dataset(self, split: str, combine: bool = False, epoch: int = 1, **kwargs: Any) -> None:
        """Load a split of all members. Training draws rows by the members' weights; other splits are read once."""
        for task in self.tasks.values():
            task.load_dataset(split, combine, epoch, **kwargs)
        weights = {name: member.weight if split == "train" else 1.0 for name, member in self.members.items()}
        self.datasets[split] = Mixture({name: task.datasets[split] for name, task in self.tasks.items()}, weights)

    def build_model(self, cfg: FairseqDataclass, from_checkpoint: bool = False) -> OfaModel:
        """Return the model. A student gets the queries of all members, in their order.

        Raises:
            InputError: if a student from a checkpoint was trained with other queries.
        """
        if hasattr(cfg, "num_queries"):
            queries = ",".join(f"{member.name}:{member.num_queries}" for member in self.members.values())
            if from_checkpoint and cfg.member_queries != queries:
                raise InputError(
                    f"{self.cfg.data}: its members need queries {queries}, but the student was trained with "
                    f"{cfg.member_queries or cfg.num_queries}; give the members of its training"
                )
            # In place, so that checkpoints store it in their configuration.
            cfg.member_queries = queries
            cfg.num_queries = sum(member.num_queries for member in self.members.values())
        model = super().build_model(cfg, from_checkpoint)
        for name, task in self.tasks.items():
            with self._blaming(name):
                task.prepare_validation(model)
        return model

    def build_generator(self, *args: Any, **kwargs: Any) -> Any:
        """Raise InputError: fairseq-generate needs the single task of one member."""
        tasks = {name: member.options._name for name, member in self.members.items()}
        choices = [f"--task {task}" + ("" if name == task else f" --member {name}") for name, task in tasks.items()]
        raise InputError(f"--task multitask only trains; to generate take {' or '.join(choices)} with its checkpoint")

    def survey_files(self, model: torch.nn.Module, epoch: int) -> list[Survey]:
        """Check the rows of all members' files that the training reads from an epoch up to `last_epoch`."""
        is_student = getattr(model, "is_student", False)
        return [
            found
            for name, task in self.tasks.items()
            for found in task.surveys(
                self.members[name].num_queries if is_student else None,
                self.keeps_eos,
                task.training_paths_of(epoch, self.last_epoch),
            )
        ]

    def train_step(
        self, sample: dict[str, Any], model: torch.nn.Module, criterion: FairseqCriterion, *args: Any, **kwargs: Any
    ) -> Step:
        """Train on a member's batch; return loss, sample size and logged values."""
        addressed = with_queries(sample, model)
        with self._answers(sample["member"]):
            loss, sample_size, logged = super().train_step(addressed, model, criterion, *args, **kwargs)
        return loss, sample_size, self.by_member(sample["member"], logged)

    def valid_step(
        self,
        sample: dict[str, Any],
        model: torch.nn.Module,
        criterion: FairseqCriterion,
        ema_model: torch.nn.Module | None = None,
    ) -> Step:
        """Validate a member's batch with its own task; return loss, sample size and logged values."""
        with self._answers(sample["member"]) as task:
            loss, sample_size, logged = task.valid_step(with_queries(sample, model), model, criterion, ema_model)
        return loss, sample_size, self.by_member(sample["member"], logged)

    def by_member(self, name: str, logged: dict[str, Any]) -> dict[str, Any]:
        """Add a step's loss and sample size under the name of its member, and zeros for all others.

        fairseq sums the logged values of all processes by position, without names. So all processes must log the same
        values in the same order, with tensors on the same device.
        """
        parts: dict[str, Any] = {}
        for other, task in self.tasks.items():
            own = other == name
            parts[f"_{other}_loss"] = logged["loss"] if own else torch.zeros_like(logged["loss"])
            parts[f"_{other}_sample_size"] = logged["sample_size"] if own else 0
            for metric in task.validation_metrics:
                for key in (f"_{other}_{metric}_sum", f"_{other}_{metric}_count"):
                    parts[key] = logged.get(key, 0)
        return {key: value for key, value in logged.items() if key not in parts} | parts

    def reduce_metrics(self, logging_outputs: list[dict[str, Any]], criterion: FairseqCriterion) -> None:
        """Log the criterion's metrics of all batches, and the loss (in bits) and scores of each member."""
        super().reduce_metrics(logging_outputs, criterion)
        for name, task in self.tasks.items():
            sample_size = sum(log.get(f"_{name}_sample_size", 0) for log in logging_outputs)
            if sample_size > 0:
                loss = sum(log[f"_{name}_loss"] for log in logging_outputs)
                metrics.log_scalar(f"{name}_loss", loss / sample_size / math.log(2), sample_size, round=3)
            task.log_scores(logging_outputs)


def with_queries(sample: dict[str, Any], model: torch.nn.Module) -> dict[str, Any]:
    """Return a member's batch; for a student, it names the member whose queries to use."""
    if not getattr(model, "is_student", False):
        return sample
    return sample | {"net_input": sample["net_input"] | {"queries": sample["member"]}}
