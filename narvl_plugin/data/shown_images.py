"""Images as pages show them: in the page itself, and brightest where a model looked."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from PIL import Image


def data_uri(image: Image.Image, kind: str, **options: Any) -> str:
    """Return an image as a data URI.

    Args:
        image: the image.
        kind: `png` or `jpeg`.
        **options: options of Pillow for this kind, such as `quality`.
    """
    stream = io.BytesIO()
    image.save(stream, kind.upper(), **options)
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"


def spotlight(image: Image.Image, heat: np.ndarray, dimmed: float) -> Image.Image:
    """Return an image that is brightest at the largest heat.

    Args:
        image: the image.
        heat: (H, W), numbers of 0 and above for the patches of the image, in rows from above.
        dimmed: brightness of patches without heat, 0 to 1.
    """
    grid = np.round(255 * heat / (float(heat.max()) or 1.0)).astype(np.uint8)
    mask = Image.fromarray(grid).resize(image.size, Image.Resampling.BICUBIC)
    return Image.composite(image, image.point(lambda value: int(dimmed * value)), mask)
