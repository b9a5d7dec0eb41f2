"""What the tests of Query-CTC share: brute force over all paths of tiny lattices."""

import itertools
from collections.abc import Callable, Iterator

import pytest

Collapse = Callable[[tuple[int, ...], int], tuple[int, ...]]
Spellings = Callable[[int, int, int, tuple[int, ...]], Iterator[tuple[int, ...]]]


def collapse_by_hand(path: tuple[int, ...], blank: int) -> tuple[int, ...]:
    """Merge repeats, then drop blanks, the way the definition says it."""
    return tuple(label for label, _ in itertools.groupby(path) if label != blank)


def spellings_by_hand(
    num_queries: int, num_labels: int, blank: int, target: tuple[int, ...]
) -> Iterator[tuple[int, ...]]:
    """Go through all num_labels ** num_queries paths and yield those that collapse to the target."""
    for path in itertools.product(range(num_labels), repeat=num_queries):
        if collapse_by_hand(path, blank) == target:
            yield path


@pytest.fixture(scope="session")
def collapse_path() -> Collapse:
    """The map from a path to its tokens, by definition."""
    return collapse_by_hand


@pytest.fixture(scope="session")
def spellings() -> Spellings:
    """All paths that collapse to a target, by enumeration."""
    return spellings_by_hand
