"""The two criterions of a parallel model, on a model of one matrix."""

import math
from argparse import ArgumentParser
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fairseq.criterions import CRITERION_REGISTRY
from fairseq.data import Dictionary
from fairseq.distributed import ModuleProxyWrapper
from fairseq.logging import metrics
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from criterions import QueryCrossEntropyCriterion, QueryCtcCriterion
from criterions.qctc import QueryCtcConfig
from criterions.query_criterion import QueryCriterion, QueryCriterionConfig
from criterions.query_cross_entropy import straight_paths
from narvl_plugin.ctc import bigram_f1, collapse, query_ctc_loss
from narvl_plugin.ctc.lattice import min_queries
from narvl_plugin.errors import BadRow, SkipBudget

BOTH = pytest.mark.parametrize("kind", [QueryCtcCriterion, QueryCrossEntropyCriterion])
MakeBatch = Callable[..., dict[str, Any]]
CAPTIONS = ["a b c", "a", "b b", "", "c d e f", "f e", "a a a", "d"] * 2


def build(kind: type[QueryCriterion], task: SimpleNamespace, **options: Any) -> QueryCriterion:
    """A criterion made the way fairseq makes it, with default options but those given."""
    config = QueryCtcConfig if kind is QueryCtcCriterion else QueryCriterionConfig
    return kind.build_criterion(config(**{"sentence_avg": False, **options}), task)


def averaged_gradient(
    criterion: QueryCriterion, model: nn.Module, batches: list[dict[str, Any]]
) -> tuple[torch.Tensor, float]:
    """Do what fairseq's trainer does: add up gradients and sample sizes, then divide."""
    model.zero_grad()
    total = 0
    for batch in batches:
        loss, sample_size, _ = criterion(model, batch)
        loss.backward()
        total += sample_size
    return model.project.weight.grad / total, total


@pytest.mark.parametrize("name", ["qctc", "query_cross_entropy"])
def test_options_on_the_command_line(name: str) -> None:
    parser = ArgumentParser()
    CRITERION_REGISTRY[name].add_args(parser)
    terms = {"bigram_weight": 0.0, "score_weight": 0.0}
    own = {"reference_loss": False, **terms} if name == "qctc" else {}
    assert vars(parser.parse_args([])) == {"keep_eos": False, "label_smoothing": 0.0, **own}
    given = parser.parse_args(["--keep-eos", "--label-smoothing", "0.1"])
    assert vars(given) == {"keep_eos": True, "label_smoothing": 0.1, **own}


def test_loss_is_query_ctc_of_the_words_alone(model: nn.Module, task: SimpleNamespace, make_batch: MakeBatch) -> None:
    batch = make_batch(["a b c", "b b"])
    loss, sample_size, log = build(QueryCtcCriterion, task)(model, batch)
    logits, _ = model(**batch["net_input"])
    expected = query_ctc_loss(
        logits, torch.tensor([[4, 5, 6], [5, 5, 0]]), torch.tensor([3, 2]), blank=10, reduction="sum"
    )
    torch.testing.assert_close(loss, expected)
    assert sample_size == log["ntokens"] == log["sample_size"] == 5
    assert log["nsentences"] == 2


@BOTH
def test_any_of_several_targets_is_the_sum_of_their_likelihoods(
    kind: type[QueryCriterion], model: nn.Module, task: SimpleNamespace, make_batch: MakeBatch
) -> None:
    criterion = build(kind, task)
    batch, other = make_batch(["a b c", "b b"]), make_batch(["d", "a"])
    first, second = (torch.exp(-criterion(model, one, reduce=False)[0]) for one in (batch, other))
    pad = task.target_dictionary.pad()
    none, too_long = torch.full((1, 8), pad), torch.full((1, 8), 4)
    rows = [batch["target"][:1], other["target"][:1], too_long, batch["target"][1:], none, none]
    batch["alternatives"] = torch.cat([F.pad(row, (0, 8 - row.size(1)), value=pad) for row in rows]).view(2, 3, 8)
    loss, sample_size, _ = criterion(model, batch)
    torch.testing.assert_close(loss, -(first[0] + second[0]).log() - first[1].log())
    assert sample_size == 5
    loss.backward()
    assert model.project.weight.grad.isfinite().all()


def test_bigram_weight_adds_what_the_best_alternative_lacks(
    model: nn.Module, task: SimpleNamespace, make_batch: MakeBatch
) -> None:
    """With several targets the one whose bigrams are said best counts; a target of one token has none."""
    plain, weighted = build(QueryCtcCriterion, task), build(QueryCtcCriterion, task, bigram_weight=3.0)
    batch = make_batch(["a b c", "d"])
    logits, _ = model(**batch["net_input"])
    f1 = bigram_f1(logits, torch.tensor([[[4, 5, 6], [5, 5, 0]]] * 2), torch.tensor([[3, 2]] * 2), blank=10)[0]
    (single, _), _, log = weighted(model, batch, reduce=False)
    (without, other), _, _ = plain(model, batch, reduce=False)
    torch.testing.assert_close(single, without + 3.0 * 2 * (1 - f1[0]))
    torch.testing.assert_close(weighted(model, batch, reduce=False)[0][1], other)
    assert log["nll_loss"] < log["loss"]

    batch["alternatives"] = torch.stack(
        [batch["target"], F.pad(make_batch(["b b", "d"])["target"], (0, 1), value=task.target_dictionary.pad())], 1
    )
    best = int(f1.argmax())
    added = (weighted(model, batch, reduce=False)[0] - plain(model, batch, reduce=False)[0])[0]
    torch.testing.assert_close(added, 3.0 * (2, 1)[best] * (1 - f1[best]))
    with pytest.raises(ValueError, match="--bigram-weight -1"):
        build(QueryCtcCriterion, task, bigram_weight=-1.0)


def test_score_weight_adds_what_the_expected_score_lacks(
    task: SimpleNamespace, model: nn.Module, make_batch: MakeBatch
) -> None:
    """The score here is 1 for outputs of the target's length; so it can be summed over all paths."""
    batch = make_batch(["a b", "c"])
    task.output_scores = lambda outputs, lengths, targets, target_lengths: (lengths == target_lengths).float()
    plain, weighted = build(QueryCtcCriterion, task), build(QueryCtcCriterion, task, score_weight=3.0)
    (without, *_), logits = plain(model, batch, reduce=False), model(**batch["net_input"])[0]
    torch.manual_seed(1)
    drawn = torch.stack([weighted(model, batch, reduce=False)[0] for _ in range(200)]).mean(0)
    paths = torch.distributions.Categorical(logits=logits).sample(torch.Size([20_000])).flatten(0, 1)
    lengths = collapse(paths, blank=model.blank).lengths.view(-1, 2)
    expected = (lengths == torch.tensor([2, 1])).float().mean(0)
    torch.testing.assert_close(drawn - without, 3 * (1 - expected), rtol=0.05, atol=0)
    with pytest.raises(ValueError, match="--score-weight -1"):
        build(QueryCtcCriterion, task, score_weight=-1.0)


def test_keep_eos_makes_it_a_token(model: nn.Module, task: SimpleNamespace, make_batch: MakeBatch) -> None:
    batch = make_batch(["a b c", "b b"])
    loss, sample_size, _ = build(QueryCtcCriterion, task, keep_eos=True)(model, batch)
    logits, _ = model(**batch["net_input"])
    expected = query_ctc_loss(
        logits, torch.tensor([[4, 5, 6, 2], [5, 5, 2, 0]]), torch.tensor([4, 3]), blank=10, reduction="sum"
    )
    torch.testing.assert_close(loss, expected)
    assert sample_size == 7


def test_cross_entropy_is_that_of_one_fixed_path(
    model: nn.Module, task: SimpleNamespace, make_batch: MakeBatch
) -> None:
    batch = make_batch(["a b c", "b b", ""])
    loss, _, _ = build(QueryCrossEntropyCriterion, task)(model, batch)
    logits, _ = model(**batch["net_input"])
    paths = torch.tensor([[4, 5, 6, 10, 10, 10], [5, 10, 5, 10, 10, 10], [10] * 6])
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), paths.flatten(), reduction="sum"))


@given(st.lists(st.lists(st.integers(1, 3), max_size=5), min_size=1, max_size=4), st.integers(0, 2))
@settings(deadline=None)  # a busy machine takes longer
def test_straight_path_collapses_to_its_target(rows: list[list[int]], spare: int) -> None:
    """In as many queries as the target needs, or more; what is written into padding is no matter."""
    longest = max(map(len, rows))
    targets = torch.tensor([row + [0] * (longest - len(row)) for row in rows], dtype=torch.long)
    targets = targets.view(len(rows), longest)
    lengths = torch.tensor([len(row) for row in rows])
    paths = straight_paths(targets, lengths, int(min_queries(targets, lengths).max()) + spare, blank=9)
    found = collapse(paths, blank=9)
    assert [tokens[:size] for tokens, size in zip(found.tokens.tolist(), map(len, rows), strict=True)] == rows
    assert found.lengths.tolist() == lengths.tolist()


@BOTH
@pytest.mark.parametrize("sentence_avg", [False, True])
def test_one_batch_of_16_gives_the_gradient_of_two_of_8(
    kind: type[QueryCriterion],
    sentence_avg: bool,
    model: nn.Module,
    task: SimpleNamespace,
    make_batch: MakeBatch,
) -> None:
    """Though the halves hold unlike numbers of tokens, and one of them a sample that does not fit."""
    captions = ["a b c d e f", *CAPTIONS[1:12], "a b c d e f a b", *CAPTIONS[13:]]
    criterion = build(kind, task, sentence_avg=sentence_avg)
    whole, size = averaged_gradient(criterion, model, [make_batch(captions)])
    halves, size_of_halves = averaged_gradient(
        criterion, model, [make_batch(captions[:8]), make_batch(captions[8:], first_row=8)]
    )
    assert size == size_of_halves == (15 if sentence_avg else sum(len(c.split()) for c in captions) - 8)
    torch.testing.assert_close(whole, halves)


@BOTH
def test_target_longer_than_the_queries_stops_with_file_and_row(
    kind: type[QueryCriterion], model: nn.Module, task: SimpleNamespace, make_batch: MakeBatch
) -> None:
    task.skip_budget = SkipBudget(0)
    with pytest.raises(BadRow, match=r"^train.tsv:2: target needs 7 queries but the model has 6; raise --num-queries"):
        build(kind, task)(model, make_batch(["a", "a a b b c", "b"]))


def test_repeats_count_towards_the_queries_needed(
    model: nn.Module, task: SimpleNamespace, make_batch: MakeBatch
) -> None:
    """Six different words fit six queries; with </s> kept they do not, nor do four equal words."""
    task.skip_budget = SkipBudget(0)
    build(QueryCtcCriterion, task)(model, make_batch(["a b c d e f"]))
    with pytest.raises(BadRow, match="needs 7 queries"):
        build(QueryCtcCriterion, task, keep_eos=True)(model, make_batch(["a b c d e f"]))
    with pytest.raises(BadRow, match="needs 7 queries"):
        build(QueryCtcCriterion, task)(model, make_batch(["a a a a"]))


@BOTH
def test_skipped_samples_are_counted_and_the_others_train(
    kind: type[QueryCriterion], model: nn.Module, task: SimpleNamespace, make_batch: MakeBatch
) -> None:
    criterion = build(kind, task)
    batch = make_batch(["a b", "a b c d e f a", "c c"])
    loss, sample_size, log = criterion(model, {**batch, "conf": torch.tensor([0.5, 9.0, 1.0])})
    assert task.skip_budget.count == log["did_not_fit"] == 1
    assert (sample_size, log["nsentences"], log["queries"]) == (4, 2, 12)
    first, *_ = criterion(model, make_batch(["a b"]))
    last, *_ = criterion(model, make_batch(["c c"], first_row=2))
    torch.testing.assert_close(loss, 0.5 * first + last)


@BOTH
def test_batch_of_which_nothing_fits_is_a_zero_that_can_be_trained_on(
    kind: type[QueryCriterion], model: nn.Module, task: SimpleNamespace, make_batch: MakeBatch
) -> None:
    loss, sample_size, log = build(kind, task, label_smoothing=0.1)(model, make_batch(["a b c d e f a"]))
    loss.backward()
    assert loss.item() == sample_size == 0
    assert model.project.weight.grad.abs().sum() == 0
    with metrics.aggregate() as meters:
        QueryCtcCriterion.reduce_metrics([log])
    assert meters.get_smoothed_values()["did_not_fit"] == 1


@BOTH
def test_weights_multiply_the_samples_losses(
    kind: type[QueryCriterion], model: nn.Module, task: SimpleNamespace, make_batch: MakeBatch
) -> None:
    batch = make_batch(["a b", "c"])
    criterion = build(kind, task)
    plain, _, plain_log = criterion(model, batch, reduce=False)
    weighted, _, log = criterion(model, {**batch, "conf": torch.tensor([0.3, 0.9])}, reduce=False)
    torch.testing.assert_close(weighted, plain * torch.tensor([0.3, 0.9]))
    torch.testing.assert_close(log["nll_loss"], plain_log["nll_loss"])


@BOTH
def test_label_smoothing_leaves_the_blank_out(
    kind: type[QueryCriterion], model: nn.Module, task: SimpleNamespace, make_batch: MakeBatch
) -> None:
    batch = make_batch(["a b", "c"])
    plain, *_ = build(kind, task)(model, batch)
    smooth, _, log = build(kind, task, label_smoothing=0.2)(model, batch)
    log_probs = model(**batch["net_input"])[0].log_softmax(2)
    spread = -log_probs[:, :, :10].mean((1, 2)).sum()
    torch.testing.assert_close(smooth, 0.8 * plain + 0.2 * spread)
    torch.testing.assert_close(log["nll_loss"], plain.detach())


@pytest.mark.parametrize("smoothing", [-0.1, 1.0])
def test_label_smoothing_out_of_range_is_refused(smoothing: float, task: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match="--label-smoothing"):
        build(QueryCtcCriterion, task, label_smoothing=smoothing)


def test_model_without_blank_is_refused_in_words(
    dictionary: Dictionary, task: SimpleNamespace, make_batch: MakeBatch
) -> None:
    with pytest.raises(ValueError, match="QueryCtcCriterion trains a parallel model.*Linear has no blank"):
        build(QueryCtcCriterion, task)(nn.Linear(1, 1), make_batch(["a"]))


def test_blank_is_found_through_the_wrappers_of_data_parallel_training(
    model: nn.Module, task: SimpleNamespace, make_batch: MakeBatch
) -> None:
    class Parallel(nn.Module):
        """Stands for DistributedDataParallel: keeps the model in `module` and knows nothing of its attributes."""

        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, **net_input: torch.Tensor) -> Any:
            return self.module(**net_input)

    criterion = build(QueryCtcCriterion, task)
    wrapped, *_ = criterion(ModuleProxyWrapper(Parallel(model)), make_batch(["a b"]))
    plain, *_ = criterion(model, make_batch(["a b"]))
    torch.testing.assert_close(wrapped, plain)


def test_what_is_logged_of_several_steps(model: nn.Module, task: SimpleNamespace, make_batch: MakeBatch) -> None:
    """Summed key by key as fairseq does between processes, the means are those of all samples in one step."""
    criterion = build(QueryCtcCriterion, task)
    with torch.no_grad():  # the first sample's queries all say blank: 6 of 24
        model.project.bias.view(6, -1)[:, 10] = -50.0
        model.project.weight.zero_().view(6, 11, 4)[:, 10, 0] = 100.0
    batches = [make_batch(["a b", "c"]), make_batch(["d", "e f a"])]
    for batch, first in zip(batches, ([1.0, 0.0], [0.0, 0.0]), strict=True):
        batch["net_input"]["features"] = torch.tensor(first)[:, None] * torch.ones(2, 4)
    logs = [criterion(model, batch)[2] for batch in batches]
    summed = {key: sum(log[key] for log in logs) for key in logs[0]}
    assert QueryCtcCriterion.logging_outputs_can_be_summed()
    with metrics.aggregate() as meters:
        QueryCtcCriterion.reduce_metrics([summed])
    values = meters.get_smoothed_values()
    bits = sum(float(log["loss"]) for log in logs) / 7 / math.log(2)
    assert values["loss"] == values["nll_loss"] == pytest.approx(bits, abs=1e-3)
    assert values["ppl"] == pytest.approx(2**bits, rel=1e-2)
    assert values["blank_share"] == 0.25
    assert values["did_not_fit"] == 0


def test_repeats_are_counted_in_validation(model: nn.Module, task: SimpleNamespace, make_batch: MakeBatch) -> None:
    """A query repeats if it has the label of the query before it, unless that is the blank."""
    with torch.no_grad():
        model.project.weight.zero_()
        model.project.bias.view(6, -1).scatter_(1, torch.tensor([4, 4, 10, 10, 4, 4])[:, None], 50.0)
    criterion = build(QueryCtcCriterion, task)
    batch = make_batch(["a b", "c"])
    assert "repeats" not in criterion(model, batch)[2]
    criterion.eval()
    log = criterion(model, batch)[2]
    with metrics.aggregate() as meters:
        QueryCtcCriterion.reduce_metrics([log])
    assert meters.get_smoothed_values()["repeat_share"] == pytest.approx(2 / 6, abs=1e-3)


@pytest.mark.integration
@BOTH
def test_training_on_one_batch_learns_it(
    kind: type[QueryCriterion], model: nn.Module, task: SimpleNamespace, make_batch: MakeBatch
) -> None:
    """After a few hundred steps the queries' best labels collapse to the captions."""
    batch = make_batch(["a b b", "c", "", "f e d"])
    criterion = build(kind, task)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        criterion(model, batch)[0].backward()
        optimizer.step()
    found = collapse(model(**batch["net_input"])[0].argmax(2), blank=10)
    words = [tokens[:size] for tokens, size in zip(found.tokens.tolist(), found.lengths.tolist(), strict=True)]
    assert words == [[4, 5, 5], [6], [], [9, 8, 7]]
