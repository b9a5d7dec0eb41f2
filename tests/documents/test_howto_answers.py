"""The how-to pages about asking, distilling, decoding and calibrating: each block is run as it is printed."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pages import SHORT, SMALL, Newcomer, Page, command_of, commands, draw_scene, known_options, lines_of, parsed
from PIL import Image

from narvl_plugin.api.loading import BOX
from narvl_plugin.checkpoints.conversion import convert
from narvl_plugin.checkpoints.reading import read_checkpoint

IMAGES = Page("docs/how-to/own-images.md")
SETS = Page("docs/how-to/boxes-and-graphs.md")
DISTIL = Page("docs/how-to/distil.md")
DECODE = Page("docs/how-to/decode.md")
CALIBRATE = Page("docs/how-to/calibrate.md")
PAGES = (
    IMAGES,
    SETS,
    DISTIL,
    DECODE,
    CALIBRATE,
    Page("docs/how-to/own-tsv.md"),
    Page("docs/how-to/raw-data-sets.md"),
    Page("docs/how-to/ofa-checkpoints.md"),
    Page("docs/how-to/ofa-ports.md"),
    Page("docs/how-to/evaluate.md"),
)


def test_every_block_is_tested() -> None:
    for page in (IMAGES, SETS, DISTIL, DECODE, CALIBRATE):
        page.require_tests()


# --- Images of one's own ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder with a scene, a folder of images, and a student of all tasks with its vocabulary beside it."""
    folder = tmp_path_factory.mktemp("desk")
    draw_scene(folder)
    (folder / "photos" / "more").mkdir(parents=True)
    for place in ("photos/1.png", "photos/2.png", "photos/more/3.png", "photos/.hidden.png"):
        shutil.copyfile(folder / "scene.png", folder / place)
    convert(BOX, folder / "student.pt")
    shutil.copyfile(BOX.with_name("spm.model"), folder / "spm.model")
    return folder


@pytest.mark.integration
@IMAGES.block("import narvl\n")
def test_a_checkpoint_answers_in_python(
    block: str, desk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(desk)
    names: dict[str, Any] = {}
    exec(block, names)
    caption, answer, box, entailed, *found = capsys.readouterr().out.splitlines()
    assert caption and answer and len(box.split(",")) == 4 and entailed in ("yes", "no", "maybe")
    assert len(found) == 2
    assert set(names["model"].verbs) == {"caption", "answer", "locate", "entails"}


@pytest.mark.integration
@IMAGES.block("narvl caption scene.png")
def test_a_checkpoint_answers_on_the_command_line(block: str, desk: Path, programs: Path) -> None:
    newcomer = Newcomer(desk, programs)
    caption, answer, _, entailed = map(newcomer.types, commands(block))
    assert caption.startswith("scene.png\t") and len(answer.split("\t")) == 3
    assert "<rect " in (desk / "found.html").read_text()
    assert json.loads(entailed)["text"] in ("yes", "no", "maybe")


@pytest.mark.integration
@IMAGES.block("narvl caption photos")
def test_a_folder_is_answered_into_files(block: str, desk: Path, programs: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pip install 'narvl[parquet]'")
    newcomer = Newcomer(desk, programs)
    for command in commands(block):
        newcomer.types(command)
    assert [line.split("\t")[0] for line in lines_of(desk / "captions.tsv")] == ["1.png", "2.png", "more/3.png"]
    answers = [json.loads(line) for line in lines_of(desk / "answers.jsonl")]
    assert len(answers) == 3 and answers[0].keys() >= {"image", "text", "confidence", "queries", "alternatives"}
    assert [one["image_id"] for one in json.loads((desk / "captions.json").read_text())] == [1, 2]
    assert parquet.read_table(desk / "boxes.parquet").num_rows == 3


@pytest.fixture
def sets(desk: Path, write_regions: Callable[[str], Path], write_graphs: Callable[[str], Path]) -> Path:
    """Give that folder with random students of all regions and of graphs, too."""
    for checkpoint in (write_regions("narvl"), write_graphs("narvl")):
        shutil.copyfile(checkpoint, desk / checkpoint.name)
    return desk


@SETS.block('import narvl\n\nmodel = narvl.load("regions.pt")')
def test_all_boxes_of_a_phrase(
    block: str, sets: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(sets)
    names: dict[str, Any] = {}
    exec(block, names)
    *boxes, confidence, surest = capsys.readouterr().out.splitlines()
    assert len(boxes) == len(names["found"].boxes) > 1
    assert float(confidence) == names["found"].confidence
    assert boxes[0].startswith(surest)


@SETS.block('import narvl\n\nmodel = narvl.load("graphs.pt")')
def test_the_graph_of_an_image(
    block: str, sets: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(sets)
    exec(block, {})
    lines = capsys.readouterr().out.splitlines()
    assert lines and all(" on " in line or " left of " in line for line in lines)


@pytest.mark.integration
@SETS.block("narvl locate photos")
def test_sets_on_the_command_line(block: str, sets: Path, programs: Path) -> None:
    newcomer = Newcomer(sets, programs)
    for command in commands(block):
        newcomer.types(command)
    rows = [line.split("\t") for line in lines_of(sets / "boxes.tsv")]
    assert len(rows) == 3 and all(len(row) == 3 and len(row[1].split("&&")[0].split(",")) == 4 for row in rows)
    assert all(json.loads(line)["triplets"] for line in lines_of(sets / "graphs.jsonl"))
    assert (sets / "graphs.html").read_text().count('<div class="graph"><svg') == 3


# --- Distillation, decoding, calibration -----------------------------------------------------------------------------


@pytest.mark.integration
@DISTIL.block("narvl distill")
def test_a_student_learns_what_its_teacher_says(block: str, captioner: Newcomer) -> None:
    distil, train = commands(block)
    captioner.types(distil)
    rows = [line.split("\t") for line in lines_of(captioner.folder / "distilled.tsv")]
    originals = [line.split("\t") for line in lines_of(captioner.folder / "train.tsv")]
    assert [row[:2] + row[3:] for row in rows] == [row[:2] + row[3:] for row in originals]
    assert max(len(row[2].split("&&")) for row in rows) > 1
    captioner.types(train, f"{SMALL} {SHORT} --patch-image-size 32 --num-queries 200 --save-dir distilled")
    trained = read_checkpoint(captioner.folder / "distilled" / "checkpoint_last.pt")
    assert trained["cfg"]["task"]["data"] == "distilled.tsv,valid.tsv"


@pytest.mark.integration
@DECODE.block("fairseq-generate test.tsv")
def test_ways_to_decode(block: str, captioner: Newcomer) -> None:
    *generating, bench = commands(block)
    counting = generating.pop(4)
    assert len(generating) == 5
    captioner.types(counting)
    for command in generating:
        assert len(captioner.generated(f"{command} --cpu")) == len(lines_of(captioner.folder / "test.tsv"))
    arguments = parsed(shlex.split(bench.replace("\\\n", " ")))  # tests/bench runs it
    assert (arguments["teacher"], arguments["frequencies"]) == (Path("teacher.pt"), Path("train.tsv"))


@pytest.mark.integration
@DECODE.block("import narvl\n")
def test_options_in_python(
    block: str, desk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(desk)
    names: dict[str, Any] = {}
    exec(block, names)
    alternatives, short, answers, _ = capsys.readouterr().out.splitlines()
    assert alternatives.count("Alternative(") == 3 and short
    assert answers.count("Alternative(") == 3 and {"'red'", "'blue'", "'green'"} <= set(re.findall(r"'\w+'", answers))
    constrained = names["model"].caption("scene.png", constraint=names["LengthRange"](3, 6))
    assert 3 <= len(constrained.tokens) <= 6


@pytest.mark.integration
@CALIBRATE.block("narvl calibrate", "fitting")
@CALIBRATE.block("import json", "reading")
def test_calibration(
    fitting: str,
    reading: str,
    captioner: Newcomer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    captioner.types(fitting)
    fitted = json.loads((captioner.folder / "calibration.json").read_text())
    assert set(fitted["systems"]) == {"student_uncalibrated", "student"}
    stored = read_checkpoint(captioner.folder / "student.pt")["cfg"]["model"]
    assert stored["temperature"] == fitted["temperature"]
    monkeypatch.chdir(captioner.folder)
    exec(reading, {})
    first, *curve = capsys.readouterr().out.splitlines()
    assert first.startswith("calibration error ") and "of the surest 100%" in curve[-1]
    keys = re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \| ", CALIBRATE.text, flags=re.MULTILINE)))
    assert set(fitted["systems"]["student"]) <= set(keys)


# --- The text of the pages -------------------------------------------------------------------------------------------


def named_commands() -> Iterator[tuple[Page, str]]:
    """Yield the commands of narvl in the text of the pages, and in their blocks."""
    for page in PAGES:
        yield from ((page, span) for span in page.spans if re.match("narvl [a-z]", span))


@pytest.mark.parametrize(
    ("page", "command"), [pytest.param(*one, id=f"{Path(one[0].name).stem}: {one[1]}") for one in named_commands()]
)
def test_commands_and_options_in_the_text_exist(page: Page, command: str) -> None:
    found, _ = command_of(re.findall(r"^(?:[a-z-]+ ?)+", command.removeprefix("narvl "))[0].split()[:2])
    known = {option for parameter in found.params for option in parameter.opts}
    assert set(re.findall(r"--[a-z0-9-]+", command)) <= known


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: Path(page.name).stem)
def test_options_that_the_pages_name_are_there(page: Page) -> None:
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]*\b", page.text)) - known_options() == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: Path(page.name).stem)
def test_links_of_the_pages_lead_to_files(page: Page) -> None:
    folder = (Path(__file__).parents[2] / page.name).parent
    links = re.findall(r"\]\((?!http)([^)#]+)\)", page.text)
    assert links
    assert [link for link in links if not (folder / link).is_file()] == []


def test_images_that_can_be_read_are_those_of_the_code(tmp_path: Path) -> None:
    from narvl_plugin.data.images import FORMATS, MAX_PIXELS

    (row,) = [line for line in IMAGES.text.splitlines() if line.startswith("| a file |")]
    named = re.findall(r"\b[A-Z][A-Za-z]+\b", row.partition(", at most")[0])
    assert {name.upper() for name in named} >= set(FORMATS)
    assert f"{MAX_PIXELS // 10**6} million" in row
    transparent = tmp_path / "transparent.png"
    Image.new("RGBA", (8, 6), (0, 0, 0, 0)).save(transparent)
    from narvl_plugin.data.any_image import as_seen

    assert as_seen(transparent, "transparent.png").getpixel((0, 0)) == (255, 255, 255)
