"""The encoder of teacher and student: image patches and text tokens in one sequence."""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from .attention import score_scaling
from .config import PADDING_INDEX, OfaConfig
from .layers import EncoderLayer
from .memo import FixedMemo, Memo, weights_of
from .positions import (
    absolute_bias,
    image_buckets,
    image_position_ids,
    num_image_buckets,
    relative_bias,
    token_buckets,
)
from .vision import STRIDE, backbone_features, build_backbone, checkpoint_backbone


class EncoderOutput(NamedTuple):
    """The output of the encoder, which decoders read.

    Legend: B batch, S source positions (patches, then text), D width.

    Attributes:
        features: (B, S, D).
        padding_mask: (B, S), True at padding; None if nothing is padded.
        positions: (S, D), normalised position embeddings, the same for each sample.
        copies: number of consecutive decoder rows that read each sample, such as the beams of a search.
    """

    features: Tensor
    padding_mask: Tensor | None
    positions: Tensor
    copies: int = 1


class OfaEncoder(nn.Module):
    """Transformer over [image patches; text tokens]. Positions enter through attention only.

    Legend: B batch, L text tokens, P patches, S = P + L, D width, H heads.

    Attributes:
        cfg: the configuration.
        heads: H.
        position_scaling: the scale of projected positions.
        embed_tokens: the embedding of all labels, shared with the decoder.
        embed_images: the vision backbone.
        layers: the encoder layers.
        is_padded: whether batches may hold padding. If None, each batch is checked, which a static graph cannot do.
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
        self.type_embedding = nn.Embedding(2, width)
        self.embed_images = build_backbone(
            cfg.vision_trunk, pretrained=cfg.vision_pretrained, drop_path_rate=cfg.resnet_drop_path_rate
        )
        if cfg.checkpoint_activations and not cfg.freeze_resnet:
            checkpoint_backbone(self.embed_images)
        channels: int = self.embed_images.out_channels
        self.feature_norm = nn.BatchNorm2d(channels, affine=False) if cfg.normalise_features else nn.Identity()
        self.image_proj = nn.Linear(channels, width)
        self.patch_layernorm_embedding = nn.LayerNorm(width)
        self.dropout = nn.Dropout(cfg.dropout)

        self.embed_positions = nn.Embedding(cfg.max_positions + 2, width)
        self.embed_image_positions = nn.Embedding(cfg.image_bucket_size**2 + 1, width)
        self.pos_ln = nn.LayerNorm(width)
        self.image_pos_ln = nn.LayerNorm(width)
        self.pos_q_linear = nn.Linear(width, width)
        self.pos_k_linear = nn.Linear(width, width)
        self.token_rel_pos_table_list = nn.ModuleList(
            nn.Embedding(2 * cfg.token_bucket_size - 1, self.heads) for _ in range(cfg.encoder_layers)
        )
        self.image_rel_pos_table_list = nn.ModuleList(
            nn.Embedding(num_image_buckets(cfg.image_bucket_size), self.heads) for _ in range(cfg.encoder_layers)
        )

        drop_path = torch.linspace(0, cfg.encoder_drop_path_rate, cfg.encoder_layers, device="cpu").tolist()
        self.layers = nn.ModuleList(EncoderLayer(cfg, rate) for rate in drop_path)
        self.layer_norm = nn.LayerNorm(width)
        self._memo: Memo[tuple[Tensor, list[Tensor]]] = Memo(exact=True)
        self.is_padded: bool | None = None

    def forward(
        self,
        src_tokens: Tensor,
        src_lengths: Tensor | None = None,
        patch_images: Tensor | None = None,
        patch_masks: Tensor | None = None,
        padded: NDArray[np.bool_] | None = None,
    ) -> EncoderOutput:
        """Encode a batch of texts, with or without images.

        Args:
            src_tokens: (B, L), right-padded.
            src_lengths: not used.
            patch_images: pixels (B, 3, height, width) or features of the backbone (B, C, rows, columns).
            patch_masks: (B,), False for samples whose image is ignored; or (B, P), False for patches that are.
            padded: (B,) on the CPU, True for samples that hold padding or an ignored image. If it is None, the
                program waits for a GPU to find out.

        Returns:
            The features of patches and tokens.
        """
        padding = src_tokens.eq(PADDING_INDEX)
        x = self._embed_text(src_tokens)
        grid = None
        if patch_images is not None:
            patches, grid = self._embed_images(patch_images)
            x = torch.cat([patches, x], dim=1)
            ignored = patches.new_zeros(patches.shape[:2], dtype=torch.bool)
            if patch_masks is not None:
                ignored = ignored | ~(patch_masks if patch_masks.dim() == 2 else patch_masks[:, None])
            padding = torch.cat([ignored, padding], dim=1)
        is_padded = self.is_padded
        if is_padded is None:
            is_padded = bool(padding.any() if padded is None else padded.any())
        padding_mask = padding if is_padded else None

        positions, biases = self._positions_and_biases(src_tokens.shape[1], grid)
        if padding_mask is not None:
            x = x.masked_fill(padding_mask[:, :, None], 0)
        for layer, bias in zip(self.layers, biases, strict=True):
            x = layer(x, bias, padding_mask)
        return EncoderOutput(self.layer_norm(x), padding_mask, positions)

    def reorder_encoder_out(self, encoder_out: EncoderOutput, new_order: Tensor) -> EncoderOutput:
        """Select rows of the batch. fairseq's beam search calls this.

        If all samples are copied equally often, each is stored once. The decoder then projects it to keys and values
        only once.

        Args:
            encoder_out: the output to select from.
            new_order: (B',), the row of each new row. If it is on the CPU, the program does not wait for a GPU.

        Returns:
            The output for the new rows.
        """
        samples, copies = samples_of(new_order, encoder_out.copies)
        everyone = torch.arange(len(encoder_out.features), device=new_order.device)
        if copies == 1 and torch.equal(new_order, everyone.repeat_interleave(len(new_order) // len(everyone))):
            samples, copies = everyone, len(new_order) // len(everyone)
        if torch.equal(samples, everyone):
            return encoder_out._replace(copies=copies)
        samples = samples.to(encoder_out.features.device, non_blocking=True)
        padding_mask = encoder_out.padding_mask
        if padding_mask is not None:
            padding_mask = padding_mask.index_select(0, samples)
        return EncoderOutput(encoder_out.features.index_select(0, samples), padding_mask, encoder_out.positions, copies)

    def max_positions(self) -> int:
        """Return the longest text, in tokens."""
        return self.cfg.max_positions

    def fix_shapes(self, *, side: int, length: int, padded: bool) -> Tensor:
        """Fix positions and biases to one shape, in place; see `NarvlModel.fix_shapes`.

        Returns:
            The positions, (S, D).
        """
        grid = backbone_features(self.embed_images, torch.zeros(1, 3, side, side)).shape[2:]
        positions, biases = self._positions_and_biases(length, (grid[0], grid[1]))
        self.is_padded = padded
        self._memo = FixedMemo((positions, biases))
        return positions

    def train(self, mode: bool = True) -> "OfaEncoder":
        """Set the mode. A frozen backbone stays in evaluation mode, so its batch statistics do not change."""
        super().train(mode)
        if self.cfg.freeze_resnet:
            self.embed_images.eval()
        return self

    def _embed_text(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens) + self.type_embedding.weight[0]
        return self.dropout(self.layernorm_embedding(x))

    def _embed_images(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        if self.cfg.freeze_resnet:  # a frozen backbone only runs forward, which is faster in this format
            images = images.contiguous(memory_format=torch.channels_last)
        features = self.feature_norm(backbone_features(self.embed_images, images))
        rows, columns = features.shape[2:]
        x = self.image_proj(features.flatten(2).transpose(1, 2)) + self.type_embedding.weight[1]
        return self.dropout(self.patch_layernorm_embedding(x)), (rows, columns)

    def _positions_and_biases(self, text_length: int, grid: tuple[int, int] | None) -> tuple[Tensor, list[Tensor]]:
        """Return the positions (S, D) and the score bias of each layer (1, H, S, S). The last ones are cached."""

        def compute() -> tuple[Tensor, list[Tensor]]:
            positions = self._positions(text_length, grid)
            return positions, self._biases(positions, text_length, grid)

        return self._memo.get((text_length, grid), weights_of(self._position_modules), compute)

    @property
    def _position_modules(self) -> list[nn.Module]:
        """The modules whose weights determine positions and biases."""
        return [
            *(self.embed_positions, self.embed_image_positions, self.pos_ln, self.image_pos_ln),
            *(self.pos_q_linear, self.pos_k_linear, self.token_rel_pos_table_list, self.image_rel_pos_table_list),
        ]

    def _positions(self, text_length: int, grid: tuple[int, int] | None) -> Tensor:
        """Return the normalised position embeddings of the whole sequence, (S, D)."""
        text = self.pos_ln(self.embed_positions.weight[:text_length])
        if grid is None:
            return text
        return torch.cat([self.image_pos_ln(self._image_positions(*grid)), text])

    def _image_positions(self, rows: int, columns: int) -> Tensor:
        original = self.cfg.orig_patch_image_size // STRIDE
        if not self.cfg.interpolate_position or rows * columns <= original**2:
            return self.embed_image_positions(self._image_ids(rows, columns))
        table = self.embed_image_positions(self._image_ids(original, original))
        table = table.T.unflatten(1, (original, original))[None]
        resized = F.interpolate(table, size=(rows, columns), mode="bilinear")
        return resized[0].flatten(1).T

    def _image_ids(self, rows: int, columns: int) -> Tensor:
        device = self.embed_image_positions.weight.device
        return image_position_ids(rows, columns, bucket_size=self.cfg.image_bucket_size, device=device)

    def _biases(self, positions: Tensor, text_length: int, grid: tuple[int, int] | None) -> list[Tensor]:
        """Return the score bias of each layer, (1, H, S, S)."""
        absolute = absolute_bias(
            positions,
            positions,
            self.pos_q_linear,
            self.pos_k_linear,
            heads=self.heads,
            scaling=self.position_scaling,
        )
        text_buckets = token_buckets(
            text_length,
            bucket_size=self.cfg.token_bucket_size,
            max_positions=self.cfg.max_positions,
            device=positions.device,
        )
        patch_buckets = None
        if grid is not None:
            patch_buckets = image_buckets(self._image_ids(*grid), bucket_size=self.cfg.image_bucket_size)
        biases = []
        for text_table, image_table in zip(self.token_rel_pos_table_list, self.image_rel_pos_table_list, strict=True):
            text = relative_bias(text_table, text_buckets)
            if patch_buckets is None:
                biases.append(absolute + text)
                continue
            image = relative_bias(image_table, patch_buckets)
            num_patches = image.shape[1]
            pad_image = F.pad(image, (0, text_length, 0, text_length))
            pad_text = F.pad(text, (num_patches, 0, num_patches, 0))
            biases.append(absolute + pad_image + pad_text)
        return biases


def samples_of(rows: Tensor, copies: int) -> tuple[Tensor, int]:
    """Return the samples that selected rows read, and the number of rows that read each.

    Args:
        rows: (B',), indices of the selected rows.
        copies: number of consecutive rows that read each sample before the selection.

    Returns:
        The samples and the number of rows that read each. If these numbers differ, each row has a sample of its own:
        (B',) and 1.
    """
    samples = rows // copies
    chosen = samples[::copies]
    if torch.equal(samples, chosen.repeat_interleave(copies)):
        return chosen, copies
    return samples, 1
