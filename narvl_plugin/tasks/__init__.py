"""fairseq tasks: importing this package registers them (`--task caption`)."""

from narvl_plugin.tasks import caption

__all__ = ["caption"]
