"""Draws the pictures of the guides: `python docs/figures.py` writes docs/images/*.svg."""

import pathlib

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path

FOLDER = pathlib.Path(__file__).parent / "images"
BLUE, GREY, LINE, DARK = "#2f6fb3", "#e6e9ee", "#9aa3ad", "#24292f"
SAMPLES, CHANNELS, SIDE = 3, 4, 3


def averages():
    """What one statistic is taken over: samples are rows, channels are columns of small images."""
    figure = Figure(figsize=(5.6, 4.6), layout="constrained")
    figure.get_layout_engine().set(hspace=0.1)
    panels = {
        "BatchNormalization": (
            "one channel, all samples",
            lambda sample, channel, position: channel == 0,
        ),
        "LayerNormalization": (
            "one position, all channels",
            lambda sample, channel, position: sample == 0 and position == 0,
        ),
        "GroupNormalization": (
            "some channels, one sample",
            lambda sample, channel, position: sample == 0 and channel < 2,
        ),
        "FilterResponseNormalization": (
            "one channel, one sample",
            lambda sample, channel, position: sample == 0 and channel == 0,
        ),
    }
    for axes, (name, (what, is_in)) in zip(figure.subplots(2, 2).flat, panels.items()):
        _grid(axes, is_in)
        axes.set_title(name, fontsize=10.5, fontweight="bold", color=DARK, pad=20)
        axes.text(0.5, 1.03, what, transform=axes.transAxes, ha="center", fontsize=10, color=DARK)
    return figure


def _grid(axes, is_in):
    step = SIDE + 0.8
    squares = {True: [], False: []}
    for sample, channel, position in np.ndindex(SAMPLES, CHANNELS, SIDE * SIDE):
        row, column = divmod(position, SIDE)
        corner = np.array([channel * step + column, -sample * step - row])
        squares[is_in(sample, channel, position)].append(Path.unit_rectangle().vertices + corner)
    for inside, corners in squares.items():
        # One path for all squares of a colour keeps the file small.
        codes = np.tile(Path.unit_rectangle().codes, len(corners))
        color = BLUE if inside else GREY
        path = Path(np.concatenate(corners), codes)
        axes.add_patch(PathPatch(path, facecolor=color, edgecolor=LINE, lw=0.6))
    axes.set(xlim=(-1.6, CHANNELS * step), ylim=(-SAMPLES * step + 0.4, 1.2), aspect="equal")
    axes.text(-0.5, 1 - SAMPLES * step / 2, "samples", rotation=90, ha="right", va="center")
    axes.text(CHANNELS * step / 2, -SAMPLES * step + 1.4, "channels", ha="center", va="top")
    axes.axis("off")


def activations():
    """ReLU beside TLU."""
    figure = Figure(figsize=(5.6, 2.6), layout="constrained")
    y = np.array([-3, -1, 0, 0.7, 3])
    left, right = figure.subplots(1, 2, sharey=True)
    left.plot(y, np.maximum(y, 0), color=BLUE, lw=2.5)
    left.set_title("ReLU: max(y, 0)", fontsize=12, fontweight="bold", color=DARK)
    for tau, shade in ((-1.0, BLUE), (0.0, LINE), (0.7, LINE)):
        right.plot(y, np.maximum(y, tau), color=shade, lw=2.5 if shade == BLUE else 1.3)
        right.text(-2.9, tau + 0.1, f"tau = {tau:g}", color=DARK, fontsize=10)
    right.set_title("TLU: max(y, tau)", fontsize=12, fontweight="bold", color=DARK)
    for axes in (left, right):
        axes.set(xlabel="y", xlim=(-3, 3), ylim=(-1.6, 3))
        axes.set(xticks=[-2, 0, 2], yticks=[-1, 0, 1, 2, 3])
        axes.grid(color=GREY)
        axes.spines[["top", "right"]].set_visible(False)
    left.set_ylabel("output")
    return figure


def main():
    """Writes each picture as SVG, the same bytes each time."""
    FOLDER.mkdir(exist_ok=True)
    options = {"svg.hashsalt": "keras-frn", "svg.fonttype": "none", "font.size": 10}
    with matplotlib.rc_context(options):
        for name, draw in (("averages", averages), ("relu-and-tlu", activations)):
            draw().savefig(FOLDER / f"{name}.svg", metadata={"Date": None}, facecolor="white")
            print(f"wrote docs/images/{name}.svg")


if __name__ == "__main__":
    main()
