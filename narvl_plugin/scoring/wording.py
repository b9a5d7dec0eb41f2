"""Signs of broken sentences that need no grammar. CIDEr hardly notices broken sentences."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from narvl_plugin.data.scenes.backgrounds import COLORS
from narvl_plugin.data.scenes.nouns import NOUNS, plural
from narvl_plugin.data.text import split_references
from narvl_plugin.data.tsv import TsvFile
from narvl_plugin.errors import BadRow
from narvl_plugin.scoring.tokenization import plain_words

RUN = 4
"""Length of the runs that must be known, in words."""
KNOWN_ROWS = 20_000
"""Largest number of training rows whose captions are read. Rows hold images, and a large file takes minutes to read."""
_START, _END = "<start>", "<end>"

Run = tuple[str, ...]


class Wording(NamedTuple):
    """What the words of a caption show, or, as shares from 0 to 1, those of several captions.

    The first three are signs of a broken sentence; `novel` is a sign of diversity.

    Correct captions may have new runs, if the language is richer than the known captions. The share of references that
    have them tells how much the share of a system's captions means.

    Attributes:
        new_runs: it holds a run of `RUN` words that no known caption holds; its start and its end count as words.
        doubled: it holds a word, or two words, twice in a row.
        cut: its last word ends no known caption; so does a caption without words.
        novel: no known caption has the same words.
    """

    new_runs: float
    doubled: float
    cut: float
    novel: float


class KnownWording:
    """The wording of known captions, by which others are judged.

    Args:
        captions: the known captions, such as those of the training file.
        kinds: the kind that stands for a word, by word; other words stand for themselves.
    """

    def __init__(self, captions: Iterable[str], kinds: Mapping[str, str]) -> None:
        self.kinds = kinds
        self.runs: set[Run] = set()
        self.patterns: set[Run] = set()
        for caption in captions:
            found = pattern(caption, kinds)
            self.runs.update(runs(found))
            self.patterns.add(found)
        self.ends = {run[-2] for run in self.runs if run[-1] == _END}

    def of(self, caption: str) -> Wording:
        """Return what a caption shows, each as 1 or 0."""
        words, found = plain_words(caption).split(), pattern(caption, self.kinds)
        pairs = list(zip(words, words[1:], strict=False))
        doubled = any(one == other for one, other in pairs) or any(
            one == other for one, other in zip(pairs, pairs[2:], strict=False)
        )
        return Wording(
            float(not self.runs.issuperset(runs(found))),
            float(doubled),
            float(not found or found[-1] not in self.ends),
            float(found not in self.patterns),
        )

    def mean(self, captions: Collection[str]) -> Wording:
        """Return the shares of captions, at least one, that show each."""
        found = [self.of(caption) for caption in captions]
        return Wording(*(sum(values) / len(found) for values in zip(*found, strict=True)))


def scene_kinds() -> dict[str, str]:
    """Return the kind of each noun and colour of the embedded scenes, see `pattern`."""
    nouns = {form: "<noun>" for noun in NOUNS for form in (noun, plural(noun))}
    return nouns | dict.fromkeys(COLORS, "<colour>")


def pattern(caption: str, kinds: Mapping[str, str]) -> Run:
    """Return the words of a caption, with the kind in place of each word that has one."""
    return tuple(kinds.get(word, word) for word in plain_words(caption).split())


def runs(words: Run) -> Iterator[Run]:
    """Yield all runs of `RUN` words of a caption's `pattern`; its start and its end count as words.

    A shorter caption is a single run.
    """
    words = (_START, *words, _END)
    for first in range(max(1, len(words) - RUN + 1)):
        yield words[first : first + RUN]


def captions_of(file: Path, column: int = 2) -> list[str]:
    """Return the captions of a TSV file, of at most `KNOWN_ROWS` rows that are spread evenly over it.

    Rows that cannot be read are left out.

    Args:
        file: the file.
        column: number of the column with captions, from 0.

    Raises:
        InputError: see `TsvFile`.
    """
    tsv = TsvFile(file, [column])
    count = min(len(tsv), KNOWN_ROWS)
    captions: list[str] = []
    for place in range(count):
        with suppress(BadRow):
            captions += split_references(tsv[place * len(tsv) // count][0])
    return captions
