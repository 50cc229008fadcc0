"""Did it collapse, and how? Collapse modes, spectra, entropies and pictures of one or several checkpoints.

    python analyze.py runs/cplearn-cifar10-seed0 runs/barlow_twins-cifar10-seed0
    python analyze.py --codes 128 128 16384 --out codes        random codes alone, without a checkpoint

DIR/report.html holds everything and opens in any browser. Beside it are the pictures as PNG, the numbers as report.json
and the arrays behind the curves as report.npz.

diagnosis   the four collapses of "Collapse-Proof Non-Contrastive Self-Supervised Learning". Each is a number in [0, 1].
            Below its threshold the mode has collapsed. `diagnose` defines the numbers
spectra     eigenvalues of the covariance of embeddings and features, divided by their mean squared norm (Figure 6a)
entropy     of Gaussian mixtures with more and more components, fitted to the embeddings, from 10,000 draws (Figure 6b).
            It is low where embeddings form tight clusters. In nats for each dimension, at a mean variance of 1
matrices    correlations of the embedding's dimensions, and cosines of the images sorted by cluster (Figure 4)
curves      what training logged: each loss term and metric, on linear and on logarithmic axes (Figures 12a and 16)
t-SNE       of the features, coloured by class (Figure 12c)
nearest     the images nearest to the most used codes, prototypes or k-means centers

All is measured on un-augmented test images, with the network in eval mode. Embeddings are of the layer that the loss
acts on. Checkpoints of different data sets are each measured on their own.
"""

import argparse
import base64
import dataclasses
import html
import io
import json
import math
import os
import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib import ticker
from PIL import Image
from sklearn.manifold import TSNE
from tqdm import tqdm

import common
import evaluate

COMPONENTS = [10, 20, 50, 100, 200, 500, 1000]
# Okabe and Ito's colours for lines, Tol's "muted" for classes: both can be told apart by colour-blind readers.
LINES = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999933"]
CLASSES = ["#CC6677", "#332288", "#DDCC77", "#117733", "#88CCEE", "#882255", "#44AA99", "#999933", "#AA4499", "#777777"]
plt.rcParams.update({
    "figure.dpi": 120, "savefig.dpi": 240, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.alpha": 0.3, "legend.frameon": False, "figure.constrained_layout.use": True,
    "savefig.bbox": "tight", "figure.max_open_warning": 0,
})  # fmt: skip

# --- numbers


def spectrum_auc(spectrum):
    """Area under the cumulative share of a spectrum (m,), largest first, as a mean over its ranks (Li, Efros and
    Pathak, 2022). It is (m + 1) / 2m for a flat spectrum, 1 for one direction, NaN if all is 0."""
    return (spectrum.cumsum(0) / spectrum.sum()).mean().item()


def power_law(spectrum):
    """The exponent alpha of spectrum_i ~ i^-alpha (Ghosh et al., 2022), by least squares in logarithms.

    Ranks below 1e-7 of the first are left out. Weights 1 / i make octaves count alike. NaN for fewer than two ranks.
    """
    values = spectrum[spectrum > 1e-7 * spectrum[0]].log()
    x = torch.arange(1, len(values) + 1, device=values.device).to(values).log()
    weight = (-x).softmax(0)
    x = x - (weight * x).sum()
    return -((weight * x * values).sum() / (weight * x * x).sum()).item()


def unit_variance(z):
    """z (n, d) centered and scaled to a mean variance of 1 over its dimensions, float32. Zeros where z is constant.

    Entropies are taken of it, so that embeddings of all scales compare.
    """
    z = z.detach().double()
    scale = common.covariance_spectrum(z).sum() / z.shape[1]
    return ((z - z.mean(0)) * (scale.rsqrt() if scale > 0 else 0)).float()


def logdet_entropy(z, floor=1e-3):
    """Entropy in nats of a Gaussian with the covariance of z (n, d): ½ Σ_j log(2πe (lambda_j + floor)).

    It is exact if z is Gaussian and n >> d. Else it is too high, because of all distributions with one covariance the
    Gaussian has the highest entropy. Few points make it too low.
    """
    spectrum = common.covariance_spectrum(z)
    missing = z.shape[1] - len(spectrum)  # directions in which too few points have no variance
    spectrum = torch.nn.functional.pad(spectrum, (0, missing))
    return (spectrum + floor).log().sum().item() / 2 + z.shape[1] * GAUSS


def pairwise_entropy(z, noise=0.1):
    """Lower and upper bound, in nats, of the entropy of z (n, d) with Gaussian noise of variance `noise` added.

    With noise z is a mixture of n Gaussians around its points. The bounds are ½ d log(2πe noise) - mean_i log mean_j
    exp(-D_ij), with D the Bhattacharyya and the Kullback-Leibler distance (Kolchinsky and Tracey, 2017, Eqs. 10, 13).
    Both are right within log n. They tell little where all points are further apart than the noise.
    """
    z = z.detach().double()
    base, n = z.shape[1] * (GAUSS + math.log(noise) / 2), len(z)
    sums = [0.0, 0.0]
    for part in z.split(1000):
        distance = torch.cdist(part, z).square()
        for i, scale in enumerate((8, 2)):
            sums[i] += (math.log(n) - (-distance / (scale * noise)).logsumexp(1)).sum().item()
    return tuple(base + total / n for total in sums)


GAUSS = (math.log(2 * math.pi) + 1) / 2  # entropy of a Gaussian of variance 1, in nats


def log_joint(x, weights, means, variances):
    """log(weight_k N(x_i; mean_k, variance_k)), (n, k)."""
    precision = 1 / variances
    quadratic = (x * x) @ precision.T - 2 * x @ (means * precision).T + (means * means * precision).sum(1)
    return weights.log() - (quadratic + variances.log().sum(1) + x.shape[1] * math.log(2 * math.pi)) / 2


def mixture_of(x, shares, floor):
    """Weights, means and variances of components that own `shares` (n, k) of the points x (n, d)."""
    count = shares.sum(0) + 10 * torch.finfo(x.dtype).eps
    means = shares.T @ x / count[:, None]
    variances = (shares.T @ (x * x) / count[:, None] - means * means).clamp_min(0) + floor
    return count / count.sum(), means, variances


def fit_mixture(x, k, iterations=100, tolerance=1e-3, floor=1e-3, start=None):
    """A Gaussian mixture of `k` components with diagonal covariance, fitted to x (n, d) by expectation maximisation.

    Returns (weights (k,), means (k, d), variances (k, d)) and its mean log-likelihood in nats before the last step.
    `floor` is added to each variance, so that a component of one point keeps some. The fit starts at the mixture
    `start`, or from k-means, and ends when the log-likelihood gains less than `tolerance`.
    """
    if start is None:
        assigned = evaluate.kmeans(x, k, restarts=1, iterations=10)[0]
        start = mixture_of(x, torch.nn.functional.one_hot(assigned, min(k, len(x))).to(x), floor)
    mixture, before = start, -math.inf
    for _ in range(iterations):
        joint = log_joint(x, *mixture)
        total = joint.logsumexp(1, keepdim=True)
        likelihood = total.mean().item()
        mixture = mixture_of(x, (joint - total).exp(), floor)
        if likelihood - before < tolerance:
            break
        before = likelihood
    return mixture, likelihood


def mixture_entropy(mixture, samples=10_000):
    """Entropy of a Gaussian mixture in nats by Monte Carlo, -mean log p over draws ("Collapse-Proof ...", Section 4).

    It is unbiased for the mixture. The mixture itself is narrower than the data, the more components it has for them.
    """
    weights, means, variances = mixture
    rng = common.generator(0)
    chosen = torch.multinomial(weights.cpu().double(), samples, replacement=True, generator=rng).to(means.device)
    noise = torch.randn(samples, means.shape[1], generator=rng).to(means)
    x = means[chosen] + variances[chosen].sqrt() * noise
    return -log_joint(x, weights, means, variances).logsumexp(1).mean().item()


def cluster_gap(z, queries=1000):
    """How much embeddings z (n, d) vary within clusters, from 0 (not at all). It needs no assignments.

    For a point with distances r_1 <= r_2 <= ... to the others it is min_k r_k / r_{k+1}, the largest jump, over the
    nearest nine tenths. The result is the median over up to `queries` points. Points without clusters have 0.36 in one
    dimension, where the ratios are U^(1/k) of uniform U, and more in more dimensions. Clusters with points 20 times
    closer to one another than to the rest have 0.05.
    """
    z = z.detach().double()
    some = common.evenly_spaced(z, queries)
    distance = torch.cdist(z[some], z)
    distance[torch.arange(len(some), device=z.device), some] = -1  # the point itself comes first
    distance = distance.sort(1).values[:, 1 : max(3, int(0.9 * len(z)))]
    ratio = torch.where(distance[:, 1:] > 0, distance[:, :-1] / distance[:, 1:], 1)
    ratio[distance[:, -1] == 0] = 0
    return ratio.amin(1).median().item()


def diagnose(z, codes=None, clusters=None, inputs=None, entropy=None):
    """Which of the four collapses of "Collapse-Proof ..." (Figure 1) the embeddings z (n, d) suffer, and whether their
    assignments have left the uniform start.

    `codes` (n,) are the assigned codes or prototypes, of `clusters` in all. `entropy` (n,) is the entropy of each
    assignment over log(clusters). `inputs` is how many numbers an image (or a point) has. Returns {mode: {"number",
    "threshold", "verdict"}}. Each number is in [0, 1]. Below its threshold the mode has collapsed:

    representation  1 - center_norm², the variance of the directions. 0.2 means a center vector of length 0.89
    dimensional     log(effective rank) / log(dimensions). At 0.5 the effective rank is the root of the dimensions
    cluster         log(effective codes) / log(clusters), with exp of the entropy of their use as effective codes
    intracluster    `cluster_gap`. At 0.05 most points are 20 times closer to their own cluster than to the next
    assignment      1 - mean entropy. Below 0.02 each image is assigned to all codes alike: "still uniform"

    Dimensions count up to n - 1, clusters up to n. No higher rank than `inputs` is asked for, because embeddings of
    points in a plane that span a plane have lost nothing. Where all embeddings are one vector, the other collapses are
    "implied". Without codes, cluster and assignment are undefined: verdict "no codes", number None. Raises ValueError
    for fewer than four embeddings.
    """
    thresholds = {"representation": 0.2, "dimensional": 0.5, "cluster": 0.5, "intracluster": 0.05, "assignment": 0.02}
    n, d = z.shape
    if n < 4:
        raise ValueError(f"a diagnosis needs at least 4 embeddings, not {n}")
    rank = common.effective_rank(z)
    dimensions = max(2, min(n - 1, d, inputs**2 if inputs else d))  # squared, because below its root is collapse
    numbers = {
        "representation": 1 - common.center_norm(z) ** 2 if rank else 0.0,
        "dimensional": min(1.0, math.log(max(1, rank)) / math.log(dimensions)),
        "cluster": None,
        "intracluster": cluster_gap(z) if rank else 0.0,
        "assignment": None if entropy is None else 1 - entropy.mean().item(),
    }
    if codes is not None:
        use = torch.bincount(codes.cpu()).double() / n
        numbers["cluster"] = torch.special.entr(use).sum().item() / math.log(max(2, min(n, clusters)))
    point = numbers["representation"] < thresholds["representation"]
    report = {}
    for mode, number in numbers.items():
        if point and mode in ("dimensional", "cluster", "intracluster"):
            verdict = "implied"
        elif number is None:
            verdict = "no codes"
        else:
            bad = "still uniform" if mode == "assignment" else "collapsed"
            verdict = bad if number < thresholds[mode] else "ok"
        report[mode] = {"number": number, "threshold": thresholds[mode], "verdict": verdict}
    return report


def measure(path, model, data, components, bar):
    """All of a checkpoint's model on the test images: numbers, as a dict for JSON; the arrays behind its curves; and
    what the pictures need: `features`, `embedding`, assigned `clusters` and, for the largest of them, `nearest`, the
    indices of the images nearest to each."""
    out = common.extract(model, data.test_images, data)
    evaluate.check_finite(path, out)
    features, embedding = out["features"], out["embedding"]
    codes, count = out.get("codes"), evaluate.count_codes(model, embedding)
    n, d = embedding.shape
    spectra = {name: common.covariance_spectrum(out[name]) for name in ("embedding", "features")}
    scaled = unit_variance(embedding)
    bar.update()
    mixtures = {}
    for k in components:
        if k <= n // 2:
            mixtures[k] = mixture_entropy(fit_mixture(scaled, k)[0]) / d
        bar.update()
    clusters, nearest, by = assign(model, data, out)
    numbers = {
        "images": n,
        "dimensions": {"embedding": d, "features": features.shape[1]},
        "diagnosis": diagnose(embedding, codes, count, data.test_images[0].numel(), out.get("entropy")),
        "center_norm": common.center_norm(embedding),
        "correlation": common.average_correlation(embedding),
        "effective_rank": {name: common.effective_rank(out[name]) for name in spectra},
        "auc": {name: spectrum_auc(spectrum) for name, spectrum in spectra.items()},
        "power_law": {name: power_law(spectrum) for name, spectrum in spectra.items()},
        "entropy": {
            "mixture": mixtures,
            "logdet": logdet_entropy(scaled) / d,
            "pairwise": [bound / d for bound in pairwise_entropy(scaled)],
        },
        "clusters": {"by": by, "used": len(np.unique(clusters)), "of": count or len(data.classes)},
    }
    bar.update()
    arrays = {f"spectrum_{name}": spectrum.cpu().numpy() for name, spectrum in spectra.items()}
    arrays |= {f"square_{name}": out[name].square().sum(1).mean().cpu().numpy() for name in spectra}
    arrays |= {"entropy_components": np.array(list(mixtures)), "entropy_mixture": np.array(list(mixtures.values()))}
    arrays |= {"clusters": clusters, "labels": data.test_labels.cpu().numpy()}
    pictures = {"features": features.cpu(), "embedding": embedding.cpu(), "clusters": clusters}
    return numbers, arrays, pictures | {"nearest": nearest}


@torch.no_grad()
def assign(model, data, out):
    """Clusters (n,), the images nearest to the eight largest and by what they were assigned: the method's codes, or
    k-means on the features where it has none."""
    if "codes" in out:
        clusters = out["codes"].cpu().numpy()
    else:
        clusters, centers = evaluate.kmeans(out["features"], len(data.classes))
        clusters = clusters.cpu().numpy()
    names, sizes = np.unique(clusters, return_counts=True)
    largest = names[np.argsort(-sizes, kind="stable")[:8]]
    if "codes" in out:
        parts = out["embedding"].split(64)
        closeness = torch.cat([model.scores(z)[:, largest].cpu() for z in parts]).numpy()
    else:
        closeness = -torch.cdist(out["features"], centers[largest]).cpu().numpy()
    nearest = {int(c): np.argsort(-closeness[:, i], kind="stable")[:10] for i, c in enumerate(largest)}
    return clusters, nearest, "codes" if "codes" in out else "k-means"


# --- pictures


def legend(axes, names):
    """One legend for all axes, below them, where it covers no data."""
    handles, labels = axes.get_legend_handles_labels()
    if len(names) > 1:
        axes.figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(names)))


def style(i):
    return {"color": LINES[i % len(LINES)], "linestyle": ["-", "--", ":"][i // len(LINES) % 3], "linewidth": 1.4}


def log_axes(ax, which):
    """Logarithmic x, y or both axes with ticks at 1, 2, 5 times powers of ten, written as plain numbers."""
    for name in which:
        ax.set(**{f"{name}scale": "log"})
        axis = getattr(ax, f"{name}axis")
        axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5), numticks=8))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_locator(ticker.NullLocator())


def draw_spectra(arrays):
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.6), sharey=True)
    for ax, name in zip(axes, ("embedding", "features"), strict=True):
        for i, (label, a) in enumerate(arrays.items()):
            share = a[f"spectrum_{name}"] / max(float(a[f"square_{name}"]), 1e-300)
            # Below a ten-millionth of the first is float32's rounding, not the network.
            share = np.where(share > 1e-7 * share[:1], share, np.nan)
            ax.plot(np.arange(1, len(share) + 1), share, label=label, **style(i))
        ax.set(title=name, xlabel="rank of the eigenvalue", yscale="log")
    axes[0].set_ylabel("eigenvalue of the covariance / mean square")
    legend(axes[0], arrays)
    return figure


def draw_entropy(arrays):
    figure, ax = plt.subplots(figsize=(5.6, 3.6))
    for i, (label, a) in enumerate(arrays.items()):
        ax.plot(a["entropy_components"], a["entropy_mixture"], marker="o", markersize=3, label=label, **style(i))
    ax.axhline((1 + np.log(2 * np.pi)) / 2, color="gray", linewidth=0.8)
    ax.annotate("isotropic Gaussian", (0.99, (1 + np.log(2 * np.pi)) / 2), xycoords=("axes fraction", "data"),
                ha="right", va="bottom", color="gray", fontsize=8)  # fmt: skip
    ax.set(xlabel="components of the mixture", ylabel="entropy [nats per dimension]")
    log_axes(ax, "x")
    ax.margins(y=0.1)
    legend(ax, arrays)
    return figure


def draw_matrices(label, picture):
    """Correlations of up to 512 dimensions, and cosines of up to 512 images in the order of their clusters."""
    z = picture["embedding"].double()
    some = common.evenly_spaced(z, 512)
    some = some[np.argsort(picture["clusters"][some], kind="stable")]
    correlation = torch.nn.functional.normalize(z - z.mean(0), dim=0)[:, common.evenly_spaced(z.T, 512)]
    directions = torch.nn.functional.normalize(z[some], dim=1)
    figure, axes = plt.subplots(1, 2, figsize=(8.2, 3.4))
    figure.suptitle(label)
    for ax, matrix, what, whole, measure in (
        (axes[0], correlation.T @ correlation, "dimension of the embedding", z.shape[1], "correlation"),
        (axes[1], directions @ directions.T, "image, sorted by cluster", len(z), "cosine"),
    ):
        ax.grid(False)
        shown = ax.imshow(matrix.numpy(), cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
        what += f" ({len(matrix)} of {whole})" if len(matrix) < whole else ""
        ax.set(xlabel=what, ylabel=what)
        figure.colorbar(shown, ax=ax, label=measure, shrink=0.8)
    return figure


def draw_curves(logs, methods, scale):
    """A panel for each quantity that the logs hold, over epochs. Metrics share one, loss terms only within a method.
    With scale "log" epochs are, which leaves out 0, before training, and values where they are positive and span more
    than a factor of 3."""
    metrics = ("knn", "center_norm", "effective_rank", "correlation", "used_codes", "assignment_entropy")
    panels = {}
    for label, log in logs.items():
        for line in log:
            for name in line.keys() - {"epoch", "lr", "images_per_second"}:
                if scale == "linear" or line["epoch"]:
                    title = name if name in metrics else f"{methods[label]}: {name}"
                    panels.setdefault(title, {}).setdefault(label, []).append((line["epoch"], line[name]))
    order = sorted(panels, key=lambda title: (metrics.index(title) if title in metrics else 9, title))
    rows = -(-len(order) // 3)
    figure, axes = plt.subplots(rows, 3, figsize=(9, 2.3 * rows), squeeze=False)
    for ax in axes.flat[len(order) :]:
        ax.remove()
    lines = {}
    for ax, title in zip(axes.flat, order, strict=False):
        for label, points in panels[title].items():
            marker = "." if len(points) < 20 else None
            (lines[label],) = ax.plot(*zip(*points, strict=True), marker=marker, **style(list(logs).index(label)))
        ax.set(title=title.replace("_", " "), xlabel="epoch")
        if scale == "log":
            values = [y for points in panels[title].values() for _, y in points]
            log_axes(ax, "xy" if 0 < 3 * min(values) < max(values) else "x")
    if len(lines) > 1:
        figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=min(3, len(lines)))
    return figure


def draw_tsne(pictures, arrays, classes):
    """Features of up to 2,000 images in the plane, a panel for each checkpoint, coloured by class."""
    columns = 2 if len(pictures) in (2, 4) else min(3, len(pictures))
    rows = -(-len(pictures) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.4 * columns, 3.4 * rows + 0.6), squeeze=False)
    for ax in axes.flat[len(pictures) :]:
        ax.remove()
    for ax, (label, picture) in zip(axes.flat, pictures.items(), strict=False):
        some = common.evenly_spaced(picture["features"], 2000)
        features, labels = picture["features"][some].numpy(), arrays[label]["labels"][some]
        ax.set(title=label, xticks=[], yticks=[])
        ax.spines[:].set_visible(True)
        if len(some) < 4 or np.ptp(features, 0).max() == 0:
            ax.text(0.5, 0.5, "too few images" if len(some) < 4 else "all features are equal", ha="center")
            continue
        # The first coordinates along two random directions, as PCA divides by zero where features are of rank 1.
        flat = TSNE(perplexity=min(30, (len(some) - 1) / 3), init="random", random_state=0).fit_transform(features)
        for c, name in enumerate(classes[label]):
            chosen = labels == c
            color = CLASSES[c] if len(classes[label]) <= len(CLASSES) else plt.cm.viridis(c / len(classes[label]))
            ax.scatter(*flat[chosen].T, s=6, color=color, label=name, linewidths=0)
    shown = max(classes.values(), key=len)
    if len(shown) <= len(CLASSES) and len({tuple(c) for c in classes.values()}) == 1:
        handles, names = axes.flat[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=min(5, len(shown)), markerscale=3)
    return figure


def draw_nearest(label, picture, data):
    """A row for each of the largest clusters, with the images nearest to it; for toys all points, coloured."""
    images = data.test_images.cpu().numpy()
    if images.ndim == 2:
        figure, ax = plt.subplots(figsize=(4.4, 3.6))
        if len(set(picture["clusters"].tolist())) > len(picture["nearest"]):
            ax.scatter(*images.T, s=4, color="lightgray", linewidths=0, label="other")
        for i, cluster in enumerate(picture["nearest"]):
            ax.scatter(*images[picture["clusters"] == cluster].T, s=4, color=LINES[i], linewidths=0, label=f"{cluster}")
        ax.set(title=label, xlabel="first coordinate", ylabel="second coordinate")
        figure.legend(title="cluster", loc="outside right center", markerscale=3)
        return figure
    figure, axes = plt.subplots(len(picture["nearest"]), 10, figsize=(8, 0.85 * len(picture["nearest"])), squeeze=False)
    figure.suptitle(label)
    for row, (cluster, nearest) in zip(axes, picture["nearest"].items(), strict=True):
        for ax in row:
            ax.axis("off")
        for ax, i in zip(row, nearest, strict=False):
            ax.imshow(images[i].transpose(1, 2, 0))
        size = (picture["clusters"] == cluster).sum()
        row[0].text(-0.15, 0.5, f"{cluster}\n{size} images", ha="right", va="center", transform=row[0].transAxes)
    return figure


def draw_codes(f, sizes):
    """WᵀW / f of dictionaries of codes, Rademacher above Hadamard, and the histogram of its entries off the diagonal,
    with what chance gives: cos = (2 B - f) / f with B binomial, so mean 0 and variance 1 / f (Eq. 5)."""
    figure, axes = plt.subplots(3, len(sizes), figsize=(2.9 * len(sizes) + 0.6, 8), squeeze=False)
    numbers, arrays = [], {}
    log_binomial = [math.lgamma(f + 1) - math.lgamma(b + 1) - math.lgamma(f - b + 1) for b in range(f + 1)]
    expected = np.exp(np.array(log_binomial) - f * math.log(2))
    cosines = 2 * np.arange(f + 1) / f - 1
    for column, c in zip(axes.T, sizes, strict=True):
        entry = {"f": f, "c": c}
        for ax, kind in zip(column, ("rademacher", "hadamard"), strict=False):
            ax.grid(False)
            if kind == "hadamard" and (f & (f - 1) or c > f):
                ax.text(0.5, 0.5, "Hadamard needs f a power\nof two and c at most f", ha="center", va="center")
                ax.axis("off")
                continue
            w = evaluate.load_method("cplearn").draw_codes(kind, f, c, seed=0).float()
            some = (w[:, :128].T @ w[:, :128] / f).numpy()
            shown = ax.imshow(some, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
            ax.set(title=f"{kind.capitalize()}, c = {c}" + (", first 128" if c > 128 else ""), xlabel="code")
            counts = torch.zeros(f + 1, dtype=torch.float64)
            for part in w.split(1024, 1):
                agree = ((part.T @ w + f) / 2).round().long()
                counts += torch.bincount(agree.flatten(), minlength=f + 1)
            counts[f] -= c  # each code with itself
            share = (counts / counts.sum()).numpy()
            average = (share * cosines).sum()
            entry[kind] = {"mean": average, "variance": (share * (cosines - average) ** 2).sum()}
            arrays[f"{kind}_{c}"] = share
            width = 2 / f if kind == "rademacher" else 0.5 / f
            color = LINES[0] if kind == "rademacher" else LINES[1]
            column[2].bar(cosines, share, width, color=color, alpha=0.7, label=kind.capitalize())
        column[2].plot(cosines, expected, color="black", linewidth=1, label="binomial")
        limit = 6 / math.sqrt(f)
        column[2].set(xlim=(-limit, limit), yscale="log", ylim=(1e-6, 2), xlabel="cosine of two codes")
        numbers.append(entry | {"variance_expected": 1 / f})
    axes[0, 0].set_ylabel("code")
    axes[2, 0].set_ylabel("share of the pairs")
    figure.colorbar(shown, ax=axes[:2], label="cosine", shrink=0.6)
    figure.legend(*axes[2, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure, numbers, arrays | {"cosines": cosines, "binomial": expected}


# --- the report

CAPTIONS = {
    "spectra": "Spectra of the covariance over the mean squared norm. A curve that falls early has few directions "
    "left: dimensional collapse. One that starts low varies little about its mean: representation collapse. "
    "Eigenvalues below float32's rounding, a ten-millionth of the largest, are not drawn.",
    "entropy": "Entropy of Gaussian mixtures with diagonal covariance fitted to the embeddings, by 10,000 draws. It "
    "falls where embeddings huddle in clusters: intracluster collapse. Mixtures of more components than half the "
    "images are left out; each variance has a floor of a thousandth of the mean variance. Embeddings are scaled to "
    "variance 1: of nearly equal ones this sees the little in which they differ.",
    "curves_linear": "What training logged; epoch 0 is the untrained network.",
    "curves_log": "The same over logarithmic epochs, without epoch 0; values too where they span more than a factor "
    "of 3.",
    "tsne": "t-SNE of the features, coloured by class. Distances between groups mean little.",
    "matrices": "Left: correlation of the embedding's dimensions; off the diagonal, white is decorrelated. "
    "Right: cosines of images, sorted by cluster; blocks are clusters, red all over is representation collapse.",
    "nearest": "What the largest clusters hold: the images nearest to each.",
    "codes": "Cosines of the dictionary's codes with one another: the larger f, the nearer to orthogonal; c does not "
    "matter (Eq. 5). Black: the binomial distribution that chance gives.",
}
STYLE = """body { font: 15px/1.5 system-ui, sans-serif; max-width: 1120px; margin: auto; padding: 2em 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0; font-size: 13px } img { max-width: 100%; height: auto }
th, td { padding: .3em .6em; border-bottom: 1px solid #ccc; text-align: right; vertical-align: bottom }
th:first-child, td:first-child { text-align: left; overflow-wrap: anywhere; min-width: 10em }
figure { margin: 2em 0 } figcaption { color: #555 }
.collapsed { background: #f9d6c4 } .implied { background: #fbeee6 } .ok { background: #dcefe6 }"""


def table(head, rows):
    """An HTML table; a cell is text, or a pair of text and class."""
    cells = [[(cell, "") if isinstance(cell, str) else cell for cell in row] for row in rows]
    lines = ["".join(f"<th>{html.escape(name)}</th>" for name in head)]
    lines += ["".join(f'<td class="{kind}">{html.escape(text)}</td>' for text, kind in row) for row in cells]
    return "<table>" + "\n".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def tables(numbers):
    """The diagnosis and the other numbers of all checkpoints as HTML."""
    modes = list(next(iter(numbers.values()))["diagnosis"])
    rows = []
    for label, entry in numbers.items():
        cells = []
        for report in entry["diagnosis"].values():
            number = "" if report["number"] is None else f"{report['number']:.2f} "
            cells.append((number + report["verdict"], report["verdict"]))
        rows.append([label, entry["method"], entry["dataset"], str(entry["epoch"]), *cells])
    first = next(iter(numbers.values()))["diagnosis"]
    heads = [f"{mode} (<\u00a0{first[mode]['threshold']:g})" for mode in modes]
    text = "<h2>Diagnosis</h2>" + table(["checkpoint", "method", "data", "epoch", *heads], rows)
    text += (
        "<p>Each number is in [0, 1]; below the threshold the mode has collapsed. Representation: variance of the "
        "embeddings' directions. Dimensional: logarithm of the effective rank over that of the dimensions. Cluster: "
        "the same of the codes in use. Intracluster: distance to the own cluster over distance to the next. "
        "Assignment: 1 - the mean entropy of an image's assignment over the logarithm of the codes; where it is still "
        "uniform, training has not left its start. Where all embeddings are one vector, the other collapses are "
        "implied.</p><h2>Numbers</h2>"
    )
    rows = []
    for label, e in numbers.items():
        mixture = list(e["entropy"]["mixture"].items())
        rows.append([
            label, str(e["images"]), f"{e['center_norm']:.3f}", f"{e['correlation']:.3f}",
            *(f"{e['effective_rank'][k]:.1f} of {e['dimensions'][k]}" for k in ("embedding", "features")),
            f"{e['auc']['embedding']:.3f}", f"{e['power_law']['embedding']:.2f}",
            f"{mixture[-1][1]:.3f} ({mixture[-1][0]})" if mixture else "", f"{e['entropy']['logdet']:.3f}",
            "{:.3f} to {:.3f}".format(*e["entropy"]["pairwise"]),
            f"{e['clusters']['used']} of {e['clusters']['of']} {e['clusters']['by']}",
        ])  # fmt: skip
    head = ["checkpoint", "images", "center norm", "correlation", "effective rank", "of features", "AUC", "power law",
            "entropy, mixture of", "log-det", "pairwise", "clusters used"]  # fmt: skip
    return text + table(head, rows) + "<p>Entropies are in nats per dimension.</p>"


def write_report(folder, title, intro, numbers, arrays, figures):
    """Writes report.json, report.npz, a PNG for each figure {name: (figure, caption)} and report.html."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{STYLE}</style><h1>{title}</h1>"
    ]
    parts.append(intro)
    for name, (figure, caption) in figures.items():
        png, webp = io.BytesIO(), io.BytesIO()
        figure.savefig(png, format="png")
        plt.close(figure)
        common.atomic_write(folder / f"{name}.png", lambda file, png=png: file.write(png.getvalue()))
        with Image.open(png) as image:
            image.convert("RGB").save(webp, "webp", quality=60)  # a third of the size, in the page
            width = image.width // 2  # two pixels of the picture for each of the page: sharp on dense screens
        data = base64.b64encode(webp.getvalue()).decode()
        alt, caption = html.escape(name), html.escape(caption)
        parts.append(
            f'<figure><img alt="{alt}" width="{width}" src="data:image/webp;base64,{data}">'
            f"<figcaption>{caption}</figcaption></figure>"
        )
    common.atomic_write(folder / "report.json", lambda file: file.write(json.dumps(finite(numbers), indent=2).encode()))
    common.atomic_write(folder / "report.npz", lambda file: np.savez_compressed(file, **arrays))
    common.atomic_write(folder / "report.html", lambda file: file.write("\n".join(parts).encode()))
    print(f"wrote {folder / 'report.html'} and {len(figures)} pictures, report.json, report.npz")


def finite(value):
    """The value with NaN as None, which JSON can hold."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def read_log(path):
    """The epochs' lines of the log beside a checkpoint, an empty list if there is none."""
    log = (path if path.is_dir() else path.parent) / "log.jsonl"
    try:
        lines = [json.loads(line) for line in log.read_text().splitlines()[1:]] if log.exists() else []
        if not all("epoch" in line and all(isinstance(v, int | float) for v in line.values()) for line in lines):
            raise ValueError
    except (ValueError, AttributeError, TypeError):
        common.fail(f"{str(log)!r} is damaged: remove it, and the curves are left out")
    return lines


def labels_of(paths):
    """The run folders' names, with as many folders above as tell them apart."""
    folders = [(path if path.is_dir() else path.parent).resolve() for path in paths]
    for depth in range(1, 10):
        labels = ["/".join(folder.parts[-depth:]) for folder in folders]
        if len(set(labels)) == len(set(folders)) == len(folders):
            return labels
    return [str(path) for path in paths]


def main():
    parser = common.Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    evaluate.add_checkpoint_flags(parser, "*")
    parser.add_argument("--out", default="report", metavar="DIR", help="folder for it, files are overwritten [report]")
    parser.add_argument(
        "--codes", nargs="+", type=int, metavar="N", help="f c [c ...]: dimensions, then numbers of codes"
    )
    parser.add_argument("--components", nargs="+", type=int, default=COMPONENTS, metavar="K",
                        help=f"sizes of the mixtures {COMPONENTS}; fewer or smaller ones are faster")  # fmt: skip
    parser.add_argument("--images", type=int, default=10_000, help="at most so many test images [10000]")
    options = parser.parse_args()
    if bool(options.codes) == bool(options.checkpoints):
        common.fail("give either checkpoints or --codes f c ... (see --help)")
    if options.codes and (len(options.codes) < 2 or options.codes[0] < 1 or min(options.codes[1:]) < 2):
        common.fail(
            "--codes wants the dimensions f and at least one number of codes c of 2 or more, as in --codes 128 16384"
        )
    if min(options.components) < 1 or options.images < 4:
        common.fail("--components must be at least 1 and --images at least 4")
    device = common.find_device(options.device)
    folder = Path(options.out)
    above = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        common.fail(f"cannot write to {options.out!r}: choose another --out")

    if options.codes:
        figure, numbers, arrays = draw_codes(options.codes[0], options.codes[1:])
        rows = [
            [str(e["c"]), kind, f"{e[kind]['mean']:.2e}", f"{e[kind]['variance']:.6f}", f"{e['variance_expected']:.6f}"]
            for e in numbers
            for kind in ("rademacher", "hadamard")
            if kind in e
        ]
        intro = table(["c", "codes", "mean cosine", "variance", "1 / f"], rows)
        title = f"Codes of {options.codes[0]} dimensions"
        write_report(folder, title, intro, numbers, arrays, {"codes": (figure, CAPTIONS["codes"])})
        return

    jobs = evaluate.read_checkpoints(options)
    names = labels_of([Path(path) for path in options.checkpoints])
    datasets = {path: options.dataset or state["args"]["dataset"] for path, state, _ in jobs}
    read = {path: read_log(Path(path)) for path in options.checkpoints}
    numbers, arrays, pictures, classes, logs, figures = {}, {}, {}, {}, {}, {}
    bar = tqdm(total=len(jobs) * (len(options.components) + 2), desc="analyze", disable=None, leave=False)
    for (path, state, trained), (model, data) in zip(jobs, evaluate.networks(jobs, options, device), strict=True):
        dataset = datasets[path]
        label = names[options.checkpoints.index(path)] + (f" on {dataset}" if len(set(datasets.values())) > 1 else "")
        label += "" if trained else " (untrained)"
        bar.set_description(label)
        if len(data.test_labels) < 4:
            common.fail(f"the analysis needs at least 4 test images, and --dataset {dataset} has fewer")
        some = common.evenly_spaced(data.test_images, options.images)
        data = dataclasses.replace(data, test_images=data.test_images[some], test_labels=data.test_labels[some])
        entry, arrays[label], pictures[label] = measure(path, model, data, options.components, bar)
        about = {"method": state["method"], "dataset": dataset, "epoch": state["epoch"] if trained else 0}
        numbers[label], classes[label] = about | entry, data.classes
        if trained and len(read[path]) > 1:  # the first line is from before training
            logs[label] = read[path]
        figures[f"matrices-{label}"] = draw_matrices(label, pictures[label]), f"{label}. {CAPTIONS['matrices']}"
        figures[f"nearest-{label}"] = draw_nearest(label, pictures[label], data), f"{label}. {CAPTIONS['nearest']}"
    bar.close()
    shared = {"spectra": draw_spectra(arrays)}
    if any(entry["entropy"]["mixture"] for entry in numbers.values()):  # few images allow none
        shared["entropy"] = draw_entropy(arrays)
    if logs:
        methods = {label: numbers[label]["method"] for label in logs}
        shared |= {f"curves_{scale}": draw_curves(logs, methods, scale) for scale in ("linear", "log")}
    shared["tsne"] = draw_tsne(pictures, arrays, classes)
    shared = {name: (figure, CAPTIONS[name]) for name, figure in shared.items()}
    figures = {re.sub(r"[^\w.-]+", "-", name).strip("-"): figure for name, figure in figures.items()}
    flat = {f"{label}/{name}": array for label, a in arrays.items() for name, array in a.items()}
    write_report(folder, "Collapse report", tables(numbers), numbers, flat, shared | figures)
    for label, entry in numbers.items():
        found = {mode: report for mode, report in entry["diagnosis"].items() if report["verdict"] == "collapsed"}
        named = ", ".join(f"{mode} ({report['number']:.2f})" for mode, report in found.items())
        uniform = entry["diagnosis"]["assignment"]["verdict"] == "still uniform"
        note = "; assignments are still uniform" if uniform else ""
        print(f"{label}: {named + ' collapse' if named else 'no collapse'}{note}")


if __name__ == "__main__":
    main()
