"""Captions by an automaton of n-grams: the options of the task and of the API."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import narvl
from narvl_plugin.api.loading import BOX
from narvl_plugin.ctc import LengthRange, NgramConstraint
from narvl_plugin.data.ngram_files import write_ngrams
from narvl_plugin.data.text import TextCodec, load_codec
from narvl_plugin.errors import InputError
from narvl_plugin.tasks.caption import CaptionConfig, CaptionTask
from narvl_plugin.tasks.refcoco import RefcocoTask


@pytest.fixture
def file(write_tsv: Callable[..., Path], caption_rows: list[list[str]], codec: TextCodec, tmp_path: Path) -> Path:
    """Give a file of the n-grams of some captions."""
    out = tmp_path / "captions.ngrams"
    write_ngrams(write_tsv("train.tsv", caption_rows), out, codec, order=3, hard=2, column=2)
    return out


@pytest.fixture
def make_task(vocabulary: Path, file: Path) -> Callable[..., CaptionTask]:
    """Make a task with n-grams."""

    def make(**options: Any) -> CaptionTask:
        common = {"data": "none", "bpe_dir": str(vocabulary), "num_bins": 10}
        return CaptionTask(CaptionConfig(**common, **{"ngram_automaton": str(file)} | options))

    return make


def test_options_become_a_constraint(make_task: Callable[..., CaptionTask]) -> None:
    options = make_task(ngram_weight=0.7).search_options(Namespace(beam=1, min_len=2, max_len_b=9))
    constraint = options["constraint"]
    assert isinstance(constraint, NgramConstraint)
    assert (constraint.weight, constraint.lengths) == (0.7, LengthRange(2, 9))
    without = make_task(ngram_automaton=None).search_options(Namespace(beam=5))
    assert without["constraint"] == LengthRange(1, 200)


@pytest.mark.parametrize(
    "options, generation, message",
    [
        ({}, {"beam": 5}, "take --beam 1"),
        ({}, {"no_repeat_ngram_size": 3}, "take --beam 1, --no-repeat-ngram-size 0"),
        ({"mbr": "bleu"}, {}, "no --mbr"),
        ({"ngram_weight": -1.0}, {}, "--ngram-weight -1.0: expected a number from 0"),
        ({"ngram_weight": float("nan")}, {}, "--ngram-weight nan: expected a number from 0"),
        ({"ngram_automaton": "gone"}, {}, "gone: no such file"),
    ],
)
def test_refused_options(
    make_task: Callable[..., CaptionTask], options: dict[str, Any], generation: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        make_task(**options).search_options(Namespace(**generation))


def test_other_constraints_and_teachers_are_refused(make_task: Callable[..., CaptionTask], file: Path) -> None:
    task = make_task()
    task.constraint = NgramConstraint(None, 0.2, LengthRange(1, 2))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="takes no other constraint than lengths"):
        task.search_options(Namespace())
    with pytest.raises(InputError, match="--ngram-automaton is for students"):
        task.build_generator([Namespace(is_student=False)], Namespace())  # type: ignore[list-item]


@pytest.mark.integration
def test_in_python(write_tsv: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "two.ngrams"
    data = write_tsv("two.tsv", [["1", "1", "a red cat"], ["2", "2", "two dogs"]])
    write_ngrams(data, out, load_codec(BOX.parent), order=3, hard=2, column=2)
    model = narvl.load()
    image = Image.new("RGB", (96, 96), "red")
    found = model.caption(image, ngram_automaton=out, ngram_weight=0.5)
    assert found.text in ("a red cat", "two dogs") or found.text == model.caption(image).text
    with pytest.raises(InputError, match="ngram_automaton: is for caption"):
        model.answer(image, "what color?", ngram_automaton=out)
    with pytest.raises(InputError, match="take a beam of 1"):
        model.caption(image, ngram_automaton=out, beam=2)


def test_tasks_without_captions_have_no_n_grams() -> None:
    task = RefcocoTask.__new__(RefcocoTask)
    vars(task)["cfg"] = Namespace()
    with pytest.raises(InputError, match="is for captions; the student was trained for refcoco"):
        task.ways_to_decode(None, None, [Path("a.ngrams")])
