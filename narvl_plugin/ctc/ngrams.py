"""An automaton of n-grams with weights, and the most probable path of the queries into it.

Legend: B batch, N queries, V labels, K labels tried at a query, U distinct labels among those of a sample, S states and
A arcs of the automaton.
"""

import heapq
import logging
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from narvl_plugin.ctc.collapse import Paths
from narvl_plugin.ctc.constraints import NEVER, LengthRange
from narvl_plugin.ctc.host import to_host

logger = logging.getLogger(__name__)

LABELS_TRIED = 8
"""Number of the most probable labels of each query that the search reads, beside the blank."""
REACH = 10.0
"""Labels that are less probable than a query's best label by more than this, in nats, are left out."""
LONGEST = 8
"""Largest order of an automaton."""
STEPS_KEPT = 1_000_000
"""Number of steps that an automaton remembers. When there are more, it forgets them all."""
PATHS_TRIED = 50_000
"""Number of beginnings of paths after which a search for one sample gives up."""


class NgramArrays(NamedTuple):
    """A back-off model of n-grams as an automaton.

    A state is a context: the last tokens, as many as are known together, at most order - 1. State 0 is the start of a
    sentence, and the last state its end. An arc reads a token. If a state has no arc for a token, the state of the next
    shorter context is asked, at the cost of a back-off weight.

    Attributes:
        first: (S + 1,) int64; the arcs of state s are first[s], ..., first[s + 1] - 1.
        labels: (A,) int64, the token that each arc reads; `</s>` enters the last state.
        targets: (A,) int64, the state that each arc enters.
        log_probs: (A,) float32, the log-probability of each arc's token in its context.
        shorter: (S,) int64, the state of the next shorter context; -1 if a token without an arc is impossible.
        backoffs: (S,) float32, the logarithm of the weight of the shorter context, at most 0.
    """

    first: np.ndarray
    labels: np.ndarray
    targets: np.ndarray
    log_probs: np.ndarray
    shorter: np.ndarray
    backoffs: np.ndarray

    def last_tokens(self, start: int) -> np.ndarray:
        """Return the last token of each state's context, (S,); `start` for the start of a sentence."""
        last = np.full(len(self.shorter), start)
        last[self.targets] = self.labels
        longer = (self.shorter >= 0).nonzero()[0]
        for _ in range(LONGEST):  # some contexts are entered only from longer ones
            last[self.shorter[longer]] = last[longer]
        return last


class NgramAutomaton:
    """An automaton that remembers its steps.

    Attributes:
        arrays: the states and arcs.
        end: the number of `</s>`.
        last_state: the state after `</s>`.
        start: a number above those of all tokens, which stands for the start of a sentence.
    """

    def __init__(self, arrays: NgramArrays, end: int) -> None:
        self.arrays = arrays
        self.end = end
        self.last_state = len(arrays.shorter) - 1
        self.start = int(arrays.labels.max(initial=end)) + 1
        self._arcs: dict[int, dict[int, int]] = {}
        self._steps: dict[tuple[int, int], tuple[int, float] | None] = {}
        # Backing off only lowers a probability, so the largest log-probability of a pair in any context is that of an
        # arc.
        before = arrays.last_tokens(self.start)
        sources = np.repeat(np.arange(len(before)), np.diff(arrays.first))
        self._pairs, places = np.unique(before[sources] * (self.start + 1) + arrays.labels, return_inverse=True)
        self._best = np.full(len(self._pairs), NEVER)
        np.maximum.at(self._best, places, arrays.log_probs)

    def step(self, state: int, token: int) -> tuple[int, float] | None:
        """Return the state after a token and the token's log-probability; None if the token is impossible there."""
        key = (state, token)
        if key in self._steps:
            return self._steps[key]
        arrays, weight, found = self.arrays, 0.0, None
        while state >= 0:
            arc = self._arcs_of(state).get(token)
            if arc is not None:
                found = int(arrays.targets[arc]), weight + float(arrays.log_probs[arc])
                break
            weight += float(arrays.backoffs[state])
            state = int(arrays.shorter[state])
        if len(self._steps) >= STEPS_KEPT:
            self._steps.clear()
        self._steps[key] = found
        return found

    def _arcs_of(self, state: int) -> dict[int, int]:
        """Return the arcs of a state by their tokens."""
        arcs = self._arcs.get(state)
        if arcs is None:
            first, stop = self.arrays.first[state : state + 2].tolist()
            arcs = dict(zip(self.arrays.labels[first:stop].tolist(), range(first, stop), strict=True))
            self._arcs[state] = arcs
        return arcs

    def log_prob(self, tokens: Sequence[int]) -> float:
        """Return the log-probability of a sentence with its end; -inf if the automaton has no such sentence."""
        state, total = 0, 0.0
        for token in (*tokens, self.end):
            found = self.step(state, token)
            if found is None:
                return NEVER
            state, total = found[0], total + found[1]
        return total

    def bounds(self, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        """Return the largest log-probability of tokens in any context that ends in certain tokens.

        Args:
            before: (I,) tokens; `start` is the start of a sentence.
            after: (J,) tokens.

        Returns:
            (I, J), -inf for a pair that is not known.
        """
        wanted = before[:, None] * (self.start + 1) + after
        place = np.searchsorted(self._pairs, wanted).clip(max=len(self._pairs) - 1)
        known = (self._pairs[place] == wanted) & (after < self.start)
        return np.where(known, self._best[place], NEVER)


def count_ngrams(sentences: Iterable[Sequence[int]], *, order: int, hard: int = 2, end: int) -> NgramAutomaton:
    """Build the automaton of the n-grams of sentences.

    The probability of a token is its share of the context's followers, interpolated with its probability in the next
    shorter context. It stops at contexts of `hard` - 1 tokens: there, a token that never followed is impossible.

    Source: Witten and Bell, IEEE Transactions on Information Theory 37, 1991, in the interpolated form of Chen and
    Goodman, 1999, section 2.7.

    Args:
        sentences: the tokens of each sentence, without `</s>`.
        order: the length of the longest n-grams, from 2 to `LONGEST`.
        hard: the length of the n-grams that must be known, from 2 to `order`; the start and the end count as tokens.
        end: the number of `</s>`.

    Returns:
        The automaton.

    Raises:
        ValueError: if `order` or `hard` is outside its range, or if there is no sentence.
    """
    if not 2 <= hard <= order <= LONGEST:
        raise ValueError(f"order {order} and hard {hard}: expected 2 <= hard <= order <= {LONGEST}")
    start = -1
    followers: defaultdict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
    for sentence in sentences:
        said = (start, *sentence, end)
        for place in range(1, len(said)):
            for begin in range(max(0, place - order + 1), place):
                followers[said[begin:place]][said[place]] += 1
    if not followers:
        raise ValueError("there is no sentence to count n-grams of")

    used = [context for context in followers if context[0] == start or len(context) >= hard - 1]
    contexts = sorted(used, key=lambda context: (context != (start,), len(context), context))
    states = {context: state for state, context in enumerate(contexts)}
    first, labels, targets, log_probs = [0], list[int](), list[int](), list[float]()
    shorter, backoffs = list[int](), list[float]()
    known: dict[tuple[int, ...], dict[int, float]] = {}
    for context in states:  # shorter contexts come first
        counts = followers[context]
        # The number of different followers weighs the shorter context.
        kinds = len(counts) if len(context) >= hard else 0
        lower = known[context[1:]] if kinds else {}
        total = counts.total() + kinds
        chances = {token: (counts[token] + kinds * lower.get(token, 0.0)) / total for token in sorted(counts)}
        if len(context) < order - 1:
            known[context] = chances
        labels += chances
        log_probs += [min(0.0, math.log(chance)) for chance in chances.values()]
        targets += [len(states) if token == end else states[(*context, token)[1 - order :]] for token in chances]
        first.append(len(labels))
        shorter.append(states[context[1:]] if kinds else -1)
        backoffs.append(math.log(kinds / total) if kinds else 0.0)
    return NgramAutomaton(
        NgramArrays(
            np.array([*first, len(labels)]),
            np.array(labels),
            np.array(targets),
            np.array(log_probs, dtype=np.float32),
            np.array([*shorter, -1]),
            np.array([*backoffs, 0.0], dtype=np.float32),
        ),
        end,
    )


# --- Search ----------------------------------------------------------------------------------------------------------


class Read(NamedTuple):
    """What the search reads of one sample, on the CPU.

    Attributes:
        labels: (N, K), the most probable labels of each query.
        log_probs: (N, K), their log-probabilities; -inf for the blank, and for labels that are left out.
        blanks: (N,), the log-probability of the blank.
    """

    labels: np.ndarray
    log_probs: np.ndarray
    blanks: np.ndarray


class Bounds(NamedTuple):
    """The most that the queries ahead can add to the score of a path, whatever was said before its last token.

    Attributes:
        after_label: N + 1 lists of U + 1 numbers, by the number of queries read and the last token; the last number is
            for the start of a sentence. The last query read has the token.
        after_blank: the same if a blank followed the token.
    """

    after_label: list[list[float]]
    after_blank: list[list[float]]

    @classmethod
    def of(
        cls, automaton: NgramAutomaton, read: Read, labels: np.ndarray, numbers: np.ndarray, weight: float
    ) -> "Bounds":
        """Compute the bounds from the probabilities of pairs, from the last query to the first.

        Args:
            automaton: the automaton.
            read: the sample.
            labels: (U,), its distinct labels.
            numbers: (N, K), the place of each label of the sample among them.
            weight: the factor of the automaton's log-probabilities.
        """
        pairs = automaton.bounds(np.append(labels, automaton.start), np.append(labels, automaton.end))
        pairs[pairs > NEVER] *= weight
        emissions = pairs[:, numbers].transpose(1, 0, 2) + read.log_probs[:, None]  # (N, U + 1, K)
        after_label, after_blank = np.empty((2, len(numbers) + 1, len(labels) + 1))
        after_label[-1] = after_blank[-1] = np.where(
            np.append(labels, automaton.start) == automaton.end, 0.0, pairs[:, -1]
        )
        for query in range(len(numbers) - 1, -1, -1):
            here = numbers[query]
            ahead = after_label[query + 1, here]
            in_blank, in_label = after_blank[query], after_label[query]
            np.maximum.reduce(emissions[query] + ahead, axis=1, out=in_blank)
            np.maximum(in_blank, after_blank[query + 1] + read.blanks[query], out=in_blank)
            in_label[:] = in_blank
            in_label[here] = np.maximum(in_blank[here], ahead + read.log_probs[query])
        return cls(after_label.tolist(), after_blank.tolist())


class Node(NamedTuple):
    """The end of a path over the first queries.

    Attributes:
        queries: the number of queries read.
        score: the score of the path; of a complete one, with the end of the sentence.
        state: the automaton's state.
        last: the number of the last token among the sample's distinct labels.
        in_blank: whether a blank followed it.
        said: the number of tokens, without `</s>`.
        before: the node before the last query; None at the start.
        label: the label of the last query.
    """

    queries: int
    score: float
    state: int
    last: int
    in_blank: bool
    said: int
    before: "Node | None"
    label: int

    def path(self) -> list[int]:
        """Return the labels of the queries read."""
        labels, node = [], self
        while node.before is not None:
            labels.append(node.label)
            node = node.before
        return labels[::-1]


def best_path(
    automaton: NgramAutomaton, read: Read, *, blank: int, weight: float, lengths: tuple[int, int] | None = None
) -> Node | None:
    """Find the path with the highest score.

    The score is the log-probability of the path, plus `weight` times the automaton's of its output. The search is
    best-first (A*): it extends the path whose score and bound are highest, so the first complete path is the best.
    Where the queries prefer no labels, as in an untrained model, very many paths are equally good. The search then
    gives up after `PATHS_TRIED` of them.

    Source: Hart, Nilsson and Raphael, IEEE Transactions on Systems Science and Cybernetics 4, 1968.

    Args:
        automaton: the automaton.
        read: the sample.
        blank: the label of the blank.
        weight: the factor of the automaton's log-probabilities, at least 0.
        lengths: the least and the greatest number of tokens, without `</s>`; None for any.

    Returns:
        The end of the best path; None if the labels that are read spell no sentence of the automaton, or if the search
        gave up.
    """
    num_queries = len(read.blanks)
    least, most = lengths or (0, num_queries)
    is_read = read.log_probs > NEVER
    labels, numbers = np.unique(np.where(is_read, read.labels, automaton.end), return_inverse=True)
    numbers = numbers.reshape(read.labels.shape)
    bounds = Bounds.of(automaton, read, labels, numbers, weight)
    columns: tuple[Any, ...] = (numbers.tolist(), read.labels.tolist(), read.log_probs.tolist())
    options: list[list[tuple[int, int, float]]] = [
        [option for option in zip(*parts, strict=True) if option[2] > NEVER] for parts in zip(*columns, strict=True)
    ]
    blanks = read.blanks.tolist()
    step, end = automaton.step, automaton.end
    # Of paths with the same bound, the longest comes first; the third number makes every entry different.
    waiting = [(-bounds.after_blank[0][-1], 0, 0, Node(0, 0.0, 0, len(labels), True, 0, None, blank))]
    extended = set()
    pushed = 0
    while waiting and pushed < PATHS_TRIED:
        node = heapq.heappop(waiting)[3]
        queries, score, state, last, in_blank, said, _, _ = node
        if queries == num_queries:
            return node
        key = (queries, state, -1 if in_blank else last, said if lengths else 0)
        if key in extended:
            continue
        extended.add(key)
        after_label = bounds.after_label[queries + 1]
        after = [Node(queries + 1, score + blanks[queries], state, last, True, said, node, blank)]
        for number, label, log_prob in options[queries]:
            if number == last and not in_blank:
                after.append(Node(queries + 1, score + log_prob, state, last, False, said, node, label))
            elif after_label[number] > NEVER:
                found = step(state, label)
                more = said + (label != end)
                if found is not None and more <= most:
                    total = score + log_prob + weight * found[1]
                    after.append(Node(queries + 1, total, found[0], number, False, more, node, label))
        complete = queries + 1 == num_queries
        for one in after:
            if complete:
                ended = _ended(automaton, one, weight) if one.said >= least else None
                if ended is None:
                    continue
                bound, one = ended.score, ended
            else:
                ahead = bounds.after_blank if one.in_blank else bounds.after_label
                bound = one.score + ahead[queries + 1][one.last]
            if bound > NEVER:
                pushed += 1
                heapq.heappush(waiting, (-bound, -queries, pushed, one))
    return None


def _ended(automaton: NgramAutomaton, node: Node, weight: float) -> Node | None:
    """Return a node with the end of the sentence in its score; None if the sentence cannot end there."""
    if node.state == automaton.last_state:
        return node
    found = automaton.step(node.state, automaton.end)
    return None if found is None else node._replace(score=node.score + weight * found[1])


class NgramConstraint:
    """The sentences of an automaton of n-grams, whose log-probabilities are added to those of paths.

    The search is exact on the most probable labels of each query and the blank. If they spell no sentence of the
    automaton, or the search gives up, the most probable output of an allowed length stays, with a warning.

    Attributes:
        automaton: the automaton.
        weight: the factor of its log-probabilities.
        lengths: the allowed numbers of tokens.
        replaced: the number of outputs so far that are no sentence of the automaton.
    """

    def __init__(self, automaton: NgramAutomaton, weight: float, lengths: LengthRange) -> None:
        self.automaton = automaton
        self.weight = weight
        self.lengths = lengths
        self.replaced = 0

    def to(self, device: torch.device) -> "NgramConstraint":
        """Return the constraint itself; the search runs on the CPU."""
        return self

    def ending_in(self, label: int) -> "NgramConstraint":
        """Return the constraint whose lengths do not count a last `label`; see `LengthRange.ending_in`."""
        return NgramConstraint(self.automaton, self.weight, self.lengths.ending_in(label))

    def alphabet(self) -> None:
        """Return None: any label may be read."""
        return

    def accepts(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Accept no output (B,) without a search, because the automaton's weights may prefer another one."""
        return torch.zeros_like(lengths, dtype=torch.bool)

    def best_paths(self, log_probs: Tensor, *, blank: int) -> Paths:
        """Return each sample's path of the highest score; see `OutputConstraint.best_paths`."""
        top = log_probs.topk(min(LABELS_TRIED, log_probs.size(2)), dim=2)
        labels, read, blanks = to_host((top.indices, top.values, log_probs[:, :, blank]))
        read = read.masked_fill((labels == blank) | (read < read[:, :, :1] - REACH), NEVER)
        paths, missing = torch.full(blanks.shape, blank), list[int]()
        for row, parts in enumerate(zip(labels.numpy(), read.numpy(), blanks.numpy(), strict=True)):
            path = self._best_path(Read(*parts), blank)
            if path is None:
                missing.append(row)
            else:
                paths[row] = torch.tensor(path)
        if missing:
            self.replaced += len(missing)
            logger.warning(
                "%d of %d outputs: no sentence of the n-gram automaton was found among the most probable labels, of "
                "which %s paths are tried; the most probable output stays",
                len(missing),
                len(paths),
                f"{PATHS_TRIED:,}",
            )
            rows = torch.tensor(missing)
            others = self.lengths.best_paths(log_probs[rows.to(log_probs.device)], blank=blank)
            paths[rows] = others.labels
        return to_host(Paths.of(log_probs, paths.to(log_probs.device), blank=blank))

    def _best_path(self, read: Read, blank: int) -> list[int] | None:
        """Return the labels of a sample's best path; None if there is none."""
        allowed = (self.lengths.minimum, self.lengths.maximum)
        found = best_path(self.automaton, read, blank=blank, weight=self.weight)
        if found is not None and not allowed[0] <= found.said <= allowed[1]:
            # Only now, because it makes the search slower.
            found = best_path(self.automaton, read, blank=blank, weight=self.weight, lengths=allowed)
        return None if found is None else found.path()
