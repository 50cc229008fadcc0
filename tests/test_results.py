"""results/make.py: which runs are made, which are skipped, and what is stored."""

import argparse
import json
import sys

import numpy as np
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "results"))
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
    run = plan.planned_run("claims", "simsiam", flags, 3)
    monkeypatch.setattr(plan, "planned", lambda: [run])
    return run


def test_a_run_is_made_once_and_again_when_its_code_has_changed(results):
    assert make.missing(ALL) == [results]
    assert make.missing(argparse.Namespace(table="shapes", method=None)) == []
    assert make.missing(argparse.Namespace(table=None, method="byol")) == []
    assert make.make(make.missing(ALL), jobs=2) == 0
    assert make.missing(ALL) == []

    (run,) = store.load()
    assert run["knn_curve"][:, 0].tolist() == [0, 1, 2]
    assert run["spectrum"][0] == 1 and np.all(np.diff(run["spectrum"]) <= 0)
    (folder,) = [path for path in make.OUT.iterdir() if path.is_dir()]
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert run["knn_curve"][:, 1].tolist() == [line["knn"] for line in log]
    # Two moons: chance is 1/2, and any network that has not collapsed is far above it.
    assert 0.7 < run["untrained"]["knn"] <= 1 and 0.7 < run["trained"]["linear"] <= 1
    assert run["diagnosis"]["cluster"] == [None, "no codes"]

    results["code"] = "another"
    assert make.missing(ALL) == [results]


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
