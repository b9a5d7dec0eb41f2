"""Devices: their choice, and the transfer of batches."""

from __future__ import annotations

from typing import Any

import torch


def choose_device(name: str | None) -> torch.device:
    """Return the device of a name in torch. For None, it is a GPU if there is one, else the CPU."""
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def move_batch(batch: dict[str, Any], device: torch.device | str) -> dict[str, Any]:
    """Return a batch with its tensors on a device."""
    moved: dict[str, Any] = _move(batch, device)
    return moved


def _move(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {name: _move(part, device) for name, part in value.items()}
    if isinstance(value, list | tuple):
        parts = [_move(part, device) for part in value]
        return parts if isinstance(value, list) else tuple(parts)
    return value


def wait_for(device: torch.device | str) -> None:
    """Wait until a device has finished all its work."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
