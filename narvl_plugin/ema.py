"""The exponential moving average of a model's weights, which fairseq's trainer keeps with --store-ema."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from fairseq.models.ema import EMA
from torch import Tensor, nn


class AveragedModel(EMA):
    """A copy of a model whose weights, and statistics of batch norms, follow the model's: average += (1 - decay) * gap.

    fairseq's own goes by the names in the state: it moves the embedding three times for its three names, and fails on
    the batch norms' counts of batches, which are integers and taken over here. What is frozen stays the same bit by
    bit.
    """

    @torch.no_grad()
    def _step_internal(self, new_model: nn.Module, updates: int | None = None) -> None:
        """Move the averages towards the model's weights."""
        own = tensors_of(self.model)
        averages = self.fp32_params if self.config.ema_fp32 else own
        for name, weight in tensors_of(new_model).items():
            average = averages[name]
            if average.is_floating_point():
                average.lerp_(weight.to(average.dtype), 1 - self.decay)
            else:
                average.copy_(weight)
            if self.config.ema_fp32:
                own[name].copy_(average)

    def build_fp32_params(self, state_dict: dict[str, Tensor] | None = None) -> None:
        """Keep the averages in single precision, too (--ema-fp32): those of the model, or the given ones."""
        super().build_fp32_params(tensors_of(self.model) if state_dict is None else state_dict)


def build_ema(model: nn.Module, cfg: Any, device: torch.device) -> AveragedModel:
    """Return the average that starts from the weights of `model`, or from those of --ema-seed-model."""
    return AveragedModel(model, cfg, device)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's parameters and buffers, each once, whatever its names, by the first of them."""
    return {name: tensor.detach() for name, tensor in chain(model.named_parameters(), model.named_buffers())}
