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
METHODS = sorted(path.stem for path in (ROOT / "methods").glob("*.py"))
TOOLS = ("evaluate", "analyze")
sys.path.insert(0, str(ROOT))
import evaluate  # noqa: E402

# Less than a second per run: three classes of points, a tiny network, and each method's own sizes small too.
TINY = ["--dataset", "blobs", "--backbone", "mlp", "--device", "cpu", "--projector-dim", "16", "--batch-size", "128"]
OWN = {
    "barlow_twins": [],
    "byol": [],
    "center_vector": [],
    "cplearn": ["--c", "64"],
    "dino": ["--prototypes", "32"],
    "gedi": ["--c", "16"],
    "mcr2": [],
    "self_classifier": ["--classes", "16", "--classifiers", "2"],
    "simclr": [],
    "simsiam": [],
    "swav": ["--prototypes", "32", "--queue", "256"],
    "triplet": [],
    "vicreg": [],
    "wmse": ["--embedding-dim", "8", "--part-size", "32"],
}


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
    parser.addoption("--long", action="store_true", help="also the long form of tests/test_killed_runs_and_damaged_files.py")


@pytest.fixture(scope="session")
def long(request):
    """Whether the long form of a test is wanted, with many more kills and damaged files."""
    return request.config.getoption("--long")


@pytest.fixture(autouse=True)
def seed():
    """Every test draws the same numbers, whichever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run(script, *flags) -> Result, in this process and in an empty folder; script is a method or one of TOOLS."""
    monkeypatch.chdir(tmp_path)

    def call(script, *flags):
        path = ROOT / f"{script}.py" if script in TOOLS else ROOT / "methods" / f"{script}.py"
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, flags)])
        capsys.readouterr()
        code = 0
        try:
            (importlib.import_module(script) if script in TOOLS else evaluate.load_method(script)).main()
        except SystemExit as stop:
            code = stop.code
        return Result(code, *capsys.readouterr())

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


def launch(script, *flags, processes=0, cwd=None):
    """Starts a script (a method's name or a path) in a process of its own, or under torchrun in several."""
    command = [sys.executable]
    if processes:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    path = ROOT / "methods" / f"{script}.py" if script in METHODS else script
    command += [str(path), *map(str, flags)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture(scope="session")
def methods():
    return {name: evaluate.load_method(name) for name in METHODS}


def same_state(a, b):
    """Two nested states hold the same keys and, bit for bit, the same tensors and numbers."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_state(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same_state(x, y) for x, y in zip(a, b, strict=True))
    return a == b
