"""Renders the pages of results: ``make results``, or ``python docs/results/make.py``.

``data/*.json`` and ``templates/*.md.j2`` make ``*.md`` here, ``plots/*.svg``, RESULTS.md, and the table in README.md
between ``<!-- results -->`` and ``<!-- /results -->``. The same data always give the same files.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drawing import STUDIES, plots
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from large_jobs import LargeJobs
from measurements import Measurement, Row, read_all

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
WIDTH = 120
PAGES = (
    "quality",
    "truth",
    "sentences",
    "speed",
    "bound",
    "confidence",
    "training",
    "decoding",
    "machine",
    "agreement",
    "overhead",
    "large_jobs",
    "box",
    "harder",
    "sets",
    "trees",
    *STUDIES,
)
"""The pages that answer a question, in the order of the index."""
FURTHER = ("method",)
"""Pages without a measurement."""
MARKERS = ("<!-- results -->", "<!-- /results -->")
LABELS = {
    "teacher_allcand": "teacher, all answers",
    "teacher_beam5": "teacher, beam 5",
    "teacher_greedy": "teacher, greedy",
    "student_greedy": "student",
    "student_beam5": "student, beam 5",
    "student_allcand": "student, all answers",
    "teacher_allcand_compiled": "teacher, all answers, compiled",
    "teacher_beam5_compiled": "teacher, beam 5, compiled",
    "teacher_greedy_compiled": "teacher, greedy, compiled",
    "student_greedy_compiled": "student, compiled",
    "student_beam5_compiled": "student, beam 5, compiled",
    "student_allcand_compiled": "student, all answers, compiled",
    "student_greedy_graph": "student, graph beside it",
    "student_beam5_graph": "student, beam 5, graph beside it",
    "student_allcand_graph": "student, all answers, graph beside it",
    "student_onnx": "student, ONNX Runtime",
    "student_onnx_int8": "student, ONNX Runtime, 8 bits",
    "student_openvino": "student, OpenVINO",
    "student_torch-export": "student, torch.export",
}
"""Names of systems in tables and plots."""
TASKS = {
    "caption": ("Captions", "CIDEr"),
    "refcoco": ("Boxes", "accuracy at IoU 0.5"),
    "snli_ve": ("Entailment", "accuracy"),
    "gqa": ("Questions, scenes", "accuracy"),
    "vqa": ("Questions, easy-VQA", "accuracy"),
}
"""Label and measure of each run of `make demo-all`."""


@dataclass(frozen=True)
class Task:
    """A task of the headline table.

    Attributes:
        name: its script in run_scripts/.
        label: its name in tables.
        measure: the name of its score.
        teacher: the row of the teacher that its student is compared with.
        student: the row of the student.
        confidence: the row of the student's confidence; None if not measured.
        settings: the sizes of the training.
    """

    name: str
    label: str
    measure: str
    teacher: Row
    student: Row
    confidence: Row | None
    settings: Row

    @property
    def ratio(self) -> float:
        """The student's score divided by the teacher's."""
        return float(self.student["score"] / self.teacher["score"])

    @property
    def speed_up(self) -> float:
        """The teacher's time divided by the student's."""
        return float(self.teacher["p50_ms"] / self.student["p50_ms"])


def task(name: str, data: Mapping[str, Measurement]) -> Task:
    """Return a task from the measurements of its run."""
    run, confidence = data[f"run_{name}"], data.get(f"run_{name}_confidence")
    teacher = run["teacher_allcand" if "teacher_allcand" in run else "teacher_beam5"]
    sure = confidence["student"] if confidence and "student" in confidence else None
    return Task(name, *TASKS[name], teacher, run["student"], sure, data[f"run_{name}_settings"]["settings"])


# --- What templates use ----------------------------------------------------------------------------------------------


def fixed(value: Any, digits: int = 3) -> str:
    """Return a number with so many digits behind the point, or a dash for None; text stays."""
    if value is None:
        return "–"
    return value if isinstance(value, str) else f"{value:,.{digits}f}"


def scientific(value: Any) -> str:
    """Return a number such as 1.2e-6; text stays."""
    return value if isinstance(value, str) else re.sub(r"e-0", "e-", f"{value:.1e}")


def spread(one: float, other: float, digits: int = 1) -> str:
    """Return two numbers as a range, the smaller one first; one number if both look alike."""
    low, high = (fixed(value, digits) for value in sorted((one, other)))
    return low if low == high else f"{low} to {high}"


def percent(value: float, digits: int = 0) -> str:
    """Return a share as a percentage."""
    return f"{100 * value:.{digits}f} %"


def code_lines(command: str) -> str:
    """Return a command, broken before its options where it is long."""
    lines = [""]
    for part in re.split(r" (?=--)", command):
        longer = f"{lines[-1]} {part}".strip()
        lines = [*lines[:-1], longer] if len(longer) < WIDTH - 15 or not lines[-1] else [*lines, part]
    return " \\\n    ".join(lines)


def measured(*used: Measurement, title: str = "How it was measured") -> str:
    """Return how some measurements were made, folded: command, seed, commit, date, machine, torch."""
    runs = {tuple(run.items()): run for measurement in used for run in measurement.runs}
    by_command: dict[str, list[Row]] = {}
    for run in runs.values():
        by_command.setdefault(run["command"] or "", []).append(run)
    parts = [f"<details>\n<summary>{title}</summary>"]
    for command, known in by_command.items():
        if command:
            parts.append(f"```text\n{code_lines(command)}\n```")
        parts.append("\n".join(f"- {_condition(run)}" for run in known))
    return "\n\n".join([*parts, "</details>"])


def _condition(run: Row) -> str:
    """Return what is known of a run beside its command."""
    known = [
        run["seed"] is not None and f"seed {run['seed']}",
        run["commit"] and f"commit `{run['commit']}`",
        run["date"],
        run["machine"],
        run["torch"] and f"torch {run['torch']}",
        run["note"],
    ]
    return "; ".join(filter(None, known))


FENCE = re.compile(r"^(```.*?^```)$", flags=re.MULTILINE | re.DOTALL)


def tidy(text: str) -> str:
    """Return a page with paragraphs of lines of at most `WIDTH` characters, and one empty line between blocks."""
    parts = FENCE.split(text)
    parts[::2] = [re.sub(r"\n{3,}", "\n\n", "\n".join(_filled(part.split("\n")))) for part in parts[::2]]
    return "".join(parts).strip() + "\n"


def _filled(lines: Iterable[str]) -> Iterator[str]:
    """Yield lines, where each paragraph and each item of a list is filled anew; tables, images and headings stay."""
    block: list[str] = []
    for line in [*lines, ""]:
        line = line.rstrip()
        fixed_line = not line or line.startswith(("|", "!", "#", "<"))
        if block and (fixed_line or line.startswith("- ")):
            indent = "  " if block[0].startswith("- ") else ""
            text = " ".join(part.strip() for part in block)
            yield from textwrap.wrap(
                text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
            )
            block = []
        if fixed_line:
            yield line
        else:
            block.append(line)


# --- Files -----------------------------------------------------------------------------------------------------------


def rendered() -> tuple[dict[Path, str], str]:
    """Return the content of all files that are made whole, by path, and the table in README.md."""
    data = read_all(HERE / "data")
    tasks = [task(name, data) for name in TASKS]
    environment = Environment(
        loader=FileSystemLoader(HERE / "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters |= {"fixed": fixed, "scientific": scientific, "percent": percent, "zip": zip}
    drawn = plots(data, tasks, LABELS)
    environment.globals |= {
        **{"d": data, "tasks": tasks, "by_name": {one.name: one for one in tasks}, "labels": LABELS},
        **{"measured": measured, "plots": drawn.keys(), "machines": data["machines"]},
        **{"large": LargeJobs(data), "spread": spread},
    }
    modules = {name: environment.get_template(f"{name}.md.j2").module for name in (*PAGES, *FURTHER)}
    listed = [{"name": name, "title": modules[name].title, "short": modules[name].short} for name in PAGES]
    made = {HERE / f"{name}.md": _page(name, str(module)) for name, module in modules.items()}
    for name, file, folder in (("index", HERE / "index.md", ""), ("RESULTS", ROOT / "RESULTS.md", "docs/results/")):
        text = environment.get_template(f"{name}.md.j2").render(pages=listed, folder=folder)
        made[file] = _page(name, text)
    made |= {HERE / "plots" / name: text for name, text in drawn.items()}
    return made, tidy(environment.get_template("README.md.j2").render())


def _page(name: str, text: str) -> str:
    """Return a page with its first line."""
    return f"<!-- Made by `make results` from docs/results/templates/{name}.md.j2. Edit that file. -->\n\n{tidy(text)}"


def with_table(text: str, table: str) -> str | None:
    """Return a text with the table between the markers; None if a marker is missing."""
    first, last = MARKERS
    if first not in text or last not in text.partition(first)[2]:
        return None
    before, _, rest = text.partition(first)
    return f"{before}{first}\n\n{table.strip()}\n\n{last}{rest.partition(last)[2]}"


def write(files: Mapping[Path, str]) -> Iterable[Path]:
    """Write the files that differ, and yield them."""
    for file, text in files.items():
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            file.parent.mkdir(exist_ok=True)
            file.write_text(text, encoding="utf-8")
            yield file


def main() -> None:
    """Write all files."""
    made, table = rendered()
    readme = ROOT / "README.md"
    changed = with_table(readme.read_text(encoding="utf-8"), table)
    if changed is None:
        print(f"README.md has no lines {' and '.join(MARKERS)}, and stays as it is")
    else:
        made[readme] = changed
    for file in write(made):
        print(f"written: {file.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
