"""How often generation waits for its device: at most twice a batch, in each of its ways.

Counted on a pretended device here, and by torch on a GPU, where there is one.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from device_waits import DEVICE, DeviceWaits
from fairseq.data import Dictionary
from fairseq.sequence_generator import SequenceGenerator
from torch import Tensor, nn

from narvl_plugin.ctc import BoxSets, LengthRange, one_of
from narvl_plugin.data.answers import AnswerTrie
from narvl_plugin.data.boxes import iou
from narvl_plugin.generation.candidates import CandidateGenerator
from narvl_plugin.generation.parallel_generator import ParallelGenerator
from narvl_plugin.generation.rescoring import TeacherRescorer
from narvl_plugin.generation.teacher import ensemble_of
from narvl_plugin.models import build
from narvl_plugin.models.captured import Graphs
from narvl_plugin.models.ofa import OfaModel

SYMBOLS, FIRST_BIN, BINS = 60, 30, 20
BOXES = BoxSets.of(first_bin=FIRST_BIN, num_bins=BINS, least=1, most=1)
ANSWERS = [torch.tensor(answer) for answer in ([5, 6], [5, 7], [8], [9, 9, 10])]
MOST = 2
"""Waits for the device, of each batch."""


def agreement(outputs: Sequence[Tensor]) -> Tensor:
    boxes = torch.stack([tokens[:4] for tokens in outputs]) - FIRST_BIN
    return iou(boxes[:, None], boxes)


def output_scores(outputs: Tensor, lengths: Tensor, targets: Tensor, target_lengths: Tensor) -> Tensor:
    return (lengths == target_lengths[:, :1]).float()


WAYS: dict[str, dict[str, Any]] = {
    "most probable path": {},
    "lengths": {"constraint": LengthRange(3, 4)},
    "lengths, abstaining": {"constraint": LengthRange(1, 4), "abstain_below": 0.5},
    "boxes": {"constraint": BOXES},
    "boxes and confidence": {"constraint": BOXES, "output_scores": output_scores, "abstain_below": 0.5},
    "boxes of a beam": {
        **{"constraint": BOXES, "beam_size": 16, "nbest": 2},
        **{"agreement": agreement, "output_scores": output_scores},
    },
    "beam": {"constraint": LengthRange(2, 4), "beam_size": 5, "nbest": 5},
    "beam of one without repeats": {"constraint": LengthRange(2, 4), "no_repeat_ngram": 1},
    "beam without repeats": {"constraint": LengthRange(2, 4), "beam_size": 3, "no_repeat_ngram": 2},
    "beam in a list": {"constraint": one_of(answer.tolist() for answer in ANSWERS), "beam_size": 3, "nbest": 3},
    "list of answers": {"answers": ANSWERS, "beam_size": 3, "nbest": 3},
    "best of a list": {"answers": ANSWERS, "beam_size": 3},
    "list of answers, abstaining": {"answers": ANSWERS, "abstain_below": 0.9},
    "hard alignment": {"print_alignment": "hard", "constraint": LengthRange(1, 4)},
    "soft alignment": {"print_alignment": "soft", "constraint": LengthRange(1, 4)},
    "soft alignment of a beam": {
        "print_alignment": "soft",
        "constraint": LengthRange(1, 4),
        "beam_size": 3,
        "nbest": 3,
    },
}


@pytest.fixture(scope="module")
def dictionary() -> Dictionary:
    dictionary = Dictionary()
    for number in range(SYMBOLS - len(dictionary)):
        dictionary.add_symbol(f"word{number}")
    return dictionary


def make(arch: str, **options: Any) -> OfaModel:
    """A small model that says varied things."""
    torch.manual_seed(3)
    sizes = {"encoder_embed_dim": 16, "encoder_ffn_embed_dim": 16, "encoder_layers": 1, "decoder_layers": 1}
    small = {"encoder_attention_heads": 2, "vision_trunk": "test_resnet", "vision_pretrained": False}
    model = build(arch, vocab_size=SYMBOLS + arch.startswith("narvl"), **sizes, **small, **options)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.5)
    return model.eval()


def batch(samples: int = 6) -> dict[str, Any]:
    """A batch as the data sets make it: texts of different lengths, and an image that is to be ignored."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(4, SYMBOLS, (samples, 5), generator=generator)
    tokens[0, 3:] = 1
    masks = torch.ones(samples, dtype=torch.bool)
    masks[1] = False
    padded = np.zeros(samples, dtype=bool)
    padded[:2] = True
    prompts = [torch.tensor([0, *range(4, 4 + number % 3)]) for number in range(samples)]
    net_input = {
        "src_tokens": tokens,
        "src_lengths": tokens.ne(1).sum(1),
        "patch_images": torch.randn(samples, 3, 32, 32, generator=generator),
        "patch_masks": masks,
        "padded": padded,
    }
    return {"net_input": net_input, "decoder_prompts": prompts}


def plain(beams: list[list[dict[str, Any]]]) -> list[list[dict[str, Any]]]:
    """Return hypotheses as plain values."""

    def value_of(value: Any) -> Any:
        return value.tolist() if isinstance(value, Tensor) else value

    return [[{key: value_of(value) for key, value in one.items()} for one in beam] for beam in beams]


def close(found: Any, expected: Any) -> bool:
    """Tell whether plain values are equal, but for rounding of numbers."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(close(found[key], expected[key]) for key in expected)
    if isinstance(expected, list | tuple):
        return len(found) == len(expected) and all(map(close, found, expected))
    if isinstance(expected, str):  # a number that is to be printed
        found, expected = float(found), float(expected)
    return bool(found == pytest.approx(expected, abs=1e-4))


@pytest.mark.integration
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("optimised", [False, True], ids=["", "optimised"])
def test_a_batch_waits_at_most_twice(way: str, optimised: bool, dictionary: Dictionary, device: DeviceWaits) -> None:
    student = make("narvl_tiny", num_queries=6)
    if optimised:
        student.optimize_for_inference()
    generator = ParallelGenerator([student], dictionary, **WAYS[way])
    expected = plain(generator.generate([student], batch()))
    moved, sample = device.move(copy.deepcopy(student)), device.move(batch())
    for _ in range(2):  # the second time with what was kept of the first
        device.clear()
        found = generator.generate([moved], sample)
        assert len(device.waits) <= MOST, [str(wait) for wait in device.waits]
    device.clear()
    assert close(plain(found), expected)
    assert not device.waits, "hypotheses are on the CPU"


@pytest.mark.parametrize("way", ["most probable path", "beam", "list of answers", "boxes of a beam"])
def test_what_must_not_be_searched_waits_once(way: str, dictionary: Dictionary, device: DeviceWaits) -> None:
    student = device.move(make("narvl_tiny", num_queries=6))
    options = WAYS[way] | ({"constraint": LengthRange(0, 6)} if way == "beam" else {})
    if way == "boxes of a beam":
        options |= {"constraint": LengthRange(0, 6), "agreement": None}
    generator, sample = ParallelGenerator([student], dictionary, **options), device.move(batch())
    generator.generate([student], sample)
    device.clear()
    generator.generate([student], sample)
    assert len(device.waits) == 1, [str(wait) for wait in device.waits]


def test_students_of_an_ensemble_wait_no_more_than_one(dictionary: Dictionary, device: DeviceWaits) -> None:
    students = [device.move(make("narvl_tiny", num_queries=6)) for _ in range(3)]
    generator, sample = ParallelGenerator(students, dictionary, beam_size=3), device.move(batch())
    generator.generate(students, sample)
    device.clear()
    generator.generate(students, sample)
    assert len(device.waits) == 1, [str(wait) for wait in device.waits]


def test_a_weight_written_between_batches_is_seen(dictionary: Dictionary, device: DeviceWaits) -> None:
    """What is kept is taken on trust, and the batch done again where that was wrong."""
    student = make("narvl_tiny", num_queries=6)
    generator = ParallelGenerator([student], dictionary, beam_size=2)
    changed = copy.deepcopy(student)
    changed.encoder.pos_q_linear.weight.data.mul_(1.5)
    expected = plain(generator.generate([changed], batch()))
    assert expected != plain(generator.generate([student], batch()))
    moved, sample = device.move(student), device.move(batch())
    generator.generate([moved], sample)
    moved.encoder.pos_q_linear.weight.data.mul_(1.5)
    assert close(plain(generator.generate([moved], sample)), expected)
    device.clear()
    generator.generate([moved], sample)
    assert len(device.waits) == 1, [str(wait) for wait in device.waits]


def test_a_teacher_that_rescores_is_one_wait_more(dictionary: Dictionary, device: DeviceWaits) -> None:
    student, teacher = make("narvl_tiny", num_queries=6), make("ofa_tiny")
    options = {"beam_size": 3, "nbest": 3, "constraint": LengthRange(0, 6)}
    rescorer = TeacherRescorer(teacher, dictionary, 0.5)
    generator = ParallelGenerator([student], dictionary, rescorer=rescorer, **options)
    expected = plain(generator.generate([student], batch()))
    moved, sample = device.move(student), device.move(batch())
    generator.generate([moved], sample)
    assert next(teacher.parameters()).device == next(moved.parameters()).device
    device.clear()
    found = generator.generate([moved], sample)
    assert len(device.waits) == 2, [str(wait) for wait in device.waits]
    assert close(plain(found), expected)


@pytest.mark.parametrize("places_at_once", [2, 50])
def test_a_teacher_scores_a_list_of_answers_with_one_wait(
    places_at_once: int, dictionary: Dictionary, device: DeviceWaits
) -> None:
    codec = SimpleNamespace(
        dictionary=dictionary, encode=lambda text: torch.tensor([dictionary.index(word) for word in text.split()])
    )
    trie = AnswerTrie(["word1", "word1 word2", "word3 word4 word5", "word6 word6"], codec)
    teacher = make("ofa_tiny")
    options = {"nbest": 3, "batch_size": places_at_once}
    expected = plain(CandidateGenerator([teacher], dictionary, trie, **options).generate([teacher], batch()))
    moved, sample = device.move(teacher), device.move(batch())
    generator = CandidateGenerator([moved], dictionary, trie, **options)
    for _ in range(2):
        device.clear()
        found = generator.generate([moved], sample)
        assert len(device.waits) == 1, [str(wait) for wait in device.waits]
    assert close(plain(found), expected)


def test_what_graphs_record_does_not_wait(dictionary: Dictionary, device: DeviceWaits) -> None:
    """A CUDA graph can record no wait: a student's pass, a teacher's encoder, and the steps of its search."""
    waits: list[list[str]] = []

    def record(run: Callable[[], Any]) -> tuple[Callable[[], object], Any]:
        run()
        device.clear()
        result = run()
        waits.append([str(wait) for wait in device.waits])
        return lambda: None, result

    sample = device.move(batch(2))
    models = make("narvl_tiny", num_queries=6), make("ofa_tiny")
    for model in models:
        model.optimize_for_inference()
    student, teacher = map(device.move, models)
    for model in (student, teacher):
        model.use_graphs(Graphs(DEVICE.type, record))
    searches = (
        ParallelGenerator([student], dictionary),
        SequenceGenerator(ensemble_of([teacher]), dictionary, beam_size=2, max_len_b=4, min_len=4),
    )
    for search, model in zip(searches, (student, teacher), strict=True):
        for _ in range(2):
            search.generate([model], sample)
    assert waits == [[]] * 7  # the student, the encoder, five steps


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_torch_counts_no_more_on_a_gpu(way: str, dictionary: Dictionary) -> None:
    student = make("narvl_tiny", num_queries=6).cuda()
    generator, sample = ParallelGenerator([student], dictionary, **WAYS[way]), on_gpu(batch())
    generator.generate([student], sample)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            generator.generate([student], sample)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [str(warning.message) for warning in caught if "synchroniz" in str(warning.message)]
    assert len(waits) <= MOST, waits


def on_gpu(sample: dict[str, Any]) -> dict[str, Any]:
    return torch.utils._pytree.tree_map(lambda part: part.cuda() if isinstance(part, Tensor) else part, sample)
