"""The teacher's perplexity of captions, against a sum worked out step by step."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from narvl_plugin.inference.perplexity import perplexities
from narvl_plugin.inference.predictor import Predictor

SAID = {"one": {0: "a cat", 2: "two dogs"}, "other": {0: "a", 2: ""}}


@pytest.mark.integration
def test_perplexity_is_that_of_all_tokens_and_ends(make_model: Callable[..., Path], tmp_path: Path) -> None:
    teacher = make_model("ofa_tiny", "cross_entropy", updates=2)
    predictor = Predictor.load(teacher, tmp_path / "valid.tsv", role="teacher", optimised=False)
    dictionary = predictor.task.target_dictionary
    for name, found in perplexities(predictor, SAID, [0, 2]).items():
        total, count = 0.0, 0
        for row, text in SAID[name].items():
            tokens = torch.cat([predictor.task.codec.encode(f" {text}"), torch.tensor([dictionary.eos()])])
            before = torch.cat([torch.tensor([dictionary.bos()]), tokens[:-1]])
            with torch.no_grad():
                logits, _ = predictor.model(**predictor.batch(row)["net_input"] | {"prev_output_tokens": before[None]})
            total += float(logits[0].log_softmax(1).gather(1, tokens[:, None]).sum())
            count += len(tokens)
        assert found == pytest.approx(math.exp(-total / count), rel=1e-4)
    whole = Predictor.load(teacher, tmp_path / "valid.tsv", role="teacher")
    assert perplexities(whole, SAID, [0, 2]) == pytest.approx(perplexities(predictor, SAID, [0, 2]), rel=1e-4)
