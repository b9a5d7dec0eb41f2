"""The phrases that captions, questions and hypotheses share: noun phrases, relations, backgrounds."""

from random import Random

from narvl_plugin.data.scenes.backgrounds import Background
from narvl_plugin.data.scenes.nouns import plural, with_article
from narvl_plugin.data.scenes.scene import Group

NUMBERS = ("zero", "one", "two", "three", "four", "five")
SIZES = {"small": ("small", "little", "tiny"), "big": ("big", "large")}
PATTERNS = {"striped": ("striped",), "dotted": ("dotted", "spotted"), "checked": ("checked", "checkered")}
RELATIONS = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under", "beneath"),
}
NEAR = ("next to", "beside", "near")
PATTERN_NOUNS = {"striped": "stripes", "dotted": "dots", "checked": "checks"}
GROUNDS = ("background", "background", "backdrop")


def maybe(random: Random, probability: float) -> bool:
    """Return True with the given probability."""
    return random.random() < probability


def count_noun(group: Group) -> str:
    """Return the noun in the number of its group: "dog", "dogs"."""
    return group.noun if group.count == 1 else plural(group.noun)


def noun_phrase(group: Group, random: Random, size_probability: float) -> str:
    """Return the first mention of a group: "a big dog", "two dogs", "a pair of small dogs"."""
    words = count_noun(group)
    if group.size and maybe(random, size_probability):
        words = f"{random.choice(SIZES[group.size])} {words}"
    if group.count == 1:
        return with_article(words)
    if group.count == 2 and maybe(random, 0.15):
        return f"a pair of {words}"
    return f"{NUMBERS[group.count]} {words}"


def definite(group: Group) -> str:
    """Return the later mention of a group: "the dog", "the dogs"."""
    return f"the {count_noun(group)}"


def be(group: Group) -> str:
    """Return the verb that agrees with a group: "is" or "are"."""
    return "is" if group.count == 1 else "are"


def relation_phrase(relation: str, random: Random) -> str:
    """Return one of the phrases for left, right, above or below."""
    return random.choice(RELATIONS[relation])


def background_phrase(background: Background, random: Random, *, with_pattern: bool = True) -> str:
    """Return a background with its article: "a plain green backdrop", "a green striped background".

    Args:
        background: the background.
        random: the random generator.
        with_pattern: whether "a background with green stripes" is allowed.

    Returns:
        The phrase.
    """
    if background.pattern == "plain":
        plain = "plain " if maybe(random, 0.3) else ""
        return with_article(f"{plain}{background.color} {random.choice(GROUNDS)}")
    if with_pattern and maybe(random, 0.2):
        return f"a background with {background.color} {PATTERN_NOUNS[background.pattern]}"
    pattern = random.choice(PATTERNS[background.pattern])
    return with_article(f"{background.color} {pattern} {random.choice(GROUNDS)}")
