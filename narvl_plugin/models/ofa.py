"""The teacher: OFA's autoregressive sequence-to-sequence model."""

import logging
from argparse import ArgumentParser
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.models import FairseqEncoderDecoderModel, register_model
from fairseq.tasks import FairseqTask
from numpy.typing import NDArray
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import _IncompatibleKeys

from .ar_decoder import AutoregressiveDecoder
from .config import PADDING_INDEX, SIZES, OfaConfig, of_size
from .encoder import OfaEncoder
from .inference import kept_values, multiply_in, on_kept_values, optimise_trunk, pack_linear_layers, product_time
from .interop import ORIGIN, Origin, Use, fit_state

logger = logging.getLogger(__name__)

COMPILED_FORMS = 64
"""How often torch.compile may compile a layer anew, for other shapes and arguments."""


@register_model("ofa", dataclass=OfaConfig)
class OfaModel(FairseqEncoderDecoderModel):
    """Encoder over image and text, decoder over previous tokens (https://arxiv.org/abs/2202.03052).

    Legend: B batch, L source text, T target, V vocabulary.
    """

    registered_name = "ofa"
    config_class: type[OfaConfig] = OfaConfig
    decoder_class: type = AutoregressiveDecoder
    extra_labels = 0
    """Labels that the model adds to the vocabulary of its task."""

    def __init__(self, cfg: OfaConfig, vocab_size: int):
        """Build the model with random weights for a vocabulary of `vocab_size` labels."""
        embed_tokens = nn.Embedding(vocab_size, cfg.encoder_embed_dim, padding_idx=PADDING_INDEX)
        super().__init__(OfaEncoder(cfg, embed_tokens), self.decoder_class(cfg, embed_tokens))
        self.cfg = cfg
        self.use: Use | None = None
        """What a task has the model for; weights that are loaded must be meant for it. None: not known."""
        initialise(self, linear_std=cfg.init_std, keep=self.encoder.embed_images if cfg.vision_pretrained else None)
        if cfg.freeze_resnet:
            self.encoder.embed_images.requires_grad_(False)
        if cfg.freeze_embedding:
            self.encoder.embed_tokens.requires_grad_(False)

    @classmethod
    def add_args(cls, parser: ArgumentParser) -> None:
        """Add the options of every size.

        fairseq turns what is on by default into a flag that switches it off; here a flag means the same in any size.
        """
        gen_parser_from_dataclass(parser, cls.config_class(), delete_default=True)

    @classmethod
    def build_model(cls, cfg: DictConfig, task: FairseqTask) -> "OfaModel":
        """Build the model for the vocabulary of a fairseq task."""
        return cls(cls.config_class.of(cfg), len(task.target_dictionary) + cls.extra_labels)

    def load_state_dict(
        self, state_dict: Mapping[str, Tensor], strict: bool = True, model_cfg: Any = None, args: Any = None
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

    def prepare_for_inference_(self, cfg: DictConfig) -> None:
        """Do what `optimize_for_inference` does; fairseq-generate calls this.

        With --amp products are in bfloat16 where that is measured to be faster than float32.
        """
        self.optimize_for_inference()
        if cfg.common.amp:
            device = self.encoder.embed_tokens.weight.device
            half, single = (product_time(device, dtype) for dtype in (torch.bfloat16, torch.float32))
            if half < single:
                self.multiply_in_bfloat16()
            else:
                logger.warning("--amp: %s is %.1f times as fast in float32, which is used", device, half / single)
        super().prepare_for_inference_(cfg)

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


def register_sizes(family: type[OfaModel]) -> None:
    """Register each size of a registered model as a model of its own, `MODEL_SIZE`.

    fairseq takes the options that nobody gave from a registered model's dataclass, on the command line, in hydra's
    configurations and in checkpoints alike; a function that sets an architecture's defaults is called for the first
    alone.
    """
    for size in SIZES:
        name = f"{family.registered_name}_{size}"
        register_model(name, dataclass=of_size(family.config_class, size))(type(family.__name__, (family,), {}))


register_sizes(OfaModel)
