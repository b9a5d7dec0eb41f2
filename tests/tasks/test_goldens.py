"""What the published training and evaluation compute, task by task: losses, validation, hypotheses, results."""

import functools
import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq import criterions

from criterions import AdjustLabelSmoothedCrossEntropyCriterion
from narvl_plugin.data.boxes import from_bins
from narvl_plugin.models.ofa import OfaModel
from narvl_plugin.tasks.base import BaseTask
from narvl_plugin.tasks.registered import (
    CaptionConfig,
    CaptionTask,
    RefcocoConfig,
    RefcocoTask,
    SnliVeConfig,
    SnliVeTask,
    VqaGenConfig,
    VqaGenTask,
)

pytestmark = pytest.mark.integration

ANSWERS = "trainval_ans2label.pkl"
# case: task, its configuration, validation file, options, label smoothing
CASES: dict[str, tuple[type[BaseTask], type[Any], str, dict[str, Any], float]] = {
    "caption_stage1": (CaptionTask, CaptionConfig, "caption_val.tsv", {}, 0.1),
    "caption_imagenet_norm": (
        CaptionTask,
        CaptionConfig,
        "caption_val.tsv",
        {"patch_image_size": 48, "imagenet_default_mean_and_std": True, "max_tgt_length": 5},
        0.1,
    ),
    "refcoco": (RefcocoTask, RefcocoConfig, "refcoco_train.tsv", {}, 0.1),
    "snli_ve": (
        SnliVeTask,
        SnliVeConfig,
        "snli_ve_train.tsv",
        {"add_caption": True, "prompt_type": "prev_output"},
        0.0,
    ),
    "snli_ve_none_nocap": (SnliVeTask, SnliVeConfig, "snli_ve_train.tsv", {}, 0.1),
    "snli_ve_src": (SnliVeTask, SnliVeConfig, "snli_ve_train.tsv", {"max_src_length": 3, "prompt_type": "src"}, 0.1),
    "vqa_gen": (
        VqaGenTask,
        VqaGenConfig,
        "vqa_train.tsv",
        {"add_object": True, "prompt_type": "prev_output", "ans2label_file": ANSWERS},
        0.1,
    ),
    "vqa_gen_beam": (
        VqaGenTask,
        VqaGenConfig,
        "vqa_train.tsv",
        {"ans2label_file": ANSWERS, "val_inference_type": "beamsearch"},
        0.1,
    ),
    "vqa_gen_unconstrained": (
        VqaGenTask,
        VqaGenConfig,
        "vqa_train.tsv",
        {"prompt_type": "prev_output", "val_inference_type": "beamsearch"},
        0.1,
    ),
}


class Case:
    """A task on its recorded file, with the batch of its first three rows, and what is recorded."""

    def __init__(self, name: str, goldens: Path, bpe_dir: Path) -> None:
        make, configure, file, options, self.smoothing = CASES[name]
        options = {"patch_image_size": 64} | options
        if "ans2label_file" in options:
            options["ans2label_file"] = str(goldens / "data" / options["ans2label_file"])
        self.golden = json.loads((goldens / "ofa_datasets_tasks.json").read_text())[name]
        self.task = make(configure(data=str(goldens / "data" / file), bpe_dir=str(bpe_dir), **options))
        self.task.load_dataset("valid")
        dataset = self.task.dataset("valid")
        self.batch = dataset.collater([dataset[row] for row in range(3)])

    def criterion(self) -> AdjustLabelSmoothedCrossEntropyCriterion:
        """Return the criterion of the recorded losses."""
        return AdjustLabelSmoothedCrossEntropyCriterion(self.task, False, self.smoothing)

    def generator(self, teacher: OfaModel, **options: Any) -> Any:
        """Return the generator of the recorded evaluation."""
        evaluation = self.golden.get("eval_step", {"gen_args": {}})
        return self.task.build_generator([teacher], Namespace(**evaluation["gen_args"] | options))


@pytest.fixture
def make_case(goldens: Path, bpe_dir: Path) -> Callable[[str], Case]:
    """Make a case by its name."""
    return lambda name: Case(name, goldens, bpe_dir)


@pytest.fixture(scope="module")
def evaluate(goldens: Path, bpe_dir: Path, teacher: OfaModel) -> Callable[[str], tuple[Case, Any]]:
    """Give a function that makes a case and searches its hypotheses, once, which takes seconds."""

    @functools.cache
    def search(name: str) -> tuple[Case, Any]:
        case = Case(name, goldens, bpe_dir)
        return case, case.task.inference_step(case.generator(teacher), [teacher], case.batch)

    return search


@pytest.mark.parametrize("name", CASES)
def test_losses(name: str, make_case: Callable[[str], Case], teacher: OfaModel) -> None:
    case = make_case(name)
    expected_loss, expected_size, expected_log = case.golden["criterion_eval_mode"]["valid"]
    with torch.no_grad():
        loss, sample_size, log = case.criterion()(teacher, case.batch)
    assert loss.item() == pytest.approx(expected_loss, rel=1e-5)
    assert sample_size == expected_size
    for key, value in expected_log.items():
        assert float(log[key]) == pytest.approx(value, rel=1e-5)


def test_without_weights_and_lists_it_is_fairseqs_loss(make_case: Callable[[str], Case], teacher: OfaModel) -> None:
    case = make_case("refcoco")
    stock = criterions.CRITERION_REGISTRY["label_smoothed_cross_entropy"](case.task, False, case.smoothing)
    with torch.no_grad():
        expected, ours = stock(teacher, case.batch), case.criterion()(teacher, case.batch)
    assert float(ours[0]) == pytest.approx(float(expected[0]), rel=1e-5)
    assert float(ours[2]["nll_loss"]) == pytest.approx(float(expected[2]["nll_loss"]), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "metric", "recorded"),
    [
        ("refcoco", "score", "_score"),
        ("snli_ve", "snli_score", "_snli"),
        ("snli_ve_none_nocap", "snli_score", "_snli"),
        ("snli_ve_src", "snli_score", "_snli"),
        ("vqa_gen", "vqa_score", "_vqa"),
        ("vqa_gen_beam", "vqa_score", "_vqa"),
        ("vqa_gen_unconstrained", "vqa_score", "_vqa"),
    ],
)
def test_validation(name: str, metric: str, recorded: str, make_case: Callable[[str], Case], teacher: OfaModel) -> None:
    case = make_case(name)
    case.task.cfg.eval_acc = True
    case.task.generator = case.generator(teacher)
    expected = case.golden["valid_step"]
    loss, _, log = case.task.valid_step(case.batch, teacher, case.criterion())
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-5)
    (score_key,) = {f"{recorded}_sum", f"{recorded}_score_sum"} & expected.keys()
    assert log[f"_{metric}_sum"] == pytest.approx(expected[score_key])
    assert log[f"_{metric}_count"] == expected[f"{recorded}_cnt"]


@pytest.mark.parametrize("name", ["caption_stage1", "refcoco", "vqa_gen_beam", "vqa_gen_unconstrained"])
def test_hypotheses(name: str, evaluate: Callable[[str], tuple[Case, Any]]) -> None:
    case, hypotheses = evaluate(name)
    prompts = case.batch.get("decoder_prompts", [torch.zeros(1)] * 3)
    for beam, expected, prompt in zip(hypotheses, case.golden["eval_tokens"], prompts, strict=True):
        begin = len(prompt) - 1  # the recorded hypotheses hold the prompt
        assert [hypothesis["tokens"].tolist() for hypothesis in beam] == [tokens[begin:] for tokens, _ in expected]
        scores = [float(hypothesis["score"]) for hypothesis in beam]
        assert scores == pytest.approx([score for _, score in expected], rel=1e-4)


@pytest.mark.parametrize("name", ["caption_stage1", "snli_ve", "vqa_gen", "vqa_gen_beam", "vqa_gen_unconstrained"])
def test_results(name: str, evaluate: Callable[[str], tuple[Case, Any]]) -> None:
    case, hypotheses = evaluate(name)
    said = [case.task.codec.decode(beam[0]["tokens"]) for beam in hypotheses]
    results = case.golden["eval_step"]["results"]
    assert said == [result.get("answer", result.get("caption")) for result in results]


def test_boxes_are_those_of_the_tokens(make_case: Callable[[str], Case]) -> None:
    # The recorded hypotheses are words, which we take for no box; the arithmetic of the record goes on all the same.
    case = make_case("refcoco")
    first = case.task.target_dictionary.index("<bin_0>")
    tokens = torch.tensor([beam[0][0][:4] for beam in case.golden["eval_tokens"]])
    resized = from_bins(tokens - first, side=512, num_bins=1000)
    ratios = torch.stack([case.batch["w_resize_ratios"], case.batch["h_resize_ratios"]], dim=1)
    expected = [result["box"] for result in case.golden["eval_step"]["results"]]
    assert (resized / ratios.repeat(1, 2)).flatten().tolist() == pytest.approx(sum(expected, []), rel=1e-5)
