"""Object recall against shares counted by hand."""

import pytest

from narvl_plugin.scoring.objects import NounFinder, object_recall


def test_recall_by_hand() -> None:
    hypotheses = {"p": "Two dogs left of a bus.", "q": "a cat", "r": ""}
    objects = {"p": ["dog", "bus", "tree"], "q": ["cat"], "r": ["apple"], "unused": ["owl"]}
    # dog, bus and cat of dog, bus, tree, cat, apple.
    assert object_recall(hypotheses, objects) == pytest.approx(3 / 5)


def test_nouns_are_found_in_singular_and_plural_as_whole_words() -> None:
    finder = NounFinder(["mouse", "leaf", "butterfly", "bus", "cat", "hat"])
    assert finder.find("three mice, two leaves and butterflies") == {"mouse", "leaf", "butterfly"}
    assert finder.find("buses and a caterpillar that chat") == {"bus"}


def test_longer_nouns_win() -> None:
    finder = NounFinder(["dog", "hot dog"])
    assert finder.find("a hot dog") == {"hot dog"}
    assert finder.find("two hot dogs and a dog") == {"hot dog", "dog"}


def test_each_noun_counts_once_an_image() -> None:
    assert object_recall({"p": "a dog and a dog"}, {"p": ["dog", "dog", "cat"]}) == pytest.approx(1 / 2)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="1 images, such as q"):
        object_recall({"q": "a dog"}, {"p": ["dog"]})
    with pytest.raises(ValueError, match="nothing to recall"):
        object_recall({"p": "a dog"}, {"p": []})
