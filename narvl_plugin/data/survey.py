"""A check of the rows of training files before training starts, for rows that would end it later."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from narvl_plugin.data.dataset import TsvDataset
from narvl_plugin.errors import BadRow, InputError, SkipBudget

logger = logging.getLogger(__name__)

ROWS_LOOKED_AT = 10_000
"""Largest number of rows that are checked in a file. In grounding each check opens the header of an image."""
BYTES_LOOKED_AT = 1 << 31
"""Largest number of bytes that are checked in a file. Rows with features may have megabytes."""


@dataclass(frozen=True)
class Survey:
    """Result of the check of a file.

    Attributes:
        looked_at: number of rows that were checked.
        total: number of all rows.
        unusable: errors of the checked rows that cannot be used.
    """

    looked_at: int
    total: int
    unusable: list[BadRow]


def survey(dataset: TsvDataset, num_queries: int | None, *, keeps_eos: bool = False) -> Survey:
    """Check the texts of a file's rows, or of a sample of them, and log how many do not fit a student.

    Images are not decoded.

    Args:
        dataset: the rows.
        num_queries: number of a student's queries. None for a teacher.
        keeps_eos: whether a student predicts `</s>`, which takes one query.
    """
    total = len(dataset)
    of_its_size = BYTES_LOOKED_AT * total // Path(dataset.tsv.path).stat().st_size
    rows = np.linspace(0, total - 1, min(total, ROWS_LOOKED_AT, max(2, of_its_size))).round().astype(int).tolist()
    needs, too_long, unusable = [], 0, []
    for row in rows:
        try:
            need = dataset.min_queries(row) + keeps_eos
        except BadRow as error:
            unusable.append(error)
            continue
        needs.append(need)
        if num_queries is not None and need > num_queries:
            too_long += 1
            if dataset.training:  # validation leaves it out of the loss
                unusable.append(does_not_fit(dataset.where(row), need, num_queries))
    if num_queries is not None:
        part = f" of a sample of {len(rows):,} of its {total:,} rows" if len(rows) < total else ""
        left_out = "" if dataset.training else ", and are left out of the loss"
        logger.log(
            logging.WARNING if too_long else logging.INFO,
            "%s: %d of %d targets%s do not fit the model's %d queries%s; the longest needs %d (see --num-queries)",
            *(dataset.tsv.path, too_long, len(needs), part, num_queries, left_out if too_long else ""),
            max(needs, default=0),
        )
    return Survey(len(rows), total, unusable)


def does_not_fit(where: str, need: int, num_queries: int) -> BadRow:
    """Return the error of a row whose target needs more queries than a student has.

    Args:
        where: FILE:ROW.
        need: number of queries that the target needs.
        num_queries: number of the student's queries.
    """
    return BadRow(
        f"{where}: target needs {need} queries but the model has {num_queries}; "
        "raise --num-queries or shorten targets with --max-tgt-length"
    )


def refuse_what_will_fail(surveys: Sequence[Survey], budget: SkipBudget) -> None:
    """Refuse a training whose unusable rows exceed the skip budget.

    A row in several surveys counts once. Rows that a resumed training skipped before also count.

    Args:
        surveys: the results for all files.
        budget: the skip budget.

    Raises:
        InputError: if too many rows cannot be used.
    """
    unusable = {error.where: error for found in surveys for error in found.unusable}
    new = len(budget.not_yet_skipped(unusable.values()))
    if not unusable or budget.count + new <= budget.limit:
        return
    looked_at, total = sum(found.looked_at for found in surveys), sum(found.total for found in surveys)
    # The share of bad rows is likely to be the same among the rows that were not checked.
    likely, counted = 0, set[str]()
    for found in surveys:
        own = {error.where for error in found.unusable} - counted
        likely += math.ceil(len(own) * found.total / found.looked_at) if own else 0
        counted |= own
    sample = f", probably {likely:,} of all {total:,}" if looked_at < total else ""
    skipped_before = budget.count + new - len(unusable)
    before = f", besides {skipped_before:,} that were skipped before" if skipped_before else ""
    raise InputError(
        f"{len(unusable):,} of {looked_at:,} rows cannot be used{sample}{before}, and the training would end at the "
        f"first one beyond --skip-bad-rows {budget.limit}. Fix them, or train without them by "
        f"--skip-bad-rows {likely + skipped_before}. The first one is {next(iter(unusable.values()))}"
    )
