"""The embedded scenes are data of all tasks, with the tasks' own defaults."""

from pathlib import Path

import pytest
from fairseq.tasks import TASK_DATACLASS_REGISTRY, TASK_REGISTRY

from narvl_plugin.data.scenes import TASKS, write_scenes
from narvl_plugin.data.text import train_sentencepiece


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hundred scenes of all tasks."""
    out = tmp_path_factory.mktemp("scenes")
    write_scenes(out, train=60, valid=20, test=20, nouns=40, seed=3, tasks=TASKS)
    return out


@pytest.mark.parametrize("name", TASKS)
def test_every_row_can_be_used(scenes: Path, name: str, answer_vocabulary: Path) -> None:
    files = ",".join(str(scenes / name / f"{split}.tsv") for split in ("train", "valid"))
    own = {"bpe_dir": str(answer_vocabulary)}
    if name in ("scene_graph", "scene_tree"):
        vocabulary = train_sentencepiece(scenes / name / "train.tsv", [2], scenes / name / "vocabulary", 300)
        own = {"bpe_dir": str(vocabulary.parent), "names_file": str(scenes / name / "names.json")}
    config = TASK_DATACLASS_REGISTRY[name](data=files, patch_image_size=32, **own)
    task = TASK_REGISTRY[name].setup_task(config)
    for split in ("valid", "train"):
        task.load_dataset(split)
        dataset = task.dataset(split)
        batch = dataset.collater([dataset[row] for row in range(len(dataset))])
        assert batch["nsentences"] == len(dataset) > 0
        for row in range(len(dataset)) if split == "train" else ():
            said = batch["target"][row][batch["target"][row].ne(task.target_dictionary.pad())]
            assert dataset.target_tokens(row, dataset.tsv[row]).tolist() == said[:-1].tolist()
