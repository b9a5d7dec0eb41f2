"""A student's pass in ONNX Runtime: the graph that `narvl export` wrote beside its checkpoint.

On a CPU a small model spends most of its time between operations. A graph has fewer of them, and starts them faster.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from narvl_plugin.errors import InputError

from .config import PADDING_INDEX

if TYPE_CHECKING:
    from .narvl import NarvlModel

logger = logging.getLogger(__name__)

SUFFIX = ".onnx"
"""Suffix of the folder beside a checkpoint."""
SETTINGS_FILE = "student.json"
"""What tells a folder of `narvl export`."""
GRAPH_FILE = "student.onnx"
LARGEST = {"side": 4_096, "prompt_length": 100_000, "max_words": 100_000}
"""Largest values of sizes in the settings."""


def folder_beside(checkpoint: Path) -> Path:
    """Return the folder of a checkpoint's graph: model.onnx for model.pt."""
    return checkpoint.with_suffix(SUFFIX)


def check_sizes(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raise InputError if a size in the settings of a folder, which may be a stranger's, is beyond its limits."""
    for name, most in LARGEST.items():
        if type(settings[name]) is not int or not 1 <= settings[name] <= most:
            raise InputError(f"{folder}: {name} is {settings[name]!r:.40}; expected a whole number from 1 to {most:,}")


def fingerprint(model: NarvlModel) -> str:
    """Return a number that differs for other weights or another temperature. The model is not optimised yet."""
    found = hashlib.sha256(repr(model.temperature).encode())
    for name, weight in sorted(model.state_dict().items()):
        found.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        found.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


class ExportedPass:
    """Computes a student's log-probabilities in ONNX Runtime, with as many threads as torch has.

    Args:
        folder: the output folder of `narvl export`, whose graph is that of the student.
        settings: the content of its settings file.
        shape: the number of queries N and of labels V.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], shape: tuple[int, int]) -> None:
        self.folder = folder
        self._settings, self._shape = settings, shape
        self._side, self._length = settings["side"], settings["prompt_length"]
        self._may_pad = "prompt" not in settings
        self._session: Any = None
        self._threads = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return ExportedPass, (self.folder, self._settings, self._shape)  # a session has no copies

    @classmethod
    def beside(cls, checkpoint: Path, model: NarvlModel) -> ExportedPass | None:
        """Return the pass of the folder beside a checkpoint; None if there is none for these weights.

        Args:
            checkpoint: the file that the model was read from.
            model: the model, which is not optimised yet.

        Raises:
            InputError: if the folder is damaged.
        """
        folder = folder_beside(checkpoint)
        file = folder / SETTINGS_FILE
        if model.encoder.embed_tokens.weight.device.type != "cpu" or not file.is_file():
            return None
        try:
            settings = json.loads(file.read_text(encoding="utf-8"))
            check_sizes(folder, settings)
            is_usable = settings["format"] == "onnx" and not settings["int8"]
        except (OSError, RecursionError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{file}: is damaged ({error!r:.100}); delete {folder}, or run narvl export") from error
        is_current = is_usable and settings.get("fingerprint") == fingerprint(model)  # older exports have none
        if not is_current:
            why = "has other weights than the checkpoint" if is_usable else "is not of --to onnx in full precision"
            logger.warning("%s: is not used, because it %s; run narvl export again", folder, why)
            return None
        if importlib.util.find_spec("onnxruntime") is None:
            logger.warning("%s: is not used, because onnxruntime is not installed", folder)
            return None
        logger.info("the student runs as the graph in %s", folder)
        return cls(folder, settings, (model.num_queries, model.blank + 1))

    def log_probs(self, net_input: dict[str, Any]) -> Tensor | None:
        """Return the log-probabilities of the labels (B, N, V); None for inputs that are none of the graph's.

        Args:
            net_input: the model's inputs, see `NarvlModel.forward`.

        Raises:
            InputError: if the graph cannot be read, or computes something else.
        """
        images, tokens, masks = net_input.get("patch_images"), net_input["src_tokens"], net_input.get("patch_masks")
        missing = self._length - tokens.size(1)
        if (
            images is None
            or images.dtype != torch.float32
            or images.shape[1:] != (3, self._side, self._side)
            or net_input.get("queries") is not None
            or (masks is not None and not bool(masks.all()))
            or missing < 0
            or (not self._may_pad and (missing > 0 or bool((tokens == PADDING_INDEX).any())))
        ):
            return None
        padded = F.pad(tokens, (0, missing), value=PADDING_INDEX)
        try:
            (found,) = self._started().run(None, {"patch_images": images.numpy(), "src_tokens": padded.numpy()})
        except Exception as error:  # the runtime raises errors of many types
            reason = " ".join(str(error).split())
            raise InputError(f"{self.folder / GRAPH_FILE}: cannot be run ({reason:.300}); delete the folder") from error
        if found.shape != (len(tokens), *self._shape):
            raise InputError(
                f"{self.folder / GRAPH_FILE}: gives {found.shape[1:]} numbers, not {self._shape}; delete the folder"
            )
        return torch.from_numpy(found)

    def _started(self) -> Any:
        """Return the session, which is started anew if torch's number of threads has changed."""
        import onnxruntime

        threads = torch.get_num_threads()
        if self._session is None or self._threads != threads:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            self._session, self._threads = onnxruntime.InferenceSession(self.folder / GRAPH_FILE, options), threads
        return self._session
