"""Bucket tables, worked out by hand or by the formula in plain Python."""

import math

import pytest
import torch

from narvl_plugin.models.positions import code_position_ids, image_buckets, image_position_ids, token_buckets


def test_token_buckets_are_exact_up_to_half_the_bucket_size_and_logarithmic_beyond():
    buckets = token_buckets(1024, bucket_size=256, max_positions=1024)
    for i, j in [(0, 0), (5, 3), (3, 5), (128, 0), (0, 128), (129, 0), (700, 1), (0, 1023)]:
        r = i - j
        size = abs(r)
        if size > 128:
            size = math.ceil(math.log(size / 128) / math.log(1023 / 128) * 127) + 128
        assert buckets[i, j] == int(math.copysign(size, r)) + 255, (i, j)
    assert buckets.min() == 0
    assert buckets.max() == 510


def test_image_buckets_depend_on_the_offset_of_two_patches():
    ids = image_position_ids(2, 3, bucket_size=42)
    assert ids.tolist() == [1, 2, 3, 43, 44, 45]
    buckets = image_buckets(ids, bucket_size=42)
    assert buckets[0, 0] == 41 * 83 + 41
    assert buckets[0, 5] == 40 * 83 + 39  # one row up, two columns left
    assert buckets[5, 0] == 42 * 83 + 43


def test_position_zero_has_buckets_of_its_own():
    buckets = image_buckets(torch.tensor([0, 1, 2]), bucket_size=42)
    assert buckets[0].tolist() == [6891, 6889, 6889]
    assert buckets[:, 0].tolist() == [6891, 6890, 6890]


def test_codes_follow_the_start_symbol_on_a_square_grid():
    ids = code_position_ids(16, 259, bucket_size=42)
    assert ids[:3].tolist() == [0, 1, 2]
    assert ids[17] == 43  # second row
    assert ids[256:].tolist() == [15 * 42 + 16, 1024, 1024]


def test_a_grid_larger_than_the_table_is_refused():
    with pytest.raises(ValueError, match="43 x 10"):
        image_position_ids(43, 10, bucket_size=42)
