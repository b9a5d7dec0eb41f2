"""A student as one static graph: pictures and prompts in, tokens and their probabilities out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from narvl_plugin.models.inference import Fixed
from narvl_plugin.models.narvl import NarvlModel
from narvl_plugin.models.vision import STRIDE


class StudentGraph(nn.Module):
    """A student with the collapse of its most probable path, in which nothing depends on the numbers but numbers.

    The student is changed: it is optimised for inference, and what only follows from its weights is fixed to one shape.

    Args:
        student: in evaluation mode.
        side: of the pictures, in pixels.
        length: tokens of a prompt, L.
        padded: whether prompts may end in padding.
        pad: its label.
    """

    def __init__(self, student: NarvlModel, *, side: int, length: int, padded: bool, pad: int) -> None:
        super().__init__()
        self.student = student
        self.blank, self.pad, self.temperature = student.blank, pad, student.temperature
        student.optimize_for_inference()
        encoder, decoder = student.encoder, student.decoder
        encoder.is_padded = padded
        with torch.no_grad():
            positions, biases = encoder._positions_and_biases(length, (side // STRIDE, side // STRIDE))
            encoder._kept = Fixed((positions, biases))
            self_biases, cross_bias = decoder.text_biases(student.num_queries, positions)
            decoder._kept = Fixed((self_biases, cross_bias))
            decoder._kept_start = Fixed(decoder._before_reading(student._rows(student.member), self_biases[0]))

    def forward(self, patch_images: Tensor, src_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Map pictures (B, 3, side, side) and prompts (B, L) to tokens and probabilities (B, N), padded."""
        logits, _ = self.student(src_tokens, patch_images=patch_images)
        probabilities, labels = (logits / self.temperature).softmax(-1).max(-1)
        before = torch.cat([torch.full_like(labels[:, :1], self.blank), labels[:, :-1]], 1)
        said = (labels != before) & (labels != self.blank)
        # The n-th label that is said goes to place n, all others to one place behind the last, which is cut off.
        queries = labels.shape[1]
        places = torch.where(said, said.long().cumsum(1) - 1, queries)
        return _put(labels, places, self.pad), _put(probabilities, places, 0)


def _put(values: Tensor, places: Tensor, empty: int) -> Tensor:
    """Put values (B, N) into places (B, N) from 0 to N, of which the last is cut off: (B, N)."""
    filled = values.new_full((values.shape[0], values.shape[1] + 1), empty)
    return filled.scatter(1, places, values)[:, :-1]
