"""Confidence that one can trust: a student's temperature and odds, and how often models are right that are so sure.

Legend: M answers, K temperatures.
"""

from __future__ import annotations

import json
import logging
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor, nn

from narvl_plugin.checkpoints.reading import SAFETENSORS_SUFFIX, existing, read_checkpoint
from narvl_plugin.devices import choose_device
from narvl_plugin.errors import InputError
from narvl_plugin.generation.parallel_generator import UNCHANGED, change_odds
from narvl_plugin.inference.predictor import Predictor
from narvl_plugin.tasks import loading
from narvl_plugin.whole_files import require_writable, whole_file, write_whole

logger = logging.getLogger(__name__)

TEMPERATURES = tuple(2 ** (step / 8) for step in range(-20, 25))
"""Those that are tried: from 0.18 to 8, each 1.09 times the one before."""
COARSE = 4
"""Of how many temperatures one is tried first."""
BINS = 10
"""Of confidence, each as wide as the others, in reliability diagrams and the calibration error."""

Floats = NDArray[np.float64]


class CachedLogits(nn.Module):
    """A student that has answered a batch already, and gives the same logits (B, N, V) at any temperature."""

    odds = UNCHANGED

    def __init__(self, student: nn.Module, logits: Tensor, temperature: float) -> None:
        super().__init__()
        self.blank, self.num_queries, self.temperature = student.blank, student.num_queries, temperature
        self.logits = logits

    def forward(self, **net_input: Any) -> tuple[Tensor, dict[str, Any]]:
        """Return the logits."""
        return self.logits, {}


@dataclass(frozen=True)
class Reliability:
    """How often a model is right that is so sure: `confidence`, `right` and `share` of the answers by bin.

    `error` is the expected calibration error, and `error_by_chance` about what it would be for so few answers if the
    model were right exactly as often as it is sure; `coverage` and `risk` say how often the model is wrong in its most
    confident answers, by their share of all, and `area` is the area below that curve (all 0 to 1). Sources: Guo et al.,
    ICML 2017; Geifman and El-Yaniv, NeurIPS 2017.
    """

    error: float
    error_by_chance: float
    mean_confidence: float
    mean_right: float
    confidence: list[float]
    right: list[float]
    share: list[float]
    coverage: list[float]
    risk: list[float]
    area: float

    @classmethod
    def of(cls, confidence: Floats, right: Floats) -> Reliability:
        """Sum up M answers: confidence (M,) and how right each is (M,), both from 0 to 1."""
        place = np.minimum((confidence * BINS).astype(int), BINS - 1)
        filled = np.unique(place)
        share = np.array([(place == number).mean() for number in filled])
        mean_confidence = np.array([confidence[place == number].mean() for number in filled])
        mean_right = np.array([right[place == number].mean() for number in filled])
        # A bin's share of right answers has this variance around its mean confidence, and a normal distribution strays
        # from its mean by sqrt(2 / pi) standard deviations on average.
        spread = [np.sqrt((confidence * (1 - confidence))[place == number].sum()) for number in filled]
        order = np.argsort(-confidence, kind="stable")
        risk = np.cumsum(1 - right[order]) / np.arange(1, len(right) + 1)
        shown = np.unique(np.ceil(np.linspace(0.05, 1, 20) * len(right)).astype(int)) - 1
        return cls(
            error=float(share @ abs(mean_confidence - mean_right)),
            error_by_chance=float(np.sqrt(2 / np.pi) * np.sum(spread) / len(right)),
            mean_confidence=float(confidence.mean()),
            mean_right=float(right.mean()),
            confidence=mean_confidence.tolist(),
            right=mean_right.tolist(),
            share=share.tolist(),
            coverage=((shown + 1) / len(right)).tolist(),
            risk=risk[shown].tolist(),
            area=float(risk.mean()),
        )


def log_loss(confidence: Floats, right: Floats) -> Floats:
    """Return the cross entropy of M confidences of K temperatures, in nats: (K, M), (K, M) -> (K,)."""
    sure = confidence.clip(1e-6, 1 - 1e-6)
    return -(right * np.log(sure) + (1 - right) * np.log(1 - sure)).mean(1)


def best_temperature(temperatures: Sequence[float], confidence: Floats, right: Floats) -> float:
    """Return the temperature of least cross entropy, of those that do not make M answers worse than 1 does.

    confidence, right: (K, M), of K temperatures. A temperature also changes what is said, and who is always wrong and
    knows it has no cross entropy; so where answers are right less often than at 1, by more than the standard error of
    the difference, a temperature does not count.
    """
    lost = right[list(temperatures).index(1.0)] - right
    counts = lost.mean(1) <= lost.std(1) / np.sqrt(lost.shape[1])
    return temperatures[int(np.where(counts, log_loss(confidence, right), np.inf).argmin())]


def with_odds(confidence: Floats, slope: float, offset: float) -> Floats:
    """Return M confidences as `change_odds` does, (M,) -> (M,)."""
    changed: Floats = change_odds(torch.from_numpy(confidence), slope, offset).numpy()
    return changed


def best_odds(confidence: Floats, right: Floats) -> tuple[float, float]:
    """Return slope and offset of log-odds at which M confidences have the least cross entropy: (M,), (M,).

    A prior of standard deviation 1 around those that change nothing holds where answers are few.
    """

    def loss(odds: Floats) -> float:
        slope, offset = odds
        sure = with_odds(confidence, slope, offset)
        return len(right) * float(log_loss(sure[None], right[None])[0]) + ((slope - 1) ** 2 + offset**2) / 2

    slope, offset = minimize(loss, UNCHANGED, method="Nelder-Mead").x
    return float(slope), float(offset)


def judge(model: Predictor, batch_size: int, temperatures: Sequence[float] | None = None) -> tuple[Floats, Floats]:
    """Predict all rows of a model's data: confidence and correctness, (K, M) each, both from 0 to 1.

    Args:
        model: the model and its data.
        batch_size: rows at a time.
        temperatures: K temperatures of a student, at which the odds are those of the queries; without them K is 1, and
            the model's own calibration counts.

    Raises:
        InputError: no row can be used.
    """
    confidence: list[list[float]] = []
    right: list[list[float]] = []
    task = model.task
    for batch in model.batches(batch_size):
        models: list[nn.Module] = [model.model]
        if temperatures is not None:
            with torch.inference_mode():
                logits = model.model(**batch["net_input"])[0]
            models = [CachedLogits(model.model, logits, temperature) for temperature in temperatures]
        found = [model.search(batch, one) for one in models]
        confidence += map(list, zip(*([task.confidence(beam) for beam in said] for said in found), strict=True))
        right += map(list, zip(*(task.correctness(batch, said) for said in found), strict=True))
    if not right:
        raise InputError(f"{task.cfg.data}: has no row that can be used")
    return np.array(confidence, dtype=float).T, np.array(right, dtype=float).T


def calibrate(
    student: Path,
    data: Path,
    *,
    test: Path | None = None,
    teacher: Path | None = None,
    out: Path | None = None,
    generation: Mapping[str, Any] | None = None,
    task_overrides: Mapping[str, Any] | None = None,
    batch_size: int = 32,
    device: str | None = None,
) -> dict[str, Any]:
    """Fit a student's temperature and odds on validation data and keep them in its checkpoint; measure on test data.

    The temperature is the `best_temperature` of `TEMPERATURES`, and the odds are then the `best_odds` where confidence
    is the score to be expected of an output, as of boxes. A caption is right if it is one of the references word by
    word, a box from an IoU of 0.5 on, an answer by its soft accuracy.

    Args:
        student: its checkpoint, which is written anew with what was fitted.
        data: TSV file to fit on; not one that it was trained on.
        test: TSV file to measure on, before and after.
        teacher: a teacher's checkpoint to measure beside the student.
        out: JSON file for what is returned.
        generation: options of generation by name, if not those of --eval-args, or a beam of 5.
        task_overrides: options of the task that differ from the checkpoint's.
        batch_size: rows at a time.
        device: torch's name of it; by default a GPU if there is one.

    Returns:
        `temperature`, `slope` and `offset` of the log-odds, `fitted_on` (rows), and `systems`: `student_uncalibrated`,
        `student` and `teacher`, as far as there is something to measure, each a `Reliability`.

    Raises:
        MissingInput, InputError: when a checkpoint or the data cannot be used, or what is fitted could not be written.
    """
    for file in (student, *([] if out is None else [out])):
        require_writable(file)

    def load(checkpoint: Path, rows: Path, role: Literal["teacher", "student"]) -> Predictor:
        found = Predictor.load(
            checkpoint,
            rows,
            task_overrides=task_overrides,
            generation=generation,
            role=role,
            optimised=False,
            device=choose_device(device),
        )
        found.generator  # noqa: B018 - options that do not go with the model are refused first
        return found

    fitted_on = load(student, data, "student")
    model_options(student, read_checkpoint(existing(student)))
    if fitted_on.model.members:
        raise InputError(
            f"{student}: answers for several tasks, and has one temperature; make a student of one task first: "
            "narvl convert CHECKPOINT OUT --member NAME"
        )
    on_test = None if test is None else load(student, test, "student")
    asked = None if teacher is None or test is None else load(teacher, test, "teacher")
    if teacher is not None and asked is not None:
        loading.require_one_task(teacher, asked.task, student, fitted_on.task)
    # First every fourth temperature, then those around the best of them.
    coarse = TEMPERATURES[::COARSE]
    place = TEMPERATURES.index(best_temperature(coarse, *judge(fitted_on, batch_size, coarse)))
    near = sorted({1.0, *TEMPERATURES[max(0, place - COARSE + 1) : place + COARSE]})
    confidence, right = judge(fitted_on, batch_size, near)
    temperature = best_temperature(near, confidence, right)
    if temperature in (TEMPERATURES[0], TEMPERATURES[-1]):
        logger.warning("the temperature %.2f is the last one tried; the fit is no minimum", temperature)
    fitted = near.index(temperature)
    slope, offset = UNCHANGED
    if fitted_on.generator.output_scores is not None:  # then confidence is no probability that a temperature sets right
        slope, offset = best_odds(confidence[fitted], right[fitted])
    result: dict[str, Any] = {"temperature": temperature, "slope": slope, "offset": offset}
    result |= {"fitted_on": right.shape[1], "systems": {}}
    if on_test is not None:
        confidence, right = judge(on_test, batch_size, [1.0, temperature])
        confidence[1] = with_odds(confidence[1], slope, offset)
        for place, name in enumerate(("student_uncalibrated", "student")):
            result["systems"][name] = asdict(Reliability.of(confidence[place], right[place]))
        if asked is not None:
            (confidence,), (right,) = judge(asked, batch_size)
            result["systems"]["teacher"] = asdict(Reliability.of(confidence, right))
    keep_calibration(student, temperature=temperature, confidence_slope=slope, confidence_offset=offset)
    if out is not None:
        write_whole(out, json.dumps(result, indent=2) + "\n")
    return result


def keep_calibration(student: Path, **fitted: float) -> None:
    """Write a student's checkpoint anew, in one step, with options of its model; nothing else in it changes."""
    state = read_checkpoint(existing(student))
    model_options(student, state).update(fitted)
    if student.suffix == SAFETENSORS_SUFFIX:  # whose configuration is in a file of its own
        file = student.with_suffix(".json")
        description = json.loads(file.read_text(encoding="utf-8")) | {"cfg": state["cfg"]}
        write_whole(file, json.dumps(description, indent=2) + "\n")
        return
    with whole_file(student) as part, open(part, "wb") as stream:
        torch.save(state, stream)


def model_options(file: Path, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a checkpoint's model, which may be changed in place.

    Other programs keep them as a namespace, older ones in `args`. Raises InputError, which names the file, where there
    are none.
    """
    options = state["cfg"].get("model") if state.get("cfg") else state.get("args")
    options = vars(options) if isinstance(options, Namespace) else options
    if not isinstance(options, dict):
        raise InputError(
            f"{file}: has no options of its model (cfg.model) that could keep what is fitted; make a checkpoint that "
            "has them first: narvl convert CHECKPOINT OUT"
        )
    return options
