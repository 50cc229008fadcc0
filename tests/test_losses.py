"""Every loss against a slow loop written from the paper's equation, in float64, and against closed
forms."""

import inspect
import math
import sys
import types

import numpy as np
import pytest
import scipy.integrate
import scipy.linalg
import torch
from cases import CASES, product, slow_wmse
from conftest import METHODS
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import common

F64 = torch.float64
LOSSES = [(name, setting) for name in METHODS for setting in CASES[name].settings]


def random_views(n, d, seed=0, scale=1.0):
    rng = torch.Generator().manual_seed(seed)
    views = [scale * torch.randn(n, d, generator=rng, dtype=F64) for _ in range(2)]
    return [view.requires_grad_() for view in views]


def random_inputs(case, n, d):
    """Random views of the kind that the loss is given."""
    views = [view.detach() for view in random_views(n, d)]
    if case.inputs == "cosines":
        return [view.tanh() for view in views]
    if case.inputs == "sphere":
        return [math.sqrt(d) * normalize(view, dim=1) for view in views]
    return views


def assert_same_value_and_gradient(loss, expected, inputs, rtol=1e-9):
    torch.testing.assert_close(loss, expected, rtol=rtol, atol=1e-12)
    for x in inputs:
        got, want = (
            torch.autograd.grad(y, x, retain_graph=True, allow_unused=True, materialize_grads=True)
            for y in (loss, expected)
        )
        largest = max(1.0, want[0].abs().max().item())
        torch.testing.assert_close(got, want, rtol=rtol, atol=1e-10 * largest)


# --- all methods


@pytest.mark.parametrize("name, setting", LOSSES)
def test_loss_is_its_equation(name, setting, methods):
    """Value and gradient of all that the loss is given: what it must not move has gradient 0."""
    case = CASES[name]
    scales = (0.01, 1.0, 100.0) if case.inputs == "any size" else (1.0,)
    for n, d in case.sizes:
        z1, z2 = random_inputs(case, n, d)
        for scale in scales:
            for other in (z2, z1):  # two views, and twice the same
                rows = case.rows(scale * z1, scale * other)
                rows = [row.detach().requires_grad_() for row in rows]
                terms = case.loss(methods[name], setting, *rows)
                expected = case.slow_loss(setting, *rows)
                assert_same_value_and_gradient(terms["loss"], expected["loss"], rows, rtol=1e-7)
                for term, value in expected.items():
                    value = torch.as_tensor(value, dtype=F64)
                    torch.testing.assert_close(terms[term], value, rtol=1e-7, atol=1e-12)


def functions_of(module, name="loss_fn"):
    """The names of the function and of those of the module that it calls, directly or not."""
    found, waiting = [], [name]
    while waiting:
        name = waiting.pop()
        found.append(name)
        source = inspect.getsource(getattr(module, name))
        for other, value in vars(module).items():
            ours = isinstance(value, types.FunctionType) and value.__module__ == module.__name__
            if ours and f"{other}(" in source and other not in found + waiting:
                waiting.append(other)
    return found


@pytest.mark.parametrize("name", METHODS)
def test_loss_fn_can_be_pasted(name, methods):
    """loss_fn, with the functions of its script that it calls, runs below "import math, torch" and
    "from torch import nn" alone, and gives the same there."""
    module, case, pasted = methods[name], CASES[name], {}
    source = "import math, torch\nfrom torch import nn\n"
    for function in functions_of(module):
        source += inspect.getsource(getattr(module, function))
    exec(source, pasted)
    rows = case.rows(*random_inputs(case, 12, 8))
    rows = [row.detach().requires_grad_() for row in rows]
    for setting, keywords in case.settings.items():
        if "function" not in keywords:
            expected = case.loss(module, setting, *rows)
            got = case.loss(types.SimpleNamespace(**pasted), setting, *rows)
            assert expected.keys() == got.keys()
            assert all(torch.equal(expected[term], got[term]) for term in got)
            assert got["loss"].requires_grad and all(value.ndim == 0 for value in got.values())


class LossIsCalled(Exception):
    pass


@pytest.mark.parametrize("name", METHODS)
def test_defaults_of_loss_fn_are_those_of_the_flags(name, methods, tmp_path, monkeypatch):
    """Whoever pastes a loss_fn gets what the script uses."""
    parameters = inspect.signature(methods[name].loss_fn).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    used = {}

    def spy(*args, **keywords):
        used.update(keywords)
        raise LossIsCalled

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(methods[name], "loss_fn", spy)
    monkeypatch.setattr(methods[name], "DEFAULTS", {})  # of the data set
    flags = ["--dataset", "blobs", "--epochs", "1", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *flags])
    with pytest.raises(LossIsCalled):
        methods[name].main()
    assert used == {keyword: defaults.get(keyword, used[keyword]) for keyword in used}


# --- Barlow Twins


def test_barlow_twins_of_identical_whitened_views_is_zero(methods):
    z = torch.randn(64, 8, dtype=F64)
    z = torch.linalg.qr(z - z.mean(0))[0]  # columns at right angles, of mean 0
    z = 1e3 * math.sqrt(64) * z  # white, and large beside the batch norm's eps
    terms = methods["barlow_twins"].loss_fn(z, z)
    assert terms["loss"] < 1e-12


def test_barlow_twins_of_a_constant_column_stays_finite(methods):
    z1, z2 = random_views(8, 3)
    z1 = z1.detach().clone()
    z1[:, 0] = 7.0
    z1.requires_grad_()
    terms = methods["barlow_twins"].loss_fn(z1, z2)
    terms["loss"].backward()
    assert terms["loss"].isfinite() and z1.grad.isfinite().all()


# --- CPLearn


def temperature(n, f, c, eps=1e-8):
    return f / (math.sqrt(n) * math.log((1 - eps * (c - 1)) / eps))


def cplearn_loss(methods, function, z1, z2, codes, **settings):
    """The loss by the plain formula or in blocks, of the codes W (f, c)."""
    if function == "loss_fn":
        return methods["cplearn"].loss_fn(product(z1, codes), product(z2, codes), **settings)
    c = codes.shape[1]
    return methods["cplearn"].loss_in_blocks(z1, z2, codes, product, c, **settings)


def sphere(h, n):
    return math.sqrt(h.shape[1] / n) * normalize(h, dim=1)


@pytest.mark.parametrize("function", ["loss_fn", "loss_in_blocks"])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_cplearn_of_aligned_codes_costs_log_c_over_n(methods, dtype, function):
    """n images each on a code of its own among c = 4096: invariance 0 and prior log(c / n), with no
    NaN for the codes that nobody uses, at Eq. 1's norm and at the released code's, sqrt(n) times
    larger."""
    n, f, c = 64, 512, 4096
    codes = methods["cplearn"].draw_codes("rademacher", f, c, 0)
    tau = temperature(n, f, c)
    for norm, within in ((1 / math.sqrt(n), 1e-2), (1.0, 1e-5)):
        h = (codes[:, :n].T.to(dtype) * norm).requires_grad_()
        for prior in ("reverse-kl", "cross-entropy"):
            terms = cplearn_loss(methods, function, h, h, codes, tau=tau, prior=prior)
            (grad,) = torch.autograd.grad(terms["loss"], h)
            assert terms["loss"].isfinite() and grad.isfinite().all()
            assert terms["invariance"].item() == pytest.approx(0, abs=1e-2)
            if prior == "reverse-kl":
                assert terms["prior"].item() == pytest.approx(math.log(c / n), rel=within)


def test_cplearn_three_prices(methods):
    """Balanced hard codes cost log(c/n), the uniform assignment beta log(c), total collapse
    log(c)."""
    n, c, beta = 8, 64, 0.25
    hard = 40.0 * torch.eye(c, dtype=F64)

    def price(s):
        return methods["cplearn"].loss_fn(s, s, tau=1.0, beta=beta)["loss"].item()

    assert price(hard[:n]) == pytest.approx(math.log(c / n))
    assert price(torch.zeros(n, c, dtype=F64)) == pytest.approx(beta * math.log(c))
    assert price(hard[:1].expand(n, c)) == pytest.approx(math.log(c))


@pytest.mark.parametrize("function", ["loss_fn", "loss_in_blocks"])
@pytest.mark.parametrize("prior", ["reverse-kl", "cross-entropy"])
def test_cplearn_in_float32(methods, prior, function):
    """In float32 value and gradient are those of float64."""
    n, f, c = 64, 128, 5000
    h1, h2 = (sphere(z.detach(), n).requires_grad_() for z in random_views(n, f))
    codes = methods["cplearn"].draw_codes("rademacher", f, c, 0)
    singles = [h.detach().float().requires_grad_() for h in (h1, h2)]
    tau, results = temperature(n, f, c), []
    for views in ((h1, h2), singles):
        loss = cplearn_loss(methods, function, *views, codes, tau=tau, prior=prior)["loss"]
        results.append((loss.detach(), *torch.autograd.grad(loss, views)))
    for exact, single in zip(*results, strict=True):
        assert (single - exact).norm() < 3e-5 * exact.norm()


def test_cplearn_blocks_do_not_change_the_loss(methods):
    h1, h2 = random_views(5, 8)
    codes = methods["cplearn"].draw_codes("rademacher", 8, 100, 0)
    loss = methods["cplearn"].loss_in_blocks
    expected = loss(h1, h2, codes, product, 100, tau=0.5, block=1)["loss"]
    for block in (7, 100, 1000):
        value = loss(h1, h2, codes, product, 100, tau=0.5, block=block)["loss"]
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)


def test_cplearn_in_blocks_never_holds_an_n_by_c_matrix(methods):
    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in tree_leaves(out):
                # Views of the int8 dictionary cost nothing.
                if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                    largest = max(largest, tensor.numel())
            return out

    n, f, c = 32, 16, 2**14
    h1, h2 = random_views(n, f)
    for codes in ("rademacher", "hadamard"):
        flags = f"--dataset blobs --projector-dim {f} --c {c} --codes {codes}"
        parser = common.make_parser(
            methods["cplearn"].add_flags, methods["cplearn"].DEFAULTS, "blobs"
        )
        model = methods["cplearn"].Model(parser.parse_args(flags.split()))
        with Largest():
            terms = methods["cplearn"].loss_in_blocks(
                h1, h2, model.codes, model.scores, c, tau=1.0, block=1024
            )
            terms["loss"].backward()
        assert 0 < largest <= 2 * n * 1024


def test_cplearn_codes(methods):
    draw = methods["cplearn"].draw_codes
    w = draw("rademacher", 64, 5000, 0).double()
    assert set(w.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(w, draw("rademacher", 64, 5000, 0).double())
    assert not torch.equal(w, draw("rademacher", 64, 5000, 1).double())
    cosine = w[:, :2000].T @ w[:, :2000] / 64
    off = cosine[~torch.eye(2000, dtype=bool)]
    # Eq. 5: mean 0 and variance 1 / f of the cosine of two codes.
    assert off.mean().abs() < 5e-3 and off.var().item() == pytest.approx(1 / 64, rel=0.02)

    rows, signs = draw("hadamard", 300, 512, 0, 7)
    assert len(rows.unique()) == 300 and rows.min() >= 1 and rows.max() <= 511
    assert set(signs.tolist()) == {-1, 1}
    for other in ((0, 8), (1, 7)):
        assert not torch.equal(draw("hadamard", 300, 512, *other)[0], rows)


@pytest.mark.parametrize("f, c", [(1, 2), (5, 8), (100, 128), (37, 1024), (500, 2048), (8, 2**15)])
def test_cplearn_fast_scores_are_those_of_the_matrix(methods, f, c):
    """scipy's Hadamard matrix, of which f rows with signs are W: W W^T = c I. Value and gradient of
    the scores, of all codes and of each block."""
    scores = methods["cplearn"].hadamard_scores
    codes = methods["cplearn"].draw_codes("hadamard", f, c, 0)
    rows, signs = codes
    sylvester = scipy.linalg.hadamard(c, dtype=np.int8) if c < 2**14 else None
    if sylvester is None:  # 1 GB; its entry (i, j) is -1 to the number of ones in i & j
        ones = np.array([[bin(i & j).count("1") for j in range(c)] for i in rows.tolist()])
        w = torch.from_numpy(1.0 - 2 * (ones % 2)) * signs[:, None]
    else:
        w = torch.from_numpy(sylvester)[rows].double() * signs[:, None]
    assert torch.equal(w @ w.T, c * torch.eye(f, dtype=F64))
    z = torch.randn(2, 3, f, dtype=F64, requires_grad=True)
    weights = torch.randn(2, 3, c, dtype=F64)
    expected = z @ w
    (slope,) = torch.autograd.grad((weights * expected).sum(), z)
    for block in {c, c // 2, max(1, c // 8)}:
        found = [scores(z, codes, first, first + block) for first in range(0, c, block)]
        torch.testing.assert_close(torch.cat(found, -1), expected, rtol=1e-12, atol=1e-11)
        (gradient,) = torch.autograd.grad((weights * torch.cat(found, -1)).sum(), z)
        torch.testing.assert_close(gradient, slope, rtol=1e-12, atol=1e-10)
    single = scores(z.float(), codes, 0, c)
    torch.testing.assert_close(single.double(), expected, rtol=1e-5, atol=1e-5 * math.sqrt(f))


@pytest.mark.parametrize(
    "f, sharpness, one_vector, hundred",
    [(128, 1.63, 1.29, 0.033), (2048, 0.407, 0.083, 0.0004), (2048, 1.63, 1.33, 0.033)],
)
def test_cplearn_prior_forbids_few_dimensions(methods, long, f, sharpness, one_vector, hundred):
    """What few dimensions cost: the prior of n = 256 embeddings that fill 0 (one vector), 1, 5, 20,
    100 dimensions. One vector costs sharpness² / 2, the Gaussian approximation of its logits. Few
    dimensions are as dear at f = 2048 as at f = 128 if the sharpness is the same, not the paper's
    eps, whose 1e-8 means 1.63 at f = 128 and 0.407 at 2048."""
    c, n, prices = 16384, 256, {}
    codes = methods["cplearn"].draw_codes("rademacher", f, c, 0).float()
    tau = math.sqrt(f) / sharpness
    assert temperature(n, f, c) * math.sqrt(n) == pytest.approx(
        math.sqrt(f) / {128: 1.63, 2048: 0.407}[f], rel=2e-3
    )
    for dimensions in (0, 1, 5, 20, 100) if long or f == 128 else (0, 100):
        rng = common.generator(dimensions)
        z = torch.randn(n, max(1, dimensions), generator=rng)
        z = z @ torch.randn(max(1, dimensions), f, generator=rng)
        if dimensions == 0:
            z = z[:1].expand(n, f)
        z = math.sqrt(f) * normalize(z, dim=1)
        prices[dimensions] = (
            methods["cplearn"].loss_fn(z @ codes, z @ codes, tau=tau)["prior"].item()
        )
    assert prices[0] == pytest.approx(sharpness**2 / 2, rel=0.1)
    assert prices[0] == pytest.approx(one_vector, rel=0.1)
    assert prices[100] == pytest.approx(hundred, rel=0.2)
    assert [*prices.values()] == sorted(prices.values(), reverse=True)
    if one_vector > 1:
        for dimensions, price in ((1, 0.7), (5, 0.26), (20, 0.09)):
            assert prices.get(dimensions, price) == pytest.approx(price, rel=0.2)


# --- SimCLR


def test_simclr_of_orthogonal_negatives_in_closed_form(methods):
    """Identical views, all images orthogonal: -log(e^(1/t) / (e^(1/t) + 2n - 2))."""
    n, t = 6, 0.2
    z = torch.eye(n, dtype=F64)
    expected = -math.log(math.exp(1 / t) / (math.exp(1 / t) + 2 * n - 2))
    assert methods["simclr"].loss_fn(z, z, temperature=t)["loss"].item() == pytest.approx(expected)
    # A temperature at which exp(1 / t) overflows even in float64.
    sharp = methods["simclr"].loss_fn(z, z, temperature=1e-4)["loss"]
    assert sharp.item() == pytest.approx(0, abs=1e-9)


# --- SimSiam and BYOL


def test_simsiam_of_identical_views_is_minus_one_without_gradient_into_z(methods):
    z = torch.randn(4, 3, dtype=F64, requires_grad=True)
    p = z.detach().clone().requires_grad_()
    loss = methods["simsiam"].loss_fn(p, p, z, z)["loss"]
    loss.backward()
    assert loss.item() == pytest.approx(-1) and z.grad is None and p.grad is not None


def test_byol_of_opposite_vectors(methods):
    """A squared distance of 4 in each direction."""
    p1, p2 = random_views(6, 5)
    assert methods["byol"].loss_fn(p1, p2, -p2, -p1)["loss"].item() == pytest.approx(8)


# --- DINO


@pytest.mark.parametrize("scale", [1.0, 50.0])
def test_dino_is_entropy_plus_divergence(methods, scale):
    s1, s2 = random_views(4, 6, scale=scale)
    t1, t2 = random_views(4, 6, seed=1, scale=scale)
    terms = methods["dino"].loss_fn(s1, s2, t1, t2, torch.randn(6, dtype=F64))
    torch.testing.assert_close(terms["entropy"] + terms["divergence"], terms["loss"].detach())
    assert terms["divergence"] >= -1e-12 and terms["entropy"] >= 0


def test_dino_gradient_as_the_temperatures_fall(methods):
    """Center-vector paper, Eq. 31: times the temperature, the student's e_max minus the centered
    teacher's."""
    n, c, temperature = 6, 9, 1e-5
    s1, s2 = random_views(n, c)
    t1, t2 = random_views(n, c, seed=1)
    center = torch.randn(c, dtype=F64)
    loss_fn = methods["dino"].loss_fn
    both = {"teacher_temperature": temperature, "temperature": temperature}
    loss = loss_fn(s1, s2, t1, t2, center, **both)["loss"]
    for s, t in ((s1, t2), (s2, t1)):
        (gradient,) = torch.autograd.grad(loss, s, retain_graph=True)
        one_hot = torch.eye(c, dtype=F64)
        expected = one_hot[s.argmax(1)] - one_hot[(t - center).argmax(1)]
        torch.testing.assert_close(temperature * gradient, expected / (2 * n))


# --- SwAV


def test_sinkhorn_shares(methods):
    """The gradient with respect to the scores of the other view is (p - q) / (2 n temperature),
    from which q is read: after many iterations its rows sum to 1, and its columns, the prototypes'
    shares, are equal."""
    n, k = 60, 12
    s = torch.nn.functional.normalize(torch.randn(n, k, dtype=F64), dim=1)
    for scale, iterations in ((1.0, 500), (1.0, 3), (1e3, 3)):
        other = s.clone().requires_grad_()
        loss = methods["swav"].loss_fn(scale * s, other, iterations=iterations)["loss12"]
        (grad,) = torch.autograd.grad(loss, other)
        q = (other / 0.1).softmax(1).detach() - grad * n * 0.1
        torch.testing.assert_close(q.sum(1), torch.ones(n, dtype=F64))
        if iterations == 500:
            shares = torch.full((k,), n / k, dtype=F64)
            torch.testing.assert_close(q.sum(0), shares, rtol=1e-4, atol=0)
        assert loss.isfinite() and q.min() > -1e-9


# --- VICReg


def test_vicreg_terms_of_a_constructed_batch(methods):
    """Columns (1, -1, 1, -1)/2 and (1, 1, -1, -1)·sqrt(3)/2: variances 1/3 and 1, covariance 0;
    then two copies."""
    a = torch.tensor([1.0, -1, 1, -1], dtype=F64)
    b = torch.tensor([1.0, 1, -1, -1], dtype=F64) * math.sqrt(3) / 2
    z = torch.stack([a / 2, b], 1)
    terms = methods["vicreg"].loss_fn(z, z + torch.tensor([2.0, 0.0], dtype=F64))
    assert terms["invariance"].item() == pytest.approx(2)
    assert terms["variance"].item() == pytest.approx((1 - math.sqrt(1 / 3 + 1e-4)) / 2)
    assert terms["covariance"].item() == pytest.approx(0)
    copies = torch.stack([b, b], 1)
    terms = methods["vicreg"].loss_fn(copies, copies)
    assert terms["covariance"].item() == pytest.approx(2 * (1 + 1) / 2)


# --- W-MSE


def test_wmse_by_cosine_rewards_a_group_at_one_point(methods):
    """The covariance may be the identity while a quarter of the images share one point. The other
    images' views have nothing in common here. Cosines: those of the group are 1, so the loss falls
    from 2 to 2 - 2/4. Euclidean: the views agree only in the direction that tells the group from
    the others, so it falls to 2 - 2/d."""
    d, group = 16, torch.zeros(16, dtype=F64)
    group[3] = 5
    for distance, expected in (("cosine", 2 - 2 / 4), ("euclidean", 2 - 2 / d)):
        z1, z2 = (torch.randn(8192, d, dtype=F64) for _ in range(2))
        alone = methods["wmse"].loss_fn(z1, z2, part_size=8192, distance=distance)["loss"]
        for z in (z1, z2):
            z[:2048] = group + z[:2048] / 100
        together = methods["wmse"].loss_fn(z1, z2, part_size=8192, distance=distance)["loss"]
        assert alone.item() == pytest.approx(2, abs=0.03)
        assert together.item() == pytest.approx(expected, abs=0.05)


def test_wmse_parts_are_the_same_images_in_both_views(methods):
    """Of 19 images in parts of 8 the last three belong to no part."""
    z1, z2 = random_views(19, 3)
    loss = methods["wmse"].loss_fn(z1, z2, part_size=8)["loss"]
    expected = sum(slow_wmse(z1[i : i + 8], z2[i : i + 8], part_size=8)["loss"] for i in (0, 8)) / 2
    assert_same_value_and_gradient(loss, expected, [z1, z2], rtol=1e-7)
    same = methods["wmse"].loss_fn(z1, z1, part_size=8)["loss"]
    assert same.item() == pytest.approx(0, abs=1e-12)


def test_wmse_does_not_see_linear_maps(methods):
    """Whitening removes shift and linear map: views that are lower triangular maps of white data
    agree fully. To scale each dimension removes only scales; without whitening nothing is
    removed."""
    white = torch.linalg.qr(torch.randn(50, 6, dtype=F64))[0]
    white = torch.linalg.qr(white - white.mean(0))[0]
    lower = torch.randn(6, 6, dtype=F64).tril() + 3 * torch.eye(6, dtype=F64)
    views = white + 1, white @ lower.T - 5
    scaled = white, white * torch.tensor([1.0, 2, 3, 4, 5, 6])
    loss = methods["wmse"].loss_fn
    assert loss(*views, part_size=50)["loss"].item() == pytest.approx(0, abs=1e-9)
    assert loss(*views, part_size=50, whitening="batchnorm")["loss"] > 0.01
    assert loss(*(100 * z for z in scaled), part_size=50, whitening="batchnorm")["loss"] < 1e-5
    assert loss(*scaled, part_size=50, whitening="none")["loss"] > 0.01
    expected = 2 - 2 * torch.nn.functional.cosine_similarity(*scaled).mean()
    plain = loss(*scaled, part_size=50, whitening="none", distance="cosine")["loss"]
    torch.testing.assert_close(plain, expected)


# --- center vector


def test_center_vector_of_one_direction_and_of_opposites(methods):
    z = torch.tensor([[3.0, 0.0], [5.0, 0.0]], dtype=F64)
    terms = methods["center_vector"].loss_fn(z, z)
    assert terms["center"].item() == pytest.approx(1) and terms["loss"].item() == pytest.approx(0)
    z = torch.tensor([[3.0, 0.0], [-5.0, 0.0]], dtype=F64, requires_grad=True)
    loss = methods["center_vector"].loss_fn(z, z)["loss"]
    loss.backward()
    assert loss.item() == pytest.approx(-0.5) and z.grad.isfinite().all()


def test_center_vector_at_weight_1_is_the_covariance_between_views(methods):
    """-½ tr Cov(u1, u2), plus an eighth of the squared distance of the views' means, which many
    images bring to 0."""
    z1, z2 = random_views(50, 6)
    u1, u2 = (torch.nn.functional.normalize(z, dim=1).detach() for z in (z1, z2))
    covariance = np.cov(u1.numpy(), u2.numpy(), rowvar=False, bias=True)[:6, 6:]
    expected = -np.trace(covariance) / 2 + (u1.mean(0) - u2.mean(0)).square().sum().item() / 8
    assert methods["center_vector"].loss_fn(z1, z2)["loss"].item() == pytest.approx(expected)


# --- Triplet


def test_triplet_at_margin_4_is_linear_in_the_cosines(methods):
    """Its maximum is never 0."""
    z1, z2 = random_views(5, 4)
    terms = methods["triplet"].loss_fn(z1, z2, margin=4)
    torch.testing.assert_close(terms["loss"], terms["negative"] - terms["positive"] + 2)


def test_triplet_of_one_point_and_of_opposite_images(methods):
    """All embeddings equal: half the margin. Images at opposite ends: distances 0 and 4, so 0 up to
    margin 4."""
    loss_fn, point = methods["triplet"].loss_fn, torch.ones(2, 3, dtype=F64)
    assert loss_fn(point, point, margin=0.6)["loss"].item() == pytest.approx(0.3)
    ends = torch.tensor([[1.0, 0], [-1, 0]], dtype=F64)
    assert loss_fn(ends, 2 * ends, margin=4)["loss"].item() == pytest.approx(0, abs=1e-12)


def test_simclr_becomes_the_hardest_triplet_as_the_temperature_falls(methods):
    """Eqs. 11 to 13: temperature times InfoNCE tends to max(closest, positive) - positive, the
    hinge without margin."""
    z1, z2 = random_views(6, 4)
    simclr = 1e-3 * methods["simclr"].loss_fn(z1, z2, temperature=1e-3)["loss"]
    triplet = methods["triplet"].loss_fn(z1, z2, margin=0, negatives="hardest")["loss"]
    assert triplet > 0.1
    torch.testing.assert_close(simclr, triplet, atol=2e-3, rtol=0)
    gradients = [torch.cat(torch.autograd.grad(x, [z1, z2])) for x in (simclr, triplet)]
    assert torch.nn.functional.cosine_similarity(*(g.flatten() for g in gradients), dim=0) > 0.999


def test_center_vector_is_the_mean_over_all_pairs_of_the_triplet(methods):
    """||s||² is the mean of all inner products, of which the negatives are all but those of an
    image with itself."""
    z1, z2 = random_views(7, 4)
    triplet = methods["triplet"].loss_fn(z1, z2, margin=4)
    s2, m = methods["center_vector"].loss_fn(z1, z2)["center"], 14
    negative = (m**2 * s2 - m - m * triplet["positive"]) / (m * (m - 2))
    torch.testing.assert_close(triplet["negative"], negative)


# --- LeJEPA


def sigreg(methods, z, directions):
    return methods["lejepa"].loss_fn(z, z, directions)["sigreg"].item()


def test_lejepa_of_one_point_in_closed_form(methods):
    """phi_a(t) = exp(i t a . z) where all z are equal. The integral of |phi - N|^2 N is adaptive
    quadrature's, and of all 0 over the whole line sqrt(2 pi) - 2 sqrt(pi) + sqrt(2 pi / 3)."""
    n = 7
    for point in (0.0, 0.3, 1.0, 2.5):

        def distance(t, x=point):
            gaussian = math.exp(-(t**2) / 2)
            return (1 + gaussian**2 - 2 * math.cos(t * x) * gaussian) * gaussian

        expected = n * scipy.integrate.quad(distance, -3, 3)[0]
        z = torch.full((n, 1), point, dtype=F64)
        # 17 knots of the trapezoid rule.
        found = sigreg(methods, z, torch.ones(1, 1, dtype=F64))
        assert found == pytest.approx(expected, rel=2e-2)
    zero = sigreg(methods, torch.zeros(n, 3, dtype=F64), torch.eye(3, dtype=F64))
    whole_line = math.sqrt(2 * math.pi) - 2 * math.sqrt(math.pi) + math.sqrt(2 * math.pi / 3)
    assert zero == pytest.approx(n * whole_line, rel=0.03) and zero / n == pytest.approx(
        0.41, abs=0.01
    )


def test_lejepa_of_gaussian_embeddings(methods):
    """Quantiles of a Gaussian have nearly its characteristic function. Random draws have the
    expectation of 1 - exp(-t^2), which over the whole line is sqrt(2 pi) - sqrt(2 pi / 3)."""
    n = 4000
    levels = (torch.arange(n, dtype=F64) + 0.5) / n
    quantiles = torch.special.ndtri(levels)[:, None]
    assert sigreg(methods, quantiles, torch.ones(1, 1, dtype=F64)) < 0.01
    directions = methods["lejepa"].draw_directions(16, 200, 0, 0).double()
    torch.testing.assert_close(
        directions.norm(dim=0), torch.ones(200, dtype=F64), rtol=1e-6, atol=0
    )
    draws = torch.randn(n, 16, dtype=F64)
    expected = math.sqrt(2 * math.pi) - math.sqrt(2 * math.pi / 3)
    assert sigreg(methods, draws, directions) == pytest.approx(expected, abs=0.25)
    # Half of the dimensions, or twice the size, is seen at once.
    assert sigreg(methods, draws * (torch.arange(16) < 8), directions) > 20
    assert sigreg(methods, 2 * draws, directions) > 20


def test_lejepa_draws_other_directions_in_every_step(methods):
    draw = methods["lejepa"].draw_directions
    assert torch.equal(draw(4, 3, 0, 1), draw(4, 3, 0, 1))
    for other in ((1, 1), (0, 2)):
        assert not torch.equal(draw(4, 3, *other), draw(4, 3, 0, 1))


# --- GEDI


def test_gedi_is_cplearn_with_its_forward_prior(methods):
    """The loss of Eq. 2 of the CPLearn paper, of which GEDI has no fixed codes: here these are an
    identity."""
    s1, s2 = random_views(5, 8)
    ours = methods["gedi"].loss_fn(s1, s2, beta=0.3)
    settings = {"tau": 1.0, "beta": 0.3, "prior": "cross-entropy"}
    cplearn = methods["cplearn"].loss_fn(s1, s2, **settings)
    for name in ("loss", "prior", "invariance"):
        torch.testing.assert_close(ours[name], cplearn[name])


def test_gedi_prices(methods):
    """Uniform p: both terms log c. A class for each image: prior log c, invariance 0. One class:
    the prior is high."""
    loss_fn = methods["gedi"].loss_fn
    uniform = loss_fn(*torch.zeros(2, 6, 6, dtype=F64))
    assert uniform["prior"].item() == pytest.approx(math.log(6)) == uniform["invariance"].item()
    each = 40 * torch.eye(6, dtype=F64)
    terms = loss_fn(each, each)
    assert terms["prior"].item() == pytest.approx(math.log(6))
    assert terms["invariance"].item() < 1e-12
    one = each[:1].expand(6, 6)
    assert loss_fn(one, one)["prior"].item() == pytest.approx(40 * 5 / 6)


@pytest.mark.parametrize("rho", [0.2, 0.45, 0.55, 0.9])
def test_views_must_correlate_by_a_half_to_leave_uniform_p(methods, rho):
    """Scores near 0, each row of mean 0 and variance v, have an invariance of log c + v (1/2 - rho)
    to second order, where rho is the correlation of the views' scores. Below 1/2 the uniform p is a
    minimum."""
    n, c, v = 1000, 50, 1e-6
    s1, other = torch.randn(2, n, c, dtype=F64)
    s1, other = (x - x.mean(1, keepdim=True) for x in (s1, other))
    s1 = s1 / s1.norm() * math.sqrt(n * c * v)
    other = other - (other * s1).sum() / (s1 * s1).sum() * s1
    s2 = rho * s1 + math.sqrt(1 - rho**2) * other / other.norm() * s1.norm()
    invariance = methods["gedi"].loss_fn(s1, s2)["invariance"].item()
    assert (invariance - math.log(c)) / v == pytest.approx(0.5 - rho, abs=0.01)


# --- MCR²


def test_mcr2_of_orthogonal_images(methods):
    """n = d images at right angles, both views alike: ZᵀZ = 2 I and each image one direction, so
    the rates are d/2 log(1 + 1/epsilon²) and ½ log(1 + d/epsilon²)."""
    d, epsilon = 8, 0.5
    axes = torch.linalg.qr(torch.randn(d, d, dtype=F64))[0]
    terms = methods["mcr2"].loss_fn(3 * axes, axes, epsilon=epsilon)
    assert terms["expansion"].item() == pytest.approx(d / 2 * math.log(1 + 1 / epsilon**2))
    assert terms["compression"].item() == pytest.approx(math.log(1 + d / epsilon**2) / 2)


def test_mcr2_leaves_views_at_right_angles(methods):
    """Views at right angles are a saddle of compression, which is ½ log of a product that is
    largest there. Where all views fill the space evenly, expansion has no gradient either: whether
    views agree costs it nothing."""
    axes = torch.eye(4, dtype=F64)
    z1, z2 = (axes[list(order)].requires_grad_() for order in ((0, 1, 2, 3), (1, 2, 3, 0)))
    loss = methods["mcr2"].loss_fn(z1, z2, epsilon=0.7)["loss"]
    assert all(g.abs().max() < 1e-12 for g in torch.autograd.grad(loss, [z1, z2]))
    agree = methods["mcr2"].loss_fn(axes, axes, epsilon=0.7)
    apart = methods["mcr2"].loss_fn(z1, z2, epsilon=0.7)
    torch.testing.assert_close(agree["expansion"], apart["expansion"])
    assert agree["compression"] < apart["compression"]


# --- Self-Classifier


def test_self_classifier_of_one_class_costs_log_k(methods):
    """All images in one class: log k with the column softmax, 0 without. A class each, n = k: 0
    with it."""
    loss_fn, one = methods["self_classifier"].loss_fn, torch.zeros(6, 6, dtype=F64)
    one[:, 2] = 40
    assert loss_fn(one, one, [6])["loss"].item() == pytest.approx(math.log(6))
    assert loss_fn(one, one, [6], column_softmax=False)["loss"].item() == pytest.approx(0, abs=1e-9)
    each = 40 * torch.eye(6, dtype=F64)
    assert loss_fn(each, each, [6])["loss"].item() == pytest.approx(0, abs=1e-9)
