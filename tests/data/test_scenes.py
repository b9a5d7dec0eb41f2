"""The embedded scenes as files: same bytes, unseen pairs, columns, boxes, and errors that say what to do."""

import base64
import io
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from narvl_plugin.data.plain_pickles import read_pickle
from narvl_plugin.data.scenes import NOUNS, TASKS, ArtError, SceneSettingError, plural, write_scenes, writer
from narvl_plugin.data.scenes.art import embedded_art
from narvl_plugin.data.scenes.compose import HeldOutPairs
from narvl_plugin.data.scenes.nouns import art_file_name, with_article
from narvl_plugin.errors import InputError
from narvl_plugin.whole_files import sole_writer


def _rows(out: Path, task: str, split: str) -> list[list[str]]:
    text = (out / task / f"{split}.tsv").read_text(encoding="utf-8")
    return [line.split("\t") for line in text.splitlines()]


def _decode(image: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(image)))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few hundred scenes of all tasks."""
    out = tmp_path_factory.mktemp("scenes")
    write_scenes(out, train=200, valid=60, test=120, nouns=40, seed=3, tasks=TASKS)
    return out


@pytest.mark.integration
def test_same_seed_same_bytes_other_seed_other_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seed in (("first", 5), ("second", 5), ("other", 6)):
        if name == "second":  # the same from several processes
            monkeypatch.setattr(writer, "_IMAGES_PER_PROCESS", 3)
        write_scenes(tmp_path / name, train=12, valid=3, test=3, seed=seed, nouns=20, tasks=TASKS)
    for path in sorted((tmp_path / "first").rglob("*.[tj]s*")):
        inside = path.relative_to(tmp_path / "first")
        assert path.read_bytes() == (tmp_path / "second" / inside).read_bytes()
        if path.name != "names.json":  # the lists of names do not depend on the seed
            assert path.read_bytes() != (tmp_path / "other" / inside).read_bytes()
    assert len(list((tmp_path / "first").rglob("*"))) == 7 + 7 * 3 + 1 + 3 + 2, "nothing but the finished files is left"


def test_a_second_process_is_refused_before_it_writes_anything(tmp_path: Path) -> None:
    """Also where the first is at another split: its files are those of one seed."""
    settings = {"train": 4, "valid": 1, "test": 1, "nouns": 20, "tasks": ("caption", "vqa_gen", "caption")}
    for busy in ("caption/test", "vqa_gen/train"):
        with sole_writer(tmp_path / f"{busy}.tsv"), pytest.raises(InputError, match=f"{busy}.tsv: .* is writing it"):
            write_scenes(tmp_path, **settings)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    write_scenes(tmp_path, **settings)
    assert len(_rows(tmp_path, "caption", "train")) == 4
    assert not list(tmp_path.rglob("*.lock"))


def test_a_longer_run_begins_with_the_shorter_one_and_tasks_do_not_change_captions(tmp_path: Path) -> None:
    write_scenes(tmp_path / "short", train=5, valid=0, test=0, nouns=20)
    write_scenes(tmp_path / "long", train=9, valid=1, test=1, nouns=20, tasks=("refcoco", "caption"))
    assert _rows(tmp_path / "long", "caption", "train")[:5] == _rows(tmp_path / "short", "caption", "train")


def test_held_out_pairs_are_in_every_test_image_of_several_nouns_and_in_no_other_split(
    scenes: Path,
) -> None:
    held_out = set(HeldOutPairs(NOUNS[:40], 3).pairs)
    assert len(held_out) == 80, "a tenth of the 780 pairs"
    several = 0
    for split in ("train", "valid", "test"):
        for row in _rows(scenes, "caption", split):
            pairs = {frozenset(pair) for pair in combinations(row[3].split("&&"), 2)}
            if split != "test":
                assert not pairs & held_out
            elif pairs:
                several += 1
                assert pairs & held_out
    assert several > 40


def test_caption_rows_hold_five_references_and_an_image(scenes: Path) -> None:
    for split in ("train", "valid", "test"):
        for row in _rows(scenes, "caption", split):
            assert len(row) == 5
            captions = row[2].split("&&")
            assert len(set(captions)) == len(captions) == 5
            for caption in captions:
                assert 6 <= len(caption.split()) <= 20
                assert caption.replace(" ", "").isalpha() and caption == caption.lower()
                for noun in row[3].split("&&"):
                    assert {noun, plural(noun)} & set(caption.split())
    image = _decode(_rows(scenes, "caption", "valid")[0][4])
    assert (image.mode, image.size) == ("RGB", (128, 128))


def test_all_tasks_show_the_same_images_in_their_own_columns(scenes: Path) -> None:
    for split in ("train", "test"):
        images = [row[4] for row in _rows(scenes, "caption", split)]
        for task, width, column in (
            ("vqa_gen", 6, 5),
            ("refcoco", 5, 4),
            ("snli_ve", 6, 2),
            ("regions", 5, 4),
            ("scene_graph", 4, 3),
            ("scene_tree", 4, 3),
        ):
            rows = _rows(scenes, task, split)
            assert {len(row) for row in rows} == {width}
            assert [row[column] for row in rows] == images


def test_images_have_the_size_asked_for(tmp_path: Path) -> None:
    write_scenes(tmp_path, train=2, valid=0, test=0, size=96, nouns=20)
    assert {_decode(row[4]).size for row in _rows(tmp_path, "caption", "train")} == {(96, 96)}


def test_answers_are_weighted_and_true_where_another_column_tells(scenes: Path) -> None:
    numbers = {"zero": 0, "one": 1, "two": 2, "three": 3, "four": 4}
    seen = set()
    for row in _rows(scenes, "vqa_gen", "train"):
        answers = [answer.split("|!+") for answer in row[3].split("&&")]
        assert [float(confidence) for confidence, _ in answers] == [1.0] + [0.6] * (len(answers) - 1)
        question, best, objects = row[2], answers[0][1], row[4].split("&&")
        if question.startswith("is there "):
            seen.add(best)
            assert (best == "yes") == any(question == f"is there {with_article(noun)}" for noun in objects)
        elif question.startswith("how many ") and not question.startswith("how many objects"):
            seen.add("count")
            asked = question.removeprefix("how many ").removesuffix(" are there")
            assert (numbers[best] > 0) == (asked in [plural(noun) for noun in objects])
    assert seen == {"yes", "no", "count"}


def test_the_list_of_answers_holds_those_of_train_and_valid_by_frequency(scenes: Path) -> None:
    rows = _rows(scenes, "vqa_gen", "train") + _rows(scenes, "vqa_gen", "valid")
    said = [answer.split("|!+")[1] for row in rows for answer in row[3].split("&&")]
    listed = list(read_pickle(scenes / "vqa_gen" / "trainval_ans2label.pkl"))
    assert set(listed) == set(said)
    assert listed == sorted(listed, key=lambda answer: -said.count(answer))


def _flat_art(folder: Path, nouns: Sequence[str]) -> Path:
    """A folder of plain dark squares in place of emoji."""
    folder.mkdir()
    for noun in nouns:
        Image.new("RGB", (40, 40), (20, 20, 20)).save(folder / art_file_name(noun))
    return folder


def test_boxes_lie_inside_the_image_and_around_the_object(tmp_path: Path) -> None:
    art = _flat_art(tmp_path / "art", NOUNS[:8])
    write_scenes(tmp_path, train=40, valid=0, test=0, nouns=8, max_objects=1, art=art, tasks=("refcoco",))
    for row in _rows(tmp_path, "refcoco", "train"):
        left, upper, right, lower = (int(edge) for edge in row[3].split(","))
        # The only dark thing on a lighter background; compression blurs its edge by a pixel or two.
        dark = np.asarray(_decode(row[4]).convert("L")) < 45
        rows, columns = np.flatnonzero(dark.any(axis=1)), np.flatnonzero(dark.any(axis=0))
        found = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        assert np.abs(np.subtract(found, (left, upper, right, lower))).max() <= 2
        assert 0 <= left < right <= 128 and 0 <= upper < lower <= 128


def test_a_folder_of_art_is_drawn_from_by_code_point_or_by_names(tmp_path: Path) -> None:
    art = _flat_art(tmp_path / "art", NOUNS[:8])
    (art / art_file_name("dog")).rename(art / "hound.png")
    with pytest.raises(ArtError, match=rf"{art}.*'dog'.*1f415\.png"):
        write_scenes(tmp_path / "out", train=1, valid=0, test=0, nouns=8, art=art)
    (art / "names.tsv").write_text("file\tnoun\nhound.png\tdog\n", encoding="utf-8")
    write_scenes(tmp_path / "out", train=1, valid=0, test=0, nouns=8, art=art)
    assert len(_rows(tmp_path / "out", "caption", "train")) == 1


def test_same_scenes_with_other_art(tmp_path: Path) -> None:
    art = _flat_art(tmp_path / "art", NOUNS[:8])
    write_scenes(tmp_path / "emoji", train=0, valid=0, test=30, nouns=8)
    write_scenes(tmp_path / "squares", train=0, valid=0, test=30, nouns=8, art=art)
    emoji, squares = (_rows(tmp_path / name, "caption", "test") for name in ("emoji", "squares"))
    same = sum(a[3].split("&&")[:1] == b[3].split("&&")[:1] for a, b in zip(emoji, squares, strict=True))
    assert same == 30, "what is drawn first depends on the seed, not on the art"
    assert emoji[0][4] != squares[0][4]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("names.tsv", "cat.png\tdragonfly\n", r"names\.tsv:1.*unknown noun 'dragonfly'"),
        ("names.tsv", "cat.png\n", r"names\.tsv:1.*2 columns"),
        ("1f415.png", "no picture", r"cannot read 1f415\.png.*'dog'"),
    ],
)
def test_bad_art_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    art = _flat_art(tmp_path / "art", NOUNS[:8])
    (art / name).write_text(text, encoding="utf-8")
    with pytest.raises(ArtError, match=message):
        write_scenes(tmp_path / "out", train=1, valid=0, test=0, nouns=8, art=art)


def test_art_without_a_visible_pixel_or_folder_is_refused(tmp_path: Path) -> None:
    art = _flat_art(tmp_path / "art", NOUNS[:8])
    Image.new("RGBA", (40, 40)).save(art / art_file_name("cat"))
    with pytest.raises(ArtError, match="'cat', is empty"):
        write_scenes(tmp_path / "out", train=1, valid=0, test=0, nouns=8, art=art)
    with pytest.raises(ArtError, match="no such folder"):
        write_scenes(tmp_path / "out", train=1, valid=0, test=0, art=tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"nouns": 10_000}, "nouns=10000.*choose 8 to"),
        ({"nouns": 5}, "nouns=5.*choose 8 to"),
        ({"max_objects": 0}, "max_objects=0: choose 1 to 4"),
        ({"max_objects": 5}, "max_objects=5: choose 1 to 4"),
        ({"train": -1}, "train=-1"),
        ({"size": 8}, "size=8"),
        ({"tasks": ("caption", "poetry")}, "poetry: choose from caption"),
        ({"tasks": ()}, "none"),
    ],
)
def test_settings_out_of_range_are_refused(tmp_path: Path, setting: dict[str, object], message: str) -> None:
    settings = {"train": 1, "valid": 0, "test": 0} | setting
    with pytest.raises(SceneSettingError, match=message):
        write_scenes(tmp_path, **settings)  # type: ignore[arg-type]


def test_every_noun_has_its_own_image() -> None:
    files = [art_file_name(noun) for noun in NOUNS]
    assert len(NOUNS) >= 110 and len(set(files)) == len(NOUNS)
    assert all((embedded_art() / file).is_file() for file in files)
    names = [name for noun in NOUNS for name in {noun, plural(noun)}]
    assert len(set(names)) == len(names), "no plural is another noun"


def test_plurals_and_articles() -> None:
    nouns = ("bus", "strawberry", "monkey", "mouse", "leaf", "snowman", "couch", "fox", "fish")
    assert [plural(noun) for noun in nouns] == (
        ["buses", "strawberries", "monkeys", "mice", "leaves", "snowmen", "couches", "foxes", "fish"]
    )
    phrases = ("dog", "apple", "unicorn", "orange background", "umbrella")
    assert [with_article(phrase).split()[0] for phrase in phrases] == ["a", "an", "a", "an", "an"]
