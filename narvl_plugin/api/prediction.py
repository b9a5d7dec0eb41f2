"""What a model predicts for an image, with everything that can be known of it.

Legend: H x W patches of the image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np

from narvl_plugin.api.html import prediction_html
from narvl_plugin.data.triplets import Instance, Triplet
from narvl_plugin.errors import InputError

Box = tuple[float, float, float, float]
"""Left, upper, right and lower edge, in pixels of the image as a person sees it."""


def box_text(box: Box) -> str:
    """Return a box as `x0,y0,x1,y1`."""
    return ",".join(f"{edge:.6g}" for edge in box)


class Token(NamedTuple):
    """One token of a text, with the probability that its query or step gives it."""

    text: str
    probability: float


class Query(NamedTuple):
    """The label of one query of a student on the most probable path to its output.

    Attributes:
        text: the label; empty for the blank.
        probability: the probability of the label, 0 to 1.
        kind: `token` adds to the output, `repeat` merges with the same label before it, `blank` adds nothing.
    """

    text: str
    probability: float
    kind: Literal["token", "repeat", "blank"]


class Alternative(NamedTuple):
    """One of the best outputs, with its confidence, and the box that it stands for, if any."""

    text: str
    confidence: float
    box: Box | None = None


class FoundBox(NamedTuple):
    """A region of several, with the probability that it is one of those asked for."""

    box: Box
    probability: float


class FoundTriplet(NamedTuple):
    """A relation between two objects of an image.

    Attributes:
        subject: the noun of the subject.
        subject_box: its box.
        relation: the relation, such as `on`.
        object: the noun of the object.
        object_box: its box.
        probability: the probability that the image has this relation between these objects.
    """

    subject: str
    subject_box: Box
    relation: str
    object: str
    object_box: Box
    probability: float

    @classmethod
    def of(cls, triplet: Triplet, probability: float) -> FoundTriplet:
        """Return a triplet with its probability."""
        subject, relation, other = triplet
        return cls(*subject, relation, *other, probability)

    @property
    def triplet(self) -> Triplet:
        """The triplet without its probability, as columns of TSV files hold it."""
        return Triplet(Instance(self.subject, self.subject_box), self.relation, Instance(self.object, self.object_box))


class HeatMap(NamedTuple):
    """Where a model looked for one token.

    Attributes:
        text: the token.
        weights: (H, W), the attention to each patch, in rows from above. It sums up to less than 1: the rest is
            attention to the text.
    """

    text: str
    weights: np.ndarray


@dataclass(frozen=True)
class Prediction:
    """The output of a model for one image.

    Attributes:
        text: a caption, an answer, `x0,y0,x1,y1` of a box, a tree in brackets, or yes, no or maybe. Several boxes, or
            the triplets of a graph, are joined by `&&`, as in a column of a TSV file. Empty if the model abstained or
            found nothing.
        confidence: how probable it is that the output is correct, 0 to 1; calibrated if the model was. A caption is
            correct if it equals a reference word by word, so its confidence is small. A set of boxes or triplets is
            correct if it has all of them and no other.
        tokens: the tokens of the output.
        queries: the queries of a student; empty for a teacher, which has none.
        alternatives: the best outputs, this one first.
        box: the region, for a model that locates; None for others, and if the model abstained.
        boxes: all regions, the most probable first, for `locate` with all=True; empty if there is none.
        triplets: the relations of an image, the most probable first, for `graph`; empty if there is none.
        tree: the tree that the text spells, for `tree`, as a dict of `label`, `probability` and `children`. The
            probability of the root is the confidence. None for other verbs, and if the model abstained.
        task: the task, such as `caption`.
        prompt: the text that was read beside the image, if any.
        image: the image as it was given, or the bytes of an open file.
        labels: the tokens by their numbers in the vocabulary.
    """

    text: str
    confidence: float
    tokens: tuple[Token, ...]
    queries: tuple[Query, ...]
    alternatives: tuple[Alternative, ...]
    box: Box | None = None
    boxes: tuple[FoundBox, ...] = ()
    triplets: tuple[FoundTriplet, ...] = ()
    tree: dict[str, Any] | None = None
    task: str = ""
    prompt: str | None = None
    image: Any = field(default=None, repr=False, compare=False)
    labels: tuple[int, ...] = field(default=(), repr=False)
    _look: Callable[[], tuple[HeatMap, ...]] | None = field(default=None, repr=False, compare=False)

    def attention(self) -> tuple[HeatMap, ...]:
        """Return where the model looked for each token. The model runs once more on the image.

        Raises:
            InputError: if the model cannot tell, as exported ones.
        """
        if self._look is None:
            raise InputError("this prediction has lost its model, such as by pickling; predict again")
        return self._look()

    def to_dict(self) -> dict[str, Any]:
        """Return the prediction as plain values, for JSON. The image is left out."""
        plain = asdict(replace(self, image=None, _look=None))
        del plain["image"], plain["_look"]
        for name in ("tokens", "queries", "alternatives", "boxes", "triplets"):
            plain[name] = [part._asdict() for part in getattr(self, name)]
        return plain

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for pickling and copying, without the model."""
        return {**vars(self), "_look": None}

    def _repr_html_(self) -> str:
        """Show the prediction in a notebook."""
        return prediction_html(self)
