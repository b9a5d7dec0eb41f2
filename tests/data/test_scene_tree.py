"""The data set of scene trees: targets, orders, lists of words, bad rows, scenes."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

from narvl_plugin.ctc import min_queries
from narvl_plugin.data.dataset import DatasetOptions
from narvl_plugin.data.scene_tree import MOST_OBJECTS, SceneTreeDataset, TreeNames, shuffled_tree, tokens_in
from narvl_plugin.data.scenes import write_scenes
from narvl_plugin.data.scenes.rows import Example, scene_tree_row
from narvl_plugin.data.scenes.scene import Group, Scene, Thing
from narvl_plugin.data.text import TextCodec, load_codec, train_sentencepiece
from narvl_plugin.data.trees import Node, read_tree, write_tree
from narvl_plugin.data.tsv import TsvFile
from narvl_plugin.errors import BadRow, InputError, SkipBudget

Rows = list[list[str]]
Make = Callable[..., SceneTreeDataset]


@pytest.fixture
def codec(tree_vocabulary: Path) -> TextCodec:
    return load_codec(tree_vocabulary, num_bins=0)


@pytest.fixture
def names(tree_names_file: Path, codec: TextCodec) -> TreeNames:
    return TreeNames.of_file(tree_names_file, codec)


@pytest.fixture
def make(codec: TextCodec, names: TreeNames, write_tsv: Callable[..., Path]) -> Make:
    """Make a data set of rows."""

    def make_dataset(rows: Sequence[Sequence[str]], split: str = "train", **orders: bool) -> SceneTreeDataset:
        options = DatasetOptions(codec, 32, 20, 4, False, SkipBudget(0))
        return SceneTreeDataset(TsvFile(write_tsv("train.tsv", rows), "0,3,2"), options, split, names=names, **orders)

    return make_dataset


def test_the_target_is_the_text_with_a_token_for_each_bracket(
    make: Make, codec: TextCodec, names: TreeNames, scene_tree_rows: Rows
) -> None:
    dataset = make(scene_tree_rows)
    targets = [dataset.sample(row)["target"][:-1] for row in range(3)]
    assert [codec.decode(target) for target in targets] == [
        write_tree(read_tree(row[2], "row")) for row in scene_tree_rows
    ]
    assert [int((target == names.opening).sum()) for target in targets] == [7, 3, 1]
    tree = names.parse(targets[0].tolist())
    assert tree is not None and tokens_in(tree) == targets[0].tolist()
    assert dataset.make_batch([dataset.sample(row) for row in range(3)])["trees"] == [row[2] for row in scene_tree_rows]


def test_tokens_of_another_form_are_no_tree(make: Make, names: TreeNames, scene_tree_rows: Rows) -> None:
    target = make(scene_tree_rows).sample(0)["target"][:-1].tolist()
    assert names.parse(target) is not None
    for wrong in ([], target[:-1], target[1:], [*target, target[0]], [*target[:-1], target[1], target[-1]], target * 2):
        assert names.parse(wrong) is None


def test_each_epoch_may_learn_another_order(make: Make, names: TreeNames, scene_tree_rows: Rows) -> None:
    for split, number in (
        ("train", 6),
        ("valid", 1),
    ):  # two orders of regions, three of objects, two of which are equal
        dataset = make(scene_tree_rows, split, random_order=True)
        seen, equal = set(), set()
        for epoch in range(1, 60):
            dataset.set_epoch(epoch)
            target = dataset.sample(0)["target"][:-1].tolist()
            tree = names.parse(target)
            assert tree is not None
            seen.add(tuple(target))
            equal.add(tree.canonical())
        assert len(equal) == 1
        assert len(seen) == number


@pytest.mark.parametrize(
    ("column", "reason"),
    [
        ("dog", "'dog' is no tree: 'dog' is outside its brackets"),
        ("( green plain )", "the scene 'green plain' is not in --names-file"),
        ("( red plain ( top ( dog ) ) )", "the region 'top' is not in --names-file"),
        ("( red plain ( left ( big dog ) ) )", "the object 'big dog' is not in --names-file"),
        ("( red plain ( left ) )", "the region 'left' has no object"),
        ("( red plain ( left ( dog ) ) ( left ( dog ) ) )", "the region 'left' occurs twice"),
        (f"( red plain ( left {'( dog ) ' * 5}) )", "has 5 objects, and this task reads at most 4"),
    ],
)
def test_bad_rows_say_why(make: Make, scene_tree_rows: Rows, column: str, reason: str) -> None:
    scene_tree_rows[1][2] = column
    with pytest.raises(BadRow, match=f"train.tsv:2: .*{reason}"):
        make(scene_tree_rows).sample(1)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[]", "holds a value of type list"),
        ('{"scene": [["red"]], "region": [["left"]]}', "'object' is None; expected a list of lists of words"),
        ('{"scene": ["red"], "region": [["left"]], "object": [["dog"]]}', "'scene' is .*; expected a list of lists"),
        (
            '{"scene": [["(red"]], "region": [["left"]], "object": [["dog"]]}',
            "expected a list of lists of words without",
        ),
        ('{"scene": [[]], "region": [["left"]], "object": [["dog"]]}', "the scene has 0 labels; give 1 to 10,000"),
        ('{"scene": [["red"]], "region": [["a", "b", "c", "d", "e"]], "object": [["dog"]]}', "the region has 5 labels"),
        ('{"scene": [["qqq"]], "region": [["left"]], "object": [["dog"]]}', "spells no label of the scene"),
    ],
)
def test_lists_of_words_that_cannot_be_used_say_why(
    tmp_path: Path, codec: TextCodec, content: str, reason: str
) -> None:
    (tmp_path / "names.json").write_text(content)
    with pytest.raises(InputError, match=reason):
        TreeNames.of_file(tmp_path / "names.json", codec)
    with pytest.raises(InputError, match="--names-file gone.json: no such file"):
        TreeNames.of_file("gone.json", codec)


def test_a_vocabulary_without_brackets_is_refused(tree_names_file: Path, vocabulary: Path) -> None:
    with pytest.raises(InputError, match="--bpe-dir: the vocabulary does not write a bracket as one token"):
        TreeNames.of_file(tree_names_file, load_codec(vocabulary, num_bins=0))


def test_a_tree_keeps_its_content_in_any_order(names: TreeNames, scene_tree_rows: Rows) -> None:
    tree = names.tokens_of(read_tree(scene_tree_rows[0][2], "row"), "row")
    orders = {tuple(tokens_in(shuffled_tree(tree, Random(seed)))) for seed in range(80)}
    assert len(orders) == 6
    assert all(names.parse(order).canonical() == tree.canonical() for order in orders)  # type: ignore[union-attr]


# --- Scenes ----------------------------------------------------------------------------------------------------------


def test_scenes_are_trees_of_halves() -> None:
    def thing(x: float, y: float) -> Thing:
        return Thing((x - 0.1, y - 0.1, x + 0.1, y + 0.1))

    groups = (Group("dog", "small", (thing(0.8, 0.2), thing(0.3, 0.7))), Group("cat", "", (thing(0.2, 0.3),)))
    ground: Any = SimpleNamespace(color="red", pattern="striped")
    row = scene_tree_row(Example("one", Scene(groups, ground), "IMAGE", 100, ()), Random(1))
    assert row == ["one", "one", "( red striped ( left ( cat ) ( small dog ) ) ( right ( small dog ) ) )", "IMAGE"]
    alone = Scene(groups[1:], ground)
    row = scene_tree_row(Example("one", alone, "IMAGE", 100, ()), Random(1))
    assert read_tree(row[2], "one") == Node("red striped", (Node("left", (Node("cat"),)),))


@pytest.mark.integration
def test_each_tree_of_scenes_fits_into_the_queries_of_the_recipe(tmp_path: Path) -> None:
    write_scenes(tmp_path, train=300, valid=0, test=0, size=32, tasks=("scene_tree",))
    folder = tmp_path / "scene_tree"
    codec = load_codec(train_sentencepiece(folder / "train.tsv", [2], tmp_path, 1000).parent, num_bins=0)
    names = TreeNames.of_file(folder / "names.json", codec)
    assert json.loads((folder / "names.json").read_text()).keys() == {"scene", "region", "object"}
    assert names.longest == 26
    trees = TsvFile(folder / "train.tsv", "2")
    most = 0
    for row in range(len(trees)):
        tree = names.tokens_of(read_tree(trees[row][0], "row"), "row")
        target = codec.encode(f" {trees[row][0]}")
        assert tokens_in(tree) == target.tolist()
        most = max(most, int(min_queries(target[None], target.new_tensor([len(target)]))))
    assert 27 <= most <= 29 and MOST_OBJECTS == 4
