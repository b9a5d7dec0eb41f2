"""Hypotheses about scenes: true for the image, false, or undecidable from it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import permutations
from random import Random

from narvl_plugin.data.scenes.backgrounds import COLORS
from narvl_plugin.data.scenes.captions import write_captions
from narvl_plugin.data.scenes.nouns import plural, with_article
from narvl_plugin.data.scenes.scene import OPPOSITE, Scene, absent_noun, relations
from narvl_plugin.data.scenes.words import NUMBERS, SIZES, be, definite, relation_phrase

LABELS = ("entailment", "neutral", "contradiction")
Claims = Iterator[tuple[str, str]]
"""For each fact of a scene, a sentence that states it, and one that states a different fact."""
# An image of objects on a background can neither prove nor disprove any of these.
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
    """Write a hypothesis about a scene; the three labels are equally frequent, and so are the kinds of claims.

    True and false hypotheses use the same words about objects of the same kinds. Only the image distinguishes them.

    Args:
        scene: the scene.
        captions: true captions other than the premise.
        nouns: all nouns of the data set, for claims about absent objects.
        random: the random generator.

    Returns:
        The hypothesis and its label, one of `LABELS`.
    """
    label = random.choice(LABELS)
    if label == "neutral":
        thing = definite(random.choice(scene.groups))
        return random.choice(_UNDECIDABLE).format(thing=thing), label
    kinds = [claims for kind in _KINDS if (claims := list(kind(scene, captions, nouns, random)))]
    true, false = random.choice(random.choice(kinds))
    return (true if label == "entailment" else false), label


def _color_claims(scene: Scene, captions: Sequence[str], nouns: Sequence[str], random: Random) -> Claims:
    other = random.choice([color for color in COLORS if color != scene.background.color])
    yield f"the background is {scene.background.color}", f"the background is {other}"


def _presence_claims(scene: Scene, captions: Sequence[str], nouns: Sequence[str], random: Random) -> Claims:
    absent = absent_noun(scene, nouns, random)
    for group in scene.groups:
        yield _state_count(group.noun, group.count), _state_count(absent, group.count)


def _state_count(noun: str, count: int) -> str:
    """Return a sentence that states the count of a noun."""
    if count == 1:
        return f"there is {with_article(noun)}"
    return f"there are {NUMBERS[count]} {plural(noun)}"


def _size_claims(scene: Scene, captions: Sequence[str], nouns: Sequence[str], random: Random) -> Claims:
    for group in scene.groups:
        if group.size:
            sizes = (group.size, "small" if group.size == "big" else "big")
            true, false = (f"{definite(group)} {be(group)} {random.choice(SIZES[size])}" for size in sizes)
            yield true, false


def _relation_claims(scene: Scene, captions: Sequence[str], nouns: Sequence[str], random: Random) -> Claims:
    for a, b in permutations(scene.groups, 2):
        for relation in relations(a, b):
            true, false = (
                f"{definite(a)} {be(a)} {relation_phrase(said, random)} {definite(b)}"
                for said in (relation, OPPOSITE[relation])
            )
            yield true, false


def _caption_claims(scene: Scene, captions: Sequence[str], nouns: Sequence[str], random: Random) -> Claims:
    other = _with_other_noun(scene, absent_noun(scene, nouns, random), random)
    yield random.choice(captions), random.choice(write_captions(other, random))


def _with_other_noun(scene: Scene, noun: str, random: Random) -> Scene:
    """Return the scene with the noun of one group replaced."""
    changed = random.randrange(len(scene.groups))
    groups = [replace(group, noun=noun) if i == changed else group for i, group in enumerate(scene.groups)]
    return replace(scene, groups=tuple(groups))


_KINDS: tuple[Callable[[Scene, Sequence[str], Sequence[str], Random], Claims], ...] = (
    _color_claims,
    _presence_claims,
    _size_claims,
    _relation_claims,
    _caption_claims,
)
