"""The parallel decoder: N learnable query tokens become N label distributions in one pass."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from .config import NarvlConfig, check_value
from .decoder import Decoder
from .encoder import EncoderOutput
from .layers import DecoderLayer
from .memo import FixedMemo, Memo, weights_of

ALL = slice(None)
"""The rows of all queries."""


class QueryDecoder(Decoder):
    """Decoder whose input is a learned embedding per query, and in which each query attends to all others.

    For comparison, `query_input` of the configuration puts something else in the place of the embeddings: the
    embeddings of the queries' positions, or a uniform copy of the encoder's states. Plain CTC decodes such states.

    Legend: B batch, N queries, S source positions, D width, V vocabulary with the blank.

    Attributes:
        cfg: the configuration.
        query_embed: the embeddings of the queries.
        blank_row: (D,), the blank's row of a frozen embedding, which is trained; else None.
    """

    cfg: NarvlConfig

    def __init__(self, cfg: NarvlConfig, embed_tokens: nn.Embedding):
        super().__init__(cfg, embed_tokens)
        check_value("query_input", cfg.query_input, str)
        self.query_embed = nn.Embedding(cfg.num_queries, cfg.encoder_embed_dim)
        self.query_embed.requires_grad_(cfg.query_input == "learned")
        self._start_memo: Memo[Tensor] = Memo(exact=True)
        self.blank_row: nn.Parameter | None = None
        if cfg.freeze_embedding:
            self._train_blank_row()

    def forward(
        self,
        prev_output_tokens: Tensor | None,
        encoder_out: EncoderOutput,
        rows: slice = ALL,
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
        if self._copies_source:
            x = self.dropout(self.layernorm_embedding(uniform_copy(encoder_out, len(self.query_embed.weight[rows]))))
            return self.run_layers(x, encoder_out, self_biases, cross_bias)
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
        if not self._copies_source:
            self._start_memo = FixedMemo(self._before_reading(rows, self_biases[0]))
        self._memo = FixedMemo((self_biases, cross_bias))

    def embed_queries(self, rows: slice) -> Tensor:
        """Return the input of the first layer, (1, N, D), where it is the same for all samples."""
        return self.dropout(self.layernorm_embedding(self._input(rows)))[None]

    def _input(self, rows: slice) -> Tensor:
        """Return the embeddings of the queries or of their positions, (N, D)."""
        queries = self.query_embed.weight[rows]
        learned = self.cfg.query_input == "learned"
        return queries if learned else self.embed_positions.weight[: len(queries)]

    @property
    def _copies_source(self) -> bool:
        """Whether the input is a copy of the encoder's states."""
        return self.cfg.query_input == "source"

    def _before_reading(self, rows: slice, bias: Tensor) -> Tensor:
        """Return the first layer's output of self-attention, (1, N, D). It is cached, being equal for all samples."""
        layer = cast(DecoderLayer, self.layers[0])
        modules = [
            *(self.query_embed, self.embed_positions, self.layernorm_embedding),
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


def uniform_copy(encoder_out: EncoderOutput, number: int) -> Tensor:
    """Return evenly spread states of each source, (B, N, D). Padding is left out.

    Source: https://arxiv.org/abs/1711.02281, section 3.1

    Args:
        encoder_out: the encoder's output, with S source positions.
        number: N.
    """
    states, mask = encoder_out.features, encoder_out.padding_mask
    middles = (torch.arange(number, device=states.device) + 0.5) / number
    if mask is None:
        places = (middles * states.shape[1]).long().expand(len(states), -1)
    else:
        real = torch.argsort(mask.long(), dim=1, stable=True)  # positions that are no padding first, in order
        places = real.gather(1, (middles * (~mask).sum(1, keepdim=True)).long())
    return states.gather(1, places[..., None].expand(-1, -1, states.shape[-1]))
