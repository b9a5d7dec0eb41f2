"""The automaton of n-grams: its probabilities, and its search against all paths."""

import itertools
import math
import time

import numpy as np
import pytest
import torch

from narvl_plugin.ctc import Greedy, Hypothesis, LengthRange, NgramConstraint, constrain, count_ngrams
from narvl_plugin.ctc.ngrams import NgramAutomaton, Read, best_path

EOS, BLANK = 0, 6
SENTENCES = [[1, 2, 3], [1, 2, 4], [1, 4, 4, 2], [3, 2, 3], [3, 1], [5, 2, 3, 1]]


def collapsed(path: tuple[int, ...]) -> list[int]:
    """Return the tokens of a path."""
    return [label for label, _ in itertools.groupby(path) if label != BLANK]


def enumerated(
    automaton: NgramAutomaton, log_probs: np.ndarray, weight: float, lengths: tuple[int, int], labels: np.ndarray
) -> float:
    """Return the highest score of all paths, of each query's labels (N, K) and the blank."""
    best = -math.inf
    for path in itertools.product(*([*row, BLANK] for row in labels.tolist())):
        tokens = collapsed(path)
        spoken = tokens[:-1] if tokens[-1:] == [EOS] else tokens
        if EOS in spoken or not lengths[0] <= len(spoken) <= lengths[1]:
            continue
        chance = automaton.log_prob(spoken)
        if chance > -math.inf:
            best = max(best, weight * chance + sum(log_probs[query, label] for query, label in enumerate(path)))
    return best


def reading(log_probs: np.ndarray, tried: int) -> Read:
    """Return the `tried` most probable labels of each query, without the blank."""
    others = np.delete(log_probs, BLANK, axis=1)
    labels = np.argsort(-others, axis=1)[:, :tried]
    return Read(labels, np.take_along_axis(log_probs, labels, 1), log_probs[:, BLANK])


@pytest.mark.parametrize("order, hard", [(2, 2), (3, 2), (4, 2), (4, 3), (4, 4)])
def test_what_may_follow_sums_to_one(order: int, hard: int) -> None:
    automaton = count_ngrams(SENTENCES, order=order, hard=hard, end=EOS)
    for state in range(automaton.last_state):
        steps = [automaton.step(state, token) for token in range(BLANK)]
        assert sum(math.exp(step[1]) for step in steps if step) == pytest.approx(1, abs=1e-6)


def test_probabilities_by_hand() -> None:
    automaton = count_ngrams([[1, 2], [1, 2], [1, 3], [4, 2]], order=3, end=EOS)
    # After <s>: 1 in three of four sentences. After <s> 1: 2, 2, 3; two kinds, so that 2 of 5 goes to the shorter
    # context 1, where 2 has 2 of 3. After 1 2 only the end follows, one kind, and always after 2.
    assert math.exp(automaton.log_prob([1, 2])) == pytest.approx(3 / 4 * (2 + 2 * 2 / 3) / 5 * 1, rel=1e-6)
    assert automaton.log_prob([4, 3]) == -math.inf  # 4 3 was never seen
    assert math.exp(automaton.log_prob([4, 2])) == pytest.approx(1 / 4, rel=1e-6)


@pytest.mark.parametrize("hard", [2, 3, 4])
def test_known_runs_alone_are_possible(hard: int) -> None:
    automaton = count_ngrams(SENTENCES, order=4, hard=hard, end=EOS)

    def runs(tokens: tuple[int, ...]) -> set[tuple[int, ...]]:
        whole = ("start", *tokens, EOS)
        size = min(hard, len(whole))
        return {whole[place : place + size] for place in range(len(whole) - size + 1)}

    known = set().union(*(runs(tuple(sentence)) for sentence in SENTENCES))
    for length in range(5):
        for tokens in itertools.product(range(1, BLANK), repeat=length):
            # A sentence shorter than a run is a run of its own: it was seen as a beginning, and may end.
            if length + 2 >= hard:
                assert (automaton.log_prob(tokens) > -math.inf) == (runs(tokens) <= known), tokens


@pytest.mark.parametrize("order, hard, weight", [(2, 2, 0.0), (3, 2, 0.7), (4, 2, 1.0), (4, 4, 0.0), (4, 3, 2.5)])
@pytest.mark.parametrize("lengths", [None, (2, 3)])
def test_the_search_finds_the_best_of_all_paths(
    order: int, hard: int, weight: float, lengths: tuple[int, int] | None
) -> None:
    automaton = count_ngrams(SENTENCES, order=order, hard=hard, end=EOS)
    generator = np.random.default_rng(order)
    found_none = 0
    for sharpness in (0.3, 2.0, 6.0) * 4:
        logits = sharpness * generator.standard_normal((5, BLANK + 1))
        log_probs = logits - np.logaddexp.reduce(logits, 1, keepdims=True)
        read = reading(log_probs, 3)
        best = enumerated(automaton, log_probs, weight, lengths or (0, 9), read.labels)
        found = best_path(automaton, read, blank=BLANK, weight=weight, lengths=lengths)
        if found is None:
            assert best == -math.inf
            found_none += 1
            continue
        assert found.score == pytest.approx(best, abs=1e-9)
        path = found.path()
        tokens = collapsed(tuple(path))
        own = sum(log_probs[query, label] for query, label in enumerate(path))
        spoken = tokens[:-1] if tokens[-1:] == [EOS] else tokens
        assert found.said == len(spoken)
        assert own + weight * automaton.log_prob(spoken) == pytest.approx(best, abs=1e-9)
    assert found_none < 12


def peaked(*labels: int, second: dict[int, int] | None = None) -> torch.Tensor:
    """Return log-probabilities (1, N, V) with the greatest at these labels, and the next at those of `second`."""
    logits = torch.zeros(1, len(labels), BLANK + 1)
    logits[0, range(len(labels)), labels] = 4.0
    for query, label in (second or {}).items():
        logits[0, query, label] = 3.0
    return logits.log_softmax(2)


def searched(log_probs: torch.Tensor, constraint: NgramConstraint) -> list[int]:
    """Return the tokens of a constrained search."""
    return hypotheses(log_probs, constraint)[0].tokens.tolist()


def hypotheses(log_probs: torch.Tensor, constraint: NgramConstraint) -> list[Hypothesis]:
    """Return the results of a constrained search that first takes the greedy path."""
    greedy = Greedy.of(log_probs, constraint, blank=BLANK)
    return constrain(greedy, log_probs, constraint, blank=BLANK).hypotheses(blank=BLANK)


class TestConstraint:
    automaton = count_ngrams([[1, 2, 3], [4, 2, 5]], order=3, end=EOS)

    def test_it_takes_a_known_pair_in_place_of_an_unknown_one(self) -> None:
        log_probs = peaked(1, BLANK, 3, BLANK, 3, second={2: 2})
        assert searched(log_probs, NgramConstraint(self.automaton, 0.2, LengthRange(1, 5))) == [1, 2, 3]

    def test_the_weights_decide_between_known_pairs(self) -> None:
        log_probs = peaked(1, BLANK, 2, BLANK, 5, second={4: 3})
        assert searched(log_probs, NgramConstraint(self.automaton, 0.0, LengthRange(1, 5))) == [1, 2, 5]
        assert searched(log_probs, NgramConstraint(self.automaton, 1.0, LengthRange(1, 5))) == [1, 2, 3]

    def test_a_predicted_end_is_the_end(self) -> None:
        log_probs = peaked(1, 2, 3, EOS, BLANK)
        constraint = NgramConstraint(self.automaton, 0.2, LengthRange(1, 3)).ending_in(EOS)
        assert searched(log_probs, constraint) == [1, 2, 3, EOS]

    def test_lengths_hold(self) -> None:
        automaton = count_ngrams([[1], [1, 2, 3]], order=2, end=EOS)
        assert searched(peaked(1, BLANK, BLANK), NgramConstraint(automaton, 0.2, LengthRange(1, 3))) == [1]
        assert searched(peaked(1, BLANK, BLANK), NgramConstraint(automaton, 0.2, LengthRange(2, 3))) == [1, 2, 3]

    def test_without_a_sentence_the_most_probable_output_stays(self, caplog: pytest.LogCaptureFixture) -> None:
        constraint = NgramConstraint(count_ngrams([[1, 2]], order=2, end=EOS), 0.2, LengthRange(1, 5))
        log_probs = torch.cat([peaked(3, BLANK), peaked(1, 2)])
        log_probs[0, :, 2] = -math.inf
        found = hypotheses(log_probs, constraint)
        assert [one.tokens.tolist() for one in found] == [[3], [1, 2]]
        assert constraint.replaced == 1
        assert "1 of 2 outputs" in caplog.text

    def test_labels_without_a_probability_are_never_read(self) -> None:
        log_probs = peaked(1, 2, 3)
        log_probs[0, 1, 2] = -math.inf
        constraint = NgramConstraint(self.automaton, 0.2, LengthRange(1, 3))
        assert searched(log_probs, constraint) == [1, 3]
        assert constraint.replaced == 1


def test_wrong_orders_and_no_sentence() -> None:
    for order, hard in ((1, 1), (3, 4), (9, 2)):
        with pytest.raises(ValueError, match="expected 2 <= hard <= order"):
            count_ngrams(SENTENCES, order=order, hard=hard, end=EOS)
    with pytest.raises(ValueError, match="no sentence"):
        count_ngrams([], order=2, end=EOS)


def test_a_search_gives_up_where_very_many_paths_are_alike(caplog: pytest.LogCaptureFixture) -> None:
    generator = np.random.default_rng(0)
    sentences = generator.integers(1, 300, (2000, 10)).tolist()
    automaton = count_ngrams(sentences, order=3, end=EOS)
    log_probs = torch.tensor(generator.standard_normal((2, 100, 301))).float().log_softmax(2)
    constraint = NgramConstraint(automaton, 1.0, LengthRange(12, 16))
    start = time.process_time()
    found = constraint.best_paths(log_probs, blank=300)
    assert time.process_time() - start < 20, "without the limit it takes minutes"
    assert constraint.replaced == 2
    assert "2 of 2 outputs: no sentence of the n-gram automaton was found" in caplog.text
    assert torch.equal(found.labels, LengthRange(12, 16).best_paths(log_probs, blank=300).labels)
