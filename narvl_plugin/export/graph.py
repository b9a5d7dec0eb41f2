"""A student as one static graph: images and prompts in, log-probabilities out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from narvl_plugin.models.narvl import NarvlModel


class StudentGraph(nn.Module):
    """A student whose graph does not depend on the values of its inputs.

    The student is changed: it is optimised for inference, and values that depend on its weights alone are fixed to one
    shape.

    Args:
        student: the student, in evaluation mode.
        side: the side of the images in pixels.
        length: the number of tokens of a prompt, L.
        padded: whether prompts may end in padding.
    """

    def __init__(self, student: NarvlModel, *, side: int, length: int, padded: bool) -> None:
        super().__init__()
        self.student, self.temperature = student, student.temperature
        student.optimize_for_inference()
        student.fix_shapes(side=side, length=length, padded=padded)

    def forward(self, patch_images: Tensor, src_tokens: Tensor) -> Tensor:
        """Return the log-probabilities of the labels.

        Args:
            patch_images: (B, 3, side, side).
            src_tokens: (B, L).

        Returns:
            (B, N, V).
        """
        logits, _ = self.student(src_tokens, patch_images=patch_images)
        return torch.log_softmax(logits.float() / self.temperature, dim=-1)
