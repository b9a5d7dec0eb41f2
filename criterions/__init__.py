"""The fairseq criterions of students and teachers; importing this package registers them."""

import narvl_plugin  # noqa: F401 - imports fairseq and leaves the logging of others as it is
from criterions.adjust_label_smoothed_cross_entropy import AdjustLabelSmoothedCrossEntropyCriterion
from criterions.qctc import QueryCtcCriterion
from criterions.query_cross_entropy import QueryCrossEntropyCriterion

__all__ = ["AdjustLabelSmoothedCrossEntropyCriterion", "QueryCrossEntropyCriterion", "QueryCtcCriterion"]
