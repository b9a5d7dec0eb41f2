"""The teacher: OFA's autoregressive sequence-to-sequence model."""

import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import _IncompatibleKeys

from .ar_decoder import AutoregressiveDecoder
from .captured import Graphs, in_bucket
from .config import PADDING_INDEX, OfaConfig
from .decoder import Decoder
from .encoder import EncoderOutput, OfaEncoder
from .exported import ExportedPass
from .inference import multiply_in, optimise_backbone, pack_linear_layers
from .interop import ORIGIN, Origin, Use, fit_state, with_frozen_backbone
from .memo import memos_of, run_on_memos

logger = logging.getLogger(__name__)

COMPILED_FORMS = 64
"""Largest number of times that torch.compile may compile a layer, for different shapes and arguments."""


class OfaModel(nn.Module):
    """Encoder over image and text, decoder over previous tokens.

    Source: https://arxiv.org/abs/2202.03052

    Legend: B batch, L source text, T target, V vocabulary.

    Attributes:
        cfg: the configuration.
        encoder: the encoder.
        decoder: the decoder.
        encoder_class: class of the encoder.
        decoder_class: class of the decoder.
        is_student: whether the model predicts all tokens in one pass, with a blank as its last label.
        extra_labels: number of labels that the model adds to the vocabulary of its task.
        use: the intended use, which loaded weights must fit. None if it is unknown.
        graphs: the CUDA graphs of a model that is optimised for inference.
        exported: the graph beside a student's checkpoint, which `ParallelGenerator` runs; None if there is none.
    """

    cfg: OfaConfig
    encoder: OfaEncoder
    decoder: Decoder
    encoder_class: type[OfaEncoder] = OfaEncoder
    decoder_class: type[Decoder] = AutoregressiveDecoder
    is_student = False
    extra_labels = 0

    def __init__(self, cfg: OfaConfig, vocab_size: int):
        """Build the model with random weights for a vocabulary of `vocab_size` labels."""
        embed_tokens = nn.Embedding(vocab_size, cfg.encoder_embed_dim, padding_idx=PADDING_INDEX)
        super().__init__()
        self.encoder = self.encoder_class(cfg, embed_tokens)
        self.decoder = self.decoder_class(cfg, embed_tokens)
        self.cfg = cfg
        self.use: Use | None = None
        self.graphs: Graphs | None = None
        self.exported: ExportedPass | None = None
        initialise(self, linear_std=cfg.init_std, keep=self.encoder.embed_images if cfg.vision_pretrained else None)
        if cfg.freeze_resnet:
            self.encoder.embed_images.requires_grad_(False)
        if cfg.freeze_embedding:
            self.encoder.embed_tokens.requires_grad_(False)

    @classmethod
    def from_pretrained(
        cls,
        model_name_or_path: str,
        checkpoint_file: str = "model.pt",
        data_name_or_path: str | None = None,
        **options: Any,
    ) -> Any:
        """Return a model that answers, by fairseq's convention; see `narvl.load`.

        Args:
            model_name_or_path: the folder.
            checkpoint_file: the file in it.
            data_name_or_path: folder of the vocabulary, as `bpe_dir` of `narvl.load`.
            **options: options of `narvl.load`.

        Raises:
            MissingInput, InputError: the model or its vocabulary cannot be used.
        """
        import narvl  # the layer above all others

        if data_name_or_path is not None:
            options.setdefault("bpe_dir", data_name_or_path)
        return narvl.load(Path(model_name_or_path) / checkpoint_file, **options)

    def load_state_dict(  # type: ignore[override]  # whether tensors are assigned follows from the model
        self, state_dict: Mapping[str, Tensor], strict: bool = True
    ) -> _IncompatibleKeys:
        """Load the weights of a checkpoint, ours or a foreign one, and log what is new, unused or reshaped.

        A model on the meta device takes the checkpoint's tensors themselves. Any other model copies them.

        Args:
            state_dict: the weights, with their origin.
            strict: not used.

        Returns:
            The names of missing and unexpected weights, both empty.

        Raises:
            InputError: if the weights are of another model (see `fit_state`) or for another use (see `Use`).
        """
        weights = with_frozen_backbone(state_dict, self.cfg)
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

    def optimize_for_inference(self, checkpoint: Path | None = None) -> None:
        """Make the model faster, in place. Outputs change by rounding only (1e-4 in float32).

        Batch norm is folded into the backbone's convolutions, and channels are stored last. On a CPU, large linear
        layers store a second copy of their weights in the layout that products read. On a GPU, what a student or a
        teacher's search computes for a small batch becomes CUDA graphs when its shapes occur again.

        Afterwards the model can be neither trained nor saved. Its weights must not be written in ways that torch does
        not count, such as through `.data`. On a GPU they must not be written at all, unless `clear_memos` follows.

        Args:
            checkpoint: the file that the model was read from, see `NarvlModel.optimize_for_inference`.
        """
        self.eval()
        if not any(weight.is_inference() for weight in self.parameters()):  # torch does not count writes to these
            for memo in memos_of(self):
                memo.count_writes()
            self.use_graphs(Graphs())
        optimise_backbone(self.encoder.embed_images)
        pack_linear_layers(self)

    def use_graphs(self, graphs: Graphs | None) -> None:
        """Let small batches on a GPU run as these CUDA graphs, or as none."""
        self.graphs = graphs
        if isinstance(self.decoder, AutoregressiveDecoder):
            self.decoder.graphs = graphs

    def encode(self, source: dict[str, Any]) -> EncoderOutput:
        """Run the encoder, as a CUDA graph if there is one for this batch.

        Args:
            source: the arguments of `OfaEncoder.forward`.
        """
        if self.graphs is None or source.get("padded") is None:
            read: EncoderOutput = self.encoder(**source)
            return read
        return self.graphs.run(self.encoder, "encoder", self.encoder, in_bucket(source))

    def clear_memos(self) -> None:
        """Forget what was computed once, such as position biases, and what was recorded."""
        for memo in memos_of(self):
            memo.forget()
        if self.graphs is not None:
            self.graphs.clear()
        self.exported = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or convert the weights. Graphs would read them where they were, or as they were."""
        if self.graphs is not None:
            self.graphs.clear()
        self.exported = None
        return super()._apply(fn, recurse)

    def multiply_in_bfloat16(self) -> None:
        """Let encoder and decoder multiply in bfloat16, in place. Only processors that support it become faster."""
        self.exported = None  # it multiplies in float32
        device = self.encoder.embed_tokens.weight.device.type
        for part in (self.encoder, self.decoder):
            # Replaces the method of this one object.
            part.forward = partial(multiply_in, torch.bfloat16, device, part.forward)  # type: ignore[method-assign]

    def compile_for_inference(self) -> None:
        """Compile the backbone's stages and the layers, in place, after `optimize_for_inference`.

        Compilation happens in the first batch of each shape and takes a minute. Outputs change by rounding only.
        """
        # All layers of a class share their compiled forms. A teacher's layers need more than the eight that torch
        # allows: for the first and for later steps, for one row and for more. Beyond them torch would not compile.
        torch._dynamo.config.cache_size_limit = COMPILED_FORMS
        stages = [stage for stage in self.encoder.embed_images.children() if any(True for _ in stage.parameters())]
        for module in (*stages, *self.encoder.layers, *self.decoder.layers):
            module.compile()

    def get_normalized_probs(
        self, net_output: tuple[Tensor, Any], log_probs: bool, sample: dict[str, Any] | None = None
    ) -> Tensor:
        """Return probabilities or their logarithms in float32. The name is fairseq's.

        Args:
            net_output: the output of `forward`, whose logits are (B, T, V).
            log_probs: whether to return logarithms.
            sample: not used.

        Returns:
            (B, T, V).
        """
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
        """Return logits and intermediate results.

        Args:
            src_tokens: (B, L), right-padded.
            src_lengths: not used.
            prev_output_tokens: (B, T), right-padded.
            patch_images: pixels (B, 3, height, width) or features of the backbone (B, C, rows, columns).
            patch_masks: (B,), False for samples whose image is ignored.
            code_masks: (B,), True for samples whose output is an image given as codes.
            padded: (B,), see `OfaEncoder.forward`.

        Returns:
            Logits (B, T, V) and a dictionary, see `Decoder.run_layers`.
        """

        def run() -> tuple[Tensor, dict[str, Any]]:
            encoder_out = self.encoder(src_tokens, src_lengths, patch_images, patch_masks, padded)
            return self.decoder(prev_output_tokens, encoder_out, code_masks)

        return run_on_memos(run)


def initialise(module: nn.Module, *, linear_std: float, keep: nn.Module | None = None) -> None:
    """Draw the weights of a module from scratch, in place.

    Linear layers are drawn from N(0, linear_std), embeddings from N(0, 0.02), convolutions by Kaiming's rule.

    Args:
        module: the module.
        linear_std: standard deviation of the weights of linear layers.
        keep: a module in it whose weights do not change.
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
