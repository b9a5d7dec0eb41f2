"""Hypotheses about scenes: true of the picture, false of it, or not to be told from it."""

from collections.abc import Iterator, Sequence
from random import Random

from narvl_plugin.data.scenes.backgrounds import COLORS
from narvl_plugin.data.scenes.nouns import plural, with_article
from narvl_plugin.data.scenes.scene import OPPOSITE, Group, Scene, relations
from narvl_plugin.data.scenes.words import NUMBERS, SIZES, be, definite, relation_phrase

LABELS = ("entailment", "neutral", "contradiction")
# No picture of objects on a background can settle any of these.
_UNDECIDABLE = (
    "a child owns {thing}",
    "somebody bought {thing} yesterday",
    "an artist will sell {thing} next week",
    "nobody has ever liked {thing}",
    "a friend wanted to have {thing}",
    "somebody lost {thing} on a rainy day",
    "the picture of {thing} was made on a monday",
    "a museum paid a lot of money for {thing}",
)


def write_hypothesis(scene: Scene, captions: Sequence[str], nouns: Sequence[str], random: Random) -> tuple[str, str]:
    """Write a hypothesis about a scene; the three labels are equally frequent.

    :param captions: true captions other than the one shown as premise
    :param nouns: all nouns of the data set, for claims about absent things
    :return: hypothesis and label, one of `LABELS`
    """
    label = random.choice(LABELS)
    if label == "neutral":
        thing = definite(random.choice(scene.groups))
        return random.choice(_UNDECIDABLE).format(thing=thing), label
    if label == "entailment":
        return random.choice([*_true_claims(scene, random), random.choice(captions)]), label
    return random.choice(list(_false_claims(scene, nouns, random))), label


def _state_count(group: Group, count: int) -> str:
    """Say that there are so many of a noun."""
    if count == 1:
        return f"there is {with_article(group.noun)}"
    return f"there are {NUMBERS[count]} {plural(group.noun)}"


def _true_claims(scene: Scene, random: Random) -> Iterator[str]:
    """Things that are so."""
    yield f"the background is {scene.background.color}"
    for group in scene.groups:
        yield _state_count(group, group.count)
        if group.size:
            yield f"{definite(group)} {be(group)} {random.choice(SIZES[group.size])}"
    for a, b, relation in _all_relations(scene):
        yield f"{definite(a)} {be(a)} {relation_phrase(relation, random)} {definite(b)}"


def _false_claims(scene: Scene, nouns: Sequence[str], random: Random) -> Iterator[str]:
    """Things that are plainly not so."""
    color = random.choice([color for color in COLORS if color != scene.background.color])
    yield f"the background is {color}"
    absent = random.choice([noun for noun in nouns if noun not in scene.nouns])
    yield f"there is {with_article(absent)}"
    for group in scene.groups:
        # One more than there are: fewer would be true as well.
        yield _state_count(group, group.count + 1)
        if group.size:
            other = "small" if group.size == "big" else "big"
            yield f"{definite(group)} {be(group)} {random.choice(SIZES[other])}"
    for a, b, relation in _all_relations(scene):
        yield f"{definite(a)} {be(a)} {relation_phrase(OPPOSITE[relation], random)} {definite(b)}"


def _all_relations(scene: Scene) -> Iterator[tuple[Group, Group, str]]:
    """Every ordered pair of groups with a relation that holds."""
    for a in scene.groups:
        for b in scene.groups:
            if a is not b:
                for relation in relations(a, b):
                    yield a, b, relation
