"""`import narvl`, and the program `narvl`.

    import narvl
    model = narvl.load("student.pt")
    model.caption("dog.jpg")  # Prediction(text="...", confidence=0.93, ...)

Importing this module takes no time: torch is imported when a model is loaded. The program answers `narvl path` at once
and hands everything else to `narvl_plugin.cli.app`.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from narvl_plugin.api import Decoding, Model, Prediction, load
    from narvl_plugin.errors import InputError

__all__ = ["Decoding", "InputError", "Model", "Prediction", "load"]


def __getattr__(name: str) -> Any:
    """Import what `import narvl` offers when it is used."""
    if name not in __all__:
        raise AttributeError(f"module 'narvl' has no attribute {name!r}")
    if name == "InputError":
        from narvl_plugin.errors import InputError

        return InputError
    from narvl_plugin import api

    return getattr(api, name)


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
