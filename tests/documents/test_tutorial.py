"""The tutorials: notebooks run as they are, and the commands of a training run one after the other at a small size."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jupytext
import nbformat
import pytest
import torch
from jupyter_client import AsyncKernelManager
from nbclient import NotebookClient
from nbformat import NotebookNode
from pages import ROOT, Newcomer, Page, lines_of, parsed

from narvl_plugin.checkpoints.reading import read_checkpoint

FOLDER = ROOT / "docs" / "tutorial"
PAGE = Page("docs/tutorial/train-on-scenes.md")
SMALL = {"TRAIN": 12, "VALID": 4, "TEST": 4, "TEACHER_UPDATES": 2, "STUDENT_UPDATES": 2, "QUERIES": 48, "TIMED": 2}
"""Sizes of a training in no time. A teacher of two updates repeats tokens, which takes twice the queries."""


def test_every_block_is_tested() -> None:
    PAGE.require_tests()


# --- Notebooks ---------------------------------------------------------------------------------------------------


def run(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[NotebookNode]:
    """Run a notebook in a folder, and return its cells of code.

    Its kernel talks through files: a port that was free may be taken before the kernel listens on it.
    """
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = jupytext.read(FOLDER / name)
    with TemporaryDirectory() as short:  # the name of a socket has at most 103 characters on some systems
        kernel = AsyncKernelManager(transport="ipc", connection_file=f"{short}/kernel", kernel_name="python3")
        resources = {"metadata": {"path": str(folder)}}
        NotebookClient(notebook, km=kernel, timeout=120, startup_timeout=120, resources=resources).execute()
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cells: list[NotebookNode], beginning: str) -> str:
    """Return what the one cell whose code has a line that begins so has printed."""
    (cell,) = [cell for cell in cells if re.search(f"^{re.escape(beginning)}", cell.source, flags=re.MULTILINE)]
    return "".join(output.text for output in cell.outputs if output.get("name") == "stdout")


def shown(cells: list[NotebookNode], kind: str) -> list[str]:
    """Return all that cells have shown in a format."""
    outputs = [output for cell in cells for output in cell.outputs]
    return [output.data[kind] for output in outputs if kind in output.get("data", {})]


def numbers_in(text: str) -> list[float]:
    """Return the numbers in a text."""
    return [float(number) for number in re.findall(r"-?\d+\.\d+", text)]


def test_the_notebook_is_the_page() -> None:
    """`jupytext --to ipynb docs/tutorial/first_caption.md` makes it."""
    notebook = nbformat.read(FOLDER / "first_caption.ipynb", as_version=4)
    page = jupytext.read(FOLDER / "first_caption.md")
    assert [(cell.cell_type, cell.source) for cell in notebook.cells] == [
        (cell.cell_type, cell.source) for cell in page.cells
    ]
    assert [cell for cell in notebook.cells if cell.get("outputs") or cell.get("execution_count")] == []


@pytest.mark.integration
def test_a_first_caption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = run("first_caption.md", tmp_path, monkeypatch)
    assert "two bananas" in printed(cells, "caption =") and "brown" in printed(cells, "caption =")

    queries = printed(cells, "for number, query").splitlines()
    assert len(queries) == 24
    assert {line.split()[1] for line in queries} == {"token", "repeat", "blank"}

    confidences = numbers_in(printed(cells, "for other in"))
    assert len(confidences) == 5 and confidences == sorted(confidences, reverse=True)
    assert printed(cells, "answer =").startswith("brown ")

    left, upper, right, lower = map(int, re.findall(r"\d+", printed(cells, "region =")))
    assert 30 < left < 80 and 120 < right < 170 and 140 < upper < 180 and 240 < lower < 280  # the lower banana
    assert any("<rect " in html for html in shown(cells, "text/html"))

    judged = printed(cells, "statements =").splitlines()
    assert [re.findall("yes|no|maybe", line.split("  ")[-1])[0] for line in judged] == ["yes", "no", "maybe"]
    for line in judged:
        assert len(numbers_in(line)) == 3 and abs(sum(numbers_in(line)) - 1) < 0.02

    assert len(shown(cells, "image/png")) == 2  # the scene, and where the model looked
    assert "gray background" in printed(cells, "print(model.caption(Image.new")


@pytest.mark.integration
def test_query_ctc_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = run("query-ctc-by-hand.md", tmp_path, monkeypatch)
    paths = printed(cells, "def collapse").splitlines()
    ours = [line for line in paths if "<-- the target" in line]
    assert (len(paths), len(ours)) == (27, 5)
    page = (FOLDER / "query-ctc-by-hand.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| (.+?) \| [\d.]+ · [\d.]+ · [\d.]+ \| (\d\.\d+) \|$", page, flags=re.MULTILINE)
    assert {(path, float(product)) for path, product in table} == {
        (line.partition("  ")[0].strip(), numbers_in(line)[0]) for line in ours
    }

    by_hand, by_loss, loss = numbers_in(printed(cells, "by_hand ="))
    assert by_hand == by_loss == 0.354
    assert abs(loss + torch.tensor(0.354).log()) < 1e-5

    most_probable = printed(cells, "best = max").splitlines()
    assert most_probable[0].endswith("->  red") and most_probable[1].endswith("red crab")
    assert len(shown(cells, "image/svg+xml")) == 2
    decoded = printed(cells, "from narvl_plugin.ctc import greedy").splitlines()
    assert decoded[0] == "greedy: red" and decoded[1].split() == ["beam:", "red", "crab", "0.354"]

    assert "queries needed: 3" in printed(cells, "twice =") and "do not fit" in printed(cells, "twice =")
    assert numbers_in(printed(cells, "(shares,) ="))[4] == 0.458
    assert numbers_in(printed(cells, "loss.backward()"))[4] == round(0.3 - 0.458, 3)

    mixed, settled = printed(cells, "WORDS =").split("any_of_both\n")
    assert mixed.count("0.12") == 8
    assert float(settled.split()[0]) > 0.9 and len(settled.splitlines()) == 1


# --- From data to a student --------------------------------------------------------------------------------------


def script_of(blocks: dict[str, str]) -> str:
    """Return blocks of commands as one script, in the order of the page, with a line of its own before each."""
    ordered = sorted(blocks, key=lambda name: PAGE.text.index(blocks[name]))
    return "".join(f"echo '@@ {name}'\n{blocks[name]}" for name in ordered)


STEPS = {
    "sizes": "TRAIN=",
    "data": "narvl data scenes",
    "vocabulary": "narvl vocab",
    "features": "for split in",
    "both": "both=(",
    "teacher": "fairseq-train features/train.tsv",
    "distil": "narvl distill",
    "student": "fairseq-train distilled/train.tsv",
    "generate": "generate=(",
    "calibrate": "narvl calibrate",
    "report": "narvl bench latency",
}


def steps(function: Callable[..., None]) -> Callable[..., None]:
    """Hand a test all commands of the training, as one script."""
    found = [PAGE.block(beginning, name).args[1][0] for name, beginning in STEPS.items()]
    return pytest.mark.parametrize("script", [script_of(dict(zip(STEPS, found, strict=True)))], ids=["bash"])(function)


@pytest.mark.integration
@steps
@PAGE.block("import narvl", "program")
def test_from_nothing_to_a_student(
    script: str,
    program: str,
    programs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, size in SMALL.items():
        script, number = re.subn(rf"\b{name}=\d+", f"{name}={size}", script)
        assert number == 1, f"the page sets {name} {number} times"
    said = Newcomer(tmp_path, programs).types(script)
    outputs = dict(re.findall(r"^@@ (\w+)\n(.*?)(?=^@@|\Z)", said, flags=re.MULTILINE | re.DOTALL))

    assert [len(lines_of(tmp_path / f"data/caption/{split}.tsv")) for split in ("train", "valid", "test")] == [12, 4, 4]
    assert len(outputs["data"].splitlines()) == 5
    assert base64.b64decode(lines_of(tmp_path / "data/caption/train.tsv")[0].split("\t")[4]).startswith(b"\xff\xd8")
    distilled = outputs["distil"].split("distilled/train.tsv\n")[-1]
    assert 1 <= len(distilled.splitlines()) <= 5 and "&&" not in distilled

    scores = outputs["generate"].splitlines()
    assert [re.findall(r"beam=\d", line) for line in scores] == [["beam=1"], ["beam=5"]]  # in the page's order
    assert all("CIDEr" in line for line in scores)
    assert outputs["calibrate"].startswith("temperature ")
    assert {"Teacher, beam 5", "Student"} <= set(re.findall("Teacher, beam 5|Student", outputs["report"]))
    assert "<html" in (tmp_path / "report.html").read_text(encoding="utf-8")

    teacher, student = (
        read_checkpoint(tmp_path / name / "checkpoint_last.pt")["model"] for name in ("teacher", "student")
    )
    assert student["decoder.query_embed.weight"].shape[0] == SMALL["QUERIES"]
    assert "decoder.query_embed.weight" not in teacher

    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(program, {})
    assert len(capsys.readouterr().out.splitlines()) == 12  # six scenes, and a caption of each


RECIPE = (
    "arch criterion any_reference bigram_weight dropout num_queries label_smoothing lr max_update optimizer adam_betas "
    "adam_eps weight_decay clip_norm lr_scheduler warmup_ratio update_freq patch_image_size num_bins seed "
    "max_tgt_length selected_cols beam nbest keep_references train valid test size nouns max_objects vocab_size images"
)
"""Options that make what is learned. The script shares a batch between processes, and logs in another way."""


def recipe(call: list[str]) -> tuple[str, dict[str, Any]]:
    """Return the program of a call, and its options that matter."""
    options = parsed(call)
    if call[0] == "fairseq-generate":  # the other options are those of the checkpoint
        return call[0], {name: options[name] for name in ("beam", "max_len_b", "no_repeat_ngram_size", "scoring")}
    found = {name: options[name] for name in RECIPE.split() if not isinstance(options.get(name, Path()), Path)}
    if call[0] == "fairseq-train":
        found["batch"] = options["batch_size"] * options["distributed_world_size"]
        found |= {f"eval {name}": value for name, value in json.loads(options["eval_args"]).items() if value}
    return " ".join(call[: 1 + (call[0] == "narvl")]), found


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore::UserWarning")  # of hydra, which reads the options of a training
@steps
@PAGE.block("bash run_scripts/caption.sh", "command")
def test_the_script_has_the_same_recipe(
    script: str, command: str, newcomer: Newcomer, recorded: Callable[[], list[list[str]]]
) -> None:
    """The programs are stand-ins that write down how they are called."""
    newcomer.types(command)
    by_script = list(map(recipe, recorded()))
    (newcomer.folder / "page").mkdir()
    newcomer.types(f"PATH=$PWD/.venv/bin:$PATH\ncd page\n{script}")
    by_page = list(map(recipe, recorded()))
    assert len(by_page) == 12
    for call in by_page:
        assert call in by_script
