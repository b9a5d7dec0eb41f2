"""Position terms of the attention scores: learned absolute and bucketed relative biases.

None of them depends on what a picture or a text contains, only on lengths and grid, so each is computed
without a batch dimension. Legend: H heads, L positions, D width.
"""

import math

import torch
from torch import Tensor, nn

from narvl_plugin.errors import InputError


def token_buckets(length: int, *, bucket_size: int, max_positions: int, device: torch.device | None = None) -> Tensor:
    """Return the bucket of each pair of text positions, (length, length), in [0, 2 * bucket_size - 2].

    Distances up to half of `bucket_size` have a bucket each, larger ones share buckets logarithmically.

    Raises InputError for more positions than there are, before anything takes memory for each pair of them.
    """
    if length > max_positions:
        raise InputError(
            f"a text of {length:,} tokens is longer than the model's {max_positions:,} positions; cut it, or leave its "
            "row out"
        )
    middle = bucket_size // 2
    distance = torch.arange(length, dtype=torch.double)
    scale = (bucket_size - 1 - middle) / math.log((max_positions - 1) / middle)
    far = torch.ceil(torch.log(distance.clamp(min=1) / middle) * scale) + middle
    magnitude = torch.where(distance <= middle, distance, far).long().to(device, non_blocking=True)
    i = torch.arange(length, device=device)
    relative = i[:, None] - i[None, :]
    return relative.sign() * magnitude[relative.abs()] + bucket_size - 1


def image_position_ids(rows: int, columns: int, *, bucket_size: int, device: torch.device | None = None) -> Tensor:
    """Return the position id `y * bucket_size + x + 1` of each patch of a grid, (rows * columns,), row by row.

    Raises ValueError if the grid is larger than the table of `bucket_size` squared.
    """
    if rows > bucket_size or columns > bucket_size:
        raise ValueError(
            f"an image grid of {rows} x {columns} patches does not fit the position table of "
            f"{bucket_size} x {bucket_size}; use smaller images (a patch is 16 pixels wide)"
        )
    y = torch.arange(rows, device=device)
    x = torch.arange(columns, device=device)
    return (y[:, None] * bucket_size + x[None, :] + 1).flatten()


def code_position_ids(grid: int, length: int, *, bucket_size: int, device: torch.device | None = None) -> Tensor:
    """Return the position ids of an image given to the decoder as codes, (length,).

    The first is 0 (`<s>`), then a square grid, then the last id of a 1024-entry table repeated.
    """
    patches = image_position_ids(grid, grid, bucket_size=bucket_size, device=device)
    ids = torch.full((max(length, 1 + len(patches)),), 1024, device=device)
    ids[0] = 0
    ids[1 : 1 + len(patches)] = patches
    return ids[:length]


def image_buckets(position_ids: Tensor, *, bucket_size: int) -> Tensor:
    """Return the bucket of each pair of image positions, (L, L), from their ids, (L,).

    A pair of patches has the bucket of its offset (dy, dx); id 0, which is no patch, has three buckets of
    its own: as row, as column, and with itself.
    """
    side = 2 * bucket_size - 1
    patch = position_ids - 1
    y = torch.div(patch, bucket_size, rounding_mode="floor")
    x = patch - y * bucket_size
    dy = y[:, None] - y[None, :]
    dx = x[:, None] - x[None, :]
    buckets = (dy + bucket_size - 1) * side + dx + bucket_size - 1
    special = position_ids == 0
    buckets = buckets.masked_fill(special[:, None], side * side)
    buckets = buckets.masked_fill(special[None, :], side * side + 1)
    return buckets.masked_fill(special[:, None] & special[None, :], side * side + 2)


def num_image_buckets(bucket_size: int) -> int:
    """Return the number of rows of a table for `image_buckets`."""
    return (2 * bucket_size - 1) ** 2 + 3


def relative_bias(table: nn.Module, buckets: Tensor) -> Tensor:
    """Look up the relative bias of each pair of positions: buckets (L, L) -> (H, L, L)."""
    bias: Tensor = table(buckets)
    return bias.permute(2, 0, 1)


def absolute_bias(
    query_positions: Tensor, key_positions: Tensor, query: nn.Linear, key: nn.Linear, *, heads: int, scaling: float
) -> Tensor:
    """Return the product of projected position embeddings, per head.

    Shapes: query_positions (Lq, D), key_positions (Lk, D) -> (1, H, Lq, Lk). `scaling` multiplies the queries.
    """
    q = (query(query_positions) * scaling).unflatten(-1, (heads, -1)).transpose(0, 1)
    k = key(key_positions).unflatten(-1, (heads, -1)).permute(1, 2, 0)
    return (q @ k)[None]
