"""Draws outputs of students of sets of boxes, of graphs and of trees, with the images of their test files.

python docs/images/outputs.py                                 draws outputs.svg from outputs.json
python docs/images/outputs.py RUNS --row 4 --commit ID        asks the students of runs of preset quick first
"""

import argparse
import base64
import io
import json
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

HERE = Path(__file__).parent
COLOURS = ("#2563eb", "#d97706", "#0f9d76", "#9333ea", "#dc2626")


def ask(runs: Path, row: int, commit: str) -> dict[str, dict[str, Any]]:
    """Ask the students of the runs that are there about a row of their test files.

    Returns:
        By task the ``image`` (base64 of a PNG), the ``title``, the ``boxes`` with their ``names``, lines of text, and
        the run.
    """
    import narvl

    panels: dict[str, dict[str, Any]] = {}
    for task, (column, describe) in TASKS.items():
        run = runs / f"{task}_quick_seed1"
        if not run.is_dir():
            continue
        columns = (run / "data" / task / "test.tsv").read_text(encoding="utf-8").splitlines()[row].split("\t")
        model = narvl.load(run / "student" / "checkpoint_last.pt", bpe_dir=run / "vocab")
        panels[task] = {"image": columns[column], **describe(model, base64.b64decode(columns[column]), columns[2])}
        command = f"bash run_scripts/{task}.sh PRESET=quick"
        panels[task]["run"] = {"command": command, "seed": 1, "commit": commit, "row": row}
    return panels


def _boxes(model: Any, image: bytes, phrase: str) -> dict[str, Any]:
    found = model.locate(image, phrase, all=True).boxes
    names = [f"{one.probability:.2f}" for one in found]
    return {"title": phrase, "boxes": [list(one.box) for one in found], "names": names, "lines": []}


def _graph(model: Any, image: bytes, _: str) -> dict[str, Any]:
    triplets = model.graph(image).triplets
    objects: dict[tuple[str, Any], str] = {}
    for one in triplets:
        for noun, box in ((one.subject, one.subject_box), (one.object, one.object_box)):
            objects[noun, tuple(box)] = noun
    lines = [f"{one.subject} {one.relation} {one.object} ({one.probability:.2f})" for one in triplets]
    boxes = [list(box) for _, box in objects]
    return {"title": "the graph of the image", "boxes": boxes, "names": list(objects.values()), "lines": lines}


def _tree(model: Any, image: bytes, _: str) -> dict[str, Any]:
    lines: list[str] = []

    def add(node: dict[str, Any], depth: int) -> None:
        lines.append(f"{'    ' * depth}{node['label']} ({node['probability']:.2f})")
        for child in node["children"]:
            add(child, depth + 1)

    add(model.tree(image).tree, 0)
    return {"title": "the tree of the image", "boxes": [], "names": [], "lines": lines}


def draw(panels: dict[str, dict[str, Any]]) -> str:
    """Return the picture of the panels by task as SVG."""
    with matplotlib.rc_context({"svg.hashsalt": "narvl", "font.size": 12, "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(11.4, 5.4), layout="constrained")
        for axes, panel in zip(figure.subplots(1, len(panels)), panels.values(), strict=True):
            _panel(axes, panel)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None})
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"


def _panel(axes: Axes, panel: dict[str, Any]) -> None:
    axes.imshow(Image.open(io.BytesIO(base64.b64decode(panel["image"]))).convert("RGB"))
    for (left, upper, right, lower), name, colour in zip(panel["boxes"], panel["names"], cycle(COLOURS), strict=False):
        axes.add_patch(Rectangle((left, upper), right - left, lower - upper, fill=False, color=colour, linewidth=2.5))
        label = {"facecolor": colour, "edgecolor": "none", "pad": 1.5}
        axes.text(left, upper, name, color="white", fontsize=10, verticalalignment="bottom", bbox=label)
    axes.set_title(panel["title"])
    axes.set_xlabel("\n".join(panel["lines"]), fontsize=11, multialignment="left")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def main() -> None:
    """Read the command line, ask the students if runs are given, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "runs", nargs="?", type=Path, help="folder of the runs of regions.sh, scene_graph.sh or scene_tree.sh"
    )
    parser.add_argument("--row", type=int, default=0, help="row of the test files, from 0")
    parser.add_argument("--commit", default="", help="commit of the runs")
    given = parser.parse_args()
    data = HERE / "outputs.json"
    panels = json.loads(data.read_text(encoding="utf-8"))
    if given.runs:
        asked = panels | ask(given.runs, given.row, given.commit)
        panels = {task: asked[task] for task in TASKS if task in asked}
        data.write_text(json.dumps(panels, indent=1) + "\n", encoding="utf-8")
    (HERE / "outputs.svg").write_text(draw(panels), encoding="utf-8")


TASKS = {"regions": (4, _boxes), "scene_graph": (3, _graph), "scene_tree": (3, _tree)}
"""For each task the column of the image, and what describes a student's output."""

if __name__ == "__main__":
    main()
