"""Checkpoints as engines: a trained student or teacher, in torch."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from copy import copy
from functools import cached_property
from typing import Any

import torch

from narvl_plugin.api.model import Decoding, name_of
from narvl_plugin.api.prediction import (
    Alternative,
    FoundBox,
    FoundTriplet,
    HeatMap,
    Prediction,
    Query,
    Token,
    box_text,
)
from narvl_plugin.ctc import slot_kinds
from narvl_plugin.data.collate import Batch, Sample
from narvl_plugin.data.table import Table
from narvl_plugin.data.text import REFERENCE_SEPARATOR
from narvl_plugin.data.triplets import Triplet, format_triplet
from narvl_plugin.errors import InputError
from narvl_plugin.inference.attention import token_attention
from narvl_plugin.inference.predictor import Predictor
from narvl_plugin.models.narvl import NarvlModel
from narvl_plugin.tasks.base import BaseTask
from narvl_plugin.tasks.boxes import BoxTask
from narvl_plugin.tasks.scene_graph import SceneGraphTask

LISTED = 5
"""Alternatives of a closed list, where the caller names no number."""
KEPT = 16
"""Searches that an engine keeps ready, each for one way to decode."""


class TrainedEngine:
    """One task of a model in torch.

    Attributes:
        task: the task, such as `caption`.
        verb: what it does with an image.
        text_column: the name of the text that is read beside an image, None where there is none.
    """

    def __init__(self, predictor: Predictor, lock: threading.RLock) -> None:
        """Wrap a model.

        Args:
            predictor: the model and one of its tasks.
            lock: held while the model runs; shared by all engines of a model, which may have to change it.
        """
        self.predictor = predictor
        self.task = predictor.task.name
        self.verb = predictor.task.verb
        self.text_column = predictor.task.text_column
        self._lock = lock
        self._searches: dict[Any, tuple[Predictor, Any]] = {}

    def prepare(self, image: Any, text: str, where: str) -> Sample:
        """Return an image and its text as the task reads them; see `Engine`."""
        texts = {} if self.text_column is None else {self.text_column: {where: text}}
        dataset = copy(self._dataset)
        dataset.tsv = Table({where: image}, texts, type(dataset))
        sample: Sample = dataset.sample(0)
        return sample

    def check(self, decoding: Decoding) -> None:
        """Check that the model can search like that; see `Engine`."""
        with self._lock:
            _ = self.searching(decoding).generator

    def predict(self, prepared: Sequence[Sample], decoding: Decoding) -> list[Prediction]:
        """Predict a batch; see `Engine`."""
        batch = self.batch(prepared)
        with self._lock:
            self.predictor.task.choose_member(self.predictor.model)
            searching = self.searching(decoding)
            try:
                found = searching.search(batch)
            except ValueError as error:  # no allowed output fits into the queries
                raise InputError(f"{error}; allow shorter outputs by answers or constraint") from error
        return [self._prediction(searching, batch, row, beam) for row, beam in enumerate(found)]

    def attention(self, image: Any, text: str, prediction: Prediction) -> tuple[HeatMap, ...]:
        """Run the model on an image again, and return its attention for each token; see `Engine`."""
        batch = self.batch([self.prepare(image, text, name_of(image, 1))])
        with self._lock:
            self.predictor.task.choose_member(self.predictor.model)
            maps = token_attention(self.predictor, batch, torch.tensor(prediction.labels))
        return tuple(HeatMap(token.text, heat.numpy()) for token, heat in zip(prediction.tokens, maps, strict=True))

    @cached_property
    def _dataset(self) -> Any:
        """The data set that reads images; each is a table of its own."""
        return self.predictor.images({})

    def batch(self, samples: Sequence[Sample]) -> Batch:
        """Return samples as a batch on the device."""
        return self.predictor.moved(self._dataset.collater(samples))

    def searching(self, decoding: Decoding) -> Predictor:
        """Return the model with a way to decode, which is kept for the next call."""
        ngrams = (decoding.ngram_automaton and str(decoding.ngram_automaton), decoding.ngram_weight)
        key = (decoding.beam, decoding.nbest, decoding.answers, id(decoding.constraint), decoding.abstain_below, ngrams)
        if key not in self._searches:
            if len(self._searches) >= KEPT:
                self._searches.pop(next(iter(self._searches)))
            # The constraint is kept, too, so that its id stays its own.
            self._searches[key] = (self._new_search(decoding), decoding.constraint)
        return self._searches[key][0]

    def _new_search(self, decoding: Decoding) -> Predictor:
        predictor, is_student = self.predictor, self.predictor.model.is_student
        if not is_student and (decoding.constraint is not None or decoding.abstain_below or decoding.ngram_automaton):
            raise InputError("constraint, abstain_below and ngram_automaton are for students; this model is a teacher")
        if decoding.ngram_automaton and self.verb != "caption":
            raise InputError(f"ngram_automaton: is for caption; {self.verb} has its own outputs")
        if decoding.ngram_automaton and decoding.width > 1:
            raise InputError("ngram_automaton: finds the one best caption; take a beam of 1, and an nbest of 1")
        if decoding.constraint is not None and (predictor.task.bins is not None or predictor.task.predicts_sets):
            raise InputError("constraint: is not for boxes, which always have four edges in order")
        generation = dict(predictor.generation)
        if decoding.ngram_automaton:
            generation |= {"beam": 1, "no_repeat_ngram_size": 0}
        if decoding.beam is not None:
            generation["beam"] = decoding.beam
        listed = decoding.answers is not None or predictor.task.scores_a_list
        generation["nbest"] = decoding.nbest or (LISTED if listed else 1)
        generation["beam"] = max(generation.get("beam", 1), generation["nbest"])
        options: dict[str, Any] = {"abstain_below": decoding.abstain_below} if is_student else {}
        if decoding.ngram_automaton:
            options |= {"ngram_automaton": str(decoding.ngram_automaton), "ngram_weight": decoding.ngram_weight}
        changed = predictor.with_options(options, **generation)
        if decoding.answers is not None:
            changed.task = changed.task.with_answers(decoding.answers)
        changed.task.constraint = decoding.constraint
        return changed

    def _prediction(self, searching: Predictor, batch: Batch, row: int, beam: list[dict[str, Any]]) -> Prediction:
        """Return what was found for one row of a batch."""
        task, model = searching.task, searching.model
        best = beam[0]
        tokens = best["tokens"][:-1] if int(best["tokens"][-1]) == task.target_dictionary.eos() else best["tokens"]
        labels = tokens.tolist()
        probabilities = best["positional_scores"][: len(labels)].exp().tolist()
        outputs = beam[: max(1, searching.generation["nbest"])]
        found = [self._elements(searching, batch, row, one) for one in outputs]
        sure: list[float] = []
        if task.predicts_sets and found[0]:
            pairs = zip(task.element_confidences(beam), found[0], strict=True)
            sure, found[0] = map(list, zip(*sorted(pairs, key=lambda pair: -pair[0]), strict=True))
        alternatives = tuple(
            Alternative(
                self._text(searching, one, elements),
                task.confidence(beam) if one is best else BaseTask.confidence(task, [one]),
                None if task.predicts_sets or not elements else elements[0],
            )
            for one, elements in zip(outputs, found, strict=True)
        )
        surest_first = list(zip(found[0], sure, strict=False))
        return Prediction(
            text=alternatives[0].text,
            confidence=alternatives[0].confidence,
            tokens=tuple(map(Token, map(searching.label_text, labels), probabilities)),
            queries=self._queries(searching, best, model.blank) if isinstance(model, NarvlModel) else (),
            alternatives=alternatives,
            box=alternatives[0].box,
            boxes=tuple(FoundBox(*pair) for pair in surest_first if not isinstance(pair[0], Triplet)),
            triplets=tuple(FoundTriplet.of(*pair) for pair in surest_first if isinstance(pair[0], Triplet)),
            tree=task.tree(beam),
            task=self.task,
            labels=tuple(labels),
        )

    @staticmethod
    def _text(searching: Predictor, hypothesis: dict[str, Any], elements: Sequence[Any]) -> str:
        if not isinstance(searching.task, BoxTask):
            return " ".join(searching.text([hypothesis]).split())
        return REFERENCE_SEPARATOR.join(
            format_triplet(one) if isinstance(one, Triplet) else box_text(one) for one in elements
        )

    @staticmethod
    def _elements(searching: Predictor, batch: Batch, row: int, hypothesis: dict[str, Any]) -> list[Any]:
        """Return the boxes or triplets of a hypothesis in pixels of its image; none for other tasks."""
        task = searching.task
        if not isinstance(task, BoxTask):
            return []
        located = hypothesis["tokens"], batch["w_resize_ratios"][row], batch["h_resize_ratios"][row]
        if isinstance(task, SceneGraphTask):
            return task.triplets(*located) or []
        return [tuple(box) for box in task.boxes(*located) or []]

    @staticmethod
    def _queries(searching: Predictor, hypothesis: dict[str, Any], blank: int) -> tuple[Query, ...]:
        labels = hypothesis["labels"]
        kinds = slot_kinds(labels, blank=blank)
        return tuple(
            Query("" if kind == "blank" else searching.label_text(label), math.exp(score), kind)
            for label, score, kind in zip(labels.tolist(), hypothesis["label_scores"].tolist(), kinds, strict=True)
        )
