"""The content of a scene and the spatial relations in it. Lengths are fractions of the image's side."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from random import Random
from typing import Any

from narvl_plugin.data.scenes.backgrounds import Background

# The least distance of the centres along a relation's axis ...
_CLEAR_DISTANCE = 0.15
# ... and its least ratio to the distance along the other axis (a diagonal is both left and above).
_CLEAR_SLOPE = 0.6
# The largest free space between the boxes of neighbours.
_NEAR_GAP = 0.15
# The unambiguous limits of the thirds of the image, for a single object.
_LOW, _MIDDLE, _HIGH = 0.38, (0.42, 0.58), 0.62

OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
"""Each relation and its reverse: A left of B is B right of A."""


@dataclass(frozen=True)
class Thing:
    """One object as drawn: its box (left, upper, right, lower) in fractions of the side."""

    box: tuple[float, float, float, float]

    @property
    def x(self) -> float:
        """The horizontal centre."""
        return (self.box[0] + self.box[2]) / 2

    @property
    def y(self) -> float:
        """The vertical centre, growing downwards."""
        return (self.box[1] + self.box[3]) / 2


@dataclass(frozen=True)
class Group:
    """The copies of one noun, all of one size.

    Attributes:
        noun: the noun.
        size: "small", "big" or "" for a medium size without a name.
        things: the copies.
    """

    noun: str
    size: str
    things: tuple[Thing, ...]

    @property
    def count(self) -> int:
        """The number of copies."""
        return len(self.things)


@dataclass(frozen=True)
class Scene:
    """Groups of distinct nouns, in order of drawing, on a background."""

    groups: tuple[Group, ...]
    background: Background

    @property
    def nouns(self) -> tuple[str, ...]:
        """The nouns in the image, each once."""
        return tuple(group.noun for group in self.groups)


def scene_as_json(scene: Scene) -> dict[str, Any]:
    """Return a scene as values of JSON, which `scene_of_json` reads back."""
    groups = [
        {"noun": group.noun, "size": group.size, "boxes": [list(thing.box) for thing in group.things]}
        for group in scene.groups
    ]
    background = {"color": scene.background.color, "pattern": scene.background.pattern}
    return {"groups": groups, "background": {**background, "variant": scene.background.variant}}


def scene_of_json(values: Any) -> Scene:
    """Return the scene of `scene_as_json`.

    Raises:
        ValueError: if the values are of another form.
    """
    try:
        groups = tuple(
            Group(
                str(group["noun"]),
                str(group["size"]),
                tuple(Thing((float(x0), float(y0), float(x1), float(y1))) for x0, y0, x1, y1 in group["boxes"]),
            )
            for group in values["groups"]
        )
        ground = values["background"]
        background = Background(str(ground["color"]), str(ground["pattern"]), int(ground["variant"]))
    except (TypeError, KeyError) as error:
        raise ValueError(f"is no scene ({type(error).__name__}: {error})") from None
    if not all(group.things for group in groups):
        raise ValueError("is no scene (a group has no box)")
    return Scene(groups, background)


def absent_noun(scene: Scene, nouns: Sequence[str], random: Random) -> str:
    """Return one of `nouns` that is not in the image."""
    return random.choice([noun for noun in nouns if noun not in scene.nouns])


def thing_relations(a: Thing, b: Thing) -> set[str]:
    """Return the clear relations of `a` to `b` (left, right, above, below); two of them on a diagonal."""
    across, down = b.x - a.x, b.y - a.y
    found = set()
    if abs(across) >= max(_CLEAR_DISTANCE, _CLEAR_SLOPE * abs(down)):
        found.add("left" if across > 0 else "right")
    if abs(down) >= max(_CLEAR_DISTANCE, _CLEAR_SLOPE * abs(across)):
        found.add("above" if down > 0 else "below")
    return found


def relations(a: Group, b: Group) -> list[str]:
    """Return the relations that hold between every copy of `a` and every copy of `b`, in a fixed order."""
    common = set(OPPOSITE)
    for first in a.things:
        for second in b.things:
            common &= thing_relations(first, second)
    return [relation for relation in OPPOSITE if relation in common]


def are_near(a: Thing, b: Thing) -> bool:
    """Tell whether two objects are neighbours, with little free space between their boxes."""
    across = max(a.box[0], b.box[0]) - min(a.box[2], b.box[2])
    down = max(a.box[1], b.box[1]) - min(a.box[3], b.box[3])
    return max(across, down) <= _NEAR_GAP


def is_between(middle: Thing, a: Thing, b: Thing) -> bool:
    """Tell whether an object lies between two others: opposite relations, and near the line that joins them."""
    to_a, to_b = thing_relations(middle, a), thing_relations(middle, b)
    if not any(relation in to_a and OPPOSITE[relation] in to_b for relation in OPPOSITE):
        return False
    ax, ay, bx, by = a.x - middle.x, a.y - middle.y, b.x - middle.x, b.y - middle.y
    # An angle of at least 140 degrees at the middle one.
    return ax * bx + ay * by <= -0.766 * ((ax * ax + ay * ay) * (bx * bx + by * by)) ** 0.5


def place(thing: Thing) -> tuple[str, str] | None:
    """Return the place of a single object (left | middle | right, top | middle | bottom); None if it is ambiguous."""
    across, down = _third(thing.x), _third(thing.y)
    if across is None or down is None:
        return None
    return ("left", "middle", "right")[across], ("top", "middle", "bottom")[down]


def _third(center: float) -> int | None:
    """Return the third (0, 1, 2) of a coordinate; None if it is ambiguous."""
    if center <= _LOW:
        return 0
    if center >= _HIGH:
        return 2
    return 1 if _MIDDLE[0] <= center <= _MIDDLE[1] else None


def is_describable(groups: tuple[Group, ...]) -> bool:
    """Tell whether words can describe the layout: a single object in a clear place, a relation for every two nouns."""
    if len(groups) == 1:
        return groups[0].count > 1 or place(groups[0].things[0]) is not None
    return all(relations(a, b) for a, b in combinations(groups, 2))
