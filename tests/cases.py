"""What the tests that concern every method must know of each: one entry in CASES a method.

To test a new methods/foo.py, copy the section of the closest method here, and run
`python -m pytest -k foo`. The fields of an entry stand in `Case`. All but `slow` have a default.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

CASES = {}


def two_rows(z1, z2):
    return z1, z2


def plain_call(loss_fn, *rows, **settings):
    return loss_fn(*rows, **settings)


def never(*_, **__):
    return False


@dataclass
class Case:
    """One method. Flags are strings, as they are typed."""

    # The loss once more, written as plain loops from the equation: slow(*arguments, **settings)
    # with the arguments of loss_fn returns some or all of its terms. Extra settings go to **_.
    slow: Callable

    # The method's own sizes, small, beside conftest.TINY, and how many codes, prototypes or classes
    # `evaluate` then counts.
    flags: str = ""
    codes: int | None = None
    # Switches on what the method stores beside its network and has off by default.
    state_flags: str = ""

    # rows(z1, z2): the tensors that the script gathers for the loss, from two views' rows (n, d).
    # call(loss_fn, *rows, **settings): the loss of them, with the arguments that are no rows.
    rows: Callable = two_rows
    call: Callable = plain_call
    # Settings to test the loss with, by name. A setting "function" names another function of the
    # script to take in place of loss_fn.
    settings: dict[str, dict] = field(default_factory=lambda: {"default": {}})
    # What the script gives the loss: "any size", "cosines" (in [-1, 1], of prototypes),
    # or "sphere" (embeddings (n, f) of norm sqrt(f)).
    inputs: str = "any size"
    # (images, dimensions) for the slow loss. The first dimension is even, none is below 2.
    sizes: tuple = ((2, 4), (5, 6))

    # tests/test_extreme_inputs.py. Settings that are left out there, with the reason in a comment;
    # settings that may differ from float64 by more than 2e-5;
    # nan(z1, z2, **settings): whether the loss must be NaN, which stops a run;
    # kink(terms, **settings): whether the loss of these terms has no gradient to compare.
    not_extreme: tuple = ()
    rounding: dict[str, float] = field(default_factory=dict)
    nan: Callable = never
    kink: Callable = never

    # tests/test_flags.py. Flags each of which changes a run of two epochs: all of the method's
    # flags, and all values of those with choices. Flags that are refused, with words of the
    # message: the bounds of all numbers. (Wrong choices and words are tried without an entry.)
    changes: tuple = ()
    refused: dict[str, str] = field(default_factory=dict)

    # Whether the model has a momentum teacher, and tensors of its state that training changes
    # beside the head's.
    teacher: bool = False
    trained: tuple = ()

    # tests/test_collapse.py. Flags that take the mechanism away, with the collapse that follows on
    # points in the plane: "representation", "dimensional" or "cluster". `alive` holds flags of all
    # these runs, and of `seeds` most must agree. `batch_norm` says which batch norms the head
    # keeps, because they prevent some collapses by themselves: "all", "none", "hidden" (all but a
    # last one without weights), "output" (only that one).
    collapses: dict[str, str] = field(default_factory=dict)
    alive: str = ""
    seeds: tuple = (0,)
    batch_norm: str = "all"

    def loss(self, module, setting, *rows):
        """The loss terms of these rows by the script `module`, in the setting of this name."""
        settings = dict(self.settings[setting])
        function = getattr(module, settings.pop("function", "loss_fn"))
        return self.call(function, *rows, **settings)

    def slow_loss(self, setting, *rows):
        settings = dict(self.settings[setting])
        settings.pop("function", None)
        return self.call(self.slow, *rows, **settings)


def mean_cosine(a, b):
    total = 0
    for i in range(len(a)):
        total = total + (a[i] @ b[i]) / (a[i].norm() * b[i].norm())
    return total / len(a)


# --- Barlow Twins


def slow_barlow_twins(z1, z2, *, lambda_offdiag=0.0051):
    """Eqs. 1 and 2 entry by entry. Embeddings are standardised with batch norm's eps of 1e-5."""
    n, d = z1.shape

    def standardised(z, i):
        return (z[:, i] - z[:, i].mean()) / (z[:, i].var(correction=0) + 1e-5).sqrt()

    invariance, redundancy = 0, 0
    for i in range(d):
        for j in range(d):
            c = standardised(z1, i) @ standardised(z2, j) / n
            if i == j:
                invariance = invariance + (1 - c) ** 2
            else:
                redundancy = redundancy + c**2
    loss = invariance + lambda_offdiag * redundancy
    return {"loss": loss, "invariance": invariance, "redundancy": redundancy}


CASES["barlow_twins"] = Case(
    slow=slow_barlow_twins,
    settings={
        "default": {},
        "lambda 0": {"lambda_offdiag": 0.0},
        "lambda 1": {"lambda_offdiag": 1.0},
    },
    changes=("--lambda-offdiag 0", "--lambda-offdiag 1"),
    refused={"--lambda-offdiag -1": "--lambda-offdiag: must be at least 0, not -1"},
    # At lambda 0 it lives on the points: tests/test_collapse.py has more.
)


# --- BYOL


def slow_byol(p1, p2, t1, t2):
    """The squared distance of the normalised vectors, both directions added."""
    terms = {}
    for name, p, t in (("loss12", p1, t2.detach()), ("loss21", p2, t1.detach())):
        total = 0
        for i in range(len(p)):
            total = total + (p[i] / p[i].norm() - t[i] / t[i].norm()).square().sum()
        terms[name] = total / len(p)
    return {"loss": terms["loss12"] + terms["loss21"], **terms}


CASES["byol"] = Case(
    slow=slow_byol,
    rows=lambda z1, z2: (z1, z2, z1, z2),
    changes=("--momentum 0", "--momentum 1", "--no-predictor", "--last-layer batchnorm"),
    refused={
        "--momentum -0.1": "--momentum: must be between 0 and 1, not -0.1",
        "--momentum 1.1": "--momentum: must be between 0 and 1, not 1.1",
    },
    teacher=True,
    collapses={"--no-predictor --momentum 0": "representation"},
)


# --- center vector


def slow_center_vector(z1, z2, *, center_weight=1.0, penalty="squared"):
    """The squared norm of the mean is the mean inner product of all pairs."""
    u1 = [row / row.norm() for row in z1]
    u2 = [row / row.norm() for row in z2]
    invariance = -mean_cosine(z1, z2)
    center = 0
    for a in u1 + u2:
        for b in u1 + u2:
            center = center + a @ b / (2 * len(z1)) ** 2
    if penalty == "norm":
        center = center.sqrt()
    loss = (invariance + center_weight * center) / 2
    return {"loss": loss, "invariance": invariance, "center": center}


def center_vector_kink(terms, penalty="squared", **_):
    """The norm of 0 has no gradient."""
    return penalty == "norm" and terms["center"] < 1e-6


CASES["center_vector"] = Case(
    slow=slow_center_vector,
    settings={"default": {}, "norm": {"penalty": "norm"}, "weight 0.7": {"center_weight": 0.7}},
    kink=center_vector_kink,
    changes=("--center-weight 0", "--center-weight 3", "--penalty norm"),
    refused={"--center-weight -1": "--center-weight: must be at least 0, not -1"},
    collapses={"--center-weight 0": "representation"},
    batch_norm="none",
)


# --- CPLearn


def slow_cplearn(s1, s2, *, tau, beta=0.2, prior="reverse-kl", **_):
    """Eq. 2 (cross-entropy) or Appendix N (reverse KL) image by image and code by code."""
    n, c = s1.shape
    log_p = []
    for s in (s1, s2):
        log_p.append([s[i] / tau - (s[i] / tau).logsumexp(0) for i in range(n)])
    invariance, matching = 0, 0
    for view in range(2):
        for i in range(n):
            invariance = invariance - log_p[view][i].exp() @ log_p[1 - view][i] / (2 * n)
        mean = sum(log_p[view][i].exp() for i in range(n)) / n
        for j in range(c):
            if prior == "reverse-kl":
                matching = matching + mean[j] * (c * mean[j]).log() / 2
            else:
                matching = matching - mean[j].log() / c / 2
    return {"loss": beta * invariance + matching, "invariance": invariance, "prior": matching}


def call_cplearn(loss_fn, z1, z2, sharper=1, **settings):
    """With 40 codes and the script's temperature, or one that is `sharper`."""
    f = z1.shape[1]
    rng = torch.Generator().manual_seed(0)
    codes = 2 * torch.randint(2, (f, 40), generator=rng, dtype=torch.int8) - 1
    tau = f / math.log(1 / 1e-8 - 39) / sharper
    if loss_fn.__name__ == "loss_in_blocks":
        return loss_fn(z1, z2, codes, product, 40, tau=tau, **settings)
    return loss_fn(product(z1, codes), product(z2, codes), tau=tau, **settings)


def product(z, codes, first=0, last=None):
    """The scores W^T z of a block of the codes W (f, c), or of all."""
    return z @ codes[:, first:last].to(z)


IN_BLOCKS = {"function": "loss_in_blocks", "block": 16}

CASES["cplearn"] = Case(
    slow=slow_cplearn,
    flags="--c 64",
    codes=64,
    call=call_cplearn,
    settings={
        "default": {},
        "beta 0": {"beta": 0.0},
        "cross-entropy": {"prior": "cross-entropy", "beta": 2.0},
        "sharp": {"sharper": 16},  # as with --activation tanh-unscaled
        "in blocks": IN_BLOCKS,
        "in blocks, cross-entropy": IN_BLOCKS | {"prior": "cross-entropy", "beta": 2.0},
        "in blocks, sharp": IN_BLOCKS | {"sharper": 16},
    },
    inputs="sphere",
    # Scores of codes are up to L = 18, or 295 if sharp. So they are off by up to L u, and p with
    # them, and in the gradient log p, as large as L, multiplies this: L^2 u = 2e-5 or 5e-3.
    # log_softmax, which needs all codes at once, is better. (u = 6e-8 is float32's rounding.)
    rounding={"sharp": 6e-5, "in blocks": 6e-5, "in blocks, sharp": 1.5e-2},
    changes=(
        "--c 2",
        "--c 32",
        "--beta 0",
        "--beta 2",
        "--activation tanh",
        "--activation tanh-unscaled",
        "--prior cross-entropy",
        "--codes hadamard",
        "--codes fresh",
        "--no-batchnorm",
        "--sharpness 1",
        "--sharpness 20",
    ),
    refused={
        "--c 1": "--c: must be between 2 and 67108864, not 1",
        "--c 100000000": "--c: must be between 2 and 67108864, not 100000000",
        "--beta -1": "--beta: must be at least 0, not -1",
        "--sharpness 0": "--sharpness: must be between 0.001 and 100, not 0",
        "--codes hadamard --c 48": "a power of two as --c, larger than --projector-dim, not 48 and",
        "--codes fresh --projector-dim 64": "--codes fresh needs a power of two as --c, larger",
    },
    collapses={"--beta 10": "representation"},
    alive="--c 64",
    batch_norm="none",
)


# --- DINO


def slow_dino(s1, s2, t1, t2, center, *, teacher_temperature=0.04, temperature=0.1):
    n, k = s1.shape
    loss, entropy = 0, 0
    for t, s in ((t1, s2), (t2, s1)):
        for i in range(n):
            q = ((t[i] - center) / teacher_temperature).softmax(0).detach()
            log_p = s[i] / temperature - (s[i] / temperature).logsumexp(0)
            for j in range(k):
                loss = loss - q[j] * log_p[j] / (2 * n)
                if q[j] > 0:
                    entropy = entropy - q[j] * q[j].log() / (2 * n)
    return {"loss": loss, "entropy": entropy, "divergence": (loss - entropy).detach()}


def call_dino(loss_fn, s1, s2, t1, t2, **settings):
    return loss_fn(s1, s2, t1, t2, t1.detach().mean(0), **settings)


CASES["dino"] = Case(
    slow=slow_dino,
    flags="--prototypes 32",
    codes=32,
    rows=lambda s1, s2: (s1, s2, s1, s2),
    call=call_dino,
    settings={
        "default": {},
        "0.02": {"teacher_temperature": 0.02},
        "0.001": {"teacher_temperature": 0.001},
        "student 0.3": {"temperature": 0.3},
    },
    inputs="cosines",
    rounding={"0.001": 2e-4},  # cosines are divided by it: 1000 times float32's rounding is 6e-5
    changes=(
        "--prototypes 2",
        "--momentum 0",
        "--momentum 1",
        "--teacher-temperature 0.001",
        "--teacher-temperature 1",
        "--no-centering",
    ),
    refused={
        "--prototypes 1": "--prototypes: must be at least 2, not 1",
        "--momentum -1": "--momentum: must be between 0 and 1, not -1",
        "--teacher-temperature 0": "--teacher-temperature: must be at least 0.001, not 0",
    },
    teacher=True,
    trained=("center", "teacher_prototypes.weight"),
    collapses={"--no-centering": "cluster"},
    alive="--prototypes 8",
    seeds=(0, 1, 2),
)


# --- GEDI


def slow_gedi(
    s1, s2, log_real=None, log_fake=None, *, prior_weight=1.0, beta=0.05, generative_weight=0.0
):
    """By probabilities, class by class and image by image."""
    n, c = s1.shape
    p1 = [row.exp() / row.exp().sum() for row in s1]
    p2 = [row.exp() / row.exp().sum() for row in s2]
    prior, invariance, generative = 0, 0, torch.zeros_like(s1[0, 0])
    for p in (p1, p2):
        for j in range(c):
            prior = prior - (sum(p)[j] / n).log() / c / 2
    for i in range(n):
        invariance = invariance - (p1[i] @ p2[i].log() + p2[i] @ p1[i].log()) / (2 * n)
        if generative_weight:
            generative = generative + (log_fake[i] - log_real[i]) / n
    loss = prior_weight * prior + beta * invariance + generative_weight * generative
    return {"loss": loss, "prior": prior, "invariance": invariance, "generative": generative}


def gedi_rows(s1, s2):
    """Scores up to 10, and log densities of images and of samples."""
    s1, s2 = 10 * s1, 10 * s2
    return s1, s2, s1.logsumexp(1), s2.logsumexp(1)


CASES["gedi"] = Case(
    slow=slow_gedi,
    flags="--c 16",
    codes=16,
    state_flags="--generative-weight 0.1",
    rows=gedi_rows,
    settings={
        "default": {},
        "with densities": {"beta": 0.1, "generative_weight": 1.0},
        "other weights": {"prior_weight": 0.5, "beta": 2.0, "generative_weight": 0.1},
    },
    inputs="cosines",
    changes=("--c 2", "--beta 0", "--prior-weight 0", "--generative-weight 0.1"),
    refused={
        "--c 1": "--c: must be at least 2, not 1",
        "--beta -1": "--beta: must be at least 0, not -1",
        "--prior-weight -1": "--prior-weight: must be at least 0, not -1",
        "--generative-weight -1": "--generative-weight: must be at least 0, not -1",
    },
    trained=("samples",),
    collapses={"--prior-weight 0": "cluster"},
)


# --- LeJEPA


def slow_lejepa(z1, z2, directions, *, sigreg_weight=0.02):
    """Image by image, direction by direction and knot by knot, with complex numbers."""
    n, d = z1.shape
    invariance = 0
    for i in range(n):
        for j in range(d):
            mean = (z1[i, j] + z2[i, j]) / 2
            for z in (z1, z2):
                invariance = invariance + (z[i, j] - mean) ** 2 / (2 * n * d)
    sigreg = 0
    step = 3 / 16
    for z in (z1, z2):
        for a in directions.T.to(z):
            for knot in range(-16, 17):
                t = knot * step
                phi = sum(torch.exp(1j * t * (z[i] @ a)) for i in range(n)) / n
                normal = math.exp(-(t**2) / 2)
                width = step / 2 if abs(knot) == 16 else step
                distance = (phi - normal).abs() ** 2
                sigreg = sigreg + n * width * normal * distance / (2 * directions.shape[1])
    loss = (1 - sigreg_weight) * invariance + sigreg_weight * sigreg
    return {"loss": loss, "invariance": invariance, "sigreg": sigreg}


def call_lejepa(loss_fn, z1, z2, **settings):
    """With five directions."""
    draw = torch.Generator().manual_seed(0)
    directions = torch.randn(z1.shape[1], 5, generator=draw, dtype=torch.float64)
    directions = directions / directions.norm(dim=0)
    return loss_fn(z1, z2, directions.to(z1), **settings)


CASES["lejepa"] = Case(
    slow=slow_lejepa,
    flags="--embedding-dim 8 --directions 32",
    call=call_lejepa,
    settings={
        "default": {},
        "invariance alone": {"sigreg_weight": 0.0},
        "SIGReg alone": {"sigreg_weight": 1.0},
    },
    # Angles t x of x as large as 3e4 are off by 3 |x| u = 5e-3, and their cosines with them.
    rounding={"SIGReg alone": 5e-3},
    changes=("--sigreg-weight 0", "--sigreg-weight 0.5", "--directions 1", "--embedding-dim 4"),
    refused={
        "--sigreg-weight -1": "--sigreg-weight: must be between 0 and 1, not -1",
        "--sigreg-weight 2": "--sigreg-weight: must be between 0 and 1, not 2",
        "--directions 0": "--directions: must be at least 1, not 0",
        "--embedding-dim 1": "--embedding-dim: must be at least 2, not 1",
    },
    collapses={"--sigreg-weight 0": "representation"},
)


# --- MCR²


def slow_mcr2(z1, z2, *, epsilon=16.0, expansion_weight=1.0):
    """Coding rates with (d, d) matrices, of the batch and image by image."""
    n, d = z1.shape
    u1 = [row / row.norm() for row in z1]
    u2 = [row / row.norm() for row in z2]
    identity = torch.eye(d).to(z1)
    everything = torch.stack(u1 + u2)
    expansion = torch.logdet(identity + d / (2 * n * epsilon**2) * everything.T @ everything) / 2
    compression = 0
    for i in range(n):
        image = torch.stack([u1[i], u2[i]])
        rate = torch.logdet(identity + d / (2 * epsilon**2) * image.T @ image) / 2
        compression = compression + rate / n
    loss = compression - expansion_weight * expansion
    return {"loss": loss, "expansion": expansion, "compression": compression}


CASES["mcr2"] = Case(
    slow=slow_mcr2,
    settings={
        "default": {},
        "epsilon 0.1": {"epsilon": 0.1},
        "weight 0": {"epsilon": 0.7, "expansion_weight": 0.0},
    },
    sizes=((2, 4), (6, 5), (3, 9)),
    changes=("--epsilon 0.001", "--epsilon 2", "--expansion-weight 0"),
    refused={
        "--epsilon 0": "--epsilon: must be at least 0.001, not 0",
        "--expansion-weight -1": "--expansion-weight: must be at least 0, not -1",
    },
    collapses={"--expansion-weight 0": "representation"},
    batch_norm="none",
)


# --- Self-Classifier


def slow_self_classifier(
    s1, s2, sizes, *, column_softmax=True, row_temperature=0.1, column_temperature=0.05
):
    """By probabilities, classifier by classifier, image by image and class by class."""

    def one_way(target, prediction):
        n, k = target.shape
        share = (target / column_temperature).exp()
        p = (prediction / row_temperature).exp()
        p = p / p.sum(1, keepdim=True)
        if column_softmax:
            share = share / share.sum(0)  # p(x_i | y)
            p = n / k * p / p.sum(0)
        total = 0
        for i in range(n):
            for y in range(k):
                total = total - share[i, y] / share[i].sum() * p[i, y].log() / n
        return total

    loss12, loss21 = 0, 0
    for a, b in zip(s1.split(sizes, 1), s2.split(sizes, 1), strict=True):
        loss12 = loss12 + one_way(a, b) / len(sizes)
        loss21 = loss21 + one_way(b, a) / len(sizes)
    return {"loss": (loss12 + loss21) / 2, "loss12": loss12, "loss21": loss21}


def call_self_classifier(loss_fn, s1, s2, **settings):
    """With two classifiers."""
    k = s1.shape[1]
    return loss_fn(s1, s2, [k // 2, k - k // 2], **settings)


CASES["self_classifier"] = Case(
    slow=slow_self_classifier,
    flags="--classes 16 --classifiers 2",
    codes=16,
    call=call_self_classifier,
    settings={
        "default": {},
        "no column softmax": {"column_softmax": False},
        "other temperatures": {"row_temperature": 0.3, "column_temperature": 0.1},
    },
    inputs="cosines",
    sizes=((2, 4), (5, 7)),
    changes=("--classes 2", "--classifiers 1", "--classifiers 3", "--no-column-softmax"),
    refused={
        "--classes 1": "--classes: must be at least 2, not 1",
        "--classifiers 0": "--classifiers: must be between 1 and 8, not 0",
        "--classifiers 9": "--classifiers: must be between 1 and 8, not 9",
    },
    trained=("gain",),
    collapses={"--no-column-softmax": "cluster"},
)


# --- SimCLR


def slow_simclr(z1, z2, *, temperature=0.5, negatives=True):
    """Eq. 1 anchor by anchor. Without negatives the numerator is left."""
    z = torch.cat([z1, z2])
    n = len(z1)
    alignment, uniformity = 0, 0
    for i in range(2 * n):
        cosines = [z[i] @ z[k] / (z[i].norm() * z[k].norm()) / temperature for k in range(2 * n)]
        alignment = alignment - cosines[(i + n) % (2 * n)] / (2 * n)
        if negatives:
            others = torch.stack([cosines[k] for k in range(2 * n) if k != i])
            uniformity = uniformity + others.logsumexp(0) / (2 * n)
    return {"loss": alignment + uniformity, "alignment": alignment, "uniformity": uniformity}


CASES["simclr"] = Case(
    slow=slow_simclr,
    settings={
        "default": {},
        "0.05": {"temperature": 0.05},
        "0.001": {"temperature": 0.001},
        "no negatives": {"negatives": False},
    },
    rounding={"0.001": 2e-4},  # cosines are divided by it: 1000 times float32's rounding is 6e-5
    changes=("--temperature 0.001", "--temperature 2", "--no-negatives"),
    refused={"--temperature 0": "--temperature: must be at least 0.001, not 0"},
    collapses={"--no-negatives": "representation"},
    batch_norm="none",
)


# --- SimSiam


def slow_simsiam(p1, p2, z1, z2, *, stop_gradient=True):
    if stop_gradient:
        z1, z2 = z1.detach(), z2.detach()
    loss12, loss21 = -mean_cosine(p1, z2), -mean_cosine(p2, z1)
    return {"loss": (loss12 + loss21) / 2, "loss12": loss12, "loss21": loss21}


CASES["simsiam"] = Case(
    slow=slow_simsiam,
    rows=lambda z1, z2: (z1, z2, z1, z2),
    settings={"default": {}, "no stop-gradient": {"stop_gradient": False}},
    changes=("--no-predictor", "--no-stop-gradient"),
    collapses={"--no-predictor": "representation", "--no-stop-gradient": "representation"},
    batch_norm="hidden",
)


# --- SwAV


def slow_swav(s1, s2, queue1=None, queue2=None, *, iterations=3, epsilon=0.05, temperature=0.1):
    """The published pseudocode, with logarithms because cosines / 0.001 have no exponentials."""

    def assignments(s, queue):
        log_q = [row.detach() / epsilon for row in s]
        if queue is not None:
            log_q += [row.detach() / epsilon for row in queue]
        for _ in range(iterations):
            columns = torch.stack(log_q).logsumexp(0)
            log_q = [row - columns for row in log_q]
            log_q = [row - row.logsumexp(0) for row in log_q]
        return [(row - row.logsumexp(0)).exp() for row in log_q[: len(s)]]

    def cross_entropy(q, s):
        total = 0
        for i in range(len(s)):
            log_p = s[i] / temperature - (s[i] / temperature).logsumexp(0)
            total = total - q[i] @ log_p / len(s)
        return total

    loss12 = cross_entropy(assignments(s1, queue1), s2)
    loss21 = cross_entropy(assignments(s2, queue2), s1)
    return {"loss": (loss12 + loss21) / 2, "loss12": loss12, "loss21": loss21}


def call_swav(loss_fn, s1, s2, queue=None, **settings):
    if queue:
        return loss_fn(s1, s2, s2[:queue].detach(), s1[:queue].detach(), **settings)
    return loss_fn(s1, s2, **settings)


CASES["swav"] = Case(
    slow=slow_swav,
    flags="--prototypes 32",
    codes=32,
    state_flags="--queue 256",
    call=call_swav,
    settings={
        "default": {},
        "queue": {"queue": 2},
        "softmax": {"iterations": 0},
        "two iterations": {"iterations": 2, "temperature": 0.2},
        "0.02": {"epsilon": 0.02},
        "0.001": {"epsilon": 0.001},
    },
    inputs="cosines",
    rounding={"0.001": 2e-4},  # cosines are divided by it: 1000 times float32's rounding is 6e-5
    changes=(
        "--prototypes 2",
        "--epsilon 0.001",
        "--epsilon 1",
        "--queue 1",
        "--queue 256",
        "--no-sinkhorn",
        "--freeze-prototypes",
    ),
    refused={
        "--prototypes 1": "--prototypes: must be at least 2, not 1",
        "--epsilon 0": "--epsilon: must be at least 0.001, not 0",
        "--queue -1": "--queue: must be at least 0, not -1",
    },
    trained=("queue", "prototypes.weight"),
    collapses={"--no-sinkhorn": "representation"},
    alive="--prototypes 32 --queue 0",
    batch_norm="none",
)


# --- triplet


def slow_triplet(z1, z2, *, margin=1.0, negatives="all"):
    """Eq. 5 anchor by anchor, negative by negative, with squared distances."""
    z = [row / row.norm() for row in (*z1, *z2)]
    n = len(z1)
    total, count = 0, 0
    for a in range(2 * n):
        near = (z[a] - z[(a + n) % (2 * n)]).square().sum()
        far = [(z[a] - z[k]).square().sum() for k in range(2 * n) if k % n != a % n]
        if negatives == "hardest":
            far = [min(far)]
        if negatives == "none":
            far = [0.0]  # as if each anchor were its own negative
        for distance in far:
            total = total + ((near - distance + margin) / 2).clamp_min(0)
            count = count + 1
    return {"loss": total / count, "positive": mean_cosine(z1, z2)}


CASES["triplet"] = Case(
    slow=slow_triplet,
    settings={
        "default": {},
        "margin 0": {"margin": 0.0},
        "margin 4": {"margin": 4.0},  # the maximum is never 0
        "hardest": {"margin": 0.7, "negatives": "hardest"},
        "no negatives": {"negatives": "none"},
    },
    # Of images that are alike float32 and float64 take different ones as the hardest, and at margin
    # 0 they are at the hinge.
    not_extreme=("hardest", "margin 0"),
    changes=("--margin 0", "--margin 4", "--negatives hardest", "--negatives none"),
    refused={"--margin -1": "--margin: must be at least 0, not -1"},
    collapses={"--negatives none": "representation"},
    batch_norm="none",
)


# --- VICReg


def slow_vicreg(
    z1,
    z2,
    *,
    invariance_weight=25.0,
    variance_weight=25.0,
    covariance_weight=1.0,
    sum_variance=False,
):
    """Eq. 6 entry by entry."""
    n, d = z1.shape
    invariance, variance, covariance = 0, 0, 0
    for i in range(n):
        for j in range(d):
            invariance = invariance + (z1[i, j] - z2[i, j]) ** 2 / (n * d)
    for z in (z1, z2):
        mean = [sum(z[i, j] for i in range(n)) / n for j in range(d)]
        for a in range(d):
            for b in range(d):
                c = sum((z[i, a] - mean[a]) * (z[i, b] - mean[b]) for i in range(n)) / (n - 1)
                if a == b:
                    variance = variance + (1 - (c + 1e-4).sqrt()).clamp_min(0) / d
                else:
                    covariance = covariance + c**2 / d
    if not sum_variance:
        variance = variance / 2
    loss = invariance_weight * invariance + variance_weight * variance
    loss = loss + covariance_weight * covariance
    return {"loss": loss, "invariance": invariance, "variance": variance, "covariance": covariance}


CASES["vicreg"] = Case(
    slow=slow_vicreg,
    settings={
        "default": {},
        "sum": {"sum_variance": True},
        "weights": {"invariance_weight": 0.5, "variance_weight": 2.0, "covariance_weight": 3.0},
    },
    changes=(
        "--invariance-weight 0",
        "--variance-weight 0",
        "--covariance-weight 0",
        "--covariance-weight 9",
        "--sum-variance",
    ),
    refused={
        "--invariance-weight -1": "--invariance-weight: must be at least 0, not -1",
        "--variance-weight -1": "--variance-weight: must be at least 0, not -1",
        "--covariance-weight -1": "--covariance-weight: must be at least 0, not -1",
    },
    collapses={"--variance-weight 0": "representation", "--covariance-weight 0": "dimensional"},
    batch_norm="none",
)


# --- W-MSE


def slow_wmse(z1, z2, *, part_size, whitening="cholesky", distance="euclidean"):
    """Eq. 3 part by part: each view whitened by the inverse of its own Cholesky factor."""
    part_size = min(part_size, len(z1))
    starts = range(0, len(z1) - part_size + 1, part_size)  # what is left over is in no part

    def white(z):
        if whitening == "none":
            return z
        z = z - z.mean(0)
        if whitening == "batchnorm":
            return z / (z.var(0) + 1e-5).sqrt()
        lower = torch.linalg.cholesky(z.T @ z / (len(z) - 1))
        return (torch.linalg.inv(lower) @ z.T).T

    loss, cosine = 0, 0
    for start in starts:
        w1 = white(z1[start : start + part_size])
        w2 = white(z2[start : start + part_size])
        cosine = cosine + mean_cosine(w1, w2) / len(starts)
        loss = loss + (w1 - w2).square().mean() / len(starts)
    if distance == "cosine":
        loss = 2 - 2 * cosine
    return {"loss": loss, "cosine": cosine}


def wmse_nan(z1, z2, whitening="cholesky", **_):
    """Where the rows of a part, up to float32's rounding, fill fewer dimensions than they have."""
    for z in (z1, z2):
        z = z[:32].double()
        if torch.linalg.matrix_rank(z - z.mean(0), rtol=1e-6) < z.shape[1]:
            return whitening == "cholesky"
    return False


CASES["wmse"] = Case(
    slow=slow_wmse,
    flags="--embedding-dim 8 --part-size 32",
    settings={
        "default": {"part_size": 32},
        "cosine": {"part_size": 32, "distance": "cosine"},
        "batchnorm": {"part_size": 32, "whitening": "batchnorm"},
        "none": {"part_size": 32, "whitening": "none"},
    },
    sizes=((6, 2), (12, 4), (70, 4)),
    nan=wmse_nan,
    changes=(
        "--distance cosine",
        "--whitening batchnorm",
        "--whitening none",
        "--embedding-dim 1",
        "--part-size 16",
        "--part-size 4 --embedding-dim 2",
    ),
    refused={
        "--embedding-dim 0": "--embedding-dim: must be at least 1, not 0",
        "--part-size 1": "--part-size: must be at least 2, not 1",
        "--embedding-dim 64": "--embedding-dim 64 needs a --part-size and a --batch-size of twice",
    },
    collapses={"--whitening none": "representation"},
)
