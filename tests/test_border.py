"""fairseq stays at the border: what is not for its programs runs where importing it raises."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq import checkpoint_utils

from narvl_plugin.devices import move_batch
from narvl_plugin.inference.predictor import Predictor

ROOT = Path(__file__).parents[1]
WITHOUT_FAIRSEQ = """
import sys


class NoFairseq:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("fairseq", "fairseq_cli"):
            raise ImportError(f"{name}: fairseq is not to be imported here")


sys.meta_path.insert(0, NoFairseq())
"""
IMPORT_ALL = """
import importlib, pkgutil

import narvl, narvl_plugin

apart = {"narvl_plugin.models.registered", "narvl_plugin.data.for_fairseq"}
names = ["narvl_plugin"]
for package in ("ctc", "models", "data", "checkpoints", "export", "inference", "api"):
    within = importlib.import_module(f"narvl_plugin.{package}")
    names += [module.name for module in pkgutil.walk_packages(within.__path__, f"{within.__name__}.")]
for name in names:
    if name not in apart:
        importlib.import_module(name)
print(len(names))
"""
PREDICT = """
import json
from pathlib import Path

from narvl_plugin.inference.predictor import Predictor

checkpoint, data = sys.argv[1:]
model = Predictor.load(Path(checkpoint), Path(data), role="student", generation={"beam": 5, "nbest": 5})
found = model.hypotheses_of(range(3))
print(json.dumps([[(model.text([one]), float(one["score"]), float(one["confidence"])) for one in beam]
                  for beam in found]))
"""


def run_without_fairseq(script: str, *arguments: object) -> str:
    """Run a script where importing fairseq raises, and return what it prints."""
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT_FAIRSEQ + script, *map(str, arguments)]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_all_but_what_fairseq_asks_for_is_imported_without_it() -> None:
    assert int(run_without_fairseq(IMPORT_ALL)) > 60


def test_the_mathematics_need_torch_alone() -> None:
    script = "import narvl_plugin.ctc; assert not {'timm', 'torchvision', 'omegaconf', 'PIL'} & sys.modules.keys()"
    run_without_fairseq(script)


def test_import_narvl_changes_nothing_of_the_process() -> None:
    script = "hook = sys.excepthook, sys.stdout; import narvl; assert hook == (sys.excepthook, sys.stdout)"
    run_without_fairseq(script + "; assert 'torch' not in sys.modules")


@pytest.mark.integration
def test_a_student_answers_the_same_without_fairseq(
    write_checkpoint: Callable[..., Path],
    write_tsv: Callable[..., Path],
    caption_rows: list[list[str]],
    vocabulary: Path,
) -> None:
    """The same words, scores and confidences as of the model and the task that fairseq itself loads."""
    options: dict[str, Any] = {"bpe_dir": str(vocabulary), "num_bins": 10, "patch_image_size": 32}
    student = write_checkpoint("student.pt", "narvl", "caption", **options)
    data = write_tsv("test.tsv", caption_rows)
    without = json.loads(run_without_fairseq(PREDICT, student, data))

    (model,), _, task = checkpoint_utils.load_model_ensemble_and_task([str(student)], {"data": str(data)})
    task.load_dataset("test")
    args = Namespace(**{**vars(task.generator_options()), "beam": 5, "nbest": 5})
    generator = task.build_generator([model.eval()], args)
    dataset = task.dataset("test")
    batch = move_batch(dataset.collater([dataset[row] for row in range(3)]), "cpu")
    found = task.inference_step(generator, [model], batch)
    assert [[one for one, *_ in beam] for beam in without] == [
        [task.codec.decode(one["tokens"]) for one in beam] for beam in found
    ]
    numbers = [[(float(one["score"]), float(one["confidence"])) for one in beam] for beam in found]
    torch.testing.assert_close(
        torch.tensor([[numbers for _, *numbers in beam] for beam in without]),
        torch.tensor(numbers),
        rtol=1e-5,
        atol=1e-6,
    )


def test_a_predictor_takes_files_as_well(
    write_checkpoint: Callable[..., Path], write_tsv: Callable[..., Path], vocabulary: Path, tmp_path: Path
) -> None:
    """Of each task, with the text that it reads beside the image."""
    from PIL import Image

    Image.new("RGB", (40, 30), (200, 30, 30)).save(tmp_path / "red.png")
    texts = {
        "caption": {},
        "refcoco": {"text": "a cat"},
        "regions": {"text": "cats"},
        "vqa_gen": {"question": "is it red"},
    }
    texts["snli_ve"] = {"hypothesis": "two dogs run"}
    columns = {
        "caption": ["red", "", "a cat", "", "red.png"],
        "refcoco": ["red", "", "a cat", "0,0,9,9", "red.png"],
        "regions": ["red", "", "cats", "0,0,9,9&&1,1,5,5", "red.png"],
        "vqa_gen": ["red", "", "is it red", "1.0|!+no", "", "red.png"],
        "snli_ve": ["red", "", "red.png", "two dogs run", "a cat", "neutral"],
    }
    for task, given in texts.items():
        options = {"bpe_dir": str(vocabulary), "num_bins": 10, "patch_image_size": 32}
        options |= {"max_image_size": 32} if task in ("refcoco", "regions") else {}
        student = write_checkpoint(f"{task}.pt", "narvl", task, **options)
        model = Predictor.load(student, write_tsv("test.tsv", [columns[task]]), role="student")
        files = model.images({"red": tmp_path / "red.png"}, {name: {"red": text} for name, text in given.items()})
        assert model.search(files.collater([files[0]]))[0][0]["tokens"].tolist() == (
            model.hypotheses_of([0])[0][0]["tokens"].tolist()
        )
