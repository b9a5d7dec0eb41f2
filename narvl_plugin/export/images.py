"""Image reading of an exported student; the export includes this file."""

import io
import warnings
from contextlib import suppress
from importlib.util import find_spec

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", *(["AVIF"] if find_spec("PIL._avif") else []))
"""Formats that Pillow may detect from the content of a file. For some other formats, it starts other programs."""
MAX_SIDE = 65_535
BITS_PER_SAMPLE, PHOTOMETRIC = 258, 262  # TIFF tags


def open_image(data: bytes) -> Image.Image:
    """Return an image as people see it.

    It is in RGB and upright according to EXIF. A transparent image gets a white background.

    Args:
        data: the bytes of the file; of several frames or pages, the first is read.

    Returns:
        The image.

    Raises:
        ValueError: for anything but an intact image in one of `FORMATS`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
                if max(opened.size) > MAX_SIDE:
                    raise ValueError(f"{opened.width} x {opened.height} pixels are too many")
                return _as_seen(opened)
    except UnidentifiedImageError as error:
        raise ValueError(f"the image is broken, or none of {', '.join(FORMATS)}") from error
    except Exception as error:  # decoders raise errors of many types
        raise ValueError(f"the image cannot be read ({error or type(error).__name__})") from error


def _as_seen(opened: Image.Image) -> Image.Image:
    image = opened
    opened.load()
    with suppress(Exception):  # damaged EXIF data do not make an image unreadable
        image = ImageOps.exif_transpose(opened)
    clear, alpha = image.info.get("transparency"), None
    if image.mode.startswith("I;16") or (image.mode == "I" and opened.format == "PNG"):
        tags, gray = getattr(opened, "tag_v2", {}), np.asarray(image)
        upper = (gray >> (tags.get(BITS_PER_SAMPLE, (16,))[0] - 8)).astype(np.uint8)
        image = Image.fromarray(255 - upper if tags.get(PHOTOMETRIC, 1) == 0 else upper)
        if clear is not None:
            alpha = Image.fromarray(np.where(gray == clear, 0, 255).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("32 bits a pixel do not tell what is white; save it with 8 or 16 bits")
    if alpha is None and clear is None and image.getbands()[-1] not in ("A", "a"):
        return image.convert("RGB")
    if image.mode == "RGB" and clear is not None and max(clear) > 255:  # 16 bits; Pillow keeps the upper 8 of them
        image.info["transparency"] = tuple(value >> 8 for value in clear)
    rgba = image.convert("RGBA")
    if alpha is not None:
        rgba.putalpha(alpha)
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
