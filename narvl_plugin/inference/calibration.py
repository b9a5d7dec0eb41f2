"""Calibration of confidence: a student's temperature and odds, and the reliability of models.

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

from narvl_plugin.checkpoints.finding import existing
from narvl_plugin.checkpoints.reading import read_checkpoint
from narvl_plugin.checkpoints.weight_files import SAFETENSORS_SUFFIX
from narvl_plugin.devices import choose_device
from narvl_plugin.errors import InputError
from narvl_plugin.generation.parallel_generator import UNCHANGED, ParallelGenerator, change_odds
from narvl_plugin.inference.predictor import Predictor
from narvl_plugin.models.narvl import Calibration, NarvlModel, calibration_layout, calibrations
from narvl_plugin.tasks import loading
from narvl_plugin.tasks.base import Hypotheses
from narvl_plugin.whole_files import require_writable, whole_file, write_whole

logger = logging.getLogger(__name__)

TEMPERATURES = tuple(2 ** (step / 8) for step in range(-20, 25))
"""Temperatures to try: from 0.18 to 8, each 1.09 times the one before."""
STEPS = (16, 8, 4, 2, 1)
"""Steps of the search among them: it starts at 1, and then tries both neighbours of the best one so far."""
BINS = 10
"""Number of confidence bins of equal width, for reliability diagrams and the calibration error."""

Floats = NDArray[np.float64]
Judged = tuple[Hypotheses, list[float]]
"""The outputs for a batch, and the correctness of the best of each row."""


class CachedLogits(nn.Module):
    """Replaces a student: it returns known logits (B, N, V) of a batch, with a temperature of its own."""

    odds = UNCHANGED

    def __init__(self, student: Any, logits: Tensor, temperature: float) -> None:
        super().__init__()
        self.blank: int = student.blank
        self.num_queries: int = student.num_queries
        self.temperature = temperature
        self.logits = logits

    def forward(self, **net_input: Any) -> tuple[Tensor, dict[str, Any]]:
        """Return the logits."""
        return self.logits, {}


@dataclass(frozen=True)
class Reliability:
    """How well a model's confidence matches its correctness. All values are from 0 to 1.

    Sources: Guo et al., ICML 2017; Geifman and El-Yaniv, NeurIPS 2017.

    Attributes:
        error: the expected calibration error.
        error_by_chance: about the error that a perfectly calibrated model would have on as many answers.
        mean_confidence: over all answers.
        mean_right: the mean correctness, over all answers.
        confidence: the mean confidence of each bin that has answers.
        right: the mean correctness of each of these bins.
        share: the share of the answers in each of these bins.
        coverage: shares of the answers, the most confident ones first.
        risk: the share of wrong answers at each coverage.
        area: the area below the curve of risk by coverage.
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
        """Evaluate M answers: confidence (M,) and correctness (M,), both from 0 to 1."""
        place = np.minimum((confidence * BINS).astype(int), BINS - 1)
        filled = np.unique(place)
        share = np.array([(place == number).mean() for number in filled])
        mean_confidence = np.array([confidence[place == number].mean() for number in filled])
        mean_right = np.array([right[place == number].mean() for number in filled])
        # If the model is calibrated, the sum of a bin's correctness has this standard deviation. The mean absolute
        # deviation of a normal distribution is sqrt(2 / pi) standard deviations.
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
    """Return the cross entropy of M confidences at K temperatures, in nats: (K, M), (K, M) -> (K,)."""
    sure = confidence.clip(1e-6, 1 - 1e-6)
    return -(right * np.log(sure) + (1 - right) * np.log(1 - sure)).mean(1)


def best_temperature(temperatures: Sequence[float], confidence: Floats, right: Floats) -> float:
    """Return the temperature of least cross entropy whose answers are not worse than those at temperature 1.

    A temperature also changes the answers. A model that is always wrong, with zero confidence, has zero cross entropy.
    So a temperature is excluded if its mean correctness is lower than at 1 by more than the standard error of the
    difference.

    Args:
        temperatures: K temperatures, 1 among them.
        confidence: (K, M).
        right: (K, M), the correctness.
    """
    lost = right[list(temperatures).index(1.0)] - right
    counts = lost.mean(1) <= lost.std(1) / np.sqrt(lost.shape[1])
    return temperatures[int(np.where(counts, log_loss(confidence, right), np.inf).argmin())]


def with_odds(confidence: Floats, slope: float, offset: float) -> Floats:
    """Return M confidences with changed odds, see `change_odds`: (M,) -> (M,)."""
    changed: Floats = change_odds(torch.from_numpy(confidence), slope, offset).numpy()
    return changed


def best_odds(confidence: Floats, right: Floats) -> tuple[float, float]:
    """Return the slope and offset of log-odds that give M confidences the least cross entropy: (M,), (M,).

    A normal prior with standard deviation 1, around the values that change nothing, regularises the fit. It matters if
    there are few answers.
    """

    def loss(odds: Floats) -> float:
        slope, offset = odds
        sure = with_odds(confidence, slope, offset)
        return len(right) * float(log_loss(sure[None], right[None])[0]) + ((slope - 1) ** 2 + offset**2) / 2

    slope, offset = minimize(loss, UNCHANGED, method="Nelder-Mead").x
    return float(slope), float(offset)


def judge(
    model: Predictor,
    batch_size: int,
    temperatures: Sequence[float] | None = None,
    known: dict[int, Judged] | None = None,
) -> tuple[Floats, Floats]:
    """Predict all rows of a model's data; return confidence and correctness, (K, M) each, both from 0 to 1.

    Args:
        model: the model and its data.
        batch_size: the number of rows in a batch.
        temperatures: K temperatures of a student, with unchanged odds; None for the model's own calibration (K is 1).
        known: what an earlier call has found of each batch, by its number, if outputs are the same at all temperatures;
            new ones are added.

    Raises:
        InputError: if no row can be used.
    """
    confidence: list[list[float]] = []
    right: list[list[float]] = []
    task, generator = model.task, model.generator
    known = {} if known is None else known
    for number, batch in enumerate(model.batches(batch_size)):
        if temperatures is None:
            judged = [_judged(model, batch)]
        else:
            with torch.inference_mode():
                logits = model.model(**batch["net_input"])[0]
            students = [CachedLogits(model.model, logits, temperature) for temperature in temperatures]
            if generator.follows_one_path:
                if number not in known:
                    known[number] = _judged(model, batch, students[0])
                found, scores = known[number]
                judged = [(_with_confidence(generator, student, found), scores) for student in students]
            else:
                judged = [_judged(model, batch, student) for student in students]
        confidence += map(list, zip(*([task.confidence(beam) for beam in found] for found, _ in judged), strict=True))
        right += map(list, zip(*(scores for _, scores in judged), strict=True))
    if not right:
        raise InputError(f"{task.cfg.data}: has no row that can be used")
    return np.array(confidence, dtype=float).T, np.array(right, dtype=float).T


def _judged(model: Predictor, batch: dict[str, Any], student: CachedLogits | None = None) -> Judged:
    """Search the outputs for a batch, with a student's known logits if they are given, and judge them."""
    found = model.search(batch, student)
    return found, model.task.correctness(batch, found)


def _with_confidence(generator: ParallelGenerator, student: CachedLogits, found: Hypotheses) -> Hypotheses:
    """Return the best outputs with the confidence that a student has in them."""
    labels = torch.stack([beam[0]["labels"] for beam in found])
    confidences = generator.path_confidences([student], {}, labels)
    return [[beam[0] | {"confidence": sure}] for beam, sure in zip(found, confidences, strict=True)]


def fit_temperature(student: Predictor, batch_size: int) -> tuple[float, Floats, Floats]:
    """Return the `best_temperature` of `TEMPERATURES`, and the confidence (M,) and correctness (M,) with it.

    It tries eleven of them. This finds the best one if the cross entropy has one minimum.

    Args:
        student: the student and its validation data, M rows.
        batch_size: the number of rows in a batch.

    Raises:
        InputError: if no row can be used.
    """
    judged: dict[float, tuple[Floats, Floats]] = {}
    known: dict[int, Judged] = {}
    best = 1.0
    for step in STEPS:
        place = TEMPERATURES.index(best)
        around = (place - step, place, place + step)
        tried = [TEMPERATURES[near] for near in around if 0 <= near < len(TEMPERATURES)]
        new = [temperature for temperature in tried if temperature not in judged]
        if new:
            judged |= zip(new, zip(*judge(student, batch_size, new, known), strict=True), strict=True)
        temperatures = sorted(judged)
        best = best_temperature(temperatures, *map(np.stack, zip(*map(judged.__getitem__, temperatures), strict=True)))
    return best, *judged[best]


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
    """Fit a student's temperature and odds on validation data and store them in its checkpoint; measure on test data.

    The temperature is the `best_temperature` of `TEMPERATURES`. If confidence is an expected score, as for boxes, the
    odds are then the `best_odds`. A caption is correct if it equals a reference word by word, a box if its IoU is at
    least 0.5. The correctness of an answer is its soft accuracy.

    Args:
        student: the student's checkpoint. It is written again with the fitted values.
        data: TSV file for the fit; not the training data.
        test: TSV file for measurements before and after the fit.
        teacher: a teacher's checkpoint, measured beside the student.
        out: JSON file for the returned values.
        generation: options of generation by name; by default those of --eval-args, or a beam of 5.
        task_overrides: options of the task that replace the checkpoint's.
        batch_size: the number of rows in a batch.
        device: torch's name of the device; by default a GPU if there is one.

    Returns:
        `temperature`, `slope` and `offset` of the log-odds, `fitted_on` (rows), and `systems`: a `Reliability` for each
        of `student_uncalibrated`, `student` and `teacher` that was measured.

    Raises:
        MissingInput, InputError: if a checkpoint or the data cannot be used, or if a file could not be written.
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
        found.generator  # noqa: B018 - refuses options that do not fit the model, before any work
        return found

    fitted_on = load(student, data, "student")
    model_options(student, read_checkpoint(existing(student)))
    member = fitted_on.model.member if isinstance(fitted_on.model, NarvlModel) else None
    on_test = None if test is None else load(student, test, "student")
    asked = None if teacher is None or test is None else load(teacher, test, "teacher")
    if teacher is not None and asked is not None:
        loading.require_one_task(teacher, asked.task, student, fitted_on.task)
    temperature, confidence, right = fit_temperature(fitted_on, batch_size)
    if temperature in (TEMPERATURES[0], TEMPERATURES[-1]):
        logger.warning("the temperature %.2f is at the end of the range; the best one may be outside", temperature)
    slope, offset = UNCHANGED
    if fitted_on.generator.output_scores is not None:  # confidence is no probability; a temperature cannot calibrate it
        slope, offset = best_odds(confidence, right)
    result: dict[str, Any] = {"temperature": temperature, "slope": slope, "offset": offset}
    result |= {"fitted_on": len(right), "systems": {}}
    if on_test is not None:
        confidence, right = judge(on_test, batch_size, [1.0, temperature])
        confidence[1] = with_odds(confidence[1], slope, offset)
        for place, name in enumerate(("student_uncalibrated", "student")):
            result["systems"][name] = asdict(Reliability.of(confidence[place], right[place]))
        if asked is not None:
            (confidence,), (right,) = judge(asked, batch_size)
            result["systems"]["teacher"] = asdict(Reliability.of(confidence, right))
    keep_calibration(student, member, temperature=temperature, slope=slope, offset=offset)
    if out is not None:
        write_whole(out, json.dumps(result, indent=2) + "\n")
    return result


def keep_calibration(
    student: Path, member: str | None = None, *, temperature: float = 1.0, slope: float = 1.0, offset: float = 0.0
) -> None:
    """Write a student's checkpoint anew, in one step, with what was fitted; nothing else in it changes.

    Args:
        student: the checkpoint.
        member: of a student of several tasks, the member that it is for.
        temperature: the divisor of logits.
        slope: the factor of the log-odds of a confidence.
        offset: the number added to the scaled log-odds.
    """
    state = read_checkpoint(existing(student))
    options = model_options(student, state)
    if member is None:
        options |= {"temperature": temperature, "confidence_slope": slope, "confidence_offset": offset}
    else:
        known = calibrations(str(options.get("member_calibration", "")))
        known[member] = Calibration(temperature, slope, offset)
        options["member_calibration"] = calibration_layout(known)
    if student.suffix == SAFETENSORS_SUFFIX:  # whose configuration is in a file of its own
        file = student.with_suffix(".json")
        description = json.loads(file.read_text(encoding="utf-8")) | {"cfg": state["cfg"]}
        write_whole(file, json.dumps(description, indent=2) + "\n")
        return
    with whole_file(student) as part, open(part, "wb") as stream:
        torch.save(state, stream)


def model_options(file: Path, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a checkpoint's model. The caller may change them in place.

    Other programs store them as a namespace, older ones in `args`.

    Raises:
        InputError: if the checkpoint has no such options.
    """
    options = state["cfg"].get("model") if state.get("cfg") else state.get("args")
    options = vars(options) if isinstance(options, Namespace) else options
    if not isinstance(options, dict):
        raise InputError(
            f"{file}: has no options of its model (cfg.model) in which to store the fitted values; convert it to a "
            "checkpoint that has them first: narvl convert CHECKPOINT OUT"
        )
    return options
