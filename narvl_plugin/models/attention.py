"""Multi-head attention with an additive position bias and one learned scale per head."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def score_scaling(width: int, heads: int, scale_factor: float) -> float:
    """Return the scale of queries, for contents and for positions: (factor * head width)^-0.5."""
    return (width / heads * scale_factor) ** -0.5


class Attention(nn.Module):
    """Attention of OFA: scores are scaled by (factor * head width)^-0.5 and biased by positions, and heads are scaled.

    Legend: B batch, H heads, Lq queries, Lk keys, D width.

    Attributes:
        heads: H.
        scaling: the scale of queries.
        dropout: the dropout of attention weights in training.
        c_attn: (H,), the learned scale of each head.
    """

    def __init__(self, width: int, heads: int, *, scale_factor: float, dropout: float):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not divisible by {heads} attention heads")
        self.heads = heads
        self.scaling = score_scaling(width, heads, scale_factor)
        self.dropout = dropout
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)
        self.c_attn = nn.Parameter(torch.ones(heads))

    def forward(self, x: Tensor, memory: Tensor, bias: Tensor) -> Tensor:
        """Attend from queries to a memory.

        If few queries read a long memory, they are projected to the memory's width, head by head. This takes less
        arithmetic than projecting the memory to keys and values. (The bias of the key projection adds a constant to
        all scores of a query, which the softmax removes.)

        Args:
            x: (B, Lq, D).
            memory: (B, Lk, D).
            bias: broadcastable to (B, H, Lq, Lk). It holds positions and masks (-inf) and is added to the scores.

        Returns:
            (B, Lq, D).
        """
        width = memory.shape[2]
        if 2 * x.shape[1] * self.heads > width or (self.training and self.dropout > 0):
            return self.attend(x, *self.project_keys(memory), bias)
        asked = self._split(self.q_proj(x)) * self.scaling @ self.k_proj.weight.view(self.heads, -1, width)
        scores = asked.flatten(1, 2) @ memory.transpose(1, 2)  # (B, H Lq, Lk)
        weights = (scores.unflatten(1, (self.heads, -1)) + bias).softmax(-1)
        read = (weights.flatten(1, 2) @ memory).unflatten(1, (self.heads, -1))  # (B, H, Lq, D)
        attended = read @ self.v_proj.weight.view(self.heads, -1, width).transpose(1, 2)
        return self._join(attended + self.v_proj.bias.view(self.heads, 1, -1))

    def project_keys(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and the values of a memory (B, Lk, D), each (B, H, Lk, D / H)."""
        return self._split(self.k_proj(memory)), self._split(self.v_proj(memory))

    def attend(self, x: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        """Attend from queries to projected keys and values.

        Args:
            x: (B, Lq, D).
            keys: (B, H, Lk, D / H).
            values: (B, H, Lk, D / H).
            bias: broadcastable to (B, H, Lq, Lk), see `forward`.

        Returns:
            (B, Lq, D).
        """
        attended = F.scaled_dot_product_attention(
            self._split(self.q_proj(x)),
            keys,
            values,
            attn_mask=bias,
            dropout_p=self.dropout if self.training else 0.0,
            scale=self.scaling,
        )
        return self._join(attended)

    def _join(self, attended: Tensor) -> Tensor:
        """Scale and join heads: (B, H, Lq, D / H) -> (B, Lq, D)."""
        attended = attended * self.c_attn[:, None, None]
        return self.out_proj(attended.transpose(1, 2).flatten(2))

    def weights(self, x: Tensor, memory: Tensor, bias: Tensor) -> Tensor:
        """Return the attention weights; the arguments are those of `forward`.

        Args:
            x: (B, Lq, D).
            memory: (B, Lk, D).
            bias: broadcastable to (B, H, Lq, Lk).

        Returns:
            (B, H, Lq, Lk), which sums to 1 over the keys.
        """
        keys, _ = self.project_keys(memory)
        scores = self._split(self.q_proj(x)) @ keys.transpose(-2, -1) * self.scaling + bias
        return scores.softmax(-1)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
