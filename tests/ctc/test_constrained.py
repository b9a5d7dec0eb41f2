"""Constrained search: against all paths of tiny lattices, and what it can never say."""

import itertools
from collections.abc import Callable

import pytest
import torch

from narvl_plugin.ctc import Automaton, constrained_search, greedy, one_of, sequence_of

BLANK = 3
LABELS = 4


def random_automaton(generator: torch.Generator) -> Automaton:
    """Return up to eight arcs between four states; several may read one label, and be ambiguous."""
    arcs = int(torch.randint(1, 9, (), generator=generator))
    ends = torch.randint(0, 4, (2, arcs), generator=generator)
    accepting = torch.randint(0, 2, (4,), generator=generator).bool()
    accepting[0] = True  # the empty output, so that there is some path
    return Automaton(ends[0], torch.randint(0, 3, (arcs,), generator=generator), ends[1], accepting)


def accepts(automaton: Automaton, tokens: tuple[int, ...]) -> bool:
    """Read the tokens in all ways."""
    states = {0}
    arcs = list(zip(*(part.tolist() for part in automaton[:3]), strict=True))
    for token in tokens:
        states = {target for source, label, target in arcs if source in states and label == token}
    return any(bool(automaton.accepting[state]) for state in states)


@pytest.mark.parametrize("seed", range(40))
def test_equals_the_best_of_all_paths(seed: int, collapse_path: Callable[..., tuple[int, ...]]) -> None:
    generator = torch.Generator().manual_seed(seed)
    automaton = random_automaton(generator)
    log_probs = (3 * torch.randn(3, 5, LABELS, generator=generator)).log_softmax(2)
    found = constrained_search(log_probs, automaton, blank=BLANK)
    paths = [
        path for path in itertools.product(range(LABELS), repeat=5) if accepts(automaton, collapse_path(path, BLANK))
    ]
    for sample, hypothesis in enumerate(found):
        scores = {path: float(log_probs[sample, range(5), path].sum()) for path in paths}
        best = max(scores, key=scores.__getitem__)
        assert tuple(hypothesis.tokens.tolist()) == collapse_path(best, BLANK)
        outputs = [score for path, score in scores.items() if collapse_path(path, BLANK) == collapse_path(best, BLANK)]
        assert float(hypothesis.score) == pytest.approx(float(torch.tensor(outputs).logsumexp(0)), abs=1e-5)


def test_a_language_of_everything_gives_the_greedy_path() -> None:
    log_probs = torch.randn(8, 6, LABELS, generator=torch.Generator().manual_seed(1)).log_softmax(2)
    everything = Automaton(
        torch.zeros(3, dtype=torch.int64),
        torch.arange(3),
        torch.zeros(3, dtype=torch.int64),
        torch.ones(1, dtype=torch.bool),
    )
    for found, expected in zip(
        constrained_search(log_probs, everything, blank=BLANK), greedy(log_probs, blank=BLANK), strict=True
    ):
        for name in ("tokens", "positional_scores", "alignment"):
            torch.testing.assert_close(getattr(found, name), getattr(expected, name))
        assert float(found.score) >= float(expected.score)  # all paths to what the best one says


def test_outputs_have_the_length_and_the_tokens_asked_for() -> None:
    log_probs = torch.randn(50, 7, 20, generator=torch.Generator().manual_seed(2)).log_softmax(2)
    allowed = [torch.arange(first, 10) for first in (0, 3, 5, 5)]
    for hypothesis in constrained_search(log_probs, sequence_of(allowed), blank=19):
        assert all(token in labels for token, labels in zip(hypothesis.tokens, allowed, strict=True))


def test_the_answer_is_one_of_the_list() -> None:
    log_probs = torch.randn(50, 6, LABELS, generator=torch.Generator().manual_seed(3)).log_softmax(2)
    answers = [(0, 1), (0, 1, 2), (2,), (1, 1, 0)]
    found = [tuple(one.tokens.tolist()) for one in constrained_search(log_probs, one_of(answers), blank=BLANK)]
    assert set(found) == set(answers)


def test_an_output_may_have_an_end() -> None:
    log_probs = torch.full((2, 3, LABELS), -9.0)
    log_probs[:, 0, 0] = log_probs[0, 1, 2] = log_probs[1, 1, 1] = log_probs[:, 2, 2] = 0.0
    found = constrained_search(log_probs, one_of([(0,), (0, 1)]).ending_in(2), blank=BLANK)
    assert [one.tokens.tolist() for one in found] == [[0, 2], [0, 1, 2]]


def test_a_token_twice_needs_a_query_between() -> None:
    log_probs = torch.full((1, 3, LABELS), -5.0)
    log_probs[0, :, 0] = 0.0
    (found,) = constrained_search(log_probs, one_of([(0, 0)]), blank=BLANK)
    assert found.tokens.tolist() == [0, 0]
    assert float(found.score) == -5.0
    assert found.alignment.tolist() == [0, 2]
    with pytest.raises(ValueError, match="2 queries have no path"):
        constrained_search(log_probs[:, :2], one_of([(0, 0)]), blank=BLANK)
