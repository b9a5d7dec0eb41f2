"""The report of a run: scores of all systems, a table, and one self-contained HTML page."""

from narvl_plugin.report.build import build_report

__all__ = ["build_report"]
