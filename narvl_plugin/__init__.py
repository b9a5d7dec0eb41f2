"""NARVL as a fairseq plugin: importing this package registers what it adds."""

from narvl_plugin import compat

compat.apply()

import criterions  # noqa: E402, F401
from narvl_plugin import fused_adam, models, scoring, tasks  # noqa: E402, F401
