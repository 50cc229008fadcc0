"""What keeps the scripts of methods/ one work: every line in which two of them differ is the method's."""

import ast
import difflib
import itertools
import re
import statistics
import subprocess
import sys

import pytest
from conftest import METHODS, OWN, ROOT

import common

SOURCE = {name: (ROOT / "methods" / f"{name}.py").read_text() for name in METHODS}
FIRST = METHODS[0]


def between(text, start, end=None):
    assert text.count(start) == 1
    text = text[text.index(start) :]
    return text[: text.index(end)] if end else text


def changed_lines(a, b):
    lines = difflib.unified_diff(a.splitlines(), b.splitlines(), n=0, lineterm="")
    return [line for line in lines if line[0] in "+-" and line[:3] not in ("+++", "---")]


def test_every_method_has_its_small_flags():
    assert OWN.keys() == set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_training_half_is_the_same(name):
    """After "# --- training" scripts are equal, but for the one line of a momentum teacher."""
    diff = changed_lines(between(SOURCE[FIRST], "# --- training"), between(SOURCE[name], "# --- training"))
    assert all(re.match(r"[+-]\s+model\.update_teacher\(.*\)$", line) for line in diff) and len(diff) <= 1


@pytest.mark.parametrize("name", METHODS)
def test_imports_are_the_same(name):
    assert between(SOURCE[name], "import math", "DEFAULTS =") == between(SOURCE[FIRST], "import math", "DEFAULTS =")


@pytest.mark.parametrize("name", METHODS)
def test_shared_defaults_are_the_same_or_say_why(name):
    own, first = (between(SOURCE[n], "DEFAULTS =", "    # this method's").splitlines() for n in (name, FIRST))
    assert [line.split(":")[0] for line in own] == [line.split(":")[0] for line in first]
    for a, b in zip(own, first, strict=True):
        assert a == b or "  # " in a or "  # " in b, f"{a.strip()} differs from {FIRST} without a comment that says why"


@pytest.mark.parametrize("name", METHODS)
def test_sections_names_and_length(name):
    text, tree = SOURCE[name], ast.parse(SOURCE[name])
    assert 100 <= len(text.splitlines()) <= 140
    parts = ['"""', "import math", "DEFAULTS = {", "VIEWS = ", "# --- the method", "# --- training", "if __name__"]
    places = [text.index(part) for part in parts]
    assert places == sorted(places)
    doc = ast.get_docstring(tree)
    for word in ("What prevents collapse: ", "`--", "Departs from the paper: ", f"Run: python methods/{name}.py"):
        assert word in doc
    assert re.search(r"\"[^\"]+\", [^\n]+20\d\d", doc), "no citation"
    names = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    assert {"loss_fn", "Model", "main"} <= names
    model = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Model")
    assert {"__init__", "forward", "embed"} <= {node.name for node in model.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("name", METHODS)
def test_every_flag_is_used_and_explained(name, methods, run):
    own = [flag for flag in methods[name].DEFAULTS if flag not in common.SHARED]
    for flag in own:
        assert re.search(rf"args\.{flag}\b", SOURCE[name]), f"--{flag} is read nowhere"
    result = run(name, "--help")
    assert result.code == 0
    for flag in (*own, *common.SHARED):
        assert "--" + flag.replace("_", "-") in result.out
    assert methods[name].__doc__.strip().splitlines()[0] in result.out


@pytest.mark.parametrize("name", METHODS)
def test_methods_import_nothing_else_of_ours(name):
    for node in ast.walk(ast.parse(SOURCE[name])):
        if isinstance(node, ast.Import):
            assert all(alias.name in ("math", "sys", "torch", "common") for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.module in ("pathlib", "torch", "torchvision.ops")


def test_common_knows_no_method():
    code = re.sub(r'""".*?"""|#[^\n]*', "", (ROOT / "common.py").read_text(), flags=re.S)
    for name in METHODS:
        assert not re.search(rf"\b{name}\b", code)


def test_packages():
    """Only tests use scikit-learn; matplotlib and scikit-learn are allowed in analyze.py alone."""
    for path in (ROOT / "common.py", ROOT / "evaluate.py"):
        assert not re.search(
            r"import (matplotlib|sklearn|scipy|pandas)|from (matplotlib|sklearn|scipy|pandas)", path.read_text()
        )


@pytest.mark.parametrize("arguments", [["check"], ["format", "--check"]])
def test_ruff(arguments):
    done = subprocess.run([sys.executable, "-m", "ruff", *arguments, str(ROOT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def diffs():
    """For each pair of scripts the number of lines that `diff` prints of both."""
    counts = {}
    for a, b in itertools.combinations(METHODS, 2):
        paths = (str(ROOT / "methods" / f"{name}.py") for name in (a, b))
        printed = subprocess.run(["diff", *paths], capture_output=True, text=True).stdout
        counts[a, b] = sum(line[0] in "<>" for line in printed.splitlines())
    return counts


def test_diffs_between_methods_are_short():
    counts = diffs().values()
    assert min(counts) > 0 and statistics.median(counts) <= 60 and max(counts) <= 95


if __name__ == "__main__":
    for (a, b), count in sorted(diffs().items(), key=lambda item: item[1]):
        print(f"{count:4}  {a} {b}")
    print(f"median {statistics.median(diffs().values()):.0f}, largest {max(diffs().values())}")
