"""Images of TSV columns: from base64 or the path of a file to a normalised tensor."""

from __future__ import annotations

import base64
import binascii
import io
import math
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, TiffImagePlugin, UnidentifiedImageError

from narvl_plugin.data.mistaken_files import HEAD, as_text, mistaken
from narvl_plugin.errors import BadRow

_AVIF = find_spec("PIL._avif") is not None  # in Pillow from 11.3 on, if it was built with the library
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", *(["AVIF"] if _AVIF else []))
"""Formats that Pillow may recognise by a file's content. For other formats, such as EPS, it would run programs."""
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    *([".avif"] if _AVIF else []),
)
PATH_SUFFIXES = (*IMAGE_SUFFIXES, ".npy")
NPY_MAGIC = b"\x93NUMPY"
BEGINNINGS = (b"\x89PNG", b"\xff\xd8\xff", NPY_MAGIC)
"""First bytes of files that are expected here."""
MAX_PIXELS = 89_478_485
"""Largest number of pixels: Pillow's own limit for decompression bombs, a quarter gigabyte of RGB."""
MAX_SIDE = 65_535
"""Longest side of an image, in pixels, as for JPEG. Resizing changes one side first, and might need much memory."""
MAX_BYTES = 1 << 28
"""Largest file: as large as `MAX_PIXELS` in uncompressed RGB."""
MAX_SCANS = 100
"""Largest number of scans of a progressive JPEG. Ten are usual, and each passes over all pixels."""
TRANSPOSED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Transposition that turns an image of an EXIF orientation upright. Orientation 1 is upright."""
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
"""Mean and standard deviation of each channel of OFA's normalisation."""
HALF_MAX = torch.finfo(torch.float16).max
"""Largest number in float16."""
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation of each channel of ImageNet."""

SHORTEST = 36
"""Length of the smallest image, a GIF, as base64."""
LONGEST_PATH = 1024
"""Length up to which an image column may be the path of a file."""

URL = re.compile(r"\s*[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_DATA_URL = re.compile(r"\s*data:[^,]*,", re.IGNORECASE)
_URL_SAFE = str.maketrans("-_", "+/")
_JPEG_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd7\xff])", re.DOTALL)  # of a segment with a length
_SCAN, _END = b"\xda", b"\xd9"


class Decoded(NamedTuple):
    """Contents of an image column.

    Attributes:
        pixels: an image (3, size, size) or features (C, h, w), in float32.
        size: width and height of the image before it was resized. None if features do not include them.
        turned: whether EXIF would turn or mirror the image.
    """

    pixels: torch.Tensor
    size: tuple[int, int] | None
    turned: bool


class ImageReader:
    """Reads the image column of a TSV row into a float32 tensor (3, size, size).

    Images are converted to RGB, resized to a square (bicubic) and normalised. A column with a `.npy` file holds
    features of a frozen backbone (C, h, w), see `narvl features`. They are returned unchanged, in float32.

    Attributes:
        folder: the folder that relative paths refer to, which is that of the TSV file.
        size: side of the square, in pixels.
        to_rgb: converts an image to RGB. It may be replaced, for example by `upright_on_white`.
        option: the option that selects the column, for errors.
    """

    def __init__(self, size: int, *, imagenet_normalisation: bool = False, folder: str | Path = ".") -> None:
        self.folder = Path(folder)
        self.size = size
        self._normalisation = torch.tensor(IMAGENET if imagenet_normalisation else HALF)[:, :, None, None]
        self.to_rgb: Callable[[Image.Image], Image.Image] = to_rgb
        self.option = "--selected-cols"

    def __call__(self, column: str, where: str) -> torch.Tensor:
        """Return the tensor of an image column, see `read`."""
        return self.read(column, where).pixels

    def with_size(self, column: str, where: str) -> tuple[torch.Tensor, tuple[int, int] | None]:
        """Return the tensor and the original width and height of the image, or None if these are unknown."""
        return self.read(column, where)[:2]

    def read(self, column: str, where: str) -> Decoded:
        """Return the contents of an image column.

        Args:
            column: the column.
            where: FILE:ROW, for errors.

        Raises:
            BadRow: if the column holds neither an image nor features.
        """
        data = self.read_bytes(column, where)
        if data.startswith(NPY_MAGIC):
            return Decoded(*read_features(data, where), turned=False)
        with opened(data, where) as image:
            rgb = self.to_rgb(image)
            turned = orientation(image) in TRANSPOSED
        return Decoded(self.to_tensor(rgb), rgb.size, turned)

    def to_tensor(self, image: Image.Image) -> torch.Tensor:
        """Return an RGB image as a normalised square, float32 (3, size, size)."""
        mean, std = self._normalisation
        bytes_of = torch.from_numpy(np.array(resize(image, self.size, self.size)))
        pixels = bytes_of.permute(2, 0, 1).contiguous().float().div_(255)
        return pixels.sub_(mean).div_(std)  # torchvision's functions give the same to the bit, in twice the time

    def read_bytes(self, column: str, where: str) -> bytes:
        """Return the file that a column holds as base64, in either alphabet, or names by its path.

        Args:
            column: the column.
            where: FILE:ROW, for errors.

        Raises:
            BadRow: if the column is neither, or the file cannot be read.
        """
        if not column.strip():
            raise BadRow(f"{where}: the image is not readable: the image column is empty; check {self.option}")
        if URL.match(column):
            raise BadRow(
                f"{where}: the image column is an address, {_shown(column, 60)}, and images are not downloaded; "
                "download it, and give its path or its base64"
            )
        if _DATA_URL.match(column):
            raise BadRow(f"{where}: the image column is a data URL, {_shown(column)}; keep only what follows the comma")
        # No base64 alphabet has a dot, so a suffix distinguishes a path from an image.
        if column[-5:].lower().endswith(PATH_SUFFIXES):
            return read_file(self.folder / column, where)
        if len(column) > MAX_BYTES // 3 * 4:
            raise BadRow(f"{where}: the image has more than {MAX_BYTES:,} bytes; make it smaller")
        try:
            data = base64.b64decode(column.translate(_URL_SAFE), validate=True)
        except (binascii.Error, ValueError) as error:
            raise BadRow(
                f"{where}: the image column is neither base64 nor a path ending in "
                f"{', '.join(PATH_SUFFIXES)}: {_shown(column)} ({error}); check {self.option}"
            ) from error
        if len(column) < SHORTEST or (len(column) <= LONGEST_PATH and os.path.isfile(self.folder / column)):
            raise BadRow(
                f"{where}: the image is not readable: the image column, {_shown(column)}, is no image as base64, and "
                f"a path must end in {', '.join(PATH_SUFFIXES)}; check {self.option}"
            )
        return data


def _shown(column: str, length: int = 20) -> str:
    """Return the beginning of an image column, for a message."""
    return repr(column if len(column) <= length else column[:length] + "…")


def resize(image: Image.Image, width: int, height: int) -> Image.Image:
    """Return an image resized bicubically, the width first.

    Pillow up to 12 always resizes the width first. Pillow 13 resizes the height first if that is quicker, which
    changes some values by one level of 255. Two calls give the images of the published models with either.

    Args:
        image: the image.
        width: its new width, in pixels.
        height: its new height, in pixels.
    """
    image = image.resize((width, image.height), Image.Resampling.BICUBIC)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def read_file(path: Path, where: str) -> bytes:
    """Return the bytes of an image file.

    Args:
        path: the file.
        where: FILE:ROW, for errors.

    Raises:
        BadRow: if it cannot be read, has more than `MAX_BYTES`, or is not a regular file (a pipe may never end).
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise BadRow(f"{where}: the image file {path} cannot be read (it is not a regular file)")
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1) if 0 < status.st_size <= MAX_BYTES else b""
    except (OSError, ValueError) as error:  # a path with a zero byte raises ValueError
        if isinstance(error, BadRow):
            raise
        reason = getattr(error, "strerror", None) or error
        raise BadRow(f"{where}: the image file {path} cannot be read ({reason})") from error
    if not 0 < len(data) <= MAX_BYTES:
        raise BadRow(
            f"{where}: the image file {path} has {max(status.st_size, len(data)):,} bytes; expected 1 to {MAX_BYTES:,}"
        )
    if (what := mistaken(data[:HEAD], BEGINNINGS)) is not None:
        raise BadRow(f"{where}: the image file {path} {what}")
    return data


def open_image(data: bytes, where: str) -> Image.Image:
    """Return an image as RGB.

    Args:
        data: the bytes of its file.
        where: FILE:ROW, for errors.

    Raises:
        BadRow: if the file is not an image, is broken, or unpacks to too much.
    """
    with opened(data, where) as image:
        return to_rgb(image)


def image_size(data: bytes, where: str) -> tuple[int, int] | None:
    """Return width and height of an image, read from the header of its file.

    Args:
        data: the bytes of the file.
        where: FILE:ROW, for errors.

    Returns:
        Width and height, or None for features that do not include them.

    Raises:
        BadRow: if the file cannot be used.
    """
    if data.startswith(NPY_MAGIC):
        return read_features(data, where)[1]
    with opened(data, where) as image:
        return image.size


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image as RGB, as the published models read it.

    Pixels stay as they are in the file, whatever the EXIF orientation. Transparent ones keep their colour in the file.

    Raises:
        ValueError: if the pixels have no defined colours.
    """
    return _in_8_bits(image).convert("RGB")


def upright_on_white(image: Image.Image) -> Image.Image:
    """Return an image as RGB, as people see it: turned by its EXIF orientation, and on a white background.

    Raises:
        ValueError: if the pixels have no defined colours.
    """
    image.load()  # loading turns a TIFF and removes its orientation
    turn = TRANSPOSED.get(orientation(image))
    has_transparency = image.getbands()[-1] in ("A", "a") or "transparency" in image.info
    image = _with_alpha(image) if has_transparency else to_rgb(image)
    if has_transparency:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if turn is None else image.transpose(turn)


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of a loaded image, 1 to 8. If none can be read, it is 1, upright."""
    try:
        found = int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF data do not make an image unreadable
        return 1
    return found if found in TRANSPOSED else 1


def _in_8_bits(image: Image.Image) -> Image.Image:
    """Return an image with 8 bits per channel. Gray images of 16 bits keep their upper byte, as Pillow does in colour.

    Raises:
        ValueError: if the pixels are other numbers. In 32 bits, for example, white is not defined.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        tags = getattr(image, "tag_v2", {})
        bits = tags.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0]
        upper = (np.asarray(image) >> (bits - 8)).astype(np.uint8)
        return Image.fromarray(255 - upper if tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION, 1) == 0 else upper)
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels, of Pillow's mode {image.mode}, have no known white; save it with 8 or 16 bits")
    return image


def _with_alpha(image: Image.Image) -> Image.Image:
    """Return an image with transparency as RGBA."""
    transparent = image.info.get("transparency")
    if image.mode == "RGB" and transparent is not None and max(transparent) > 255:
        # The transparent colour of a 16-bit PNG. Pillow keeps only the upper bytes of the pixels.
        image = image.copy()
        image.info["transparency"] = tuple(value >> 8 for value in transparent)
    in_8_bits = _in_8_bits(image)
    rgba = in_8_bits.convert("RGBA")
    if in_8_bits is not image and transparent is not None:
        rgba.putalpha(Image.fromarray(np.where(np.asarray(image) == transparent, 0, 255).astype(np.uint8)))
    return rgba


@contextmanager
def opened(data: bytes, where: str) -> Iterator[Image.Image]:
    """Open an image before its pixels are decoded. Of several frames or pages it is the first.

    Args:
        data: the bytes of its file, in one of `FORMATS`.
        where: FILE:ROW, for errors.

    Yields:
        The image.

    Raises:
        BadRow: if the image cannot be read, here or in the with-block, or unpacks to too much.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _refuse_bombs(image, data, where)
            yield image
    except BadRow:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadRow(f"{where}: the image is refused ({error})") from error
    except UnidentifiedImageError as error:
        what, text = mistaken(data[:HEAD], BEGINNINGS), as_text(data[:HEAD])
        reason = what or f"is broken, or none of {', '.join(FORMATS)}"
        reason += f"; it is text that begins {text!r}" if text is not None and what is None else ""
        raise BadRow(f"{where}: the image is not readable (it {reason})") from error
    except Exception as error:  # a decoder may raise any exception on a broken file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BadRow(f"{where}: the image is not readable ({reason})") from error


def _refuse_bombs(image: Image.Image, data: bytes, where: str) -> None:
    """Raise BadRow if decoding an image would take gigabytes or minutes, whatever the size of its file."""
    width, height = image.size
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise BadRow(
            f"{where}: the image has {width} x {height} pixels; more than {MAX_PIXELS} in all or "
            f"{MAX_SIDE} on a side are refused as a decompression bomb"
        )
    tags = getattr(image, "tag_v2", {})
    tile = [int(tags.get(tag, 0)) for tag in (TiffImagePlugin.TILEWIDTH, TiffImagePlugin.TILELENGTH)]
    if math.prod(tile) > MAX_PIXELS:
        raise BadRow(
            f"{where}: the image has tiles of {tile[0]} x {tile[1]} pixels; more than {MAX_PIXELS} are refused as a "
            "decompression bomb"
        )
    if image.format in ("JPEG", "MPO") and _count_scans(data) > MAX_SCANS:
        raise BadRow(f"{where}: the image has more than {MAX_SCANS} scans and is refused as a decompression bomb")


def _count_scans(data: bytes) -> int:
    """Return the number of scans of the first image in a JPEG file, counted up to just above `MAX_SCANS`."""
    scans, position = 0, 2
    while scans <= MAX_SCANS and (marker := _JPEG_MARKER.search(data, position)) and marker[1] != _END:
        scans += marker[1] == _SCAN
        position = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")
    return scans


def encode_features(features: torch.Tensor, size: tuple[int, int]) -> bytes:
    """Return features as a `.npy` file in float16, followed by a second one with the image's width and height.

    Args:
        features: (C, h, w).
        size: width and height of the image.

    Raises:
        ValueError: if features are not finite, or too large for float16.
    """
    stream = io.BytesIO()
    halves = features.to(torch.float16).cpu()
    if not bool(halves.isfinite().all()):
        largest = float(features.abs().amax())
        found = f"up to {largest:.3g}" if math.isfinite(largest) else "NaN or infinity"
        raise ValueError(f"the features of the image are {found}; they are stored as numbers up to {HALF_MAX:,.0f}")
    np.save(stream, halves.numpy(), allow_pickle=False)
    np.save(stream, np.array(size, dtype=np.int32), allow_pickle=False)
    return stream.getvalue()


def read_features(data: bytes, where: str) -> tuple[torch.Tensor, tuple[int, int] | None]:
    """Return the features of a file, and the width and height of their image.

    Args:
        data: the bytes of the file.
        where: FILE:ROW, for errors.

    Returns:
        float32 (C, h, w), and width and height or None if the file does not include them.

    Raises:
        BadRow: if the file holds another array, or numbers that are not finite in float32.
    """
    stream = io.BytesIO(data)
    size = None
    try:
        features = read_array(stream)
        if features.ndim != 3 or features.dtype.kind != "f":
            raise ValueError(
                f"expected floating-point features of shape (C, h, w), found {features.dtype} {features.shape}"
            )
        with np.errstate(over="ignore"):
            features = features.astype(np.float32)
        if wrong := features.size - np.count_nonzero(np.isfinite(features)):
            raise ValueError(
                f"{wrong:,} of {features.size:,} numbers are NaN, infinite or too large for float32; compute them again"
            )
        if stream.tell() < len(data):
            width, height = read_array(stream).tolist()
            size = int(width), int(height)
        if stream.tell() < len(data) or (size and min(size) < 1):
            raise ValueError(f"expected the image's width and height after them, and nothing more, found {size}")
    except Exception as error:  # numpy parses the header as Python literals, which may raise almost any exception
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BadRow(f"{where}: the .npy features cannot be used ({reason})") from error
    return torch.from_numpy(features), size


def read_array(stream: io.BytesIO) -> np.ndarray:
    """Return the array of a `.npy` file that starts here. Another file may raise almost any exception."""
    # The header may claim any shape. numpy would allocate it before it finds that bytes are missing.
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
