"""evaluate.py: part of the labels, the number of neighbours, several epochs and data sets, and data
without labels."""

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image

import analyze
import common
import evaluate

with io.BytesIO() as png:
    Image.new("RGB", (2, 2)).save(png, "png")
    PIXEL = png.getvalue()


def test_part_of_the_labels_has_each_class_and_is_always_the_same():
    labels = torch.tensor([0] * 1000 + [1] * 100 + [3] * 7)
    some = evaluate.share_of_each_class(labels, 0.1)
    assert torch.bincount(labels[some]).tolist() == [100, 10, 0, 1]
    assert len(some.unique()) == len(some)
    assert torch.equal(some, evaluate.share_of_each_class(labels, 0.1))
    assert some[99] > 500  # not the first ones
    assert len(evaluate.share_of_each_class(labels, 1e-6)) == 3


def test_neighbours_are_no_more_than_the_smallest_class_holds():
    assert common.neighbours(torch.arange(50_000) % 10) == 200
    assert common.neighbours(torch.tensor([0] * 120 + [1] * 12 + [2] * 12)) == 12
    assert common.neighbours(np.array([5, 5, 2])) == 1


def test_small_classes_beside_a_large_one_are_found():
    # As of features after a ReLU, all cosines are large. So all neighbours count nearly alike.
    generator = common.generator(0)
    labels = torch.tensor([0] * 120 + [1] * 12 + [2] * 12)
    queries = torch.arange(3).repeat(30)
    bank = 3 + torch.eye(3)[labels] + 0.1 * torch.randn(144, 3, generator=generator)
    x = 3 + torch.eye(3)[queries] + 0.1 * torch.randn(90, 3, generator=generator)
    assert common.knn_accuracy(bank, labels, x, queries, k=200) == pytest.approx(1 / 3)
    assert common.knn_accuracy(bank, labels, x, queries) == 1


@pytest.fixture
def nothing_drawn(monkeypatch):
    """Pictures are made, but not drawn, which would take most of the time."""
    monkeypatch.setattr(analyze, "as_png", lambda figure: PIXEL)


@pytest.fixture
def two_epochs(run):
    """A run with a checkpoint of each of its two epochs."""
    flags = ["--epochs", "2", "--keep-every", "1", "--out", "run"]
    assert run("cplearn", *TINY, "--c", "64", *flags).code == 0
    return ["run/epoch-0001.pt", "run"]


def table(result):
    """The cells of the printed table that hold no spaces: a dict for each row."""
    assert result.code == 0, result.err
    head, *rows = result.out.splitlines()
    return [dict(zip(head.split(), row.split(), strict=False)) for row in rows]


def test_label_fraction_and_k_are_used_and_said(run, two_epochs, monkeypatch):
    used = []
    linear_probe = evaluate.linear_probe

    def watch(features, labels, *rest):
        used.append((len(features), torch.bincount(labels).tolist()))
        return linear_probe(features, labels, *rest)

    monkeypatch.setattr(evaluate, "linear_probe", watch)
    flags = ["--device", "cpu", "--json"]
    (full,) = json.loads(run("evaluate", "run", *flags).out)
    assert (full["training_labels"], full["training_images"], full["k"]) == (1500, 1500, 200)
    flags += ["--label-fraction", "0.01"]
    (part,) = json.loads(run("evaluate", "run", *flags).out)
    assert (part["training_labels"], part["training_images"], part["k"]) == (15, 1500, 5)
    assert used == [(1500, [500, 500, 500]), (15, [5, 5, 5])]
    assert part["nmi"] == full["nmi"]
    (two,) = json.loads(run("evaluate", "run", *flags, "--k", "2").out)
    assert two["k"] == 2

    result = run("evaluate", "run", "--device", "cpu", "--label-fraction", "0.01", "--k", "2")
    assert result.out.splitlines()[1].endswith("15 of 1500 labels, k = 2")
    assert "note" not in run("evaluate", "run", "--device", "cpu").out
    assert "--label-fraction" in run("evaluate", "run", "--label-fraction", "0").error
    assert "--label-fraction" in run("evaluate", "run", "--label-fraction", "1.5").error
    assert "--k" in run("evaluate", "run", "--k", "0").error


def test_several_checkpoints_of_a_run_say_their_epochs(run, two_epochs, nothing_drawn):
    rows = table(run("evaluate", *two_epochs, "--device", "cpu"))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert "dataset" not in rows[0]
    flags = ["--device", "cpu", "--save-features", "features"]
    assert run("evaluate", *two_epochs, *flags).code == 0
    names = sorted(path.name for path in Path("features").iterdir())
    assert names == [
        "run-cplearn-blobs-trained.npz",
        "run-epoch-0001-cplearn-blobs-trained.npz",
    ]

    flags = ["--device", "cpu", "--components", "2", "--images", "50", "--untrained"]
    # One is there twice.
    result = run("analyze", *two_epochs, "run/last.pt", *flags)
    assert result.code == 0, result.err
    report = json.loads(Path("report/report.json").read_text())
    assert list(report) == ["run (untrained)", "run epoch 1", "run epoch 2"]
    assert [entry["epoch"] for entry in report.values()] == [0, 1, 2]


def test_rows_of_different_data_sets_name_them(run, two_epochs):
    assert run("cplearn", *TINY, "--c", "64", "--dataset", "moons", "--epochs", "1").code == 0
    np.save("z.npy", np.random.default_rng(0).normal(size=(20, 3)))
    rows = table(run("evaluate", "run", "runs/cplearn-moons-seed0", "z.npy", "--device", "cpu"))
    assert [row["dataset"] for row in rows] == ["blobs", "moons", "-"]


def test_untrained_was_called_init(run, two_epochs):
    flags = ["--device", "cpu", "--json"]
    rows = json.loads(run("evaluate", "run", "--untrained", *flags).out)
    assert [row["epoch"] for row in rows] == [0, 2]
    assert json.loads(run("evaluate", "run", "--init", *flags).out) == rows
    help_text = run("evaluate", "--help").out
    assert "--untrained" in help_text and "--init" not in help_text


def test_other_data_are_normalised_as_in_training(run, two_epochs, monkeypatch):
    (before,) = json.loads(run("evaluate", "run", "--device", "cpu", "--json").out)
    load_data = common.load_data

    def with_other_mean(args, device):
        data = load_data(args, device)
        return dataclasses.replace(data, mean=data.mean + 1, std=data.std * 3)

    monkeypatch.setattr(common, "load_data", with_other_mean)
    (after,) = json.loads(run("evaluate", "run", "--device", "cpu", "--json").out)
    assert after == before
    state = torch.load("run/last.pt", weights_only=True)
    torch.save(state | {"mean": None, "std": None}, "old.pt")
    (old,) = json.loads(run("evaluate", "old.pt", "--device", "cpu", "--json").out)
    assert old["rank"] != before["rank"]


def test_data_without_labels_leave_out_what_needs_them(run, two_epochs, monkeypatch, nothing_drawn):
    load_data = common.load_data

    def without_labels(args, device):
        data = load_data(args, device)
        return dataclasses.replace(data, labels=None, test_labels=None, classes=[])

    assert run("simclr", *TINY, "--epochs", "1", "--out", "no-codes").code == 0
    monkeypatch.setattr(common, "load_data", without_labels)
    result = run("evaluate", "run", "no-codes", "--device", "cpu", "--json")
    with_codes, without_codes = json.loads(result.out)
    for row in (with_codes, without_codes):
        assert not row.keys() & {"linear", "knn", "k", "nmi", "shuffled", "ami"}
        assert row["rank"] > 1 and 0 < row["center_norm"] < 1
    assert (with_codes["clusters_by"], with_codes["clusters"]) == ("codes", 64)
    assert (without_codes["clusters_by"], without_codes["clusters"]) == ("k-means", 10)

    result = run("evaluate", "run", "no-codes", "--device", "cpu", "--save-features", "features")
    lines = result.out.splitlines()
    assert [row["linear"] for row in table(result)] == ["-", "-"]
    assert lines[1].rstrip().endswith("no labels")
    assert lines[2].endswith("no labels, so k-means has 10 clusters")
    for path in Path("features").iterdir():
        assert "test_labels" not in np.load(path)

    flags = ["--device", "cpu", "--components", "2", "--images", "50"]
    result = run("analyze", "run", "no-codes", *flags)
    assert result.code == 0, result.err
    report = json.loads(Path("report/report.json").read_text())
    assert report["no-codes"]["clusters"]["of"] == 10
    assert "no-codes/labels" not in np.load("report/report.npz")
