"""The papers' claims, the rows of a table in methods/README.md written by results.py.

(source, what the paper says, runs, shown, holds)
    `runs` are stored runs without their seeds. `shown` is formatted with their figures: {0[knn]} is the mean over the
    seeds of the first run's kNN, {0[start][knn]} that of the untrained network. `holds` is a function of all figures:
    True, False, or None, where accuracies differ by less than 0.01, about what seeds differ by.
(source, what the paper says, test)
    Tests decide. `test` is what pytest is given.
(source, what the paper says, None, why not)
    It was not run.
"""

from itertools import pairwise

A = "Report"  # "Preventing Collapses in Non-Contrastive Self-Supervised Learning"
B = "CPLearn"  # "Collapse-Proof Non-Contrastive Self-Supervised Learning"
C = "Center"  # "The Common Stability Mechanism behind most Self-Supervised Learning Approaches"

CODES = [f"claim-cplearn-c{c}" for c in (10, 128, 2048, 16384)]
RISING_BETA = ["claim-cplearn-beta0.05", CODES[2], *(f"claim-cplearn-beta{beta}" for beta in ("0.25", "0.5", "1"))]
LARGE_BETA = [f"claim-cplearn-beta{beta}" for beta in ("1.25", "2", "10")]
RIVALS = [f"claim-{method}-ten" for method in ("barlow_twins", "swav", "gedi", "self_classifier")]
MOMENTA = [f"claim-byol-momentum{m}" for m in ("0", "0.9", "0.99")]
POINTS = [f"claim-{run}" for data in ("blobs", "moons") for run in (f"center_vector-{data}", f"simsiam-{data}")]
NO_DATA = "SVHN and CIFAR-100 were not at hand"


def each(n, figure, form=".3f"):
    return ", ".join(f"{{{i}[{figure}]:{form}}}" for i in range(n))


def rising(figure):
    return lambda *runs: all(a[figure] < b[figure] for a, b in pairwise(runs))


def point(run):
    """All embeddings are one vector, by the threshold of analyze.diagnose."""
    return 1 - run["center_norm"] ** 2 < 0.2


def flat(run):
    """Few dimensions, likewise."""
    return run["rank"] < run["dimensions"] ** 0.5


def better(a, b, figure):
    return None if abs(a[figure] - b[figure]) < 0.01 else a[figure] > b[figure]


# fmt: off
CLAIMS = [
    (f"{A}, Fig. 8", "VICReg with all its terms fills many dimensions", ["shapes-vicreg"],
     "rank {0[rank]:.1f} of {0[dimensions]:.0f}", lambda all_: not flat(all_)),
    (f"{A}, Fig. 8", "without variance it collapses totally", ["ablation-vicreg-variance-weight-0"],
     "center norm {0[center_norm]:.2f}; kNN {0[knn]:.3f}, untrained {0[start][knn]:.3f}", point),
    (f"{A}, Fig. 8", "without covariance it collapses into few dimensions", ["ablation-vicreg-covariance-weight-0"],
     "rank {0[rank]:.1f} of {0[dimensions]:.0f}", flat),
    (f"{A}, Fig. 11", "without covariance the correlation of dimensions rises",
     ["shapes-vicreg", "ablation-vicreg-covariance-weight-0"], "correlation " + each(2, "correlation", ".2f"),
     rising("correlation")),
    (f"{A}, Sec. 4.1", "spectra, correlation and entropies measure collapse", "tests/test_metrics.py"),
    (f"{A}, Sec. 4", "SimSiam collapses without predictor or stop-gradient",
     ["shapes-simsiam", "ablation-simsiam-no-predictor", "ablation-simsiam-no-stop-gradient"],
     "center norm " + each(3, "center_norm", ".2f") + "; kNN " + each(3, "knn"),
     lambda with_, *without: not point(with_) and all(point(run) for run in without)),
    (f"{A}, Sec. 4", "BYOL collapses without predictor and slow teacher",
     ["shapes-byol", "ablation-byol-momentum-0-no-predictor"],
     "center norm " + each(2, "center_norm", ".2f") + "; kNN " + each(2, "knn"),
     lambda with_, without: not point(with_) and point(without)),
    (f"{A}, Sec. 4", "batch norm instead of whitening leaves few dimensions", ["ablation-wmse-whitening-batchnorm"],
     "rank {0[rank]:.1f} of {0[dimensions]:.0f}", flat),
    (f"{A}, Sec. 4", "BYOL lowers the correlation (there of features, here of embeddings)", ["claim-byol-momentum0.99"],
     "{0[start][correlation]:.2f} untrained, {0[correlation]:.2f}",
     lambda run: run["correlation"] < run["start"]["correlation"]),
    (f"{B}, Fig. 3, Eq. 5", "cosines of random codes have mean 0 and variance 1 / f, for any c",
     "tests/test_theory.py -k eq_5"),
    (f"{B}, Lemma 1", "the minima of the loss, in closed form (under more conditions: see the tests)",
     "tests/test_theory.py -k lemma_1"),
    (f"{B}, Theorem 1", "embeddings at the minimum are codes", "tests/test_theory.py -k theorem_1"),
    (f"{B}, Cor. 1 to 3", "they are decorrelated, and in clusters of n / c", "tests/test_theory.py -k corollar"),
    (f"{B}, Table 1", "linear probe: above Self-Classifier, GEDI (no gen), SwAV, Barlow Twins", [*RIVALS, CODES[-1]],
     "Barlow Twins, SwAV, GEDI, Self-Classifier, CPLearn: " + each(5, "linear"),
     lambda *runs: max(run["linear"] for run in runs[:-1]) < runs[-1]["linear"]),
    (f"{B}, Table 1", "NMI: above them (shuffled assignments score more, the more codes there are)",
     [*RIVALS, CODES[-1]], "NMI " + each(5, "nmi", ".2f") + "; shuffled " + each(5, "shuffled", ".2f")
     + "; AMI " + each(5, "ami", ".2f"), lambda *runs: max(run["ami"] for run in runs[:-1]) < runs[-1]["ami"]),
    (f"{B}, Figs. 4, 13a", "correlation falls as c grows from 10 to 16384", CODES,
     "correlation " + each(4, "correlation", ".2f"), lambda *runs: rising("correlation")(*runs[::-1])),
    (f"{B}, Fig. 5", "the linear probe rises with c", CODES, "linear " + each(4, "linear"), rising("linear")),
    (f"{B}, Fig. 5", "NMI rises with c", CODES, "NMI " + each(4, "nmi", ".2f") + "; shuffled "
     + each(4, "shuffled", ".2f") + "; AMI " + each(4, "ami", ".2f"), rising("ami")),
    (f"{B}, Fig. 13a", "more singular values are large as c grows", CODES, "rank " + each(4, "rank", ".1f"),
     rising("rank")),
    (f"{B}, Fig. 13b", "entropy of a mixture of 200 rises with c", CODES, each(4, "mixture200", ".2f"),
     rising("mixture200")),
    (f"{B}, Fig. 6a", "CPLearn fills its dimensions like Barlow Twins, the others do not", [*RIVALS, CODES[-1]],
     "share of dimensions " + each(5, "share", ".2f"),
     lambda barlow, *others: min(barlow["share"], others[-1]["share"]) > max(run["share"] for run in others[:-1])),
    (f"{B}, Fig. 6b", "its mixture entropy is the highest", [*RIVALS, CODES[-1]], each(5, "mixture200", ".2f"),
     lambda *runs: max(run["mixture200"] for run in runs[:-1]) < runs[-1]["mixture200"]),
    (f"{B}, Table 9", "linear probe rises with beta up to 1", RISING_BETA,
     "beta 0.05, 0.1, 0.25, 0.5, 1: linear " + each(5, "linear"), rising("linear")),
    (f"{B}, Table 9", "above beta 1.25 there is cluster collapse", LARGE_BETA,
     "beta 1.25, 2, 10: used codes " + each(3, "used", ".0f") + "; linear " + each(3, "linear"),
     lambda *runs: all(run["used"] < run["clusters"] ** 0.5 for run in runs)),
    (f"{B}, Fig. 12", "beta 0 ends with two clusters", ["claim-cplearn-beta0"], "used codes {0[used]:.0f}",
     lambda run: run["used"] < 10),
    (f"{B}, Fig. 12", "beta 10 ends with one", LARGE_BETA[2:], "used codes {0[used]:.0f}",
     lambda run: run["used"] < 10),
    (f"{B}, Table 4", "L2 norm and tanh are about the same", [CODES[2], "claim-cplearn-tanh"],
     "linear " + each(2, "linear") + "; kNN " + each(2, "knn"), lambda a, b: abs(a["linear"] - b["linear"]) < 0.02),
    (f"{B}, Table 4", "tanh with scores sqrt(n) times as large, as in the paper's code, trains",
     ["claim-cplearn-tanhunscaled"], "linear {0[linear]:.3f}, untrained {0[start][linear]:.3f}; entropy over log c "
     "{0[assignment_entropy]:.3f}", lambda run: better(run, run["start"], "linear")),
    (f"{B}, App. A", "linear and batch norm in the head stabilise training", [CODES[2], "claim-cplearn-nobatchnorm"],
     "linear " + each(2, "linear") + "; rank " + each(2, "rank", ".1f"), lambda a, b: better(a, b, "linear")),
    (f"{B}, App. N", "reverse KL trains where Eq. 2's prior is unstable (a ViT on ImageNet)",
     [CODES[2], "claim-cplearn-crossentropy"], "linear " + each(2, "linear"),
     lambda a, b: better(a, b, "linear")),
    (f"{B}, Table 8", "a larger dictionary costs no time", None,
     "projected for an H100: with c = 16384 a step takes 1.13 times that with c = 512 (`tests/benchmark.py step`)"),
    (f"{B}, Fig. 16", "accuracy rises fastest with CPLearn (there a linear probe, here kNN)", [*RIVALS, CODES[-1]],
     "after 2 epochs " + each(5, "curve][2") + "; after 5 " + each(5, "curve][5"),
     lambda *runs: all(max(run["curve"][i] for run in runs[:-1]) < runs[-1]["curve"][i] for i in range(2, 11))),
    (f"{B}, Fig. 7", "statistics of the features over training, on SVHN", None, NO_DATA),
    (f"{B}, Table 3", "ImageNet-100 with a ViT-S", None, "no GPU was at hand"),
    (f"{B}, Figs. 8 to 11, 14, 15", "the same on SVHN and CIFAR-100", None, NO_DATA),
    (f"{C}, Fig. 3", "the center vector classifies points better than SimSiam", POINTS,
     "blobs: kNN {0[knn]:.3f}, {1[knn]:.3f}; moons: {2[knn]:.3f}, {3[knn]:.3f}",
     lambda *runs: better(runs[0], runs[1], "knn") and better(runs[2], runs[3], "knn")),
    (f"{C}, Fig. 4", "SimSiam without predictor or stop-gradient: long center vector, on points",
     ["claim-simsiam-moons", "claim-simsiam-moonsnopredictor", "claim-simsiam-moonsnostop"],
     "center norm " + each(3, "center_norm", ".2f") + "; rank " + each(3, "rank", ".1f"),
     lambda with_, *without: not point(with_) and all(point(run) for run in without)),
    (f"{C}, Fig. 5", "Barlow Twins without redundancy term does not collapse, but is worse",
     ["shapes-barlow_twins", "claim-barlow_twins-offdiag"],
     "kNN " + each(2, "knn") + "; rank " + each(2, "rank", ".1f"),
     lambda a, b: b["start"]["knn"] < b["knn"] < a["knn"]),
    (f"{C}, Fig. 5b, c", "its batch norm removes the center vector, with the term and without",
     None, "nothing to measure: a batch norm subtracts the mean"),
    (f"{C}, Fig. 6", "SwAV with fixed prototypes does not collapse, but is worse", ["shapes-swav", "claim-swav-freeze"],
     "kNN " + each(2, "knn") + "; center norm " + each(2, "center_norm", ".2f"),
     lambda a, b: not point(b) and b["start"]["knn"] < b["knn"] < a["knn"]),
    (f"{C}, Fig. 7", "BYOL with less momentum: longer center vector, worse kNN", MOMENTA,
     "momentum 0, 0.9, 0.99: center norm " + each(3, "center_norm", ".2f") + "; kNN " + each(3, "knn"),
     lambda *runs: rising("center_norm")(*runs[::-1]) and rising("knn")(*runs)),
    (f"{C}, Eq. 4", "agreement alone makes the center vector long",
     ["shapes-center_vector", "ablation-center_vector-center-weight-0"],
     "center norm " + each(2, "center_norm", ".2f"), lambda with_, without: point(without) and not point(with_)),
    (f"{C}, Eqs. 11 to 13", "InfoNCE becomes the hardest triplet as its temperature falls",
     "tests/test_losses.py -k simclr_becomes"),
    (f"{C}, Eq. 31", "DINO's gradient as its temperature falls", "tests/test_losses.py -k dino_gradient"),
]
# fmt: on
