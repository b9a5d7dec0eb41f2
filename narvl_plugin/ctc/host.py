"""Transfers from a device to the CPU, packed into one, because each transfer waits for all pending work."""

from typing import TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

Parts = TypeVar("Parts")


def to_host(parts: Parts) -> Parts:
    """Return the tensors of one device, in tuples and lists, on the CPU with one synchronisation."""
    leaves, form = tree_flatten(parts)
    # Tensors with the largest elements come first, so each begins at a multiple of its element size.
    there = sorted(
        (place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.device.type != "cpu"),
        key=lambda place: -leaves[place].element_size(),
    )
    if not there:
        return parts
    packed = torch.cat([leaves[place].flatten().view(torch.uint8) for place in there]).cpu()
    sizes = [leaves[place].nbytes for place in there]
    for place, part in zip(there, packed.split(sizes), strict=True):
        leaves[place] = part.view(leaves[place].dtype).view(leaves[place].shape)
    moved: Parts = tree_unflatten(leaves, form)
    return moved
