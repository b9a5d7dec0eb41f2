"""Captions of scenes are read back: which are sentences, which are true, which name everything."""

from __future__ import annotations

from pathlib import Path

import pytest

from narvl_plugin.data.scenes import write_scenes
from narvl_plugin.data.scenes.backgrounds import Background
from narvl_plugin.data.scenes.reading import is_complete, is_true, read_caption
from narvl_plugin.data.scenes.scene import Group, Scene, Thing
from narvl_plugin.data.scenes.truth import CaptionTruth, mean_truth, read_scenes, scenes_file
from narvl_plugin.errors import InputError


def thing(x: float, y: float, side: float = 0.3) -> Thing:
    return Thing((x - side / 2, y - side / 2, x + side / 2, y + side / 2))


CAT_LEFT_OF_DOGS = Scene(
    (
        Group("cat", "small", (thing(0.2, 0.5),)),
        Group("dog", "", (thing(0.7, 0.3), thing(0.7, 0.7))),
    ),
    Background("red", "dotted", 0),
)
LONE_OWL = Scene((Group("owl", "big", (thing(0.8, 0.2),)),), Background("gray", "plain", 0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, train=300, valid=1, test=1, size=32, nouns=60, tasks=("caption", "refcoco"))
    return folder / "caption"


@pytest.mark.integration
def test_all_references_are_true_and_complete_sentences_of_their_scene_alone(folder: Path) -> None:
    scenes = list(read_scenes(scenes_file(folder / "train.tsv")).values())
    rows = [line.split("\t") for line in (folder / "train.tsv").read_text().splitlines()]
    assert len(scenes) == len(rows) == 300
    others = 0
    for place, (scene, row) in enumerate(zip(scenes, rows, strict=True)):
        for caption in row[2].split("&&"):
            reading = read_caption(caption)
            assert reading is not None, caption
            assert is_true(reading, scene) and is_complete(caption, scene), caption
            others += is_true(reading, scenes[place - 1])
    assert others < 5


@pytest.mark.integration
def test_a_word_less_or_twice_makes_no_other_sentence(folder: Path) -> None:
    """But for words that may be left out."""
    free = {"small", "little", "tiny", "big", "large", "plain", "there", "side", "corner", "together", "is", "are"}
    free |= {"striped", "dotted", "spotted", "checked", "checkered"}
    for line in (folder / "train.tsv").read_text().splitlines()[:60]:
        words = line.split("\t")[2].split("&&")[0].split()
        for place, word in enumerate(words):
            doubled = " ".join([*words[:place], word, *words[place:]])
            assert read_caption(doubled) is None, doubled
            if word not in free:
                shorter = " ".join(words[:place] + words[place + 1 :])
                assert read_caption(shorter) is None, shorter


@pytest.mark.parametrize(
    "caption",
    [
        "there is an owl in the upper right on a gray background",
        "a big owl is at the top on a plain gray backdrop",
        "a dog and two cats with the dog above the cats on a red background",
        "a red dotted background with a pair of dogs",
        "a pair of dogs are side by side on a background with red dots",
        "on a red background are two dogs one above the other",
        "an image of three fish together on a red background",
        "a cat between a dog and an owl on a plain white backdrop",
        "a cat left of a dog and an owl under the dog on a blue checked background",
    ],
)
def test_sentences(caption: str) -> None:
    assert read_caption(caption) is not None


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a dog",
        "on a white spotted background there is a giraffe to the right of a",
        "on a pink striped background there are two mushrooms side by side of a",
        "on a blue striped background there is a car above a car",
        "on a gray spotted background there are two cat one below the other",
        "a big a dog on a red background",
        "an dog on a red background",
        "a orange background with a dog",
        "there are a dog and a cat on a red background",
        "a dog and a cat is on a red background",
        "a pair of dogs is side by side on a red background",
        "two dogs on the left on a red background",
        "a dog side by side on a red background",
        "two dogs together on a red background",
        "a dog next to two cats on a red background",
        "a dog on the left and a cat on the left on a red background",
        "a dog and two cats with the dog above the cat on a red background",
        "a background with red dots with a dog",
        "a plain red striped background with a dog",
        "a dog on a red background on a red background",
        "a photo of a dog between a cat and two owls on a red background",
        "a dog and a cat and an owl and a pig and a car on a red background",
        "on a red background " * 5 + "there is a dog",
    ],
)
def test_no_sentences(caption: str) -> None:
    assert read_caption(caption) is None


@pytest.mark.parametrize(
    ("caption", "true"),
    [
        ("a small cat to the left of two dogs on a red dotted background", True),
        ("two dogs to the right of a cat on a background with red dots", True),
        ("a pair of dogs right of a little cat on a red spotted background", True),
        ("a cat and two dogs with the cat left of the dogs on a red dotted backdrop", True),
        ("a cat on the left and two dogs on the right on a red dotted background", True),
        ("a cat and two dogs on a red dotted background", True),
        ("two dogs one above the other on a red dotted background", True),
        ("a big cat to the left of two dogs on a red dotted background", False),  # its size
        ("two big dogs to the right of a cat on a red dotted background", False),  # a medium size has no name
        ("a cat above two dogs on a red dotted background", False),  # their relation
        ("a cat on the right and two dogs on the left on a red dotted background", False),
        ("a cat to the left of three dogs on a red dotted background", False),  # their number
        ("a cat to the left of two dogs on a red background", False),  # the pattern
        ("a cat to the left of two dogs on a blue dotted background", False),  # the colour
        ("a cat to the left of two pigs on a red dotted background", False),  # the noun
        ("two dogs side by side on a red dotted background", False),
    ],
)
def test_what_is_true_of_a_cat_left_of_dogs(caption: str, true: bool) -> None:
    reading = read_caption(caption)
    assert reading is not None
    assert is_true(reading, CAT_LEFT_OF_DOGS) == true


@pytest.mark.parametrize(("place", "true"), [("in the upper right corner", True), ("in the top left", False)])
def test_places(place: str, true: bool) -> None:
    reading = read_caption(f"there is a large owl {place} on a gray background")
    assert reading is not None
    assert is_true(reading, LONE_OWL) == true


def test_shares() -> None:
    captions = {
        "1": "a cat to the left of two dogs on a red dotted background",
        "2": "a cat above two dogs on a red dotted background",
        "3": "two dogs to the right of a cat the cat",
        "4": "an owl in the top right on a gray background",
    }
    scenes = dict.fromkeys("123", CAT_LEFT_OF_DOGS) | {"4": LONE_OWL}
    assert mean_truth(captions, scenes) == CaptionTruth(sentences=0.75, true=0.5, complete=1.0)
    assert mean_truth({"4": "a cat on a red background"}, scenes) == CaptionTruth(1.0, 0.0, 0.0)
    with pytest.raises(InputError, match="5: the file of scenes has no image of this id"):
        mean_truth({"5": ""}, scenes)


@pytest.mark.parametrize(
    "line", ["", "[]", "{}", '{"id": 1, "groups": 3}', '{"id": "1", "groups": [], "background": []}', "[" * 100000]
)
def test_files_that_hold_no_scenes_are_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "test.scenes.jsonl").write_text(f"{line}\n")
    with pytest.raises(InputError, match=r"test\.scenes\.jsonl: line 1 "):
        read_scenes(tmp_path / "test.scenes.jsonl")


def test_only_captions_have_a_file_of_scenes(folder: Path) -> None:
    assert sorted(file.name for file in folder.glob("*.jsonl")) == [
        f"{split}.scenes.jsonl" for split in ("test", "train", "valid")
    ]
    assert list((folder.parent / "refcoco").glob("*.jsonl")) == []
