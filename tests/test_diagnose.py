"""The diagnosis on embeddings made to suffer each collapse, alone and with the others."""

import math

import pytest
import torch

import common


def embeddings(n, d, modes, seed=0):
    """Embeddings (n, d) and codes (n,) of 64 that suffer exactly these of "D", "C" and "I", as
    "Collapse-Proof ...", Figure 1, draws them; without any a cloud in all directions whose codes
    are used alike.

    D: in a plane. I: in clusters of a thousandth of their distances; so that their centers span all
    dimensions without D, there are n / 8 of them, with it four. C: three or four codes are used.
    """
    rng = common.generator(seed)
    dims = 2 if "D" in modes else d
    if "I" in modes:
        cluster = torch.arange(n) % (4 if "D" in modes else n // 8)
        centers = torch.randn(n // 8, d, generator=rng)
        if "D" in modes:
            centers = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
        z = centers[cluster] + 1e-3 * torch.randn(n, dims, generator=rng)
        # In the plane without C the 64 codes divide the four clusters.
        codes = cluster % 4 if "C" in modes else torch.arange(n) % 64
    else:
        z = torch.randn(n, dims, generator=rng)
        codes = torch.arange(n) % (3 if "C" in modes else 64)
    if "D" in modes:
        z = z @ torch.linalg.qr(torch.randn(d, dims, generator=rng))[0].T
    return z, codes


CASES = ["", "D", "C", "I", "DC", "DI", "CI", "DCI"]
NAMES = {"D": "dimensional", "C": "cluster", "I": "intracluster"}


@pytest.mark.parametrize("modes", CASES)
@pytest.mark.parametrize("n, d", [(256, 16), (256, 2048), (1000, 128), (10_000, 16), (4000, 2048)])
def test_each_collapse_and_overlap_is_named_and_no_other(n, d, modes):
    z, codes = embeddings(n, d, modes)
    report = common.diagnose(z, codes, 64)
    named = {mode for mode, r in report.items() if r["verdict"] == "collapsed"}
    assert named == {NAMES[mode] for mode in modes}
    assert report.pop("assignment")["verdict"] == "no codes"
    assert {r["verdict"] for r in report.values()} <= {"collapsed", "ok"}
    for r in report.values():
        assert (r["number"] < r["threshold"]) == (r["verdict"] == "collapsed")


@pytest.mark.parametrize("n, d", [(256, 16), (256, 2048), (10_000, 128)])
def test_one_vector_for_all_is_representation_collapse(n, d):
    codes = torch.arange(n) % 64
    for noise in (0, 1e-3):
        z = torch.ones(d) + noise * torch.randn(n, d, generator=common.generator(1))
        report = common.diagnose(z, codes, 64)
        verdicts = [r["verdict"] for r in report.values()]
        assert verdicts == ["collapsed", "implied", "implied", "implied", "no codes"]
    report = common.diagnose(torch.zeros(n, d))
    assert report["representation"]["verdict"] == "collapsed"
    assert report["representation"]["number"] == 0


@pytest.mark.parametrize("modes", CASES)
@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_scale_and_precision_do_not_matter(modes, scale):
    z, codes = embeddings(500, 64, modes, seed=2)

    def verdicts(z):
        return [r["verdict"] for r in common.diagnose(z, codes, 64).values()]

    assert verdicts(scale * z) == verdicts(z)
    assert verdicts(z.bfloat16())[1:3] == verdicts(z)[1:3]


def test_without_codes_cluster_collapse_is_undefined():
    report = common.diagnose(embeddings(300, 16, "")[0])
    assert report["cluster"] == {"number": None, "threshold": 0.5, "verdict": "no codes"}


def test_uniform_assignments_are_named():
    """Scores that are nearly equal are the start of training. Sharp ones have left it, whichever
    code they choose."""
    z, codes = embeddings(300, 16, "")
    scores = torch.randn(300, 64, generator=common.generator(0))
    for temperature, verdict in ((10, "still uniform"), (0.1, "ok")):
        entropy = common.normalised_entropy(scores / temperature)
        p = torch.distributions.Categorical(logits=scores / temperature)
        expected = 1 - p.entropy().mean() / math.log(64)
        report = common.diagnose(z, codes, 64, entropy=entropy)
        assert report["assignment"]["number"] == pytest.approx(expected.item(), abs=1e-6)
        assert report["assignment"]["verdict"] == verdict
        assert {r["verdict"] for mode, r in report.items() if mode != "assignment"} == {"ok"}
    # One vector for all can have sharp assignments too.
    report = common.diagnose(torch.ones(300, 16), codes, 64, entropy=entropy)
    assert report["assignment"]["verdict"] == "ok"


def test_more_codes_than_images():
    """Each image on a code of its own is the most that n images can use of c codes; sqrt(n) codes
    are the threshold."""
    z = embeddings(1000, 16, "")[0]
    report = common.diagnose(z, torch.arange(1000) * 16, 16_384)["cluster"]
    assert report["number"] == pytest.approx(1)
    for used, verdict in ((25, "collapsed"), (40, "ok")):
        report = common.diagnose(z, torch.arange(1000) % used, 16_384)["cluster"]
        assert report["number"] == pytest.approx(math.log(used) / math.log(1000))
        assert report["verdict"] == verdict


def test_rare_codes_hardly_count():
    """All 64 codes in use, but 937 of 1000 images on one of them: exp(entropy) is 1.7 codes."""
    codes = torch.arange(1000).clamp_max(63)
    report = common.diagnose(embeddings(1000, 16, "")[0], codes, 64)["cluster"]
    entropy = -(0.937 * math.log(0.937) + 63 * 0.001 * math.log(0.001))
    assert report["number"] == pytest.approx(entropy / math.log(64))
    assert report["verdict"] == "collapsed"


def test_no_more_dimensions_are_asked_for_than_an_input_has():
    """A plane is a collapse of 16 dimensions, but not where the inputs are points of a plane; a
    line is."""
    for spread, verdict in (([1.0, 1.0], "ok"), ([1.0, 0.01], "collapsed")):
        points = torch.randn(500, 2, generator=common.generator(0)) * torch.tensor(spread)
        z = points @ torch.eye(2, 16)
        z[:, 2:] += 0.001 * torch.randn(500, 14, generator=common.generator(1))
        assert common.diagnose(z)["dimensional"]["verdict"] == "collapsed"
        assert common.diagnose(z, inputs=2)["dimensional"]["verdict"] == verdict
    assert common.diagnose(z, inputs=768) == common.diagnose(z)


def test_an_outlier_is_no_cluster():
    z = embeddings(1000, 16, "")[0]
    z[0] = 1e3
    assert common.diagnose(z)["intracluster"]["verdict"] == "ok"


def test_too_few_embeddings():
    with pytest.raises(ValueError, match="at least 4"):
        common.diagnose(torch.ones(3, 2))
    assert common.diagnose(torch.eye(4))["intracluster"]["number"] == pytest.approx(1)


def test_cluster_gap_closed_forms():
    """On a line the ratios r_k / r_{k+1} are U^(1/k), independent, so P(min > t) = Π (1 - t^k), a
    half at t = 0.36."""
    line = torch.rand(10_000, 1, generator=common.generator(0), dtype=torch.float64)
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    survival = (1 - t[:, None] ** torch.arange(1, 200)).prod(1)
    median = t[(survival - 0.5).abs().argmin()].item()
    assert common.cluster_gap(line) == pytest.approx(median, abs=0.03)
    # Pairs at distance 0.1, each 3 away from the next pair: the jump is from 0.1 to 3.
    pairs = 3.1 * torch.arange(50).repeat_interleave(2) + 0.1 * (torch.arange(100) % 2)
    assert common.cluster_gap(pairs[:, None]) == pytest.approx(0.1 / 3, rel=1e-4)
    assert common.cluster_gap(torch.eye(5).repeat(4, 1)) == 0
    assert common.cluster_gap(torch.ones(10, 3)) == 0
