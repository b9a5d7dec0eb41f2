"""Repairs of how fairseq generates, each against the call that fails without it."""

import pytest
import torch
from fairseq.ngram_repeat_block import NGramRepeatBlock


class TestRepeatedNgrams:
    def blocked(self, size: int, said: list[int]) -> list[int]:
        """Return the tokens (of six) that fairseq forbids after those said, in a buffer twelve long."""
        tokens = torch.ones(1, 12, dtype=torch.int64)
        tokens[0, : len(said)] = torch.tensor(said)
        log_probs = NGramRepeatBlock(size)(tokens, torch.zeros(1, 6), 1, 1, len(said) - 1)
        return log_probs[0].isinf().nonzero().flatten().tolist()

    @pytest.mark.parametrize(
        ("size", "said", "forbidden"),
        [
            (2, [0, 3, 4, 3], [4]),
            (2, [0, 3, 4, 3, 5, 3], [4, 5]),
            (3, [0, 3, 4, 5, 3, 4], [5]),
            (3, [0, 3, 4, 5, 4, 3], []),
        ],
    )
    def test_are_blocked(self, size: int, said: list[int], forbidden: list[int]) -> None:
        assert self.blocked(size, said) == forbidden
