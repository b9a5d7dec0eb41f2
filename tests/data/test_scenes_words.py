"""What the words about a scene claim is so: checked against geometry worked out here from the boxes."""

import math
import re
from collections import Counter
from random import Random

import pytest

from narvl_plugin.data.scenes.art import load_art
from narvl_plugin.data.scenes.backgrounds import COLORS, Background
from narvl_plugin.data.scenes.captions import write_captions
from narvl_plugin.data.scenes.compose import Composer, HeldOutPairs
from narvl_plugin.data.scenes.entailment import LABELS, write_hypothesis
from narvl_plugin.data.scenes.nouns import NOUNS, plural
from narvl_plugin.data.scenes.questions import write_question
from narvl_plugin.data.scenes.regions import write_expression
from narvl_plugin.data.scenes.scene import Group, Scene, Thing, is_between, place, relations

_RELATIONS = {
    "left of": ("x", 1), "right of": ("x", -1),
    "above": ("y", 1), "over": ("y", 1),
    "below": ("y", -1), "under": ("y", -1), "beneath": ("y", -1),
}  # fmt: skip
_COUNTS = {"a": 1, "an": 1, "the": 0, "two": 2, "three": 3, "four": 4, "five": 5}
_SIZES = {"small": "small", "little": "small", "tiny": "small", "big": "big", "large": "big"}


def _thing(x: float, y: float, side: float = 0.3) -> Thing:
    return Thing((x - side / 2, y - side / 2, x + side / 2, y + side / 2))


def _group(noun: str, *centers: tuple[float, float], size: str = "") -> Group:
    return Group(noun, size, tuple(_thing(x, y) for x, y in centers))


def _scene(*groups: Group) -> Scene:
    return Scene(groups, Background("green", "striped", 0))


def _composed(number: int) -> list[Scene]:
    nouns = NOUNS[:40]
    composer = Composer(load_art(nouns), HeldOutPairs(nouns, 1), 96, 4)
    return [composer.compose(Random(f"{index}"), unseen_pairs=index % 2 == 0)[0] for index in range(number)]


def _false_claims(text: str, scene: Scene) -> list[str]:
    """Claims of a text that its scene contradicts: counts, sizes, colour, and relations between two nouns."""
    forms = {form: group for group in scene.groups for form in (group.noun, plural(group.noun))}
    text = text.replace("to the left of", "left of").replace("to the right of", "right of")
    text = text.replace("a pair of", "two")
    noun = "|".join(sorted(forms, key=len, reverse=True))
    phrase = rf"\b({'|'.join(_COUNTS)}) (?:({'|'.join(_SIZES)}) )?({noun})\b"
    wrong = []
    for count, size, form in re.findall(phrase, text):
        group = forms[form]
        if _COUNTS[count] not in (0, group.count) or (size and _SIZES[size] != group.size):
            wrong.append(f"{count} {size} {form}")
    plain = re.sub(phrase, r"\3", text)
    claim = rf"\b({noun}) (?:is |are )?({'|'.join(_RELATIONS)}) ({noun})(?: and ({noun}))?(?: on | with |$)"
    for a, relation, b, c in re.findall(claim, plain):
        axis, sign = _RELATIONS[relation]
        for other in [forms[b], *([forms[c]] if c else [])]:
            pairs = [(p, q) for p in forms[a].things for q in other.things]
            if not all(sign * (getattr(q, axis) - getattr(p, axis)) > 0 for p, q in pairs):
                wrong.append(f"{a} {relation} {other.noun}")
    colors = [color for color in COLORS if color in text.split() and color not in forms]
    return wrong + [color for color in colors if color != scene.background.color]


def test_captions_of_composed_scenes_make_no_false_claim_and_say_all_nouns_and_counts() -> None:
    for index, scene in enumerate(_composed(300)):
        captions = write_captions(scene, Random(index))
        assert len(set(captions)) == 5
        for caption in captions:
            words = caption.split()
            assert 6 <= len(words) <= 20
            assert _false_claims(caption, scene) == [], caption
            for group in scene.groups:
                assert (group.noun if group.count == 1 else plural(group.noun)) in words
            assert scene.background.color in words


def test_the_checker_itself_finds_false_claims() -> None:
    scene = _scene(_group("dog", (0.2, 0.5)), _group("cat", (0.8, 0.5), size="big"))
    assert _false_claims("a dog left of a large cat on a green striped background", scene) == []
    assert len(_false_claims("two dogs right of a tiny cat on a red background", scene)) == 4


def test_side_by_side_is_left_or_right_and_never_above_or_below() -> None:
    scene = _scene(_group("dog", (0.2, 0.5)), _group("cat", (0.8, 0.52)))
    said = " ".join(caption for seed in range(60) for caption in write_captions(scene, Random(seed)))
    assert not re.search(r"\b(above|over|below|under|beneath|near|beside|next)\b", said)
    assert re.search(r"dog (is )?(to the )?left of", said) and re.search(r"cat (is )?(to the )?right of", said)
    assert not re.search(r"dog (is )?(to the )?right of", said)
    assert {"picture", "image", "photo", "there", "backdrop"} <= set(said.split())


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((0.2, 0.5), (0.8, 0.5), ["left"]),
        ((0.5, 0.8), (0.5, 0.2), ["below"]),
        ((0.8, 0.2), (0.2, 0.8), ["right", "above"]),
        ((0.5, 0.5), (0.55, 0.6), []),
    ],
)
def test_relations(a: tuple[float, float], b: tuple[float, float], expected: list[str]) -> None:
    assert relations(_group("dog", a), _group("cat", b)) == expected


def test_a_relation_of_copies_needs_all_of_them() -> None:
    dogs = _group("dog", (0.2, 0.2), (0.8, 0.2))
    assert relations(dogs, _group("cat", (0.5, 0.8))) == ["above"]
    assert relations(dogs, _group("cat", (0.5, 0.2))) == []


def test_between_and_places() -> None:
    assert is_between(_thing(0.5, 0.5), _thing(0.2, 0.45), _thing(0.8, 0.5))
    assert not is_between(_thing(0.5, 0.8), _thing(0.2, 0.3), _thing(0.8, 0.3))
    assert place(_thing(0.2, 0.8)) == ("left", "bottom")
    assert place(_thing(0.5, 0.5)) == ("middle", "middle")
    assert place(_thing(0.4, 0.5)) is None


def test_expressions_fit_one_object() -> None:
    """A noun alone means its only copy; a side means the outermost copy, by its centre."""
    ends = {
        "left": ("x", min), "leftmost": ("x", min), "right": ("x", max), "rightmost": ("x", max),
        "upper": ("y", min), "highest": ("y", min), "lower": ("y", max), "lowest": ("y", max),
    }  # fmt: skip
    for index, scene in enumerate(_composed(200)):
        text, thing = write_expression(scene, Random(index))
        (group,) = [group for group in scene.groups if thing in group.things]
        assert group.noun in text.split() and _false_claims(text, scene) == []
        if group.count > 1:
            (word,) = set(text.split()) & set(ends)
            axis, outermost = ends[word]
            assert getattr(thing, axis) == outermost(getattr(other, axis) for other in group.things)


def test_hypotheses_agree_with_their_labels() -> None:
    seen = dict.fromkeys(LABELS, 0)
    for index, scene in enumerate(_composed(300)):
        random = Random(index)
        captions = write_captions(scene, random)
        hypothesis, label = write_hypothesis(scene, captions, NOUNS[:40], random)
        seen[label] += 1
        named = {noun for noun in NOUNS[:40] if {noun, plural(noun)} & set(hypothesis.split())}
        if label == "contradiction":
            assert named - set(scene.nouns) or _false_claims(hypothesis, scene) or _says_wrong_size(hypothesis, scene)
        else:
            assert named <= set(scene.nouns)
            assert not _false_claims(hypothesis, scene) and not _says_wrong_size(hypothesis, scene)
    assert min(seen.values()) > 70


@pytest.mark.integration
def test_words_alone_do_not_tell_what_is_so_from_what_is_not() -> None:
    rows = []
    for index, scene in enumerate(_composed(3000)):
        random = Random(index)
        captions = write_captions(scene, random)
        hypothesis, label = write_hypothesis(scene, captions, NOUNS[:40], random)
        if label != "neutral":
            rows.append((set(hypothesis.split()), label == "entailment"))
    learned, asked = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    # Naive Bayes on words, with one more of each.
    counts = {so: Counter(word for words, label in learned if label == so for word in words) for so in (True, False)}
    totals = {so: sum(label == so for _, label in learned) + 2 for so in (True, False)}

    def score(words: set[str], so: bool) -> float:
        return sum(math.log((counts[so][word] + 1) / totals[so]) for word in words)

    right = sum((score(words, True) > score(words, False)) == label for words, label in asked) / len(asked)
    assert right == pytest.approx(0.5, abs=0.06)


def _says_wrong_size(hypothesis: str, scene: Scene) -> bool:
    """Whether "the dog is big" is said of a dog that is not."""
    found = re.fullmatch(rf"the (\w+) (?:is|are) ({'|'.join(_SIZES)})", hypothesis)
    if not found:
        return False
    sizes = {form: group.size for group in scene.groups for form in (group.noun, plural(group.noun))}
    return sizes[found[1]] != _SIZES[found[2]]


def test_answers_about_a_known_scene() -> None:
    scene = _scene(_group("dog", (0.2, 0.5)), _group("apple", (0.8, 0.4), (0.8, 0.8), size="small"))
    known = dict(write_question(scene, ("dog", "apple", "cat"), Random(seed)) for seed in range(400))
    expected = {
        "how many dogs are there": [(1.0, "one")],
        "how many apples are there": [(1.0, "two")],
        "how many cats are there": [(1.0, "zero"), (0.6, "none")],
        "how many objects are in the picture": [(1.0, "three")],
        "what color is the background": [(1.0, "green")],
        "which pattern does the background have": [(1.0, "striped")],
        "is there a dog": [(1.0, "yes")],
        "is there a cat": [(1.0, "no")],
        "what is left of the apples": [(1.0, "dog")],
        "are the apples left or right of the dog": [(1.0, "right")],
        "how big are the apples": [(1.0, "small"), (0.6, "little"), (0.6, "tiny")],
        "what is in the picture": [(1.0, "dog"), (0.6, "apple")],
    }
    assert expected.items() <= known.items()
