"""Reference models under a weight recipe: what OFA and the authors' parallel model compute, recorded as data."""

import copy
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from narvl_plugin.models.ofa import OfaModel
from narvl_plugin.models.registered import build

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import recipe  # noqa: E402

TOLERANCE = 1e-4
FILES = {"ofa_tiny": "ofa_tiny.npz", "narvl_tiny": "narvl_tiny_q20.npz"}


@dataclass
class Golden:
    """The recorded inputs and outputs of one reference model."""

    arch: str
    arrays: Any
    meta: dict[str, Any]

    def inputs(self, case: str) -> tuple[dict[str, Tensor], Tensor]:
        """Return the model's arguments in a case, and the target."""
        prefix = f"{case}/in/"
        found = {
            name.removeprefix(prefix): torch.from_numpy(self.arrays[name])
            for name in self.arrays.files
            if name.startswith(prefix)
        }
        return found, found.pop("target")

    def model(self) -> OfaModel:
        """Build our model of the same size without dropout, with the recipe's weights, in evaluation mode."""
        queries = {"num_queries": self.meta["num_queries"]} if "num_queries" in self.meta else {}
        model = build(self.arch, vocab_size=self.meta["dict_len"], dropout=0.0, **queries).eval()
        recipe.fill(model)
        return model


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Sum in as many parts as the recordings did: gradients through batch norm differ less then."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def goldens() -> dict[str, Golden]:
    """The recorded models by architecture."""
    found = {}
    for arch, file in FILES.items():
        arrays = np.load(HERE / "goldens" / file)
        found[arch] = Golden(arch, arrays, json.loads(str(arrays["meta"])))
    return found


@pytest.fixture(scope="session")
def evaluated(goldens: dict[str, Golden]) -> dict[str, OfaModel]:
    """The models with the recipe's weights, in evaluation mode; tests leave them as they are."""
    return {arch: golden.model() for arch, golden in goldens.items()}


@pytest.fixture
def trained(evaluated: dict[str, OfaModel]) -> Callable[[str], OfaModel]:
    """Give a function that copies one of these models, to be trained."""
    return lambda arch: copy.deepcopy(evaluated[arch]).train()


@pytest.fixture
def close(request: pytest.FixtureRequest, measured: Callable[[str, str, float], None]) -> Callable[..., None]:
    """Give a function that compares with the largest expected magnitude as the scale, and keeps the difference."""
    case = request.node.name.partition("[")[2].rstrip("]")

    def compare(actual: Any, expected: Any, what: str, tolerance: float = TOLERANCE) -> None:
        actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
        difference = np.abs(actual - expected).max() / np.abs(expected).max()
        measured(case, what, float(difference))
        assert difference <= tolerance, f"{what}: largest relative difference {difference:.1e}"

    return compare
