"""A GPU gives what the CPU gives: models, loss, searches, the programs; skipped where there is none."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fairseq.data import Dictionary
from fairseq.sequence_generator import SequenceGenerator
from torch import Tensor

from narvl_plugin.bench.floor import distance_to_floor
from narvl_plugin.bench.gpu import Scale, measure
from narvl_plugin.bench.limit import UNSEEN, Pair, limit
from narvl_plugin.bench.loss import loss_costs
from narvl_plugin.ctc import (
    LengthRange,
    build_trie,
    constrained_outputs,
    constrained_search,
    greedy,
    prefix_beam_search,
    query_ctc_loss,
    score_targets,
    score_trie,
    viterbi,
)
from narvl_plugin.ctc.loss import _function_in_kernels, _losses
from narvl_plugin.generation.parallel_generator import ParallelGenerator
from narvl_plugin.generation.teacher import ensemble_of
from narvl_plugin.models import build
from narvl_plugin.models.narvl import NarvlModel
from narvl_plugin.models.ofa import OfaModel

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

BLANK = 49


@pytest.fixture(autouse=True)
def float32() -> None:
    """Multiply in float32, not in TF32, so that differences are rounding."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


@pytest.fixture
def log_probs() -> Tensor:
    """Three samples of 8 queries and 50 labels, (B, N, V)."""
    return (3 * torch.randn(3, 8, 50, generator=torch.Generator().manual_seed(1))).log_softmax(2)


@pytest.mark.parametrize("arch", ["ofa_nano", "narvl_nano", "ofa_tiny", "narvl_tiny"])
@pytest.mark.parametrize("optimised", [False, True])
def test_models_agree_with_the_cpu(arch: str, optimised: bool) -> None:
    torch.manual_seed(1)
    model = build(arch, vocab_size=50, num_queries=6 if arch.startswith("narvl") else None, vision_pretrained=False)
    inputs = {
        "src_tokens": torch.randint(4, 49, (2, 7)),
        "prev_output_tokens": torch.randint(4, 49, (2, 5)),
        "patch_images": torch.randn(2, 3, 64, 96),
        "patch_masks": torch.tensor([True, False]),
    }
    model.eval()
    there = copy.deepcopy(model).cuda()
    if optimised:
        model.optimize_for_inference()
        there.optimize_for_inference()
    with torch.no_grad():
        here = model(**inputs)[0]
        for _ in range(2):  # the second time with biases that were kept
            found = there(**{name: tensor.cuda() for name, tensor in inputs.items()})[0]
            torch.testing.assert_close(found.cpu(), here, rtol=1e-3, atol=1e-3 * float(here.abs().max()))


def test_kept_biases_move_with_the_model() -> None:
    torch.manual_seed(1)
    model = build("narvl_nano", vocab_size=50, num_queries=6, vision_pretrained=False).eval()
    inputs = {"src_tokens": torch.randint(4, 49, (2, 7)), "patch_images": torch.randn(2, 3, 64, 64)}
    with torch.no_grad():
        here = model(**inputs)[0]
        there = model.cuda()(**{name: tensor.cuda() for name, tensor in inputs.items()})[0].cpu()
        torch.testing.assert_close(there, here, rtol=1e-3, atol=1e-3 * float(here.abs().max()))
        torch.testing.assert_close(model.cpu()(**inputs)[0], here)


def test_loss_and_its_gradient_agree(log_probs: Tensor) -> None:
    targets, lengths = torch.randint(0, 49, (3, 4)), torch.tensor([4, 2, 0])
    results = []
    for device in ("cpu", "cuda"):
        logits = log_probs.detach().clone().to(device).requires_grad_()
        loss = query_ctc_loss(logits, targets.to(device), lengths.to(device), blank=BLANK, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, logits)
        results.append((loss.detach().cpu(), gradient.cpu()))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("longest", [1, 6, 40, 130])
def test_the_kernels_of_the_loss_agree_with_the_cpu(dtype: torch.dtype, longest: int) -> None:
    """Repeats, empty targets, targets that do not fit, queries that are not in use, one query."""
    assert _function_in_kernels() is not None, "see the warning for what Triton lacks"
    random = torch.Generator().manual_seed(longest)
    logits = (3 * torch.randn(6, max(1, longest), 3000, generator=random)).to(dtype)
    targets = torch.randint(1, 4, (6, 3, longest), generator=random)
    lengths = torch.randint(0, longest + 1, (6, 3), generator=random)
    lengths[0, 0] = 0
    used = torch.randint(1, max(1, longest) + 1, (6,), generator=random)
    upstream = torch.randn(6, 3, generator=random)
    results = []
    for device in ("cpu", "cuda"):
        here = logits.detach().to(device).requires_grad_()
        given = (targets.to(device), lengths.to(device), used.to(device), 0)
        losses = _losses(here, *given)
        losses.backward(upstream.to(losses))
        results.append((losses.detach().cpu(), here.grad.cpu()))
    (expected, right), (found, gradient) = results
    assert expected.isinf().any() and expected.isfinite().any()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    absolute = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2}[dtype]
    torch.testing.assert_close(gradient, right, rtol=0, atol=absolute)


def test_the_loss_never_waits_for_the_gpu(log_probs: Tensor) -> None:
    logits = log_probs.cuda().requires_grad_()
    targets, lengths = torch.randint(0, 49, (3, 4)).cuda(), torch.tensor([4, 2, 0]).cuda()
    for mode in ("default", "error"):  # first the kernels are compiled
        torch.cuda.set_sync_debug_mode(mode)
        try:
            query_ctc_loss(logits, targets, lengths, blank=BLANK, checked=True).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert logits.grad.isfinite().all()


def dictionary_of(size: int) -> Dictionary:
    dictionary = Dictionary()
    for number in range(size - len(dictionary)):
        dictionary.add_symbol(str(number))
    return dictionary


def samples_of_two_shapes(dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Yield batches on the GPU: a shape three times, another one twice, and the first one again."""
    for seed, side in enumerate((64, 64, 64, 96, 96, 64)):
        torch.manual_seed(seed)
        net_input = {
            "src_tokens": torch.randint(4, 49, (2, 7)).cuda(),
            "patch_images": torch.randn(2, 3, side, side).to("cuda", dtype),
            "padded": np.zeros(2, dtype=bool),
        }
        yield {"net_input": net_input}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_captured_student_predicts_what_a_plain_one_predicts(dtype: torch.dtype) -> None:
    """Also for other inputs than those that were recorded, and after a pass over another shape."""
    torch.manual_seed(1)
    student = build("narvl_nano", vocab_size=50, num_queries=6, vision_pretrained=False)
    assert isinstance(student, NarvlModel)
    student.optimize_for_inference()
    student = student.to("cuda", dtype)
    dictionary = dictionary_of(49)
    plain = copy.deepcopy(student)
    plain.use_graphs(None)
    captured, expecting = (ParallelGenerator([model], dictionary) for model in (student, plain))
    assert student.graphs is not None
    for sample in samples_of_two_shapes(dtype):
        found = captured.generate([student], sample)
        expected = expecting.generate([plain], sample)
        for (one,), (other,) in zip(found, expected, strict=True):
            assert one["tokens"].tolist() == other["tokens"].tolist()
            torch.testing.assert_close(one["score"], other["score"], rtol=1e-2, atol=1e-2)
    assert len(student.graphs) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_captured_teacher_finds_what_a_plain_one_finds(dtype: torch.dtype) -> None:
    """Also for other inputs than those that were recorded, and after a search in another shape."""
    torch.manual_seed(1)
    teacher = build("ofa_nano", vocab_size=50, vision_pretrained=False)
    assert isinstance(teacher, OfaModel)
    teacher.optimize_for_inference()
    teacher = teacher.to("cuda", dtype)
    dictionary = dictionary_of(50)
    plain = copy.deepcopy(teacher)
    plain.use_graphs(None)
    captured, expecting = (
        SequenceGenerator(ensemble_of([model]), dictionary, beam_size=4, max_len_b=6) for model in (teacher, plain)
    )
    for sample in samples_of_two_shapes(dtype):
        found = captured.generate([teacher], sample)
        expected = expecting.generate([plain], sample)
        for one, other in zip(found, expected, strict=True):
            assert one[0]["tokens"].tolist() == other[0]["tokens"].tolist()
            torch.testing.assert_close(one[0]["score"], other[0]["score"], rtol=1e-2, atol=1e-2)
    assert teacher.graphs is not None
    assert len(teacher.graphs) > 4


def test_searches_agree(log_probs: Tensor) -> None:
    there = log_probs.cuda()
    for one, other in zip(greedy(there, blank=BLANK), greedy(log_probs, blank=BLANK), strict=True):
        assert one.tokens.tolist() == other.tokens.tolist()
    sizes = {"blank": BLANK, "beam_size": 4, "nbest": 4, "top_k": 8}
    for one, other in zip(prefix_beam_search(there, **sizes), prefix_beam_search(log_probs, **sizes), strict=True):
        assert [hypothesis.tokens.tolist() for hypothesis in one] == [found.tokens.tolist() for found in other]
    constraint = LengthRange(2, 3)
    for one, other in zip(
        constrained_search(there, constraint, blank=BLANK),
        constrained_search(log_probs, constraint, blank=BLANK),
        strict=True,
    ):
        assert one.tokens.tolist() == other.tokens.tolist()
        assert float(one.score) == pytest.approx(float(other.score), rel=1e-4)
    found = constrained_outputs(there, constraint, blank=BLANK, beam_size=4, top_k=8, no_repeat_ngram=0)
    scores = score_targets(there, found.tokens, found.lengths, blank=BLANK)
    torch.testing.assert_close(
        scores.cpu(),
        score_targets(log_probs, found.tokens.cpu(), found.lengths.cpu(), blank=BLANK),
        rtol=1e-4,
        atol=1e-4,
    )
    answers, lengths = torch.tensor([[5, 6], [5, 7], [8, 8]]), torch.tensor([2, 2, 1])
    trie = build_trie(answers, lengths)
    on_gpu = type(trie)(*(part.cuda() for part in trie))
    torch.testing.assert_close(
        score_trie(there, on_gpu, blank=BLANK).cpu(), score_trie(log_probs, trie, blank=BLANK), rtol=1e-4, atol=1e-4
    )
    targets, sizes_of_targets = found.tokens[:, 0], found.lengths[:, 0]
    assert torch.equal(
        viterbi(there, targets, sizes_of_targets, blank=BLANK).labels.cpu(),
        viterbi(log_probs, targets.cpu(), sizes_of_targets.cpu(), blank=BLANK).labels,
    )


def test_all_of_the_gpu_benchmark_runs(tmp_path: Path) -> None:
    scale = Scale(size="nano", side=64, repeats=1, labels=5000, batches=(16,), training_batch=2, waits=2)
    parts = measure(tmp_path / "gpu.json", scale, device="cuda", seconds=10_000)["parts"]
    assert not any("skipped" in part for part in parts.values())
    assert parts["one_image"]["captured"]
    assert parts["training"]["largest_batch"] > 16


def test_benchmarks_run() -> None:
    assert loss_costs(batch=4, queries=8, labels=5000, length=3, repeats=1, device="cuda")["query_ctc"].error < 1e-5
    assert distance_to_floor(size="nano", side=64, queries=4, repeats=1, device="cuda").floor > 0
    found = limit(Pair("nano", side=64, device="cuda", dtype=torch.bfloat16), "nano", repeats=1)
    assert len(found.checks) == len(UNSEEN)
    assert math.isfinite(found.error)
