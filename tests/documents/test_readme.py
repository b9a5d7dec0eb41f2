"""README's commands, each run as it is printed, in a folder with small stand-ins of the files that it names.

A `…` stands for further options, and a test puts there what makes the run small. All else is left as it is, unless a
comment says why. A block that no test is about is an error.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from pages import ROOT, Newcomer, Page, command_of, commands, lines_of, parsed

PAGE = Page("README.md")


def test_every_block_is_tested() -> None:
    PAGE.require_tests()


# --- Scripts: with programs that write down how they are called, as trainings of hours cannot be part of a test ------


@pytest.mark.integration
@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@PAGE.block("make demo")
def test_make(block: str, newcomer: Newcomer, recorded: Callable[[], list[list[str]]]) -> None:
    """The scripts run for real, with the preset smoke, in test_pipeline.py."""
    newcomer.types(block.rstrip())
    calls = recorded()
    assert [call[0] for call in calls].count("fairseq-train") >= 2  # a teacher and a student
    assert {"vocab", "features", "calibrate", "bench", "report"} <= {call[1] for call in calls}
    assert (newcomer.folder / "runs" / "caption_quick_seed1" / "report.html").is_file()

    newcomer.types(PAGE.in_text("make demo-all"))
    tasks = [call[call.index("--task") + 1] for call in recorded() if call[0] == "fairseq-generate"]
    assert set(tasks) == {
        "refcoco",
        "regions",
        "scene_graph",
        "scene_tree",
        "snli_ve",
        "vqa_gen",
    }  # the run of captions is done

    newcomer.types(PAGE.in_text("make test"))
    assert recorded() == [["python", "-m", "pytest", "-n", "auto", "--dist", "worksteal"]]


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore::UserWarning")  # of hydra, which reads the options of a training
@PAGE.block("bash run_scripts/caption.sh DATA=coco")
def test_the_road_of_published_sizes(block: str, newcomer: Newcomer, recorded: Callable[[], list[list[str]]]) -> None:
    (newcomer.folder / "coco").mkdir()
    for split in ("train", "val", "test"):  # the files of narvl data coco
        (newcomer.folder / "coco" / f"{split}.tsv").touch()
    (newcomer.folder / "ofa_base.pt").touch()
    (newcomer.folder / "bpe_folder").mkdir()
    newcomer.types(block)
    calls = [(*call[:2], parsed(call)) for call in recorded()]
    assert {str(arguments["bpe_dir"]) for *_, arguments in calls} == {str(newcomer.folder / "bpe_folder")}
    trained = {arguments["arch"] for program, _, arguments in calls if program == "fairseq-train"}
    assert trained == {"narvl_base"}  # the teacher is there
    (distilling,) = [arguments for _, command, arguments in calls if command == "distill"]
    assert [file.resolve() for file in distilling["teacher"]] == [newcomer.folder / "ofa_base.pt"]
    assert distilling["data"] == newcomer.folder / "coco" / "train.tsv"


# --- Answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.integration
@PAGE.block("pip install .")
def test_a_model_answers_on_the_command_line(block: str, programs: Path) -> None:
    install, *questions = commands(block)
    assert install.startswith("pip install .  # ")  # not run, since it downloads packages
    caption, answer = (Newcomer(ROOT, programs).types(question) for question in questions)
    assert caption == "docs/images/scene.png\ta banana on the right side on a purple dotted background\n"
    assert answer.split("\t")[1] == "purple"


@pytest.mark.integration
@PAGE.block("import narvl\n")
def test_a_model_answers_in_python(
    block: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    exec(block, {})
    caption, box, judged = capsys.readouterr().out.splitlines()
    (promised,) = re.findall(r"caption\(.*\.text\)  # (.*)", block)
    assert caption == promised
    x0, y0, x1, y1 = (float(edge) for edge in box.strip("()").split(","))
    assert 0 <= x0 < x1 <= 96 and 0 <= y0 < y1 <= 96
    answer, confidence = judged.split()
    assert f"judged.confidence)  # {answer}, " in block
    assert 1 / 3 < float(confidence) < 1


# --- Training and generation -----------------------------------------------------------------------------------------


@pytest.mark.integration
@PAGE.block("fairseq-train train.tsv")
def test_a_student_predicts_captions_in_the_sizes_of_its_training(block: str, captioner: Newcomer) -> None:
    """The fixture has run the training."""
    _, generate = commands(block)
    assert "size" not in generate
    assert len(captioner.generated(generate)) == len(lines_of(captioner.folder / "test.tsv"))


@pytest.mark.parametrize("command", [span for span in PAGE.spans if re.match("narvl [a-z]", span)])
def test_commands_and_options_in_the_text_exist(command: str) -> None:
    found, _ = command_of(re.findall(r"^(?:[a-z-]+ ?)+", command.removeprefix("narvl "))[0].split())
    known = {option for parameter in found.params for option in parameter.opts}
    assert set(re.findall(r"--[a-z0-9-]+", command)) <= known


def test_it_is_short() -> None:
    assert len(PAGE.text.splitlines()) <= 150
