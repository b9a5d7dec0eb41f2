"""Means over seeds, and differences between runs that were tested on the same rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 1000
"""Number of samples of the bootstrap."""
LEVEL = 0.95
"""Share of the bootstrap's differences that the interval holds."""


@dataclass(frozen=True)
class Summary:
    """Values of several seeds.

    Attributes:
        mean: their mean.
        sd: their standard deviation (that of a sample); None for one value.
        number: their number.
    """

    mean: float
    sd: float | None
    number: int


@dataclass(frozen=True)
class Difference:
    """The difference between two rows of a table.

    Attributes:
        mean: mean over seeds of the difference between the mean scores of test rows.
        low: lower end of the interval.
        high: upper end of the interval.
        seeds: number of seeds that both rows have.
        paired: whether both were tested on the same rows with each seed.
    """

    mean: float
    low: float
    high: float
    seeds: int
    paired: bool


@dataclass(frozen=True)
class RowScores:
    """The scores of a run's test rows.

    Attributes:
        test: equal for runs with the same test rows.
        rows: the score of each row.
    """

    test: str
    rows: Sequence[float]


def summary(values: Sequence[float]) -> Summary | None:
    """Return the mean and the spread of values; None without any."""
    if not values:
        return None
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Summary(float(np.mean(values)), spread, len(values))


def difference(pairs: Sequence[tuple[RowScores, RowScores]], seed: int = 0) -> Difference | None:
    """Compare runs with others, in pairs of the same seed.

    The interval is a percentile interval of the bootstrap: in each sample, the test rows of each seed are drawn anew,
    with replacement. Seeds are not drawn, so that the interval holds for these seeds. If both runs of a pair were
    tested on the same rows, the differences of rows are drawn, otherwise the rows of each run.

    Args:
        pairs: for each seed, a run and the run that it is compared with.
        seed: seed of the bootstrap.

    Returns:
        The mean of the first minus the second; None without pairs.
    """
    if not pairs:
        return None
    generator = np.random.default_rng(seed)
    means, samples, paired = [], np.zeros(RESAMPLES), True
    for one, other in pairs:
        if one.test == other.test and len(one.rows) == len(other.rows):
            rows = np.subtract(one.rows, other.rows)
            means.append(rows.mean())
            samples += _resampled(rows, generator)
        else:
            paired = False
            means.append(np.mean(one.rows) - np.mean(other.rows))
            samples += _resampled(np.asarray(one.rows), generator) - _resampled(np.asarray(other.rows), generator)
    low, high = np.quantile(samples / len(pairs), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Difference(float(np.mean(means)), float(low), float(high), len(pairs), paired)


def _resampled(rows: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Return the means of samples with replacement of rows."""
    return np.array([rows[generator.integers(len(rows), size=len(rows))].mean() for _ in range(RESAMPLES)])
