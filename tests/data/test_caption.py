"""The caption data set: the published items and batches, references, bad rows, order."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from fairseq.data import data_utils

from narvl_plugin.data.caption import CaptionDataset
from narvl_plugin.data.dataset import DatasetOptions
from narvl_plugin.data.text import TextCodec
from narvl_plugin.data.tsv import TsvFile
from narvl_plugin.errors import BadRow, InputError, SkipBudget

Rows = list[list[str]]


@pytest.fixture
def make(codec: TextCodec, write_tsv: Callable[..., Path]) -> Callable[..., CaptionDataset]:
    """Make a data set of rows of captions."""

    def make_dataset(
        rows: Sequence[Sequence[str]],
        split: str = "train",
        skip: int = 0,
        any_reference: bool = False,
        max_references: int = 0,
    ) -> CaptionDataset:
        options = DatasetOptions(codec, 8, 20, 4, False, SkipBudget(skip))
        tsv = TsvFile(write_tsv(f"{split}.tsv", rows), "0,4,2")
        return CaptionDataset(tsv, options, split, any_reference=any_reference, max_references=max_references)

    return make_dataset


@pytest.mark.parametrize(
    ("case", "columns", "size", "imagenet", "max_words", "train_file", "train_split"),
    [
        ("caption_stage1", "0,4,2", 64, False, 20, "caption_stage1_train.tsv", "train"),
        ("caption_drop_worst", "0,4,2", 64, False, 30, "caption_stage1_train.tsv", "train"),
        ("caption_rdrop", "0,4,2", 64, False, 30, "caption_stage1_train.tsv", "train"),
        ("caption_imagenet_norm", "0,4,2", 48, True, 5, "caption_stage1_train.tsv", "train"),
        # Here the published training took all references for its target, as we do in evaluation.
        ("caption_scst", "1,4,2", 64, False, 20, "caption_stage2_train.tsv", "test"),
    ],
)
def test_items_and_batches_are_the_published_ones(
    goldens: Path,
    gpt2_codec: TextCodec,
    check_golden: Callable[..., None],
    case: str,
    columns: str,
    size: int,
    imagenet: bool,
    max_words: int,
    train_file: str,
    train_split: str,
) -> None:
    options = DatasetOptions(gpt2_codec, size, 80, max_words, imagenet, SkipBudget(0))
    for split, file, kind in (("train", train_file, train_split), ("valid", "caption_val.tsv", "valid")):
        check_golden(CaptionDataset(TsvFile(goldens / "data" / file, columns), options, kind), case, split)


class TestReferences:
    def test_evaluation_has_all_of_them_and_the_first_as_a_target(
        self, make: Callable[..., CaptionDataset], codec: TextCodec, caption_rows: Rows
    ) -> None:
        caption_rows[0][2] = "a red square on a wall.&&two dogs&&the blue hat"
        dataset = make(caption_rows, "valid")
        batch = dataset.collater([dataset[0], dataset[1]])
        assert batch["references"] == [
            ["a red square on a wall", "two dogs", "the blue hat"],
            ["two dogs run"],
        ]
        assert codec.decode(batch["target"][0]) == "a red square on a wall&&two dogs&&the blue hat"
        first = batch["first_reference"]
        assert codec.decode(first["target"][0]) == "a red square on"  # cut to four words
        assert first["target"][0, -1] == codec.dictionary.eos()
        assert first["prev_output_tokens"][0].tolist() == [0, *first["target"][0, :-1].tolist()]
        assert first["target"][1, -1] == codec.dictionary.pad()

    def test_any_of_them_can_be_asked_for(
        self, make: Callable[..., CaptionDataset], codec: TextCodec, caption_rows: Rows
    ) -> None:
        caption_rows[0][2], caption_rows[1][2] = "a cat&&a dog", "a cat"
        dataset = make(caption_rows, any_reference=True)
        batch = dataset.collater([dataset[0], dataset[1]])
        cat, dog = codec.encode(" a cat").tolist(), codec.encode(" a dog").tolist()
        eos, pad = codec.dictionary.eos(), codec.dictionary.pad()
        texts = [[[t for t in row if t not in (eos, pad)] for row in rows] for rows in batch["alternatives"].tolist()]
        assert texts == [[cat, dog], [cat, []]]

    def test_training_may_take_the_first_ones_alone(
        self, make: Callable[..., CaptionDataset], codec: TextCodec, caption_rows: Rows
    ) -> None:
        """Each epoch learns another one of these, a student may learn any of these, and evaluation has all."""
        caption_rows[0][2] = "a cat&&a dog&&two dogs run"
        cat, dog = codec.encode(" a cat").tolist(), codec.encode(" a dog").tolist()
        two = make(caption_rows, any_reference=True, max_references=2)
        learned = []
        for epoch in (0, 1, 2):
            two.set_epoch(epoch)
            learned.append(two[0]["target"][:-1].tolist())
        assert learned == [cat, dog, cat]
        assert [one.tolist()[:-1] for one in two[0]["alternatives"]] == [cat, dog]
        assert make(caption_rows, "valid", max_references=2)[0]["references"] == ["a cat", "a dog", "two dogs run"]

    def test_training_learns_another_one_each_epoch(
        self, make: Callable[..., CaptionDataset], codec: TextCodec, caption_rows: Rows
    ) -> None:
        caption_rows[0][2] = "a cat&&two dogs&&the blue hat"
        dataset = make(caption_rows)
        learned = []
        for epoch in (1, 2, 3, 4):
            dataset.set_epoch(epoch)
            learned.append(codec.decode(dataset[0]["target"]))
        assert set(learned) == {"a cat", "two dogs", "the blue hat"}
        assert learned[3] == learned[0]
        assert "references" not in dataset.collater([dataset[0]])

    def test_all_of_them_without_the_images(self, make: Callable[..., CaptionDataset], caption_rows: Rows) -> None:
        rows = [["0", "", "a cat!&&a dog", "", "no image"], ["1", "", "..", "", "no image"], ["2"]]
        assert list(make(rows, "valid").all_references()) == [["a cat", "a dog"]]


class TestBadRows:
    @pytest.mark.parametrize(
        ("column", "value", "message"),
        [
            (2, "", r"train\.tsv:3: the caption '' has no words"),
            (2, "?!", r"train\.tsv:3: the caption '\?!' has no words"),
            (4, "bm8gaW1hZ2U=", r"train\.tsv:3: the image is not readable"),
            (None, None, r"train\.tsv:3: has 4 columns, column 4 of --selected-cols 0,4,2 is missing"),
        ],
    )
    def test_are_errors_that_say_how_to_go_on(
        self,
        make: Callable[..., CaptionDataset],
        caption_rows: Rows,
        column: int | None,
        value: str,
        message: str,
    ) -> None:
        if column is None:
            caption_rows[2] = caption_rows[2][:4]
        else:
            caption_rows[2][column] = value
        with pytest.raises(BadRow, match=message + ".*--skip-bad-rows"):
            make(caption_rows)[2]

    def test_are_left_out_and_counted_once(
        self, make: Callable[..., CaptionDataset], caption_rows: Rows, caplog: pytest.LogCaptureFixture
    ) -> None:
        caption_rows[1][2] = caption_rows[4][2] = ""
        dataset = make(caption_rows, skip=2)
        for _ in range(3):  # epochs
            batch = dataset.collater([dataset[row] for row in range(len(dataset))])
            assert batch["id"].tolist() == ["0", "2", "3", "5"]
        assert dataset.options.skip_budget.count == 2
        assert sum("skipped bad row" in message for message in caplog.messages) == 2

    def test_beyond_the_budget_are_errors(self, make: Callable[..., CaptionDataset], caption_rows: Rows) -> None:
        caption_rows[1][2] = caption_rows[4][2] = ""
        dataset = make(caption_rows, skip=1)
        assert dataset[1] is None
        with pytest.raises(BadRow, match=r"train\.tsv:5: .*--skip-bad-rows \(now 1\)"):
            dataset[4]

    def test_are_counted_across_workers(self, make: Callable[..., CaptionDataset], caption_rows: Rows) -> None:
        for row in range(4):
            caption_rows[row][2] = ""
        dataset = make(caption_rows, skip=4)
        for _ in range(2):  # epochs, with workers of their own
            loader = torch.utils.data.DataLoader(dataset, batch_size=2, num_workers=2, collate_fn=dataset.collater)
            assert [batch["id"].tolist() for batch in loader] == [["4"], ["4"], ["4", "5"]]
        assert dataset.options.skip_budget.count == 4

    def test_alone_in_a_batch_have_a_stand_in_only_where_the_trainer_needs_one(
        self, make: Callable[..., CaptionDataset], caption_rows: Rows
    ) -> None:
        caption_rows[0][2] = ""
        for split in ("train", "valid"):
            assert make(caption_rows, split, skip=1).collater([None])["id"].tolist() == ["1"]
        assert make(caption_rows, "test", skip=1).collater([None]) == {}

    def test_only(self, make: Callable[..., CaptionDataset], caption_rows: Rows) -> None:
        for row in caption_rows:
            row[2] = ""
        with pytest.raises(InputError, match=r"train\.tsv: none of its 6 rows can be used"):
            make(caption_rows, skip=9).collater([None])

    def test_the_budget_cannot_be_negative(self) -> None:
        with pytest.raises(InputError, match="--skip-bad-rows -1"):
            SkipBudget(-1)


class TestOrder:
    def test_training_shuffles_all_rows_by_fairseqs_seed(
        self, make: Callable[..., CaptionDataset], caption_rows: Rows
    ) -> None:
        dataset = make(caption_rows * 5)
        orders = []
        for seed in (1, 2, 1):
            with data_utils.numpy_seed(seed):
                orders.append(dataset.ordered_indices())
        assert all(sorted(order) == list(range(30)) for order in orders)
        assert np.array_equal(orders[0], orders[2])
        assert not np.array_equal(orders[0], orders[1])

    @pytest.mark.parametrize("split", ["valid", "test"])
    def test_evaluation_keeps_the_files_order(
        self, make: Callable[..., CaptionDataset], caption_rows: Rows, split: str
    ) -> None:
        assert make(caption_rows, split).ordered_indices().tolist() == [0, 1, 2, 3, 4, 5]
