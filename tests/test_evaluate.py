"""evaluate.py: each part against scikit-learn, and the command as it is typed."""

import argparse
import io
import json
import math
import shutil
import zipfile
from functools import partial
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from cases import CASES
from conftest import METHODS, tiny
from PIL import Image
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

import common
import evaluate


def test_linear_probe_is_a_logistic_regression():
    rng = torch.Generator().manual_seed(0)
    centers = 0.8 * torch.randn(5, 20, generator=rng)
    labels, test_labels = (torch.randint(5, (n,), generator=rng) for n in (2000, 1000))
    x = 100 * (centers[labels] + torch.randn(2000, 20, generator=rng)) + 7
    test_x = 100 * (centers[test_labels] + torch.randn(1000, 20, generator=rng)) + 7
    scaler = StandardScaler().fit(x.numpy())
    judge = LogisticRegression(C=1e3, max_iter=1000)
    judge.fit(scaler.transform(x.numpy()), labels.numpy())
    expected = judge.score(scaler.transform(test_x.numpy()), test_labels.numpy())
    accuracy = evaluate.linear_probe(x, labels, test_x, test_labels)
    assert accuracy == pytest.approx(expected, abs=0.02)


def test_probe_of_one_class_or_constant_features():
    x, y = torch.randn(10, 4), torch.zeros(10, dtype=torch.long)
    assert evaluate.linear_probe(x, y, x, y, epochs=2) == 1
    y = torch.arange(10) % 2
    assert evaluate.linear_probe(torch.ones(10, 4), y, torch.ones(10, 4), y, epochs=2) == 0.5
    x = torch.stack([torch.ones(10), 2.0 * y], 1)  # one dimension says nothing, the other all
    assert evaluate.linear_probe(x, y, x, y) == 1


def test_kmeans_is_as_good_as_scikit_learns():
    rng = torch.Generator().manual_seed(1)
    x = 4 * torch.randn(8, 6, generator=rng)[torch.randint(8, (600,), generator=rng)] + torch.randn(
        600, 6, generator=rng
    )

    def inertia(assigned):
        clusters = [x[assigned == k] for k in np.unique(assigned)]
        return sum((z - z.mean(0)).square().sum().item() for z in clusters)

    judge = KMeans(8, n_init=10, random_state=0).fit(x.numpy())
    assigned, centers = evaluate.kmeans(x, 8)
    assert inertia(assigned.numpy()) <= 1.02 * judge.inertia_
    torch.testing.assert_close(centers, torch.stack([x[assigned == k].mean(0) for k in range(8)]))
    assert evaluate.kmeans(torch.ones(20, 3), 4)[0].shape == (20,)
    assert evaluate.kmeans(x[:3], 10)[0].unique().numel() == 3


@pytest.fixture
def trained(run):
    """trained(method) -> the folder of a run of two epochs."""

    def call(method):
        assert run(method, *tiny(method), "--epochs", "2").code == 0
        return f"runs/{method}-blobs-seed0"

    return call


@pytest.mark.parametrize("method", METHODS)
def test_table_and_json(method, run, trained):
    """With the network before training, whose effective rank is in the log, too."""
    folder = trained(method)
    result = run("evaluate", folder, "--untrained", "--device", "cpu")
    assert result.code == 0, result.err
    head, *lines = result.out.splitlines()
    figures = "checkpoint epoch linear knn nmi shuffled ami used rank center"
    assert head.split() == figures.split() and len(lines) == 2
    assert len({len(line) for line in (head, *lines)}) == 1
    rows = json.loads(run("evaluate", folder, "--untrained", "--json", "--device", "cpu").out)
    assert [row["epoch"] for row in rows] == [0, 2]
    # Codes or prototypes where the method has them, never an argmax over the embedding.
    codes = CASES[method].codes
    for row, line in zip(rows, lines, strict=True):
        assert f"{row['linear']:.3f}" == line.split()[2] and row["knn"] > 0.9
        assert row["clusters_by"] == ("codes" if codes else "k-means"), "`codes` in tests/cases.py"
        assert row["used"] <= row["clusters"] == (codes or 3) and row["shuffled"] < 0.1
    # The log's figures are of other, fewer points.
    untrained = json.loads(Path(folder, "log.jsonl").read_text().splitlines()[0])
    assert rows[0]["rank"] == pytest.approx(untrained["effective_rank"], rel=0.15)


def test_several_checkpoints_are_one_table(run, trained):
    folders = [trained("barlow_twins"), trained("swav")]
    lines = run("evaluate", *folders, "--device", "cpu").out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == folders
    assert len({len(line) for line in lines}) == 1


def test_transfer_to_other_data(run, trained):
    folder = trained("barlow_twins")
    result = run("evaluate", folder, "--dataset", "moons", "--json", "--device", "cpu")
    (row,) = json.loads(result.out)
    assert row["dataset"] == "moons" and row["linear"] > 0.5
    assert "cannot read --dataset shapes" in run("evaluate", folder, "--dataset", "shapes").error


def test_bad_input_is_one_line(run, trained, tmp_path):
    folder = tmp_path / trained("barlow_twins")
    assert "no checkpoint at 'nowhere'" in run("evaluate", "nowhere").error
    (tmp_path / "empty").mkdir()
    assert "no checkpoint at" in run("evaluate", "empty").error
    whole = (folder / "last.pt").read_bytes()
    (tmp_path / "half.pt").write_bytes(whole[: len(whole) // 2])
    assert "damaged or not a checkpoint" in run("evaluate", "half.pt").error
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:  # one bit of a weight
        weights = archive.read(max(archive.infolist(), key=lambda member: member.file_size))
    at = whole.index(weights) + len(weights) // 2
    (tmp_path / "flipped.pt").write_bytes(whole[:at] + bytes([whole[at] ^ 64]) + whole[at + 1 :])
    assert "damaged or not a checkpoint" in run("evaluate", "flipped.pt").error
    torch.save({"weights": torch.ones(2)}, tmp_path / "foreign.pt")
    assert "not a checkpoint of these methods" in run("evaluate", "foreign.pt").error
    state = torch.load(folder / "last.pt", weights_only=True)
    torch.save(state | {"method": "magic"}, tmp_path / "unknown.pt")
    assert "no methods/magic.py" in run("evaluate", "unknown.pt").error
    (tmp_path / "code.py").write_text("raise SystemExit('code of a stranger')")
    torch.save(state | {"method": str(tmp_path / "code")}, tmp_path / "unknown.pt")
    assert "and there is no methods/" in run("evaluate", "unknown.pt").error
    for change in ({"projector_dim": 8}, {"width": 10**6}, {"projector_dim": 10**9}):
        torch.save(state | {"args": state["args"] | change}, tmp_path / "other.pt")
        assert "does not fit" in run("evaluate", "other.pt").error
    wrong = [
        ({"seed": "many"}, "--seed: invalid int value"),
        ({"lr": [1]}, "--lr"),
        ({"backbone": "vgg"}, "--backbone"),
        ({"width": -1}, "--width"),
        ({"compile": "yes"}, "--compile"),
        ({"out": 0, "resume": 1.5}, "--resume"),
        ({"width": "64"}, "'width' is '64'"),
        ({"seed": None}, "'seed' is None"),
        ({"lr": False}, "'lr' is False"),
    ]
    for change, words in wrong:
        torch.save(state | {"args": state["args"] | change}, tmp_path / "other.pt")
        error = run("evaluate", "other.pt").error
        assert f"are not those of {state['method']}.py" in error and words in error
    for name in ("lr", "width"):
        args = dict(state["args"])
        del args[name]
        torch.save(state | {"args": args}, tmp_path / "other.pt")
        assert f"lacks flags of today, which have their defaults: --{name} " in (
            run("evaluate", "other.pt").err
        )
    torch.save(state | {"args": state["args"] | {3: 4}}, tmp_path / "other.pt")
    assert "flags that are no more, which are ignored: --3" in run("evaluate", "other.pt").err
    for model in ({"x": 1}, {}, state["model"] | {"head.0.weight": "three"}):
        torch.save(state | {"model": model}, tmp_path / "other.pt")
        assert "does not fit" in run("evaluate", "other.pt").error
    cplearn = torch.load(tmp_path / trained("cplearn") / "last.pt", weights_only=True)
    args = cplearn["args"] | {"c": 2**26}
    torch.save(cplearn | {"args": args}, tmp_path / "other.pt")
    assert "does not fit methods/cplearn.py: size mismatch for codes" in (
        run("evaluate", "other.pt").error
    )
    assert "CHECKPOINT" in run("evaluate").error


@pytest.fixture
def one_run(run):
    assert run("cplearn", *tiny("cplearn"), "--epochs", "2").code == 0
    return Path("runs/cplearn-blobs-seed0")


def test_data_that_is_not_there_is_one_line(run, one_run, monkeypatch):
    def offline(*args, **kwargs):
        raise URLError("no connection")

    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", offline)
    state = torch.load(one_run / "last.pt", weights_only=True)
    args = state["args"] | {"backbone": "resnet8", "dataset": "shapes", "width": 4}
    model = evaluate.load_method("cplearn").Model(argparse.Namespace(**args))
    torch.save(state | {"args": args, "model": model.state_dict()}, "images.pt")
    flags = ["images.pt", "--data-dir", "nowhere", "--dataset"]
    assert "cifar10 is not in 'nowhere'" in run("evaluate", *flags, "cifar10").error
    assert "nowhere' does not exist: --data-dir" in run("evaluate", *flags, "folder").error
    assert "invalid choice: 'mnist'" in run("evaluate", *flags, "mnist").error


def test_network_of_nan_is_one_line(run, one_run):
    state = torch.load(one_run / "last.pt", weights_only=True)
    state["model"]["head.0.weight"].fill_(torch.nan)
    torch.save(state, "nan.pt")
    error = run("evaluate", "nan.pt", "--device", "cpu").error
    assert "'nan.pt' gives features that are not finite" in error


FOLDER = (
    "--dataset folder --data-dir images --image-size 16 --backbone resnet8 --device cpu"
).split()


def draw_folder(counts, test_counts):
    """images/{train,val}/<class>/*: squares of noise, each class with a tint of its own."""
    rng = np.random.default_rng(0)
    for split, numbers in (("train", counts), ("val", test_counts)):
        for label, n in enumerate(numbers):
            folder = Path("images", split, f"class{label}")
            folder.mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 200, (16, 16, 3)) + 50 * np.eye(3, dtype=int)[label]
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")


def no_constant(name):
    raise AssertionError(f"{name} in JSON")


@pytest.mark.parametrize("counts, test_counts", [([9, 1], [9, 1]), ([200, 3, 1], [40, 1, 1])])
def test_few_images_and_unequal_classes(run, counts, test_counts):
    draw_folder(counts, test_counts)
    for method, own in (("cplearn", ["--c", "16"]), ("vicreg", [])):
        sizes = ["--width", "4", "--projector-dim", "8", "--batch-size", "4", "--epochs", "2"]
        assert run(method, *FOLDER, *sizes, *own).code == 0
    runs = [
        "runs/cplearn-folder-seed0",
        "runs/vicreg-folder-seed0",
        "--untrained",
        "--device",
        "cpu",
    ]
    assert run("evaluate", *runs).code == 0
    result = run("evaluate", *runs, "--json", "--save-features", "features")
    rows = json.loads(result.out, parse_constant=no_constant)
    assert len(rows) == 4
    for row in rows:
        saved = np.load(row["saved"])
        labels = saved["test_labels"]
        assert np.bincount(labels).tolist() == test_counts
        judge = KNeighborsClassifier(
            min(counts), metric="cosine", weights=lambda d: np.exp((1 - d) / 0.1)
        )
        judge.fit(saved["train_features"], saved["train_labels"])
        assert row["knn"] == pytest.approx(judge.score(saved["test_features"], labels))
        scaler = StandardScaler().fit(saved["train_features"])
        probe = LogisticRegression(C=1e3, max_iter=1000)
        probe.fit(scaler.transform(saved["train_features"]), saved["train_labels"])
        expected = probe.score(scaler.transform(saved["test_features"]), labels)
        assert row["linear"] == pytest.approx(expected, abs=0.05)
        if row["method"] == "cplearn":
            codes = saved["test_codes"]
        else:
            features = torch.from_numpy(saved["test_features"])
            codes = evaluate.kmeans(features, len(counts))[0].numpy()
        assert row["nmi"] == pytest.approx(normalized_mutual_info_score(labels, codes))
        assert row["ami"] == pytest.approx(adjusted_mutual_info_score(labels, codes))
        assert 0 <= row["shuffled"] <= 1 and 1 <= row["used"] <= len(labels)
        assert 1 <= row["rank"] <= min(8, len(labels) - 1)


def test_images_of_one_class(run, tmp_path):
    """scikit-learn's convention: all is 1 where all images are in one cluster, too."""
    rows = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    labels = np.zeros(20, dtype=int)
    np.savez("one.npz", embedding=rows, labels=labels)
    np.savez("codes.npz", embedding=rows, labels=labels, codes=np.arange(20) % 2, clusters=2)
    one, codes = json.loads(run("evaluate", "one.npz", "codes.npz", "--json").out)
    assert one["linear"] == one["knn"] == codes["linear"] == codes["knn"] == 1
    assert one["nmi"] == one["shuffled"] == one["ami"] == 1
    assert codes["nmi"] == codes["shuffled"] == codes["ami"] == 0


def test_saved_features_are_those_of_the_network(run, one_run):
    """Against a plain torch.nn network with the checkpoint's backbone, and Eq. 1 for embedding and
    codes."""
    flags = ["--untrained", "--json", "--save-features", "new/features", "--device", "cpu"]
    before, after = json.loads(run("evaluate", one_run, *flags).out)
    name = "new/features/cplearn-blobs-seed0-cplearn-blobs"
    names = [f"{name}-untrained.npz", f"{name}-trained.npz"]
    assert [before["saved"], after["saved"]] == names
    assert {str(file) for file in Path("new/features").iterdir()} == {*names}
    saved = np.load(names[1])
    arrays = {"features", "embedding", "codes", "entropy", "labels"}
    expected = {f"{split}_{name}" for split in ("train", "test") for name in arrays}
    assert set(saved) == expected | {"checkpoint", "classes", "clusters", "inputs"}
    assert (saved["clusters"], saved["inputs"]) == (64, 2)
    assert str(saved["checkpoint"]) == str(one_run)

    state = torch.load(one_run / "last.pt", weights_only=True)
    net = torch.nn.Sequential(
        torch.nn.Linear(2, 64),
        torch.nn.ReLU(),
        torch.nn.Linear(64, 64),
        torch.nn.ReLU(),
        torch.nn.Linear(64, 64),
    )
    net.load_state_dict(state["backbone"])
    points, labels = common.draw_toy("blobs", 1500, 0)
    test_points, test_labels = common.draw_toy("blobs", 600, 1)
    head = torch.nn.Sequential(torch.nn.Linear(64, 16), torch.nn.BatchNorm1d(16)).eval()
    weights = {k: v for k, v in state["model"].items() if k.startswith("head.")}
    head.load_state_dict({k.removeprefix("head."): v for k, v in weights.items()})
    codes = evaluate.load_method("cplearn").draw_codes("rademacher", 16, 64, 0).float()
    for split, x, y in (("train", points, labels), ("test", test_points, test_labels)):
        with torch.no_grad():
            features = net((x - points.mean(0)) / points.std(0))
            embedding = torch.nn.functional.normalize(head(features)) * math.sqrt(16)
        torch.testing.assert_close(torch.from_numpy(saved[f"{split}_features"]), features)
        torch.testing.assert_close(torch.from_numpy(saved[f"{split}_embedding"]), embedding)
        assert saved[f"{split}_codes"].tolist() == (embedding @ codes).argmax(1).tolist()
        assert saved[f"{split}_labels"].tolist() == y.tolist()
    assert not np.array_equal(saved["train_features"], np.load(names[0])["train_features"])
    names = ("train_features", "train_labels", "test_features", "test_labels")
    arrays = [torch.from_numpy(saved[name]) for name in names]
    assert evaluate.linear_probe(*arrays) == after["linear"]


def test_each_image_is_seen_once(run, one_run, monkeypatch):
    seen, normalise = [], common.Data.normalise

    def watch(self, x):
        seen.append(len(x))
        return normalise(self, x)

    monkeypatch.setattr(common.Data, "normalise", watch)
    assert run("evaluate", one_run, "--save-features", "f", "--device", "cpu").code == 0
    assert sum(seen) == 1500 + 600


def test_figures_depend_on_no_batch_order_of_files_or_rounding(run, monkeypatch):
    """At most one test image of 90 is told otherwise, and the clusters' figures differ by less than
    0.02."""
    draw_folder([60, 60, 60], [30, 30, 30])
    runs = ["runs/cplearn-folder-seed0", "runs/simclr-folder-seed0"]
    for method, own in (("cplearn", ["--c", "64"]), ("simclr", [])):
        sizes = ["--width", "8", "--projector-dim", "16", "--batch-size", "30", "--epochs", "3"]
        assert run(method, *FOLDER, *sizes, *own).code == 0

    def figures(*flags):
        rows = json.loads(run("evaluate", *runs, "--json", "--device", "cpu", *flags).out)
        return [{k: v for k, v in row.items() if isinstance(v, float)} for row in rows]

    def assert_close(others):
        for one, other in zip(first, others, strict=True):
            for name, value in one.items():
                bounds = {"linear": 1 / 90, "knn": 1 / 90, "rank": 1e-3 * one["rank"]}
                bound = bounds.get(name, 0.02) + 1e-6
                assert abs(value - other[name]) < bound, (name, value, other[name])

    first = figures()
    assert all(min(row["knn"], row["linear"]) > 0.4 for row in first)
    # So that the file system lists them in another order.
    for file in sorted(Path("images").rglob("*.png"), reverse=True):
        copy = Path("reversed", *file.parts[1:])
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)
    assert figures("--data-dir", "reversed") == first
    extract = common.extract
    monkeypatch.setattr(common, "extract", partial(extract, batch_size=7))
    assert_close(figures())

    def rounded_otherwise(*args, **flags):
        out = extract(*args, **flags)
        for name in ("features", "embedding"):
            if name in out:
                out[name] = out[name] * (1 + 1e-6 * torch.randn_like(out[name]))
        return out

    monkeypatch.setattr(common, "extract", rounded_otherwise)
    assert_close(figures())


def test_saved_features_never_overwrite_one_another(run, one_run):
    for name in ("a", "b"):
        shutil.copytree(one_run, Path(name, "run"))
    shutil.copy(one_run / "last.pt", "run.pt")
    checkpoints = ["a/run", "b/run/last.pt", "run.pt"]
    flags = ["--save-features", "f", "--device", "cpu"]
    rows = json.loads(run("evaluate", *checkpoints, "--json", *flags).out)
    names = [f"f/run-cplearn-blobs-trained{number}.npz" for number in ("", "-2", "-3")]
    assert [row["saved"] for row in rows] == names
    assert [str(np.load(name)["checkpoint"]) for name in names] == checkpoints
    written = [Path(name).read_bytes() for name in names]
    error = run("evaluate", "b/run", *flags).error
    assert "'f/run-cplearn-blobs-trained.npz' exists already" in error
    assert [Path(name).read_bytes() for name in names] == written
    # Other data are another name.
    assert run("evaluate", "b/run", "--dataset", "moons", *flags).code == 0
    assert Path("f/run-cplearn-moons-trained.npz").exists()


def test_features_that_cannot_be_saved_are_refused_before_the_work(run, one_run, monkeypatch):
    flags = [one_run, "--device", "cpu", "--save-features"]

    def cut_short(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", cut_short)
        assert "No space left" in run("evaluate", *flags, "full").error
    assert not list(Path("full").glob("*.npz"))
    monkeypatch.setattr(common, "load_data", lambda *_: pytest.fail("the work began"))
    Path("file").touch()
    for folder in ("file", "file/below", "/proc"):  # in /proc nobody can write, not even root
        error = run("evaluate", *flags, folder).error
        assert f"cannot write to --save-features {folder!r}" in error
