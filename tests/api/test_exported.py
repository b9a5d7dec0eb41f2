"""Exported students answer through the same verbs as their checkpoints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import narvl
from narvl_plugin.checkpoints.conversion import convert
from narvl_plugin.export import export

TEXTS = {"refcoco": "the cat", "snli_ve": "a cat sits"}  # an export takes ten seconds


@pytest.fixture(scope="module")
def exported(several_tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Give a function that returns the checkpoint of one task and the folder it was exported to."""
    folder = tmp_path_factory.mktemp("exported")

    def make(task: str) -> tuple[Path, Path]:
        student, out = folder / f"{task}.pt", folder / task
        if not out.exists():
            convert(several_tasks, student, member=task)
            export(student, out, to="onnx")
        return student, out

    return make


@pytest.fixture
def images() -> list[Image.Image]:
    draw = np.random.default_rng(1)
    return [Image.fromarray(draw.integers(0, 256, (6, 8, 3), dtype=np.uint8)) for _ in range(3)]


@pytest.mark.integration
@pytest.mark.parametrize("task", TEXTS)
def test_an_exported_student_answers_as_its_checkpoint(exported: Any, images: list[Image.Image], task: str) -> None:
    checkpoint, folder = exported(task)
    trained, written = narvl.load(checkpoint, beam=1, device="cpu"), narvl.load(folder)
    assert trained.verbs == written.verbs
    (verb,) = written.verbs
    for one, other in zip(
        trained.predict(verb, images, TEXTS[task]), written.predict(verb, images, TEXTS[task]), strict=True
    ):
        assert one.text == other.text and one.labels == other.labels
        assert one.box is other.box is None or one.box == pytest.approx(other.box, rel=1e-5)
        assert other.confidence == pytest.approx(one.confidence, abs=0.02)  # drawn paths of boxes may differ
        assert [(query.text, query.kind) for query in one.queries] == [(q.text, q.kind) for q in other.queries]
        assert [query.probability for query in one.queries] == pytest.approx(
            [query.probability for query in other.queries], abs=1e-4
        )
        if task == "snli_ve":
            assert [answer.text for answer in one.alternatives] == [answer.text for answer in other.alternatives]
    with pytest.raises(narvl.InputError, match="does not tell where it looks; load its checkpoint"):
        other.attention()


@pytest.mark.integration
def test_what_an_exported_student_cannot_do_is_said(exported: Any, images: list[Image.Image], tmp_path: Path) -> None:
    _, folder = exported("snli_ve")
    model = narvl.load(folder)
    with pytest.raises(narvl.InputError, match="beam: an exported student answers as it was exported"):
        model.entails(images, "a cat", beam=3)
    with pytest.raises(narvl.InputError, match="was not trained for locate; it has entails"):
        model.locate(images[0], "a cat")
    with pytest.raises(narvl.InputError, match="image 1: the image is not readable"):
        model.entails(b"no image", "a cat")
    assert model.entails(images[0], "a cat", abstain_below=1.0).text == ""
    (tmp_path / "student.json").write_text("{}")
    with pytest.raises(narvl.InputError, match="is no student of narvl export, or is damaged"):
        narvl.load(tmp_path)


@pytest.mark.integration
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"format": "torch-export"}, "is in the format 'torch-export', whose files are programs"),
        ({"side": 10**9}, "side is 1000000000; expected a whole number from 1 to 4,096"),
        ({"side": "32"}, "side is '32'"),
        ({"template": "{text.__class__}"}, "the template has the field 'text.__class__'; expected a plain name"),
        ({"task": "os"}, "was exported for the unknown task 'os'"),
    ],
)
def test_a_strangers_folder_is_checked(exported: Any, tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    _, folder = exported("snli_ve")
    copied = shutil.copytree(folder, tmp_path / "copied")
    settings = json.loads((copied / "student.json").read_text())
    (copied / "student.json").write_text(json.dumps(settings | changed))
    with pytest.raises(narvl.InputError, match=message):
        narvl.load(copied)
