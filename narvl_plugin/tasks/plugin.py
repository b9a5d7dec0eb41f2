"""What fairseq imports of all of `tasks/` when it loads the user directory; this module brings in the rest."""

from narvl_plugin import registered  # noqa: F401
