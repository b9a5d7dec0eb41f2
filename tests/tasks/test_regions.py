"""The task of all regions: sets of boxes in searches, scores and validation, orders, fairseq's own programs."""

import random
import re
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from narvl_plugin.generation.parallel_generator import ParallelGenerator
from narvl_plugin.models.registered import build
from narvl_plugin.tasks.box_sets import number_of_boxes
from narvl_plugin.tasks.registered import RegionsConfig, RegionsTask

Rows = list[list[str]]
EOS = 2
WHOLE, LEFT, RIGHT, CORNER = (0, 0, 10, 10), (0, 0, 5, 10), (5, 0, 10, 10), (0, 0, 2, 2)
NEARLY_LEFT = (0, 0, 6, 10)


@pytest.fixture
def rows(regions_rows: Rows) -> Rows:
    """Rows with two boxes, one and none, on images of 8 x 6 pixels."""
    regions_rows[0][3], regions_rows[1][3] = "4,0,8,6&&0,0,4,6", "0,0,8,6"
    return regions_rows


@pytest.fixture
def make_task(vocabulary: Path, write_tsv: Callable[..., Path]) -> Callable[..., RegionsTask]:
    """Make a task on rows of regions; eleven bins, so that bin k is at 8 k of the 80 pixels."""

    def make(rows: Rows, **options: Any) -> RegionsTask:
        path = write_tsv("valid.tsv", rows)
        values = {"patch_image_size": 80, "max_image_size": 80, "num_bins": 11} | options
        return RegionsTask.setup_task(RegionsConfig(data=f"train.tsv,{path}", bpe_dir=str(vocabulary), **values))

    return make


@pytest.fixture
def task(make_task: Callable[..., RegionsTask], rows: Rows) -> RegionsTask:
    return make_task(rows)


def tokens_of(task: RegionsTask, *boxes: Sequence[int]) -> torch.Tensor:
    return torch.tensor([*sum(map(tuple, boxes), ()), EOS - task.bins.first]) + task.bins.first


# --- Targets --------------------------------------------------------------------------------------------------------


def test_the_elements_of_a_target_are_its_boxes(task: RegionsTask) -> None:
    assert task.elements([4, 5, 6, 7, 8, 9, 10, 11]) == [(4, 5, 6, 7), (8, 9, 10, 11)]
    assert task.elements([]) == []


def orders_of_epochs(make_task: Callable[..., RegionsTask], rows: Rows, write_tsv: Any, order: str) -> list[list[int]]:
    task = make_task(rows, element_order=order)
    task.cfg.data = f"{write_tsv('train.tsv', rows)},{task.cfg.data.split(',')[-1]}"
    for split in ("train", "valid"):
        task.load_dataset(split)
    targets = []
    for epoch in range(1, 13):
        task.dataset("train").set_epoch(epoch)
        targets.append((task.dataset("train").sample(0)["target"][:-1] - task.bins.first).tolist())
    reading = (task.dataset("valid").sample(0)["target"][:-1] - task.bins.first).tolist()
    assert reading == [*LEFT, *RIGHT]
    return targets


@pytest.mark.parametrize("order", ["reading", "random"])
def test_orders_of_boxes_in_training(
    make_task: Callable[..., RegionsTask], rows: Rows, write_tsv: Callable[..., Path], order: str
) -> None:
    targets = orders_of_epochs(make_task, rows, write_tsv, order)
    assert targets == orders_of_epochs(make_task, rows, write_tsv, order)
    expected = [[*LEFT, *RIGHT]] + ([[*RIGHT, *LEFT]] if order == "random" else [])
    assert sorted(set(map(tuple, targets))) == sorted(map(tuple, expected))


# --- Searches -------------------------------------------------------------------------------------------------------


def accepted(task: RegionsTask, *outputs: torch.Tensor) -> list[bool]:
    constraint = task.search_options(Namespace(beam=1))["constraint"].ending_in(EOS)
    padded = torch.nn.utils.rnn.pad_sequence(list(outputs), batch_first=True)
    lengths = torch.tensor([len(tokens) for tokens in outputs])
    valid: list[bool] = constraint.accepts(padded, lengths).tolist()
    assert valid == [not task.is_invalid(tokens) for tokens in outputs]
    return valid


def test_a_student_says_whole_different_boxes_in_order(task: RegionsTask) -> None:
    five = [(0, 0, edge, 10) for edge in range(5)]
    valid = ([], [WHOLE], [WHOLE, LEFT], [(3, 3, 3, 3)], five)
    assert all(accepted(task, *(tokens_of(task, *boxes) for boxes in valid)))
    invalid = ([WHOLE, WHOLE], [(5, 0, 4, 10)], [WHOLE, (0, 5, 10, 4)], [*five, WHOLE], [WHOLE[:3]])
    assert not any(accepted(task, *(tokens_of(task, *boxes) for boxes in invalid)))


def test_a_teacher_is_led_to_whole_different_boxes_in_order(task: RegionsTask) -> None:
    def allowed(*boxes: Sequence[int]) -> list[int]:
        return [token - task.bins.first for token in task.allowed_tokens(tokens_of(task, *boxes)[:-1].tolist())]

    bins, end = list(range(11)), EOS - task.bins.first
    assert sorted(allowed()) == sorted(allowed(WHOLE)) == [end, *bins]
    assert allowed((3,)) == allowed(WHOLE, (0,)) == bins
    assert allowed((3, 4)) == bins[3:]
    assert allowed((3, 4, 5)) == bins[4:]
    assert allowed(LEFT, RIGHT, (0, 0, 5)) == bins[:-1]
    assert allowed(LEFT, CORNER, WHOLE, RIGHT, NEARLY_LEFT) == [end]
    corner = (10, 10, 10, 10)  # the only box that begins with 10, 10
    assert allowed(corner, (10,)) == bins[:-1]
    assert allowed((3, 11)) == allowed((-1,)) == []


@pytest.mark.parametrize("bins", [1, 2, 3])
def test_a_teacher_with_few_bins_never_gets_stuck(make_task: Callable[..., RegionsTask], rows: Rows, bins: int) -> None:
    task = make_task(rows, num_bins=bins)
    draw = random.Random(bins)
    seen = set()
    for _ in range(200):
        said: list[int] = []
        while EOS not in said:
            said.append(draw.choice(task.allowed_tokens(said)))
        assert not task.is_invalid(torch.tensor(said))
        seen.add(tuple(said))
    every = [
        (x0, y0, x1, y1) for x0 in range(bins) for y0 in range(bins) for x1 in range(x0, bins) for y1 in range(y0, bins)
    ]
    assert max(map(len, seen)) == 4 * min(5, len(every)) + 1
    for begin in {box[:size] for box in every for size in (1, 2, 3, 4)}:
        assert number_of_boxes(begin, bins) == sum(box[: len(begin)] == begin for box in every)


def model_of(task: RegionsTask, name: str) -> Any:
    torch.manual_seed(1)
    is_student = name.startswith("narvl")
    queries = {"num_queries": 22} if is_student else {}
    size = len(task.target_dictionary) + is_student
    return build(name, vocab_size=size, vision_pretrained=False, **queries).eval()


def batch_of(task: RegionsTask) -> dict[str, Any]:
    task.load_dataset("valid")
    dataset = task.dataset("valid")
    batch: dict[str, Any] = dataset.collater([dataset[row] for row in range(3)])
    return batch


@pytest.mark.parametrize(("name", "beam"), [("narvl_nano", 1), ("narvl_nano", 3), ("ofa_nano", 1), ("ofa_nano", 3)])
def test_outputs_of_any_model_are_sets_with_a_probability_for_each_box(task: RegionsTask, name: str, beam: int) -> None:
    model = model_of(task, name)
    generator = task.build_generator([model], Namespace(beam=beam, nbest=beam))
    beams = task.inference_step(generator, [model], batch_of(task))
    outputs = [one["tokens"] for hypotheses in beams for one in hypotheses]
    assert all(accepted(task, *outputs))
    assert max(map(len, outputs)) > 1
    for hypotheses in beams:
        confidences = task.element_confidences(hypotheses)
        assert len(confidences) == len(task.elements(hypotheses[0]["tokens"][:-1].tolist()))
        assert all(0 <= one <= 1 for one in (*confidences, task.confidence(hypotheses)))
        assert all(one >= task.confidence(hypotheses) - 1e-6 for one in confidences)


def test_the_lengths_of_the_options_do_not_limit_sets(task: RegionsTask) -> None:
    args = Namespace(beam=2, min_len=4, max_len_a=1, max_len_b=4)
    search = task.build_generator([model_of(task, "ofa_nano")], args)
    assert (search.min_len, search.max_len_a, search.max_len_b) == (0, 0, 20)
    assert args.max_len_b == 4
    assert isinstance(task.build_generator([model_of(task, "narvl_nano")], args), ParallelGenerator)


@pytest.mark.parametrize("beam", [1, 3])
def test_a_student_says_none_if_no_box_is_probable(
    task: RegionsTask, monkeypatch: pytest.MonkeyPatch, beam: int
) -> None:
    model = model_of(task, "narvl_nano")
    shares = torch.tensor([0.25, 0.5, 0.25, 0.25, 0.25])
    monkeypatch.setattr(task, "element_scores", lambda drawn, lengths, tokens: shares[: len(tokens) // 4].flip(0))

    def outputs(least: float) -> list[dict[str, Any]]:
        task.cfg.abstain_below = least
        generator = task.build_generator([model], Namespace(beam=beam, nbest=beam, print_alignment="hard"))
        return sum(task.inference_step(generator, [model], batch_of(task)), [])

    always = outputs(0.0)
    assert [len(one["tokens"]) for one in always].count(1) < len(always)
    for least in (0.25, 0.3, 0.6):
        for before, after in zip(always, outputs(least), strict=True):
            best = float(before["element_confidences"].amax()) if len(before["element_confidences"]) else 1.0
            if best >= least:
                assert torch.equal(after["tokens"], before["tokens"])
                assert after["confidence"] == before["confidence"]
                continue
            assert after["tokens"].tolist() == [task.target_dictionary.eos()]
            assert (len(after["positional_scores"]), len(after["alignment"])) == (1, 0)
            assert float(after["confidence"]) == 1 - best
            assert task.element_confidences([after]) == []


# --- Scores ---------------------------------------------------------------------------------------------------------


def test_sets_agree_in_any_order_if_all_their_boxes_do(task: RegionsTask) -> None:
    sets = ([LEFT, CORNER], [CORNER, NEARLY_LEFT], [LEFT], [], [LEFT, RIGHT], [(5, 0, 4, 10)])
    outputs = [tokens_of(task, *boxes) for boxes in sets]
    outputs.append(outputs[0][:7])  # not whole
    expected = torch.eye(7)
    expected[0, 1] = expected[1, 0] = 1
    expected[5, 5] = expected[6, 6] = 0  # a box that covers nothing agrees with none
    assert task.agreement(outputs).tolist() == expected.tolist()
    options = task.search_options(Namespace(beam=5))
    assert (options["beam_size"], task.search_options(Namespace(beam=1))["beam_size"]) == (16, 1)


def test_outputs_score_by_whether_they_are_right(task: RegionsTask) -> None:
    def padded(*outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        said = [tokens[:-1] for tokens in outputs]
        return torch.nn.utils.rnn.pad_sequence(said, batch_first=True)[None], torch.tensor([list(map(len, said))])

    sets = ([RIGHT, NEARLY_LEFT], [LEFT], [LEFT, RIGHT, CORNER], [])
    tokens, lengths = padded(*(tokens_of(task, *boxes) for boxes in sets))
    targets, target_lengths = padded(tokens_of(task, LEFT, RIGHT))
    assert task.output_scores(tokens, lengths, targets, target_lengths).tolist() == [[1, 0, 0, 0]]
    assert task.output_scores(tokens, lengths - 1, targets, target_lengths)[0, :3].tolist() == [0, 0, 0]
    nothing, no_length = padded(tokens_of(task))
    assert task.output_scores(tokens, lengths, nothing, no_length).tolist() == [[0, 0, 0, 1]]


def test_the_probability_of_a_box_is_its_share_of_the_drawn_sets(task: RegionsTask) -> None:
    sets = ([LEFT, CORNER], [NEARLY_LEFT], [RIGHT], [LEFT, LEFT[:2]])
    said = [tokens_of(task, *boxes)[:-1] for boxes in sets]
    lengths = torch.tensor(list(map(len, said)))
    drawn = torch.nn.utils.rnn.pad_sequence(said, batch_first=True)
    shares = task.element_scores(drawn, lengths, tokens_of(task, LEFT, RIGHT, (8, 8, 9, 9))[:-1])
    assert shares.tolist() == pytest.approx([2 / 3, 1 / 3, 0])  # the last is no set
    assert task.element_scores(drawn, lengths, tokens_of(task)[:-1]).tolist() == []
    assert task.element_scores(drawn[3:], lengths[3:], tokens_of(task, LEFT)[:-1]).tolist() == [0]


def test_a_teachers_probabilities_are_those_of_its_beam(task: RegionsTask) -> None:
    beam = [
        {"tokens": tokens_of(task, *boxes), "positional_scores": torch.tensor([share]).log()}
        for boxes, share in (([LEFT, CORNER], 0.5), ([CORNER, NEARLY_LEFT], 0.2), ([CORNER], 0.1), ([], 0.1))
    ]
    assert task.confidence(beam) == pytest.approx(0.7)
    assert task.element_confidences(beam) == pytest.approx([0.7, 0.8])
    assert task.element_confidences(beam[3:]) == []


def test_validation_logs_precision_f1_and_whether_there_is_any_box(
    make_task: Callable[..., RegionsTask], rows: Rows, validated: Callable[..., dict[str, float]]
) -> None:
    task = make_task([*rows, [*rows[2][:3], "", rows[2][4]], rows[1]], eval_acc=True)
    said = ["<bin_0><bin_0><bin_5><bin_10><bin_5><bin_0><bin_10><bin_10>", "", "", "<bin_0><bin_0><bin_1><bin_1>"]
    said.append("<bin_0><bin_0>")  # no set
    codec, encode = task.codec, task.codec.encode
    codec.encode = lambda text: (  # the tests' generator says texts
        torch.tensor([codec.dictionary.index(symbol) for symbol in re.findall(r"<bin_\d+>", text)]).long()
        if text in said
        else encode(text)
    )
    logged = validated(task, said)
    assert logged["score"] == logged["mean_f1"] == pytest.approx(2 / 5)
    assert logged["n_acc"] == pytest.approx(1 / 2)
    assert logged["t_acc"] == pytest.approx(2 / 3, abs=1e-4)


def test_outputs_are_written_as_the_column_has_them(task: RegionsTask) -> None:
    outputs = [tokens_of(task, RIGHT, LEFT), tokens_of(task), tokens_of(task, LEFT, (3, 3, 3, 3))]
    written = task.written_targets(batch_of(task), [[{"tokens": tokens}] for tokens in outputs])
    assert written == ["4,0,8,6&&0,0,4,6", "", None]  # a box without area is no target
    assert task.written_targets(batch_of(task), [[{"tokens": outputs[0][:-2]}]] * 3) == [None] * 3


@pytest.mark.integration
@pytest.mark.parametrize(
    ("arch", "training"),
    [
        ("ofa_nano", ["--criterion", "label_smoothed_cross_entropy", "--element-order", "random"]),
        ("narvl_nano", ["--criterion", "qset", "--num-queries", 22]),
    ],
)
def test_from_tsv_to_sets_with_fairseqs_programs(
    arch: str, training: list[object], fairseqs_programs: Callable[..., str], rows: Rows
) -> None:
    last = fairseqs_programs(
        rows,
        *("--task", "regions", "--num-bins", 11, "--max-image-size", 80),
        training=["--arch", arch, *training, "--eval-acc"],
        metric="score",
        generation=["--scoring", "regions", "--beam", 2],
    )
    assert re.search(r"precision [01]\.\d+ at F1 = 1 and IoU 0\.5, mean F1 .*, 3 rows, 0 hypotheses are no", last)
