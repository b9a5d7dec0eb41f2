"""What the first rows say about --selected-cols: wrong columns are refused or warned of, and unusual ones are not."""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import permutations
from pathlib import Path

import pytest

from narvl_plugin.data.caption import CaptionDataset
from narvl_plugin.data.columns import Kind, check_columns, kind_of
from narvl_plugin.data.refcoco import RefcocoDataset
from narvl_plugin.data.regions import RegionsDataset
from narvl_plugin.data.snli_ve import SnliVeDataset
from narvl_plugin.data.tsv import TsvFile
from narvl_plugin.data.vqa_gen import VqaGenDataset
from narvl_plugin.errors import InputError
from narvl_plugin.tasks.registered import CaptionConfig, CaptionTask

IMAGE = "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAGCAIAAABxZ0isAAAAF0lEQVR4nGM4ISCAFTHgEhcQGGQ6AKljGOFHFTDgAAAAAElFTkSuQmCC"
SENTENCES = (
    *("a man in a hat rides a horse", "two dogs run on the beach", "the blue bus stops at a corner"),
    *("a cat sleeps under the old table", "a bird and a boat on the water"),
)
HYPOTHESES = ("a man is outdoors", "the dogs are asleep", "a bus", "an old cat", "there is a bird")
OBJECTS = ("man&&hat&&horse", "dog&&dog&&beach", "bus&&street corner", "cat&&table", "bird&&boat&&water")
BOXES = ("0,0,4,3", "1,2,7,5", "2.5,1,8,6", "0,0,8,6", "3,3,5,5")
SETS_OF_BOXES = ("0,0,4,3&&1,2,7,5", "", "2.5,1,8,6", "0,0,8,6&&1,2,7,5&&0,0,4,3", "3,3,5,5")
ANSWERS = ("1.0|!+yes", "0.6|!+two&&0.3|!+three", "1.0|!+blue", "0.9|!+cat", "1|!+2")
LABELS = ("entailment", "contradiction", "neutral", "entailment", "neutral")
QUESTIONS = (
    "is the man on a horse",
    "how many dogs run",
    "what is blue",
    "where is the cat",
    "how many birds are there",
)
IDS, IMAGE_IDS, IMAGES = [f"{row}" for row in range(5)], [f"img-{row}" for row in range(5)], [IMAGE] * 5
FILES = {
    "caption": (IDS, IMAGE_IDS, SENTENCES, OBJECTS, IMAGES),
    "refcoco": (IDS, IMAGE_IDS, ("man left", "the dog", "bus", "old cat", "bird on boat"), BOXES, IMAGES),
    "regions": (IDS, IMAGE_IDS, ("all men", "every dog", "bus", "old cats", "birds on boats"), SETS_OF_BOXES, IMAGES),
    "vqa_gen": (IDS, IMAGE_IDS, QUESTIONS, ANSWERS, OBJECTS, IMAGES),
    "snli_ve": (IDS, IMAGE_IDS, IMAGES, HYPOTHESES, SENTENCES, LABELS),
}
NAMES = {
    "caption": CaptionDataset.column_names,
    "refcoco": RefcocoDataset.column_names,
    "regions": RegionsDataset.column_names,
    "vqa_gen": VqaGenDataset.column_names,
    "snli_ve": SnliVeDataset.column_names,
}
RIGHT = {
    "caption": (4, 2),
    "refcoco": (4, 2, 3),
    "regions": (4, 2, 3),
    "vqa_gen": (5, 2, 3, 4),
    "snli_ve": (2, 3, 4, 5),
}
"""After the id, which may be the row's or the image's."""


@pytest.fixture
def check(
    write_tsv: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> Callable[[str, tuple[int, ...], tuple[object, ...]], str]:
    """Give a function that checks selected columns of a file; returns what is said, and raises what is refused."""

    def run(task: str, selected: tuple[int, ...], columns: tuple[object, ...]) -> str:
        caplog.clear()
        with caplog.at_level(logging.WARNING, "narvl_plugin.data.columns"):
            tsv = TsvFile(write_tsv("rows.tsv", list(zip(*columns, strict=True))), selected)
            check_columns(tsv, NAMES[task])
        return "\n".join(caplog.messages)

    return run


@pytest.mark.parametrize("task", NAMES)
def test_no_order_but_the_right_one_is_read_in_silence(
    task: str, write_tsv: Callable[..., Path], check: object
) -> None:
    tsv = TsvFile(write_tsv("rows.tsv", list(zip(*FILES[task], strict=True))), [0])
    silent = []
    logger = logging.getLogger("narvl_plugin.data.columns")
    said: list[logging.LogRecord] = []
    logger.addFilter(said.append)  # type: ignore[arg-type]  # which also lets none through
    for order in permutations(range(len(FILES[task])), len(NAMES[task])):
        said.clear()
        tsv.columns = list(order)
        try:
            check_columns(tsv, NAMES[task])
        except InputError:
            continue
        if not said:
            silent.append(order)
    logger.removeFilter(said.append)  # type: ignore[arg-type]
    assert silent == [(0, *RIGHT[task]), (1, *RIGHT[task])]


@pytest.mark.parametrize(
    ("task", "selected", "refusal"),
    [
        ("caption", (0, 2, 4), "column 2 is read as the image, and looks like sentences; column 4 looks right"),
        ("caption", (2, 4, 0), "column 0 is read as the caption, and looks like ids; column 2 looks right"),
        ("caption", (0, 4, 4), "column 4 is read as the caption, and looks like images"),
        ("caption", (4, 4, 2), "column 4 is read as the id, and looks like images"),
        ("vqa_gen", (0, 5, 1, 3, 4), "column 1 is read as the question, and looks like ids; column 2 looks right"),
        ("refcoco", (0, 4, 3, 2), r"column 3 is read as the text, and looks like boxes \(x0,y0,x1,y1\); column 2"),
        ("refcoco", (0, 4, 1, 3), "column 1 is read as the text, and looks like ids; column 2 looks right"),
        ("vqa_gen", (0, 5, 3, 2, 4), "column 3 is read as the question, and looks like answers with their"),
        ("vqa_gen", (0, 5, 2, 4, 3), "column 4 is read as the answers, and looks like names of objects; column 3"),
        ("snli_ve", (0, 2, 5, 4, 3), "column 5 is read as the hypothesis, and looks like labels of entailment"),
        ("snli_ve", (0, 2, 3, 5, 4), "column 4 is read as the label, and looks like sentences; column 5 looks right"),
    ],
)
def test_a_column_of_another_kind_is_refused(
    check: Callable[..., str], task: str, selected: tuple[int, ...], refusal: str
) -> None:
    with pytest.raises(InputError, match=rf"rows\.tsv: {refusal}.*\(--selected-cols {','.join(map(str, selected))} "):
        check(task, selected, FILES[task])


@pytest.mark.parametrize(
    ("task", "selected", "warning"),
    [
        (
            "caption",
            (0, 4, 3),
            "column 3 is read as the caption, and looks like names of objects; column 2 looks right",
        ),
        ("vqa_gen", (0, 5, 4, 3, 2), "column 4 is read as the question, and looks like names of objects; column 2"),
        ("vqa_gen", (0, 5, 4, 3, 2), "column 2 is read as the objects, and looks like sentences; column 4 looks right"),
        ("snli_ve", (0, 2, 4, 3, 5), "if these are exchanged, exchange their numbers in --selected-cols"),
        ("caption", (2, 4, 2), "column 2 is read as the id, and looks like sentences; column 0 or 1 looks right"),
    ],
)
def test_a_doubtful_column_is_warned_of(
    check: Callable[..., str], task: str, selected: tuple[int, ...], warning: str
) -> None:
    assert warning in check(task, selected, FILES[task])


UNUSUAL = {
    "captions of one word": (
        "caption",
        (0, 4, 2),
        (IDS, IMAGE_IDS, ["cat", "dog", "bus", "hat", "cat"], [""] * 5, IMAGES),
    ),
    "captions of one word beside names of objects": (
        *("caption", (0, 4, 2)),
        (IDS, IMAGE_IDS, ["cat", "dog", "bus", "hat", "cat"], OBJECTS, IMAGES),
    ),
    "several references": (
        *("caption", (1, 4, 2)),
        (IDS, IMAGE_IDS, [f"{text}&&{text}&&a cat" for text in SENTENCES], OBJECTS, IMAGES),
    ),
    "plates to read off": (
        *("caption", (0, 4, 2)),
        (IDS, IMAGE_IDS, ["AB-123", "X9", "B-XY12", "77", "LK4"], OBJECTS, IMAGES),
    ),
    "counts, and sentences in another column": (
        "caption",
        (0, 4, 2),
        (IDS, IDS, ["3", "1", "2", "3", "1"], *FILES["caption"][2::2]),
    ),
    "names of files to read off": (
        *("caption", (0, 4, 2)),
        (IDS, IMAGE_IDS, ["a.png", "b c.jpg", "x.gif", "y.jpeg", "z.png"], OBJECTS, IMAGES),
    ),
    "labels as captions": ("caption", (0, 2, 1), (IDS, LABELS, IMAGES)),
    "boxes as captions": ("caption", (0, 2, 1), (IDS, BOXES, IMAGES)),
    "hypotheses that are numbers": (
        *("snli_ve", (0, 2, 3, 4, 5)),
        (IDS, IMAGE_IDS, IMAGES, ["1", "2", "2", "1", "4"], SENTENCES, LABELS),
    ),
    "ids that are hashes which begin like a JPEG": (
        *("caption", (0, 4, 2)),
        ([f"/9j/{40 * 'x'}{row}" for row in range(5)], IMAGE_IDS, SENTENCES, OBJECTS, IMAGES),
    ),
    "Chinese beside English": (
        *("caption", (0, 4, 2)),
        (IDS, IMAGE_IDS, ["一个男人骑着马", "两只狗在跑", "蓝色的车", "猫在睡觉", "鸟和船在"], SENTENCES, IMAGES),
    ),
    "another language": (
        *("caption", (0, 4, 2)),
        (
            IDS,
            IMAGE_IDS,
            ["ein Hund", "zwei rote Katzen", "馬", "чёрный кот", "un chat"],
            SENTENCES[:1] + ("x",) * 4,
            IMAGES,
        ),
    ),
    "columns in an order of one's own": ("caption", (1, 0, 2), (IMAGES, IDS, SENTENCES)),
    "ids that are words": ("caption", (0, 2, 1), (["tom", "eva", "ann", "ida", "leo"], SENTENCES, IMAGES)),
    "ids that are names of image files": (
        *("caption", (1, 1, 2)),
        (IDS, [f"{row}.jpg" for row in range(5)], SENTENCES),
    ),
    "no objects, and another column in their place": (
        "vqa_gen",
        (0, 4, 2, 3, 2),
        (IDS, IDS, HYPOTHESES, ANSWERS, IMAGES),
    ),
    "no captions, and another column in their place": (
        "snli_ve",
        (0, 2, 3, 3, 4),
        (IDS, IDS, IMAGES, HYPOTHESES, LABELS),
    ),
    "one row": ("caption", (0, 4, 2), tuple(column[:1] for column in FILES["caption"])),
    "empty values": ("vqa_gen", (0, 5, 2, 3, 4), (*FILES["vqa_gen"][:4], [""] * 5, IMAGES)),
    "a broken image": ("caption", (0, 4, 2), (IDS, IMAGE_IDS, SENTENCES, OBJECTS, [*IMAGES[:4], "broken"])),
    "a broken image alone": ("caption", (0, 1, 2), (IDS[:1], ["broken"], SENTENCES[:1])),
    "telegrams": (
        *("refcoco", (0, 4, 2, 3)),
        (IDS, IMAGE_IDS, ["left man", "woman", "red", "dog 2", "guy blue"], BOXES, IMAGES),
    ),
}


WARNED_OF = (
    *("plates to read off", "counts, and sentences in another column", "names of files to read off"),
    *("labels as captions", "boxes as captions", "hypotheses that are numbers"),
    "ids that are hashes which begin like a JPEG",
)


@pytest.mark.parametrize("case", UNUSUAL)
def test_what_is_unusual_is_not_refused(check: Callable[..., str], case: str) -> None:
    said = check(*UNUSUAL[case])
    assert not said or case in WARNED_OF or "in their place" in case


def test_names_of_image_files_are_refused_as_captions_where_files_have_ids_or_as_the_image(
    check: Callable[..., str],
) -> None:
    names = [f"COCO_{row}.jpg" for row in range(5)]
    for selected, columns in (
        ((0, 4, 1), (IDS, names, SENTENCES, OBJECTS, IMAGES)),
        ((0, 2, 2), (IDS, SENTENCES, names)),
    ):
        with pytest.raises(InputError, match="is read as the caption, and looks like paths of image files"):
            check("caption", selected, columns)


def test_files_are_checked_as_a_task_opens_them(write_tsv: Callable[..., Path], vocabulary: Path) -> None:
    file = write_tsv("rows.tsv", list(zip(*FILES["caption"], strict=True)))
    options = CaptionConfig(data=str(file), bpe_dir=str(vocabulary), num_bins=10, selected_cols="0,4,1")
    for split in ("train", "test"):
        with pytest.raises(InputError, match="column 1 is read as the caption, and looks like ids"):
            CaptionTask.setup_task(options).load_dataset(split)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ("", Kind.EMPTY),
        (" ", Kind.EMPTY),
        (IMAGE, Kind.IMAGE),
        (IMAGE.replace("/", "_").replace("+", "-"), Kind.IMAGE),
        ("/9j/4AAQSkZJRgABAQAAAQABAAD" + 1000 * "A", Kind.IMAGE),
        ("pictures/cat.JPEG", Kind.PATH),
        ("features/1.npy", Kind.PATH),
        ("0,1, 2.5,3e2", Kind.BOX),
        ("0,1,2", Kind.TEXT),
        ("neutral", Kind.LABEL),
        ("0.3|!+a dog&&1|!+cat", Kind.ANSWERS),
        ("a dog&&1|!+cat", Kind.TEXT),
        ("train-000001", Kind.ID),
        ("cat", Kind.TEXT),
        ("3 cats", Kind.TEXT),
    ],
)
def test_kinds_of_values(value: str, kind: Kind) -> None:
    assert kind_of(value) is kind
