"""What all drawings of pages share, as SVG inside an HTML page: their style, and pictures of graphs."""

import io
import re
from collections.abc import Sequence
from html import escape
from typing import Any

import matplotlib
import networkx
from matplotlib.figure import Figure

from narvl_plugin.data.triplets import Triplet, distinct_names, objects_of, triplet_words

INK, RULE, GUIDE = "#1c2430", "#d5dae1", "#8b95a3"
STYLE: dict[Any, Any] = {  # matplotlib types its keys as literals
    "svg.fonttype": "none",
    "svg.hashsalt": "narvl",
    "font.family": "sans-serif",
    "font.size": 12,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}
NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def for_html(svg: str, description: str) -> str:
    """Remove the parts of a separate file (XML header, fixed size) and add a description."""
    svg = svg[svg.index("<svg") :]
    opening, rest = svg.split(">", 1)
    opening = re.sub(r'\s(?:width|height|xmlns(?::\w+)?)="[^"]*"', "", opening)
    return f'{opening} role="img" aria-label="{escape(description)}">{rest}'


def triplets_picture(triplets: Sequence[Triplet], size: tuple[int, int]) -> str:
    """Draw a scene graph, with each object at its place in the image.

    Args:
        triplets: the triplets, with boxes in pixels.
        size: the width and height of the image, in pixels.

    Returns:
        An ``<svg>`` element; empty without triplets.
    """
    if not triplets:
        return ""
    objects, pairs = objects_of(triplets)
    width, height = size
    boxes = [one.box for one in objects]
    nodes = [
        (name, (left + right) / 2 / width, (upper + lower) / 2 / height)
        for name, (left, upper, right, lower) in zip(distinct_names(objects), boxes, strict=True)
    ]
    edges = [(*pair, one.relation) for pair, one in zip(pairs, triplets, strict=True)]
    return graph_picture(nodes, edges, description=triplet_words(triplets))


def graph_picture(
    nodes: Sequence[tuple[str, float, float]], edges: Sequence[tuple[int, int, str]], *, description: str
) -> str:
    """Draw a graph of objects at their places in an image.

    Args:
        nodes: the name, x and y of each object; x and y are shares of the image's width and height.
        edges: the numbers of two nodes, and the name of the relation from the first to the second.
        description: the text for screen readers.

    Returns:
        An ``<svg>`` element.
    """
    # matplotlib takes what is between two dollars for a formula.
    names = [name.replace("$", r"\$") for name, _, _ in nodes]
    between = [name.replace("$", r"\$") for _, _, name in edges]
    node_size = min(max(33, 7 * max(map(len, names))), 70) ** 2  # an area, so that names fit into circles
    graph = networkx.MultiDiGraph()
    graph.add_nodes_from(range(len(nodes)))
    graph.add_edges_from((one, other, {"name": name}) for (one, other, _), name in zip(edges, between, strict=True))
    places = {number: (x, y) for number, (_, x, y) in enumerate(nodes)}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.3, 3.2), layout="constrained")
        axes = figure.add_subplot()
        networkx.draw_networkx_nodes(graph, places, ax=axes, node_size=node_size, node_color="white", edgecolors=RULE)
        networkx.draw_networkx_labels(graph, places, dict(enumerate(names)), ax=axes)
        networkx.draw_networkx_edges(graph, places, ax=axes, edge_color=GUIDE, node_size=node_size)
        relations = networkx.get_edge_attributes(graph, "name")
        networkx.draw_networkx_edge_labels(graph, places, relations, ax=axes, font_size=10, font_color=INK)
        axes.set_xlim(-0.1, 1.1)
        axes.set_ylim(1.1, -0.1)
        axes.set_axis_off()
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata=NO_METADATA)
    return for_html(stream.getvalue(), description)
