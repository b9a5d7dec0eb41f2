"""The queries of a parallel student on an image: their labels, their attention, and the next best answers.

Legend: N queries, V labels, T tokens of the answer, P patches of the image.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from narvl_plugin.ctc import slot_kinds, viterbi
from narvl_plugin.data import shown_images
from narvl_plugin.data.shown_images import data_uri
from narvl_plugin.inference.attention import as_squares, attention_of_tokens, query_attention
from narvl_plugin.inference.predictor import Predictor
from narvl_plugin.models.narvl import NarvlModel

NBEST = 3
MAP_SIDE = 72  # pixels of a heat map
DIMMED = 0.35  # brightness of patches without attention


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
        image: the image as a data URI, dark where the attention is low.
    """

    text: str
    image: str


@dataclass(frozen=True)
class QueryView:
    """What is shown of a student's answer: its queries, its attention, and its best answers with their confidence."""

    slots: list[Slot]
    looks: list[AttentionMap]
    nbest: list[tuple[str, float]]


@torch.inference_mode()
def view_queries(student: Predictor, rows: Sequence[int], images: Sequence[Image.Image]) -> list[QueryView]:
    """Run a student on some rows of its test file and read its N queries.

    Slots lie on the most probable path to the student's answer without a `</s>`. A token's attention is the mean over
    all layers, heads and queries, weighted by the probability that the query predicts the token.

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
        nbest = [(student.task.codec.decode(one["tokens"]), float(one["confidence"])) for one in found]
        looks = [AttentionMap(text, spotlight(image, heat)) for text, heat in zip(tokens, maps, strict=True)]
        readings.append(QueryView(slots, looks, nbest))
    return readings


def spotlight(image: Image.Image, heat: Tensor) -> str:
    """Return an image as a data URI, brightest at the largest heat (P,) of a square of patches."""
    grid = as_squares(heat[None])[0].cpu().numpy()
    return data_uri(shown_images.spotlight(image.resize((MAP_SIDE, MAP_SIDE)), grid, DIMMED), "jpeg", quality=80)
