"""Distillation of questions, boxes and entailment: targets in each task's own form, which training reads back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from narvl_plugin.data.boxes import parse_box
from narvl_plugin.data.vqa_gen import parse_answers
from narvl_plugin.errors import BadRow, InputError
from narvl_plugin.inference.distillation import distill
from narvl_plugin.tasks import loading
from narvl_plugin.tasks.base import BaseTask
from narvl_plugin.tasks.registered import (
    RefcocoConfig,
    RefcocoTask,
    RegionsConfig,
    RegionsTask,
    SnliVeConfig,
    SnliVeTask,
    VqaGenConfig,
    VqaGenTask,
)

Rows = list[list[str]]
TASKS = {
    "vqa_gen": (VqaGenTask, VqaGenConfig),
    "refcoco": (RefcocoTask, RefcocoConfig),
    "regions": (RegionsTask, RegionsConfig),
    "snli_ve": (SnliVeTask, SnliVeConfig),
}


class Says:
    """Stands for a generator: says given texts in turn, the first of a beam of two."""

    def __init__(self, task: BaseTask, texts: list[str]) -> None:
        self.task, self.texts = task, iter(texts)

    def _tokens(self, text: str) -> torch.Tensor:
        if text.startswith("<bin_"):
            symbols = text.replace("><", "> <").split()
            return torch.tensor([self.task.target_dictionary.index(symbol) for symbol in symbols])
        return self.task.codec.encode(f" {text}")

    def generate(self, models: object, sample: dict[str, Any], **_: Any) -> list[list[dict[str, Any]]]:
        hypotheses = []
        for prompt in sample.get("decoder_prompts", [torch.zeros(1)] * sample["nsentences"]):
            tokens = torch.cat([torch.zeros(len(prompt) - 1).long(), self._tokens(next(self.texts)), torch.tensor([2])])
            hypotheses.append([{"tokens": tokens, "positional_scores": torch.zeros(len(tokens))}] * 2)
        return hypotheses


@pytest.fixture
def distilled(
    tmp_path: Path, write_tsv: Callable[..., Path], answer_vocabulary: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Rows]:
    """Give a function that distils rows with a teacher that says given texts, and returns the rows written."""

    def run(name: str, rows: Rows, texts: list[str], skip: int = 0, **settings: Any) -> Rows:
        task_class, config_class = TASKS[name]

        def load(teacher: Path, *, task_overrides: dict[str, Any], **_: Any) -> SimpleNamespace:
            given = {key: value for key, value in task_overrides.items() if value is not None}
            cfg = config_class(
                _name=name, bpe_dir=str(answer_vocabulary), patch_image_size=80, num_bins=11, **sizes, **given
            )
            task = task_class.setup_task(cfg)
            monkeypatch.setattr(task, "build_generator", lambda models, args: Says(task, texts))
            return loading.Loaded([torch.nn.Module()], task, SimpleNamespace())

        sizes = {"max_image_size": settings.pop("max_image_size", 80)} if name in ("refcoco", "regions") else {}
        monkeypatch.setattr(loading, "load", load)
        teacher, out = tmp_path / "teacher.pt", tmp_path / "out.tsv"
        teacher.touch()
        distill(teacher=teacher, data=write_tsv("in.tsv", rows), out=out, skip_bad_rows=skip, batch_size=2, **settings)
        return [line.split("\t") for line in out.read_text().splitlines()]

    return run


def test_answers_have_full_confidence(distilled: Callable[..., Rows], vqa_rows: Rows) -> None:
    written = distilled("vqa_gen", vqa_rows, ["red", "a cat", "two  dogs", "maybe"])
    assert [row[3] for row in written] == ["1.0|!+red", "1.0|!+a cat", "1.0|!+two dogs", "1.0|!+maybe"]
    assert parse_answers(written[1][3], "out.tsv:2") == {"a cat": 1.0}
    assert [row[:3] + row[4:] for row in written] == [row[:3] + row[4:] for row in vqa_rows]


def test_entailment_is_written_as_labels(distilled: Callable[..., Rows], snli_ve_rows: Rows) -> None:
    written = distilled("snli_ve", snli_ve_rows, ["maybe", "no", "yes", "yes"])
    assert [row[5] for row in written] == ["neutral", "contradiction", "entailment", "entailment"]
    assert [row[:5] for row in written] == [row[:5] for row in snli_ve_rows]


def test_boxes_are_written_in_pixels_of_the_image(distilled: Callable[..., Rows], refcoco_rows: Rows) -> None:
    said = ["<bin_0><bin_1><bin_5><bin_10>", "<bin_2><bin_3><bin_3><bin_4>", "<bin_0><bin_0><bin_10><bin_10>"]
    written = distilled("refcoco", refcoco_rows, said)
    # Eleven bins over 8 x 6 pixels: 0.8 and 0.6 pixels a bin.
    boxes = [parse_box(row[3], "out.tsv").tolist() for row in written]
    assert boxes == [pytest.approx(box) for box in ([0, 0.6, 4, 6], [1.6, 1.8, 2.4, 2.4], [0, 0, 8, 6])]
    assert [row[:3] + row[4:] for row in written] == [row[:3] + row[4:] for row in refcoco_rows]


def test_sets_of_boxes_are_joined_and_may_be_empty(distilled: Callable[..., Rows], regions_rows: Rows) -> None:
    said = ["<bin_0><bin_0><bin_5><bin_10>", "<bin_2><bin_3><bin_3><bin_4>", "<bin_0><bin_0><bin_10><bin_10>"]
    written = distilled("regions", regions_rows, [said[0] + said[2], "", said[1]])
    boxes = [[parse_box(box, "out.tsv").tolist() for box in row[3].split("&&") if box] for row in written]
    assert boxes == [
        [pytest.approx([0, 0, 4, 6]), pytest.approx([0, 0, 8, 6])],
        [],
        [pytest.approx([1.6, 1.8, 2.4, 2.4])],
    ]


@pytest.mark.parametrize("num_bins", [64, 1000])
def test_a_student_learns_the_very_bins_that_the_teacher_said(
    write_tsv: Callable[..., Path], refcoco_rows: Rows, vocabulary: Path, num_bins: int
) -> None:
    rows = [refcoco_rows[0][:] for _ in range(50)]
    config = {"bpe_dir": str(vocabulary), "patch_image_size": 80, "max_image_size": 96, "num_bins": num_bins}
    task = RefcocoTask.setup_task(RefcocoConfig(data=str(write_tsv("test.tsv", rows)), **config))
    task.load_dataset("test")
    dataset = task.dataset("test")
    last = 80 * (num_bins - 1) // 96  # of the bins on the image
    corners = torch.rand(50, 2, 2, generator=torch.Generator().manual_seed(1)).mul(last).long().sort(dim=1).values
    corners[:, 1] += 1
    bins = corners.clamp(max=last).flatten(1) + task.target_dictionary.index("<bin_0>")
    batch = dataset.collater([dataset[row] for row in range(50)])
    written = task.written_targets(batch, [[{"tokens": said}] for said in bins])
    assert sum(map(bool, written)) > 45  # but for boxes that cover nothing
    for row, (target, said) in enumerate(zip(written, bins, strict=True)):
        if target:
            columns = [*dataset.tsv[row][:3], target]
            assert dataset.target_tokens(row, columns).tolist() == said.tolist()


@pytest.mark.parametrize(
    ("name", "rows", "bad", "good", "complaint"),
    [
        ("vqa_gen", "vqa_rows", "", "red", "the teacher predicts '', which is not a target of vqa_gen"),
        ("snli_ve", "snli_ve_rows", "red", "yes", "the teacher predicts 'red', which is not a target of snli_ve"),
        ("regions", "regions_rows", "<bin_0><bin_0><bin_5><bin_5><bin_0>", "", "is not a target of regions"),
        ("refcoco", "refcoco_rows", "<bin_3>", "<bin_0><bin_0><bin_5><bin_5>", "predicts '<bin_3>', which is not a"),
        ("refcoco", "refcoco_rows", "<bin_5><bin_0><bin_5><bin_5>", "<bin_0><bin_0><bin_5><bin_5>", "is not a target"),
        ("refcoco", "refcoco_rows", "<bin_0><bin_0><bin_9><bin_5>", "<bin_0><bin_0><bin_5><bin_5>", "is not a target"),
    ],
)
def test_what_is_no_target_is_named_or_left_out(
    distilled: Callable[..., Rows],
    request: pytest.FixtureRequest,
    name: str,
    rows: str,
    bad: str,
    good: str,
    complaint: str,
) -> None:
    rows = request.getfixturevalue(rows)
    wide = {"max_image_size": 160} if name == "refcoco" else {}  # so that bins above 5 lie outside the image
    texts = [good, bad, good, good][: len(rows)]
    with pytest.raises(BadRow, match=f"in.tsv:2: .*{complaint}"):
        distilled(name, rows, texts, **wide)
    written = distilled(name, rows, texts, skip=1, **wide)
    assert [row[0] for row in written] == [row[0] for row in rows if row != rows[1]]


@pytest.mark.parametrize("name", TASKS)
def test_a_row_with_one_target_takes_no_several(
    distilled: Callable[..., Rows], request: pytest.FixtureRequest, name: str
) -> None:
    rows = request.getfixturevalue({"vqa_gen": "vqa_rows"}.get(name, f"{name}_rows"))
    with pytest.raises(InputError, match=f"--nbest 2: .* was trained for {name}, whose rows have one target"):
        distilled(name, rows, [], nbest=2)
