"""From a device to the CPU: everything at once, since each question to a device waits for all that it has to do."""

from typing import TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

Parts = TypeVar("Parts")


def to_host(parts: Parts) -> Parts:
    """Return tensors of one device, in tuples and lists, on the CPU; the device is waited for once."""
    leaves, form = tree_flatten(parts)
    # The largest numbers first, so that each tensor begins at a multiple of the size of its own.
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
