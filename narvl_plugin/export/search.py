"""The constrained search of a checkpoint in numpy, which an exported student takes along.

Legend: N queries, V labels, A arcs and S states of an automaton, M places of a trie.
"""

import heapq
from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from typing import Any, NamedTuple

import numpy as np

NEVER = -np.inf
LABELS_TRIED = 32
"""Of each query, the most probable labels, where no n-gram may come twice."""


class Search:
    """The constrained search of the checkpoint, for one picture, as with a beam of 1.

    Args:
        settings: `blank` and `eos`; `answers`, where they are a closed list; else of the outputs that there are either
            `automaton` and `pairs` of places whose tokens are in order, or `minimum` and `maximum` of their length;
            `no_repeat_ngram`; `odds`, the slope and offset of a confidence; `good_boxes`, where it is that of a box.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = settings
        self.blank, self.eos = settings["blank"], settings["eos"]
        self.answers: list[list[int]] = settings.get("answers", [])
        self.trie = Trie.of([*self.answers, *([*answer, self.eos] for answer in self.answers)])
        self.automaton = None
        if "automaton" in settings:
            self.automaton = Automaton(*map(np.array, settings["automaton"]))

    def __call__(self, log_probs: np.ndarray) -> tuple[list[int], list[int], float]:
        """Return what the log-probabilities (N, V) say: tokens, the query of each, and the confidence.

        Raises ValueError where nothing that may be said has a probability.
        """
        if self.answers:
            scores = np.logaddexp(*self.trie.score(log_probs, self.blank).reshape(2, -1))
            score = scores.max() - np.logaddexp.reduce(scores)
            path = self._path_to(log_probs, self.answers[scores.argmax()])
        else:
            path = self._best_path(log_probs)
            score = Trie.of([collapse(path, self.blank)[0]]).score(log_probs, self.blank)[0]
        if not score > NEVER:
            raise no_path(log_probs)
        tokens, queries = collapse(path, self.blank)
        length = tokens.index(self.eos) if self.eos in tokens else len(tokens)
        confidence = float(np.exp(score))
        if "good_boxes" in self.settings:
            confidence = self._share_of_good_boxes(log_probs, tokens[:length])
        return tokens[:length], queries[:length], change_odds(confidence, *self.settings["odds"])

    def _best_path(self, log_probs: np.ndarray) -> np.ndarray:
        """Return the path (N,) to the output; without n-grams that come twice where that is asked for and possible."""
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
        """Tell whether an output is one of those that there are."""
        if self.automaton is None:
            words = tokens[:-1] if tokens[-1:] == [self.eos] else tokens
            return self.eos not in words and self.settings["minimum"] <= len(words) <= self.settings["maximum"]
        in_order = not out_of_order(tokens, self.settings["pairs"])
        return in_order and self.automaton.accepts(tokens)

    def _of_lengths(self, log_probs: np.ndarray) -> "Automaton":
        """Return the automaton of the outputs of some lengths, and of each with `</s>` after it, of the best labels.

        Of any run of neighbouring queries these are the three most probable ones: one is none of its two neighbours.
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
        """Return the output that a prefix beam search of width 1 ends with, which has no n-gram twice."""
        labels = np.arange(log_probs.shape[1])
        if self.automaton is not None:
            labels = np.append(np.unique(self.automaton.labels), self.blank)
        size, tokens = self.settings["no_repeat_ngram"], list[int]()
        in_blank, in_label = 0.0, NEVER
        for row in log_probs:
            tried = labels[np.argpartition(-row[labels], min(LABELS_TRIED, len(labels)) - 1)[:LABELS_TRIED]]
            last = tokens[-1] if tokens else self.blank
            said = np.logaddexp(in_blank, in_label)
            # A token right after itself is read as one, so that only what ends in a blank can repeat it.
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
        """Return how many of the outputs that are drawn from the queries overlap well with a box, 0 to 1."""
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
    """The beginnings of outputs, each once, as places; the first is the empty one.

    parents: (M,) the place that is a token shorter; labels: (M,) the token that was added; ends: the place of each
    whole output. Of the first place parent and label are anything.
    """

    parents: np.ndarray
    labels: np.ndarray
    ends: list[int]

    @classmethod
    def of(cls, outputs: Iterable[Sequence[int]]) -> "Trie":
        """Sort out the beginnings of outputs."""
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
        """Return the log-probability of each output, summed over all paths to it, -inf where there is none: (N, V)."""
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
    """The regular language of a finite automaton that reads tokens; it starts in state 0.

    sources, labels, targets: (A,), of each arc the state it leaves, the token it reads, the state it enters;
    accepting: (S,) bool, the states in which an output may end.
    """

    sources: np.ndarray
    labels: np.ndarray
    targets: np.ndarray
    accepting: np.ndarray

    def accepts(self, tokens: Iterable[int]) -> bool:
        """Tell whether an output is in the language."""
        reached = np.arange(len(self.accepting)) == 0
        for token in tokens:
            arcs = reached[self.sources] & (self.labels == token)
            reached = np.isin(np.arange(len(reached)), self.targets[arcs])
        return bool((reached & self.accepting).any())

    def keep(self, arcs: np.ndarray) -> "Automaton":
        """Return the automaton with some of its arcs, (A,) bool."""
        return Automaton(self.sources[arcs], self.labels[arcs], self.targets[arcs], self.accepting)

    def best_path(self, log_probs: np.ndarray, blank: int) -> tuple[np.ndarray, float]:
        """Return the most probable path (N,) into the language, and its log-probability, -inf if there is none.

        By dynamic programming over (query, last arc, whether blanks followed it).
        """
        sources, labels, targets, accepting = self
        arcs, states = np.arange(len(labels)), np.arange(len(accepting))
        # What has been said so far ends in an arc's label, or in a blank, or is nothing.
        in_label = np.full(len(arcs), NEVER)
        in_blank = np.where(states == 0, 0.0, NEVER)
        moves = []  # (A + S,) each: where the best path to each of both came from; states count from A
        for row in log_probs:
            scores, first = best_by_state(in_label, targets, len(states))
            said_first = labels[first]
            others, second = best_by_state(
                np.where(said_first[targets] == labels, NEVER, in_label), targets, len(states)
            )
            # A label right after itself would merge with it.
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
    """Return the largest score (S,) of the arcs into each state, and such an arc (any where there is none)."""
    best, arcs = np.full(num_states, NEVER), np.zeros(num_states, dtype=np.int64)
    np.maximum.at(best, targets, scores)
    winners = np.flatnonzero(scores == best[targets])
    arcs[targets[winners]] = winners
    return best, arcs


def best_in_order(
    log_probs: np.ndarray, automaton: Automaton, pairs: Sequence[Sequence[int]], blank: int
) -> np.ndarray:
    """Return the most probable path (N,) to an output whose tokens are in order at pairs of places.

    The best path out of order is excluded by halves: with m between two tokens, either the first is at most m, or both
    are above. Of all parts the one with the best path is searched next. Raises ValueError if there is no path.
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
    """Return the pairs of places at which the first token is above the second; a place that is not there is not."""
    return [pair for pair in pairs if max(pair) < len(tokens) and tokens[pair[0]] > tokens[pair[1]]]


def collapse(path: np.ndarray, blank: int) -> tuple[list[int], list[int]]:
    """Return the tokens of a path (N,), runs merged and blanks dropped, and the query of each."""
    said = (path != blank) & (path != np.append(blank, path[:-1]))
    return path[said].tolist(), np.flatnonzero(said).tolist()


def overlap(box: np.ndarray, other: np.ndarray) -> float:
    """Return the area of the intersection of two boxes over that of the union, 0 to 1; edges (4,)."""
    common = (np.minimum(box[2:], other[2:]) - np.maximum(box[:2], other[:2])).clip(min=0).prod()
    union = sum((edges[2:] - edges[:2]).clip(min=0).prod() for edges in (box, other)) - common
    return float(common / union) if union > 0 else 0.0


def change_odds(confidence: float, slope: float, offset: float) -> float:
    """Return a confidence whose log-odds are multiplied by a slope and moved by an offset."""
    sure = min(max(confidence, 0.0), 1.0)
    if (slope, offset) == (1.0, 0.0):
        return sure
    with np.errstate(divide="ignore", over="ignore"):
        return float(1 / (1 + np.exp(-(slope * (np.log(sure) - np.log1p(-sure)) + offset))))


def no_path(log_probs: np.ndarray) -> ValueError:
    """Return the error that says that no output has a probability."""
    return ValueError(f"{len(log_probs)} queries give no output that may be said a probability")
