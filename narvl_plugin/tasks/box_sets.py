"""What tasks whose outputs are sets of elements with boxes share."""

from collections import Counter
from collections.abc import Sequence

from narvl_plugin.tasks.boxes import BoxTask
from narvl_plugin.tasks.sets import SetTask


class BoxSetTask(SetTask, BoxTask):
    """A task whose outputs are sets of elements with boxes."""


def next_edges(begin: list[int], others: Sequence[list[int]], bins: int) -> list[int]:
    """Return the edges that may follow the first edges of a box.

    The edges of a box are in order. An edge is left out if all boxes that begin so are among the others.

    Args:
        begin: the first edges, in bins.
        others: boxes that must differ from it.
        bins: the number of all bins.
    """
    times = Counter(other[len(begin)] for other in others if other[: len(begin)] == begin)
    used_up = {edge for edge, count in times.items() if count == number_of_boxes([*begin, edge], bins)}
    least = begin[-2] if len(begin) >= 2 else 0
    return [edge for edge in range(least, bins) if edge not in used_up]


def number_of_boxes(begin: Sequence[int], bins: int) -> int:
    """Return the number of boxes whose edges are in order and begin with some bins, one or more.

    Args:
        begin: the first bins.
        bins: the number of all bins.
    """
    if len(begin) == 1:
        return (bins - begin[0]) * bins * (bins + 1) // 2
    rights, lowers = bins - begin[0], bins - begin[1]
    return [rights * lowers, lowers, 1][len(begin) - 2]
