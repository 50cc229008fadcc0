"""Features and embeddings from elsewhere: analyze.py and evaluate.py on .npy and .npz files, and
the metrics on numpy arrays."""

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image

import analyze
import common
import evaluate

QUICK = ["--device", "cpu", "--components", "2", "--images", "60"]
CPU = ["--device", "cpu"]
with io.BytesIO() as png:
    Image.new("RGB", (2, 2)).save(png, "png")
    PIXEL = png.getvalue()


@pytest.fixture
def nothing_drawn(monkeypatch):
    """Pictures are made, but not drawn, which would take most of the time."""
    monkeypatch.setattr(analyze, "as_png", lambda figure: PIXEL)


def clusters(n=90, d=8, seed=0):
    """Embeddings (n, d) float64 around three centers, and the labels (n,)."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, n)
    centers = 2 * rng.normal(size=(3, d))
    return centers[labels] + 0.3 * rng.normal(size=(n, d)), labels


def rows_of(run, *words):
    result = run("evaluate", *words, *CPU, "--json")
    assert result.code == 0, result.err
    return json.loads(result.out)


def test_one_array_is_enough(run):
    z, _ = clusters()
    np.save("a.npy", z)
    np.savez("b.npz", anything=z.astype(np.float32))
    np.savez("c.npz", embeddings=z.astype(">f8"))
    rows = rows_of(run, "a.npy", "b.npz", "c.npz")
    for row in rows:
        assert row["rank"] == pytest.approx(common.effective_rank(z), rel=1e-4)
        assert row["center_norm"] == pytest.approx(common.center_norm(z), rel=1e-4)
        assert row["used"] == row["clusters"] == 10
        assert not row.keys() & {"linear", "knn", "nmi", "method", "dataset", "epoch"}

    result = run("analyze", "a.npy", "b.npz", *QUICK)
    assert result.code == 0, result.err
    assert result.out.splitlines()[1:] == [
        "a.npy: no collapse (embedding of 60 images)",
        "b.npz: no collapse (embedding of 60 images)",
    ]
    report = json.loads(Path("report/report.json").read_text())
    assert report["a.npy"]["images"] == 60
    assert report["a.npy"]["diagnosed"] == "embedding"
    assert report["a.npy"]["dimensions"] == {"embedding": 8}
    pictures = {path.stem for path in Path("report").glob("*.png")}
    assert pictures == {"spectra", "entropy", "tsne", "matrices-a.npy", "matrices-b.npz"}
    page = Path("report/report.html").read_text()
    assert "a.npy" in page and "Curves" not in page


def test_labels_are_halved_for_the_probe(run, nothing_drawn):
    z, labels = clusters()
    names = np.array(["cat", "$dog_", "b"])[labels]
    np.savez("numbers.npz", z=z, labels=labels + 10**12)
    np.savez("names.npz", z=z, labels=names)
    numbers, named = rows_of(run, "numbers.npz", "names.npz")
    assert numbers["halves"] and numbers["training_images"] == 45
    assert numbers["linear"] == named["linear"] == 1
    assert numbers["knn"] == numbers["nmi"] == 1
    assert numbers["clusters"] == 3
    # The probe has not seen what it is tested on.
    rng = np.random.default_rng(1)
    np.savez("noise.npz", z=rng.normal(size=(400, 8)), labels=rng.integers(0, 2, 400))
    (noise,) = rows_of(run, "noise.npz")
    assert noise["linear"] < 0.7 and noise["knn"] < 0.7

    result = run("evaluate", "names.npz", *CPU)
    assert "half of the rows train the probe" in result.out
    assert run("analyze", "names.npz", *QUICK).code == 0
    first, second = evaluate.half_and_half(5)
    assert sorted([*first.tolist(), *second.tolist()]) == [0, 1, 2, 3, 4]


def test_saved_features_give_the_figures_of_their_checkpoint(run, nothing_drawn):
    for method, flags in (("cplearn", ["--c", "64"]), ("vicreg", [])):
        assert run(method, *TINY, *flags, "--epochs", "2", "--out", method).code == 0
    networks = rows_of(run, "cplearn", "vicreg", "--save-features", "f")
    files = [row.pop("saved") for row in networks]
    # Clusters of k-means depend on float32's rounding no more than their number does.
    for network, file in zip(networks, rows_of(run, *files), strict=True):
        for name in file.keys() - {"checkpoint"}:
            assert file[name] == network[name], name

    result = run("analyze", "cplearn", *files, *QUICK)
    assert result.code == 0, result.err
    network, file, _ = json.loads(Path("report/report.json").read_text()).values()
    assert file["diagnosis"] == network["diagnosis"]
    assert file["clusters"] == network["clusters"]
    assert set(np.load(files[0])["classes"]) == {"0", "1", "2"}


def test_names_of_images_are_saved(tmp_path):
    x = torch.ones(4, 2)
    data = common.Data(x, None, x, None, [], x[0], x[0], size=8)
    data.train_names = ["a/1.png", "2.png", "ä.png", "4.png"]
    data.test_names = ["5.png", "6.png", "7.png", "8.png"]
    out = {"features": x}
    evaluate.save_features(tmp_path / "f.npz", "path", out, out, data, None)
    saved = np.load(tmp_path / "f.npz")
    assert saved["train_names"].tolist() == data.train_names
    assert saved["test_names"].tolist() == data.test_names


def positive(n=60, d=64, seed=0):
    """Living features after a ReLU: means and deviations as those of a ResNet-18."""
    rng = np.random.default_rng(seed)
    scale = rng.uniform(0.3, 1, d)
    return np.maximum(0, scale * (1 + 0.45 * rng.normal(size=(n, d)))).astype(np.float32)


def test_features_after_a_relu_have_a_rule_of_their_own():
    x = positive()
    assert common.diagnose(x)["representation"]["verdict"] == "collapsed"
    assert common.diagnose(x, array="features")["representation"]["verdict"] == "ok"
    nearly_one = x.mean(0) + 0.1 * (x - x.mean(0))
    for dead in (nearly_one, np.ones_like(x), np.zeros_like(x)):
        report = common.diagnose(dead, array="features")
        assert report["representation"]["verdict"] == "collapsed"
    assert common.describe(common.diagnose(nearly_one, array="features"), "features").startswith(
        "representation collapse: the features' variance is 0.0"
    )
    assert common.variance_share(np.ones((5, 3))) == 0
    assert common.variance_share(np.array([[1.0, 0], [-1, 0]])) == 1


def test_it_is_said_which_array_was_diagnosed(run, nothing_drawn):
    x = positive()
    signed = (x - x.mean(0)) @ np.random.default_rng(0).normal(size=(64, 32))
    np.save("relu.npy", x)
    np.savez("named.npz", features=signed)
    np.savez("both.npz", features=x, embedding=signed)
    np.savez("split.npz", train_features=x, test_features=x[:50], test_codes=np.arange(50))
    np.save("one.npy", x.mean(0) + 0.1 * (x - x.mean(0)))
    names = ["relu.npy", "named.npz", "both.npz", "split.npz", "one.npy"]
    result = run("analyze", *names, *QUICK)
    assert result.code == 0, result.err
    lines = result.out.splitlines()[1:]
    for name, line, array in zip(names, lines, ["features"] * 2 + ["embedding"], strict=False):
        assert line == f"{name}: no collapse ({array} of {len(x)} images)"
    assert lines[3] == "split.npz: no collapse (features of 50 images)"
    assert lines[4].startswith("one.npy: representation collapse: the features' variance")
    report = json.loads(Path("report/report.json").read_text())
    assert report["relu.npy"]["representation"] == "variance / mean square"
    assert report["both.npz"]["representation"] == "1 - center_norm²"
    assert report["both.npz"]["dimensions"] == {"embedding": 32, "features": 64}
    # How many codes there are is not known.
    assert report["split.npz"]["diagnosis"]["cluster"]["verdict"] == "no codes"
    assert report["split.npz"]["clusters"] == {"by": "codes", "used": 50, "of": None}
    assert "0.1 or 0.2" in Path("report/report.html").read_text()


def test_files_stand_beside_checkpoints(run, nothing_drawn):
    assert run("simsiam", *TINY, "--epochs", "1", "--out", "run").code == 0
    z, labels = clusters()
    Path("other").mkdir()
    np.savez("x.npz", z=z, labels=labels)
    np.savez("other/x.npz", z=z)
    result = run("evaluate", "run", "x.npz", "other/x.npz", "--untrained", *CPU)
    assert result.code == 0, result.err
    assert [line.split()[0] for line in result.out.splitlines()[1:]] == [
        *("run", "run", "x.npz", "other/x.npz"),
    ]
    flags = ["--untrained", *QUICK]
    result = run("analyze", "run", "x.npz", "other/x.npz", *flags)
    assert result.code == 0, result.err
    report = json.loads(Path("report/report.json").read_text())
    home = Path.cwd().name
    assert [label.removeprefix(f"{home}/") for label in report] == [
        *("run (untrained)", "run", "x.npz", "other/x.npz"),
    ]
    assert report["other/x.npz"]["images"] == 60


def test_wrong_files_are_refused_in_one_line(run):
    z, labels = clusters()

    def error_of(file):
        error = run("evaluate", file).error
        assert run("analyze", file, *QUICK).error.split(": ", 1)[1] == error.split(": ", 1)[1]
        return error

    assert "there is no file 'nothing.npz'" in error_of("nothing.npz")
    np.savez("two.npz", a=z, b=z, c=labels)
    error = error_of("two.npz")
    assert "has a (90, 8), b (90, 8), c (90,): expected one array (n, d)" in error
    np.savez("none.npz")
    assert "has no arrays" in error_of("none.npz")
    np.save("flat.npy", labels)
    assert "has (90,): expected one array (n, d)" in error_of("flat.npy")
    np.save("deep.npy", np.ones((5, 4, 3)))
    assert "has (5, 4, 3)" in error_of("deep.npy")
    np.savez("deep.npz", features=np.ones((5, 4, 3)))
    assert "the array 'features' is (5, 4, 3) of float64, expected numbers" in error_of("deep.npz")
    np.save("words.npy", np.array([["a"] * 3] * 5))
    assert "of <U1, expected numbers" in error_of("words.npy")
    np.save("complex.npy", z + 1j)
    assert "expected numbers" in error_of("complex.npy")

    broken = z.copy()
    broken[3, 1] = math.nan
    broken[7] = math.inf
    np.save("nan.npy", broken)
    assert "2 of the 90 rows of the array hold NaN or infinite numbers" in error_of("nan.npy")
    np.savez("large.npz", features=1e300 * z)
    assert "90 of the 90 rows" in error_of("large.npz")

    np.save("few.npy", z[:3])
    assert "has 3 rows: at least 4" in error_of("few.npy")
    np.save("zero.npy", z[:0])
    assert "has 0 rows: at least 4" in error_of("zero.npy")
    np.savez("labels.npz", z=z, labels=labels[1:])
    assert "labels is (89,) of int64, expected (90,)" in error_of("labels.npz")
    np.savez("soft.npz", z=z, labels=labels + 0.5)
    assert "whole numbers or names" in error_of("soft.npz")
    np.savez("dims.npz", train_features=z, test_features=z[:, 1:])
    assert "as many dimensions" in error_of("dims.npz")
    np.savez("kinds.npz", train_embedding=z, test_features=z)
    assert "in one of train_ and test_ only" in error_of("kinds.npz")
    np.savez("rows.npz", features=z, embedding=z[1:])
    assert "different length" in error_of("rows.npz")

    Path("text.npy").write_text("1 2 3")
    assert "damaged or not an .npy or .npz file" in error_of("text.npy")
    whole = Path("labels.npz").read_bytes()
    Path("half.npz").write_bytes(whole[: len(whole) // 2])
    assert "damaged or not" in error_of("half.npz")
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 255
    Path("flipped.npz").write_bytes(flipped)
    assert "damaged or not" in error_of("flipped.npz")
    Path("folder.npy").mkdir()
    assert "damaged or not" in error_of("folder.npy")
    assert not Path("report").exists()


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("code-was-run"),)


def test_no_code_in_a_file_is_run(run):
    bomb = np.array([[Bomb()] * 3] * 5, dtype=object)
    np.save("bomb.npy", bomb, allow_pickle=True)
    np.savez("bomb.npz", z=bomb)
    for file in ("bomb.npy", "bomb.npz"):
        assert "arrays of objects, which are not read" in run("evaluate", file).error
        assert "arrays of objects, which are not read" in run("analyze", file, *QUICK).error
    assert not Path("code-was-run").exists()


def test_metrics_take_numpy_arrays():
    z, labels = clusters()
    t = torch.from_numpy(z)
    for metric in (
        *(common.center_norm, common.effective_rank, common.average_correlation),
        *(common.cluster_gap, common.variance_share, analyze.logdet_entropy),
        *(analyze.pairwise_entropy,),
    ):
        assert metric(z) == metric(t), metric
    assert torch.equal(common.covariance_spectrum(z), common.covariance_spectrum(t))
    assert torch.equal(analyze.unit_variance(z), analyze.unit_variance(t))
    codes = labels % 2
    entropy = np.full(90, 0.5)
    expected = common.diagnose(t, torch.from_numpy(codes), 2, None, torch.from_numpy(entropy))
    assert common.diagnose(z, codes, 2, None, entropy) == expected
    z, other = z.astype(np.float32), labels.astype(np.int32)
    assert common.knn_accuracy(z, other, z, other) == 1
    assert evaluate.linear_probe(z, labels, z, labels) == 1
    assert len(evaluate.kmeans(z, 3)[0]) == 90
