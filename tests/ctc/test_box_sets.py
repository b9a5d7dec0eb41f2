"""Sets of boxes, with and without names: the search against all outputs, repeated elements, acceptance, and parts."""

import random
from collections.abc import Sequence
from itertools import groupby, permutations, product

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from narvl_plugin.ctc import BoxSets, collapse, constrained_search, min_queries, viterbi
from narvl_plugin.ctc import box_sets as module
from narvl_plugin.ctc.box_sets import split

NOUNS, PAIRS = [(0,), (1,), (0, 1)], [(2, 0), (2, 1), (1, 0)]
FIRST_BIN, BINS, END, BLANK = 3, 2, 5, 6
BOXES = [box for box in product(range(FIRST_BIN, FIRST_BIN + BINS), repeat=4) if box[0] <= box[2] and box[1] <= box[3]]
NUM_COORDINATES = 24
"""Number of coordinates of boxes without names, whose labels are 0, 1, ...; the blank follows them."""
ELEMENTS = [noun + box + pair + other for noun in NOUNS for box in BOXES for pair in PAIRS for other in BOXES]


@pytest.fixture
def graphs() -> BoxSets:
    return BoxSets.of([NOUNS, PAIRS], first_bin=FIRST_BIN, num_bins=BINS, most=2).ending_in(END)


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


def found_by(graphs: BoxSets, log_probs: torch.Tensor) -> tuple[float, list[int]]:
    """Return the log-probability of the path that the search finds, and its output."""
    paths = graphs.best_paths(log_probs, blank=BLANK)
    tokens, _, lengths = collapse(paths.labels, blank=BLANK)
    return float(log_probs.gather(2, paths.labels[..., None]).sum()), tokens[0, : lengths[0]].tolist()


@pytest.mark.parametrize("tried", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_the_best_path_is_that_of_all_outputs(
    graphs: BoxSets, seed: int, tried: int, monkeypatch: pytest.MonkeyPatch
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
    graphs = BoxSets.of([[(0,), (1,)]], first_bin=FIRST_BIN, num_bins=BINS, most=2)
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


def test_valid_outputs_are_accepted_and_no_others(graphs: BoxSets) -> None:
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


def test_outputs_of_no_tokens_are_accepted(graphs: BoxSets) -> None:
    assert graphs.accepts(torch.zeros(2, 0, dtype=torch.int64), torch.tensor([0, 0])).tolist() == [True, True]


def test_each_sample_of_a_batch_is_searched(graphs: BoxSets) -> None:
    log_probs = torch.randn(2, 13, BLANK + 1).log_softmax(2)
    found = constrained_search(log_probs, graphs, blank=BLANK)
    alone = [constrained_search(row[None], graphs, blank=BLANK)[0] for row in log_probs]
    assert [one.tokens.tolist() for one in found] == [one.tokens.tolist() for one in alone]
    assert all(is_valid(one.tokens.tolist()) for one in found)


def test_the_parts_of_an_output_are_names_and_boxes() -> None:
    rows = [[0, 1, 3, 4, 3, 4, 2, 3, 3, 4, 4], [0, 3, 4, 3], [3, 4, 3, 4], [0, 3, 4, 3, 4, 4], [0, 3, 3, 3, 3, 1], []]
    padded = pad_sequence([torch.tensor(row, dtype=torch.int64) for row in rows], batch_first=True)
    parts = split(padded, torch.tensor(list(map(len, rows))), bins=(FIRST_BIN, BINS), most=2, width=11)
    assert parts.names[0, :, :3].tolist() == [[0, 1, -1], [2, -1, -1]]
    assert parts.boxes[0].tolist() == [[0, 1, 0, 1], [0, 0, 1, 1]]
    assert parts.numbers.tolist() == [2, 1, 0, 1, 2, 0]
    assert parts.whole.tolist() == [True, False, False, False, False, True]
    assert not split(padded[:1], torch.tensor([11]), bins=(FIRST_BIN, BINS), most=1, width=11).whole.any()


def test_a_name_longer_than_all_names_differs_from_each(graphs: BoxSets) -> None:
    box = (3, 3, 4, 4)
    rows = [(*name, *box, *pair, *box) for name in (*NOUNS, (0, 1, 0), (0, 1, 2)) for pair in PAIRS]
    tokens = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    parts = graphs.parts(tokens, torch.tensor(list(map(len, rows))))
    listed, longer = parts.names[: 3 * len(PAIRS), 0], parts.names[3 * len(PAIRS) :, 0]
    assert not (listed[:, None] == longer).all(2).any()
    assert longer.size(1) == 3


# --- Boxes without names ---------------------------------------------------------------------------------------------


def bare(least: int, most: int) -> BoxSets:
    return BoxSets.of(first_bin=0, num_bins=NUM_COORDINATES, least=least, most=most)


def draw(seed: int, batch: int, queries: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = 3.0 * torch.randn(batch, queries, NUM_COORDINATES + 1, generator=generator, dtype=torch.float64)
    return logits.log_softmax(2)


def test_the_box_of_four_queries_is_the_best_of_all() -> None:
    """Each query says one edge, so the best path is the best of all boxes whose neighbouring edges differ."""
    boxes = torch.cartesian_prod(*[torch.arange(NUM_COORDINATES)] * 4)
    x0, y0, x1, y1 = boxes.T
    boxes = boxes[(x0 <= x1) & (y0 <= y1) & (x0 != y0) & (y0 != x1) & (x1 != y1)]
    log_probs = draw(1, 12, 4)
    for row, found in zip(log_probs, constrained_search(log_probs, bare(1, 1), blank=NUM_COORDINATES), strict=True):
        scores = row[torch.arange(4), boxes].sum(1)
        assert found.tokens.tolist() == boxes[scores.argmax()].tolist()


@pytest.mark.parametrize("least", [0, 1, 2])
@pytest.mark.parametrize("seed", range(4))
def test_the_best_set_is_that_of_all_sets(seed: int, least: int) -> None:
    """All queries prefer one box, said twice; the best path has a better set, of which no two boxes are equal."""
    sets = BoxSets.of(first_bin=FIRST_BIN, num_bins=BINS, least=least, most=2).ending_in(END)
    generator = torch.Generator().manual_seed(seed)
    log_probs = torch.randn(1, 11, BLANK + 1, generator=generator)
    twice = torch.tensor([3, 4, 3, 4, BLANK, 3, 4, 3, 4, 4, BLANK])
    log_probs[0, torch.arange(11), twice] += 2
    log_probs = log_probs.log_softmax(2)
    score, said = found_by(sets, log_probs)
    outputs: list[tuple[int, ...]] = [
        sum(boxes, ()) + end
        for number in range(least, 3)
        for boxes in permutations(BOXES, number)
        for end in ((), (END,))
    ]
    assert score == pytest.approx(best_score(log_probs, outputs), abs=1e-4)
    assert tuple(said) in outputs


def test_labels_that_cost_too_much_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search is the same, however many labels are tried first."""
    sets, log_probs = bare(0, 3), draw(2, 6, 15)
    expected = [found.labels.tolist() for found in constrained_search(log_probs, sets, blank=NUM_COORDINATES)]
    for tried in (1, 4, NUM_COORDINATES):
        monkeypatch.setattr(module, "FIRST_TRIED", tried)
        found = [path.labels.tolist() for path in constrained_search(log_probs, sets, blank=NUM_COORDINATES)]
        assert found == expected


def test_a_search_of_a_few_labels_finds_a_valid_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAIRS_TRIED", 5 * 5**2)
    paths = bare(0, 5).best_paths(draw(3, 6, 25), blank=NUM_COORDINATES).labels
    tokens, _, lengths = collapse(paths, blank=NUM_COORDINATES)
    assert bare(0, 5).accepts(tokens, lengths).all()


def test_numbers_of_boxes_and_the_end() -> None:
    box, other, third, crossed = [0, 1, 2, 3], [0, 1, 2, 4], [0, 0, 0, 0], [2, 1, 0, 3]
    cases: list[tuple[list[int], bool]] = [
        ([], False),
        (box, True),
        ([*box, *other], True),
        ([*other, *box], True),
        ([*third, *box], True),
        ([*box, *box], False),
        ([*box, *crossed], False),
        ([*crossed, *box], False),
        ([*box, *other, *third], False),
        ([*box, *other, 5], False),
        ([*box, *other[:3]], False),
        ([*box, *other[:3], NUM_COORDINATES + 1], False),
    ]
    sets, end = bare(1, 2), NUM_COORDINATES + 5
    padded = torch.tensor([[*tokens, *[NUM_COORDINATES] * (13 - len(tokens))] for tokens, _ in cases])
    lengths = torch.tensor([len(tokens) for tokens, _ in cases])
    valid = [is_valid for _, is_valid in cases]
    assert sets.accepts(padded, lengths).tolist() == valid
    assert bare(0, 2).accepts(padded, lengths).tolist() == [True, *valid[1:]]
    closed = torch.tensor([[*tokens, end, *[NUM_COORDINATES] * (12 - len(tokens))] for tokens, _ in cases])
    assert sets.ending_in(end).accepts(closed, lengths + 1).tolist() == valid
    assert not sets.accepts(closed, lengths + 1).any()
    assert sets.ending_in(end).alphabet().tolist() == [*range(NUM_COORDINATES), end]


def test_boxes_of_any_edges_are_those_of_an_automaton() -> None:
    automaton = BoxSets.of(first_bin=1, num_bins=2, most=1).ending_in(3).boxes_of_any_edges()
    every = [tokens for length in range(6) for tokens in product((1, 2, 3), repeat=length)]
    padded = torch.tensor([[*tokens, *[0] * (5 - len(tokens))] for tokens in every])
    accepted = automaton.accepts(padded, torch.tensor([len(tokens) for tokens in every]))
    boxes = [(), *product((1, 2), repeat=4)]
    valid = {(*box, *end) for box in boxes for end in ((), (3,))}
    assert {tokens for tokens, is_valid in zip(every, accepted.tolist(), strict=True) if is_valid} == valid
