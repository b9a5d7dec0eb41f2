"""The pretended device counts what a GPU would be waited for, that alone, and computes what the CPU does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from device_waits import DEVICE, DeviceWaits
from torch import Tensor, nn


def numbers() -> Tensor:
    return torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 4.0]])


WAITS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x[0, 0]),
    "int": lambda x: int(x.max()),
    "bool": lambda x: bool(x.any()),
    "if": lambda x: 1 if (x > 9).any() else 0,
    "tolist": lambda x: x.tolist(),
    "tolist of a scalar": lambda x: x.sum().tolist(),
    "cpu": lambda x: x.cpu(),
    "to cpu": lambda x: x.to("cpu", torch.float64),
    "copy into a tensor of the CPU": lambda x: torch.zeros(2, 3).copy_(x),
    "a number as an index": lambda x: x[x[1].argmin()],
    "a number as the end of a slice": lambda x: x[: x[1].argmin() + 1],
    "equal": lambda x: torch.equal(x, x + 1),
    "allclose": lambda x: torch.allclose(x, x + 1),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 1),
    "mask": lambda x: x[x > 1],
    "mask of rows": lambda x: x[(x > 1).all(1)],
    "write by a mask": lambda x: x.clone().index_put_((x > 1,), x.flatten()[:4]),
    "masked_select": lambda x: x.masked_select(x > 1),
    "unique": lambda x: x.unique(),
    "unique rows": lambda x: x.unique(dim=0),
    "unique_consecutive": lambda x: x.unique_consecutive(),
    "bincount": lambda x: x.long().flatten().bincount(),
    "repeat_interleave": lambda x: x.repeat_interleave(x[0].long()[:2], 0),
    "torch.tensor": lambda x: torch.tensor([1, 2], device=x.device),
    "new_tensor": lambda x: x.new_tensor([1, 2]),
    "as_tensor": lambda x: torch.as_tensor([1.0], device=x.device),
    "asarray": lambda x: torch.asarray([1.0], device=x.device),
    "text": lambda x: len(f"{x[0, 0]}") and x,
    "to the device": lambda x: torch.ones(2).to(x.device),
    "to a tensor's device": lambda x: torch.ones(2).to(x),
    "copy of a tensor of the CPU": lambda x: x.clone().copy_(torch.zeros(2, 3)),
    "index of the CPU": lambda x: x[torch.tensor([0, 1])],
    "list as an index": lambda x: x[:, [0, 1]],
    "empty list as an index": lambda x: x[[]],
}
NO_WAITS: dict[str, Callable[[Tensor], Any]] = {
    "arithmetic": lambda x: (x * 2 + x.sum() / 3 - x.mean(1, keepdim=True)).exp(),
    "products": lambda x: x @ x.T,
    "comparisons": lambda x: (x == 1) | (x > 2) & ~(x <= 1),
    "where": lambda x: torch.where(x > 1, x, 0.0),
    "masked_fill": lambda x: x.masked_fill(x > 1, float("-inf")),
    "fill by a mask": lambda x: x.clone().index_put_((x > 1,), torch.tensor(7.0)),
    "gather": lambda x: x.gather(1, x.argsort(1)),
    "scatter": lambda x: x.scatter(1, x.argsort(1), x),
    "index_select": lambda x: x.index_select(0, torch.zeros(3, dtype=torch.int64, device=x.device)),
    "index": lambda x: x[x[0].long() - 2],
    "slices": lambda x: x[:, 1:][None, ..., 0],
    "topk": lambda x: x.topk(2, 1),
    "argmax": lambda x: x.argmax(1),
    "shapes": lambda x: (len(x), x.size(1), x.shape, x.numel(), x.dim(), x.dtype, x.device),
    "loop over rows": lambda x: [row.sum() for row in x],
    "factories": lambda x: (torch.arange(3, device=x.device), torch.zeros(2, device=x.device), x.new_full((2,), 1)),
    "repeat_interleave of a number": lambda x: x.repeat_interleave(2, 0),
    "repeat_interleave of a known size": lambda x: x.repeat_interleave(x[1].long()[:2], 0, output_size=5),
    "to the device without waiting": lambda x: torch.ones(2).to(x.device, non_blocking=True),
    "types": lambda x: x.double().int(),
    "in place": lambda x: x.clone().add_(1).mul_(x),
    "a number of the CPU": lambda x: x + torch.tensor(2.0),
}


def on_cpu(found: Any) -> Any:
    return torch.utils._pytree.tree_map(lambda part: getattr(part, "numbers", part), found)


@pytest.mark.parametrize("kind", WAITS)
def test_a_wait_is_counted_where_it_is(device: DeviceWaits, kind: str) -> None:
    moved = device.move(numbers())
    WAITS[kind](moved)
    assert device.waits
    assert device.waits[0].places[0].filename == __file__
    assert not device.ours  # this is a test
    device.clear()
    assert not device.waits


@pytest.mark.parametrize("kind", NO_WAITS)
def test_no_wait_is_counted(device: DeviceWaits, kind: str) -> None:
    NO_WAITS[kind](device.move(numbers()))
    assert [str(wait) for wait in device.waits] == []


@pytest.mark.parametrize("kind", sorted({*WAITS, *NO_WAITS} - {"shapes"}))
def test_numbers_are_those_of_the_cpu(device: DeviceWaits, kind: str) -> None:
    run = {**NO_WAITS, **WAITS}[kind]
    found, expected = on_cpu(run(device.move(numbers()))), run(numbers())
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_copy_to_the_cpu_is_a_tensor_of_the_cpu(device: DeviceWaits) -> None:
    moved = device.move(numbers())
    assert moved.device == DEVICE
    assert moved.cpu().device.type == "cpu"
    assert moved.cpu().numpy().sum() == 15
    with pytest.raises(TypeError, match="numpy"):
        moved.numpy()


def test_tensors_of_both_devices_do_not_mix(device: DeviceWaits) -> None:
    with pytest.raises(RuntimeError, match="same device"):
        device.move(numbers()) + numbers()


def test_a_view_is_written_through(device: DeviceWaits) -> None:
    moved = device.move(numbers())
    moved[0].zero_()
    moved[1, 1] = 9
    assert moved.tolist() == [[0, 0, 0], [0, 9, 4]]


def test_numbers_that_are_replaced_are_others(device: DeviceWaits) -> None:
    moved = device.move(numbers())
    moved.data = moved.data * 2
    assert moved.sum().item() == 30


def test_a_model_learns_there_as_on_the_cpu(device: DeviceWaits) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.GELU(), nn.Linear(4, 2))
    model(numbers()).square().sum().backward()
    expected = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    device.move(model)(device.move(numbers())).square().sum().backward()
    assert not device.waits
    found = [parameter.grad.cpu() for parameter in model.parameters() if parameter.grad is not None]
    torch.testing.assert_close(found, expected)
