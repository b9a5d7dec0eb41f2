"""Reads captions of scenes: is it a sentence of their grammar, is it true of a scene, does it name all objects.

`read_caption` is the reverse of `write_captions`. First it replaces phrases by symbols: N for a first mention ("two big
dogs"), T for a later one ("the dogs"), G for the background. Then what is left, such as ``there are N above N on G``,
must match a template and one of the layouts.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from narvl_plugin.data.scenes.backgrounds import COLORS
from narvl_plugin.data.scenes.captions import KINDS_OF_IMAGE, MAX_WORDS
from narvl_plugin.data.scenes.nouns import NOUNS, plural, with_article
from narvl_plugin.data.scenes.scene import Group, Scene, are_near, is_between, place, relations, thing_relations
from narvl_plugin.data.scenes.words import GROUNDS, NEAR, NUMBERS, PATTERN_NOUNS, PATTERNS, RELATIONS, SIZES


@dataclass(frozen=True)
class Mention:
    """What a caption says of a group where it names it first.

    Attributes:
        noun: the noun.
        count: the number of copies.
        size: "small", "big", or "" if no size is named.
        words: the phrase.
    """

    noun: str
    count: int
    size: str
    words: str


class Claim(NamedTuple):
    """That mentions stand in a relation, or one mention in a place.

    Attributes:
        relation: a key of `RELATIONS`; "near", "between"; "across" or "down" for two copies of a noun; or a place.
        mentions: the numbers of the mentions. The first one has the relation to the others.
    """

    relation: str | tuple[str, str]
    mentions: tuple[int, ...]


@dataclass(frozen=True)
class Reading:
    """What a caption claims.

    Attributes:
        mentions: its groups in order.
        color: the background's colour.
        pattern: the background's pattern.
        claims: the relations and places.
    """

    mentions: tuple[Mention, ...]
    color: str
    pattern: str
    claims: tuple[Claim, ...]


def read_caption(caption: str) -> Reading | None:
    """Return what a caption claims, or None if `write_captions` makes no such caption of any scene."""
    if len(caption.split()) > MAX_WORDS:
        return None
    phrases = _Phrases()
    skeleton = _phrase_pattern().sub(phrases.replace, caption)
    mentions, grounds = phrases.mentions, phrases.grounds
    distinct = {mention.noun for mention in mentions}
    if phrases.wrong or len(grounds) != 1 or not 0 < len(distinct) == len(mentions):
        return None
    color, pattern, with_pattern = grounds[0]
    for template in _TEMPLATES:
        found = template.fullmatch(skeleton)
        if found is None or (template is _BACKGROUND_WITH and with_pattern):  # "a background with dots with a dog"
            continue
        verb = found["verb"] if "verb" in template.groupindex else None
        if verb and (verb == "are") != mentions[0].words.startswith(NUMBERS[2:]):
            continue
        for layout in _LAYOUTS:
            claims = layout.read(found["content"], phrases, sentence=template is _STATEMENT)
            if claims is not None:
                return Reading(tuple(mentions), color, pattern, claims)
    return None


def is_true(reading: Reading, scene: Scene) -> bool:
    """Tell whether everything that a caption claims holds in a scene."""
    groups = {group.noun: group for group in scene.groups}
    if (reading.color, reading.pattern) != (scene.background.color, scene.background.pattern):
        return False
    for mention in reading.mentions:
        group = groups.get(mention.noun)
        if group is None or group.count != mention.count or mention.size not in ("", group.size):
            return False
    return all(
        _holds(claim.relation, [groups[reading.mentions[number].noun] for number in claim.mentions])
        for claim in reading.claims
    )


def is_complete(caption: str, scene: Scene) -> bool:
    """Tell whether a caption, which need not be a sentence, holds all nouns of a scene."""
    words = set(caption.split())
    return all(noun in words or plural(noun) in words for noun in scene.nouns)


def _holds(relation: str | tuple[str, str], groups: Sequence[Group]) -> bool:
    """Tell whether a relation holds between groups, the first one being its subject."""
    first = groups[0].things
    match relation:
        case "near":
            return are_near(first[0], groups[1].things[0])
        case "between":
            return is_between(first[0], groups[1].things[0], groups[2].things[0])
        case "across":
            return bool(thing_relations(*first) & {"left", "right"})
        case "down":
            return bool(thing_relations(*first) & {"above", "below"})
        case str():
            return relation in relations(groups[0], groups[1])
        case _:
            return place(first[0]) == relation


# --- Phrases ---------------------------------------------------------------------------------------------------------


def _one_of(words: Sequence[str]) -> str:
    """Return a pattern of these words, the longest first."""
    return "|".join(sorted(words, key=len, reverse=True))


_SIZE_OF = {word: size for size, words in SIZES.items() for word in words}
_PATTERN_OF = {word: pattern for pattern, words in PATTERNS.items() for word in words}
_PATTERN_OF_NOUN = {noun: pattern for pattern, noun in PATTERN_NOUNS.items()}
_RELATION_OF = {phrase: relation for relation, phrases in RELATIONS.items() for phrase in phrases}
_RELATION_OF |= dict.fromkeys(NEAR, "near")


@cache
def _phrase_pattern() -> re.Pattern[str]:
    """Return the pattern of a background, a first mention or a later one."""
    forms = _one_of([*NOUNS, *map(plural, NOUNS)])
    colors, sizes = _one_of(list(COLORS)), _one_of(list(_SIZE_OF))
    return re.compile(
        rf"\b(?:a background with (?P<color>{colors}) (?P<dots>{_one_of(list(_PATTERN_OF_NOUN))})"
        rf"|an? (?:plain )?(?P<ground>{colors})(?: (?P<pattern>{_one_of(list(_PATTERN_OF))}))? (?:{_one_of(GROUNDS)})"
        rf"|(?P<number>an?|a pair of|{_one_of(NUMBERS[2:])}) (?:(?P<size>{sizes}) )?(?P<noun>{forms})"
        rf"|the (?P<later>{forms}))\b"
    )


class _Phrases:
    """The phrases of one caption, gathered while symbols take their places.

    Attributes:
        mentions: the first mentions.
        later: the words of the later ones, without "the".
        grounds: (colour, pattern, whether it is "a background with dots") of each background.
        wrong: whether an article or a number does not agree.
    """

    def __init__(self) -> None:
        self.mentions: list[Mention] = []
        self.later: list[str] = []
        self.grounds: list[tuple[str, str, bool]] = []
        self.wrong = False

    def replace(self, found: re.Match[str]) -> str:
        """Keep a phrase, and return its symbol."""
        article = found[0].split()[0]
        if found["color"]:
            self.grounds.append((found["color"], _PATTERN_OF_NOUN[found["dots"]], True))
            return "G"
        if found["ground"]:
            plain = " plain " in found[0]
            self.wrong |= with_article(found[0].removeprefix(article).strip()) != found[0]
            self.wrong |= plain and found["pattern"] is not None
            self.grounds.append((found["ground"], _PATTERN_OF.get(found["pattern"], "plain"), False))
            return "G"
        if found["later"]:
            self.later.append(found["later"])
            return "T"
        number, form = found["number"], found["noun"]
        count = 1 if number in ("a", "an") else 2 if number == "a pair of" else NUMBERS.index(number)
        nouns = [noun for noun in _nouns_of(form) if (noun if count == 1 else plural(noun)) == form]
        words = found[0].removeprefix(article).strip()
        if not nouns or (count == 1 and with_article(words) != found[0]):
            self.wrong = True
            return "N"
        self.mentions.append(Mention(nouns[0], count, _SIZE_OF.get(found["size"], ""), found[0]))
        return "N"

    def is_later(self, number: int, mention: int) -> bool:
        """Tell whether a later mention is that of a first one."""
        first = self.mentions[mention]
        return self.later[number] == (first.noun if first.count == 1 else plural(first.noun))


@cache
def _nouns_of(form: str) -> tuple[str, ...]:
    """Return the nouns of which a word is the singular or the plural."""
    return tuple(noun for noun in NOUNS if form in (noun, plural(noun)))


# --- Templates and layouts -------------------------------------------------------------------------------------------

_STATEMENT = re.compile(r"(?P<content>N.*) on G")
_BACKGROUND_WITH = re.compile(r"G with (?P<content>.+)")
_TEMPLATES = (
    _STATEMENT,
    re.compile(r"there (?P<verb>is|are) (?P<content>.+) on G"),
    re.compile(rf"(?:{_one_of([with_article(kind) for kind in KINDS_OF_IMAGE])}) of (?P<content>.+) on G"),
    re.compile(r"on G (?:there )?(?P<verb>is|are) (?P<content>.+)"),
    _BACKGROUND_WITH,
)
_RELATED = f"({_one_of([phrase for phrase in _RELATION_OF if phrase not in NEAR])})"
_BESIDE = f"({_one_of(list(_RELATION_OF))})"
Claims = tuple[Claim, ...]


class _Layout:
    """One way to put mentions into words.

    Attributes:
        phrase: the words as a noun phrase.
        sentence: the words with a verb; None if they take none.
    """

    def __init__(
        self, subject: str, rest: str, claims: Callable[["_Phrases", Sequence[str]], Claims | None] | None = None
    ) -> None:
        """Build a layout.

        Args:
            subject: pattern of the words before a verb.
            rest: pattern of the words after it, or empty.
            claims: gives the claims of the phrases and the words that the pattern's groups match; None if the phrases
                do not fit. Without it nothing is claimed.
        """
        self._joined = " and " in subject
        self._claims = claims
        self.phrase = re.compile(f"{subject} {rest}".strip())
        takes_verb = not rest.startswith("with ")
        self.sentence = re.compile(f"{subject} (?P<verb>is|are) {rest}".strip()) if takes_verb else None

    def read(self, content: str, phrases: _Phrases, *, sentence: bool) -> Claims | None:
        """Return the claims of some words in this layout; None if they are in another.

        Args:
            content: the words, with symbols for phrases.
            phrases: the phrases.
            sentence: whether a verb may stand after the subject.
        """
        found = self.phrase.fullmatch(content)
        words = found.groups() if found else ()
        if found is None and sentence and self.sentence:
            found = self.sentence.fullmatch(content)
            if found is None:
                return None
            plural = self._joined or phrases.mentions[0].count > 1
            if (found["verb"] == "are") != plural:
                return None
            place_of_verb = self.sentence.groupindex["verb"] - 1
            words = tuple(word for place, word in enumerate(found.groups()) if place != place_of_verb)
        if found is None:
            return None
        return self._claims(phrases, words) if self._claims else ()


def _place(across: int | None, down: int | None) -> Callable[[_Phrases, Sequence[str]], Claims | None]:
    """Return what gives the claim that a single object is in a place.

    Args:
        across: the number of the matched word for left or right; None for the middle.
        down: the number of the one for top or bottom; None for the middle.
    """

    def claims(phrases: _Phrases, words: Sequence[str]) -> Claims | None:
        if phrases.mentions[0].count > 1:
            return None
        height = {"upper": "top", "lower": "bottom"}.get(words[down], words[down]) if down is not None else "middle"
        return (Claim((words[across] if across is not None else "middle", height), (0,)),)

    return claims


def _copies(relation: str) -> Callable[[_Phrases, Sequence[str]], Claims | None]:
    """Return what gives the claim that two copies of a noun are beside or above each other."""
    return lambda phrases, words: (Claim(relation, (0,)),) if phrases.mentions[0].count == 2 else None


def _related(*pairs: tuple[int, int, int]) -> Callable[[_Phrases, Sequence[str]], Claims | None]:
    """Return what gives the claims of relations.

    Args:
        pairs: of each relation, the number of the matched word, of its subject, and of its object. The word "and"
            claims nothing.
    """

    def claims(phrases: _Phrases, words: Sequence[str]) -> Claims | None:
        found = [
            Claim(_RELATION_OF[words[word]], (first, second)) for word, first, second in pairs if words[word] != "and"
        ]
        for claim in found:
            if claim.relation == "near" and any(phrases.mentions[number].count > 1 for number in claim.mentions):
                return None
        return tuple(found)

    return claims


def _with_later(
    claims: Callable[[_Phrases, Sequence[str]], Claims | None], *mentions: int
) -> Callable[[_Phrases, Sequence[str]], Claims | None]:
    """Return claims that also demand that the later mentions are those of these first ones."""

    def checked(phrases: _Phrases, words: Sequence[str]) -> Claims | None:
        fits = all(phrases.is_later(number, mention) for number, mention in enumerate(mentions))
        return claims(phrases, words) if fits else None

    return checked


def _on_two_sides(phrases: _Phrases, words: Sequence[str]) -> Claims | None:
    """Return the claim of "a dog on the left and a cat on the right"."""
    return (Claim(words[0], (0, 1)),) if set(words) == {"left", "right"} else None


def _between(phrases: _Phrases, words: Sequence[str]) -> Claims | None:
    """Return the claim of "a dog between a cat and an apple"."""
    alone = all(mention.count == 1 for mention in phrases.mentions)
    return (Claim("between", (0, 1, 2)),) if alone else None


def _together(phrases: _Phrases, words: Sequence[str]) -> Claims | None:
    """Return no claim, of three or more copies."""
    return () if phrases.mentions[0].count > 2 else None


_LAYOUTS = (
    # One noun.
    _Layout("N", ""),
    _Layout("N", "in the (?:middle|center)", _place(None, None)),
    _Layout("N", "on the (left|right)(?: side)?", _place(0, None)),
    _Layout("N", "at the (top|bottom)", _place(None, 0)),
    _Layout("N", "in the (top|upper|bottom|lower) (left|right)(?: corner)?", _place(1, 0)),
    _Layout("N", "(?:side by side|next to each other)", _copies("across")),
    _Layout("N", "one (?:above|below) the other", _copies("down")),
    _Layout("N", "together", _together),
    # Two.
    _Layout("N", "on the (left|right) and N on the (left|right)", _on_two_sides),
    _Layout("N and N", f"with T {_RELATED} T", _with_later(_related((0, 0, 1)), 0, 1)),
    _Layout("N and N", ""),
    _Layout("N", f"{_BESIDE} N", _related((0, 0, 1))),
    # Three.
    _Layout("N", "between N and N", _between),
    _Layout("N and N", f"{_RELATED} N", _related((0, 0, 2), (0, 1, 2))),
    _Layout("N", f"{_RELATED} N and N", _related((0, 0, 1), (0, 0, 2))),
    _Layout("N and N and N", ""),
    _Layout("N", f"{_BESIDE} N and N {_BESIDE} T", _with_later(_related((0, 0, 1), (1, 2, 1)), 1)),
    # Four.
    _Layout("N and N", f"{_RELATED} N and N", _related((0, 0, 2), (0, 0, 3), (0, 1, 2), (0, 1, 3))),
    _Layout(f"N and N and N {_BESIDE[:-1]}|and) N", "", _related((0, 2, 3))),
    _Layout("N", f"{_BESIDE} N and N {_BESIDE[:-1]}|and) N", _related((0, 0, 1), (1, 2, 3))),
)
"""The layouts of `write_captions`."""
