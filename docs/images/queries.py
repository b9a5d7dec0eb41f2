"""Draws the picture of README: an image, a student's queries, the caption that they spell, and both models' times.

python docs/images/queries.py                            draws queries.svg from queries.json
python docs/images/queries.py RUN --row 196 --commit ID  asks the student of a run of caption.sh first
"""

import argparse
import base64
import json
from html import escape
from pathlib import Path

HERE = Path(__file__).parent
WIDTH, CHIP, GAP, PER_LINE = 860, 66, 4, 8
LEFT = 268
COLOURS = {
    "token": ("#1f6feb", "#ffffff", ""),
    "repeat": ("#ffffff", "#1f6feb", "4 3"),
    "blank": ("#d8dee4", "#57606a", ""),
}


def ask(run: Path, row: int, commit: str) -> dict:
    """Ask a run's student about a row of its test file, and read the times that the run measured.

    Returns:
        What the picture shows: ``image`` (base64 of a PNG), ``queries``, ``text``, ``p50_ms`` by system, and the run.
    """
    import narvl

    columns = (run / "data" / "caption" / "test.tsv").read_text(encoding="utf-8").splitlines()[row].split("\t")
    prediction = narvl.load(run / "student" / "checkpoint_last.pt").caption(base64.b64decode(columns[4]))
    measured = json.loads((run / "latency.json").read_text(encoding="utf-8"))
    return {
        "image": columns[4],
        "queries": [{"text": query.text, "kind": query.kind} for query in prediction.queries],
        "text": prediction.text,
        "p50_ms": {name: round(system["p50_ms"], 1) for name, system in measured["systems"].items()},
        "run": {
            "command": "bash run_scripts/caption.sh PRESET=quick",
            "seed": 1,
            "commit": commit,
            "row": row,
            "machine": f"{measured['machine']['processor']}, {measured['machine']['threads']} thread",
        },
    }


def draw(shown: dict) -> str:
    """Return the picture as SVG."""
    parts = [label(LEFT, 34, f"{len(shown['queries'])} learned queries, all labelled in one pass", bold=True)]
    step, lines = CHIP + GAP, -(-len(shown["queries"]) // PER_LINE)
    for place, query in enumerate(shown["queries"]):
        x, y = LEFT + place % PER_LINE * step, 48 + place // PER_LINE * 36
        fill, ink, dashes = COLOURS[query["kind"]]
        parts.append(
            f'<rect x="{x}" y="{y}" width="{CHIP}" height="28" rx="5" fill="{fill}" stroke="{ink if dashes else fill}"'
            f' stroke-dasharray="{dashes}"/>'
        )
        text = "blank" if query["kind"] == "blank" else query["text"].strip()
        size = 10.5 if len(text) > 8 else 12.5
        parts.append(label(x + CHIP / 2, y + 18.5, text, size=size, fill=ink, anchor="middle"))
    y = 48 + lines * 36 + 22
    parts.append(label(LEFT, y, "Merge repeats (dashed), drop blanks (gray):", size=13, fill="#57606a"))
    parts.append(label(LEFT, y + 26, shown["text"], size=15.5, bold=True))
    times = shown["p50_ms"]
    y = max(y + 62, 258)
    bars = (
        ("Parallel student", times["student"], "#1f6feb", "1 pass"),
        ("Autoregressive teacher, greedy", times["teacher_greedy"], "#8c959f", "1 pass a token"),
        ("Autoregressive teacher, beam 5", times["teacher_beam5"], "#8c959f", "1 pass a token"),
    )
    for place, (name, ms, fill, passes) in enumerate(bars):
        top = y + place * 30
        length = 320 * ms / max(bar[1] for bar in bars)
        parts.append(label(24, top + 14, name, size=13))
        parts.append(f'<rect x="{LEFT}" y="{top}" width="{length:.1f}" height="20" rx="3" fill="{fill}"/>')
        parts.append(label(LEFT + length + 8, top + 15, f"{ms:.1f} ms, {passes}", size=13))
    height = y + 3 * 30 + 30
    parts.append(
        label(
            24,
            height - 12,
            "Median time of one image on one CPU thread. make demo trains both models.",
            size=11.5,
            fill="#57606a",
        )
    )
    image = f'<image x="24" y="20" width="216" height="216" href="data:image/png;base64,{shown["image"]}"/>'
    title = f"An image, the labels of {len(shown['queries'])} queries, the caption: {shown['text']}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
        f' role="img" font-family="system-ui, sans-serif"><title>{escape(title)}</title>'
        f'<rect width="{WIDTH}" height="{height}" rx="10" fill="#ffffff" stroke="#d0d7de"/>'
        f"{image}{''.join(parts)}</svg>\n"
    )


def label(
    x: float, y: float, text: str, size: float = 14, fill: str = "#1f2328", anchor: str = "start", bold: bool = False
) -> str:
    """Return a line of text as SVG."""
    weight = ' font-weight="600"' if bold else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{fill}" text-anchor="{anchor}"{weight}>'
        f"{escape(text)}</text>"
    )


def main() -> None:
    """Draw the picture."""
    parser = argparse.ArgumentParser(description="Draws docs/images/queries.svg.")
    parser.add_argument("run", type=Path, nargs="?", help="folder of a run of caption.sh; without it, of queries.json")
    parser.add_argument("--row", type=int, default=0, help="number of the test row, from 0")
    parser.add_argument("--commit", default="", help="commit of the run")
    given = parser.parse_args()
    if given.run:
        shown = ask(given.run, given.row, given.commit)
        (HERE / "queries.json").write_text(json.dumps(shown, indent=1) + "\n", encoding="utf-8")
    shown = json.loads((HERE / "queries.json").read_text(encoding="utf-8"))
    (HERE / "queries.svg").write_text(draw(shown), encoding="utf-8")


if __name__ == "__main__":
    main()
