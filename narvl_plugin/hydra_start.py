"""What hydra's configurations of a training start with: the plugin, imported before fairseq reads them.

`fairseq-hydra-train` imports `common.user_dir` late: options that the plugin adds to fairseq's own are refused by then,
and it has chosen how to start its processes. Hydra builds its callbacks first of all.
"""

import sys
from typing import Any, NoReturn

from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

import narvl_plugin.registered
from narvl_plugin.errors import InputError, MissingInput

OmegaConf.register_new_resolver("narvl_path", lambda: next(iter(narvl_plugin.__path__)))
"""`${narvl_path:}` is the folder that fairseq takes as its user directory, wherever the package is installed."""


class ImportPlugin(Callback):  # type: ignore[misc]  # hydra's class has no types
    """Its module's import, which has to happen first, and one line for what a user can mend: `hydra.callbacks`.

    `made_by` is the command that makes the files which a configuration names, if there is one.
    """

    def __init__(self, made_by: str | None = None) -> None:
        self.made_by = made_by

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """End the program before a training that lacks options which its configuration leaves to the command."""
        own = OmegaConf.masked_copy(config, [name for name in config if name != "hydra"])
        missing = sorted(OmegaConf.missing_keys(own))
        if missing:
            words = " ".join(f"{key}=VALUE" for key in missing)
            end(InputError(f"{' and '.join(missing)}: not given; add {words} to the command"))

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """End the program after a training that failed for what its user gave, before hydra shows how it failed."""
        error = job_return._return_value
        if isinstance(error, MissingInput) and self.made_by:
            error = MissingInput(f"{error}; {self.made_by} makes it")
        if isinstance(error, InputError) or isinstance(getattr(error, "__context__", None), InputError):
            end(error)


def end(error: BaseException) -> NoReturn:
    """End the program with an error as all of fairseq's programs show it (see compat/programs.py)."""
    sys.excepthook(type(error), error, error.__traceback__)
    sys.exit(1)
