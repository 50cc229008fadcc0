"""Every loss against a slow loop written from the paper's equation, in float64, and against closed forms."""

import ast
import inspect
import math
import sys
from unittest import mock

import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import METHODS, OWN, TINY
from torch.utils._python_dispatch import TorchDispatchMode

import common

F64 = torch.float64


def random_views(n, d, seed=0, scale=1.0):
    rng = torch.Generator().manual_seed(seed)
    return [(scale * torch.randn(n, d, generator=rng, dtype=F64)).requires_grad_() for _ in range(2)]


def assert_same_value_and_gradient(loss, expected, inputs, rtol=1e-9):
    torch.testing.assert_close(loss, expected, rtol=rtol, atol=1e-12)
    got, want = (torch.autograd.grad(value, inputs, retain_graph=True) for value in (loss, expected))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=rtol, atol=1e-10 * max(1.0, w.abs().max().item()))


def loss_calls(z1, z2):
    """The arguments of each loss_fn from two views' rows (n, 8), and keywords that are not the defaults."""
    x1, x2 = 2 * z1 + 1, z2 - 3
    codes = 2 * torch.randint(2, (8, 40), generator=torch.Generator().manual_seed(0)) - 1
    return {
        "barlow_twins": ((z1, z2), {"lambda_offdiag": 0.1}),
        "byol": ((z1, z2, x1, x2), {}),
        "center_vector": ((z1, z2), {"penalty": "norm"}),
        "cplearn": ((z1, z2, codes), {"tau": 0.5, "prior": "cross-entropy"}),
        "dino": ((z1, z2, x1, x2, z1[0].detach()), {"teacher_temperature": 0.1}),
        "gedi": ((z1, z2, x1[:, 0], x2[:, 0]), {"weights": (0.5, 2.0, 0.1)}),
        "mcr2": ((z1, z2), {"epsilon": 0.3}),
        "self_classifier": ((z1, z2, [3, 5]), {"column_softmax": False}),
        "simclr": ((z1, z2), {"temperature": 0.3}),
        "simsiam": ((z1, z2, x1, x2), {"stop_gradient": False}),
        "swav": ((z1, z2, x1[:4], x2[:4]), {"iterations": 2}),
        "triplet": ((z1, z2), {"margin": 0.2, "negatives": "hardest"}),
        "vicreg": ((z1 / 3, z2 / 3), {"sum_variance": True}),
        "wmse": ((z1[:, :2], z2[:, :2]), {"part_size": 6}),
    }


@pytest.mark.parametrize("name", METHODS)
def test_loss_fn_can_be_pasted(name, methods):
    """Each loss_fn runs below "import math, torch" and "from torch import nn" alone, and gives the same there."""
    pasted = {}
    source = "import math, torch\nfrom torch import nn\n" + inspect.getsource(methods[name].loss_fn)
    exec(source, pasted)
    z1, z2 = random_views(12, 8)
    inputs, settings = loss_calls(z1, z2)[name]
    for keywords in (settings, {"tau": 0.5} if name == "cplearn" else {}):
        expected, got = (f(*inputs, **keywords) for f in (methods[name].loss_fn, pasted["loss_fn"]))
        assert expected.keys() == got.keys() and all(torch.equal(expected[k], got[k]) for k in got)
    assert got["loss"].requires_grad and all(value.ndim == 0 for value in got.values())


@pytest.mark.parametrize("name", METHODS)
def test_defaults_of_loss_fn_are_those_of_the_flags(name, methods):
    """Whoever pastes a loss_fn gets what the script uses."""
    args = parse(methods, name)
    defaults = {k: p.default for k, p in inspect.signature(methods[name].loss_fn).parameters.items()}
    main = ast.parse(inspect.getsource(methods[name].main))
    calls = [node for node in ast.walk(main) if isinstance(node, ast.Call) and "loss" in ast.unparse(node.func)]
    (call,) = [call for call in calls if call.keywords or ast.unparse(call.func) == "loss_fn"]
    for keyword in call.keywords:
        if keyword.arg == "tau":  # follows from f and c
            continue
        used = eval(ast.unparse(keyword.value), {"args": args, "weights": (25.0, 25.0, 1.0)})
        assert used == defaults[keyword.arg], keyword.arg
    if name == "vicreg":
        weights = (args.invariance_weight, args.variance_weight, args.covariance_weight)
        assert weights == defaults["weights"]


# --- Barlow Twins


def slow_barlow_twins(z1, z2, lambda_offdiag):
    """Eqs. 1 and 2 entry by entry, embeddings standardised with the batch norm's eps of 1e-5."""
    n, d = z1.shape
    columns = [
        [(z[:, i] - z[:, i].mean()) / (z[:, i].var(correction=0) + 1e-5).sqrt() for i in range(d)] for z in (z1, z2)
    ]
    invariance, redundancy = 0, 0
    for i in range(d):
        for j in range(d):
            c = sum(columns[0][i][b] * columns[1][j][b] for b in range(n)) / n
            if i == j:
                invariance = invariance + (1 - c) ** 2
            else:
                redundancy = redundancy + c**2
    return invariance + lambda_offdiag * redundancy, invariance, redundancy


@pytest.mark.parametrize("n, d, scale", [(6, 5, 1.0), (2, 4, 1.0), (5, 3, 1e4), (5, 3, 1e-3)])
@pytest.mark.parametrize("lambda_offdiag", [0.0051, 0.0, 1.0])
def test_barlow_twins_is_its_equation(methods, n, d, scale, lambda_offdiag):
    z1, z2 = random_views(n, d, scale=scale)
    terms = methods["barlow_twins"].loss_fn(z1, z2, lambda_offdiag=lambda_offdiag)
    loss, invariance, redundancy = slow_barlow_twins(z1, z2, lambda_offdiag)
    assert_same_value_and_gradient(terms["loss"], loss, [z1, z2])
    torch.testing.assert_close(terms["invariance"], invariance)
    torch.testing.assert_close(terms["redundancy"], redundancy)


def test_barlow_twins_of_identical_whitened_views_is_zero(methods):
    z = torch.linalg.qr(torch.randn(64, 8, dtype=F64) - 0)[0]
    z = torch.linalg.qr(z - z.mean(0))[0] * math.sqrt(64) * 1e3  # white, and large beside the batch norm's eps
    z = z - z.mean(0)
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


def slow_cplearn(h1, h2, codes, tau, beta, prior):
    """Eq. 2 (cross-entropy) or Appendix N (reverse KL) image by image, code by code, averaged over the views."""
    n, c = len(h1), codes.shape[1]
    log_p = []
    for h in (h1, h2):
        rows = []
        for i in range(n):
            logits = torch.stack([(h[i] * codes[:, j]).sum() / tau for j in range(c)])
            rows.append([logits[j] - logits.logsumexp(0) for j in range(c)])
        log_p.append(rows)
    invariance = sum(
        -log_p[v][i][j].exp() * log_p[1 - v][i][j] / (2 * n) for v in range(2) for i in range(n) for j in range(c)
    )
    matching = 0
    for v in range(2):
        for j in range(c):
            mean = sum(log_p[v][i][j].exp() for i in range(n)) / n
            matching = matching + (mean * (c * mean).log() if prior == "reverse-kl" else -mean.log() / c) / 2
    return beta * invariance + matching, invariance, matching


def temperature(n, f, c, eps=1e-8):
    return f / (math.sqrt(n) * math.log((1 - eps * (c - 1)) / eps))


def sphere(h, n):
    return math.sqrt(h.shape[1] / n) * torch.nn.functional.normalize(h, dim=1)


@pytest.mark.parametrize("prior", ["reverse-kl", "cross-entropy"])
@pytest.mark.parametrize(
    "n, f, c, beta, scale", [(4, 8, 11, 1.0, 1.0), (2, 4, 3, 0.1, 1.0), (3, 4, 9, 10.0, 3.0), (3, 4, 7, 0.0, 1.0)]
)
@pytest.mark.parametrize("identical", [False, True])
def test_cplearn_is_its_equation(methods, prior, n, f, c, beta, scale, identical):
    z1, z2 = random_views(n, f)
    h1, h2 = scale * sphere(z1, n), scale * sphere(z1 if identical else z2, n)
    codes = methods["cplearn"].draw_codes("rademacher", f, c, seed=3)
    tau = temperature(n, f, c)
    expected = slow_cplearn(h1, h2, codes.to(F64), tau, beta, prior)
    plain = methods["cplearn"].loss_fn(h1, h2, codes, tau=tau, beta=beta, prior=prior)
    blocks = methods["cplearn"].loss_in_blocks(h1, h2, codes, tau=tau, beta=beta, prior=prior, block=4)
    for terms in (plain, blocks):
        assert_same_value_and_gradient(terms["loss"], expected[0], [z1] if identical else [z1, z2])
        for name, value in zip(("invariance", "prior"), expected[1:], strict=True):
            assert_same_value_and_gradient(terms[name], value, [z1] if identical else [z1, z2])


@pytest.mark.parametrize("function", ["loss_fn", "loss_in_blocks"])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_cplearn_of_aligned_codes_costs_log_c_over_n(methods, dtype, function):
    """n images each on a code of its own among c = 16384: invariance 0 and prior log(c / n), with no NaN for the codes
    that nobody uses, at Eq. 1's norm and at the released code's, sqrt(n) times larger."""
    n, f, c = 64, 512, 16384
    codes = methods["cplearn"].draw_codes("rademacher", f, c, seed=0)
    tau = temperature(n, f, c)
    for norm, within in ((1 / math.sqrt(n), 1e-2), (1.0, 1e-5)):
        h = (codes[:, :n].T.to(dtype) * norm).requires_grad_()
        for prior in ("reverse-kl", "cross-entropy"):
            terms = getattr(methods["cplearn"], function)(h, h, codes, tau=tau, prior=prior)
            (grad,) = torch.autograd.grad(terms["loss"], h)
            assert terms["loss"].isfinite() and grad.isfinite().all()
            assert terms["invariance"].item() == pytest.approx(0, abs=1e-2)
            if prior == "reverse-kl":
                assert terms["prior"].item() == pytest.approx(math.log(c / n), rel=within)


def test_cplearn_three_prices(methods):
    """Balanced hard codes cost log(c/n), the uniform assignment beta log(c), total collapse log(c)."""
    n, f, c, beta = 8, 64, 64, 0.25
    codes = methods["cplearn"].draw_codes("hadamard", f, c, seed=0)
    corner = 40.0 * codes.T.to(F64) / f

    def price(h):
        return methods["cplearn"].loss_fn(h, h, codes, tau=1.0, beta=beta)["loss"].item()

    assert price(corner[:n]) == pytest.approx(math.log(c / n))
    assert price(torch.zeros(n, f, dtype=F64)) == pytest.approx(beta * math.log(c))
    assert price(corner[:1].expand(n, f)) == pytest.approx(math.log(c))


@pytest.mark.parametrize("function", ["loss_fn", "loss_in_blocks"])
@pytest.mark.parametrize("prior", ["reverse-kl", "cross-entropy"])
def test_cplearn_in_float32(methods, prior, function):
    """In float32 value and gradient are those of float64."""
    n, f, c = 64, 128, 5000
    h1, h2 = (sphere(z.detach(), n).requires_grad_() for z in random_views(n, f))
    codes = methods["cplearn"].draw_codes("rademacher", f, c, seed=0)
    results = []
    for views in ((h1, h2), [h.detach().float().requires_grad_() for h in (h1, h2)]):
        loss = getattr(methods["cplearn"], function)(*views, codes, tau=temperature(n, f, c), prior=prior)["loss"]
        results.append((loss.detach(), *torch.autograd.grad(loss, views)))
    for exact, single in zip(*results, strict=True):
        assert (single - exact).norm() < 3e-5 * exact.norm()


def test_cplearn_blocks_do_not_change_the_loss(methods):
    h1, h2 = random_views(5, 8)
    codes = methods["cplearn"].draw_codes("rademacher", 8, 100, seed=0)
    values = [methods["cplearn"].loss_in_blocks(h1, h2, codes, tau=0.5, block=b)["loss"] for b in (1, 7, 100, 1000)]
    for value in values[1:]:
        torch.testing.assert_close(value, values[0], rtol=1e-12, atol=0)


def test_cplearn_in_blocks_never_holds_an_n_by_c_matrix(methods):
    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                # Views of the int8 dictionary cost nothing.
                if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                    largest = max(largest, tensor.numel())
            return out

    n, f, c = 32, 16, 20_000
    h1, h2 = random_views(n, f)
    codes = methods["cplearn"].draw_codes("rademacher", f, c, seed=0)
    with Largest():
        methods["cplearn"].loss_in_blocks(h1, h2, codes, tau=1.0, block=1000)["loss"].backward()
    assert 0 < largest <= 2 * n * 1000


@pytest.mark.parametrize("c, function", [(4096, "loss_fn"), (2**20, "loss_in_blocks")])
def test_cplearn_takes_blocks_of_a_large_dictionary(methods, run, monkeypatch, c, function):
    """With 32 images a million codes are 2^25 scores, as many as the plain formula is used for; with 64 more."""
    called = []
    for name in ("loss_fn", "loss_in_blocks"):

        def spy(z1, z2, codes, name=name, **settings):
            called.append((name, codes.dtype, len(z1) * codes.shape[1]))
            return {"loss": (z1 * z2).sum()}

        monkeypatch.setattr(methods["cplearn"], name, spy)
    monkeypatch.setattr(common, "collapse_metrics", lambda *_: {"center_norm": 0.0})
    monkeypatch.setattr(sys, "argv", ["cplearn.py", *TINY, "--batch-size", "64", "--projector-dim", "4", "--c", str(c),
                                      "--epochs", "1", "--out", "r"])  # fmt: skip
    methods["cplearn"].main()
    assert set(called) == {(function, torch.int8, 64 * c)}


def test_cplearn_codes(methods):
    draw = methods["cplearn"].draw_codes
    w = draw("rademacher", 64, 5000, 0).double()
    assert set(w.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(w, draw("rademacher", 64, 5000, 0).double()) and not torch.equal(
        w, draw("rademacher", 64, 5000, 1)
    )
    cosine = w[:, :2000].T @ w[:, :2000] / 64
    off = cosine[~torch.eye(2000, dtype=bool)]
    # Eq. 5: mean 0 and variance 1 / f of the cosine of two codes.
    assert off.mean().abs() < 5e-3 and off.var().item() == pytest.approx(1 / 64, rel=0.02)
    h = draw("hadamard", 64, 32, 0).double()
    assert torch.equal(h.T @ h, 64 * torch.eye(32, dtype=F64))
    columns = {tuple(column) for column in scipy.linalg.hadamard(64).T.tolist()}
    assert {tuple(column) for column in h.T.int().tolist()} <= columns


@pytest.mark.parametrize(
    "f, eps, one_vector, hundred", [(128, 1e-8, 1.29, 0.033), (2048, 1e-8, 0.083, 0.0005), (2048, 1e-32, 1.33, 0.033)]
)
def test_cplearn_prior_forbids_few_dimensions(methods, f, eps, one_vector, hundred):
    """What few dimensions cost: the prior of n = 256 embeddings that fill 0 (one vector), 1, 5, 20, 100 dimensions.
    One vector costs (f / tau)² / 2f, the Gaussian approximation of its logits. At f = 2048 it takes eps = 1e-32 to make
    p as sharp, and few dimensions as dear, as at f = 128 with the paper's 1e-8."""
    c, n, prices = 16384, 256, []
    codes, tau = methods["cplearn"].draw_codes("rademacher", f, c, 0).float(), temperature(n, f, c, eps) * math.sqrt(n)
    for dimensions in (0, 1, 5, 20, 100):
        rng = common.generator(dimensions)
        z = torch.randn(n, max(1, dimensions), generator=rng) @ torch.randn(max(1, dimensions), f, generator=rng)
        z = math.sqrt(f) * torch.nn.functional.normalize(z if dimensions else z[:1].expand(n, f), dim=1)
        prices.append(methods["cplearn"].loss_fn(z, z, codes, tau=tau)["prior"].item())
    assert prices == sorted(prices, reverse=True)
    assert prices[0] == pytest.approx((f / tau) ** 2 / (2 * f), rel=0.1)
    assert prices[0] == pytest.approx(one_vector, rel=0.1)
    assert prices[-1] == pytest.approx(hundred, rel=0.2)
    if one_vector > 1:
        assert prices[1:4] == pytest.approx([0.7, 0.26, 0.09], rel=0.2)


def test_cplearn_scores_are_those_of_eq_1(methods):
    """H W / tau with Eq. 1's H = sqrt(f/n) l2norm(z) and its tau, n being the batch size in training, whatever batch
    is scored; at a corner of the hypercube tanh(z) / sqrt(n) is as long; the authors' tanh is sqrt(n) sharper."""
    norms = {}
    for activation in ("l2", "tanh", "tanh-unscaled"):
        flags = ["--activation", activation, "--c", "32", "--batch-size", "64", "--no-batchnorm", "--width", "8"]
        model = build_model(methods, "cplearn", *flags).eval()
        x = torch.randn(3, 2)
        scores = model.scores(model(x)).detach() / model.temperature
        z = (model.backbone(x) @ model.head[0].weight.T + model.head[0].bias).double().detach()
        h = {"l2": math.sqrt(16 / 64) * z / z.norm(dim=1, keepdim=True), "tanh": z.tanh() / math.sqrt(64)}
        h = h.get(activation, z.tanh())
        expected = h @ model.codes.double() / temperature(64, 16, 32)
        torch.testing.assert_close(scores.double(), expected, rtol=1e-4, atol=1e-5)
        norms[activation] = model.head(1e5 * torch.randn(3, 8)).norm(dim=1)
    torch.testing.assert_close(norms["tanh"], norms["l2"], rtol=1e-2, atol=0)


# --- SimCLR


def slow_simclr(z1, z2, temperature):
    """Eq. 1 anchor by anchor."""
    z = torch.cat([z1, z2])
    n, total = len(z1), 0
    for i in range(2 * n):
        j = (i + n) % (2 * n)
        sims = [(z[i] @ z[k]) / (z[i].norm() * z[k].norm()) / temperature for k in range(2 * n)]
        total = total - sims[j] + torch.stack([sims[k] for k in range(2 * n) if k != i]).logsumexp(0)
    return total / (2 * n)


@pytest.mark.parametrize("n, d, temperature", [(5, 4, 0.5), (2, 3, 0.1), (4, 6, 0.001)])
def test_simclr_is_its_equation(methods, n, d, temperature):
    z1, z2 = random_views(n, d)
    terms = methods["simclr"].loss_fn(z1, z2, temperature=temperature)
    assert_same_value_and_gradient(terms["loss"], slow_simclr(z1, z2, temperature), [z1, z2])


def test_simclr_of_orthogonal_negatives_in_closed_form(methods):
    """Identical views, all images orthogonal: -log(e^(1/t) / (e^(1/t) + 2n - 2))."""
    n, t = 6, 0.2
    z = torch.eye(n, dtype=F64)
    expected = -math.log(math.exp(1 / t) / (math.exp(1 / t) + 2 * n - 2))
    assert methods["simclr"].loss_fn(z, z, temperature=t)["loss"].item() == pytest.approx(expected)
    # A temperature at which exp(1 / t) overflows even in float64.
    assert methods["simclr"].loss_fn(z, z, temperature=1e-4)["loss"].item() == pytest.approx(0, abs=1e-9)


# --- SimSiam and BYOL


def slow_cosine(a, b):
    return sum((a[i] @ b[i]) / (a[i].norm() * b[i].norm()) for i in range(len(a))) / len(a)


@pytest.mark.parametrize("n", [2, 6])
@pytest.mark.parametrize("stop_gradient", [True, False])
def test_simsiam_is_its_equation(methods, n, stop_gradient):
    p1, p2 = random_views(n, 5)
    z1, z2 = random_views(n, 5, seed=1)
    loss = methods["simsiam"].loss_fn(p1, p2, z1, z2, stop_gradient=stop_gradient)["loss"]
    t1, t2 = (z1.detach(), z2.detach()) if stop_gradient else (z1, z2)
    inputs = [p1, p2] if stop_gradient else [p1, p2, z1, z2]
    assert_same_value_and_gradient(loss, -(slow_cosine(p1, t2) + slow_cosine(p2, t1)) / 2, inputs)


def test_simsiam_of_identical_views_is_minus_one_without_gradient_into_z(methods):
    z = torch.randn(4, 3, dtype=F64, requires_grad=True)
    p = z.detach().clone().requires_grad_()
    loss = methods["simsiam"].loss_fn(p, p, z, z)["loss"]
    loss.backward()
    assert loss.item() == pytest.approx(-1) and z.grad is None and p.grad is not None


@pytest.mark.parametrize("n", [2, 6])
def test_byol_is_its_equation(methods, n):
    """The squared distance of the normalised vectors, both directions added."""
    p1, p2 = random_views(n, 5)
    t1, t2 = random_views(n, 5, seed=1)
    expected = 0
    for p, t in ((p1, t2), (p2, t1)):
        for i in range(n):
            expected = expected + (p[i] / p[i].norm() - t[i].detach() / t[i].norm().detach()).square().sum() / n
    loss = methods["byol"].loss_fn(p1, p2, t1, t2)["loss"]
    assert_same_value_and_gradient(loss, expected, [p1, p2])
    assert not torch.autograd.grad(loss, [t1], allow_unused=True)[0]
    opposite = methods["byol"].loss_fn(p1, p2, -p2, -p1)["loss"]
    assert opposite.item() == pytest.approx(8)


def parse(methods, name, *flags):
    """The flags of the method's script on this command line."""
    with mock.patch.object(sys, "argv", [name, *flags]):
        return common.parse_args(f"{name}.py", "", methods[name].add_flags, methods[name].DEFAULTS)


def main(methods, name, *flags):
    """Runs the method's script with small sizes."""
    with mock.patch.object(sys, "argv", [f"{name}.py", *TINY, *OWN[name], "--out", "r", *flags]):
        methods[name].main()


def build_model(methods, name, *flags):
    """The method's Model as the command line with these flags would build it."""
    torch.manual_seed(0)
    return methods[name].Model(parse(methods, name, *TINY, *OWN[name], *flags))


@pytest.mark.parametrize("name", ["byol", "dino"])
@pytest.mark.parametrize("m", [0.9, 0.0, 1.0])
def test_teacher_is_the_moving_average_of_parameters_alone(methods, name, m):
    model = build_model(methods, name)
    student = [*model.backbone.parameters(), *model.head.parameters()]
    student += model.prototypes.parameters() if name == "dino" else []
    teacher = list(model.teacher.parameters())
    assert all(torch.equal(t, s) for t, s in zip(teacher, student, strict=True))
    assert not any(t.requires_grad for t in teacher)
    model.train()
    assert not model.teacher(torch.randn(8, 2)).requires_grad
    buffers = [b.clone() for b in model.teacher.buffers()]
    with torch.no_grad():
        for s in student:
            s.add_(torch.randn_like(s))
    expected = [m * t.detach() + (1 - m) * s.detach() for t, s in zip(teacher, student, strict=True)]
    model.update_teacher(m)
    for t, e in zip(model.teacher.parameters(), expected, strict=True):
        torch.testing.assert_close(t.detach(), e)
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.teacher.buffers(), strict=True))
    assert model.teacher.training  # its batch norms use the batch


@pytest.mark.parametrize("name", ["byol", "dino"])
def test_momentum_rises_along_a_cosine(name, methods, run, monkeypatch):
    """m = 1 - (1 - momentum) (cos(π progress) + 1) / 2 after each of 22 steps."""
    used = []
    monkeypatch.setattr(methods[name].Model, "update_teacher", lambda self, m: used.append(m))
    main(methods, name, "--epochs", "2", "--momentum", "0.9")
    assert used == pytest.approx([1 - 0.1 * (math.cos(math.pi * step / 22) + 1) / 2 for step in range(22)])


# --- DINO


@pytest.mark.parametrize("n, c, scale", [(4, 6, 1.0), (2, 3, 1.0), (3, 5, 50.0)])
def test_dino_is_its_equation(methods, n, c, scale):
    s1, s2 = random_views(n, c, scale=scale)
    t1, t2 = random_views(n, c, seed=1, scale=scale)
    center = torch.randn(c, dtype=F64)
    expected = 0
    for t, s in ((t1, s2), (t2, s1)):
        for i in range(n):
            q = ((t[i] - center) / 0.04).softmax(0).detach()
            log_p = s[i] / 0.1 - (s[i] / 0.1).logsumexp(0)
            expected = expected - sum(q[k] * log_p[k] for k in range(c)) / (2 * n)
    terms = methods["dino"].loss_fn(s1, s2, t1, t2, center)
    assert_same_value_and_gradient(terms["loss"], expected, [s1, s2])
    torch.testing.assert_close(terms["entropy"] + terms["divergence"], terms["loss"].detach())
    assert terms["divergence"] >= -1e-12 and terms["entropy"] >= 0
    assert not torch.autograd.grad(terms["loss"], [t1], allow_unused=True)[0]


def test_dino_gradient_as_the_temperatures_fall(methods):
    """Center-vector paper, Eq. 31: times the temperature, the student's e_max minus the centered teacher's."""
    n, c, temperature = 6, 9, 1e-5
    s1, s2 = random_views(n, c)
    t1, t2 = random_views(n, c, seed=1)
    center = torch.randn(c, dtype=F64)
    loss_fn = methods["dino"].loss_fn
    loss = loss_fn(s1, s2, t1, t2, center, teacher_temperature=temperature, temperature=temperature)["loss"]
    for s, t in ((s1, t2), (s2, t1)):
        (gradient,) = torch.autograd.grad(loss, s, retain_graph=True)
        expected = torch.eye(c, dtype=F64)[s.argmax(1)] - torch.eye(c, dtype=F64)[(t - center).argmax(1)]
        torch.testing.assert_close(temperature * gradient, expected / (2 * n))


@pytest.mark.parametrize("flags", [[], ["--no-centering"]])
def test_dino_center_by_hand(flags, methods, run, monkeypatch):
    """center <- 0.9 center + 0.1 mean over both views, after the step; left at 0 without centering."""
    expected, loss_fn = torch.zeros(32), methods["dino"].loss_fn

    def spy(s1, s2, t1, t2, center, **settings):
        nonlocal expected
        torch.testing.assert_close(center, expected)
        if not flags:
            expected = 0.9 * expected + 0.1 * torch.cat([t1, t2]).mean(0)
        return loss_fn(s1, s2, t1, t2, center, **settings)

    monkeypatch.setattr(methods["dino"], "loss_fn", spy)
    main(methods, "dino", "--epochs", "1", *flags)
    assert expected.any() != bool(flags)


# --- SwAV


def slow_sinkhorn(s, iterations, epsilon):
    """The published pseudocode: rows are prototypes, columns images."""
    q = (s.T / epsilon).exp()
    q = q / q.sum()
    k, n = q.shape
    for _ in range(iterations):
        q = q / q.sum(1, keepdim=True) / k
        q = q / q.sum(0, keepdim=True) / n
    return (q * n).T


@pytest.mark.parametrize("n, k, m, scale", [(6, 4, 0, 1.0), (2, 3, 0, 1.0), (4, 5, 8, 1.0), (5, 4, 3, 0.3)])
def test_swav_is_its_equation(methods, n, k, m, scale):
    """Scores are cosines, in [-1, 1]: larger ones overflow the published pseudocode."""
    s1, s2 = (x.detach().tanh().mul(scale).requires_grad_() for x in random_views(n, k))
    earlier = [x.detach().tanh() * scale for x in random_views(m, k, seed=1)]
    loss, terms = 0, methods["swav"].loss_fn(s1, s2, *earlier)
    for view, s, other in ((0, s1, s2), (1, s2, s1)):
        q = slow_sinkhorn(torch.cat([s, earlier[view]]).detach(), 3, 0.05)[:n]
        log_p = other / 0.1 - (other / 0.1).logsumexp(1, keepdim=True)
        one_way = -(q * log_p).sum() / n
        assert terms[("loss12", "loss21")[view]].item() == pytest.approx(one_way.item())
        loss = loss + one_way / 2
    assert_same_value_and_gradient(terms["loss"], loss, [s1, s2])
    q = (s2 / 0.05).softmax(1).detach()
    softmax = methods["swav"].loss_fn(s1, s2, *earlier, iterations=0)["loss21"]
    torch.testing.assert_close(softmax, -(q * (s1 / 0.1).log_softmax(1)).sum() / n)


def test_sinkhorn_shares(methods):
    """The gradient with respect to the scores of the other view is (p - q) / (2 n temperature), from which q is read:
    after many iterations its rows sum to 1, and its columns, the prototypes' shares, are equal."""
    n, k = 60, 12
    s = torch.nn.functional.normalize(torch.randn(n, k, dtype=F64), dim=1)
    for scale, iterations in ((1.0, 500), (1.0, 3), (1e3, 3)):
        other = s.clone().requires_grad_()
        none = torch.empty(0, k, dtype=F64)
        loss = methods["swav"].loss_fn(scale * s, other, none, none, iterations=iterations)["loss12"]
        (grad,) = torch.autograd.grad(loss, other)
        q = (other / 0.1).softmax(1).detach() - grad * n * 0.1
        torch.testing.assert_close(q.sum(1), torch.ones(n, dtype=F64))
        if iterations == 500:
            torch.testing.assert_close(q.sum(0), torch.full((k,), n / k, dtype=F64), rtol=1e-4, atol=0)
        assert loss.isfinite() and q.min() > -1e-9


def test_swav_queue_and_prototypes(methods, run, monkeypatch):
    """The queue holds the last embeddings. What is filled joins in epoch 15. Prototypes are always unit vectors."""
    used, seen, loss_fn = [], [], methods["swav"].loss_fn
    networks, model_class = [], methods["swav"].Model

    class Model(model_class):
        def __init__(self, args):
            super().__init__(args)
            networks.append(self)

    def spy(s1, s2, earlier1, earlier2, **settings):
        (model,) = networks
        torch.testing.assert_close(model.prototypes.weight.norm(dim=1), torch.ones(32))
        used.append(len(earlier1))
        if len(earlier1):
            filled = torch.cat(seen[::-1], 1)[:, : len(earlier1)]
            assert torch.equal(model.queue[:, : len(earlier1)], filled)
            assert torch.equal(torch.stack([earlier1, earlier2]), model.scores(filled))
        return loss_fn(s1, s2, earlier1, earlier2, **settings)

    gather = common.gather

    def watch(*rows):
        out = gather(*rows)
        if out[0].shape[1] == 128:
            seen.append(torch.stack(out).detach())
        return out

    monkeypatch.setattr(methods["swav"], "loss_fn", spy)
    monkeypatch.setattr(methods["swav"], "Model", Model)
    monkeypatch.setattr(common, "gather", watch)
    main(methods, "swav", "--epochs", "16", "--queue", "300")
    assert used == 15 * 11 * [0] + 11 * [300]
    used.clear(), seen.clear(), networks.clear()
    main(methods, "swav", "--epochs", "17", "--queue", "22500", "--out", "later")
    assert used == 15 * 11 * [0] + [min(22500, 128 * step) for step in range(165, 187)] and used[-1] == 22500
    (model,) = networks
    torch.testing.assert_close(model.prototypes.weight.norm(dim=1), torch.ones(32))
    assert not model.queue.requires_grad and model.prototypes.bias is None


def test_swav_prototypes_are_frozen_in_the_first_epoch_or_for_good(methods, run, tmp_path):
    for flags, epochs, moved in (([], 1, False), ([], 2, True), (["--freeze-prototypes"], 2, False)):
        start = build_model(methods, "swav", *flags).prototypes.weight
        out = tmp_path / f"{epochs}{moved}"
        main(methods, "swav", *flags, "--epochs", str(epochs), "--out", str(out))
        trained = common.load_checkpoint(out)["model"]["prototypes.weight"]
        assert torch.allclose(start, trained, atol=1e-6) != moved


# --- VICReg


@pytest.mark.parametrize("n, d, scale", [(6, 4, 1.0), (2, 3, 1.0), (5, 3, 0.01)])
@pytest.mark.parametrize("sum_variance", [False, True])
def test_vicreg_is_its_equation(methods, n, d, scale, sum_variance):
    z1, z2 = random_views(n, d, scale=scale)
    invariance = sum((z1[i, j] - z2[i, j]) ** 2 for i in range(n) for j in range(d)) / (n * d)
    variance, covariance = 0, 0
    for z in (z1, z2):
        mean = [sum(z[i, j] for i in range(n)) / n for j in range(d)]
        cov = [
            [sum((z[i, a] - mean[a]) * (z[i, b] - mean[b]) for i in range(n)) / (n - 1) for b in range(d)]
            for a in range(d)
        ]
        variance = variance + sum(torch.clamp(1 - (cov[j][j] + 1e-4).sqrt(), min=0) for j in range(d)) / d
        covariance = covariance + sum(cov[a][b] ** 2 for a in range(d) for b in range(d) if a != b) / d
    variance = variance if sum_variance else variance / 2
    terms = methods["vicreg"].loss_fn(z1, z2, sum_variance=sum_variance)
    assert_same_value_and_gradient(terms["loss"], 25 * invariance + 25 * variance + covariance, [z1, z2])


def test_vicreg_terms_of_a_constructed_batch(methods):
    """Columns (1, -1, 1, -1)/2 and (1, 1, -1, -1)·sqrt(3)/2: variances 1/3 and 1, covariance 0; then two copies."""
    a = torch.tensor([1.0, -1, 1, -1], dtype=F64)
    b = torch.tensor([1.0, 1, -1, -1], dtype=F64) * math.sqrt(3) / 2
    z = torch.stack([a / 2, b], 1)
    terms = methods["vicreg"].loss_fn(z, z + torch.tensor([2.0, 0.0], dtype=F64))
    assert terms["invariance"].item() == pytest.approx(2)
    assert terms["variance"].item() == pytest.approx((1 - math.sqrt(1 / 3 + 1e-4)) / 2)
    assert terms["covariance"].item() == pytest.approx(0)
    copies = torch.stack([b, b], 1)
    assert methods["vicreg"].loss_fn(copies, copies)["covariance"].item() == pytest.approx(2 * (1 + 1) / 2)


# --- W-MSE


def slow_wmse(z1, z2, distance):
    """Eq. 3 for one part: each view whitened by the inverse of its own Cholesky factor."""
    white = []
    for z in (z1, z2):
        z = z - z.mean(0)
        lower = torch.linalg.cholesky(z.T @ z / (len(z) - 1))
        white.append((torch.linalg.inv(lower) @ z.T).T)
    if distance == "cosine":
        return 2 - 2 * slow_cosine(*white)
    return sum(((a - b) ** 2).sum() / len(a) for a, b in zip(*white, strict=True)) / len(z1)


@pytest.mark.parametrize("n, d", [(12, 4), (6, 2)])
@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_wmse_is_its_equation(methods, n, d, distance):
    """With gradient through both views."""
    z1, z2 = random_views(n, d)
    loss = methods["wmse"].loss_fn(z1, z2, part_size=n, distance=distance)["loss"]
    assert_same_value_and_gradient(loss, slow_wmse(z1, z2, distance), [z1, z2], rtol=1e-7)


def test_wmse_by_cosine_rewards_a_group_at_one_point(methods):
    """The covariance may be the identity while a quarter of the images share one point. The other images' views have
    nothing in common here. Cosines: those of the group are 1, so the loss falls from 2 to 2 - 2/4. Euclidean: the views
    agree only in the direction that tells the group from the others, so it falls to 2 - 2/d."""
    d, group = 16, torch.zeros(16, dtype=F64)
    group[3] = 5
    for distance, expected in (("cosine", 2 - 2 / 4), ("euclidean", 2 - 2 / d)):
        z1, z2 = (torch.randn(8192, d, dtype=F64) for _ in range(2))
        alone = methods["wmse"].loss_fn(z1, z2, part_size=8192, distance=distance)["loss"]
        for z in (z1, z2):
            z[:2048] = group + z[:2048] / 100
        together = methods["wmse"].loss_fn(z1, z2, part_size=8192, distance=distance)["loss"]
        assert alone.item() == pytest.approx(2, abs=0.03) and together.item() == pytest.approx(expected, abs=0.05)


def test_wmse_parts_are_the_same_images_in_both_views(methods):
    """Of 19 images in parts of 8 the last three belong to no part."""
    z1, z2 = random_views(19, 3)
    loss = methods["wmse"].loss_fn(z1, z2, part_size=8)["loss"]
    expected = sum(slow_wmse(z1[i : i + 8], z2[i : i + 8], "euclidean") for i in (0, 8)) / 2
    assert_same_value_and_gradient(loss, expected, [z1, z2], rtol=1e-7)
    assert methods["wmse"].loss_fn(z1, z1, part_size=8)["loss"].item() == pytest.approx(0, abs=1e-12)


def test_wmse_does_not_see_linear_maps(methods):
    """Whitening removes shift and linear map: views that are lower triangular maps of white data agree fully. To scale
    each dimension removes only scales; without whitening nothing is removed."""
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
    torch.testing.assert_close(loss(*scaled, part_size=50, whitening="none", distance="cosine")["loss"], expected)


# --- center vector


@pytest.mark.parametrize("n", [2, 5])
@pytest.mark.parametrize("penalty", ["squared", "norm"])
def test_center_vector_is_its_equation(methods, n, penalty):
    z1, z2 = random_views(n, 4)
    u = [[z[i] / z[i].norm() for i in range(n)] for z in (z1, z2)]
    invariance = -sum(u[0][i] @ u[1][i] for i in range(n)) / n
    # The squared norm of the mean is the mean inner product of all pairs.
    everything = u[0] + u[1]
    center = sum(a @ b for a in everything for b in everything) / (2 * n) ** 2
    center = center if penalty == "squared" else center.sqrt()
    terms = methods["center_vector"].loss_fn(z1, z2, center_weight=0.7, penalty=penalty)
    assert_same_value_and_gradient(terms["loss"], (invariance + 0.7 * center) / 2, [z1, z2])
    torch.testing.assert_close(terms["center"], center)


def test_center_vector_of_one_direction_and_of_opposites(methods):
    z = torch.tensor([[3.0, 0.0], [5.0, 0.0]], dtype=F64)
    terms = methods["center_vector"].loss_fn(z, z)
    assert terms["center"].item() == pytest.approx(1) and terms["loss"].item() == pytest.approx(0)
    z = torch.tensor([[3.0, 0.0], [-5.0, 0.0]], dtype=F64, requires_grad=True)
    loss = methods["center_vector"].loss_fn(z, z)["loss"]
    loss.backward()
    assert loss.item() == pytest.approx(-0.5) and z.grad.isfinite().all()


def test_center_vector_at_weight_1_is_the_covariance_between_views(methods):
    """-½ tr Cov(u1, u2), plus an eighth of the squared distance of the views' means, which many images bring to 0."""
    z1, z2 = random_views(50, 6)
    u1, u2 = (torch.nn.functional.normalize(z, dim=1).detach() for z in (z1, z2))
    covariance = np.cov(u1.numpy(), u2.numpy(), rowvar=False, bias=True)[:6, 6:]
    expected = -np.trace(covariance) / 2 + (u1.mean(0) - u2.mean(0)).square().sum().item() / 8
    assert methods["center_vector"].loss_fn(z1, z2)["loss"].item() == pytest.approx(expected)


# --- Triplet


def slow_triplet(z1, z2, margin, negatives):
    """Eq. 5 anchor by anchor, negative by negative, with squared distances."""
    z, n = [row / row.norm() for row in (*z1, *z2)], len(z1)
    total, count = 0, 0
    for a in range(2 * n):
        others = [k for k in range(2 * n) if k % n != a % n]
        if negatives == "hardest":
            others = [min(others, key=lambda k: (z[a] - z[k]).square().sum().item())]
        for k in others:
            near, far = (z[a] - z[(a + n) % (2 * n)]).square().sum(), (z[a] - z[k]).square().sum()
            far = 0.0 if negatives == "none" else far  # as if each anchor were its own negative
            total, count = total + ((near - far + margin) / 2).clamp_min(0), count + 1
    return total / count


@pytest.mark.parametrize("n", [2, 5])
@pytest.mark.parametrize("margin", [0.0, 0.7, 4.0])
@pytest.mark.parametrize("negatives", ["all", "hardest", "none"])
def test_triplet_is_its_equation(methods, n, margin, negatives):
    z1, z2 = random_views(n, 4)
    terms = methods["triplet"].loss_fn(z1, z2, margin=margin, negatives=negatives)
    assert_same_value_and_gradient(terms["loss"], slow_triplet(z1, z2, margin, negatives), [z1, z2])
    cosine = torch.nn.functional.cosine_similarity(z1, z2).mean()
    torch.testing.assert_close(terms["positive"], cosine)
    if margin == 4:  # the maximum is never 0
        torch.testing.assert_close(terms["loss"], terms["negative"] - cosine + 2)


def test_triplet_of_one_point_and_of_opposite_images(methods):
    """All embeddings equal: half the margin. Images at opposite ends: distances 0 and 4, so 0 up to margin 4."""
    loss_fn, point = methods["triplet"].loss_fn, torch.ones(2, 3, dtype=F64)
    assert loss_fn(point, point, margin=0.6)["loss"].item() == pytest.approx(0.3)
    ends = torch.tensor([[1.0, 0], [-1, 0]], dtype=F64)
    assert loss_fn(ends, 2 * ends, margin=4)["loss"].item() == pytest.approx(0, abs=1e-12)


def test_simclr_becomes_the_hardest_triplet_as_the_temperature_falls(methods):
    """Eqs. 11 to 13: temperature times InfoNCE tends to max(closest, positive) - positive, the hinge without margin."""
    z1, z2 = random_views(6, 4)
    simclr = 1e-3 * methods["simclr"].loss_fn(z1, z2, temperature=1e-3)["loss"]
    triplet = methods["triplet"].loss_fn(z1, z2, margin=0, negatives="hardest")["loss"]
    assert triplet > 0.1
    torch.testing.assert_close(simclr, triplet, atol=2e-3, rtol=0)
    gradients = [torch.cat(torch.autograd.grad(x, [z1, z2])) for x in (simclr, triplet)]
    assert torch.nn.functional.cosine_similarity(*(g.flatten() for g in gradients), dim=0) > 0.999


def test_center_vector_is_the_mean_over_all_pairs_of_the_triplet(methods):
    """||s||² is the mean of all inner products, of which the negatives are all but those of an image with itself."""
    z1, z2 = random_views(7, 4)
    triplet = methods["triplet"].loss_fn(z1, z2, margin=4)
    s2, m = methods["center_vector"].loss_fn(z1, z2)["center"], 14
    negative = (m**2 * s2 - m - m * triplet["positive"]) / (m * (m - 2))
    torch.testing.assert_close(triplet["negative"], negative)


# --- GEDI


def slow_gedi(s1, s2, weights, log_real, log_fake):
    """By probabilities, class by class and image by image."""
    n, c = s1.shape
    p1, p2 = ([row.exp() / row.exp().sum() for row in s] for s in (s1, s2))
    prior = sum(-(sum(p)[k] / n).log() / c for p in (p1, p2) for k in range(c)) / 2
    invariance = sum(-(a @ b.log() + b @ a.log()) / 2 for a, b in zip(p1, p2, strict=True)) / n
    generative = sum(fake - real for fake, real in zip(log_fake, log_real, strict=True)) / n
    return weights[0] * prior + weights[1] * invariance + weights[2] * generative


@pytest.mark.parametrize("n, c", [(2, 3), (5, 4)])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 0.0), (0.5, 2.0, 0.3), (0.0, 1.0, 0.0)])
def test_gedi_is_its_equation(methods, n, c, weights):
    s1, s2 = random_views(n, c, scale=3)
    loss = methods["gedi"].loss_fn(s1, s2, s1.logsumexp(1), s2.logsumexp(1), weights=weights)["loss"]
    assert_same_value_and_gradient(loss, slow_gedi(s1, s2, weights, s1.logsumexp(1), s2.logsumexp(1)), [s1, s2])


def test_gedi_is_cplearn_with_its_forward_prior(methods):
    """The loss of Eq. 2 of the CPLearn paper, of which GEDI has no fixed codes: here these are an identity."""
    s1, s2 = random_views(5, 8)
    ours = methods["gedi"].loss_fn(s1, s2, weights=(1.0, 0.3, 0.0))
    cplearn = methods["cplearn"].loss_fn(s1, s2, torch.eye(8), tau=1.0, beta=0.3, prior="cross-entropy")
    for name in ("loss", "prior", "invariance"):
        torch.testing.assert_close(ours[name], cplearn[name])


def test_gedi_prices(methods):
    """Uniform p: both terms log c. A class for each image: prior log c, invariance 0. One class: the prior is high."""
    loss_fn = methods["gedi"].loss_fn
    uniform = loss_fn(*torch.zeros(2, 6, 6, dtype=F64))
    assert uniform["prior"].item() == pytest.approx(math.log(6)) == uniform["invariance"].item()
    each = 40 * torch.eye(6, dtype=F64)
    terms = loss_fn(each, each)
    assert terms["prior"].item() == pytest.approx(math.log(6)) and terms["invariance"].item() < 1e-12
    one = each[:1].expand(6, 6)
    assert loss_fn(one, one)["prior"].item() == pytest.approx(40 * 5 / 6)


@pytest.mark.parametrize("rho", [0.2, 0.45, 0.55, 0.9])
def test_views_must_correlate_by_a_half_to_leave_uniform_p(methods, rho):
    """Scores near 0, each row of mean 0 and variance v, have an invariance of log c + v (1/2 - rho) to second order,
    where rho is the correlation of the views' scores. Below 1/2 the uniform p is a minimum."""
    n, c, v = 1000, 50, 1e-6
    s1, other = torch.randn(2, n, c, dtype=F64)
    s1, other = (x - x.mean(1, keepdim=True) for x in (s1, other))
    s1 = s1 / s1.norm() * math.sqrt(n * c * v)
    other = other - (other * s1).sum() / (s1 * s1).sum() * s1
    s2 = rho * s1 + math.sqrt(1 - rho**2) * other / other.norm() * s1.norm()
    invariance = methods["gedi"].loss_fn(s1, s2)["invariance"].item()
    assert (invariance - math.log(c)) / v == pytest.approx(0.5 - rho, abs=0.01)


def test_gedi_samples_have_the_variance_of_langevin_dynamics(methods):
    """Where log p(x) = -5 ||x||² + const, a Gaussian of variance 1/10, steps x - 0.05 x + 0.1 noise have, after many,
    the variance v = 0.95² v + 0.01. Before every 20 steps, one sample in 20 gets variance 1 again."""
    model = methods["gedi"].Model(parse(methods, "gedi", *TINY, "--generative-weight", "1"))
    model.head, model.backbone = torch.nn.Identity(), torch.nn.Identity()
    model.scores = lambda x: -5 * x.square().sum(1, keepdim=True)
    before = model.samples.clone()
    _, log_fake = model.log_densities(before[:500], 0)
    moved = (model.samples != before).any(1)
    assert moved.sum() == 500 and model.training
    torch.testing.assert_close(log_fake.sort()[0], model.scores(model.samples[moved])[:, 0].sort()[0])
    for step in range(1, 100):
        model.log_densities(before[:2000], step)
    v, left = 0.01 / (1 - 0.95**2), 0.95**40  # what 20 steps leave of a difference to v
    excess = left * (1 - v) / 20 / (1 - left * 19 / 20)
    assert model.samples.var().item() == pytest.approx(v + excess, rel=0.02)


# --- MCR²


def slow_rates(z1, z2, epsilon):
    """Coding rates with (d, d) matrices, of the batch and image by image."""
    z1, z2 = ([row / row.norm() for row in z] for z in (z1, z2))
    n, d = len(z1), len(z1[0])
    identity, z = torch.eye(d, dtype=F64), torch.stack([*z1, *z2])
    expansion = torch.logdet(identity + d / (2 * n * epsilon**2) * z.T @ z) / 2
    parts = [torch.stack(pair) for pair in zip(z1, z2, strict=True)]
    rates = [torch.logdet(identity + d / (2 * epsilon**2) * part.T @ part) / 2 for part in parts]
    return expansion, sum(rates) / n


@pytest.mark.parametrize("n, d", [(2, 3), (6, 4), (3, 9)])
@pytest.mark.parametrize("epsilon, weight", [(16.0, 1.0), (0.1, 1.0), (0.7, 0.0)])
def test_mcr2_is_its_equation(methods, n, d, epsilon, weight):
    z1, z2 = random_views(n, d)
    terms = methods["mcr2"].loss_fn(z1, z2, epsilon=epsilon, expansion_weight=weight)
    expansion, compression = slow_rates(z1, z2, epsilon)
    assert_same_value_and_gradient(terms["loss"], compression - weight * expansion, [z1, z2])
    torch.testing.assert_close(terms["expansion"], expansion)
    torch.testing.assert_close(terms["compression"], compression)


def test_mcr2_of_orthogonal_images(methods):
    """n = d images at right angles, both views alike: ZᵀZ = 2 I and each image one direction, so the rates are
    d/2 log(1 + 1/epsilon²) and ½ log(1 + d/epsilon²)."""
    d, epsilon = 8, 0.5
    axes = torch.linalg.qr(torch.randn(d, d, dtype=F64))[0]
    terms = methods["mcr2"].loss_fn(3 * axes, axes, epsilon=epsilon)
    assert terms["expansion"].item() == pytest.approx(d / 2 * math.log(1 + 1 / epsilon**2))
    assert terms["compression"].item() == pytest.approx(math.log(1 + d / epsilon**2) / 2)


def test_mcr2_leaves_views_at_right_angles(methods):
    """Views at right angles are a saddle of compression, which is ½ log of a product that is largest there. Where all
    views fill the space evenly, expansion has no gradient either: whether views agree costs it nothing."""
    axes = torch.eye(4, dtype=F64)
    z1, z2 = (axes[list(order)].requires_grad_() for order in ((0, 1, 2, 3), (1, 2, 3, 0)))
    loss = methods["mcr2"].loss_fn(z1, z2, epsilon=0.7)["loss"]
    assert all(g.abs().max() < 1e-12 for g in torch.autograd.grad(loss, [z1, z2]))
    agree = methods["mcr2"].loss_fn(axes, axes, epsilon=0.7)
    apart = methods["mcr2"].loss_fn(z1, z2, epsilon=0.7)
    torch.testing.assert_close(agree["expansion"], apart["expansion"])
    assert agree["compression"] < apart["compression"]


# --- Self-Classifier


def slow_self_classifier(target, prediction, column_softmax):
    """One direction of one classifier by probabilities, image by image and class by class."""
    n, k = target.shape
    a, b = (target / 0.05).exp(), (prediction / 0.1).exp()
    loss = 0
    share = a / a.sum(0) if column_softmax else a  # p(x_i | y)
    p = torch.stack([row / row.sum() for row in b])
    if column_softmax:
        p = n / k * p / p.sum(0)
    for i in range(n):
        for y in range(k):
            loss = loss - share[i, y] / share[i].sum() * p[i, y].log() / n
    return loss


@pytest.mark.parametrize("n", [2, 5])
@pytest.mark.parametrize("column_softmax", [True, False])
def test_self_classifier_is_its_equation(methods, n, column_softmax):
    s1, s2 = random_views(n, 7, scale=0.3)
    terms = methods["self_classifier"].loss_fn(s1, s2, [3, 4], column_softmax=column_softmax)
    directions = []
    for a, b in ((s1, s2), (s2, s1)):
        parts = [slow_self_classifier(a[:, c], b[:, c], column_softmax) for c in (slice(0, 3), slice(3, 7))]
        directions.append(sum(parts) / 2)
    assert_same_value_and_gradient(terms["loss"], sum(directions) / 2, [s1, s2])
    torch.testing.assert_close(terms["loss12"], directions[0])


def test_self_classifier_of_one_class_costs_log_k(methods):
    """All images in one class: log k with the column softmax, 0 without. A class each, n = k: 0 with it."""
    loss_fn, one = methods["self_classifier"].loss_fn, torch.zeros(6, 6, dtype=F64)
    one[:, 2] = 40
    assert loss_fn(one, one, [6])["loss"].item() == pytest.approx(math.log(6))
    assert loss_fn(one, one, [6], column_softmax=False)["loss"].item() == pytest.approx(0, abs=1e-9)
    each = 40 * torch.eye(6, dtype=F64)
    assert loss_fn(each, each, [6])["loss"].item() == pytest.approx(0, abs=1e-9)
