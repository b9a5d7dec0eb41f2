"""Referring expressions: phrases that fit exactly one object of a scene."""

from collections.abc import Iterator
from random import Random

from narvl_plugin.data.scenes.scene import Group, Scene, Thing, relations
from narvl_plugin.data.scenes.words import SIZES, definite, relation_phrase

# The least lead of an object over all of its copies to be "the leftmost" of them.
_CLEAR_LEAD = 0.08
# direction -> (unit vector, word among two, word among more)
_DIRECTIONS = {
    "left": ((-1, 0), "left", "leftmost"),
    "right": ((1, 0), "right", "rightmost"),
    "up": ((0, -1), "upper", "highest"),
    "down": ((0, 1), "lower", "lowest"),
}


def write_expression(scene: Scene, random: Random) -> tuple[str, Thing]:
    """Choose one object of a scene and a phrase that fits no other.

    Args:
        scene: the scene.
        random: the random generator.

    Returns:
        The expression, such as "the big dog left of the cat" or "the leftmost bell", and the object.
    """
    group = random.choice(scene.groups)
    if group.count == 1:
        return _name_single(scene, group, random), group.things[0]
    leads = sorted(_leads(group), key=lambda lead: -lead[0])
    clear = [lead for lead in leads if lead[0] >= _CLEAR_LEAD] or leads[:1]
    _, word, thing = random.choice(clear)
    noun = group.noun
    if word in ("left", "right") and random.random() < 0.5:
        return f"the {noun} on the {word}", thing
    return f"the {word} {noun}", thing


def _name_single(scene: Scene, group: Group, random: Random) -> str:
    """Name the only copy of a noun, sometimes with its size and its relation to another object."""
    size = f"{random.choice(SIZES[group.size])} " if group.size and random.random() < 0.5 else ""
    name = f"the {size}{group.noun}"
    others = [other for other in scene.groups if other is not group and relations(group, other)]
    if others and random.random() < 0.5:
        other = random.choice(others)
        relation = relation_phrase(random.choice(relations(group, other)), random)
        return f"{name} {relation} {definite(other)}"
    return name


def _leads(group: Group) -> Iterator[tuple[float, str, Thing]]:
    """Yield for each direction the lead of the outermost copy over the next one, the word, and the copy."""
    for (right, down), among_two, among_more in _DIRECTIONS.values():
        reach = sorted(((thing.x * right + thing.y * down, thing) for thing in group.things), key=lambda pair: -pair[0])
        yield reach[0][0] - reach[1][0], among_two if group.count == 2 else among_more, reach[0][1]
