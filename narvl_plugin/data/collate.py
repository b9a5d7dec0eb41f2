"""Padded batches of the samples of any task."""

from __future__ import annotations

from collections.abc import Sequence
from operator import eq
from typing import Any

import numpy as np
import torch

from narvl_plugin.errors import BadRow

Sample = dict[str, Any]
Batch = dict[str, Any]


def pad_tokens(rows: Sequence[torch.Tensor], pad: int) -> torch.Tensor:
    """Return B rows of tokens of different lengths (T,) as one tensor (B, T), padded on the right."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=pad)


def target_sizes(targets: Sequence[torch.Tensor], *, pad: int, eos: int) -> tuple[list[int], list[int]]:
    """Count the tokens of targets, and the queries that a student needs for each.

    A repeated token needs one more query, for the blank in between. Padding and the closing `</s>` do not count.
    The counts are plain numbers: tensors of a batch move to the model's device, and reading them would wait for it.

    Args:
        targets: B targets, each (T,).
        pad: padding.
        eos: `</s>`.

    Returns:
        B numbers of tokens and B numbers of queries.
    """
    lengths, needs = [], []
    for target in targets:
        tokens = [token for token in target.tolist() if token != pad]
        if tokens and tokens[-1] == eos:
            tokens.pop()
        lengths.append(len(tokens))
        needs.append(len(tokens) + sum(map(eq, tokens, tokens[1:])))
    return lengths, needs


def collate(samples: Sequence[Sample], pad: int) -> Batch:
    """Return the batch of one or more samples. Tokens are padded on the right.

    Args:
        samples: each with id, where, source (S,), target (T,), prev_output_tokens (T,), patch_image, which is an image
            (3, h, w) or features (C, h, w), and patch_mask (1,).
        pad: padding.

    Raises:
        BadRow: if images have different shapes, for example because only some rows hold precomputed features.
    """
    shape = samples[0]["patch_image"].shape
    for sample in samples:
        if sample["patch_image"].shape != shape:
            raise BadRow(
                f"{sample['where']}: the image has shape {tuple(sample['patch_image'].shape)}, but "
                f"{samples[0]['where']} has {tuple(shape)}; "
                "a file holds either images or precomputed features"
            )
    source = pad_tokens([sample["source"] for sample in samples], pad)
    patch_masks = torch.cat([sample["patch_mask"] for sample in samples])
    return {
        "id": np.array([sample["id"] for sample in samples]),
        "nsentences": len(samples),
        "ntokens": sum(int(sample["target"].ne(pad).sum()) for sample in samples),
        "net_input": {
            "src_tokens": source,
            "src_lengths": torch.tensor([len(sample["source"]) for sample in samples]),
            "patch_images": torch.stack([sample["patch_image"] for sample in samples]),
            "patch_masks": patch_masks,
            # An array of numpy: a tensor would move to the model's device, and reading it would wait for the device.
            "padded": (source.eq(pad).any(1) | ~patch_masks).numpy(),
            "prev_output_tokens": pad_tokens([sample["prev_output_tokens"] for sample in samples], pad),
        },
        "target": pad_tokens([sample["target"] for sample in samples], pad),
        "where": [sample["where"] for sample in samples],
    }
