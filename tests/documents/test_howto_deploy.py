"""The pages on students in use: exported, behind a server, over many images.

All of them ask the model in the box, as student.pt, so that no test trains.
"""

from __future__ import annotations

import csv
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pages import ROOT, Newcomer, Page, command_of, commands, draw_scene, lines_of, parsed
from PIL import Image

from narvl_plugin.api.exported import SAFE_FORMATS
from narvl_plugin.api.files import SHOWN
from narvl_plugin.api.loading import BOX
from narvl_plugin.bench.serving import Running, running_server
from narvl_plugin.bulk.folder import SUCCESS
from narvl_plugin.bulk.shards import SHARD_ROWS
from narvl_plugin.checkpoints.conversion import convert
from narvl_plugin.demo import gate, page
from narvl_plugin.export import FORMATS, PROMPT_LENGTH, TOLERANCE
from narvl_plugin.inference.predictor import Predictor
from narvl_plugin.serving.app import REASONS, SUMMARIES
from narvl_plugin.serving.pool import PATIENCE
from narvl_plugin.serving.requests import UPLOAD_SECONDS
from narvl_plugin.serving.schemas import TEXT_NAMES, Prediction, RequestFields

INSTALL = Page("docs/how-to/install.md")
EXPORT = Page("docs/how-to/export.md")
SERVE = Page("docs/how-to/serve.md")
BULK = Page("docs/how-to/bulk-inference.md")
PLAN = Page("docs/how-to/plan-a-large-job.md")
QUICKLY = {"OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("one", [INSTALL, EXPORT, SERVE, BULK, PLAN], ids=lambda one: one.name)
def test_every_block_is_tested(one: Page) -> None:
    one.require_tests()


@pytest.fixture(scope="module")
def boxed(tmp_path_factory: pytest.TempPathFactory, programs: Path) -> Newcomer:
    """Give a newcomer with the model in the box as student.pt, its vocabulary, a scene and a folder of images."""
    folder = tmp_path_factory.mktemp("boxed")
    draw_scene(folder)
    convert(BOX, folder / "student.pt")
    (folder / "vocab").mkdir()
    for place in (folder, folder / "vocab"):
        shutil.copyfile(BOX.with_name("spm.model"), place / "spm.model")
    for split in ("train", "test"):
        shutil.copyfile(folder / "caption" / f"{split}.tsv", folder / f"{split}.tsv")
    (folder / "FOLDER").mkdir()
    for name in ("1.png", "2.png"):
        shutil.copyfile(folder / "scene.png", folder / "FOLDER" / name)
    return Newcomer(folder, programs)


def options_of(words: str) -> dict[str, Any]:
    """Return the defaults of a command of `narvl` by the names of its options."""
    command, _ = command_of(words.split())
    return {option: parameter.default for parameter in command.params for option in parameter.opts}


def parses(block: str) -> None:
    """Check that each command of a block parses; installations and requests are not run."""
    for command in commands(block):
        command = command.replace("\\\n", " ")
        words = [word for word in shlex.split(command, comments=True) if not re.fullmatch(r"[A-Z_]+=\S+", word)]
        if words[0] == "pip":
            extra = re.fullmatch(r"narvl\[(\w+)\]", words[2])
            assert extra and f'"{extra[1]}": ' in (ROOT / "setup.py").read_text(encoding="utf-8")
        elif words[0] == "narvl":
            assert parsed(words)


# --- Installation ----------------------------------------------------------------------------------------------------


@pytest.mark.integration
@INSTALL.block("python -m venv")
def test_what_is_installed_captions(block: str, programs: Path) -> None:
    *steps, caption = commands(block)
    assert steps == ["python -m venv .venv", "source .venv/bin/activate", "pip install ."]  # not run: they download
    assert "banana" in Newcomer(ROOT, programs).types(caption)


def test_what_the_page_says_of_versions_and_parts_is_in_setup_py() -> None:
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    assert 'python_requires=">=3.11,<3.13"' in setup and '"torch>=2.6,<3"' in setup
    assert "ve-fairseq==0.12.3;" in setup and "fairseq-fixed==" in setup
    parts = set(re.findall(r"narvl\[(\w+)\]", INSTALL.text))
    extras = setup.partition("extras_require")[2]
    assert parts | {"docs", "dev"} == set(re.findall(r'^ {8}"(\w+)": ', extras, re.MULTILINE))


# --- Export ----------------------------------------------------------------------------------------------------------


@pytest.mark.integration
@EXPORT.block("pip install 'narvl[export]'", "first")
@EXPORT.block("python out/run.py image.jpg question", "asked")
@EXPORT.block("import narvl\n", "used")
@EXPORT.block("narvl export student.pt\n", "beside")
def test_exported_students(
    first: str,
    asked: str,
    used: str,
    beside: str,
    boxed: Newcomer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """Two students of one task are made of the model in the box, as export wants."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="pip install 'narvl[export]'")
    install, export, caption = commands(first)
    parses(install)
    quicker = export.replace("onnx", "torch-export")  # which is written in half the time
    for member, command, run in (("caption", quicker, caption), ("vqa_gen", beside, asked)):
        user = Newcomer(tmp_path / member, boxed.programs)
        user.folder.mkdir()
        Image.open(boxed.folder / "scene.png").convert("RGB").save(user.folder / "image.jpg")
        shutil.copyfile(BOX.with_name("spm.model"), user.folder / "spm.model")
        convert(boxed.folder / "student.pt", user.folder / "student.pt", member=member)
        user.types(f"{command.rstrip()} --bpe-dir .")
        if command == beside:
            student = Predictor.load(user.folder / "student.pt", task_overrides={"bpe_dir": str(user.folder)})
            assert student.model.exported is not None
            (user.folder / "student.onnx").rename(user.folder / "out")  # where `export` writes the same
        text, probability = user.types(run).rstrip("\n").split("\t")
        assert text and 0 <= float(probability) <= 1
    monkeypatch.chdir(tmp_path / "vqa_gen")
    exec(used, {})
    again = capsys.readouterr().out.split()
    assert (again[0], float(again[-1])) == (text, pytest.approx(float(probability), abs=1e-4))
    files = {file.name for file in (tmp_path / "vqa_gen" / "out").iterdir()}
    assert (
        {"student.onnx", "student.json", "spm.model", "run.py", "narvl_student"}
        <= files
        <= set(re.findall(r"[\w.]+", EXPORT.text))
    )


def test_facts_about_exports() -> None:
    formats = [row for row in tables(EXPORT) if row[1].startswith("student.")]
    assert [row[0].removesuffix(" (default)") for row in formats] == list(FORMATS)
    assert [row[0].removesuffix(" (default)") for row in formats if row[3] == "yes"] == list(SAFE_FORMATS)
    assert PROMPT_LENGTH == 32 and TOLERANCE == 1e-4
    assert f"{PROMPT_LENGTH} by default" in EXPORT.text and "10^{-4}" in EXPORT.text
    known = options_of("export").keys() | options_of("convert").keys() | {"--add-caption", "--add-object", "--beam"}
    assert set(re.findall(r"--[a-z][a-z0-9-]+", EXPORT.text)) <= known


# --- HTTP and the page -----------------------------------------------------------------------------------------------


def tables(one: Page) -> Iterator[list[str]]:
    """Yield the rows of all tables of a page, without backticks."""
    for line in one.text.splitlines():
        if line.startswith("|") and not re.fullmatch(r"[|: -]+", line):
            yield [cell.strip().replace("`", "") for cell in line.strip("|").split("|")]


@pytest.fixture(scope="module")
def running(boxed: Newcomer) -> Iterator[Running]:
    with running_server(BOX, "--device", "cpu", environment=QUICKLY) as found:
        yield found


@SERVE.block("pip install 'narvl[serve]'", "served")
@SERVE.block("pip install 'narvl[demo]'", "shown")
def test_commands_of_servers_parse(served: str, shown: str) -> None:
    parses(served)
    parses(shown)


@pytest.mark.integration
@SERVE.block("curl -F image")
def test_curl(block: str, boxed: Newcomer, running: Running) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    found = json.loads(boxed.types(block.replace(":8000/", f":{running.port}/")))
    assert found["text"]
    listed = re.search(r"`Prediction\.to_dict\(\)`: (.*?)\. From", SERVE.text, flags=re.DOTALL)
    assert listed and set(re.findall(r"`(\w+)`", listed[1])) == set(found) == set(Prediction.model_fields)


@pytest.mark.integration
@SERVE.block("import base64")
def test_python(
    block: str, boxed: Newcomer, running: Running, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(boxed.folder)
    exec(block.replace(":8000/", f":{running.port}/"), {})
    assert len(json.loads(capsys.readouterr().out)) == 4


@pytest.mark.integration
@SERVE.block("NARVL_API_KEY")
def test_a_key(block: str, boxed: Newcomer) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    serve, curl = commands(block)
    parses(serve)
    (key,) = re.findall(r"NARVL_API_KEY=(\S+)", serve)
    with running_server(BOX, "--device", "cpu", environment={**QUICKLY, "NARVL_API_KEY": key}) as found:
        here = curl.replace(":8000/", f":{found.port}/")
        assert json.loads(boxed.types(here))["text"]
        assert "the key is missing" in boxed.types(here.replace(f"Bearer {key}", "Bearer other"))
        assert "workers_ready" in boxed.types(f"curl http://127.0.0.1:{found.port}/health")


def test_facts_about_the_server() -> None:
    rows = list(tables(SERVE))
    texts = {row[0].removeprefix("POST /"): row[1] for row in rows if row[0].startswith("POST ")}
    assert texts == {verb: TEXT_NAMES.get(verb, "none") for verb in SUMMARIES}
    defaults = options_of("serve")
    for row in rows:
        if row[0].startswith("--"):
            named, values = row[0].split(", "), row[1].replace(",000", "000").split(", ")
            for option, value in zip(named, values, strict=True):
                known = defaults.pop(option)
                assert str(known) == value or known is None, option
    assert defaults.keys() <= {"checkpoint", "--bpe-dir", "--help"}
    for name in ("answers", "beam", "nbest", "abstain_below"):
        assert name in RequestFields.model_fields and f"`{name}`" in SERVE.text
    numbers = {int(number) for row in rows for number in re.findall(r"^\d{3}|(?<=, )\d{3}(?=$)", row[0])}
    assert numbers == {*REASONS, 408, 500}
    assert f"within {UPLOAD_SECONDS} seconds" in SERVE.text
    assert f"within {PATIENCE:.0f} seconds" in SERVE.text


def test_facts_about_the_page() -> None:
    assert f"up to {gate.MAX_UPLOAD >> 20} MB" in SERVE.text and page.KEPT == 3600
    defaults = options_of("demo")
    assert (defaults["--host"], f"http://{defaults['--host']}:{defaults['--port']}" in SERVE.text) == (
        "127.0.0.1",
        True,
    )
    assert "default-src 'self'" in gate.HEADERS["content-security-policy"]


# --- Many images -----------------------------------------------------------------------------------------------------


@pytest.mark.integration
@BULK.block("narvl caption FOLDER --checkpoint student.pt --out captions.tsv --batch-size", "caption")
@BULK.block("narvl answer FOLDER", "others")
def test_a_folder_of_images(caption: str, others: str, boxed: Newcomer) -> None:
    boxed.types(caption)
    rows = [line.split("\t") for line in lines_of(boxed.folder / "captions.tsv")]
    assert [row[0] for row in rows] == ["1.png", "2.png"] and all(row[1] for row in rows)
    for command in commands(others):
        boxed.types(command)
    assert {"tokens", "queries", "alternatives", "box"} <= json.loads(
        lines_of(boxed.folder / "answers.jsonl")[0]
    ).keys()
    assert [len(line.split("\t")) for line in lines_of(boxed.folder / "boxes.tsv")] == [3, 3]
    assert {line.split("\t")[1] for line in lines_of(boxed.folder / "entailed.tsv")} <= {"yes", "no", "maybe"}


@pytest.mark.integration
@BULK.block("narvl caption FOLDER --checkpoint student.pt --out captions.tsv/")
def test_folders_of_shards(block: str, boxed: Newcomer, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="pip install 'narvl[parquet]'")
    user = Newcomer(tmp_path, boxed.programs)
    for name in ("student.pt", "spm.model", "FOLDER"):
        (tmp_path / name).symlink_to(boxed.folder / name)
    (row,) = lines_of(boxed.folder / "train.tsv")
    image = row.split("\t")[4]
    rows = (f"{number}\t\t{text}\t\t\t{image}\n" for number, text in enumerate(("what color is it?", "how many?")))
    (tmp_path / "questions.tsv").write_text("".join(rows))
    user.types(block)
    assert [line.split("\t")[0] for line in lines_of(tmp_path / "captions.tsv.all")] == ["1.png", "2.png"]
    from pyarrow.parquet import read_table

    answers = read_table(tmp_path / "answers.parquet" / "000000-questions.parquet").to_pylist()
    assert [one["prompt"] for one in answers] == ["what color is it?", "how many?"] and answers[0]["text"]
    assert json.loads((tmp_path / "answers.parquet" / SUCCESS).read_text()) == {"rows": 2, "skipped": 0, "shards": 1}
    assert f"{SHARD_ROWS:,} images" in BULK.text


@pytest.mark.integration
@BULK.block("pip install 'narvl[ray]'", "here")
@BULK.block("narvl caption s3://bucket/images/", "cluster")
def test_shards_on_ray(here: str, cluster: str, boxed: Newcomer) -> None:
    parses(cluster)  # there is none
    install, caption = commands(here)
    parses(install)
    pytest.importorskip("ray", reason=install)
    boxed.types(caption)
    assert [line.split("\t")[0] for line in lines_of(boxed.folder / "on-ray" / "000000-images.tsv")] == [
        "1.png",
        "2.png",
    ]


@pytest.mark.integration
@BULK.block("CUDA_VISIBLE_DEVICES=0")
def test_several_processes(block: str, boxed: Newcomer) -> None:
    """All at once, as the commands of the block wait for each other."""
    (boxed.folder / "captions.tsv").unlink(missing_ok=True)
    boxed.types(block)
    with open(boxed.folder / "captions.tsv", encoding="utf-8") as file:
        assert [Path(row[0]).name for row in csv.reader(file, delimiter="\t")] == ["2.png", "1.png"]


@pytest.mark.integration
@BULK.block("fairseq-generate test.tsv")
def test_a_file_of_rows(block: str, boxed: Newcomer) -> None:
    boxed.types(f"{block.rstrip()} --cpu".replace("--num-workers 4", "--num-workers 0"))
    found = lines_of(boxed.folder / "results" / "generate-test.txt")
    assert len([line for line in found if line.startswith("D-")]) == len(lines_of(boxed.folder / "test.tsv"))


@pytest.mark.integration
@BULK.block("narvl distill --teacher", "whole")
@BULK.block("split --number", "parts")
def test_outputs_of_a_teacher(
    whole: str, parts: str, boxed: Newcomer, save_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """The parts together are the whole."""
    user = Newcomer(tmp_path, boxed.programs)
    trained = {"bpe_dir": str(boxed.folder / "vocab"), "patch_image_size": 32}
    save_checkpoint(tmp_path / "teacher.pt", "ofa", "caption", **trained)
    (row,) = (line.split("\t", 1)[1] for line in lines_of(boxed.folder / "train.tsv"))
    (tmp_path / "train.tsv").write_text("".join(f"{number}\t{row}\n" for number in range(4)))
    user.types(whole)
    expected = (tmp_path / "distilled.tsv").read_text()
    assert len(expected.splitlines()) == 4
    (tmp_path / "distilled.tsv").unlink()
    user.types(parts)
    assert (tmp_path / "distilled.tsv").read_text() == expected
    assert len(lines_of(tmp_path / "distilled01.tsv")) in (1, 2, 3)


def test_facts_about_many_images() -> None:
    for verb in ("caption", "answer", "locate", "entail"):
        defaults = options_of(verb)
        assert (defaults["--batch-size"], defaults["--workers"]) == (8, 1)
    assert f"first {SHOWN} images" in BULK.text
    known = set().union(*(options_of(command) for command in ("caption", "distill")))
    text = re.sub(r"^```.*?^```$", "", BULK.text, flags=re.MULTILINE | re.DOTALL)
    assert set(re.findall(r"--[a-z][a-z0-9-]+", text)) <= known


def test_shells_read_the_blocks() -> None:
    for one in (EXPORT, SERVE, BULK, PLAN):
        for block in one.blocks:
            if block.language == "bash":
                subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)


# --- Plans -----------------------------------------------------------------------------------------------------------


@pytest.mark.integration
@PLAN.block("narvl bench plan SAMPLE")
def test_a_sample_gives_a_plan(block: str, boxed: Newcomer) -> None:
    (boxed.folder / "SAMPLE").symlink_to("FOLDER")
    (command,) = commands(block)
    head, _, *rows = [line for line in boxed.types(command).splitlines() if line.startswith("|")]
    assert [row.split(" | ")[0] for row in rows] == ["| 1", "| 8", "| 64", "| 512"]
    columns = set(head.strip("| ").split(" | ")) - {"devices"}
    assert columns == set(re.findall(r"^\| ([^|]+?) \|", PLAN.text, re.MULTILINE)) - {"column", "---"}


@PLAN.block("from narvl_plugin.bench.plan import")
def test_a_plan_for_own_numbers(block: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(block, {})
    assert capsys.readouterr().out == PLAN.blocks[[one.text for one in PLAN.blocks].index(block) + 1].text


def test_facts_about_plans() -> None:
    assert f"shards of\n  {SHARD_ROWS:,} rows" in PLAN.text
    assert options_of("bench plan")["--shard-rows"] == SHARD_ROWS
