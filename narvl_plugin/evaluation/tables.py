"""Scores as tables on the terminal and as JSON."""

from __future__ import annotations

import json
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from narvl_plugin.errors import harmless
from narvl_plugin.evaluation.benchmarks import Scores
from narvl_plugin.whole_files import write_whole


def print_scores(scores: Scores) -> None:
    """Print all tables, with the notes below."""
    console = Console()
    for title, rows in scores.tables.items():
        columns = list(dict.fromkeys(name for values in rows.values() for name in values))
        table = RichTable(title, box=box.SIMPLE_HEAD, padding=0, show_edge=False)
        for name in columns:
            table.add_column(Text(harmless(name)), justify="right")
        for row, values in rows.items():
            table.add_row(Text(harmless(row)), *(_number(values.get(name)) for name in columns))
        console.print(table)
        console.print()
    for note in scores.notes:
        console.print(f"- {note}", highlight=False, markup=False)


def write_scores(scores: Scores, out: Path) -> None:
    """Write the tables, by title, row and column, and the notes as JSON."""
    content = {"tables": scores.tables, "notes": scores.notes}
    write_whole(out, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _number(value: float | None) -> str:
    """Format a share or score with four decimals, a count as a whole number, and None as a dash."""
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
