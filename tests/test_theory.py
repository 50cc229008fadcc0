"""The theory of "Collapse-Proof Non-Contrastive Self-Supervised Learning" (Sansone, Lebailly and
Tuytelaars, ICML 2025) without training: Lemma 1 (minima), Theorem 1 (embeddings), Corollaries 1 to
3 and Eq. 5 (random codes).

All of it holds as printed but for these, each with a test below:
- Lemma 1: n (q_j - eps) / (1 - c eps) must be whole numbers. With fewer images than codes Eq. 3 is
  out of reach.
- Lemma 1: eps <= p <= 1 - eps (c - 1) is assumed, and Eq. 1 does not enforce it. Codes without
  their mean, as long as Theorem 1's embeddings, are surer of their code and cost less than Eq. 3.
  (Appendix D calls the loss convex in P; its entropy is concave, which is why the minima are
  extrema all the same.)
- Corollary 2: H^T H = I is the second moment. The covariance, about the mean, has rank f - 1.
- Eq. 5: the variance 1/f is that of two different codes; a code's cosine with itself is always 1.
"""

import itertools
import math

import numpy as np
import pytest
import scipy.linalg
import torch
from scipy.special import softmax

import common
import evaluate

EPS = 1e-8


def eq2(p1, p2, q, beta):
    """Eq. 2 of probabilities p1, p2 (n rows of c) and prior q (c), term by term."""
    n, c = len(p1), len(q)
    loss = 0.0
    for i in range(n):
        for j in range(c):
            loss -= beta / n * p1[i][j] * math.log(p2[i][j])
    for j in range(c):
        loss -= q[j] * math.log(sum(p1[i][j] for i in range(n)) / n)
    return loss


def eq3(q, beta, eps):
    """The bound of Eq. 3, whose last term is the entropy of q."""
    top = 1 - eps * (len(q) - 1)
    cross_entropy = -(top * math.log(top) + (1 - top) * math.log(eps))
    return beta * cross_entropy - sum(x * math.log(x) for x in q)


def hard(counts, eps):
    """Extrema: counts[j] images on code j, with probability 1 - eps (c - 1), eps for every other
    code."""
    c = len(counts)
    p = np.full((sum(counts), c), eps)
    p[np.arange(len(p)), np.repeat(np.arange(c), counts)] = 1 - eps * (c - 1)
    return p


@pytest.mark.parametrize("beta", [0.25, 1.0, 10.0])
@pytest.mark.parametrize("counts", [(4, 4, 4), (2, 2, 2, 2), (6, 4, 2)])
@pytest.mark.parametrize("eps", [1e-8, 1e-2])
def test_lemma_1_minimum_is_eq_3(counts, beta, eps):
    """Hard invariant assignments with |I_max(j)| = n (q_j - eps) / (1 - c eps) reach the bound;
    random probabilities of the Lemma's box, of every sharpness, equal or not in both views, never
    fall below it."""
    n, c = sum(counts), len(counts)
    q = [eps + (1 - c * eps) * m / n for m in counts]
    bound, p = eq3(q, beta, eps), hard(counts, eps)
    assert eq2(p, p, q, beta) == pytest.approx(bound, rel=1e-12)
    rng = np.random.default_rng(0)
    for concentration in np.logspace(-3, 2, 60):
        p1, p2 = eps + (1 - c * eps) * rng.dirichlet([concentration] * c, (2, n))
        for first, second in ((p1, p1), (p1, p2), (p, p1), (p1, p)):
            assert eq2(first, second, q, beta) > bound


def test_lemma_1_each_condition_is_needed():
    eps, q, p = 0.01, [1 / 3] * 3, hard((3, 3, 3), 0.01)
    bound = eq3(q, 1.0, eps)
    assert eq2(p, np.roll(p, 1, axis=1), q, 1.0) > bound + 1  # views disagree
    soft = 0.9 * p + 0.1 / 3
    assert soft.mean(0) == pytest.approx(q) and eq2(soft, soft, q, 1.0) > bound + 0.1  # not extreme
    # The prior is matched by |I_max(j)| = n / c and by no other of the 55 hard assignments.
    for counts in itertools.product(range(10), repeat=3):
        if sum(counts) == 9:
            p = hard(counts, eps)
            assert (eq2(p, p, q, 1.0) > bound + 0.01) == (counts != (3, 3, 3))
    # Nor by any of two images on three codes: one code is left with eps.
    p = hard((1, 1, 0), EPS)
    assert eq2(p, p, q, 1.0) == pytest.approx(-(2 * math.log(0.5) + math.log(EPS)) / 3, abs=1e-6)
    assert eq2(p, p, q, 1.0) > eq3(q, 1.0, EPS) + 5


# --- the loss itself, and the embeddings of Theorem 1


def temperature(n, f, c):
    """Eq. 1's."""
    return f / (math.sqrt(n) * math.log((1 - EPS * (c - 1)) / EPS))


def hadamard(c):
    """As many orthogonal codes as dimensions: W^T W = f I with c = f."""
    return scipy.linalg.hadamard(c).astype(float)


def loss_of(methods, h1, h2, w, beta):
    s1, s2 = torch.from_numpy(h1 @ w), torch.from_numpy(h2 @ w)
    tau = temperature(len(h1), *w.shape)
    loss_fn = methods["cplearn"].loss_fn
    return loss_fn(s1, s2, tau=tau, beta=beta, prior="cross-entropy")["loss"].item()


@pytest.mark.parametrize("beta", [0.25, 1.0])
@pytest.mark.parametrize("n, c", [(48, 16), (64, 64), (12, 4)])
def test_loss_of_aligned_codes_is_eq_3(methods, n, c, beta):
    w, q = hadamard(c), [1 / c] * c
    h = np.repeat(w.T, n // c, axis=0) / math.sqrt(n)
    assert loss_of(methods, h, h, w, beta) == pytest.approx(eq3(q, beta, EPS), rel=1e-12)
    # Anywhere it is Eq. 2, averaged over which view comes first.
    h1, h2 = np.random.default_rng(0).normal(size=(2, n, c)) / math.sqrt(n)
    p1, p2 = (softmax(h @ w / temperature(n, c, c), axis=1) for h in (h1, h2))
    expected = (eq2(p1, p2, q, beta) + eq2(p2, p1, q, beta)) / 2
    assert loss_of(methods, h1, h2, w, beta) == pytest.approx(expected, rel=1e-12)


def test_eq_1_reaches_below_eq_3(methods):
    """The logits of codes without their mean, scaled to the norm sqrt(f/n), are sqrt(c / (c - 1))
    times further apart, which gives Eq. 3 of a smaller eps; the more codes, the less it matters."""
    n, c = 48, 16
    w, q = hadamard(c), [1 / c] * c
    centered = w.T - w.mean(1)
    units = centered / np.linalg.norm(centered, axis=1, keepdims=True)
    h = math.sqrt(c / n) * np.repeat(units, n // c, axis=0)
    smaller = 1 / (c - 1 + ((1 - EPS * (c - 1)) / EPS) ** math.sqrt(c / (c - 1)))
    loss = loss_of(methods, h, h, w, 1.0)
    assert loss == pytest.approx(eq3(q, 1.0, smaller), rel=1e-12) and loss < eq3(q, 1.0, EPS) - 1e-6


def sure_embeddings(w, j, n):
    """The two alphas of Theorem 1, the smaller first, and their embeddings, found without Eq. 4:
    softmax(h W / tau) = p means h = W (log p + t) tau / f for some t, and the norm sqrt(f/n) is a
    quadratic equation in t."""
    f, c = w.shape
    p = np.where(np.arange(c) == j, 1 - EPS * (c - 1), EPS)

    def h(t):
        return w @ (np.log(p) + t) * temperature(n, f, c) / f

    t = np.array([-1.0, 0.0, 1.0]) - math.log(EPS)  # near the roots, where the fit keeps its digits
    roots = np.roots(np.polyfit(t, [h(x) @ h(x) - f / n for x in t], 2))
    embeddings = sorted((h(x) for x in roots), key=lambda h: h @ w[:, j])
    return [h @ w[:, j] / f for h in embeddings], embeddings


@pytest.mark.parametrize("n, c", [(48, 16), (64, 64), (7, 4)])
def test_theorem_1(methods, n, c):
    w, j = hadamard(c), 2

    def eq4(alpha):
        return alpha * w[:, j] + (alpha - 1 / math.sqrt(n)) * (w.sum(1) - w[:, j])

    low, high = (1 - 2 / c) / math.sqrt(n), 1 / math.sqrt(n)
    alphas, embeddings = sure_embeddings(w, j, n)
    assert alphas == pytest.approx([low, high], rel=1e-9)
    for alpha, h in zip((low, high), embeddings, strict=True):
        assert eq4(alpha) == pytest.approx(h, abs=1e-9)
        assert eq4(alpha) @ eq4(alpha) == pytest.approx(c / n)
        p = softmax(eq4(alpha) @ w / temperature(n, c, c))
        assert p == pytest.approx(np.where(np.arange(c) == j, 1 - EPS * (c - 1), EPS), rel=1e-10)
    # Other alphas, between and around, give other norms.
    for alpha in np.linspace(low, high, 12)[1:-1]:
        assert eq4(alpha) @ eq4(alpha) < c / n * (1 - 1e-3 / c)
    for alpha in (-high, 0.9 * low, 1.1 * high):
        assert eq4(alpha) @ eq4(alpha) > c / n * (1 + 1e-3 / c)


def test_corollary_1():
    """The gap between the two alphas is 2 / (c sqrt n); that between the embeddings closes only as
    2 / sqrt c."""
    n = 100
    for c in (4, 16, 64, 256, 1024):
        w = hadamard(c)
        (low, high), (spurious, aligned) = sure_embeddings(w, 1, n)
        assert high - low == pytest.approx(2 / (c * math.sqrt(n)), rel=1e-6)
        assert aligned == pytest.approx(w[:, 1] / math.sqrt(n), abs=1e-8)
        gap = np.linalg.norm(spurious - aligned) / np.linalg.norm(aligned)
        assert gap == pytest.approx(2 / math.sqrt(c), rel=1e-6)


@pytest.mark.parametrize("n, c", [(48, 16), (64, 64), (12, 4)])
def test_corollaries_2_and_3(n, c):
    h = np.repeat(hadamard(c).T, n // c, axis=0) / math.sqrt(n)
    assert h.T @ h == pytest.approx(np.eye(c), abs=1e-12)
    assert h @ h.T == pytest.approx(np.kron(np.eye(c), np.full((n // c, n // c), c / n)), abs=1e-12)
    assert np.linalg.matrix_rank(np.cov(h.T)) == c - 1


@pytest.mark.parametrize("f", [50, 100])
def test_eq_5(f):
    """Two Rademacher codes have a cosine of mean 0 and variance 1/f. The cosines of different pairs
    are independent two by two, and a square's variance is 2 (f - 1) / f^3, so both standard errors
    are known."""
    c = 16384
    w = evaluate.load_method("cplearn").draw_codes("rademacher", f, c, 0).double().numpy()
    assert ((w * w).sum(0) == f).all()
    # Sums over all ordered pairs, from f × f matrices, less the c cosines of 1 of a code with
    # itself.
    pairs = c * (c - 1)
    mean = ((w.sum(1) ** 2).sum() / f - c) / pairs
    square = (((w @ w.T) ** 2).sum() / f**2 - c) / pairs
    assert abs(mean) < 4 * math.sqrt(2 / (f * pairs))
    assert abs(square - mean**2 - 1 / f) < 4 * math.sqrt(4 * (f - 1) / (f**3 * pairs))


# --- the limit of many codes
#
# Not in the paper. Let u = z / |z|, and let sharpness be the standard deviation sigma of the scores
# W^T z / tau over random codes: sigma = sqrt(f) / tau. A score is the sum of f independent terms,
# so over many codes the scores of several z are Gaussian, with covariances sigma^2 cos(z, z'). Then
# all sums over codes become expectations, and f, c and eps drop out.


def unit_rows(x):
    return x / x.norm(dim=1, keepdim=True)


def cplearn_terms(methods, u1, u2, sigma, c, kind, beta=1.0):
    """The script's loss of embeddings with the directions u1 and u2 (n, f), float64."""
    f = u1.shape[1]
    codes = methods["cplearn"].draw_codes(kind, f, c, 0)
    scores = []
    for u in (u1, u2):
        z = math.sqrt(f) * u
        if kind == "hadamard":
            scores.append(methods["cplearn"].hadamard_scores(z, codes, 0, c))
        else:
            scores.append(z @ codes.double())
    return methods["cplearn"].loss_fn(*scores, tau=math.sqrt(f) / sigma, beta=beta)


def divergence_from_normal(centers):
    """KL of the mixture of unit Gaussians around centers (n, 2) from N(0, I), on a fine grid."""
    axis = np.linspace(-9, 9, 721)
    points = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 1, 2)
    density = np.zeros(len(points))
    for center in centers:
        density += np.exp(-((points[:, 0] - center) ** 2).sum(1) / 2)
    density /= len(centers) * 2 * math.pi
    log_normal = -(points[:, 0] ** 2).sum(1) / 2 - math.log(2 * math.pi)
    cell = (axis[1] - axis[0]) ** 2
    return float((density * (np.log(density) - log_normal)).sum() * cell)


@pytest.mark.parametrize("kind", ["rademacher", "hadamard"])
@pytest.mark.parametrize("sigma", [0.4, 1.0, 1.63])
def test_many_codes_leave_cosines_and_sharpness(methods, sigma, kind):
    """Invariance is log c + sigma^2 / 2 - sigma^2 cos(z1, z2). The prior is the KL divergence of a
    mixture of unit Gaussians around sigma u_i from N(0, I). The embeddings lie in a plane of f
    dimensions, so that this is an integral over two; the plane is spread over all coordinates."""
    f, c = 512, 2**16
    rng = common.generator(f)
    plane, _ = torch.linalg.qr(torch.randn(f, 2, generator=rng, dtype=torch.float64))
    for spread in (0.3, 2.0, 6.0):  # from one point to the whole circle
        angles = spread * torch.rand(12, generator=rng, dtype=torch.float64)
        noise = 0.5 * torch.randn(12, generator=rng, dtype=torch.float64)
        in_plane = []
        for angle in (angles, angles + noise):
            in_plane.append(torch.stack([angle.cos(), angle.sin()], 1))
        u1, u2 = in_plane[0] @ plane.T, in_plane[1] @ plane.T
        terms = cplearn_terms(methods, u1, u2, sigma, c, kind)
        cosine = (u1 * u2).sum(1).mean().item()
        invariance = math.log(c) + sigma**2 / 2 - sigma**2 * cosine
        # The mean of exp over 65,536 codes has a relative error of (exp(sigma^2) / c)^(1/2).
        assert terms["invariance"].item() == pytest.approx(invariance, abs=0.03 * sigma**2)
        expected = 0
        for centers in in_plane:
            expected += divergence_from_normal(sigma * centers.numpy()) / 2
        assert terms["prior"].item() == pytest.approx(expected, rel=0.06)


def test_few_codes_leave_this_limit(methods):
    """Above sigma = sqrt(2 log c) single codes decide, and one image costs no more than log c."""
    u = unit_rows(torch.randn(1, 512, generator=common.generator(0), dtype=torch.float64))
    prices = {}
    for sigma in (1.63, 6.0, 30.0):
        prices[sigma] = cplearn_terms(methods, u, u, sigma, 4096, "rademacher")["prior"].item()
    assert prices[1.63] == pytest.approx(1.63**2 / 2, rel=0.05)
    assert prices[6.0] < 0.5 * 6.0**2 / 2
    assert 0.9 * math.log(4096) < prices[30.0] <= math.log(4096)


def test_soft_assignments_make_it_the_center_vector_objective(methods):
    """For a small sigma the loss is, up to sigma^3, beta (log c + sigma^2 / 2) plus sigma^2 times
    -beta cos(z1, z2) + |center|^2 / 2. At beta = 1/2 this is the script center_vector's loss."""
    f, c, sigma = 64, 2**14, 0.02
    rng = common.generator(1)
    for shift in (0.0, 0.5, 3.0):
        a = unit_rows(torch.randn(2, 40, f, generator=rng, dtype=torch.float64)[0] + shift)
        b = unit_rows(a + 0.1 * torch.randn(40, f, generator=rng, dtype=torch.float64))
        u1, u2 = torch.cat([a, b]), torch.cat([b, a])  # so both views have the same center
        cosine, center = (u1 * u2).sum(1).mean(), u1.mean(0).square().sum()
        for beta in (0.1, 0.5, 2.0):
            loss = cplearn_terms(methods, u1, u2, sigma, c, "hadamard", beta)["loss"]
            rest = (loss - beta * (math.log(c) + sigma**2 / 2)) / sigma**2
            assert rest.item() == pytest.approx((center / 2 - beta * cosine).item(), abs=0.01)
            if beta == 0.5:
                other = methods["center_vector"].loss_fn(u1, u2)["loss"]
                assert rest.item() == pytest.approx(other.item(), abs=0.01)


def test_a_large_beta_draws_all_embeddings_together(methods):
    """Let m be the squared norm of the center and rho the mean cosine of two views' centered
    embeddings. The slope of the loss in m is sigma^2 (1/2 - beta (1 - rho)). So a beta above
    1 / (2 (1 - rho)) pulls to one point: above 0.625 at the rho of 0.2 of untrained networks."""
    n, f, c, sigma = 32, 128, 2**14, 0.02
    rng = common.generator(2)
    basis, _ = torch.linalg.qr(torch.randn(f, n + 1, generator=rng, dtype=torch.float64))
    mean, v, other = basis[:, 0], basis[:, 1 : n // 2 + 1].T, basis[:, n // 2 + 1 :].T
    v, other = torch.cat([v, -v]), torch.cat([other, -other])  # unit rows that add up to 0

    def loss(m, rho, beta):
        views = []
        for centered in (v, rho * v + math.sqrt(1 - rho**2) * other):
            views.append(math.sqrt(m) * mean + math.sqrt(1 - m) * centered)
        return cplearn_terms(methods, *views, sigma, c, "hadamard", beta)["loss"].item()

    for rho in (0.0, 0.2, 0.5):
        for beta in (0.05, 0.4, 0.6, 0.65, 0.9, 1.1, 2.0):
            slope = (loss(0.3, rho, beta) - loss(0.2, rho, beta)) / 0.1 / sigma**2
            expected = 0.5 - beta * (1 - rho)
            assert slope == pytest.approx(expected, abs=0.01)
            if abs(expected) > 0.01:
                assert (slope < 0) == (beta > 0.5 / (1 - rho))


@pytest.mark.parametrize("sigma", [1.0, 1.63])
def test_the_bound_on_beta_is_a_guide_for_sharper_assignments(methods, sigma):
    """Beyond the first order embeddings are drawn together from one point outwards by the same
    rule: near m = 1 the slope's sign is that of 1/2 - beta (1 - rho), whatever sigma."""
    n, f, c = 32, 128, 2**14
    rng = common.generator(3)
    basis, _ = torch.linalg.qr(torch.randn(f, n + 1, generator=rng, dtype=torch.float64))
    mean, v, other = basis[:, 0], basis[:, 1 : n // 2 + 1].T, basis[:, n // 2 + 1 :].T
    v, other = torch.cat([v, -v]), torch.cat([other, -other])
    for rho, beta in ((0.2, 0.3), (0.2, 1.2), (0.5, 0.5), (0.5, 1.8)):
        losses = []
        for m in (0.999, 1.0):
            views = []
            for centered in (v, rho * v + math.sqrt(1 - rho**2) * other):
                views.append(math.sqrt(m) * mean + math.sqrt(1 - m) * centered)
            losses.append(cplearn_terms(methods, *views, sigma, c, "hadamard", beta)["loss"].item())
        assert (losses[1] < losses[0]) == (beta > 0.5 / (1 - rho))


def test_the_spectrum_of_random_codes_and_of_hadamard_rows(methods):
    """Random codes stretch |W^T u|^2 / c between (1 - sqrt(f/c))^2 and (1 + sqrt(f/c))^2 (Marchenko
    and Pastur), so that z can move to where scores are short. Hadamard rows stretch nothing, and
    their codes' cosines have variance (1/f - 1/c) instead of 1/f."""
    f, c = 256, 2048
    w = methods["cplearn"].draw_codes("rademacher", f, c, 0).double()
    spectrum = torch.linalg.eigvalsh(w @ w.T / c)
    least, most = (1 - math.sqrt(f / c)) ** 2, (1 + math.sqrt(f / c)) ** 2
    assert spectrum[0].item() == pytest.approx(least, abs=0.03)
    assert spectrum[-1].item() == pytest.approx(most, abs=0.05)
    codes = methods["cplearn"].draw_codes("hadamard", f, c, 0)
    w = methods["cplearn"].hadamard_scores(torch.eye(f, dtype=torch.float64), codes, 0, c)
    assert torch.equal(w @ w.T, c * torch.eye(f, dtype=torch.float64))
    cosines = (w.T @ w / f)[~torch.eye(c, dtype=torch.bool)]
    assert cosines.square().mean().item() == pytest.approx(1 / f - 1 / c, rel=1e-3)
