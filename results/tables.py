"""The tables of README.md and results/README.md, as lines of Markdown, from the stored runs."""

from statistics import mean, stdev

import store
from store import label, select

# README.md's table: a method, its idea, what prevents collapse, and the flags that take this away.
METHODS = [
    (
        "triplet",
        "two views of an image are closer than views of other images, by a margin",
        "other images are pushed away",
        ["--negatives none"],
    ),
    (
        "simclr",
        "find an image's other view among all images of the batch",
        "all images push each other apart",
        ["--no-negatives"],
    ),
    (
        "simsiam",
        "predict one view's embedding from the other's",
        "the predictor, and no gradient through the target",
        ["--no-predictor", "--no-stop-gradient"],
    ),
    (
        "byol",
        "predict what a slow copy of the network, the teacher, says of the other view",
        "the predictor, and the slow teacher",
        ["--momentum 0 --no-predictor"],
    ),
    (
        "dino",
        "assign an image to prototypes as a slow teacher does",
        "the teacher's scores are centered (else one prototype wins) and sharpened (else all are"
        " alike)",
        ["--no-centering", "--teacher-temperature 1"],
    ),
    (
        "swav",
        "predict the prototype of the other view",
        "assignments that give every prototype an equal share of the batch",
        ["--no-sinkhorn"],
    ),
    (
        "barlow_twins",
        "the cross-correlation of two views is the identity matrix",
        "each dimension is standardised over the batch, so one point is impossible; the redundancy"
        " term decorrelates the dimensions",
        ["--lambda-offdiag 0"],
    ),
    (
        "vicreg",
        "views agree, dimensions vary and are decorrelated",
        "the variance term (against one point), the covariance term (against few dimensions)",
        ["--variance-weight 0", "--covariance-weight 0"],
    ),
    (
        "wmse",
        "whiten the batch, then make views agree",
        "whitened embeddings have the identity as covariance",
        ["--whitening batchnorm", "--whitening none"],
    ),
    (
        "lejepa",
        "views agree, and embeddings are made a standard Gaussian",
        "a test of normality on random directions (SIGReg)",
        ["--sigreg-weight 0"],
    ),
    (
        "mcr2",
        "views of an image are close, and the batch fills a large volume",
        "the volume term (coding rate) of the whole batch",
        ["--expansion-weight 0"],
    ),
    (
        "center_vector",
        "views agree, and the mean of the embeddings is short",
        "the penalty on the mean",
        ["--center-weight 0"],
    ),
    (
        "self_classifier",
        "predict the other view's class; the classes are learned",
        "a softmax over the images, too, so that every class gets images",
        ["--no-column-softmax"],
    ),
    (
        "gedi",
        "views agree on a class; the classes are learned and used equally",
        "a prior: on average all classes are used equally",
        ["--prior-weight 0"],
    ),
    (
        "cplearn",
        "views agree on one of many random codes",
        "a prior: on average all codes are used equally (a large `--beta` outweighs it)",
        ["--beta 10"],
    ),
]

# Linear accuracy of a whole ResNet-18 after 1000 epochs on CIFAR-10, and its source.
SOLO_LEARN = "[solo-learn](https://github.com/vturrisi/solo-learn#results)"
CPLEARN_PAPER = "CPLearn paper, Table 8"
PUBLISHED = {
    "barlow_twins": f"0.921, {SOLO_LEARN}",
    "byol": f"0.926, {SOLO_LEARN}",
    "dino": f"0.895, {SOLO_LEARN}",
    "simclr": f"0.907, {SOLO_LEARN}",
    "simsiam": f"0.905, {SOLO_LEARN}",
    "swav": f"0.892, {SOLO_LEARN}",
    "vicreg": f"0.921, {SOLO_LEARN}",
    "wmse": f"0.887, {SOLO_LEARN}",
    "cplearn": f"0.913, {CPLEARN_PAPER}",
    "gedi": f"0.800, {CPLEARN_PAPER}",
    "self_classifier": f"0.848, {CPLEARN_PAPER}",
}

NO_RUNS = "No run is stored yet."


# --- cells


def row(*cells):
    return f"| {' | '.join(cells)} |"


def spread(values, digits=3):
    """The mean of the seeds and their standard deviation."""
    shown = f"{mean(values):.{digits}f}"
    if len(values) > 1:
        shown += f" ± {stdev(values):.{digits}f}"
    return shown


def trained(runs, figure):
    return [run["trained"][figure] for run in runs]


def gains(runs, figure="knn"):
    return [run["trained"][figure] - run["untrained"][figure] for run in runs]


def rank(runs):
    return f"{mean(trained(runs, 'rank')):.1f} of {runs[0]['trained']['dimensions']}"


def minutes(runs):
    """Of seed 0, because other seeds may be of another processor."""
    of_seed_0 = [run["minutes"] for run in runs if run["seed"] == 0]
    if not of_seed_0:
        return "–"
    (spent,) = of_seed_0
    if spent < 10:
        return f"{spent:.1f}"
    return f"{spent:.0f}"


def found(run):
    """The modes of collapse that the diagnosis finds in a run."""
    return [mode for mode, (_, verdict) in run["diagnosis"].items() if verdict == "collapsed"]


def is_uniform(run):
    return run["diagnosis"]["assignment"][1] == "still uniform"


def verdict(run):
    """The diagnosis of a run in words."""
    words = []
    if found(run):
        words.append(" and ".join(found(run)) + " collapse")
    if is_uniform(run):
        words.append("assignments stay uniform")
    return ", ".join(words) or "no collapse by the diagnosis"


def verdicts(runs):
    """The modes that the diagnosis finds in the runs, and in how many where not in all."""
    modes = [mode for run in runs for mode in found(run)]
    words = []
    for mode in dict.fromkeys(modes):
        if modes.count(mode) < len(runs):
            mode += f" ({modes.count(mode)} of {len(runs)})"
        words.append(mode)
    return ", ".join(words) or "none"


def best_first(runs):
    """The methods of the runs, by their mean kNN accuracy, equal ones by their names."""

    def knn(method):
        return mean(trained([run for run in runs if run["method"] == method], "knn"))

    names = sorted({run["method"] for run in runs})
    return sorted(names, key=knn, reverse=True)


def origin(runs):
    """Where the runs of a table are from, in sentences."""
    commits = ", ".join(sorted({f"`{run['commit']}`" for run in runs}))
    torches = ", ".join(sorted({run["versions"]["torch"] for run in runs}))
    text = f"{len(runs)} runs, code of commit {commits}, torch {torches}, each on one thread."
    for seed in sorted({run["seed"] for run in runs}):
        its = [run for run in runs if run["seed"] == seed]
        precisions = " and ".join(sorted({run["precision"] for run in its}))
        cpus = "; ".join(sorted({run["cpu"] for run in its}))
        text += f" Seed {seed}: {precisions}, {cpus}."
    codes = {method: store.code_of(method) for method in {run["method"] for run in runs}}
    older = [run for run in runs if run["code"] != codes[run["method"]]]
    if older:
        text += f" {len(older)} of them are of older code."
    return text


# --- README.md


def methods(runs):
    """Each method with its mechanism, and what happens without it on the drawn shapes."""
    floor = mean(run["untrained"]["knn"] for run in select(runs, "shapes") if run["seed"] == 0)
    yield "The last column is the verdict of `analyze.py` on a run without the mechanism, on the"
    yield "drawn shapes with seed 0. Figures are with the mechanism → without it. Before training,"
    yield f"kNN is {floor:.2f}."
    yield ""
    yield row(
        "method", "idea", "what prevents collapse", "flag that takes it away", "what then happens"
    )
    yield "|---|---|---|---|---|"
    for method, idea, prevents, flags in METHODS:
        name = f"[`{method}`](methods/{method}.py)"
        typed = "<br>".join(f"`{flag}`" for flag in flags)
        happens = "<br>".join(what_happens(runs, method, flag) for flag in flags)
        yield row(name, idea, prevents, typed, happens)


def pair(runs, method, flag):
    """The runs of a method on the drawn shapes with its mechanism and without it, of seed 0."""
    with_ = stored(runs, "shapes", f"{method} --dataset shapes")
    without = stored(runs, "ablations", f"{method} --dataset shapes {flag}")
    return with_, without


def stored(runs, table, wanted, seed=0):
    """The run of a table with the label `wanted`."""
    for run in select(runs, table):
        if label(run) == wanted and run["seed"] == seed:
            return run
    raise SystemExit(f"the table {table} has no run {wanted} --seed {seed}")


def what_happens(runs, method, flag):
    """The diagnosis without the mechanism, and figures with -> without it."""
    with_, without = pair(runs, method, flag)
    before, after = with_["trained"], without["trained"]
    figures = []
    modes = found(without)
    if "representation" in modes:
        figures.append(f"center norm {before['center_norm']:.2f} → {after['center_norm']:.2f}")
    if "dimensional" in modes:
        ranks = f"{before['rank']:.1f} → {after['rank']:.1f}"
        figures.append(f"rank {ranks} of {after['dimensions']}")
    if is_uniform(without):
        entropies = f"{before['assignment_entropy']:.2f} → {after['assignment_entropy']:.2f}"
        figures.append(f"entropy {entropies} of the largest possible")
    elif "assignment_entropy" in after:
        used = f"{before['used']} → {after['used']}"
        figures.append(f"{used} of {after['clusters']} {codes_name(method)} in use")
    figures.append(f"kNN {before['knn']:.2f} → {after['knn']:.2f}")
    return f"{verdict(without)}: {', '.join(figures)}"


def codes_name(method):
    if method == "cplearn":
        return "codes"
    if method in ("gedi", "self_classifier"):
        return "classes"
    return "prototypes"


# --- results/README.md


def shapes(runs):
    yield from compared(select(runs, "shapes"))


def photographs(runs):
    yield from compared(select(runs, "photographs"), PUBLISHED)


def compared(table, published=None):
    """Every method with the same data and budget. `published` has a cell for the last column, for
    some of the methods; without it there is no such column."""
    if not table:
        yield NO_RUNS
        return
    head = ["method", "seeds", "linear", "kNN", "kNN above untrained", "effective rank"]
    head += ["collapse", "minutes"]
    if published:
        head.append("published linear")
    yield row(*head)
    yield "|---" * len(head) + "|"
    for method in best_first(table):
        its = [run for run in table if run["method"] == method]
        cells = [
            f"`{method}`",
            str(len(its)),
            spread(trained(its, "linear")),
            spread(trained(its, "knn")),
            f"{mean(gains(its)):+.3f}",
            rank(its),
            verdicts(its),
            minutes(its),
        ]
        if published:
            cells.append(published.get(method, "–"))
        yield row(*cells)
    linear = mean(run["untrained"]["linear"] for run in table)
    knn = mean(run["untrained"]["knn"] for run in table)
    cells = ["untrained", "", f"{linear:.3f}", f"{knn:.3f}"]
    yield row(*cells, *[""] * (len(head) - len(cells)))
    yield ""
    yield origin(table)


def ablations(runs):
    """The drawn shapes with the mechanism -> without it, seed 0."""
    yield row("command", "linear", "kNN", "effective rank", "center norm", "without the mechanism")
    yield "|---|---|---|---|---|---|"
    table = select(runs, "ablations")
    for without in table:
        with_ = stored(runs, "shapes", f"{without['method']} --dataset shapes", without["seed"])
        before, after = with_["trained"], without["trained"]
        yield row(
            f"`{label(without).replace(' --dataset shapes', '')}`",
            f"{before['linear']:.3f} → {after['linear']:.3f}",
            f"{before['knn']:.3f} → {after['knn']:.3f}",
            f"{before['rank']:.1f} → {after['rank']:.1f} of {after['dimensions']}",
            f"{before['center_norm']:.2f} → {after['center_norm']:.2f}",
            verdict(without),
        )
    yield ""
    yield origin(table)


def all_images(runs):
    """Few methods on all images."""
    table = select(runs, "all_images")
    if not table:
        yield NO_RUNS
        return
    yield row(
        "method", "epochs", "linear", "kNN", "kNN above untrained", "effective rank", "collapse",
        "minutes", "published linear",
    )  # fmt: skip
    yield "|---|---|---|---|---|---|---|---|---|"
    for method in best_first(table):
        (run,) = select(table, "all_images", method)
        yield row(
            f"`{method}`",
            f"{run['knn_curve'][-1][0]:.0f}",
            spread(trained([run], "linear")),
            spread(trained([run], "knn")),
            f"{gains([run])[0]:+.3f}",
            rank([run]),
            verdicts([run]),
            minutes([run]),
            PUBLISHED.get(method, "–"),
        )
    yield ""
    yield origin(table)
