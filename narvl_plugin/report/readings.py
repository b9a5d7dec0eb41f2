"""The queries of a parallel student on an image: their labels, their attention, and the next best outputs.

Legend: N queries, V labels, T tokens of the answer, P patches of the image.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from narvl_plugin.ctc import slot_kinds, viterbi
from narvl_plugin.data.shown_images import data_uri
from narvl_plugin.inference.attention import as_squares, attention_of_tokens, query_attention
from narvl_plugin.inference.predictor import Predictor
from narvl_plugin.models.narvl import NarvlModel

NBEST = 3
BEAM = 5
"""Width of the search for other outputs, if the student itself takes the most probable path."""
HEAT = ((255, 224, 102, 0), (255, 196, 61, 110), (240, 110, 20, 180), (176, 0, 46, 225))
"""Colours of attention from none to the most, evenly spaced, as red, green, blue and opacity of 255."""
PALE_SIDE = 240
"""Largest side of a pale image, in pixels."""


@dataclass(frozen=True)
class Slot:
    """One query's label on the path to the student's output.

    Attributes:
        text: the label as text; empty for the blank.
        probability: the probability of the label, 0 to 1.
        kind: ``token`` adds to the output, ``repeat`` merges with the same label before it, ``blank`` adds nothing.
    """

    text: str
    probability: float
    kind: str


@dataclass(frozen=True)
class AttentionMap:
    """The attention of a token.

    Attributes:
        text: the token.
        image: its colours as a data URI, a pixel a patch, to be drawn over the pale image.
    """

    text: str
    image: str


@dataclass(frozen=True)
class QueryView:
    """What is shown of a student's output.

    Attributes:
        slots: its queries.
        looks: the attention of each token.
        pale: the image as a data URI, pale and gray, to draw the attention on.
        nbest: the output, then other outputs that the student found probable, with their confidence.
        elements: the elements of an output that is a set, with the probability of each.
    """

    slots: list[Slot]
    looks: list[AttentionMap]
    pale: str
    nbest: list[tuple[str, float]]
    elements: list[tuple[str, float]] = field(default_factory=list)


@torch.inference_mode()
def view_queries(student: Predictor, rows: Sequence[int], images: Sequence[Image.Image]) -> list[QueryView]:
    """Run a student on some rows of its test file and read its N queries.

    Slots lie on the most probable path to the student's answer without a `</s>`. A token's attention is the mean over
    all layers, heads and queries, weighted by the probability that the query predicts the token. A student that takes
    the most probable path finds no other outputs; a beam search then finds them.

    Args:
        student: the student and its data.
        rows: the numbers of the rows.
        images: the images of the rows.

    Returns:
        A reading for each row.

    Raises:
        ValueError: if the model has no queries (a teacher).
    """
    if not isinstance(student.model, NarvlModel):
        raise ValueError(f"{type(student.model).__name__} has no queries; give a student's checkpoint")
    model = student.model
    student = student.with_options({}, nbest=NBEST)
    any_words = {"ngram_automaton": None} if hasattr(student.task.cfg, "ngram_automaton") else {}
    wide = student.with_options(any_words, nbest=NBEST, beam=BEAM)
    blank = model.blank
    readings = []
    for row, image in zip(rows, images, strict=True):
        batch = student.batch(row)
        found = student.hypotheses(batch)
        answer = found[0]["tokens"][None, :-1]
        log_probs, patches = query_attention(model, batch)  # (1, N, V), (N, P)
        length = torch.tensor([answer.size(1)], device=answer.device)
        labels = viterbi(log_probs, answer, length, blank=blank).labels[0]  # (N,)
        probabilities = log_probs[0].gather(1, labels[:, None])[:, 0].exp()  # (N,)
        maps = attention_of_tokens(log_probs, patches, answer[0], blank=blank).flatten(1)  # (T, P)
        tokens = [student.label_text(label) for label in answer[0].tolist()]
        slots = [
            Slot("" if kind == "blank" else student.label_text(label), probability, kind)
            for label, probability, kind in zip(
                labels.tolist(), probabilities.tolist(), slot_kinds(labels, blank=blank), strict=True
            )
        ]
        others = found if len(found) > 1 else wide.hypotheses(batch)
        looks = [AttentionMap(text, heat_map(heat)) for text, heat in zip(tokens, maps, strict=True)]
        readings.append(
            QueryView(slots, looks, pale(image), ranked(student, found[0], others), elements(student, found))
        )
    return readings


def elements(student: Predictor, beam: list[dict[str, Any]]) -> list[tuple[str, float]]:
    """Return the elements of the best output as texts with their probability; none if outputs are no sets."""
    task = student.task
    if not task.predicts_sets:
        return []
    pairs = zip(task.elements(beam[0]["tokens"][:-1].tolist()), task.element_confidences(beam), strict=True)
    return [(task.codec.decode(list(one)), sure) for one, sure in pairs]


def ranked(student: Predictor, output: dict[str, Any], others: Sequence[dict[str, Any]]) -> list[tuple[str, float]]:
    """Return an output and at most `NBEST` - 1 others as texts with their confidence.

    The confidence of a task that shows none is the probability of the output.

    Args:
        student: the student.
        output: its output, in fairseq's form.
        others: the outputs that it found, best first; the output may be among them.
    """
    sure: dict[str, float] = {}
    for one in (output, *others):
        text = student.task.codec.decode(one["tokens"])
        value = float(one["confidence"] if student.task.shows_confidence else math.exp(one["score"]))
        sure[text] = max(value, sure.get(text, 0.0))  # a search adds up more paths to it than the most probable one
    return list(sure.items())[:NBEST]


def heat_map(heat: Tensor) -> str:
    """Return the colours of the heat (P,) of a square of patches as a data URI, relative to the largest heat."""
    grid = as_squares(heat[None])[0].cpu().numpy()
    stops = np.linspace(0, 1, len(HEAT))
    share = grid / (float(grid.max()) or 1.0)
    colours = np.stack([np.interp(share, stops, channel) for channel in zip(*HEAT, strict=True)], axis=-1)
    return data_uri(Image.fromarray(colours.round().astype(np.uint8), "RGBA"), "png", optimize=True)


def pale(image: Image.Image) -> str:
    """Return an image as a data URI: square, as the model sees it, gray, and light enough to draw on."""
    side = min(PALE_SIDE, max(image.size))
    gray = ImageOps.autocontrast(image.convert("L")).resize((side, side)).point(lambda value: 170 + value * 85 // 255)
    return data_uri(gray, "jpeg", quality=80)
