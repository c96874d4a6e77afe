"""Tables, words and plots of the studies of training."""

import numpy as np
from common import RESULTS
from training import interval

# Top-1 of ResNetV2-50 on ImageNet by images per GPU, read by eye off the paper's figure 1.
PAPER = {
    "FRN + TLU": (77.3, 77.2, 77.1, 77.1, 77.2),
    "GroupNormalization + ReLU": (76.2, 76.0, 76.1, 75.8, 75.7),
    "BatchRenormalization + ReLU": (70.7, 74.2, 75.6, 75.9, 75.8),
    "BatchNormalization + ReLU": (65.1, 72.0, 74.0, 75.5, 76.2),
}
PAPER_BATCHES = (2, 4, 8, 16, 32)
COLORS = {
    "FRN + TLU": "C1",
    "FRN + ReLU": "C4",
    "BatchNormalization + ReLU": "C0",
    "GroupNormalization + ReLU": "C2",
    "GroupNormalization + TLU": "C8",
    "LayerNormalization + ReLU": "C7",
    "BatchRenormalization + ReLU": "C9",
    "ReLU alone": "0.5",
}
KINDS = {False: "plain filters", True: "filters of zero mean"}


def picture(path):
    """The plot of a table: beside it, but for the results that the guides show."""
    is_shown = path.parent.resolve() == RESULTS.resolve()
    folder = RESULTS.parents[1] / "docs" / "images" if is_shown else path.parent
    return folder / f"{path.stem}.png"


def by_seed(rows, measure, **where):
    """Dict from seeds to the measure, of the rows in which each column is as given."""
    rows = [r for r in rows if all(r[k] == str(v) for k, v in where.items())]
    return {int(r["seed"]): float(r[measure]) for r in rows}


def difference(ours, theirs):
    """Mean and half interval of ours - theirs over the seeds that both have."""
    return interval([ours[s] - theirs[s] for s in ours if s in theirs])


def verdict(ours, theirs, name):
    mean, half = difference(ours, theirs)
    if not abs(mean) > half:
        return f"shows no difference from {name} ({mean:+.1f} ± {half:.1f})"
    return f"{'ahead of' if mean > 0 else 'LOSES to'} {name} by {abs(mean):.1f} ± {half:.1f}"


def cells(rows, measure, names, columns, show=print):
    """A table: a row for each name and kind of filter, mean ± half interval of each column."""
    show(f"  {'':50}" + "".join(f"{head!s:>15}" for head, _ in columns))
    for zero_mean, kind in KINDS.items():
        for name in names:
            line = f"  {name + ', ' + kind:50}"
            for _, where in columns:
                found = by_seed(
                    rows, measure, normalization=name, zero_mean=int(zero_mean), **where
                )
                mean, half = interval(list(found.values())) if found else (np.nan, np.nan)
                cell = f"{mean:.1f}" + (f" ± {half:.1f}" if half == half else "")
                line += f"{cell if found else '-':>15}"
            show(line)


def in_words(rows, measure, names, where, show=print):
    """Where FRN + TLU stands against each other normalization, for both kinds of filter."""
    of = {
        (name, zero_mean): by_seed(
            rows, measure, normalization=name, zero_mean=int(zero_mean), **where
        )
        for name in names
        for zero_mean in KINDS
    }
    others = [n for n in names if n != "FRN + TLU"]
    for zero_mean, kind in KINDS.items():
        ours = of["FRN + TLU", zero_mean]
        for name in others:
            theirs = of[name, zero_mean]
            if set(ours) & set(theirs):
                show(f"  with {kind}: FRN + TLU {verdict(ours, theirs, name)}")
    ours = of["FRN + TLU", True]
    for name in names:
        if set(ours) & set(of[name, False]):
            show(f"  FRN + TLU with zero mean {verdict(ours, of[name, False], 'plain ' + name)}")


def ablation_table(rows, measure, variants, show=print):
    """Each change, and its difference from zero mean alone, seed by seed."""
    alike = {"normalization": "FRN + TLU", "batch": 2}
    base = by_seed(rows, measure, **alike, zero_mean=1, variant="")
    plain = by_seed(rows, measure, **alike, zero_mean=0, variant="")
    changes = {"(filters not of zero mean)": plain, "(zero mean alone)": base}
    changes |= {v: by_seed(rows, measure, **alike, variant=v) for v in variants}
    for name, found in changes.items():
        if found and base:
            mean, half = interval(list(found.values()))
            change, around = difference(found, base)
            show(
                f"  {name:40}{mean:6.1f} ± {half:3.1f}{change:+9.1f} ± {around:3.1f}"
                f"   ({len(found)} seeds)"
            )


def pyplot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def plot_batches(rows, names, path):
    """Accuracy by batch size: plain filters, filters of zero mean, and the paper."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(10, 4.2), layout="constrained")
    batches = sorted({int(r["batch"]) for r in rows})
    means = []
    for axis, (zero_mean, kind) in zip(axes, KINDS.items()):
        for number, name in enumerate(names):
            points = []
            for batch in batches:
                found = by_seed(
                    rows,
                    "accuracy",
                    normalization=name,
                    zero_mean=int(zero_mean),
                    batch=batch,
                    variant="",
                )
                if found:
                    points.append((batch, *interval(list(found.values()))))
            if points:
                x, y, half = zip(*points)
                means += y
                # Side by side, or the intervals would cover each other.
                x, half = np.array(x) * 2 ** (0.08 * number - 0.2), np.nan_to_num(half)
                line = {"color": COLORS[name], "elinewidth": 1, "capsize": 2}
                axis.errorbar(x, y, half, **line, **style(name))
        axis.set_title(f"Fashion-MNIST, {kind}", fontsize=10)
    for name, values in PAPER.items():
        axes[2].plot(PAPER_BATCHES, values, color=COLORS[name], **style(name))
    axes[2].set_title("The paper: ImageNet, ResNetV2-50", fontsize=10)
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.set_xticks(PAPER_BATCHES if axis is axes[2] else batches)
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.set_xlabel("batch size" if axis is not axes[2] else "images per GPU")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    # A run that fell apart is in the table; the plot shows where the others differ.
    floor = max(min(means), np.median(means) - 15) if means else 0
    for axis in axes[:2]:
        axis.set_ylim(floor - 1.5, max(means, default=100) + 1.5)
    axes[0].set_ylabel("test accuracy, %")
    lines = dict(zip(*[axes[0].get_legend_handles_labels()[i] for i in (1, 0)]))
    lines |= dict(zip(*[axes[2].get_legend_handles_labels()[i] for i in (1, 0)]))
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=4, fontsize=9)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def style(name):
    ours = name.startswith("FRN")
    line = {"ls": "--"} if name.startswith("BatchRe") else {}
    return {"label": name, "marker": "o", "ms": 4, "lw": 2.2 if ours else 1.2, **line}


def plot_bars(rows, names, path):
    """Dice of the networks that segment volumes."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(7, 2.6), layout="constrained")
    for shift, (zero_mean, kind) in zip((-0.18, 0.18), KINDS.items()):
        found = [
            list(by_seed(rows, "dice", normalization=n, zero_mean=int(zero_mean)).values())
            for n in names
        ]
        means = [np.mean(f) if f else 0 for f in found]
        heights = np.arange(len(names)) + shift
        axis.barh(heights, means, 0.34, color="C1" if zero_mean else "0.7", label=kind)
        for height, values in zip(heights, found):
            axis.plot(values, [height] * len(values), "k|", ms=7)
    axis.set_yticks(np.arange(len(names)), names)
    axis.invert_yaxis()
    axis.set_xlabel("Dice, %; marks are seeds")
    values = [float(r["dice"]) for r in rows]
    axis.set_xlim(max(0, min(values) - 10), min(100, max(values) + 3))
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)
    plt.close(figure)
