"""NARVL as a fairseq plugin: importing this package registers its models, tasks, criterions and scorers."""

from narvl_plugin import compat

compat.apply()

import criterions  # noqa: E402, F401
from narvl_plugin import models, scoring, tasks  # noqa: E402, F401
