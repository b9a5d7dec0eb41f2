"""One box of a model that finds sets of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from narvl_plugin.api.model import Decoding, Engine
from narvl_plugin.api.prediction import Alternative, HeatMap, Prediction, box_text


class SurestBox:
    """A model of all regions that locates one: it predicts the most probable box of its set.

    The confidence is the probability of that box. For an empty set it is the confidence of the set, and there is no
    box. Alternatives are the next boxes of the set.
    """

    verb = "locate"

    def __init__(self, regions: Engine) -> None:
        self.regions = regions
        self.task, self.text_column = regions.task, regions.text_column

    def prepare(self, image: Any, text: str, where: str) -> Any:
        """Return an image and its text as the model of regions reads them; see `Engine`."""
        return self.regions.prepare(image, text, where)

    def check(self, decoding: Decoding) -> None:
        """Check that the model of regions can search like that; see `Engine`."""
        self.regions.check(decoding)

    def predict(self, prepared: Sequence[Any], decoding: Decoding) -> list[Prediction]:
        """Predict a batch; see `Engine`."""
        # Alternatives are boxes of the best set, so other sets are not searched for.
        found = self.regions.predict(prepared, replace(decoding, nbest=None))
        return [_surest(one, decoding.nbest or 1) for one in found]

    def attention(self, image: Any, text: str, prediction: Prediction) -> tuple[HeatMap, ...]:
        """Return where the model looked for each token of the set; see `Engine`."""
        return self.regions.attention(image, text, prediction)


def _surest(found: Prediction, number: int) -> Prediction:
    """Return the most probable box of a set as a prediction of its own, with a number of alternatives."""
    boxes = [Alternative(box_text(box), probability, box) for box, probability in found.boxes[:number]]
    alternatives = tuple(boxes) or (Alternative("", found.confidence),)
    text, confidence, box = alternatives[0]
    return replace(found, text=text, confidence=confidence, box=box, boxes=(), alternatives=alternatives)
