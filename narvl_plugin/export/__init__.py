"""Students as files that run without this code, in ONNX Runtime, OpenVINO or plain torch."""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

from narvl_plugin.ctc import BoxSets, LengthRange
from narvl_plugin.ctc.box_sets import IN_ORDER
from narvl_plugin.data.boxes import GOOD_IOU
from narvl_plugin.data.images import HALF, IMAGENET
from narvl_plugin.data.text import PROMPTS, SPM_FILE, Gpt2Codec
from narvl_plugin.data.vocabulary import Vocabulary
from narvl_plugin.errors import InputError
from narvl_plugin.export import images, runner, search
from narvl_plugin.export.graph import StudentGraph
from narvl_plugin.generation.options import generation_config
from narvl_plugin.generation.parallel_generator import PATHS_DRAWN, UNCHANGED
from narvl_plugin.inference.predictor import Predictor
from narvl_plugin.models.exported import GRAPH_FILE, SETTINGS_FILE, fingerprint, folder_beside
from narvl_plugin.models.narvl import NarvlModel
from narvl_plugin.tasks.base import BaseTask
from narvl_plugin.whole_files import naming, require_writable, sole_writer, write_whole

FORMATS = {
    "onnx": ["onnx", "onnxscript", "onnxruntime"],
    "openvino": ["onnx", "onnxscript", "openvino"],
    "torch-export": [],
}
"""What a student is written as, and the packages that writing and checking it takes."""
TOLERANCE = 1e-4
"""By how much probabilities may differ from the model's own, in float32."""
PROMPT_LENGTH = 32
"""Tokens of the prompts of tasks that read a text."""
PACKAGE = "narvl_student"
"""What run.py imports, beside it."""
RUN = f'''"""Runs the student in this file's folder; it does no more than the code in {PACKAGE}/."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
try:
    from {PACKAGE}.runner import Student, main
except ImportError as error:
    if __name__ != "__main__":
        raise
    sys.exit(f"run.py: {{error}}; it needs numpy and Pillow (pip install numpy pillow), and {PACKAGE}/ beside it")

if __name__ == "__main__":
    main(Path(__file__).parent)
'''


def export(
    checkpoint: Path,
    out: Path,
    *,
    to: str = "onnx",
    int8: bool = False,
    prompt_length: int = PROMPT_LENGTH,
    task_overrides: Mapping[str, Any] | None = None,
) -> float:
    """Write a student, all that its images and texts need, and a program that runs it into a folder.

    Args:
        checkpoint: of a student.
        out: the folder.
        to: one of `FORMATS`.
        int8: weights of matrix products in 8 bits, of ONNX only.
        prompt_length: tokens that the graph reads beside the image; of captions it is that of the one prompt.
        task_overrides: options of the task that differ from the checkpoint's.

    Returns:
        the largest difference between the probabilities of what was written and the model's own.

    Raises:
        InputError: for a checkpoint that is no student's, formats that packages are missing for, tasks whose prompts
            hold more than texts, and --eval-args of another kind of search; where the most probable labels differ, or
            probabilities by more than `TOLERANCE`.
    """
    if to not in FORMATS:
        raise InputError(f"--to {to}: choose {', '.join(FORMATS)}")
    if int8 and to != "onnx":
        raise InputError(f"--int8: is for --to onnx, not {to}")
    if missing := [name for name in FORMATS[to] if importlib.util.find_spec(name) is None]:
        raise InputError(f"--to {to}: needs {', '.join(missing)}; pip install {' '.join(missing)}")
    require_writable(out, folder=True)
    loaded = Predictor.load(checkpoint, task_overrides=task_overrides, optimised=False)
    model, task = loaded.model, loaded.task
    if not isinstance(model, NarvlModel):
        raise InputError(f"{checkpoint}: is no student's; a teacher has no graph that says a whole output at once")
    if task.predicts_sets and out != folder_beside(checkpoint):
        raise InputError(
            f"{checkpoint}: is a student of {task.name}, which cannot be exported, since run.py searches for one text "
            f"or box alone; narvl export {checkpoint} without a folder makes the checkpoint faster"
        )
    settings: dict[str, Any] = {
        **{"task": task.name, "format": to, "int8": int8, "fingerprint": fingerprint(model)},
        **{"side": task.cfg.patch_image_size, "prompt_length": prompt_length, "max_words": task.cfg.max_src_length},
    }
    if not task.predicts_sets:
        settings |= _settings(task) | search_settings(task, model)
    graph = StudentGraph(
        model,
        side=settings["side"],
        length=settings["prompt_length"],
        padded="prompt" not in settings,
    ).eval()
    example = _example(settings, task.target_dictionary)
    with naming(out), sole_writer(out):
        out.mkdir(exist_ok=True)
        write_graph(graph, example, out, to, int8)
        (out / SETTINGS_FILE).write_text(json.dumps(settings, ensure_ascii=False), encoding="utf-8")
        if not task.predicts_sets:
            _write_code(out)
            if settings["tokenizer"] == "sentencepiece":
                shutil.copyfile(Path(task.cfg.bpe_dir) / SPM_FILE, out / SPM_FILE)
        return _difference(graph, example, out, to, checked=not int8)


def _write_code(out: Path) -> None:
    """Write run.py and the package that it imports into a folder."""
    (out / PACKAGE).mkdir(exist_ok=True)
    (out / PACKAGE / "__init__.py").write_text('"""What run.py needs."""\n')
    for module in (runner, search, images):
        shutil.copyfile(str(module.__file__), out / PACKAGE / Path(str(module.__file__)).name)
    (out / "run.py").write_text(RUN)


def _settings(task: BaseTask) -> dict[str, Any]:
    """Return what the runner has to know beside the graph, whose settings are in `export`."""
    cfg, codec, dictionary = task.cfg, task.codec, task.target_dictionary
    if getattr(cfg, "add_object", False):
        raise InputError("a student of questions with objects (--add-object) cannot be exported")
    name = f"{cfg._name}_caption" if getattr(cfg, "add_caption", False) else str(cfg._name)
    if name not in PROMPTS:
        raise InputError(f"a student of {cfg._name} cannot be exported")
    mean, std = IMAGENET if cfg.imagenet_default_mean_and_std else HALF
    settings = {
        "mean": mean,
        "std": std,
        "template": PROMPTS[name],
        **{special: getattr(dictionary, special)() for special in ("bos", "pad", "eos", "unk")},
        "tokenizer": "gpt2" if isinstance(codec, Gpt2Codec) else "sentencepiece",
        "labels": {symbol: label for label, symbol in enumerate(dictionary.symbols)},
        "pieces": [codec.piece(symbol).decode("latin-1") for symbol in dictionary.symbols],
    }
    if "{" not in PROMPTS[name]:
        prompt = [dictionary.bos(), *codec.encode(PROMPTS[name]).tolist(), dictionary.eos()]
        settings |= {"prompt": prompt, "prompt_length": len(prompt)}
    return settings


def search_settings(task: BaseTask, model: NarvlModel) -> dict[str, Any]:
    """Return what the runner has to know to find the checkpoint's output with a beam of 1, and its confidence.

    The other options of the search are those of the checkpoint's --eval-args.
    """
    options = task.path_options(generation_config({**vars(task.generator_options()), "beam": 1}))
    eos = task.target_dictionary.eos()
    found: dict[str, Any] = {
        "blank": model.blank,
        "eos": eos,
        "no_repeat_ngram": options.get("no_repeat_ngram", 0),
        "odds": model.odds,
    }
    constraint = options["constraint"].ending_in(eos)
    if "answers" in options:
        found["answers"] = [answer.tolist() for answer in options["answers"]]
    elif isinstance(constraint, LengthRange):
        found |= {"minimum": constraint.minimum, "maximum": constraint.maximum}
    else:
        is_box = isinstance(constraint, BoxSets)
        automaton = constraint.boxes_of_any_edges() if is_box else constraint
        found |= {"automaton": [part.tolist() for part in automaton], "pairs": IN_ORDER if is_box else ()}
    settings = {"search": found, "abstain_below": task.cfg.abstain_below}
    if task.bins is not None:
        first, num_bins, max_image_size = task.bins
        settings["box"] = {"first": first, "num_bins": num_bins, "max_image_size": max_image_size}
        points = (SobolEngine(model.num_queries).draw(PATHS_DRAWN) * PATHS_DRAWN).int().tolist()
        found["good_boxes"] = {"first": first, "num_bins": num_bins, "iou": GOOD_IOU, "points": points}
    is_calibrated = model.temperature != 1 or model.odds != UNCHANGED
    return settings | {"shows_confidence": is_calibrated or task.shows_confidence}


def _example(settings: Mapping[str, Any], dictionary: Vocabulary) -> tuple[Tensor, Tensor]:
    """Draw two images, and prompts of which one is shorter where they may be."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, settings["side"], settings["side"], generator=generator)
    if "prompt" in settings:
        return images, torch.tensor([settings["prompt"]] * 2)
    prompts = torch.randint(4, len(dictionary), (2, settings["prompt_length"]), generator=generator)
    prompts[0, settings["prompt_length"] // 2 :] = dictionary.pad()
    return images, prompts


@torch.no_grad()
def write_graph(graph: StudentGraph, example: tuple[Tensor, Tensor], out: Path, to: str, int8: bool = False) -> None:
    """Write a graph, whose batch may have any size, into a folder; example: two images and their prompts."""
    batch = torch.export.Dim("batch")
    program = torch.export.export(graph, example, dynamic_shapes=({0: batch}, {0: batch}))
    if to == "torch-export":
        content = BytesIO()  # torch ends the process where it finds no space for a file
        torch.export.save(program, content)
        write_whole(out / "student.pt2", content.getvalue())
        return
    with TemporaryDirectory(dir=out) as folder:
        file = Path(folder) / GRAPH_FILE
        _quietly(
            torch.onnx.export,
            program,
            (),
            file,
            input_names=["patch_images", "src_tokens"],
            output_names=["log_probs"],
            external_data=False,
            verbose=False,
        )
        if to == "openvino":
            import openvino

            openvino.save_model(openvino.convert_model(file), out / "student.xml", compress_to_fp16=False)
        elif int8:
            from onnxruntime.quantization import QuantType, quantize_dynamic

            quantize_dynamic(file, out / GRAPH_FILE, op_types_to_quantize=["MatMul"], weight_type=QuantType.QInt8)
        else:
            file.replace(out / GRAPH_FILE)


def _quietly(function: Any, *arguments: Any, **options: Any) -> None:
    """Call a function of libraries that log each step of theirs."""
    loggers = [logging.getLogger(name) for name in ("onnx_ir", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        function(*arguments, **options)
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@torch.no_grad()
def _difference(graph: StudentGraph, example: tuple[Tensor, Tensor], out: Path, to: str, *, checked: bool) -> float:
    """Return the largest difference of probabilities to what was written, for two images and for one."""
    run = runner.RUNTIMES[to](out, None)
    largest = 0.0
    for size in (2, 1):
        images, prompts = (tensor[:size] for tensor in example)
        log_probs, written = graph(images, prompts).numpy(), run(images.numpy(), prompts.numpy())
        largest = max(largest, float(np.abs(np.exp(written) - np.exp(log_probs)).max()))
        if checked and (largest > TOLERANCE or not np.array_equal(written.argmax(2), log_probs.argmax(2))):
            raise InputError(f"{out}: what was written differs from the model, by {largest:.1e} in probabilities")
    return largest
