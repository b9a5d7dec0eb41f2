"""A student as one static graph: images and prompts in, log-probabilities out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from narvl_plugin.models.inference import Fixed
from narvl_plugin.models.narvl import NarvlModel
from narvl_plugin.models.vision import trunk_features


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
        encoder, decoder = student.encoder, student.decoder
        encoder.is_padded = padded
        with torch.no_grad():
            rows, columns = trunk_features(encoder.embed_images, torch.zeros(1, 3, side, side)).shape[2:]
            positions, biases = encoder._positions_and_biases(length, (rows, columns))
            encoder._kept = Fixed((positions, biases))
            self_biases, cross_bias = decoder.text_biases(student.num_queries, positions)
            decoder._kept = Fixed((self_biases, cross_bias))
            decoder._kept_start = Fixed(decoder._before_reading(student._rows(student.member), self_biases[0]))

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
