"""What the server and its workers send each other through pipes: a header of fixed length, then JSON and an image."""

from __future__ import annotations

import json
import struct
from dataclasses import asdict, dataclass
from typing import Any

ASK = struct.Struct("!QII")
"""Header of a question: its number, the length of its JSON, and of its image."""
ANSWER = struct.Struct("!QHHI")
"""Header of an answer: the number of its question, its HTTP status, the size of its batch, and its length."""

READY = 0
"""Number of a worker's first message: the verbs of its model, or why it cannot be loaded."""
OK, UNUSABLE, BROKEN = 200, 422, 500


@dataclass(frozen=True)
class WorkerSettings:
    """How a worker predicts.

    Attributes:
        checkpoint: see `narvl.load`, as the two below.
        device: torch's name of the device.
        bpe_dir: folder of the vocabulary.
        max_batch_size: largest number of images in one pass of the model.
        batch_timeout: seconds that a request waits for others to fill its batch.
        max_pixels: largest number of pixels of an image.
        threads: threads of torch. None: as OMP_NUM_THREADS says.
        readers: threads that decode images.
        ngram_automaton: see `narvl.load`, as the one below.
        ngram_weight: factor of the n-grams' log-probabilities.
    """

    checkpoint: str | None
    device: str | None
    bpe_dir: str | None
    max_batch_size: int
    batch_timeout: float
    max_pixels: int
    threads: int | None
    readers: int
    ngram_automaton: str | None = None
    ngram_weight: float = 0.2


@dataclass(frozen=True)
class Question:
    """What is asked about one image. The options are those of `Decoding`."""

    verb: str
    text: str | None
    image: bytes
    beam: int | None = None
    nbest: int | None = None
    answers: tuple[str, ...] | None = None
    abstain_below: float = 0.0

    def packed(self, number: int) -> bytes:
        """Return the message of this question."""
        fields = json.dumps({name: value for name, value in vars(self).items() if name != "image"}).encode()
        return ASK.pack(number, len(fields), len(self.image)) + fields + self.image


@dataclass(frozen=True)
class Answer:
    """What a worker answers.

    Attributes:
        status: the HTTP status.
        batch: the number of images that were predicted together, in the first answer of a batch; 0 in the others.
        body: a prediction as JSON, or what is wrong in plain text.
    """

    status: int
    batch: int
    body: bytes

    def packed(self, number: int) -> bytes:
        """Return the message of this answer."""
        return ANSWER.pack(number, self.status, self.batch, len(self.body)) + self.body


def question_of(fields: bytes, image: bytes) -> Question:
    """Return a question from the JSON and the image of its message."""
    read: dict[str, Any] = json.loads(fields)
    if read["answers"] is not None:
        read["answers"] = tuple(read["answers"])
    return Question(image=image, **read)


def packed_settings(settings: WorkerSettings) -> bytes:
    """Return the first message to a worker: its settings, as a line of JSON."""
    return json.dumps(asdict(settings)).encode() + b"\n"
