"""The fairseq criterions of students and teachers; importing this package registers them."""

from narvl_plugin.importing import leaving_logging_alone

with leaving_logging_alone():
    from criterions.adjust_label_smoothed_cross_entropy import AdjustLabelSmoothedCrossEntropyCriterion
    from criterions.qctc import QueryCtcCriterion
    from criterions.qset import QuerySetCriterion
    from criterions.query_cross_entropy import QueryCrossEntropyCriterion

__all__ = [
    "AdjustLabelSmoothedCrossEntropyCriterion",
    "QueryCrossEntropyCriterion",
    "QueryCtcCriterion",
    "QuerySetCriterion",
]
