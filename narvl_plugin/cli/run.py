"""The command `narvl run`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from narvl_plugin.pipeline.keys import table

SETTINGS = f"Settings, as the run scripts spell them, and below each its option:\n\n\b\n{table()}"
"""The end of the command's help."""


def run(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings, and flags of Hydra.")
    ] = None,
    config_dir: Annotated[
        Path | None, typer.Option(help="Folder of the recipes, run_scripts/config of a clone.")
    ] = None,
    log_file: Annotated[Path | None, typer.Option(help="File to append all messages to, but progress bars.")] = None,
) -> None:
    """Run a recipe from data to report.

    The stages are data, teacher, distillation, student, calibration, generation, latency and report. A stage is skipped
    if its output is there: the same command goes on where it was stopped.

    Example: narvl run recipe=caption size=nano preset=quick

    Options of the trainings are those of fairseq-hydra-train, after teacher., student. or training. (both):
    student.model.num_queries=30

    Recipes are caption, refcoco, regions, scene_graph, scene_tree, snli_ve, gqa and vqa. Hydra's flags work, too:
    --multirun seed=1,2 runs one after another, and --cfg job prints the options.
    """
    from narvl_plugin.pipeline.app import main

    main(words or [], config_dir, log_file)
