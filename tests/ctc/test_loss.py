"""Query-CTC against enumeration, against torch's ctc_loss, and against finite differences."""

import itertools
import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from narvl_plugin.ctc import TargetsDoNotFit, log_sum_exp, query_ctc_any_loss, query_ctc_loss
from narvl_plugin.ctc.lattice import min_queries

Spellings = Callable[[int, int, int, tuple[int, ...]], Iterator[tuple[int, ...]]]


def generator(seed: int) -> torch.Generator:
    """Random numbers of one test."""
    return torch.Generator().manual_seed(seed)


def random_case(
    seed: int,
    batch: int,
    queries: int,
    labels: int,
    longest: int,
    blank: int,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, and fitting targets with many adjacent repeats, all lengths from 0 on and nonsense as padding."""
    random = generator(seed)
    logits = 3 * torch.randn(batch, queries, labels, dtype=dtype, generator=random)
    alphabet = [label for label in range(labels) if label != blank]
    picks = torch.randint(len(alphabet), (batch, longest), generator=random)
    stays = torch.rand(batch, longest, generator=random) < 0.3
    for position in range(1, longest):
        picks[:, position] = torch.where(stays[:, position], picks[:, position - 1], picks[:, position])
    targets = torch.tensor(alphabet)[picks]
    lengths = torch.randint(longest + 1, (batch,), generator=random)
    while (too_long := min_queries(targets, lengths) > queries).any():
        lengths = lengths - too_long.long()
    targets[torch.arange(longest) >= lengths[:, None]] = -(10**9)
    return logits, targets, lengths


def torch_ctc(logits: Tensor, targets: Tensor, target_lengths: Tensor, query_lengths: Tensor, blank: int) -> Tensor:
    """The same loss by torch, which wants no nonsense in the padding."""
    pad = (blank + 1) % logits.size(2)
    length_mask = torch.arange(targets.size(1)) < target_lengths[:, None]
    log_probs = logits.log_softmax(2).transpose(0, 1)
    return F.ctc_loss(
        log_probs, targets.where(length_mask, pad), query_lengths, target_lengths, blank, reduction="none"
    )


@pytest.mark.parametrize("num_labels", [2, 3, 4])
@pytest.mark.parametrize("num_queries", [1, 2, 3, 4])
def test_equals_the_sum_over_all_paths(num_queries: int, num_labels: int, spellings: Spellings) -> None:
    """Every blank, every target that fits, the empty one and those with repeats included."""
    logits = torch.randn(1, num_queries, num_labels, dtype=torch.float64, generator=generator(num_queries))
    log_probs = logits[0].log_softmax(1)
    queries = torch.arange(num_queries)
    for blank in range(num_labels):
        tokens = [label for label in range(num_labels) if label != blank]
        for length in range(num_queries + 1):
            for target in itertools.product(tokens, repeat=length):
                paths = list(spellings(num_queries, num_labels, blank, target))
                call = (logits, torch.tensor([target], dtype=torch.long), torch.tensor([length]))
                if not paths:
                    with pytest.raises(TargetsDoNotFit):
                        query_ctc_loss(*call, blank=blank)
                    continue
                scores = torch.stack([log_probs[queries, torch.tensor(path)].sum() for path in paths])
                loss = query_ctc_loss(*call, blank=blank)
                assert float(loss) == pytest.approx(-float(scores.logsumexp(0)), abs=1e-12)


@pytest.mark.parametrize("blank", [0, 1, 2])
def test_probabilities_of_all_targets_sum_to_one(blank: int) -> None:
    logits = torch.randn(1, 4, 3, dtype=torch.float64, generator=generator(5))
    tokens = [label for label in range(3) if label != blank]
    total = 0.0
    for length in range(5):
        for target in itertools.product(tokens, repeat=length):
            call = torch.tensor([target], dtype=torch.long), torch.tensor([length])
            if min_queries(*call) <= 4:
                total += math.exp(-query_ctc_loss(logits, *call, blank=blank).item())
    assert total == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("varied_queries", [False, True])
@pytest.mark.parametrize(
    ("queries", "labels", "longest", "blank"), [(20, 5000, 12, 4999), (48, 7, 40, 0), (9, 40, 9, 17)]
)
def test_equals_torch_on_large_random_cases(
    queries: int, labels: int, longest: int, blank: int, varied_queries: bool
) -> None:
    """Values and gradients, torch's in double."""
    logits, targets, lengths = random_case(1, 24, queries, labels, longest, blank)
    query_lengths = torch.full_like(lengths, queries)
    if varied_queries:
        needs = min_queries(targets, lengths)
        room = torch.rand(24, generator=generator(2)) * (queries - needs + 1)
        query_lengths = (needs + room.long()).clamp(min=1)
    upstream = torch.randn(24, generator=generator(3))

    reference = logits.double().requires_grad_()
    expected = torch_ctc(reference, targets, lengths, query_lengths, blank)
    (expected * upstream).sum().backward()

    logits.requires_grad_()
    given = query_lengths if varied_queries else None
    losses = query_ctc_loss(logits, targets, lengths, blank=blank, query_lengths=given, reduction="none")
    (losses * upstream).sum().backward()
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(logits.grad.double(), reference.grad, rtol=1e-4, atol=2e-5)
    assert logits.grad[torch.arange(queries) >= query_lengths[:, None]].abs().sum() == 0


@pytest.mark.parametrize("blank", [0, 3])
def test_gradient_passes_finite_differences(blank: int) -> None:
    logits, targets, lengths = random_case(4, 5, 6, 4, 4, blank, torch.float64)
    query_lengths = torch.maximum(min_queries(targets, lengths), torch.tensor([6, 5, 6, 4, 3]))
    weights = torch.rand(5, dtype=torch.float64, generator=generator(5)).requires_grad_()

    def loss(logits: Tensor, weights: Tensor) -> Tensor:
        return query_ctc_loss(
            logits,
            targets,
            lengths,
            blank=blank,
            query_lengths=query_lengths,
            weights=weights,
            reduction="sum",
        )

    assert torch.autograd.gradcheck(loss, (logits.requires_grad_(), weights))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_summed_in_float32(dtype: torch.dtype) -> None:
    """The loss is that of the same numbers in float32; only the gradient's last step rounds to the logits' type."""
    logits, targets, lengths = random_case(6, 8, 20, 300, 12, 299)
    logits = logits.to(dtype).requires_grad_()
    wide = logits.detach().float().requires_grad_()
    loss = query_ctc_loss(logits, targets, lengths, blank=299)
    expected = query_ctc_loss(wide, targets, lengths, blank=299)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-6)
    loss.backward()
    expected.backward()
    assert logits.grad.dtype == dtype
    torch.testing.assert_close(logits.grad, wide.grad.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-7)


def test_names_of_labels_do_not_matter() -> None:
    """Permuting the vocabulary, targets and blank along with it, changes nothing."""
    logits, targets, lengths = random_case(7, 8, 12, 30, 8, 4, torch.float64)
    targets = targets.clamp(min=0)
    order = torch.randperm(30, generator=generator(8))
    place = order.argsort()
    plain = query_ctc_loss(logits, targets, lengths, blank=4, reduction="none")
    permuted = query_ctc_loss(logits[..., order], place[targets], lengths, blank=int(place[4]), reduction="none")
    torch.testing.assert_close(plain, permuted)


def test_adding_to_all_logits_of_a_query_changes_nothing() -> None:
    """Even by amounts at which a naive sum of exponentials would overflow."""
    logits, targets, lengths = random_case(9, 4, 10, 20, 6, 0, torch.float64)
    moved = logits + torch.tensor([0.0, 1e4, -1e4, 700.0]).double()[:, None, None]
    torch.testing.assert_close(
        query_ctc_loss(logits, targets, lengths, blank=0, reduction="none"),
        query_ctc_loss(moved, targets, lengths, blank=0, reduction="none"),
    )


def test_reductions_and_weights() -> None:
    logits, targets, lengths = random_case(10, 6, 10, 20, 6, 0)
    weights = torch.tensor([0.0, 0.3, 1.0, 0.6, 0.9, 2.0])
    call = {"logits": logits, "targets": targets, "target_lengths": lengths, "blank": 0}
    plain = query_ctc_loss(**call, reduction="none")
    weighted = query_ctc_loss(**call, reduction="none", weights=weights)
    assert plain.shape == (6,)
    torch.testing.assert_close(weighted, plain * weights)
    torch.testing.assert_close(query_ctc_loss(**call, reduction="sum", weights=weights), weighted.sum())
    torch.testing.assert_close(query_ctc_loss(**call, weights=weights), weighted.sum() / 6)
    torch.testing.assert_close(query_ctc_loss(**call), plain.mean())


def test_targets_that_do_not_fit_are_listed() -> None:
    targets = torch.tensor([[1, 2, 3, 0], [1, 1, 1, 0], [1, 2, 3, 3], [1, 1, 0, 0]])
    with pytest.raises(TargetsDoNotFit, match="target 1 needs 5 queries but has 4; target 2 needs 5") as caught:
        query_ctc_loss(torch.zeros(4, 4, 5), targets, torch.tensor([3, 3, 4, 2]), blank=4)
    assert (caught.value.indices, caught.value.needs, caught.value.available) == ([1, 2], [5, 5], [4, 4])
    with pytest.raises(TargetsDoNotFit) as caught:
        query_ctc_loss(
            torch.zeros(4, 5, 5),
            targets,
            torch.tensor([3, 3, 4, 2]),
            blank=4,
            query_lengths=torch.tensor([3, 5, 5, 2]),
        )
    assert (caught.value.indices, caught.value.needs, caught.value.available) == ([3], [3], [2])


@pytest.mark.parametrize(
    ("targets", "lengths", "message"),
    [
        ([[1, 2], [3, 0]], [2, 2], "target 1 has label 0 at position 1.*blank, which is 0"),
        ([[1, 2], [3, 5]], [2, 2], r"target 1 has label 5 at position 1.*\[0, 5\)"),
        ([[-100, 2], [3, 1]], [1, 2], "target 0 has label -100 at position 0"),
        ([[1, 2], [3, 4]], [2, 3], r"target lengths \[2, 3\]"),
        ([[1, 2], [3, 4]], [-1, 2], r"target lengths \[-1, 2\]"),
    ],
)
def test_targets_that_cannot_be_meant_are_refused(targets: list, lengths: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        query_ctc_loss(torch.zeros(2, 4, 5), torch.tensor(targets), torch.tensor(lengths), blank=0)


def test_other_arguments_that_cannot_be_meant_are_refused() -> None:
    call = torch.zeros(2, 4, 5), torch.tensor([[1], [2]]), torch.tensor([1, 1])
    with pytest.raises(ValueError, match="blank 5 is not one of the 5 labels"):
        query_ctc_loss(*call, blank=5)
    with pytest.raises(ValueError, match=r"query lengths \[5, 1\]"):
        query_ctc_loss(*call, blank=0, query_lengths=torch.tensor([5, 1]))
    with pytest.raises(ValueError, match="'avg'"):
        query_ctc_loss(*call, blank=0, reduction="avg")


@pytest.mark.parametrize("shape", [(0, 4, 5), (2, 0, 5), (2, 3, 5)])
def test_nothing_to_say(shape: tuple[int, int, int]) -> None:
    """No samples, no queries, or no room for targets: the only path left is all blank."""
    logits = torch.randn(shape, dtype=torch.float64, generator=generator(11)).requires_grad_()
    nothing = torch.empty(shape[0], 0, dtype=torch.long)
    losses = query_ctc_loss(logits, nothing, torch.zeros(shape[0], dtype=torch.long), blank=2, reduction="none")
    torch.testing.assert_close(losses, -logits.log_softmax(2)[:, :, 2].sum(1))
    mean = query_ctc_loss(logits, nothing, torch.zeros(shape[0], dtype=torch.long), blank=2)
    mean.backward()
    assert mean.isfinite()
    assert logits.grad.isfinite().all()


def test_nothing_comes_from_queries_out_of_use() -> None:
    """Not even when their logits are not numbers."""
    logits, targets, lengths = random_case(12, 3, 8, 10, 3, 0)
    logits[:, 6:] = math.nan
    logits.requires_grad_()
    short = query_ctc_loss(logits, targets, lengths, blank=0, query_lengths=torch.tensor([6, 6, 6]))
    short.backward()
    torch.testing.assert_close(short, query_ctc_loss(logits.detach()[:, :6], targets, lengths, blank=0))
    assert logits.grad[:, :6].isfinite().all()
    assert logits.grad[:, 6:].abs().sum() == 0


def test_target_ruled_out_by_the_logits_costs_infinity_and_breaks_no_other() -> None:
    logits = torch.zeros(2, 3, 4)
    logits[0, :, 1] = -math.inf
    logits.requires_grad_()
    losses = query_ctc_loss(logits, torch.tensor([[1], [1]]), torch.tensor([1, 1]), blank=0, reduction="none")
    assert losses[0] == math.inf
    assert losses[1].item() == pytest.approx(-math.log(6 / 64), abs=1e-6)  # 001 010 100 011 110 111
    losses.sum().backward()
    assert logits.grad.isfinite().all()
    assert logits.grad[0].abs().sum() == 0


def test_target_ruled_out_at_one_query_only() -> None:
    """Label 1 cannot be said first: of six paths 001 010 011 remain, each of (1/3)(1/4)(1/4)."""
    logits = torch.zeros(1, 3, 4, dtype=torch.float64)
    logits[0, 0, 1] = -math.inf
    logits.requires_grad_()
    loss = query_ctc_loss(logits, torch.tensor([[1]]), torch.tensor([1]), blank=0)
    loss.backward()
    assert loss.item() == pytest.approx(-math.log(3 / 48), abs=1e-12)
    assert logits.grad[0, 0].tolist() == pytest.approx([1 / 3 - 1, 0, 1 / 3, 1 / 3])


def test_logits_of_any_memory_layout() -> None:
    logits, targets, lengths = random_case(13, 4, 10, 20, 6, 0)
    plain, transposed = logits.clone().requires_grad_(), logits.transpose(0, 1).contiguous().requires_grad_()
    query_ctc_loss(plain, targets, lengths, blank=0).backward()
    query_ctc_loss(transposed.transpose(0, 1), targets, lengths, blank=0).backward()
    torch.testing.assert_close(plain.grad, transposed.grad.transpose(0, 1))


def test_autocast_does_not_touch_the_sums() -> None:
    logits, targets, lengths = random_case(14, 4, 10, 20, 6, 0)
    plain, mixed = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    query_ctc_loss(plain, targets, lengths, blank=0).backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        query_ctc_loss(mixed, targets, lengths, blank=0).backward()
    assert torch.equal(plain.grad, mixed.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_log_sum_exp_equals_torch(dtype: torch.dtype) -> None:
    logits = (20 * torch.randn(3, 5, 70_000, generator=generator(15))).to(dtype)
    expected = logits.double().logsumexp(2)
    torch.testing.assert_close(log_sum_exp(logits).double(), expected, rtol=1e-6, atol=1e-6)


def test_any_of_several_targets_sums_over_the_paths_of_all(spellings: Spellings) -> None:
    """By enumeration: three targets of different lengths, the empty one among them, and one that does not count."""
    logits = torch.randn(1, 4, 4, dtype=torch.float64, generator=generator(5))
    targets = torch.tensor([[[1, 1, 9], [2, 1, 3], [9, 9, 9], [3, 9, 9]]])
    lengths = torch.tensor([[2, 3, 0, -1]])
    log_probs = logits[0].log_softmax(1)
    paths = [path for target in ((1, 1), (2, 1, 3), ()) for path in spellings(4, 4, 0, target)]
    total = sum(math.exp(sum(float(log_probs[i, label]) for i, label in enumerate(path))) for path in paths)
    loss = query_ctc_any_loss(logits, targets, lengths, blank=0)
    assert loss.tolist() == pytest.approx([-math.log(total)], rel=1e-12)


def test_any_of_several_targets_is_what_single_losses_add_up_to() -> None:
    """Value and gradient, with targets that share labels, and a sample of which none counts."""
    logits, targets, lengths = random_case(3, 12, 8, 6, 5, blank=2, dtype=torch.float64)
    targets, lengths = targets.view(4, 3, -1), lengths.view(4, 3)
    lengths[1, 2] = lengths[2, 0] = -1
    lengths[3] = -1
    shared = logits[:4].clone().requires_grad_()
    loss = query_ctc_any_loss(shared, targets, lengths, blank=2)
    assert loss[3].item() == math.inf
    loss[:3].sum().backward()

    reference = logits[:4].clone().requires_grad_()
    expected = []
    for sample in range(3):
        kept = lengths[sample] >= 0
        rows = reference[sample].expand(int(kept.sum()), -1, -1)
        losses = query_ctc_loss(rows, targets[sample][kept], lengths[sample][kept], blank=2, reduction="none")
        expected.append(-(-losses).logsumexp(0))
    torch.testing.assert_close(loss[:3], torch.stack(expected))
    torch.stack(expected).sum().backward()
    torch.testing.assert_close(shared.grad, reference.grad)


def test_any_of_several_targets_refuses_what_a_single_one_is_refused_for() -> None:
    logits, targets, lengths = torch.zeros(1, 3, 5), torch.tensor([[[1, 2], [3, 4]]]), torch.tensor([[2, 3]])
    with pytest.raises(ValueError, match=r"target lengths \[2, 3\] must be in \[0, 2\]"):
        query_ctc_any_loss(logits, targets, lengths, blank=0)
    with pytest.raises(ValueError, match="the blank 5 is not one of the 5 labels"):
        query_ctc_any_loss(logits, targets, lengths - 1, blank=5)


def test_any_of_several_targets_refuses_what_does_not_fit() -> None:
    with pytest.raises(TargetsDoNotFit, match="target 3 needs 5 queries but has 3"):
        query_ctc_any_loss(
            torch.zeros(2, 3, 5),
            torch.tensor([[[1, 2], [3, 4]], [[1, 2], [1, 1]]]).repeat(1, 1, 2)[..., :3],
            torch.tensor([[2, 2], [2, 3]]),
            blank=0,
        )
