"""The pages on training: its options, several GPUs, Hydra, several tasks, resuming."""

from __future__ import annotations

import re
import shlex
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fairseq import options
from fairseq.dataclass.initialize import hydra_init
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from pages import ROOT, SHORT, SMALL, Newcomer, Page, command_of, commands, lines_of, parsed, save_model
from PIL import Image
from torch.distributed import run as torchrun

import narvl_plugin.hydra_start  # noqa: F401 - registers ${narvl_path:}
from narvl_plugin.checkpoints.reading import read_checkpoint
from narvl_plugin.data.survey import BYTES_LOOKED_AT, ROWS_LOOKED_AT
from narvl_plugin.data.text import load_codec
from narvl_plugin.models import build
from narvl_plugin.models.config import SIZES
from narvl_plugin.models.meta import without_weights
from narvl_plugin.pipeline.keys import KEYS
from narvl_plugin.tasks import TASKS

TRAIN = Page("docs/how-to/train.md")
GPUS = Page("docs/how-to/several-gpus.md")
MACHINES = Page("docs/how-to/several-machines.md")
HYDRA = Page("docs/how-to/hydra.md")
HYDRA_TRAIN = "fairseq-hydra-train --config-dir run_scripts/config --config-name train recipe=caption size=base"
MULTITASK = Page("docs/how-to/multitask.md")
RESUME = Page("docs/how-to/resume.md")
PAGES = (TRAIN, GPUS, MACHINES, HYDRA, MULTITASK, RESUME)
CONFIGS = ROOT / "run_scripts" / "config"
NANO = f"{SHORT} --patch-image-size 32"
"""Options of a training of size nano in no time; its backbone has weights of its own."""
PUBLISHED = {"captions": "caption", "grounding": "refcoco", "entailment": "snli_ve", "questions": "vqa"}
"""Names of the page's table of recipes -> configurations."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_is_tested(page: Page) -> None:
    page.require_tests()


def rows_of(page: Page) -> Iterator[list[str]]:
    """Yield the rows of all tables of a page, without backticks."""
    for line in page.text.splitlines():
        if line.startswith("|") and not re.fullmatch(r"[|: -]+", line):
            yield [cell.strip().replace("`", "") for cell in line.strip("|").split("|")]


def read_call(command: str, more: str = "") -> dict[str, Any]:
    """Return the arguments of a command as its program reads them."""
    typed = re.sub(r"\\\n", " ", command).replace('"$(narvl path)"', str(ROOT / "narvl_plugin")).replace("…", more)
    return parsed(shlex.split(typed, comments=True))


def small_overrides() -> str:
    """Return the sizes of a model that is trained in no time, and a training of an update, for hydra."""
    sizes = re.sub(r"--(\S+) (\w+)", lambda found: f"+model.{found[1].replace('-', '_')}={found[2]}", SMALL)
    sizes = sizes.replace("--freeze-resnet", "+model.freeze_resnet=true task.patch_image_size=32")
    return f"{sizes} common.cpu=true dataset.num_workers=0 optimization.max_update=1 optimization.max_epoch=1"


@pytest.fixture
def taught(newcomer: Newcomer, save_checkpoint: Callable[..., Path]) -> Newcomer:
    """Give a newcomer with teacher.pt of size nano, and small.pt of the test's own size."""
    shutil.copytree(newcomer.folder / "vocab", newcomer.folder / "bpe")
    save_checkpoint(newcomer.folder / "small.pt", "ofa", "caption", bpe_dir=str(newcomer.folder / "bpe"))
    save_model(newcomer.folder / "teacher.pt", "nano", len(load_codec(newcomer.folder / "bpe", 1000).dictionary))
    return newcomer


# --- Trainings -------------------------------------------------------------------------------------------------------


@pytest.mark.integration
@TRAIN.block("fairseq-train train.tsv", "block")
def test_a_teacher_and_its_student(block: str, newcomer: Newcomer) -> None:
    for command in commands(block):
        newcomer.types(command, NANO.replace("--optimizer adam --lr 1e-4 ", ""))
    for name, arch in (("teacher", "ofa_nano"), ("student", "narvl_nano")):
        cfg = read_checkpoint(newcomer.folder / name / "checkpoint_last.pt")["cfg"]
        assert (cfg["model"]["_name"], cfg["optimizer"]["_name"]) == (arch, "fused_adam")


@pytest.mark.integration
@TRAIN.block("narvl features", "block")
def test_features(block: str, newcomer: Newcomer) -> None:
    for command in commands(block):
        newcomer.types(command)
    for split in ("train", "valid"):
        assert len(lines_of(newcomer.folder / f"{split}_features.tsv")) == len(
            lines_of(newcomer.folder / f"{split}.tsv")
        )


@pytest.mark.integration
@TRAIN.block("import torch\nfrom narvl_plugin.models import build")
def test_a_model_without_a_task(block: str) -> None:
    names: dict[str, Any] = {}
    exec(block, names)
    assert names["logits"].shape == (1, 20, 59458)
    assert names["extra"]["encoder_out"].shape == (16 * 16 + 4, 1, 768)


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore::UserWarning")  # of hydra, which reads the options of a training
@TRAIN.block("bash run_scripts/caption.sh PRESET", "small")
@TRAIN.block("bash run_scripts/caption.sh DATA", "published")
@RESUME.block("bash run_scripts/caption.sh", "again")
def test_scripts(
    small: str, published: str, again: str, newcomer: Newcomer, recorded: Callable[[], list[list[str]]]
) -> None:
    """With stand-ins of the programs; test_pipeline.py runs the scripts for real."""
    newcomer.types(small)
    trained = [parsed(call) for call in recorded() if call[0] == "fairseq-train"]
    assert [arguments["store_ema"] for arguments in trained[:2]] == [True, True]
    assert (trained[0]["ema_decay"], trained[0]["seed"]) == (0.999, 2)

    (newcomer.folder / "coco").mkdir()
    for split in ("train", "val", "test"):
        (newcomer.folder / "coco" / f"{split}.tsv").touch()
    (newcomer.folder / "ofa_base.pt").touch()
    (newcomer.folder / "bpe_folder").mkdir()
    newcomer.types(published)
    calls = [(call[0], parsed(call)) for call in recorded()]
    assert {arguments["arch"] for program, arguments in calls if program == "fairseq-train"} == {"narvl_base"}

    newcomer.types(again)
    assert recorded()
    newcomer.types(again.replace("SKIP_BAD_ROWS=5", "SKIP_BAD_ROWS=9 WORKERS=2"))  # settings that may change
    assert not (newcomer.folder / "record").exists(), "a finished stage was repeated"
    with pytest.raises(AssertionError, match="begun with other settings"):
        newcomer.types(f"{again.rstrip()} SEED=7")


@pytest.mark.integration
@RESUME.block("fairseq-train train.tsv", "block")
def test_a_training_goes_on(block: str, taught: Newcomer) -> None:
    """Bit by bit: see tests/training/test_resuming.py."""
    last = taught.folder / "student" / "checkpoint_last.pt"
    for updates in (1, 2):
        taught.types(block, f"{NANO} --max-update {updates}")
        assert read_checkpoint(last)["optimizer_history"][-1]["num_updates"] == updates


def test_facts_about_trainings() -> None:
    for family, first, last in re.findall(r"`(\w+?)_(\w+)` … `\1_(\w+)`", TRAIN.text):
        assert family in ("ofa", "narvl") and [first, last] == [list(SIZES)[0], list(SIZES)[-1]]
    for page in (TRAIN, HYDRA):
        named = re.search(r"`nano`, `tiny`.*?`huge`", page.text)
        assert named and re.findall(r"`(\w+)`", named[0]) == list(SIZES)
    assert f"{ROWS_LOOKED_AT:,} rows and {BYTES_LOOKED_AT >> 30} GiB" in RESUME.text


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_and_settings_are_there(page: Page) -> None:
    text = "\n".join(line for line in page.text.splitlines() if not re.match(r"\|[-:| ]+\|$", line))
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]*\b", text))
    known = {
        "--config-dir",
        "--config-name",
        "--cfg",
        "--multirun",
        *("--nodes", "--ntasks-per-node", "--gpus-per-node", "--requeue"),  # Slurm's
    } | options.get_generation_parser()._option_string_actions.keys()
    for command in set(re.findall(r"narvl (bench \w+|[a-z]+)", text)) - {"data", "path", "load", "export"}:
        found, _ = command_of(command.split())
        known |= {option for parameter in found.params for option in parameter.opts}
    for command in ("data coco", "bench training"):
        known |= {option for parameter in command_of(command.split())[0].params for option in parameter.opts}
    known |= torchrun.get_args_parser()._option_string_actions.keys()
    chosen = ["--arch", "narvl_tiny", "--optimizer", "fused_adam", "--lr-scheduler", "polynomial_decay_ratio"]
    for task in (*TASKS, "multitask"):
        parser = options.get_training_parser(task)
        words = ["data", "--task", task, "--bpe-dir", "vocab", "--criterion", "qctc", "--num-queries", "7", *chosen]
        options.parse_args_and_arch(parser, words)  # which adds those of the parts that are chosen
        known |= parser._option_string_actions.keys()
    assert named - known == set()

    settings = {key.name for key in KEYS}
    given = {span.partition("=")[0] for span in page.spans if re.fullmatch(r"[A-Z][A-Z_]+(=\S+)?", span)}
    others = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"}
    assert given - settings <= others | {"KEY", "TASK_SIZE"}


# --- Several GPUs ----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::UserWarning")
@GPUS.block("fairseq-train train.tsv")
def test_several_gpus(block: str) -> None:
    """There are none where tests run: the command is read."""
    arguments = read_call(block, "--optimizer adam --lr 1e-4")
    assert (arguments["ddp_backend"], arguments["batch_size"], arguments["update_freq"]) == ("pytorch_ddp", 2, [8])


@pytest.mark.integration
@GPUS.block("OMP_NUM_THREADS=1 torchrun")
def test_several_processes(block: str, taught: Newcomer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    taught.types(block, NANO)
    state = read_checkpoint(taught.folder / "checkpoints" / "checkpoint_last.pt")
    assert state["cfg"]["distributed_training"]["distributed_world_size"] == 2


@pytest.mark.integration
@MACHINES.block("torchrun --nnodes 2")
def test_several_machines(block: str, taught: Newcomer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both machines are this one, with a process each, on a CPU; see also tests/training/test_several_machines.py."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]} --local-addr 127.0.0.1"
    changes = {"HOST:29500": address, "--nproc-per-node 8": "--nproc-per-node 1", "narvl_base": "narvl_nano"}
    for told, here in {**changes, " --amp": ""}.items():
        assert told in block
        block = block.replace(told, here)
    taught.types(f"machine() {{\n{block}}}\nmachine > other.log 2>&1 &\nmachine\nwait $!", NANO)
    state = read_checkpoint(taught.folder / "checkpoints" / "checkpoint_last.pt")
    assert state["cfg"]["distributed_training"]["distributed_world_size"] == 2


@pytest.mark.filterwarnings("ignore::UserWarning")
@MACHINES.block("fairseq-hydra-train")
def test_a_job_of_slurm(block: str, composes: Callable[..., Any]) -> None:
    """The configuration is read; tests/training/test_slurm.py runs such a job."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    words = shlex.split(re.sub(r"\\\n", " ", block))
    assert words[:5] == shlex.split(HYDRA_TRAIN)[:5]
    cfg = composes(words[5:], return_hydra_config=True)
    assert (cfg.hydra.launcher.nodes, cfg.hydra.launcher.tasks_per_node, cfg.hydra.mode.name) == (2, 8, "MULTIRUN")
    assert (cfg.hydra.launcher.partition, cfg.optimization.update_freq) == ("gpu", [4])
    for name, _, default in (row for row in rows_of(MACHINES) if "=" in row[0]):
        key = name.partition("=")[0]
        composes([*words[5:], name])
        value = OmegaConf.select(composes(["cluster=slurm"], return_hydra_config=True), key)
        assert default == ("the cluster's" if value is None else str(value))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_updates_on_more_gpus_have_as_many_rows(composes: Callable[..., Any]) -> None:
    told = {row[0]: tuple(map(int, row[1:])) for row in rows_of(MACHINES) if row[0] in PUBLISHED}
    assert told.keys() == PUBLISHED.keys()
    for name, (batch, *frequencies, rows) in told.items():
        cfg = composes([f"recipe={PUBLISHED[name]}", "task.data=data", "task.bpe_dir=bpe"])
        assert (batch, frequencies[0]) == (cfg.dataset.batch_size, cfg.optimization.update_freq[0])
        assert [batch * each * gpus for each, gpus in zip(frequencies, (8, 16, 32), strict=True)] == [rows] * 3
    with without_weights():
        base = build("narvl_base", vocab_size=59458, num_queries=20)
    trained = sum(weight.numel() for weight in base.parameters() if weight.requires_grad)
    assert f"{8 * trained / 1e9:.1f} GB for `base`" in " ".join(MACHINES.text.split())


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_sizes_of_updates_are_those_of_the_recipes(composes: Callable[..., Any]) -> None:
    told = {row[0]: tuple(map(int, row[1:])) for row in rows_of(GPUS) if row[0] in PUBLISHED}
    assert told.keys() == PUBLISHED.keys()
    for name, config in PUBLISHED.items():
        cfg = composes([f"recipe={config}", "task.data=data", "task.bpe_dir=bpe"])
        batch, frequency = cfg.dataset.batch_size, cfg.optimization.update_freq[0]
        assert told[name] == (batch, frequency, batch * frequency * 8)
    _, captions, _ = told["captions"]
    assert f"for captions {captions * 2} on four GPUs, {captions * 8} on one" in " ".join(GPUS.text.split())
    assert f"optimization.update_freq=[{captions * 8}]" in HYDRA.text


# --- Hydra -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def composes() -> Iterator[Callable[..., Any]]:
    """Give a function that composes a configuration, which raises for options that are not there."""

    def run(overrides: list[str], **options: Any) -> Any:
        hydra_init("train")
        with initialize_config_dir(str(CONFIGS), version_base="1.1"):
            return compose("train", overrides, **options)

    yield run
    GlobalHydra.instance().clear()


@pytest.mark.integration
@HYDRA.block(f"{HYDRA_TRAIN} role=student", "student")
@HYDRA.block(f"{HYDRA_TRAIN} role=teacher", "teacher")
def test_a_configuration(student: str, teacher: str, taught: Newcomer) -> None:
    """With small sizes added, since size base on images of 480 pixels takes minutes on a CPU."""
    shutil.copytree(ROOT / "run_scripts", taught.folder / "run_scripts")
    for name in ("teacher.pt", "pretrained.pt"):
        shutil.copyfile(taught.folder / "small.pt", taught.folder / name)
    for block, role in ((student, "student"), (teacher, "teacher")):
        taught.types(f"{block.rstrip()} {small_overrides()}")
        assert (taught.folder / "runs" / "caption_base" / role / "checkpoint_best.pt").is_file()


@pytest.mark.integration
@HYDRA.block("narvl run recipe")
def test_the_whole_pipeline(block: str, newcomer: Newcomer, recorded: Callable[[], list[list[str]]]) -> None:
    shutil.copytree(ROOT / "run_scripts", newcomer.folder / "run_scripts", dirs_exist_ok=True)
    newcomer.types(f'PATH="$PWD/.venv/bin:$PATH"; {block.rstrip()}')
    calls = recorded()
    trained = [parsed(call) for call in calls if call[0] == "fairseq-train"]
    assert [cfg["arch"] for cfg in trained if cfg["arch"].startswith("narvl")][0] == "narvl_nano"
    assert {cfg["num_queries"] for cfg in trained if cfg["arch"] == "narvl_nano"} == {30}
    assert (newcomer.folder / "runs" / "caption_quick_seed1" / "report.html").is_file()


@pytest.mark.integration
@HYDRA.block("# my_configs/mine.yaml", "yaml")
@HYDRA.block("fairseq-hydra-train --config-dir my_configs", "command")
def test_your_own_file(yaml: str, command: str, newcomer: Newcomer) -> None:
    file = newcomer.folder / yaml.splitlines()[0].removeprefix("# ")
    file.parent.mkdir()
    file.write_text(yaml, encoding="utf-8")
    newcomer.types(f"{command.rstrip()} {small_overrides()}")
    state = read_checkpoint(newcomer.folder / "runs" / "mine" / "checkpoint_last.pt")
    assert state["cfg"]["lr_scheduler"]["warmup_ratio"] == 0.06


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_overrides_compose(composes: Callable[..., Any]) -> None:
    words = [word for span in HYDRA.spans for word in span.split() if re.fullmatch(r"\+?[a-z_]+\.[a-z_.]+=\S+", word)]
    assert len(words) >= 12
    for word in words:
        composes(["recipe=gqa", word])


def test_choices_of_groups() -> None:
    for group in ("recipe", "size", "role", "preset", "cluster"):
        (told,) = re.findall(rf"^\| `{group}` \| (.*?) \|", HYDRA.text, flags=re.MULTILINE)
        choices = {file.stem for file in (CONFIGS / group).glob("*.yaml")} - {"common"}
        assert set(re.findall(r"`(\w+)`", told)) == choices
    for path in re.findall(r"`((?:recipe|role|for_role|embedded|pipeline)/[\w/.]*)`", HYDRA.text):
        assert list(CONFIGS.glob(path.replace("RECIPE", "*").rstrip("/"))), path


# --- Several tasks ---------------------------------------------------------------------------------------------------


@pytest.mark.integration
@MULTITASK.block("caption:  ", "mixture")
@MULTITASK.block("narvl vocab mixture.yaml")
@MULTITASK.block("narvl distill", "distil")
@MULTITASK.block("narvl convert", "convert")
def test_one_file_trains_a_teacher_and_a_student(
    mixture: str, block: str, distil: str, convert: str, newcomer: Newcomer
) -> None:
    (newcomer.folder / "mixture.yaml").write_text(mixture, encoding="utf-8")
    shutil.rmtree(newcomer.folder / "vocab")
    vocabulary, train, generate = commands(block)
    newcomer.types(vocabulary)
    teacher = train.replace("--arch narvl_base --criterion qctc", MULTITASK.in_text("--arch ofa_base --criterion"))
    assert teacher != train
    newcomer.types(teacher, f"{SMALL} {SHORT} --save-dir teacher")
    newcomer.types(train, f"{SMALL} {SHORT} --finetune-from-model teacher/checkpoint_last.pt")
    newcomer.keep_last("student.pt")
    assert len(newcomer.generated(generate, "--cpu")) == len(lines_of(newcomer.folder / "gqa_test.tsv"))
    newcomer.types(convert)
    assert read_checkpoint(newcomer.folder / "gqa.pt")["model"]["decoder.query_embed.weight"].shape == (6, 16)
    shutil.copyfile(newcomer.folder / "teacher" / "checkpoint_last.pt", newcomer.folder / "teacher.pt")
    newcomer.types(distil)
    assert len(lines_of(newcomer.folder / "gqa" / "distilled.tsv")) == len(lines_of(newcomer.folder / "gqa/train.tsv"))


# --- Resuming --------------------------------------------------------------------------------------------------------


def test_commands_that_resume_are_there() -> None:
    for row in rows_of(RESUME):
        for name in re.findall(r"narvl ([a-z]+(?: [a-z]+)?)", row[0].replace(", ", " , ")):
            assert command_of(name.split()), name


@pytest.mark.integration
def test_what_is_said_of_a_stopped_run(newcomer: Newcomer) -> None:
    """A finished file is kept, bad rows are counted, and the error names file and row."""
    Image.new("RGB", (8, 8)).save(newcomer.folder / "image.png")
    (newcomer.folder / "bad.tsv").write_text("0\t0\ta\t\timage.png\n1\t1\tb\t\tbm8gaW1hZ2U=\n")
    command = "narvl features bad.tsv out.tsv --patch-image-size 32"
    with pytest.raises(AssertionError, match=r"bad.tsv:2: .*--skip-bad-rows"):
        newcomer.types(command)
    newcomer.types(f"{command} --skip-bad-rows 1")
    assert len(lines_of(newcomer.folder / "out.tsv")) == 1
