"""NARVL as a fairseq plugin: importing this package registers what it adds."""

import logging

import narvl_command

narvl_command.explain_interrupts()  # first, since the other imports take seconds


# A module of fairseq calls logging.basicConfig(level=logging.DEBUG) when it is imported. That sets nothing where the
# root logger has a handler; the one that logging itself takes where there is none prints what it would print anyway.
_stand_in = logging.lastResort or logging.NullHandler()
if not logging.root.handlers:
    logging.root.addHandler(_stand_in)
try:
    from narvl_plugin import compat

    compat.apply()

    import criterions  # noqa: F401
    from narvl_plugin import models, scoring, tasks  # noqa: F401
    from narvl_plugin.training import fused_adam  # noqa: F401
finally:
    logging.root.removeHandler(_stand_in)
