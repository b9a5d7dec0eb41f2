"""The model in the box: it comes with the package, and knows the embedded scenes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import narvl
from narvl_plugin.api.loading import BOX, BOX_NGRAMS
from narvl_plugin.cli.app import app
from narvl_plugin.data.images import ImageReader
from narvl_plugin.data.scenes import write_scenes
from narvl_plugin.data.tsv import TsvFile
from narvl_plugin.data.vqa_gen import parse_answers


def test_it_is_small_and_tells_nothing_of_the_machine_it_was_trained_on() -> None:
    files = sorted(file.name for file in BOX.parent.iterdir())
    assert files == ["README.md", "captions.ngrams", "spm.model", "student.json", "student.safetensors"]
    assert sum(file.stat().st_size for file in BOX.parent.iterdir()) < 6_000_000
    description = json.loads((BOX.parent / "student.json").read_text())
    assert "/" not in json.dumps(description).replace("</", "")
    assert set(description["cfg"]) == {"model", "task"}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder with scenes of a seed that it was not trained on."""
    folder = tmp_path_factory.mktemp("scenes")
    tasks = ("caption", "refcoco", "snli_ve", "vqa_gen")
    write_scenes(folder, train=1, valid=60, test=1, size=96, seed=99, nouns=24, max_objects=2, tasks=tasks)
    return folder


def rows_of(scenes: Path, task: str, columns: str) -> tuple[list[bytes], list[list[str]]]:
    """Return the images and the other columns of a task's rows; the image is the first column."""
    tsv = TsvFile(scenes / task / "valid.tsv", columns)
    rows = [tsv[row] for row in range(len(tsv))]
    reader = ImageReader(96)
    return [reader.read_bytes(row[0], "scene") for row in rows], [row[1:] for row in rows]


@pytest.mark.integration
def test_its_captions_are_searched_under_its_n_grams(scenes: Path, tmp_path: Path) -> None:
    """Where one caption is searched for, and the call does not say otherwise."""
    model = narvl.load(device="cpu")
    for options in ({}, {"beam": 1, "nbest": 1}, {"abstain_below": 0.1}):
        assert model.decoding_for("caption", **options).ngram_automaton == BOX_NGRAMS
    answers: dict[str, Any] = {"answers": ["a cat"]}
    for options in ({"beam": 2}, {"nbest": 3}, answers, {"ngram_automaton": None}):
        assert model.decoding_for("caption", **options).ngram_automaton is None
    assert model.decoding_for("answer").ngram_automaton is None

    images, _ = rows_of(scenes, "caption", "4,2")
    texts = [one.text for one in model.caption(images)]
    assert texts == [one.text for one in model.caption(images, ngram_automaton=BOX_NGRAMS)]
    assert texts != [one.text for one in model.caption(images, ngram_automaton=None)]
    assert len(model.caption(images[0], nbest=3).alternatives) == 3
    folder, single, shards = (tmp_path / name for name in ("images", "captions.tsv", "captions"))
    folder.mkdir()
    for number, image in enumerate(images):
        (folder / f"{number:02}.png").write_bytes(image)
    for out in (str(single), f"{shards}/"):
        app(["caption", str(folder), "--out", out, "--device", "cpu"], standalone_mode=False)
    written = [single, *shards.glob("*.tsv")]
    assert len(written) == 2
    for file in written:
        assert [line.split("\t")[1].strip() for line in file.read_text().splitlines()] == texts


@pytest.mark.integration
def test_it_knows_scenes(scenes: Path) -> None:
    model = narvl.load(device="cpu")
    assert model.verbs == ("caption", "locate", "entails", "answer")
    assert repr(model) == "<narvl.Model (the model in the box): caption, locate, entails, answer>"
    images, rows = rows_of(scenes, "refcoco", "4,2,3")
    found = model.locate(images, [text for text, _ in rows])
    hits = [
        overlap(one.box, [float(edge) for edge in box.split(",")]) >= 0.5
        for one, (_, box) in zip(found, rows, strict=True)
    ]
    assert sum(hits) / len(hits) > 0.6
    images, rows = rows_of(scenes, "vqa_gen", "5,2,3")
    answers = model.answer(images, [question for question, _ in rows])
    right = [one.text in parse_answers(answer, "row") for one, (_, answer) in zip(answers, rows, strict=True)]
    assert sum(right) / len(right) > 0.6
    images, rows = rows_of(scenes, "snli_ve", "2,3,5")
    words = {"entailment": "yes", "contradiction": "no", "neutral": "maybe"}
    said = model.entails(images, [hypothesis for hypothesis, _ in rows])
    right = [one.text == words[label] for one, (_, label) in zip(said, rows, strict=True)]
    assert sum(right) / len(right) > 0.6
    images, rows = rows_of(scenes, "caption", "4,2")
    nouns = [
        set(references.split()) & set(one.text.split())
        for one, (references,) in zip(model.caption(images), rows, strict=True)
    ]
    assert sum(len(shared) >= 3 for shared in nouns) / len(nouns) > 0.8


def overlap(box: Sequence[float], other: Sequence[float]) -> float:
    """Return the intersection over union of two boxes."""
    width = min(box[2], other[2]) - max(box[0], other[0])
    height = min(box[3], other[3]) - max(box[1], other[1])
    common = max(width, 0) * max(height, 0)
    areas = [(edges[2] - edges[0]) * (edges[3] - edges[1]) for edges in (box, other)]
    return common / (sum(areas) - common)
