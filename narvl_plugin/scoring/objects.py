"""Object recall: whether a caption names the objects in the image; no reference text is involved."""

import re
from collections.abc import Iterable, Mapping, Sequence

from narvl_plugin.data.scenes.nouns import plural
from narvl_plugin.scoring.tokenization import plain_words


class NounFinder:
    """Finds the nouns of a closed list in captions, in the singular or the plural.

    Longer nouns take precedence: with both in the list, "hot dog" in a caption does not name a "dog".
    """

    def __init__(self, nouns: Iterable[str]) -> None:
        self._noun_of: dict[str, str] = {}
        for noun in sorted(set(nouns)):
            for form in (noun, plural(noun)):
                self._noun_of.setdefault(plain_words(form), noun)
        longest_first = sorted(self._noun_of, key=len, reverse=True)
        # Hyphens are part of a word: "hat-stand" does not name a "hat".
        self._pattern = re.compile(rf"(?<![\w-])(?:{'|'.join(map(re.escape, longest_first))})(?![\w-])")

    def find(self, caption: str) -> set[str]:
        """Return the nouns that the caption names, in the singular."""
        return {self._noun_of[form] for form in self._pattern.findall(plain_words(caption))}


def object_recall(hypotheses: Mapping[str, str], objects: Mapping[str, Sequence[str]]) -> float:
    """Return the share of the nouns in the images that the captions name, each once for each image.

    Args:
        hypotheses: captions by image id.
        objects: singular nouns in the image, by image id; at least the ids of ``hypotheses``.

    Returns:
        A share between 0 and 1.

    Raises:
        ValueError: if a caption's image has no list of nouns, or no image has a noun.
    """
    missing = [key for key in hypotheses if key not in objects]
    if missing:
        raise ValueError(f"no list of objects for {len(missing)} images, such as {missing[0]}")
    finder = NounFinder(noun for nouns in objects.values() for noun in nouns)
    present = sum(len(set(objects[key])) for key in hypotheses)
    if not present:
        raise ValueError("no image lists an object, so there is nothing to recall")
    named = sum(len(set(objects[key]) & finder.find(caption)) for key, caption in hypotheses.items())
    return named / present
