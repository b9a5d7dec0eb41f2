"""From raw files to TSV, to what a model might say, to predictions, to scores that are worked out by hand."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from narvl_plugin.errors import BadRow, InputError, MissingInput
from narvl_plugin.evaluation.benchmarks import Scores, evaluate
from narvl_plugin.evaluation.predictions import BinSizes, write_predictions
from narvl_plugin.evaluation.tables import print_scores, write_scores
from narvl_plugin.scoring import tokenization

RAW_CAPTIONS = {"karpathy": "dataset_coco.json", "official": "annotations/captions_val2014.json"}


@pytest.fixture
def predict(tmp_path: Path, write_generated: Callable[..., Path]) -> Callable[..., Path]:
    """Give a function that turns what a model says into a file of predictions, and returns it."""

    def write(task: str, data: Path, said: dict[str, str], bins: BinSizes | None = None) -> Path:
        out = tmp_path / "predictions.json"
        write_predictions(write_generated(said), out, task=task, data=data, bins=bins or BinSizes())
        return out

    return write


@pytest.mark.parametrize(("file", "row"), [("karpathy", "test"), ("official", "all")])
def test_captions(raw: Path, coco_tsv: Path, predict: Callable[..., Path], no_java: None, file: str, row: str) -> None:
    # One caption is its reference, and the other has no word of it: half of all n-grams, and the mean of 10 and 0.
    said = {"74": "A red dog runs fast.", "75": "nothing here fits at all"}
    predictions = predict("caption", coco_tsv, said)
    assert json.loads(predictions.read_text()) == [
        {"image_id": 74, "caption": "A red dog runs fast."},
        {"image_id": 75, "caption": "nothing here fits at all"},
    ]
    scores = evaluate(predictions, [raw / RAW_CAPTIONS[file]], "caption")
    values = scores.tables["captions"]
    assert values.keys() == {row}
    assert values[row] == pytest.approx(
        {f"BLEU-{n}": 0.5 for n in range(1, 5)} | {"ROUGE-L": 0.5, "CIDEr": 5, "pictures": 2}
    )
    assert scores.notes[0] == "Words are split plainly (no Java)." and scores.notes[1].startswith("No METEOR:")


def test_java_that_never_answers_leaves_plain_scores_that_say_so(
    raw: Path, coco_tsv: Path, predict: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "java").write_text("#!/bin/sh\nsleep 60\n")
    (tmp_path / "java").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(tokenization, "_PTB_BASE_SECONDS", 0.3)
    predictions = predict("caption", coco_tsv, {"74": "A red dog runs fast.", "75": "nothing here fits at all"})
    scores = evaluate(predictions, [raw / RAW_CAPTIONS["official"]], "caption")
    assert scores.tables["captions"]["all"]["CIDEr"] == pytest.approx(5)
    assert scores.notes[0] == "Words are split plainly (Java failed, see the warning)."
    assert "METEOR" not in scores.tables["captions"]["all"]


def test_vqa(raw: Path, vqa_tsv: Path, predict: Callable[..., Path], written: Callable[[Path], Any]) -> None:
    predictions = predict("vqa", vqa_tsv, {"42000": "Yes.", "42001": "three", "42002": "hot dog"})
    assert written(predictions)[0] == {"question_id": 42000, "answer": "Yes."}
    scores = evaluate(predictions, [raw / "v2_mscoco_val2014_annotations.json"], "vqa")
    # Nine of ten say yes: 1. Two of ten say three: 8 of the ten groups of nine hold both, 2/3, and 2 hold one, 1/3.
    # All ten say "Hot-Dog", to the letter, and so the official evaluation wants it to the letter.
    assert scores.tables["answer type"] == {
        "all": {"accuracy": pytest.approx(1.6 / 3), "questions": 3},
        "number": {"accuracy": pytest.approx(0.6), "questions": 1},
        "other": {"accuracy": 0, "questions": 1},
        "yes/no": {"accuracy": 1, "questions": 1},
    }
    assert {name: row["questions"] for name, row in scores.tables["question type"].items()} == {
        "how many": 1,
        "is the": 1,
        "what is": 1,
    }


def test_gqa(raw: Path, gqa_tsv: Path, predict: Callable[..., Path], written: Callable[[Path], Any]) -> None:
    said = {"05515938": "Left ", "20": "no", "201": "t shirt", "202": "man"}
    predictions = predict("gqa", gqa_tsv, said)
    assert written(predictions)[0] == {"questionId": "05515938", "prediction": "Left"}
    scores = evaluate(predictions, [raw / "testdev_balanced_questions.json"], "gqa")
    assert scores.tables == {
        "questions": {
            "all": {"accuracy": 0.5, "questions": 4},
            "binary": {"accuracy": 0.5, "questions": 2},
            "open": {"accuracy": 0.5, "questions": 2},
        },
        "structural type": {
            "choose": {"accuracy": 1, "questions": 1},
            "query": {"accuracy": 0.5, "questions": 2},
            "verify": {"accuracy": 0, "questions": 1},
        },
        "semantic type": {
            "attr": {"accuracy": 0, "questions": 1},
            "obj": {"accuracy": 0, "questions": 1},
            "rel": {"accuracy": 1, "questions": 2},
        },
    }


def test_refcoco(raw: Path, refcoco_tsv: Path, predict: Callable[..., Path], written: Callable[[Path], Any]) -> None:
    # Bin k of 11 is at k/10 of the image's 640 x 480 pixels.
    said = {
        "1010": "<bin_0><bin_0><bin_5><bin_5>",  # the box itself
        "1011": "left",
        "1020": "<bin_1><bin_2><bin_2><bin_4>",  # its left half
    }
    predictions = predict("refcoco", refcoco_tsv, said, BinSizes(num_bins=11))
    assert written(predictions) == [
        {"sent_id": 1010, "box": [0, 0, 320, 240]},
        {"sent_id": 1011, "box": None},
        {"sent_id": 1020, "box": [64, 96, 128, 192]},
    ]
    scores = evaluate(predictions, [raw / "refcoco/refs(unc).p", raw / "refcoco/instances.json"], "refcoco")
    assert scores.tables == {
        "boxes": {
            "testA": {
                "accuracy at IoU 0.5": pytest.approx(2 / 3),
                "mean IoU": pytest.approx((1 + 0 + 0.5) / 3),
                "no box": 1,
                "sentences": 3,
            }
        }
    }


def test_grefcoco(
    raw: Path, grefcoco_tsv: Path, predict: Callable[..., Path], written: Callable[[Path], Any], tmp_path: Path
) -> None:
    # Bin k of 11 is at k/10 of the image's 640 x 480 pixels: a box is one bin wide and two high.
    said = {
        "1-1": "<bin_1><bin_0><bin_2><bin_2><bin_0><bin_0><bin_1><bin_2>",  # both, in another order
        "2-2": "",
        "3-3": "<bin_1>",
        "4-4": "".join(f"<bin_{left}><bin_0><bin_{left + 1}><bin_2>" for left in range(5)),  # five of six
    }
    predictions = predict("grefcoco", grefcoco_tsv, said, BinSizes(num_bins=11))
    assert written(predictions)[:3] == [
        {"id": "1-1", "boxes": [[64, 0, 128, 96], [0, 0, 64, 96]]},
        {"id": "2-2", "boxes": []},
        {"id": "3-3", "boxes": None},
    ]
    files = [raw / "grefcoco/grefs(unc).json", raw / "grefcoco/instances.json"]
    scores = evaluate(predictions, files, "grefcoco")
    assert scores.tables == {
        "sets of boxes": {
            "val": {
                "Precision@(F1=1, IoU>=0.5)": 0.5,
                "mean F1": pytest.approx((1 + 1 + 0 + 10 / 11) / 4),
                "N-acc": 0.5,
                "T-acc": 1,
                "no boxes": 1,
                "sentences": 4,
            }
        }
    }
    assert len(scores.notes) == 1 and "GREC's own program pairs them greedily" in scores.notes[0]

    file = tmp_path / "train.json"
    file.write_text(json.dumps([{"id": key, "boxes": [[0, 0, 64, 96]]} for key in ("1-1", "5-5")]))
    train = evaluate(file, files, "grefcoco").tables["sets of boxes"]
    assert train == {
        "train": {
            "Precision@(F1=1, IoU>=0.5)": 1,
            "mean F1": 1,
            "T-acc": 1,  # and no N-acc, since no phrase of train describes nothing
            "no boxes": 0,
            "sentences": 2,
        }
    }


def triplet(subject: str, left: float, relation: str, other: str, other_left: float) -> dict[str, Any]:
    """Return a predicted triplet of boxes of 50 x 40 pixels."""
    boxes = {"subject_box": [left, 0, left + 50, 40], "object_box": [other_left, 0, other_left + 50, 40]}
    return {"subject": subject, "relation": relation, "object": other, **boxes}


def test_visual_genome(visual_genome: list[Path], write_json: Callable[..., Path]) -> None:
    wrong = [triplet("dog", 0, f"on {number}", "mat", 60) for number in range(9)]
    said = {
        1: [triplet("Dog", 0, "on", " mat", 60), *wrong, triplet("cat", 120, "on", "mat", 60)],
        2: [triplet("dog", 10, "near", "mat", 60)],  # an IoU of 2/3
    }
    file = write_json("p.json", [{"image_id": key, "triplets": found} for key, found in said.items()])
    scores = evaluate(file, visual_genome, "visual_genome")
    values = scores.tables["triplets"]["test"]
    # Of the first image one of three is among the first five and ten, and two among the first twenty.
    early, late = pytest.approx((1 / 3 + 1) / 2), pytest.approx((2 / 3 + 1) / 2)
    assert [values[f"R@{rank}"] for rank in (5, 10, 20, 50, 100)] == [early, early, late, late, late]
    # "on": one of two, then both. "near": nothing of the first image, all of the second.
    early, late = pytest.approx((1 / 2 + 1 / 2) / 2), pytest.approx((1 + 1 / 2) / 2)
    assert [values[f"mR@{rank}"] for rank in (5, 10, 20, 50, 100)] == [early, early, late, late, late]
    assert values["exact graph"] == 0.5 and values["images"] == 2
    assert scores.tables["triplets"].keys() == {"test"}
    assert "without graph constraint" in scores.notes[0]


def test_visual_genome_of_a_list_of_names(visual_genome: list[Path], write_json: Callable[..., Path]) -> None:
    names = write_json("VG-SGG-dicts.json", {"label_to_idx": {"dog": 1, "mat": 2}, "predicate_to_idx": {"on": 1}})
    file = write_json("p.json", [{"image_id": 1, "triplets": [triplet("dog", 0, "on", "mat", 60)]}])
    values = evaluate(file, [*visual_genome, names], "visual_genome").tables["triplets"]["test"]
    assert values["R@5"] == values["exact graph"] == values["images"] == 1


def test_snli_ve(raw: Path, snli_ve_tsv: Path, predict: Callable[..., Path], written: Callable[[Path], Any]) -> None:
    key = "4705552913.jpg#2r"
    said = {f"{key}1e": "yes", f"{key}2n": "maybe", f"{key}3c": "yes", f"{key}5n": "maybe not"}
    predictions = predict("snli_ve", snli_ve_tsv, said)
    assert written(predictions) == [
        {"pairID": f"{key}1e", "label": "entailment"},
        {"pairID": f"{key}2n", "label": "neutral"},
        {"pairID": f"{key}3c", "label": "entailment"},
        {"pairID": f"{key}5n", "label": "maybe not"},
    ]
    scores = evaluate(predictions, [raw / "snli_ve_test.jsonl"], "snli_ve")
    assert scores.tables == {
        "gold label": {
            "all": {"accuracy": 0.5, "pairs": 4},
            "contradiction": {"accuracy": 0, "pairs": 1},
            "entailment": {"accuracy": 1, "pairs": 1},
            "neutral": {"accuracy": 0.5, "pairs": 2},
        },
        "gold label, predicted as": {
            "contradiction": {"entailment": 1, "neutral": 0, "contradiction": 0, "other": 0},
            "entailment": {"entailment": 1, "neutral": 0, "contradiction": 0, "other": 0},
            "neutral": {"entailment": 0, "neutral": 1, "contradiction": 0, "other": 1},
        },
    }


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1010, 1011], r"1 predictions are missing, such as that of 1020: it has 2, and the annotations \(testA\) 3"),
        ([1010, 1011, 1020, 9], "1 predictions are of no annotated id, such as that of 9: it has 4, and .* 3; score"),
        ([1010, 1011, 1020, 1030, 5], r"of no annotated id, such as that of 5.*annotations \(testA, testB\) 4"),
        ([7], r"4 predictions are missing, .* 1010 and 1 predictions are of no annotated id, such as that of 7"),
        ([], r"4 predictions are missing"),
    ],
)
def test_incomplete_and_foreign_predictions_are_refused(
    raw: Path, tmp_path: Path, refcoco_tsv: Path, ids: list[int], message: str
) -> None:
    file = tmp_path / "p.json"
    file.write_text(json.dumps([{"sent_id": key, "box": None} for key in ids]))
    with pytest.raises(InputError, match=rf"p.json: .*{message}"):
        evaluate(file, [raw / "refcoco/refs(unc).p", raw / "refcoco/instances.json"], "refcoco")


def test_splits_in_one_file_are_scored_each(raw: Path, tmp_path: Path, refcoco_tsv: Path) -> None:
    file = tmp_path / "p.json"
    boxes = {1010: [0, 0, 320, 240], 1011: [0, 0, 320, 240], 1020: [64, 96, 192, 192], 1030: [1, 2, 4, 4]}
    file.write_text(json.dumps([{"sent_id": key, "box": box} for key, box in boxes.items()]))
    table = evaluate(file, [raw / "refcoco/refs(unc).p", raw / "refcoco/instances.json"], "refcoco").tables["boxes"]
    assert [(split, row["mean IoU"]) for split, row in table.items()] == [
        ("testA", 1),
        ("testB", 0.5),  # 3 x 2 pixels of 3 x 4
    ]


@pytest.mark.parametrize(
    ("task", "files", "error", "message"),
    [
        ("vqa", [], InputError, "--task vqa: is scored against v2_mscoco_val2014_annotations.json, in this order"),
        ("refcoco", ["a.json", "b.p"], InputError, r"against refs\(unc\).p, instances.json, in this order; given: a"),
        ("vqa", ["a.json", "b"], InputError, "--task vqa: is scored against v2_mscoco_val2014_annotations.json, in"),
        (
            "visual_genome",
            ["a.json", "b.json"],
            InputError,
            "against image_data.json, relationships.json, vg_splits.json and, if you like, VG-SGG-dicts.json, in this",
        ),
        ("visual_genome", ["a.json"] * 5, InputError, "--task visual_genome: is scored against"),
        ("snli_ve", ["gone.jsonl"], MissingInput, "gone.jsonl: no such file of annotations"),
        ("retrieval", ["a.json"], InputError, "--task retrieval: choose one of caption"),
    ],
)
def test_other_files_than_the_tasks_are_refused(
    task: str, files: list[str], error: type[InputError], message: str
) -> None:
    with pytest.raises(error, match=message):
        evaluate(Path("p.json"), [Path(file) for file in files], task)


@pytest.mark.parametrize(
    ("task", "content", "message"),
    [
        ("caption", {"annotations": [{"image_id": 7}]}, r"a.json:annotations\[0\]: has no field 'caption'"),
        ("vqa", {"annotations": [{"question_id": 7, "answers": []}]}, "has no field 'answer_type'"),
        ("vqa", {"questions": []}, "a.json: has no field 'annotations'"),
        ("gqa", {"7": {"imageId": "7", "answer": "x"}}, "a.json:7: has no field 'types'"),
        ("gqa", {"7": {"imageId": "7", "answer": "x", "types": {}}}, "a.json:7.types: has no field 'structural'"),
    ],
)
def test_an_annotation_that_is_not_as_published_is_named(
    tmp_path: Path, write_json: Callable[..., Path], task: str, content: Any, message: str
) -> None:
    predictions = write_json("p.json", [])
    with pytest.raises(BadRow, match=message):
        evaluate(predictions, [write_json("a.json", content)], task)


def test_an_id_that_is_annotated_twice_is_named(raw: Path, vqa_tsv: Path, write_json: Callable[..., Path]) -> None:
    file = raw / "v2_mscoco_val2014_annotations.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({"annotations": content["annotations"] * 2}))
    with pytest.raises(BadRow, match="annotations.json:annotations: has the id 42000 twice"):
        evaluate(write_json("p.json", []), [file], "vqa")


def test_tables_are_printed_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], written: Callable[[Path], Any]
) -> None:
    tables = {"captions": {"val": {"CIDEr": 1.0, "pictures": 5000}, "test": {"METEOR": 0.25, "pictures": 2}}}
    scores = Scores(tables, ["Words are split plainly."])
    print_scores(scores)
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines[0] == ["captions", "CIDEr", "pictures", "METEOR"]
    assert lines[2:] == [["val", "1.0000", "5,000", "–"], ["test", "–", "2", "0.2500"], ["-", *scores.notes[0].split()]]
    write_scores(scores, tmp_path / "new" / "scores.json")
    assert written(tmp_path / "new" / "scores.json") == {"tables": tables, "notes": scores.notes}


def test_names_in_annotations_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    # "[/x]" would end a style that nobody began.
    print_scores(Scores({"questions": {"[/x] [bold]how\x1b[2J": {"[/y]": 1.0}}}))
    shown = capsys.readouterr().out
    assert "[/x] [bold]how?[2J" in shown and "[/y]" in shown
