"""The example images of the page: scenes that are drawn at the start, always the same."""

from __future__ import annotations

from random import Random
from typing import NamedTuple

from PIL import Image

from narvl_plugin.data.scenes.art import load_art
from narvl_plugin.data.scenes.captions import write_captions
from narvl_plugin.data.scenes.compose import Composer, HeldOutPairs
from narvl_plugin.data.scenes.entailment import write_hypothesis
from narvl_plugin.data.scenes.nouns import NOUNS
from narvl_plugin.data.scenes.phrases import write_phrase
from narvl_plugin.data.scenes.questions import write_question
from narvl_plugin.data.scenes.regions import write_expression

CHOSEN = (9, 20, 19, 14, 11, 5)
"""Numbers of the scenes. They differ in objects, backgrounds and questions."""
SIDE = 288
"""Side of an example, in pixels: three times what the model in the box reads, so that it looks sharp on the page."""
SEED = 7
"""Seed of the pairs of nouns that no training image of the model in the box shows; the examples show such pairs."""
EASIEST = 24
"""Number of nouns that the model in the box knows."""


class Example(NamedTuple):
    """An example.

    Attributes:
        name: a caption, for those who do not see the image.
        image: the image.
        texts: a text for each verb that reads one.
    """

    name: str
    image: Image.Image
    texts: dict[str, str]


def draw_examples() -> list[Example]:
    """Draw the examples, each with a question, a region, a statement, and a phrase for several regions.

    Raises:
        ArtError: if the package with the emoji art is missing.
    """
    nouns = NOUNS[:EASIEST]
    composer = Composer(load_art(nouns), HeldOutPairs(nouns, SEED), SIDE, max_objects=4)
    examples = []
    for number in CHOSEN:
        scene, image = composer.compose(Random(f"demo/{number}"), unseen_pairs=True)
        random = Random(f"demo/{number}/texts")
        name, *captions = write_captions(scene, random)
        texts = {
            "answer": write_question(scene, nouns, random)[0],
            "locate": write_expression(scene, random)[0],
            "entails": write_hypothesis(scene, captions, nouns, random)[0],
            "regions": write_phrase(scene, nouns, random)[0],
        }
        examples.append(Example(name, image, texts))
    return examples
