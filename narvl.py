"""The program `narvl`: answers `narvl path` at once and hands everything else to `narvl_plugin.cli.app`."""

from __future__ import annotations

import importlib.util
import logging
import sys
import warnings
from pathlib import Path


def plugin_folder() -> Path:
    """Return the absolute folder of `narvl_plugin`, which fairseq takes as `--user-dir`."""
    package = importlib.util.find_spec("narvl_plugin")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("narvl_plugin is not installed; pip install it where narvl is")
    return Path(package.submodule_search_locations[0]).resolve()


def main() -> None:
    """Run the command line."""
    if sys.argv[1:] == ["path"]:
        print(plugin_folder())
        return
    from narvl_plugin import program

    program.end_on_signals()
    program.write_to_any_terminal()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.")
    from narvl_plugin.cli.app import run

    run()


if __name__ == "__main__":
    main()
