"""Ways of decoding side by side, and other packages' beam search."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from narvl_plugin.bench import decoding as bench_decoding
from narvl_plugin.bench.decoding import (
    FREE,
    answer_list_speeds,
    beam_search_speeds,
    decoding,
    table,
    ways_to_decode,
)
from narvl_plugin.data.ngram_files import write_ngrams
from narvl_plugin.data.text import TextCodec
from narvl_plugin.errors import InputError
from narvl_plugin.inference.predictor import Predictor
from narvl_plugin.tasks.answers import AnswerTask
from narvl_plugin.tasks.caption import CaptionTask
from narvl_plugin.tasks.refcoco import RefcocoTask


def task_of(kind: type, codec: TextCodec, **attributes: object) -> object:
    """Return a task without data."""
    task = kind.__new__(kind)
    vars(task).update({"codec": codec, **attributes})
    return task


@pytest.mark.integration
def test_captions_are_decoded_in_all_ways(make_model: Callable[..., Path], tmp_path: Path) -> None:
    student = make_model("narvl_tiny", "qctc", "--num-queries", 16, updates=20)
    teacher = make_model("ofa_tiny", "cross_entropy", updates=2)
    data, out = tmp_path / "valid.tsv", tmp_path / "run" / "decoding.json"
    files = {"student": student, "data": data, "teacher": teacher, "frequencies": tmp_path / "train.tsv"}
    task = Predictor.load(student).task
    write_ngrams(tmp_path / "train.tsv", tmp_path / "3.ngrams", task.codec, order=3, hard=2, column=2)
    result = decoding(out, **files, ngrams=[tmp_path / "3.ngrams"], images=2, repeats=1)
    assert json.loads(out.read_text()) == result
    assert (result["rows"], result["metric"]) == (6, "cider")
    ways = result["ways"]
    assert list(ways)[:4] == [FREE, "greedy", "beam 5", "beam 16"]
    assert {"beam 16, expected BLEU", "beam 16, expected CIDEr", "beam 5 and 1 of the teacher"} < ways.keys()
    # A wider search finds nothing less probable, and n-grams that are ruled out do not come.
    assert ways["greedy"]["score"] <= ways["beam 5"]["score"] + 1e-6 <= ways["beam 16"]["score"] + 2e-6
    assert ways["beam 5, no trigram twice"]["invalid"] == 0
    for name in ("3.ngrams, ruled out", "3.ngrams, weighted"):
        assert ways[name]["replaced"] == 0 and ways[name]["invalid"] == 0
    assert ways["3.ngrams, ruled out"]["score"] <= ways["greedy"]["score"]
    assert all(way["p50_ms"] > 0 for way in ways.values())
    lines = table(result).splitlines()
    words = "new runs | doubled | cut | novel"
    assert lines[0] == f"| decoding | cider | {words} | invalid | log p | calibration error | p50 ms |"
    assert all(0 <= share <= 1 for way in ways.values() for share in way["others"].values())
    assert ways["beam 5 and 1 of the teacher"]["others"].keys() == {"new_runs", "doubled", "cut", "novel"}
    assert len(lines) == 2 + len(ways)
    with pytest.raises(InputError, match="is a teacher"):
        decoding(out, student=teacher, data=data)


def test_scores_may_be_of_some_rows_only(
    write_checkpoint: Callable[..., Path],
    write_tsv: Callable[..., Path],
    regions_rows: list[list[str]],
    vocabulary: Path,
    tmp_path: Path,
) -> None:
    options = {"bpe_dir": str(vocabulary), "patch_image_size": 32, "max_image_size": 32, "num_bins": 11}
    student = write_checkpoint("student.pt", "narvl", "regions", **options)
    for rows, others in ((regions_rows, {"mean_f1", "n_acc", "t_acc"}), (regions_rows[:2], {"mean_f1", "t_acc"})):
        data = write_tsv("test.tsv", rows)
        ways = decoding(tmp_path / "out.json", student=student, data=data, images=1, repeats=1)["ways"]
        assert list(ways) == [FREE, "greedy", "probably right"]
        assert all(way["others"].keys() == others for way in ways.values())
        assert ways["greedy"]["invalid"] == ways["probably right"]["invalid"] == 0


def test_what_is_no_output(codec: TextCodec) -> None:
    first = codec.dictionary.index("<bin_0>")
    boxes = torch.tensor([[1, 2, 3, 4], [3, 2, 1, 4], [1, 4, 3, 2], [1, 1, 1, 1]]) + first
    grounding = task_of(RefcocoTask, codec)
    assert [grounding.is_invalid(box) for box in boxes] == [False, True, True, False]
    assert grounding.is_invalid(boxes[0, :3])
    captions = task_of(CaptionTask, codec)
    for text, invalid in (("a cat", False), ("", True), ("a cat a cat", False), ("a cat a cat a cat", True)):
        assert captions.is_invalid(codec.encode(f" {text}")) == invalid
    for trie, expected in (({"a cat"}, [False, True, True]), (None, [False, False, True])):
        questions = task_of(AnswerTask, codec, trie=trie)
        assert [questions.is_invalid(codec.encode(f" {text}")) for text in ("a cat", "two", "")] == expected


def test_ways_of_tasks_with_answers_and_boxes(codec: TextCodec) -> None:
    assert list(ways_to_decode(task_of(RefcocoTask, codec), None, None)) == [FREE, "greedy", "expected IoU"]
    questions = task_of(AnswerTask, codec, trie={"a cat"})
    ways = ways_to_decode(questions, Path("teacher.pt"), None)
    assert list(ways)[:4] == [FREE, "greedy", "beam 5", "all answers"]
    assert ways["beam 5 and 0.5 of the teacher"].task_options == {
        "val_inference_type": "beamsearch",
        "rescore_with": "teacher.pt",
        "rescore_weight": 0.5,
    }
    assert list(ways_to_decode(task_of(AnswerTask, codec, trie=None), None, None)) == [
        FREE,
        "greedy",
        "beam 5",
        "beam 16",
    ]


def test_beam_search_is_timed_beside_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"batch": 2, "queries": 4, "labels": 30, "repeats": 1}
    monkeypatch.setattr(bench_decoding, "optional", lambda name: None)
    assert list(beam_search_speeds(**sizes)) == ["narvl"]
    asked = []
    other = SimpleNamespace(beam_search=lambda one, *_, **__: asked.append(one.shape))
    monkeypatch.setattr(bench_decoding, "optional", lambda name: other if name == "fast_ctc_decode" else None)
    times = beam_search_speeds(**sizes)
    assert list(times) == ["narvl", "fast-ctc-decode"]
    assert asked == [(4, 30)] * 4


def test_lists_of_answers_are_timed() -> None:
    times = answer_list_speeds(answers=6, queries=4, labels=30, size="tiny", part=2, repeats=1)
    assert list(times) == ["student", "teacher"]
    assert min(times.values()) > 0
