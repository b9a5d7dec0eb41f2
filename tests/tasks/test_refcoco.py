"""The grounding task: boxes in validation, options, fairseq's own programs."""

import re
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fairseq.optim.amp_optimizer import AMPOptimizer

from narvl_plugin.errors import InputError
from narvl_plugin.evaluation.predictions import BinSizes
from narvl_plugin.tasks.registered import RefcocoConfig, RefcocoTask

Rows = list[list[str]]


@pytest.fixture
def make_task(vocabulary: Path, write_tsv: Callable[..., Path]) -> Callable[..., RefcocoTask]:
    """Make a task on rows of regions; eleven bins, so that bin k is at 8 k of the 80 pixels."""

    def make(rows: Rows, **options: Any) -> RefcocoTask:
        path = write_tsv("valid.tsv", rows)
        values = {"patch_image_size": 80, "max_image_size": 80, "num_bins": 11} | options
        return RefcocoTask.setup_task(RefcocoConfig(data=f"train.tsv,{path}", bpe_dir=str(vocabulary), **values))

    return make


def test_validation_logs_accuracy_overlap_and_what_is_no_box(
    make_task: Callable[..., RefcocoTask], refcoco_rows: Rows, validated: Callable[..., dict[str, float]]
) -> None:
    refcoco_rows[0][3] = "0,0,4,3"  # of 8 x 6 pixels: 0, 0, 40, 40 of 80 x 80, bins 0, 0, 5, 5
    refcoco_rows[1][3] = "0,0,8,6"  # the whole
    refcoco_rows[2][3] = "0,0,8,6"
    task = make_task(refcoco_rows, eval_acc=True)
    codec = task.codec
    said = {"<bin_0><bin_0><bin_5><bin_5>": 1.0, "<bin_0><bin_0><bin_10><bin_4>": 0.4, "<bin_0><bin_0><bin_10>": 0.0}
    encode = codec.encode
    codec.encode = lambda text: (  # the tests' generator says texts
        torch.tensor([codec.dictionary.index(symbol) for symbol in re.findall("<bin_.>|<bin_10>", text)])
        if text in said
        else encode(text)
    )
    logged = validated(task, list(said))
    assert logged["score"] == pytest.approx(1 / 3, abs=1e-4)
    assert logged["mean_iou"] == pytest.approx(1.4 / 3, abs=1e-4)
    assert logged["no_box"] == pytest.approx(1 / 3, abs=1e-4)


def test_a_student_compares_boxes_by_their_overlap(make_task: Callable[..., RefcocoTask], refcoco_rows: Rows) -> None:
    task = make_task(refcoco_rows)
    first = task.target_dictionary.index("<bin_0>")
    options = task.search_options(Namespace(beam=5))
    assert (options["beam_size"], task.search_options(Namespace(beam=1))["beam_size"]) == (64, 1)
    in_order = torch.tensor([[0, 0, 10, 10], [0, 10, 10, 9], [3, 3, 2, 3], [5, 5, 5, 5]]) + first
    assert options["constraint"].accepts(in_order, torch.tensor([4] * 4)).tolist() == [True, False, False, True]
    corners = ([0, 0, 10, 10], [0, 0, 5, 10], [5, 0, 10, 10], [5, 5, 5, 5])
    gains = options["agreement"]([torch.tensor(corner) + first for corner in corners])
    expected = [[1.0, 0.5, 0.5, 0.0], [0.5, 1.0, 0.0, 0.0], [0.5, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    assert gains.tolist() == expected


def test_boxes_are_given_in_pixels_of_the_image_as_it_comes(
    make_task: Callable[..., RefcocoTask], refcoco_rows: Rows
) -> None:
    task = make_task(refcoco_rows)
    task.load_dataset("valid")
    batch = task.dataset("valid").collater([task.dataset("valid")[row] for row in range(2)])
    first = task.target_dictionary.index("<bin_0>")
    boxes = task.boxes_of_best(batch, [[{"tokens": torch.tensor([first, first + 5, first + 10, first + 10, 2])}]] * 2)
    assert boxes == [[pytest.approx([0, 3, 8, 6])]] * 2
    assert task.boxes_of_best(batch, [[{"tokens": torch.tensor([first, 2])}]] * 2) == [None, None]


def test_boxes_are_those_of_the_files_of_predictions(make_task: Callable[..., RefcocoTask], refcoco_rows: Rows) -> None:
    task = make_task(refcoco_rows, max_image_size=160)
    task.load_dataset("valid")
    batch = task.dataset("valid").collater([task.dataset("valid")[0]])
    first = task.target_dictionary.index("<bin_0>")
    ((box,),) = task.boxes_of_best(batch, [[{"tokens": torch.tensor([first + 1, first, first + 3, first + 5, 2])}]])
    bins = BinSizes(num_bins=11, max_image_size=160, patch_image_size=80)
    assert box == pytest.approx([1.6, 0, 4.8, 6])
    assert bins.box("<bin_1><bin_0><bin_3><bin_5>", (8, 6)) == pytest.approx(box)


def test_images_beyond_the_bins_are_refused(make_task: Callable[..., RefcocoTask], refcoco_rows: Rows) -> None:
    with pytest.raises(InputError, match="--patch-image-size 81 is larger than --max-image-size 80"):
        make_task(refcoco_rows, patch_image_size=81)


@pytest.mark.integration
@pytest.mark.parametrize(
    ("arch", "criterion"), [("ofa_nano", "adjust_label_smoothed_cross_entropy"), ("narvl_nano", "qctc")]
)
def test_from_tsv_to_boxes_with_fairseqs_programs(
    arch: str, criterion: str, fairseqs_programs: Callable[..., str], refcoco_rows: Rows
) -> None:
    queries = ["--num-queries", 7] if arch == "narvl_nano" else []
    last = fairseqs_programs(
        refcoco_rows,
        *("--task", "refcoco", "--num-bins", 11, "--max-image-size", 80),
        training=["--arch", arch, "--criterion", criterion, *queries, "--eval-acc"],
        metric="score",
        generation=["--scoring", "grounding", "--min-len", 4, "--max-len-b", 4],
    )
    no_box = "0" if arch == "narvl_nano" else "[0-3]"
    assert re.search(rf"accuracy 0\.\d+ at IoU 0\.5, mean IoU 0\.\d+ \(3 boxes, {no_box} hypotheses are no", last)


def test_outputs_in_training_score_as_good_boxes_do(make_task: Callable[..., RefcocoTask], refcoco_rows: Rows) -> None:
    task = make_task(refcoco_rows)
    first = task.target_dictionary.index("<bin_0>")
    said = torch.tensor([[0, 0, 5, 4], [0, 0, 5, 2], [0, 0, 5, 4], [5, 4, 0, 0], [-1, 0, 5, 4]]) + first
    lengths = torch.tensor([[4, 4, 3, 4, 4]])
    target = torch.tensor([[[0, 0, 5, 5]]]) + first
    scores = task.output_scores(said[None], lengths, target, torch.tensor([[4]]))
    assert scores.tolist() == [[1.0, 0.0, 0.0, 0.0, 0.0]]
    short = task.output_scores(said[None, :, :3], lengths.clamp(max=3), target, torch.tensor([[4]]))
    assert short.tolist() == [[0.0] * 5]


def test_mixed_precision_multiplies_in_bfloat16_on_a_cpu(
    make_task: Callable[..., RefcocoTask], refcoco_rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, model = make_task(refcoco_rows), torch.nn.Linear(3, 2)
    monkeypatch.setattr(model, "set_num_updates", lambda updates: None, raising=False)
    types = []

    def criterion(model: torch.nn.Module, sample: dict[str, Any]) -> tuple[torch.Tensor, int, dict[str, Any]]:
        product = model(torch.ones(1, 3))
        types.append(product.dtype)
        return product.sum().float(), 1, {}

    mixed = AMPOptimizer.__new__(AMPOptimizer)
    monkeypatch.setattr(AMPOptimizer, "backward", lambda self, loss: loss.backward())
    for optimizer in (mixed, SimpleNamespace(backward=torch.Tensor.backward)):
        task.train_step({"id": 0}, model, criterion, optimizer, 0)
    assert types == [torch.bfloat16, torch.float32]
    assert model.weight.grad is not None


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_shares_are_refused_in_every_split(
    make_task: Callable[..., RefcocoTask], refcoco_rows: Rows, write_tsv: Callable[..., Path], split: str
) -> None:
    shares = [[*row[:3], "0.1,0.2,0.5,0.9", row[4]] for row in refcoco_rows]
    training = write_tsv("train.tsv", shares if split == "train" else refcoco_rows)
    task = make_task(refcoco_rows if split == "train" else shares)
    task.cfg.data = f"{training},{task.cfg.data.split(',')[-1]}"
    with pytest.raises(InputError, match="boxes lie within 1 pixels"):
        task.load_dataset(split)
