"""The application `narvl run`: Hydra reads the options, and the run begins."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from narvl_plugin.errors import InputError
from narvl_plugin.pipeline.keys import translate
from narvl_plugin.pipeline.options import read_options, with_options
from narvl_plugin.pipeline.programs import ENDINGS, ProgramFailed, Programs, Stopped, noting_signals
from narvl_plugin.pipeline.run import Run
from narvl_plugin.pipeline.settings import RunConfig, Settings, find_tree
from narvl_plugin.pipeline.sharing import check_shared, link_shared
from narvl_plugin.pipeline.stages import Reporter, sole_run

PRIMARY = {
    "defaults": ["run_schema", "_self_", {"override hydra/job_logging": "none"}],
    "hydra": {
        "run": {"dir": "."},
        "sweep": {"dir": "runs", "subdir": "."},  # of --multirun, which writes down its options there
        "output_subdir": None,
        "job": {"chdir": False},
    },
}
"""The configuration of the application: what Hydra itself is told, and the options of a run."""


def run_recipe(config: DictConfig, config_dir: Path | None, log_file: Path | None) -> None:
    """Run a recipe in its folder, or go on with it.

    Raises:
        InputError: if torchrun has started it in several processes.
    """
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise InputError(
            "a run is one process, which starts its own; start it without torchrun, or train by torchrun with "
            "fairseq-hydra-train"
        )
    if config.cell:
        config = with_options(config, read_options(Path(config.cell)), config.cell)
    settings = Settings(config, find_tree(config_dir))
    reporter = Reporter(log_file)
    with sole_run(settings.out) as lock:
        if config.shared:
            check_shared(settings)
        settings.keep()
        if config.shared:
            link_shared(settings)
        programs = Programs(lock)
        signal.signal(signal.SIGTSTP, lambda *_: programs.pause())
        try:
            Run(settings, programs, reporter)()
        finally:
            programs.end()
            signal.signal(signal.SIGTSTP, signal.SIG_DFL)


def in_one_line(work: Callable[[], None]) -> None:
    """Do the work of a program. Errors that a user can fix, and signals, end the program with one line."""
    try:
        with noting_signals():
            work()
    except Stopped as stopped:
        end = f"{ENDINGS[stopped.number]}; start the same command again to go on"  # type: ignore[index]
        _end(end, 128 + stopped.number)
    except (InputError, OSError) as error:
        if os.environ.get("NARVL_DEBUG") == "1":
            raise
        _end(f"error: {error}", error.status if isinstance(error, ProgramFailed) else 1)


def _end(message: str, status: int) -> None:
    """End the program with a message."""
    with suppress(OSError):  # the terminal may be closed
        print(message, file=sys.stderr, flush=True)
    sys.exit(status)


def main(words: Sequence[str], config_dir: Path | None, log_file: Path | None) -> None:
    """Run the application.

    Args:
        words: settings, and flags of Hydra.
        config_dir: folder of the recipes, if not that of the source tree.
        log_file: file to append all messages to, or None.
    """
    try:
        overrides = translate(words)
    except InputError as error:
        _end(f"error: {error}", 1)
    store = ConfigStore.instance()
    store.store(name="run_schema", node=RunConfig)
    store.store(name="run", node=PRIMARY)
    sys.argv = [sys.argv[0], *overrides]

    @hydra.main(config_path=None, config_name="run", version_base="1.3")
    def start(config: DictConfig) -> None:
        in_one_line(lambda: run_recipe(config, config_dir, log_file))

    start()
