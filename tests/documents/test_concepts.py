"""The concept pages: their examples print what the pages show, and the code that they name is there."""

from __future__ import annotations

import ast
import itertools
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import ROOT, Block, Newcomer, Page, commands, draw_scene, lines_of, parsed

import narvl_plugin.ctc
from narvl_plugin.bench.limit import Case, Parts
from narvl_plugin.ctc import query_ctc_loss
from narvl_plugin.data.scenes import NOUNS
from narvl_plugin.data.scenes.backgrounds import COLORS, PATTERNS
from narvl_plugin.data.scenes.compose import MAX_OBJECTS
from narvl_plugin.inference.calibration import TEMPERATURES
from narvl_plugin.models.config import NarvlConfig

QUERY_CTC = Page("docs/concepts/query-ctc.md")
TEACHER_AND_STUDENT = Page("docs/concepts/teacher-and-student.md")
ANY_REFERENCE = Page("docs/concepts/any-reference.md")
TRAINING_TERMS = Page("docs/concepts/training-terms.md")
CONSTRAINTS = Page("docs/concepts/constraints.md")
CONFIDENCE = Page("docs/concepts/confidence.md")
STRUCTURED_OUTPUTS = Page("docs/concepts/structured-outputs.md")
SPEED_UP = Page("docs/concepts/speed-up.md")
SCENES = Page("docs/concepts/scenes.md")
FIXES = Page("docs/concepts/fairseq-fixes.md")
PAGES = (
    *(QUERY_CTC, TEACHER_AND_STUDENT, ANY_REFERENCE, TRAINING_TERMS, CONSTRAINTS),
    *(CONFIDENCE, STRUCTURED_OUTPUTS, SPEED_UP, SCENES, FIXES),
)
IN_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: Path(page.name).stem)
NARVL = "import narvl\n"
"""Beginning of the blocks that load the model in the box."""


def examples(page: Page) -> list[tuple[Block, str]]:
    """Return the Python blocks of a page whose output is shown: each with the block of text that follows at once."""
    following = zip(page.blocks, page.blocks[1:], strict=False)
    pairs = [
        (block, shown.text) for block, shown in following if (block.language, shown.language) == ("python", "text")
    ]
    return [(block, text) for block, text in pairs if f"{block.text}```\n\n```text\n{text}" in page.text]


SHOWN = [(page, *example) for page in PAGES for example in examples(page)]
IN_FRESH_PROCESS = [example for example in SHOWN if "import NGramRepeatBlock" in example[1].text]
"""What stock fairseq does, which the fixes in this process have replaced."""
for found, block, _ in SHOWN:
    found.tested.append(block)


def numbers_of(example: tuple[Page, Block, str]) -> str:
    return f"{Path(example[0].name).stem}-{examples(example[0]).index(example[1:])}"


@pytest.mark.parametrize("example", [one for one in SHOWN if one not in IN_FRESH_PROCESS], ids=numbers_of)
def test_an_example_prints_what_the_page_shows(
    example: tuple[Page, Block, str], capsys: pytest.CaptureFixture[str]
) -> None:
    _, block, text = example
    exec(compile(block.text, example[0].name, "exec"), {})
    assert capsys.readouterr().out == text


@pytest.mark.integration
@pytest.mark.parametrize("example", IN_FRESH_PROCESS, ids=numbers_of)
def test_an_example_of_stock_fairseq_prints_what_the_page_shows(example: tuple[Page, Block, str]) -> None:
    _, block, text = example
    done = subprocess.run([sys.executable, "-c", block.text], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == text


def test_there_are_examples_to_run() -> None:
    without = {Path(page.name).stem for page in PAGES} - {Path(page.name).stem for page, *_ in SHOWN}
    assert without == set()
    assert len(IN_FRESH_PROCESS) == 1


@IN_PAGE
def test_every_block_is_tested(page: Page) -> None:
    page.require_tests()


# --- What every page has ---------------------------------------------------------------------------------------------


@IN_PAGE
def test_the_modules_that_a_page_names_are_there(page: Page) -> None:
    named = [span for span in page.spans if re.fullmatch(r"[\w/]+(\.py|\.sh|/)", span)]
    assert len(named) >= 1
    for span in named:
        places = (ROOT, ROOT / "narvl_plugin" / "data" / "scenes")
        assert any((place / span).exists() for place in places), span


@IN_PAGE
def test_the_links_and_images_of_a_page_are_there(page: Page) -> None:
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", page.text):
        assert ((ROOT / page.name).parent / link).exists(), link


@IN_PAGE
def test_a_page_has_its_parts(page: Page) -> None:
    headings = re.findall(r"^## (.*)$", page.text, flags=re.MULTILINE)
    assert {"Limits", "Where it is in the code"} <= {*headings, "Where it is in the code" if page is FIXES else ""}
    assert re.search(r"arXiv|paper|Sources", page.text)


def test_titles_hold_the_words_that_people_type() -> None:
    titles = {page.name: set(re.findall(r"[\w.]+", page.text.partition("\n")[0].lower())) for page in PAGES}
    assert {"why", "is", "it", "only", "1.4", "times", "as", "fast", "on", "my", "cpu"} <= titles[SPEED_UP.name]
    assert {"how", "sure", "is", "it"} <= titles[CONFIDENCE.name]
    assert "DETR calls the same thing an object query" in " ".join(QUERY_CTC.text.split())


def test_the_images_are_drawn_by_the_script(tmp_path: Path) -> None:
    folder = ROOT / "docs" / "concepts" / "images"
    runpy.run_path(str(folder / "draw.py"))["main"](tmp_path)
    drawn = {file.name for file in tmp_path.iterdir()}
    assert drawn == {file.name for file in folder.iterdir() if file.suffix not in (".py", ".pyc") and file.is_file()}
    assert drawn == {Path(link).name for page in PAGES for link in re.findall(r"!\[[^]]*\]\((\S+)\)", page.text)}
    for file in tmp_path.glob("*.svg"):
        assert "fill: #ffffff" in file.read_text(encoding="utf-8")  # legible on a dark page, too


# --- Query-CTC -------------------------------------------------------------------------------------------------------


def test_the_paths_that_the_page_lists_are_all_paths_to_the_target() -> None:
    labels = ["red", "crab", "blank"]
    table = [line for line in QUERY_CTC.text.splitlines() if line.startswith("| query ")]
    probabilities = [[float(cell) for cell in line.split("|")[2:5]] for line in table]
    listed = dict(re.findall(r"^\| ((?:\w+, ){2}\w+) \| [\d.· ]+ = ([\d.]+) \|$", QUERY_CTC.text, flags=re.MULTILINE))
    expected = {}
    for path in itertools.product(range(3), repeat=3):
        if [label for label, _ in itertools.groupby(path) if label != 2] == [0, 1]:
            product = torch.tensor([probabilities[query][label] for query, label in enumerate(path)]).prod()
            expected[", ".join(labels[label] for label in path)] = f"{product:.3f}"
    assert listed == expected
    assert f"| all | {sum(map(float, listed.values())):.3f} |" in QUERY_CTC.text


def test_the_collapses_of_the_page() -> None:
    rows = re.findall(r"^\| ((?:\w+, ){2,3}\w+) \| ([a-z ]+) \|$", QUERY_CTC.text, flags=re.MULTILINE)
    assert len(rows) == 4
    for path, output in rows:
        merged = [label for label, _ in itertools.groupby(path.split(", "))]
        assert " ".join(label for label in merged if label != "blank") == output


@QUERY_CTC.block("import torch\nfrom narvl_plugin.ctc import query_ctc_loss\n\nlogits = torch.randn")
def test_the_loss_of_a_batch(block: str) -> None:
    names: dict[str, Any] = {}
    exec(block, names)
    assert names["loss"].isfinite() and names["logits"].grad.abs().sum() > 0
    with pytest.raises(narvl_plugin.ctc.TargetsDoNotFit):
        query_ctc_loss(names["logits"][:, :4], names["targets"], torch.tensor([4, 2]), blank=999)


def test_the_default_number_of_queries() -> None:
    assert f"The default of `--num-queries` is {NarvlConfig().num_queries}." in QUERY_CTC.text


# --- Constraints, confidence, structured outputs ---------------------------------------------------------------------


def test_the_classes_that_pages_name_are_those_of_the_package() -> None:
    for page in (CONSTRAINTS, STRUCTURED_OUTPUTS):
        named = {span for span in page.spans if re.fullmatch(r"[A-Z]\w+[a-z]|one_of|sequence_of", span)}
        assert named - {"OUT"} <= set(narvl_plugin.ctc.__all__)
        assert {"LengthRange", "BoxSets", "one_of", "sequence_of"} <= named


@pytest.mark.integration
@CONSTRAINTS.block(NARVL)
def test_a_model_takes_a_constraint(
    block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    draw_scene(tmp_path)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(block, names)
    caption, alternatives = capsys.readouterr().out.splitlines()
    assert 1 <= len(names["model"].caption("scene.png", constraint=names["LengthRange"](1, 8)).tokens) <= 8
    assert caption and len(names["model"].caption("scene.png").tokens) > 8  # so that the constraint matters
    assert {"'red'", "'yellow'", "'blue'"} == set(re.findall(r"text=('\w+')", alternatives))


@pytest.mark.integration
@CONFIDENCE.block(NARVL)
def test_a_model_abstains(
    block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    draw_scene(tmp_path)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(block, names)
    assert "confidence=" in capsys.readouterr().out.splitlines()[1]
    found, model = names["found"], names["model"]
    question = "what color is the background?"
    assert found.text and model.answer("scene.png", question, abstain_below=1.0).text == ""


@CONFIDENCE.block("narvl calibrate")
def test_the_command_that_calibrates(block: str) -> None:
    """It runs for real in tests/cli and in the pipelines."""
    arguments = parsed(block.split())
    assert [Path(str(arguments[name])).name for name in ("student", "data", "test", "out")] == [
        *("student.pt", "valid.tsv", "test.tsv", "calibration.json")
    ]
    assert f"from {TEMPERATURES[0]:.2f} to {TEMPERATURES[-1]:g} " in CONFIDENCE.text


def test_a_thousand_outputs_have_a_tenth_of_the_error_by_chance_of_ten() -> None:
    from narvl_plugin.inference.calibration import Reliability

    few, many = ([0.9] * number + [0.6] * number for number in (5, 500))
    errors = [Reliability.of(*2 * (torch.tensor(one).double().numpy(),)).error_by_chance for one in (few, many)]
    assert errors[0] / errors[1] == pytest.approx(10)


# --- Speed-up --------------------------------------------------------------------------------------------------------


@SPEED_UP.block("narvl bench limit")
def test_the_commands_that_measure(block: str) -> None:
    """They run for real in tests/bench."""
    limit, models = (parsed(command.split()) for command in commands(block))
    assert (limit["sizes"], limit["threads"]) == ("base", 2)
    assert str(models["teacher"]).endswith("teacher.pt") and str(models["out"]).endswith("models.json")


def test_the_figures_of_the_speed_up_are_those_of_the_results() -> None:
    """The figures of a row are those of one row of the results, which hold the runs."""
    sources = (ROOT / "RESULTS.md", *(ROOT / "docs" / "results").glob("*.md"))
    results = "".join(file.read_text(encoding="utf-8") for file in sources)
    measured = [set(numbers_in(row)) for row in re.findall(r"^\|.*\|$", results, flags=re.MULTILINE)]
    rows = re.findall(r"^\| (?:encoder|teacher|student|NVIDIA|two CPU).*\|$", SPEED_UP.text, flags=re.MULTILINE)
    assert len(rows) == 7
    for row in rows:
        assert any(set(numbers_in(row)) <= others for others in measured), row


def numbers_in(row: str) -> list[str]:
    return re.findall(r"(?<=\| )\d+\.\d+(?= \|)", row)


def test_the_formula_is_that_of_the_benchmark() -> None:
    encoder, step, decoder = 7.0, 2.0, 3.0
    parts = Parts((0, encoder), (0, 0, step, 0), (decoder, 0, 0))
    case = Case(batch=1, beam=5, length=20, queries=40)
    assert parts.speed_up(case) == pytest.approx((encoder + 21 * step) / (encoder + decoder))
    assert parts.bound(case) == pytest.approx((encoder + 21 * step) / encoder)


# --- Scenes ----------------------------------------------------------------------------------------------------------


def test_what_is_in_a_scene() -> None:
    assert f"1 to {MAX_OBJECTS} of up to {len(NOUNS)} nouns" in SCENES.text
    assert f"{len(COLORS)} colours; {', '.join(PATTERNS[:-1])} or {PATTERNS[-1]}" in SCENES.text


@pytest.mark.integration
@SCENES.block("narvl data scenes")
def test_the_scenes_are_drawn(block: str, tmp_path: Path, programs: Path) -> None:
    newcomer = Newcomer(tmp_path, programs)
    newcomer.types(block)
    rows = {file.parent.name: len(lines_of(file)) for file in tmp_path.glob("scenes/*/test.tsv")}
    assert rows == dict.fromkeys(("caption", "vqa_gen", "refcoco", "snli_ve"), 8)
    assert (tmp_path / "scenes" / "vqa_gen" / "trainval_ans2label.pkl").is_file()


def test_the_rows_of_the_page_are_those_of_the_second_image(tmp_path: Path) -> None:
    from narvl_plugin.data.scenes import TASKS, write_scenes

    write_scenes(tmp_path, train=0, valid=0, test=2, seed=4, nouns=24, max_objects=2, tasks=TASKS)
    shown = next(block.text for block in SCENES.blocks if block.text.startswith("caption ")).splitlines()
    for task, line in zip(TASKS, shown, strict=True):
        row = lines_of(tmp_path / task / "test.tsv")[1].split("\t")
        cells = re.split(r" {2,}", line)[1:]
        for cell in cells:
            for part in cell.removesuffix(" && …").split(" && "):
                assert any(part in column.split("&&") for column in row), (task, part)


# --- Fixes of fairseq ------------------------------------------------------------------------------------------------


def functions(file: Path) -> dict[str, ast.FunctionDef]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}


def called_by(function: ast.FunctionDef) -> set[str]:
    names = (node.func for node in ast.walk(function) if isinstance(node, ast.Call))
    return {name.attr if isinstance(name, ast.Attribute) else getattr(name, "id", "") for name in names}


def test_the_page_names_each_fix_under_its_module_and_no_other() -> None:
    """A fix is what `narvl_plugin/compat/__init__.py` applies, and each function whose docstring says what it fixes."""
    folder = ROOT / "narvl_plugin" / "compat"
    applied = functions(folder / "__init__.py")
    calls = called_by(applied["repair_fairseq"]) | called_by(applied["take_over_program"])
    sections = dict(re.findall(r"^## [^\n]*`(narvl_plugin/compat/\w+\.py)`\n(.*?)(?=^## )", FIXES.text, re.M | re.S))
    assert set(sections) == {f"narvl_plugin/compat/{file.name}" for file in folder.glob("[a-z]*.py")}
    seen = set()
    for name, section in sections.items():
        defined = functions(ROOT / name)
        fixes = {one for one in defined if one in calls or "Fixes " in (ast.get_docstring(defined[one]) or "")}
        named = set(re.findall(r"^\| `(\w+)`", section, flags=re.MULTILINE))
        if "begin_and_end_programs" in fixes:
            named |= set(re.findall(r"^`(\w+)` wraps", section, flags=re.MULTILINE))
        assert named - {"write_to_any_terminal"} == fixes, name
        seen |= named
    assert calls - {"", "cache"} <= seen


def test_the_fixes_elsewhere_are_there() -> None:
    assert "Two fixes are elsewhere" in (ROOT / "narvl_plugin" / "compat" / "__init__.py").read_text(encoding="utf-8")
    assert '"required_batch_size_multiple": 1' in (ROOT / "narvl_plugin/tasks/trained.py").read_text(encoding="utf-8")
    assert "fairseq's GPT2BPE raises" in (ROOT / "narvl_plugin/data/text.py").read_text(encoding="utf-8")
    assert "def write_to_any_terminal" in (ROOT / "narvl_plugin/program.py").read_text(encoding="utf-8")
