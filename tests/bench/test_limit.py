"""The model of the speed-up: how times add up, what is fitted, what is counted for another machine."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from narvl_plugin.bench.limit import (
    UNSEEN,
    Case,
    Check,
    Limit,
    Pair,
    Parts,
    Processor,
    Work,
    derive,
    draw,
    limit,
    table,
)
from narvl_plugin.models.inference import PackedConv2d, PackedLinear

# E = 5 + 10 B, S = 1 + 2 B + (n + 1) (3 + 0.5 B b), P = 4 + 2 B + 0.1 B N
PARTS = Parts((5.0, 10.0), (1.0, 2.0, 3.0, 0.5), (4.0, 2.0, 0.1))


@pytest.fixture(scope="module")
def pair() -> Pair:
    return Pair("nano", side=64)


def test_times_add_up() -> None:
    case = Case(batch=2, beam=5, length=9, queries=20)
    assert PARTS.encoder_ms(2) == pytest.approx(25)
    assert PARTS.teacher_ms(case) == pytest.approx(25 + 5 + 10 * 8)
    assert PARTS.student_ms(case) == pytest.approx(25 + 12)
    assert PARTS.speed_up(case) == pytest.approx(110 / 37)
    assert PARTS.bound(case) == pytest.approx(110 / 25)


def test_error_is_that_of_the_ratio() -> None:
    check = Check(UNSEEN[0], teacher_ms=100, student_ms=20, predicted_teacher_ms=120, predicted_student_ms=20)
    assert check.speed_up == pytest.approx(5)
    assert check.error == pytest.approx(0.2)


def test_coefficients_of_made_up_times_are_found(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    def made_up(calls: dict, **_: object) -> dict:
        parts = {
            "encoder": lambda batch: PARTS.encoder_ms(batch),
            "search": lambda *case: PARTS.teacher_ms(Case(*case, 1)) - PARTS.encoder_ms(case[0]),
            "student": lambda *case: PARTS.student_ms(Case(case[0], 1, 1, case[1])) - PARTS.encoder_ms(case[0]),
            "whole teacher": lambda *case: PARTS.teacher_ms(Case(*case)),
            "whole student": lambda *case: 1.1 * PARTS.student_ms(Case(*case)),
        }
        return {name: parts[name[0]](*name[1:]) for name in calls}

    monkeypatch.setattr("narvl_plugin.bench.limit.in_turns", made_up)
    found = limit(pair, "nano", repeats=1)
    for name, coefficients in vars(PARTS).items():
        assert getattr(found.parts, name) == pytest.approx(coefficients)
    assert found.error == pytest.approx(0.1)


def test_teacher_says_as_much_as_it_is_asked_for(pair: Pair) -> None:
    inputs = pair.inputs(2)
    with torch.no_grad():
        whole = pair.search(pair.teacher, inputs, 3, 5)
        read = pair.search(pair.teacher_that_has_read(inputs), inputs, 3, 5)
    for found in (whole, read):
        assert [len(sample[0]["tokens"]) for sample in found] == [6, 6]  # and </s>
    assert [sample[0]["tokens"].tolist() for sample in whole] == [sample[0]["tokens"].tolist() for sample in read]


def test_work_counts_kernels_and_the_slower_of_arithmetic_and_memory() -> None:
    left, right = torch.ones(4, 8), torch.ones(8, 2)
    flops, moved = 2 * 4 * 8 * 2, 2 * (32 + 16 + 8)
    for rates, seconds in (((1e6, 1e12), flops / 1e6), ((1e12, 1e6), moved / 1e6)):
        with torch.no_grad(), Work(Processor(*rates, launch=0)) as work:
            left @ right.view(8, 2)
        assert work.kernels == 1
        assert work.ms == pytest.approx(1000 * seconds)
    with torch.no_grad(), Work(Processor(1e12, 1e12, launch=0.5)) as work:
        left + left + left
    assert work.ms == pytest.approx(1000)
    with pytest.raises(ValueError, match="above 0"):
        Processor(0, 1, 1)


@pytest.mark.parametrize(
    ("layer", "packed", "shape"),
    [
        (nn.Linear(8, 4), PackedLinear, (3, 8)),
        (nn.Conv2d(4, 6, 3, groups=2), partial(PackedConv2d, activation=nn.Identity()), (1, 4, 5, 5)),
    ],
)
def test_work_counts_packed_layers_as_plain_ones(layer: Any, packed: Any, shape: tuple[int, ...]) -> None:
    processor, inputs = Processor(1, 1e12, launch=0), torch.ones(shape)
    counted = []
    for run in (layer, packed(layer)):
        with torch.no_grad():
            run(inputs)  # packs the weight
            with Work(processor) as work:
                run(inputs)
        counted.append(work.busy)
    assert counted[0] == pytest.approx(counted[1])
    assert counted[0] > 100


@pytest.mark.integration
def test_faster_machine_is_bound_by_starting_kernels(pair: Pair) -> None:
    slow, fast = (derive(pair, Processor(flops, flops / 100, 1e-6)) for flops in (1e9, 1e18))
    case = Case(1, 5, 10, 20)
    assert slow.teacher_ms(case) > 10 * fast.teacher_ms(case)
    assert slow.student_ms(case) > 10 * fast.student_ms(case)
    assert fast.search[3] < 0.01 * fast.search[2], "five beams start hardly more kernels than one"


def test_everything_is_written(tmp_path: Path) -> None:
    found = Limit("nano", PARTS, [Check(UNSEEN[0], 100, 20, 120, 20)])
    assert json.loads(json.dumps(found.as_json()))["median_error"] == pytest.approx(0.2)
    lines = table(found, PARTS).splitlines()
    assert "B 1, beam 1, n 8, N 16: 100.0 (120.0), 20.0 (20.0), 5.00" in lines[5]
    draw(tmp_path / "limit.svg", {"nano": PARTS}, beam=5)
    assert "<svg" in (tmp_path / "limit.svg").read_text()
