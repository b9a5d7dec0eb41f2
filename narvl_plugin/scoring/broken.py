"""Broken sentences: captions with a run of words that no known caption holds; CIDEr hardly notices them."""

from collections.abc import Collection, Iterable, Iterator, Mapping

from narvl_plugin.data.scenes.backgrounds import COLORS
from narvl_plugin.data.scenes.nouns import NOUNS, plural
from narvl_plugin.scoring.tokenization import plain_words

RUN = 4
"""Length of the runs that must be known, in words."""
_START, _END = "<start>", "<end>"

Run = tuple[str, ...]


def scene_kinds() -> dict[str, str]:
    """Return the kind of each noun and colour of the embedded scenes; `runs` writes the kind in place of the word."""
    nouns = {form: "<noun>" for noun in NOUNS for form in (noun, plural(noun))}
    return nouns | dict.fromkeys(COLORS, "<colour>")


def pattern(caption: str, kinds: Mapping[str, str]) -> Run:
    """Return the words of a caption, with the kind in place of each word that has one; see `scene_kinds`."""
    return tuple(kinds.get(word, word) for word in plain_words(caption).split())


def runs(caption: str, kinds: Mapping[str, str]) -> Iterator[Run]:
    """Yield all runs of `RUN` words of a caption; its start and its end count as words.

    Args:
        caption: the caption. A shorter one is a single run.
        kinds: the kind that stands for a word, by word; other words stand for themselves.
    """
    words = (_START, *pattern(caption, kinds), _END)
    for first in range(max(1, len(words) - RUN + 1)):
        yield words[first : first + RUN]


def known_runs(captions: Iterable[str], kinds: Mapping[str, str]) -> set[Run]:
    """Return all runs of some captions; see `runs`."""
    return {run for caption in captions for run in runs(caption, kinds)}


def broken_share(captions: Collection[str], known: Collection[Run], kinds: Mapping[str, str]) -> float:
    """Return the share of captions that hold a run which is not known.

    The share tells broken sentences only if the known captions hold nearly all runs of correct language, as those of a
    small grammar do. The share of correct captions shows whether this is so.

    Args:
        captions: the captions to judge, at least one.
        known: the runs of the training captions, from `known_runs`.
        kinds: as for `known_runs`.

    Returns:
        A share between 0 and 1.
    """
    return sum(any(run not in known for run in runs(caption, kinds)) for caption in captions) / len(captions)
