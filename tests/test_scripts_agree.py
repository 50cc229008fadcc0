"""What keeps the scripts of methods/ one work: every line in which two of them differ is the method's."""

import ast
import itertools
import re
import statistics
import subprocess
import sys

import pytest
from conftest import METHODS, OWN, ROOT

SOURCE = {name: (ROOT / "methods" / f"{name}.py").read_text() for name in METHODS}
FIRST = METHODS[0]


def between(text, start, end=None):
    assert text.count(start) == 1
    text = text[text.index(start) :]
    return text[: text.index(end)] if end else text


def function(tree, name):
    (found,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    return found


def test_every_method_has_its_small_flags():
    assert OWN.keys() == set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_training_half_is_the_same(name):
    """After "# --- training" scripts are equal, but for the forward passes and the loss, and for what a method updates
    after the optimizer's step: a teacher, a center, a queue, prototypes."""

    def frame(text):
        text = between(text, "# --- training")
        loss = between(text, "                z1, z2 = model(x1), model(x2)", "            optimizer.zero_grad()")
        update = between(text, "            optimizer.step()\n", "            run.end_step(terms)")
        return text.replace(loss, "").replace(update, ""), loss, update

    own, loss, update = frame(SOURCE[name])
    assert own == frame(SOURCE[FIRST])[0]
    assert re.search(r"^            terms = loss(_fn)?\(", loss, re.M) and len(loss.splitlines()) <= 6
    for line in update.splitlines()[1:]:
        assert re.match(r"            model\.(update_teacher|normalise_prototypes|center|queue)\b", line), line
    assert len(update.splitlines()) <= 3


@pytest.mark.parametrize("name", METHODS)
def test_imports_are_the_same(name):
    """But for `import math`, which only the scripts have that need it; ruff finds it where it is not used."""
    assert between(SOURCE[name], "import sys", "VIEWS =") == between(SOURCE[FIRST], "import sys", "VIEWS =")


@pytest.mark.parametrize("name", METHODS)
def test_sections_names_and_length(name):
    text, tree = SOURCE[name], ast.parse(SOURCE[name])
    assert 85 <= len(text.splitlines()) <= 140
    parts = ['"""', "import sys", "VIEWS = ", "SIZES = ", "def add_flags(parser)", "# --- the method", "def loss_fn",
             "class Model", "# --- training", "def main", "if __name__"]  # fmt: skip
    places = [text.index(part) for part in parts]
    assert places == sorted(places)
    doc = ast.get_docstring(tree)
    for word in ("What prevents collapse: ", "`--", "Departs from the paper: ", f"Run: python methods/{name}.py"):
        assert word in doc
    assert re.search(r"\"[^\"]+\", [^\n]+20\d\d", doc), "no citation"
    (model,) = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    assert {"__init__", "forward"} <= {node.name for node in model.body if isinstance(node, ast.FunctionDef)}
    forward = [ast.unparse(node) for node in model.body if getattr(node, "name", "") == "forward"]
    assert forward == ["def forward(self, x):\n    return self.head(self.backbone(x))"]


@pytest.mark.parametrize("name", METHODS)
def test_loss_fn_is_short_and_needs_nothing_of_ours(name):
    loss_fn = function(ast.parse(SOURCE[name]), "loss_fn")
    assert loss_fn.end_lineno - loss_fn.lineno < 18
    names = {node.id for node in ast.walk(loss_fn) if isinstance(node, ast.Name)}
    assert "common" not in names and "args" not in names


@pytest.mark.parametrize("name", METHODS)
def test_every_flag_is_used_and_explained(name, run):
    """Each script sets its optimizer, and each of its flags is read and stands in --help with its default."""
    add_flags = function(ast.parse(SOURCE[name]), "add_flags")
    calls = [node for node in ast.walk(add_flags) if isinstance(node, ast.Call)]
    (recipe,) = [call for call in calls if ast.unparse(call.func) == "parser.set_defaults"]
    assert {"optimizer", "lr", "weight_decay"} <= {keyword.arg for keyword in recipe.keywords}
    own = [call.args[0].value for call in calls if ast.unparse(call.func) == "parser.add_argument"]
    result = run(name, "--help")
    assert result.code == 0
    for flag in own:
        assert re.search(rf"args\.{flag[2:].replace('-', '_')}\b", SOURCE[name]), f"{flag} is read nowhere"
        assert re.search(rf"^  {flag} .*(\n    .*)*?", result.out, re.M), f"{flag} is not in --help"
    for flag in ("--dataset", "--epochs", "--lr", "--resume"):
        assert flag in result.out
    assert ast.get_docstring(ast.parse(SOURCE[name])).splitlines()[0] in result.out


@pytest.mark.parametrize("name", METHODS)
def test_methods_import_nothing_else_of_ours(name):
    for node in ast.walk(ast.parse(SOURCE[name])):
        if isinstance(node, ast.Import):
            assert all(alias.name in ("math", "sys", "torch", "common") for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.module in ("pathlib", "torch")


def test_common_knows_no_method():
    code = re.sub(r'""".*?"""|#[^\n]*', "", (ROOT / "common.py").read_text(), flags=re.S)
    for name in METHODS:
        assert not re.search(rf"\b{name}\b", code)


def test_common_holds_what_training_needs_and_no_more():
    """From what a script calls, every function and class of common.py can be reached."""
    source = (ROOT / "common.py").read_text()
    assert sum(bool(line.strip()) for line in source.splitlines()) <= 950
    defined = {node.name: node for node in ast.parse(source).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    constants = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign):
            constants[node.targets[0].id] = node
    reached, waiting = set(), set(re.findall(r"\bcommon\.(\w+)", "".join(SOURCE.values())))
    while waiting:
        name = waiting.pop()
        reached.add(name)
        names = {node.id for node in ast.walk((defined | constants)[name]) if isinstance(node, ast.Name)}
        waiting |= (names & (defined | constants).keys()) - reached
    assert not defined.keys() - reached


def test_packages():
    """Only evaluate.py, analyze.py and the tests use more than torch, torchvision, numpy and tqdm."""
    for path in (ROOT / "common.py", *(ROOT / "methods").glob("*.py")):
        assert not re.search(r"^\s*(import|from) (matplotlib|sklearn|scipy|pandas)", path.read_text(), re.M)


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
    assert min(counts) > 0 and statistics.median(counts) <= 70 and max(counts) <= 115


if __name__ == "__main__":
    for (a, b), count in sorted(diffs().items(), key=lambda item: item[1]):
        print(f"{count:4}  {a} {b}")
    print(f"median {statistics.median(diffs().values()):.0f}, largest {max(diffs().values())}")
