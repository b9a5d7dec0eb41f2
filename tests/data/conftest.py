"""Items and batches of the published data sets, recorded as data."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from narvl_plugin.data.dataset import TsvDataset

BATCH_SIZE = 3  # of the recorded batches


def check_image(tensor: torch.Tensor, golden: dict[str, Any] | list[Any]) -> None:
    """Compare with a golden digest: mean, deviation, the first values, every k-th pixel; or with the shape alone."""
    if isinstance(golden, list):
        assert list(tensor.shape) == golden
        return
    assert list(tensor.shape) == golden["shape"]
    every = golden["shape"][-1] // len(golden["sub"][0][0] if tensor.dim() == 3 else golden["sub"][0][0][0])
    for value, expected in (
        (tensor.mean(), golden["mean"]),
        (tensor.std(), golden["std"]),
        (tensor.flatten()[:8], golden["first"]),
        (tensor[..., ::every, ::every], golden["sub"]),
    ):
        torch.testing.assert_close(value, torch.tensor(expected), atol=1e-6, rtol=0)


def check_value(value: Any, golden: Any) -> None:
    """Compare a tensor, a list of tensors or anything plain; whole numbers exactly, fractions to 1e-6."""
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        torch.testing.assert_close(value, torch.tensor(golden, dtype=value.dtype), atol=1e-6, rtol=1e-6)
    elif isinstance(value, torch.Tensor):
        assert value.tolist() == golden
    elif isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
        assert [item.tolist() for item in value] == golden
    else:
        assert (value.tolist() if hasattr(value, "tolist") else value) == golden


def check_fields(fields: dict[str, Any], golden: dict[str, Any]) -> None:
    """Compare all that the golden item or batch holds."""
    for key, expected in golden.items():
        if key == "net_input":
            check_fields(fields[key], expected)
        elif key in ("patch_image", "patch_images"):
            check_image(fields[key], expected)
        elif key == "patch_image_digest":
            mean, deviation, sub = expected
            image = fields["patch_image"]
            actual = torch.stack([image.mean(), image.std()])
            torch.testing.assert_close(actual, torch.tensor([mean, deviation]), atol=1e-6, rtol=0)
            torch.testing.assert_close(image[:, ::37, ::41], torch.tensor(sub), atol=1e-6, rtol=0)
        elif key == "constraint_mask_nonzero":
            assert fields["constraint_mask"].nonzero().tolist() == expected
        else:
            check_value(fields[key], expected)


@pytest.fixture
def check_golden(goldens: Path) -> Callable[[TsvDataset, str, str], None]:
    """Give a function that compares a data set's items and its first batch with those of a recorded case."""
    recorded = json.loads((goldens / "ofa_datasets_tasks.json").read_text())

    def check(dataset: TsvDataset, case: str, split: str) -> None:
        golden = recorded[case]
        assert len(dataset) == len(golden["datasets"][split])
        samples = [dataset[row] for row in range(len(dataset))]
        for sample, expected in zip(samples, golden["datasets"][split], strict=True):
            assert sample is not None
            check_fields(sample, expected)
        check_fields(dataset.collater(samples[:BATCH_SIZE]), golden["batch3"][split])

    return check
