"""Plans of jobs that no machine at hand could run: from measured parts, counted work and published sizes.

A device takes at least the time of all FLOPs at the measured rate of a matrix product, and at most the measured time of
one image at a time. Times of the large size are derived from those of base by the ratio of their kernels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from measurements import Measurement

from narvl_plugin.bench.plan import Costs, Plan

RECIPE = Path(__file__).parents[2] / "run_scripts" / "config" / "recipe" / "caption.yaml"
IMAGES = 100_000_000
GPUS = (1, 8, 64, 512)
SHARD_ROWS = 1000
SHARDS = (100, 1000, 10_000, 100_000)
"""Rows of a shard, whose effects are compared."""
LINE = 100
"""Assumed bytes of a line: a name and a caption."""
TOKENS = 12
"""Assumed tokens of a caption."""
BEAM = 5
SAMPLES = 2
"""Samples of a training step, as in the recipe."""
DATA = {"COCO": "images of COCO's train and restval", "CC12M": "images of CC12M"}


@dataclass(frozen=True)
class Range:
    """Two ends of what is planned: the least time and the most."""

    least: Plan
    most: Plan


@dataclass(frozen=True)
class Training:
    """A student's training, in hours of one GPU."""

    data: str
    size: str
    epochs: int
    least: float
    most: float


class LargeJobs:
    """Everything that the page on large jobs shows.

    Args:
        data: all measurements.
    """

    def __init__(self, data: Mapping[str, Measurement]) -> None:
        self.data = data
        self.tokens = TOKENS
        self.tflops = data["floor_h200"].facts["tflops"]
        published = {row["fact"]: row["value"] for row in data["published"]}
        self.published = published
        self.image_bytes = 1e9 * published["GB of train2014.zip"] / published["images in train2014.zip"]
        gpu_hours = 24 * published["days of it"] * published["GPUs of the training whose failures are counted"]
        self.hours_between_failures = gpu_hours / published["unexpected failures in them"]
        found = re.search(r"max_epoch: (\d+)", RECIPE.read_text(encoding="utf-8"))
        assert found is not None, RECIPE
        self.epochs = int(found[1])

    @property
    def ray_ms(self) -> float:
        """What Ray adds to an image, in ms."""
        bulk = self.data["bulk"]
        return float(1000 / bulk["ray"]["images_s"] - 1000 / bulk["local"]["images_s"])

    def costs(self, device_ms: float) -> Costs:
        """Return the costs of an image of COCO's size, on Ray."""
        start = self.data["startup"]["narvl caption IMAGE"]["seconds"]
        core = self.data["reading"]["640 x 480"]["reading_ms"]
        return Costs(device_ms + self.ray_ms, core, self.image_bytes, LINE, start)

    @property
    def student_ms(self) -> tuple[float, float]:
        """The least and the most time of a base student for an image, without Ray."""
        measured = self.data["floor_h200"]
        return measured["floor"]["ms"], measured["optimised"]["ms"]

    def plan(self, ms: tuple[float, float], images: int, gpus: int, shard_rows: int = SHARD_ROWS) -> Range:
        """Return the plans for the least and the most time of an image."""
        least, most = (Plan(self.costs(one), images, gpus, shard_rows) for one in ms)
        return Range(least, most)

    def captions(self) -> dict[int, Range]:
        """Return the plan of `IMAGES` captions, by the number of GPUs."""
        return {gpus: self.plan(self.student_ms, IMAGES, gpus) for gpus in GPUS}

    def by_shard(self) -> dict[int, Range]:
        """Return the plan on most GPUs, by the rows of a shard."""
        return {rows: self.plan(self.student_ms, IMAGES, GPUS[-1], rows) for rows in SHARDS}

    def teacher_ms(self, size: str) -> tuple[float, float]:
        """Return the least and the most time of a teacher's beam search for an image."""
        work, base = self.data["counts"][size], self.data["counts"]["base"]
        parts = self.data["limit_gpu_parts"]["base"]
        steps = TOKENS + 1
        gflop = work["encoder_gflop"] + work["keys_gflop"] + steps * BEAM * work["step_gflop"]
        encoder = parts["encoder_ms"] * work["encoder_kernels"] / base["encoder_kernels"]
        step = parts["step_5_ms"] * work["step_kernels"] / base["step_kernels"]
        return gflop / self.tflops, encoder + steps * step

    def distillations(self) -> dict[tuple[str, str], dict[int, Range]]:
        """Return the plans of distillation by data set and size, and by the number of GPUs."""
        return {
            (data, size): {gpus: self.plan(self.teacher_ms(size), self.published[fact], gpus) for gpus in GPUS}
            for data, fact in DATA.items()
            for size in ("base", "large")
        }

    def derived_of_measured(self) -> tuple[float, float]:
        """Return the ratios of nano's times, derived from those of base by their kernels, to its measured times."""
        parts, work = self.data["limit_gpu_parts"], self.data["counts"]
        pairs = (("encoder_ms", "encoder_kernels"), ("step_5_ms", "step_kernels"), ("parallel_ms", "decoder_kernels"))
        ratios = [
            parts["base"][time] * work["nano"][kernels] / work["base"][kernels] / parts["nano"][time]
            for time, kernels in pairs
        ]
        return min(ratios), max(ratios)

    def training_ms(self, size: str) -> tuple[float, float]:
        """Return the least and the most time of a training step, divided by its samples.

        The most is the time of all FLOPs, of starting all kernels, and of the loss, one after the other.
        """
        work, base = self.data["counts"][size], self.data["counts"]["base"]
        least = work["training_gflop"] / self.tflops
        start = self.data["limit_gpu_parts"]["base"]["encoder_ms"] / base["encoder_kernels"]
        loss = self.data["loss_h200"]["query_ctc"]["ms"]
        return least, least + (work["training_kernels"] * start + loss) / SAMPLES

    def trainings(self) -> list[Training]:
        """Return the trainings of students on a teacher's captions."""
        found = []
        for data, fact in DATA.items():
            for size in ("base", "large"):
                rows = self.published[fact] * self.epochs
                least, most = (rows * ms / 3_600_000 for ms in self.training_ms(size))
                found.append(Training(data, size, self.epochs, least, most))
        return found
