"""A look at a file's rows before training: texts that are too long, in tokens, of every task."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from narvl_plugin.data.answers import AnswerTrie
from narvl_plugin.data.caption import CaptionDataset
from narvl_plugin.data.dataset import DatasetOptions, TsvDataset
from narvl_plugin.data.refcoco import RefcocoDataset
from narvl_plugin.data.snli_ve import SnliVeDataset
from narvl_plugin.data.survey import Survey, refuse_what_will_fail, survey
from narvl_plugin.data.text import TextCodec
from narvl_plugin.data.tsv import TsvFile
from narvl_plugin.data.vqa_gen import VqaGenDataset
from narvl_plugin.errors import BadRow, InputError, SkipBudget

WORD = "abcdefghij" * 200
Rows = list[list[str]]


@pytest.fixture
def options(codec: TextCodec) -> DatasetOptions:
    """Give options for a model that reads 100 tokens, the prompts of all tasks being shorter."""
    return DatasetOptions(
        codec=codec,
        patch_image_size=8,
        max_src_length=80,
        max_tgt_length=20,
        imagenet_normalisation=False,
        skip_budget=SkipBudget(0),
        source_positions=100,
        target_positions=100,
    )


@pytest.fixture
def datasets(
    options: DatasetOptions,
    write_tsv: Callable[..., Path],
    codec: TextCodec,
    refcoco_rows: Rows,
    snli_ve_rows: Rows,
    vqa_rows: Rows,
) -> dict[str, TsvDataset]:
    """Give a training file of each task whose encoder reads a text, in whose second row this is one long word."""
    refcoco_rows[1][2] = snli_ve_rows[1][3] = vqa_rows[1][2] = WORD
    files = {
        "refcoco": TsvFile(write_tsv("refcoco.tsv", refcoco_rows), "0,4,2,3"),
        "snli_ve": TsvFile(write_tsv("snli_ve.tsv", snli_ve_rows), "0,2,3,4,5"),
        "vqa_gen": TsvFile(write_tsv("vqa_gen.tsv", vqa_rows), "0,5,2,3,4"),
    }
    return {
        "refcoco": RefcocoDataset(files["refcoco"], options, "train", max_image_size=8),
        "snli_ve": SnliVeDataset(files["snli_ve"], options, "train", trie=AnswerTrie(["yes", "no", "maybe"], codec)),
        "vqa_gen": VqaGenDataset(files["vqa_gen"], options, "train"),
    }


@pytest.mark.parametrize("task", ["refcoco", "snli_ve", "vqa_gen"])
def test_a_word_of_two_thousand_letters_is_no_text_that_an_encoder_reads(
    task: str, datasets: dict[str, TsvDataset]
) -> None:
    dataset = datasets[task]
    told = rf"{task}.tsv:2: the text has [\d,]+ tokens, and the model reads at most 100; .* words with --max-src-length"
    if task == "vqa_gen":
        told += ", or fewer objects with --max-object-length"
    found = survey(dataset, None)
    assert (found.looked_at, found.total) == (len(dataset), len(dataset))
    (error,) = found.unusable
    with pytest.raises(BadRow, match=told):
        raise error
    with pytest.raises(BadRow, match=told):
        dataset[1]
    assert dataset[0] is not None


def test_a_target_that_no_decoder_reads_may_have_any_length(
    options: DatasetOptions, write_tsv: Callable[..., Path], caption_rows: Rows
) -> None:
    """All references joined, in fairseq-generate; a student's one reference of several."""
    caption_rows[0][2] = f"two dogs&&{WORD}"
    file = TsvFile(write_tsv("a.tsv", caption_rows), "0,4,2")
    assert CaptionDataset(file, options, "test")[0] is not None
    assert CaptionDataset(file, options, "valid")[0] is not None
    caption_rows[0][2] = f"{WORD}&&two dogs"
    file = TsvFile(write_tsv("a.tsv", caption_rows), "0,4,2")
    with pytest.raises(BadRow, match=r"a\.tsv:1: the target has [\d,]+ tokens, and the model reads at most 100"):
        CaptionDataset(file, options, "valid")[0]


def test_a_sample_is_spread_over_the_file(
    options: DatasetOptions, write_tsv: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [[str(row), "", "" if row in (0, 50, 99) else "a cat", "", ""] for row in range(100)]
    dataset = CaptionDataset(TsvFile(write_tsv("a.tsv", rows), "0,4,2"), options, "train")
    monkeypatch.setattr("narvl_plugin.data.survey.ROWS_LOOKED_AT", 3)
    found = survey(dataset, 4)
    assert [error.where.rpartition(":")[2] for error in found.unusable] == ["1", "51", "100"]
    assert (found.looked_at, found.total) == (3, 100)


def test_of_large_rows_fewer_are_read(
    options: DatasetOptions, write_tsv: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [[str(row), "", "a cat", "", "A" * 1000] for row in range(100)]
    dataset = CaptionDataset(TsvFile(write_tsv("a.tsv", rows), "0,4,2"), options, "train")
    monkeypatch.setattr("narvl_plugin.data.survey.BYTES_LOOKED_AT", 20_500)
    assert survey(dataset, 4).looked_at == 20
    monkeypatch.setattr("narvl_plugin.data.survey.BYTES_LOOKED_AT", 5)
    assert survey(dataset, 4).looked_at == 2


def test_files_draw_on_one_budget() -> None:
    names = iter("abcdefgh")

    def found(number: int, looked_at: int, total: int) -> Survey:
        name = next(names)
        return Survey(looked_at, total, [BadRow(f"{name}.tsv:{row}: is broken") for row in range(1, number + 1)])

    whole = [found(1, 10, 10), found(2, 10, 10)]
    refuse_what_will_fail(whole, SkipBudget(3))
    with pytest.raises(InputError, match=r"^3 of 20 rows cannot be used, and .* by --skip-bad-rows 3\. .* a.tsv:1: is"):
        refuse_what_will_fail(whole, SkipBudget(2))
    sampled = [found(1, 10, 10), found(2, 10, 35), found(0, 5, 5)]
    with pytest.raises(InputError, match=r"^3 of 25 rows cannot be used, probably 8 of all 50, .*--skip-bad-rows 8\."):
        refuse_what_will_fail(sampled, SkipBudget(2))


def test_a_row_of_two_surveys_counts_once_and_no_more_than_before_a_training_goes_on() -> None:
    rows = [BadRow(f"a.tsv:{row}: is broken") for row in (1, 2)]
    budget = SkipBudget(2)
    twice = [Survey(10, 20, rows), Survey(10, 20, rows)]
    refuse_what_will_fail(twice, budget)
    budget.skip(rows[0])
    refuse_what_will_fail(twice, budget)
    budget.skip(BadRow("b.tsv:1: is broken"))
    told = r"^2 of 20 rows cannot be used, probably 4 of all 40, besides 1 that were skipped .* by --skip-bad-rows 5\."
    with pytest.raises(InputError, match=told):
        refuse_what_will_fail(twice, budget)
    refuse_what_will_fail([Survey(10, 20, rows[:1]), Survey(10, 20, [])], budget)


@pytest.mark.parametrize(("prompt_type", "fits"), [("none", True), ("src", False), ("prev_output", False)])
def test_question_and_answer_together_may_be_longer_than_a_decoder_reads(
    prompt_type: str, fits: bool, options: DatasetOptions, write_tsv: Callable[..., Path], vqa_rows: Rows
) -> None:
    vqa_rows[1][2:4] = 60 * "x", f"1.0|!+{60 * 'y'}"
    file = TsvFile(write_tsv("vqa_gen.tsv", vqa_rows), "0,5,2,3,4")
    dataset = VqaGenDataset(file, options, "train", prompt_type=prompt_type)
    found = survey(dataset, None).unusable
    if fits:
        assert found == []
        assert dataset[1] is not None
        return
    (error,) = found
    assert str(error).startswith(f"{file.path}:2: the target has 1")
    with pytest.raises(BadRow) as raised:
        dataset[1]
    assert str(raised.value).startswith(str(error))


def test_prompt_and_an_answer_of_the_list_may_be_longer_than_a_decoder_reads(
    options: DatasetOptions, write_tsv: Callable[..., Path], vqa_rows: Rows
) -> None:
    """Where a teacher answers; an answer that takes a place more than there are ended in an AssertionError."""
    vqa_rows[1][2] = 40 * "x"
    file = TsvFile(write_tsv("vqa_gen.tsv", vqa_rows), "0,5,2,3,4")

    def dataset(room: int, prompt_type: str = "prev_output") -> VqaGenDataset:
        return VqaGenDataset(file, options, "test", prompt_type=prompt_type, answer_room=room)

    prompt = len(dataset(0)[1]["decoder_prompt"])
    assert dataset(100 - prompt)[1] is not None
    assert dataset(99, "none")[1] is not None
    told = rf"vqa_gen.tsv:2: the prompt has {prompt} tokens, an answer may have {101 - prompt}, and the model reads at"
    with pytest.raises(BadRow, match=told):
        dataset(101 - prompt)[1]
