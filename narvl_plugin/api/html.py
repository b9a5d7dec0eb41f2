"""Predictions as HTML, for notebooks and pages. Nothing in it is loaded from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from PIL import Image

from narvl_plugin.data.any_image import as_seen
from narvl_plugin.data.shown_images import data_uri, spotlight
from narvl_plugin.data.text import REFERENCE_SEPARATOR
from narvl_plugin.data.triplets import distinct_names, objects_of
from narvl_plugin.errors import InputError

if TYPE_CHECKING:
    from narvl_plugin.api.prediction import Alternative, Box, HeatMap, Prediction, Query

SIDE = 320
"""Longest side of a shown image, in pixels."""
DIMMED = 0.3
"""Brightness of patches without attention."""
STYLE = """
.narvl {font: 14px/1.5 system-ui, sans-serif; color: #1a1a1a; display: flex; flex-wrap: wrap; gap: 16px;
  background: #fff; padding: 8px}
.narvl > div {flex: 1 1 260px; min-width: 0}
.narvl svg, .narvl img {max-width: 100%; height: auto; display: block}
.narvl .text {font-size: 18px; font-weight: 600; overflow-wrap: anywhere}
.narvl .queries {display: flex; flex-wrap: wrap; gap: 3px; margin: 6px 0; padding: 0; list-style: none}
.narvl .queries li {margin: 0}
.narvl .queries li > * {display: block; padding: 1px 6px; border-radius: 4px; border: 1px solid #0000; min-width: 8px;
  text-align: center; font: inherit}
.narvl .token {background: #1f6feb; color: #fff}
.narvl .repeat {background: #fff; color: #1f6feb; border-color: #1f6feb !important; border-style: dashed !important}
.narvl .blank {background: #d0d7de; color: #424a53}
.narvl .unsure {outline: 2px solid #bf3989}
.narvl table {border-collapse: collapse} .narvl td {padding: 0 10px 0 0} .narvl td + td {text-align: right}
.narvl .graph {background: #fff; border-radius: 8px; max-width: 400px; margin: 8px 0}
"""
NOTHING = {"regions": "no such region", "scene_graph": "no relations"}
"""What an empty set says, by task."""
UNSURE = 0.5
"""Probability below which a query's label is marked."""


def prediction_html(prediction: Prediction) -> str:
    """Return a prediction as a piece of HTML: the image with its boxes, the text, the queries and the alternatives."""
    prompt = f"<div>{escape(prediction.prompt)}</div>" if prediction.prompt else ""
    parts = [
        prompt,
        f'<div class="text">{output_html(prediction)}</div>',
        f"<div>{confidence_text(prediction)}</div>",
        elements_html(prediction),
        queries_html(prediction.queries),
        alternatives_html(prediction),
    ]
    shown = image_html(prediction)
    left = f"<div>{shown}</div>" if shown else ""
    return f'<style>{STYLE}</style><div class="narvl">{left}<div>{"".join(parts)}</div></div>'


def confidence_text(prediction: Prediction) -> str:
    """Return the confidence of a prediction in words.

    That of a caption is about its exact wording, and that of a set about all of its elements.
    """
    meaning = " in exactly these words" if prediction.task == "caption" else ""
    if prediction.task in NOTHING and prediction.box is None:
        meaning = " that all of this is right, and nothing is missing"
    return f"confidence {prediction.confidence:.3f}{meaning}"


def output_html(prediction: Prediction) -> str:
    """Return the output of a prediction in words; of a set, the number of its elements."""
    if elements := prediction.boxes or prediction.triplets:
        kind = "region" if prediction.boxes else "relation"
        return f"{len(elements)} {kind}{'s' if len(elements) > 1 else ''}"
    if prediction.box is not None:
        return box_words(prediction.box)
    return escape(prediction.text) or NOTHING.get(prediction.task, "<i>no output: the model abstained</i>")


def box_words(box: Box) -> str:
    """Return words for a box."""
    return "box from {:.0f}, {:.0f} to {:.0f}, {:.0f}".format(*box)


def elements_html(prediction: Prediction) -> str:
    """Return the elements of a set with their probabilities: a table, a graph also as a drawing, a tree as a list."""
    rows = [(f"{number}: {box_words(box)}", sure) for number, (box, sure) in enumerate(prediction.boxes, 1)]
    objects, pairs = objects_of([one.triplet for one in prediction.triplets])
    names = distinct_names(objects)
    for (subject, other), one in zip(pairs, prediction.triplets, strict=True):
        rows.append((f"{names[subject]} {one.relation} {names[other]}", one.probability))
    cells = "".join(f"<tr><td>{escape(words)}</td><td>{sure:.3f}</td></tr>" for words, sure in rows)
    return (f'<table class="elements">{cells}</table>' if rows else "") + graph_html(prediction) + tree_html(prediction)


def graph_html(prediction: Prediction) -> str:
    """Return the graph of a prediction as a drawing, each object at its place; empty without triplets or an image."""
    if not prediction.triplets or prediction.image is None:
        return ""
    from narvl_plugin.report.svg import triplets_picture  # matplotlib takes a while to import

    size = as_seen(prediction.image, "image").size
    return f'<div class="graph">{triplets_picture([one.triplet for one in prediction.triplets], size)}</div>'


def tree_html(prediction: Prediction) -> str:
    """Return the tree of a prediction as nested lists, each node with its probability; empty without a tree."""

    def item(node: dict[str, Any]) -> str:
        below = "".join(map(item, node["children"]))
        return f"<li>{escape(node['label'])} {node['probability']:.3f}{f'<ul>{below}</ul>' if below else ''}</li>"

    return f'<ul class="tree">{item(prediction.tree)}</ul>' if prediction.tree else ""


def queries_html(queries: Sequence[Query], buttons: bool = False) -> str:
    """Return the queries of a student in their order, coloured by kind; the title of each tells its probability.

    Args:
        queries: the queries.
        buttons: whether queries that predict a token are buttons; `data-token` of each is the token's number, from 0.
    """
    if not queries:
        return ""
    slots, token = [], -1
    for number, query in enumerate(queries, 1):
        token += query.kind == "token"
        shown = "·" if query.kind == "blank" else escape(query.text.strip() or query.text)
        unsure = " unsure" if query.probability < UNSURE else ""
        title = f"{'blank' if query.kind == 'blank' else shown}: query {number}, {query.kind}, {query.probability:.3f}"
        about = f'class="{query.kind}{unsure}" title="{title}" aria-label="{title}"'
        if buttons and query.kind != "blank":
            slot = f'<button type="button" {about} aria-pressed="false" data-token="{token}">{shown}</button>'
        else:
            slot = f'<span role="img" {about}>{shown}</span>'
        slots.append(f"<li>{slot}</li>")
    return f'<ol class="queries" aria-label="queries">{"".join(slots)}</ol>'


def alternatives_html(prediction: Prediction) -> str:
    """Return the best outputs as a table, if there are several."""
    if len(prediction.alternatives) < 2:
        return ""
    rows = "".join(
        f"<tr><td>{escape(_words_of(one))}</td><td>{one.confidence:.3f}</td></tr>" for one in prediction.alternatives
    )
    return f"<table>{rows}</table>"


def _words_of(alternative: Alternative) -> str:
    text = alternative.text.replace(REFERENCE_SEPARATOR, "; ")
    return (text if alternative.box is None else box_words(alternative.box)) or "(empty)"


def image_html(prediction: Prediction) -> str:
    """Return the image of a prediction, with its boxes drawn on it; empty if the prediction has no image."""
    if prediction.image is None:
        return ""
    return boxed_html(as_seen(prediction.image, "image"), named_boxes(prediction), prediction.text)


def named_boxes(prediction: Prediction) -> list[tuple[str, Box]]:
    """Return the boxes of a prediction with their names: numbers of several regions, and nouns of a graph."""
    if prediction.box is not None:
        return [("", prediction.box)]
    objects, _ = objects_of([one.triplet for one in prediction.triplets])
    found = [(str(number), one.box) for number, one in enumerate(prediction.boxes, 1)]
    return found + [(name, one.box) for name, one in zip(distinct_names(objects), objects, strict=True)]


def boxed_html(image: Image.Image, boxes: Sequence[tuple[str, Box]], text: str = "") -> str:
    """Return an image as an SVG with boxes and their names drawn on it."""
    width, height = image.size
    shown, drawn = image_uri(shrunk(image)), ""
    # Without the white rim, a box or a name could not be seen on some images.
    stroke, letters = max(width, height) / (100 if len(boxes) < 2 else 150), max(width, height) / 18
    for name, (left, upper, right, lower) in boxes:
        edges = f'x="{left:.6g}" y="{upper:.6g}" width="{right - left:.6g}" height="{lower - upper:.6g}" fill="none"'
        drawn += (
            f'<rect {edges} stroke="#fff" stroke-width="{2 * stroke:.3g}"/>'
            f'<rect {edges} stroke="#bf3989" stroke-width="{stroke:.3g}"/>'
        )
        if name:
            drawn += (
                f'<text x="{left + 2 * stroke:.6g}" y="{upper + letters:.6g}" font-size="{letters:.3g}" '
                f'font-family="sans-serif" font-weight="bold" fill="#bf3989" stroke="#fff" '
                f'stroke-width="{letters / 6:.3g}" paint-order="stroke">{escape(name)}</text>'
            )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{min(SIDE, 3 * width)}" '
        f'role="img" aria-label="{escape(text)}"><image href="{shown}" width="{width}" height="{height}" '
        f'preserveAspectRatio="none"/>{drawn}</svg>'
    )


def shrunk(image: Image.Image) -> Image.Image:
    """Return an image with sides of at most `SIDE` pixels."""
    scale = min(1.0, SIDE / max(image.size))
    return image.resize([max(1, round(side * scale)) for side in image.size]) if scale < 1 else image


def overlay(image: Image.Image, heat: HeatMap) -> Image.Image:
    """Return an image that is bright where a model looked and dark elsewhere."""
    return spotlight(shrunk(image), heat.weights, DIMMED)


def image_uri(image: Image.Image) -> str:
    """Return an image as a data URI, in PNG if it is small, else as a JPEG."""
    small = image.width * image.height <= 128 * 128
    return data_uri(image, "png") if small else data_uri(image, "jpeg", quality=88)


def page_html(predictions: Sequence[Prediction], names: Sequence[str]) -> str:
    """Return a page of predictions, for `--show`.

    Args:
        predictions: the predictions, with their images.
        names: the name of each image.
    """
    parts = []
    for prediction, name in zip(predictions, names, strict=True):
        parts.append(f"<h2>{escape(name)}</h2>{prediction_html(prediction)}")
        if prediction.image is not None:
            parts.append(heat_maps_html(prediction))
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        "<title>narvl</title><style>body {font-family: system-ui, sans-serif; max-width: 960px; margin: 24px auto; "
        "padding: 0 12px} h2 {font-size: 15px; font-weight: 600} .maps {display: flex; flex-wrap: wrap; gap: 8px} "
        "figure {margin: 0; width: 96px} figure img {width: 96px} figcaption {text-align: center; font-size: 12px}"
        f"</style><body>{''.join(parts)}</body></html>"
    )


def heat_maps_html(prediction: Prediction) -> str:
    """Return the image once for each token, bright where the model looked for it; empty for exported students."""
    try:
        maps = prediction.attention()
    except InputError:
        return ""
    image = as_seen(prediction.image, "image")
    figures = (
        f'<figure><img src="{image_uri(overlay(image, heat))}" alt="where the model looked for {escape(heat.text)}">'
        f"<figcaption>{escape(heat.text)}</figcaption></figure>"
        for heat in maps
    )
    return f'<div class="maps">{"".join(figures)}</div>'
