"""Collapse metrics against closed forms, numpy and scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score
from sklearn.neighbors import KNeighborsClassifier

import common


def test_center_norm_closed_forms():
    z = torch.randn(1, 16).expand(50, 16)
    assert common.center_norm(3 * z) == pytest.approx(1)
    assert common.center_norm(torch.cat([z, -z])) == pytest.approx(0, abs=1e-12)
    # Two orthogonal directions in equal shares: the mean is (1/2, 1/2).
    assert common.center_norm(torch.eye(2).repeat(10, 1)) == pytest.approx(np.sqrt(0.5))
    # Independent directions: E ||mean||² = 1 / n.
    norms = [common.center_norm(torch.randn(100, 64, generator=common.generator(i))) ** 2 for i in range(50)]
    assert np.mean(norms) == pytest.approx(1 / 100, rel=0.1)


def test_effective_rank_closed_forms():
    q = torch.linalg.qr(torch.randn(200, 9, dtype=torch.float64))[0]
    q = torch.linalg.qr(q - q.mean(0))[0]
    assert common.effective_rank(q) == pytest.approx(9)
    assert common.effective_rank(5 + 1e-3 * q) == pytest.approx(9)
    assert common.effective_rank(q[:, :1] @ torch.randn(1, 30, dtype=torch.float64)) == pytest.approx(1, abs=1e-5)
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
    z = torch.randn(60, 7, generator=common.generator(0)) @ torch.randn(7, 7, generator=common.generator(1))
    corr = np.abs(np.corrcoef(z.double().numpy().T))
    assert common.average_correlation(z) == pytest.approx((corr.sum() - 7) / 42)
    column = torch.randn(60, 1)
    assert common.average_correlation(column * torch.tensor([1.0, -2.0, 3.0])) == pytest.approx(1)
    assert common.average_correlation(torch.full((9, 5), 0.3)) == 1
    assert common.average_correlation(column) == 0


def test_nmi_and_ami_are_scikit_learns_on_200_random_labelings():
    rng = np.random.default_rng(0)
    for _ in range(200):
        n = int(rng.integers(2, 300))
        a, b = (rng.integers(0, rng.integers(1, n + 1), n) for _ in range(2))
        if rng.random() < 0.3:
            b = np.where(rng.random(n) < 0.8, a, b)
        ta, tb = torch.from_numpy(a), torch.from_numpy(b)
        assert common.nmi(ta, tb) == pytest.approx(normalized_mutual_info_score(a, b), abs=1e-9)
        assert common.ami(ta, tb) == pytest.approx(adjusted_mutual_info_score(a, b), abs=1e-6)


def test_nmi_of_chance_is_shown_and_ami_removes_it():
    """10,000 images of 10 classes on 16,384 random codes: NMI above a third though there is nothing to be found."""
    rng = common.generator(0)
    labels, codes = torch.arange(10_000) % 10, torch.randint(16_384, (10_000,), generator=rng)
    score = common.nmi(codes, labels)
    assert score > 0.33
    assert common.nmi_shuffled(codes, labels) == pytest.approx(score, abs=5e-3)
    assert common.ami(codes, labels) == pytest.approx(0, abs=5e-3)
    sorted_codes = labels * 1000
    assert common.nmi(sorted_codes, labels) == pytest.approx(1)
    assert common.nmi_shuffled(sorted_codes, labels) < 0.01


def test_knn_is_scikit_learns_weighted_vote():
    rng = common.generator(0)
    bank, queries = torch.randn(300, 8, generator=rng), torch.randn(120, 8, generator=rng)
    bank_labels, labels = (torch.randint(5, (n,), generator=rng) for n in (300, 120))
    for k, temperature in ((1, 0.1), (20, 0.1), (200, 0.05)):
        judge = KNeighborsClassifier(k, metric="cosine", weights=lambda d, t=temperature: np.exp((1 - d) / t))
        judge.fit(bank.numpy(), bank_labels.numpy())
        expected = judge.score(queries.numpy(), labels.numpy())
        assert common.knn_accuracy(bank, bank_labels, queries, labels, k, temperature) == pytest.approx(expected)
    assert common.knn_accuracy(bank, bank_labels, bank, bank_labels, k=1) == 1
    assert 0 <= common.knn_accuracy(bank[:3], bank_labels[:3], queries, labels) <= 1  # fewer images than neighbours


def test_used_codes():
    assert common.used_codes(torch.tensor([5, 5, 7, 100])) == 3
