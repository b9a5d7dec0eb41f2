"""The teacher: OFA's autoregressive sequence-to-sequence model."""

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import _IncompatibleKeys

from .ar_decoder import AutoregressiveDecoder
from .config import PADDING_INDEX, OfaConfig
from .decoder import Decoder
from .encoder import OfaEncoder
from .inference import kept_values, multiply_in, on_kept_values, optimise_trunk, pack_linear_layers
from .interop import ORIGIN, Origin, Use, fit_state

logger = logging.getLogger(__name__)

COMPILED_FORMS = 64
"""How often torch.compile may compile a layer anew, for other shapes and arguments."""


class OfaModel(nn.Module):
    """Encoder over image and text, decoder over previous tokens (https://arxiv.org/abs/2202.03052).

    Legend: B batch, L source text, T target, V vocabulary.
    """

    encoder_class: type[OfaEncoder] = OfaEncoder
    decoder_class: type[Decoder] = AutoregressiveDecoder
    is_student = False
    """Whether the model predicts all tokens in one pass, with a blank as its last label."""
    extra_labels = 0
    """Labels that the model adds to the vocabulary of its task."""

    def __init__(self, cfg: OfaConfig, vocab_size: int):
        """Build the model with random weights for a vocabulary of `vocab_size` labels."""
        embed_tokens = nn.Embedding(vocab_size, cfg.encoder_embed_dim, padding_idx=PADDING_INDEX)
        super().__init__()
        self.encoder = self.encoder_class(cfg, embed_tokens)
        self.decoder = self.decoder_class(cfg, embed_tokens)
        self.cfg = cfg
        self.use: Use | None = None
        """What a task has the model for; weights that are loaded must be meant for it. None: not known."""
        initialise(self, linear_std=cfg.init_std, keep=self.encoder.embed_images if cfg.vision_pretrained else None)
        if cfg.freeze_resnet:
            self.encoder.embed_images.requires_grad_(False)
        if cfg.freeze_embedding:
            self.encoder.embed_tokens.requires_grad_(False)

    def load_state_dict(  # type: ignore[override]  # whether tensors are assigned follows from the model
        self, state_dict: Mapping[str, Tensor], strict: bool = True
    ) -> _IncompatibleKeys:
        """Load the weights of a checkpoint, ours or a foreign one, and log what is new, unused or reshaped.

        A model on the meta device takes the checkpoint's tensors themselves, another one copies them.
        Raises InputError for weights of another model (see `fit_state`) or use (see `Use`), whatever `strict` says.
        """
        weights = dict(state_dict)
        origin = weights.pop(ORIGIN, None)
        if self.use is not None and origin is not None:
            self.use.check(Origin.read(origin))
        allow = [name for name in self.cfg.allow_mismatch.split(",") if name]
        grow = self.use is None or self.use.training
        fitted, notes = fit_state(weights, self.state_dict(), allow=allow, grow=grow)
        for note in notes:
            logger.info(note)
        on_meta = self.encoder.embed_tokens.weight.is_meta
        result = nn.Module.load_state_dict(self, fitted, strict=True, assign=on_meta)
        self.decoder.output_projection.weight = self.encoder.embed_tokens.weight
        return result

    def optimize_for_inference(self) -> None:
        """Make the model faster, in place; outputs change by rounding only (1e-4 in float32).

        Batch norm is folded into the trunk's convolutions, pixels' channels are laid out last, and on a CPU the weights
        of large linear layers are kept a second time, as products read them. The model can then neither be trained nor
        saved. Its weights must not be written any more where torch does not count it, such as through `.data`.
        """
        self.eval()
        if not any(weight.is_inference() for weight in self.parameters()):  # whose writes are never counted
            for kept in kept_values(self):
                kept.count_writes()
        optimise_trunk(self.encoder.embed_images)
        pack_linear_layers(self)

    def multiply_in_bfloat16(self) -> None:
        """Let encoder and decoder multiply in bfloat16, in place; it is faster only on processors that have it."""
        device = self.encoder.embed_tokens.weight.device.type
        for part in (self.encoder, self.decoder):
            part.forward = partial(multiply_in, torch.bfloat16, device, part.forward)

    def compile_for_inference(self) -> None:
        """Compile the trunk's stages and the layers, in place, after `optimize_for_inference`; it takes a minute.

        The first batch of each shape then waits for its compilation. Outputs change by rounding only.
        """
        # All layers of a class share what was compiled, and a teacher's are called in more forms than the eight that
        # torch allows: in a first step or a later one, for one row or more. It would not compile what comes after them.
        torch._dynamo.config.cache_size_limit = COMPILED_FORMS
        stages = [stage for stage in self.encoder.embed_images.children() if any(True for _ in stage.parameters())]
        for module in (*stages, *self.encoder.layers, *self.decoder.layers):
            module.compile()

    def get_normalized_probs(
        self, net_output: tuple[Tensor, Any], log_probs: bool, sample: dict[str, Any] | None = None
    ) -> Tensor:
        """Return probabilities, or their logarithms, in float32, of what `forward` returns; fairseq's name of it."""
        function = torch.log_softmax if log_probs else torch.softmax
        return function(net_output[0], dim=-1, dtype=torch.float32)

    def forward(
        self,
        src_tokens: Tensor,
        src_lengths: Tensor | None = None,
        prev_output_tokens: Tensor | None = None,
        patch_images: Tensor | None = None,
        patch_masks: Tensor | None = None,
        code_masks: Tensor | None = None,
        padded: NDArray[np.bool_] | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Return logits (B, T, V) and a dictionary of inner results (see `Decoder.run_layers`).

        Shapes: src_tokens (B, L), prev_output_tokens (B, T), patch_images (B, 3, height, width), patch_masks and
        code_masks (B,). `padded` is that of `OfaEncoder.forward`.
        """

        def run() -> tuple[Tensor, dict[str, Any]]:
            encoder_out = self.encoder(src_tokens, src_lengths, patch_images, patch_masks, padded)
            return self.decoder(prev_output_tokens, encoder_out, code_masks)

        return on_kept_values(run)


def initialise(module: nn.Module, *, linear_std: float, keep: nn.Module | None = None) -> None:
    """Draw weights from scratch: linear layers N(0, linear_std), embeddings N(0, 0.02), convolutions Kaiming.

    What is in `keep` stays as it is.
    """
    if module is keep:
        return
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=linear_std)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
        if module.padding_idx is not None:
            nn.init.zeros_(module.weight[module.padding_idx])
    elif isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.LayerNorm | _BatchNorm):
        module.reset_parameters()
    for child in module.children():
        initialise(child, linear_std=linear_std, keep=keep)
