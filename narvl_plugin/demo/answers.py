"""What the page asks its models, and what it shows of their answers."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from PIL import Image

from narvl_plugin.api import Decoding, HeatMap, Model, Prediction
from narvl_plugin.api.model import checked_text, with_input
from narvl_plugin.data.any_image import as_seen
from narvl_plugin.errors import InputError

MOST_ALTERNATIVES = 10
"""Largest number of alternatives that a visitor may ask for."""
LONGEST_TEXT = 500
"""Longest text that a visitor may send, in characters."""


class Answer(NamedTuple):
    """The answer of one model, or why there is none.

    Attributes:
        prediction: what the model predicted.
        seconds: the time of the model and its search, without the reading of the image.
        heat_maps: where the model looked for each token; empty if it cannot tell.
        reason: why the model did not answer; empty if it did.
    """

    prediction: Prediction | None = None
    seconds: float = 0.0
    heat_maps: tuple[HeatMap, ...] = ()
    reason: str = ""


class Asked(NamedTuple):
    """The answers of all models to one visitor.

    Attributes:
        image: the image as a person sees it.
        answers: the answers, by the name of the model.
    """

    image: Image.Image
    answers: dict[str, Answer]


def ask(
    models: Mapping[str, Model],
    verb: Any,
    image: Any,
    name: str,
    text: Any,
    alternatives: Any = None,
    abstain_below: Any = 0.0,
) -> Asked:
    """Ask each model. Everything but the models may come from a stranger.

    Args:
        models: the models by their names. Abstention is for the first only: a teacher cannot abstain.
        verb: what to predict.
        image: the bytes of an image file, or an image.
        name: the name of the image, for errors.
        text: the text beside the image; unused by verbs that read none.
        alternatives: the number of alternatives; None for the model's own.
        abstain_below: confidence below which the first model predicts nothing.

    Raises:
        InputError: if the image, the text or a number cannot be used; the message has one line.
    """
    first = next(iter(models.values()))
    if verb not in first.verbs:
        raise InputError(f"the model cannot {verb!r:.40}; it has {', '.join(first.verbs)}")
    if isinstance(text, str) and len(text) > LONGEST_TEXT:
        raise InputError(f"the text has {len(text):,} characters; at most {LONGEST_TEXT} can be read")
    if alternatives is not None and alternatives not in range(1, MOST_ALTERNATIVES + 1):
        raise InputError(f"{alternatives!r:.40} alternatives: choose 1 to {MOST_ALTERNATIVES}")
    if not isinstance(abstain_below, int | float):
        raise InputError("the confidence to abstain below is not a number; give one from 0 to 1")
    number = None if alternatives is None else int(alternatives)
    seen = as_seen(image, name)
    answers = {}
    for place, (title, model) in enumerate(models.items()):
        try:
            decoding = model.decoding_for(verb, abstain_below=0.0 if place else float(abstain_below))
            if decoding.ngram_automaton is None:  # a search under n-grams finds one caption
                decoding = replace(decoding, nbest=number)
            answers[title] = _answer(model, verb, seen, name, text, decoding)
        except InputError as error:
            if place == 0:
                raise
            answers[title] = Answer(reason=str(error))
    return Asked(seen, answers)


def _answer(model: Model, verb: str, image: Image.Image, name: str, text: Any, decoding: Decoding) -> Answer:
    """Return the answer of one model, with its time."""
    engine = model.engine(verb)
    words = checked_text(engine, None if engine.text_column is None else text)
    prepared = engine.prepare(image, words, name)
    start = time.perf_counter()
    found = engine.predict([prepared], decoding)[0]
    seconds = time.perf_counter() - start
    prediction = with_input(found, engine, image, words)
    try:
        heat_maps = prediction.attention()
    except InputError:  # an exported student cannot tell
        heat_maps = ()
    return Answer(prediction, seconds, heat_maps)
