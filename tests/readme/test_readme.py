"""README's commands, each run as it is printed, in a folder with small stand-ins of the files that it names.

A `…` stands for further options, and a test puts there what makes the run small. All else is left as it is, unless a
comment says why. A block that no test is about is an error.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import re
import shutil
import subprocess
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest
import torch
import typer
from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from PIL import Image

from narvl_plugin.api.loading import BOX
from narvl_plugin.bench.serving import running_server
from narvl_plugin.checkpoints.reading import read_checkpoint, whole_checkpoint
from narvl_plugin.cli.app import app
from narvl_plugin.data.scenes import write_scenes
from narvl_plugin.data.text import load_codec, train_sentencepiece
from narvl_plugin.models import build
from narvl_plugin.models.config import SIZES, OfaConfig
from narvl_plugin.models.interop import flags_of, tables_of

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SMALL = (
    "--encoder-embed-dim 16 --encoder-ffn-embed-dim 32 --encoder-attention-heads 2 --encoder-layers 1 "
    "--decoder-layers 1 --vision-trunk test_resnet --freeze-resnet"
)
"""Sizes of a model that is trained in no time."""
SHORT = "--max-update 1 --batch-size 2 --optimizer adam --lr 1e-4 --cpu --num-workers 0 --no-epoch-checkpoints"
LONE = re.compile(r"(?<!\S)…(?!\S)")


class Block(NamedTuple):
    """A fenced block of README."""

    constraint: str
    text: str


FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
BLOCKS = [Block(*found) for found in FENCED.findall(README)]
IN_TEXT = sorted({" ".join(span.split()) for span in re.findall(r"`([^`]+)`", FENCED.sub("", README))})
TESTED: list[Block] = []


def of_block(beginning: str, name: str = "block") -> pytest.MarkDecorator:
    """Hand a test the one block that begins so, as its argument of that name, and take note that it is tested."""
    found = [block for block in BLOCKS if block.text.startswith(beginning)]
    assert len(found) == 1, f"README has {len(found)} blocks that begin with {beginning!r}"
    TESTED.extend(found)
    return pytest.mark.parametrize(name, [found[0].text], ids=[found[0].constraint])


def commands(block: str) -> list[str]:
    """Return the commands of a block, with their comments; a line that ends in a backslash goes on in the next."""
    return re.findall(r"(?:[^\n]*\\\n)*[^\n]+", block)


def in_text(beginning: str) -> str:
    """Return the one command in README's text that begins so."""
    found = [span for span in IN_TEXT if span.startswith(beginning)]
    assert len(found) == 1, f"README's text has {len(found)} commands that begin with {beginning!r}"
    return found[0]


class Newcomer:
    """Someone who types README's commands in a folder."""

    def __init__(self, folder: Path, programs: Path) -> None:
        self.folder, self.programs = folder, programs

    def types(self, command: str, more: str = "") -> str:
        """Run a command, with `more` in the place of its `…`, and return what it printed."""
        assert bool(LONE.search(command.partition("  # ")[0])) == bool(more), f"`…` in: {command}"
        command = LONE.sub(lambda _: more, command)
        path = f"{self.programs}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        assert "was trained with" not in done.stderr, "options of generation differ from those of the training"
        return done.stdout

    def keep_last(self, name: str) -> None:
        """Keep the checkpoint that a training has left under a name of README's."""
        shutil.copyfile(self.folder / "checkpoints" / "checkpoint_last.pt", self.folder / name)

    def generated(self, command: str, more: str = "") -> list[str]:
        """Run a fairseq-generate, and return the lines of what it says."""
        return [line for line in self.types(command, more).splitlines() if line.startswith("D-")]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder with data, embedded scenes of 32 pixels, and a vocabulary of them."""
    folder = tmp_path_factory.mktemp("readme")
    write_scenes(folder, train=4, valid=2, test=2, size=32, nouns=8, max_objects=1, tasks=("caption", "vqa_gen"))
    (folder / "vqa_gen").rename(folder / "gqa")
    shutil.copyfile(folder / "gqa" / "test.tsv", folder / "gqa_test.tsv")
    for split in ("train", "valid", "test"):
        shutil.copyfile(folder / "caption" / f"{split}.tsv", folder / f"{split}.tsv")
    rows = [line.split("\t") for file in folder.rglob("*.tsv") for line in lines_of(file)]
    (folder / "texts").write_text("".join(f"{row[2]} {row[3]}\n" for row in rows), encoding="utf-8")
    train_sentencepiece(folder / "texts", [0], folder / "vocab", 400)
    return folder


def lines_of(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").splitlines()


@pytest.fixture
def newcomer(files: Path, programs: Path, tmp_path: Path) -> Iterator[Newcomer]:
    """Give a newcomer in a folder of those files, which goes with the test: some checkpoints are of half a gigabyte."""
    shutil.copytree(files, tmp_path / "folder")
    yield Newcomer(tmp_path / "folder", programs)
    shutil.rmtree(tmp_path / "folder")


def test_every_block_is_tested() -> None:
    assert len(re.findall(r"^\s*(?:```|~~~)", README, flags=re.MULTILINE)) == 2 * len(BLOCKS)
    untested = [block for block in BLOCKS if block not in TESTED]
    assert [block.constraint for block in untested] == [""], f"README's blocks without a test: {untested}"
    assert "─ encoder ─>" in untested[0].text  # the drawing of how data flow


# --- Scripts: with programs that write down how they are called, as trainings of hours cannot be part of a test ------


def parsed(call: Sequence[str]) -> dict[str, Any]:
    """Return the arguments of a program's call as the program itself reads them; it ends at those that are wrong."""
    program, *words = call
    if program == "narvl":
        command, words = command_of(words)
        return command.make_context(program, words).params
    training = program == "fairseq-train"
    parser = options.get_training_parser() if training else options.get_generation_parser()
    arguments = options.parse_args_and_arch(parser, words)
    convert_namespace_to_omegaconf(arguments)
    return vars(arguments)


def command_of(words: Sequence[str]) -> tuple[click.Command, list[str]]:
    """Return the command of `narvl` that some words name, and the words after its name."""
    command: Any = typer.main.get_command(app)
    words = list(words)
    while hasattr(command, "commands") and words:
        assert words[0] in command.commands, f"narvl has no command {words[0]}"
        command = command.commands[words.pop(0)]
    return command, words


@pytest.mark.integration
@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@of_block("make demo")
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
@of_block("bash run_scripts/caption.sh DATA=coco")
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


@of_block("import torch\nfrom narvl_plugin.ctc.loss")
def test_the_loss(block: str) -> None:
    names: dict[str, Any] = {}
    exec(block, names)
    assert names["loss"].isfinite() and names["logits"].grad.abs().sum() > 0


def draw_scene(folder: Path) -> None:
    """Write scene.png, a scene that the model in the box may know."""
    write_scenes(folder, train=1, valid=1, test=1, size=96, seed=99, nouns=24, max_objects=1, tasks=("caption",))
    image = (folder / "caption" / "test.tsv").read_text().split("\t")[4]
    (folder / "scene.png").write_bytes(base64.b64decode(image))


@pytest.mark.integration
@of_block("import narvl\n")
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
@of_block("narvl caption scene.png")
def test_a_model_answers_on_the_command_line(block: str, tmp_path: Path, programs: Path) -> None:
    draw_scene(tmp_path)
    newcomer = Newcomer(tmp_path, programs)
    caption, answer, _, entailed = map(newcomer.types, commands(block))
    assert caption.startswith("scene.png\t") and len(answer.split("\t")) == 3
    assert "<rect " in (tmp_path / "found.html").read_text()
    assert json.loads(entailed)["text"] in ("yes", "no", "maybe")


@pytest.mark.integration
@of_block("curl -F image")
def test_a_model_answers_over_http(block: str, tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    draw_scene(tmp_path)
    with running_server(BOX, "--device", "cpu", environment={"OMP_NUM_THREADS": "1"}) as server:
        command = block.replace(":8000/", f":{server.port}/")
        done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["text"]


@pytest.mark.integration
@of_block("import torch\nfrom narvl_plugin.models import build")
def test_a_model_without_a_task(block: str) -> None:
    names: dict[str, Any] = {}
    exec(block, names)
    assert names["logits"].shape == (1, 20, 59458)
    assert names["extra"]["encoder_out"].shape == (16 * 16 + 4, 1, 768)


# --- Training and generation -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def captioner(
    files: Path, programs: Path, save_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Newcomer:
    """Give a newcomer who has trained a student of captions, student.pt, as README does first."""
    newcomer = Newcomer(tmp_path_factory.mktemp("captioner") / "folder", programs)
    shutil.copytree(files, newcomer.folder)
    save_checkpoint(newcomer.folder / "teacher.pt", "ofa", "caption", bpe_dir=str(newcomer.folder / "vocab"))
    train, _ = commands(next(block.text for block in BLOCKS if block.text.startswith("fairseq-train train.tsv")))
    newcomer.types(train, f"{SMALL} {SHORT} --patch-image-size 32")
    newcomer.keep_last("student.pt")
    return newcomer


@pytest.mark.integration
@of_block("fairseq-train train.tsv")
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
    words = [placeholders.get(word, word) for word in in_text(beginning).split()]
    captioner.types(" ".join(words))
    assert (captioner.folder / output).stat().st_size > 0


@pytest.mark.parametrize("command", [span for span in IN_TEXT if re.match("narvl [a-z]", span)])
def test_commands_and_options_in_the_text_exist(command: str) -> None:
    found, _ = command_of(re.findall(r"^(?:[a-z-]+ ?)+", command.removeprefix("narvl "))[0].split())
    known = {option for parameter in found.params for option in parameter.opts}
    assert set(re.findall(r"--[a-z0-9-]+", command)) <= known


@pytest.mark.integration
@of_block("caption:  ", "mixture")
@of_block("narvl vocab mixture.yaml")
def test_one_file_trains_a_teacher_and_a_student_of_several_tasks(mixture: str, block: str, newcomer: Newcomer) -> None:
    (newcomer.folder / "mixture.yaml").write_text(mixture, encoding="utf-8")
    shutil.rmtree(newcomer.folder / "vocab")
    vocabulary, train, generate = commands(block)
    newcomer.types(vocabulary)
    teacher = train.replace("--arch narvl_base --criterion qctc", in_text("--arch ofa_base --criterion"))
    assert teacher != train
    newcomer.types(teacher, f"{SMALL} {SHORT} --save-dir teacher")
    newcomer.types(train, f"{SMALL} {SHORT} --finetune-from-model teacher/checkpoint_last.pt")
    newcomer.keep_last("student.pt")
    assert len(newcomer.generated(generate, "--cpu")) == len(lines_of(newcomer.folder / "gqa_test.tsv"))
    newcomer.types(in_text("narvl convert student.pt gqa.pt"))
    assert read_checkpoint(newcomer.folder / "gqa.pt")["model"]["decoder.query_embed.weight"].shape == (6, 16)


@pytest.mark.integration
@of_block("fairseq-hydra-train")
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
@of_block("python out/run.py")
def test_exported_students(
    block: str, captioner: Newcomer, newcomer: Newcomer, save_checkpoint: Callable[..., Path]
) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="pip install 'narvl[export]'")
    trained = {"bpe_dir": str(newcomer.folder / "vocab"), "patch_image_size": 32}
    save_checkpoint(newcomer.folder / "student.pt", "narvl", "vqa_gen", **trained)
    export = in_text("narvl export student.pt out")
    quicker = export.replace("onnx", "torch-export")  # the other format that README names is written in half the time
    for user, first, command in zip((captioner, newcomer), (export, quicker), commands(block), strict=True):
        Image.new("RGB", (32, 24), "red").save(user.folder / "image.jpg")
        user.types(first)
        _, probability = user.types(command).rstrip("\n").split("\t")
        assert 0 <= float(probability) <= 1


# --- Published checkpoints -------------------------------------------------------------------------------------------


@pytest.mark.integration
@of_block("fairseq-train … --arch narvl_base")
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


def save_model(file: Path, size: str, labels: int, layout: Callable[[OfaConfig], Any] = asdict) -> None:
    """Write a teacher of random weights in one of OFA's sizes, with its configuration in our layout or in OFA's."""
    config = OfaConfig(_name="ofa", **SIZES[size])
    cfg = {"model": layout(config), "task": {"_name": "unify_task", "bpe_dir": "../../utils/BPE"}}
    tables = tables_of(config) if layout is flags_of else {}
    torch.save(whole_checkpoint(build(f"ofa_{size}", vocab_size=labels).state_dict() | tables, cfg), file)


# --- Data sets and benchmarks ----------------------------------------------------------------------------------------


@pytest.mark.integration
@of_block("narvl data coco", "data")
@of_block("narvl predictions", "benchmarks")
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
