"""Questions about scenes with weighted answers: number, place, colour, presence."""

from collections.abc import Callable, Iterator, Sequence
from random import Random

from narvl_plugin.data.scenes.nouns import plural, with_article
from narvl_plugin.data.scenes.scene import OPPOSITE, Group, Scene, absent_noun, place, relations
from narvl_plugin.data.scenes.words import NUMBERS, PATTERNS, SIZES, be, definite, relation_phrase

Answers = list[tuple[float, str]]
"""Confidence and answer, the best first: 1.0 for the answer of most people, 0.6 for other correct answers."""
_SECOND_BEST = 0.6


def write_question(scene: Scene, nouns: Sequence[str], random: Random) -> tuple[str, Answers]:
    """Write one question about a scene.

    Args:
        scene: the scene.
        nouns: all nouns of the data set, for questions about absent objects.
        random: the random generator.

    Returns:
        The question, without its question mark, and its answers.
    """
    kinds = list(_KINDS)
    random.shuffle(kinds)
    for kind in kinds:
        asked = list(kind(scene, nouns, random))
        if asked:
            return random.choice(asked)
    raise AssertionError("every scene has a background to ask for")


def join_answers(answers: Answers) -> str:
    """Return the answers as a TSV column: `confidence|!+answer` joined by `&&`."""
    return "&&".join(f"{confidence}|!+{answer}" for confidence, answer in answers)


def _with_synonyms(best: str, others: Sequence[str]) -> Answers:
    """Return one best answer and other correct answers."""
    return [(1.0, best), *((_SECOND_BEST, other) for other in others if other != best)]


def _how_many(scene: Scene, nouns: Sequence[str], random: Random) -> Iterator[tuple[str, Answers]]:
    for group in scene.groups:
        yield f"how many {plural(group.noun)} are there", [(1.0, NUMBERS[group.count])]
    total = sum(group.count for group in scene.groups)
    yield "how many objects are in the picture", [(1.0, NUMBERS[total])]
    yield f"how many {plural(absent_noun(scene, nouns, random))} are there", _with_synonyms(NUMBERS[0], ["none"])


def _background(scene: Scene, nouns: Sequence[str], random: Random) -> Iterator[tuple[str, Answers]]:
    color, pattern = scene.background.color, scene.background.pattern
    yield "what color is the background", [(1.0, color)]
    yield "which pattern does the background have", _with_synonyms(pattern, PATTERNS.get(pattern, ("none",)))


def _is_there(scene: Scene, nouns: Sequence[str], random: Random) -> Iterator[tuple[str, Answers]]:
    yield f"is there {with_article(random.choice(scene.nouns))}", [(1.0, "yes")]
    yield f"is there {with_article(absent_noun(scene, nouns, random))}", [(1.0, "no")]


def _what_is_where(scene: Scene, nouns: Sequence[str], random: Random) -> Iterator[tuple[str, Answers]]:
    for known in scene.groups:
        for relation in OPPOSITE:
            found = [group for group in scene.groups if group is not known and relation in relations(group, known)]
            if found:
                found.sort(key=lambda group: _distance(group, known))
                question = f"what is {relation_phrase(relation, random)} {definite(known)}"
                yield question, _with_synonyms(found[0].noun, [group.noun for group in found[1:]])


def _distance(a: Group, b: Group) -> float:
    """Return the square of the least distance between two objects of two groups."""
    return min((p.x - q.x) ** 2 + (p.y - q.y) ** 2 for p in a.things for q in b.things)


def _which_side(scene: Scene, nouns: Sequence[str], random: Random) -> Iterator[tuple[str, Answers]]:
    for a in scene.groups:
        for b in scene.groups:
            for relation in relations(a, b) if a is not b else ():
                choice = "left or right of" if relation in ("left", "right") else "above or below"
                yield f"{be(a)} {definite(a)} {choice} {definite(b)}", [(1.0, relation)]


def _how_big(scene: Scene, nouns: Sequence[str], random: Random) -> Iterator[tuple[str, Answers]]:
    for group in scene.groups:
        if group.size:
            yield f"how big {be(group)} {definite(group)}", _with_synonyms(group.size, SIZES[group.size])


def _where(scene: Scene, nouns: Sequence[str], random: Random) -> Iterator[tuple[str, Answers]]:
    if len(scene.groups) == scene.groups[0].count == 1 and (spot := place(scene.groups[0].things[0])):
        across, down = spot
        question = f"where is {definite(scene.groups[0])}"
        if across == down == "middle":
            yield question, _with_synonyms("middle", ["center"])
        elif down == "middle":
            yield question, [(1.0, across)]
        elif across == "middle":
            yield question, [(1.0, down)]
        else:
            other = "upper" if down == "top" else "lower"
            yield question, _with_synonyms(f"{down} {across}", [f"{other} {across}"])


def _what(scene: Scene, nouns: Sequence[str], random: Random) -> Iterator[tuple[str, Answers]]:
    order = {"big": 0, "": 1, "small": 2}
    found = sorted(scene.groups, key=lambda group: order[group.size])
    yield "what is in the picture", _with_synonyms(found[0].noun, [group.noun for group in found[1:]])


_KINDS: tuple[Callable[[Scene, Sequence[str], Random], Iterator[tuple[str, Answers]]], ...] = (
    _how_many,
    _background,
    _is_there,
    _what_is_where,
    _which_side,
    _how_big,
    _where,
    _what,
)
