"""Columns of triplets: round trips of any names and boxes, hostile columns, and what is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from narvl_plugin.data.triplets import (
    LONGEST_NAME,
    MOST_TRIPLETS,
    Instance,
    Triplet,
    clean_name,
    read_triplets,
    write_triplets,
)
from narvl_plugin.errors import BadRow

DOG = Instance("dog", (12, 40, 96.5, 131))
MAT = Instance("mat", (0, 90, 150, 160))
CAT = Instance("cat", (100, 20, 140, 90))
COLUMN = "dog 12,40,96.5,131 | on | mat 0,90,150,160&&cat 100,20,140,90 | left of | dog 12,40,96.5,131"
TRIPLETS = [Triplet(DOG, "on", MAT), Triplet(CAT, "left of", DOG)]

spans = st.tuples(st.integers(-100, 6_553_400), st.integers(1, 6_553_500))  # hundredths of a pixel: begin and length
boxes = st.tuples(spans, spans).map(
    lambda sides: tuple([begin / 100 for begin, _ in sides] + [(begin + length) / 100 for begin, length in sides])
)
names = st.text(max_size=12).map(lambda text: clean_name(text) or "dog")
instances = st.builds(Instance, names, boxes)
graphs = st.lists(st.builds(Triplet, instances, names, instances), max_size=5, unique=True)


def test_the_column_of_the_module_is_read_and_written() -> None:
    assert read_triplets(COLUMN, "a.tsv:1") == TRIPLETS
    assert write_triplets(TRIPLETS) == COLUMN


@pytest.mark.parametrize("column", ["", "  "])
def test_an_empty_column_is_a_graph_without_triplets(column: str) -> None:
    assert read_triplets(column, "a.tsv:1") == []
    assert write_triplets([]) == ""


def test_spaces_beside_separators_do_not_matter() -> None:
    assert read_triplets(COLUMN.replace(" | ", "|").replace("&&", " && "), "a.tsv:1") == TRIPLETS


@given(graphs)
def test_what_is_written_is_read_back(triplets: list[Triplet]) -> None:
    column = write_triplets(triplets)
    assert read_triplets(column, "a.tsv:1") == triplets
    assert "\t" not in column and len(column.splitlines()) <= 1
    column.encode()


@given(st.text(st.characters() | st.sampled_from("|& \t\n\r\ud800\u2028\x85\x1b\u202e"), max_size=20))
def test_any_text_becomes_a_name_that_a_column_can_hold(text: str) -> None:
    name = clean_name(text)
    assert clean_name(name) == name
    triplet = Triplet(Instance(name, DOG.box), name, MAT)
    if name:
        assert read_triplets(write_triplets([triplet]), "a.tsv:1") == [triplet]
    else:
        with pytest.raises(ValueError, match="'' is no name"):
            write_triplets([triplet])


@given(
    st.text(st.sampled_from("dc 0123456789,.-e|&\t\n\ud800é"))
    | st.lists(st.sampled_from(COLUMN.split(" "))).map(" ".join)
)
def test_a_hostile_column_is_refused_or_means_what_is_written_again(column: str) -> None:
    try:
        triplets = read_triplets(column, "a.tsv:1")
    except BadRow as error:
        assert str(error).startswith("a.tsv:1: ")
    else:
        assert read_triplets(write_triplets(triplets), "a.tsv:1") == triplets


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("dog 1,2,3,4 | on", "'dog 1,2,3,4 | on' is no triplet; expected `noun x0,y0,x1,y1 | relation"),
        ("dog 1,2,3,4 | on | mat 1,2,3,4 | on | dog 1,2,3,4", "is no triplet"),
        (COLUMN + "&&", "'' is no triplet"),
        ("dog 1,2,3,4 | on | " + "m" * 500, "is no triplet; .* at most 500 characters"),
        ("dog | on | mat 1,2,3,4", "'dog' is no box; expected x0,y0,x1,y1 in pixels"),
        ("dog 1,2,3 | on | mat 1,2,3,4", "'1,2,3' is no box"),
        ("dog 1,2,nan,4 | on | mat 1,2,3,4", "'1,2,nan,4' is no box"),
        ("dog 1,2,1e99,4 | on | mat 1,2,3,4", "'1,2,1e99,4' is no box"),
        ("dog 5,2,3,4 | on | mat 1,2,3,4", "the box 5,2,3,4 is empty"),
        ("dog 1,2,1.001,4 | on | mat 1,2,3,4", "the box 1,2,1.001,4 is empty with edges rounded to two decimals"),
        ("1,2,3,4 | on | mat 1,2,3,4", "'' is no name"),
        ("dog 1,2,3,4 | | mat 1,2,3,4", "'' is no name"),
        ("a  dog 1,2,3,4 | on | mat 1,2,3,4", "'a  dog' is no name; .* single spaces"),
        ("R&B 1,2,3,4 | on | mat 1,2,3,4", "'R&B' is no name; .* no `&`"),
        ("dog 1,2,3,4 | o\x1bn | mat 1,2,3,4", r"'o\\x1bn' is no name"),
        (f"{'d' * 101} 1,2,3,4 | on | mat 1,2,3,4", "is no name; expected 1 to 100 characters"),
        (
            "dog 1,2,3,4 | on | mat 1,2,3,4&&dog 1,2.0,3,4.001|on|mat 1,2,3,4",
            "holds the triplet 'dog 1,2,3,4 | on .* twice",
        ),
    ],
)
def test_what_is_no_set_of_triplets_is_named(column: str, message: str) -> None:
    with pytest.raises(BadRow, match=f"a.tsv:7: .*{message.replace('|', '[|]')}"):
        read_triplets(column, "a.tsv:7")


def test_numbers_and_lengths_are_bounded() -> None:
    many = [Triplet(DOG, f"on {number}", MAT) for number in range(MOST_TRIPLETS)]
    assert read_triplets(write_triplets(many), "a.tsv:1") == many
    with pytest.raises(BadRow, match="has 1001 triplets, and at most 1000 are read; delete some"):
        read_triplets(write_triplets(many) + "&&" + COLUMN.split("&&")[0], "a.tsv:1")
    longest = Triplet(Instance("d" * LONGEST_NAME, (10000.25, 10000.25, 65535.75, 65535.75)), "o" * LONGEST_NAME, MAT)
    longest = longest._replace(object=longest.subject)
    assert read_triplets(write_triplets([longest]), "a.tsv:1") == [longest]


@pytest.mark.parametrize(
    ("triplet", "message"),
    [
        (Triplet(DOG, "on | the", MAT), "is no triplet"),
        (Triplet(DOG, "on&&under", MAT), "is no triplet"),
        (Triplet(DOG, " on", MAT), "is read as other triplets"),
        (Triplet(DOG, "on\t", MAT), "is read as other triplets"),
        (Triplet(DOG._replace(noun="a\tdog"), "on", MAT), "is no name"),
        (Triplet(DOG._replace(box=(1, 2, 1, 4)), "on", MAT), "the box 1,2,1,4 is empty"),
        (Triplet(DOG._replace(box=(1, 2, float("nan"), 4)), "on", MAT), "is no box"),
        (Triplet(DOG._replace(box=(1, 2, float("inf"), 4)), "on", MAT), "is no box"),
    ],
)
def test_what_a_column_cannot_hold_is_not_written(triplet: Triplet, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_triplets([triplet])


def test_edges_are_rounded_and_triplets_that_become_equal_are_refused() -> None:
    near = Triplet(DOG._replace(box=(12.001, 40, 96.5, 131)), "on", MAT)
    assert write_triplets([near]) == COLUMN.split("&&")[0]
    with pytest.raises(ValueError, match="twice"):
        write_triplets([TRIPLETS[0], near])
