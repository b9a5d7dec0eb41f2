"""A graph beside a checkpoint: the student runs as that graph, and predicts what it predicts in torch."""

from __future__ import annotations

import base64
import copy
import importlib.util
import json
import logging
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq_cli import generate

import narvl
from narvl_plugin.bench.stages import STAGES, stages
from narvl_plugin.bench.systems import compare
from narvl_plugin.cli.app import app
from narvl_plugin.errors import InputError
from narvl_plugin.export import export
from narvl_plugin.inference.calibration import keep_calibration
from narvl_plugin.inference.predictor import Predictor
from narvl_plugin.models.exported import GRAPH_FILE, SETTINGS_FILE, folder_beside
from narvl_plugin.models.narvl import NarvlModel

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not importlib.util.find_spec("onnxruntime"), reason="onnxruntime is not installed"),
]


@pytest.fixture(scope="module")
def made(save_checkpoint: Callable[..., Path], vocabulary: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the folder of a random student of captions, student.pt, and its graph."""
    folder = tmp_path_factory.mktemp("made")
    options_of_task = {"bpe_dir": str(vocabulary), "num_bins": 10, "patch_image_size": 32}
    checkpoint = save_checkpoint(folder / "student.pt", "narvl", "caption", **options_of_task)
    export(checkpoint, folder_beside(checkpoint))
    return folder


@pytest.fixture
def exported(
    made: Path, write_tsv: Callable[..., Path], caption_rows: list[list[str]], tmp_path: Path
) -> tuple[Path, Path]:
    """Give the test's own student with its graph, and data."""
    shutil.copytree(made, tmp_path / "student")
    return tmp_path / "student" / "student.pt", write_tsv("test.tsv", caption_rows)


@pytest.fixture
def without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a student fail if it runs in torch."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the student ran in torch")

    monkeypatch.setattr(NarvlModel, "forward", refuse)


def test_predictions_are_those_of_torch(exported: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, data = exported
    graph = Predictor.load(checkpoint, data)
    in_torch = Predictor.load(checkpoint, data)
    assert graph.model.exported is not None
    in_torch.model.exported = None
    for beam in (1, 3):
        found, wanted = (one.with_options({}, beam=beam, nbest=beam) for one in (graph, in_torch))
        expected = wanted.hypotheses_of([0, 1, 2])
        with monkeypatch.context() as patched:
            patched.setattr(NarvlModel, "forward", None)  # it is not called
            said = found.hypotheses_of([0, 1, 2])
        for mine, theirs in zip(said, expected, strict=True):
            assert [one["tokens"].tolist() for one in mine] == [one["tokens"].tolist() for one in theirs]
            torch.testing.assert_close(mine[0]["score"], theirs[0]["score"], atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("exported", "without_torch")
def test_python_and_fairseq_generate_run_it(
    exported: tuple[Path, Path], caption_rows: list[list[str]], vocabulary: Path, tmp_path: Path
) -> None:
    checkpoint, data = exported
    model = narvl.load(checkpoint, bpe_dir=vocabulary)
    image = tmp_path / "image.png"
    image.write_bytes(base64.b64decode(caption_rows[0][4]))
    prediction = model.caption(image)
    words = (
        *(data, "--user-dir", "narvl_plugin", "--task", "caption", "--bpe-dir", vocabulary, "--path", checkpoint),
        *("--gen-subset", "test", "--batch-size", 2, "--beam", 1, "--cpu", "--no-progress-bar"),
    )
    parsed = options.parse_args_and_arch(options.get_generation_parser(), [str(word) for word in words])
    handlers = logging.getLogger().handlers[:]
    generate.main(convert_namespace_to_omegaconf(parsed))
    logging.getLogger().handlers[:] = handlers
    assert prediction.queries


def test_other_inputs_run_in_torch(exported: tuple[Path, Path]) -> None:
    checkpoint, data = exported
    predictor = Predictor.load(checkpoint, data)
    net_input = predictor.batch(0)["net_input"]
    graph = predictor.model.exported
    assert graph is not None and graph.log_probs(net_input) is not None
    images, tokens = net_input["patch_images"], net_input["src_tokens"]
    others: dict[str, dict[str, Any]] = {
        "another size": {"patch_images": torch.zeros(1, 3, images.size(2) + 8, images.size(3))},
        "features": {"patch_images": torch.zeros(1, 8, 2, 2)},
        "half precision": {"patch_images": images.half()},
        "no image": {"patch_masks": torch.tensor([False])},
        "a longer prompt": {"src_tokens": torch.cat([tokens, tokens], 1)},
        "a shorter prompt": {"src_tokens": tokens[:, :-1]},
        "padding": {"src_tokens": torch.full_like(tokens, 1)},
        "a member's queries": {"queries": "gqa"},
    }
    for name, changed in others.items():
        assert graph.log_probs(net_input | changed) is None, name


def test_copies_run_it_and_stages_do_not(exported: tuple[Path, Path]) -> None:
    predictor = Predictor.load(*exported)
    graph = predictor.model.exported
    assert graph is not None
    net_input = predictor.batch(0)["net_input"]
    wanted = graph.log_probs(net_input)
    for same in (copy.deepcopy(graph), pickle.loads(pickle.dumps(graph))):
        torch.testing.assert_close(same.log_probs(net_input), wanted)
    assert all(stages(predictor, 0)[stage] > 0 for stage in STAGES)
    assert predictor.model.exported is graph


def test_it_is_measured_beside_torch(
    exported: tuple[Path, Path], save_checkpoint: Callable[..., Path], vocabulary: Path, tmp_path: Path
) -> None:
    checkpoint, data = exported
    options_of_task = {"bpe_dir": str(vocabulary), "num_bins": 10, "patch_image_size": 32}
    teacher = save_checkpoint(tmp_path / "teacher.pt", "ofa", "caption", **options_of_task)
    few = {"images": 2, "warmup": 0, "repeats": 1}
    systems = compare(tmp_path / "models.json", teacher=teacher, student=checkpoint, data=data, **few)["systems"]
    for way in ("student_greedy", "student_beam5"):
        assert "stages" in systems[way] and "stages" not in systems[f"{way}_graph"]  # a graph has none
        assert systems[f"{way}_graph"]["quality"] == systems[way]["quality"]


@pytest.mark.parametrize(
    "change", [lambda model: model.double(), lambda model: model.clear_memos(), NarvlModel.multiply_in_bfloat16]
)
def test_a_changed_model_runs_in_torch(change: Callable[[Any], object], exported: tuple[Path, Path]) -> None:
    model = Predictor.load(*exported).model
    change(model)
    assert model.exported is None


def test_a_graph_of_other_weights_is_not_used(exported: tuple[Path, Path], caplog: pytest.LogCaptureFixture) -> None:
    checkpoint, data = exported
    keep_calibration(checkpoint, temperature=1.7, slope=0.6, offset=-0.4)
    assert Predictor.load(checkpoint, data).model.exported is None
    assert f"{folder_beside(checkpoint)}: is not used, because it has other weights" in caplog.text
    file = folder_beside(checkpoint) / SETTINGS_FILE
    older = {name: value for name, value in json.loads(file.read_text()).items() if name != "fingerprint"}
    file.write_text(json.dumps(older))
    assert Predictor.load(checkpoint, data).model.exported is None
    export(checkpoint, folder_beside(checkpoint), int8=True)
    caplog.clear()
    assert Predictor.load(checkpoint, data).model.exported is None
    assert "is not of --to onnx in full precision" in caplog.text
    assert Predictor.load([checkpoint, checkpoint], data).model.exported is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("[", "is damaged"),
        ("[" * 100_000, "is damaged"),
        ("{}", "is damaged"),
        ({"side": "9" * 9}, "side is '999999999'"),
        ({"prompt_length": 10**9}, "expected a whole number from 1 to 100,000"),
    ],
)
def test_damaged_settings_are_named(settings: str | dict[str, Any], message: str, exported: tuple[Path, Path]) -> None:
    checkpoint, data = exported
    file = folder_beside(checkpoint) / SETTINGS_FILE
    file.write_text(settings if isinstance(settings, str) else json.dumps(json.loads(file.read_text()) | settings))
    with pytest.raises(InputError, match=message) as raised:
        Predictor.load(checkpoint, data)
    assert str(folder_beside(checkpoint)) in str(raised.value)


def test_damaged_graphs_are_named(exported: tuple[Path, Path], tmp_path: Path) -> None:
    checkpoint, data = exported
    file = folder_beside(checkpoint) / GRAPH_FILE
    good = file.read_bytes()
    for content in (b"", good[: len(good) // 2]):
        file.write_bytes(content)
        with pytest.raises(InputError, match=f"{GRAPH_FILE}: cannot be run"):
            Predictor.load(checkpoint, data).predict([0])


def test_the_command_writes_it(
    exported: tuple[Path, Path], vocabulary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, data = exported
    shutil.rmtree(folder_beside(checkpoint))
    app(["export", str(checkpoint), "--bpe-dir", str(vocabulary)], standalone_mode=False)
    assert capsys.readouterr().out.startswith(f"{folder_beside(checkpoint)}: probabilities within")
    assert Predictor.load(checkpoint, data).model.exported is not None
    with pytest.raises(InputError, match="OUT: is missing"):
        app(["export", str(checkpoint), "--int8"], standalone_mode=False)
