"""The pictures of README.md and results/README.md, from the stored runs."""

import math

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle
from store import ROOT, select
from tables import METHODS, best_first, pair

PICTURES = ROOT / ".github" / "pictures"

# --- the collapse matrix

# The modes of common.diagnose: how the picture calls them, and their thresholds.
MODES = {
    "representation": ("one\npoint", 0.2),
    "dimensional": ("few\ndimensions", 0.5),
    "cluster": ("few\nclusters", 0.5),
    "intracluster": ("clusters\nare points", 0.05),
    "assignment": ("still\nuniform", 0.02),
}
ALIVE = plt.cm.Blues
COLLAPSED = plt.cm.Reds
NOTHING = "0.95"


def matrix(runs):
    """The diagnosis of every method on the drawn shapes with its mechanism and without it."""
    rows = []
    for method, _, _, mechanisms in METHODS:
        for flags in mechanisms:
            with_, without = pair(runs, method, flags)
            rows.append((method, flags, with_, without))

    figure, ax = plt.subplots(figsize=(11.5, 8.6), layout="constrained")
    columns = len(MODES) + 1
    second = columns + 0.4  # where the block without the mechanism begins
    names = []
    for y, (method, flags, with_, without) in enumerate(rows):
        if method not in names:
            names.append(method)
            ax.text(-0.15, y + 0.5, method, ha="right", va="center", fontsize=10)
            draw_diagnosis(ax, 0, y, with_)
        draw_diagnosis(ax, second, y, without)
        ax.text(
            second + columns + 0.1, y + 0.5, flags, va="center", fontsize=8.5, family="monospace"
        )

    above = {"ha": "center", "va": "bottom", "fontsize": 8}
    for x, title in ((0, "with the mechanism"), (second, "without it")):
        ax.text(x + 0.03, -1.5, title, fontsize=12, weight="bold")
        for i, (name, threshold) in enumerate(MODES.values()):
            ax.text(x + i + 0.5, -0.12, f"{name}\n< {threshold}", **above)
        ax.text(x + len(MODES) + 0.5, -0.12, "kNN\naccuracy\n", **above)
    floor = np.mean([with_["untrained"]["knn"] for _, _, with_, _ in rows])
    legend = (
        "Numbers go from 0, collapsed, to 1. Red: below the threshold, has collapsed in this way."
        " Blue: has not. Empty: the method has no codes.\n"
        f"–: follows from being one point. Before training kNN accuracy is {floor:.2f}."
    )
    ax.text(0.03, len(rows) + 0.35, legend, fontsize=9, va="top")
    ax.set(xlim=(-2.2, second + columns + 3.6), ylim=(len(rows) + 1.7, -1.95))
    ax.axis("off")
    figure.savefig(PICTURES / "matrix.png", dpi=130)
    plt.close(figure)


def draw_diagnosis(ax, x, y, run):
    """A run's row: one cell for each mode, and the accuracy."""
    centered = {"ha": "center", "va": "center"}
    for i, (mode, (_, threshold)) in enumerate(MODES.items()):
        number, verdict = run["diagnosis"][mode]
        if number is None:
            ax.add_patch(cell(x + i, y, NOTHING))
            continue
        if verdict == "implied":
            ax.add_patch(cell(x + i, y, NOTHING))
            ax.text(x + i + 0.5, y + 0.5, "–", color="0.6", **centered)
            continue
        if verdict in ("collapsed", "still uniform"):
            strength = 1 - number / threshold
            color = COLLAPSED(0.6 + 0.25 * strength)
            ink = "white"
        else:
            strength = (number - threshold) / (1 - threshold)
            color = ALIVE(0.15 + 0.45 * strength)
            ink = "black"
        ax.add_patch(cell(x + i, y, color))
        ax.text(x + i + 0.5, y + 0.5, f"{number:.2f}", fontsize=8.5, color=ink, **centered)
    accuracy = f"{run['trained']['knn']:.2f}"
    ax.text(x + len(MODES) + 0.5, y + 0.5, accuracy, fontsize=9, **centered)


def cell(x, y, color):
    return Rectangle((x + 0.03, y + 0.06), 0.94, 0.88, color=color, linewidth=0)


# --- spectra

WITH = "tab:blue"
WITHOUT = "tab:red"
# The curve without a method's first mechanism is solid, without its second dashed.
STYLES = {"solid": "-", "dashed": "--", "dotted": ":"}
FLOOR = 1e-8  # eigenvalues below it are drawn there


def spectra(runs):
    """The eigenvalues of the embeddings' covariance on the drawn shapes, with each method's
    mechanism and without it."""
    lines = math.ceil(len(METHODS) / 5)
    figure, axes = plt.subplots(
        lines, 5, figsize=(12, 2.27 * lines), sharex=True, sharey=True, layout="constrained"
    )
    panels = list(axes.flat)
    for ax in panels[len(METHODS) :]:
        ax.axis("off")
    for ax, (method, _, _, flags) in zip(panels, METHODS, strict=False):
        with_, _ = pair(runs, method, flags[0])
        draw_spectrum(ax, with_, WITH, "-")
        for i, flag in enumerate(flags):
            _, without = pair(runs, method, flag)
            style = list(STYLES)[i]
            draw_spectrum(ax, without, WITHOUT, STYLES[style])
            name = flag.replace(" --", "\n--")
            if len(flags) > 1:
                name += f" ({style})"
            place = {"ha": "right", "va": "top", "transform": ax.transAxes}
            ax.text(0.99, 0.98 - 0.1 * i, name, color=WITHOUT, fontsize=7.5, **place)
        ax.set_title(method, fontsize=10)
        ax.set(xticks=(0, 0.5, 1), ylim=(-8.3, 0.5))
        ax.grid(alpha=0.3)
    panels[0].text(0.3, 0.74, "with the mechanism", color=WITH, transform=panels[0].transAxes)
    panels[0].text(0.3, 0.61, "without it", color=WITHOUT, transform=panels[0].transAxes)
    figure.supxlabel("rank of the eigenvalue / number of dimensions", fontsize=10)
    figure.supylabel("log10 of the eigenvalue, at least -8", fontsize=10)
    figure.savefig(PICTURES / "spectra.png", dpi=130)
    plt.close(figure)


def draw_spectrum(ax, run, color, style):
    """The spectrum is scaled to the sum 1 - center_norm^2, which is the variance of the embeddings'
    directions. So the curve is low where all embeddings are near one point."""
    spectrum = np.float64(run["spectrum"])
    variance = 1 - run["trained"]["center_norm"] ** 2
    spectrum = spectrum / spectrum.sum() * variance
    place = np.linspace(0, 1, len(spectrum))
    ax.plot(place, np.log10(spectrum.clip(FLOOR)), color=color, linestyle=style)


# --- learning curves


def curves(runs):
    """kNN accuracy while training on the photographs, means over the seeds."""
    table = select(runs, "photographs")
    if not table:
        return
    figure, ax = plt.subplots(figsize=(9, 5.2), layout="constrained")
    ends = []
    for i, method in enumerate(best_first(table)):
        stacked = np.stack([run["knn_curve"] for run in select(table, "photographs", method)])
        epochs, knn = stacked.mean(0).T
        color = plt.cm.tab10(i % 10)
        style = list(STYLES.values())[i // 10]
        ax.plot(epochs, knn, color=color, linestyle=style, marker="o", markersize=2.5)
        ends.append((knn[-1], method, color))

    # The names stand at the ends of the curves, moved down where they would overlap.
    place = math.inf
    for end, method, color in sorted(ends, reverse=True):
        place = min(end, place - 0.0085)
        line = {"arrowstyle": "-", "color": color, "linewidth": 0.5, "relpos": (0, 0.5)}
        ax.annotate(
            method, (epochs[-1], end), (epochs[-1] * 1.04, place),
            color=color, fontsize=9, va="center", arrowprops=line,
        )  # fmt: skip

    floor = np.mean([run["knn_curve"][0, 1] for run in table])
    ax.axhline(floor, color="black", linestyle=":", linewidth=1)
    ax.annotate(
        "untrained network", (epochs[-1], floor), (0, -4),
        textcoords="offset points", ha="right", va="top", fontsize=9,
    )  # fmt: skip
    ax.set_xlim(0, epochs[-1] * 1.25)
    ax.set_xticks(epochs)
    ax.set_xlabel("epoch")
    ax.set_ylabel("kNN accuracy")
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(PICTURES / "curves.png", dpi=130)
    plt.close(figure)
