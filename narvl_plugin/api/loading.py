"""`narvl.load`: any model that this project knows, as a `Model`."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path

import torch

from narvl_plugin.api.exported import ExportedEngine
from narvl_plugin.api.model import IN_THE_BOX, Decoding, Engine, Model
from narvl_plugin.api.surest_box import SurestBox
from narvl_plugin.api.trained import TrainedEngine
from narvl_plugin.checkpoints.record import Checkpoint
from narvl_plugin.ctc import OutputConstraint
from narvl_plugin.devices import choose_device
from narvl_plugin.errors import InputError
from narvl_plugin.inference.predictor import Predictor
from narvl_plugin.models.exported import SETTINGS_FILE
from narvl_plugin.tasks import TASKS, loading

BOX = Path(__file__).parents[1] / "box" / "student.safetensors"
"""The model in the box: a small student of all tasks, trained on the embedded scenes."""
BOX_NGRAMS = BOX.with_name("captions.ngrams")
"""The n-grams of the captions that it was trained on."""
PRECISIONS = ("float32", "bfloat16")


def load(
    checkpoint: str | os.PathLike[str] | None = None,
    *,
    bpe_dir: str | os.PathLike[str] | None = None,
    ans2label_file: str | os.PathLike[str] | None = None,
    task: str = "caption",
    member: str | None = None,
    device: str | None = None,
    precision: str = "float32",
    batch_size: int = 8,
    beam: int | None = None,
    nbest: int | None = None,
    answers: Sequence[str] | None = None,
    constraint: OutputConstraint | None = None,
    abstain_below: float = 0.0,
    ngram_automaton: str | os.PathLike[str] | None = None,
    ngram_weight: float = 0.2,
) -> Model:
    """Load a model that answers about images.

    Args:
        checkpoint: a student or a teacher of fairseq-train, a published file of OFA, NAME.safetensors with NAME.json
            beside it, the folder of a Hugging Face or ModelScope port of OFA, `hf://OWNER/NAME`, or a folder that
            `narvl export` wrote. None loads the model in the box, a small student of all tasks that knows scenes of
            emoji art; photos are beyond it.
        bpe_dir: folder of the vocabulary, if neither the checkpoint names it nor its own folder holds it.
        ans2label_file: the list of answers (trainval_ans2label.pkl), if not the one that the checkpoint names.
        task: the task of a checkpoint that names none of ours, such as OFA's pretrained ones.
        member: of a model of several tasks, the one member to load. By default all.
        device: torch's name of the device. By default a GPU if there is one.
        precision: type of matrix products: float32, or bfloat16, which only some processors and GPUs do faster.
        batch_size: images in one pass.
        beam: see `Decoding`, as the options below.
        nbest: see `Decoding`.
        answers: see `Decoding`.
        constraint: see `Decoding`.
        abstain_below: see `Decoding`.
        ngram_automaton: see `Decoding`.
        ngram_weight: see `Decoding`.

    Returns:
        The model. Its methods take the last eight options, too, for one call.

    Raises:
        MissingInput, InputError: the model or its vocabulary cannot be used, or the n-grams with this model.
    """
    decoding = Decoding(beam, nbest, answers, constraint, abstain_below, ngram_automaton, ngram_weight)
    if precision not in PRECISIONS:
        raise InputError(f"precision={precision!r}: choose {' or '.join(PRECISIONS)}")
    if task not in TASKS:
        raise InputError(f"task={task!r}: choose one of {', '.join(TASKS)}")
    path = BOX if checkpoint is None else Path(checkpoint)
    if (path / SETTINGS_FILE).is_file():
        if precision != "float32":
            raise InputError(f"precision={precision!r}: an exported student has the one that it was written with")
        engine: Engine = ExportedEngine(path)
        return _checked(Model(str(path), {engine.verb: engine}, decoding, batch_size))
    read = Checkpoint.read(path)
    given = {"bpe_dir": bpe_dir, "ans2label_file": ans2label_file}
    overrides = {name: str(value) for name, value in given.items() if value}
    chosen = _device(device)
    model, tasks = loading.load_members(read, task_name=task, member=member, task_overrides=overrides, device=chosen)
    model.optimize_for_inference(read.file)
    if precision == "bfloat16":
        model.multiply_in_bfloat16()
    lock = threading.RLock()
    engines: dict[str, Engine] = {}
    for one in tasks.values():
        # Of two members with one task the first answers; the other is loaded by its name.
        engines.setdefault(one.verb, TrainedEngine(Predictor(model, one, {}, chosen), lock))
    if "regions" in engines:
        engines.setdefault("locate", SurestBox(engines["regions"]))
    if checkpoint is None:
        return _checked(Model(IN_THE_BOX, engines, decoding, batch_size, BOX_NGRAMS))
    return _checked(Model(str(path), engines, decoding, batch_size))


def _checked(model: Model) -> Model:
    """Return a model, if it can use its n-grams."""
    if model.decoding.ngram_automaton is not None:
        model.engine("caption").check(model.decoding)
    return model


def _device(name: str | None) -> torch.device:
    try:
        device = choose_device(name)
        torch.empty(0, device=device)
    except Exception as error:  # torch raises errors of many types for a device that is not there
        raise InputError(f"device={name!r}: cannot be used ({' '.join(str(error).split()):.200})") from error
    return device
