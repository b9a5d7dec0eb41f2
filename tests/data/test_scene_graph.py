"""The data set of scene graphs: targets, orders, lists of names, bad rows, texts of outputs, vocabularies, scenes."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from narvl_plugin.data.dataset import DatasetOptions
from narvl_plugin.data.scene_graph import GraphNames, SceneGraphDataset, triplets_in
from narvl_plugin.data.scenes.rows import Example, scene_graph_row
from narvl_plugin.data.scenes.scene import Group, Scene, Thing
from narvl_plugin.data.text import TextCodec, load_codec, sayings
from narvl_plugin.data.triplets import read_triplets
from narvl_plugin.data.tsv import TsvFile
from narvl_plugin.errors import BadRow, InputError, SkipBudget

Rows = list[list[str]]
Make = Callable[..., SceneGraphDataset]
HAT_ON_DOG = "red hat<bin_0><bin_0><bin_4><bin_4> on dog<bin_4><bin_0><bin_9><bin_9>"


@pytest.fixture
def codec(graph_vocabulary: Path) -> TextCodec:
    return load_codec(graph_vocabulary, num_bins=10)


@pytest.fixture
def names(names_file: Path, codec: TextCodec) -> GraphNames:
    return GraphNames.of_file(names_file, codec)


@pytest.fixture
def make(codec: TextCodec, names: GraphNames, write_tsv: Callable[..., Path]) -> Make:
    """Make a data set of rows; images are resized to 90 pixels, and ten bins cover them."""

    def make_dataset(rows: Sequence[Sequence[str]], split: str = "train", **orders: bool) -> SceneGraphDataset:
        options = DatasetOptions(codec, 90, 20, 4, False, SkipBudget(0))
        tsv = TsvFile(write_tsv("train.tsv", rows), "0,3,2")
        return SceneGraphDataset(tsv, options, split, max_image_size=90, names=names, **orders)

    return make_dataset


def test_triplets_become_names_and_bins_in_the_order_of_reading(
    make: Make, codec: TextCodec, scene_graph_rows: Rows
) -> None:
    scene_graph_rows[0][2] = (
        "dog 4,0,8,6 | on | red hat 0,0,4,3&&red hat 0,0,4,3 | left of | dog 4,0,8,6&&dog 4,0,8,6 | on | dog 0,3,8,6"
    )
    three, _, none = (make(scene_graph_rows).sample(row) for row in range(3))
    dog = "dog<bin_4><bin_0><bin_9><bin_9>"
    hat = "red hat<bin_0><bin_0><bin_4><bin_4>"
    expected = f"{hat} left_of {dog} {dog} on {hat} {dog} on dog<bin_0><bin_4><bin_9><bin_9>"
    assert codec.decode(three["target"]).replace("> ", ">") == expected.replace("> ", ">")
    assert three["region_coord"].tolist()[:2] == [[4, 0, 8, 6], [0, 0, 4, 3]]
    assert none["target"].tolist() == [codec.dictionary.eos()]
    assert none["region_coord"].shape == (0, 4)


def test_a_batch_holds_the_graphs(make: Make, codec: TextCodec, scene_graph_rows: Rows) -> None:
    dataset = make(scene_graph_rows)
    batch = dataset.collater([dataset[row] for row in range(3)])
    assert batch["graphs"] == [row[2] for row in scene_graph_rows]
    assert codec.decode(batch["net_input"]["src_tokens"][0]) == "what are the relations in the image?"
    blanks = 5  # in 0,0 and 4,4 of the hat, in 0,0 of the dog on the left, and in 9,9 of the other twice
    assert dataset.min_queries(0) == len(dataset.sample(0)["target"]) - 1 + blanks


def test_triplets_with_equal_bins_are_one(make: Make, scene_graph_rows: Rows) -> None:
    scene_graph_rows[1][2] = "dog 0,0,4,3 | on | dog 0,0,8,6&&dog 0,0,4.1,3 | on | dog 0,0,8,6"
    dataset = make(scene_graph_rows)
    assert len(dataset.sample(1)["target"]) == 1 + len(dataset.target_tokens(1, dataset.tsv[1]))
    assert len(dataset.sample(1)["target"]) < len(dataset.sample(0)["target"])


def test_each_epoch_may_learn_another_order(make: Make, scene_graph_rows: Rows) -> None:
    orders: dict[str, set[tuple[int, ...]]] = {split: set() for split in ("train", "valid")}
    for split, seen in orders.items():
        dataset = make(scene_graph_rows, split, random_order=True)
        for epoch in range(1, 9):
            dataset.set_epoch(epoch)
            seen.add(tuple(dataset.sample(0)["target"].tolist()))
    assert [len(orders[split]) for split in ("train", "valid")] == [2, 1]


@pytest.mark.parametrize(
    ("column", "reason"),
    [
        ("cat 0,0,4,3 | on | dog 0,0,8,6", "the name 'cat' is not in --names-file"),
        ("dog 0,0,4,3 | under | dog 0,0,8,6", "the name 'under' is not in --names-file"),
        ("dog 0,0,4,3 | on | dog 0,0,80,6", "lies outside the image"),
        ("&&".join(f"dog 0,0,{edge},3 | on | dog 0,0,8,6" for edge in range(1, 8)), "has 7 triplets, .* at most 6"),
        ("a dog", "is no triplet"),
    ],
)
def test_bad_rows_say_why(make: Make, scene_graph_rows: Rows, column: str, reason: str) -> None:
    scene_graph_rows[1][2] = column
    with pytest.raises(BadRow, match=f"train.tsv:2: .*{reason}"):
        make(scene_graph_rows).sample(1)


@pytest.mark.parametrize(
    ("nouns", "relations", "reason"),
    [
        (["dog"], [], "1 nouns and 0 relations"),
        (["dog"], ["on_top"], "the relation 'on_top' has a `_`"),
        (["d☃g"], ["on"], "0 nouns and 1 relations can be spelled"),
    ],
)
def test_names_that_cannot_be_used_are_refused(
    codec: TextCodec, nouns: list[str], relations: list[str], reason: str
) -> None:
    with pytest.raises(InputError, match=reason):
        GraphNames(nouns, relations, codec)


def test_names_that_cannot_be_spelled_are_left_out(codec: TextCodec, caplog: pytest.LogCaptureFixture) -> None:
    assert list(GraphNames(["dog", "d☃g"], ["on"], codec).nouns) == ["dog"]
    assert "cannot spell 1 names of --names-file, such as 'd☃g'" in caplog.text


def test_names_of_other_files_are_refused(codec: TextCodec, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file; give a list of names"):
        GraphNames.of_file(tmp_path / "names.json", codec)
    (tmp_path / "names.json").write_text(json.dumps({"nouns": ["dog"]}))
    with pytest.raises(InputError, match="label_to_idx"):
        GraphNames.of_file(tmp_path / "names.json", codec)


def test_triplets_are_found_in_texts() -> None:
    hat, dog = (0, 0, 4, 4), (4, 0, 9, 9)
    assert triplets_in(HAT_ON_DOG) == [("red hat", hat, "on", "dog", dog)]
    other = "dog<bin_4><bin_0><bin_9><bin_9> to_the_left_of red hat<bin_0><bin_0><bin_4><bin_4>"
    assert triplets_in(f"{HAT_ON_DOG} {other}")[1:] == [("dog", dog, "to the left of", "red hat", hat)]  # type: ignore[index]
    assert triplets_in(" ") == []
    for text in ("dog", HAT_ON_DOG[:-8], f"{HAT_ON_DOG} dog", HAT_ON_DOG.replace(" on", ""), "<bin_0>" * 8):
        assert triplets_in(text) is None


def test_a_vocabulary_learns_names_without_boxes() -> None:
    column = "dog 12,40,96.5,131 | left of | red mat 0,90,150,160&&cat 1,2,3,4 | on | dog 12,40,96.5,131"
    assert sayings(column) == ["dog", "left_of", "red mat", "cat", "on", "dog"]
    assert sayings("a dog | a cat") == ["a dog  a cat"]


def test_scenes_relate_each_two_objects_once() -> None:
    left, right, below = Thing((0, 0.4, 0.2, 0.6)), Thing((0.7, 0.4, 0.9, 0.6)), Thing((0.02, 0.7, 0.2, 0.9))
    near = Thing((0.05, 0.45, 0.2, 0.6))
    groups = (Group("dog", "", (right, left)), Group("cat", "", (below,)), Group("hat", "", (near,)))
    row = scene_graph_row(Example("one", Scene(groups, None), "IMAGE", 100, ()), None)  # type: ignore[arg-type]
    triplets = read_triplets(row[2], "one")
    assert [(one.subject.noun, one.relation, one.object.noun) for one in triplets] == [
        ("dog", "left of", "dog"),
        ("cat", "left of", "dog"),  # and below it
        ("hat", "left of", "dog"),
        ("dog", "above", "cat"),
        ("hat", "above", "cat"),
    ]
    assert triplets[0].subject.box == (0, 40, 20, 60)
    assert row[0] == row[1] == "one" and row[3] == "IMAGE"
