"""The task of visual entailment: accuracy in validation, fairseq's own programs."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from narvl_plugin.tasks.registered import SnliVeConfig, SnliVeTask

Rows = list[list[str]]


def test_validation_logs_accuracy(
    answer_vocabulary: Path,
    write_tsv: Callable[..., Path],
    snli_ve_rows: Rows,
    validated: Callable[..., dict[str, float]],
) -> None:
    path = write_tsv("valid.tsv", snli_ve_rows)
    config = SnliVeConfig(
        data=f"a.tsv,{path}", bpe_dir=str(answer_vocabulary), patch_image_size=8, num_bins=10, eval_acc=True
    )
    task = SnliVeTask.setup_task(config)
    # entailment, contradiction, neutral, entailment
    assert validated(task, ["yes", "no", "yes", "yes no"])["snli_score"] == 0.5
    assert validated(task, ["yes", "no", "maybe", "yes"])["snli_score"] == 1


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
    snli_ve_rows: Rows,
) -> None:
    queries = ["--num-queries", 3] if arch == "narvl_nano" else []
    last = fairseqs_programs(
        snli_ve_rows,
        *("--task", "snli_ve", "--num-bins", 10, "--add-caption", "--val-inference-type", inference),
        training=["--arch", arch, "--criterion", criterion, *queries, "--eval-acc"],
        metric="snli_score",
        generation=["--scoring", "entailment"],
        vocabulary=answer_vocabulary,
    )
    assert re.search(r"accuracy [01]\.\d+ \(4 rows\); yes: \d yes, \d no, \d maybe", last)
