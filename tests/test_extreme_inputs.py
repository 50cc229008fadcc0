"""No loss returns NaN or a wrong gradient for finite float32 inputs, however extreme.

Right is what the same function makes of the same numbers in float64, which test_losses.py compares
with slow loops. Errors are shares of the largest entry of an image's gradient and of the largest
that 16 random images have: where terms cancel, as in a minimum, the rounding of the terms remains.
"""

import math

import pytest
import torch
from cases import CASES
from conftest import METHODS, TINY
from torch.nn.functional import normalize

F64 = torch.float64
SIZES = ((16, 8), (64, 4), (50, 8), (2, 4))  # images n, dimensions d; 2 images are the fewest
SCALES = {"any size": (1e-4, 1.0, 1e4), "cosines": (1.0,), "sphere": (1.0,)}
PROTOTYPES = 6
# float32 rounds by up to u = 6e-8. Cosines, divided by temperatures down to 0.02, are off by 50 u,
# which is 3e-6. `rounding` in tests/cases.py has more, with the reasons.
USUALLY_ALLOWED = 2e-5
LOSSES = [
    (name, setting)
    for name in METHODS
    for setting in CASES[name].settings
    if setting not in CASES[name].not_extreme
]


def batches(n, d, scale):
    """Two views' embeddings (n, d), by what is extreme about them."""
    rng = torch.Generator().manual_seed(n)
    z1, z2 = (scale * torch.randn(n, d, generator=rng) for _ in range(2))
    i = torch.arange(n)
    twice = i % (n // 2)
    first_two = i.masked_fill(i == 1, 0)
    but_first = (i > 0).float().unsqueeze(1)
    sign = torch.where(i < n // 2, 1.0, -1.0).unsqueeze(1)
    first_column = torch.arange(d) == 0
    maps = [torch.randn(d // 2, d, generator=rng) for _ in range(2)]
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
        "a constant column": (
            torch.where(first_column, z1[0], z1),
            torch.where(first_column, z2[0], z2),
        ),
        "a column twice": (
            torch.where(first_column, z1[:, 1:2], z1),
            torch.where(first_column, z2[:, 1:2], z2),
        ),
        "few dimensions": (z1[:, : d // 2] @ maps[0], z2[:, : d // 2] @ maps[1]),
    }


def cosine_batches(n, d):
    """Two views' cosines (n, PROTOTYPES) with random prototypes, and extreme cosines."""
    rng = torch.Generator().manual_seed(1)
    prototypes = normalize(torch.randn(PROTOTYPES, d, generator=rng), dim=1)
    kinds = {}
    for kind, views in batches(n, d, 1.0).items():
        kinds[kind] = [(normalize(z, dim=1) @ prototypes.T).clamp(-1, 1) for z in views]
    ones = torch.ones(n, PROTOTYPES)
    own = torch.arange(n).unsqueeze(1) % PROTOTYPES == torch.arange(PROTOTYPES)
    one_each = 2.0 * own - 1
    signs = [2.0 * torch.randint(2, (n, PROTOTYPES), generator=rng) - 1 for _ in range(2)]
    return kinds | {
        "highest": (ones, ones),
        "lowest": (-ones, -ones),
        "signs": signs,
        "one each": (one_each, one_each),
    }


def sphere_batches(n, d):
    """Two views' embeddings (n, d) of norm sqrt(d), and corners of the hypercube."""
    kinds = {}
    for kind, views in batches(n, d, 1.0).items():
        kinds[kind] = [math.sqrt(d) * normalize(z, dim=1) for z in views]
    rng = torch.Generator().manual_seed(0)
    each = 2.0 * torch.randint(2, (n, d), generator=rng) - 1
    one = each[:1].expand(n, d)
    return kinds | {
        "a corner each": (each, each),
        "another corner each": (each, each.roll(1, 0)),
        "one corner": (one, one),
        "opposite corners": (each, -each),
    }


def inputs(kind_of_inputs, n, d, scale):
    if kind_of_inputs == "cosines":
        return cosine_batches(n, d)
    if kind_of_inputs == "sphere":
        return sphere_batches(n, d)
    return batches(n, d, scale)


def terms_and_gradient(name, setting, methods, views, dtype):
    """All terms as one vector, and the gradient (2, n, d) of the loss, in float64."""
    case = CASES[name]
    views = [view.to(dtype).clone().requires_grad_() for view in views]
    terms = case.loss(methods[name], setting, *case.rows(*views))
    gradient = torch.autograd.grad(terms["loss"], views)
    values = torch.stack([*terms.values()]).detach().double()
    return values, torch.stack(gradient).double(), terms


def check(name, setting, methods, views, random):
    """float32 is finite and agrees with float64, up to rounding in numbers of the size that
    `random` inputs give."""
    case = CASES[name]
    loss = name, setting, methods
    value, gradient, _ = terms_and_gradient(*loss, views, torch.float32)
    exact_value, exact_gradient, terms = terms_and_gradient(*loss, views, F64)
    for part in (value, gradient, exact_value, exact_gradient):
        assert part.isfinite().all()
    usual_value, usual_gradient, _ = terms_and_gradient(*loss, random, F64)
    allowed = case.rounding.get(setting, USUALLY_ALLOWED)
    largest = exact_value.abs().max() + usual_value.abs().max()
    assert ((value - exact_value).abs() <= allowed * largest).all()
    if not case.kink(terms, **case.settings[setting]):
        largest = exact_gradient.abs().amax(2, keepdim=True) + usual_gradient.abs().max()
        assert ((gradient - exact_gradient).abs() <= allowed * largest).all()


@pytest.mark.parametrize("name, setting", LOSSES)
def test_extreme_inputs(name, setting, methods):
    """Or the loss is NaN where its entry says so, which stops the run."""
    case = CASES[name]
    for scale in SCALES[case.inputs]:
        for n, d in SIZES:
            random = inputs(case.inputs, 16, d, scale)["random"]
            for kind, views in inputs(case.inputs, n, d, scale).items():
                try:
                    if case.nan(*views, **case.settings[setting]):
                        loss = case.loss(methods[name], setting, *case.rows(*views))["loss"]
                        assert loss.isnan()
                    else:
                        check(name, setting, methods, views, random)
                except AssertionError as error:
                    error.add_note(f"with {kind}, {n} images, {d} dimensions, scale {scale:g}")
                    raise


def test_wmse_of_few_dimensions_stops_the_run(run):
    """Five hidden units fill five of eight dimensions. A whitening of the rest would blow up
    float32's rounding."""
    flags = [*TINY, "--projector-dim", "5", "--embedding-dim", "8", "--part-size", "32"]
    result = run("wmse", *flags, "--epochs", "1")
    assert result.code == 1 and result.err == "wmse: loss is nan in epoch 1\n"
