"""No loss returns NaN or a wrong gradient for finite float32 inputs, however extreme.

Right is what the same function makes of the same numbers in float64, which test_losses.py compares with slow loops.
Errors are shares of the largest entry of an image's gradient and of the largest that 16 random images have: where terms
cancel, as in a minimum, the rounding of the terms remains.
"""

import math

import pytest
import torch
from conftest import METHODS, TINY
from torch.nn.functional import normalize

F64 = torch.float64
SIZES = ((16, 8), (64, 4), (50, 8), (2, 4))  # images n, dimensions d; two images are the smallest batch
SCALES = (1e-4, 1.0, 1e4)
PROTOTYPES, CODES = 6, 40


def batches(n, d, scale):
    """Two views' embeddings (n, d), by what is extreme about them."""
    rng = torch.Generator().manual_seed(n)
    z1, z2 = (scale * torch.randn(n, d, generator=rng) for _ in range(2))
    i = torch.arange(n)
    twice, first_two, but_first = i % (n // 2), i.masked_fill(i == 1, 0), (i > 0).float().unsqueeze(1)
    sign = torch.where(i < n // 2, 1.0, -1.0).unsqueeze(1)
    column = torch.arange(d) == 0
    return {
        "random": (z1, z2),
        "identical views": (z1, z1.clone()),
        "all images alike": (z1[0 * i], z2[0 * i]),
        "all views alike": (z1[0 * i], z1[0 * i]),
        "each image twice": (z1[twice], z2[twice]),
        "two images alike": (z1[first_two], z2[first_two]),
        "a zero row": (but_first * z1, z2),
        "a zero row in both views": (but_first * z1, but_first * z2),
        "zeros": (0 * z1, 0 * z2),
        "opposites": (sign * z1[twice], sign * z1[twice]),  # their mean is 0
        "a constant column": (torch.where(column, z1[0], z1), torch.where(column, z2[0], z2)),
        "a column twice": (torch.where(column, z1[:, 1:2], z1), torch.where(column, z2[:, 1:2], z2)),
        "few dimensions": tuple(z[:, : d // 2] @ torch.randn(d // 2, d, generator=rng) for z in (z1, z2)),
    }


KINDS = list(batches(4, 2, 1.0))


def pair(method, **settings):
    return lambda m, z1, z2: m[method].loss_fn(z1, z2, **settings)


def predictions(method, **settings):
    return lambda m, z1, z2: m[method].loss_fn(z1, z2, z1, z2, **settings)


def swav(earlier=0, **settings):
    return lambda m, s1, s2: m["swav"].loss_fn(s1, s2, s2[:earlier], s1[:earlier], **settings)


def dino(**settings):
    return lambda m, s1, s2: m["dino"].loss_fn(s1, s2, s1, s2, s1.detach().mean(0), **settings)


def cplearn(function, sharper=1, **settings):
    """With the script's temperature, or the `sharper` one of --activation tanh-unscaled."""

    def loss(m, z1, z2):
        tau = z1.shape[1] / math.log((1 - 1e-8 * (CODES - 1)) / 1e-8) / sharper
        return getattr(m["cplearn"], function)(z1, z2, codes(m, z1.shape[1]), tau=tau, **settings)

    return loss


def codes(m, f):
    return m["cplearn"].draw_codes("rademacher", f, CODES, 0)


# Losses of embeddings, which may have any size.
UNBOUNDED = {
    "barlow_twins": pair("barlow_twins"),
    "center_vector": pair("center_vector"),
    "center_vector norm": pair("center_vector", penalty="norm"),
    "mcr2": pair("mcr2"),
    "mcr2 0.1": pair("mcr2", epsilon=0.1),
    "triplet": pair("triplet"),
    "simclr": pair("simclr"),
    "simclr 0.05": pair("simclr", temperature=0.05),
    "simclr 0.001": pair("simclr", temperature=0.001),
    "vicreg": pair("vicreg"),
    "vicreg sum": pair("vicreg", sum_variance=True),
    "wmse": pair("wmse", part_size=32),
    "wmse cosine": pair("wmse", part_size=32, distance="cosine"),
    "wmse batchnorm": pair("wmse", part_size=32, whitening="batchnorm"),
    "wmse none": pair("wmse", part_size=32, whitening="none"),
    "byol": predictions("byol"),
    "simsiam": predictions("simsiam"),
    "simsiam both": predictions("simsiam", stop_gradient=False),
}
# Losses of cosines in [-1, 1], and of embeddings of norm sqrt(f), as their scripts make them.
COSINES = {
    "self_classifier": lambda m, s1, s2: m["self_classifier"].loss_fn(s1, s2, [s1.shape[1]]),
    "gedi": lambda m, s1, s2: m["gedi"].loss_fn(10 * s1, 10 * s2),
    "gedi with densities": lambda m, s1, s2: m["gedi"].loss_fn(
        10 * s1, 10 * s2, (10 * s1).logsumexp(1), (10 * s2).logsumexp(1), weights=(1.0, 0.1, 1.0)
    ),
    "swav": swav(),
    "swav queue": swav(earlier=2),
    "swav softmax": swav(iterations=0),
    "swav 0.02": swav(epsilon=0.02),
    "swav 0.001": swav(epsilon=0.001),
    "dino": dino(),
    "dino 0.02": dino(teacher_temperature=0.02),
    "dino 0.001": dino(teacher_temperature=0.001),
}
SPHERE = {
    "cplearn": cplearn("loss_fn"),
    "cplearn cross-entropy": cplearn("loss_fn", prior="cross-entropy"),
    "cplearn sharp": cplearn("loss_fn", sharper=16),
    "cplearn in blocks": cplearn("loss_in_blocks", block=16),
    "cplearn in blocks, cross-entropy": cplearn("loss_in_blocks", block=16, prior="cross-entropy"),
    "cplearn in blocks, sharp": cplearn("loss_in_blocks", sharper=16, block=16),
}
LOSSES = UNBOUNDED | COSINES | SPHERE

# float32 rounds by up to u = 6e-8. Cosines, divided by temperatures down to 0.02, are off by 50 u = 3e-6.
USUALLY_ALLOWED = 2e-5
ALLOWED = {name: 2e-4 for name in LOSSES if name.endswith("0.001")}  # the smallest that flags take: 1000 u = 6e-5
# Scores of codes are up to L = 18, or 295 if sharp. So they are off by up to L u, and p with them, and in the gradient
# log p, as large as L, multiplies this: L² u = 2e-5, 5e-3. log_softmax, which needs all codes at once, is better.
ALLOWED |= {"cplearn in blocks": 6e-5, "cplearn in blocks, sharp": 1.5e-2, "cplearn sharp": 6e-5}


def test_every_loss_is_here():
    assert {name.split()[0] for name in LOSSES} == set(METHODS)


def value_and_gradient(loss, methods, inputs, dtype):
    """All terms as one vector, and the gradient (2, n, d) of the loss."""
    inputs = [x.to(dtype).clone().requires_grad_() for x in inputs]
    terms = loss(methods, *inputs)
    gradient = torch.autograd.grad(terms["loss"], inputs)
    return torch.stack(list(terms.values())).detach().to(F64), torch.stack(gradient).to(F64)


def check(name, methods, inputs, random):
    """float32 is finite and agrees with float64, up to rounding in numbers of the size that `random` inputs give."""
    results = [value_and_gradient(LOSSES[name], methods, inputs, dtype) for dtype in (torch.float32, F64)]
    assert all(part.isfinite().all() for result in results for part in result)
    (value, gradient), (exact_value, exact_gradient) = results
    if name == "center_vector norm" and exact_value[2] < 1e-6:
        return  # the norm of 0 has no gradient to agree with
    usual_value, usual_gradient = value_and_gradient(LOSSES[name], methods, random, F64)
    allowed = ALLOWED.get(name, USUALLY_ALLOWED)
    assert ((value - exact_value).abs() <= allowed * (exact_value.abs().max() + usual_value.abs().max())).all()
    largest = exact_gradient.abs().amax(2, keepdim=True) + usual_gradient.abs().max()
    assert ((gradient - exact_gradient).abs() <= allowed * largest).all()


def singular(z):
    """Whether the first 32 rows of z, up to float32's rounding, fill fewer dimensions than they have."""
    z = z[:32].to(F64)
    return torch.linalg.matrix_rank(z - z.mean(0), rtol=1e-6) < z.shape[1]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", UNBOUNDED)
def test_embeddings_of_any_size(name, kind, scale, methods):
    """W-MSE cannot whiten embeddings whose covariance is singular, and its loss is NaN there, as it says."""
    for n, d in SIZES:
        views = batches(n, d, scale)[kind]
        if name in ("wmse", "wmse cosine") and any(singular(z) for z in views):
            assert LOSSES[name](methods, *views)["loss"].isnan(), (n, d)
        else:
            check(name, methods, views, batches(16, d, scale)["random"])


def test_wmse_of_few_dimensions_stops_the_run(run):
    """Five hidden units fill five of eight dimensions. A whitening of the rest would blow up float32's rounding."""
    flags = [*TINY, "--projector-dim", "5", "--embedding-dim", "8", "--part-size", "32", "--epochs", "1"]
    result = run("wmse", *flags)
    assert result.code == 1 and result.err == "wmse: loss is nan in epoch 1\n"


@pytest.mark.parametrize("kind", [*KINDS, "highest", "lowest", "signs", "one each"])
@pytest.mark.parametrize("name", COSINES)
def test_cosines(name, kind, methods):
    for n, d in SIZES:
        rng = torch.Generator().manual_seed(1)
        prototypes = normalize(torch.randn(PROTOTYPES, d, generator=rng), dim=1)
        kinds = {
            k: [(normalize(z, dim=1) @ prototypes.T).clamp(-1, 1) for z in views]
            for k, views in batches(n, d, 1.0).items()
        }
        ones = torch.ones(n, PROTOTYPES)
        signs = [2.0 * torch.randint(2, (n, PROTOTYPES), generator=rng) - 1 for _ in range(2)]
        one_each = 2.0 * (torch.arange(n).unsqueeze(1) % PROTOTYPES == torch.arange(PROTOTYPES)) - 1
        kinds |= {"highest": (ones, ones), "lowest": (-ones, -ones), "signs": signs, "one each": (one_each, -one_each)}
        check(name, methods, kinds[kind], kinds["random"])


@pytest.mark.parametrize("kind", [*KINDS, "a code each", "another code each", "one code", "opposite codes"])
@pytest.mark.parametrize("name", SPHERE)
def test_embeddings_on_a_sphere(name, kind, methods):
    for n, d in SIZES:
        kinds = {k: [math.sqrt(d) * normalize(z, dim=1) for z in views] for k, views in batches(n, d, 1.0).items()}
        each = codes(methods, d).T.float()[torch.arange(n) % CODES]
        kinds |= {"a code each": (each, each), "another code each": (each, each.roll(1, 0))}
        kinds |= {"one code": (each[:1].expand(n, d),) * 2, "opposite codes": (each, -each)}
        check(name, methods, kinds[kind], kinds["random"])
