"""A fix for mixed precision."""

import logging
from typing import Any

import torch
from fairseq.optim.amp_optimizer import AMPOptimizer

logger = logging.getLogger(__name__)


def unscale_gradients_once() -> None:
    """Let --amp divide gradients by the loss scale only once.

    Fixes `AMPOptimizer.clip_grad_norm(1.0)` before `AMPOptimizer.step()`. The first unscales under torch's optimizer,
    the second steps under fairseq's. So torch's GradScaler unscales again, and Adam receives gradients that are too
    small by the factor of the scale.

    Without a scaler, as on a CPU, a gradient that is not finite would raise AttributeError. Here it raises the error
    that fairseq raises in float32.
    """

    def clip_grad_norm(self: AMPOptimizer, max_norm: float, aggregate_norm_fn: Any = None) -> torch.Tensor:
        self.scaler.unscale_(self.fp32_optimizer)
        grad_norm: torch.Tensor = self.fp32_optimizer.clip_grad_norm(max_norm, aggregate_norm_fn)
        if not torch.isfinite(grad_norm).all():
            if not self.scaler.is_enabled():
                raise FloatingPointError("gradients are Nan/Inf")
            if self.next_loss_scale <= self.min_loss_scale:
                raise FloatingPointError(
                    f"gradients are Nan/Inf, and the minimum loss scale is reached ({self.min_loss_scale}, "
                    "--min-loss-scale): the loss is probably exploding; lower the learning rate"
                )
            logger.info("a gradient overflowed; the loss scale is now %g", self.next_loss_scale)
        return grad_norm

    AMPOptimizer.clip_grad_norm = clip_grad_norm
