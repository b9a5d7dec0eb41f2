"""Checkpoints to hand on: 16 bits, no backbone that a package has, no paths of a training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

import narvl
from narvl_plugin.checkpoints.conversion import convert
from narvl_plugin.checkpoints.reading import read_checkpoint, whole_checkpoint
from narvl_plugin.data.text import load_codec
from narvl_plugin.errors import InputError
from narvl_plugin.models.config import NarvlConfig, of_size
from narvl_plugin.models.narvl import NarvlModel


@pytest.fixture(scope="module")
def nano(vocabulary: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the checkpoint of an untrained narvl_nano that captions."""
    config = of_size(NarvlConfig, "nano")()
    config.num_queries = 8
    codec = load_codec(vocabulary, 10)
    config.vocabulary = codec.checksum
    torch.manual_seed(1)
    model = NarvlModel(config, len(codec.dictionary) + 1)
    task = {"_name": "caption", "bpe_dir": str(vocabulary), "num_bins": 10, "patch_image_size": 64, "data": "/home/me"}
    file = tmp_path_factory.mktemp("nano") / "student.pt"
    cfg = {"model": {**asdict(config), "_name": "narvl_nano"}, "task": task, "common": {"user_dir": "/home/me/plugin"}}
    torch.save(whole_checkpoint(model.state_dict(), cfg), file)
    return file


@pytest.mark.integration
def test_a_slim_checkpoint_answers_alike(nano: Path, vocabulary: Path, tmp_path: Path) -> None:
    slim = tmp_path / "slim.safetensors"
    convert(nano, slim, slim=True)
    assert slim.stat().st_size < nano.stat().st_size / 2
    assert (
        "/home/me" not in slim.with_suffix(".json").read_text()
        and str(vocabulary) not in slim.with_suffix(".json").read_text()
    )
    weights = read_checkpoint(slim)["model"]
    assert not any(name.startswith("encoder.embed_images.") for name in weights)
    assert {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()} == {torch.float16}
    (tmp_path / "spm.model").write_bytes((vocabulary / "spm.model").read_bytes())
    images = list(np.random.default_rng(1).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8))
    whole, light = (narvl.load(file, device="cpu").caption(images) for file in (nano, slim))
    for one, other in zip(whole, light, strict=True):
        assert [query.probability for query in one.queries] == pytest.approx(
            [query.probability for query in other.queries], abs=0.01
        )


def test_a_backbone_that_was_trained_stays(
    write_checkpoint: Callable[..., Path], vocabulary: Path, nano: Path, tmp_path: Path
) -> None:
    other = write_checkpoint("student.pt", "narvl", "caption", bpe_dir=str(vocabulary), patch_image_size=32)
    with pytest.raises(InputError, match="its backbone was trained, so it cannot be left out"):
        convert(other, tmp_path / "slim.pt", slim=True)
    state = torch.load(nano, weights_only=False)
    state["model"]["encoder.embed_images.conv_stem.weight"] += 1
    torch.save(state, tmp_path / "changed.pt")
    with pytest.raises(InputError, match="conv_stem.weight differs from ImageNet's weights"):
        convert(tmp_path / "changed.pt", tmp_path / "slim.pt", slim=True)
