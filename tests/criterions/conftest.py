"""What the tests of the criterions share: a task, a parallel model and batches, each as small as can be."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fairseq.data import Dictionary
from torch import Tensor, nn

from narvl_plugin.errors import SkipBudget

NUM_QUERIES = 6


class TinyModel(nn.Module):
    """Logits (B, N, V) from features (B, D) by one matrix; the blank is the label after the dictionary's last."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.blank = vocabulary
        self.project = nn.Linear(4, NUM_QUERIES * (vocabulary + 1))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.project.reset_parameters()

    def forward(self, features: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """(B, D) -> (B, N, V) and nothing else."""
        return self.project(features).view(len(features), NUM_QUERIES, -1), {}


@pytest.fixture
def dictionary() -> Dictionary:
    """Four special symbols and the words a to f, labels 4 to 9."""
    dictionary = Dictionary()
    for word in "abcdef":
        dictionary.add_symbol(word)
    return dictionary


@pytest.fixture
def task(dictionary: Dictionary) -> SimpleNamespace:
    """The task as a criterion sees it, forgiving one row."""
    return SimpleNamespace(
        target_dictionary=dictionary, skip_budget=SkipBudget(1), scores_outputs=True, task_names=("snli_ve",)
    )


@pytest.fixture
def model(dictionary: Dictionary) -> TinyModel:
    """A parallel model with six queries, the same every time."""
    return TinyModel(len(dictionary))


@pytest.fixture
def make_batch(dictionary: Dictionary) -> Callable[..., dict[str, Any]]:
    """Build a batch from captions such as "a b b"; row i has the same features whichever batch it is in."""

    def make(captions: list[str], first_row: int = 0) -> dict[str, Any]:
        rows = [
            torch.tensor([*(dictionary.index(word) for word in caption.split()), dictionary.eos()])
            for caption in captions
        ]
        features = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
        return {
            "net_input": {"features": features[first_row : first_row + len(rows)]},
            "target": nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=dictionary.pad()),
            "where": [f"train.tsv:{first_row + row + 1}" for row in range(len(rows))],
        }

    return make
