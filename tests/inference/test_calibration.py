"""Calibration: what is fitted and kept, what is measured, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from narvl_plugin.checkpoints.conversion import convert
from narvl_plugin.checkpoints.reading import read_checkpoint
from narvl_plugin.errors import InputError
from narvl_plugin.generation.parallel_generator import ParallelGenerator, change_odds
from narvl_plugin.generation.rescoring import TeacherRescorer
from narvl_plugin.inference import calibration
from narvl_plugin.inference.calibration import (
    TEMPERATURES,
    Reliability,
    best_odds,
    best_temperature,
    calibrate,
    fit_temperature,
    judge,
    keep_calibration,
    log_loss,
)
from narvl_plugin.inference.predictor import Predictor
from narvl_plugin.models.narvl import calibrations
from narvl_plugin.tasks import loading
from narvl_plugin.tasks.caption import CaptionTask

MakeModel = Callable[..., Path]


def test_reliability_by_hand() -> None:
    confidence, right = np.array([0.95, 0.91, 0.55, 1.0, 0.15]), np.array([1.0, 0.5, 0.0, 1.0, 0.0])
    found = Reliability.of(confidence, right)
    assert found.share == pytest.approx([0.2, 0.2, 0.6])
    assert found.confidence == pytest.approx([0.15, 0.55, 2.86 / 3])
    assert found.right == pytest.approx([0.0, 0.0, 2.5 / 3])
    assert found.error == pytest.approx(0.2 * 0.15 + 0.2 * 0.55 + 0.6 * (2.86 - 2.5) / 3)
    # Surest first: right, right, half right, wrong, wrong.
    assert found.coverage == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert found.risk == pytest.approx([0.0, 0.0, 0.5 / 3, 1.5 / 4, 2.5 / 5])
    assert found.area == pytest.approx((0.5 / 3 + 1.5 / 4 + 2.5 / 5) / 5)
    assert (found.mean_right, found.mean_confidence) == (pytest.approx(0.5), pytest.approx(0.712))


def test_who_is_as_sure_as_right_has_no_error_and_the_least_loss() -> None:
    generator = np.random.default_rng(1)
    sure = generator.random(20_000)
    right = (generator.random(20_000) < sure).astype(float)
    found = Reliability.of(sure, right)
    assert found.error < 0.02
    few = [Reliability.of(sure[start : start + 200], right[start : start + 200]) for start in range(0, 20_000, 200)]
    assert np.mean([one.error for one in few]) == pytest.approx(np.mean([one.error_by_chance for one in few]), rel=0.1)
    candidates = np.stack([sure**2, sure, sure**0.5])
    assert log_loss(candidates, np.stack([right] * 3)).argmin() == 1


def test_a_temperature_that_makes_answers_wrong_does_not_count() -> None:
    """At 8 all is wrong and known to be; at 0.5 two answers of 100 are lost and one is won, which may be chance."""
    right = np.zeros((3, 100))
    right[0, 2:31], right[1, :30] = 1, 1
    confidence = np.stack([np.full(100, 0.3), np.full(100, 0.9), np.zeros(100)])
    assert log_loss(confidence, right).argmin() == 2
    assert best_temperature([0.5, 1.0, 8.0], confidence, right) == 0.5


@pytest.mark.parametrize("best", range(0, len(TEMPERATURES), 4))
def test_a_few_temperatures_lead_to_the_best(best: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[float] = []

    def judged(student: Any, batch_size: int, temperatures: Sequence[float], known: Any) -> tuple[Any, Any]:
        tried.extend(temperatures)
        apart = np.array([abs(TEMPERATURES.index(one) - best) for one in temperatures])
        return np.repeat(1 / (1 + apart[:, None]), 3, 1), np.ones((len(temperatures), 3))

    monkeypatch.setattr(calibration, "judge", judged)
    found, confidence, right = calibration.fit_temperature(None, 8)  # type: ignore[arg-type]
    assert found == TEMPERATURES[best]
    assert confidence.tolist() == right.tolist() == [1, 1, 1]
    assert len(set(tried)) == len(tried) <= 11


def test_odds_are_those_that_answers_had() -> None:
    generator = np.random.default_rng(1)
    sure = generator.random(20_000)
    right = (generator.random(20_000) < change_odds(torch.from_numpy(sure), 1.5, -0.4).numpy()).astype(float)
    assert best_odds(sure, right) == pytest.approx((1.5, -0.4), abs=0.05)
    slope, offset = best_odds(np.array([0.2, 0.9, 0.95]), np.ones(3))
    assert 0 < slope < 2
    assert 0 < offset < 2


@pytest.mark.integration
@pytest.mark.parametrize("scored", [False, True])
def test_a_student_keeps_the_calibration_that_fits_best(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scored: bool
) -> None:
    """Odds are fitted where outputs have scores; here half of what a student says is right."""
    if scored:
        scores = {"output_scores": lambda tokens, lengths, right, right_lengths: (lengths % 2 == 0).float()}
        monkeypatch.setattr(CaptionTask, "search_options", lambda task, args: scores)
    student = make_model("narvl_tiny", "qctc", "--num-queries", 16, updates=30)
    teacher = make_model("ofa_tiny", "cross_entropy", updates=2)
    before = read_checkpoint(student)
    weights = {name: tensor.clone() for name, tensor in before["model"].items()}
    data, out = tmp_path / "valid.tsv", tmp_path / "calibration.json"
    result = calibrate(student, data, test=tmp_path / "train.tsv", teacher=teacher, out=out, batch_size=4)
    assert json.loads(out.read_text()) == result
    assert set(result["systems"]) == {"student_uncalibrated", "student", "teacher"}
    assert result["fitted_on"] == 6
    assert result["temperature"] in TEMPERATURES

    confidence, right = judge(Predictor.load(student, data, optimised=False), 6, TEMPERATURES)
    best = TEMPERATURES.index(best_temperature(TEMPERATURES, confidence, right))
    losses = log_loss(confidence, right)
    assert losses[TEMPERATURES.index(result["temperature"])] == pytest.approx(losses[best], rel=1e-9)

    after = read_checkpoint(student)
    assert after["cfg"]["model"]["temperature"] == result["temperature"]
    assert after["cfg"]["model"]["confidence_slope"] == result["slope"]
    assert after["cfg"]["model"]["confidence_offset"] == result["offset"]
    for name in ("temperature", "confidence_slope", "confidence_offset"):
        after["cfg"]["model"][name] = before["cfg"]["model"][name]
    assert after["cfg"] == before["cfg"]
    assert after["extra_state"]["train_iterator"] == before["extra_state"]["train_iterator"]
    assert weights.keys() == after["model"].keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in after["model"].items())
    (model,), *_ = loading.load(student, task_overrides={"data": str(data)})
    assert model.temperature == result["temperature"]
    # The model's own calibration is what it answers with.
    place = TEMPERATURES.index(result["temperature"])
    odds = best_odds(confidence[place], right[place]) if scored else (1, 0)
    assert (result["slope"], result["offset"]) == pytest.approx(odds, abs=1e-3)
    assert (result["offset"] != 0) == scored
    sure = change_odds(torch.from_numpy(confidence[place]), result["slope"], result["offset"])
    np.testing.assert_allclose(judge(Predictor.load(student, data, optimised=False), 4)[0][0], sure, rtol=1e-4)
    on_test, _ = judge(Predictor.load(student, tmp_path / "train.tsv", optimised=False), 4)
    assert result["systems"]["student"]["mean_confidence"] == pytest.approx(float(on_test.mean()), rel=1e-4)


@pytest.mark.integration
@pytest.mark.parametrize("scored", [False, True])
def test_outputs_that_temperature_keeps_are_searched_once(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scored: bool
) -> None:
    scores = {"output_scores": lambda tokens, lengths, right, right_lengths: (lengths > right_lengths[:, :1]).float()}
    monkeypatch.setattr(CaptionTask, "search_options", lambda task, args: scores if scored else {})
    student = make_model("narvl_tiny", "qctc", "--num-queries", 16, updates=30)
    searches: list[int] = []

    def judged(options: Mapping[str, Any]) -> tuple[float, np.ndarray, np.ndarray]:
        loaded = Predictor.load(student, tmp_path / "valid.tsv", generation=options, optimised=False)
        search = loaded.search
        loaded.search = lambda *given: searches.append(0) or search(*given)  # type: ignore[method-assign, func-returns-value]
        return fit_temperature(loaded, 4)

    once = judged({"beam": 1})
    assert len(searches) == 2  # six rows in batches of four
    monkeypatch.setattr(ParallelGenerator, "follows_one_path", False)
    each = judged({"beam": 1})
    assert len(searches) > 2 + 2 * 5
    assert once[0] == each[0]
    np.testing.assert_allclose(once[1], each[1], rtol=1e-5)
    np.testing.assert_array_equal(once[2], each[2])


def test_a_student_as_safetensors_keeps_it_beside_its_weights(make_model: MakeModel, tmp_path: Path) -> None:
    exported = tmp_path / "student.safetensors"
    convert(make_model("narvl_tiny", "qctc", "--num-queries", 8), exported)
    keep_calibration(exported, temperature=2.0)
    (model,), *_ = loading.load(exported, task_overrides={"data": str(tmp_path / "valid.tsv")})
    assert model.temperature == 2.0


def test_a_teacher_has_no_temperature(make_model: MakeModel, tmp_path: Path) -> None:
    teacher = make_model("ofa_tiny", "cross_entropy")
    with pytest.raises(InputError, match="is a teacher"):
        calibrate(teacher, tmp_path / "valid.tsv")


@pytest.mark.integration
def test_a_teacher_adds_its_log_probabilities(make_model: MakeModel, tmp_path: Path) -> None:
    """Each output by itself, through the whole model, gives the same as all outputs of a batch in one pass."""
    teacher_file = make_model("ofa_tiny", "cross_entropy", updates=3)
    student_file = make_model("narvl_tiny", "qctc", "--num-queries", 16)
    overrides = {"data": str(tmp_path / "valid.tsv"), "rescore_with": str(teacher_file), "rescore_weight": 0.5}
    (student,), task, _ = loading.load(student_file, task_overrides=overrides)
    task.load_dataset("test")
    batch = task.dataset("test").collater([task.dataset("test")[row] for row in range(3)])
    rescorer = task.load_rescorer(next(student.parameters()))
    assert isinstance(rescorer, TeacherRescorer)
    outputs = [[torch.tensor([5, 6, 7]), torch.tensor([5])], [], [torch.tensor([9, 2])]]  # 2 is </s>
    scores = rescorer(batch, outputs)
    assert [len(one) for one in scores] == [2, 0, 1]
    (teacher,), *_ = loading.load(teacher_file, task_overrides={"data": overrides["data"]})
    for sample, beam in enumerate(outputs):
        for tokens, score in zip(beam, scores[sample], strict=True):
            spoken = [token for token in tokens.tolist() if token != 2]
            one = {name: value[sample, None] for name, value in batch["net_input"].items()}
            logits = teacher(**{**one, "prev_output_tokens": torch.tensor([[0, *spoken]])})[0]
            expected = logits.detach().log_softmax(2)[0].gather(1, torch.tensor([*spoken, 2])[:, None]).sum()
            assert float(score) == pytest.approx(0.5 * float(expected), abs=1e-4)

    found = Predictor.load(student_file, tmp_path / "valid.tsv", task_overrides=overrides, generation={"beam": 3})
    ((best, *_), *_) = task.inference_step(found.generator, [student], batch)
    alone = rescorer(batch, [[best["tokens"][:-1]], [], []])[0][0]
    plain = Predictor.load(student_file, tmp_path / "valid.tsv", generation={"beam": 3, "nbest": 3})
    same = [
        one
        for one in task.inference_step(plain.generator, [student], batch)[0]
        if torch.equal(one["tokens"], best["tokens"])
    ]
    assert float(best["score"]) == pytest.approx(float(same[0]["score"] + alone), abs=1e-4)


@pytest.mark.integration
def test_what_cannot_rescore_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    student = make_model("narvl_tiny", "qctc", "--num-queries", 16)
    data = tmp_path / "valid.tsv"
    with pytest.raises(InputError, match="is a student; give a teacher"):
        _ = Predictor.load(student, data, task_overrides={"rescore_with": str(student)}).generator
    teacher = make_model("ofa_tiny", "cross_entropy")
    for wrong in ({"rescore_with": str(teacher)}, {"abstain_below": 0.5}):
        with pytest.raises(InputError, match="is for students"):
            _ = Predictor.load(teacher, data, task_overrides=wrong).generator


@pytest.mark.integration
def test_each_member_of_a_mixture_keeps_its_own(
    several_tasks: Path, write_tsv: Callable[..., Path], caption_rows: list[list[str]], tmp_path: Path
) -> None:
    student = tmp_path / "student.pt"
    student.write_bytes(several_tasks.read_bytes())
    keep_calibration(student, "snli_ve", temperature=3.0, slope=0.5)
    data = write_tsv("captions.tsv", caption_rows)
    fitted = calibrate(student, data, task_overrides={"member": "caption"})["temperature"]
    for member, temperature, odds in (("caption", fitted, (1, 0)), ("snli_ve", 3.0, (0.5, 0)), ("refcoco", 1, (1, 0))):
        (model,), *_ = loading.load(student, task_overrides={"member": member})
        assert (model.temperature, model.odds) == (temperature, odds)
        convert(student, tmp_path / f"{member}.pt", member=member)
        (alone,), *_ = loading.load(tmp_path / f"{member}.pt", task_name=member)
        assert (alone.temperature, alone.odds) == (temperature, odds)


@pytest.mark.parametrize("layout", ["caption", "caption:x:1:0", "caption:1:1", "caption:nan:1:0", "caption:-1:1:0"])
def test_a_calibration_of_another_form_is_refused(layout: str) -> None:
    with pytest.raises(InputError, match="member_calibration"):
        calibrations(layout)
