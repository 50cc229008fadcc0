"""Did it collapse, and how? Collapse modes, spectra, entropies, pictures of checkpoints or files.

    python analyze.py runs/cplearn-cifar10-seed0 runs/barlow_twins-cifar10-seed0
    python analyze.py embeddings.npz
    python analyze.py --codes 128 128 16384 --out codes        random codes, without a checkpoint

DIR/report.html holds everything and opens in any browser. Beside it are the pictures as PNG, the
numbers as report.json and the arrays behind the curves as report.npz. The figures named below are
those of "Collapse-Proof Non-Contrastive Self-Supervised Learning".

diagnosis   the four collapses of Figure 1. Each is a number in [0, 1]. Below its threshold the mode
            has collapsed. `common.diagnose` defines the numbers.
spectra     eigenvalues of the covariance of embeddings and of features, divided by their mean
            squared norm (Figure 6a)
entropy     of Gaussian mixtures with more and more components, fitted to the embeddings, by 10,000
            draws (Figure 6b). It is low where embeddings form tight clusters. It is in nats for
            each dimension, at a mean variance of 1.
matrices    correlations of the embedding's dimensions, and cosines of the images sorted by cluster
            (Figure 4)
curves      what training logged: each loss term and metric, on linear and on logarithmic axes
            (Figures 12a and 16)
t-SNE       of the features, coloured by class (Figure 12c)
nearest     the images nearest to the most used codes, prototypes or k-means centers

All is measured on un-augmented test images, with the network in eval mode. Embeddings are of the
layer that the loss acts on. Checkpoints of different data sets are each measured on their own.

A file is what `evaluate.py --save-features` writes, of which the test arrays are measured, or an
.npy or .npz file from elsewhere: `python evaluate.py --help` says what it may hold. What cannot be
known of it (curves, nearest images) is left out. Its embedding is diagnosed, or its features where
it has no embedding. An array without a negative number counts as features. Of embeddings,
representation collapse is seen in the variance of the directions. Features after a ReLU are all
positive, so that their directions are always close to one another. Of features it is seen in the
variance over the mean square. The last lines and the report say which array was diagnosed.
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
import warnings
from collections import Counter
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
import torch
from matplotlib import font_manager, ticker
from matplotlib import pyplot as plt
from PIL import Image
from sklearn.manifold import TSNE
from torch.nn import functional as F
from tqdm import tqdm

import common
import evaluate

COMPONENTS = [10, 20, 50, 100, 200, 500, 1000]
STANDARD_NORMAL_ENTROPY = (math.log(2 * math.pi) + 1) / 2  # of a Gaussian of variance 1, in nats
ROUNDING = 1e-7  # eigenvalues below this share of the largest are float32's rounding

# What training logs of every method, in the order of the pictures. All else are its loss terms.
METRICS = [
    "knn",
    "center_norm",
    "effective_rank",
    "correlation",
    "used_codes",
    "assignment_entropy",
]

# Okabe and Ito's colours for lines, Tol's "muted" for classes: both can be told apart by
# colour-blind readers.
LINES = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999933"]
CLASSES = [
    "#CC6677", "#332288", "#DDCC77", "#117733", "#88CCEE",
    "#882255", "#44AA99", "#999933", "#AA4499", "#777777",
]  # fmt: skip
plt.rcParams.update({
    "figure.dpi": 120, "savefig.dpi": 240, "font.size": 9,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3,
    "legend.frameon": False, "figure.constrained_layout.use": True, "savefig.bbox": "tight",
    "figure.max_open_warning": 0,
})  # fmt: skip
# The first font has Latin, Greek and Cyrillic letters. Others, of which one may be installed, have
# the letters of more languages. A letter that none of them has is drawn as a box.
FONTS = [
    "DejaVu Sans", "Noto Sans CJK JP", "Noto Sans CJK SC", "WenQuanYi Zen Hei", "Hiragino Sans",
    "PingFang SC", "Apple SD Gothic Neo", "Yu Gothic", "Microsoft YaHei", "Malgun Gothic",
    "Arial Unicode MS", "Noto Sans Arabic", "Noto Sans Hebrew", "Noto Sans Devanagari",
]  # fmt: skip
installed = {font.name for font in font_manager.fontManager.ttflist}
plt.rcParams["font.family"] = [font for font in FONTS if font in installed]
warnings.filterwarnings("ignore", message="Glyph .* missing from font")

# --- spectra


def spectrum_auc(spectrum):
    """Area under the cumulative share of a spectrum (m,), largest first, as a mean over its ranks
    (Li, Efros and Pathak, 2022).

    It is (m + 1) / 2m for a flat spectrum, 1 for one direction, NaN if all is 0.
    """
    spectrum = torch.as_tensor(spectrum)
    return (spectrum.cumsum(0) / spectrum.sum()).mean().item()


def power_law(spectrum):
    """The exponent alpha of spectrum_i ~ i^-alpha (Ghosh et al., 2022), by least squares in
    logarithms.

    Ranks below 1e-7 of the first are left out. Weights 1 / i make octaves count alike. It is NaN
    for fewer than two ranks.
    """
    spectrum = torch.as_tensor(spectrum)
    y = spectrum[spectrum > ROUNDING * spectrum[0]].log()
    x = torch.arange(1, len(y) + 1, device=y.device).to(y).log()
    weight = (-x).softmax(0)  # 1 / i over the sum of all
    x = x - (weight * x).sum()  # centered, so that the slope needs no intercept
    slope = (weight * x * y).sum() / (weight * x * x).sum()
    return -slope.item()


# --- entropies


def unit_variance(z):
    """z (n, d) centered and scaled to a mean variance of 1 over its dimensions, float32. It is zero
    where z is constant.

    Entropies are taken of it, so that embeddings of all scales compare.
    """
    z = torch.as_tensor(z).detach().double()
    variance = common.covariance_spectrum(z).sum() / z.shape[1]
    scale = variance.rsqrt() if variance > 0 else 0
    return ((z - z.mean(0)) * scale).float()


def logdet_entropy(z, floor=1e-3):
    """Entropy in nats of a Gaussian with the covariance of z (n, d): ½ Σ_j log(2πe (λ_j + floor)).

    The λ_j are the eigenvalues of the covariance. The entropy is exact if z is Gaussian and n >> d.
    Else it is too high, because of all distributions with one covariance the Gaussian has the
    highest entropy. Few points make it too low.
    """
    spectrum = common.covariance_spectrum(z)
    # The spectrum lacks the directions in which too few points have no variance.
    missing = z.shape[1] - len(spectrum)
    spectrum = F.pad(spectrum, (0, missing))
    logdet = (spectrum + floor).log().sum().item()
    return logdet / 2 + z.shape[1] * STANDARD_NORMAL_ENTROPY


def pairwise_entropy(z, noise=0.1):
    """Lower and upper bound, in nats, of the entropy of z (n, d) with Gaussian noise of variance
    `noise` added.

    With noise z is a mixture of n Gaussians around its points. The bounds are
    ½ d log(2πe noise) - mean_i log mean_j exp(-D_ij). D is the Bhattacharyya distance for the lower
    and the Kullback-Leibler divergence for the upper (Kolchinsky and Tracey, 2017, Eqs. 10, 13).
    Both are right within log n. They tell little where all points are further apart than the noise.
    """
    z = torch.as_tensor(z).detach().double()
    n, d = z.shape
    lower = 0.0
    upper = 0.0
    for part in z.split(1000):  # not all n² distances at once
        squared = torch.cdist(part, z).square()
        bhattacharyya = squared / (8 * noise)
        kullback_leibler = squared / (2 * noise)
        lower += (math.log(n) - (-bhattacharyya).logsumexp(1)).sum().item()
        upper += (math.log(n) - (-kullback_leibler).logsumexp(1)).sum().item()
    noise_entropy = d * (STANDARD_NORMAL_ENTROPY + math.log(noise) / 2)
    return noise_entropy + lower / n, noise_entropy + upper / n


def log_joint(x, weights, means, variances):
    """log(weight_k N(x_i; mean_k, variance_k)), (n, k), of points x (n, d) and the k components of
    a Gaussian mixture."""
    precision = 1 / variances
    # Squared distances to the means over the variances, multiplied out to need no (n, k, d) array.
    distance = (x * x) @ precision.T
    distance = distance - (2 * x) @ (means * precision).T
    distance = distance + (means * means * precision).sum(1)
    log_volume = variances.log().sum(1)
    return weights.log() - (distance + log_volume + x.shape[1] * math.log(2 * math.pi)) / 2


def mixture_of(x, shares, floor):
    """Weights (k,), means (k, d) and variances (k, d) of the components that own `shares` (n, k) of
    the points x (n, d). `floor` is added to each variance."""
    count = shares.sum(0) + 10 * torch.finfo(x.dtype).eps  # more than 0, as it is divided by
    weights = count / count.sum()
    means = shares.T @ x / count[:, None]
    mean_squares = shares.T @ (x * x) / count[:, None]
    variances = (mean_squares - means * means).clamp_min(0) + floor
    return weights, means, variances


def fit_mixture(x, k, iterations=100, tolerance=1e-3, floor=1e-3, start=None):
    """A Gaussian mixture of `k` components with diagonal covariance, fitted to x (n, d) by
    expectation maximisation.

    Returns (weights (k,), means (k, d), variances (k, d)) and its mean log-likelihood in nats
    before the last step. `floor` is added to each variance, so that a component of one point keeps
    some. The fit starts at the mixture `start`, or from k-means. It ends when the log-likelihood
    gains less than `tolerance`.
    """
    x = torch.as_tensor(x)
    if start is None:
        assigned, _ = evaluate.kmeans(x, k, restarts=1, iterations=10)
        shares = F.one_hot(assigned, min(k, len(x))).to(x)
        start = mixture_of(x, shares, floor)
    mixture = start
    before = -math.inf
    for _ in range(iterations):
        joint = log_joint(x, *mixture)
        total = joint.logsumexp(1, keepdim=True)
        likelihood = total.mean().item()
        shares = (joint - total).exp()
        mixture = mixture_of(x, shares, floor)
        if likelihood - before < tolerance:
            break
        before = likelihood
    return mixture, likelihood


def mixture_entropy(mixture, samples=10_000):
    """Entropy in nats of a Gaussian mixture (weights, means, variances), by Monte Carlo: the mean
    of -log p over draws ("Collapse-Proof ...", Section 4).

    It is unbiased for the mixture. The mixture itself is narrower than the data, and the more so
    the more components it has.
    """
    weights, means, variances = mixture
    rng = common.generator(0)
    shares = weights.cpu().double()
    chosen = torch.multinomial(shares, samples, replacement=True, generator=rng).to(means.device)
    noise = torch.randn(samples, means.shape[1], generator=rng).to(means)
    x = means[chosen] + variances[chosen].sqrt() * noise
    log_density = log_joint(x, weights, means, variances).logsumexp(1)
    return -log_density.mean().item()


# --- one checkpoint


def mixture_entropies(scaled, components, bar):
    """The entropy {k: nats per dimension} of a mixture of each number k of components, fitted to
    embeddings of unit variance (n, d). Numbers above n / 2 are left out."""
    n, d = scaled.shape
    entropies = {}
    for k in components:
        if k <= n // 2:
            mixture, _ = fit_mixture(scaled, k)
            entropies[k] = mixture_entropy(mixture) / d
        bar.update()
    return entropies


def largest_clusters(clusters, count=8):
    """The names of the largest of the assigned clusters (n,), the largest first."""
    names, sizes = np.unique(clusters, return_counts=True)
    order = np.argsort(-sizes, kind="stable")
    return names[order[:count]]


@torch.no_grad()
def assign(model, data, out):
    """The cluster of each image (n,), of each of the eight largest clusters the up to ten images
    that are nearest to its code or center {cluster: indices}, and what the clusters are: "codes" of
    the method, or "k-means" of the features where it has none, or of the embedding where there are
    no features.

    Without a model, codes are as they are in `out`, and the nearest images are not known.
    """
    if "codes" in out:
        clusters_by = "codes"
        clusters = out["codes"].cpu().numpy()
        if model is None:
            return clusters, {}, clusters_by
        largest = largest_clusters(clusters)
        scores = []
        # A few rows at a time, because there may be many codes.
        for z in out["embedding"].split(64):
            scores.append(model.scores(z)[:, largest].cpu())
        closeness = torch.cat(scores).numpy()
    else:
        clusters_by = "k-means"
        x = evaluate.matrix_of(out)
        count = len(data.classes) or evaluate.CLUSTERS_WITHOUT_LABELS
        assigned, centers = evaluate.kmeans(x, count)
        clusters = assigned.cpu().numpy()
        largest = largest_clusters(clusters)
        closeness = -torch.cdist(x, centers[largest]).cpu().numpy()
    nearest = {}
    for column, cluster in enumerate(largest):
        own = np.flatnonzero(clusters == cluster)
        order = np.argsort(-closeness[own, column], kind="stable")
        nearest[int(cluster)] = own[order[:10]]
    return clusters, nearest, clusters_by


def mean_squared_norm(x):
    """The mean of |x_i|² over the rows of x (n, d), as a numpy number."""
    return x.square().sum(1).mean().cpu().numpy()


def measure_network(job, model, data, components, bar):
    """What `measure` gives for a network, on the test images.

    Ends the program with one line if features or embeddings are not finite.
    """
    out = common.extract(model, data.test_images, data)
    evaluate.check_finite(job.path, out)
    code_count = common.count_codes(model, out["embedding"][:1].to(data.mean.device))
    inputs = data.test_images[0].numel()
    return measure(out, data, components, bar, model, code_count, inputs)


def measure_file(job, limit, components, bar, device):
    """What `measure` gives for a file, of at most `limit` of its rows."""
    arrays = job.arrays
    some = common.evenly_spaced(evaluate.matrix_of(arrays.test), limit)
    out = {name: x[some] for name, x in arrays.test.items()}
    out = evaluate.to_device(out, device)
    data = arrays.data
    if data.test_labels is not None:
        data = dataclasses.replace(data, test_labels=data.test_labels[some])
    return measure(out, data, components, bar, None, arrays.clusters, arrays.inputs)


def measure(out, data, components, bar, model, code_count, inputs):
    """All that the report says of a network's or a file's test images.

    `out` is what `common.extract` gives for them, of which either features or embedding may be
    missing. `components` are the sizes of the mixtures. `bar` is updated len(components) + 2 times.
    `model` is None for a file. `code_count` is the number of codes, and `inputs` how many numbers
    an image has. They are None where they are unknown, or where there are no codes. Returns three
    dicts: the numbers, for JSON; the arrays behind the curves; and what the pictures need:
    `features`, `embedding`, assigned `clusters`, and `nearest`, as `assign` gives them.
    """
    diagnosed = "embedding" if "embedding" in out else "features"
    z = out[diagnosed]
    layers = [layer for layer in ("embedding", "features") if layer in out]
    spectra = {layer: common.covariance_spectrum(out[layer]) for layer in layers}
    scaled = unit_variance(z)
    bar.update()
    mixtures = mixture_entropies(scaled, components, bar)
    lower, upper = pairwise_entropy(scaled)
    clusters, nearest, clusters_by = assign(model, data, out)
    n, d = z.shape

    codes = out.get("codes")
    if code_count is None:
        codes = None  # the share of those in use is not known
    if clusters_by == "k-means":
        cluster_count = len(data.classes) or evaluate.CLUSTERS_WITHOUT_LABELS
    else:
        cluster_count = code_count
    representation = "1 - center_norm²"
    if diagnosed == "features":
        representation = "variance / mean square"
    numbers = {
        "images": n,
        "dimensions": {layer: out[layer].shape[1] for layer in layers},
        "diagnosed": diagnosed,
        "representation": representation,
        "diagnosis": common.diagnose(
            z, codes, code_count, inputs, out.get("entropy"), array=diagnosed
        ),
        "center_norm": common.center_norm(z),
        "correlation": common.average_correlation(z),
        "effective_rank": {layer: common.effective_rank(out[layer]) for layer in layers},
        "auc": {layer: spectrum_auc(spectra[layer]) for layer in layers},
        "power_law": {layer: power_law(spectra[layer]) for layer in layers},
        "entropy": {
            "mixture": mixtures,
            "logdet": logdet_entropy(scaled) / d,
            "pairwise": [lower / d, upper / d],
        },
        "clusters": {
            "by": clusters_by,
            "used": len(np.unique(clusters)),
            "of": cluster_count,
        },
    }
    arrays = {
        "entropy_components": np.array(list(mixtures.keys())),
        "entropy_mixture": np.array(list(mixtures.values())),
        "clusters": clusters,
    }
    for layer in layers:
        arrays[f"spectrum_{layer}"] = spectra[layer].cpu().numpy()
        arrays[f"square_{layer}"] = mean_squared_norm(out[layer])
    if data.test_labels is not None:
        arrays["labels"] = data.test_labels.cpu().numpy()
    pictures = {"diagnosed": diagnosed, "clusters": clusters, "nearest": nearest}
    for layer in layers:
        pictures[layer] = out[layer].cpu()
    bar.update()
    return numbers, arrays, pictures


# --- random codes


def has_hadamard(f, c):
    """Whether c Hadamard codes of f dimensions exist: c is a power of two, and f less than c."""
    power_of_two = (c & (c - 1)) == 0
    return power_of_two and f < c


def pair_shares(codes):
    """The share (f + 1,) of the pairs of different codes (f, c), each ±1, for each cosine that they
    can have: -1, -1 + 2 / f, ..., 1."""
    f, c = codes.shape
    counts = torch.zeros(f + 1, dtype=torch.float64)
    for part in codes.split(1024, 1):  # not all c² cosines at once
        agreeing = ((part.T @ codes + f) / 2).round().long()  # dimensions in which two codes agree
        counts += torch.bincount(agreeing.flatten(), minlength=f + 1)
    counts[f] -= c  # each code with itself
    return (counts / counts.sum()).numpy()


def binomial_shares(f):
    """The shares (f + 1,) that chance gives: of B ~ binomial(f, ½), because the cosine of two
    random codes is (2B - f) / f. It has mean 0 and variance 1 / f ("Collapse-Proof ...", Eq. 5)."""
    log_coefficients = []
    for b in range(f + 1):
        log_coefficients.append(math.lgamma(f + 1) - math.lgamma(b + 1) - math.lgamma(f - b + 1))
    return np.exp(np.array(log_coefficients) - f * math.log(2))


def measure_codes(f, sizes):
    """The cosines of random codes of f dimensions with one another, for each number of codes in
    `sizes`.

    Returns the numbers, a list of dicts; the arrays, `cosines` (f + 1,) and the shares of the pairs
    that have them, `<kind>_<c>` and `binomial`; and, for the pictures, the cosines (m, m) of the
    first 128 codes {(kind, c): cosines}. Hadamard codes are left out where there are none.
    """
    cplearn = evaluate.load_method("cplearn")
    cosines = 2 * np.arange(f + 1) / f - 1
    numbers = []
    arrays = {}
    corners = {}
    for c in sizes:
        entry = {"f": f, "c": c}
        for kind in ("rademacher", "hadamard"):
            if kind == "hadamard" and not has_hadamard(f, c):
                continue
            codes = cplearn.draw_codes(kind, f, c, 0)
            if kind == "hadamard":  # row numbers and signs, from which the transform makes W
                codes = cplearn.hadamard_scores(torch.eye(f), codes, 0, c)
            codes = codes.float()
            first = codes[:, :128]
            shares = pair_shares(codes)
            mean = (shares * cosines).sum()
            variance = (shares * (cosines - mean) ** 2).sum()
            entry[kind] = {"mean": mean, "variance": variance}
            arrays[f"{kind}_{c}"] = shares
            corners[kind, c] = (first.T @ first / f).numpy()
        entry["variance_expected"] = 1 / f
        numbers.append(entry)
    arrays["cosines"] = cosines
    arrays["binomial"] = binomial_shares(f)
    return numbers, arrays, corners


# --- pictures


def plain(text):
    """A name as matplotlib shows it letter by letter. It takes $ for mathematics, and leaves out of
    legends what begins with _."""
    text = text.replace("$", r"\$")
    if text.startswith("_"):
        text = " " + text
    return text


def line_style(i):
    """How the i-th line of a picture is drawn. No two of the first 24 look alike."""
    dashes = ["-", "--", ":"]
    return {
        "color": LINES[i % len(LINES)],
        "linestyle": dashes[i // len(LINES) % len(dashes)],
        "linewidth": 1.4,
    }


def plain_log_ticks(axis):
    """Ticks of a logarithmic axis at 1, 2, 5 times powers of ten, written as plain numbers."""
    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5), numticks=8))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(ticker.NullLocator())


def add_legend(figure, lines, labels, count):
    """One legend for the `count` lines of all panels, below them, where it covers no data. A line
    alone needs none."""
    if count > 1:
        figure.legend(lines, labels, loc="outside lower center", ncols=min(3, count))


def plot_spectra(ax, arrays, layer):
    """The spectra of "embedding" or "features", a line for each checkpoint that has one."""
    for i, (label, entry) in enumerate(arrays.items()):
        if f"spectrum_{layer}" not in entry:
            continue
        spectrum = entry[f"spectrum_{layer}"]
        share = spectrum / max(float(entry[f"square_{layer}"]), 1e-300)
        share = np.where(share > ROUNDING * share[:1], share, np.nan)
        ax.plot(np.arange(1, len(share) + 1), share, label=plain(label), **line_style(i))
    ax.set(title=layer, xlabel="rank of the eigenvalue", yscale="log")


def draw_spectra(arrays):
    """The spectra of embeddings and features, from the `arrays` {label: {name: array}}."""
    layers = []
    for layer in ("embedding", "features"):
        if any(f"spectrum_{layer}" in entry for entry in arrays.values()):
            layers.append(layer)
    size = (4 * len(layers), 3.6)
    figure, axes = plt.subplots(1, len(layers), figsize=size, sharey=True, squeeze=False)
    lines = {}
    for ax, layer in zip(axes.flat, layers, strict=True):
        plot_spectra(ax, arrays, layer)
        handles, labels = ax.get_legend_handles_labels()
        lines |= dict(zip(labels, handles, strict=True))
    axes[0, 0].set_ylabel("eigenvalue of the covariance / mean square")
    names = [plain(label) for label in lines]
    add_legend(figure, lines.values(), names, len(lines))
    return figure


def draw_entropy(arrays):
    """The entropies of the mixtures, from the `arrays` {label: {name: array}}."""
    figure, ax = plt.subplots(figsize=(5.6, 3.6))
    for i, (label, entry) in enumerate(arrays.items()):
        components = entry["entropy_components"]
        entropy = entry["entropy_mixture"]
        ax.plot(components, entropy, marker="o", markersize=3, label=plain(label), **line_style(i))
    ax.axhline(STANDARD_NORMAL_ENTROPY, color="gray", linewidth=0.8)
    ax.annotate(
        "isotropic Gaussian",
        (0.99, STANDARD_NORMAL_ENTROPY),
        xycoords=("axes fraction", "data"),
        ha="right",
        va="bottom",
        color="gray",
        fontsize=8,
    )
    ax.set(xlabel="components of the mixture", ylabel="entropy [nats per dimension]")
    ax.set_xscale("log")
    plain_log_ticks(ax.xaxis)
    ax.margins(y=0.1)
    lines, labels = ax.get_legend_handles_labels()
    add_legend(figure, lines, labels, len(arrays))
    return figure


def show_matrix(ax, matrix):
    """A matrix of cosines or correlations: red is 1, white 0, blue -1. Returns the image."""
    ax.grid(False)
    return ax.imshow(matrix, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")


def axis_name(name, shown, count):
    """The name of an axis, and how much of it is shown if it is not all."""
    return f"{name} ({shown} of {count})" if shown < count else name


def draw_matrices(label, picture):
    """Correlations of up to 512 dimensions, and cosines of up to 512 images in the order of their
    clusters."""
    diagnosed = picture["diagnosed"]
    z = picture[diagnosed].double()
    n, d = z.shape
    some_dimensions = common.evenly_spaced(z.T, 512)
    columns = F.normalize(z - z.mean(0), dim=0)[:, some_dimensions]
    correlation = columns.T @ columns
    some_images = common.evenly_spaced(z, 512)
    order = np.argsort(picture["clusters"][some_images], kind="stable")
    directions = F.normalize(z[some_images[order]], dim=1)
    cosine = directions @ directions.T

    figure, (left, right) = plt.subplots(1, 2, figsize=(8.2, 3.4))
    figure.suptitle(plain(label))
    shown = show_matrix(left, correlation.numpy())
    name = axis_name(f"dimension of the {diagnosed}", len(correlation), d)
    left.set(xlabel=name, ylabel=name)
    figure.colorbar(shown, ax=left, label="correlation", shrink=0.8)
    shown = show_matrix(right, cosine.numpy())
    name = axis_name("image, sorted by cluster", len(cosine), n)
    right.set(xlabel=name, ylabel=name)
    figure.colorbar(shown, ax=right, label="cosine", shrink=0.8)
    return figure


def curve_panels(logs, methods, scale):
    """What the logs {label: lines} hold, sorted into panels {title: {label: [(epoch, value)]}}.

    A metric has one panel for all. A loss term has one for each method.
    """
    panels = {}
    for label, log in logs.items():
        for line in log:
            if scale == "log" and line["epoch"] == 0:
                continue
            for name, value in line.items():
                if name in ("epoch", "lr", "images_per_second"):
                    continue
                title = name if name in METRICS else f"{methods[label]}: {name}"
                panel = panels.setdefault(title, {})
                panel.setdefault(label, []).append((line["epoch"], value))
    return panels


def draw_curves(logs, methods, scale):
    """A panel for each quantity that the logs {label: lines} hold, over epochs: first the metrics,
    then the loss terms by name.

    With scale "log" epochs are logarithmic, which leaves out 0, before training. Values are where
    they are positive and span more than a factor of 3.
    """
    panels = curve_panels(logs, methods, scale)
    titles = [name for name in METRICS if name in panels]
    titles += sorted(title for title in panels if title not in METRICS)
    rows = math.ceil(len(titles) / 3)
    figure, axes = plt.subplots(rows, 3, figsize=(9, 2.3 * rows), squeeze=False)
    for ax in axes.flat[len(titles) :]:
        ax.remove()
    styles = {label: line_style(i) for i, label in enumerate(logs)}
    lines = {}
    for ax, title in zip(axes.flat, titles, strict=False):
        all_values = []
        for label, points in panels[title].items():
            epochs, values = zip(*points, strict=True)
            marker = "." if len(points) < 20 else None
            (line,) = ax.plot(epochs, values, marker=marker, **styles[label])
            lines[label] = line
            all_values.extend(values)
        ax.set(title=title.replace("_", " "), xlabel="epoch")
        if scale == "log":
            ax.set_xscale("log")
            plain_log_ticks(ax.xaxis)
            if 0 < 3 * min(all_values) < max(all_values):
                ax.set_yscale("log")
                plain_log_ticks(ax.yaxis)
    names = [plain(label) for label in lines]
    add_legend(figure, lines.values(), names, len(lines))
    return figure


def plot_tsne(ax, features, labels, classes):
    """Features (n, d) in the plane, coloured by their labels (n,), if there are any."""
    # PCA, the usual start, would divide by zero where features are of rank 1.
    perplexity = min(30, (len(features) - 1) / 3)
    tsne = TSNE(perplexity=perplexity, init="random", random_state=0)
    points = tsne.fit_transform(features)
    if labels is None:
        x, y = points.T
        ax.scatter(x, y, s=6, color=LINES[0], linewidths=0)
        return
    for c, name in enumerate(classes):
        if len(classes) <= len(CLASSES):
            color = CLASSES[c]
        else:
            color = plt.cm.viridis(c / len(classes))
        x, y = points[labels == c].T
        ax.scatter(x, y, s=6, color=color, label=plain(name), linewidths=0)


def draw_tsne(pictures, arrays, classes):
    """Features of up to 2,000 images in the plane, a panel for each checkpoint, coloured by class.

    It is the embedding where there are no features. There is a legend if all checkpoints have the
    same classes, and not too many.
    """
    columns = 2 if len(pictures) in (2, 4) else min(3, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    size = (3.4 * columns, 3.4 * rows + 0.6)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    for ax in axes.flat[len(pictures) :]:
        ax.remove()
    for ax, (label, picture) in zip(axes.flat, pictures.items(), strict=False):
        features = evaluate.matrix_of(picture)
        some = common.evenly_spaced(features, 2000)
        features = features[some].numpy()
        labels = arrays[label].get("labels")
        if labels is not None:
            labels = labels[some]
        ax.set(title=plain(label), xticks=[], yticks=[])
        ax.spines[:].set_visible(True)
        if len(features) < 4:
            ax.text(0.5, 0.5, "too few images", ha="center")
        elif np.ptp(features, 0).max() == 0:
            ax.text(0.5, 0.5, "all features are equal", ha="center")
        else:
            plot_tsne(ax, features, labels, classes[label])
    first, *others = classes.values()
    if 0 < len(first) <= len(CLASSES) and all(other == first for other in others):
        dots, names = axes.flat[0].get_legend_handles_labels()
        figure.legend(
            dots, names, loc="outside lower center", ncols=min(5, len(first)), markerscale=3
        )
    return figure


def draw_nearest(label, picture, data):
    """What the largest clusters hold: the images nearest to each, or, for toys, all its points."""
    images = data.test_images.cpu().numpy()
    if images.ndim == 2:
        return draw_clusters_of_points(label, picture, images)
    return draw_nearest_images(label, picture, images)


def draw_clusters_of_points(label, picture, points):
    """Points (n, 2), coloured by cluster. All but the largest clusters are gray."""
    clusters = picture["clusters"]
    largest = list(picture["nearest"])
    figure, ax = plt.subplots(figsize=(4.4, 3.6))
    if len(np.unique(clusters)) > len(largest):
        x, y = points.T
        ax.scatter(x, y, s=4, color="lightgray", linewidths=0, label="other")
    for i, cluster in enumerate(largest):
        x, y = points[clusters == cluster].T
        ax.scatter(x, y, s=4, color=LINES[i], linewidths=0, label=str(cluster))
    ax.set(title=plain(label), xlabel="first coordinate", ylabel="second coordinate")
    figure.legend(title="cluster", loc="outside right center", markerscale=3)
    return figure


def draw_nearest_images(label, picture, images):
    """A row for each of the largest clusters, with the images (of all n, 3, h, w) nearest to it."""
    nearest = picture["nearest"]
    rows = len(nearest)
    figure, axes = plt.subplots(rows, 10, figsize=(8, 0.85 * rows), squeeze=False)
    figure.suptitle(plain(label))
    for ax in axes.flat:
        ax.axis("off")
    for row, (cluster, indices) in zip(axes, nearest.items(), strict=True):
        for ax, i in zip(row, indices, strict=False):
            ax.imshow(images[i].transpose(1, 2, 0))
        size = (picture["clusters"] == cluster).sum()
        left = row[0]
        name = f"{cluster}\n{size} image"
        if size != 1:
            name += "s"
        left.text(-0.15, 0.5, name, ha="right", va="center", transform=left.transAxes)
    return figure


def codes_title(kind, c, corner):
    """The title of a matrix of cosines, which says so if it is not of all codes."""
    title = f"{kind}, c = {c}"
    if len(corner) < c:
        title += f", first {len(corner)}"
    return title


def draw_codes(f, sizes, arrays, corners):
    """What `measure_codes` gives of dictionaries W of codes, a column for each size: WᵀW / f of
    Rademacher codes above that of Hadamard codes, and the histogram of its entries off the
    diagonal, with what chance gives."""
    cosines = arrays["cosines"]
    size = (2.9 * len(sizes) + 0.6, 8)
    figure, axes = plt.subplots(3, len(sizes), figsize=size, squeeze=False)
    for (top, middle, bottom), c in zip(axes.T, sizes, strict=True):
        corner = corners["rademacher", c]
        shown = show_matrix(top, corner)
        top.set(title=codes_title("Rademacher", c, corner), xlabel="code")
        shares = arrays[f"rademacher_{c}"]
        bottom.bar(cosines, shares, 2 / f, color=LINES[0], alpha=0.7, label="Rademacher")

        if has_hadamard(f, c):
            corner = corners["hadamard", c]
            show_matrix(middle, corner)
            middle.set(title=codes_title("Hadamard", c, corner), xlabel="code")
            shares = arrays[f"hadamard_{c}"]
            bottom.bar(cosines, shares, 0.5 / f, color=LINES[1], alpha=0.7, label="Hadamard")
        else:
            reason = "Hadamard needs c a power\nof two and more than f"
            middle.text(0.5, 0.5, reason, ha="center", va="center")
            middle.axis("off")

        bottom.plot(cosines, arrays["binomial"], color="black", linewidth=1, label="binomial")
        limit = 6 / math.sqrt(f)
        bottom.set(xlim=(-limit, limit), yscale="log", ylim=(1e-6, 2))
        bottom.set_xlabel("cosine of two codes")
    axes[0, 0].set_ylabel("code")
    axes[2, 0].set_ylabel("share of the pairs")
    figure.colorbar(shown, ax=axes[:2], label="cosine", shrink=0.6)
    bars_of = {}  # by their labels; the first column may lack Hadamard codes
    for bottom in axes[2]:
        bars, labels = bottom.get_legend_handles_labels()
        bars_of |= dict(zip(labels, bars, strict=True))
    figure.legend(bars_of.values(), bars_of.keys(), loc="outside lower center", ncols=3)
    return figure


# --- the report

CAPTIONS = {
    "spectra": "Spectra of the covariance over the mean squared norm. A curve that falls early has "
    "few directions left: dimensional collapse. One that starts low varies little about its mean: "
    "representation collapse. Eigenvalues below float32's rounding, a ten-millionth of the "
    "largest, are not drawn.",
    "entropy": "Entropy of Gaussian mixtures with diagonal covariance fitted to the embeddings, by "
    "10,000 draws. It falls where embeddings huddle in clusters: intracluster collapse. Mixtures "
    "of more components than half the images are left out; each variance has a floor of a "
    "thousandth of the mean variance. Embeddings are scaled to variance 1: of nearly equal ones "
    "this sees the little in which they differ.",
    "curves_linear": "What training logged; epoch 0 is the untrained network.",
    "curves_log": "The same over logarithmic epochs, without epoch 0; values too where they span "
    "more than a factor of 3.",
    "tsne": "t-SNE of the features, or of the embedding of a file without features, coloured by "
    "class where there are labels. Distances between groups mean little.",
    "matrices": "Left: correlation of the embedding's dimensions; off the diagonal, white is "
    "decorrelated. Right: cosines of images, sorted by cluster; blocks are clusters, red all over "
    "is representation collapse.",
    "nearest": "What the largest clusters hold: the images of each that are nearest to its code, "
    "prototype or center.",
    "codes": "Cosines of the dictionary's codes with one another: the larger f, the nearer to "
    "orthogonal; c does not matter (Eq. 5). Black: the binomial distribution that chance gives.",
}
DIAGNOSIS_NOTE = (
    "Each number is in [0, 1]; below the threshold the mode has collapsed. Representation: "
    "variance of the embeddings' directions (threshold 0.2). Of an array of features, whose "
    "directions are close to one another when a ReLU has made all of them positive: variance over "
    "mean square (threshold 0.1). Dimensional: logarithm of the effective rank over "
    "that of the dimensions, or of the images less one if these are fewer. Cluster: the same of "
    "the codes in use. Intracluster: distance to the "
    "own cluster over distance to the next. Assignment: 1 - the mean entropy of an image's "
    "assignment over the logarithm of the codes; where it is still uniform, training has not left "
    "its start. Where all embeddings are one vector, the other collapses are implied."
)
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1120px; margin: auto;
  padding: 2em 1em }
table { border-collapse: collapse; margin: 1em 0; font-size: 13px }
th, td { padding: .3em .6em; border-bottom: 1px solid #ccc; text-align: right;
  vertical-align: bottom }
th:first-child, td:first-child { text-align: left; overflow-wrap: anywhere; min-width: 10em }
img { max-width: 100%; height: auto }
figure { margin: 2em 0 }
figcaption { color: #555 }
.collapsed { background: #f9d6c4 }
.implied { background: #fbeee6 }
.ok { background: #dcefe6 }
"""


def html_cell(cell):
    """A cell of a table: a text, or a pair of text and class."""
    if isinstance(cell, str):
        text = cell
        kind = ""
    else:
        text, kind = cell
    return f'<td class="{kind}">{html.escape(text)}</td>'


def html_table(rows):
    """An HTML table of rows {head: cell}, all with the same heads."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in rows[0])
    lines = [f"<tr>{head}</tr>"]
    for row in rows:
        cells = "".join(html_cell(cell) for cell in row.values())
        lines.append(f"<tr>{cells}</tr>")
    return "<table>" + "\n".join(lines) + "</table>"


def diagnosis_table(numbers):
    """The diagnosis of all checkpoints as HTML, with the thresholds in the head."""
    # Representation collapse has one for embeddings, and another one for features.
    reports = [entry["diagnosis"]["representation"] for entry in numbers.values()]
    thresholds = [f"{number:g}" for number in sorted({report["threshold"] for report in reports})]
    rows = []
    for label, entry in numbers.items():
        row = {
            "checkpoint": label,
            "method": entry.get("method", ""),
            "data": entry.get("dataset", ""),
            "epoch": str(entry.get("epoch", "")),
            "array": entry["diagnosed"],
        }
        for mode, report in entry["diagnosis"].items():
            text = report["verdict"]
            if report["number"] is not None:
                text = f"{report['number']:.2f} {text}"
            threshold = report["threshold"]
            if mode == "representation":
                threshold = " or ".join(thresholds)
            row[f"{mode} (<\u00a0{threshold})"] = (text, report["verdict"])
        rows.append(row)
    return html_table(rows)


def of_all(rank, dimensions, layer):
    """The rank of a layer and how many dimensions it has, or nothing if it is missing."""
    if layer not in rank:
        return ""
    return f"{rank[layer]:.1f} of {dimensions[layer]}"


def numbers_table(numbers):
    """The other numbers of all checkpoints as HTML."""
    rows = []
    for label, entry in numbers.items():
        diagnosed = entry["diagnosed"]
        rank = entry["effective_rank"]
        dimensions = entry["dimensions"]
        entropy = entry["entropy"]
        lower, upper = entropy["pairwise"]
        clusters = entry["clusters"]
        used = f"{clusters['used']} {clusters['by']}"
        if clusters["of"] is not None:
            used = f"{clusters['used']} of {clusters['of']} {clusters['by']}"
        mixture = ""  # of the last size only
        if entropy["mixture"]:
            components, value = list(entropy["mixture"].items())[-1]
            mixture = f"{value:.3f} ({components})"
        row = {
            "checkpoint": label,
            "images": str(entry["images"]),
            "center norm": f"{entry['center_norm']:.3f}",
            "correlation": f"{entry['correlation']:.3f}",
            "effective rank": of_all(rank, dimensions, "embedding"),
            "of features": of_all(rank, dimensions, "features"),
            "AUC": f"{entry['auc'][diagnosed]:.3f}",
            "power law": f"{entry['power_law'][diagnosed]:.2f}",
            "entropy, mixture of": mixture,
            "log-det": f"{entropy['logdet']:.3f}",
            "pairwise": f"{lower:.3f} to {upper:.3f}",
            "clusters used": used,
        }
        rows.append(row)
    return html_table(rows)


def codes_table(numbers):
    """The numbers of random codes as HTML."""
    rows = []
    for entry in numbers:
        for kind in ("rademacher", "hadamard"):
            if kind not in entry:
                continue
            row = {
                "c": str(entry["c"]),
                "codes": kind,
                "mean cosine": f"{entry[kind]['mean']:.2e}",
                "variance": f"{entry[kind]['variance']:.6f}",
                "1 / f": f"{entry['variance_expected']:.6f}",
            }
            rows.append(row)
    return html_table(rows)


def checkpoints_intro(numbers):
    """What stands above the pictures in a report on checkpoints, as HTML."""
    return (
        f"<h2>Diagnosis</h2>{diagnosis_table(numbers)}<p>{DIAGNOSIS_NOTE}</p>"
        f"<h2>Numbers</h2>{numbers_table(numbers)}<p>Entropies are in nats per dimension.</p>"
    )


def html_head(title):
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title>"
        f"<style>{STYLE}</style><h1>{title}</h1>"
    )


def html_figure(name, caption, png):
    """A picture, of which `png` are the bytes, inside the page and with its caption."""
    webp = io.BytesIO()
    with Image.open(io.BytesIO(png)) as image:
        image.convert("RGB").save(webp, "webp", quality=60)  # a third of the size
        width = image.width // 2  # two pixels for each of the page: sharp on dense screens
    data = base64.b64encode(webp.getvalue()).decode()
    return (
        f'<figure><img alt="{html.escape(name)}" width="{width}" '
        f'src="data:image/webp;base64,{data}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def as_png(figure):
    """The bytes of a matplotlib figure as a PNG. Closes the figure."""
    png = io.BytesIO()
    figure.savefig(png, format="png")
    plt.close(figure)
    return png.getvalue()


def finite(value):
    """The value with None in place of infinite numbers and NaN, which JSON cannot hold."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_bytes(path, content):
    """Writes a file whole or not at all."""

    def write(file):
        file.write(content)

    common.atomic_write(path, write)


def write_report(folder, title, intro, numbers, arrays, figures):
    """Writes report.json, report.npz, report.html and a PNG for each figure to `folder`.

    `intro` is HTML. `figures` is {name: (figure, caption)}, and each name is that of its file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    page = [html_head(title), intro]
    for name, (figure, caption) in figures.items():
        png = as_png(figure)
        write_bytes(folder / f"{name}.png", png)
        page.append(html_figure(name, caption, png))
    write_bytes(folder / "report.json", json.dumps(finite(numbers), indent=2).encode())

    def write_arrays(file):
        np.savez_compressed(file, **arrays)

    common.atomic_write(folder / "report.npz", write_arrays)
    page_file = folder / "report.html"
    write_bytes(page_file, "\n".join(page).encode())
    print(f"wrote {page_file} and {len(figures)} pictures, report.json, report.npz")


def report_codes(f, sizes, folder):
    """The report on random codes of f dimensions, for each number of codes in `sizes`."""
    numbers, arrays, corners = measure_codes(f, sizes)
    figure = draw_codes(f, sizes, arrays, corners)
    figures = {"codes": (figure, CAPTIONS["codes"])}
    title = f"Codes of {f} dimensions"
    write_report(folder, title, codes_table(numbers), numbers, arrays, figures)


# --- the report on checkpoints


def run_folder(path):
    """The folder of the checkpoint at `path`, which is the folder or a file in it."""
    return path if path.is_dir() else path.parent


def read_log(path):
    """The epochs' lines, a list of dicts, of the log beside the checkpoint at `path`, a Path,
    without their verdicts.

    The list is empty if there is no log. Ends the program with one line if the log is damaged.
    """
    log = run_folder(path) / "log.jsonl"
    if not log.exists():
        return []
    try:
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        if lines and isinstance(lines[0], dict) and "argv" in lines[0]:
            del lines[0]  # older logs begin with what is in run.json now
        for line in lines:
            if not isinstance(line, dict) or "epoch" not in line:
                raise ValueError
            line.pop("verdict", None)
            if not all(isinstance(value, int | float) for value in line.values()):
                raise ValueError
    except ValueError:
        common.fail(f"{str(log)!r} is damaged: remove it, and the curves are left out")
    return lines


def source_of(job):
    """What a job is named after: the run folder, or a file that training has not named. A Path."""
    path = Path(job.path)
    if path.name == "last.pt" or path.match("epoch-*.pt"):
        path = path.parent
    return path.resolve()


def unique_jobs(jobs):
    """The jobs without those that are there twice, as runs/x and runs/x/last.pt, and with one
    untrained network for each run."""
    unique = {}
    for job in jobs:
        step = job.state["step"] if job.state is not None and job.trained else 0
        unique.setdefault((source_of(job), step, job.trained), job)
    return list(unique.values())


def short_names(sources):
    """The names {path: name} of paths, with as many folders above as tell them apart."""
    sources = set(sources)
    for depth in range(1, 10):
        names = {source: "/".join(source.parts[-depth:]) for source in sources}
        if len(set(names.values())) == len(sources):
            break
    return names


def job_labels(jobs, options):
    """What each job is called in the report: the name of the run or of the file, its epoch if there
    are several of one run, its data set if there are several, and whether it is untrained."""
    names = short_names([source_of(job) for job in jobs])
    datasets = {job.dataset(options) for job in jobs if job.state is not None}
    checkpoints = Counter(source_of(job) for job in jobs if job.trained)
    labels = []
    for job in jobs:
        label = names[source_of(job)]
        if checkpoints[source_of(job)] > 1 and job.trained:
            label += f" epoch {job.epoch()}"
        if len(datasets) > 1 and job.state is not None:
            label += f" on {job.dataset(options)}"
        if not job.trained:
            label += " (untrained)"
        if label in labels:  # two checkpoints of one epoch, one of which is not whole
            label += f" {Path(job.path).name}"
        labels.append(label)
    return labels


def fewer_test_images(data, limit):
    """The data with at most `limit` of their test images."""
    some = common.evenly_spaced(data.test_images, limit)
    fewer = dataclasses.replace(data, test_images=data.test_images[some])
    if data.test_labels is not None:
        fewer.test_labels = data.test_labels[some]
    return fewer


def draw_own(label, picture, data):
    """The pictures that show one checkpoint alone {name of the file: (figure, caption)}. `data` is
    None for a file, of which there are no images."""

    # Labels hold slashes, spaces and brackets, which file names had better not.
    def file_name(kind):
        return re.sub(r"[^\w.-]+", "-", f"{kind}-{label}").strip("-")

    matrices = draw_matrices(label, picture)
    figures = {file_name("matrices"): (matrices, f"{label}. {CAPTIONS['matrices']}")}
    if data is not None:
        nearest = draw_nearest(label, picture, data)
        figures[file_name("nearest")] = (nearest, f"{label}. {CAPTIONS['nearest']}")
    return figures


def draw_shared(numbers, arrays, pictures, classes, logs, methods):
    """The pictures that show all checkpoints together {name: (figure, caption)}.

    The arguments are dicts by the checkpoints' labels, and `logs` and `methods` by the names of
    runs. Entropies are left out where the images are too few for any mixture, and curves where
    there are no logs.
    """
    figures = {"spectra": draw_spectra(arrays)}
    if any(entry["entropy"]["mixture"] for entry in numbers.values()):
        figures["entropy"] = draw_entropy(arrays)
    if logs:
        figures["curves_linear"] = draw_curves(logs, methods, "linear")
        figures["curves_log"] = draw_curves(logs, methods, "log")
    figures["tsne"] = draw_tsne(pictures, arrays, classes)
    return {name: (figure, CAPTIONS[name]) for name, figure in figures.items()}


def report_checkpoints(options, folder, device):
    """The report on the checkpoints and files in `options`. Ends the program with one line, before
    any work is done, if one of them cannot be read."""
    jobs = unique_jobs(evaluate.read_jobs(options))
    labels = job_labels(jobs, options)
    run_logs = {}
    for job in jobs:
        if job.state is not None:
            run_logs[source_of(job)] = read_log(Path(job.path))

    numbers = {}
    arrays = {}
    pictures = {}
    classes = {}
    logs = {}
    methods = {}
    own_figures = {}
    components = options.components
    steps = len(jobs) * (len(components) + 2)
    bar = tqdm(total=steps, desc="analyze", disable=None, leave=False)
    run_names = short_names([source_of(job) for job in jobs])
    networks = evaluate.networks(jobs, options, device)
    for job, label, (model, data) in zip(jobs, labels, networks, strict=True):
        bar.set_description(label)
        about = {}
        if job.state is None:
            results = measure_file(job, options.images, components, bar, device)
            classes[label] = job.arrays.data.classes
        else:
            if len(data.test_images) < 4:
                common.fail(
                    f"the analysis needs at least 4 test images, and --dataset "
                    f"{job.dataset(options)} has fewer"
                )
            data = fewer_test_images(data, options.images)
            results = measure_network(job, model, data, components, bar)
            classes[label] = data.classes
            about = {
                "method": job.state["method"],
                "dataset": job.dataset(options),
                "epoch": job.epoch(),
            }
            # The first line is from before training. A run with several checkpoints has one log.
            log = run_logs[source_of(job)]
            if job.trained and len(log) > 1:
                logs[run_names[source_of(job)]] = log
                methods[run_names[source_of(job)]] = job.state["method"]
        found, arrays[label], pictures[label] = results
        numbers[label] = about | found
        own_figures |= draw_own(label, pictures[label], data)
    bar.close()

    shared_figures = draw_shared(numbers, arrays, pictures, classes, logs, methods)
    named_arrays = {}
    for label, entry in arrays.items():
        for name, array in entry.items():
            named_arrays[f"{label}/{name}"] = array
    intro = checkpoints_intro(numbers)
    figures = shared_figures | own_figures
    write_report(folder, "Collapse report", intro, numbers, named_arrays, figures)
    for label, entry in numbers.items():
        diagnosed = entry["diagnosed"]
        found = common.describe(entry["diagnosis"], diagnosed)
        print(f"{label}: {found} ({diagnosed} of {entry['images']} images)")


# --- the command


def parse_options():
    parser = common.Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    evaluate.add_checkpoint_flags(parser, "*")
    parser.add_argument(
        "--out",
        default="report",
        metavar="DIR",
        help="folder for it, files are overwritten [report]",
    )
    parser.add_argument(
        "--codes",
        nargs="+",
        type=int,
        metavar="N",
        help="f c [c ...]: dimensions, then numbers of codes",
    )
    parser.add_argument(
        "--components",
        nargs="+",
        type=int,
        default=COMPONENTS,
        metavar="K",
        help=f"sizes of the mixtures {COMPONENTS}; fewer or smaller ones are faster",
    )
    parser.add_argument(
        "--images", type=int, default=10_000, help="at most so many test images [10000]"
    )
    return parser.parse_args()


def check_options(options):
    """Ends the program with one line if the flags do not go together or are out of range."""
    if bool(options.codes) == bool(options.checkpoints):
        common.fail("give either checkpoints or --codes f c ... (see --help)")
    if options.codes:
        f, *sizes = options.codes
        if not sizes or f < 1 or min(sizes) < 2:
            common.fail(
                "--codes wants the dimensions f and at least one number of codes c of 2 or more, "
                "as in --codes 128 16384"
            )
    if min(options.components) < 1 or options.images < 4:
        common.fail("--components must be at least 1 and --images at least 4")


def check_writable(name):
    """Ends the program with one line if nothing can be written to the folder `name`, which need not
    exist yet."""
    folder = Path(name).absolute()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        common.fail(f"cannot write to {name!r}: choose another --out")


def main():
    options = parse_options()
    check_options(options)
    device = common.find_device(options.device)
    check_writable(options.out)
    folder = Path(options.out)
    if options.codes:
        f, *sizes = options.codes
        report_codes(f, sizes, folder)
    else:
        report_checkpoints(options, folder, device)


if __name__ == "__main__":
    main()
