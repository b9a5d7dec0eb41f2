"""The exponential moving average of a model's weights, for fairseq's option --store-ema."""

from __future__ import annotations

import copy
from functools import partial
from itertools import chain
from typing import Any

import torch
from fairseq.models.ema import EMA
from torch import Tensor, nn

from narvl_plugin.models.inference import multiply_in


class AveragedModel(EMA):
    """A copy of a model whose weights and batch-norm statistics follow the model's: average += (1 - decay) * gap.

    fairseq's own average uses the names in the state. It moves the embedding three times, once for each name. It fails
    on the batch norms' counts of batches, which are integers; this class copies them. Frozen weights stay equal bit by
    bit.

    The averages are always in float32, because a step is too small to change averages in half precision. With --fp16
    and --bf16, the averaged model still multiplies in the training's precision, by autocast.
    """

    def __init__(self, model: nn.Module, config: Any, device: torch.device | None = None) -> None:
        super().__init__(copy.deepcopy(model).float(), config, device)
        dtype = next(model.parameters()).dtype
        if dtype in (torch.float16, torch.bfloat16):
            place = next(self.model.parameters()).device.type
            for part in (self.model, *self.model.children()):  # searches call encoder and decoder, losses the model
                part.forward = partial(multiply_in, dtype, place, part.forward)

    @torch.no_grad()
    def _step_internal(self, new_model: nn.Module, updates: int | None = None) -> None:
        """Move the averages towards the model's weights."""
        averages = tensors_of(self.model)
        for name, weight in tensors_of(new_model).items():
            if weight.is_floating_point():
                averages[name].lerp_(weight.float(), 1 - self.decay)
            else:
                averages[name].copy_(weight)

    def build_fp32_params(self, state_dict: dict[str, Tensor] | None = None) -> None:
        """Provide the averages by name, as --ema-fp32 does, and restore those that are given, in float32."""
        self.fp32_params = tensors_of(self.model)
        for name, average in self.fp32_params.items():
            if state_dict is not None and name in state_dict:
                average.copy_(state_dict[name])


def build_ema(model: nn.Module, cfg: Any, device: torch.device) -> AveragedModel:
    """Return the averaged model. It starts from the weights of `model`, or from those of --ema-seed-model."""
    return AveragedModel(model, cfg, device)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's parameters and buffers by name. Each appears once, under its first name."""
    return {name: tensor.detach() for name, tensor in chain(model.named_parameters(), model.named_buffers())}
