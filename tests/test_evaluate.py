"""evaluate.py: each part against scikit-learn, and the command as it is typed."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import METHODS, OWN, TINY
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

import evaluate


def test_linear_probe_is_a_logistic_regression():
    rng = torch.Generator().manual_seed(0)
    centers = 0.8 * torch.randn(5, 20, generator=rng)
    labels, test_labels = (torch.randint(5, (n,), generator=rng) for n in (2000, 1000))
    x, test_x = (100 * (centers[y] + torch.randn(len(y), 20, generator=rng)) + 7 for y in (labels, test_labels))
    scaler = StandardScaler().fit(x.numpy())
    judge = LogisticRegression(C=1e3, max_iter=1000).fit(scaler.transform(x.numpy()), labels.numpy())
    expected = judge.score(scaler.transform(test_x.numpy()), test_labels.numpy())
    assert evaluate.linear_probe(x, labels, test_x, test_labels) == pytest.approx(expected, abs=0.02)


def test_probe_of_one_class_or_constant_features():
    x, y = torch.randn(10, 4), torch.zeros(10, dtype=torch.long)
    assert evaluate.linear_probe(x, y, x, y, epochs=2) == 1
    y = torch.arange(10) % 2
    assert evaluate.linear_probe(torch.ones(10, 4), y, torch.ones(10, 4), y, epochs=2) == 0.5


def test_kmeans_is_as_good_as_scikit_learns():
    rng = torch.Generator().manual_seed(1)
    x = 4 * torch.randn(8, 6, generator=rng)[torch.randint(8, (600,), generator=rng)] + torch.randn(
        600, 6, generator=rng
    )

    def inertia(assigned):
        return sum((x[assigned == k] - x[assigned == k].mean(0)).square().sum().item() for k in np.unique(assigned))

    judge = KMeans(8, n_init=10, random_state=0).fit(x.numpy())
    assert inertia(evaluate.kmeans(x, 8).numpy()) <= 1.02 * judge.inertia_
    assert evaluate.kmeans(torch.ones(20, 3), 4).shape == (20,)
    assert evaluate.kmeans(x[:3], 10).unique().numel() == 3


@pytest.fixture
def trained(run):
    for method in METHODS:
        assert run(method, *TINY, *OWN[method], "--epochs", "2").code == 0
    return [f"runs/{method}-blobs-seed0" for method in METHODS]


def test_table_and_json(run, trained):
    result = run("evaluate", *trained, "--init", "--device", "cpu")
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert len(lines) == 1 + 2 * len(METHODS)
    assert lines[0].split() == ["checkpoint", "epoch", "linear", "knn", "nmi", "shuffled", "ami", "used", "rank"]
    assert len({len(line) for line in lines}) == 1
    rows = json.loads(run("evaluate", *trained, "--init", "--json", "--device", "cpu").out)
    assert [row["epoch"] for row in rows] == [0, 2] * len(METHODS)
    for row, line in zip(rows, lines[1:], strict=True):
        assert f"{row['linear']:.3f}" == line.split()[2] and row["knn"] > 0.9
        # Codes or prototypes where the method has them, never an argmax over the embedding's 16 dimensions.
        sizes = {"cplearn": 64, "dino": 32, "swav": 32}
        assert row["clusters_by"] == ("codes" if row["method"] in sizes else "k-means")
        assert row["used"] <= row["clusters"] == sizes.get(row["method"], 3) and row["shuffled"] < 0.1


def test_init_is_the_network_before_training(run, trained):
    logs = {m: json.loads(Path(f"runs/{m}-blobs-seed0/log.jsonl").read_text().splitlines()[1]) for m in METHODS}
    rows = json.loads(run("evaluate", *trained, "--init", "--json", "--device", "cpu").out)
    for row in rows[::2]:
        # The log's figures are of other, fewer points.
        assert row["rank"] == pytest.approx(logs[row["method"]]["effective_rank"], rel=0.15)


def test_transfer_to_other_data(run, trained):
    (row,) = json.loads(run("evaluate", trained[0], "--dataset", "moons", "--json", "--device", "cpu").out)
    assert row["dataset"] == "moons" and row["linear"] > 0.5
    assert "cannot read --dataset shapes" in run("evaluate", trained[0], "--dataset", "shapes").error


def test_bad_input_is_one_line(run, trained, tmp_path):
    assert "no checkpoint at 'nowhere'" in run("evaluate", "nowhere").error
    (tmp_path / "empty").mkdir()
    assert "no checkpoint at" in run("evaluate", "empty").error
    whole = (tmp_path / trained[0] / "last.pt").read_bytes()
    (tmp_path / "half.pt").write_bytes(whole[: len(whole) // 2])
    assert "damaged or not a checkpoint" in run("evaluate", "half.pt").error
    torch.save({"weights": torch.ones(2)}, tmp_path / "foreign.pt")
    assert "not a checkpoint of these methods" in run("evaluate", "foreign.pt").error
    state = torch.load(tmp_path / trained[0] / "last.pt", weights_only=True)
    torch.save(state | {"method": "magic"}, tmp_path / "unknown.pt")
    assert "no methods/magic.py" in run("evaluate", "unknown.pt").error
    torch.save(state | {"args": state["args"] | {"projector_dim": 8}}, tmp_path / "other.pt")
    assert "does not fit" in run("evaluate", "other.pt").error
    assert "CHECKPOINT" in run("evaluate").error
