"""The papers' claims, and what the stored runs and the tests say of them: the table of claims.md.

A claim is decided by a test, or by stored runs. For the latter a function gets the figures of each
of the claim's runs (see `figures`) and returns the text that the table shows and whether the claim
holds: True, False, or None where two accuracies are too close to say.
"""

from itertools import pairwise
from statistics import mean

from store import label

# "Preventing Collapses in Non-Contrastive Self-Supervised Learning"
REPORT = "Report"
# "Collapse-Proof Non-Contrastive Self-Supervised Learning"
CPLEARN = "CPLearn"
# "The Common Stability Mechanism behind most Self-Supervised Learning Approaches"
CENTER = "Center"

# The flags that claims.md abbreviates, as it would be done in a shell.
PHOTOGRAPHS = "--dataset folder --data-dir cifar --image-size 16 --width 16 --epochs 10"
SMALL_F = "--projector-dim 128 --eps 1e-8 --weight-decay 1e-4"

# The runs, by their labels (see store.label).
SIMSIAM = "simsiam --dataset shapes"
BYOL = "byol --dataset shapes"
BYOL_MOMENTA = [f"byol --dataset shapes --momentum {momentum}" for momentum in ("0", "0.9", "0.99")]
SWAV = "swav --dataset shapes"
BARLOW_TWINS = "barlow_twins --dataset shapes"
VICREG = "vicreg --dataset shapes"
CENTER_VECTOR = "center_vector --dataset shapes"
MOONS = "simsiam --dataset moons"
RIVALS = [
    f"{method} {PHOTOGRAPHS} --projector-dim 512"
    for method in ("barlow_twins", "swav", "gedi", "self_classifier")
]
CP = f"cplearn {PHOTOGRAPHS} {SMALL_F}"
CP_10 = f"{CP} --c 10 --beta 0.5"
CP_128 = f"{CP} --c 128 --beta 0.5"
CP_2048 = f"{CP} --c 2048 --beta 0.1"
CP_16384 = f"{CP} --c 16384 --beta 0.05"
CODES = [CP_10, CP_128, CP_2048, CP_16384]
SMALL_BETA = [
    f"{CP} --c 2048 --beta 0.05",
    CP_2048,
    f"{CP} --c 2048 --beta 0.25",
    f"{CP} --c 2048 --beta 0.5",
    f"{CP} --c 2048 --beta 1",
]
LARGE_BETA = [f"{CP} --c 2048 --beta {beta}" for beta in ("1.25", "2", "10")]


# --- what runs have come to


def figures(runs, like):
    """The figures of the runs with the label `like`, means over their seeds: those of the trained
    network by their names, `mixture` (of 200 Gaussians), `curve` (kNN while training, of the first
    seed), `seeds` (how many) and `untrained`, a dict of the untrained network's figures."""
    found = [run for run in runs if label(run) == like]
    if not found:
        raise SystemExit(f"no stored run has the label {like!r}")
    out = means([run["trained"] for run in found])
    out["untrained"] = means([run["untrained"] for run in found])
    out["seeds"] = len(found)
    if all(run["mixture"] for run in found):
        out["mixture"] = mean(run["mixture"]["200"] for run in found)
    if found[0]["knn_curve"] is not None:
        out["curve"] = found[0]["knn_curve"][:, 1]
    return out


def means(rows):
    """The means of the figures that all rows have."""
    out = {}
    for name in rows[0]:
        if all(name in row for row in rows):
            out[name] = mean(row[name] for row in rows)
    return out


def listed(runs, name, digits=3):
    return ", ".join(f"{run[name]:.{digits}f}" for run in runs)


def rises(runs, name):
    return all(a[name] < b[name] for a, b in pairwise(runs))


def last_is_best(runs, name):
    return max(run[name] for run in runs[:-1]) < runs[-1][name]


def is_point(run):
    """All embeddings are one vector, by the threshold of common.diagnose."""
    return 1 - run["center_norm"] ** 2 < 0.2


def is_flat(run):
    """Few dimensions are left, by the threshold of common.diagnose."""
    return run["rank"] < run["dimensions"] ** 0.5


def is_better(run, other, name):
    """Whether an accuracy is higher, None where the two differ by less than seeds do."""
    if abs(run[name] - other[name]) < 0.01:
        return None
    return run[name] > other[name]


def rank_of(run):
    return f"rank {run['rank']:.1f} of {run['dimensions']:.0f}"


# --- decisions: one function for each claim that runs decide


def vicreg_fills_dimensions(run):
    return rank_of(run), not is_flat(run)


def becomes_a_point(run):
    knn = f"kNN {run['knn']:.3f}, untrained {run['untrained']['knn']:.3f}"
    return f"center norm {run['center_norm']:.2f}; {knn}", is_point(run)


def keeps_few_dimensions(run):
    return rank_of(run), is_flat(run)


def correlation_rises(*runs):
    return f"correlation {listed(runs, 'correlation', 2)}", rises(runs, "correlation")


def only_the_first_is_no_point(*runs):
    shown = f"center norm {listed(runs, 'center_norm', 2)}; kNN {listed(runs, 'knn')}"
    return shown, not is_point(runs[0]) and all(is_point(run) for run in runs[1:])


def correlation_falls_while_training(run):
    before = run["untrained"]["correlation"]
    return f"{before:.2f} untrained, {run['correlation']:.2f}", run["correlation"] < before


def linear_is_best(*runs):
    return f"linear {listed(runs, 'linear')}", last_is_best(runs, "linear")


def information(runs):
    nmi = f"NMI {listed(runs, 'nmi', 2)}"
    shuffled = f"shuffled {listed(runs, 'shuffled', 2)}"
    return f"{nmi}; {shuffled}; AMI {listed(runs, 'ami', 2)}"


def information_is_best(*runs):
    return information(runs), last_is_best(runs, "ami")


def information_rises(*runs):
    return information(runs), rises(runs, "ami")


def correlation_falls(*runs):
    return f"correlation {listed(runs, 'correlation', 2)}", rises(runs[::-1], "correlation")


def linear_rises(*runs):
    return f"linear {listed(runs, 'linear')}", rises(runs, "linear")


def rank_rises(*runs):
    return f"rank {listed(runs, 'rank', 1)}", rises(runs, "rank")


def mixture_entropy_rises(*runs):
    return f"entropy {listed(runs, 'mixture', 2)}", rises(runs, "mixture")


def cplearn_and_barlow_twins_fill_more(barlow_twins, *others):
    shares = [run["rank"] / run["dimensions"] for run in (barlow_twins, *others)]
    shown = "share of dimensions " + ", ".join(f"{share:.2f}" for share in shares)
    return shown, min(shares[0], shares[-1]) > max(shares[1:-1])


def mixture_entropy_is_best(*runs):
    return f"entropy {listed(runs, 'mixture', 2)}", last_is_best(runs, "mixture")


def clusters_collapse(*runs):
    shown = f"used codes {listed(runs, 'used', 0)} of 2048; linear {listed(runs, 'linear')}"
    return shown, all(run["used"] < run["clusters"] ** 0.5 for run in runs)


def uses_few_codes(run):
    return f"used codes {run['used']:.0f} of 2048", run["used"] < 10


def becomes_one_cluster(run):
    shown = f"used codes {run['used']:.0f} of 2048; center norm {run['center_norm']:.2f}"
    return shown, is_point(run)


def about_the_same(run, other):
    shown = f"linear {listed((run, other), 'linear')}; kNN {listed((run, other), 'knn')}"
    return shown, abs(run["linear"] - other["linear"]) < 0.02


def trains(run):
    shown = f"linear {run['linear']:.3f}, untrained {run['untrained']['linear']:.3f}"
    shown += f"; entropy over log c {run['assignment_entropy']:.3f}"
    return shown, is_better(run, run["untrained"], "linear")


def first_is_better(run, other):
    return f"linear {listed((run, other), 'linear')}", is_better(run, other, "linear")


def accuracy_rises_fastest(*runs):
    after = []
    for epoch in (2, 5):
        after.append(", ".join(f"{run['curve'][epoch]:.3f}" for run in runs))
    ahead = []
    for epoch in range(2, 11):
        others = max(run["curve"][epoch] for run in runs[:-1])
        ahead.append(others < runs[-1]["curve"][epoch])
    return f"kNN after 2 epochs {after[0]}; after 5 {after[1]}", all(ahead)


def center_vector_is_better(center_blobs, simsiam_blobs, center_moons, simsiam_moons):
    shown = f"blobs: kNN {listed((center_blobs, simsiam_blobs), 'knn')}"
    shown += f"; moons: {listed((center_moons, simsiam_moons), 'knn')}"
    on_blobs = is_better(center_blobs, simsiam_blobs, "knn")
    on_moons = is_better(center_moons, simsiam_moons, "knn")
    return shown, on_blobs and on_moons


def simsiam_becomes_a_point_on_moons(*runs):
    shown = f"center norm {listed(runs, 'center_norm', 2)}; rank {listed(runs, 'rank', 1)}"
    return shown, not is_point(runs[0]) and all(is_point(run) for run in runs[1:])


def learns_less_without_redundancy(run, without):
    shown = f"kNN {listed((run, without), 'knn')}; rank {listed((run, without), 'rank', 1)}"
    return shown, without["untrained"]["knn"] < without["knn"] < run["knn"]


def learns_less_with_fixed_prototypes(run, fixed):
    shown = f"kNN {listed((run, fixed), 'knn')}"
    shown += f"; center norm {listed((run, fixed), 'center_norm', 2)}"
    learns_less = fixed["untrained"]["knn"] < fixed["knn"] < run["knn"]
    return shown, learns_less and not is_point(fixed)


def momentum_shortens_the_center(*runs):
    shown = f"center norm {listed(runs, 'center_norm', 2)}; kNN {listed(runs, 'knn')}"
    return shown, rises(runs[::-1], "center_norm") and rises(runs, "knn")


# --- the claims: paper and place, what it says, the runs or the test that decide, the decision

CLAIMS = [
    (f"{REPORT}, Fig. 8", "VICReg with all its terms fills many dimensions",
     [VICREG], vicreg_fills_dimensions),
    (f"{REPORT}, Fig. 8", "without its variance term all embeddings become one point",
     [f"{VICREG} --variance-weight 0"], becomes_a_point),
    (f"{REPORT}, Fig. 8", "without its covariance term few dimensions are left",
     [f"{VICREG} --covariance-weight 0"], keeps_few_dimensions),
    (f"{REPORT}, Fig. 11", "without its covariance term the correlation of dimensions rises",
     [VICREG, f"{VICREG} --covariance-weight 0"], correlation_rises),
    (f"{REPORT}, Sec. 4.1", "spectra, correlation and entropies measure collapse",
     "tests/test_metrics.py", None),
    (f"{REPORT}, Sec. 4", "SimSiam collapses without predictor or stop-gradient",
     [SIMSIAM, f"{SIMSIAM} --no-predictor", f"{SIMSIAM} --no-stop-gradient"],
     only_the_first_is_no_point),
    (f"{REPORT}, Sec. 4", "BYOL collapses without predictor and slow teacher",
     [BYOL, f"{BYOL} --momentum 0 --no-predictor"], only_the_first_is_no_point),
    (f"{REPORT}, Sec. 4", "W-MSE with batch norm instead of whitening keeps few dimensions",
     ["wmse --dataset shapes --whitening batchnorm"], keeps_few_dimensions),
    (f"{REPORT}, Sec. 4", "BYOL lowers the correlation (there of features, here of embeddings)",
     [f"{BYOL} --momentum 0.99"], correlation_falls_while_training),
    (f"{CPLEARN}, Fig. 3, Eq. 5", "the cosines of random codes have mean 0 and variance 1 / f",
     "tests/test_theory.py -k eq_5", None),
    (f"{CPLEARN}, Lemma 1", "the minima of the loss, in closed form (the tests add conditions)",
     "tests/test_theory.py -k lemma_1", None),
    (f"{CPLEARN}, Theorem 1", "embeddings at the minimum are codes",
     "tests/test_theory.py -k theorem_1", None),
    (f"{CPLEARN}, Cor. 1 to 3", "they are decorrelated, and in clusters of n / c",
     "tests/test_theory.py -k corollar", None),
    (f"{CPLEARN}, Table 1", "linear: CPLearn is above Barlow Twins, SwAV, GEDI and Self-Classifier",
     [*RIVALS, CP_16384], linear_is_best),
    (f"{CPLEARN}, Table 1", "NMI: CPLearn is above them",
     [*RIVALS, CP_16384], information_is_best),
    (f"{CPLEARN}, Figs. 4, 13a", "correlation falls as c grows", CODES, correlation_falls),
    (f"{CPLEARN}, Fig. 5", "linear rises with c", CODES, linear_rises),
    (f"{CPLEARN}, Fig. 5", "NMI rises with c", CODES, information_rises),
    (f"{CPLEARN}, Fig. 13a", "more singular values are large as c grows", CODES, rank_rises),
    (f"{CPLEARN}, Fig. 13b", "the entropy of a mixture of 200 Gaussians rises with c",
     CODES, mixture_entropy_rises),
    (f"{CPLEARN}, Fig. 6a", "CPLearn and Barlow Twins fill more of their dimensions than others",
     [*RIVALS, CP_16384], cplearn_and_barlow_twins_fill_more),
    (f"{CPLEARN}, Fig. 6b", "CPLearn's mixture entropy is the highest",
     [*RIVALS, CP_16384], mixture_entropy_is_best),
    (f"{CPLEARN}, Table 9", "linear rises with beta up to 1", SMALL_BETA, linear_rises),
    (f"{CPLEARN}, Table 9", "from beta 1.25 on there is cluster collapse",
     LARGE_BETA, clusters_collapse),
    (f"{CPLEARN}, Fig. 12", "beta 0 ends with two clusters",
     [f"{CP} --c 2048 --beta 0"], uses_few_codes),
    (f"{CPLEARN}, Fig. 12", "beta 10 ends with one cluster", LARGE_BETA[2:], becomes_one_cluster),
    (f"{CPLEARN}, Table 4", "L2 norm and tanh are about the same",
     [CP_2048, f"{CP_2048} --activation tanh"], about_the_same),
    (f"{CPLEARN}, Table 4", "tanh trains with scores sqrt(n) times as large, as in its code",
     [f"{CP_2048} --activation tanh-unscaled"], trains),
    (f"{CPLEARN}, App. A", "batch norm in the head stabilises training",
     [CP_2048, f"{CP_2048} --no-batchnorm"], first_is_better),
    (f"{CPLEARN}, App. N", "reverse KL trains where Eq. 2's prior is unstable (a ViT on ImageNet)",
     [CP_2048, f"{CP_2048} --prior cross-entropy"], first_is_better),
    (f"{CPLEARN}, Fig. 16", "accuracy rises fastest with CPLearn (there linear, here kNN)",
     [*RIVALS, CP_16384], accuracy_rises_fastest),
    (f"{CENTER}, Fig. 3", "the center vector classifies points better than SimSiam",
     ["center_vector --dataset blobs", "simsiam --dataset blobs",
      "center_vector --dataset moons", MOONS],
     center_vector_is_better),
    (f"{CENTER}, Fig. 4", "on points, SimSiam without predictor or stop-gradient has a long center",
     [MOONS, f"{MOONS} --no-predictor", f"{MOONS} --no-stop-gradient"],
     simsiam_becomes_a_point_on_moons),
    (f"{CENTER}, Fig. 5", "Barlow Twins without the redundancy term learns, but less",
     [BARLOW_TWINS, f"{BARLOW_TWINS} --lambda-offdiag 0"], learns_less_without_redundancy),
    (f"{CENTER}, Fig. 6", "SwAV with fixed prototypes learns, but less",
     [SWAV, f"{SWAV} --freeze-prototypes"], learns_less_with_fixed_prototypes),
    (f"{CENTER}, Fig. 7", "BYOL with less momentum has a longer center and lower accuracy",
     BYOL_MOMENTA, momentum_shortens_the_center),
    (f"{CENTER}, Eq. 4", "agreement alone makes the center long",
     [CENTER_VECTOR, f"{CENTER_VECTOR} --center-weight 0"], only_the_first_is_no_point),
    (f"{CENTER}, Eqs. 11 to 13", "InfoNCE becomes the hardest triplet as its temperature falls",
     "tests/test_losses.py -k simclr_becomes", None),
    (f"{CENTER}, Eq. 31", "DINO's gradient as its temperature falls",
     "tests/test_losses.py -k dino_gradient", None),
]  # fmt: skip


# --- the table


def table(runs):
    """The lines of the table of claims."""
    yield "| paper | says | runs, or test | measured here, in the runs' order | holds |"
    yield "|---|---|---|---|---|"
    first = {}  # the first claim that some runs decide
    for source, says, decided_by, decide in CLAIMS:
        if decide is None:
            made_by = f"`python -m pytest {decided_by}`"
            shown, holds = "as the tests say", True
        else:
            measured = [figures(runs, like) for like in decided_by]
            commands = [command(*pair) for pair in zip(decided_by, measured, strict=True)]
            made_by = "<br>".join(commands)
            if made_by in first and len(commands) > 1:
                made_by = f"those of {first[made_by]}"
            first.setdefault(made_by, source)
            shown, holds = decide(*measured)
        yield f"| {source} | {says} | {made_by} | {shown} | {word(holds)} |"


def command(like, run):
    """A run's label, with the flags that the page abbreviates, and how many seeds it has."""
    text = like.replace(PHOTOGRAPHS, "$PHOTOGRAPHS").replace(SMALL_F, "$SMALL_F")
    if run["seeds"] > 1:
        return f"`{text}` ({run['seeds']} seeds)"
    return f"`{text}`"


def word(holds):
    if holds is None:
        return "too close to say"
    if holds:
        return "yes"
    return "**no**"
