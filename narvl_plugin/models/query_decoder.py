"""The parallel decoder: N learnable query tokens become N label distributions in one pass."""

from typing import Any

from torch import Tensor, nn

from .config import NarvlConfig
from .decoder import Decoder
from .encoder import EncoderOutput


class QueryDecoder(Decoder):
    """Decoder whose input is a learned embedding for each query, and where each query sees every other.

    Legend: B batch, N queries, D width, V vocabulary with the blank.
    """

    def __init__(self, cfg: NarvlConfig, embed_tokens: nn.Embedding):
        super().__init__(cfg, embed_tokens)
        self.query_embed = nn.Embedding(cfg.num_queries, cfg.encoder_embed_dim)

    def forward(self, prev_output_tokens: Tensor | None, encoder_out: EncoderOutput) -> tuple[Tensor, dict[str, Any]]:
        """Return logits (B, N, V) and what `run_layers` adds; `prev_output_tokens` is accepted and ignored."""
        positions = self.text_positions(self.query_embed.num_embeddings)
        x = self.dropout(self.layernorm_embedding(self.query_embed.weight))
        x = x.expand(len(encoder_out.features), -1, -1)
        cross_bias = self.cross_bias(positions, encoder_out.positions)
        return self.run_layers(x, encoder_out, self.self_biases(positions), cross_bias)
