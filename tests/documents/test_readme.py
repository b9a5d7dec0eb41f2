"""README's commands, each run as it is printed, in a folder with small stand-ins of the files that it names.

A `…` stands for further options, and a test puts there what makes the run small. All else is left as it is, unless a
comment says why. A block that no test is about is an error.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pages import ROOT, SHORT, SMALL, Newcomer, Page, command_of, commands, draw_scene, lines_of, parsed, save_model
from PIL import Image

from narvl_plugin.api.loading import BOX
from narvl_plugin.bench.serving import running_server
from narvl_plugin.checkpoints.reading import read_checkpoint
from narvl_plugin.data.text import load_codec
from narvl_plugin.models.interop import flags_of

PAGE = Page("README.md")


def test_every_block_is_tested() -> None:
    PAGE.require_tests()


# --- Scripts: with programs that write down how they are called, as trainings of hours cannot be part of a test ------


@pytest.mark.integration
@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@PAGE.block("make demo")
def test_make(block: str, newcomer: Newcomer, recorded: Callable[[], list[list[str]]]) -> None:
    """The scripts run for real, with the preset smoke, in test_pipeline.py."""
    demo, demo_all, test = commands(block)
    newcomer.types(demo)
    calls = recorded()
    assert [call[0] for call in calls].count("fairseq-train") >= 2  # a teacher and a student
    assert {"distill", "vocab", "features", "calibrate", "bench", "report"} <= {call[1] for call in calls}
    assert (newcomer.folder / "runs" / "caption_quick_seed1" / "report.html").is_file()

    newcomer.types(demo_all)
    tasks = [call[call.index("--task") + 1] for call in recorded() if call[0] == "fairseq-generate"]
    assert set(tasks) == {"refcoco", "snli_ve", "vqa_gen"}  # the run of captions is done

    newcomer.types(test)
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
    assert distilling["teacher"].resolve() == newcomer.folder / "ofa_base.pt"
    assert distilling["data"] == newcomer.folder / "coco" / "train.tsv"


# --- Python ----------------------------------------------------------------------------------------------------------


@PAGE.block("import torch\nfrom narvl_plugin.ctc.loss")
def test_the_loss(block: str) -> None:
    names: dict[str, Any] = {}
    exec(block, names)
    assert names["loss"].isfinite() and names["logits"].grad.abs().sum() > 0


@pytest.mark.integration
@PAGE.block("import narvl\n")
def test_a_model_answers_in_python(
    block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    draw_scene(tmp_path)
    monkeypatch.chdir(tmp_path)
    exec(block, {})
    caption, answer, box, alternatives = capsys.readouterr().out.splitlines()
    assert caption.startswith("Prediction(text='") and answer
    assert len(box.split(",")) == 4
    assert {word in alternatives for word in ("'yes'", "'no'", "'maybe'")} == {True}


@pytest.mark.integration
@PAGE.block("narvl caption scene.png")
def test_a_model_answers_on_the_command_line(block: str, tmp_path: Path, programs: Path) -> None:
    draw_scene(tmp_path)
    newcomer = Newcomer(tmp_path, programs)
    caption, answer, _, entailed = map(newcomer.types, commands(block))
    assert caption.startswith("scene.png\t") and len(answer.split("\t")) == 3
    assert "<rect " in (tmp_path / "found.html").read_text()
    assert json.loads(entailed)["text"] in ("yes", "no", "maybe")


@pytest.mark.integration
@PAGE.block("curl -F image")
def test_a_model_answers_over_http(block: str, tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    draw_scene(tmp_path)
    with running_server(BOX, "--device", "cpu", environment={"OMP_NUM_THREADS": "1"}) as server:
        command = block.replace(":8000/", f":{server.port}/")
        done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["text"]


@pytest.mark.integration
@PAGE.block("import torch\nfrom narvl_plugin.models import build")
def test_a_model_without_a_task(block: str) -> None:
    names: dict[str, Any] = {}
    exec(block, names)
    assert names["logits"].shape == (1, 20, 59458)
    assert names["extra"]["encoder_out"].shape == (16 * 16 + 4, 1, 768)


# --- Training and generation -----------------------------------------------------------------------------------------


@pytest.mark.integration
@PAGE.block("fairseq-train train.tsv")
def test_a_student_says_captions_in_the_sizes_of_its_training(block: str, captioner: Newcomer) -> None:
    _, generate = commands(block)
    assert "size" not in generate
    assert len(captioner.generated(generate)) == len(lines_of(captioner.folder / "test.tsv"))


@pytest.mark.integration
@pytest.mark.parametrize(
    ("beginning", "placeholders", "output"),
    [
        ("narvl calibrate student.pt", {}, "calibration.json"),
        ("narvl caption", {"FOLDER": "pictures", "CKPT": "student.pt"}, "captions.tsv"),
        ("narvl distill --teacher", {"CKPT": "teacher.pt", "IN.tsv": "train.tsv", "OUT.tsv": "said.tsv"}, "said.tsv"),
        ("narvl vocab TSV", {"TSV": "train.tsv", "DIR": "pieces"}, "pieces/spm.model"),
    ],
)
def test_commands_in_the_text(beginning: str, placeholders: dict[str, str], output: str, captioner: Newcomer) -> None:
    (captioner.folder / "pictures").mkdir(exist_ok=True)
    Image.new("RGB", (32, 24), "red").save(captioner.folder / "pictures" / "red.png")
    words = [placeholders.get(word, word) for word in PAGE.in_text(beginning).split()]
    captioner.types(" ".join(words))
    assert (captioner.folder / output).stat().st_size > 0


@pytest.mark.parametrize("command", [span for span in PAGE.spans if re.match("narvl [a-z]", span)])
def test_commands_and_options_in_the_text_exist(command: str) -> None:
    found, _ = command_of(re.findall(r"^(?:[a-z-]+ ?)+", command.removeprefix("narvl "))[0].split())
    known = {option for parameter in found.params for option in parameter.opts}
    assert set(re.findall(r"--[a-z0-9-]+", command)) <= known


@pytest.mark.integration
@PAGE.block("caption:  ", "mixture")
@PAGE.block("narvl vocab mixture.yaml")
def test_one_file_trains_a_teacher_and_a_student_of_several_tasks(mixture: str, block: str, newcomer: Newcomer) -> None:
    (newcomer.folder / "mixture.yaml").write_text(mixture, encoding="utf-8")
    shutil.rmtree(newcomer.folder / "vocab")
    vocabulary, train, generate = commands(block)
    newcomer.types(vocabulary)
    teacher = train.replace("--arch narvl_base --criterion qctc", PAGE.in_text("--arch ofa_base --criterion"))
    assert teacher != train
    newcomer.types(teacher, f"{SMALL} {SHORT} --save-dir teacher")
    newcomer.types(train, f"{SMALL} {SHORT} --finetune-from-model teacher/checkpoint_last.pt")
    newcomer.keep_last("student.pt")
    assert len(newcomer.generated(generate, "--cpu")) == len(lines_of(newcomer.folder / "gqa_test.tsv"))
    newcomer.types(PAGE.in_text("narvl convert student.pt gqa.pt"))
    assert read_checkpoint(newcomer.folder / "gqa.pt")["model"]["decoder.query_embed.weight"].shape == (6, 16)


@pytest.mark.integration
@PAGE.block("fairseq-hydra-train")
def test_a_configuration(block: str, newcomer: Newcomer, save_checkpoint: Callable[..., Path]) -> None:
    """With small sizes added, since size base on images of 480 pixels takes minutes on a CPU."""
    shutil.copytree(ROOT / "run_scripts", newcomer.folder / "run_scripts")
    shutil.copytree(newcomer.folder / "vocab", newcomer.folder / "bpe")
    save_checkpoint(newcomer.folder / "teacher.pt", "ofa", "caption", bpe_dir=str(newcomer.folder / "bpe"))
    sizes = re.sub(r"--(\S+) (\w+)", lambda found: f"+model.{found[1].replace('-', '_')}={found[2]}", SMALL)
    sizes = sizes.replace("--freeze-resnet", "+model.freeze_resnet=true task.patch_image_size=32")
    short = "common.cpu=true dataset.num_workers=0 optimization.max_update=1 optimization.max_epoch=1"
    newcomer.types(f"{block.rstrip()} {sizes} {short}")
    assert (newcomer.folder / "runs" / "caption_base" / "student" / "checkpoint_best.pt").is_file()


@pytest.mark.integration
@PAGE.block("python out/run.py")
def test_exported_students(
    block: str, captioner: Newcomer, newcomer: Newcomer, save_checkpoint: Callable[..., Path]
) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="pip install 'narvl[export]'")
    trained = {"bpe_dir": str(newcomer.folder / "vocab"), "patch_image_size": 32}
    save_checkpoint(newcomer.folder / "student.pt", "narvl", "vqa_gen", **trained)
    export = PAGE.in_text("narvl export student.pt out")
    quicker = export.replace("onnx", "torch-export")  # the other format that README names is written in half the time
    for user, first, command in zip((captioner, newcomer), (export, quicker), commands(block), strict=True):
        Image.new("RGB", (32, 24), "red").save(user.folder / "image.jpg")
        user.types(first)
        _, probability = user.types(command).rstrip("\n").split("\t")
        assert 0 <= float(probability) <= 1


# --- Published checkpoints -------------------------------------------------------------------------------------------


@pytest.mark.integration
@PAGE.block("fairseq-train … --arch narvl_base")
def test_published_checkpoints(block: str, newcomer: Newcomer) -> None:
    """With stand-ins of OFA's sizes, of random weights and few words."""
    folder = newcomer.folder
    (folder / "bpe").mkdir()
    (folder / "bpe" / "dict.txt").write_text("".join(f"{token} 1\n" for token in range(1000)))
    save_model(folder / "ofa_base.pt", "base", len(load_codec(folder / "bpe").dictionary), layout=flags_of)
    train, generate, to_student, to_ofa, to_safetensors = commands(block)
    caption = '--user-dir "$(narvl path)" --task caption --bpe-dir bpe --patch-image-size 32'
    # sgd has no state beside each weight; with so few words a caption takes more tokens than there are queries.
    short = SHORT.replace("adam", "sgd") + " --skip-bad-rows 1"
    newcomer.types(train, f"train.tsv,valid.tsv {caption} --criterion qctc {short} --no-save --disable-validation")
    assert len(newcomer.generated(generate, f"test.tsv {caption} --max-len-b 2 --cpu")) == 2
    newcomer.types(to_student)
    state = read_checkpoint(folder / "student.pt")
    assert state["model"]["decoder.query_embed.weight"].shape == (20, 768)

    save_model(folder / "teacher.pt", "tiny", 200)
    newcomer.types(to_ofa)
    assert isinstance(read_checkpoint(folder / "ofa.pt")["cfg"]["model"], Namespace)
    newcomer.types(to_safetensors)
    description = json.loads((folder / "student.json").read_text())
    assert description["cfg"]["model"]["num_queries"] == 20


# --- Data sets and benchmarks ----------------------------------------------------------------------------------------


@pytest.mark.integration
@PAGE.block("narvl data coco", "data")
@PAGE.block("narvl predictions", "benchmarks")
def test_from_raw_data_to_scores(
    data: str,
    benchmarks: str,
    newcomer: Newcomer,
    write_raw_data: Callable[[Path], None],
    predictions: dict[str, Any],
    save_checkpoint: Callable[..., Path],
) -> None:
    folder = newcomer.folder
    write_raw_data(folder / "DIR")
    *converters, easy_vqa = commands(data)
    for command in converters:
        newcomer.types(command)
        (out,) = re.findall(r"--out (\S+)", command)
        assert len(list((folder / out).glob("*.tsv"))) >= 3

    shutil.copytree(folder / "DIR", folder, dirs_exist_ok=True)
    save_checkpoint(folder / "student.pt", "narvl", "vqa_gen", bpe_dir=str(folder / "vocab"), patch_image_size=32)
    generate = 'fairseq-generate vqa_tsv/val.tsv --user-dir "$(narvl path)" --task vqa_gen --path student.pt'
    newcomer.types(f"{generate} --results-path . --cpu")
    for name, right in predictions.items():
        (folder / name).write_text(json.dumps(right))
    predict, *evaluations = commands(benchmarks)
    newcomer.types(predict)
    for command in evaluations:
        assert "1.0000" in newcomer.types(command) or "vqa.json" in command
    assert (folder / "scores.json").is_file()

    if importlib.util.find_spec("easy_vqa") is None:
        pytest.skip("all but its last line is tested: pip install easy-vqa==1.0")
    newcomer.types(easy_vqa)
    assert (folder / "easy_vqa_tsv" / "trainval_ans2label.pkl").is_file()
