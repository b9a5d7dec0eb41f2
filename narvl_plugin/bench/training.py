"""The cost of a student's training step, part by part, and its waiting time for batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from criterions.qctc import QueryCtcCriterion
from narvl_plugin.bench.floor import LABELS, PROMPT
from narvl_plugin.bench.loss import MEGABYTE
from narvl_plugin.bench.timing import use_threads
from narvl_plugin.ctc import query_ctc_loss
from narvl_plugin.devices import move_batch, wait_for
from narvl_plugin.errors import InputError
from narvl_plugin.importing import leaving_logging_alone
from narvl_plugin.models.registered import build
from narvl_plugin.models.vision import STRIDE
from narvl_plugin.tasks import TASKS

with leaving_logging_alone():
    from fairseq.optim import FairseqOptimizer, build_optimizer
    from fairseq.tasks import TASK_DATACLASS_REGISTRY, TASK_REGISTRY

EMBEDDED_LABELS = 1_000
"""Number of labels of nano, which uses the vocabularies of the embedded data."""
TARGET = 10
"""Number of tokens of a target."""
QUERIES = 20
CLIP_NORM = 1.0
OPTIMIZERS = ("adam", "fused_adam")
WORKERS = 1


@dataclass(frozen=True)
class StepCost:
    """The median times of the parts of a step, in ms, and the memory it keeps for the backward pass.

    Attributes:
        forward: the forward pass.
        loss: the loss.
        backward: the backward pass.
        optimizer: clearing the old gradients, clipping and updating.
        kept_mb: the memory kept for the backward pass beside the weights, in MiB.
        batch: the number of samples.
    """

    forward: float
    loss: float
    backward: float
    optimizer: float
    kept_mb: float
    batch: int

    @property
    def parts(self) -> dict[str, float]:
        """The parts by name, in their order."""
        return {name: getattr(self, name) for name in ("forward", "loss", "backward", "optimizer")}

    @property
    def ms(self) -> float:
        """The time of the whole step."""
        return sum(self.parts.values())

    @property
    def samples_per_second(self) -> float:
        """The training speed in samples a second."""
        return 1000 * self.batch / self.ms


class TrainingStep:
    """A student with random weights, a synthetic batch in memory, and a fairseq optimizer.

    Args:
        size: the size of the student, such as ``base``.
        side: the side of the images in pixels.
        batch: the number of samples.
        features: whether the inputs are the backbone's features, as ``narvl features`` writes them.
        optimizer: its name in fairseq.
        checkpoint_activations: the model's option.
        bfloat16: whether to autocast the forward pass and the loss.
        device: the device of the model and the batch.
    """

    def __init__(
        self,
        size: str,
        *,
        side: int,
        batch: int,
        features: bool = False,
        optimizer: str = "adam",
        checkpoint_activations: bool = False,
        bfloat16: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        torch.manual_seed(1)
        labels = EMBEDDED_LABELS if size == "nano" else LABELS
        student = build(
            f"narvl_{size}",
            vocab_size=labels,
            num_queries=QUERIES,
            vision_pretrained=False,
            checkpoint_activations=checkpoint_activations,
        )
        self.student: Any = student.to(device).train()
        self.optimizer = _optimizer(optimizer, self.student)
        self.device = torch.device(device)
        self.autocast = torch.autocast(self.device.type, torch.bfloat16) if bfloat16 else nullcontext()
        channels, scale = (self.student.encoder.embed_images.out_channels, STRIDE) if features else (3, 1)
        self._image = (channels, -(-side // scale), -(-side // scale))
        self._labels = labels
        self.draw(batch)

    def draw(self, batch: int) -> None:
        """Draw another batch of a number of samples."""
        self.inputs = {
            "src_tokens": torch.randint(4, self._labels - 1, (batch, PROMPT), device=self.device),
            "patch_images": torch.randn(batch, *self._image, device=self.device),
            "patch_masks": torch.ones(batch, dtype=torch.bool, device=self.device),
        }
        self.targets = torch.randint(4, self._labels - 1, (batch, TARGET), device=self.device)
        self.target_lengths = torch.full((batch,), TARGET, device=self.device)

    def __call__(self) -> tuple[float, ...]:
        """Take a step and return the times of its parts, in ms."""
        times = [self._now()]
        logits = self.forward()
        times.append(self._now())
        with self.autocast:
            loss = query_ctc_loss(logits, self.targets, self.target_lengths, blank=self.student.blank, checked=True)
        times.append(self._now())
        loss.backward()
        times.append(self._now())
        _update(self.optimizer)
        times.append(self._now())
        return tuple(1000 * (end - start) for start, end in pairwise(times))

    def forward(self) -> Tensor:
        """Return the logits."""
        with self.autocast:
            logits: Tensor = self.student(**self.inputs)[0]
        return logits

    def _now(self) -> float:
        wait_for(self.device)
        return time.perf_counter()


def kept_bytes(model: nn.Module, run: Callable[[], object]) -> int:
    """Return the memory that a call keeps for a backward pass beside a model's weights, in bytes."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = run()  # kept alive, because freed memory could be reused and counted once
    del result
    return sum(kept.values())


def step_costs(steps: Mapping[str, TrainingStep], *, repeats: int, threads: int) -> dict[str, StepCost]:
    """Time training steps in turns; the first turn is a warm-up.

    Args:
        steps: the steps by name.
        repeats: the number of timed turns.
        threads: torch's threads.

    Returns:
        The costs by name.
    """
    times: dict[str, list[tuple[float, ...]]] = {name: [] for name in steps}
    with use_threads(threads):
        for turn in range(repeats + 1):
            for name, step in steps.items():
                measured = step()
                if turn:
                    times[name].append(measured)
        kept = {name: kept_bytes(step.student, step.forward) / MEGABYTE for name, step in steps.items()}
    costs = {}
    for name, step in steps.items():
        forward, loss, backward, optimizer = map(median, zip(*times[name], strict=True))
        costs[name] = StepCost(forward, loss, backward, optimizer, kept_mb=kept[name], batch=len(step.targets))
    return costs


@dataclass(frozen=True)
class Wait:
    """Mean times of a training step in ms.

    Attributes:
        wait: the time until the batch arrives.
        step: the time from then on.
        batches: the number of batches.
    """

    wait: float
    step: float
    batches: int

    @property
    def share(self) -> float:
        """The share of the time that is spent on waiting."""
        return self.wait / (self.wait + self.step)


def wait_for_batches(
    data: Path,
    *,
    task: str,
    bpe_dir: Path,
    size: str = "nano",
    side: int = 128,
    batch: int = 16,
    batches: int = 10,
    threads: int = 1,
    optimizer: str = "adam",
    workers: int = WORKERS,
    bfloat16: bool = False,
    device: torch.device | str = "cpu",
) -> Wait:
    """Train a student with random weights on a TSV file as fairseq does.

    The first batch is not counted, because its workers have to start. An epoch may end before `batches` more.

    Args:
        data: the TSV file.
        task: the name of the task.
        bpe_dir: the directory of the vocabulary.
        size: the size of the student.
        side: the side of the images in pixels.
        batch: the number of samples in a batch.
        batches: the number of batches to measure.
        threads: torch's threads.
        optimizer: its name in fairseq.
        workers: the number of processes that read.
        bfloat16: whether to autocast the steps.
        device: the device to train on.

    Returns:
        The mean times.

    Raises:
        InputError: for an unknown task and for a file of a single batch.
    """
    if task not in TASKS:
        raise InputError(f"--task {task}: choose one of {', '.join(TASKS)}")
    torch.manual_seed(1)
    options = TASK_DATACLASS_REGISTRY[task](data=str(data), bpe_dir=str(bpe_dir), patch_image_size=side)
    running: Any = TASK_REGISTRY[task].setup_task(options)
    running.load_dataset("train")
    student = build(
        f"narvl_{size}",
        vocab_size=len(running.target_dictionary) + 1,
        num_queries=QUERIES,
        vision_pretrained=False,
    )
    student = student.to(device).train()
    criterion = QueryCtcCriterion(running, sentence_avg=False, keep_eos=False, label_smoothing=0.0)
    updating = _optimizer(optimizer, student)
    epoch = running.get_batch_iterator(
        running.dataset("train"), max_sentences=batch, num_workers=workers, data_buffer_size=10
    ).next_epoch_itr()
    waits, steps = [], []
    with use_threads(threads):
        for turn in range(min(batches + 1, len(epoch))):
            asked = time.perf_counter()
            sample = next(epoch)
            given = time.perf_counter()
            sample = move_batch(sample, device)
            with torch.autocast(student.encoder.embed_tokens.weight.device.type, torch.bfloat16, enabled=bfloat16):
                running.train_step(sample, student, criterion, updating, turn)
            _update(updating)
            wait_for(device)
            waits.append(1000 * (given - asked))
            steps.append(1000 * (time.perf_counter() - given))
    if len(waits) < 2:
        raise InputError(f"{data}: has a single batch; give more rows or a smaller --batch")
    count = len(waits) - 1
    return Wait(sum(waits[1:]) / count, sum(steps[1:]) / count, count)


def _optimizer(name: str, model: nn.Module) -> FairseqOptimizer:
    """Build a fairseq optimizer with its options for fine-tuning."""
    options = {"_name": name, "lr": [1e-5], "adam_betas": "(0.9, 0.999)", "adam_eps": 1e-8, "weight_decay": 0.01}
    unused = {"use_old_adam": False, "fp16_adam_stats": False, "tpu": False}
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return build_optimizer(OmegaConf.create({**options, **unused}), weights)


def _update(optimizer: FairseqOptimizer) -> None:
    """Clip the gradients, update and clear the gradients, as fairseq's trainer does."""
    optimizer.clip_grad_norm(CLIP_NORM)
    optimizer.step()
    optimizer.zero_grad()


def table(costs: Mapping[str, StepCost]) -> str:
    """Format times and shares of the parts, samples a second, and their ratio to the first step's."""
    first = next(iter(costs.values()))
    lines = []
    for name, cost in costs.items():
        parts = ", ".join(f"{part} {ms:.1f} ms ({ms / cost.ms:.1%})" for part, ms in cost.parts.items())
        lines.append(f"{name}: {parts}")
        lines.append(
            f"{name}: {cost.ms:.1f} ms a step, {cost.samples_per_second:.2f} samples/s "
            f"({cost.samples_per_second / first.samples_per_second:.3f} of {next(iter(costs))}), "
            f"{cost.kept_mb:.0f} MiB kept for the backward pass"
        )
    return "\n".join(lines)
