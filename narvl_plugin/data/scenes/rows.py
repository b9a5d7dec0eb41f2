"""The TSV rows of a scene, one for each task, in OFA's columns."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from random import Random

from narvl_plugin.data.scenes.captions import write_captions
from narvl_plugin.data.scenes.entailment import write_hypothesis
from narvl_plugin.data.scenes.phrases import write_phrase
from narvl_plugin.data.scenes.questions import join_answers, write_question
from narvl_plugin.data.scenes.regions import write_expression
from narvl_plugin.data.scenes.scene import OPPOSITE, Scene, Thing, thing_relations
from narvl_plugin.data.text import REFERENCE_SEPARATOR
from narvl_plugin.data.trees import Node, write_tree
from narvl_plugin.data.triplets import Instance, Triplet, write_triplets

GRAPH_RELATIONS = {"left": "left of", "above": "above"}
"""Relations of scene graphs -> their names. The others are their opposites."""

TREE_REGIONS = ("left", "right")
"""The regions of scene trees."""


@dataclass(frozen=True)
class Example:
    """A finished scene with its image.

    Attributes:
        image_id: its name.
        scene: its content.
        image: base64 of an image file, `side` pixels high and wide.
        side: the side of the image in pixels.
        nouns: all nouns of the data set.
    """

    image_id: str
    scene: Scene
    image: str
    side: int
    nouns: Sequence[str]


def caption_row(example: Example, random: Random) -> list[str]:
    """Return uniq-id, image-id, captions, objects, image: all five captions, joined by `&&`."""
    captions = "&&".join(write_captions(example.scene, random))
    return [example.image_id, example.image_id, captions, "&&".join(example.scene.nouns), example.image]


def vqa_row(example: Example, random: Random) -> list[str]:
    """Return question-id, image-id, question, weighted answers, objects, image."""
    question, answers = write_question(example.scene, example.nouns, random)
    objects = "&&".join(example.scene.nouns)
    return [example.image_id, example.image_id, question, join_answers(answers), objects, example.image]


def refcoco_row(example: Example, random: Random) -> list[str]:
    """Return uniq-id, image-id, text, x0,y0,x1,y1 in pixels, image."""
    text, thing = write_expression(example.scene, random)
    box = ",".join(map(str, _pixels(thing, example)))
    return [example.image_id, example.image_id, text, box, example.image]


def regions_row(example: Example, random: Random) -> list[str]:
    """Return uniq-id, image-id, text, boxes, image: all boxes that the text fits, joined by `&&`.

    A box is x0,y0,x1,y1 in pixels. The column is empty if the text fits none. The boxes are in the reading order of
    their upper left corners: from top to bottom, and from left to right where y0 is equal.
    """
    text, things = write_phrase(example.scene, tuple(example.nouns), random)
    boxes = sorted((_pixels(thing, example) for thing in things), key=lambda box: (box[1], box[0], box))
    joined = REFERENCE_SEPARATOR.join(",".join(map(str, box)) for box in boxes)
    return [example.image_id, example.image_id, text, joined, example.image]


def _pixels(thing: Thing, example: Example) -> list[int]:
    """Return the box of an object in pixels."""
    return [round(edge * example.side) for edge in thing.box]


def snli_ve_row(example: Example, random: Random) -> list[str]:
    """Return uniq-id, image-id, image, hypothesis, caption, label."""
    caption, *others = write_captions(example.scene, random)
    hypothesis, label = write_hypothesis(example.scene, others, example.nouns, random)
    return [example.image_id, example.image_id, example.image, hypothesis, caption, label]


def scene_graph_row(example: Example, random: Random) -> list[str]:
    """Return uniq-id, image-id, triplets, image; see `narvl_plugin.data.triplets` for the column.

    The triplets are one for each two objects with a clear relation. The subject is the object on the left, or, if
    neither is clearly on the left, the one above. Left out are the opposites right and below, and "above" on diagonals:
    they follow, or would double the number of triplets, and a graph has at most one for each of the six pairs of four
    objects. Sizes, backgrounds, "near" and "between" are left out, too.
    """
    things = [(group.noun, thing) for group in example.scene.groups for thing in group.things]
    triplets = []
    for one, other in combinations(things, 2):
        clear = thing_relations(one[1], other[1])
        for relation, name in GRAPH_RELATIONS.items():
            if clear & {relation, OPPOSITE[relation]}:
                first, second = (one, other) if relation in clear else (other, one)
                triplets.append(Triplet(_instance(*first, example), name, _instance(*second, example)))
                break
    return [example.image_id, example.image_id, write_triplets(triplets), example.image]


def _instance(noun: str, thing: Thing, example: Example) -> Instance:
    """Return an object with its box in pixels."""
    x0, y0, x1, y1 = _pixels(thing, example)
    return Instance(noun, (x0, y0, x1, y1))


def scene_tree_row(example: Example, random: Random) -> list[str]:
    """Return uniq-id, image-id, tree, image; see `narvl_plugin.data.trees` for the column.

    The scene has its background's colour and pattern as its label. Its regions are the left and the right half of the
    image, without empty ones. An object is in the half that holds its centre, and its label is its size, if that has a
    name, and its noun. Objects of a region are in order from top to bottom. Relations are left out.
    """
    objects: dict[str, list[tuple[float, float, str]]] = {region: [] for region in TREE_REGIONS}
    for group in example.scene.groups:
        label = f"{group.size} {group.noun}".strip()
        for thing in group.things:
            objects["left" if thing.x < 0.5 else "right"].append((thing.y, thing.x, label))
    regions = tuple(
        Node(region, tuple(Node(label) for *_, label in sorted(things))) for region, things in objects.items() if things
    )
    background = example.scene.background
    tree = Node(f"{background.color} {background.pattern}", regions)
    return [example.image_id, example.image_id, write_tree(tree), example.image]


ROWS: dict[str, Callable[[Example, Random], list[str]]] = {
    "caption": caption_row,
    "vqa_gen": vqa_row,
    "refcoco": refcoco_row,
    "snli_ve": snli_ve_row,
    "regions": regions_row,
    "scene_graph": scene_graph_row,
    "scene_tree": scene_tree_row,
}
"""Task -> the function that makes its row."""
