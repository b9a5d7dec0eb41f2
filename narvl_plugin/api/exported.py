"""Exported students as engines: one graph in ONNX Runtime, OpenVINO or torch."""

from __future__ import annotations

import json
import math
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from narvl_plugin.api.model import Decoding
from narvl_plugin.api.prediction import Alternative, HeatMap, Prediction, Query, Token
from narvl_plugin.data.any_image import as_seen
from narvl_plugin.errors import BadRow, InputError
from narvl_plugin.export.runner import Answer, Student
from narvl_plugin.models.exported import SETTINGS_FILE, check_sizes
from narvl_plugin.tasks import TASKS

SAFE_FORMATS = ("onnx", "openvino")
"""Formats whose files are data. torch reads its own by evaluating strings."""


class Prepared(NamedTuple):
    """An image and its text as the graph reads them: (3, side, side), (L,), and the size of the image."""

    pixels: np.ndarray
    prompt: list[int]
    size: tuple[int, int]


class ExportedEngine:
    """A student that `narvl export` wrote. It follows one output, as its checkpoint does with a beam of 1.

    Attributes:
        task: the task, such as `caption`.
        verb: what it does with an image.
        text_column: the name of the text that is read beside an image, None where there is none.
    """

    def __init__(self, folder: Path, threads: int | None = None) -> None:
        """Load a folder that `narvl export` wrote.

        Args:
            folder: the folder.
            threads: threads of the runtime; None leaves the choice to it.

        Raises:
            InputError: if the folder is incomplete or damaged, or the runtime of its format is not installed.
        """
        try:
            _check_settings(folder)
            self.student = Student(folder, threads)
        except InputError:
            raise
        except ImportError as error:
            raise InputError(f"{folder}: needs the package {error.name}; pip install {error.name}") from error
        except Exception as error:  # a damaged file raises errors of many types
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"{folder}: is no student of narvl export, or is damaged ({reason:.300})") from error
        self.folder = folder
        self.task = str(self.student.settings["task"])
        if self.task not in TASKS:
            raise InputError(f"{folder}: was exported for the unknown task {self.task!r:.40}")
        self.verb, self.text_column = TASKS[self.task].verb, TASKS[self.task].text_column

    def prepare(self, image: Any, text: str, where: str) -> Prepared:
        """Return an image and its text as the graph reads them; see `Engine`."""
        try:
            prompt = self.student.prompt({} if self.text_column is None else {self.text_column: text})
        except ValueError as error:
            raise BadRow(f"{where}: {error}") from error
        seen = as_seen(image, where)
        return Prepared(self.student.normalise(seen), prompt, seen.size)

    def check(self, decoding: Decoding) -> None:
        """Check that the student can search like that; see `Engine`."""
        if decoding.ngram_automaton:
            raise InputError("ngram_automaton: an exported student cannot use n-grams; load its checkpoint")
        beyond = [name for name in ("beam", "answers", "constraint") if getattr(decoding, name) not in (None, 1)]
        if beyond:
            raise InputError(
                f"{beyond[0]}: an exported student answers as it was exported; load its checkpoint for other searches"
            )

    def predict(self, prepared: Sequence[Prepared], decoding: Decoding) -> list[Prediction]:
        """Predict a batch; see `Engine`."""
        self.check(decoding)
        pixels, prompts, sizes = zip(*prepared, strict=True)
        log_probs = self.student.run(np.stack(pixels), np.array(prompts, dtype=np.int64))
        found = [
            self.student.answer(row, size, decoding.abstain_below or None)
            for row, size in zip(log_probs, sizes, strict=True)
        ]
        return [self._prediction(answer, decoding) for answer in found]

    def attention(self, image: Any, text: str, prediction: Prediction) -> tuple[HeatMap, ...]:
        """Raise InputError: the graph holds no attention."""
        raise InputError(f"{self.folder}: an exported student does not tell where it looks; load its checkpoint")

    def _prediction(self, answer: Answer, decoding: Decoding) -> Prediction:
        words = map(self.student.label_text, answer.tokens)
        box: Any = answer.box
        number = decoding.nbest or len(answer.alternatives)
        return Prediction(
            text=" ".join(answer.text.split()),
            confidence=answer.confidence,
            tokens=tuple(map(Token, words, answer.probabilities)),
            queries=tuple(self._query(*query) for query in answer.queries),
            alternatives=tuple(Alternative(*one) for one in answer.alternatives[:number])
            or (Alternative(answer.text, answer.confidence, box),),
            box=box,
            task=self.task,
            labels=tuple(answer.tokens),
        )

    def _query(self, label: int, score: float, kind: Any) -> Query:
        return Query("" if kind == "blank" else self.student.label_text(label), math.exp(score), kind)


def _check_settings(folder: Path) -> None:
    """Check the settings of an exported student, which may be a stranger's.

    Raises:
        InputError: if it is in a format whose reader runs code, or a size is beyond its limits.
        Exception: if the file is damaged.
    """
    settings = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    if settings["format"] not in SAFE_FORMATS:
        raise InputError(
            f"{folder}: is in the format {settings['format']!r:.40}, whose files are programs; load its checkpoint, or "
            f"export it to {' or '.join(SAFE_FORMATS)}"
        )
    check_sizes(folder, settings)
    if "search" not in settings:
        raise InputError(f"{folder}: is a graph for the checkpoint beside it alone; load the checkpoint")
    for _, field, form, conversion in string.Formatter().parse(settings["template"]):
        if field is not None and (not field.isidentifier() or form or conversion):
            raise InputError(f"{folder}: the template has the field {field!r:.40}; expected a plain name")
