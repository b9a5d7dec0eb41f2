"""From a random number generator to a scene and its image: objects, sizes, places, background."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

from PIL import Image

from narvl_plugin.data.scenes.art import Glyph, visible_box
from narvl_plugin.data.scenes.backgrounds import COLORS, PATTERNS, VARIANTS, Background, paint_background
from narvl_plugin.data.scenes.scene import Group, Scene, Thing, is_describable

# Longer side of an object, as a fraction of the image's side; a medium size has no name.
_SIZES = {"small": (0.235, 0.295), "": (0.33, 0.39), "big": (0.44, 0.515)}
# Weights of the sizes by the number of objects: crowded images have no room for big ones.
_SIZE_WEIGHTS = {1: (1, 2, 1), 2: (1, 2, 1), 3: (2, 5, 1), 4: (3, 5, 0)}
# The ways to split a number of objects into nouns, with weights.
_SPLITS: dict[int, tuple[tuple[tuple[int, ...], int], ...]] = {
    1: (((1,), 1),),
    2: (((1, 1), 3), ((2,), 1)),
    3: (((1, 1, 1), 3), ((2, 1), 2), ((3,), 1)),
    4: (((1, 1, 1, 1), 2), ((2, 1, 1), 2), ((2, 2), 1), ((3, 1), 1), ((4,), 1)),
}
MAX_OBJECTS = max(_SPLITS)
"""The largest number of objects in an image, with copies."""
_TILT = 30.0
_MARGIN = 0.01
# The largest overlap of two boxes, as a share of the smaller one.
_OVERLAP = 0.06
_PLACEMENT_TRIES = 40
# After so many failed layouts, objects become small; after twice as many, any layout without overlap is accepted.
_LAYOUTS_BEFORE_SMALL = 30


class HeldOutPairs:
    """Pairs of nouns that never share a training image, determined by the nouns and the seed alone.

    The seed shuffles the nouns into a ring. About a tenth of all pairs, those closest in the ring, are held out. Every
    noun is in equally many pairs, and a set of nouns without any pair always exists.
    """

    def __init__(self, nouns: Sequence[str], seed: int) -> None:
        """Choose the pairs among `nouns`."""
        ring = list(nouns)
        Random(f"{seed}/pairs").shuffle(ring)
        reach = max(1, len(ring) // 20)
        self.pairs: tuple[frozenset[str], ...] = tuple(
            frozenset((noun, ring[(position + step) % len(ring)]))
            for position, noun in enumerate(ring)
            for step in range(1, reach + 1)
        )
        self._members = frozenset(self.pairs)

    def found_in(self, nouns: Sequence[str]) -> bool:
        """Tell whether two of these nouns are a held-out pair."""
        return any(frozenset((a, b)) in self._members for i, a in enumerate(nouns) for b in nouns[:i])


@dataclass(frozen=True)
class Composer:
    """Composes scenes of up to `max_objects` objects from `glyphs`, `side` pixels high and wide."""

    glyphs: Mapping[str, Glyph]
    held_out: HeldOutPairs
    side: int
    max_objects: int

    def compose(self, random: Random, *, unseen_pairs: bool) -> tuple[Scene, Image.Image]:
        """Compose a scene.

        Args:
            random: the random generator; it alone decides the scene.
            unseen_pairs: True for a held-out pair among several nouns; False for none.

        Returns:
            The scene and its image (RGB, side x side).
        """
        total = random.randint(1, self.max_objects)
        splits, weights = zip(*_SPLITS[total], strict=True)
        counts = random.choices(splits, weights)[0]
        nouns = self._choose_nouns(random, len(counts), unseen_pairs)
        groups, sprites = self._lay_out(random, nouns, counts)
        background = self._choose_background(random, nouns)
        image = paint_background(background, self.side).copy()
        for sprite, corner in sprites:
            image.paste(sprite, corner, sprite)
        return Scene(groups, background), image

    def _choose_nouns(self, random: Random, number: int, unseen_pairs: bool) -> tuple[str, ...]:
        """Choose distinct nouns with or without a held-out pair among them."""
        everything = list(self.glyphs)
        if unseen_pairs and number > 1:
            pair = sorted(random.choice(self.held_out.pairs))
            others = [noun for noun in everything if noun not in pair]
            nouns = pair + random.sample(others, number - 2)
            random.shuffle(nouns)
            return tuple(nouns)
        while True:
            nouns = random.sample(everything, number)
            if not self.held_out.found_in(nouns):
                return tuple(nouns)

    def _choose_background(self, random: Random, nouns: Sequence[str]) -> Background:
        """Choose a background on which every object is easy to see, if any."""
        # All numbers are drawn unconditionally, so another folder of art changes the colour only if necessary.
        pattern, variant = random.choice(PATTERNS), random.randrange(VARIANTS)
        colors = random.sample(list(COLORS), len(COLORS))
        color = min(colors, key=lambda color: sum(color in self.glyphs[noun].blends for noun in nouns))
        return Background(color, pattern, variant)

    def _lay_out(
        self, random: Random, nouns: Sequence[str], counts: Sequence[int]
    ) -> tuple[tuple[Group, ...], list[tuple[Image.Image, tuple[int, int]]]]:
        """Choose sizes and places until the layout can be described in words."""
        total, attempt = sum(counts), 0
        while True:
            crowded = attempt >= _LAYOUTS_BEFORE_SMALL
            weights = (1, 0, 0) if crowded else _SIZE_WEIGHTS[total]
            sizes = [random.choices(list(_SIZES), weights)[0] for _ in nouns]
            sprites = [
                self._make_sprite(random, noun, size)
                for noun, size, count in zip(nouns, sizes, counts, strict=True)
                for _ in range(count)
            ]
            corners = self._place(random, [sprite.size for sprite in sprites])
            attempt += 1
            if corners is None:
                continue
            placed = list(zip(sprites, corners, strict=True))
            things = iter([self._thing(sprite, corner) for sprite, corner in placed])
            groups = tuple(
                Group(noun, size, tuple(next(things) for _ in range(count)))
                for noun, size, count in zip(nouns, sizes, counts, strict=True)
            )
            if is_describable(groups) or attempt > 2 * _LAYOUTS_BEFORE_SMALL:
                return groups, placed

    def _make_sprite(self, random: Random, noun: str, size: str) -> Image.Image:
        """Return one copy of a noun's art: possibly mirrored, tilted, and scaled to the size of its longer side."""
        image = self.glyphs[noun].image
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        image = image.rotate(random.uniform(-_TILT, _TILT), Image.Resampling.BILINEAR, expand=True)
        image = image.crop(visible_box(image))
        scale = random.uniform(*_SIZES[size]) * self.side / max(image.size)
        width, height = (max(1, round(length * scale)) for length in image.size)
        return image.resize((width, height), Image.Resampling.BICUBIC)

    def _place(self, random: Random, sizes: Sequence[tuple[int, int]]) -> list[tuple[int, int]] | None:
        """Find upper left corners for boxes of these sizes with little overlap; None if all tries fail."""
        margin = round(_MARGIN * self.side)
        corners: list[tuple[int, int]] = []
        for width, height in sizes:
            for _ in range(_PLACEMENT_TRIES):
                left = random.randint(margin, self.side - margin - width)
                top = random.randint(margin, self.side - margin - height)
                if all(
                    _overlap((left, top, width, height), (*corner, *size)) <= _OVERLAP
                    for corner, size in zip(corners, sizes, strict=False)
                ):
                    corners.append((left, top))
                    break
            else:
                return None
        return corners

    def _thing(self, sprite: Image.Image, corner: tuple[int, int]) -> Thing:
        """Return the object of a sprite at a corner; its box is that of the sprite's visible pixels."""
        left, upper, right, lower = visible_box(sprite) or (0, 0, *sprite.size)
        (x, y), side = corner, self.side
        return Thing(((x + left) / side, (y + upper) / side, (x + right) / side, (y + lower) / side))


def _overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> float:
    """Return the common area of two boxes (left, top, width, height) as a share of the smaller one's."""
    across = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    down = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    return max(0, across) * max(0, down) / min(a[2] * a[3], b[2] * b[3])
