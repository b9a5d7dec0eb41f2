"""Images as Python programs have them: paths, bytes, open files, Pillow's images, arrays and tensors."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image

from narvl_plugin.data.images import (
    MAX_BYTES,
    MAX_PIXELS,
    MAX_SIDE,
    URL,
    Decoded,
    ImageReader,
    opened,
    read_file,
    upright_on_white,
)
from narvl_plugin.errors import BadRow

AnyImage = str | os.PathLike[str] | bytes | bytearray | BinaryIO | Image.Image | np.ndarray | torch.Tensor
"""A path, the bytes of a file, an open binary file, an image of Pillow, or pixels.

Arrays of pixels are (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), tensors (1, H, W), (3, H, W) or (4, H, W). They are
uint8, or floating-point numbers from 0 to 1.
"""


def held(image: AnyImage) -> Any:
    """Return an image that can be read more than once: an open file as its bytes, a text as a path.

    Args:
        image: the image. An open file is read from its current position to its end.

    Raises:
        BadRow: if a text is an address, or an open file holds text.
    """
    if isinstance(image, str) and URL.match(image):
        raise BadRow(f"{image:.80}: is an address, and images are not downloaded; download it, and give its path")
    if isinstance(image, str | os.PathLike):
        return Path(image)
    read = getattr(image, "read", None)
    if read is None:
        return image
    data = read(MAX_BYTES + 1)
    if not isinstance(data, bytes):
        raise BadRow("the open file of an image was opened as text; open it in binary mode: open(path, 'rb')")
    return data


def as_seen(image: Any, where: str) -> Image.Image:
    """Return an image in RGB as people see it: turned by its EXIF orientation, and on a white background.

    Args:
        image: an image that `held` returned.
        where: its name, for errors.

    Raises:
        BadRow: if it is not a readable image, or has too many bytes or pixels.
    """
    if isinstance(image, str | Path):
        image = read_file(Path(image), where)
    if isinstance(image, bytes | bytearray):
        if len(image) > MAX_BYTES:
            raise BadRow(f"{where}: the image has more than {MAX_BYTES:,} bytes; make it smaller")
        with opened(bytes(image), where) as found:
            return upright_on_white(found)
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu().numpy()
        if image.ndim == 3:
            image = image.transpose(1, 2, 0)
    if isinstance(image, np.ndarray):
        image = _of_pixels(image, where)
    if not isinstance(image, Image.Image):
        raise BadRow(
            f"{where}: an image cannot be a {type(image).__name__}; give a path, bytes, an open binary file, an image "
            "of Pillow, an array or a tensor"
        )
    _check_size(*image.size, where)
    try:
        return upright_on_white(image)
    except Exception as error:  # a decoder may raise any exception on a broken file
        raise BadRow(f"{where}: the image is not readable ({' '.join(str(error).split())})") from error


def _of_pixels(pixels: np.ndarray, where: str) -> Image.Image:
    """Return an array of pixels as an image of Pillow."""
    form = f"{where}: an array of shape {pixels.shape} and type {pixels.dtype}"
    if pixels.ndim == 4:
        raise BadRow(f"{form} is not one image; give a list of images")
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] not in (1, 3, 4)):
        raise BadRow(f"{form} is no image; arrays are (H, W), or (H, W, C), tensors (C, H, W), with C of 1, 3 or 4")
    if not pixels.size:
        raise BadRow(f"{form} has no pixels")
    _check_size(pixels.shape[1], pixels.shape[0], where)
    if pixels.dtype.kind == "f":
        if not (np.isfinite(pixels).all() and pixels.min() >= 0 and pixels.max() <= 1):
            raise BadRow(f"{form} has values outside of 0 to 1; floating-point pixels must be in this range")
        pixels = np.round(pixels * 255).astype(np.uint8)
    if pixels.dtype != np.uint8:
        raise BadRow(f"{form} is no image; pixels are uint8, or floating-point numbers from 0 to 1")
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    return Image.fromarray(np.ascontiguousarray(pixels))


def _check_size(width: int, height: int, where: str) -> None:
    """Raise BadRow for an image that has too many pixels."""
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE or not width * height:
        raise BadRow(
            f"{where}: the image has {width} x {height} pixels; expected 1 to {MAX_PIXELS:,} in all, and at most "
            f"{MAX_SIDE:,} on a side"
        )


class AnyImageReader(ImageReader):
    """Reads images that `held` returned, as people see them."""

    def read(self, column: Any, where: str) -> Decoded:
        """Return an image as a normalised square, with its size.

        Args:
            column: the image.
            where: its name, for errors.

        Raises:
            BadRow: if it cannot be read.
        """
        image = as_seen(column, where)
        return Decoded(self.to_tensor(image), image.size, turned=False)
