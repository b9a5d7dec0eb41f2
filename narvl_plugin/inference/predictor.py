"""A checkpoint that answers rows of a TSV file, and the ways in which teachers and students are asked."""

from collections.abc import Mapping, Sequence
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from fairseq.dataclass.configs import FairseqConfig
from fairseq.models import BaseFairseqModel

from narvl_plugin.devices import move_batch
from narvl_plugin.errors import InputError
from narvl_plugin.generation.options import generation_config
from narvl_plugin.tasks import loading
from narvl_plugin.tasks.answers import AnswerTask
from narvl_plugin.tasks.base import BaseTask

SPLIT = "test"


class Predictor:
    """A checkpoint that turns rows of one TSV file into text, as fairseq-generate does.

    Attributes:
        model: teacher or student, in evaluation mode.
        task: the task it was trained on.
        generation: generation options by name: those of --eval-args, which it was validated with, and those given.
    """

    def __init__(
        self, model: BaseFairseqModel, task: BaseTask, generation: Mapping[str, Any], device: torch.device
    ) -> None:
        self.model = model
        self.task = task
        self.generation = {**vars(task.generator_options()), **generation}
        self.device = device

    @classmethod
    def load(
        cls,
        checkpoint: Path,
        data: Path,
        *,
        task_overrides: Mapping[str, Any] | None = None,
        role: Literal["teacher", "student"] | None = None,
        device: torch.device | str = "cpu",
    ) -> "Predictor":
        """Load a checkpoint and open a TSV file as its test split.

        Args:
            checkpoint: a file of fairseq-train, teacher or student.
            data: the TSV file.
            task_overrides: task options that differ from the checkpoint's, such as ``{"bpe_dir": "vocab"}``.
            role: which kind of model it must be; None takes either.
            device: where to run.

        Raises:
            MissingInput, InputError: when the checkpoint, its vocabulary or the file cannot be used.
        """
        overrides = {**(task_overrides or {}), "data": str(data)}
        (model,), task, _ = loading.load(checkpoint, task_overrides=overrides, role=role, device=device)
        task.load_dataset(SPLIT)
        model.prepare_for_inference_(FairseqConfig())
        return cls(model, task, {}, torch.device(device))

    def with_options(self, task_options: Mapping[str, Any], **generation: Any) -> "Predictor":
        """Give the same model and data with other options of the task and of generation."""
        task = copy(self.task)
        task.cfg = copy(self.task.cfg)
        for name, value in task_options.items():
            setattr(task.cfg, name, value)
        return Predictor(self.model, task, generation, self.device)

    @cached_property
    def generator(self) -> Any:
        """Make the generator; here, since not every way to generate goes with every checkpoint."""
        return self.task.build_generator([self.model], generation_config(self.generation))

    def batch(self, *rows: int) -> dict[str, Any]:
        """Read one row (from 0) or some, and make a batch of them alone.

        Raises:
            BadRow: when the row cannot be used.
            InputError: when the task skips it.
        """
        dataset = self.task.dataset(SPLIT)
        batch = dataset.collater([dataset[row] for row in rows])
        if not batch:
            raise InputError(f"row {rows[0] + 1} of the test file is bad; leave it out")
        return move_batch(batch, self.device)

    @torch.inference_mode()
    def __call__(self, row: int) -> str:
        """Answer one row: read, decode and resize its picture, run the model, search, write the words."""
        return self.say([row])[0]

    @torch.inference_mode()
    def say(self, rows: Sequence[int]) -> list[str]:
        """Answer some rows in one batch."""
        return [self.task.codec.decode(beam[0]["tokens"]) for beam in self.hypotheses_of(rows)]

    @torch.inference_mode()
    def hypotheses_of(self, rows: Sequence[int]) -> list[list[dict[str, Any]]]:
        """Answer some rows in one batch: the hypotheses of each, best first, in fairseq's form."""
        found: list[list[dict[str, Any]]] = self.task.inference_step(self.generator, [self.model], self.batch(*rows))
        return found

    def hypotheses(self, batch: dict[str, Any]) -> list[dict[str, Any]]:
        """Answer the one row of a batch: its hypotheses, best first, in fairseq's form."""
        (found,) = self.task.inference_step(self.generator, [self.model], batch)
        return found

    def label_text(self, label: int) -> str:
        """Write one output label; special symbols, which are no words, by their name."""
        return self.task.codec.decode([label]) or self.task.target_dictionary[label]


class Search(NamedTuple):
    """A way to ask a teacher: options of generation and of its task."""

    generation: dict[str, Any]
    task_options: dict[str, Any]


def searching(task: BaseTask) -> dict[str, Any]:
    """Return the task's options with which outputs are searched for, where all answers could be scored instead."""
    return {"val_inference_type": "beamsearch"} if isinstance(task, AnswerTask) else {}


def teacher_searches(task: BaseTask) -> dict[str, Search]:
    """Return how teachers of a task are asked, by name of the system, the usual way first.

    Answers of a closed list are scored one and all, or searched for; captions and boxes are searched for.
    """
    searches = {}
    if isinstance(task, AnswerTask) and task.trie is not None:
        searches["teacher_allcand"] = Search({"beam": 1}, {"val_inference_type": "allcand"})
    if not (isinstance(task, AnswerTask) and str(task.cfg.prompt_type) == "src"):  # no beam search can start from src
        searches["teacher_beam5"] = Search({"beam": 5}, searching(task))
        searches["teacher_greedy"] = Search({"beam": 1}, searching(task))
    return searches


def student_searches(task: BaseTask) -> dict[str, Search]:
    """Return how a student is asked, by name of the system."""
    searches = {
        "student_greedy": Search({"beam": 1}, searching(task)),
        "student_beam5": Search({"beam": 5}, searching(task)),
    }
    if isinstance(task, AnswerTask) and task.trie is not None:
        searches["student_allcand"] = Search({"beam": 1}, {"val_inference_type": "allcand"})
    return searches
