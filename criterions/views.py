"""Two views of a batch for the consistency loss: each sample twice, with other patches of its image erased.

Legend: B batch, P patches of an image.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from narvl_plugin.models.vision import STRIDE

ERASED = 0.2
"""Share of an image's patches that a view does not show."""


def two_views(sample: dict[str, Any]) -> dict[str, Any]:
    """Return a batch of 2 B samples: all samples of a batch in a first view, then all in a second one.

    A view shows each patch of an image with a probability of 1 - `ERASED`. The model does not attend to the others.
    Dropout differs between the views, too.

    Args:
        sample: the batch. Images are `patch_images` of `net_input`, if there are any.
    """
    views = {key: _twice(value) for key, value in sample.items()}
    inputs = {key: _twice(value) for key, value in sample["net_input"].items()}
    images = inputs.get("patch_images")
    if images is not None:
        shown = _shown(images)
        masks = inputs.get("patch_masks")
        inputs["patch_masks"] = shown if masks is None else shown & masks[:, None]
        inputs["padded"] = np.ones(len(images), dtype=bool)
    return views | {"net_input": inputs}


def mean_of_views(of_views: Tensor) -> Tensor:
    """Return the means over both views: (2 B,) -> (B,)."""
    half = len(of_views) // 2
    return (of_views[:half] + of_views[half:]) / 2


def _shown(images: Tensor) -> Tensor:
    """Draw the patches that are shown.

    Args:
        images: pixels (B, 3, height, width) or features (B, C, rows, columns).

    Returns:
        (B, P), False for an erased patch.
    """
    rows, columns = images.shape[2:]
    if images.shape[1] == 3:
        rows, columns = -(-rows // STRIDE), -(-columns // STRIDE)
    return torch.rand(len(images), rows * columns, device=images.device) >= ERASED


def _twice(value: Any) -> Any:
    """Return B values as 2 B values. What is not a value for each sample stays as it is."""
    if isinstance(value, Tensor):
        return torch.cat([value, value])
    if isinstance(value, np.ndarray):
        return np.concatenate([value, value])
    return value + value if isinstance(value, list) else value
