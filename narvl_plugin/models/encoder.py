"""The encoder of teacher and student: image patches and text tokens in one sequence."""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from .attention import score_scaling
from .config import PADDING_INDEX, OfaConfig
from .inference import Kept, weights_of
from .layers import EncoderLayer
from .positions import (
    absolute_bias,
    image_buckets,
    image_position_ids,
    num_image_buckets,
    relative_bias,
    token_buckets,
)
from .vision import STRIDE, build_trunk, checkpoint_trunk, trunk_features


class EncoderOutput(NamedTuple):
    """What the decoders read: B batch, S source positions (patches, then text), D width."""

    features: Tensor
    """(B, S, D)"""
    padding_mask: Tensor | None
    """(B, S), True at padding; None where nothing is padded."""
    positions: Tensor
    """(S, D), normalised position embeddings, the same for each sample."""
    copies: int = 1
    """How many rows of a decoder read each sample, one after another, such as the beams of a search."""


class OfaEncoder(nn.Module):
    """Transformer over [image patches; text tokens] with positions that enter attention only.

    Legend: B batch, L text tokens, P patches, S = P + L, D width, H heads.
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
        self.embed_images = build_trunk(
            cfg.vision_trunk, pretrained=cfg.vision_pretrained, drop_path_rate=cfg.resnet_drop_path_rate
        )
        if cfg.checkpoint_activations and not cfg.freeze_resnet:
            checkpoint_trunk(self.embed_images)
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
        self._kept: Kept[tuple[Tensor, list[Tensor]]] = Kept(exact=True)
        self.is_padded: bool | None = None
        """Whether batches may hold padding; None has each looked at, which a static graph cannot do."""

    def forward(
        self,
        src_tokens: Tensor,
        src_lengths: Tensor | None = None,
        patch_images: Tensor | None = None,
        patch_masks: Tensor | None = None,
        padded: NDArray[np.bool_] | None = None,
    ) -> EncoderOutput:
        """Encode a batch of texts (B, L), each with an image or none.

        `patch_images` holds pixels (B, 3, height, width) or features of the trunk (B, C, rows, columns);
        `patch_masks` (B,) is False for a sample whose image is to be ignored. `src_lengths` is not needed. `padded`,
        (B,) on the CPU, says which samples hold padding or an ignored image; without it a GPU is asked, and waited for.
        """
        padding = src_tokens.eq(PADDING_INDEX)
        x = self._embed_text(src_tokens)
        grid = None
        if patch_images is not None:
            patches, grid = self._embed_images(patch_images)
            x = torch.cat([patches, x], dim=1)
            ignored = patches.new_zeros(patches.shape[:2], dtype=torch.bool)
            if patch_masks is not None:
                ignored = ignored | ~patch_masks[:, None]
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
        """Select rows of the batch, as fairseq's beam search asks; new_order (B',).

        Equal numbers of copies of all samples stay one sample each, which the decoder then projects to keys and values
        once. With new_order on the CPU no device is waited for.
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

    def train(self, mode: bool = True) -> "OfaEncoder":
        """Set the mode; a frozen trunk keeps its batch statistics."""
        super().train(mode)
        if self.cfg.freeze_resnet:
            self.embed_images.eval()
        return self

    def _embed_text(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens) + self.type_embedding.weight[0]
        return self.dropout(self.layernorm_embedding(x))

    def _embed_images(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        if self.cfg.freeze_resnet:  # whose trunk only runs forwards, which is faster so
            images = images.contiguous(memory_format=torch.channels_last)
        features = self.feature_norm(trunk_features(self.embed_images, images))
        rows, columns = features.shape[2:]
        x = self.image_proj(features.flatten(2).transpose(1, 2)) + self.type_embedding.weight[1]
        return self.dropout(self.patch_layernorm_embedding(x)), (rows, columns)

    def _positions_and_biases(self, text_length: int, grid: tuple[int, int] | None) -> tuple[Tensor, list[Tensor]]:
        """Return the positions (S, D) and the score bias of each layer (1, H, S, S); the last ones are kept."""

        def compute() -> tuple[Tensor, list[Tensor]]:
            positions = self._positions(text_length, grid)
            return positions, self._biases(positions, text_length, grid)

        return self._kept.get((text_length, grid), weights_of(self._position_modules), compute)

    @property
    def _position_modules(self) -> list[nn.Module]:
        """The modules from whose weights positions and biases follow."""
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
    """Return the samples that chosen rows read, and how many rows read each; before, `copies` read each.

    Where no longer equally many rows read each sample, there is one sample for each row: (rows,), 1.
    """
    samples = rows // copies
    chosen = samples[::copies]
    if torch.equal(samples, chosen.repeat_interleave(copies)):
        return chosen, copies
    return samples, 1
