"""Files of predictions: official ids, boxes in pixels, labels, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from narvl_plugin.errors import BadRow, InputError, MissingInput
from narvl_plugin.evaluation.benchmarks import evaluate
from narvl_plugin.evaluation.predictions import BinSizes, read_generated, read_predictions, write_predictions

DOG_ON_MAT = {
    "subject": "dog",
    "subject_box": [1, 2, 3, 4],
    "relation": "on",
    "object": "mat",
    "object_box": [0, 0, 9, 9],
}
CAPTIONS = [{"image_id": 74, "caption": "a dog"}, {"image_id": 9, "caption": "a cat"}]


class TestGenerated:
    """The reader of fairseq-generate's files."""

    def test_first_of_several_hypotheses_counts(self, tmp_path: Path) -> None:
        path = tmp_path / "generate-test.txt"
        path.write_text("D-a-1\t-0.5\ta dog \nD-a-1\t-0.9\ta cat\nD-b\t-1.0\t\nD-c\t-1.0\tone\u2028line\n")
        assert read_generated(path) == {"a-1": "a dog", "b": "", "c": "one\u2028line"}

    @pytest.mark.parametrize("mark", ["\r", "\r\r", "\x0b", "\x0c", "\x1c", "\x1e", "\x85", "\u2028", "\u2029", "\t"])
    def test_line_ends_in_a_text_neither_cut_it_nor_make_lines(self, tmp_path: Path, mark: str) -> None:
        path = tmp_path / "generate-test.txt"
        path.write_bytes(f"D-1\t-1\ta cat{mark}D-2\t-1\ton a mat\nD-2\t-1\ta dog\r\n".encode())
        assert read_generated(path) == {"1": f"a cat{mark}D-2\t-1\ton a mat", "2": "a dog"}

    def test_bytes_that_are_no_text_are_named(self, tmp_path: Path) -> None:
        path = tmp_path / "generate-test.txt"
        path.write_bytes(b"D-1\t-1\ta caf\xe9\n")
        with pytest.raises(InputError, match="generate-test.txt: is not UTF-8 text"):
            read_generated(path)

    def test_no_hypothesis_is_an_error(self, tmp_path: Path) -> None:
        path = tmp_path / "generate-test.txt"
        path.write_text("2024 | INFO | nothing\n")
        with pytest.raises(InputError, match="generate-test.txt: holds no D- lines"):
            read_generated(path)


class TestSizesOfBins:
    """They are those with which a file was generated, as it says."""

    SIZES = {"num_bins": 11, "max_image_size": 160, "patch_image_size": 80}

    @pytest.fixture
    def generated(self, tmp_path: Path) -> Path:
        path = tmp_path / "generate-test.txt"
        path.write_text(f"O-\t{json.dumps(self.SIZES)}\nD-1\t-1\t<bin_0>\n")
        return path

    def test_what_generated_a_file_says_them(self, generated: Path, caplog: pytest.LogCaptureFixture) -> None:
        assert BinSizes.of(generated, dict.fromkeys(self.SIZES)) == BinSizes(**self.SIZES)
        assert not caplog.records

    def test_log_lines_may_come_first_and_shards_one_after_the_other(self, generated: Path) -> None:
        content = generated.read_text()
        generated.write_text(f"2024 | INFO | loading\r\n{content}H-1\t-1\tO-\t3\n{content}")
        assert BinSizes.of(generated, {}) == BinSizes(**self.SIZES)
        generated.write_text(content + content.replace("160", "512"))
        with pytest.raises(InputError, match=r"its parts were generated with other sizes \(.*160.*512"):
            BinSizes.of(generated, {})

    def test_what_is_given_otherwise_counts_and_is_warned_of(
        self, generated: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        found = BinSizes.of(generated, {"num_bins": 11, "patch_image_size": 40})
        assert found == BinSizes(**self.SIZES | {"patch_image_size": 40})
        assert [record.getMessage() for record in caplog.records] == [
            f"{generated}: was generated with --patch-image-size 80, now --patch-image-size 40"
        ]

    def test_a_file_that_does_not_say_them_needs_them_given(self, tmp_path: Path) -> None:
        path = tmp_path / "old.txt"
        path.write_text("D-1\t-1\t<bin_0>\n")
        with pytest.raises(
            InputError, match=r"old.txt: does not say the --num-bins .*; give --num-bins as in training"
        ):
            BinSizes.of(path, {})
        assert BinSizes.of(path, self.SIZES) == BinSizes(**self.SIZES)
        with pytest.raises(MissingInput, match="gone.txt: no such file"):
            BinSizes.of(tmp_path / "gone.txt", {})

    @pytest.mark.parametrize("line", ["3", "[" * 900, '{"num_bins": "x"}', '{"num_bins": 1e9}', "[[1]]", "{"])
    def test_a_strangers_line_is_no_more_than_sizes(self, tmp_path: Path, line: str) -> None:
        path = tmp_path / "generate-test.txt"
        path.write_text(f"O-\t{line}\nD-1\t-1\t<bin_0>\n")
        with pytest.raises(InputError, match="generate-test.txt: "):
            BinSizes.of(path, {})


@pytest.mark.parametrize(
    "said",
    [
        {"u0": "a dog", "u1": "a cat"},  # --selected-cols 0,4,2
        {"74": "a dog", "9": "a cat"},  # --selected-cols 1,4,2
    ],
)
def test_captions_go_to_image_ids_from_either_column(
    tmp_path: Path,
    write_tsv: Callable[..., Path],
    write_generated: Callable[..., Path],
    written: Callable[[Path], Any],
    said: dict[str, str],
) -> None:
    tsv = write_tsv("test.tsv", [["u0", "74", "a", "", "x"], ["u1", "9", "b", "", "x"]])
    out = tmp_path / "new" / "captions.json"
    assert write_predictions(write_generated(said), out, task="caption", data=tsv, bins=BinSizes()) == 2
    assert written(out) == CAPTIONS
    assert read_predictions(out, "caption") == {74: "a dog", 9: "a cat"}


def test_rows_of_one_image_give_one_caption_the_first_generated(
    tmp_path: Path,
    write_tsv: Callable[..., Path],
    write_generated: Callable[..., Path],
    written: Callable[[Path], Any],
) -> None:
    tsv = write_tsv("train.tsv", [["740", "74", "a", "", "x"], ["741", "74", "b", "", "x"]])
    generated = write_generated({"741": "second", "740": "first"})
    write_predictions(generated, tmp_path / "o.json", task="caption", data=tsv, bins=BinSizes())
    assert written(tmp_path / "o.json") == [{"image_id": 74, "caption": "first"}]


@pytest.mark.parametrize(
    ("task", "said", "message"),
    [
        ("vqa", {"1": "a", "5": "b"}, "1 of 2 sample ids belong to no row, such as 5; generate from this file"),
        ("vqa", {"1": "a"}, "2 of the 3 ids of .*test.tsv have no hypothesis, such as 2; generate again"),
        ("vqa", {"74": "a"}, "sample ids belong to several rows.*--selected-cols 0"),
        ("caption", {"1": "a", "2": "b", "x": "c"}, "'m' is no image_id, which are whole numbers; check --task"),
        ("vqa", {"1": "a", "2": "b", "x": "c"}, "test.tsv:3: 'x' is no question_id"),
        (
            "boxes",
            {"1": "a"},
            "--task boxes: choose one of caption, vqa, gqa, refcoco, grefcoco, snli_ve, visual_genome",
        ),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_written(
    tmp_path: Path,
    write_tsv: Callable[..., Path],
    write_generated: Callable[..., Path],
    task: str,
    said: dict[str, str],
    message: str,
) -> None:
    tsv = write_tsv("test.tsv", [["1", "74", "a"], ["2", "74", "b"], ["x", "m", "c"]])
    with pytest.raises(InputError, match=message):
        write_predictions(write_generated(said), tmp_path / "o.json", task=task, data=tsv, bins=BinSizes())
    assert not list(tmp_path.glob("o.json*"))


@pytest.mark.parametrize("task", ["refcoco", "vqa", "caption"])
@pytest.mark.parametrize(
    "key",
    ["79_1", "7_91", "+791", "-791", " 791", "791 ", "٧٩١", "\uff17", "7.91", "791.0", "7e2", "0x1", "²", "9" * 19],
)
def test_only_digits_make_a_number_of_an_id(
    tmp_path: Path, write_tsv: Callable[..., Path], write_generated: Callable[..., Path], task: str, key: str
) -> None:
    """OFA's ids of regions are such as 79_1, of which Python's int makes 791, the id of another sentence."""
    tsv = write_tsv("test.tsv", [["5", "6", "a"], [key, key, "b"]])
    name = {"refcoco": "sent_id", "vqa": "question_id", "caption": "image_id"}[task]
    source = {"refcoco": "refcoco", "vqa": "vqav2", "caption": "coco"}[task]
    generated = write_generated({"6" if task == "caption" else "5": "a", key: "b"})
    with pytest.raises(BadRow) as caught:
        write_predictions(generated, tmp_path / "o.json", task=task, data=tsv, bins=BinSizes())
    assert str(caught.value).startswith(f"{tsv}:2: {key!r} is no {name}")
    assert f"`narvl data {source}`" in str(caught.value)
    assert not list(tmp_path.glob("o.json*"))


@pytest.mark.parametrize(
    ("task", "rows"),
    [
        ("vqa", [["7", "1", "a"], ["007", "2", "b"]]),
        ("vqa", [["7", "1", "a"], ["7", "1", "b"]]),
        ("caption", [["a", "7", "a"], ["b", "007", "b"]]),
        ("snli_ve", [["x", "1", "a"], ["x", "1", "b"]]),
        ("gqa", [["7", "n1", "a"], ["7", "n1", "b"]]),
    ],
)
def test_two_rows_of_one_id_are_refused(
    tmp_path: Path,
    write_tsv: Callable[..., Path],
    write_generated: Callable[..., Path],
    task: str,
    rows: list[list[str]],
) -> None:
    tsv = write_tsv("test.tsv", rows)
    generated = write_generated({row[0]: "yes" for row in rows})
    with pytest.raises(BadRow, match=r"test.tsv:2: .* is the .*, as .* of row 1 is; leave one of the rows out"):
        write_predictions(generated, tmp_path / "o.json", task=task, data=tsv, bins=BinSizes())


def test_leading_zeros_are_no_part_of_a_number(
    tmp_path: Path, write_tsv: Callable[..., Path], write_generated: Callable[..., Path], written: Callable[..., Any]
) -> None:
    tsv = write_tsv("test.tsv", [["0", "000000000042", "a"]])
    write_predictions(write_generated({"0": "a\rcat"}), tmp_path / "o.json", task="caption", data=tsv, bins=BinSizes())
    assert written(tmp_path / "o.json") == [{"image_id": 42, "caption": "a cat"}]


def test_ids_that_may_be_either_are_refused(
    tmp_path: Path, write_tsv: Callable[..., Path], write_generated: Callable[..., Path]
) -> None:
    tsv = write_tsv("test.tsv", [["1", "2", "a"], ["2", "1", "b"]])
    generated = write_generated({"1": "a", "2": "b"})
    with pytest.raises(InputError, match="all sample ids are unique ids, and image ids of other rows, too"):
        write_predictions(generated, tmp_path / "o.json", task="caption", data=tsv, bins=BinSizes())


@pytest.mark.parametrize(
    ("bins", "text", "box"),
    [
        # Bin k of 11 is at k/10 of 512 pixels; the image is 640 pixels wide and 480 high.
        (BinSizes(num_bins=11), "<bin_1><bin_2><bin_5><bin_10>", [64, 96, 320, 480]),
        (BinSizes(num_bins=11, max_image_size=1024), "<bin_1> <bin_2> <bin_5> <bin_5>", [128, 192, 640, 480]),
        (BinSizes(num_bins=11, patch_image_size=256), "<bin_0><bin_0><bin_5><bin_5>", [0, 0, 640, 480]),
        (BinSizes(), "<bin_0><bin_0><bin_333><bin_999>", [0, 0, 213.33, 480]),
        (BinSizes(), "<bin_0><bin_0><bin_333>", None),
        (BinSizes(), "a hat", None),
    ],
)
def test_bins_become_pixels_of_the_original_image(bins: BinSizes, text: str, box: list[float] | None) -> None:
    assert bins.box(text, (640, 480)) == box


@pytest.mark.parametrize(
    ("text", "boxes"),
    [
        ("", []),
        (
            "<bin_1><bin_2><bin_5><bin_10><bin_0><bin_0><bin_5><bin_5>",
            [[64, 96, 320, 480], [0, 0, 320, 240]],
        ),
        ("<bin_1><bin_2><bin_5><bin_10><bin_0>", None),
        ("no hats", None),
    ],
)
def test_sets_of_bins_become_boxes(text: str, boxes: list[list[float]] | None) -> None:
    assert BinSizes(num_bins=11).boxes(text, (640, 480)) == boxes


def test_triplets_of_hypotheses_are_in_pixels_and_can_be_evaluated(
    tmp_path: Path,
    write_tsv: Callable[..., Path],
    write_generated: Callable[..., Path],
    written: Callable[..., Any],
    photo: Callable[..., str],
    visual_genome: list[Path],
) -> None:
    image = photo("1.png", size=(200, 150))
    tsv = write_tsv("test.tsv", [["1", "1", "", image], ["2", "2", "", image]])
    # Bin k of 11 is at k/10 of the image, which is 200 pixels wide and 150 high.
    said = {
        "1": "dog<bin_0><bin_0><bin_2><bin_3> in_front_of mat<bin_3><bin_0><bin_6><bin_10> "
        "cat<bin_6><bin_0><bin_9><bin_3> on mat<bin_3><bin_0><bin_5><bin_3>",
        "2": "dog<bin_0> on mat",
    }
    out = tmp_path / "graphs.json"
    bins = BinSizes(num_bins=11)
    assert write_predictions(write_generated(said), out, task="visual_genome", data=tsv, bins=bins) == 2
    first, second = written(out)
    assert (first["image_id"], second["image_id"], second["triplets"]) == (1, 2, [])
    assert first["triplets"][0] == {
        "subject": "dog",
        "subject_box": [0, 0, 40, 45],
        "relation": "in front of",
        "object": "mat",
        "object_box": [60, 0, 120, 150],
    }
    scores = evaluate(out, visual_genome, "visual_genome").tables["triplets"]["test"]
    assert scores["R@5"] == pytest.approx((1 / 3 + 0) / 2), "the cat is on the mat"


def test_a_file_of_any_size_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "p.json", "wb") as file:
        file.truncate(2**33)  # takes no room on the disk
    with pytest.raises(InputError, match=r"p.json: has 8,589,934,592 bytes; of JSON at most 4,294,967,296 are read"):
        read_predictions(tmp_path / "p.json", "caption")


def test_boxes_need_the_image(
    tmp_path: Path, write_tsv: Callable[..., Path], write_generated: Callable[..., Path]
) -> None:
    tsv = write_tsv("test.tsv", [["1", "74", "hat", "0,0,1,1", "gone.jpg"]])
    generated = write_generated({"1": "<bin_0><bin_0><bin_3><bin_9>"})
    with pytest.raises(BadRow, match=r"test.tsv:1: the image file .*gone.jpg cannot be read"):
        write_predictions(generated, tmp_path / "o.json", task="refcoco", data=tsv, bins=BinSizes())


@pytest.mark.parametrize(
    ("task", "content", "message"),
    [
        ("caption", {}, "is a dict, not a list; each entry is an object with image_id"),
        ("caption", [CAPTIONS[0], {"image_id": "9", "caption": "a"}], r"p.json\[1\]: is {.*, not an object with"),
        ("caption", [{"image_id": 9}], r"p.json\[0\]: is {\"image_id\": 9}, not an object with image_id \(int\)"),
        ("caption", CAPTIONS * 2, r"p.json\[2\]: image_id 74 has a prediction already"),
        ("vqa", [{"question_id": 1, "answer": 2}], "not an object with question_id"),
        ("vqa", ["yes"], r"p.json\[0\]: is \"yes\""),
        ("gqa", [{"questionId": 7, "prediction": "x"}], r"not an object with questionId \(str\) and prediction"),
        ("refcoco", [{"sent_id": 7, "box": [1, 2, 3]}], "not an object with sent_id"),
        ("refcoco", [{"sent_id": 7, "box": [1, 2, 3, float("nan")]}], "not an object with sent_id"),
        ("snli_ve", [{"pairID": "x", "label": None}], "not an object with pairID"),
        ("caption", [{"image_id": True, "caption": "a"}], "not an object with image_id"),
        ("caption", [{"image_id": 9.0, "caption": "a"}], "not an object with image_id"),
        ("refcoco", [{"sent_id": 7, "box": [1, 2, 3, 10**400]}], "not an object with sent_id"),
        ("refcoco", [{"sent_id": 7, "box": [1, 2, 3, True]}], "not an object with sent_id"),
        ("grefcoco", [{"id": "7-1", "boxes": [1, 2, 3, 4]}], r"not an object with id \(str\) and boxes"),
        ("grefcoco", [{"id": "7-1", "boxes": [[1, 2, 3, 4], None]}], "not an object with id"),
        ("grefcoco", [{"id": "7-1", "boxes": [[1, 2, 3, 4]] * 1001}], "not an object with id"),
        ("grefcoco", [{"id": 7, "boxes": []}], "not an object with id"),
        ("visual_genome", [{"image_id": 7, "triplets": None}], r"image_id \(int\) and triplets"),
        ("visual_genome", [{"image_id": 7, "triplets": [["dog", "on", "mat"]]}], "not an object with image_id"),
        ("visual_genome", [{"image_id": 7, "triplets": [{**DOG_ON_MAT, "relation": 1}]}], "not an object with"),
        ("visual_genome", [{"image_id": 7, "triplets": [{**DOG_ON_MAT, "object_box": [1]}]}], "not an object with"),
        ("visual_genome", [{"image_id": 7, "triplets": [{"subject": "dog"}]}], "not an object with"),
        ("visual_genome", [{"image_id": 7, "triplets": [DOG_ON_MAT] * 1001}], "not an object with"),
    ],
)
def test_files_of_another_form_are_refused(tmp_path: Path, task: str, content: Any, message: str) -> None:
    file = tmp_path / "p.json"
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        read_predictions(file, task)


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match="p.json: no such file; write it by narvl predictions"):
        read_predictions(tmp_path / "p.json", "vqa")
    (tmp_path / "p.json").write_text("[")
    with pytest.raises(InputError, match="p.json: is not JSON"):
        read_predictions(tmp_path / "p.json", "vqa")
