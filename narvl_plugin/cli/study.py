"""The commands `narvl study …`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup


class RunsByDefault(TyperGroup):
    """The group of commands, whose command `run` may be left out."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put `run` before arguments that begin with no command."""
        if args and args[0] not in (*self.commands, *ctx.help_option_names):
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(cls=RunsByDefault, no_args_is_help=True, rich_markup_mode=None)


@app.command()
def run(
    file: Annotated[Path, typer.Argument(help="YAML file of the study.")],
    out: Annotated[Path, typer.Option(help="Folder of the study.")],
    launcher: Annotated[
        str | None,
        typer.Option(help="Launcher of Hydra, such as submitit_slurm or joblib, that starts the runs, if installed."),
    ] = None,
    config_dir: Annotated[
        Path | None, typer.Option(help="Folder of the recipes, run_scripts/config of a clone.")
    ] = None,
    log_file: Annotated[Path | None, typer.Option(help="File to append all messages to.")] = None,
) -> None:
    """Run all combinations of settings, and compare them.

    The word run may be left out. Runs that differ in their student alone share the data and the teacher. A run that is
    finished is not started again: the same command goes on where it was stopped.

    Example: narvl study run_scripts/studies/queries.yaml --out runs/queries
    """
    from narvl_plugin.pipeline.app import in_one_line
    from narvl_plugin.pipeline.settings import find_tree
    from narvl_plugin.study.plan import read_study
    from narvl_plugin.study.running import Job, run_study

    failed: list[Job] = []
    folder = out.resolve()

    def work() -> None:
        failed.extend(
            run_study(read_study(file), file, folder, tree=find_tree(config_dir), launcher=launcher, log_file=log_file)
        )

    in_one_line(work)
    report(out)
    if failed:
        for job in failed:
            print(f"{job.name} {job.failed}", file=sys.stderr)
        print("Start the same command again to try these runs again.", file=sys.stderr)
        raise typer.Exit(1)


@app.command()
def report(out: Annotated[Path, typer.Argument(help="Folder of the study.")]) -> None:
    """Compare the runs of a study that have ended.

    The study's folder receives study.json with all figures, study.md with a table for each part, and study.html with
    plots.
    """
    from narvl_plugin.study.report import report_study

    report_study(out)
    print(f"{out / 'study.md'} · {out / 'study.html'}")
