"""Batches: padding, counts, images that do not match."""

import numpy as np
import pytest
import torch

from narvl_plugin.data.collate import Sample, collate
from narvl_plugin.errors import BadRow

PAD = 1


def sample(name: str, source: list[int], target: list[int], side: int = 2) -> Sample:
    return {
        "id": name,
        "where": f"train.tsv:{name}",
        "source": torch.tensor(source),
        "target": torch.tensor(target),
        "prev_output_tokens": torch.tensor([0, *target[:-1]]),
        "patch_image": torch.full((3, side, side), float(name)),
        "patch_mask": torch.tensor([name != "2"]),
    }


def test_rows_are_padded_on_the_right_and_counted() -> None:
    batch = collate([sample("1", [0, 5, 2], [7, 8, 2]), sample("2", [0, 2], [9, 2])], PAD)
    assert batch["id"].tolist() == ["1", "2"]
    assert isinstance(batch["id"], np.ndarray)
    assert batch["where"] == ["train.tsv:1", "train.tsv:2"]
    assert (batch["nsentences"], batch["ntokens"]) == (2, 5)
    assert batch["target"].tolist() == [[7, 8, 2], [9, 2, PAD]]
    net_input = batch["net_input"]
    assert net_input["src_tokens"].tolist() == [[0, 5, 2], [0, 2, PAD]]
    assert net_input["src_lengths"].tolist() == [3, 2]
    assert net_input["prev_output_tokens"].tolist() == [[0, 7, 8], [0, 9, PAD]]
    assert net_input["patch_images"].shape == (2, 3, 2, 2)
    assert net_input["patch_masks"].tolist() == [True, False]


def test_padding_inside_a_target_is_not_counted() -> None:
    # Up to where an answer begins, the target of a teacher with a prompt is padding.
    assert collate([sample("1", [0, 2], [PAD, PAD, 7, 2]), sample("2", [0, 2], [9, 2])], PAD)["ntokens"] == 4


def test_images_of_different_shapes_are_an_error() -> None:
    with pytest.raises(BadRow, match=r"train\.tsv:2: .*\(3, 4, 4\), but train\.tsv:1 has \(3, 2, 2\)"):
        collate([sample("1", [0, 2], [2]), sample("2", [0, 2], [2], side=4)], PAD)
