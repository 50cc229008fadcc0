"""Collapse metrics against closed forms, numpy and scikit-learn."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import KNeighborsClassifier

import analyze
import common
import evaluate


def test_center_norm_closed_forms():
    z = torch.randn(1, 16).expand(50, 16)
    assert common.center_norm(3 * z) == pytest.approx(1)
    assert common.center_norm(torch.cat([z, -z])) == pytest.approx(0, abs=1e-12)
    # Two orthogonal directions in equal shares: the mean is (1/2, 1/2).
    assert common.center_norm(torch.eye(2).repeat(10, 1)) == pytest.approx(np.sqrt(0.5))
    # Independent directions: E ||mean||² = 1 / n.
    clouds = [torch.randn(100, 64, generator=common.generator(i)) for i in range(50)]
    norms = [common.center_norm(cloud) ** 2 for cloud in clouds]
    assert np.mean(norms) == pytest.approx(1 / 100, rel=0.1)


def test_effective_rank_closed_forms():
    q = torch.linalg.qr(torch.randn(200, 9, dtype=torch.float64))[0]
    q = torch.linalg.qr(q - q.mean(0))[0]
    assert common.effective_rank(q) == pytest.approx(9)
    assert common.effective_rank(5 + 1e-3 * q) == pytest.approx(9)
    line = q[:, :1] @ torch.randn(1, 30, dtype=torch.float64)
    assert common.effective_rank(line) == pytest.approx(1, abs=1e-5)
    assert common.effective_rank(torch.full((10, 4), 0.1)) == 0
    sigma = torch.tensor([4.0, 2.0, 1.0, 1.0], dtype=torch.float64)
    p = (sigma / 8).numpy()
    assert common.effective_rank(q[:, :4] * sigma) == pytest.approx(np.exp(-(p * np.log(p)).sum()))


@pytest.mark.parametrize("n, d", [(40, 100), (100, 40)])
def test_effective_rank_is_that_of_numpys_singular_values(n, d):
    z = torch.randn(n, d, generator=common.generator(n)) * torch.linspace(0.01, 3, d) + 1
    sigma = np.linalg.svd((z - z.mean(0)).double().numpy(), compute_uv=False)
    p = sigma[sigma > 1e-10 * sigma[0]] / sigma.sum()
    assert common.effective_rank(z) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-4)


def test_average_correlation_is_numpys():
    z = torch.randn(60, 7, generator=common.generator(0))
    z = z @ torch.randn(7, 7, generator=common.generator(1))
    corr = np.abs(np.corrcoef(z.double().numpy().T))
    assert common.average_correlation(z) == pytest.approx((corr.sum() - 7) / 42)
    column = torch.randn(60, 1)
    assert common.average_correlation(column * torch.tensor([1.0, -2.0, 3.0])) == pytest.approx(1)
    assert common.average_correlation(torch.full((9, 5), 0.3)) == 1
    assert common.average_correlation(column) == 0


def test_nmi_of_chance_is_shown_and_ami_removes_it():
    """10,000 images of 10 classes on 16,384 random codes: NMI above a third though there is nothing
    to be found."""
    rng = np.random.default_rng(0)
    labels, codes = np.arange(10_000) % 10, rng.integers(16_384, size=10_000)
    score = normalized_mutual_info_score(labels, codes)
    assert score == pytest.approx(0.354, abs=1e-3)
    assert evaluate.shuffled_nmi(codes, labels) == pytest.approx(score, abs=5e-3)
    assert adjusted_mutual_info_score(labels, codes) == pytest.approx(0, abs=5e-3)
    sorted_codes = labels * 1000
    assert normalized_mutual_info_score(labels, sorted_codes) == pytest.approx(1)
    assert evaluate.shuffled_nmi(sorted_codes, labels) < 0.01


def test_knn_is_scikit_learns_weighted_vote():
    rng = common.generator(0)
    bank, queries = torch.randn(300, 8, generator=rng), torch.randn(120, 8, generator=rng)
    bank_labels, labels = (torch.randint(5, (n,), generator=rng) for n in (300, 120))
    for k, temperature in ((1, 0.1), (20, 0.1), (200, 0.05)):
        judge = KNeighborsClassifier(
            k, metric="cosine", weights=lambda d, t=temperature: np.exp((1 - d) / t)
        )
        judge.fit(bank.numpy(), bank_labels.numpy())
        expected = judge.score(queries.numpy(), labels.numpy())
        accuracy = common.knn_accuracy(bank, bank_labels, queries, labels, k, temperature)
        assert accuracy == pytest.approx(expected)
    assert common.knn_accuracy(bank, bank_labels, bank, bank_labels, k=1) == 1
    bank = torch.randn(40_000, 8, generator=rng)
    bank_labels = torch.randint(5, (40_000,), generator=rng)
    judge.fit(bank.numpy(), bank_labels.numpy())  # a bank that is walked over in blocks
    expected = judge.score(queries.numpy(), labels.numpy())
    accuracy = common.knn_accuracy(bank, bank_labels, queries, labels, k, temperature)
    assert accuracy == pytest.approx(expected)
    # Fewer images than neighbours.
    assert 0 <= common.knn_accuracy(bank[:3], bank_labels[:3], queries, labels) <= 1


def test_used_codes():
    """The monitor counts the codes in use. Here the code of a point is its first number."""
    points = torch.tensor([[5.0, 0], [5, 1], [7, 2], [100, 3]])
    data = common.Data(points, None, points, None, [], torch.zeros(2), torch.ones(2), 0)
    model = torch.nn.Module()
    model.backbone = model.head = torch.nn.Identity()
    assert "used_codes" not in common.collapse_metrics(model, data)
    model.scores = lambda z: 1.0 * torch.nn.functional.one_hot(z[:, 0].long(), 128)
    model.temperature = 0.2
    metrics = common.collapse_metrics(model, data)
    assert metrics["used_codes"] == 3
    total = math.exp(5) + 127  # of softmax: the code has exp(1 / 0.2), the others have 1
    entropy = math.log(total) - 5 * math.exp(5) / total
    assert metrics["assignment_entropy"] == pytest.approx(entropy / math.log(128), rel=1e-5)


@pytest.mark.parametrize("n, d", [(40, 100), (100, 40)])
def test_covariance_spectrum_is_numpys(n, d):
    z = 5 + torch.randn(n, d, generator=common.generator(n)).double() * torch.linspace(0.1, 3, d)
    expected = np.linalg.eigvalsh(np.cov(z.numpy().T, bias=True))[::-1][: min(n - 1, d)]
    np.testing.assert_allclose(common.covariance_spectrum(z).numpy(), expected, rtol=1e-9)
    assert not common.covariance_spectrum(torch.full((10, 4), 0.1)).any()


def test_covariance_spectrum_of_a_known_gaussian():
    """Eigenvalues of n >> d draws are the variances, within a few sqrt(2 / n)."""
    variances = torch.tensor([9.0, 4.0, 1.0, 0.25])
    q = torch.linalg.qr(torch.randn(4, 4, generator=common.generator(0)))[0]
    z = torch.randn(100_000, 4, generator=common.generator(1)) * variances.sqrt() @ q + 3
    np.testing.assert_allclose(common.covariance_spectrum(z).numpy(), variances.numpy(), rtol=0.02)


def test_spectrum_auc_closed_forms():
    assert analyze.spectrum_auc(torch.ones(50)) == pytest.approx(51 / 100)
    assert analyze.spectrum_auc(torch.tensor([2.0, 0, 0, 0])) == 1
    assert analyze.spectrum_auc(torch.tensor([3.0, 1.0])) == pytest.approx((3 / 4 + 1) / 2)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.5])
def test_power_law_of_a_constructed_spectrum(alpha):
    ranks = torch.arange(1, 501, dtype=torch.float64)
    assert analyze.power_law(7 * ranks**-alpha) == pytest.approx(alpha, abs=1e-9)
    noisy = ranks**-alpha * torch.exp(0.1 * torch.randn(500, generator=common.generator(0)))
    assert analyze.power_law(noisy.sort(descending=True).values) == pytest.approx(alpha, abs=0.1)
    # Directions that are rounding alone do not tilt the line.
    longer = torch.cat([ranks**-alpha, torch.full((100,), 1e-12)])
    assert analyze.power_law(longer) == pytest.approx(alpha, abs=1e-9)
    assert math.isnan(analyze.power_law(torch.tensor([1.0, 0, 0])))


def gaussian(n, d, seed=0):
    """Draws of a Gaussian of known covariance, and that covariance."""
    a = torch.randn(d, d, generator=common.generator(seed, 1)).double() / d**0.5 + torch.eye(d)
    return torch.randn(n, d, generator=common.generator(seed)).double() @ a.T, a @ a.T


def test_logdet_entropy_of_a_gaussian_is_scipys():
    z, covariance = gaussian(50_000, 6)
    expected = multivariate_normal(cov=covariance.numpy()).entropy()
    assert analyze.logdet_entropy(z, floor=0) == pytest.approx(expected, abs=0.02)


def test_logdet_entropy_is_biased_as_it_says():
    """Too high for what is not Gaussian: log 1 = 0 per dimension of the unit cube; too low for n of
    the size of d."""
    cube = torch.rand(50_000, 3, generator=common.generator(0))
    assert analyze.logdet_entropy(cube, floor=0) / 3 == pytest.approx(
        0.5 * math.log(2 * math.pi * math.e / 12), abs=0.01
    )
    z, covariance = gaussian(60, 30)
    expected = multivariate_normal(cov=covariance.numpy()).entropy()
    assert analyze.logdet_entropy(z, floor=0) < expected - 3


def test_pairwise_entropy_closed_forms_and_bounds():
    noise, d = 0.1, 5
    alone = multivariate_normal(cov=noise * np.eye(d)).entropy()
    assert analyze.pairwise_entropy(torch.ones(20, d), noise) == pytest.approx((alone, alone))
    far = 100 * torch.eye(d).repeat(2, 1) * torch.tensor([1.0] * d + [-1.0] * d)[:, None]
    expected = alone + math.log(2 * d)
    assert analyze.pairwise_entropy(far, noise) == pytest.approx((expected, expected))
    # A Gaussian with the noise added is known; the bounds are on either side, and within log n.
    z = torch.randn(3000, 2, generator=common.generator(0)) * (1 - noise) ** 0.5
    lower, upper = analyze.pairwise_entropy(z, noise)
    assert lower < multivariate_normal(cov=np.eye(2)).entropy() < upper < lower + math.log(3000)


def test_mixture_is_scikit_learns_step_by_step():
    """From the same start the log-likelihood, weights, means and variances after each number of
    steps are equal."""
    rng = common.generator(3)
    x = 2 * torch.randn(5, 4, generator=rng).double()[torch.randint(5, (400,), generator=rng)]
    x = x + torch.randn(400, 4, generator=rng).double()
    start = torch.full((6,), 1 / 6, dtype=torch.float64), x[:6], torch.ones(6, 4).double()
    for steps in (1, 2, 10, 50):
        judge = GaussianMixture(
            6,
            covariance_type="diag",
            tol=0,
            reg_covar=1e-3,
            max_iter=steps,
            weights_init=start[0],
            means_init=start[1],
            precisions_init=1 / start[2],
        )
        with pytest.warns(match="converge"):
            judge.fit(x.numpy())
        (weights, means, variances), likelihood = analyze.fit_mixture(
            x, 6, steps, -1.0, 1e-3, start
        )
        assert likelihood == pytest.approx(judge.lower_bound_, abs=1e-9)
        np.testing.assert_allclose(weights.numpy(), judge.weights_, rtol=1e-6)
        np.testing.assert_allclose(means.numpy(), judge.means_, atol=1e-6)
        np.testing.assert_allclose(variances.numpy(), judge.covariances_, rtol=1e-6)


def test_mixture_in_float32_fits_as_well_as_scikit_learn():
    """From its own start, 50 components on 2,000 points of 30 dimensions: within 2 % of
    scikit-learn's likelihood."""
    rng = common.generator(4)
    x = torch.randn(40, 30, generator=rng)[torch.randint(40, (2000,), generator=rng)]
    x = analyze.unit_variance(x + 0.7 * torch.randn(2000, 30, generator=rng))
    judge = GaussianMixture(50, covariance_type="diag", reg_covar=1e-3, random_state=0).fit(
        x.numpy()
    )
    mixture, likelihood = analyze.fit_mixture(x, 50)
    assert likelihood == pytest.approx(judge.lower_bound_, rel=0.02)
    sampled = -judge.score_samples(judge.sample(10_000)[0]).mean()
    assert analyze.mixture_entropy(mixture) == pytest.approx(sampled, rel=0.02)


def test_mixture_entropy_closed_forms():
    one = torch.ones(1), torch.zeros(1, 3), torch.tensor([[4.0, 1.0, 0.25]])
    expected = multivariate_normal(cov=np.diag([4.0, 1.0, 0.25])).entropy()
    assert analyze.mixture_entropy(one) == pytest.approx(expected, abs=0.05)
    # Components far apart add the entropy of the choice among them.
    shares = torch.tensor([0.5, 0.25, 0.25])
    apart = shares, 1000 * torch.eye(3), torch.tensor([[4.0, 1.0, 0.25]]).expand(3, 3)
    assert analyze.mixture_entropy(apart) == pytest.approx(expected + 1.5 * math.log(2), abs=0.05)


def test_mixture_of_a_known_gaussian_has_its_entropy():
    z = torch.randn(20_000, 8, generator=common.generator(5)) * torch.linspace(0.5, 2, 8)
    expected = multivariate_normal(cov=np.diag(np.linspace(0.5, 2, 8) ** 2)).entropy()
    assert analyze.mixture_entropy(analyze.fit_mixture(z, 10)[0]) == pytest.approx(
        expected, abs=0.1
    )


def test_unit_variance():
    z = 7 + 0.01 * torch.randn(500, 20, generator=common.generator(0)) * torch.linspace(1, 9, 20)
    scaled = analyze.unit_variance(z)
    assert scaled.var(0, correction=0).mean() == pytest.approx(1, abs=1e-4)
    assert scaled.mean(0).abs().max() < 1e-5
    assert not analyze.unit_variance(torch.full((10, 4), 0.1)).any()
