"""Which task a checkpoint is read with, whoever trained it."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from narvl_plugin.checkpoints.finding import existing
from narvl_plugin.errors import InputError, MissingInput
from narvl_plugin.tasks.caption import CaptionConfig
from narvl_plugin.tasks.options import task_options

PUBLISHED = {
    "_name": "unify_task",
    "data": "/elsewhere/train.tsv",
    "bpe": {"_name": "gpt2"},
    "bpe_dir": None,
    "selected_cols": None,
    "patch_image_size": 480,
    "code_dict_size": 8192,
}


def test_a_published_checkpoint_is_read_with_our_task_and_its_own_sizes() -> None:
    given = {"data": "test.tsv", "bpe_dir": "bpe"}
    cfg = task_options(Path("ofa.pt"), OmegaConf.create(PUBLISHED), "caption", CaptionConfig, given)
    assert (cfg._name, cfg.data, cfg.bpe_dir) == ("caption", "test.tsv", "bpe")
    assert cfg.patch_image_size == 480
    assert cfg.selected_cols == "0,4,2"
    assert "code_dict_size" not in cfg


def test_the_vocabulary_must_be_known() -> None:
    with pytest.raises(InputError, match=r"ofa.pt: does not say which vocabulary .* --bpe-dir"):
        task_options(Path("ofa.pt"), OmegaConf.create(PUBLISHED), "caption", CaptionConfig, {"data": "test.tsv"})


def test_an_option_that_the_task_does_not_have_is_named() -> None:
    with pytest.raises(InputError, match="caption has no option beams"):
        task_options(
            Path("a.pt"), OmegaConf.create(PUBLISHED), "caption", CaptionConfig, {"bpe_dir": "bpe", "beams": 5}
        )


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match="gone.pt: no such checkpoint"):
        existing(tmp_path / "gone.pt")
