"""The two pictures of README.md, from the stored runs."""

import math

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt
from store import ROOT, select
from tables import METHODS, best_first, pair

PICTURES = ROOT / ".github" / "pictures"

# Without the second flag of a method the curve is dashed.
WITH = "tab:blue"
WITHOUT = "tab:red"
STYLES = ("-", "--")
FLOOR = 1e-8  # eigenvalues below it are drawn there


def mechanisms(runs):
    """The eigenvalues of the embeddings' covariance on the drawn shapes, with each method's
    mechanism and without it."""
    figure, axes = plt.subplots(
        3, 5, figsize=(12, 6.8), sharex=True, sharey=True, layout="constrained"
    )
    panels = list(axes.flat)
    for ax, (method, _, _, flags) in zip(panels, METHODS, strict=False):
        with_, _ = pair(runs, method, flags[0])
        draw_spectrum(ax, with_, WITH, "-")
        for i, flag in enumerate(flags):
            _, without = pair(runs, method, flag)
            draw_spectrum(ax, without, WITHOUT, STYLES[i])
            name = flag.replace(" --", "\n--")
            if len(flags) > 1:
                name += (" (solid)", " (dashed)")[i]
            place = {"ha": "right", "va": "top", "transform": ax.transAxes}
            ax.text(0.99, 0.98 - 0.1 * i, name, color=WITHOUT, fontsize=7.5, **place)
        ax.set_title(method, fontsize=10)
        ax.set(xticks=(0, 0.5, 1), ylim=(-8.3, 0.5))
        ax.grid(alpha=0.3)
    for ax in panels[len(METHODS) :]:
        ax.axis("off")
        ax.text(0.1, 0.6, "with the mechanism", color=WITH, transform=ax.transAxes)
        ax.text(0.1, 0.4, "without it", color=WITHOUT, transform=ax.transAxes)
    figure.supxlabel("rank of the eigenvalue / number of dimensions", fontsize=10)
    figure.supylabel("log10 of the eigenvalue, at least -8", fontsize=10)
    figure.savefig(PICTURES / "mechanisms.png", dpi=130)
    plt.close(figure)


def draw_spectrum(ax, run, color, style):
    """The spectrum is scaled to the sum 1 - center_norm^2, which is the variance of the embeddings'
    directions. So the curve is low where all embeddings are near one point."""
    spectrum = np.float64(run["spectrum"])
    variance = 1 - run["trained"]["center_norm"] ** 2
    spectrum = spectrum / spectrum.sum() * variance
    place = np.linspace(0, 1, len(spectrum))
    ax.plot(place, np.log10(spectrum.clip(FLOOR)), color=color, linestyle=style)


def curves(runs):
    """kNN accuracy while training, of all methods at one budget, means over the seeds."""
    table = select(runs, "budget")
    figure, ax = plt.subplots(figsize=(9, 5.2), layout="constrained")
    ends = []
    for i, method in enumerate(best_first(table)):
        stacked = np.stack([run["knn_curve"] for run in select(table, "budget", method)])
        epochs, knn = stacked.mean(0).T
        color = plt.cm.tab10(i % 10)
        style = STYLES[i // 10]
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
