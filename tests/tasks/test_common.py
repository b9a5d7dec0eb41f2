"""What tasks refuse before they read any data: missing options, and a criterion for the other kind of model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fairseq.criterions import CRITERION_DATACLASS_REGISTRY
from fairseq.tasks import TASK_DATACLASS_REGISTRY, TASK_REGISTRY, get_task
from omegaconf import OmegaConf

from narvl_plugin.errors import InputError
from narvl_plugin.models.registered import FAMILIES
from narvl_plugin.tasks import registry
from narvl_plugin.tasks.trained import TrainedTask as CommonTask

STUDENT = ("qctc", "qset", "query_cross_entropy")
TEACHER = ("cross_entropy", "label_smoothed_cross_entropy", "adjust_label_smoothed_cross_entropy")
TASKS = (*registry.TASKS, "multitask")
SMALL = {
    **{"encoder_embed_dim": 16, "encoder_ffn_embed_dim": 32, "encoder_attention_heads": 2, "encoder_layers": 1},
    **{"decoder_layers": 1, "vision_trunk": "test_resnet", "freeze_resnet": True},
}


NAMES = {
    "scene_graph": '{"label_to_idx": {"dog": 1}, "predicate_to_idx": {"on": 1}}',
    "scene_tree": '{"scene": [["red"]], "region": [["left"]], "object": [["dog"]]}',
}
"""Lists of names, of tasks that need them."""


@pytest.fixture
def spelling(name: str, answer_vocabulary: Path, tree_vocabulary: Path) -> Path:
    """Give a vocabulary that can spell the outputs of a task."""
    return tree_vocabulary if name == "scene_tree" else answer_vocabulary


def task_with_model(name: str, family: str, vocabulary: Path, folder: Path) -> CommonTask:
    """Return a task whose files do not exist, after it has built a small model."""
    data = "gone.tsv,lost.tsv"
    if name == "multitask":
        data = str(folder / "members.yaml")
        Path(data).write_text("caption:\n  data: gone.tsv,lost.tsv\n  num_queries: 4\n")
    options = {"data": data, "bpe_dir": str(vocabulary), "num_bins": 10}
    if name in NAMES:
        options["names_file"] = str(folder / "names.json")
        (folder / "names.json").write_text(NAMES[name])
    task = TASK_REGISTRY[name].setup_task(OmegaConf.structured(TASK_DATACLASS_REGISTRY[name](_name=name, **options)))
    task.build_model(OmegaConf.structured(FAMILIES[family][0](_name=family, **SMALL)))
    return task


def criterion(name: str) -> Any:
    """Return a criterion's configuration."""
    cfg = OmegaConf.structured(CRITERION_DATACLASS_REGISTRY[name](sentence_avg=False))
    cfg._name = name
    return cfg


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize(
    ("family", "good", "bad", "remedy"),
    [
        ("narvl", STUDENT, TEACHER, r"is a student; take --criterion qctc"),
        ("ofa", TEACHER, STUDENT, r"is a teacher; take --criterion label_smoothed_cross_entropy"),
    ],
)
def test_a_criterion_of_the_other_kind_of_model_is_refused_before_data_are_read(
    name: str,
    family: str,
    good: tuple[str, ...],
    bad: tuple[str, ...],
    remedy: str,
    spelling: Path,
    tmp_path: Path,
) -> None:
    task = task_with_model(name, family, spelling, tmp_path)
    for wrong in bad:
        with pytest.raises(InputError, match=rf"^--criterion {wrong}: .*the model {family} {remedy}"):
            task.build_criterion(criterion(wrong))
    for right in good:
        task.build_criterion(criterion(right))


@pytest.mark.parametrize("value", [None, ""])
@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("bpe_dir", r"--bpe-dir is not given \(task\.bpe_dir in a configuration\); give the folder of the vocabulary"),
        ("data", r"the data argument is not given \(task\.data in a configuration\); give the files to read"),
    ],
)
def test_an_option_without_a_default_that_nobody_gave_is_named(
    option: str, message: str, name: str, value: str | None, vocabulary: Path
) -> None:
    given = {"data": "a.tsv,b.tsv", "bpe_dir": str(vocabulary), option: value}
    config = TASK_DATACLASS_REGISTRY[name](_name=name, **{key: text for key, text in given.items() if text is not None})
    for cfg in (config, OmegaConf.structured(config)):
        with pytest.raises(InputError, match=message):
            TASK_REGISTRY[name].setup_task(cfg)


@pytest.mark.parametrize("name", TASKS)
def test_fairseq_preprocess_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="fairseq-preprocess does not support our tasks, which read TSV files"):
        get_task(name).build_dictionary(["train.tsv"])
