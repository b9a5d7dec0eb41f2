"""The task of scene graphs: triplets in searches, scores and validation, and fairseq's own programs."""

import random
import re
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from narvl_plugin.data.triplets import read_triplets
from narvl_plugin.errors import InputError
from narvl_plugin.models.registered import build
from narvl_plugin.tasks.registered import SceneGraphConfig, SceneGraphTask

Rows = list[list[str]]
EOS = 2
HAT, DOG, NEARLY_HAT = ("red hat", (0, 0, 5, 5)), ("dog", (5, 0, 10, 10)), ("red hat", (0, 0, 5, 6))
ON, NEARLY_ON, BESIDE = (DOG, "on", HAT), (DOG, "on", NEARLY_HAT), (HAT, "left_of", DOG)


@pytest.fixture
def make_task(
    graph_vocabulary: Path, names_file: Path, write_tsv: Callable[..., Path]
) -> Callable[..., SceneGraphTask]:
    """Make a task on rows of graphs; eleven bins, so that bin k is at 8 k of the 80 pixels."""

    def make(rows: Rows, **options: Any) -> SceneGraphTask:
        data = f"train.tsv,{write_tsv('valid.tsv', rows)}"
        values = {"patch_image_size": 80, "max_image_size": 80, "num_bins": 11, "names_file": str(names_file)}
        config = SceneGraphConfig(data=data, bpe_dir=str(graph_vocabulary), **values | options)
        return SceneGraphTask.setup_task(config)

    return make


@pytest.fixture
def task(make_task: Callable[..., SceneGraphTask], scene_graph_rows: Rows) -> SceneGraphTask:
    return make_task(scene_graph_rows)


def element(task: SceneGraphTask, triplet: Sequence[Any]) -> list[int]:
    (subject, box), relation, (other, other_box) = triplet
    first = task.target_dictionary.index("<bin_0>")
    names = [task.codec.encode(f" {text}").tolist() for text in (subject, f"{relation} {other}")]
    return names[0] + [first + edge for edge in box] + names[1] + [first + edge for edge in other_box]


def tokens_of(task: SceneGraphTask, *triplets: Sequence[Any]) -> torch.Tensor:
    return torch.tensor([*sum((element(task, one) for one in triplets), []), EOS])


def in_bins(*triplets: Sequence[Any]) -> str:
    def spelled(noun: str, box: Sequence[int]) -> str:
        return noun + "".join(f"<bin_{edge}>" for edge in box)

    return " ".join(f"{spelled(*one)} {relation} {spelled(*other)}" for one, relation, other in triplets)


def batch_of(task: SceneGraphTask) -> dict[str, Any]:
    task.load_dataset("valid")
    dataset = task.dataset("valid")
    batch: dict[str, Any] = dataset.collater([dataset[row] for row in range(3)])
    return batch


def test_the_elements_of_a_target_are_its_triplets(task: SceneGraphTask) -> None:
    said = tokens_of(task, ON, BESIDE)[:-1].tolist()
    assert task.elements(said) == [tuple(element(task, ON)), tuple(element(task, BESIDE))]
    assert task.elements([]) == []


def test_names_and_bins_must_be_given(
    make_task: Callable[..., SceneGraphTask], scene_graph_rows: Rows, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="--names-file: is not given"):
        make_task(scene_graph_rows, names_file=None)
    with pytest.raises(InputError, match="--num-bins 1: "):
        make_task(scene_graph_rows, num_bins=1)
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(InputError, match="--names-file .*other.json"):
        make_task(scene_graph_rows, names_file=str(tmp_path / "other.json"))


# --- Searches -------------------------------------------------------------------------------------------------------


def accepted(task: SceneGraphTask, *outputs: torch.Tensor) -> list[bool]:
    constraint = task.search_options(Namespace(beam=1))["constraint"].ending_in(EOS)
    valid: list[bool] = constraint.accepts(
        pad_sequence(list(outputs), batch_first=True), torch.tensor(list(map(len, outputs)))
    ).tolist()
    assert valid == [not task.is_invalid(tokens) for tokens in outputs]
    return valid


def test_a_student_says_whole_different_triplets_of_listed_names(task: SceneGraphTask) -> None:
    six = [(("dog", (0, 0, edge, 10)), "on", HAT) for edge in range(6)]
    assert all(accepted(task, *(tokens_of(task, *one) for one in ([], [ON], [ON, BESIDE, NEARLY_ON], six))))
    wrong = ([ON, ON], [(("dog", (5, 0, 4, 9)), "on", HAT)], [(("hat", (0, 0, 1, 1)), "on", HAT)], [*six, ON])
    outputs = [tokens_of(task, *one) for one in wrong] + [tokens_of(task, ON)[:-2], tokens_of(task, ON)[1:]]
    assert not any(accepted(task, *outputs))


@pytest.mark.parametrize("bins", [2, 11])
def test_a_teacher_never_gets_stuck(
    make_task: Callable[..., SceneGraphTask], scene_graph_rows: Rows, tmp_path: Path, bins: int
) -> None:
    if bins < 11:  # few triplets, which are soon used up
        (tmp_path / "names.json").write_text('{"label_to_idx": {"dog": 1}, "predicate_to_idx": {"on": 1}}')
    task = make_task(scene_graph_rows, num_bins=bins)
    draw = random.Random(bins)
    seen = []
    for _ in range(40):
        said: list[int] = []
        while EOS not in said:
            allowed = task.allowed_tokens(said)
            others = [token for token in allowed if token != EOS]
            said.append(draw.choice(others if others and draw.random() < 0.95 else allowed))
        assert not task.is_invalid(torch.tensor(said))
        seen.append(len(task.elements(said[:-1])))
    assert max(seen) == 6


def test_a_teacher_is_led_to_names_and_boxes(task: SceneGraphTask) -> None:
    first = task.target_dictionary.index("<bin_0>")
    whole = element(task, ON)
    assert EOS in task.allowed_tokens([]) and EOS in task.allowed_tokens(whole)
    subject = len(task.codec.encode(" dog"))
    assert task.allowed_tokens(whole[:subject]) == list(range(first, first + 11))
    assert task.allowed_tokens(whole[: subject + 2]) == list(range(first + 5, first + 11))
    assert not set(task.allowed_tokens(whole[: subject + 4])) & {EOS, *range(first, first + 11)}
    assert whole[-1] not in task.allowed_tokens([*whole, *whole[:-1]])
    hat = task.codec.encode(" red").tolist()  # is a noun, and begins another
    assert set(task.allowed_tokens(hat)) > set(range(first, first + 11))
    assert task.allowed_tokens([first]) == task.allowed_tokens([EOS]) == []


def model_of(task: SceneGraphTask, name: str) -> Any:
    torch.manual_seed(1)
    is_student = name.startswith("narvl")
    queries = {"num_queries": 30} if is_student else {}
    size = len(task.target_dictionary) + is_student
    return build(name, vocab_size=size, vision_pretrained=False, **queries).eval()


@pytest.mark.parametrize(("name", "beam"), [("narvl_nano", 1), ("narvl_nano", 3), ("ofa_nano", 1), ("ofa_nano", 3)])
def test_outputs_of_any_model_are_graphs_with_a_probability_for_each_triplet(
    task: SceneGraphTask, name: str, beam: int
) -> None:
    model = model_of(task, name)
    generator = task.build_generator([model], Namespace(beam=beam, nbest=beam))
    beams = task.inference_step(generator, [model], batch_of(task))
    outputs = [one["tokens"] for hypotheses in beams for one in hypotheses]
    assert all(accepted(task, *outputs))
    for hypotheses in beams:
        confidences = task.element_confidences(hypotheses)
        assert len(confidences) == len(task.elements(hypotheses[0]["tokens"][:-1].tolist()))
        assert all(0 <= one <= 1 for one in (*confidences, task.confidence(hypotheses)))


def test_a_student_says_none_if_no_triplet_is_probable(
    make_task: Callable[..., SceneGraphTask], scene_graph_rows: Rows
) -> None:
    task = make_task(scene_graph_rows, abstain_below=1.1)
    model = model_of(task, "narvl_nano")
    generator = task.build_generator([model], Namespace(beam=1))
    for (one,) in task.inference_step(generator, [model], batch_of(task)):
        assert one["tokens"].tolist() == [task.target_dictionary.eos()]


# --- Scores ---------------------------------------------------------------------------------------------------------


def test_graphs_agree_in_any_order_if_all_their_triplets_do(task: SceneGraphTask) -> None:
    graphs = ([ON, BESIDE], [BESIDE, NEARLY_ON], [ON], [], [(HAT, "on", DOG)])
    outputs = [*(tokens_of(task, *one) for one in graphs), tokens_of(task, ON)[:-2]]
    expected = torch.eye(6)
    expected[0, 1] = expected[1, 0] = 1
    expected[5, 5] = 0  # not whole
    assert task.agreement(outputs).tolist() == expected.tolist()


def padded(*outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    said = [tokens[:-1] for tokens in outputs]
    return pad_sequence(said, batch_first=True), torch.tensor(list(map(len, said)))


def test_outputs_score_by_whether_they_are_exact(task: SceneGraphTask) -> None:
    tokens, lengths = padded(*(tokens_of(task, *one) for one in ([NEARLY_ON], [BESIDE], [ON, BESIDE], [])))
    target, length = padded(tokens_of(task, ON))
    scores = task.output_scores(tokens[None], lengths[None], target[None], length[None])
    assert scores.tolist() == [[1, 0, 0, 0]]


def test_the_probability_of_a_triplet_is_its_share_of_the_drawn_graphs(task: SceneGraphTask) -> None:
    drawn = [tokens_of(task, *one) for one in ([ON, BESIDE], [NEARLY_ON], [BESIDE])]
    tokens, lengths = padded(*drawn, tokens_of(task, ON)[:-1])
    shares = task.element_scores(tokens, lengths, tokens_of(task, ON, BESIDE, (HAT, "on", DOG))[:-1])
    assert shares.tolist() == pytest.approx([2 / 3, 2 / 3, 0])  # the last is no graph
    assert task.element_scores(tokens, lengths, tokens_of(task)[:-1]).tolist() == []


def test_a_teachers_probabilities_are_those_of_its_beam(task: SceneGraphTask) -> None:
    beam = [
        {"tokens": tokens_of(task, *one), "positional_scores": torch.tensor([share]).log()}
        for one, share in (([ON, BESIDE], 0.5), ([BESIDE, NEARLY_ON], 0.2), ([BESIDE], 0.1), ([], 0.1))
    ]
    assert task.confidence(beam) == pytest.approx(0.7)
    assert task.element_confidences(beam) == pytest.approx([0.7, 0.8])
    assert task.element_confidences(beam[3:]) == []


def test_validation_logs_exact_graphs_and_recall(
    make_task: Callable[..., SceneGraphTask], scene_graph_rows: Rows, validated: Callable[..., dict[str, float]]
) -> None:
    rows = [scene_graph_rows[row] for row in (0, 0, 1, 2, 2)]
    on, beside = (("dog", (5, 0, 10, 10)), "on", HAT), (("dog", (0, 0, 5, 10)), "left_of", DOG)
    said = [in_bins(beside, on), in_bins(on), in_bins(on), "", "dog"]
    task = make_task(rows, eval_acc=True)
    codec, encode = task.codec, task.codec.encode
    codec.encode = lambda text: (  # the tests' generator says texts
        torch.cat(
            [
                torch.tensor([codec.dictionary.index(part)]) if part.startswith("<bin") else encode(f" {part.strip()}")
                for part in re.findall(r"<bin_\d+>|[^<]+", text)
            ]
            or [torch.empty(0, dtype=torch.int64)]
        )
        if text in said
        else encode(text)
    )
    logged = validated(task, said)
    assert logged["score"] == pytest.approx(2 / 5)
    assert logged["r_5"] == logged["r_10"] == pytest.approx(1.5 / 3)


def test_outputs_are_written_as_the_column_has_them(task: SceneGraphTask) -> None:
    outputs = [tokens_of(task, ON, BESIDE), tokens_of(task), tokens_of(task, (("dog", (3, 3, 3, 3)), "on", HAT))]
    written = task.written_targets(batch_of(task), [[{"tokens": tokens}] for tokens in outputs])
    assert written[1:] == ["", None]  # a box without area is no target
    assert written[0] == "dog 4,0,8,6 | on | red hat 0,0,4,3&&red hat 0,0,4,3 | left of | dog 4,0,8,6"
    assert len(read_triplets(written[0], "written")) == 2
    assert task.written_targets(batch_of(task), [[{"tokens": outputs[0][:-2]}]] * 3) == [None] * 3


@pytest.mark.integration
@pytest.mark.parametrize(
    ("arch", "training"),
    [
        ("ofa_nano", ["--criterion", "label_smoothed_cross_entropy", "--element-order", "random"]),
        ("narvl_nano", ["--criterion", "qset", "--num-queries", 36]),
    ],
)
def test_from_tsv_to_graphs_with_fairseqs_programs(
    arch: str,
    training: list[object],
    fairseqs_programs: Callable[..., str],
    scene_graph_rows: Rows,
    names_file: Path,
    graph_vocabulary: Path,
) -> None:
    last = fairseqs_programs(
        scene_graph_rows,
        *("--task", "scene_graph", "--num-bins", 11, "--max-image-size", 80, "--names-file", names_file),
        training=["--arch", arch, *training, "--eval-acc"],
        metric="score",
        generation=["--scoring", "scene_graph", "--beam", 2],
        vocabulary=graph_vocabulary,
    )
    assert re.search(r"exact graphs [01]\.\d+, R@5 .*, 3 rows, 0 hypotheses are no triplets", last)
