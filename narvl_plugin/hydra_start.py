"""A callback of hydra that imports the plugin before fairseq reads the configuration of a training.

`fairseq-hydra-train` imports `common.user_dir` too late. By then it has refused options that the plugin adds, and
chosen how to start its processes. Hydra builds its callbacks earlier.
"""

import os
import sys
from typing import Any, NoReturn

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

import narvl_plugin.registered
from narvl_plugin.errors import InputError, MissingInput

OmegaConf.register_new_resolver("narvl_path", lambda: next(iter(narvl_plugin.__path__)))
"""The resolver `${narvl_path:}` gives the folder that fairseq takes as its user directory."""


class ImportPlugin(Callback):
    """Callback for `hydra.callbacks`, whose import loads the plugin. It shortens errors that a user can fix.

    Attributes:
        made_by: the command that makes the files in the configuration, or None.
        folder: the folder in which it makes them, to which the configuration refers.
    """

    def __init__(self, made_by: str | None = None, folder: str | None = None) -> None:
        self.made_by = made_by
        self.folder = folder

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """End the program before it submits a training if the command lacks required options."""
        HydraConfig.instance().set_config(config)  # as for a job; interpolations read it
        ask_for_missing(config)

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Join the tasks of a job. End the program before a training if the command lacks required options."""
        join_tasks_of_a_job()
        ask_for_missing(config)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """End the program after a training that failed by the user's input, before hydra prints the traceback."""
        error = job_return._return_value
        if isinstance(error, MissingInput) and self.made_by:
            error = MissingInput(f"{error}; {self.made_by} makes it")
        if isinstance(error, InputError) or isinstance(getattr(error, "__context__", None), InputError):
            end(error)


def ask_for_missing(config: DictConfig) -> None:
    """End the program if the command lacks required options; those of a sweep are in its overrides."""
    own = OmegaConf.masked_copy(config, [str(name) for name in config if name != "hydra"])
    given = {override.lstrip("+").partition("=")[0] for override in config.hydra.overrides.task}
    missing = sorted(OmegaConf.missing_keys(own) - given)
    if missing:
        words = " ".join(f"{key}=VALUE" for key in missing)
        end(InputError(f"{' and '.join(missing)}: not given; add {words} to the command"))


def join_tasks_of_a_job() -> None:
    """Describe the tasks of a job in the environment, as torchrun does, if hydra's submitit launcher has started them.

    Each task then is a process of one training; see `compat.distributed.join_launched_processes`.
    """
    if "SUBMITIT_EXECUTOR" not in os.environ or "WORLD_SIZE" in os.environ:
        return
    from submitit import JobEnvironment  # there, since it has started this process
    from submitit.helpers import TorchDistributedEnvironment

    if JobEnvironment().num_tasks > 1:
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False)


def end(error: BaseException) -> NoReturn:
    """End the program with an error in the form of all programs of fairseq (see compat/programs.py)."""
    sys.excepthook(type(error), error, error.__traceback__)
    sys.exit(1)
