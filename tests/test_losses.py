"""Every loss against a slow loop written from the paper's equation, in float64, and against closed forms."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

F64 = torch.float64


def random_views(n, d, seed=0, scale=1.0):
    rng = torch.Generator().manual_seed(seed)
    return [(scale * torch.randn(n, d, generator=rng, dtype=F64)).requires_grad_() for _ in range(2)]


def assert_same_value_and_gradient(loss, expected, inputs, rtol=1e-9):
    torch.testing.assert_close(loss, expected, rtol=rtol, atol=1e-12)
    got, want = (torch.autograd.grad(value, inputs, retain_graph=True) for value in (loss, expected))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=rtol, atol=1e-10 * max(1.0, w.abs().max().item()))


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
    terms = methods["cplearn"].loss_fn(h1, h2, codes, tau=tau, beta=beta, prior=prior, block=4)
    loss, invariance, matching = slow_cplearn(h1, h2, codes.to(F64), tau, beta, prior)
    assert_same_value_and_gradient(terms["loss"], loss, [z1] if identical else [z1, z2])
    torch.testing.assert_close(terms["invariance"], invariance)
    torch.testing.assert_close(terms["prior"], matching)


def test_cplearn_gradient_is_the_finite_difference(methods):
    h1, h2 = random_views(3, 4)
    codes = methods["cplearn"].draw_codes("rademacher", 4, 6, seed=0)
    for prior in ("reverse-kl", "cross-entropy"):
        assert torch.autograd.gradcheck(
            lambda a, b, p=prior: methods["cplearn"].loss_fn(a, b, codes, tau=0.7, beta=0.5, prior=p, block=4)["loss"],
            (h1, h2),
        )


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_cplearn_of_aligned_codes_costs_log_c_over_n(methods, dtype):
    """n images each on a code of its own among c = 16384: invariance 0 and prior log(c / n), with no NaN for the codes
    that nobody uses, at Eq. 1's norm and at the released code's, sqrt(n) times larger."""
    n, f, c = 64, 512, 16384
    codes = methods["cplearn"].draw_codes("rademacher", f, c, seed=0)
    tau = temperature(n, f, c)
    for norm, within in ((1 / math.sqrt(n), 1e-2), (1.0, 1e-5)):
        h = (codes[:, :n].T.to(dtype) * norm).requires_grad_()
        for prior in ("reverse-kl", "cross-entropy"):
            terms = methods["cplearn"].loss_fn(h, h, codes, tau=tau, prior=prior)
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


def test_cplearn_blocks_do_not_change_the_loss(methods):
    h1, h2 = random_views(5, 8)
    codes = methods["cplearn"].draw_codes("rademacher", 8, 100, seed=0)
    values = [methods["cplearn"].loss_fn(h1, h2, codes, tau=0.5, block=b)["loss"] for b in (1, 7, 100, 1000)]
    for value in values[1:]:
        torch.testing.assert_close(value, values[0], rtol=1e-12, atol=0)


def test_cplearn_never_holds_an_n_by_c_matrix(methods):
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
        methods["cplearn"].loss_fn(h1, h2, codes, tau=1.0, block=1000)["loss"].backward()
    assert 0 < largest <= 2 * n * 1000


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


def test_cplearn_activations(methods):
    """At a corner of the hypercube tanh has Eq. 1's norm sqrt(f/n); unscaled it has sqrt(f)."""
    import argparse

    args = argparse.Namespace(
        backbone="mlp", dataset="blobs", image_size=32, width=8, projector_dim=16, c=32, beta=1.0, codes="rademacher",
        no_batchnorm=True, seed=0, batch_size=64, activation="l2", prior="reverse-kl",
    )  # fmt: skip
    norms = {}
    for args.activation in ("l2", "tanh", "tanh-unscaled"):
        model = methods["cplearn"].Model(args)
        norms[args.activation] = model.project(1e4 * torch.randn(3, 8)).norm(dim=1)
    torch.testing.assert_close(norms["l2"], torch.full((3,), math.sqrt(16 / 64)))
    torch.testing.assert_close(norms["tanh"], norms["l2"], rtol=1e-2, atol=0)
    torch.testing.assert_close(norms["tanh-unscaled"], 8 * norms["tanh"])
    # The temperature belongs to the training batch, whatever the batch it meets later.
    assert model.tau == pytest.approx(temperature(64, 16, 32))
