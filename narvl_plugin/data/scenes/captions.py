"""Captions of scenes: true sentences of 6 to 20 words, in several wordings and word orders."""

from random import Random

from narvl_plugin.data.scenes.scene import (
    OPPOSITE,
    Group,
    Scene,
    are_near,
    is_between,
    place,
    relations,
    thing_relations,
)
from narvl_plugin.data.scenes.words import NEAR, background_phrase, definite, maybe, noun_phrase, relation_phrase

MAX_WORDS = 20
REFERENCES = 5
KINDS_OF_IMAGE = ("picture", "image", "photo", "drawing")
_TEMPLATES = ("plain", "existential", "picture", "background_first", "background_subject", "verb")
# How often each template opens a caption; the others follow without repetition.
_TEMPLATE_WEIGHTS = (4, 3, 3, 2, 1, 3)


def write_captions(scene: Scene, random: Random) -> list[str]:
    """Write five different captions of a scene, each from another template, in random order.

    Args:
        scene: a scene that can be described in words.
        random: the random generator; it decides the wording.

    Returns:
        `REFERENCES` lower-case captions without punctuation, of at most `MAX_WORDS` words each.
    """
    captions: list[str] = []
    for template in _shuffle_templates(random)[:REFERENCES]:
        caption = _write_caption(scene, template, random)
        while caption in captions:
            caption = _write_caption(scene, template, random)
        captions.append(caption)
    return captions


def _shuffle_templates(random: Random) -> list[str]:
    """Return the templates in random order, heavy ones more often first (weighted sampling without replacement)."""
    keys = {name: random.random() ** (1 / weight) for name, weight in zip(_TEMPLATES, _TEMPLATE_WEIGHTS, strict=True)}
    return sorted(_TEMPLATES, key=lambda name: -keys[name])


def _write_caption(scene: Scene, template: str, random: Random) -> str:
    """Write one caption from one template; sizes are left out if the caption is too long."""
    size_probability = 0.9
    while True:
        content = _Content(scene, random, size_probability)
        # "a background with stripes with a dog" would be bad style.
        ground = background_phrase(scene.background, random, with_pattern=template != "background_subject")
        caption = _fill(template, content, ground, random)
        if len(caption.split()) <= MAX_WORDS:
            return caption
        size_probability *= 0.7


def _fill(template: str, content: "_Content", ground: str, random: Random) -> str:
    """Combine a description and a background."""
    be = "are" if content.starts_plural else "is"
    match template:
        case "plain":
            return f"{content} on {ground}"
        case "existential":
            return f"there {be} {content} on {ground}"
        case "picture":
            kind = random.choice(KINDS_OF_IMAGE)
            opening = f"{'an' if kind == 'image' else 'a'} {kind} of"
            return f"{opening} {content} on {ground}"
        case "background_first":
            return f"on {ground} there {be} {content}" if maybe(random, 0.7) else f"on {ground} {be} {content}"
        case "background_subject":
            return f"{ground} with {content}"
        case _:
            return f"{content.as_sentence()} on {ground}"


class _Content:
    """The objects of a scene and their places in words, one random wording for each instance.

    Attributes:
        starts_plural: whether a verb before the words must be plural.
    """

    def __init__(self, scene: Scene, random: Random, size_probability: float) -> None:
        self._random = random
        self._size_probability = size_probability
        # Everything is (subject, rest): a verb may stand in between.
        groups = list(scene.groups)
        random.shuffle(groups)
        describe = (self._one, self._two, self._three, self._four)[len(groups) - 1]
        self._subject, self._rest, self._plural_subject = describe(groups)
        self.starts_plural = self._subject.split()[0] in ("two", "three", "four")

    def __str__(self) -> str:
        """Return the description as one noun phrase."""
        return f"{self._subject} {self._rest}".strip()

    def as_sentence(self) -> str:
        """Return the description with a verb: "a dog is above a cat"; the background completes "two dogs are"."""
        if self._rest.startswith("with "):
            return str(self)
        return f"{self._subject} {'are' if self._plural_subject else 'is'} {self._rest}".strip()

    def _phrase(self, group: Group) -> str:
        return noun_phrase(group, self._random, self._size_probability)

    def _relate(self, a: Group, b: Group) -> str | None:
        """Return how `a` stands to `b`: a relation that holds, sometimes only "next to", None without any."""
        found = relations(a, b)
        near = a.count == b.count == 1 and are_near(a.things[0], b.things[0])
        if near and (not found or maybe(self._random, 0.12)):
            return self._random.choice(NEAR)
        return relation_phrase(self._random.choice(found), self._random) if found else None

    def _clause(self, a: Group, b: Group) -> str:
        """Return two groups in one phrase: "a dog left of a cat", or joined by "and" without a relation."""
        relation = self._relate(a, b)
        return f"{self._phrase(a)} {relation or 'and'} {self._phrase(b)}"

    def _one(self, groups: list[Group]) -> tuple[str, str, bool]:
        (group,) = groups
        return self._phrase(group), self._where(group), group.count > 1

    def _where(self, group: Group) -> str:
        """Return where the only group is: its place in the image, or the relation of its two copies."""
        if group.count == 1:
            spot = place(group.things[0])
            return _name_place(spot, self._random) if spot else ""
        if group.count > 2:
            return "together" if maybe(self._random, 0.4) else ""
        found = thing_relations(*group.things)
        choices = []
        if found & {"left", "right"}:
            choices += ["side by side", "next to each other"]
        if found & {"above", "below"}:
            choices += ["one above the other", "one below the other"]
        return self._random.choice(choices) if choices else ""

    def _two(self, groups: list[Group]) -> tuple[str, str, bool]:
        a, b = groups
        found = relations(a, b)
        choice = self._random.random()
        if choice < 0.15 and set(found) & {"left", "right"}:
            first, second = ("left", "right") if "left" in found else ("right", "left")
            rest = f"on the {first} and {self._phrase(b)} on the {second}"
            return self._phrase(a), rest, a.count > 1
        if choice < 0.3 and found:
            relation = self._random.choice(found)
            apposition = f"with {definite(a)} {relation_phrase(relation, self._random)} {definite(b)}"
            return f"{self._phrase(a)} and {self._phrase(b)}", apposition, True
        phrase = self._relate(a, b)
        if phrase is None:
            return f"{self._phrase(a)} and {self._phrase(b)}", "", True
        return self._phrase(a), f"{phrase} {self._phrase(b)}", a.count > 1

    def _three(self, groups: list[Group]) -> tuple[str, str, bool]:
        a, b, c = groups
        for middle, first, second in ((a, b, c), (b, c, a), (c, a, b)):
            lonely = middle.count == first.count == second.count == 1
            if lonely and is_between(middle.things[0], first.things[0], second.things[0]) and maybe(self._random, 0.4):
                rest = f"between {self._phrase(first)} and {self._phrase(second)}"
                return self._phrase(middle), rest, False
        shared = [relation for relation in relations(a, c) if relation in relations(b, c)]
        if shared and maybe(self._random, 0.5):
            # True for both readings of the "and": both have this relation to the third.
            relation = self._random.choice(shared)
            if maybe(self._random, 0.5):
                rest = f"{relation_phrase(relation, self._random)} {self._phrase(c)}"
                return f"{self._phrase(a)} and {self._phrase(b)}", rest, True
            rest = f"{relation_phrase(OPPOSITE[relation], self._random)} {self._phrase(a)} and {self._phrase(b)}"
            return self._phrase(c), rest, c.count > 1
        of_a, of_c = self._relate(a, b), self._relate(c, b)
        if of_a is None or of_c is None:
            return f"{self._phrase(a)} and {self._phrase(b)} and {self._phrase(c)}", "", True
        rest = f"{of_a} {self._phrase(b)} and {self._phrase(c)} {of_c} {definite(b)}"
        return self._phrase(a), rest, a.count > 1

    def _four(self, groups: list[Group]) -> tuple[str, str, bool]:
        a, b, c, d = groups
        shared = [
            relation
            for relation in OPPOSITE
            if all(relation in relations(first, second) for first in (a, b) for second in (c, d))
        ]
        if shared and maybe(self._random, 0.4):
            relation = self._random.choice(shared)
            rest = f"{relation_phrase(relation, self._random)} {self._phrase(c)} and {self._phrase(d)}"
            return f"{self._phrase(a)} and {self._phrase(b)}", rest, True
        phrase = self._relate(a, b)
        if phrase is None:
            return f"{self._phrase(a)} and {self._phrase(b)} and {self._clause(c, d)}", "", True
        return self._phrase(a), f"{phrase} {self._phrase(b)} and {self._clause(c, d)}", a.count > 1


def _name_place(spot: tuple[str, str], random: Random) -> str:
    """Return a place in the image: "in the upper left corner", "in the middle", "at the bottom", "on the left"."""
    across, down = spot
    if across == down == "middle":
        return f"in the {random.choice(('middle', 'center'))}"
    if down == "middle":
        return f"on the {across}" + random.choice(("", " side"))
    if across == "middle":
        return f"at the {down}"
    height = random.choice(("top", "upper") if down == "top" else ("bottom", "lower"))
    return f"in the {height} {across}" + random.choice(("", " corner"))
