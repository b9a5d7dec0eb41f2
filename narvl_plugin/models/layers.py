"""Transformer layers of encoder and decoder: pre-norm, with norms after each attention and inside the FFN."""

from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from narvl_plugin.importing import without_compiler

from .attention import Attention
from .config import OfaConfig

with without_compiler():
    from timm.layers import DropPath


class LayerCache(TypedDict, total=False):
    """Projected keys and values of one decoder layer, cached between decoding steps.

    Each tensor is (B, H, L, D / H). Those of the source have a single row for all beams of a sample.

    Attributes:
        self_keys: keys of the tokens so far.
        self_values: values of the tokens so far.
        cross_keys: keys of the source.
        cross_values: values of the source.
    """

    self_keys: Tensor
    self_values: Tensor
    cross_keys: Tensor
    cross_values: Tensor


class _Layer(nn.Module):
    """Base of encoder and decoder layers: the feed-forward block, dropout and drop-path."""

    def __init__(self, cfg: OfaConfig, drop_path: float):
        super().__init__()
        width, inner = cfg.encoder_embed_dim, cfg.encoder_ffn_embed_dim
        self.self_attn = _attention(cfg)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, inner)
        self.ffn_layernorm = nn.LayerNorm(inner)
        self.fc2 = nn.Linear(inner, width)
        self.final_layer_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(cfg.dropout)
        self.activation_dropout = nn.Dropout(cfg.activation_dropout)
        self.drop_path = DropPath(drop_path)
        self.checkpoint_activations = cfg.checkpoint_activations

    def __call__(self, *inputs: Any, **cache: Any) -> Any:
        """Run the layer. With --checkpoint-activations, only its inputs are kept for the backward pass."""
        run = super().__call__
        if self.checkpoint_activations and self.training and torch.is_grad_enabled() and not cache:
            return checkpoint(run, *inputs, use_reentrant=False)
        return run(*inputs, **cache)

    def _residual(self, x: Tensor, update: Tensor) -> Tensor:
        return x + self.drop_path(self.dropout(update))

    def _feed_forward(self, x: Tensor) -> Tensor:
        hidden = self.activation_dropout(F.gelu(self.fc1(self.final_layer_norm(x))))
        return self._residual(x, self.fc2(self.ffn_layernorm(hidden)))


class EncoderLayer(_Layer):
    """Self-attention and feed-forward block over (B, S, D)."""

    def __init__(self, cfg: OfaConfig, drop_path: float):
        super().__init__(cfg, drop_path)
        self.attn_ln = nn.LayerNorm(cfg.encoder_embed_dim)

    def forward(self, x: Tensor, bias: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Run self-attention and the feed-forward block.

        Args:
            x: (B, S, D).
            bias: broadcastable to (B, H, S, S), added to the scores.
            padding_mask: (B, S), True at padding.

        Returns:
            (B, S, D).
        """
        bias = mask_keys(bias, padding_mask)  # inside the layer: a checkpoint then keeps no (B, H, S, S) tensor
        normed = self.self_attn_layer_norm(x)
        attended = self.self_attn(normed, normed, bias)
        x = self._residual(x, self.attn_ln(attended))
        return self._feed_forward(x)


class DecoderLayer(_Layer):
    """Self-attention, cross-attention to the encoder, and feed-forward block over (B, T, D)."""

    def __init__(self, cfg: OfaConfig, drop_path: float):
        super().__init__(cfg, drop_path)
        width = cfg.encoder_embed_dim
        self.self_attn_ln = nn.LayerNorm(width)
        self.encoder_attn = _attention(cfg)
        self.encoder_attn_layer_norm = nn.LayerNorm(width)
        self.cross_attn_ln = nn.LayerNorm(width)

    def forward(
        self, x: Tensor, memory: Tensor, self_bias: Tensor | None, cross_bias: Tensor, cache: LayerCache | None = None
    ) -> Tensor:
        """Run self-attention, cross-attention and the feed-forward block.

        Args:
            x: (B, T, D).
            memory: (M, S, D), the source. B / M consecutive rows of x read each sample.
            self_bias: broadcastable to (B, H, T, T), see `attend_to_outputs`. None if x is the output of
                `attend_to_outputs`.
            cross_bias: broadcastable to (M, H, B / M * T, S).
            cache: keys and values of earlier steps, updated in place.

        Returns:
            (B, T, D).
        """
        if self_bias is not None:
            x = self.attend_to_outputs(x, self_bias, cache)
        normed = self.encoder_attn_layer_norm(x)
        queries = normed.reshape(memory.shape[0], -1, normed.shape[2])
        if cache is None:
            attended = self.encoder_attn(queries, memory, cross_bias)
        else:
            if "cross_keys" not in cache:
                cache["cross_keys"], cache["cross_values"] = self.encoder_attn.project_keys(memory)
            attended = self.encoder_attn.attend(queries, cache["cross_keys"], cache["cross_values"], cross_bias)
        x = self._residual(x, self.cross_attn_ln(attended.view_as(x)))
        return self._feed_forward(x)

    def attend_to_outputs(self, x: Tensor, bias: Tensor, cache: LayerCache | None = None) -> Tensor:
        """Run the first third of the layer: self-attention with its residual connection.

        Args:
            x: (B, T, D).
            bias: broadcastable to (B, H, T, T), or with a cache to (B, H, 1, tokens so far).
            cache: keys and values of earlier steps, updated in place by those of x.

        Returns:
            (B, T, D).
        """
        normed = self.self_attn_layer_norm(x)
        keys, values = self.self_attn.project_keys(normed)
        if cache is not None:
            if "self_keys" in cache:
                keys = torch.cat([cache["self_keys"], keys], dim=2)
                values = torch.cat([cache["self_values"], values], dim=2)
            cache["self_keys"], cache["self_values"] = keys, values
        return self._residual(x, self.self_attn_ln(self.self_attn.attend(normed, keys, values, bias)))


def mask_keys(bias: Tensor, padding_mask: Tensor | None) -> Tensor:
    """Set the scores of padded keys to -inf.

    Args:
        bias: (1, H, Lq, Lk).
        padding_mask: (B, Lk), True at padding, or None if nothing is padded.

    Returns:
        (B, H, Lq, Lk), or the unchanged bias without a mask.
    """
    if padding_mask is None:
        return bias
    return bias.masked_fill(padding_mask[:, None, None, :], float("-inf"))


def _attention(cfg: OfaConfig) -> Attention:
    return Attention(
        cfg.encoder_embed_dim,
        cfg.encoder_attention_heads,
        scale_factor=cfg.attn_scale_factor,
        dropout=cfg.attention_dropout,
    )
