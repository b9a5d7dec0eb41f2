"""Options that several commands of `narvl` have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

BpeDir = Annotated[Path | None, typer.Option(help="Vocabulary's folder, if not the one the checkpoint names.")]
Ans2LabelFile = Annotated[Path | None, typer.Option(help="List of answers, if not where the checkpoint says.")]
MaxLenB = Annotated[int | None, typer.Option(min=1, help="Longest output, in tokens, if not as in --eval-args.")]
NoRepeat = Annotated[
    int | None,
    typer.Option(min=0, help="Length of n-grams that are said once only; 0: any; if not as in --eval-args."),
]


def overrides(bpe_dir: Path | None, ans2label_file: Path | None) -> dict[str, str]:
    """Return the options of the task that differ from the checkpoint's."""
    given = {"bpe_dir": bpe_dir, "ans2label_file": ans2label_file}
    return {name: str(value) for name, value in given.items() if value is not None}
