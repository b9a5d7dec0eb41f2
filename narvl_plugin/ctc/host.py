"""Transfers from a device to the CPU, packed into one, because each transfer waits for all pending work."""

from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

Parts = TypeVar("Parts")


def to_host(parts: Parts) -> Parts:
    """Return the tensors of one device, in tuples and lists, on the CPU with one synchronisation."""
    if all(tensor.device.type == "cpu" for tensor in _tensors(parts)):
        return parts
    leaves, form = tree_flatten(parts)
    # Tensors with the largest elements come first, so each begins at a multiple of its element size.
    there = sorted(
        (place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.device.type != "cpu"),
        key=lambda place: -leaves[place].element_size(),
    )
    packed = torch.cat([leaves[place].flatten().view(torch.uint8) for place in there]).cpu()
    sizes = [leaves[place].nbytes for place in there]
    for place, part in zip(there, packed.split(sizes), strict=True):
        leaves[place] = part.view(leaves[place].dtype).view(leaves[place].shape)
    moved: Parts = tree_unflatten(leaves, form)
    return moved


def longest_of(lengths: Tensor, most: int) -> int:
    """Return the largest of some lengths; on a device the bound `most`, because reading it would synchronise."""
    if lengths.device.type != "cpu":
        return most
    return int(lengths.max()) if lengths.numel() else 0


def _tensors(parts: Any) -> Iterator[Tensor]:
    """Yield the tensors in tuples and lists."""
    if isinstance(parts, Tensor):
        yield parts
    elif isinstance(parts, tuple | list):
        for part in parts:
            yield from _tensors(part)
