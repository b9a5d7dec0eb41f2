"""The few repairs that stock fairseq 0.12.3 needs, each with the failing call that it mends."""

from narvl_plugin.compat.programs import apply, write_sizes_of_bins, write_to_any_terminal

__all__ = ["apply", "write_sizes_of_bins", "write_to_any_terminal"]
