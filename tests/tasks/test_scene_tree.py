"""The task of scene trees: searches, scores, probabilities and validation, and fairseq's own programs."""

import random
import re
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from criterions.qset import QuerySetConfig, QuerySetCriterion
from narvl_plugin.ctc import query_ctc_any_loss
from narvl_plugin.data.trees import tree_in
from narvl_plugin.errors import InputError
from narvl_plugin.models.registered import build
from narvl_plugin.tasks.registered import SceneTreeConfig, SceneTreeTask

Rows = list[list[str]]
EOS = 2
WHOLE = "( red plain ( left ( small red hat ) ( dog ) ( dog ) ) ( right ( dog ) ) )"
OTHER_ORDER = "( red plain ( right ( dog ) ) ( left ( dog ) ( small red hat ) ( dog ) ) )"
ONE_DOG = "( red plain ( left ( small red hat ) ( dog ) ) ( right ( dog ) ) )"
BLUE = "( blue plain ( right ( dog ) ) )"


@pytest.fixture
def make_task(
    tree_vocabulary: Path, tree_names_file: Path, write_tsv: Callable[..., Path]
) -> Callable[..., SceneTreeTask]:
    """Make a task on rows of trees."""

    def make(rows: Rows, **options: Any) -> SceneTreeTask:
        data = f"train.tsv,{write_tsv('valid.tsv', rows)}"
        values = {"patch_image_size": 32, "num_bins": 0, "names_file": str(tree_names_file)}
        config = SceneTreeConfig(data=data, bpe_dir=str(tree_vocabulary), **values | options)
        return SceneTreeTask.setup_task(config)

    return make


@pytest.fixture
def task(make_task: Callable[..., SceneTreeTask], scene_tree_rows: Rows) -> SceneTreeTask:
    return make_task(scene_tree_rows)


def tokens_of(task: SceneTreeTask, text: str) -> torch.Tensor:
    return torch.cat([task.codec.encode(f" {text}"), torch.tensor([EOS])])


def batch_of(task: SceneTreeTask) -> dict[str, Any]:
    task.load_dataset("valid")
    dataset = task.dataset("valid")
    batch: dict[str, Any] = dataset.collater([dataset[row] for row in range(3)])
    return batch


def test_the_elements_of_a_tree_are_its_regions_and_objects(task: SceneTreeTask) -> None:
    said = task.elements(tokens_of(task, ONE_DOG)[:-1].tolist())
    assert [task.codec.decode(list(one)) for one in said] == [
        "( left ( small red hat ) ( dog ) )",
        "( small red hat )",
        "( dog )",
        "( right ( dog ) )",
        "( dog )",
    ]
    assert task.elements([]) == []


def test_words_must_be_given(make_task: Callable[..., SceneTreeTask], scene_tree_rows: Rows) -> None:
    with pytest.raises(InputError, match="--names-file: is not given"):
        make_task(scene_tree_rows, names_file=None)


# --- Criterion ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["all", "given", "random", "best"])
def test_the_loss_sums_over_the_orders_of_all_children(task: SceneTreeTask, order: str) -> None:
    criterion = QuerySetCriterion.build_criterion(QuerySetConfig(sentence_avg=False, order=order), task)
    texts = [
        f"( red plain {regions} )"
        for hat in (
            "( small red hat ) ( dog ) ( dog )",
            "( dog ) ( small red hat ) ( dog )",
            "( dog ) ( dog ) ( small red hat )",
        )
        for regions in (f"( left {hat} ) ( right ( dog ) )", f"( right ( dog ) ) ( left {hat} )")
    ]
    targets = torch.stack([task.codec.encode(f" {text}") for text in texts])
    size = len(task.target_dictionary)
    logits = torch.randn(1, 40, size + 1, generator=torch.Generator().manual_seed(1))
    length = torch.tensor([[targets.size(1)]])
    loss = criterion.losses_over_references(logits, targets[None, :1], length, blank=size)
    each = torch.cat([query_ctc_any_loss(logits, one[None, None], length, blank=size) for one in targets])
    if order == "all":
        torch.testing.assert_close(loss[0], -(-each).logsumexp(0))
    elif order == "given":
        torch.testing.assert_close(loss[0], each[0])
    else:
        assert torch.isclose(loss, each).any()
    with pytest.raises(InputError, match="--window 2: is for sets"):
        task.acceptor(targets[0].tolist(), 2)


# --- Searches -------------------------------------------------------------------------------------------------------


def accepted(task: SceneTreeTask, *outputs: torch.Tensor) -> list[bool]:
    constraint = task.search_options(Namespace(beam=1))["constraint"].ending_in(EOS)
    valid: list[bool] = constraint.accepts(
        pad_sequence(list(outputs), batch_first=True), torch.tensor(list(map(len, outputs)))
    ).tolist()
    assert valid == [not task.is_invalid(tokens) for tokens in outputs]
    return valid


def test_a_student_says_trees_of_listed_labels(task: SceneTreeTask) -> None:
    good = (WHOLE, OTHER_ORDER, ONE_DOG, BLUE, "( red plain )")
    assert all(accepted(task, *(tokens_of(task, text) for text in good)))
    wrong = (
        "",
        "( red )",
        "( plain red )",
        "( red plain ( left ) )",
        "( red plain ( left ( dog ) ) ( left ( dog ) ) )",
        "( red plain ( dog ) )",
        "( red plain ( left ( dog small ) ) )",
        f"( red plain ( left {'( dog ) ' * 5}) )",
        WHOLE[:-2],
        f"{BLUE} {BLUE}",
    )
    assert not any(accepted(task, *(tokens_of(task, text) for text in wrong)))


def test_a_teacher_never_gets_stuck(task: SceneTreeTask) -> None:
    draw = random.Random(1)
    seen = []
    for _ in range(60):
        said: list[int] = []
        while EOS not in said:
            said.append(draw.choice(task.allowed_tokens(said)))
        assert not task.is_invalid(torch.tensor(said))
        assert len(said) - 1 <= task.longest_output
        tree = tree_in(task.codec.decode(said))
        assert tree is not None
        seen.append(sum(len(region.children) for region in tree.children))
    assert set(seen) == {0, 1, 2, 3, 4}
    assert task.allowed_tokens([EOS]) == []


def model_of(task: SceneTreeTask, name: str) -> Any:
    torch.manual_seed(1)
    is_student = name.startswith("narvl")
    queries = {"num_queries": 32} if is_student else {}
    size = len(task.target_dictionary) + is_student
    return build(name, vocab_size=size, vision_pretrained=False, **queries).eval()


@pytest.mark.parametrize(("name", "beam"), [("narvl_nano", 1), ("narvl_nano", 3), ("ofa_nano", 1), ("ofa_nano", 3)])
def test_outputs_of_any_model_are_trees_with_a_probability_for_each_part(
    task: SceneTreeTask, name: str, beam: int
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


def test_a_student_may_abstain(make_task: Callable[..., SceneTreeTask], scene_tree_rows: Rows) -> None:
    task = make_task(scene_tree_rows, abstain_below=1.0)
    model = model_of(task, "narvl_nano")
    generator = task.build_generator([model], Namespace(beam=1))
    for hypotheses in task.inference_step(generator, [model], batch_of(task)):
        assert hypotheses[0]["tokens"].tolist() == [EOS]
        assert task.tree(hypotheses) is None
        assert task.element_confidences(hypotheses) == []


# --- Scores ---------------------------------------------------------------------------------------------------------


def test_trees_agree_in_any_order(task: SceneTreeTask) -> None:
    outputs = [tokens_of(task, text) for text in (WHOLE, OTHER_ORDER, ONE_DOG, BLUE, "( red plain ( left ) )")]
    expected = torch.eye(5)
    expected[0, 1] = expected[1, 0] = 1
    expected[4, 4] = 0  # no tree of the task
    assert task.agreement(outputs).tolist() == expected.tolist()


def padded(*outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    said = [tokens[:-1] for tokens in outputs]
    return pad_sequence(said, batch_first=True), torch.tensor(list(map(len, said)))


def test_outputs_score_by_whether_they_are_exact(task: SceneTreeTask) -> None:
    tokens, lengths = padded(*(tokens_of(task, text) for text in (OTHER_ORDER, ONE_DOG, WHOLE, WHOLE[:-2])))
    target, length = padded(tokens_of(task, WHOLE))
    scores = task.output_scores(tokens[None], lengths[None], target[None], length[None])
    assert scores.tolist() == [[1, 0, 1, 0]]


def test_the_probability_of_a_part_is_its_share_of_the_drawn_trees(task: SceneTreeTask) -> None:
    drawn = [tokens_of(task, text) for text in (WHOLE, OTHER_ORDER, ONE_DOG, BLUE, WHOLE[:-2])]  # the last is no tree
    shares = task.element_scores(*padded(*drawn), tokens_of(task, WHOLE)[:-1])
    # left, its hat, its first dog, its second dog; right, its dog: as many dogs must be in the same region
    assert shares.tolist() == pytest.approx([2 / 4, 3 / 4, 3 / 4, 2 / 4, 1, 1])
    assert task.element_scores(*padded(*drawn), tokens_of(task, "( red plain )")[:-1]).tolist() == []
    assert task.element_scores(*padded(drawn[-1]), tokens_of(task, BLUE)[:-1]).tolist() == [0, 0]


def test_a_tree_has_its_probabilities(task: SceneTreeTask) -> None:
    beam = [
        {"tokens": tokens_of(task, text), "positional_scores": torch.tensor([share]).log()}
        for text, share in ((ONE_DOG, 0.5), (WHOLE, 0.2), (BLUE, 0.1), (ONE_DOG, 0.1))
    ]
    assert task.confidence(beam) == pytest.approx(0.6)
    assert task.element_confidences(beam) == pytest.approx([0.6, 0.8, 0.8, 0.9, 0.9])
    tree = task.tree(beam)
    assert tree is not None
    left, right = tree["children"]
    assert (tree["label"], tree["probability"]) == ("red plain", pytest.approx(0.6))
    assert (left["label"], left["probability"]) == ("left", pytest.approx(0.6))
    assert [(one["label"], one["children"]) for one in left["children"]] == [("small red hat", []), ("dog", [])]
    assert [one["probability"] for one in left["children"]] == pytest.approx([0.8, 0.8])
    assert right["children"][0]["probability"] == pytest.approx(0.9)


def test_validation_logs_exact_trees_and_edits(
    make_task: Callable[..., SceneTreeTask], scene_tree_rows: Rows, validated: Callable[..., dict[str, float]]
) -> None:
    said = [OTHER_ORDER, "( blue plain ( right ( dog ) ) )", "( red"]
    task = make_task(scene_tree_rows, eval_acc=True)
    logged = validated(task, said)
    assert logged["score"] == pytest.approx(1 / 3, abs=1e-3)
    assert logged["edits"] == pytest.approx((0 + 1 + 1) / 3, abs=1e-3)


def test_outputs_are_written_as_the_column_has_them(task: SceneTreeTask) -> None:
    hypotheses = [[{"tokens": tokens_of(task, text)}] for text in (OTHER_ORDER, "( red plain )", WHOLE[:-2])]
    assert task.written_targets(batch_of(task), hypotheses) == [OTHER_ORDER, "( red plain )", None]


@pytest.mark.integration
@pytest.mark.parametrize(
    ("arch", "training"),
    [
        ("ofa_nano", ["--criterion", "label_smoothed_cross_entropy", "--element-order", "random"]),
        ("narvl_nano", ["--criterion", "qset", "--num-queries", 36]),
    ],
)
def test_from_tsv_to_trees_with_fairseqs_programs(
    arch: str,
    training: list[object],
    fairseqs_programs: Callable[..., str],
    scene_tree_rows: Rows,
    tree_names_file: Path,
    tree_vocabulary: Path,
) -> None:
    last = fairseqs_programs(
        scene_tree_rows,
        *("--task", "scene_tree", "--num-bins", 0, "--names-file", tree_names_file),
        training=["--arch", arch, *training, "--eval-acc"],
        metric="score",
        generation=["--scoring", "scene_tree", "--beam", 2],
        vocabulary=tree_vocabulary,
    )
    assert re.search(r"exact trees [01]\.\d+, edit distance \d\.\d+, outputs that parse 1.0000, 3 rows", last)
