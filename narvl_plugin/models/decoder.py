"""The base of the autoregressive and the parallel decoder: weights, position biases, layers, projection."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .attention import score_scaling
from .config import OfaConfig
from .encoder import EncoderOutput
from .layers import DecoderLayer, LayerCache, mask_keys
from .memo import Memo, weights_of
from .positions import absolute_bias, num_image_buckets, relative_bias, token_buckets


class Decoder(nn.Module):
    """Transformer decoder that attends to the encoder's output. Subclasses define its input.

    Legend: B rows, T decoder positions, S source positions, D width, H heads, V vocabulary.

    Attributes:
        cfg: the configuration.
        heads: H.
        position_scaling: the scale of projected positions.
        embed_tokens: the embedding of all labels (V, D), shared with the encoder and the output projection.
        layers: the decoder layers.
    """

    def __init__(self, cfg: OfaConfig, embed_tokens: nn.Embedding):
        super().__init__()
        self.register_buffer("version", torch.tensor([3.0]))
        width = cfg.encoder_embed_dim
        self.cfg = cfg
        self.heads = cfg.encoder_attention_heads
        self.position_scaling = score_scaling(width, self.heads, cfg.attn_scale_factor)
        self.embed_tokens = embed_tokens
        self.layernorm_embedding = nn.LayerNorm(width)
        self.code_layernorm_embedding = nn.LayerNorm(width)
        self.dropout = nn.Dropout(cfg.dropout)

        self.embed_positions = nn.Embedding(cfg.max_positions + 2, width)
        self.embed_image_positions = nn.Embedding(cfg.image_bucket_size**2 + 1, width)
        self.pos_ln = nn.LayerNorm(width)
        self.image_pos_ln = nn.LayerNorm(width)
        self.self_pos_q_linear = nn.Linear(width, width)
        self.self_pos_k_linear = nn.Linear(width, width)
        self.cross_pos_q_linear = nn.Linear(width, width)
        self.cross_pos_k_linear = nn.Linear(width, width)
        self.token_rel_pos_table_list = nn.ModuleList(
            nn.Embedding(2 * cfg.token_bucket_size - 1, self.heads) for _ in range(cfg.decoder_layers)
        )
        self.image_rel_pos_table_list = nn.ModuleList(
            nn.Embedding(num_image_buckets(cfg.image_bucket_size), self.heads) for _ in range(cfg.decoder_layers)
        )

        drop_path = torch.linspace(0, cfg.decoder_drop_path_rate, cfg.decoder_layers, device="cpu").tolist()
        self.layers = nn.ModuleList(DecoderLayer(cfg, rate) for rate in drop_path)
        self.layer_norm = nn.LayerNorm(width)
        self.output_projection = nn.Linear(width, embed_tokens.num_embeddings, bias=False)
        self.output_projection.weight = embed_tokens.weight
        self._memo: Memo[tuple[list[Tensor], Tensor]] = Memo(exact=True)

    def max_positions(self) -> int:
        """Return the longest output, in tokens."""
        return self.cfg.max_positions

    def text_positions(self, length: int) -> Tensor:
        """Return the normalised position embeddings of the first `length` positions, (T, D)."""
        return self.pos_ln(self.embed_positions.weight[:length])

    def text_biases(self, length: int, source_positions: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the biases of a text. The last ones are cached.

        Args:
            length: T.
            source_positions: (S, D), position embeddings of the encoder.

        Returns:
            The self-attention bias of each layer, (1, H, T, T), and the cross-attention bias, (1, H, T, S).
        """

        def compute() -> tuple[list[Tensor], Tensor]:
            positions = self.text_positions(length)
            return self.self_biases(positions), self.cross_bias(positions, source_positions)

        modules = [
            *(self.embed_positions, self.pos_ln, self.self_pos_q_linear, self.self_pos_k_linear),
            *(self.cross_pos_q_linear, self.cross_pos_k_linear, self.token_rel_pos_table_list),
        ]
        return self._memo.get(length, [*weights_of(modules), source_positions], compute)

    def self_biases(self, positions: Tensor) -> list[Tensor]:
        """Return the self-attention bias of each layer, for text.

        Args:
            positions: (T, D), position embeddings.

        Returns:
            (1, H, T, T) per layer.
        """
        absolute = self._absolute(positions, positions, self.self_pos_q_linear, self.self_pos_k_linear)
        buckets = token_buckets(
            len(positions),
            bucket_size=self.cfg.token_bucket_size,
            max_positions=self.cfg.max_positions,
            device=positions.device,
        )
        return [absolute + relative_bias(table, buckets) for table in self.token_rel_pos_table_list]

    def cross_bias(self, positions: Tensor, source_positions: Tensor) -> Tensor:
        """Return the cross-attention bias, which all layers share: (T, D), (S, D) -> (1, H, T, S)."""
        return self._absolute(positions, source_positions, self.cross_pos_q_linear, self.cross_pos_k_linear)

    def run_layers(
        self,
        x: Tensor,
        encoder_out: EncoderOutput,
        self_biases: Sequence[Tensor | None],
        cross_bias: Tensor,
        caches: list[LayerCache] | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Run the layers over embedded input.

        Args:
            x: (B, T, D).
            encoder_out: the encoder's output for the B / copies samples that the rows read.
            self_biases: the self-attention bias of each layer, see `DecoderLayer.forward`.
            cross_bias: the cross-attention bias, see `DecoderLayer.forward`.
            caches: the cache of each layer, updated in place.

        Returns:
            Logits (B, T, V) and a dictionary with `encoder_out` (S, B, D), `encoder_padding_mask` (B, S) or None,
            `inner_states` (the output of each layer before the last norm, (T, B, D)) and `attn` (None).
        """
        cross_bias = mask_keys(cross_bias, encoder_out.padding_mask).repeat(1, 1, encoder_out.copies, 1)
        inner_states = []
        for i, layer in enumerate(self.layers):
            cache = {"cache": caches[i]} if caches else {}
            x = layer(x, encoder_out.features, self_biases[i], cross_bias, **cache)
            inner_states.append(x.transpose(0, 1))
        extra = {
            "encoder_out": encoder_out.features.transpose(0, 1),
            "encoder_padding_mask": encoder_out.padding_mask,
            "inner_states": inner_states,
            "attn": None,
        }
        return self.project(self.layer_norm(x)), extra

    def project(self, x: Tensor) -> Tensor:
        """Return logits (B, T, V) of normalised features (B, T, D)."""
        logits: Tensor = self.output_projection(x)
        return logits

    def _absolute(self, queries: Tensor, keys: Tensor, query: nn.Linear, key: nn.Linear) -> Tensor:
        return absolute_bias(queries, keys, query, key, heads=self.heads, scaling=self.position_scaling)
