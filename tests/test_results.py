"""The tables of methods/README.md are what the stored runs say, and each stored command is one that can be run."""

import argparse
import re

import pytest
import results
from claims import CLAIMS
from conftest import METHODS

import common
import evaluate

RUNS = results.load()


def test_the_page_holds_what_is_stored():
    text = results.PAGE.read_text()
    assert results.page(text, RUNS) == text
    for name in results.TABLES:
        assert f"<!-- {name}: written by tests/results.py -->" in text


@pytest.mark.parametrize("method", METHODS)
def test_every_command_parses(method, monkeypatch):
    """A stored run's name says its table, method and seed, and its command is one of that method."""
    commands = [(name, run) for name, run in RUNS.items() if name.split("-")[1] == method]
    assert len([name for name, _ in commands if name.startswith("shapes-")]) == 3
    for name, run in commands:
        python, script, *flags = run["command"].split()
        assert (python, script) == ("python", f"methods/{method}.py")
        monkeypatch.setattr("sys.argv", [script, *flags])
        module = evaluate.load_method(method)
        args = common.parse_args(script, "", module.add_flags, module.DEFAULTS)
        assert isinstance(args, argparse.Namespace) and args.seed == run["seed"] == int(name.rpartition("-")[2])
        for figures in (run["untrained"], run["trained"]):
            assert all(0 <= figures[key] <= 1 for key in ("linear", "knn", "nmi"))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_on_the_shapes(method):
    """In each of three seeds, and in runs that were made again, kNN is at least 0.10 above the untrained network's."""
    runs, again = results.seeds(RUNS, f"shapes-{method}"), results.made_again(RUNS, method)
    assert len(runs) == 3 and min(results.gain(run, "knn") for run in runs + again) >= 0.10


def test_claims_name_tests_that_exist():
    for _, _, made, *_ in CLAIMS:
        if isinstance(made, str):
            path, _, word = made.partition(" -k ")
            assert re.search(rf"^def test_\w*{word}", (results.ROOT / path).read_text(), re.M), made
