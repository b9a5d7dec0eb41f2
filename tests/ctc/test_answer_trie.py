"""Closed lists of answers: each one's score is that of the loss, in any company."""

import pytest
import torch

from narvl_plugin.ctc import build_trie, query_ctc_loss, score_candidates, score_trie

BLANK = 5


@pytest.mark.parametrize("seed", range(10))
def test_scores_are_those_of_the_loss(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    log_probs = (3 * torch.randn(4, 9, 6, generator=generator)).log_softmax(2)
    candidates = torch.randint(0, 5, (40, 5), generator=generator)
    lengths = torch.randint(0, 6, (40,), generator=generator)
    scores = score_candidates(log_probs, candidates, lengths, blank=BLANK)
    assert scores.shape == (4, 40)
    for sample in range(4):
        loss = query_ctc_loss(log_probs[sample].expand(40, -1, -1), candidates, lengths, blank=BLANK, reduction="none")
        torch.testing.assert_close(scores[sample], -loss, rtol=0, atol=1e-4)


def test_a_trie_holds_each_beginning_once() -> None:
    trie = build_trie(torch.tensor([[1, 1, 2], [1, 1, 9], [1, 3, 9], [1, 1, 2]]), torch.tensor([3, 2, 2, 3]))
    assert len(trie.parents) == 5  # nothing, 1, 1 1, 1 3, 1 1 2
    assert trie.ends[0] == trie.ends[3]
    assert trie.repeats.sum() == 1
    log_probs = torch.randn(2, 4, 6).log_softmax(2)
    scores = score_trie(log_probs, trie, blank=BLANK)
    assert torch.equal(scores[:, 0], scores[:, 3])


def test_answers_that_no_path_spells() -> None:
    candidates, lengths = torch.tensor([[1, 1], [1, 2], [3, 9], [4, 4]]), torch.tensor([2, 2, 1, 0])
    log_probs = torch.tensor([0.0, 0.2, 0.3, 0.0, 0.2, 0.3]).log().expand(1, 2, -1)
    scores = score_candidates(log_probs, candidates, lengths, blank=BLANK).exp()[0].tolist()
    assert scores == pytest.approx([0.0, 0.06, 0.0, 0.09])


def test_all_outputs_together_are_certain() -> None:
    log_probs = torch.randn(3, 3, 3, dtype=torch.float64).log_softmax(2)
    outputs = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1), (0, 1, 0), (1, 0, 1)]
    candidates = torch.tensor([[*output, *(3 - len(output)) * [0]] for output in outputs])
    lengths = torch.tensor([len(output) for output in outputs])
    total = score_candidates(log_probs, candidates, lengths, blank=2).logsumexp(1)
    torch.testing.assert_close(total, torch.zeros(3, dtype=torch.float64))
