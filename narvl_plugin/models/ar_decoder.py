"""The teacher's decoder: one token after another, with keys and values kept between steps."""

from typing import Any

import torch
from torch import Tensor

from .config import PADDING_INDEX
from .decoder import Decoder
from .encoder import EncoderOutput, samples_of
from .layers import LayerCache
from .positions import code_position_ids, image_buckets, relative_bias
from .vision import STRIDE

_STATE = "ofa_decoder"
_BIAS_BLOCK = 32
"""Positions for which a decoding run computes its biases at a time."""


class AutoregressiveDecoder(Decoder):
    """Causal decoder over previous output tokens.

    Legend: B batch, T target positions, S source positions, D width, H heads, V vocabulary.
    """

    def forward(
        self,
        prev_output_tokens: Tensor,
        encoder_out: EncoderOutput,
        code_masks: Tensor | None = None,
        incremental_state: dict[str, Any] | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Return logits (B, T, V) and what `run_layers` adds.

        `prev_output_tokens` is (B, T), right-padded. `code_masks` (B,) is True for samples whose output is an
        image, as codes. With an `incremental_state` only the last token is run and logits are (B, 1, V).
        """
        if incremental_state is not None:
            return self._step(prev_output_tokens, encoder_out, incremental_state)
        length = prev_output_tokens.shape[1]
        embedded = self.embed_tokens(prev_output_tokens)
        x = self.layernorm_embedding(embedded)
        self_biases, cross_bias = self.text_biases(length, encoder_out.positions)
        if code_masks is not None and bool(code_masks.any()):
            is_code = code_masks[:, None, None, None]
            x = torch.where(is_code[..., 0], self.code_layernorm_embedding(embedded), x)
            code_biases, code_cross_bias = self._code_biases(length, encoder_out)
            self_biases = [
                torch.where(is_code, code, text) for code, text in zip(code_biases, self_biases, strict=True)
            ]
            cross_bias = torch.where(is_code, code_cross_bias, cross_bias)
        # Also where nothing is padded, which a GPU would have to be asked.
        padding = prev_output_tokens.eq(PADDING_INDEX)
        self_biases = [bias.masked_fill(padding[:, None, None, :], float("-inf")) for bias in self_biases]
        return self.run_layers(self.dropout(x), encoder_out, self_biases, cross_bias)

    def reorder_incremental_state_scripting(self, incremental_state: dict[str, Any], new_order: Tensor) -> None:
        """Make the kept keys and values follow the beams, new_order (B',); called by fairseq's beam search."""
        if _STATE not in incremental_state:
            return
        caches: list[LayerCache] = incremental_state[_STATE]["caches"]
        rows, samples = len(caches[0]["self_keys"]), len(caches[0]["cross_keys"])
        chosen, _ = samples_of(new_order, rows // samples)
        for cache in caches:
            cache["self_keys"] = cache["self_keys"].index_select(0, new_order)
            cache["self_values"] = cache["self_values"].index_select(0, new_order)
            # Beams move within a sentence and share its source, so unless sentences finish and leave the batch, the
            # large cross-attention tensors are already in place.
            if len(chosen) != samples:
                cache["cross_keys"] = cache["cross_keys"].index_select(0, chosen)
                cache["cross_values"] = cache["cross_values"].index_select(0, chosen)

    def _step(
        self, tokens: Tensor, encoder_out: EncoderOutput, incremental_state: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Any]]:
        state = incremental_state.setdefault(_STATE, {"caches": [{} for _ in self.layers], "biases": ([], None)})
        caches: list[LayerCache] = state["caches"]
        last = tokens.shape[1] - 1
        if not state["biases"][0] or last >= state["biases"][0][0].shape[-1]:
            block = (last // _BIAS_BLOCK + 1) * _BIAS_BLOCK
            state["biases"] = self.text_biases(block, encoder_out.positions)
        self_biases, cross_bias = state["biases"]
        self_biases = [bias[..., last : last + 1, : last + 1] for bias in self_biases]
        x = self.layernorm_embedding(self.embed_tokens(tokens[:, -1:]))
        return self.run_layers(x, encoder_out, self_biases, cross_bias[..., last : last + 1, :], caches)

    def self_biases(self, positions: Tensor) -> list[Tensor]:
        """Return each layer's causal self-attention bias for text at `positions` (T, D): (1, H, T, T)."""
        return [causal(bias) for bias in super().self_biases(positions)]

    def _code_biases(self, length: int, encoder_out: EncoderOutput) -> tuple[list[Tensor], Tensor]:
        """Return the same for an output that is an image given as codes."""
        bucket_size = self.cfg.image_bucket_size
        grid = self.cfg.code_image_size * 2 // STRIDE
        ids = code_position_ids(grid, length, bucket_size=bucket_size, device=self.embed_image_positions.weight.device)
        positions = self.image_pos_ln(self.embed_image_positions(ids))
        absolute = self._absolute(positions, positions, self.self_pos_q_linear, self.self_pos_k_linear)
        buckets = image_buckets(ids, bucket_size=bucket_size)
        self_biases = [causal(absolute + relative_bias(t, buckets)) for t in self.image_rel_pos_table_list]
        return self_biases, self.cross_bias(positions, encoder_out.positions)


def causal(bias: Tensor) -> Tensor:
    """Add -inf to the scores of later positions: (1, H, T, T) -> (1, H, T, T)."""
    length = bias.shape[-1]
    later = torch.ones(length, length, dtype=torch.bool, device=bias.device).triu(1)
    return bias.masked_fill(later, float("-inf"))
