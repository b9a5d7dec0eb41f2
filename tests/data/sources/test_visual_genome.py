"""Visual Genome: whole rows of triplets, names and boxes at the border, lists of names, and hostile files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from narvl_plugin.data.sources.visual_genome import convert_visual_genome
from narvl_plugin.data.sources.writing import ImageFolder
from narvl_plugin.data.triplets import Instance, Triplet, read_triplets
from narvl_plugin.errors import BadRow, InputError, MissingInput

DOG, MAT, CAT = (12, 40, 84, 91), (0, 90, 150, 70), (100, 20, 40, 70)


def thing(key: int, box: Any, *names: str, one_name: bool = False) -> dict[str, Any]:
    """Return a subject or an object, with all that is published of it."""
    x, y, w, h = box
    said = {"name": names[0]} if one_name else {"names": list(names)}
    return {"object_id": key, "x": x, "y": y, "w": w, "h": h, "synsets": [f"{key}.n.01"], **said}


def relationship(subject: dict[str, Any], predicate: Any, other: dict[str, Any]) -> dict[str, Any]:
    return {
        "relationship_id": 15927,
        "predicate": predicate,
        "synsets": ["along.r.01"],
        "subject": subject,
        "object": other,
    }


ON_MAT = relationship(thing(1, DOG, "Dog", "puppy"), "ON", thing(2, MAT, "mat", one_name=True))
LEFT = relationship(thing(3, CAT, "cat"), "to the\tleft of", thing(1, DOG, "dog"))
RELATED = {
    1: [ON_MAT, LEFT, ON_MAT],
    2: [
        relationship(thing(4, (-1, -2, 10, 20), "R&B |\nband"), "on&&under", thing(5, (190, 140, 50, 50), "stage")),
        relationship(thing(4, DOG, ""), "on", thing(5, MAT, "mat")),
        relationship(thing(4, DOG), "on", thing(5, MAT, "mat")),
        relationship(thing(4, DOG, "dog"), " \t", thing(5, MAT, "mat")),
        relationship(thing(4, DOG, "dog" * 50), "on", thing(5, MAT, "mat")),
        relationship(thing(4, DOG, "dog"), "on", thing(5, (0, 0, 0, 9), "mat")),
        relationship(thing(4, DOG, "dog"), "on", thing(5, (300, 0, 9, 9), "mat")),
    ],
    3: [],
    4: [ON_MAT],
    5: [LEFT],
}
SPLITS = {"train": [1, 2, 3], "val": [4], "test": [5]}
NAMES = {"label_to_idx": {"dog": 1, "mat": 2}, "predicate_to_idx": {"on": 1}, "idx_to_label": {"1": "dog"}}


@pytest.fixture
def write(write_json: Callable[[str, Any], Path]) -> Callable[..., None]:
    """Give a function that writes the JSON files."""

    def write_all(related: Any = RELATED, splits: Any = SPLITS, size: tuple[int, int] = (200, 150)) -> None:
        width, height = size
        images = [
            {
                "width": width,
                "height": height,
                "image_id": key,
                "url": f"https://x/VG_100K_2/{key}.jpg",
                "coco_id": None,
            }
            for key in RELATED
        ]
        write_json("image_data.json", images)
        published = [{"relationships": found, "image_id": key} for key, found in related.items()]
        write_json("relationships.json", published)
        write_json("vg_splits.json", splits)

    return write_all


@pytest.fixture
def photos(photo: Callable[..., str], write: Callable[..., None]) -> dict[int, str]:
    """Write the data set, and return its photographs, of which the fifth is missing."""
    write()
    return {key: photo(f"{'VG_100K' if key % 2 else 'VG_100K_2'}/{key}.jpg") for key in (1, 2, 3, 4)} | {
        5: photo("VG_100K/5.jpg")
    }


def test_rows(raw: Path, tmp_path: Path, photos: dict[int, str], read_rows: Callable[..., Any]) -> None:
    train, val, test = convert_visual_genome(raw, tmp_path, ImageFolder(raw))
    on_mat, left = (
        "dog 12,40,96,131 | on | mat 0,90,150,150",
        "cat 100,20,140,90 | to the left of | dog 12,40,96,131",
    )
    assert read_rows(train.path) == [
        ["1", "1", f"{on_mat}&&{left}", photos[1]],
        ["2", "2", "r b band 0,0,9,18 | on under | stage 190,140,200,150", photos[2]],
    ]
    assert train.counts == {
        "rows written": 2,
        "boxes clipped": 4,  # the mat twice, the band, the stage
        "repeated triplets left out": 1,
        "triplets left out (no name)": 3,
        "triplets left out (name of more than 100 characters)": 1,
        "triplets left out (box empty or outside the image)": 2,
        "dropped (no triplet)": 1,
    }
    assert read_rows(val.path) == [["4", "4", on_mat, photos[4]]]
    assert read_rows(test.path) == [["5", "5", left, photos[5]]]
    assert read_triplets(on_mat, "here") == [
        Triplet(Instance("dog", (12, 40, 96, 131)), "on", Instance("mat", (0, 90, 150, 150)))
    ]


def test_a_list_of_names_restricts_them(
    raw: Path,
    tmp_path: Path,
    photos: dict[int, str],
    write_json: Callable[[str, Any], Path],
    read_rows: Callable[..., Any],
) -> None:
    names = write_json("VG-SGG-dicts.json", NAMES)
    train, val = convert_visual_genome(raw, tmp_path, ImageFolder(raw), splits=["train", "val"], names=names)
    assert [row[2] for row in read_rows(train.path)] == ["dog 12,40,96,131 | on | mat 0,90,150,150"]
    assert train.counts is not None
    assert train.counts["triplets left out (name not in the list)"] == 1
    assert train.counts["dropped (no triplet)"] == 2
    assert val.counts == {"rows written": 1, "boxes clipped": 1}


def test_a_missing_image_is_counted(raw: Path, tmp_path: Path, photos: dict[int, str]) -> None:
    (raw / "VG_100K/1.jpg").unlink()
    (train,) = convert_visual_genome(raw, tmp_path, ImageFolder(raw), splits=["train"])
    assert train.counts is not None and train.counts["dropped (missing image)"] == 1


def test_all_images_may_lie_in_one_folder(
    raw: Path, tmp_path: Path, photo: Callable[..., str], write: Callable[..., None]
) -> None:
    write()
    for key in RELATED:
        photo(f"VG_100K/{key}.jpg")
    assert len(list(convert_visual_genome(raw, tmp_path, ImageFolder(raw)))) == 3


def test_rows_of_too_many_triplets_are_dropped(
    raw: Path, tmp_path: Path, photos: dict[int, str], write: Callable[..., None]
) -> None:
    dog, mat = thing(1, DOG, "dog"), thing(2, MAT, "mat")
    many = [relationship(dog, f"on {number}", mat) for number in range(1001)]
    write({**RELATED, 2: many})
    (train,) = convert_visual_genome(raw, tmp_path, ImageFolder(raw), splits=["train"])
    assert train.counts is not None and train.counts["dropped (more than 1000 triplets)"] == 1


@pytest.mark.parametrize(
    "gone", ["image_data.json", "relationships.json", "vg_splits.json", "VG-SGG-dicts.json", "VG_100K"]
)
def test_missing_input_is_named_before_anything_is_written(
    raw: Path, tmp_path: Path, photos: dict[int, str], write_json: Callable[[str, Any], Path], gone: str
) -> None:
    names = write_json("VG-SGG-dicts.json", NAMES)
    (raw / gone).rename(raw / "elsewhere")
    if gone == "VG_100K":
        (raw / "VG_100K_2").rename(raw / "elsewhere, too")
    with pytest.raises(MissingInput, match=rf"{gone}: no such .*; unpack image_data.json.zip"):
        list(convert_visual_genome(raw, tmp_path / "out", ImageFolder(raw), names=names))
    assert not (tmp_path / "out").exists()


GOOD = thing(1, DOG, "dog")


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ("on", r"relationships.json\[0\].relationships\[0\]: is a str, not an object with predicate"),
        (relationship(GOOD, 7, GOOD), r"relationships\[0\]: predicate is 7, not of type str"),
        ({"predicate": "on", "subject": GOOD}, r"relationships\[0\]: has no field 'object'"),
        (relationship(GOOD, "on", []), "object is \\[\\], not of type dict"),
        (relationship({"names": ["dog"]}, "on", GOOD), r"\[0\].subject: has x, y, w, h \[None, .*, not 4 numbers"),
        (relationship(thing(1, (1, 2, "3", 4), "dog"), "on", GOOD), r"\.subject: has x, y, w, h .*, not 4 numbers"),
        (relationship(GOOD, "on", thing(1, (1, 2, float("nan"), 4), "x")), r"\.object: has x, y, w, h .*, not 4"),
        (relationship(GOOD, "on", thing(1, (1, 2, 3, 10**400), "x")), r"\.object: has x, y, w, h .*, not 4 numbers"),
        (relationship({**GOOD, "names": "dog"}, "on", GOOD), r"\.subject: has names 'dog', not a list of texts"),
        (relationship({**GOOD, "names": [7]}, "on", GOOD), r"has names \[7\], not a list of texts"),
        (relationship({**thing(1, DOG, "x", one_name=True), "name": 7}, "on", GOOD), r"has names \[7\], not a list"),
    ],
)
def test_a_relationship_that_is_not_as_published_is_named(
    raw: Path, tmp_path: Path, photos: dict[int, str], write: Callable[..., None], found: Any, message: str
) -> None:
    write({1: [found]})
    with pytest.raises(BadRow, match=message):
        list(convert_visual_genome(raw, tmp_path, ImageFolder(raw)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("image_data.json", {}, "image_data.json: is a dict, not a list"),
        ("image_data.json", [{"image_id": "1"}], r"image_data.json\[0\]: image_id is '1', not of type int"),
        ("relationships.json", [{"image_id": 1}], r"relationships.json\[0\]: has no field 'relationships'"),
        ("relationships.json", [{"image_id": 1, "relationships": []}] * 2, r"\[1\]: has the image_id 1 again"),
        ("vg_splits.json", {"train": [1]}, "vg_splits.json: has no field 'val'"),
        (
            "vg_splits.json",
            {**SPLITS, "val": [4, 999]},
            "vg_splits.json:val: 999 is not among the images of .*image_data",
        ),
        ("vg_splits.json", {**SPLITS, "val": ["../../etc/passwd"]}, "'../../etc/passwd' is not among the images"),
        ("vg_splits.json", {**SPLITS, "val": [[1]]}, r"\[1\] is not among the images"),
        ("vg_splits.json", {**SPLITS, "val": [True]}, "True is not among the images"),
        ("VG-SGG-dicts.json", {"label_to_idx": {}}, "VG-SGG-dicts.json: has no field 'predicate_to_idx'"),
        ("VG-SGG-dicts.json", {"label_to_idx": [], "predicate_to_idx": {}}, "label_to_idx is .*, not of type dict"),
    ],
)
def test_a_file_that_is_not_as_published_is_named(
    raw: Path,
    tmp_path: Path,
    photos: dict[int, str],
    write_json: Callable[[str, Any], Path],
    name: str,
    content: Any,
    message: str,
) -> None:
    names = write_json("VG-SGG-dicts.json", NAMES)
    write_json(name, content)
    with pytest.raises(BadRow, match=message):
        list(convert_visual_genome(raw, tmp_path, ImageFolder(raw), names=names))


@pytest.mark.parametrize("name", ["image_data.json", "relationships.json", "vg_splits.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b"\xff\xfe", b"PK\x03\x04"])
def test_broken_json_is_named(raw: Path, tmp_path: Path, photos: dict[int, str], name: str, content: bytes) -> None:
    (raw / name).write_bytes(content)
    with pytest.raises(BadRow, match=rf"{name}: is not JSON"):
        list(convert_visual_genome(raw, tmp_path, ImageFolder(raw)))


def test_names_of_every_kind_stay_one_cell_of_one_line(
    raw: Path, tmp_path: Path, photos: dict[int, str], write: Callable[..., None], read_rows: Callable[..., Any]
) -> None:
    names = ["a\tb", "a\nb", "a\r\nb", "a && b", "a|!+b", "a | b", "a\u2028b", "a\x1b[2Jb", "a\ud800b", "İ" * 60]
    mat = thing(2, MAT, "mat")
    write({**RELATED, 1: [relationship(thing(1, DOG, name), name, mat) for name in names]})
    (train,) = convert_visual_genome(raw, tmp_path, ImageFolder(raw), splits=["train"])
    first = read_rows(train.path)[0]
    assert len(first) == 4
    found = read_triplets(first[2], "here")
    assert [triplet.relation for triplet in found] == ["a b", "a !+b", "a [2jb"]
    assert train.counts is not None and train.counts["repeated triplets left out"] == 6


def test_links_out_of_the_folder_lead_to_images_alone(raw: Path, tmp_path: Path, photos: dict[int, str]) -> None:
    (tmp_path / "secret").write_text("secret")
    (raw / "VG_100K_2/4.jpg").unlink()
    (raw / "VG_100K_2/4.jpg").symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match=r"no row to write \(1 dropped \(unreadable image\)\)"):
        list(convert_visual_genome(raw, tmp_path / "out", ImageFolder(raw), splits=["val"]))
