"""What a scene holds and which words of place are true of it. Lengths are fractions of the picture's side."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from random import Random

from narvl_plugin.data.scenes.backgrounds import Background

# A relation counts when centres lie at least this far apart along its axis ...
_CLEAR_DISTANCE = 0.15
# ... and it is at least this part of the distance along the other axis (a diagonal is both left and above).
_CLEAR_SLOPE = 0.6
# Free space between the boxes of neighbours, at most.
_NEAR_GAP = 0.15
# Where a third of the picture surely ends and the next surely begins, for a lonely object.
_LOW, _MIDDLE, _HIGH = 0.38, (0.42, 0.58), 0.62

OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
"""Each relation and its reverse: A left of B is B right of A."""


@dataclass(frozen=True)
class Thing:
    """One object as drawn: its box (left, upper, right, lower) in fractions of the side."""

    box: tuple[float, float, float, float]

    @property
    def x(self) -> float:
        """Horizontal centre."""
        return (self.box[0] + self.box[2]) / 2

    @property
    def y(self) -> float:
        """Vertical centre, growing downwards."""
        return (self.box[1] + self.box[3]) / 2


@dataclass(frozen=True)
class Group:
    """The copies of one noun: all of one size, which is "small", "big" or "" (plain, not named)."""

    noun: str
    size: str
    things: tuple[Thing, ...]

    @property
    def count(self) -> int:
        """How many copies there are."""
        return len(self.things)


@dataclass(frozen=True)
class Scene:
    """Groups of distinct nouns, in order of drawing, on a background."""

    groups: tuple[Group, ...]
    background: Background

    @property
    def nouns(self) -> tuple[str, ...]:
        """The nouns in the picture, each once."""
        return tuple(group.noun for group in self.groups)


def absent_noun(scene: Scene, nouns: Sequence[str], random: Random) -> str:
    """One of `nouns` that is not in the picture."""
    return random.choice([noun for noun in nouns if noun not in scene.nouns])


def thing_relations(a: Thing, b: Thing) -> set[str]:
    """Which of left, right, above, below are plainly true of `a` seen from `b`: two of them on a diagonal."""
    across, down = b.x - a.x, b.y - a.y
    found = set()
    if abs(across) >= max(_CLEAR_DISTANCE, _CLEAR_SLOPE * abs(down)):
        found.add("left" if across > 0 else "right")
    if abs(down) >= max(_CLEAR_DISTANCE, _CLEAR_SLOPE * abs(across)):
        found.add("above" if down > 0 else "below")
    return found


def relations(a: Group, b: Group) -> list[str]:
    """The relations that hold between every copy of `a` and every copy of `b`, in a fixed order."""
    common = set(OPPOSITE)
    for first in a.things:
        for second in b.things:
            common &= thing_relations(first, second)
    return [relation for relation in OPPOSITE if relation in common]


def are_near(a: Thing, b: Thing) -> bool:
    """Whether two objects are neighbours: little free space between their boxes."""
    across = max(a.box[0], b.box[0]) - min(a.box[2], b.box[2])
    down = max(a.box[1], b.box[1]) - min(a.box[3], b.box[3])
    return max(across, down) <= _NEAR_GAP


def is_between(middle: Thing, a: Thing, b: Thing) -> bool:
    """Whether an object lies between two others: opposite relations, and near the line that joins them."""
    to_a, to_b = thing_relations(middle, a), thing_relations(middle, b)
    if not any(relation in to_a and OPPOSITE[relation] in to_b for relation in OPPOSITE):
        return False
    ax, ay, bx, by = a.x - middle.x, a.y - middle.y, b.x - middle.x, b.y - middle.y
    # An angle of at least 140 degrees at the middle one.
    return ax * bx + ay * by <= -0.766 * ((ax * ax + ay * ay) * (bx * bx + by * by)) ** 0.5


def place(thing: Thing) -> tuple[str, str] | None:
    """Where a lonely object is: (left | middle | right, top | middle | bottom), None if arguable."""
    across, down = _third(thing.x), _third(thing.y)
    if across is None or down is None:
        return None
    return ("left", "middle", "right")[across], ("top", "middle", "bottom")[down]


def _third(center: float) -> int | None:
    """Which third a coordinate is plainly in (0, 1, 2), None if that can be argued about."""
    if center <= _LOW:
        return 0
    if center >= _HIGH:
        return 2
    return 1 if _MIDDLE[0] <= center <= _MIDDLE[1] else None


def is_describable(groups: tuple[Group, ...]) -> bool:
    """Whether words can say where all is: a lonely object in a plain place, every two nouns in a relation."""
    if len(groups) == 1:
        return groups[0].count > 1 or place(groups[0].things[0]) is not None
    return all(relations(a, b) for a, b in combinations(groups, 2))
