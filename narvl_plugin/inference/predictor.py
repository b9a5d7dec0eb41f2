"""Predictions of a checkpoint for rows of a TSV file, for image files with their texts, or for batches of tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from tqdm import tqdm

from narvl_plugin.data.any_image import AnyImageReader
from narvl_plugin.data.collate import Batch, Sample
from narvl_plugin.data.dataset import TsvDataset
from narvl_plugin.data.table import Table
from narvl_plugin.devices import move_batch
from narvl_plugin.errors import InputError
from narvl_plugin.generation.options import generation_config
from narvl_plugin.models.ofa import OfaModel
from narvl_plugin.tasks import loading
from narvl_plugin.tasks.base import BaseTask

SPLIT = "test"


class Predictor:
    """A model with its data. It predicts as fairseq-generate does.

    Attributes:
        model: the teacher or student, in evaluation mode.
        others: further models of an ensemble; a search averages the probabilities of all.
        task: the task that it was trained on.
        generation: generation options by name: those of --eval-args, replaced by those given.
        device: the device of the model.
    """

    def __init__(
        self,
        model: OfaModel,
        task: BaseTask,
        generation: Mapping[str, Any],
        device: torch.device,
        others: Sequence[OfaModel] = (),
    ) -> None:
        self.model = model
        self.others = others
        self.task = task
        self.generation = {**vars(task.generator_options()), **generation}
        self.device = device

    @classmethod
    def load(
        cls,
        checkpoint: Path | Sequence[Path],
        data: Path | None = None,
        *,
        task_overrides: Mapping[str, Any] | None = None,
        generation: Mapping[str, Any] | None = None,
        role: Literal["teacher", "student"] | None = None,
        optimised: bool = True,
        device: torch.device | str = "cpu",
    ) -> Predictor:
        """Load a checkpoint and open a TSV file as its test split.

        Args:
            checkpoint: a file of fairseq-train or a published one, teacher or student. Several form an ensemble.
            data: the TSV file; None to predict only image files and batches.
            task_overrides: task options that replace the checkpoint's, such as ``{"bpe_dir": "vocab"}``.
            generation: generation options that replace those of --eval-args; None counts as not given.
            role: the kind of model that is needed; None accepts both.
            optimised: whether to make the model faster; it changes the outputs by rounding.
            device: the device of the model.

        Raises:
            MissingInput, InputError: if the checkpoint, its vocabulary or the file cannot be used.
        """
        overrides = {**(task_overrides or {}), "data": "none" if data is None else str(data)}
        models, task, _ = loading.load(checkpoint, task_overrides=overrides, role=role, device=device)
        if data is not None:
            task.load_dataset(SPLIT)
        if optimised:
            alone = checkpoint if isinstance(checkpoint, Path) else None  # of an ensemble, no graph is used
            for model in models:
                model.optimize_for_inference(alone)
        given = {name: value for name, value in (generation or {}).items() if value is not None}
        return cls(models[0], task, given, torch.device(device), models[1:])

    def with_options(self, task_options: Mapping[str, Any], **generation: Any) -> Predictor:
        """Return the same model and data with other options of the task and of generation."""
        task = copy(self.task)
        task.cfg = copy(self.task.cfg)
        for name, value in task_options.items():
            setattr(task.cfg, name, value)
        return Predictor(self.model, task, generation, self.device, self.others)

    @cached_property
    def generator(self) -> Any:
        """Build the generator at first use, because some checkpoints do not support all options of generation."""
        return self.task.build_generator([self.model, *self.others], generation_config(self.generation))

    @property
    def dataset(self) -> TsvDataset:
        """The rows of the TSV file."""
        dataset: TsvDataset = self.task.dataset(SPLIT)
        return dataset

    def usable_rows(self) -> Iterator[int]:
        """Yield the numbers (from 0) of the usable rows. The task skips bad rows."""
        return (row for row in range(len(self.dataset)) if self.dataset[row] is not None)

    def samples(self, rows: Sequence[int]) -> dict[int, Sample]:
        """Read rows (from 0), without those that the task skips.

        Raises:
            BadRow: if a row cannot be used, and the skip budget is spent.
        """
        return {row: sample for row in rows if (sample := self.dataset[row]) is not None}

    def batch(self, *rows: int) -> Batch:
        """Read one or several rows (from 0) as a batch on the device.

        Raises:
            BadRow: if a row cannot be used, and the skip budget is spent.
            InputError: if the task skips all of them.
        """
        samples = self.samples(rows)
        if not samples:
            raise InputError(f"row {rows[0] + 1} of the test file is bad; leave it out")
        return self.collate(samples.values())

    def collate(self, samples: Any) -> Batch:
        """Return a batch of samples of the TSV file, on the device."""
        return self.moved(self.dataset.collater(list(samples)))

    def moved(self, batch: Batch) -> Batch:
        """Return a batch on the device."""
        return move_batch(batch, self.device)

    def batches(self, size: int) -> Iterator[Batch]:
        """Yield all usable rows in batches of at most `size`."""
        for start in tqdm(range(0, len(self.dataset), size), desc="answer", unit="batch", leave=False):
            samples = self.samples(range(start, min(start + size, len(self.dataset))))
            if samples:
                yield self.collate(samples.values())

    def images(self, images: Mapping[str, Any], texts: Mapping[str, Mapping[str, str]] | None = None) -> TsvDataset:
        """Return images as a data set of the task. They are seen as people see them.

        Args:
            images: paths, or any other images that `held` returns, by name.
            texts: the texts that the task reads beside the images, by column name and then by image name.
        """
        table: Any = Table(images, texts or {}, self.task.dataset_class)  # has the used attributes of a TsvFile
        dataset = self.task.build_dataset(table, SPLIT)
        options = self.task.options
        dataset.read_image = AnyImageReader(
            options.patch_image_size, imagenet_normalisation=options.imagenet_normalisation
        )
        return dataset

    @torch.inference_mode()
    def search(self, batch: Batch, model: nn.Module | None = None) -> list[list[dict[str, Any]]]:
        """Return the hypotheses of each sample of a batch, best first, in fairseq's form.

        Args:
            batch: the batch, on the device, see `collate`.
            model: replaces all models in this search, for example by known logits.
        """
        models = [self.model, *self.others] if model is None else [model]
        return self.task.inference_step(self.generator, models, batch)

    def hypotheses(self, batch: Batch) -> list[dict[str, Any]]:
        """Return the hypotheses of a batch of one row, best first, in fairseq's form."""
        (found,) = self.search(batch)
        return found

    def hypotheses_of(self, rows: Sequence[int]) -> list[list[dict[str, Any]]]:
        """Predict some rows in one batch; return the hypotheses of each, best first, in fairseq's form."""
        return self.search(self.batch(*rows))

    def predict(self, rows: Sequence[int]) -> list[str]:
        """Predict some rows in one batch; return the best text of each."""
        return [self.text(beam) for beam in self.hypotheses_of(rows)]

    def __call__(self, row: int) -> str:
        """Predict the text of one row: read, decode and resize its image, run the model, search, decode tokens."""
        return self.predict([row])[0]

    def text(self, beam: Sequence[Mapping[str, Any]]) -> str:
        """Return the text of the best of a sample's hypotheses."""
        return self.task.codec.decode(beam[0]["tokens"])

    def label_text(self, label: int) -> str:
        """Return the text of one output label, or the name of a special symbol."""
        return self.task.codec.decode([label]) or self.task.codec.dictionary[label]
