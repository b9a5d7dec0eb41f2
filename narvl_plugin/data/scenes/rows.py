"""The TSV rows of a scene, one for each task, in OFA's columns."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from narvl_plugin.data.scenes.captions import write_captions
from narvl_plugin.data.scenes.entailment import write_hypothesis
from narvl_plugin.data.scenes.questions import join_answers, write_question
from narvl_plugin.data.scenes.regions import write_expression
from narvl_plugin.data.scenes.scene import Scene


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
    box = ",".join(str(round(edge * example.side)) for edge in thing.box)
    return [example.image_id, example.image_id, text, box, example.image]


def snli_ve_row(example: Example, random: Random) -> list[str]:
    """Return uniq-id, image-id, image, hypothesis, caption, label."""
    caption, *others = write_captions(example.scene, random)
    hypothesis, label = write_hypothesis(example.scene, others, example.nouns, random)
    return [example.image_id, example.image_id, example.image, hypothesis, caption, label]


ROWS: dict[str, Callable[[Example, Random], list[str]]] = {
    "caption": caption_row,
    "vqa_gen": vqa_row,
    "refcoco": refcoco_row,
    "snli_ve": snli_ve_row,
}
"""Task -> the function that makes its row."""
