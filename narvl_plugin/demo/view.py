"""Answers as HTML. Texts of visitors and models are escaped, and nothing is loaded from elsewhere."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape

from PIL import Image

from narvl_plugin.api import Prediction, Query
from narvl_plugin.api.html import (
    STYLE,
    UNSURE,
    alternatives_html,
    boxed_html,
    confidence_text,
    elements_html,
    image_uri,
    named_boxes,
    output_html,
    overlay,
    queries_html,
)
from narvl_plugin.demo.answers import Answer, Asked
from narvl_plugin.demo.examples import Example

THUMBNAIL = 96
"""Side of an example among the others, in pixels."""
SLOWDOWNS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
WATCHABLE = 2.0
"""Time that the slowest answer takes on the page at least, in seconds. Real times are too short to see."""


def error_html(reason: str) -> str:
    """Return the reason why there is no answer."""
    return f'<p class="error" role="alert">{escape(reason)}</p>'


def asked_html(asked: Asked) -> str:
    """Return the answers of all models. Several stand side by side, and appear in slow motion."""
    several = len(asked.answers) > 1
    slowdown = slow_motion([answer.seconds for answer in asked.answers.values()]) if several else 0
    parts = [_answer_html(title, answer, asked.image, slowdown) for title, answer in asked.answers.items()]
    note, places = "", ""
    if several:
        longest = max(len(answer.prediction.tokens) for answer in asked.answers.values() if answer.prediction)
        places = "".join(f"#result li:nth-child({place}) {{--place: {place}}} " for place in range(1, longest + 1))
    if slowdown > 1:
        note = f'<p class="note">The tokens appear {slowdown} times slower than they were predicted.</p>'
    elif several:
        note = '<p class="note">The tokens appear as fast as they were predicted.</p>'
    return f'<style>{STYLE}{places}</style>{note}<div class="answers">{"".join(parts)}</div>'


def slow_motion(seconds: Sequence[float]) -> int:
    """Return by how much to slow answers down until the slowest is `WATCHABLE`."""
    slowest = max(*seconds, 1e-6)
    return next((factor for factor in SLOWDOWNS if factor * slowest >= WATCHABLE), SLOWDOWNS[-1])


def examples_html(examples: Sequence[Example]) -> str:
    """Return the examples as buttons; `data-number` of each is its number, from 0."""
    buttons = "".join(
        f'<button type="button" data-number="{number}" aria-label="{escape(one.name)}" title="{escape(one.name)}">'
        f'<img src="{image_uri(one.image.resize((THUMBNAIL, THUMBNAIL)))}" alt=""></button>'
        for number, one in enumerate(examples)
    )
    return f'<h2>Examples</h2><div role="group" aria-label="Examples">{buttons}</div>'


def _answer_html(title: str, answer: Answer, image: Image.Image, slowdown: int) -> str:
    """Return the answer of one model; with a slowdown above 0, under its title, and animated."""
    heading = f"<h2>{escape(title)}</h2>" if slowdown else ""
    opening = f'<section class="narvl answer" aria-label="{escape(title)}">{heading}'
    prediction = answer.prediction
    if prediction is None:
        return f"{opening}<div>{error_html(answer.reason)}</div></section>"
    # A student's queries predict together; a teacher predicts one token after the other.
    steps = 1 if prediction.queries else max(1, len(prediction.tokens))
    step = slowdown * answer.seconds / steps
    moving = f' moving" style="--step: {step:.3f}s; --steps: {steps}' if slowdown else ""
    facts = (
        f'<p class="facts"><i class="bar" style="--share: {prediction.confidence:.1%}" aria-hidden="true"></i>'
        f"<span>{confidence_text(prediction)}</span><span>{_time(answer, steps)}</span></p>"
    )
    parts = [
        f'<p class="text">{output_html(prediction)}</p>',
        facts,
        elements_html(prediction),
        _tokens_html(answer, prediction),
        _alternatives(prediction),
    ]
    return (
        f"{opening}<div>{_figure_html(answer, prediction, image)}</div>"
        f'<div class="said{moving}">{"".join(parts)}</div></section>'
    )


def _figure_html(answer: Answer, prediction: Prediction, image: Image.Image) -> str:
    """Return the image with its boxes, and the images that take its place when a token is touched."""
    heats = [[heat.text.strip(), image_uri(overlay(image, heat))] for heat in answer.heat_maps]
    boxes = named_boxes(prediction)
    about = "the image" + (", with a box" if len(boxes) == 1 else f", with {len(boxes)} boxes" if boxes else "")
    return (
        f'<figure data-heats="{escape(json.dumps(heats))}">{boxed_html(image, boxes, about)}'
        '<figcaption aria-live="polite"></figcaption></figure>'
    )


def _tokens_html(answer: Answer, prediction: Prediction) -> str:
    """Return the queries of a student, or the tokens of a teacher, as buttons if there are heat maps."""
    touchable = bool(answer.heat_maps)
    queries = prediction.queries or tuple(Query(text, probability, "token") for text, probability in prediction.tokens)
    if not queries:
        return ""
    title = f"{len(queries)} queries, all at once" if prediction.queries else f"{len(queries)} tokens, one by one"
    present = {query.kind for query in queries}
    legend = "".join(
        f'<span><i class="{kind}" aria-hidden="true"></i>{meaning}</span>'
        for kind, meaning in (("token", "token"), ("repeat", "repeats the one before"), ("blank", "blank"))
        if kind in present and prediction.queries
    )
    if any(query.probability < UNSURE for query in queries):
        legend += f'<span><i class="unsure" aria-hidden="true"></i>below {UNSURE}</span>'
    hint = '<p class="hint">Touch a token to see where the model looked.</p>' if touchable else ""
    return f'<h3>{title}</h3>{hint}{queries_html(queries, buttons=touchable)}<p class="legend">{legend}</p>'


def _alternatives(prediction: Prediction) -> str:
    table = alternatives_html(prediction)
    return f"<h3>Alternatives</h3>{table}" if table else ""


def _time(answer: Answer, steps: int) -> str:
    """Return the time of an answer in words."""
    total = f"{1000 * answer.seconds:.1f} ms"
    return total if steps == 1 else f"{total}, {1000 * answer.seconds / steps:.1f} ms a token"
