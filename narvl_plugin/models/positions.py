"""Position terms of the attention scores: learned absolute and bucketed relative biases.

They depend only on the length of the text and on the grid of the image. Each is therefore computed without a batch
dimension.

Legend: H heads, L positions, D width.
"""

import math

import torch
from torch import Tensor, nn

from narvl_plugin.errors import InputError


def token_buckets(length: int, *, bucket_size: int, max_positions: int, device: torch.device | None = None) -> Tensor:
    """Return the bucket of each pair of text positions.

    Distances up to half of `bucket_size` have a bucket each. Larger ones share buckets logarithmically.

    Args:
        length: L.
        bucket_size: number of buckets per direction.
        max_positions: longest text.
        device: device of the result.

    Returns:
        (L, L), in [0, 2 * bucket_size - 2].

    Raises:
        InputError: if the text is too long. This is checked before memory is allocated for pairs of positions.
    """
    if length > max_positions:
        raise InputError(
            f"a text of {length:,} tokens is longer than the model's {max_positions:,} positions; shorten it, or "
            "remove its row"
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
    """Return the position id of each patch of a grid, `y * bucket_size + x + 1`.

    Args:
        rows: rows of the grid.
        columns: columns of the grid.
        bucket_size: side of the largest grid.
        device: device of the result.

    Returns:
        (rows * columns,), row by row.

    Raises:
        ValueError: if the grid is too large.
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
    """Return the position ids of an image given to the decoder as codes.

    The first is 0 (`<s>`). The patches of a square grid follow, then the last id of a 1024-entry table, repeated.

    Args:
        grid: side of the grid, in patches.
        length: L.
        bucket_size: side of the largest grid.
        device: device of the result.

    Returns:
        (L,).
    """
    patches = image_position_ids(grid, grid, bucket_size=bucket_size, device=device)
    ids = torch.full((max(length, 1 + len(patches)),), 1024, device=device)
    ids[0] = 0
    ids[1 : 1 + len(patches)] = patches
    return ids[:length]


def image_buckets(position_ids: Tensor, *, bucket_size: int) -> Tensor:
    """Return the bucket of each pair of image positions.

    A pair of patches has the bucket of its offset (dy, dx). Id 0 is not a patch and has three buckets of its own: as
    row, as column, and with itself.

    Args:
        position_ids: (L,), see `image_position_ids`.
        bucket_size: side of the largest grid.

    Returns:
        (L, L).
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
    """Look up the relative bias of each pair of positions.

    Args:
        table: embedding of buckets, with width H.
        buckets: (L, L).

    Returns:
        (H, L, L).
    """
    bias: Tensor = table(buckets)
    return bias.permute(2, 0, 1)


def absolute_bias(
    query_positions: Tensor, key_positions: Tensor, query: nn.Linear, key: nn.Linear, *, heads: int, scaling: float
) -> Tensor:
    """Return the product of projected position embeddings, per head.

    Args:
        query_positions: (Lq, D).
        key_positions: (Lk, D).
        query: projection of the queries.
        key: projection of the keys.
        heads: H.
        scaling: factor of the queries.

    Returns:
        (1, H, Lq, Lk).
    """
    q = (query(query_positions) * scaling).unflatten(-1, (heads, -1)).transpose(0, 1)
    k = key(key_positions).unflatten(-1, (heads, -1)).permute(1, 2, 0)
    return (q @ k)[None]
