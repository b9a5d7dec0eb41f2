"""Repairs of how fairseq finds data, each against the call that fails without it."""

from pathlib import Path
from types import SimpleNamespace

from fairseq.data import data_utils


class TestDataArgument:
    def test_may_name_files(self, tmp_path: Path) -> None:
        config = SimpleNamespace(
            dataset=SimpleNamespace(
                ignore_unused_valid_subsets=False,
                combine_valid_subsets=None,
                disable_validation=False,
                valid_subset="valid",
            ),
            task=SimpleNamespace(data=f"{tmp_path / 'train.tsv'},{tmp_path / 'valid.tsv'}"),
        )
        data_utils.raise_if_valid_subsets_unintentionally_ignored(config)

    def test_may_still_name_a_folder(self, tmp_path: Path) -> None:
        (tmp_path / "valid1.bin").touch()
        assert data_utils._find_extra_valid_paths(str(tmp_path)) == {"valid1"}
