"""The optimizer `fused_adam`: fairseq's Adam, in one pass over memory for each update."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from fairseq.optim import FairseqOptimizer, register_optimizer
from fairseq.optim.adam import FairseqAdam, FairseqAdamConfig


class _FusedAdamW(torch.optim.AdamW):
    """AdamW by torch's fused kernel, with epsilon added before the bias correction, as in fairseq."""

    supports_flat_params = True

    def step(self, closure: Any = None) -> Any:
        """Update the weights by their gradients; return the result of `closure`."""
        epsilons = [group["eps"] for group in self.param_groups]
        for group in self.param_groups:
            # Counted here: torch's counts are tensors, so reading them would synchronise with a GPU.
            group["updates"] = group.get("updates", 0) + 1
            group["eps"] /= math.sqrt(1 - group["betas"][1] ** group["updates"])
        result = super().step(closure)
        for group, epsilon in zip(self.param_groups, epsilons, strict=True):
            group["eps"] = epsilon
        return result


@register_optimizer("fused_adam", dataclass=FairseqAdamConfig)
class FusedAdam(FairseqAdam):
    """Adam with decoupled weight decay. It has the options of fairseq's `adam`, and its results up to rounding."""

    def __init__(self, cfg: FairseqAdamConfig, params: Iterable[torch.nn.Parameter]) -> None:
        FairseqOptimizer.__init__(self, cfg)
        self._optimizer = _FusedAdamW(params, fused=True, **self.optimizer_config)
