"""The data set of visual question answering: the published items and batches, answers, bad rows."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from narvl_plugin.data.answers import AnswerTrie, read_answers
from narvl_plugin.data.dataset import DatasetOptions
from narvl_plugin.data.text import TextCodec
from narvl_plugin.data.tsv import TsvFile
from narvl_plugin.data.vqa_gen import VqaGenDataset, parse_answers
from narvl_plugin.errors import BadRow, SkipBudget

Rows = list[list[str]]


@pytest.fixture
def make(codec: TextCodec, write_tsv: Callable[..., Path]) -> Callable[..., VqaGenDataset]:
    """Make a data set of rows of questions."""

    def make_dataset(
        rows: Sequence[Sequence[str]], split: str = "train", skip: int = 0, **options: Any
    ) -> VqaGenDataset:
        shared = DatasetOptions(codec, 8, 20, 4, False, SkipBudget(skip))
        return VqaGenDataset(TsvFile(write_tsv("train.tsv", rows), "0,5,2,3,4"), shared, split, **options)

    return make_dataset


@pytest.mark.parametrize(
    ("case", "prompt_type", "max_objects", "closed"),
    [
        ("vqa_gen", "prev_output", 30, True),
        ("vqa_gen_beam", "none", None, True),
        ("vqa_gen_unconstrained", "prev_output", None, False),
    ],
)
@pytest.mark.parametrize("split", ["train", "valid"])
def test_items_and_batches_are_the_published_ones(
    goldens: Path,
    gpt2_codec: TextCodec,
    check_golden: Callable[..., None],
    case: str,
    prompt_type: str,
    max_objects: int | None,
    closed: bool,
    split: str,
) -> None:
    options = DatasetOptions(gpt2_codec, 64, 80, 30, False, SkipBudget(0))
    trie = AnswerTrie(read_answers(goldens / "data" / "trainval_ans2label.pkl"), gpt2_codec) if closed else None
    tsv = TsvFile(goldens / "data" / "vqa_train.tsv", "0,5,2,3,4")
    dataset = VqaGenDataset(tsv, options, split, prompt_type=prompt_type, trie=trie, max_objects=max_objects)
    check_golden(dataset, case, split)


def test_the_best_answer_is_learned_with_its_confidence(
    make: Callable[..., VqaGenDataset], codec: TextCodec, vqa_rows: Rows
) -> None:
    dataset = make(vqa_rows)
    batch = dataset.collater([dataset[1], dataset[2]])
    assert batch["ref_dict"] == [{"two": 0.6, "a red hat": 0.3}, {"a dog": 0.3, "a cat": 0.9}]
    assert batch["conf"].tolist() == pytest.approx([0.6, 0.9])
    assert [codec.decode(target) for target in batch["target"]] == ["two", "a cat"]
    assert codec.decode(dataset.target_tokens(2, dataset.tsv[2])) == "a cat"


def test_scorers_read_the_whole_column(
    make: Callable[..., VqaGenDataset], gpt2_codec: TextCodec, vqa_rows: Rows
) -> None:
    tsv = make(vqa_rows).tsv
    dataset = VqaGenDataset(tsv, DatasetOptions(gpt2_codec, 8, 20, 4, False, SkipBudget(0)), "test")
    assert gpt2_codec.decode(dataset[1]["target"]) == "0.6|!+two&&0.3|!+a red hat"


def test_nothing_is_masked_where_nobody_takes_a_loss(
    make: Callable[..., VqaGenDataset], codec: TextCodec, vqa_rows: Rows
) -> None:
    for split, masked in (("train", True), ("valid", True), ("test", False)):
        dataset = make(vqa_rows[:1], split, trie=AnswerTrie(["red"], codec))
        assert ("constraint_masks" in dataset.collater([dataset[0]])) == masked


def test_objects_are_cut_to_a_number(make: Callable[..., VqaGenDataset], codec: TextCodec, vqa_rows: Rows) -> None:
    vqa_rows[0][2:5] = ["two dogs?", vqa_rows[0][3], "a cat&&dogs&&hat"]
    plain = codec.encode(" two dogs?")
    dataset = make(vqa_rows, max_objects=2)
    assert dataset[0]["source"][1:-1].tolist() == codec.encode(" two dogs? object: a cat dogs").tolist()
    assert make(vqa_rows)[0]["source"][1:-1].tolist() == plain.tolist()


class TestClosedAnswers:
    def test_training_learns_the_best_that_is_listed(
        self, make: Callable[..., VqaGenDataset], codec: TextCodec, vqa_rows: Rows
    ) -> None:
        trie = AnswerTrie(["red", "a red hat", "a dog"], codec)
        dataset = make(vqa_rows, trie=trie)
        assert codec.decode(dataset[1]["target"]) == "a red hat"
        assert dataset[1]["conf"].item() == pytest.approx(0.3)
        with pytest.raises(BadRow, match=r"train\.tsv:2: none of the answers two, a red hat is in --ans2label-file"):
            make(vqa_rows, trie=AnswerTrie(["red"], codec))[1]

    def test_evaluation_keeps_a_row_whose_answers_are_not(
        self, make: Callable[..., VqaGenDataset], codec: TextCodec, vqa_rows: Rows
    ) -> None:
        sample = make(vqa_rows, "valid", trie=AnswerTrie(["red"], codec))[1]
        assert codec.decode(sample["target"]) == "two"
        assert sample["constraint_mask"].all()


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        (2, "", "the question '' has no words"),
        (2, "?", r"the question '\?' has no words"),
        (3, "", "the answers '' cannot be read"),
        (3, "red", r"the answers 'red' cannot be read; expected CONFIDENCE\|!\+ANSWER"),
        (3, "1.0|!+", "the answers .* cannot be read"),
        (3, "high|!+red", "the answers 'high.*' cannot be read"),
        (3, "1.0|!+red&&", "the answers .* cannot be read"),
        (3, "3|!+red", "the answers .* cannot be read; .*above 0 and at most 1"),
        (3, "nan|!+red", "the answers .* cannot be read"),
        (3, "nan|!+red&&0.3|!+red", "the answers .* cannot be read"),
        (3, "-1|!+red&&0.3|!+red", "the answers .* cannot be read"),
        (3, "7|!+red&&0.3|!+red", "the answers .* cannot be read"),
        (3, "inf|!+red", "the answers .* cannot be read"),
        (3, "0|!+red", "the answers .* cannot be read"),
        (3, "0_1|!+red", "the answers .* cannot be read"),
        (3, "٠.٥|!+red", "the answers .* cannot be read"),
        (3, "1.0|!+ \u2003", "the answers .* cannot be read"),
        (3, "1.0|!+&&0.3|!+red", "the answers .* cannot be read"),
        (3, "1.0|!+red0.3|!+blue", "the answers .* cannot be read"),
        (5, "bm8gaW1hZ2U=", "the image is not readable"),
    ],
)
def test_bad_rows_are_named_and_can_be_skipped(
    make: Callable[..., VqaGenDataset], vqa_rows: Rows, column: int, value: str, message: str
) -> None:
    vqa_rows[1][column] = value
    with pytest.raises(BadRow, match=rf"train\.tsv:2: {message}.*--skip-bad-rows"):
        make(vqa_rows)[1]
    dataset = make(vqa_rows, skip=1)
    assert dataset.collater([dataset[row] for row in range(4)])["id"].tolist() == ["0", "2", "3"]
    assert dataset.options.skip_budget.count == 1


def test_answers_are_read_with_their_confidences() -> None:
    assert parse_answers("0.3|!+on bench&&1|!+a|b!", "") == {"on bench": 0.3, "a|b!": 1.0}


@pytest.mark.parametrize(
    ("column", "answers"),
    [
        ("1.0|!+yes&&0.3|!+yes", {"yes": 1.0}),
        ("0.3|!+yes&&0.6|!+no&&0.9|!+yes", {"yes": 0.9, "no": 0.6}),
        ("0.3|!+yes&&0.3|!+yes", {"yes": 0.3}),
        ("0.6|!+hot dog&&0.3|!+ hot\u00a0 dog ", {"hot dog": 0.6}),
        ("0.6|!+Yes&&0.3|!+yes", {"Yes": 0.6, "yes": 0.3}),  # two spellings, whose confidences the scorer adds up
        (" 1 |!+a&&.5|!+b&&1e-3|!+c&&1.|!+d", {"a": 1.0, "b": 0.5, "c": 0.001, "d": 1.0}),
    ],
)
def test_an_answer_that_stands_there_twice_has_its_highest_confidence(column: str, answers: dict[str, float]) -> None:
    assert parse_answers(column, "") == answers
    assert list(parse_answers(column, "")) == list(answers)


def test_training_learns_the_answer_of_highest_confidence_however_often_it_stands_there(
    make: Callable[..., VqaGenDataset], codec: TextCodec, vqa_rows: Rows
) -> None:
    vqa_rows[0][3] = "1.0|!+red&&0.6|!+two&&0.3|!+red"
    dataset = make(vqa_rows)
    assert codec.decode(dataset[0]["target"]) == "red"
    assert dataset[0]["conf"].item() == 1
