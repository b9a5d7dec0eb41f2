"""A worker: the process that holds a model. Threads decode images while the model predicts.

It reads questions from its standard input, answers on its standard output, and ends when the input ends.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO, Generic, TypeVar

from narvl_plugin.errors import BadRow, InputError
from narvl_plugin.serving.messages import (
    ASK,
    BROKEN,
    OK,
    READY,
    UNUSABLE,
    Answer,
    Question,
    WorkerSettings,
    question_of,
)

logger = logging.getLogger(__name__)

Key = TypeVar("Key", bound=Hashable)
Item = TypeVar("Item")


class Batcher(Generic[Key, Item]):
    """Collects items into batches of one key.

    A batch is due when it is full, or when its first item has waited for the timeout. Of the batches that are due, the
    one whose first item came first is taken.
    """

    def __init__(self, max_size: int, timeout: float) -> None:
        self._max_size, self._timeout = max_size, timeout
        self._waiting: dict[Key, deque[tuple[float, Item]]] = {}
        self._added = threading.Condition()

    def add(self, key: Key, item: Item) -> None:
        """Add an item."""
        with self._added:
            self._waiting.setdefault(key, deque()).append((time.monotonic(), item))
            self._added.notify()

    def take(self) -> tuple[Key, list[Item]]:
        """Wait for a batch that is due, and return it with its key."""
        with self._added:
            while True:
                now = time.monotonic()
                ends = {key: group[0][0] + self._timeout for key, group in self._waiting.items()}
                due = [key for key, end in ends.items() if end <= now or len(self._waiting[key]) >= self._max_size]
                if due:
                    return self._pop(min(due, key=lambda key: ends[key]))
                self._added.wait(min(ends.values()) - now if ends else None)

    def _pop(self, key: Key) -> tuple[Key, list[Item]]:
        group = self._waiting[key]
        batch = [group.popleft()[1] for _ in range(min(len(group), self._max_size))]
        if not group:
            del self._waiting[key]
        return key, batch


class Worker:
    """Answers questions about images with a model.

    Attributes:
        model: the model.
        settings: how it predicts.
    """

    def __init__(self, model: Any, settings: WorkerSettings, output: BinaryIO) -> None:
        """Keep a model.

        Args:
            model: the model.
            settings: how it predicts.
            output: where answers are written.
        """
        self.model, self.settings = model, settings
        self._output, self._writing = output, threading.Lock()
        self._batcher: Batcher[Any, tuple[int, str, Any]] = Batcher(settings.max_batch_size, settings.batch_timeout)

    def answer(self, number: int, answer: Answer) -> None:
        """Send an answer."""
        with self._writing:
            self._output.write(answer.packed(number))
            self._output.flush()

    def read(self, number: int, question: Question) -> None:
        """Decode the image of a question, and let the question wait for the model."""
        from narvl_plugin.api.model import checked_text
        from narvl_plugin.data.images import opened

        try:
            engine = self.model.engine(question.verb)
            text = checked_text(engine, question.text)
            given = {name: getattr(question, name) for name in ("beam", "nbest", "answers", "abstain_below")}
            decoding = self.model.decoding_for(question.verb, **given)
            with opened(question.image, "image") as image:
                width, height = image.size
                if width * height > self.settings.max_pixels:
                    raise BadRow(
                        f"image: has {width} x {height} pixels; this server takes up to {self.settings.max_pixels:,}"
                    )
            prepared = engine.prepare(question.image, text, "image")
        except (InputError, ValueError) as error:
            self.answer(number, Answer(UNUSABLE, 0, _reason(error)))
        except Exception:
            logger.exception("a question could not be read")
            self.answer(number, Answer(BROKEN, 0, b"the server failed to read this request"))
        else:
            self._batcher.add((question.verb, decoding), (number, text, prepared))

    def predict(self) -> None:
        """Predict one batch, and send its answers.

        Raises:
            Exception: any that is not about the questions. The model may be in an undefined state then.
        """
        (verb, decoding), batch = self._batcher.take()
        numbers, texts, prepared = zip(*batch, strict=True)
        try:
            answers = self._answers(self.model.engine(verb), decoding, texts, prepared)
        except Exception:
            for number in numbers:
                self.answer(number, Answer(BROKEN, 0, b"the server failed to answer this request"))
            raise
        for place, (number, (status, body)) in enumerate(zip(numbers, answers, strict=True)):
            self.answer(number, Answer(status, 0 if place else len(batch), body))

    def _answers(
        self, engine: Any, decoding: Any, texts: Sequence[str], prepared: Sequence[Any]
    ) -> list[tuple[int, bytes]]:
        """Return the status and the body of the answer to each image."""
        from narvl_plugin.api.model import with_input

        try:
            found = engine.predict(prepared, decoding)
            complete = [with_input(one, engine, None, text) for one, text in zip(found, texts, strict=True)]
            return [(OK, json.dumps(one.to_dict(), ensure_ascii=False).encode()) for one in complete]
        except (InputError, ValueError) as error:
            if len(prepared) == 1:
                return [(UNUSABLE, _reason(error))]
        # One image may be the reason: each is predicted alone.
        alone = zip(texts, prepared, strict=True)
        return [answer for text, one in alone for answer in self._answers(engine, decoding, [text], [one])]

    def run(self, questions: BinaryIO) -> None:
        """Answer questions until there are no more."""
        threading.Thread(target=self._predict_always, daemon=True).start()
        readers = ThreadPoolExecutor(self.settings.readers)
        while len(header := questions.read(ASK.size)) == ASK.size:
            number, length, size = ASK.unpack(header)
            readers.submit(self.read, number, question_of(questions.read(length), questions.read(size)))

    def _predict_always(self) -> None:
        try:
            while True:
                self.predict()
        except Exception:
            logger.exception("a batch could not be predicted; this worker ends, and the server starts another")
        finally:
            os._exit(1)


def _reason(error: Exception) -> bytes:
    return " ".join(str(error).split()).encode()


def main() -> None:
    """Run a worker."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the server, which receives them, too, ends its workers
        signal.signal(number, signal.SIG_IGN)
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    settings = WorkerSettings(**json.loads(sys.stdin.buffer.readline()))
    import torch

    from narvl_plugin.api import load

    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    try:
        model = load(
            settings.checkpoint,
            device=settings.device,
            bpe_dir=settings.bpe_dir,
            ngram_automaton=settings.ngram_automaton,
            ngram_weight=settings.ngram_weight,
        )
    except Exception as error:
        if not isinstance(error, InputError | OSError | ValueError):
            logger.exception("the model could not be loaded")
        output.write(Answer(UNUSABLE, 0, _reason(error)).packed(READY))
        output.flush()
        return
    logging.getLogger().setLevel(logging.ERROR)  # warnings would quote what clients send
    worker = Worker(model, settings, output)
    worker.answer(READY, Answer(OK, 0, json.dumps(model.verbs).encode()))
    worker.run(sys.stdin.buffer)
    os._exit(0)  # whatever a thread still does: nobody waits for it


if __name__ == "__main__":
    main()
