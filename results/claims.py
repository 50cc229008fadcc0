"""The papers' claims, and what the stored runs and the tests say of them: the table of claims.md.

A claim is decided by a test, or by stored runs. For the latter a function gets the figures of each
of the claim's runs (see `figures`) and returns the text that the table shows and whether the claim
holds: True, False, or None where two accuracies are too close to say.
"""

from itertools import pairwise
from operator import itemgetter
from statistics import mean, stdev

import plan
from store import label

# "Preventing Collapses in Non-Contrastive Self-Supervised Learning"
REPORT = "Report"
# "Collapse-Proof Non-Contrastive Self-Supervised Learning"
CPLEARN = "CPLearn"
# "The Common Stability Mechanism behind most Self-Supervised Learning Approaches"
CENTER = "Center"

# The runs, by their labels (see store.label).
SIMSIAM = "simsiam --dataset shapes"
BYOL = "byol --dataset shapes"
BYOL_MOMENTA = [f"{BYOL} --momentum {momentum}" for momentum in ("0", "0.9", "0.99")]
SWAV = "swav --dataset shapes"
BARLOW_TWINS = "barlow_twins --dataset shapes"
VICREG = "vicreg --dataset shapes"
CENTER_VECTOR = "center_vector --dataset shapes"
CPLEARN_BETA_10 = "cplearn --dataset shapes --beta 10"
MOONS = "simsiam --dataset moons"

ON_PHOTOGRAPHS = [f"{method} {plan.PHOTOGRAPHS}" for method in plan.TABLE_1]
ON_ALL_IMAGES = [
    f"{method} {plan.ALL_IMAGES} --epochs {plan.EPOCHS[method]}"
    for method in ("barlow_twins", "cplearn")
]


# --- what runs have come to


def figures(runs, like, seeds):
    """The figures of the runs with the label `like`, means over `seeds`: those of the trained
    network by their names, `untrained`, a dict of the untrained network's figures, and `deviation`,
    a dict of the standard deviations of all seeds that there are, 0 of one seed."""
    alike = [run for run in runs if label(run) == like]
    counted = [run for run in alike if run["seed"] in seeds]
    out = over_seeds(mean, [run["trained"] for run in counted])
    out["untrained"] = over_seeds(mean, [run["untrained"] for run in counted])
    out["deviation"] = over_seeds(deviation, [run["trained"] for run in alike])
    return out


def common_seeds(runs, labels):
    """The seeds that there are of all labels."""
    seeds = {0, 1, 2}
    for like in labels:
        seeds &= {run["seed"] for run in runs if label(run) == like}
    return seeds


def over_seeds(function, rows):
    """A function of the figures that all rows have."""
    out = {}
    for name in rows[0]:
        if all(name in row for row in rows):
            out[name] = function([row[name] for row in rows])
    return out


def deviation(values):
    if len(values) == 1:
        return 0
    return stdev(values)


def listed(runs, name, digits=3):
    return ", ".join(f"{run[name]:.{digits}f}" for run in runs)


def rises(runs, name):
    return both(*[is_better(after, before, name) for before, after in pairwise(runs)])


def both(*answers):
    """Whether all hold: False if one does not, else None if one is too close to say."""
    if False in answers:
        return False
    if None in answers:
        return None
    return True


def last_is_best(runs, name):
    best = max(runs[:-1], key=itemgetter(name))
    return is_better(runs[-1], best, name)


def is_point(run):
    """All embeddings are one vector, by the threshold of common.diagnose."""
    return 1 - run["center_norm"] ** 2 < 0.2


def is_flat(run):
    """Few dimensions are left, by the threshold of common.diagnose."""
    return run["rank"] < run["dimensions"] ** 0.5


def is_better(run, other, name):
    """Whether a figure is higher, None where the two differ by less than seeds do."""
    margin = max(0.01, run["deviation"][name], other["deviation"][name])
    if abs(run[name] - other[name]) < margin:
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


def becomes_one_cluster(run):
    return f"used codes {run['used']:.0f} of {run['clusters']:.0f}", run["used"] == 1


def linear_is_best(*runs):
    return f"linear {listed(runs, 'linear')}", last_is_best(runs, "linear")


def information_is_best(*runs):
    shown = f"NMI {listed(runs, 'nmi', 2)}; of shuffled assignments {listed(runs, 'shuffled', 2)}"
    return shown, last_is_best(runs, "nmi")


def center_vector_is_better(center_blobs, simsiam_blobs, center_moons, simsiam_moons):
    shown = f"blobs: kNN {listed((center_blobs, simsiam_blobs), 'knn')}"
    shown += f"; moons: {listed((center_moons, simsiam_moons), 'knn')}"
    on_blobs = is_better(center_blobs, simsiam_blobs, "knn")
    on_moons = is_better(center_moons, simsiam_moons, "knn")
    return shown, both(on_blobs, on_moons)


def simsiam_becomes_a_point_on_moons(*runs):
    shown = f"center norm {listed(runs, 'center_norm', 2)}; rank {listed(runs, 'rank', 1)}"
    return shown, not is_point(runs[0]) and all(is_point(run) for run in runs[1:])


def learns_less(run, without):
    shown = f"kNN {listed((run, without), 'knn')}; untrained {without['untrained']['knn']:.3f}"
    learns = without["knn"] > without["untrained"]["knn"] + 0.01
    return shown, both(learns, is_better(run, without, "knn"))


def momentum_shortens_the_center(*runs):
    shown = f"center norm {listed(runs, 'center_norm', 2)}; kNN {listed(runs, 'knn')}"
    return shown, both(rises(runs[::-1], "center_norm"), rises(runs, "knn"))


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
    (f"{CPLEARN}, Fig. 3, Eq. 5", "the cosines of random codes have mean 0 and variance 1 / f",
     "tests/test_theory.py -k eq_5", None),
    (f"{CPLEARN}, Lemma 1", "the minima of the loss, in closed form (the tests add conditions)",
     "tests/test_theory.py -k lemma_1", None),
    (f"{CPLEARN}, Theorem 1", "embeddings at the minimum are codes",
     "tests/test_theory.py -k theorem_1", None),
    (f"{CPLEARN}, Cor. 1 to 3", "they are decorrelated, and in clusters of n / c",
     "tests/test_theory.py -k corollar", None),
    (f"{CPLEARN}, Table 1", "linear: CPLearn is above Barlow Twins, SwAV, GEDI and Self-Classifier",
     ON_PHOTOGRAPHS, linear_is_best),
    (f"{CPLEARN}, Table 1", "linear: CPLearn is above Barlow Twins (all images, an hour each)",
     ON_ALL_IMAGES, linear_is_best),
    (f"{CPLEARN}, Table 1", "NMI: CPLearn is above Barlow Twins, SwAV, GEDI and Self-Classifier",
     ON_PHOTOGRAPHS, information_is_best),
    (f"{CPLEARN}, Fig. 12", "beta 10 ends with one cluster",
     [CPLEARN_BETA_10], becomes_one_cluster),
    (f"{CENTER}, Fig. 3", "the center vector classifies points better than SimSiam",
     ["center_vector --dataset blobs", "simsiam --dataset blobs",
      "center_vector --dataset moons", MOONS],
     center_vector_is_better),
    (f"{CENTER}, Fig. 4", "on points, SimSiam without predictor or stop-gradient becomes one point",
     [MOONS, f"{MOONS} --no-predictor", f"{MOONS} --no-stop-gradient"],
     simsiam_becomes_a_point_on_moons),
    (f"{CENTER}, Fig. 5", "Barlow Twins without the redundancy term learns, but less",
     [BARLOW_TWINS, f"{BARLOW_TWINS} --lambda-offdiag 0"], learns_less),
    (f"{CENTER}, Fig. 6", "SwAV with fixed prototypes learns, but less",
     [SWAV, f"{SWAV} --freeze-prototypes"], learns_less),
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
    for source, says, decided_by, decide in CLAIMS:
        if decide is None:
            made_by = f"`python -m pytest {decided_by}`"
            yield f"| {source} | {says} | {made_by} | tested | yes |"
            continue
        seeds = common_seeds(runs, decided_by)
        made_by = "<br>".join(shortened(like, seeds) for like in decided_by)
        if not seeds:
            yield f"| {source} | {says} | {made_by} | not run yet | |"
            continue
        measured = [figures(runs, like, seeds) for like in decided_by]
        shown, holds = decide(*measured)
        yield f"| {source} | {says} | {made_by} | {shown} | {in_words(holds)} |"


def shortened(like, seeds):
    """A run's label, with the flags that the page abbreviates, and how many seeds are counted."""
    text = like.replace(plan.PHOTOGRAPHS, "$PHOTOGRAPHS").replace(plan.ALL_IMAGES, "$ALL_IMAGES")
    if len(seeds) > 1:
        return f"`{text}` ({len(seeds)} seeds)"
    return f"`{text}`"


def in_words(holds):
    if holds is None:
        return "too close to say"
    if holds:
        return "yes"
    return "**no**"
