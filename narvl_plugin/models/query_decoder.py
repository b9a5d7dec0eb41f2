"""The parallel decoder: N learnable query tokens become N label distributions in one pass."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from .config import NarvlConfig
from .decoder import Decoder
from .encoder import EncoderOutput
from .layers import DecoderLayer
from .memo import FixedMemo, Memo, weights_of

ALL = slice(None)
"""The rows of all queries."""


class QueryDecoder(Decoder):
    """Decoder whose input is a learned embedding per query, and in which each query attends to all others.

    Legend: B batch, N queries, D width, V vocabulary with the blank.

    Attributes:
        query_embed: the embeddings of the queries.
        blank_row: (D,), the blank's row of a frozen embedding, which is trained; else None.
    """

    def __init__(self, cfg: NarvlConfig, embed_tokens: nn.Embedding):
        super().__init__(cfg, embed_tokens)
        self.query_embed = nn.Embedding(cfg.num_queries, cfg.encoder_embed_dim)
        self._start_memo: Memo[Tensor] = Memo(exact=True)
        self.blank_row: nn.Parameter | None = None
        if cfg.freeze_embedding:
            self._train_blank_row()

    def forward(
        self, prev_output_tokens: Tensor | None, encoder_out: EncoderOutput, rows: slice = ALL
    ) -> tuple[Tensor, dict[str, Any]]:
        """Return logits and the intermediate results of `run_layers`.

        Args:
            prev_output_tokens: not used.
            encoder_out: the encoder's output.
            rows: the N queries to use. The first one is at position 0.

        Returns:
            Logits (B, N, V) and a dictionary of intermediate results.
        """
        samples = encoder_out.features.shape[0]
        self_biases, cross_bias = self.text_biases(len(self.query_embed.weight[rows]), encoder_out.positions)
        first = cast(DecoderLayer, self.layers[0])
        if any(part.training for part in (self, self.dropout, first.self_attn, first.dropout, first.drop_path)):
            # Dropout differs from sample to sample.
            x = self.embed_queries(rows).expand(samples, -1, -1)
            return self.run_layers(x, encoder_out, self_biases, cross_bias)
        x = self._before_reading(rows, self_biases[0]).expand(samples, -1, -1)
        return self.run_layers(x, encoder_out, [None, *self_biases[1:]], cross_bias)

    def fix_shapes(self, rows: slice, source_positions: Tensor) -> None:
        """Fix the biases of the queries in `rows`, and what they are before reading, for one source, in place.

        Args:
            rows: of the table of queries.
            source_positions: (S, D), of the encoder.
        """
        self_biases, cross_bias = self.text_biases(len(self.query_embed.weight[rows]), source_positions)
        self._start_memo = FixedMemo(self._before_reading(rows, self_biases[0]))
        self._memo = FixedMemo((self_biases, cross_bias))

    def embed_queries(self, rows: slice) -> Tensor:
        """Return the input of the first layer, (1, N, D)."""
        return self.dropout(self.layernorm_embedding(self.query_embed.weight[rows]))[None]

    def _before_reading(self, rows: slice, bias: Tensor) -> Tensor:
        """Return the first layer's output of self-attention, (1, N, D). It is cached, being equal for all samples."""
        layer = cast(DecoderLayer, self.layers[0])
        modules = [
            *(self.query_embed, self.layernorm_embedding),
            *(layer.self_attn_layer_norm, layer.self_attn, layer.self_attn_ln),
        ]
        return self._start_memo.get(
            (rows.start, rows.stop),
            [bias, *weights_of(modules)],
            lambda: layer.attend_to_outputs(self.embed_queries(rows), bias),
        )

    def project(self, x: Tensor) -> Tensor:
        """Return logits (B, N, V) of normalised features (B, N, D)."""
        logits = super().project(x)
        if self.blank_row is None:
            return logits
        return torch.cat([logits[..., :-1], (x @ self.blank_row)[..., None]], dim=-1)

    def _train_blank_row(self) -> None:
        """Make the blank's row of a frozen embedding a separate parameter. Checkpoints store it in the embedding."""
        self.blank_row = nn.Parameter(self.embed_tokens.weight[-1].detach().clone())

        def put_into_embedding(decoder: "QueryDecoder", prefix: str, keep_vars: bool) -> None:
            with torch.no_grad():
                decoder.embed_tokens.weight[-1] = decoder.get_parameter("blank_row")

        def leave_out(decoder: nn.Module, state: dict[str, Tensor], prefix: str, metadata: dict[str, Any]) -> None:
            del state[f"{prefix}blank_row"]

        def take_from_embedding(decoder: nn.Module, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
            state[f"{prefix}blank_row"] = state[f"{prefix}embed_tokens.weight"][-1]

        self.register_state_dict_pre_hook(put_into_embedding)
        self.register_state_dict_post_hook(leave_out)
        self.register_load_state_dict_pre_hook(take_from_embedding)
