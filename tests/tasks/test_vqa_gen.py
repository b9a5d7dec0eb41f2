"""The task of visual question answering: soft accuracy in validation, fairseq's own programs."""

import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from narvl_plugin.evaluation.predictions import BinSizes, read_predictions, write_predictions
from narvl_plugin.tasks.registered import VqaGenConfig, VqaGenTask

Rows = list[list[str]]


def test_validation_logs_the_confidence_of_the_given_answer(
    vocabulary: Path, write_tsv: Callable[..., Path], vqa_rows: Rows, validated: Callable[..., dict[str, float]]
) -> None:
    path = write_tsv("valid.tsv", vqa_rows)
    config = VqaGenConfig(data=f"a.tsv,{path}", bpe_dir=str(vocabulary), patch_image_size=8, num_bins=10, eval_acc=True)
    # 1.0 for red, 0.3 for the second best, 0.9 for the best, 0 for what nobody said
    logged = validated(VqaGenTask.setup_task(config), ["red", "a red hat", "a cat", "two"])
    assert logged["vqa_score"] == pytest.approx((1.0 + 0.3 + 0.9 + 0) / 4, abs=1e-4)


@pytest.mark.integration
@pytest.mark.parametrize(
    ("arch", "criterion", "inference"),
    [
        ("ofa_nano", "adjust_label_smoothed_cross_entropy", "allcand"),
        ("ofa_nano", "adjust_label_smoothed_cross_entropy", "beamsearch"),
        ("narvl_nano", "qctc", "allcand"),
    ],
)
def test_from_tsv_to_answers_with_fairseqs_programs(
    arch: str,
    criterion: str,
    inference: str,
    fairseqs_programs: Callable[..., str],
    answer_vocabulary: Path,
    vqa_rows: Rows,
    tmp_path: Path,
) -> None:
    answers = tmp_path / "answers.pkl"
    answers.write_bytes(pickle.dumps({"red": 0, "two": 1, "a red hat": 2, "a cat": 3, "a dog": 4}))
    queries = ["--num-queries", 6] if arch == "narvl_nano" else ["--prompt-type", "prev_output"]
    last = fairseqs_programs(
        vqa_rows,
        *("--task", "vqa_gen", "--num-bins", 10, "--ans2label-file", answers, "--val-inference-type", inference),
        training=["--arch", arch, "--criterion", criterion, *queries, "--eval-acc"],
        metric="vqa_score",
        generation=["--scoring", "vqa", "--unnormalized"],
        vocabulary=answer_vocabulary,
    )
    assert re.search(r"soft accuracy 0\.\d+ \(4 questions\), number 0\.\d+ \(1\), other 0\.\d+ \(3\)", last)
    out = tmp_path / "predictions.json"
    write_predictions(tmp_path / "generate-test.txt", out, task="vqa", data=tmp_path / "valid.tsv", bins=BinSizes())
    assert read_predictions(out, "vqa").keys() == {0, 1, 2, 3}
