"""Phrases for all objects of a scene that they fit: "every dog on the left", "everything but the cats".

A phrase may fit no object, one, or several. The scene decides exactly which. A phrase is not used if an object is a
doubtful case, for example a little left of the centre. Objects have a noun, a size and a box. Colours and patterns
belong to the background, so phrases name these as what the objects are on.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from random import Random

from narvl_plugin.data.scenes.backgrounds import COLORS, PATTERNS
from narvl_plugin.data.scenes.nouns import plural, with_article
from narvl_plugin.data.scenes.scene import OPPOSITE, Group, Scene, Thing, absent_noun, thing_relations
from narvl_plugin.data.scenes.words import SIZES, definite, relation_phrase

EMPTY_SHARE = 0.2
"""Share of phrases that fit no object."""
PLACES = {
    "left": ("on the left", "on the left side"),
    "right": ("on the right", "on the right side"),
    "top": ("at the top",),
    "bottom": ("at the bottom",),
}
"""Place -> its wordings."""
_ANYTHING = "object", "thing"
# place -> unit vector towards it
_TOWARDS = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}
# The same of relations, from the other object.
_DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "below": (0, 1)}
# An object is at a place if its centre is at least so far from the image's centre, in the direction of the place. It is
# not there if it is in the other half.
_CLEARLY_THERE = 0.12
_NUMBER_POWER = 1.5  # few scenes have many objects, so large sets are preferred where they are possible


@dataclass(frozen=True)
class Phrase:
    """What a phrase says of the objects that it means. All of it must hold.

    Attributes:
        noun: their noun; "" for any object.
        size: "small", "big", or "" for any size.
        place: a key of `PLACES`, or "" for anywhere.
        relation: a relation (a key of `OPPOSITE`) and the noun of the objects to which it holds; None for no relation.
        ground: the colour or the pattern of the background, or "" for any.
        also: a second noun, whose objects are meant as well; "" for none.
        besides: the noun of the only objects that are not meant; "" for none.
    """

    noun: str = ""
    size: str = ""
    place: str = ""
    relation: tuple[str, str] | None = None
    ground: str = ""
    also: str = ""
    besides: str = ""

    @property
    def template(self) -> str:
        """The key of `TEMPLATES` for what the phrase says."""
        said = (name for name in ("size", "place", "relation", "ground", "also", "besides") if getattr(self, name))
        return next(said, "noun" if self.noun else "all")


TEMPLATES = {"all": 1, "noun": 4, "size": 4, "place": 6, "relation": 8, "ground": 2, "also": 4, "besides": 6}
"""The kinds of phrases, with their weights among phrases that fit an object. Those that few scenes allow weigh more.

Size, place and relation exist for a noun ("every dog on the left") and for any object ("everything on the left").
"""
_EMPTY_TEMPLATES = {**dict.fromkeys(TEMPLATES, 1), "noun": 2, "place": 2}
"""The weights among phrases that fit no object."""


def write_phrase(scene: Scene, nouns: tuple[str, ...], random: Random) -> tuple[str, list[Thing]]:
    """Write a phrase, and find all objects that it fits.

    A fifth of the phrases fit none: one word of a phrase that fits some objects is replaced, such as the noun or the
    place. Of the others, those that fit more objects are preferred, see `_NUMBER_POWER`.

    Args:
        scene: the scene.
        nouns: all nouns of the data set, for phrases about absent objects.
        random: the random generator.

    Returns:
        The phrase and the objects, in the order of the scene.
    """
    by_number: dict[int, list[Phrase]] = {}
    for phrase in _phrases(scene):
        if found := matches(phrase, scene):
            by_number.setdefault(len(found), []).append(phrase)
    if random.random() < EMPTY_SHARE:
        # Each with the number of objects of the phrase from which it is made.
        empty = {
            changed: number
            for number, phrases in by_number.items()
            for phrase in phrases
            for changed in _changed(phrase, scene, nouns, random)
            if matches(changed, scene) == []
        }
        phrase = _choose(empty, _EMPTY_TEMPLATES, random)
        return _words(phrase, empty[phrase], scene, random), []
    numbers = sorted(by_number)
    number = random.choices(numbers, [number**_NUMBER_POWER for number in numbers])[0]
    phrase = _choose(by_number[number], TEMPLATES, random)
    return _words(phrase, number, scene, random), matches(phrase, scene) or []


def matches(phrase: Phrase, scene: Scene) -> list[Thing] | None:
    """Return the objects of a scene that a phrase fits, in the scene's order; None if this is not clear for one."""
    fits: list[Thing] = []
    for group in scene.groups:
        if not _named(phrase, group):
            continue
        for thing in group.things:
            fit = _is_there(phrase, thing, scene)
            if fit is None:
                return None
            if fit:
                fits.append(thing)
    if phrase.ground and phrase.ground not in (scene.background.color, scene.background.pattern):
        return []
    return fits


def _named(phrase: Phrase, group: Group) -> bool:
    """Tell whether the words for objects, without their positions, fit a group."""
    if phrase.relation and phrase.relation[1] == group.noun:
        return False
    noun_fits = phrase.noun in ("", group.noun) or phrase.also == group.noun
    return noun_fits and phrase.besides != group.noun and phrase.size in ("", group.size)


def _is_there(phrase: Phrase, thing: Thing, scene: Scene) -> bool | None:
    """Tell whether the words for positions fit an object; None if that is not clear."""
    if phrase.place:
        right, down = _TOWARDS[phrase.place]
        distance = (thing.x - 0.5) * right + (thing.y - 0.5) * down
        return True if distance >= _CLEARLY_THERE else False if distance <= 0 else None
    if phrase.relation:
        relation, noun = phrase.relation
        right, down = _DIRECTIONS[relation]
        others = [other for group in scene.groups if group.noun == noun for other in group.things]
        if all(relation in thing_relations(thing, other) for other in others):
            return True
        clearly_not = all((thing.x - other.x) * right + (thing.y - other.y) * down <= 0 for other in others)
        return False if clearly_not else None
    return True


def _phrases(scene: Scene) -> Iterator[Phrase]:
    """Yield the phrases of a scene's own words, true or not."""
    for noun in ("", *scene.nouns):
        plain = Phrase(noun)
        yield plain
        for size in SIZES:
            yield replace(plain, size=size)
        for place in PLACES:
            yield replace(plain, place=place)
        for other in scene.nouns:
            if other != noun:
                for relation in OPPOSITE:
                    yield replace(plain, relation=(relation, other))
        for ground in (scene.background.color, scene.background.pattern) if noun else ():
            yield replace(plain, ground=ground)
    for noun, other in combinations(scene.nouns, 2):
        yield Phrase(noun, also=other)
        yield Phrase(other, also=noun)
    for noun in scene.nouns:
        yield Phrase(besides=noun)


def _changed(phrase: Phrase, scene: Scene, nouns: tuple[str, ...], random: Random) -> Iterator[Phrase]:
    """Yield a phrase with one of its words replaced by another one of its kind."""
    if phrase.noun:
        for noun in (*scene.nouns, absent_noun(scene, nouns, random)):
            if noun != phrase.noun and not (phrase.relation and noun == phrase.relation[1]):
                yield replace(phrase, noun=noun)
    if phrase.size:
        yield replace(phrase, size="small" if phrase.size == "big" else "big")
    if phrase.place:
        for place in PLACES:
            if place != phrase.place:
                yield replace(phrase, place=place)
    if phrase.relation:
        for relation in OPPOSITE:
            if relation != phrase.relation[0]:
                yield replace(phrase, relation=(relation, phrase.relation[1]))
    if phrase.ground:
        others = list(COLORS) if phrase.ground in COLORS else list(PATTERNS)
        yield replace(phrase, ground=random.choice([other for other in others if other != phrase.ground]))


def _choose(phrases: Iterable[Phrase], weights: Mapping[str, int], random: Random) -> Phrase:
    """Choose a template by its weight, and a phrase of it."""
    by_template: dict[str, list[Phrase]] = {}
    for phrase in phrases:
        by_template.setdefault(phrase.template, []).append(phrase)
    templates = list(by_template)
    return random.choice(by_template[random.choices(templates, [weights[name] for name in templates])[0]])


def _words(phrase: Phrase, number: int, scene: Scene, random: Random) -> str:
    """Return a wording of a phrase.

    Args:
        phrase: the phrase.
        number: number of the objects for "the dog" or "the dogs": of a phrase that fits none, that of the phrase from
            which it was made.
        scene: the scene.
        random: the random generator.
    """
    groups = {group.noun: group for group in scene.groups}
    if phrase.also:
        return _pair(phrase.noun, phrase.also, groups, random)
    words = _quantified(phrase.noun, phrase.size, number, random)
    if phrase.besides:
        return f"{words} {random.choice(('but', 'except'))} {definite(groups[phrase.besides])}"
    if phrase.place:
        return f"{words} {random.choice(PLACES[phrase.place])}"
    if phrase.relation:
        relation, noun = phrase.relation
        return f"{words} {relation_phrase(relation, random)} {definite(groups[noun])}"
    if phrase.ground:
        return f"{words} on {with_article(phrase.ground)} background"
    return words


def _quantified(noun: str, size: str, number: int, random: Random) -> str:
    """Return "every dog", "all small dogs", "the dogs", "everything" and the like."""
    one = noun or random.choice(_ANYTHING)
    many = plural(one)
    if not noun and not size:
        return random.choice(("everything", "everything", f"all {many}", many, "every object"))
    if size:
        said = random.choice(SIZES[size])
        one, many = f"{said} {one}", f"{said} {many}"
    forms = [f"every {one}", f"all {many}", many]
    if noun:
        forms += [f"each {one}", f"all the {many}", f"the {one if number == 1 else many}"]
    return random.choice(forms)


def _pair(noun: str, other: str, groups: Mapping[str, Group], random: Random) -> str:
    """Return "the dog and the cats", "every dog and every cat" and the like."""
    forms: tuple[Callable[[str], str], ...] = (
        lambda name: definite(groups[name]),
        lambda name: f"every {name}",
        lambda name: f"all {plural(name)}",
        plural,
    )
    form = random.choice(forms)
    return f"{form(noun)} and {form(other)}"
