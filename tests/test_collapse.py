"""With its mechanism each method stays alive, without it it collapses: runs of a second on points
in the plane.

Each case is what a paper claims, on the toy of "The Common Stability Mechanism ...", Section 3.2:
three classes, two views are two points of one class. Batch norm in a head by itself prevents some
collapses, so it is taken out where the claim is about something else. Where a claim does not hold
on the toy, the test says so and pins down what does happen.

`named` are the collapses that `diagnose` finds in most of the seeds: none in a living run. Most
runs have one seed, with `--long` all have three.
"""

import argparse
import json
import math
from collections import Counter
from pathlib import Path
from statistics import mean

import pytest
import torch
from cases import CASES
from conftest import METHODS, TINY, tiny

import common
import evaluate


@pytest.fixture
def train(run, long, tmp_path, monkeypatch):
    """train(method, *flags, batch_norm=...) -> the log's last line after 30 epochs, averaged over
    seeds; `named`."""

    def call(method, *flags, dataset="moons", batch_norm="all", seeds=(0,), epochs=30):
        class Without(torch.nn.BatchNorm1d):
            def forward(self, x):
                # One without weights is SimSiam's last. All others have weights.
                place = "hidden" if self.affine else "output"
                if batch_norm in ("all", place):
                    return super().forward(x)
                return x

        lines, named = [], Counter()
        seeds = (0, 1, 2) if long else seeds
        for seed in seeds:
            out = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
            sparse = ["--eval-every", 100, "--save-every", 100]
            own = ["--dataset", dataset, "--epochs", epochs, "--seed", seed, "--out", out]
            with monkeypatch.context() as patch:
                if batch_norm != "all":
                    patch.setattr(torch.nn, "BatchNorm1d", Without)
                result = run(method, *TINY, *own, *sparse, *flags)
                assert result.code == 0, result.err
                lines.append(json.loads((out / "log.jsonl").read_text().splitlines()[-1]))
                named.update(diagnosis(out))
        numbers = lines[0].keys() - {"verdict"}
        averages = {name: mean(line[name] for line in lines) for name in numbers}
        return averages | {"named": {mode for mode, n in named.items() if n > len(seeds) / 2}}

    return call


def read(folder):
    """The trained model of a run and its data."""
    state, cpu = common.load_checkpoint(folder), torch.device("cpu")
    args = argparse.Namespace(**state["args"])
    return evaluate.build_model(state, cpu), common.load_data(args, cpu)


def diagnosis(folder):
    """The collapses that are found in a run's test embeddings."""
    model, data = read(folder)
    test = common.extract(model, data.test_images, data)
    clusters = common.count_codes(model, test["embedding"])
    inputs = data.test_images[0].numel()
    report = common.diagnose(test["embedding"], test.get("codes"), clusters, inputs)
    return {mode for mode, entry in report.items() if entry["verdict"] == "collapsed"}


# --- with the method's own defaults


def separation(model, data):
    """How much more alike are the test embeddings of two points of one class than of two classes:
    the difference of their mean cosines. It is 0 where all embeddings are one point."""
    embedding = common.extract(model, data.test_images, data)["embedding"]
    u = torch.nn.functional.normalize(embedding.double(), dim=1)
    cosines = u @ u.T
    same = data.test_labels[:, None] == data.test_labels
    others = ~torch.eye(len(u), dtype=torch.bool)
    return (cosines[same & others].mean() - cosines[~same].mean()).item()


@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns(name, run):
    """With nothing but its defaults, ten epochs pull the classes of the blobs apart."""
    flags = ["--dataset", "blobs", "--device", "cpu", "--epochs", 10, "--eval-every", 10]
    result = run(name, *flags, "--out", "r")
    assert result.code == 0, result.err
    trained, data = read("r")
    untrained = evaluate.build_model(common.load_checkpoint("r"), torch.device("cpu"), False)
    assert separation(trained, data) > separation(untrained, data) + 0.2


# --- with and without the mechanism


def byol(alive, dead):
    assert alive["center_norm"] < 0.8


def center_vector(alive, dead):
    assert alive["center_norm"] < 0.4 and dead["--center-weight 0"]["center_norm"] > 0.99


def cplearn(alive, dead):
    """Figure 12: a large beta leaves one code for nearly all images, at the price log c of total
    collapse."""
    drowned = dead["--beta 10"]
    assert alive["used_codes"] > 15 and drowned["used_codes"] <= 2
    assert drowned["prior"] == pytest.approx(math.log(64), abs=0.7)


def dino(alive, dead):
    """Figure 7: without centering few codes for all, entropy near 0."""
    assert 0.04 < alive["entropy"] < 0.95 * math.log(8) and alive["used_codes"] >= 3
    one_code = dead["--no-centering"]
    assert one_code["entropy"] < alive["entropy"] / 2 and one_code["used_codes"] <= 2


def gedi(alive, dead):
    assert alive["used_codes"] > 6 and dead["--prior-weight 0"]["used_codes"] < 4


def mcr2(alive, dead):
    """Three classes at right angles, which is what the loss asks for, have a center norm of
    1 / sqrt(3)."""
    assert alive["center_norm"] < 0.62


def self_classifier(alive, dead):
    assert alive["used_codes"] > 4 and dead["--no-column-softmax"]["used_codes"] < 2


def simclr(alive, dead):
    """Negatives spread the embeddings: their mean is near 0. Alignment alone is 1 at its best."""
    assert alive["center_norm"] < 0.15
    alone = dead["--no-negatives"]
    assert alone["center_norm"] > 0.98 and alone["loss"] == alone["alignment"]


def simsiam(alive, dead):
    """Without output batch norm the center norm rises to 1 when predictor or stop-gradient is
    missing (center-vector paper, Figure 4), and the loss is lower than alive."""
    assert alive["center_norm"] < 0.75 and alive["effective_rank"] > 5
    for line in dead.values():
        assert line["center_norm"] > 0.98 and line["loss"] < -0.99 < alive["loss"]
        assert line["named"] == {"representation"}


def swav(alive, dead):
    assert alive["used_codes"] >= 15 and alive["center_norm"] < 0.8
    assert dead["--no-sinkhorn"]["used_codes"] <= 2


def triplet(alive, dead):
    assert alive["center_norm"] < 0.5 and dead["--negatives none"]["center_norm"] > 0.99


def vicreg(alive, dead):
    """Report, Figure 8: without variance total collapse, without covariance dimensional
    collapse."""
    total, dimensional = dead["--variance-weight 0"], dead["--covariance-weight 0"]
    assert alive["variance"] < 0.4 and alive["correlation"] < 0.75
    assert total["variance"] > 0.95 and total["center_norm"] > 0.99
    assert dimensional["variance"] < 0.1 and dimensional["correlation"] > 0.95
    assert total["named"] == {"representation"} and dimensional["named"] == {"dimensional"}


def wmse(alive, dead):
    assert alive["correlation"] < 0.5 and alive["effective_rank"] > 4.5
    assert alive["center_norm"] < 0.6


# Further claims of a method's paper about these runs: f(alive, dead), dead by flags.
CLAIMS = {
    "byol": byol,
    "center_vector": center_vector,
    "cplearn": cplearn,
    "dino": dino,
    "gedi": gedi,
    "mcr2": mcr2,
    "self_classifier": self_classifier,
    "simclr": simclr,
    "simsiam": simsiam,
    "swav": swav,
    "triplet": triplet,
    "vicreg": vicreg,
    "wmse": wmse,
}


@pytest.mark.parametrize("name", [name for name in METHODS if CASES[name].collapses])
def test_lives_with_its_mechanism_and_collapses_without(name, train):
    case, dead = CASES[name], {}
    own, setting = case.alive.split(), {"batch_norm": case.batch_norm, "seeds": case.seeds}
    alive = train(name, *own, **setting)
    assert not alive["named"]
    for flags, mode in case.collapses.items():
        dead[flags] = train(name, *own, *flags.split(), **setting)
        assert mode in dead[flags]["named"], flags
        if mode == "representation":
            assert dead[flags]["center_norm"] > 0.9
        elif mode == "dimensional":
            assert dead[flags]["effective_rank"] < 2 < alive["effective_rank"]
        else:
            assert dead[flags]["used_codes"] < alive["used_codes"]
    if name in CLAIMS:
        CLAIMS[name](alive, dead)


# --- what else is claimed


def test_simsiam_with_output_batch_norm_collapses_into_one_dimension_instead(train):
    """Batch norm after the projector keeps the center norm low, whatever is taken away; the rank
    falls instead: to a line where it is the only one, to about the plane that three classes span
    where hidden layers have theirs too."""
    alive, sparse = (train("simsiam", batch_norm=kept) for kept in ("all", "output"))
    assert (
        alive["center_norm"] < 0.4
        and sparse["center_norm"] < 0.4
        and not alive["named"]
        and not sparse["named"]
    )
    for flag in ("--no-predictor", "--no-stop-gradient"):
        dead = train("simsiam", flag)
        assert (
            dead["center_norm"] < 0.4 and dead["effective_rank"] < 3 < 5 < alive["effective_rank"]
        )
        assert dead["correlation"] > 0.65 > alive["correlation"]
        dead = train("simsiam", flag, batch_norm="output")
        assert (
            dead["center_norm"] < 0.5
            and dead["effective_rank"] < 2 < 2.6 < sparse["effective_rank"]
        )
        assert dead["correlation"] > sparse["correlation"] and dead["named"] == {"dimensional"}


def test_center_vector_lives_by_its_penalty_on_blobs_too(train):
    alive = train("center_vector", dataset="blobs", batch_norm="none")
    dead = train("center_vector", "--center-weight", "0", dataset="blobs", batch_norm="none")
    assert alive["center_norm"] < 0.4 and dead["center_norm"] > 0.99
    assert not alive["named"] and dead["named"] == {"representation"}


def test_center_vector_is_kept_short_by_its_unsquared_norm_too(train):
    """Eq. 32 read as ||s||, not ||s||²."""
    assert train("center_vector", "--penalty", "norm", batch_norm="none")["center_norm"] < 0.4


def test_center_vector_is_as_good_as_simsiam_on_the_toy(train):
    """Figure 3 has it clearly better than SimSiam; here both find the classes equally well, within
    3 % of kNN."""
    simple, simsiam = train("center_vector")["knn"], train("simsiam")["knn"]
    assert simple > 0.9 and simsiam > 0.9 and abs(simple - simsiam) < 0.03


def test_barlow_twins_at_lambda_0_lives_through_batch_norm_but_worse(train, tmp_path):
    """Figure 5: no collapse at lambda 0, lower quality (here: rank); batch norm is what removes the
    center vector."""
    full = train("barlow_twins", dataset="blobs")
    bare = train("barlow_twins", "--lambda-offdiag", "0", dataset="blobs")
    assert bare["knn"] > 0.95 and bare["center_norm"] < 0.75
    assert bare["effective_rank"] < full["effective_rank"]
    assert not bare["named"] and not full["named"]
    for folder in sorted(tmp_path.iterdir()):
        model, data = read(folder)
        z = common.extract(model, data.images, data)["embedding"]
        after = torch.nn.functional.batch_norm(z, None, None, training=True)
        assert common.center_norm(z) > 0.3 and common.center_norm(after) < 0.15


def test_wmse_with_batch_norm_for_whitening_collapses_into_few_dimensions(train):
    """W-MSE paper: standardising instead of whitening leaves dimensional collapse.

    With batch norm in the hidden layer the plane remains that three classes span; without it less
    does. (Cholesky cannot be compared there: embeddings of points in the plane come to fill less
    than its eight dimensions.)
    """
    dead = train("wmse", "--whitening", "batchnorm")
    assert dead["correlation"] > 0.7 and dead["effective_rank"] < 3
    dead = train("wmse", "--whitening", "batchnorm", batch_norm="none")
    assert dead["effective_rank"] < 2 and "dimensional" in dead["named"]


def test_swav_with_fixed_prototypes_lives(train):
    """Center-vector paper, Figure 6: fixed random prototypes do not collapse."""
    flags = ["--prototypes", "32", "--queue", "0", "--freeze-prototypes"]
    alive = train("swav", *flags, batch_norm="none")
    assert alive["used_codes"] >= 15 and alive["center_norm"] < 0.8 and not alive["named"]


def test_dino_without_sharpening_stays_uniform(train):
    """The other collapse of Figure 7: all codes alike, entropy log c."""
    uniform = train("dino", "--prototypes", "8", "--teacher-temperature", "1")
    assert uniform["entropy"] > 0.999 * math.log(8) and uniform["divergence"] < 0.001
    assert uniform["assignment_entropy"] > 0.999


def test_byol_does_not_need_its_momentum_on_the_toy(train):
    """Figure 7 has a center norm that rises as the momentum falls. On the toy it does not."""
    fast, slow = (train("byol", "--momentum", m) for m in ("0", "0.99"))
    assert abs(fast["center_norm"] - slow["center_norm"]) < 0.15
    assert max(fast["center_norm"], slow["center_norm"]) < 0.8
    assert not fast["named"] and not slow["named"]


def test_cplearn_without_agreement_uses_its_codes(train):
    """Figure 12: at beta 0 two codes are left. On the toy it uses most of them, only without the
    views agreeing."""
    alive = train("cplearn", batch_norm="none")
    alone = train("cplearn", "--beta", "0", batch_norm="none")
    assert alone["used_codes"] > 15 and alone["prior"] < alive["prior"]
    assert alone["invariance"] > alive["invariance"] and not alone["named"]


def test_simclr_at_a_high_temperature_spreads_embeddings_too(train):
    """On the toy even at a temperature that weighs all negatives alike."""
    flat = train("simclr", "--temperature", "100")
    assert flat["center_norm"] < 0.15 and not flat["named"]


def test_gedi_makes_its_density_that_of_the_points(run):
    """With the generative term samples lie as near to the points as points lie to each other, and
    noise does not."""
    flags = [*tiny("gedi"), "--generative-weight", "1", "--epochs", "15"]
    assert run("gedi", *flags, "--out", "r").code == 0
    model, data = read("r")
    points = data.normalise(data.images)
    samples = model.samples[torch.randperm(10000)[:1000]]

    def distance(x):
        return torch.cdist(x, points).amin(1).median().item()

    assert distance(samples) < 0.7 * distance(torch.randn(1000, 2))
    assert distance(samples) < 2 * distance(data.normalise(data.test_images))


def test_wmse_of_a_singular_covariance_stops_the_run(run, tmp_path):
    """More dimensions than the points span: one line instead of a factorisation's traceback."""
    flags = [*TINY, "--epochs", "1", "--embedding-dim", "64", "--part-size", "128", "--width", "2"]
    result = run("wmse", *flags, "--out", "a")
    assert result.code == 1 and "nan" in result.err and len(result.err.strip().splitlines()) == 1


def test_embeddings_that_are_not_finite_stop_the_run(run, tmp_path, monkeypatch):
    """Also where every loss was finite and only the last step broke the network: one line, no
    checkpoint of it."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.fill_(math.nan)

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    result = run("barlow_twins", *TINY, "--batch-size", "1500", "--epochs", "1", "--out", "a")
    assert result.code == 1 and "center_norm is nan in epoch 1" in result.err
    assert len(result.err.strip().splitlines()) == 1 and not (tmp_path / "a" / "last.pt").exists()


# --- on images


@pytest.fixture
def shapes(long, monkeypatch):
    """Flags for runs on the drawn shapes: all 5000 with `--long`, and a fifth of them otherwise, in
    as many steps."""
    flags = "--dataset shapes --backbone resnet8 --projector-dim 64 --device cpu --eval-every 100"
    if long:
        return [*flags.split(), "--batch-size", "250"]
    draw = common.draw_shapes
    monkeypatch.setattr(common, "draw_shapes", lambda n, size, seed: draw(n // 5, size, seed))
    return [*flags.split(), "--batch-size", "50"]


@pytest.mark.parametrize(
    "method, flags",
    [
        ("vicreg", ""),
        ("swav", "--prototypes 64 --queue 0"),
        ("cplearn", "--c 512"),
        ("barlow_twins", ""),
    ],
)
def test_diagnosis_on_images(run, shapes, long, method, flags):
    """A living run is named nothing, without its mechanism the collapse it prevents, of all images.

    Not among the cases: W-MSE with batch norm for whitening, dimensional on the toys, here so with
    one of three seeds; and BYOL, DINO and the center vector, which these few steps leave with ranks
    of 5 to 9, and which are named for it.
    """
    flags = [*shapes, *flags.split(), "--epochs", "5"]
    assert run(method, *flags, "--out", "alive").code == 0
    assert diagnosis("alive") == set()
    for taken_away, mode in CASES[method].collapses.items() if long else ():
        assert run(method, *flags, *taken_away.split(), "--out", taken_away).code == 0
        assert diagnosis(taken_away) == {mode}


@pytest.mark.parametrize("epsilon, verdict", [("0.05", "still uniform"), ("0.02", "ok")])
def test_uniform_assignments_of_swav_on_images(run, shapes, epsilon, verdict):
    """With the published epsilon SwAV stays at equal scores on these images, loss log 64. With 0.02
    it leaves."""
    flags = [*shapes, "--epochs", "3", "--epsilon", epsilon]
    assert run("swav", *flags, "--out", "a").code == 0
    last = json.loads(Path("a", "log.jsonl").read_text().splitlines()[-1])
    uniform = verdict == "still uniform"
    assert (last["assignment_entropy"] > 0.99) == uniform
    assert (last["loss"] > 4.1) == uniform
    model, data = read("a")
    test = common.extract(model, data.test_images, data)
    inputs = data.test_images[0].numel()
    report = common.diagnose(test["embedding"], test["codes"], 64, inputs, test["entropy"])
    assert report["assignment"]["verdict"] == verdict
