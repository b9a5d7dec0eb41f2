"""A look at the rows of a training's files before it starts: those that would end it later."""

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
"""Of each file; grounding opens the header of each one's image."""
BYTES_LOOKED_AT = 1 << 31
"""Of each file, since rows with features may have megabytes."""


@dataclass(frozen=True)
class Survey:
    """What was found in a file: how many of all its rows were looked at, and those that cannot be used."""

    looked_at: int
    total: int
    unusable: list[BadRow]


def survey(dataset: TsvDataset, num_queries: int | None, *, keeps_eos: bool = False) -> Survey:
    """Look at the texts of a file's rows, or of some that are spread over it, and log what does not fit a student.

    num_queries: those of a student, of which keeps_eos takes one; None for a teacher. Images are not decoded.
    """
    total = len(dataset)
    of_its_size = BYTES_LOOKED_AT * total // Path(dataset.tsv.path).stat().st_size
    rows = np.linspace(0, total - 1, min(total, ROWS_LOOKED_AT, max(2, of_its_size))).round().astype(int).tolist()
    needs, too_long, unusable = [], 0, []
    for row in rows:
        try:
            need = dataset.queries_needed(row) + keeps_eos
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
    """Return what is wrong with a row whose target needs more queries than a student has."""
    return BadRow(
        f"{where}: target needs {need} queries but the model has {num_queries}; "
        "raise --num-queries or shorten targets with --max-tgt-length"
    )


def refuse_what_will_fail(surveys: Sequence[Survey], budget: SkipBudget) -> None:
    """Raise InputError if the rows that cannot be used are more than the skip budget forgives.

    A row counts once, in however many surveys it is. Rows that a resumed training has skipped before count, too.
    """
    unusable = {error.where: error for found in surveys for error in found.unusable}
    new = len(budget.not_yet_skipped(unusable.values()))
    if not unusable or budget.count + new <= budget.limit:
        return
    looked_at, total = sum(found.looked_at for found in surveys), sum(found.total for found in surveys)
    # The rows that were not looked at are likely to be as bad.
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
        f"first that --skip-bad-rows {budget.limit} does not forgive. Mend them, or let it go on without them by "
        f"--skip-bad-rows {likely + skipped_before}. The first one is {next(iter(unusable.values()))}"
    )
