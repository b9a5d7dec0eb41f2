"""Where a model looks for each token of an output.

Legend: B batch, N queries, T tokens of the output, S source: patches, then text, P patches, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from narvl_plugin.ctc import token_posteriors
from narvl_plugin.data.collate import Batch
from narvl_plugin.inference.predictor import Predictor
from narvl_plugin.models.narvl import NarvlModel


@torch.inference_mode()
def token_attention(predictor: Predictor, batch: Batch, tokens: Tensor) -> Tensor:
    """Return the attention to the image for each token of an output.

    It is the mean over all layers and heads. A student's is also the mean over its queries, weighted by the probability
    that the query predicts the token.

    Args:
        predictor: the model.
        batch: one row, on the device of the model.
        tokens: (T,), the output without `</s>`.

    Returns:
        (T, height, width), on the CPU; the patches of a square image.
    """
    model, net_input = predictor.model, batch["net_input"]
    if not len(tokens):
        return torch.empty(0, 0, 0)
    if isinstance(model, NarvlModel):
        return attention_of_tokens(*query_attention(model, batch), tokens, blank=model.blank)
    begin = batch.get("decoder_prompts", [tokens.new_tensor([predictor.task.target_dictionary.bos()])])[0]
    written = torch.cat([begin.cpu(), tokens.cpu()[:-1]])[None].to(net_input["src_tokens"].device)
    with cross_attention(model.decoder) as layers:
        model(**net_input | {"prev_output_tokens": written})
    return as_squares(to_patches(layers, net_input)[-len(tokens) :])  # without the prompt


@torch.inference_mode()
def query_attention(model: NarvlModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Run a student on one row.

    Args:
        model: the student.
        batch: one row, on its device.

    Returns:
        The log-probabilities of the labels, (1, N, V), and each query's attention to the image, (N, P), on the CPU.
    """
    with cross_attention(model.decoder) as layers:
        logits = model(**batch["net_input"])[0].float()
    return (logits / model.temperature).log_softmax(dim=-1).cpu(), to_patches(layers, batch["net_input"])


def attention_of_tokens(log_probs: Tensor, patches: Tensor, tokens: Tensor, *, blank: int) -> Tensor:
    """Return the attention for each token of a student's output.

    Args:
        log_probs: (1, N, V).
        patches: (N, P), the attention of each query.
        tokens: (T,), the output without `</s>`.
        blank: the label of the blank.

    Returns:
        (T, height, width).
    """
    answer, length = tokens[None].cpu(), torch.tensor([len(tokens)])
    shares = token_posteriors(log_probs, answer, length, blank=blank)[0]  # (T, N)
    return as_squares((shares / shares.sum(1, keepdim=True)) @ patches)


def to_patches(layers: Sequence[Tensor], net_input: Mapping[str, Any]) -> Tensor:
    """Return the mean attention to the image, without the text, of one row: layers of (1, H, N, S) -> (N, P)."""
    attention = torch.stack(list(layers)).mean((0, 2))[0].cpu()
    return attention[:, : attention.size(1) - net_input["src_tokens"].size(1)]


def as_squares(patches: Tensor) -> Tensor:
    """Return the patches of square images in rows: (T, P) -> (T, height, width)."""
    return patches.unflatten(1, (math.isqrt(patches.size(1)), -1))


@contextmanager
def cross_attention(decoder: Any) -> Iterator[list[Tensor]]:
    """Collect a decoder's attention to the source while it runs, layer by layer.

    Yields:
        The list that receives (B, H, N, S) of each layer; T in place of N of a teacher.
    """
    collected: list[Tensor] = []

    def keep(attention: Any, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        collected.append(attention.weights(*arguments))

    handles = [layer.encoder_attn.register_forward_hook(keep) for layer in decoder.layers]
    try:
        yield collected
    finally:
        for handle in handles:
            handle.remove()
