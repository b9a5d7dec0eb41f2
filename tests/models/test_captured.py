"""CUDA graphs of students and teachers: what is recorded when, and that results are those of the plain pass.

Without a GPU, a stand-in records: it runs the function again, and writes into the tensors of the first result.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from fairseq.data import Dictionary
from fairseq.sequence_generator import SequenceGenerator
from torch import Tensor
from torch.utils._pytree import tree_leaves

from narvl_plugin.ctc import one_of
from narvl_plugin.generation.parallel_generator import ParallelGenerator
from narvl_plugin.generation.teacher import ensemble_of
from narvl_plugin.models import build
from narvl_plugin.models.captured import LARGEST_BATCH, MOST_GRAPHS, Graphs, in_bucket
from narvl_plugin.models.narvl import NarvlModel
from narvl_plugin.models.ofa import OfaModel

SYMBOLS = 40


class Recorder:
    """Stands in for the capture of a CUDA graph, and counts."""

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def __call__(self, run: Callable[[], Any]) -> tuple[Callable[[], object], Any]:
        self.captures += 1
        result = run()

        def replay() -> None:
            self.replays += 1
            for own, new in zip(tree_leaves(result), tree_leaves(run()), strict=True):
                if isinstance(own, Tensor):
                    own.copy_(new)

        return replay, result


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def graphs(recorder: Recorder) -> Graphs:
    return Graphs("cpu", recorder)


def double(numbers: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    return 2 * numbers, {"sum": numbers.sum(0)}


MODEL = torch.nn.Linear(1, 1).eval()


@torch.no_grad()
def test_a_shape_is_recorded_at_its_second_call(graphs: Graphs, recorder: Recorder) -> None:
    counts = []
    for turn in range(4):
        numbers = torch.full((2, 3), float(turn))
        found, more = graphs.run(MODEL, "double", double, {"numbers": numbers})
        assert torch.equal(found, 2 * numbers)
        assert torch.equal(more["sum"], numbers.sum(0))
        counts.append((recorder.captures, recorder.replays))
    assert counts == [(0, 0), (1, 1), (1, 2), (1, 3)]


@torch.no_grad()
def test_results_are_the_callers_own(graphs: Graphs) -> None:
    results = [graphs.run(MODEL, "double", double, {"numbers": torch.full((2,), float(turn))})[0] for turn in range(4)]
    results[2] += 100
    assert [found[0].item() for found in results] == [0, 2, 104, 6]


@torch.no_grad()
def test_inputs_may_be_nested_and_come_back_as_they_were_given(graphs: Graphs, recorder: Recorder) -> None:
    def add(parts: list[dict[str, Tensor]], number: int) -> tuple[list[dict[str, Tensor]], Tensor]:
        return parts, parts[0]["a"] + parts[1]["b"] + number

    with_rows = torch.zeros(2)
    for turn in range(4):
        parts = [{"a": torch.full((2,), float(turn))}, {"b": torch.ones(2)}]
        (one, other), total = graphs.run(
            MODEL,
            "add",
            lambda rows, parts, number: add(parts, number),
            {"rows": with_rows, "parts": parts, "number": 3},
        )
        assert total.tolist() == [turn + 4] * 2
        assert one["a"] is parts[0]["a"]
        assert other["b"] is parts[1]["b"]
    assert recorder.captures == 1


@torch.no_grad()
def test_graphs_share_the_memory_of_their_inputs(graphs: Graphs) -> None:
    for key in ("one", "other"):
        for number in (1.0, 2.0, 3.0):
            found = graphs.run(MODEL, key, lambda a, b: a - b, {"a": torch.full((2,), number), "b": torch.ones(2)})
            assert found.tolist() == [number - 1] * 2
    assert len(graphs) == 2
    assert len(graphs._buffers) == 2  # one for each input


@torch.no_grad()
def test_another_shape_type_key_or_mode_is_another_graph(graphs: Graphs, recorder: Recorder) -> None:
    for numbers, key in (
        (torch.ones(2), "one"),
        (torch.ones(3), "one"),
        (torch.ones(2, dtype=torch.float64), "one"),
        (torch.ones(2), "other"),
    ):
        for _ in range(2):
            assert graphs.run(MODEL, key, double, {"numbers": numbers})[0].dtype == numbers.dtype
    with torch.inference_mode():
        for _ in range(2):
            graphs.run(MODEL, "one", double, {"numbers": torch.ones(2)})
    assert recorder.captures == len(graphs) == 5


@torch.no_grad()
def test_graphs_of_inference_mode_share_no_memory_with_others(graphs: Graphs, recorder: Recorder) -> None:
    for mode in (torch.inference_mode(), torch.no_grad()):
        with mode:
            for _ in range(2):
                assert graphs.run(MODEL, "double", double, {"numbers": torch.ones(2)})[0].tolist() == [2, 2]
    assert recorder.captures == 2


@torch.no_grad()
def test_the_number_of_graphs_is_bounded(graphs: Graphs) -> None:
    for size in range(1, MOST_GRAPHS + 4):
        for _ in range(3):
            found = graphs.run(MODEL, "double", double, {"numbers": torch.ones(1, size)})[0]
            assert found.shape == (1, size)
    assert len(graphs) == MOST_GRAPHS
    graphs.clear()
    assert not len(graphs)


def test_training_gradients_large_batches_and_other_devices_run_plainly(recorder: Recorder) -> None:
    small, large = torch.ones(2), torch.ones(LARGEST_BATCH + 1)
    training = copy.deepcopy(MODEL).train()
    here, elsewhere = Graphs("cpu", recorder), Graphs("cuda", recorder)
    for _ in range(3):
        here.run(MODEL, "double", double, {"numbers": small})  # with gradients
        with torch.no_grad():
            here.run(training, "double", double, {"numbers": small})
            here.run(MODEL, "double", double, {"numbers": large})
            assert elsewhere.run(MODEL, "double", double, {"numbers": small})[0].tolist() == [2, 2]
            here.run(MODEL, "first", lambda a, b: a, {"a": small, "b": torch.ones(2, device="meta")})
    assert recorder.captures == 0


@torch.no_grad()
def test_what_cannot_be_recorded_runs_plainly_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    def fail(run: Callable[[], Any]) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    graphs = Graphs("cpu", fail)
    with caplog.at_level(logging.WARNING):
        for _ in range(4):
            assert graphs.run(MODEL, "double", double, {"numbers": torch.ones(2)})[0].tolist() == [2, 2]
    assert caplog.text.count("without CUDA graphs") == 1
    assert "stream is capturing" in caplog.text


def test_padded_texts_are_padded_to_a_bucket() -> None:
    tokens = torch.full((2, 5), 7)
    plain = {"src_tokens": tokens, "padded": np.zeros(2, dtype=bool)}
    assert in_bucket(plain) is plain
    assert in_bucket({"src_tokens": tokens})["src_tokens"] is tokens
    found = in_bucket({"src_tokens": tokens, "padded": np.array([True, False])})
    assert found["src_tokens"].tolist() == [[7] * 5 + [1] * 3] * 2
    assert found["padded"].all()


@pytest.fixture
def dictionary() -> Dictionary:
    dictionary = Dictionary()
    for number in range(SYMBOLS - len(dictionary)):
        dictionary.add_symbol(f"word{number}")
    return dictionary


def make(arch: str, *, std: float, **options: Any) -> OfaModel:
    """A small model that says varied things."""
    torch.manual_seed(3)
    sizes = {"encoder_embed_dim": 16, "encoder_ffn_embed_dim": 16, "encoder_layers": 1}
    small = {"encoder_attention_heads": 2, "vision_trunk": "test_resnet", "vision_pretrained": False}
    model = build(arch, **sizes, **small, **options)
    assert isinstance(model, OfaModel)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=std)
    return model.eval()


def make_student() -> NarvlModel:
    student = make("narvl_tiny", std=0.5, vocab_size=SYMBOLS + 1, num_queries=6, decoder_layers=1)
    assert isinstance(student, NarvlModel)
    return student


def make_teacher() -> OfaModel:
    teacher = make("ofa_tiny", std=0.3, vocab_size=SYMBOLS, decoder_layers=2)
    teacher.optimize_for_inference()
    return teacher


def batch(seed: int, length: int = 5, padded: bool = False) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(4, SYMBOLS, (2, length), generator=generator)
    if padded:
        tokens[1, -2:] = 1
    images = torch.randn(2, 3, 32, 32, generator=generator)
    return {"net_input": {"src_tokens": tokens, "patch_images": images, "padded": np.array([False, padded])}}


@pytest.mark.parametrize(
    "options", [{}, {"beam_size": 3, "nbest": 2}, {"constraint": one_of([[5, 6], [7]])}], ids=["path", "beam", "list"]
)
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_a_generator_finds_the_same_with_graphs(
    options: dict[str, Any], padded: bool, dictionary: Dictionary, recorder: Recorder
) -> None:
    plain, captured = make_student(), make_student()
    plain.optimize_for_inference()
    captured.optimize_for_inference()
    captured.graphs = Graphs("cpu", recorder)
    with_graphs, without = (ParallelGenerator([model], dictionary, **options) for model in (captured, plain))
    # In batches that hold padding, 5 and 7 tokens are one shape.
    for seed, length in enumerate((5, 5, 7 if padded else 5, 5)):
        given = batch(seed, length, padded)
        found, expected = with_graphs.generate([captured], given), without.generate([plain], given)
        for one, other in zip(found, expected, strict=True):
            assert [hypothesis["tokens"].tolist() for hypothesis in one] == [
                hypothesis["tokens"].tolist() for hypothesis in other
            ]
            for hypothesis, right in zip(one, other, strict=True):
                assert float(hypothesis["score"]) == pytest.approx(float(right["score"]), abs=1e-4)
    assert (recorder.captures, recorder.replays) == (1, 3)


def test_weights_that_move_or_change_need_other_graphs(dictionary: Dictionary, recorder: Recorder) -> None:
    student = make_student()
    assert student.graphs is None  # it may still be trained
    student.optimize_for_inference()
    student.graphs = Graphs("cpu", recorder)
    generator = ParallelGenerator([student], dictionary)
    for forget in (student.double, student.clear_memos):
        for _ in range(2):
            generator.generate([student], batch(1))
        assert len(student.graphs) == 1
        forget()
        assert not len(student.graphs)
        student.float()
    assert not len(copy.deepcopy(student).graphs)


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_a_teacher_finds_the_same_with_graphs(padded: bool, dictionary: Dictionary, recorder: Recorder) -> None:
    """Two samples of three beams, of which one may end before the other."""
    plain, captured = make_teacher(), make_teacher()
    captured.use_graphs(Graphs("cpu", recorder))
    with_graphs, without = (
        SequenceGenerator(ensemble_of([model]), dictionary, beam_size=3, max_len_b=9) for model in (captured, plain)
    )
    steps = set()
    for seed in range(5):
        given = batch(seed, 5, padded)
        found, expected = with_graphs.generate([captured], given), without.generate([plain], given)
        for one, other in zip(found, expected, strict=True):
            assert [list(hypothesis["tokens"]) for hypothesis in one] == [list(right["tokens"]) for right in other]
            for hypothesis, right in zip(one, other, strict=True):
                assert float(hypothesis["score"]) == pytest.approx(float(right["score"]), abs=1e-4)
        steps.add(max(len(one["tokens"]) for one in expected[0] + expected[1]))
    assert recorder.captures > max(steps)  # the encoder, and each step
    assert recorder.replays > 2 * recorder.captures


def test_a_teacher_without_known_padding_encodes_plainly(dictionary: Dictionary, recorder: Recorder) -> None:
    teacher = make_teacher()
    teacher.use_graphs(Graphs("cpu", recorder))
    ensemble = ensemble_of([teacher])
    given = batch(1)["net_input"]
    with torch.no_grad():
        for _ in range(3):
            ensemble.forward_encoder({name: value for name, value in given.items() if name != "padded"})
        assert recorder.captures == 0
        first, second, third = (ensemble.forward_encoder(given)[0] for _ in range(3))
    assert recorder.captures == 1
    assert first.features is not third.features
    torch.testing.assert_close(second.features, first.features)
    assert second.positions is third.positions  # so the decoder's biases, which depend on them, stay kept
