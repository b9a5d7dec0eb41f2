"""The constrained search of a checkpoint in numpy; the export includes this file.

Legend: N queries, V labels, A arcs and S states of an automaton, M nodes of a trie.
"""

import heapq
from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from typing import Any, NamedTuple

import numpy as np

NEVER = -np.inf
LISTED = 5
"""Number of answers of a closed list that are returned."""
LABELS_TRIED = 32
"""Number of most probable labels of each query that are tried if no n-gram may repeat."""


class Found(NamedTuple):
    """The output of a search.

    Attributes:
        tokens: the tokens, without `</s>`.
        queries: the query of each token.
        confidence: the probability of a correct output.
        path: (N,), the label of each query on the most probable path to the output.
        ranked: of a closed list of answers, the best ones with their confidence, best first; else empty.
    """

    tokens: list[int]
    queries: list[int]
    confidence: float
    path: np.ndarray
    ranked: list[tuple[list[int], float]]


class Search:
    """The constrained search of the checkpoint for one image, as with a beam of 1.

    The settings are:

    - `blank` and `eos`;
    - `answers`, for a closed list of answers;
    - else `automaton` and `pairs` of positions whose tokens are in order, or the `minimum` and `maximum` length;
    - `no_repeat_ngram`;
    - `odds`, the slope and offset of a confidence;
    - `good_boxes`, if the confidence is that of a box.

    Args:
        settings: the settings by name.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = settings
        self.blank, self.eos = settings["blank"], settings["eos"]
        self.answers: list[list[int]] = settings.get("answers", [])
        self.trie = Trie.of([*self.answers, *([*answer, self.eos] for answer in self.answers)])
        self.automaton = None
        if "automaton" in settings:
            self.automaton = Automaton(*map(np.array, settings["automaton"]))

    def __call__(self, log_probs: np.ndarray) -> Found:
        """Return the output of the search.

        Args:
            log_probs: (N, V).

        Raises:
            ValueError: if no valid output has a probability.
        """
        ranked = []
        if self.answers:
            scores = np.logaddexp(*self.trie.score(log_probs, self.blank).reshape(2, -1))
            shares = scores - np.logaddexp.reduce(scores)
            best = np.argsort(-scores, kind="stable")[:LISTED]
            path, score = self._path_to(log_probs, self.answers[best[0]]), shares[best[0]]
            ranked = [(self.answers[place], self._sure(shares[place])) for place in best if scores[place] > NEVER]
        else:
            path = self._best_path(log_probs)
            score = Trie.of([collapse(path, self.blank)[0]]).score(log_probs, self.blank)[0]
        if not score > NEVER:
            raise no_path(log_probs)
        tokens, queries = collapse(path, self.blank)
        length = tokens.index(self.eos) if self.eos in tokens else len(tokens)
        tokens, queries = tokens[:length], queries[:length]
        if "good_boxes" in self.settings:
            share = self._share_of_good_boxes(log_probs, tokens)
            return Found(tokens, queries, change_odds(share, *self.settings["odds"]), path, ranked)
        return Found(tokens, queries, self._sure(score), path, ranked)

    def _sure(self, score: float) -> float:
        """Return the confidence that belongs to a log-probability."""
        return change_odds(float(np.exp(score)), *self.settings["odds"])

    def _best_path(self, log_probs: np.ndarray) -> np.ndarray:
        """Return the path (N,) to the output, without repeated n-grams if that is requested and possible."""
        if self.settings["no_repeat_ngram"]:
            tokens = self._follow_one(log_probs)
            if self._accepts(tokens):
                return self._path_to(log_probs, tokens)
        path = log_probs.argmax(1)
        if self._accepts(collapse(path, self.blank)[0]):
            return path
        if self.automaton is None:
            return self._of_lengths(log_probs).best_path(log_probs, self.blank)[0]
        return best_in_order(log_probs, self.automaton, self.settings["pairs"], self.blank)

    def _accepts(self, tokens: list[int]) -> bool:
        """Tell whether an output is valid."""
        if self.automaton is None:
            words = tokens[:-1] if tokens[-1:] == [self.eos] else tokens
            return self.eos not in words and self.settings["minimum"] <= len(words) <= self.settings["maximum"]
        in_order = not out_of_order(tokens, self.settings["pairs"])
        return in_order and self.automaton.accepts(tokens)

    def _of_lengths(self, log_probs: np.ndarray) -> "Automaton":
        """Return the automaton of the outputs of valid lengths, each optionally followed by `</s>`.

        It reads the three most probable labels of every run of neighbouring queries. At most two of them equal the
        labels of the run's neighbours, so a best path remains.
        """
        single = log_probs.copy()
        single[:, [self.blank, self.eos]] = NEVER
        sums, best = single, []
        for longer in range(len(single)):
            sums = sums[:-1] + single[longer:] if longer else single
            best.append(np.argpartition(sums, -3)[:, -3:].ravel())
        found = np.setdiff1d(np.concatenate(best), [self.blank, self.eos])
        places = np.arange(min(self.settings["maximum"], len(single)) + 1)
        accepting = places >= self.settings["minimum"]
        sources = np.concatenate([np.repeat(places[:-1], len(found)), places[accepting]])
        labels = np.concatenate([np.tile(found, len(places) - 1), np.full(accepting.sum(), self.eos)])
        targets = np.where(labels == self.eos, len(places), sources + 1)
        return Automaton(sources, labels, targets, np.append(accepting, True))

    def _path_to(self, log_probs: np.ndarray, tokens: list[int]) -> np.ndarray:
        """Return the most probable path (N,) to an output."""
        if not tokens:
            return np.full(len(log_probs), self.blank)
        places = np.arange(len(tokens) + 1)
        chain = Automaton(places[:-1], np.array(tokens), places[1:], places == len(tokens))
        return chain.best_path(log_probs, self.blank)[0]

    def _follow_one(self, log_probs: np.ndarray) -> list[int]:
        """Return the output of a prefix beam search of width 1 that repeats no n-gram."""
        labels = np.arange(log_probs.shape[1])
        if self.automaton is not None:
            labels = np.append(np.unique(self.automaton.labels), self.blank)
        size, tokens = self.settings["no_repeat_ngram"], list[int]()
        in_blank, in_label = 0.0, NEVER
        for row in log_probs:
            tried = labels[np.argpartition(-row[labels], min(LABELS_TRIED, len(labels)) - 1)[:LABELS_TRIED]]
            last = tokens[-1] if tokens else self.blank
            said = np.logaddexp(in_blank, in_label)
            # Equal neighbouring labels merge, so only a path that ends in a blank can repeat its last token.
            longer = row[tried] + np.where(tried == last, in_blank, said)
            context = tokens[len(tokens) - size + 1 :]
            starts = range(len(tokens) - size + 1)
            twice = [tokens[at + size - 1] for at in starts if tokens[at : at + size - 1] == context]
            longer[np.isin(tried, [self.blank, *twice])] = NEVER
            stay = said + row[self.blank], in_label + row[last]
            if longer.max() > np.logaddexp(*stay):
                tokens.append(int(tried[longer.argmax()]))
                in_blank, in_label = NEVER, longer.max()
            else:
                in_blank, in_label = stay
        return tokens

    def _share_of_good_boxes(self, log_probs: np.ndarray, box: list[int]) -> float:
        """Return the share of outputs drawn from the queries that overlap enough with a box, 0 to 1."""
        good = self.settings["good_boxes"]
        bins = range(good["first"], good["first"] + good["num_bins"])
        points = (np.array(good["points"], dtype=np.float32) + 0.5) / len(good["points"])
        reached = np.exp(log_probs).cumsum(1, dtype=np.float64).astype(np.float32)
        labels = [np.searchsorted(row, column) for row, column in zip(reached, points.T, strict=True)]
        hits = 0
        for path in np.stack(labels, 1).clip(max=log_probs.shape[1] - 1):
            tokens, _ = collapse(path, self.blank)
            drawn = tokens[: [*tokens, self.eos].index(self.eos)]
            if len(drawn) == 4 and all(token in bins for token in drawn):
                hits += overlap(np.array(drawn), np.array(box)) >= good["iou"]
        return hits / len(points)


class Trie(NamedTuple):
    """The prefixes of outputs, each as one node; node 0 is the empty prefix.

    Attributes:
        parents: (M,), the node of the prefix without its last token; any for node 0.
        labels: (M,), the last token of the prefix; any for node 0.
        ends: the node of each complete output.
    """

    parents: np.ndarray
    labels: np.ndarray
    ends: list[int]

    @classmethod
    def of(cls, outputs: Iterable[Sequence[int]]) -> "Trie":
        """Build the trie of outputs."""
        places: dict[tuple[int, int], int] = {}
        ends = []
        for output in outputs:
            place = 0
            for token in output:
                place = places.setdefault((place, token), len(places) + 1)
            ends.append(place)
        parents, labels = np.array([(0, -1), *places]).T
        return cls(parents, labels, ends)

    def score(self, log_probs: np.ndarray, blank: int) -> np.ndarray:
        """Return the log-probability of each output, summed over its paths; -inf without a path: (N, V)."""
        parents, labels, ends = self
        repeats = labels == labels[parents]
        in_label = np.full(len(parents), NEVER)
        in_blank = in_label.copy()
        in_blank[0] = 0.0
        for row in log_probs:
            said = np.logaddexp(in_blank, in_label)
            arrived = np.where(repeats, in_blank[parents], said[parents])
            arrived[0] = NEVER
            in_label = np.logaddexp(in_label, arrived) + row[labels]
            in_blank = said + row[blank]
        return np.logaddexp(in_blank, in_label)[ends]


class Automaton(NamedTuple):
    """The regular language of a finite automaton that reads tokens and starts in state 0.

    Attributes:
        sources: (A,), the state that each arc leaves.
        labels: (A,), the token that each arc reads.
        targets: (A,), the state that each arc enters.
        accepting: (S,) bool, whether an output may end in the state.
    """

    sources: np.ndarray
    labels: np.ndarray
    targets: np.ndarray
    accepting: np.ndarray

    def accepts(self, tokens: Iterable[int]) -> bool:
        """Tell whether an output is valid."""
        reached = np.arange(len(self.accepting)) == 0
        for token in tokens:
            arcs = reached[self.sources] & (self.labels == token)
            reached = np.isin(np.arange(len(reached)), self.targets[arcs])
        return bool((reached & self.accepting).any())

    def keep(self, arcs: np.ndarray) -> "Automaton":
        """Return the automaton with the marked arcs, (A,) bool, alone."""
        return Automaton(self.sources[arcs], self.labels[arcs], self.targets[arcs], self.accepting)

    def best_path(self, log_probs: np.ndarray, blank: int) -> tuple[np.ndarray, float]:
        """Return the most probable path to a valid output.

        Dynamic programming runs over (query, last arc, whether blanks followed it).

        Args:
            log_probs: (N, V).
            blank: the label of the blank.

        Returns:
            The path, (N,), and its log-probability; -inf without a path.
        """
        sources, labels, targets, accepting = self
        arcs, states = np.arange(len(labels)), np.arange(len(accepting))
        # A path so far ends in an arc's label, or it ends in a blank or is empty.
        in_label = np.full(len(arcs), NEVER)
        in_blank = np.where(states == 0, 0.0, NEVER)
        moves = []  # (A + S,) each: the predecessor on the best path to each arc and state; states count from A
        for row in log_probs:
            scores, first = best_by_state(in_label, targets, len(states))
            said_first = labels[first]
            others, second = best_by_state(
                np.where(said_first[targets] == labels, NEVER, in_label), targets, len(states)
            )
            # Equal labels at neighbouring queries would merge.
            merges = said_first[sources] == labels
            after_label = np.where(merges, others[sources], scores[sources])
            ways = np.stack([in_label, in_blank[sources], after_label])
            origins = np.stack([arcs, len(arcs) + sources, np.where(merges, second[sources], first[sources])])
            came_from = origins[ways.argmax(0), arcs]
            moves.append(np.append(came_from, np.where(scores > in_blank, first, len(arcs) + states)))
            in_blank = np.maximum(in_blank, scores) + row[blank]
            in_label = ways.max(0) + row[labels]
        ends = np.append(accepting[targets], accepting)
        scores = np.where(ends, np.append(in_label, in_blank), NEVER)
        place, said = scores.argmax(), np.append(labels, np.full(len(states), blank))
        path = []
        for move in reversed(moves):
            path.append(said[place])
            place = move[place]
        return np.array(path[::-1]), float(scores.max())


def best_by_state(scores: np.ndarray, targets: np.ndarray, num_states: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the largest score (S,) of the arcs into each state, and such an arc (any for a state without arcs)."""
    best, arcs = np.full(num_states, NEVER), np.zeros(num_states, dtype=np.int64)
    np.maximum.at(best, targets, scores)
    winners = np.flatnonzero(scores == best[targets])
    arcs[targets[winners]] = winners
    return best, arcs


def best_in_order(
    log_probs: np.ndarray, automaton: Automaton, pairs: Sequence[Sequence[int]], blank: int
) -> np.ndarray:
    """Return the most probable path to an output with ordered tokens, by branch and bound.

    Let m lie between two tokens in the wrong order. In every valid output, either the first token is at most m, or both
    tokens exceed m. The part with the best path is searched next.

    Args:
        log_probs: (N, V).
        automaton: the automaton of the outputs.
        pairs: pairs of positions; the first token must not exceed the second.
        blank: the label of the blank.

    Returns:
        The path, (N,).

    Raises:
        ValueError: if no path exists.
    """
    parts: list[tuple[float, int, np.ndarray, Automaton]] = []
    number = count()

    def add(part: Automaton) -> None:
        path, score = part.best_path(log_probs, blank)
        if score > NEVER:
            heapq.heappush(parts, (-score, next(number), path, part))

    add(automaton)
    while parts:
        *_, path, part = heapq.heappop(parts)
        tokens, _ = collapse(path, blank)
        wrong = out_of_order(tokens, pairs)
        if not wrong:
            return path
        first, second = wrong[0]
        at_first, low = part.sources == first, part.labels <= (tokens[first] + tokens[second]) // 2
        add(part.keep(low | ~at_first))
        add(part.keep(~low | ~(at_first | (part.sources == second))))
    raise no_path(log_probs)


def out_of_order(tokens: Sequence[int], pairs: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """Return the pairs of positions whose first token exceeds the second; pairs beyond the last token are in order."""
    return [pair for pair in pairs if max(pair) < len(tokens) and tokens[pair[0]] > tokens[pair[1]]]


def collapse(path: np.ndarray, blank: int) -> tuple[list[int], list[int]]:
    """Return the tokens of a path (N,), with runs merged and blanks removed, and the query of each."""
    said = (path != blank) & (path != np.append(blank, path[:-1]))
    return path[said].tolist(), np.flatnonzero(said).tolist()


def overlap(box: np.ndarray, other: np.ndarray) -> float:
    """Return the intersection over union of two boxes, 0 to 1; edges (4,)."""
    common = (np.minimum(box[2:], other[2:]) - np.maximum(box[:2], other[:2])).clip(min=0).prod()
    union = sum((edges[2:] - edges[:2]).clip(min=0).prod() for edges in (box, other)) - common
    return float(common / union) if union > 0 else 0.0


def change_odds(confidence: float, slope: float, offset: float) -> float:
    """Return a confidence whose log-odds are multiplied by a slope and shifted by an offset."""
    sure = min(max(confidence, 0.0), 1.0)
    if (slope, offset) == (1.0, 0.0):
        return sure
    with np.errstate(divide="ignore", over="ignore"):
        return float(1 / (1 + np.exp(-(slope * (np.log(sure) - np.log1p(-sure)) + offset))))


def no_path(log_probs: np.ndarray) -> ValueError:
    """Return the error for queries without a valid output."""
    return ValueError(f"{len(log_probs)} queries have no path with a probability to any valid output")
