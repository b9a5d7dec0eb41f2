"""The model that people call: one method for each thing that it can do with an image."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, overload

from narvl_plugin.api.prediction import HeatMap, Prediction
from narvl_plugin.ctc import OutputConstraint
from narvl_plugin.data.any_image import AnyImage, held
from narvl_plugin.errors import InputError

Images = AnyImage | Sequence[AnyImage]
"""One image, or a list of them."""
IN_THE_BOX = "the model in the box"
"""The name of the model that comes with narvl."""


@dataclass(frozen=True)
class Decoding:
    """How outputs are searched for.

    Attributes:
        beam: width of the beam search. None: as the model was validated.
        nbest: number of alternatives. None: one, and five of a closed list of answers.
        answers: a closed list of outputs, which are all scored. None: the model's own list, if it has one.
        constraint: the outputs that a student may predict. None: all of its task.
        abstain_below: confidence below which the model predicts nothing, 0 to 1. A set of boxes or a graph is left
            empty if its most probable element is less probable.
        ngram_automaton: file of `narvl ngrams`. A student's caption is then the best one whose n-grams are known. Given
            to `narvl.load`, it is for captions only, and other verbs answer as without it. The model in the box has its
            own for calls that search for one caption; None does without.
        ngram_weight: factor of the n-grams' log-probabilities. 0 only rules out.
    """

    beam: int | None = None
    nbest: int | None = None
    answers: Sequence[str] | None = None
    constraint: OutputConstraint | None = None
    abstain_below: float = 0.0
    ngram_automaton: str | os.PathLike[str] | None = None
    ngram_weight: float = 0.2

    def __post_init__(self) -> None:
        for name in ("beam", "nbest"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise InputError(f"{name}={value!r}: expected a whole number above 0")
        weight = self.ngram_weight
        if not isinstance(weight, int | float) or not 0 <= weight < math.inf:
            raise InputError(f"ngram_weight={weight!r}: expected a number from 0")
        if not 0 <= self.abstain_below <= 1:
            raise InputError(f"abstain_below={self.abstain_below!r}: expected a confidence from 0 to 1")
        if self.answers is not None:
            given: Any = self.answers
            if isinstance(given, str) or not all(isinstance(one, str) and one.strip() for one in given):
                raise InputError("answers: expected a list of texts that are not empty")
            object.__setattr__(self, "answers", tuple(given))
            if not self.answers:
                raise InputError("answers: the list is empty; give at least one answer")

    @property
    def width(self) -> int:
        """The number of outputs that the search keeps, as far as it is given."""
        return max(self.beam or 1, self.nbest or 1)

    @property
    def finds_one(self) -> bool:
        """Whether the one best of all outputs is searched for. Only then can n-grams weigh them."""
        return self.width == 1 and self.answers is None and self.constraint is None


class Engine(Protocol):
    """What answers for one task: a checkpoint, or an exported student."""

    task: str
    verb: str
    text_column: str | None

    def attention(self, image: Any, text: str, prediction: Prediction) -> tuple[HeatMap, ...]:
        """Return where the model looks for each token of a prediction.

        Raises:
            InputError: if the model cannot tell.
        """

    def prepare(self, image: Any, text: str, where: str) -> Any:
        """Read an image and its text. Threads and processes may do so while the model runs.

        Args:
            image: an image that `held` returned.
            text: the text; unused by tasks that read none.
            where: the name of the image, for errors.

        Raises:
            BadRow: if the image or the text cannot be used.
        """

    def check(self, decoding: Decoding) -> None:
        """Check that the model can search like that, before the first prediction.

        Raises:
            InputError: if it cannot.
        """

    def predict(self, prepared: Sequence[Any], decoding: Decoding) -> list[Prediction]:
        """Predict a batch.

        Args:
            prepared: what `prepare` returned for each image.
            decoding: how to search.

        Raises:
            InputError: if the model cannot search like that.
        """


class Model:
    """A model that answers about images: a student or a teacher, in fairseq's format or exported.

    Each verb takes one image or a list, and returns one `Prediction` or a list. An image is a path, bytes, an open
    binary file, an image of Pillow, or an array or tensor of pixels. All verbs take `batch_size` and
    the options of `Decoding` by name, for one call. Threads may share a model.

    Attributes:
        name: the file or folder that was loaded.
        batch_size: images in one pass.
        decoding: how outputs are searched for.
        engines: what answers, by verb.
        ngrams: file of n-grams that come with the model, for calls that search for one caption.
    """

    def __init__(
        self,
        name: str,
        engines: Mapping[str, Engine],
        decoding: Decoding,
        batch_size: int,
        ngrams: Path | None = None,
    ) -> None:
        self.name = name
        self.engines = dict(engines)
        self.decoding = decoding
        self.batch_size = batch_size
        self.ngrams = ngrams
        _require_batch_size(batch_size)

    @property
    def verbs(self) -> tuple[str, ...]:
        """What this model does: its methods, of caption, answer, locate, graph, tree and entails.

        `regions` is `locate` with all=True. Other verbs are for `predict`.
        """
        return tuple(self.engines)

    @overload
    def caption(self, images: AnyImage, **options: Any) -> Prediction: ...
    @overload
    def caption(self, images: Sequence[AnyImage], **options: Any) -> list[Prediction]: ...
    def caption(self, images: Images, **options: Any) -> Prediction | list[Prediction]:
        """Describe images in a sentence.

        Args:
            images: an image, or a list.
            **options: see `Decoding`; also `batch_size`.

        Raises:
            InputError: if an image cannot be read, or the model was not trained to caption.
        """
        return self.predict("caption", images, None, **options)

    @overload
    def answer(self, images: AnyImage, question: str, **options: Any) -> Prediction: ...
    @overload
    def answer(self, images: Sequence[AnyImage], question: str | Sequence[str], **options: Any) -> list[Prediction]: ...
    def answer(self, images: Images, question: str | Sequence[str], **options: Any) -> Prediction | list[Prediction]:
        """Answer a question about images.

        Args:
            images: an image, or a list.
            question: the question, or a list with one for each image.
            **options: see `Decoding`, such as `answers=["red", "blue"]` for a closed list; also `batch_size`.

        Raises:
            InputError: if an image or a question cannot be used, or the model was not trained to answer.
        """
        return self.predict("answer", images, question, **options)

    @overload
    def locate(self, images: AnyImage, text: str, *, all: bool = False, **options: Any) -> Prediction: ...
    @overload
    def locate(
        self, images: Sequence[AnyImage], text: str | Sequence[str], *, all: bool = False, **options: Any
    ) -> list[Prediction]: ...
    def locate(
        self, images: Images, text: str | Sequence[str], *, all: bool = False, **options: Any
    ) -> Prediction | list[Prediction]:
        """Find the region of images that a text describes, or all of them, in pixels of the image as a person sees it.

        One region is `box`. A model of the task `regions` predicts the most probable of its boxes, and None if there is
        no such region. All regions are `boxes`, the most probable first, each with its probability.

        Args:
            images: an image, or a list.
            text: words for the region, or a list with one for each image.
            all: whether to find all regions, which takes a model of the task `regions`.
            **options: see `Decoding`; also `batch_size`.

        Raises:
            InputError: if an image or a text cannot be used, or the model was not trained to locate, or for `regions`.
        """
        return self.predict("regions" if all else "locate", images, text, **options)

    @overload
    def graph(self, images: AnyImage, **options: Any) -> Prediction: ...
    @overload
    def graph(self, images: Sequence[AnyImage], **options: Any) -> list[Prediction]: ...
    def graph(self, images: Images, **options: Any) -> Prediction | list[Prediction]:
        """Find the relations of the objects in images: `triplets`, the most probable first, each with its probability.

        Args:
            images: an image, or a list.
            **options: see `Decoding`; also `batch_size`.

        Raises:
            InputError: if an image cannot be read, or the model was not trained for the task `scene_graph`.
        """
        return self.predict("graph", images, None, **options)

    @overload
    def entails(self, images: AnyImage, statement: str, **options: Any) -> Prediction: ...
    @overload
    def entails(
        self, images: Sequence[AnyImage], statement: str | Sequence[str], **options: Any
    ) -> list[Prediction]: ...
    def entails(self, images: Images, statement: str | Sequence[str], **options: Any) -> Prediction | list[Prediction]:
        """Tell whether images show what a statement says: yes, no or maybe. `alternatives` has all three.

        Args:
            images: an image, or a list.
            statement: the statement, or a list with one for each image.
            **options: see `Decoding`; also `batch_size`.

        Raises:
            InputError: if an image or a statement cannot be used, or the model was not trained on entailment.
        """
        return self.predict("entails", images, statement, **options)

    @overload
    def tree(self, images: AnyImage, **options: Any) -> Prediction: ...
    @overload
    def tree(self, images: Sequence[AnyImage], **options: Any) -> list[Prediction]: ...
    def tree(self, images: Images, **options: Any) -> Prediction | list[Prediction]:
        """Find the tree of images: the scene, its regions, and the objects in each. It is `Prediction.tree`.

        Args:
            images: an image, or a list.
            **options: see `Decoding`; also `batch_size`.

        Raises:
            InputError: if an image cannot be read, or the model was not trained on scene trees.
        """
        return self.predict("tree", images, None, **options)

    def predict(self, verb: str, images: Images, texts: str | Sequence[str] | None = None, **options: Any) -> Any:
        """Do what a verb says.

        Args:
            verb: one of `verbs`.
            images: an image, or a list.
            texts: the text beside each image, or one for all; None for verbs without a text.
            **options: see `Decoding`; also `batch_size`.

        Returns:
            A prediction, or a list of them where images or texts are a list.

        Raises:
            InputError: if something cannot be used; the message names the image.
        """
        several = isinstance(images, list | tuple)
        if not several and isinstance(texts, list | tuple):
            images, several = [images] * len(texts), True  # type: ignore[list-item]
        given: list[Any] = list(images) if several else [images]  # type: ignore[arg-type]
        if texts is not None and not isinstance(texts, str) and len(texts) != len(given):
            raise InputError(
                f"{len(given)} images and {len(texts)} texts: give one text for each image, or one for all"
            )
        paired = [texts] * len(given) if texts is None or isinstance(texts, str) else list(texts)
        found = list(self.stream(verb, zip(given, paired, strict=True), **options))
        return found if several else found[0]

    def stream(self, verb: str, pairs: Iterable[tuple[AnyImage, str | None]], **options: Any) -> Iterator[Prediction]:
        """Yield the prediction of each pair of an image and its text, batch by batch, as they are read.

        Args:
            verb: one of `verbs`.
            pairs: images, each with its text, or None for verbs without a text.
            **options: see `Decoding`; also `batch_size`.

        Raises:
            InputError: if something cannot be used; the message names the image.
        """
        engine = self.engine(verb)
        batch_size = options.pop("batch_size", self.batch_size)
        _require_batch_size(batch_size)
        decoding = self.decoding_for(verb, **options)
        return self._stream(engine, iter(pairs), decoding, batch_size)

    def _stream(
        self, engine: Engine, pairs: Iterator[tuple[AnyImage, str | None]], decoding: Decoding, batch_size: int
    ) -> Iterator[Prediction]:
        done = 0
        while batch := list(islice(pairs, batch_size)):
            images = [held(image) for image, _ in batch]
            texts = [checked_text(engine, text) for _, text in batch]
            prepared = [
                engine.prepare(image, text, name_of(image, number))
                for number, (image, text) in enumerate(zip(images, texts, strict=True), done + 1)
            ]
            done += len(batch)
            for prediction, image, text in zip(engine.predict(prepared, decoding), images, texts, strict=True):
                yield with_input(prediction, engine, image, text)

    def engine(self, verb: str) -> Engine:
        """Return what answers for a verb.

        Raises:
            InputError: if the model was not trained for it.
        """
        if verb not in self.engines:
            meaning = " (all boxes of a text)" if verb == "regions" else ""
            advice = "; give the checkpoint of a model that was" if self.name == IN_THE_BOX else ""
            has = f"it has {', '.join(self.verbs)}{advice}"
            raise InputError(f"{self.name}: was not trained for {verb}{meaning}; {has}")
        return self.engines[verb]

    def decoding_for(self, verb: str, **options: Any) -> Decoding:
        """Return how to search in one call.

        Args:
            verb: one of `verbs`.
            **options: the options of `Decoding` that differ from the model's.

        Raises:
            InputError: if an option or its value is unknown.
        """
        names = vars(self.decoding).keys()
        if unknown := [name for name in options if name not in names]:
            raise InputError(f"there is no option {unknown[0]}; the options are {', '.join([*names, 'batch_size'])}")
        decoding = replace(self.decoding, **options)
        if "ngram_automaton" in options:
            return decoding
        if verb != "caption":
            return replace(decoding, ngram_automaton=None)
        if decoding.ngram_automaton is None and decoding.finds_one:
            return replace(decoding, ngram_automaton=self.ngrams)
        return decoding

    def __repr__(self) -> str:
        return f"<narvl.Model ({self.name}): {', '.join(self.verbs)}>"


def name_of(image: Any, number: int) -> str:
    """Return the name of an image for errors: its path, or its number, counted from 1."""
    return str(image) if isinstance(image, Path) else f"image {number}"


def with_input(prediction: Prediction, engine: Engine, image: Any, text: str) -> Prediction:
    """Return a prediction that knows its image and its text."""
    look = partial(engine.attention, image, text, prediction)
    return replace(prediction, image=image, prompt=text or None, _look=look)


def checked_text(engine: Engine, text: str | None) -> str:
    """Return the text beside an image; raises InputError if it is missing or superfluous."""
    if engine.text_column is None:
        if text is not None:
            raise InputError(f"{engine.verb} reads no text")
        return ""
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"the {engine.text_column} is empty; {engine.verb} needs one")
    return text


def _require_batch_size(batch_size: Any) -> None:
    if type(batch_size) is not int or batch_size < 1:
        raise InputError(f"batch_size={batch_size!r}: expected a whole number above 0")
