"""The data set of visual entailment: the published items and batches, prompts, bad rows."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from narvl_plugin.data.answers import AnswerTrie
from narvl_plugin.data.dataset import DatasetOptions
from narvl_plugin.data.snli_ve import SnliVeDataset
from narvl_plugin.data.text import ENTAILMENT_ANSWERS, TextCodec
from narvl_plugin.data.tsv import TsvFile
from narvl_plugin.errors import BadRow, SkipBudget

Rows = list[list[str]]


@pytest.fixture
def make(codec: TextCodec, write_tsv: Callable[..., Path]) -> Callable[..., SnliVeDataset]:
    """Make a data set of rows of hypotheses."""

    def make_dataset(rows: Sequence[Sequence[str]], skip: int = 0, **options: Any) -> SnliVeDataset:
        shared = DatasetOptions(codec, 8, 20, 4, False, SkipBudget(skip))
        trie = AnswerTrie(ENTAILMENT_ANSWERS.values(), codec)
        tsv = TsvFile(write_tsv("train.tsv", rows), "0,2,3,4,5")
        return SnliVeDataset(tsv, shared, "train", trie=trie, **options)

    return make_dataset


@pytest.mark.parametrize(
    ("case", "prompt_type", "add_caption", "max_words"),
    [
        ("snli_ve", "prev_output", True, 80),
        ("snli_ve_none_nocap", "none", False, 80),
        ("snli_ve_src", "src", False, 3),
    ],
)
@pytest.mark.parametrize("split", ["train", "valid"])
def test_items_and_batches_are_the_published_ones(
    goldens: Path,
    gpt2_codec: TextCodec,
    check_golden: Callable[..., None],
    case: str,
    prompt_type: str,
    add_caption: bool,
    max_words: int,
    split: str,
) -> None:
    options = DatasetOptions(gpt2_codec, 64, max_words, 30, False, SkipBudget(0))
    tsv = TsvFile(goldens / "data" / "snli_ve_train.tsv", "0,2,3,4,5")
    trie = AnswerTrie(ENTAILMENT_ANSWERS.values(), gpt2_codec)
    dataset = SnliVeDataset(tsv, options, split, trie=trie, prompt_type=prompt_type, add_caption=add_caption)
    check_golden(dataset, case, split)


def test_labels_become_answers(make: Callable[..., SnliVeDataset], codec: TextCodec, snli_ve_rows: Rows) -> None:
    dataset = make(snli_ve_rows)
    said = [codec.decode(dataset[row]["target"]) for row in range(4)]
    assert said == [codec.decode(codec.encode(f" {word}")) for word in ("yes", "no", "maybe", "yes")]
    assert [codec.decode(dataset.target_tokens(row, dataset.tsv[row])) for row in range(4)] == said


def test_a_caption_is_read_only_if_asked_for(make: Callable[..., SnliVeDataset], snli_ve_rows: Rows) -> None:
    snli_ve_rows[0][4] = ""
    assert make(snli_ve_rows)[0] is not None
    with pytest.raises(BadRow, match=r"train\.tsv:1: the caption '' has no words"):
        make(snli_ve_rows, add_caption=True)[0]


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        (5, "true", "the label 'true' is unknown; expected entailment, contradiction, neutral"),
        (5, "", "the label '' is unknown"),
        (3, "..", r"the hypothesis '\.\.' has no words"),
        (2, "bm8gaW1hZ2U=", "the image is not readable"),
    ],
)
def test_bad_rows_are_named_and_can_be_skipped(
    make: Callable[..., SnliVeDataset], snli_ve_rows: Rows, column: int, value: str, message: str
) -> None:
    snli_ve_rows[1][column] = value
    with pytest.raises(BadRow, match=rf"train\.tsv:2: {message}.*--skip-bad-rows"):
        make(snli_ve_rows)[1]
    dataset = make(snli_ve_rows, skip=1)
    assert dataset.collater([dataset[row] for row in range(4)])["id"].tolist() == ["0", "2", "3"]
    assert dataset.options.skip_budget.count == 1
