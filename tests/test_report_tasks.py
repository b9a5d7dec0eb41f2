"""Reports on questions, boxes and entailment: scores worked out by hand, further tables, boxes on the images."""

import json
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from narvl_plugin.errors import BadRow, InputError
from narvl_plugin.inference.calibration import Reliability
from narvl_plugin.report import build_report
from narvl_plugin.report.subjects.refcoco import RefcocoReport
from narvl_plugin.report.subjects.vqa_gen import VqaGenReport

Rows = list[list[str]]
QUESTIONS = {  # confidences by vqa_rows: red 1; two 0.6, a red hat 0.3; a cat 0.9, a dog 0.3; red 1
    "teacher_allcand": ["red", "two", "a cat", "red"],
    "teacher_beam5": ["red", "two", "a cat", "blue"],
    "student": ["red", "a red hat", "a dog", ""],
}
ENTAILMENT = {  # yes, no, maybe, yes
    "teacher_allcand": ["yes", "no", "maybe", "no"],
    "student": ["yes", "yes", "perhaps", "yes"],
}
SETS = {  # the right ones are 0,0,4,3 and 1,2,7,5; none; 2,1,8,6
    "teacher_beam5": [
        "<bin_1><bin_3><bin_9><bin_8><bin_0><bin_0><bin_5><bin_5>",
        "<bin_0><bin_0><bin_10><bin_10>",
        "<bin_2><bin_1><bin_10><bin_10>",
    ],
    "student": ["<bin_0><bin_0><bin_5><bin_5>", "", "<bin_0><bin_0>"],
}
GRAPHS = {  # the right ones are a red hat on a dog, and a dog left of another; a red hat on a dog; none
    "teacher_beam5": [
        "dog<bin_0><bin_0><bin_5><bin_10> left_of dog<bin_5><bin_0><bin_10><bin_10>",
        "red hat<bin_3><bin_3><bin_10><bin_10> on dog<bin_0><bin_0><bin_10><bin_10>",
        "",
    ],
    "student": [
        "dog<bin_0><bin_0><bin_5><bin_10> left_of dog<bin_5><bin_0><bin_10><bin_10> "
        "dog<bin_5><bin_0><bin_10><bin_10> on red hat<bin_0><bin_0><bin_5><bin_5>",
        "red hat<bin_0>",
        "dog<bin_0><bin_0><bin_5><bin_10> on dog<bin_5><bin_0><bin_10><bin_10>",
    ],
}
SCENE_TREES = {  # the right ones have four objects, one and none; see `scene_tree_rows`
    "teacher_beam5": [
        "( red plain ( right ( dog ) ) ( left ( dog ) ( dog ) ( small red hat ) ) )",
        "( blue plain ( right ( dog ) ) )",
        "( red plain )",
    ],
    "student": [
        "( red plain ( left ( dog ) ( small red hat ) ( dog ) ) ( right ( dog ) ) )",
        "( blue",
        "( blue plain )",
    ],
}
BOXES = {  # of eleven bins; the right ones are 0,0,4,3 and 1,2,7,5 and 2,1,8,6 on 8 x 6 pixels
    "teacher_beam5": ["<bin_0><bin_0><bin_5><bin_5>", "<bin_0><bin_0><bin_10><bin_10>", "<bin_9><bin_9><bin_1><bin_1>"],
    "student": ["<bin_0><bin_0><bin_5><bin_5>", "<bin_0><bin_0>", "<bin_0><bin_0><bin_10><bin_10>"],
}


@pytest.fixture
def report_on(
    tmp_path: Path, write_tsv: Callable[..., Path], vocabulary: Path, write_checkpoint: Callable[..., Path]
) -> Callable[..., dict[str, Any]]:
    """Give a function that makes the folder of a run and reports on it; its student has the options `cfg`, if any."""

    def report(task: str, rows: Rows, said: dict[str, list[str]], **cfg: Any) -> dict[str, Any]:
        for name, outputs in said.items():
            folder = tmp_path / "generate" / name
            folder.mkdir(parents=True)
            lines = [f"D-{row[0]}\t-0.5\t{output}\n" for row, output in zip(rows, outputs, strict=True)]
            (folder / "generate-test.txt").write_text("".join(lines))
        latency = {name: {"p50_ms": ms, "n": 3} for name, ms in zip(said, (80.0, 40.0, 10.0), strict=False)}
        (tmp_path / "latency.json").write_text(json.dumps({"systems": latency, "machine": {}}))
        if cfg:
            (tmp_path / "student").mkdir()
            write_checkpoint("student/checkpoint_last.pt", "narvl", task, **{"bpe_dir": str(vocabulary)} | cfg)
        return build_report(tmp_path, task=task, test_tsv=write_tsv("test.tsv", rows))

    return report


def cells(table: str, system: str) -> list[str]:
    """Return the cells of a system's row of the table."""
    line = next(line for line in table.splitlines() if line.startswith(f"| {system} |"))
    return [cell.strip() for cell in line.strip("| \n").split("|")][1:]


def test_questions(report_on: Callable[..., dict[str, Any]], vqa_rows: Rows, tmp_path: Path) -> None:
    content = report_on("vqa_gen", vqa_rows, QUESTIONS)
    assert list(content["systems"]) == ["teacher_allcand", "teacher_beam5", "student", "most_frequent"]
    student = content["systems"]["student"]
    # "two" counts as a number; nobody's best answer is yes or no
    assert student["scores"] == pytest.approx({"accuracy": 1.6 / 4, "number": 0.3, "other": 1.3 / 3})
    assert content["systems"]["most_frequent"]["scores"]["accuracy"] == 0.5  # red, twice
    assert student["accuracy_ratio_to_teacher_allcand"] == pytest.approx(1.6 / 3.5)
    assert student["latency_ratio_to_teacher_allcand"] == 10 / 80
    assert student["latency_ratio_to_teacher_beam5"] == 10 / 40
    assert content["test"]["questions"] == 4
    table = (tmp_path / "table.md").read_text()
    assert table.splitlines()[0] == (
        "| system | accuracy | yes/no | number | other | p50 ms | ratio all | ratio beam | accuracy/teacher |"
    )
    assert cells(table, "Student") == ["0.400", "–", "0.300", "0.433", "10.0", "0.125", "0.250", "0.457"]
    assert "4 test questions (0 yes/no, 1 number, 3 other" in table
    page = (tmp_path / "report.html").read_text()
    assert "what two dogs run" in page  # a question
    assert '<span class="wrong">soft accuracy 0.30</span>' in page
    assert "two (0.6)" in page
    assert "8.0 ×" in page and "4.0 ×" in page


def test_page_shows_how_far_confidence_can_be_trusted(
    report_on: Callable[..., dict[str, Any]], vqa_rows: Rows, tmp_path: Path
) -> None:
    sure = Reliability.of(np.array([0.95, 0.9, 0.4, 0.35]), np.array([1.0, 1.0, 1.0, 0.0]))
    systems = dict.fromkeys(("student_uncalibrated", "student", "teacher"), asdict(sure))
    measured = {"temperature": 1.5, "slope": 1.2, "offset": -0.1, "fitted_on": 4, "systems": systems}
    (tmp_path / "calibration.json").write_text(json.dumps(measured))
    assert report_on("vqa_gen", vqa_rows, QUESTIONS)["calibration"] == measured
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 2
    assert "probability that its answer is correct" in page and "by its soft accuracy" in page
    assert "temperature is 1.50, log-odds are taken 1.20 times -0.10, fitted on 4" in page
    row = "| Student, calibrated | 0.750 | 0.650 | 0.275 | 0.267 | 0.062 |"
    assert row in (tmp_path / "table.md").read_text()


def test_without_a_list_of_answers_beam_search_is_the_base(
    report_on: Callable[..., dict[str, Any]], vqa_rows: Rows
) -> None:
    said = {name: QUESTIONS[name] for name in ("teacher_beam5", "student")}
    student = report_on("vqa_gen", vqa_rows, said)["systems"]["student"]
    assert student["accuracy_ratio_to_teacher_beam5"] == pytest.approx(1.6 / 2.5)
    assert student["latency_ratio_to_teacher_beam5"] == 0.5
    assert not any("allcand" in key for key in student)


def test_entailment(report_on: Callable[..., dict[str, Any]], snli_ve_rows: Rows, tmp_path: Path) -> None:
    content = report_on("snli_ve", snli_ve_rows, ENTAILMENT)
    student = content["systems"]["student"]
    assert student["scores"] == {"accuracy": 0.5}
    assert student["confusion"] == {"yes": {"yes": 2}, "no": {"yes": 1}, "maybe": {"other": 1}}
    assert content["systems"]["teacher_allcand"]["scores"]["accuracy"] == 0.75
    assert content["systems"]["most_frequent"]["scores"]["accuracy"] == 0.5  # yes, twice
    table = (tmp_path / "table.md").read_text()
    assert cells(table, "Student") == ["0.500", "40.0", "0.500", "0.667"]
    assert "does not show that the image is looked at" in table
    matrix = table[table.index("Student: right answer by row") :]
    assert cells(matrix, "yes") == ["2", "0", "0", "0"]
    assert cells(matrix, "maybe") == ["0", "0", "0", "1"]
    page = (tmp_path / "report.html").read_text()
    assert page.count("<caption>") == 2  # of the teacher and the student
    assert page.count('<span class="right">right</span>') == 3 + 2
    assert "maybe (neutral)" in page


def test_boxes(report_on: Callable[..., dict[str, Any]], refcoco_rows: Rows, tmp_path: Path) -> None:
    content = report_on("refcoco", refcoco_rows, BOXES, num_bins=11, max_image_size=80, patch_image_size=80)
    systems = content["systems"]
    assert list(systems) == ["teacher_beam5", "student", "whole_image", "mean_box"]
    # Right boxes cover 12, 18 and 30 of 48 pixels; the teacher's last is the wrong way round.
    assert systems["teacher_beam5"]["scores"] == pytest.approx(
        {"accuracy": 1 / 3, "mean IoU": (1 + 18 / 48 + 0) / 3, "no box": 0}
    )
    assert systems["student"]["scores"] == pytest.approx(
        {"accuracy": 2 / 3, "mean IoU": (1 + 0 + 30 / 48) / 3, "no box": 1 / 3}
    )
    assert systems["whole_image"]["scores"] == pytest.approx(
        {"accuracy": 1 / 3, "mean IoU": (12 + 18 + 30) / 48 / 3, "no box": 0}
    )
    assert systems["student"]["accuracy_ratio_to_teacher_beam5"] == pytest.approx(2)
    page = (tmp_path / "report.html").read_text()
    rectangles = re.findall(r'<rect class="(\w+)" x="(.*)" y="(.*)" width="(.*)" height="(.*)"/>', page)
    assert [role for role, *_ in rectangles] == ["reference", "teacher", "student", "reference", "teacher"] + [
        "reference",
        "teacher",
        "student",
    ]
    assert [float(edge) for edge in rectangles[3][1:]] == pytest.approx([1 / 8, 2 / 6, 6 / 8, 3 / 6], abs=1e-4)
    assert rectangles[4][1:] == ("0.0000", "0.0000", "1.0000", "1.0000")
    assert "x 1 to 7, y 2 to 5" in page
    assert "&lt;bin_0&gt;&lt;bin_0&gt;" in page  # no box is shown as it was said


def test_sets_of_boxes(report_on: Callable[..., dict[str, Any]], regions_rows: Rows, tmp_path: Path) -> None:
    for row, column in zip(regions_rows, ("0,0,4,3&&1,2,7,5", "", "2,1,8,6"), strict=True):
        row[3] = column
    content = report_on("regions", regions_rows, SETS, num_bins=11, max_image_size=80, patch_image_size=80)
    systems = content["systems"]
    assert list(systems) == ["teacher_beam5", "student", "no_region", "whole_image"]
    assert systems["teacher_beam5"]["scores"] == pytest.approx(
        {"precision": 2 / 3, "mean F1": 2 / 3, "N-acc": 0, "T-acc": 1}
    )
    student = systems["student"]
    assert student["scores"] == pytest.approx({"precision": 1 / 3, "mean F1": 5 / 9, "N-acc": 1, "T-acc": 1})
    assert student["precision_ratio_to_teacher_beam5"] == pytest.approx(1 / 2)
    assert student["by_count"] == {
        "0": {"rows": 1, "precision": 1.0, "mean F1": 1.0},
        "1": {"rows": 1, "precision": 0.0, "mean F1": 0.0},
        "2": {"rows": 1, "precision": 0.0, "mean F1": pytest.approx(2 / 3)},
    }
    assert systems["no_region"]["scores"]["N-acc"] == systems["whole_image"]["scores"]["T-acc"] == 1
    table = (tmp_path / "table.md").read_text().partition("Precision by the number of true boxes")[2]
    assert cells(table, "system") == ["0", "1", "2"]
    assert cells(table, "phrases") == ["1", "1", "1"]
    assert cells(table, "Teacher, beam 5") == ["0.000", "1.000", "1.000"]
    page = (tmp_path / "report.html").read_text()
    roles = re.findall(r'<rect class="(\w+)"', page)
    assert roles == [*["reference"] * 2, *["teacher"] * 2, "student", "teacher", "reference", "teacher"]
    assert page.count("no region") == 3  # the student's answer, and twice the right one
    assert "x 0 to 4, y 0 to 3; x 1 to 7, y 2 to 5" in page
    assert '<span class="wrong">F1 0.67</span>' in page
    assert "<h3>Precision by the number of true elements</h3>" in page
    assert "&lt;bin_0&gt;&lt;bin_0&gt;" in page  # no set is shown as it was said


def test_trees(
    report_on: Callable[..., dict[str, Any]],
    scene_tree_rows: Rows,
    tree_names_file: Path,
    tree_vocabulary: Path,
    tmp_path: Path,
) -> None:
    own = {"names_file": str(tree_names_file), "bpe_dir": str(tree_vocabulary), "num_bins": 0, "patch_image_size": 32}
    content = report_on("scene_tree", scene_tree_rows, SCENE_TREES, **own)
    systems = content["systems"]
    assert list(systems) == ["teacher_beam5", "student", "most_frequent"]
    assert systems["teacher_beam5"]["scores"] == pytest.approx(
        {"exact trees": 2 / 3, "edit distance": 1 / 3, "outputs that parse": 1}
    )
    student = systems["student"]
    assert student["scores"] == pytest.approx(
        {"exact trees": 1 / 3, "edit distance": 4 / 3, "outputs that parse": 2 / 3}
    )
    assert student["by_count"] == {
        "0": {"rows": 1, "exact trees": 0.0},
        "1": {"rows": 1, "exact trees": 0.0},
        "4": {"rows": 1, "exact trees": 1.0},
    }
    table = (tmp_path / "table.md").read_text().partition("Exact trees by the number of true objects")[2]
    assert cells(table, "Teacher, beam 5") == ["1.000", "0.000", "1.000"]
    page = (tmp_path / "report.html").read_text()
    assert "( blue plain ( right ( dog ) ) )" in page and '<span class="wrong">edit distance 1</span>' in page


def test_graphs(
    report_on: Callable[..., dict[str, Any]],
    scene_graph_rows: Rows,
    names_file: Path,
    graph_vocabulary: Path,
    tmp_path: Path,
) -> None:
    sizes = {"num_bins": 11, "max_image_size": 80, "patch_image_size": 80}
    own = {"names_file": str(names_file), "bpe_dir": str(graph_vocabulary)}
    content = report_on("scene_graph", scene_graph_rows, GRAPHS, **sizes, **own)
    systems = content["systems"]
    assert list(systems) == ["teacher_beam5", "student", "no_triplet"]
    student = systems["student"]
    assert student["scores"]["exact graphs"] == pytest.approx(1 / 3)
    assert (student["scores"]["R@5"], student["scores"]["mR@5"]) == (0.5, 0.75)
    assert systems["teacher_beam5"]["scores"]["R@5"] == 0.75
    assert systems["no_triplet"]["scores"] == {
        "exact graphs": pytest.approx(1 / 3),
        "R@5": 0,
        "R@10": 0,
        "mR@5": 0,
        "mR@10": 0,
    }
    assert student["by_count"] == {
        "0": {"rows": 1, "exact graphs": 0.0},
        "1": {"rows": 1, "exact graphs": 0.0},
        "2": {"rows": 1, "exact graphs": 1.0},
    }
    table = (tmp_path / "table.md").read_text().partition("Exact graphs by the number of true triplets")[2]
    assert cells(table, "Teacher, beam 5") == ["1.000", "1.000", "0.000"]
    page = (tmp_path / "report.html").read_text()
    assert "dog left of dog; dog on red hat" in page and "no triplet" in page
    assert page.count('class="picture"') == 4  # of the five outputs that are triplets, one has none
    assert re.findall(r'<rect class="(\w+)"', page).count("student") == 5
    assert "red hat&lt;bin_0&gt;" in page  # no graph is shown as it was said


def test_bins_may_cover_more_than_the_image(tmp_path: Path, refcoco_rows: Rows) -> None:
    cfg = SimpleNamespace(num_bins=11, max_image_size=160, patch_image_size=80)
    subject = RefcocoReport(SimpleNamespace(cfg=cfg), tmp_path / "test.tsv")
    row = subject.read(0, [refcoco_rows[0][column] for column in subject.columns], "test.tsv:1")
    assert subject.regions(row, "<bin_0><bin_0><bin_5><bin_5>") == [pytest.approx((0, 0, 1, 1))]
    assert subject.say_baselines([row])["whole_image"] == {0: "<bin_0><bin_0><bin_5><bin_5>"}
    # The mean of one box: 0, 0 to the middle, at bin 2.5, which lies as near to 2 as to 3.
    assert subject.say_baselines([row])["mean_box"] == {0: "<bin_0><bin_0><bin_2><bin_2>"}


def test_features_of_unknown_size_are_a_bad_row(tmp_path: Path, refcoco_rows: Rows) -> None:
    np.save(tmp_path / "features.npy", np.zeros((3, 2, 2), dtype=np.float32))
    refcoco_rows[0][4] = "features.npy"
    cfg = SimpleNamespace(num_bins=11, max_image_size=160, patch_image_size=80)
    subject = RefcocoReport(SimpleNamespace(cfg=cfg), tmp_path / "test.tsv")
    with pytest.raises(BadRow, match=r"test\.tsv:1: the image column holds features that do not tell the size"):
        subject.read(0, [refcoco_rows[0][column] for column in subject.columns], "test.tsv:1")


def test_boxes_need_the_students_options(report_on: Callable[..., dict[str, Any]], refcoco_rows: Rows) -> None:
    with pytest.raises(InputError, match="student/checkpoint_last.pt is not there.*--num-bins"):
        report_on("refcoco", refcoco_rows, BOXES)


def test_image_ids_do_not_name_questions(
    report_on: Callable[..., dict[str, Any]], vqa_rows: Rows, tmp_path: Path
) -> None:
    vqa_rows[1][0] = vqa_rows[0][0]
    with pytest.raises(InputError, match="4 rows of the test file share 3 ids"):
        report_on("vqa_gen", vqa_rows, QUESTIONS)
    subject = VqaGenReport(None, tmp_path)
    assert subject.read(0, ["q7", "what?", "1.0|!+red"], "test.tsv:1").ids == ("q7",)


def test_unknown_tasks_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--task vqa: choose one of caption, vqa_gen, refcoco, snli_ve, regions"):
        build_report(tmp_path, task="vqa")
