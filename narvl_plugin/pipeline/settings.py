"""The settings of a run: what the user gives, and what the tree of recipes makes of it."""

from __future__ import annotations

import copy
import functools
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.version import VersionBase
from omegaconf import DictConfig, OmegaConf

import narvl_plugin
from narvl_plugin.checkpoints.finding import existing, local
from narvl_plugin.data.vocabulary import holds_vocabulary
from narvl_plugin.errors import InputError, MissingInput
from narvl_plugin.pipeline.keys import KEYS, TRAININGS, Key, keys_of
from narvl_plugin.whole_files import write_whole

PRESETS = ("smoke", "quick", "full")

SETTINGS_FILE = "settings.txt"
"""Name of the file in a run's folder with its settings."""

RESOLVED = ("beam", "nbest", "distil", "vocab_size", "timed", "max_len", "no_repeat_ngram", "ngrams")
SELF_DISTIL = ("best", "mbr")
LONGEST_RUN = 8
"""Longest n-grams of `narvl ngrams`."""
SEEDS_APART = 1000
"""Difference of the training seeds of two teachers of a run."""
SIZES_OF_DATA = ("train", "valid", "test", "nouns", "objects")


@dataclass
class RunConfig:
    """The options of `narvl run`. None stands for the value of the recipe and the preset.

    `narvl_plugin.pipeline.keys` describes each.
    """

    recipe: str = "caption"
    size: str = "nano"
    preset: str = "quick"
    out: Optional[str] = None
    shared: Optional[str] = None
    until: Optional[str] = None
    cell: Optional[str] = None
    seed: int = 1
    data: Optional[str] = None
    teacher_checkpoint: Optional[str] = None
    teachers: int = 1
    init_checkpoint: Optional[str] = None
    bpe_dir: Optional[str] = None
    train: Optional[int] = None
    valid: Optional[int] = None
    test: Optional[int] = None
    nouns: Optional[int] = None
    objects: Optional[int] = None
    vocab_size: Optional[int] = None
    distil: Optional[bool] = None
    self_distil: Optional[str] = None
    baselines: bool = False
    epochs: Optional[int] = None
    dropout: Optional[float] = None
    ema_decay: Optional[float] = None
    amp: Optional[bool] = None
    beam: Optional[int] = None
    nbest: Optional[int] = None
    timed: Optional[int] = None
    max_len: Optional[int] = None
    no_repeat_ngram: Optional[int] = None
    ngrams: Optional[int] = None
    add_caption: Optional[bool] = None
    processes: Optional[int] = None
    threads: int = 1
    workers: int = 1
    skip_bad_rows: int = 0
    training: dict[str, Any] = field(default_factory=dict)
    teacher: dict[str, Any] = field(default_factory=dict)
    student: dict[str, Any] = field(default_factory=dict)


class Settings:
    """A run's settings, complete.

    Attributes:
        config: the options of the command.
        recipe: what the tree's folder `pipeline` holds of the recipe, with the user's options.
        teacher: the configuration of the teacher's training, as `fairseq-hydra-train` reads it, but for files.
        student: the same of the student's.
        out: folder of the run.
        nano: whether the models are of size nano, whose backbone is frozen.
        task: name of the task.
        processes: number of processes that share a batch.
    """

    def __init__(self, config: DictConfig, tree: Path) -> None:
        self.config = config
        self.nano = config.size == "nano"
        _find_ports(config)
        _require(config)
        for name in ("data", "bpe_dir", "teacher_checkpoint", "init_checkpoint", "shared"):
            if config[name]:  # absolute, so that a run does not depend on the current folder
                config[name] = os.path.realpath(config[name])
        self.processes = config.processes or _usual_processes()
        folder = config.out or f"runs/{config.recipe}_{config.preset}_seed{config.seed}"
        self.out = Path(os.path.realpath(folder))
        composed = {role: _composed(config, tree, role) for role in ("teacher", "student")}
        self.recipe = _recipe(config, tree, composed["teacher"])
        if (order := self.recipe["ngrams"]) and not 2 <= order <= LONGEST_RUN:
            raise InputError(f"NGRAMS={order}: choose a length from 2 to {LONGEST_RUN}, or 0")
        if order and self.recipe["no_repeat_ngram"]:
            raise InputError(f"NGRAMS={order}: needs NO_REPEAT_NGRAM=0, and it is {self.recipe['no_repeat_ngram']}")
        changed = {role: self._changed(role, whole) for role, whole in composed.items()}
        self.teacher, self.student = changed["teacher"], changed["student"]
        self.task: str = self.teacher["task"]["_name"]
        batch = self.teacher["dataset"]["batch_size"]
        if batch % self.processes:
            raise InputError(f"BATCH={batch}: is not divisible by PROCESSES={self.processes}, which share each batch")
        self.splits = self._splits()

    @property
    def answered(self) -> int:
        """The batch size of inference."""
        return 128 if self.nano else int(self.teacher["dataset"]["batch_size"])

    @property
    def distil(self) -> bool:
        """Whether the student learns the teacher's outputs."""
        return bool(self.recipe["distil"])

    @property
    def teachers(self) -> list[str]:
        """The folders of the teachers in that of the run. A student starts from the first."""
        return ["teacher", *(f"teacher_{number}" for number in range(2, self.config.teachers + 1))]

    def _changed(self, role: str, whole: DictConfig) -> dict[str, Any]:
        """Return a training's configuration with what the run and the user change of it."""
        config, recipe = self.config, self.recipe
        layers = [recipe["training"], recipe[role], _of_the_run(config, role, recipe)]
        given = OmegaConf.merge({}, *(OmegaConf.to_container(config[part]) for part in ("training", role)))
        OmegaConf.set_struct(whole, False)
        with _hydra_as(whole):
            own = OmegaConf.masked_copy(whole, [str(name) for name in whole if name != "hydra"])
            merged = OmegaConf.merge(own, *layers)
            criterion = OmegaConf.select(given, "criterion._name")
            if criterion not in (None, merged.criterion._name):
                merged.criterion = {}  # another criterion has other options
            merged = OmegaConf.merge(merged, given)
            merged.common.user_dir = str(Path(narvl_plugin.__file__).parent)
            for unknown in ("data", "bpe_dir"):  # the run's files
                merged.task[unknown] = ""
            resolved = OmegaConf.to_container(merged, resolve=True)
        assert isinstance(resolved, dict)
        return {str(name): value for name, value in resolved.items()}

    def _splits(self) -> dict[str, Path]:
        """Return the files of the data: train, valid and test."""
        config = self.config
        if not config.data:
            folder = self.out / "data" / self.task
            return {split: folder / f"{split}.tsv" for split in ("train", "valid", "test")}
        names = {
            "train": ("train", "stage1_train"),
            "valid": ("valid", "val", "dev"),
            "test": ("test", "testA", "testdev"),
        }
        return {split: self._found(*those) for split, those in names.items()}

    def _found(self, *names: str) -> Path:
        """Return the first file NAME.tsv or RECIPE_NAME.tsv of the user's folder."""
        folder = Path(self.config.data)
        for name in names:
            for file in (folder / f"{name}.tsv", folder / f"{self.config.recipe}_{name}.tsv"):
                if file.exists():
                    return file
        raise MissingInput(
            f"DATA={folder}: holds none of {' '.join(names)}, each with .tsv, as it is or after {self.config.recipe}_"
        )

    # --- What a run keeps --------------------------------------------------------------------------------------------

    def kept(self) -> dict[str, str]:
        """Return the settings that a run keeps. A run that was begun with others is refused."""
        keys = [key for key in keys_of(self.config.recipe) if key.kept]
        kept = {key.name: self._text(key) for key in keys}
        known = {key.target for key in KEYS}
        for part in TRAININGS:
            for name, value in _leaves(OmegaConf.to_container(self.config[part]), part):
                if name not in known:
                    kept[name] = _text(value)
        return kept

    def _text(self, key: Key) -> str:
        """Return a setting as it is kept."""
        part, _, rest = key.target.partition(".")
        if key.name == "ARCH":
            return f"narvl_{self.config.size}"
        if key.name == "EPOCHS":
            return _text(self.teacher["optimization"]["max_epoch"] or None)
        if key.name == "DROPOUT":
            part, rest = "teacher", "model.dropout"
        if key.name == "EMA_DECAY":
            averages = self.teacher.get("ema", {})  # those of the student alone are kept as options of its training
            return _text(averages["ema_decay"]) if averages.get("store_ema") else ""
        if key.name == "ADD_CAPTION":
            part, rest = "teacher", "task.add_caption"
        if key.name == "AMP":
            part, rest = "teacher", "common.amp"
        if rest:
            value: Any = self.student if part == "student" else self.teacher
            for name in rest.split("."):
                value = value.get(name) if isinstance(value, dict) else None
            if key.name == "ADAM_BETA2":
                value = float(str(value).strip("()").split(",")[1])
            if key.name.endswith("_UPDATES"):
                value = value or None
            return _text(value) or key.default
        return _text(self.recipe.get(part, self.config.get(part)))

    def differences(self, kept: Path) -> list[str]:
        """Return the settings that another run has kept in a file, as far as they differ from this one's."""
        now = self.kept()
        lines = kept.read_text(encoding="utf-8").splitlines()
        was = dict(line.split("=", 1) for line in lines if "=" in line)
        known = {key.name for key in KEYS if key.kept} | now.keys() | {key for key in was if "." in key}
        return [
            f"{key} (was '{was.get(key, '')}', now '{now.get(key, '')}')"
            for key in {**was, **now}
            if key in known and (key in was or "." in key) and not _same(was.get(key, ""), now.get(key, ""))
        ]

    def keep(self) -> None:
        """Store the settings of a new run in its folder.

        Raises:
            InputError: if the run was begun with other settings.
        """
        file = self.out / SETTINGS_FILE
        if not file.exists():
            write_whole(file, "".join(f"{key}={value}\n" for key, value in self.kept().items()))
            return
        different = "".join(f" {each}" for each in self.differences(file))
        if different:
            raise InputError(
                f"{self.out} was begun with other settings:{different}. Choose another OUT, or delete what depends on "
                f"them and {file}"
            )


def find_tree(given: Path | None) -> Path:
    """Return the folder of the recipes: the given one, or that of the source tree.

    Raises:
        MissingInput: if it is not there.
    """
    tree = given or Path(narvl_plugin.__file__).parents[1] / "run_scripts" / "config"
    if not (tree / "train.yaml").is_file():
        raise MissingInput(
            f"{tree}: holds no recipes (train.yaml); give the folder run_scripts/config of a clone by --config-dir"
        )
    return tree.resolve()


def _find_ports(config: DictConfig) -> None:
    """Download models of the Hugging Face hub, and take the vocabulary of a port of OFA if none is given.

    Raises:
        MissingInput, InputError: if a model cannot be downloaded, or a folder is not that of a port.
    """
    for name in ("init_checkpoint", "teacher_checkpoint"):
        path = Path(local(config[name])) if config[name] else None
        if path is not None and path.is_dir():
            existing(path)
            config[name] = str(path)
            if not config.bpe_dir and holds_vocabulary(path):
                config.bpe_dir = str(path)


def _require(config: DictConfig) -> None:
    """Check the options that need no recipe."""
    if config.preset not in PRESETS:
        raise InputError(f"PRESET={config.preset}: choose smoke, quick or full")
    if config.until not in (None, "distil"):
        raise InputError(f"UNTIL={config.until}: the only end that can be chosen is distil")
    if config.teachers < 1 or (config.teachers > 1 and config.teacher_checkpoint):
        raise InputError(f"TEACHERS={config.teachers}: choose 1 or more, and 1 if TEACHER gives a checkpoint")
    if config.self_distil and (config.self_distil not in SELF_DISTIL or config.recipe != "caption"):
        raise InputError(f"SELF_DISTIL={config.self_distil}: choose {' or '.join(SELF_DISTIL)}, for captions")
    if config.size != "nano" and not config.bpe_dir:
        raise InputError(f"ARCH=narvl_{config.size}: give BPE=FOLDER with dict.txt of OFA, or vocab.json of a port")
    for key in KEYS:
        if key.target in ("data", "bpe_dir", "teacher_checkpoint", "init_checkpoint", "shared"):
            value = config[key.target]
            if value and not Path(value).exists():
                raise MissingInput(f"{key.name}={value}: no such file or folder")
    trained = config.teacher_checkpoint or config.init_checkpoint
    if trained and not config.bpe_dir:
        raise InputError(f"{trained}: give the vocabulary it was trained with, too: BPE=FOLDER")


def _usual_processes() -> int:
    """Return the number of processes of a training: 2, or 1 on a single core or with a GPU."""
    return 1 if len(os.sched_getaffinity(0)) == 1 or shutil.which("nvidia-smi") else 2


def _multiplies_in_bfloat16() -> bool:
    """Return whether trainings run on a processor that multiplies in bfloat16."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return not shutil.which("nvidia-smi") and bool(re.search(r"\b(avx512_bf16|amx_bf16)\b", flags))


def _composed(config: DictConfig, tree: Path, role: str) -> DictConfig:
    """Return the tree's configuration of a training, with Hydra's own."""
    choices = {"recipe": config.recipe, "size": config.size, "role": role}
    choices["preset"] = config.preset if config.size == "nano" else "published"
    for group, choice in choices.items():
        if not (tree / group / f"{choice}.yaml").is_file():
            found = " ".join(sorted(file.stem for file in (tree / group).glob("*.yaml") if file.stem != "common"))
            raise InputError(f"{group}={choice}: choose one of {found}")
    return _compose(tree, tuple(f"{group}={choice}" for group, choice in choices.items()))


@functools.cache  # a study has many runs of a few kinds
def _compose(tree: Path, words: tuple[str, ...]) -> DictConfig:
    with _another_hydra(), initialize_config_dir(str(tree), version_base="1.3"):
        return compose("train", list(words), return_hydra_config=True)


@contextmanager
def _another_hydra() -> Iterator[None]:
    """Let a configuration be composed within a program that Hydra has started, by other rules of Hydra's versions."""
    instance, version = GlobalHydra.instance(), VersionBase.instance()
    before, rules = instance.hydra, version.version_base
    instance.hydra = None
    try:
        yield
    finally:
        instance.hydra = before
        version.version_base = rules


@contextmanager
def _hydra_as(whole: DictConfig) -> Iterator[None]:
    """Let `${hydra:...}` read another configuration."""
    instance = HydraConfig.instance()
    before = instance.cfg
    instance.set_config(whole)
    try:
        yield
    finally:
        instance.cfg = before


def _recipe(config: DictConfig, tree: Path, teacher: DictConfig) -> dict[str, Any]:
    """Return what the tree's folder `pipeline` holds of a recipe, with the user's options."""
    common = OmegaConf.load(tree / "pipeline" / "common.yaml")
    own = OmegaConf.load(tree / "pipeline" / f"{config.recipe}.yaml")
    if "like" in own:
        own = OmegaConf.merge(OmegaConf.load(tree / "pipeline" / f"{own.like}.yaml"), own)
    sections = [f"presets.{config.preset}"]
    sections += ["published"] if config.size != "nano" else []
    sections += ["own_data" if config.data else "scenes"]
    evaluation = json.loads(teacher.task.get("eval_args") or "{}")
    layers = [common, own, {"max_len": evaluation.get("max_len_b")}]
    layers += [
        found for name in sections for file in (common, own) if (found := OmegaConf.select(file, name)) is not None
    ]
    given = {name: config[name] for name in (*RESOLVED, *SIZES_OF_DATA) if config[name] is not None}
    merged = OmegaConf.to_container(OmegaConf.merge(*layers, given), resolve=True)
    assert isinstance(merged, dict)
    return {str(name): value for name, value in merged.items()}


def _of_the_run(config: DictConfig, role: str, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the run's own options change of a training's configuration."""
    amp = config.amp if config.amp is not None else config.size == "nano" and _multiplies_in_bfloat16()
    changes: dict[str, Any] = {"common": {"amp": bool(amp), "seed": config.seed}}
    changes["task"] = {"skip_bad_rows": config.skip_bad_rows}
    if config.epochs:
        changes["optimization"] = {"max_epoch": config.epochs, "max_update": 0}
    if config.ema_decay is not None:
        changes["ema"] = {"store_ema": True, "ema_decay": config.ema_decay}
    if config.dropout is not None and (role == "teacher" or not recipe["own_dropout"]):
        changes["model"] = {"dropout": config.dropout}
    if config.add_caption is not None:
        changes["task"]["add_caption"] = config.add_caption
    if role == "teacher" and config.init_checkpoint:
        changes["checkpoint"] = {"finetune_from_model": config.init_checkpoint}
    return copy.deepcopy(changes)


def _leaves(tree: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield each value below a mapping, with its path."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield from _leaves(value, f"{path}.{name}")
    else:
        yield path, tree


def _text(value: Any) -> str:
    """Return a value in the form of the run scripts' settings."""
    if isinstance(value, list) and len(value) == 1:
        return _text(value[0])
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float):
        return f"{value:.15g}"
    return "" if value is None else str(value)


def _same(first: str, second: str) -> bool:
    """Return whether two kept values are the same, as texts or as numbers."""
    try:
        return first == second or float(first) == float(second)
    except ValueError:
        return False
