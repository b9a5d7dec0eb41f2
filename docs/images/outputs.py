"""Draws outputs of students of sets of boxes and of graphs on images of their test files.

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


def ask(runs: Path, row: int, commit: str) -> dict[str, Any]:
    """Ask the students about a row of their test files.

    Returns:
        For each task the ``image`` (base64 of a PNG), the ``title``, the ``boxes`` with their ``names``, and lines of
        text; and the run.
    """
    import narvl

    def of(task: str, column: int) -> tuple[Any, str, list[str]]:
        run = runs / f"{task}_quick_seed1"
        columns = (run / "data" / task / "test.tsv").read_text(encoding="utf-8").splitlines()[row].split("\t")
        model = narvl.load(run / "student" / "checkpoint_last.pt", bpe_dir=run / "vocab")
        return model, columns[column], columns

    model, image, columns = of("regions", 4)
    found = model.locate(base64.b64decode(image), columns[2], all=True).boxes
    sets = {"image": image, "title": columns[2], "boxes": [list(one.box) for one in found]}
    sets |= {"names": [f"{one.probability:.2f}" for one in found], "lines": []}
    model, image, _ = of("scene_graph", 3)
    triplets = model.graph(base64.b64decode(image)).triplets
    objects: dict[tuple[str, Any], str] = {}
    for one in triplets:
        for noun, box in ((one.subject, one.subject_box), (one.object, one.object_box)):
            objects[noun, tuple(box)] = noun
    lines = [f"{one.subject} {one.relation} {one.object} ({one.probability:.2f})" for one in triplets]
    graph = {"image": image, "title": "the graph of the image", "boxes": [list(box) for _, box in objects]}
    graph |= {"names": list(objects.values()), "lines": lines}
    command = "bash run_scripts/{regions,scene_graph}.sh PRESET=quick"
    return {"panels": [sets, graph], "run": {"command": command, "seed": 1, "commit": commit, "row": row}}


def draw(shown: dict[str, Any]) -> str:
    """Return the picture as SVG."""
    with matplotlib.rc_context({"svg.hashsalt": "narvl", "font.size": 12, "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(7.6, 4.2), layout="constrained")
        for axes, panel in zip(figure.subplots(1, len(shown["panels"])), shown["panels"], strict=True):
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
    axes.set_xlabel("\n".join(panel["lines"]), fontsize=11)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def main() -> None:
    """Read the command line, ask the students if runs are given, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="?", type=Path, help="folder of the runs of regions.sh and scene_graph.sh")
    parser.add_argument("--row", type=int, default=0, help="row of the test files, from 0")
    parser.add_argument("--commit", default="", help="commit of the runs")
    given = parser.parse_args()
    data = HERE / "outputs.json"
    if given.runs:
        data.write_text(json.dumps(ask(given.runs, given.row, given.commit), indent=1) + "\n", encoding="utf-8")
    (HERE / "outputs.svg").write_text(draw(json.loads(data.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()
