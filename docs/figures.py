"""Draws the pictures of the guides: `python docs/figures.py` writes docs/images/*.svg."""

import csv
import pathlib
import sys

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, PathPatch
from matplotlib.path import Path

FOLDER = pathlib.Path(__file__).parent / "images"
RESULTS = FOLDER.parents[1] / "benchmarks" / "results"
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


def zero_mean():
    """Accuracy with plain and with zero-mean filters: the mean of three seeds, and its interval."""
    with open(RESULTS / "small_batch.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if not row["variant"]]
    panels = {"batch 2, five passes": ("300000", "2"), "batch 32, ten passes": ("600000", "32")}
    names = ("FRN + TLU", "GroupNormalization + ReLU", "BatchNormalization + ReLU")
    figure = Figure(figsize=(5.6, 3.4), layout="constrained")
    for axes, (title, run) in zip(figure.subplots(2, 1), panels.items()):
        for y, name in enumerate(names):
            for flag, color, label in (("0", LINE, "plain"), ("1", BLUE, "zero-mean")):
                values = [
                    float(row["accuracy"])
                    for row in rows
                    if (row["images"], row["batch"], row["normalization"], row["zero_mean"])
                    == (*run, name, flag)
                ]
                # Student's t for three values, 95%.
                half = 4.303 * np.std(values, ddof=1) / len(values) ** 0.5
                place = y + (0.14 if flag == "0" else -0.14)
                axes.errorbar(np.mean(values), place, xerr=half, fmt="o", color=color, label=label)
        axes.set_title(title, fontsize=11, fontweight="bold", color=DARK)
        axes.set(yticks=range(len(names)), yticklabels=names, ylim=(-0.5, len(names) - 0.5))
        axes.grid(axis="x", color=GREY)
        axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("test accuracy in %")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles[:2], labels[:2], loc="outside upper center", ncols=2, frameon=False)
    return figure


def _diagram(width, height):
    """A figure whose axes count in inches, and functions that draw boxes and arrows on it."""
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")

    def box(x, y, text, size, color=GREY):
        corner = (x - size[0] / 2, y - size[1] / 2)
        style = "round,pad=0,rounding_size=0.08"
        axes.add_patch(FancyBboxPatch(corner, *size, style, facecolor=color, edgecolor=LINE))
        ink = "white" if color == BLUE else DARK
        axes.text(x, y, text, ha="center", va="center", color=ink, linespacing=1.3)

    def arrow(start, end, label="", shift=(0, 0)):
        axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": DARK})
        middle = np.add(start, end) / 2 + shift
        axes.text(*middle, label, ha="center", va="center", color=DARK)

    return figure, box, arrow


def choice():
    """Which normalization to take."""
    figure, box, arrow = _diagram(4.2, 4.1)
    questions = {
        3.45: (
            "Can you train at batch 32,\nand may an output depend\non the rest of its batch?",
            "Batch-\nNormalization",
        ),
        1.95: (
            "Do you need int8 on an NPU or\nmicrocontroller, faster steps,\n"
            "or an existing FRN network?",
            "FRN + TLU",
        ),
    }
    for y, (question, answer) in questions.items():
        box(1.25, y, question, (2.3, 0.95))
        box(3.55, y, answer, (1.15, 0.6), BLUE)
        arrow((2.4, y), (2.97, y), "yes", (-0.03, 0.12))
        arrow((1.25, y - 0.48), (1.25, y - 1.02), "no", (0.2, 0.02))
    box(1.25, 0.6, "GroupNormalization\nor FRN + TLU", (2.3, 0.6), BLUE)
    return figure


def unet():
    """The U-Net of the guide."""
    figure, box, arrow = _diagram(4.2, 2.75)
    size = (0.95, 0.42)
    levels = {"8": (0.75, 3.45, 2.3), "16": (1.3, 2.9, 1.45)}
    for filters, (left, right, y) in levels.items():
        for x in (left, right):
            box(x, y, f"block, {filters}", size, BLUE)
        arrow(
            (left + 0.48, y), (right - 0.48, y), "concatenate" if filters == "8" else "", (0, 0.12)
        )
    box(2.1, 0.6, "block, 32", size, BLUE)
    for start, end, lower in ((0.75, 1.3, 1.45), (1.3, 2.1, 0.6)):
        top = lower + 0.85
        arrow((start, top - 0.21), (end - 0.15, lower + 0.21))
        arrow((4.2 - end + 0.15, lower + 0.21), (4.2 - start, top - 0.21))
    figure.axes[0].text(0.05, 1.02, "strided\nconvolution", color=DARK)
    figure.axes[0].text(4.15, 1.02, "upsampling", color=DARK, ha="right")
    figure.axes[0].text(
        2.1, 0.15, "block: twice a convolution, then FRN + TLU", color=DARK, ha="center"
    )
    return figure


def main(folder=FOLDER):
    """Writes each picture as SVG, the same bytes each time."""
    folder.mkdir(exist_ok=True)
    options = {"svg.hashsalt": "keras-frn", "svg.fonttype": "none", "font.size": 10}
    with matplotlib.rc_context(options):
        pictures = {
            "averages": averages,
            "relu-and-tlu": activations,
            "zero-mean": zero_mean,
            "choice": choice,
            "unet": unet,
        }
        for name, draw in pictures.items():
            draw().savefig(folder / f"{name}.svg", metadata={"Date": None}, facecolor="white")
            print(f"wrote {folder / name}.svg")


if __name__ == "__main__":
    main(*map(pathlib.Path, sys.argv[1:]))
