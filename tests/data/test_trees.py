"""Trees as bracketed text: they are read as written, and what is wrong with a column is said."""

import pytest

from narvl_plugin.data.text import sayings
from narvl_plugin.data.trees import Node, read_tree, tree_in, write_tree
from narvl_plugin.errors import BadRow

TREE = Node(
    "red plain", (Node("left", (Node("small red hat"), Node("dog"), Node("dog"))), Node("right", (Node("dog"),)))
)
TEXT = "( red plain ( left ( small red hat ) ( dog ) ( dog ) ) ( right ( dog ) ) )"


def test_a_tree_is_read_as_it_is_written() -> None:
    assert write_tree(TREE) == TEXT
    assert read_tree(TEXT, "row") == tree_in("(red  plain(left(small red hat)(dog)(dog))(right (dog)))") == TREE
    assert read_tree("( red )", "row") == Node("red")


def test_the_order_of_children_has_no_meaning() -> None:
    other = "( red plain ( right ( dog ) ) ( left ( dog ) ( small red hat ) ( dog ) ) )"
    assert read_tree(other, "row") != TREE
    assert read_tree(other, "row").canonical() == TREE.canonical()
    assert read_tree(other.replace("small ", ""), "row").canonical() != TREE.canonical()


@pytest.mark.parametrize(
    ("column", "reason"),
    [
        ("", "it is empty"),
        ("dog", "'dog' is outside its brackets"),
        ("( red ) dog", "'dog' is outside"),
        ("( red ) ( blue )", r"'\(' is outside"),
        ("( red ) )", r"'\)' is outside"),
        ("( red ( left ( dog ) )", "a bracket is not closed"),
        ("( ( left ( dog ) ) )", "a node has no label"),
        ("( red ( ) )", "a node has no label"),
        ("( red ( left ( dog ) ) plain )", "the word 'plain' follows a child"),
        ("( red ( left ( dog ( ear ) ) ) )", "it has more than 3 levels"),
        ("(" * 9_000, "a node has no label"),
        ("( a" * 4_000, "the tree has 12,000 characters, and at most 10,000 are read"),
    ],
)
def test_a_column_that_is_no_tree_says_why(column: str, reason: str) -> None:
    with pytest.raises(BadRow, match=f"^train.tsv:7: .*{reason}"):
        read_tree(column, "train.tsv:7")
    assert tree_in(column) is None


def test_a_vocabulary_learns_trees_with_their_brackets() -> None:
    assert sayings("(red plain (left (dog)))") == ["( red plain ( left ( dog ) ) )"]
    assert sayings("(a dog)") == ["a dog"]  # a caption in brackets
