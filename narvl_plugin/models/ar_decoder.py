"""The teacher's decoder, which predicts one token after another and caches keys and values between steps."""

from typing import Any

import torch
from torch import Tensor

from .captured import Graphs
from .config import PADDING_INDEX
from .decoder import Decoder
from .encoder import EncoderOutput, samples_of
from .layers import LayerCache
from .positions import code_position_ids, image_buckets, relative_bias
from .vision import STRIDE

_STATE = "ofa_decoder"
_BIAS_BLOCK = 32
"""Number of positions whose biases a search computes at once."""


class AutoregressiveDecoder(Decoder):
    """Causal decoder over previous output tokens.

    Legend: B rows, T target positions, S source positions, D width, H heads, V vocabulary.

    Attributes:
        graphs: the CUDA graphs of a model that is optimised for inference, which record the steps of a search.
    """

    graphs: Graphs | None = None

    def forward(
        self,
        prev_output_tokens: Tensor,
        encoder_out: EncoderOutput,
        code_masks: Tensor | None = None,
        incremental_state: dict[str, Any] | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Return logits and the intermediate results of `run_layers`.

        Args:
            prev_output_tokens: (B, T), right-padded.
            encoder_out: the encoder's output.
            code_masks: (B,), True for rows whose output is an image given as codes.
            incremental_state: the cache of a search, updated in place. If given, only the last token is decoded.

        Returns:
            Logits (B, T, V) and a dictionary of intermediate results. With an incremental state, logits (B, 1, V) and a
            dictionary of `attn` (None) alone.
        """
        if incremental_state is not None:
            return self._step(prev_output_tokens, encoder_out, incremental_state), {"attn": None}
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
        # The mask is added even if nothing is padded: to find out, the program would have to wait for a GPU.
        padding = prev_output_tokens.eq(PADDING_INDEX)
        self_biases = [bias.masked_fill(padding[:, None, None, :], float("-inf")) for bias in self_biases]
        return self.run_layers(self.dropout(x), encoder_out, self_biases, cross_bias)

    def reorder_incremental_state_scripting(self, incremental_state: dict[str, Any], new_order: Tensor) -> None:
        """Reorder the cached keys and values as beams are reordered. fairseq's beam search calls this.

        Args:
            incremental_state: the cache of the search, updated in place.
            new_order: (B',), the previous row of each row.
        """
        if _STATE not in incremental_state:
            return
        caches: list[LayerCache] = incremental_state[_STATE]["caches"]
        rows, samples = len(caches[0]["self_keys"]), len(caches[0]["cross_keys"])
        chosen, _ = samples_of(new_order, rows // samples)
        for cache in caches:
            cache["self_keys"] = cache["self_keys"].index_select(0, new_order)
            cache["self_values"] = cache["self_values"].index_select(0, new_order)
            # The beams of a sentence share its source. The large cross-attention tensors therefore stay as they are
            # unless sentences finish and leave the batch.
            if len(chosen) != samples:
                cache["cross_keys"] = cache["cross_keys"].index_select(0, chosen)
                cache["cross_values"] = cache["cross_values"].index_select(0, chosen)

    def _step(self, tokens: Tensor, encoder_out: EncoderOutput, incremental_state: dict[str, Any]) -> Tensor:
        """Return the logits (B, 1, V) of the next token, and add the keys and values of the last one to the cache."""
        state = incremental_state.setdefault(_STATE, {"caches": [{} for _ in self.layers], "biases": ([], None)})
        last = tokens.shape[1] - 1
        if not state["biases"][0] or last >= state["biases"][0][0].shape[-1]:
            block = (last // _BIAS_BLOCK + 1) * _BIAS_BLOCK
            state["biases"] = self.text_biases(block, encoder_out.positions)
        self_biases, cross_bias = state["biases"]
        step = {
            "token": tokens[:, -1:],
            "encoder_out": encoder_out,
            "self_biases": [bias[..., last : last + 1, : last + 1] for bias in self_biases],
            "cross_bias": cross_bias[..., last : last + 1, :],
            "caches": state["caches"],
        }
        run = self._run_step
        logits, state["caches"] = run(**step) if self.graphs is None else self.graphs.run(self, "step", run, step)
        return logits

    def _run_step(
        self,
        token: Tensor,
        encoder_out: EncoderOutput,
        self_biases: list[Tensor],
        cross_bias: Tensor,
        caches: list[LayerCache],
    ) -> tuple[Tensor, list[LayerCache]]:
        """Return logits and new caches, for the last token (B, 1) and its position's biases."""
        caches = [cache.copy() for cache in caches]
        x = self.layernorm_embedding(self.embed_tokens(token))
        logits, _ = self.run_layers(x, encoder_out, self_biases, cross_bias, caches)
        return logits, caches

    def self_biases(self, positions: Tensor) -> list[Tensor]:
        """Return the causal self-attention bias of each layer, for text.

        Args:
            positions: (T, D), position embeddings.

        Returns:
            (1, H, T, T) per layer.
        """
        return [causal(bias) for bias in super().self_biases(positions)]

    def _code_biases(self, length: int, encoder_out: EncoderOutput) -> tuple[list[Tensor], Tensor]:
        """Return the biases of `text_biases` for an output that is an image given as codes."""
        bucket_size = self.cfg.image_bucket_size
        grid = self.cfg.code_image_size * 2 // STRIDE
        ids = code_position_ids(grid, length, bucket_size=bucket_size, device=self.embed_image_positions.weight.device)
        positions = self.image_pos_ln(self.embed_image_positions(ids))
        absolute = self._absolute(positions, positions, self.self_pos_q_linear, self.self_pos_k_linear)
        buckets = image_buckets(ids, bucket_size=bucket_size)
        self_biases = [causal(absolute + relative_bias(t, buckets)) for t in self.image_rel_pos_table_list]
        return self_biases, self.cross_bias(positions, encoder_out.positions)


def causal(bias: Tensor) -> Tensor:
    """Set the scores of later positions to -inf.

    Args:
        bias: (1, H, T, T).

    Returns:
        (1, H, T, T).
    """
    length = bias.shape[-1]
    later = torch.ones(length, length, dtype=torch.bool, device=bias.device).triu(1)
    return bias.masked_fill(later, float("-inf"))
