"""Beam search against other packages for CTC: with wide beams all find the same outputs, with the same scores."""

import numpy as np
import pytest
import torch

from narvl_plugin.ctc import prefix_beam_search

LETTERS = "abcd"
BLANK = len(LETTERS)
WIDE = 1400  # there are 1,365 outputs of up to five letters
NEVER = -1e4  # below any log-probability, so that nothing is pruned


def random_log_probs(seed: int) -> torch.Tensor:
    """Return one sample of five queries, the blank last."""
    return (2 * torch.randn(1, 5, BLANK + 1, generator=torch.Generator().manual_seed(seed))).log_softmax(2)


def ours(log_probs: torch.Tensor) -> list[tuple[str, float]]:
    """Return the five best outputs as text with their scores."""
    (found,) = prefix_beam_search(log_probs, blank=BLANK, beam_size=WIDE, nbest=5)
    return [("".join(LETTERS[token] for token in tokens), float(score)) for tokens, score in found]


@pytest.mark.integration
@pytest.mark.parametrize("seed", range(8))
def test_ctc_beam_decoder(seed: int) -> None:
    package = pytest.importorskip("ctc_beam_decoder", reason="ctc-beam-decoder has no build for this platform")
    log_probs = random_log_probs(seed)
    decoder = package.BeamSearchDecoder(list(LETTERS))
    beams = decoder.decode_beams(log_probs[0].numpy(), beam_width=WIDE, beam_prune_logp=NEVER, token_min_logp=NEVER)
    found = ours(log_probs)
    assert [text for text, _ in found] == [beam[0] for beam in beams[:5]]
    # It clips and prunes a little even so.
    assert [score for _, score in found] == pytest.approx([beam[3] for beam in beams[:5]], abs=1e-3)


@pytest.mark.integration
@pytest.mark.parametrize("seed", range(8))
def test_fast_ctc_decode(seed: int) -> None:
    package = pytest.importorskip("fast_ctc_decode", reason="fast-ctc-decode has no build for this platform")
    log_probs = random_log_probs(seed)
    blank_first = np.ascontiguousarray(np.roll(log_probs[0].exp().numpy(), 1, axis=1))
    text, _ = package.beam_search(blank_first, ["", *LETTERS], beam_size=WIDE, beam_cut_threshold=0.0)
    assert text == ours(log_probs)[0][0]
