"""fairseq's trainer as our tasks need it, and what it is given: averaged weights, schedule, optimizer."""

from narvl_plugin.importing import leaving_logging_alone

with leaving_logging_alone():
    import fairseq.trainer  # noqa: F401
