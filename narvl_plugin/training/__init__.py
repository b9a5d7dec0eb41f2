"""The trainer of our tasks, derived from fairseq's, with averaged weights, a schedule and an optimizer."""

from narvl_plugin.importing import leaving_logging_alone

with leaving_logging_alone():
    import fairseq.trainer  # noqa: F401
