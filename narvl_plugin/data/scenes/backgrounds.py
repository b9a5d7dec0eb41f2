"""Backgrounds of scenes: ten colours with unambiguous names, plain or in three patterns."""

from dataclasses import dataclass
from functools import lru_cache

from PIL import Image, ImageDraw

Color = tuple[int, int, int]

# name -> (ground, second shade of a pattern). Both shades of a pair have the same name in everyday speech.
COLORS: dict[str, tuple[Color, Color]] = {
    "red": ((205, 55, 60), (160, 30, 40)),
    "orange": ((240, 140, 40), (250, 180, 105)),
    "yellow": ((250, 215, 70), (255, 238, 155)),
    "green": ((80, 165, 85), (135, 205, 130)),
    "blue": ((70, 125, 210), (125, 172, 235)),
    "purple": ((135, 85, 185), (178, 138, 215)),
    "pink": ((245, 155, 195), (252, 203, 224)),
    "brown": ((135, 90, 55), (168, 122, 86)),
    "gray": ((150, 150, 150), (190, 190, 190)),
    "white": ((250, 250, 250), (216, 221, 226)),
}
PATTERNS = ("plain", "striped", "dotted", "checked")
VARIANTS = 4
"""Number of variants of each pattern (direction and width)."""


@dataclass(frozen=True)
class Background:
    """The background of a scene.

    Attributes:
        color: a key of `COLORS`.
        pattern: one of `PATTERNS`.
        variant: which of its `VARIANTS`.
    """

    color: str
    pattern: str
    variant: int


@lru_cache(maxsize=len(COLORS) * len(PATTERNS) * VARIANTS)
def paint_background(background: Background, size: int) -> Image.Image:
    """Draw a background of size x size pixels (RGB). The image is cached: copy it before drawing on it."""
    ground, second = COLORS[background.color]
    image = Image.new("RGB", (size, size), ground)
    draw = ImageDraw.Draw(image)
    upright, wide = background.variant % 2 == 0, background.variant // 2 == 0
    step = max(2, round(size / (8 if wide else 12)))
    if background.pattern == "striped":
        for start in range(0, size, 2 * step):
            stripe = (start, 0, start + step - 1, size) if upright else (0, start, size, start + step - 1)
            draw.rectangle(stripe, fill=second)
    elif background.pattern == "checked":
        offset = 0 if upright else step
        for row, top in enumerate(range(0, size, step)):
            for left in range((row % 2) * step - offset, size, 2 * step):
                draw.rectangle((left, top, left + step - 1, top + step - 1), fill=second)
    elif background.pattern == "dotted":
        radius = step * 0.3
        for row, middle in enumerate(range(step // 2, size + step, step)):
            shift = (row % 2) * step // 2 if upright else 0
            for center in range(step // 2 - shift, size + step, step):
                dot = (center - radius, middle - radius, center + radius, middle + radius)
                draw.ellipse(dot, fill=second)
    return image
