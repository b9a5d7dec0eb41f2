"""Where models run, and how batches get there."""

from __future__ import annotations

from typing import Any

import torch
from fairseq import utils


def choose_device(name: str | None) -> torch.device:
    """Return the device of torch's name, or without one a GPU if there is one, else the CPU."""
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def move_batch(batch: dict[str, Any], device: torch.device | str) -> dict[str, Any]:
    """Return a batch with its tensors on a device."""
    moved: dict[str, Any] = utils.apply_to_sample(lambda tensor: tensor.to(device, non_blocking=True), batch)
    return moved


def wait_for(device: torch.device | str) -> None:
    """Wait until all that was started on a device is computed."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
