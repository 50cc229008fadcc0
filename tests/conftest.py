import fcntl
import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported; the same sums on every machine
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from cases import CASES  # noqa: E402

import evaluate  # noqa: E402

SCRIPTS = sorted(path.stem for path in (ROOT / "methods").glob("*.py"))
# One without an entry in CASES fails in test_scripts_agree.py, and is left out everywhere else.
METHODS = [name for name in SCRIPTS if name in CASES]
TOOLS = ("evaluate", "analyze")

# Less than a second per run: three classes of points and a tiny network.
TINY = [
    *("--dataset", "blobs", "--backbone", "mlp", "--device", "cpu"),
    *("--projector-dim", "16", "--batch-size", "128"),
]


def tiny(method, state=False):
    """Flags of a method for a run that takes less than a second; with `state`, it also has what it
    stores beside its network and leaves off by default, such as a queue."""
    case = CASES[method]
    flags = [*TINY, *case.flags.split()]
    if state:
        flags += case.state_flags.split()
    return flags


class Result:
    def __init__(self, code, out, err):
        self.code, self.out, self.err = code, out, err

    @property
    def error(self):
        """The one line on stderr of a refused command."""
        assert self.code == 2, (self.code, self.out, self.err)
        assert "Traceback" not in self.err
        (line,) = self.err.strip().splitlines()
        return line


def pytest_addoption(parser):
    parser.addoption(
        "--long",
        action="store_true",
        help="more of the same: kills, damaged files, processes, extreme inputs, compiled code",
    )


@pytest.fixture(scope="session")
def long(request):
    """Whether the long form of a test is wanted."""
    return request.config.getoption("--long")


@pytest.fixture(autouse=True)
def seed():
    """Every test draws the same numbers, whichever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run(script, *flags) -> Result, in this process and in an empty folder; script is a method or
    one of TOOLS."""
    monkeypatch.chdir(tmp_path)

    def call(script, *flags):
        if script in TOOLS:
            path = ROOT / f"{script}.py"
            module = importlib.import_module(script)
        else:
            path = ROOT / "methods" / f"{script}.py"
            module = evaluate.load_method(script)
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, flags)])
        capsys.readouterr()
        code = 0
        try:
            module.main()
        except SystemExit as stop:
            code = stop.code
        return Result(code, *capsys.readouterr())

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


def launch(script, *flags, processes=0, cwd=None):
    """Starts a script (a method's name or a path) in a process of its own, or under torchrun in
    several."""
    command = [sys.executable]
    if processes:
        command += ["-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={processes}"]
    path = ROOT / "methods" / f"{script}.py" if script in METHODS else script
    command += [str(path), *map(str, flags)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


class Modules(dict):
    """The methods' modules by name, each loaded when it is first asked for."""

    def __missing__(self, name):
        self[name] = evaluate.load_method(name)
        return self[name]


@pytest.fixture(scope="session")
def methods():
    return Modules()


@pytest.fixture(scope="session")
def made_once(tmp_path_factory, request):
    """made_once(name, make) -> a folder that `make(folder)` has filled. All the processes in which
    pytest runs tests share it: the first one that asks makes it, and the others wait."""

    def call(name, make):
        base = tmp_path_factory.getbasetemp()
        if hasattr(request.config, "workerinput"):
            base = base.parent
        folder = base / name
        with open(base / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / "made").exists():
                folder.mkdir(exist_ok=True)
                make(folder)
                (folder / "made").touch()
        return folder

    return call


def selected(request, test):
    """The parameters of the tests of this name that are to be run, as dicts."""
    items = request.session.items
    return [item.callspec.params for item in items if getattr(item, "originalname", "") == test]


def same_state(a, b):
    """Two nested states hold the same keys and, bit for bit, the same tensors and numbers."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_state(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same_state(x, y) for x, y in zip(a, b, strict=True))
    return a == b
