"""Phrases for all objects that they fit: read back word by word, and compared with the scene's objects."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import pytest

from narvl_plugin.data.scenes import NOUNS, plural, write_scenes
from narvl_plugin.data.scenes.backgrounds import COLORS, PATTERNS, Background
from narvl_plugin.data.scenes.phrases import TEMPLATES, Phrase, matches, write_phrase
from narvl_plugin.data.scenes.scene import Group, Scene, Thing
from narvl_plugin.data.scenes.truth import read_scenes, scenes_file

SIDE = 64
KNOWN = NOUNS[:30]
SINGULAR = {name: noun for noun in KNOWN for name in (noun, plural(noun))}
SMALL, BIG = ("small", "little", "tiny"), ("big", "large")
RELATIONS = {"left of": "left", "right of": "right", "above": "above", "over": "above"} | dict.fromkeys(
    ("below", "under", "beneath"), "below"
)
Box = tuple[float, ...]


@dataclass(frozen=True)
class Said:
    """What a phrase says, as this test reads it."""

    nouns: frozenset[str] = frozenset()  # none for any object
    size: str = ""
    place: str = ""
    relation: tuple[str, str] | None = None
    ground: str = ""
    besides: str = ""


def read(text: str) -> Said:
    """Read a phrase; fail if it is no phrase of the grammar."""
    if found := re.fullmatch(r"(.+) on the (left|right)(?: side)?|(.+) at the (top|bottom)", text):
        return replace(read_head(found[1] or found[3]), place=found[2] or found[4])
    if found := re.fullmatch(rf"(.+?) (?:to the )?({'|'.join(RELATIONS)}) the (\w+)", text):
        return replace(read_head(found[1]), relation=(RELATIONS[found[2]], SINGULAR[found[3]]))
    if found := re.fullmatch(r"(.+) on an? (\w+) background", text):
        assert found[2] in (*COLORS, *PATTERNS)
        return replace(read_head(found[1]), ground=found[2])
    if found := re.fullmatch(r"(.+) (?:but|except) the (\w+)", text):
        assert read_head(found[1]) == Said()
        return Said(besides=SINGULAR[found[2]])
    if found := re.fullmatch(r"(.+) and (.+)", text):
        first, second = read_head(found[1]), read_head(found[2])
        assert first.size == second.size == ""
        assert first.nouns and second.nouns
        return Said(first.nouns | second.nouns)
    return read_head(text)


def read_head(text: str) -> Said:
    """Read the words for objects."""
    words = re.sub(r"^(every|each|all the|all|the) ", "", text).split()
    size = ""
    if words[0] in SMALL + BIG:
        size = "small" if words.pop(0) in SMALL else "big"
    (word,) = words
    if word in ("everything", "object", "objects", "thing", "things"):
        return Said(size=size)
    return Said(frozenset((SINGULAR[word],)), size)


def fitting(said: Said, scene: Scene) -> list[Box] | None:
    """Return the boxes that a phrase fits, in any order, or None if an object is a doubtful case."""
    boxes: list[Box] = []
    ground = said.ground in ("", scene.background.color, scene.background.pattern)
    for group, thing in ((one, thing) for one in scene.groups for thing in one.things):
        left, top, right, bottom = thing.box
        x, y = (left + right) / 2, (top + bottom) / 2
        if said.nouns and group.noun not in said.nouns:
            continue
        if said.besides == group.noun or (said.size and said.size != group.size):
            continue
        if said.place:
            along = {"left": 1 - x, "right": x, "top": 1 - y, "bottom": y}[said.place]
            if 0.5 < along < 0.62:
                return None
            if along <= 0.5:
                continue
        if said.relation:
            relation, anchor = said.relation
            if group.noun == anchor:
                continue
            (others,) = (other.things for other in scene.groups if other.noun == anchor)
            far = []
            for other in others:
                right_by, down_by = x - (other.box[0] + other.box[2]) / 2, y - (other.box[1] + other.box[3]) / 2
                along, across = {
                    "left": (-right_by, down_by),
                    "right": (right_by, down_by),
                    "above": (-down_by, right_by),
                    "below": (down_by, right_by),
                }[relation]
                far.append("yes" if along >= 0.15 and along >= 0.6 * abs(across) else "no" if along <= 0 else "perhaps")
            if set(far) == {"no"}:
                continue
            if set(far) != {"yes"}:
                return None
        if ground:
            boxes.append(thing.box)
    return boxes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, train=1200, valid=1, test=1, size=SIDE, nouns=len(KNOWN), tasks=("caption", "regions"))
    return folder


@pytest.fixture(scope="module")
def rows(folder: Path) -> list[tuple[Scene, str, str]]:
    """Give the content of each scene, its phrase, and the column of its boxes."""
    scenes = read_scenes(scenes_file(folder / "caption" / "train.tsv"))
    lines = [line.split("\t") for line in (folder / "regions" / "train.tsv").read_text().splitlines()]
    assert [len(line) for line in lines] == [5] * 1200
    assert [line[0] for line in lines] == [line[1] for line in lines] == list(scenes)
    return [(scene, line[2], line[3]) for scene, line in zip(scenes.values(), lines, strict=True)]


def boxes_of(column: str) -> list[list[int]]:
    return [[int(edge) for edge in box.split(",")] for box in column.split("&&")] if column else []


@pytest.mark.integration
def test_each_phrase_has_the_boxes_of_all_objects_that_it_fits(rows: list[tuple[Scene, str, str]]) -> None:
    for scene, text, column in rows:
        found = fitting(read(text), scene)
        assert found is not None, f"{text} is doubtful in {scene}"
        expected = sorted([round(edge * SIDE) for edge in box] for box in found)
        assert sorted(boxes_of(column)) == expected, (text, scene)


@pytest.mark.integration
def test_boxes_are_in_reading_order(rows: list[tuple[Scene, str, str]]) -> None:
    for _, _, column in rows:
        corners = [(top, left) for left, top, _, _ in boxes_of(column)]
        assert corners == sorted(corners)


@pytest.mark.integration
def test_numbers_of_boxes_are_spread_and_all_kinds_of_phrases_occur(rows: list[tuple[Scene, str, str]]) -> None:
    numbers = Counter(len(boxes_of(column)) for _, _, column in rows)
    assert set(numbers) == {0, 1, 2, 3, 4}
    assert 0.16 < numbers[0] / 1200 < 0.24
    assert all(0.08 < numbers[number] / 1200 < 0.35 for number in (1, 2, 3, 4))
    texts = [text for _, text, _ in rows]
    said = [read(text) for text in texts]
    for kind in ("size", "place", "relation", "ground", "besides"):
        assert sum(bool(getattr(one, kind)) for one in said) > 30, kind
    assert sum(len(one.nouns) == 2 for one in said) > 30
    for one in ("every ", "each ", "all ", "all the ", "the ", "everything"):
        assert sum(text.startswith(one) for text in texts) > 30, one


@pytest.mark.integration
def test_phrases_that_fit_nothing_differ_in_one_word_from_one_that_fits(rows: list[tuple[Scene, str, str]]) -> None:
    for scene, text, column in rows:
        if column:
            continue
        said = read(text)
        others = [replace(said, nouns=frozenset((noun,))) for noun in scene.nouns if said.nouns]
        others += [replace(said, size=size) for size in ("small", "big") if said.size]
        others += [replace(said, place=place) for place in ("left", "right", "top", "bottom") if said.place]
        if said.ground:
            others += [replace(said, ground=ground) for ground in (scene.background.color, scene.background.pattern)]
        if said.relation:
            others += [replace(said, relation=(name, said.relation[1])) for name in set(RELATIONS.values())]
        assert any(fitting(other, scene) for other in others), (text, scene)


def thing(x: float, y: float) -> Thing:
    return Thing((x - 0.1, y - 0.1, x + 0.1, y + 0.1))


CATS = thing(0.2, 0.2), thing(0.3, 0.8)
DOG = thing(0.7, 0.25)
OWL = thing(0.56, 0.8)
SCENE = Scene(
    (Group("cat", "small", CATS), Group("dog", "big", (DOG,)), Group("owl", "", (OWL,))), Background("red", "dotted", 0)
)


@pytest.mark.parametrize(
    ("phrase", "found"),
    [
        (Phrase(), [*CATS, DOG, OWL]),
        (Phrase("cat"), [*CATS]),
        (Phrase("pig"), []),
        (Phrase(size="small"), [*CATS]),
        (Phrase("dog", size="small"), []),
        (Phrase("owl", size="big"), []),
        (Phrase("cat", place="bottom"), [CATS[1]]),
        (Phrase("cat", place="right"), []),
        (Phrase(place="left"), [*CATS]),
        (Phrase(place="right"), None),  # the owl is a little right of the centre
        (Phrase("owl", place="bottom"), [OWL]),
        (Phrase("cat", relation=("left", "dog")), [*CATS]),
        (Phrase("cat", relation=("below", "dog")), [CATS[1]]),
        (Phrase(relation=("left", "dog")), None),  # the owl is left of the dog by little
        (Phrase("owl", relation=("above", "dog")), []),
        (Phrase("dog", relation=("right", "cat")), [DOG]),
        (Phrase("dog", relation=("above", "cat")), None),  # of one of the cats only
        (Phrase("dog", ground="red"), [DOG]),
        (Phrase("dog", ground="dotted"), [DOG]),
        (Phrase("dog", ground="striped"), []),
        (Phrase("dog", also="cat"), [*CATS, DOG]),
        (Phrase(besides="cat"), [DOG, OWL]),
    ],
)
def test_what_a_phrase_fits(phrase: Phrase, found: list[Thing] | None) -> None:
    assert matches(phrase, SCENE) == found


def test_every_kind_of_phrase_has_a_weight() -> None:
    phrases = [Phrase(), Phrase("a"), Phrase("a", also="b"), Phrase(besides="a"), Phrase("a", ground="red")]
    phrases += [Phrase("a", size="big"), Phrase("a", place="left"), Phrase("a", relation=("left", "b"))]
    assert {phrase.template for phrase in phrases} == set(TEMPLATES)


def test_a_phrase_follows_from_the_generator_alone() -> None:
    for seed in range(20):
        assert write_phrase(SCENE, KNOWN, Random(f"{seed}")) == write_phrase(SCENE, KNOWN, Random(f"{seed}"))
