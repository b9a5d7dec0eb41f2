"""Draws the images of the concept pages: ``python docs/concepts/images/draw.py``. It needs narvl, and no network."""

import base64
import io
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from narvl_plugin.ctc.lattice import build_lattice, forward_scores, state_emissions
from narvl_plugin.data.scenes import write_scenes

SCENES = 4
"""Number of scenes that are shown, side by side."""
BLUE, ORANGE, GREY = "#1f77b4", "#ff7f0e", "#7f7f7f"


@contextmanager
def axes_of(file: Path, width: float, height: float) -> Iterator[Axes]:
    """Yield axes on white, and write them as SVG. The same drawing gives the same bytes."""
    with matplotlib.rc_context({"svg.hashsalt": "narvl", "font.size": 10}):
        figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
        yield figure.add_subplot()
        figure.savefig(file, format="svg", metadata={"Date": None})


def draw_lattice(file: Path) -> None:
    """Draw the lattice of "red crab" over three queries, with the forward sums and the most probable path."""
    red, crab, blank = range(3)
    probabilities = torch.tensor([[[0.6, 0.1, 0.3], [0.2, 0.5, 0.3], [0.1, 0.3, 0.6]]])
    lattice = build_lattice(torch.tensor([[red, crab]]), torch.tensor([2]), blank=blank)
    emissions = state_emissions(probabilities.log(), lattice)
    sums = forward_scores(emissions, lattice, torch.tensor([3])).exp()[0, 1:]  # (N, L)
    names = ["blank", "red", "blank", "crab", "blank"]
    best = [(0, 1), (1, 3), (2, 4)]
    # A node is drawn if it lies on a path from the beginning to the end.
    nodes = {(0, 0), (0, 1), (1, 1), (1, 2), (1, 3), (2, 3), (2, 4)}
    with axes_of(file, 6.4, 3.6) as axes:
        for query, state in sorted(nodes):
            for step in (0, 1, 2):
                target = (query + 1, state + step)
                allowed = step < 2 or bool(lattice.skip[0, min(state + 2, 4)])
                if target in nodes and allowed:
                    bold = (query, state) in best and target in best
                    arrow = {
                        "arrowstyle": "->",
                        "color": ORANGE if bold else GREY,
                        "lw": 2.4 if bold else 1,
                        "shrinkA": 21,
                        "shrinkB": 21,
                    }
                    axes.annotate("", (target[0], -target[1]), (query, -state), arrowprops=arrow)
        for query in range(3):
            for state in range(5):
                used = (query, state) in nodes
                color = (ORANGE if (query, state) in best else BLUE) if used else "#dddddd"
                axes.scatter(query, -state, s=1500, facecolor="white", edgecolor=color, linewidth=1.6, zorder=3)
                if used:
                    text = f"{float(sums[query, state]):.3f}"
                    axes.text(query, -state, text, ha="center", va="center", fontsize=9, color="black", zorder=4)
        axes.set_xticks(range(3), [f"query {number}" for number in (1, 2, 3)])
        axes.set_yticks([-state for state in range(5)], names)
        axes.set_xlim(-0.5, 2.5)
        axes.set_ylim(-4.6, 0.6)
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)


def draw_speed_up(file: Path) -> None:
    """Draw the parts of a teacher's and a student's time, as shares of the encoder's.

    The figures are those of RESULTS.md, "What bounds the speed-up": base, one image, 20 tokens, beam of 5.
    """
    rows = {
        "two CPU cores: teacher": (2171.3, 3520.9 - 2171.3),
        "two CPU cores: student": (2171.3, 2465.8 - 2171.3),
        "GPU (H200): teacher": (7.5, 15.71 * 7.5 - 7.5),
        "GPU (H200): student": (7.5, 5.6),
    }
    with axes_of(file, 7.2, 2.6) as axes:
        for place, (encoder, rest) in enumerate(rows.values()):
            axes.barh(-place, 1, color=BLUE, label="encoder" if place == 0 else None)
            axes.barh(-place, rest / encoder, left=1, color=ORANGE, label="decoder" if place == 0 else None)
            axes.text(1.15 + rest / encoder, -place, f"{1 + rest / encoder:.2f}", va="center", fontsize=9)
        axes.set_yticks([-place for place in range(len(rows))], list(rows))
        axes.set_xlabel("time, in times of the encoder")
        axes.set_xlim(0, 17.5)
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="upper right", fontsize=9)


def draw_scenes(file: Path) -> None:
    """Draw the first test scenes of ``narvl data scenes --seed 4 --nouns 24 --max-objects 2 --test 4``."""
    with tempfile.TemporaryDirectory() as folder:
        write_scenes(Path(folder), train=4, valid=4, test=SCENES, seed=4, nouns=24, max_objects=2)
        lines = (Path(folder) / "caption" / "test.tsv").read_text(encoding="utf-8").splitlines()
    images = [Image.open(io.BytesIO(base64.b64decode(line.split("\t")[4]))) for line in lines]
    side, gap = images[0].width, 8
    sheet = Image.new("RGB", (SCENES * side + (SCENES - 1) * gap, side), "white")
    for place, image in enumerate(images):
        sheet.paste(image, (place * (side + gap), 0))
    sheet.save(file, "JPEG", quality=90)


def main(folder: Path) -> None:
    """Draw all images into a folder."""
    draw_lattice(folder / "lattice.svg")
    draw_speed_up(folder / "speed-up.svg")
    draw_scenes(folder / "scenes.jpg")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
