"""What results/make.py makes, skips and stores, and how claims are judged."""

import argparse
import json
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

sys.path.insert(0, str(ROOT / "results"))
import claims
import make
import plan
import store

ALL = argparse.Namespace(table=None, method=None)


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Empty results in a folder of their own, and a plan of one run that takes seconds."""
    monkeypatch.setattr(store, "RUNS", tmp_path / "runs.jsonl")
    monkeypatch.setattr(store, "CURVES", tmp_path / "curves.npz")
    monkeypatch.setattr(make, "OUT", tmp_path / "runs")
    store.save([])
    flags = "--dataset moons --epochs 2 --eval-every 1"
    run = plan.planned_run("claims", "simsiam", flags, 3) | {"code": store.code_of("simsiam")}

    def planned():
        return [run]

    monkeypatch.setattr(plan, "planned", planned)
    return run


def test_a_run_is_made_once_and_again_when_its_code_has_changed(results):
    assert make.missing(ALL) == [results]
    assert make.missing(argparse.Namespace(table="shapes", method=None)) == []
    assert make.missing(argparse.Namespace(table=None, method="byol")) == []
    assert make.make(make.missing(ALL), jobs=2) == 0
    assert make.missing(ALL) == []

    (run,) = store.load()
    assert run["knn_curve"][:, 0].tolist() == [0, 1, 2]
    assert run["precision"] == "fp32"
    assert run["spectrum"][0] == 1 and np.all(np.diff(run["spectrum"]) <= 0)
    (folder,) = [path for path in make.OUT.iterdir() if path.is_dir()]
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert run["knn_curve"][:, 1].tolist() == [line["knn"] for line in log]
    # Two moons: chance is 1/2, and any network that has not collapsed is far above it.
    assert 0.7 < run["untrained"]["knn"] <= 1 and 0.7 < run["trained"]["linear"] <= 1
    assert run["diagnosis"]["cluster"] == [None, "no codes"]

    results["code"] = "another"
    assert make.missing(ALL) == [results]


def test_photographs_alone_are_made_in_bf16():
    for run in plan.planned():
        run["precision"] = make.precision_of(run, bf16=True)
        train, _ = make.stages(run)[0]
        given = train[train.index("--precision") + 1]
        assert (given == "bf16") == (run["table"] in ("photographs", "all_images"))


def test_a_run_that_fails_is_not_stored(results, capsys):
    results["command"] = results["command"].replace("--epochs 2", "--epochs two")
    assert make.make([results], jobs=2) == 1
    assert store.load() == []
    assert "failed" in capsys.readouterr().out


def test_code_is_what_runs():
    code = """
A = 1
def f(x):
    return A + x
"""
    talk = '''
"""About it.

Two lines.
"""
# why
A = 1

def f(x):
    """What f does."""

    return A + x
'''
    assert store.code_lines(talk) == store.code_lines(code)
    assert store.code_lines(talk.replace("A + x", "A - x")) != store.code_lines(code)
    text = 'A = """no\ndocstring"""\n'
    assert store.code_lines(text) == text.splitlines()


class SmallCIFAR10:
    """Seven images of two classes, in place of the download."""

    classes = ["cat", "dog"]

    def __init__(self, root, train, download):
        self.labels = [1, 0, 1, 1, 0, 0, 1]

    def __iter__(self):
        for i, label in enumerate(self.labels):
            yield Image.new("RGB", (32, 32), (30 * i, 0, 0)), label


def test_photographs_are_the_first_of_each_class(tmp_path, monkeypatch):
    monkeypatch.setattr(make, "CIFAR10", SmallCIFAR10)
    make.save_first(tmp_path / "small", train=2, test=1)
    saved = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.jpg"))
    assert saved == [
        "small/test/cat/00000.jpg",
        "small/test/dog/00000.jpg",
        "small/train/cat/00000.jpg",
        "small/train/cat/00001.jpg",
        "small/train/dog/00000.jpg",
        "small/train/dog/00001.jpg",
    ]
    # The cats are images 1, 4 and 5: the second that is saved has red 30 * 4.
    red = np.asarray(Image.open(tmp_path / "small/train/cat/00001.jpg"))[..., 0]
    assert abs(red.mean() - 120) < 3


def test_claims_are_about_planned_runs():
    planned = {store.label(run) for run in plan.planned()}
    for _, says, decided_by, decide in claims.CLAIMS:
        if decide is not None:
            assert set(decided_by) <= planned, says


def test_a_difference_within_the_deviation_of_the_seeds_decides_nothing():
    runs = []
    for method, accuracies in (("a", (0.50, 0.60, 0.70)), ("b", (0.65,)), ("c", (0.75,))):
        for seed, accuracy in enumerate(accuracies):
            command = f"python methods/{method}.py --seed {seed}"
            figures = {"trained": {"knn": accuracy}, "untrained": {"knn": 0.1}}
            runs.append({"command": command, "seed": seed, **figures})
    assert claims.common_seeds(runs, ["a", "b"]) == {0}
    a, b, c = (claims.figures(runs, method, {0}) for method in "abc")
    assert a["deviation"]["knn"] == pytest.approx(0.1)
    assert claims.is_better(c, a, "knn") is True and claims.is_better(a, c, "knn") is False
    assert claims.is_better(b, a | {"knn": 0.6}, "knn") is None
    assert claims.rises([a, b, c], "knn") is True
    assert claims.both(None, False) is False and claims.both(None, True) is None
