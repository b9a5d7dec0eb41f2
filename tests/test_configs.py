"""The configurations of fairseq-hydra-train: that they compose, say what the recipes say, and train."""

from __future__ import annotations

import copy
import functools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq import models, options
from fairseq.dataclass.initialize import add_defaults, hydra_init
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, MissingConfigException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import ConfigKeyError

import narvl_plugin.hydra_start  # as the configurations' callback does
from narvl_plugin.checkpoints.reading import read_checkpoint
from narvl_plugin.data.scenes import write_scenes
from narvl_plugin.data.text import train_sentencepiece
from narvl_plugin.models.config import SIZES, NarvlConfig, OfaConfig

ROOT = Path(__file__).parents[1]
RUN_FOR_REAL = f'[ "$1" != run ] || exec {sys.executable} {ROOT / "narvl.py"} "$@"'
"""Beginning of a stand-in of narvl: the engine of the run scripts is no stand-in."""
CONFIGS = ROOT / "run_scripts" / "config"
TASKS = ("caption", "vqa", "gqa", "refcoco", "refcocog", "regions", "scene_graph", "scene_tree", "snli_ve")
EMBEDDED = [task for task in TASKS if task != "refcocog"]
NAMES = sorted({f"{task}_{size}" for task in TASKS for size in SIZES} - {"refcocog_nano"})
"""Names of recipes and sizes: those of size nano are trained on embedded data, and there is none of refcocog's."""


def choices(name: str) -> list[str]:
    """Return the words that choose a recipe and a size: of nano, with the preset quick."""
    recipe, _, size = name.rpartition("_")
    return [f"recipe={recipe}", f"size={size}", *(["preset=quick"] if size == "nano" else [])]


@pytest.fixture(scope="module")
def composed() -> Iterator[Any]:
    """Give a function that composes a configuration as fairseq-hydra-train does, and resolves it."""
    before = HydraConfig.instance().cfg

    @functools.cache  # half a second each
    def run(name: str, *overrides: str, folder: Path = CONFIGS) -> DictConfig:
        hydra_init("train")
        with initialize_config_dir(str(folder), version_base="1.1"):
            whole = compose("train", [*choices(name), *overrides], return_hydra_config=True)
        HydraConfig.instance().set_config(whole)
        cfg = copy.deepcopy(whole)
        with open_dict(cfg):
            del cfg["hydra"]
        add_defaults(cfg)
        return OmegaConf.create(OmegaConf.to_container(cfg, resolve=True, enum_to_str=True))

    yield run
    GlobalHydra.instance().clear()
    HydraConfig.instance().cfg = before


def test_there_is_a_recipe_of_each_task_and_a_file_of_each_size(composed: Any) -> None:
    assert {file.stem for file in CONFIGS.glob("recipe/*.yaml")} == {*TASKS, "common"}
    assert {file.stem for file in CONFIGS.glob("size/*.yaml")} == set(SIZES)
    assert [file.name for file in CONFIGS.glob("*.yaml")] == ["train.yaml"]
    with pytest.raises(MissingConfigException, match="refcocog"):
        composed("refcocog_nano")


QUERIES = {
    **{"caption": 20, "vqa": 6, "gqa": 6, "refcoco": 7, "refcocog": 7, "regions": 40, "scene_graph": 84},
    **{"scene_tree": 40, "snli_ve": 3},
    **{"caption_nano": 24, "scene_graph_nano": 57},
}


def has_the_values_of_its_size(cfg: DictConfig, size: str, config: OfaConfig) -> bool:
    """Whether all that any size changes of the defaults is as this one has it."""
    expected = {key: getattr(config, key) for key in SIZES["large"] | SIZES["nano"]} | SIZES[size]
    return {key: cfg.model[key] for key in expected} == expected


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", NAMES)
def test_students(composed: Any, name: str) -> None:
    task, _, size = name.rpartition("_")
    cfg = composed(name)
    assert cfg.model._name == f"narvl_{size}"
    assert has_the_values_of_its_size(cfg, size, NarvlConfig())
    drop_path = 0.0 if size == "nano" else 0.1
    assert cfg.model.encoder_drop_path_rate == cfg.model.decoder_drop_path_rate == drop_path
    assert cfg.model.dropout == (0.0 if name in ("gqa_nano", "snli_ve_nano") else 0.1)
    assert cfg.model.num_queries == QUERIES.get(name, QUERIES[task])
    assert cfg.model.freeze_embedding == (task in ("caption", "vqa", "gqa") and size != "nano")
    criterion = "qset" if task in ("regions", "scene_graph", "scene_tree") else "qctc"
    assert (cfg.criterion._name, cfg.checkpoint.save_dir) == (criterion, f"runs/{name}/student")
    assert cfg.common.user_dir == str(Path(narvl_plugin.__file__).parent)


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith(("_nano", "_base"))])
def test_teachers(composed: Any, name: str) -> None:
    _, _, size = name.rpartition("_")
    cfg = composed(name, "role=teacher")
    assert cfg.model._name == f"ofa_{size}"
    assert has_the_values_of_its_size(cfg, size, OfaConfig())
    assert cfg.criterion._name == "adjust_label_smoothed_cross_entropy"
    assert cfg.criterion.label_smoothing == (0.0 if size == "nano" else 0.1)
    assert (cfg.checkpoint.save_dir, cfg.checkpoint.finetune_from_model) == (f"runs/{name}/teacher", None)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("task", "task_name", "metric", "image", "lr", "epochs", "warmup", "ema", "batch", "accumulated"),
    [
        ("caption", "caption", "cider", 480, 1e-5, 5, 0.06, False, 2, 8),
        ("vqa", "vqa_gen", "vqa_score", 480, 5e-5, 10, 0.04, True, 4, 16),
        ("gqa", "vqa_gen", "vqa_score", 480, 5e-5, 10, 0.04, True, 4, 16),
        ("refcoco", "refcoco", "score", 512, 5e-5, 10, 0.06, False, 4, 4),
        ("refcocog", "refcoco", "score", 512, 3e-5, 12, 0.06, False, 4, 4),
        ("regions", "regions", "score", 512, 5e-5, 10, 0.06, False, 4, 4),
        ("scene_graph", "scene_graph", "score", 512, 5e-5, 10, 0.06, False, 4, 4),
        ("scene_tree", "scene_tree", "score", 512, 5e-5, 10, 0.06, False, 4, 4),
        ("snli_ve", "snli_ve", "snli_score", 480, 5e-5, 5, 0.06, False, 4, 8),
    ],
)
def test_the_published_recipes(
    composed: Any,
    task: str,
    task_name: str,
    metric: str,
    image: int,
    lr: float,
    epochs: int,
    warmup: float,
    ema: bool,
    batch: int,
    accumulated: int,
) -> None:
    cfg = composed(f"{task}_large")
    assert cfg.task._name == task_name
    assert cfg.task.patch_image_size == image
    assert (cfg.checkpoint.best_checkpoint_metric, cfg.checkpoint.maximize_best_checkpoint_metric) == (metric, True)
    assert cfg.task["eval_cider" if task == "caption" else "eval_acc"]
    assert (list(cfg.optimization.lr), cfg.optimization.max_epoch, cfg.optimization.max_update) == ([lr], epochs, 0)
    assert (cfg.dataset.batch_size, list(cfg.optimization.update_freq)) == (batch, [accumulated])
    assert (cfg.optimizer._name, cfg.optimizer.adam_betas, cfg.optimizer.weight_decay) == ("adam", "(0.9, 0.999)", 0.01)
    assert cfg.optimization.clip_norm == 1.0
    schedule = cfg.lr_scheduler
    assert (schedule._name, schedule.warmup_ratio, list(schedule.lr)) == ("polynomial_decay_ratio", warmup, [lr])
    assert schedule.total_num_update == 0  # which our schedule replaces by the updates of max_epoch
    assert (cfg.ema.store_ema, cfg.ema.ema_decay) == (ema, 0.9999)


def script_settings(task: str, folder: Path) -> dict[str, str]:
    """Return what a task's script is set to: it writes that down before its first program, which here fails."""
    shutil.copytree(ROOT / "run_scripts", folder / "run_scripts")
    program = folder / ".venv" / "bin" / "narvl"
    program.parent.mkdir(parents=True)
    program.write_text(f"#!/bin/sh\n{RUN_FOR_REAL}\nexit 1\n")
    program.chmod(0o755)
    command = ["bash", folder / "run_scripts" / f"{task}.sh", f"OUT={folder / 'out'}"]
    subprocess.run(command, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)})
    lines = (folder / "out" / "settings.txt").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("task", EMBEDDED)
def test_embedded_recipes_are_those_of_the_scripts(composed: Any, task: str, tmp_path: Path) -> None:
    script = script_settings(task, tmp_path)
    assert script["PRESET"] == "quick"
    student = composed(f"{task}_nano")
    teacher = composed(f"{task}_nano", "role=teacher")
    features = f"runs/{task}_quick_seed1/features"
    assert teacher.task.data == f"{features}/train.tsv,{features}/valid.tsv"
    trained_on = f"runs/{task}_quick_seed1/distilled" if script["DISTIL"] == "1" else features
    assert student.task.data == f"{trained_on}/train.tsv,{features}/valid.tsv"
    assert student.checkpoint.finetune_from_model == f"runs/{task}_quick_seed1/teacher/checkpoint_last.pt"
    for cfg, role in ((student, "STUDENT"), (teacher, "TEACHER")):
        updates = int(script[f"{role}_UPDATES"])
        assert cfg.task.patch_image_size == int(script["PATCH_IMAGE_SIZE"])
        assert (cfg.task.num_bins, cfg.task.max_tgt_length) == (int(script["NUM_BINS"]), int(script["WORDS"]))
        assert (cfg.optimization.max_update, cfg.optimization.max_epoch) == (updates, 0)
        assert cfg.lr_scheduler.total_num_update == updates
        assert cfg.checkpoint.save_interval_updates == cfg.dataset.validate_interval_updates == 300
        assert list(cfg.optimization.lr) == [float(script[f"{role}_LR"])]
        assert cfg.lr_scheduler.warmup_ratio == float(script["WARMUP_RATIO"])
        assert cfg.dataset.batch_size == int(script["BATCH"])
        assert list(cfg.optimization.update_freq) == [int(script["UPDATE_FREQ"])]
        assert cfg.model.dropout == float(script["STUDENT_DROPOUT" if cfg is student else "DROPOUT"])
        assert cfg.optimizer.adam_betas == f"(0.9, {script['ADAM_BETA2']})"
        assert cfg.task.matmul_precision == "medium"
        assert cfg.ema.store_ema == bool(script["EMA_DECAY"])
    assert teacher.criterion.label_smoothing == float(script["LABEL_SMOOTHING"])
    assert student.model.num_queries == int(script["QUERIES"])
    assert student.criterion.score_weight == float(script["SCORE_WEIGHT"])
    assert student.criterion.get("bigram_weight", 0) == float(script["BIGRAM_WEIGHT"])  # a loss of sets has none


def files_named(cfg: DictConfig) -> set[str]:
    """Return the files and folders that a configuration reads."""
    named = {cfg.task.bpe_dir, cfg.task.get("ans2label_file"), cfg.checkpoint.finetune_from_model}
    return (named | set(cfg.task.data.split(","))) - {None}


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("task", EMBEDDED)
def test_files_that_embedded_configurations_read_are_made_by_the_scripts(
    composed: Any, task: str, tmp_path: Path
) -> None:
    """Of which the programs are stand-ins that make the files that the real ones make, by name."""
    shutil.copytree(ROOT / "run_scripts", tmp_path / "run_scripts")
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    for program in ("narvl", "fairseq-hydra-train", "fairseq-generate"):
        recorder = ROOT / "tests" / "documents" / "recorder.py"
        first = f"{RUN_FOR_REAL}\n" if program == "narvl" else ""
        (programs / program).write_text(f'#!/bin/sh\n{first}exec {sys.executable} -SE {recorder} {program} "$@"\n')
        (programs / program).chmod(0o755)
    environment = {**os.environ, "RECORD": str(tmp_path / "record"), "PLUGIN": str(ROOT / "narvl_plugin")}
    environment["PYTHONPATH"] = str(ROOT)
    (made_by,) = re.findall(r"made_by: (bash \S+)", (CONFIGS / "embedded" / "common.yaml").read_text())
    command = made_by.replace("${hydra.runtime.choices.recipe}", task)
    subprocess.run(command, shell=True, cwd=tmp_path, env=environment, check=True, capture_output=True)
    for role in ((), ("role=teacher",)):
        for file in files_named(composed(f"{task}_nano", *role)):
            assert (tmp_path / file).exists(), file


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("task", TASKS)
def test_files_that_other_configurations_read_are_named_in_their_guide(composed: Any, task: str) -> None:
    """Of size base: `test_other_sizes_are_trained_as_base_is`."""
    guide = (ROOT / "docs" / "how-to" / "hydra.md").read_text()
    cfg = composed(f"{task}_base", "task.data=DATA", "task.bpe_dir=BPE")
    assert files_named(cfg) == {"DATA", "BPE", "teacher.pt"}
    for option in ("task.data", "task.bpe_dir", "checkpoint.finetune_from_model=teacher.pt"):
        assert option in guide


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", [name for name in NAMES if not name.endswith(("_nano", "_base"))])
def test_other_sizes_are_trained_as_base_is(composed: Any, name: str) -> None:
    task, _, _ = name.rpartition("_")
    cfg, base = (copy.deepcopy(composed(other)) for other in (name, f"{task}_base"))
    for each in (cfg, base):
        del each["model"]
        each.checkpoint.save_dir = ""
    assert cfg == base


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_unknown_options_are_refused(composed: Any) -> None:
    with pytest.raises(ConfigCompositionException, match=r"optimization\.epochs"):
        composed("caption_base", "optimization.epochs=3")
    for group in ("task", "model", "criterion", "optimizer", "lr_scheduler"):
        with pytest.raises(ConfigKeyError, match="Key 'colour' not in"):
            composed("caption_base", f"+{group}.colour=red")


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("key", "typo"), [("max_epoch", "max_epochs"), ("max_tgt_length", "max_target_length")])
def test_unknown_keys_of_a_file_are_refused(composed: Any, tmp_path: Path, key: str, typo: str) -> None:
    shutil.copytree(CONFIGS, tmp_path / "config")
    recipe = tmp_path / "config" / "recipe" / "caption.yaml"
    recipe.write_text(recipe.read_text().replace(f"{key}:", f"{typo}:"))
    with pytest.raises((ConfigKeyError, ConfigCompositionException), match=f"Key '{typo}' not in"):
        composed("caption_base", folder=tmp_path / "config")


def test_an_explicit_option_outweighs_the_size() -> None:
    cfg = OmegaConf.create({"_name": "ofa_nano", "freeze_resnet": False, "encoder_layers": 3})
    merged = OmegaConf.merge(models.MODEL_DATACLASS_REGISTRY["ofa_nano"], cfg)
    assert (merged.freeze_resnet, merged.encoder_layers, merged.decoder_layers) == (False, 3, 3)
    assert (merged.vision_trunk, merged.encoder_embed_dim) == ("tf_efficientnet_lite0", 128)


@pytest.mark.parametrize("flags", [[], ["--freeze-resnet"]])
def test_a_flag_switches_on_also_what_a_size_has_on(flags: list[str]) -> None:
    command = ["DATA", "--task", "caption", "--bpe-dir", "BPE", "--arch", "narvl_nano", "--num-queries", "7", *flags]
    cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(options.get_training_parser(), command))
    assert (cfg.model._name, cfg.model.freeze_resnet, cfg.model.num_queries) == ("narvl_nano", True, 7)
    assert has_the_values_of_its_size(cfg, "nano", NarvlConfig())


def hydra_train(programs: Path, folder: Path, name: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Run fairseq-hydra-train in a folder, from this source tree."""
    command = [
        "fairseq-hydra-train",
        "--config-dir",
        str(CONFIGS),
        "--config-name",
        "train",
        *choices(name),
        *overrides,
    ]
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    environment["OMP_NUM_THREADS"] = "1"
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with scenes and a vocabulary."""
    folder = tmp_path_factory.mktemp("hydra")
    write_scenes(folder, train=12, valid=4, test=0, size=32, nouns=8, max_objects=1)
    train_sentencepiece(folder / "caption" / "train.tsv", [2], folder / "vocab", 200)
    return folder


TINY = (
    *("task.data='caption/train.tsv,caption/valid.tsv'", "task.bpe_dir=vocab", "task.patch_image_size=32"),
    *("common.cpu=true", "common.log_interval=1", "dataset.num_workers=0", "dataset.batch_size=2"),
    *("optimization.update_freq=[2]", "optimization.max_epoch=2", "lr_scheduler.warmup_ratio=0.5"),
    *("task.max_tgt_length=4", "+model.encoder_layers=1"),
)


@pytest.mark.integration
def test_a_teacher_and_then_its_student_train(folder: Path, programs: Path) -> None:
    """From a folder of relative paths: 12 rows in batches of 2, 2 in an update, are 3 updates an epoch, 6 in all."""
    done = hydra_train(programs, folder, "caption_tiny", *TINY, "role=teacher")
    assert done.returncode == 0, done.stdout + done.stderr
    teacher_file = "runs/caption_tiny/teacher/checkpoint_last.pt"
    student_options = (f"checkpoint.finetune_from_model={teacher_file}", "optimization.lr=[3e-4]")
    done = hydra_train(programs, folder, "caption_tiny", *TINY, *student_options)
    assert done.returncode == 0, done.stdout + done.stderr

    assert sorted(path.name for path in folder.iterdir()) == ["caption", "runs", "vocab"]
    out = folder / "runs" / "caption_tiny" / "student"
    assert {path.name for path in out.iterdir()} == {
        *(".hydra", "hydra_train.log", "checkpoint_best.pt", "checkpoint_last.pt")
    }
    log = (out / "hydra_train.log").read_text()
    assert "new: decoder.query_embed.weight[0:20], queries" in log
    # Half of the updates is warm-up, so that the rate, as logged after each, rises by thirds and falls by thirds.
    records = [json.loads(line[line.index("{") :]) for line in log.splitlines() if '"lr":' in line]
    rates = {int(record["num_updates"]): float(record["lr"]) for record in records if "lr" in record}
    assert rates == pytest.approx({1: 1e-4, 2: 2e-4, 3: 3e-4, 4: 2e-4, 5: 1e-4, 6: 0.0}, abs=2e-6)

    teacher, student = (read_checkpoint(folder / file) for file in (teacher_file, out / "checkpoint_best.pt"))
    for state, name in ((teacher, "ofa_tiny"), (student, "narvl_tiny")):
        model = state["cfg"]["model"]
        assert (model["_name"], model["encoder_layers"], model["decoder_layers"]) == (name, 1, 4)
        assert state["model"]["encoder.layers.0.fc1.weight"].shape == (1024, 256)
        assert state["optimizer_history"][-1]["num_updates"] in (3, 6)
    assert student["model"]["decoder.query_embed.weight"].shape == (20, 256)
    assert student["extra_state"]["best"] >= 0  # CIDEr
    # Frozen, but for the blank: the teacher's embedding as it was.
    embedding = "encoder.embed_tokens.weight"
    torch.testing.assert_close(student["model"][embedding][:-1], teacher["model"][embedding], rtol=0, atol=0)


@pytest.mark.integration
def test_a_student_without_a_teacher_is_refused(folder: Path, programs: Path) -> None:
    done = hydra_train(programs, folder, "caption_tiny", *TINY, "checkpoint.save_dir=runs/new")
    assert done.returncode != 0
    assert "--finetune-from-model teacher.pt does not exist" in done.stderr


@pytest.mark.integration
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_several_processes_without_a_gpu_are_refused(folder: Path, programs: Path) -> None:
    world = ("distributed_training.distributed_world_size=2", "distributed_training.distributed_init_method=tcp://x:1")
    done = hydra_train(programs, folder, "caption_tiny", *TINY, *world)
    assert done.returncode != 0
    assert "fairseq would start no process and train nothing" in done.stderr


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder with small data of all tasks where the embedded configurations look for them."""
    folder = tmp_path_factory.mktemp("embedded")
    tasks = {"caption": "2", "refcoco": "2", "regions": "2", "scene_graph": "2", "scene_tree": "2"}
    tasks |= {"snli_ve": "3,4,5", "vqa_gen": "2,3"}
    write_scenes(folder / "data", train=4, valid=2, test=2, size=32, nouns=8, max_objects=2, tasks=tuple(tasks))
    for name in TASKS:
        task = {"vqa": "vqa_gen", "gqa": "vqa_gen", "refcocog": "refcoco"}.get(name, name)
        run = folder / "runs" / f"{name}_quick_seed1"
        for copied in (f"data/{task}", "features", "distilled"):  # images train like their features
            shutil.copytree(folder / "data" / task, run / copied)
        texts = run / "features" / "train.tsv"
        if task == "scene_graph":  # a few rows do not hold the letters of all names
            texts = folder / "names.tsv"
            names = json.loads((run / "features" / "names.json").read_text())
            spelled = [name.replace(" ", "_") for listed in names.values() for name in listed]
            texts.write_text("".join(f"0\t0\t{name}\n" for name in spelled))
        if task == "scene_tree":
            texts = folder / "words.tsv"
            words = json.loads((run / "features" / "names.json").read_text())
            spelled = " ".join(word for lists in words.values() for listed in lists for word in listed)
            texts.write_text(f"0\t0\t( {spelled} ( {spelled} ) )\n")
        train_sentencepiece(texts, tasks[task], run / "vocab", 300)
    return folder


def start(programs: Path, folder: Path, name: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Run fairseq-hydra-train in a folder for one update."""
    short = ("common.cpu=true", "dataset.num_workers=0", "dataset.batch_size=2", "optimization.max_update=1")
    return hydra_train(programs, folder, name, *overrides, *short)


@pytest.mark.integration
@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("_nano")])
def test_embedded_configurations_train_a_teacher_and_a_student(embedded: Path, programs: Path, name: str) -> None:
    """As embedded/common.yaml says."""
    teacher = f"runs/{name}/teacher/checkpoint_last.pt"
    done = start(programs, embedded, name, "role=teacher")
    assert done.returncode == 0, done.stderr
    done = start(programs, embedded, name, f"checkpoint.finetune_from_model={teacher}")
    assert done.returncode == 0, done.stderr
    assert (embedded / "runs" / name / "student" / "checkpoint_last.pt").is_file()


SMALL = (
    *("encoder_embed_dim=16", "encoder_ffn_embed_dim=32", "encoder_attention_heads=2", "encoder_layers=1"),
    *("decoder_layers=1", "vision_trunk=test_resnet", "freeze_resnet=true"),
)
"""Sizes of a model that is trained in no time."""


@pytest.mark.integration
@pytest.mark.parametrize("task", TASKS)
def test_published_configurations_train_on_files_of_the_user(embedded: Path, programs: Path, task: str) -> None:
    """Of size base: the others differ in the model alone."""
    run = f"runs/{task}_quick_seed1"
    files = [f"task.data='{run}/features/train.tsv,{run}/features/valid.tsv'", f"task.bpe_dir={run}/vocab"]
    if task in ("scene_graph", "scene_tree"):
        files.append(f"task.names_file={run}/features/names.json")
    small = (*(f"+model.{option}" for option in SMALL), "task.patch_image_size=32")
    done = start(programs, embedded, f"{task}_base", *files, *small, "checkpoint.finetune_from_model=null")
    assert done.returncode == 0, done.stderr
    assert (embedded / "runs" / f"{task}_base" / "student" / "checkpoint_last.pt").is_file()


@pytest.mark.integration
@pytest.mark.parametrize(
    ("name", "overrides", "complaint"),
    [
        (
            "caption_base",
            ["task.bpe_dir=vocab"],
            "task.data: not given; add task.data=VALUE to the command",
        ),
        (
            "gqa_base",
            [],
            "task.bpe_dir and task.data: not given; add task.bpe_dir=VALUE task.data=VALUE to the command",
        ),
        (
            "gqa_nano",
            [],
            "--bpe-dir runs/gqa_quick_seed1/vocab: no spm.model (a vocabulary trained on the data) and no dict.txt "
            "(GPT-2 BPE of the published checkpoints; in their ports vocab.json) there; bash run_scripts/gqa.sh makes "
            "it",
        ),
    ],
)
def test_what_a_user_must_bring_is_one_line(
    programs: Path, tmp_path: Path, name: str, overrides: list[str], complaint: str
) -> None:
    done = start(programs, tmp_path, name, *overrides)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"error: {complaint}"
    assert "Traceback" not in done.stderr


@pytest.mark.integration
@pytest.mark.parametrize(
    ("missing", "complaint"),
    [
        ("data/vqa_gen/trainval_ans2label.pkl", "trainval_ans2label.pkl"),
        ("features/train.tsv", "features/train.tsv: no such TSV file"),
        ("teacher/checkpoint_last.pt", "--finetune-from-model runs/vqa_quick_seed1/teacher/checkpoint_last.pt"),
    ],
)
def test_each_missing_file_of_an_embedded_configuration_is_one_line(
    embedded: Path, programs: Path, tmp_path: Path, missing: str, complaint: str
) -> None:
    shutil.copytree(embedded / "runs" / "vqa_quick_seed1", tmp_path / "runs" / "vqa_quick_seed1")
    (tmp_path / "runs" / "vqa_quick_seed1" / missing).unlink(missing_ok=True)
    teacher = () if missing.startswith("teacher") else ("role=teacher",)
    done = start(programs, tmp_path, "vqa_nano", *teacher)
    assert done.returncode == 1
    assert complaint in done.stderr.splitlines()[-1]
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert done.stderr.endswith("; bash run_scripts/vqa.sh makes it\n")
    assert "Traceback" not in done.stderr


@pytest.mark.integration
def test_a_teacher_of_questions_without_a_list_of_answers_is_told_what_to_do(embedded: Path, programs: Path) -> None:
    run = "runs/gqa_quick_seed1"
    files = (f"task.data='{run}/features/train.tsv,{run}/features/valid.tsv'", f"task.bpe_dir={run}/vocab")
    small = (
        *(f"+model.{option}" for option in SMALL),
        "task.patch_image_size=32",
        "role=teacher",
    )
    done = start(programs, embedded, "gqa_base", *files, *small)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: --val-inference-type allcand needs a list of answers")
    done = start(programs, embedded, "gqa_base", *files, *small, "+task.val_inference_type=beamsearch")
    assert done.returncode == 0, done.stderr


@pytest.mark.integration
def test_a_configuration_that_is_started_again_goes_on_in_its_folder(folder: Path, programs: Path) -> None:
    """With more epochs as a resume, as it was without a step, and with another model or criterion not at all."""

    def run(*overrides: str) -> subprocess.CompletedProcess[str]:
        teacher = ("checkpoint.save_dir=runs/again", "role=teacher")
        return hydra_train(programs, folder, "caption_tiny", *TINY, *teacher, *overrides)

    def updates() -> int:
        state = read_checkpoint(folder / "runs" / "again" / "checkpoint_last.pt")
        return int(state["optimizer_history"][-1]["num_updates"])

    for epochs, expected in ((1, 3), (1, 3), (2, 6)):
        done = run(f"optimization.max_epoch={epochs}")
        assert done.returncode == 0, done.stdout + done.stderr
        assert updates() == expected
    for override, error in (
        ("+model.encoder_embed_dim=128", "its training began with --encoder-embed-dim 256, now 128"),
        ("criterion._name=qctc", "--criterion qctc: is for students"),
        ("task.bpe_dir=", "--bpe-dir is not given (task.bpe_dir in a configuration)"),
    ):
        done = run("optimization.max_epoch=3", override)
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1].startswith("error: ")
        assert error in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr
    assert updates() == 6
