"""The plan of a large job: its hours, what it reads, and what a lost machine costs, from the cost of one image.

A job is divided into whole shards of R rows, and a device does one shard at a time. On K devices,

    time of a shard    t = R ms / 1000
    time of the job    T = start + ceil(shards / K) t

The last round keeps few devices busy if shards are few, and more devices than shards have nothing to do. A device gets
its images in time if `core_ms / device_ms` CPU cores read them. A lost machine repeats the shards that it had begun.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Costs:
    """What one image costs.

    Attributes:
        device_ms: the time of a device for an image of a batch, in ms.
        core_ms: the time of a CPU core to read, decode and resize an image, in ms.
        image_bytes: the size of an image's file.
        output_bytes: the size of an output's line.
        start_seconds: the time in which a process loads its model.
    """

    device_ms: float
    core_ms: float
    image_bytes: float
    output_bytes: float
    start_seconds: float

    def __post_init__(self) -> None:
        if self.device_ms <= 0 or min(self.core_ms, self.image_bytes, self.output_bytes, self.start_seconds) < 0:
            raise ValueError(f"{self}: times and sizes must not be below 0, and device_ms must be above 0")

    @property
    def images_per_second(self) -> float:
        """Images a second of one device."""
        return 1000 / self.device_ms

    @property
    def cores(self) -> float:
        """CPU cores that read images as fast as one device takes them."""
        return self.core_ms / self.device_ms

    @property
    def megabytes_per_second(self) -> float:
        """MB a second that one device takes from the store."""
        return self.image_bytes * self.images_per_second / 1e6


@dataclass(frozen=True)
class Plan:
    """A job on equal devices.

    Attributes:
        costs: what one image costs.
        images: the number of images.
        devices: the number of devices K.
        shard_rows: the images of a shard R.
    """

    costs: Costs
    images: int
    devices: int
    shard_rows: int

    def __post_init__(self) -> None:
        if min(self.images, self.devices, self.shard_rows) < 1:
            raise ValueError(f"{self}: images, devices and shard_rows must be above 0")

    @property
    def shards(self) -> int:
        """The number of shards."""
        return math.ceil(self.images / self.shard_rows)

    @property
    def busy(self) -> int:
        """The devices that have a shard to do."""
        return min(self.devices, self.shards)

    @property
    def shard_seconds(self) -> float:
        """The time of a device for a shard, t."""
        return self.shard_rows * self.costs.device_ms / 1000

    @property
    def seconds(self) -> float:
        """The time of the job, T."""
        return self.costs.start_seconds + math.ceil(self.shards / self.devices) * self.shard_seconds

    @property
    def hours(self) -> float:
        """The time of the job, in hours."""
        return self.seconds / 3600

    @property
    def waiting(self) -> float:
        """The share of the devices' time in which they start, or have no shard to do."""
        return 1 - self.images * self.costs.device_ms / 1000 / (self.devices * self.seconds)

    @property
    def gigabytes_per_second(self) -> float:
        """GB a second that all devices take from the store."""
        return self.busy * self.costs.megabytes_per_second / 1000

    @property
    def cores(self) -> float:
        """CPU cores that read images for all devices."""
        return self.busy * self.costs.cores

    @property
    def writer_ms(self) -> float:
        """The time between two shards, in ms, in which the machine of the command writes one."""
        return 1000 * self.shard_seconds / self.busy

    @property
    def repeated_seconds(self) -> float:
        """The most that each device of a lost machine loses: a start, and a shard that another device does again."""
        return self.costs.start_seconds + self.shard_seconds
