"""What hydra's configurations of a training start with: the plugin, imported before fairseq reads them.

`fairseq-hydra-train` imports `common.user_dir` late: options that the plugin adds to fairseq's own are refused by then,
and it has chosen how to start its processes. Hydra builds its callbacks first of all.
"""

from hydra.experimental.callback import Callback
from omegaconf import OmegaConf

import narvl_plugin

OmegaConf.register_new_resolver("narvl_path", lambda: next(iter(narvl_plugin.__path__)))
"""`${narvl_path:}` is the folder that fairseq takes as its user directory, wherever the package is installed."""


class ImportPlugin(Callback):  # type: ignore[misc]  # hydra's class has no types
    """Nothing but its place in this module, whose import is what has to happen: `_target_` of `hydra.callbacks`."""
