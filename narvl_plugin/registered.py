"""NARVL as a fairseq plugin. Importing this module fixes fairseq and registers the parts of the plugin."""

from narvl_plugin import program
from narvl_plugin.importing import leaving_logging_alone

program.explain_interrupts()  # first, since the other imports take seconds

with leaving_logging_alone():
    from narvl_plugin import compat

    compat.apply()

    import criterions  # noqa: F401
    import narvl_plugin.models.registered
    import narvl_plugin.scoring.registered
    import narvl_plugin.tasks.registered
    import narvl_plugin.training.fused_adam  # noqa: F401
    from narvl_plugin.training.trainer import use_trainer

    use_trainer()
