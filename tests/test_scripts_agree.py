"""What the scripts of methods/ share, so that a line in which two differ is the method's."""

import ast
import re
import subprocess
import sys

import pytest
from cases import CASES
from conftest import METHODS, ROOT, SCRIPTS

SOURCE = {name: (ROOT / "methods" / f"{name}.py").read_text() for name in SCRIPTS}
FIRST = SOURCE[SCRIPTS[0]]


@pytest.mark.parametrize("name", sorted({*SCRIPTS, *CASES}))
def test_every_method_has_an_entry(name):
    assert name in CASES, f"methods/{name}.py has no entry in tests/cases.py"
    assert name in SCRIPTS, f"tests/cases.py has an entry for {name}, which is no script"


def shared_frame(text):
    """The lines of the training half that are the same in all scripts. Free are the forward passes
    and the loss, and what a method updates after the optimizer's step. The lines between which they
    stand belong to the frame. There may be more than two views."""
    lines, free = [], False
    for line in text[text.index("# --- training") :].splitlines():
        line = re.sub(r"for x1, x2(, x\d)* in", "for x1, x2 in", line)
        line = re.sub(r"z1, z2(, z\d)* = model\(x1\), .*", "z1, z2 = model(x1), model(x2)", line)
        code = line.strip()
        if code.startswith(("optimizer.zero_grad()", "run.end_step(terms)")):
            free = False
        if not free:
            lines.append(line)
        if code.startswith(("z1, z2 = model(x1), model(x2)", "optimizer.step()")):
            free = True
    return lines


@pytest.mark.parametrize("name", METHODS)
def test_training_half_is_the_same(name):
    frame = shared_frame(SOURCE[name])
    assert frame == shared_frame(FIRST)
    for mark in ("z1, z2 = model(x1)", "optimizer.zero_grad()", "optimizer.step()", "run.end_step"):
        assert sum(mark in line for line in frame) == 1


def imports(text):
    """From "import sys" on: only the scripts that need it have `import math` before."""
    return re.search(r"^import sys\n.*?^import common\n", text, re.M | re.S).group()


@pytest.mark.parametrize("name", METHODS)
def test_imports_are_the_same(name):
    assert imports(SOURCE[name]) == imports(FIRST)


@pytest.mark.parametrize("name", METHODS)
def test_methods_import_nothing_else_of_ours(name):
    for node in ast.walk(ast.parse(SOURCE[name])):
        if isinstance(node, ast.Import):
            assert all(alias.name in ("math", "sys", "torch", "common") for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.module in ("pathlib", "torch")


@pytest.mark.parametrize("name", METHODS)
def test_sections_and_names(name):
    parts = [
        '"""',
        "import sys\n",
        "\nVIEWS = ",
        "\nDEFAULTS = ",
        "\ndef add_flags(parser):",
        "\n# --- the method\n",
        "\ndef loss_fn(",
        "\nclass Model(nn.Module):",
        "\n# --- training\n",
        "\ndef main():",
        "\nif __name__ ==",
    ]
    places = [SOURCE[name].find(part) for part in parts]
    assert -1 not in places, parts[places.index(-1)]
    assert places == sorted(places)


@pytest.mark.parametrize("name", METHODS)
def test_embeddings_are_the_head_of_the_backbone(name):
    """The metrics and evaluate.py rely on this."""
    classes = [node for node in ast.parse(SOURCE[name]).body if isinstance(node, ast.ClassDef)]
    (model,) = [node for node in classes if node.name == "Model"]
    (forward,) = [node for node in model.body if getattr(node, "name", "") == "forward"]
    assert ast.unparse(forward) == "def forward(self, x):\n    return self.head(self.backbone(x))"


@pytest.mark.parametrize("name", METHODS)
def test_docstring(name):
    doc = ast.get_docstring(ast.parse(SOURCE[name]))
    for word in ("What prevents collapse: ", "`--", f"Run: python methods/{name}.py"):
        assert word in doc
    assert re.search(r'^"[^"]+",[^"]+ 20\d\d\b', doc, re.M), "no citation"


@pytest.mark.parametrize("name", METHODS)
def test_every_flag_is_used_and_explained(name, run):
    """Each script sets its optimizer. Each of its flags is read, and stands in --help."""
    body = ast.parse(SOURCE[name]).body
    (add_flags,) = [node for node in body if getattr(node, "name", "") == "add_flags"]
    calls = [node for node in ast.walk(add_flags) if isinstance(node, ast.Call)]
    (recipe,) = [call for call in calls if ast.unparse(call.func) == "parser.set_defaults"]
    assert {"optimizer", "lr", "weight_decay"} <= {keyword.arg for keyword in recipe.keywords}
    result = run(name, "--help")
    assert result.code == 0
    own = [call for call in calls if ast.unparse(call.func) == "parser.add_argument"]
    for flag in (call.args[0].value for call in own):
        attribute = flag.removeprefix("--").replace("-", "_")
        assert re.search(rf"\bargs\.{attribute}\b", SOURCE[name]), f"{flag} is read nowhere"
        assert re.search(rf"^  {flag}\b", result.out, re.M), f"{flag} is not in --help"
    for flag in ("--dataset", "--epochs", "--lr", "--resume"):
        assert re.search(rf"^  {flag}\b", result.out, re.M)
    assert SOURCE[name].removeprefix('"""').splitlines()[0] in result.out


def test_common_knows_no_method():
    code = re.sub(r'""".*?"""|#[^\n]*', "", (ROOT / "common.py").read_text(), flags=re.S)
    for name in SCRIPTS:
        assert not re.search(rf"\b{name}\b", code)


def test_common_holds_what_training_needs_and_no_more():
    """From what a script calls, every function and class of common.py can be reached."""
    definitions = {}
    for node in ast.parse((ROOT / "common.py").read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            definitions[node.name] = node
        elif isinstance(node, ast.Assign):
            definitions[ast.unparse(node.targets[0])] = node
    reached = set()
    waiting = set(re.findall(r"\bcommon\.(\w+)", "".join(SOURCE.values())))
    while waiting:
        name = waiting.pop()
        reached.add(name)
        for node in ast.walk(definitions[name]):
            if isinstance(node, ast.Name) and node.id in definitions and node.id not in reached:
                waiting.add(node.id)
    functions = [n for n, node in definitions.items() if not isinstance(node, ast.Assign)]
    assert not set(functions) - reached


def test_packages():
    """Only evaluate.py, analyze.py and the tests use more than torch, torchvision, numpy, tqdm."""
    for path in (ROOT / "common.py", *(ROOT / "methods").glob("*.py")):
        others = r"^\s*(import|from) (matplotlib|sklearn|scipy|pandas)"
        assert not re.search(others, path.read_text(), re.M)


@pytest.mark.parametrize("arguments", [["check"], ["format", "--check"]])
def test_ruff(arguments):
    command = [sys.executable, "-m", "ruff", *arguments, str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
