"""Query-CTC over languages: the paths whose outputs an automaton accepts, summed in any semiring.

Legend: B batch, N queries, V labels, U distinct labels of a sample, M nodes of a sample, of which W have more than
NARROW predecessors, P predecessors of a node.

A path of labels walks through nodes, one a query. A node is a state of the automaton with the last token read into it,
or a state with a blank read last. From query to query a path stays, reads a blank, or reads the next token. The next
token may follow the last one without a blank between if the two differ, because equal neighbours merge.

A target is a chain, several targets are a trie, and a set of elements is the lattice of its subsets. Each has the loss
of this module: the negative log-probability that the output is one that the automaton accepts. It is exact if the
automaton is unambiguous, that is if it accepts no output in two ways; the automata of this package are.

The recursion is written once, for any semiring. In that of logs and sums it gives the loss, and its gradient gives the
posterior of each label at each query. In that of maxima it gives the score of the best path, and its gradient is that
path.

Sources: Graves et al., ICML 2006, section 4.1; Goodman, Semiring Parsing, Computational Linguistics 25, 1999.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from narvl_plugin.ctc.constraints import Automaton
from narvl_plugin.ctc.lattice import IMPOSSIBLE, gather_labels
from narvl_plugin.ctc.loss import log_sum_exp, row_pieces

NARROW = 3
"""The number of predecessors of most nodes: a path stays, or it reads a token after a blank, or after another token."""

Plus = Callable[[Tensor, int], Tensor]
"""The addition of a semiring over one dimension; its multiplication is that of probabilities, a sum of logs."""


def log_plus(scores: Tensor, dim: int) -> Tensor:
    """Add probabilities: the log of the summed exponentials."""
    return scores.logsumexp(dim)


def max_plus(scores: Tensor, dim: int) -> Tensor:
    """Take the highest score; its gradient is 1 for one of the highest and 0 for the others."""
    return scores.max(dim).values


# --- Graphs of paths -------------------------------------------------------------------------------------------------


class PathGraph(NamedTuple):
    """The nodes that the paths of each sample of a batch walk through.

    Attributes:
        labels: (B, U), the distinct labels that each sample reads; the blank is the first, and fills the padding.
        reads: (B, M), the place in `labels` of the label that is read in each node.
        wide: (B, P, W), the nodes from which a path may come to each of the first W nodes; M on padding.
        narrow: (B, NARROW, M - W), the same for the other nodes.
        start: (B,), the node before the first query.
        ends: (B, M), whether a path may end in the node.
    """

    labels: Tensor
    reads: Tensor
    wide: Tensor
    narrow: Tensor
    start: Tensor
    ends: Tensor

    @classmethod
    def of(cls, automata: Sequence[Automaton], *, blank: int) -> PathGraph:
        """Build the graph of a batch, on the CPU.

        Args:
            automata: one for each sample, on the CPU.
            blank: the label of the blank.

        Raises:
            ValueError: for an automaton that reads the blank.
        """
        graphs = [_graph(automaton, blank) for automaton in automata]
        distinct, nodes, ways, wide = (max(sizes) for sizes in zip(*((1, 1, 1, 0), *map(_sizes, graphs)), strict=True))
        labels = np.full((len(graphs), distinct), blank)
        reads = np.zeros((len(graphs), nodes), dtype=np.int64)
        previous = np.full((len(graphs), nodes, max(ways, NARROW)), nodes)
        start = np.zeros(len(graphs), dtype=np.int64)
        ends = np.zeros((len(graphs), nodes), dtype=bool)
        for sample, graph in enumerate(graphs):
            size, most = graph.previous.shape
            labels[sample, : len(graph.labels)] = graph.labels
            reads[sample, :size] = graph.reads
            previous[sample, :size, :most] = np.where(graph.previous == size, nodes, graph.previous)
            start[sample] = graph.start
            ends[sample, :size] = graph.ends
        turned = previous.swapaxes(1, 2)
        parts = (labels, reads, turned[:, :, :wide], turned[:, :NARROW, wide:], start, ends)
        return cls(*(torch.from_numpy(np.ascontiguousarray(part)) for part in parts))

    def to(self, device: torch.device) -> PathGraph:
        """Return the same graph on another device without a synchronisation."""
        return PathGraph(*(part.to(device, non_blocking=True) for part in self))

    def arrive(self, values: Tensor, nothing: float | bool, plus: Plus) -> Tensor:
        """Add up the values of the nodes from which a path may come to each node: (B, M) -> (B, M).

        Args:
            values: (B, M).
            nothing: the value of no node.
            plus: the addition.
        """
        outside = F.pad(values, (0, 1), value=nothing)
        parts = [outside.gather(1, nodes.flatten(1)).view(nodes.shape) for nodes in (self.wide, self.narrow)]
        return torch.cat([plus(part, 1) for part in parts if part.size(2)], 1)

    def least_queries(self, most: int) -> Tensor:
        """Return the number of queries of each sample's shortest path, (B,); `most` + 1 if it is above `most`."""
        reached = torch.zeros_like(self.ends).scatter(1, self.start[:, None], True)
        needs = torch.full_like(self.start, most + 1)
        for queries in range(most + 1):
            there = (reached & self.ends).any(1)
            needs = torch.where(there & (needs > queries), queries, needs)
            reached = self.arrive(reached, False, torch.any)
        return needs


class _Graph(NamedTuple):
    """The graph of one sample; see `PathGraph`."""

    labels: np.ndarray
    reads: np.ndarray
    previous: np.ndarray
    start: int
    ends: np.ndarray


def _sizes(graph: _Graph) -> tuple[int, int, int, int]:
    """Return the numbers U, M, P and W of a graph."""
    nodes, ways = graph.previous.shape
    wide = int((graph.previous[:, NARROW:] != nodes).any(1).sum()) if ways > NARROW else 0
    return len(graph.labels), nodes, ways, wide


def _graph(automaton: Automaton, blank: int) -> _Graph:
    """Build the graph of an automaton: a node for each pair of a state and a token read into it, then one a state."""
    sources, tokens, targets, accepting = (part.numpy() for part in automaton)
    if (tokens == blank).any():
        raise ValueError(f"the automaton reads the blank, which is {blank}")
    num_states = len(accepting)
    cells, cell_of_arc = np.unique(np.stack([targets, tokens], 1), axis=0, return_inverse=True)
    cell_of_arc = cell_of_arc.reshape(-1)
    num_cells = len(cells)
    state_of_cell, token_of_cell = cells[:, 0], cells[:, 1]  # sorted by the state
    first = np.searchsorted(state_of_cell, np.arange(num_states + 1))
    # Pairs of an arc and a cell of the state that it leaves.
    counts = np.diff(first)[sources]
    arcs = np.repeat(np.arange(len(sources)), counts)
    places = np.arange(len(arcs)) - np.repeat(counts.cumsum() - counts, counts)
    before = first[sources[arcs]] + places
    differs = token_of_cell[before] != tokens[arcs]
    nodes = np.arange(num_cells + num_states)
    ways = [
        (nodes, nodes),  # a label that is read again, or one more blank
        (num_cells + sources, cell_of_arc),  # a token after a blank
        (before[differs], cell_of_arc[arcs[differs]]),  # a token after another one
        (np.arange(num_cells), num_cells + state_of_cell),  # a blank after a token
    ]
    origins, reached = (np.concatenate(parts) for parts in zip(*ways, strict=True))
    numbers = np.bincount(reached, minlength=len(nodes))
    widest_first = np.argsort(-numbers, kind="stable")
    rank = np.empty_like(nodes)
    rank[widest_first] = nodes
    origins, reached, numbers = rank[origins], rank[reached], numbers[widest_first]
    order = np.argsort(reached, kind="stable")
    origins, reached = origins[order], reached[order]
    previous = np.full((len(nodes), numbers.max()), len(nodes))
    previous[reached, np.arange(len(reached)) - np.repeat(numbers.cumsum() - numbers, numbers)] = origins
    labels, read = np.unique(token_of_cell, return_inverse=True)
    reads = np.concatenate([1 + read.reshape(-1), np.zeros(num_states, dtype=np.int64)])
    ends = np.concatenate([accepting[state_of_cell], accepting])
    labels = np.concatenate([[blank], labels])
    return _Graph(labels, reads[widest_first], previous, int(rank[num_cells]), ends[widest_first])


# --- Sums over paths -------------------------------------------------------------------------------------------------


def sum_over_paths(emissions: Tensor, graph: PathGraph, plus: Plus = log_plus) -> Tensor:
    """Add the scores of all paths of each sample.

    Args:
        emissions: (B, N, U), the log-probability of each of the graph's labels at each query.
        graph: the paths.
        plus: the addition of the semiring.

    Returns:
        (B,); at most IMPOSSIBLE / 2 for a sample without a path.
    """
    read = emissions.clamp(min=IMPOSSIBLE).gather(2, graph.reads[:, None].expand(-1, emissions.size(1), -1))
    scores = emissions.new_full(graph.ends.shape, IMPOSSIBLE).scatter(1, graph.start[:, None], 0.0)
    for query in range(emissions.size(1)):
        scores = graph.arrive(scores, IMPOSSIBLE, plus) + read[:, query]
    return plus(scores.masked_fill(~graph.ends, IMPOSSIBLE), 1)


class _LogProbabilities(torch.autograd.Function):
    """See `labels_log_probs`."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        normalisers = log_sum_exp(logits)
        log_probs = gather_labels(logits, labels) - normalisers[..., None]
        ctx.save_for_backward(logits, labels, log_probs)
        return log_probs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        logits, labels, log_probs = ctx.saved_tensors
        copies = (labels == labels[:, :1])[:, None]
        first = upstream.masked_fill(~copies, 0.0).sum(2, keepdim=True)
        upstream = torch.where(copies, first, upstream)
        total = first + upstream.masked_fill(copies, 0.0).sum(2, keepdim=True)  # (B, N, 1)
        gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
        rows, totals, row_gradients = logits.flatten(0, 1), total.flatten(0, 1), gradient.flatten(0, 1)
        for piece in row_pieces(rows):
            softmax = rows[piece].softmax(1, dtype=totals.dtype)
            torch.mul(softmax, -totals[piece], out=row_gradients[piece])
        # The gradients of the labels are written, not added, so that half precision loses no small difference.
        values = upstream - log_probs.exp() * total
        gradient.scatter_(2, labels[:, None].expand_as(values), values.to(gradient.dtype))
        return gradient, None


def language_loss(
    logits: Tensor,
    acceptors: Sequence[Automaton] | PathGraph,
    *,
    blank: int,
    reduction: Literal["none", "sum", "mean"] = "mean",
) -> Tensor:
    """Return the negative log of the probability that the queries spell an output that an automaton accepts.

    The sums are in float32 (float64 stays). The gradient is exact. A sample whose outputs are all impossible, or need
    more than N queries, has an infinite loss and no gradient.

    Args:
        logits: (B, N, V), of any float type, unnormalised.
        acceptors: an unambiguous automaton for each sample, or their graph.
        blank: the label of the blank.
        reduction: "none" for the losses, "sum" for their sum, "mean" for their mean over the batch.

    Returns:
        (B,) for "none", else a scalar (0 for an empty batch); in nats.

    Raises:
        ValueError: if there is not one automaton for each sample, or one reads the blank or no label of the logits.
    """
    graph = _graph_of(logits, acceptors, blank)
    return reduced(sum_over_paths(labels_log_probs(logits, graph.labels), graph), reduction)


def labels_log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the log-probabilities of some labels, straight from logits, with no tensor of the logits' size kept.

    Args:
        logits: (B, N, V), of any float type, unnormalised.
        labels: (B, U), distinct but for copies of the first one.

    Returns:
        (B, N, U), in float32 (float64 stays).
    """
    log_probs: Tensor = _LogProbabilities.apply(logits, labels)
    return log_probs


def reduced(totals: Tensor, reduction: str) -> Tensor:
    """Return losses from the logs of the summed probabilities of all paths.

    Args:
        totals: (B,), at most IMPOSSIBLE / 2 for a sample without a path, whose loss is infinite, without a gradient.
        reduction: "none" for the losses, "sum" for their sum, "mean" for their mean over the batch.

    Raises:
        ValueError: for another reduction.
    """
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f"reduction is {reduction!r}; it must be 'none', 'sum' or 'mean'")
    losses = torch.where(totals > IMPOSSIBLE / 2, -totals, float("inf"))
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / max(1, len(totals))


def best_path_of(logits: Tensor, acceptors: Sequence[Automaton] | PathGraph, *, blank: int) -> tuple[Tensor, Tensor]:
    """Return each sample's most probable path to an output that its automaton accepts.

    Args:
        logits: (B, N, V), unnormalised or normalised.
        acceptors: see `language_loss`.
        blank: the label of the blank.

    Returns:
        The labels (B, N) and the log-probabilities (B,); -inf, and any labels, for a sample without a path.
    """
    graph = _graph_of(logits, acceptors, blank)
    emissions = labels_log_probs(logits.detach(), graph.labels)
    scores, shares = _with_gradient(emissions, graph, max_plus)
    labels = graph.labels.gather(1, shares.argmax(2))
    return labels, scores.masked_fill(scores < IMPOSSIBLE / 2, float("-inf"))


def label_posteriors(
    logits: Tensor, acceptors: Sequence[Automaton] | PathGraph, *, blank: int
) -> tuple[Tensor, Tensor]:
    """Return the probability of each label at each query, given that the output is accepted.

    Args:
        logits: (B, N, V), unnormalised or normalised.
        acceptors: see `language_loss`.
        blank: the label of the blank.

    Returns:
        The labels (B, U) of each sample, the blank first and on padding, and the probabilities (B, N, U).
    """
    graph = _graph_of(logits, acceptors, blank)
    emissions = labels_log_probs(logits.detach(), graph.labels)
    return graph.labels, _with_gradient(emissions, graph, log_plus)[1]


def path_entropy(logits: Tensor, acceptors: Sequence[Automaton] | PathGraph, *, blank: int) -> Tensor:
    """Return the entropy of the path, given that its output is accepted, (B,) in nats, without a gradient.

    Args:
        logits: (B, N, V), unnormalised or normalised.
        acceptors: see `language_loss`.
        blank: the label of the blank.
    """
    graph = _graph_of(logits, acceptors, blank)
    emissions = labels_log_probs(logits.detach(), graph.labels)
    totals, shares = _with_gradient(emissions, graph, log_plus)
    return totals - (shares * emissions.clamp(min=IMPOSSIBLE)).sum((1, 2))


def _with_gradient(emissions: Tensor, graph: PathGraph, plus: Plus) -> tuple[Tensor, Tensor]:
    """Return the sums over paths (B,), and their gradients for the emissions (B, N, U)."""
    with torch.enable_grad():
        read = emissions.detach().requires_grad_()
        totals = sum_over_paths(read, graph, plus)
        gradient = torch.autograd.grad(totals.sum(), read)[0]
    return totals.detach(), gradient


def _graph_of(logits: Tensor, acceptors: Sequence[Automaton] | PathGraph, blank: int) -> PathGraph:
    """Return the graph of automata on the device of the logits.

    Raises:
        ValueError: if it does not fit the logits.
    """
    graph = acceptors if isinstance(acceptors, PathGraph) else PathGraph.of(acceptors, blank=blank)
    if len(graph.labels) != len(logits):
        raise ValueError(f"{len(graph.labels)} automata for {len(logits)} samples")
    if not isinstance(acceptors, PathGraph) and graph.labels.numel():
        least, most = int(graph.labels.min()), int(graph.labels.max())
        if least < 0 or most >= logits.size(2):
            raise ValueError(f"automata read labels from {least} to {most}; labels must be in [0, {logits.size(2)})")
    return graph.to(logits.device)
