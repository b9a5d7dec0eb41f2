"""Imports the whole plugin. fairseq imports every module of `tasks/` when it loads the user directory."""

from narvl_plugin import registered  # noqa: F401
