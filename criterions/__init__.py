"""The fairseq criterions of the parallel model; importing this package registers them."""

from criterions.qctc import QueryCtcCriterion
from criterions.query_cross_entropy import QueryCrossEntropyCriterion

__all__ = ["QueryCrossEntropyCriterion", "QueryCtcCriterion"]
