"""Repairs of how fairseq reads command lines, each against the call that fails without it."""

from collections.abc import Callable

import pytest

from narvl_plugin.errors import InputError


def test_programs_of_fairseq_refuse_arguments_that_are_not_utf_8(run_generate: Callable[..., None]) -> None:
    with pytest.raises(InputError, match="the argument .* cannot be read as UTF-8; rename it"):
        run_generate("a.tsv", "--task", "caption", "--path", "x\udcff/checkpoint_best.pt")
