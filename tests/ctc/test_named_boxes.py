"""Elements of names and boxes: the search against all outputs, repeated elements, acceptance, and parts of outputs."""

import random
from collections.abc import Sequence
from itertools import groupby, product

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from narvl_plugin.ctc import NamedBoxes, collapse, constrained_search, min_queries, viterbi
from narvl_plugin.ctc import named_boxes as module
from narvl_plugin.ctc.named_boxes import split

NOUNS, PAIRS = [(0,), (1,), (0, 1)], [(2, 0), (2, 1), (1, 0)]
FIRST_BIN, BINS, END, BLANK = 3, 2, 5, 6
BOXES = [box for box in product(range(FIRST_BIN, FIRST_BIN + BINS), repeat=4) if box[0] <= box[2] and box[1] <= box[3]]
ELEMENTS = [noun + box + pair + other for noun in NOUNS for box in BOXES for pair in PAIRS for other in BOXES]


@pytest.fixture
def graphs() -> NamedBoxes:
    return NamedBoxes.of([NOUNS, PAIRS], first_bin=FIRST_BIN, num_bins=BINS, most=2).ending_in(END)


def is_valid(tokens: Sequence[int]) -> bool:
    """Whether tokens are at most two different elements, and maybe the end."""
    said = tuple(tokens[:-1] if tokens and tokens[-1] == END else tokens)
    parts = [tuple(run) for _, run in groupby(said, key=lambda token: FIRST_BIN <= token < FIRST_BIN + BINS)]
    elements = [sum(parts[place : place + 4], ()) for place in range(0, len(parts), 4)]
    return len(set(elements)) == len(elements) <= 2 and all(element in ELEMENTS for element in elements)


def best_score(log_probs: torch.Tensor, outputs: Sequence[Sequence[int]]) -> float:
    """Return the log-probability of the best path to any of some outputs: (1, N, V)."""
    tokens = pad_sequence([torch.tensor(one, dtype=torch.int64) for one in outputs], batch_first=True)
    lengths = torch.tensor(list(map(len, outputs)))
    fits = min_queries(tokens, lengths) <= log_probs.size(1)
    tokens, lengths = tokens[fits], lengths[fits]
    expanded = log_probs.expand(len(tokens), -1, -1)
    labels = viterbi(expanded, tokens[:, : int(lengths.max())], lengths, blank=BLANK).labels
    return float(expanded.gather(2, labels[..., None]).sum((1, 2)).max())


def found_by(graphs: NamedBoxes, log_probs: torch.Tensor) -> tuple[float, list[int]]:
    """Return the log-probability of the path that the search finds, and its output."""
    paths = graphs.best_paths(log_probs, blank=BLANK)
    tokens, _, lengths = collapse(paths.labels, blank=BLANK)
    return float(log_probs.gather(2, paths.labels[..., None]).sum()), tokens[0, : lengths[0]].tolist()


@pytest.mark.parametrize("tried", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_the_best_path_is_that_of_all_outputs(
    graphs: NamedBoxes, seed: int, tried: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FIRST_TRIED", tried)
    torch.manual_seed(seed)
    log_probs = (3 * torch.randn(1, 13, BLANK + 1)).log_softmax(2)  # room for one element alone
    score, said = found_by(graphs, log_probs)
    outputs = [(*element, *end) for element in [(), *ELEMENTS] for end in ((), (END,))]
    assert score == pytest.approx(best_score(log_probs, outputs), abs=1e-4)
    assert is_valid(said)


@pytest.mark.parametrize("seed", range(4))
def test_of_equal_elements_one_becomes_the_next_best(seed: int) -> None:
    graphs = NamedBoxes.of([[(0,), (1,)]], first_bin=FIRST_BIN, num_bins=BINS, most=2)
    elements = [(name, *box) for name in (0, 1) for box in BOXES]
    torch.manual_seed(seed)
    log_probs = torch.randn(1, 12, BLANK + 1)
    twice = torch.tensor([0, 3, 4, BLANK, 4, 4, 0, 3, 4, BLANK, 4, 4])
    log_probs[0, torch.arange(12), twice] += 9
    log_probs = log_probs.log_softmax(2)
    score, said = found_by(graphs, log_probs)
    pairs = [one + other for one in elements for other in elements]
    different = [(), *elements, *(pair for pair in pairs if pair[:5] != pair[5:])]
    assert score == pytest.approx(best_score(log_probs, different), abs=1e-4)
    assert score < best_score(log_probs, pairs)
    assert said[:5] != said[5:]


def test_valid_outputs_are_accepted_and_no_others(graphs: NamedBoxes) -> None:
    draw = random.Random(1)
    rows = []
    for _ in range(1500):
        row = [token for _ in range(draw.randint(0, 3)) for token in draw.choice(ELEMENTS[:: draw.choice((1, 200))])]
        if row and draw.random() < 0.4:
            row[draw.randrange(len(row))] = draw.randrange(BLANK)
        rows.append(row + [END] * (draw.random() < 0.3))
    padded = pad_sequence([torch.tensor(row, dtype=torch.int64) for row in rows], batch_first=True)
    accepted = graphs.accepts(padded, torch.tensor(list(map(len, rows)))).tolist()
    expected = list(map(is_valid, rows))
    assert accepted == expected
    assert 300 < sum(expected) < 1200


def test_outputs_of_no_tokens_are_accepted(graphs: NamedBoxes) -> None:
    assert graphs.accepts(torch.zeros(2, 0, dtype=torch.int64), torch.tensor([0, 0])).tolist() == [True, True]


def test_each_sample_of_a_batch_is_searched(graphs: NamedBoxes) -> None:
    log_probs = torch.randn(2, 13, BLANK + 1).log_softmax(2)
    found = constrained_search(log_probs, graphs, blank=BLANK)
    alone = [constrained_search(row[None], graphs, blank=BLANK)[0] for row in log_probs]
    assert [one.tokens.tolist() for one in found] == [one.tokens.tolist() for one in alone]
    assert all(is_valid(one.tokens.tolist()) for one in found)


def test_the_parts_of_an_output_are_names_and_boxes() -> None:
    rows = [[0, 1, 3, 4, 3, 4, 2, 3, 3, 4, 4], [0, 3, 4, 3], [3, 4, 3, 4], [0, 3, 4, 3, 4, 4], [0, 3, 3, 3, 3, 1], []]
    padded = pad_sequence([torch.tensor(row, dtype=torch.int64) for row in rows], batch_first=True)
    parts = split(padded, torch.tensor(list(map(len, rows))), bins=(FIRST_BIN, BINS), most=2)
    assert parts.names[0, :, :3].tolist() == [[0, 1, -1], [2, -1, -1]]
    assert parts.boxes[0].tolist() == [[0, 1, 0, 1], [0, 0, 1, 1]]
    assert parts.numbers.tolist() == [2, 1, 0, 1, 2, 0]
    assert parts.whole.tolist() == [True, False, False, False, False, True]
    assert not split(padded[:1], torch.tensor([11]), bins=(FIRST_BIN, BINS), most=1).whole.any()
