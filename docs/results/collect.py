"""Copies fresh measurements into ``data/``, from where ``make results`` renders the pages.

    python docs/results/collect.py run_caption runs/caption_quick_seed1 --kind report
    python docs/results/collect.py models_caption models.json --kind models --command "narvl bench models …"
    python docs/results/collect.py study_losses runs/losses --kind study
    python docs/results/collect.py floor_cpu floor.txt --kind floor --command "narvl bench floor" --commit 3baabde

A result replaces the file of its name, and those of its parts. The file's question and facts stay. Each part of a study
whose runs have all ended has a file of its own, such as data/study_losses_captions.json. Long lists and paths
of this machine are left out.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from measurements import KINDS, RUN

DATA = Path(__file__).parent / "data"
LEFT_OUT = ("coverage", "risk", "confusion", "missing_scores")
"""Entries that no page shows."""


def shortened(value: Any) -> Any:
    """Return a result without what no page shows, and with names in place of absolute paths."""
    if isinstance(value, dict):
        return {key: shortened(found) for key, found in value.items() if key not in LEFT_OUT}
    if isinstance(value, list):
        return [shortened(found) for found in value]
    if isinstance(value, str) and value.startswith("/") and "\n" not in value:
        return Path(value).name
    return value


def read_run(folder: Path) -> dict[str, Any]:
    """Return a run's ``results.json``, with the minutes of its stages."""
    result = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    stages = (folder / "stages.tsv").read_text(encoding="utf-8").splitlines()
    return result | {"minutes": sum(float(line.split("\t")[1]) for line in stages) / 60}


def read_parts(folder: Path) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield what is known of the runs, and the result, of each part of a study whose runs have all ended."""
    study = json.loads((folder / "study.json").read_text(encoding="utf-8"))
    for part, found in study["parts"].items():
        cells_of = [[study["cells"][name] for name in row["cells"].values()] for row in found["rows"]]
        if not all(cell["finished"] for cells in cells_of for cell in cells):
            continue
        rows = []
        for row, cells in zip(found["rows"], cells_of, strict=True):
            scores = [cell["measures"]["score"] for cell in cells]
            kept = {key: row[key] for key in ("label", "measures", "difference")}
            rows.append({**kept, "scores": scores, "curve": row["validation"]})
        seeds = sorted({seed for row in found["rows"] for seed in row["cells"]} - {""})
        command = f"narvl study run_scripts/studies/{folder.name}.yaml --out runs/{folder.name}"
        result = {"part": part, **{key: found[key] for key in ("main", "compare", "reference")}, "rows": rows}
        result |= {"machine": cells_of[-1][-1]["machine"], "question": study["question"]}
        yield {"command": command, "seed": ", ".join(seeds) or "1"}, result


def git_date(commit: str) -> str | None:
    """Return the date of a commit; None if git does not know it."""
    command = ["git", "-C", str(DATA), "log", "-1", "--format=%as", commit]
    found = subprocess.run(command, capture_output=True, text=True)
    return found.stdout.strip() or None


def collect(name: str, source: Path, kind: str, run: dict[str, Any]) -> list[Path]:
    """Write a result into ``data/``.

    Args:
        name: the name of the measurement.
        source: a JSON file, a file of printed text, or the folder of a run or a study.
        kind: one of `KINDS`.
        run: what is known of the run, with the keys of `RUN`.

    Returns:
        The files.
    """
    if kind == "study":
        return [
            _write(f"{name}_{re.sub('[^a-z]+', '_', result['part'])}", kind, known | run, result)
            for known, result in read_parts(source)
        ]
    if source.is_dir():
        result: Any = read_run(source)
        task = source.name.split("_quick")[0]
        run = {"command": f"bash run_scripts/{task}.sh PRESET=quick", "seed": int(result["settings"]["SEED"])} | run
    else:
        text = source.read_text(encoding="utf-8")
        result = json.loads(text) if source.suffix == ".json" else text
    return [_write(name, kind, run, result)]


def _write(name: str, kind: str, run: dict[str, Any], result: Any) -> Path:
    """Write a result into its file, and remove the files that it replaces."""
    file = DATA / f"{name}.json"
    asked = result.pop("question", name) if isinstance(result, dict) else name
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"question": asked}
    kept = {key: before[key] for key in ("question", "facts") if key in before}
    result = shortened(result)
    machine = result.get("machine", {}) if isinstance(result, dict) else {}
    commit = run.get("commit") or machine.get("commit")
    known = {"commit": commit and commit[:7], "torch": machine.get("torch", "").partition("+")[0] or None}
    known["date"] = git_date(commit) if commit else None
    run = {key: (known | run).get(key) for key in RUN}
    content = {**kept, "kind": kind, "run": run, "result": result}
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for part in filter(None, KINDS[kind](result)):
        (DATA / f"{name}_{part}.json").unlink(missing_ok=True)
    return file


def main() -> None:
    """Read the command line and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="name of the measurement, as in data/NAME.json")
    parser.add_argument("source", type=Path, help="JSON file, printed text, or folder of a run or study")
    parser.add_argument("--kind", required=True, choices=KINDS)
    parser.add_argument("--seed", type=int)
    for key in RUN:
        if key != "seed":
            parser.add_argument(f"--{key}")
    given = parser.parse_args()
    run = {key: value for key in RUN if (value := getattr(given, key)) is not None}
    for file in collect(given.name, given.source, given.kind, run):
        print(file)


if __name__ == "__main__":
    main()
