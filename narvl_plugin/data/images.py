"""Pictures from TSV columns: base64 or a file's path in, normalised tensor out."""

from __future__ import annotations

import base64
import binascii
import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import functional

from narvl_plugin.errors import BadRow

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
PATH_SUFFIXES = (*PICTURE_SUFFIXES, ".npy")
NPY_MAGIC = b"\x93NUMPY"
MAX_PIXELS = 89_478_485  # Pillow's own border to decompression bombs: a quarter gigabyte of RGB
MAX_SIDE = 65_535  # of a JPEG; resizing a longer one would unpack it sideways
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

_URL_SAFE = str.maketrans("-_", "+/")


class ImageReader:
    """Reads the image column of a TSV row into a float32 tensor (3, size, size).

    Pictures become RGB, are resized to a square (bicubic) and normalised by mean = std = 0.5, or by
    ImageNet's values. Where the column holds a `.npy` file, a frozen trunk's features (C, h, w) were computed
    before, see `narvl features`; they come back as float32, unchanged. Relative paths are looked up from `folder`,
    the TSV's own.
    """

    def __init__(self, size: int, *, imagenet_normalisation: bool = False, folder: str | Path = ".") -> None:
        self.folder = Path(folder)
        self.size = size
        self.normalisation = IMAGENET if imagenet_normalisation else HALF

    def __call__(self, column: str, where: str) -> torch.Tensor:
        """Return the tensor of an image column; raises BadRow, naming `where` (FILE:ROW), if it is none."""
        return self.with_size(column, where)[0]

    def with_size(self, column: str, where: str) -> tuple[torch.Tensor, tuple[int, int] | None]:
        """Return the tensor, and width and height of the picture before it was resized; None for unknown ones."""
        data = self.read_bytes(column, where)
        if data.startswith(NPY_MAGIC):
            return read_features(data, where)
        picture = open_image(data, where)
        return self.to_tensor(picture), picture.size

    def to_tensor(self, image: Image.Image) -> torch.Tensor:
        """Return an RGB picture as a normalised square, float32 (3, size, size)."""
        mean, std = self.normalisation
        pixels = functional.to_tensor(resize(image, self.size, self.size))
        return functional.normalize(pixels, mean, std, inplace=True)

    def read_bytes(self, column: str, where: str) -> bytes:
        """Return the file that a column holds as base64, of either alphabet, or names by its path."""
        # No base64 alphabet has a dot, so a suffix tells a path from a picture.
        if column[-5:].lower().endswith(PATH_SUFFIXES):
            path = self.folder / column
            try:
                return path.read_bytes()
            except OSError as error:
                raise BadRow(f"{where}: the image file {path} cannot be read ({error.strerror})") from error
        try:
            return base64.b64decode(column.translate(_URL_SAFE), validate=True)
        except (binascii.Error, ValueError) as error:
            shown = column if len(column) <= 20 else column[:20] + "…"
            raise BadRow(
                f"{where}: the image column is neither base64 nor a path ending in "
                f"{', '.join(PATH_SUFFIXES)}: {shown!r} ({error}); check --selected-cols"
            ) from error


def resize(image: Image.Image, width: int, height: int) -> Image.Image:
    """Return the picture resized bicubically, the width first.

    Pillow up to 12 always took the width first; Pillow 13 takes the height first where that is quicker,
    which changes some values by one level of 255. Two calls give the published models' pictures with either.
    """
    image = image.resize((width, image.height), Image.Resampling.BICUBIC)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def open_image(data: bytes, where: str) -> Image.Image:
    """Return a picture as RGB; raises BadRow if `data` is no picture, is broken, or unpacks to too much."""
    with _opened(data, where) as image:
        return image.convert("RGB")


def image_size(data: bytes, where: str) -> tuple[int, int] | None:
    """Return width and height of a picture from its header, None for features that do not tell; raises BadRow."""
    if data.startswith(NPY_MAGIC):
        return read_features(data, where)[1]
    with _opened(data, where) as image:
        return image.size


@contextmanager
def _opened(data: bytes, where: str) -> Iterator[Image.Image]:
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
                raise BadRow(
                    f"{where}: the image has {width} x {height} pixels; more than {MAX_PIXELS} in all or "
                    f"{MAX_SIDE} on a side are refused as a decompression bomb"
                )
            yield image
    except Image.DecompressionBombError as error:
        raise BadRow(f"{where}: the image is refused ({error})") from error
    except BadRow:
        raise
    except (OSError, ValueError, SyntaxError, EOFError, MemoryError, Image.UnidentifiedImageError) as error:
        raise BadRow(f"{where}: the image is not readable ({error})") from error


def encode_features(features: torch.Tensor, size: tuple[int, int]) -> bytes:
    """Return features (C, h, w) as a `.npy` file in float16, followed by one of the picture's width and height."""
    stream = io.BytesIO()
    np.save(stream, features.to(torch.float16).cpu().numpy(), allow_pickle=False)
    np.save(stream, np.array(size, dtype=np.int32), allow_pickle=False)
    return stream.getvalue()


def read_features(data: bytes, where: str) -> tuple[torch.Tensor, tuple[int, int] | None]:
    """Return features, float32 (C, h, w), and width and height of their picture, None where they are not told.

    Raises BadRow for any other array.
    """
    stream = io.BytesIO(data)
    size = None
    try:
        features = read_array(stream)
        if features.ndim != 3 or features.dtype.kind != "f":
            raise ValueError(
                f"expected floating-point features of shape (C, h, w), found {features.dtype} {features.shape}"
            )
        if stream.tell() < len(data):
            width, height = read_array(stream).tolist()
            size = int(width), int(height)
        if stream.tell() < len(data) or (size and min(size) < 1):
            raise ValueError(f"expected the picture's width and height after them, and nothing more, found {size}")
    except (ValueError, TypeError, KeyError, EOFError) as error:
        raise BadRow(f"{where}: the .npy features cannot be used ({error})") from error
    return torch.from_numpy(features.astype(np.float32)), size


def read_array(stream: io.BytesIO) -> np.ndarray:
    """Return the array of a `.npy` file that starts here; raises ValueError, KeyError or EOFError."""
    # The header may claim any shape; numpy would allocate it before it finds the bytes missing.
    start = stream.tell()
    version = np.lib.format.read_magic(stream)
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }[version]
    shape, _, dtype = read_header(stream)
    found, needed = len(stream.getbuffer()) - stream.tell(), math.prod(shape) * dtype.itemsize
    if found < needed:
        raise ValueError(f"{found} bytes of data where {shape} needs {needed}")
    stream.seek(start)
    return np.load(stream, allow_pickle=False)
