"""The stored runs: reading them, writing them, and measuring new ones.

`runs.jsonl` has one line for each run:

    table      which table of the pages shows it: one of TABLES
    method     the name of the script in methods/
    command    the command that makes the run, with every flag that is not a default but --precision
    seed       its --seed
    code       a hash of the script and of common.py, as `code_of` makes it
    commit     the last commit that changed the script or common.py
    precision  of the network while training: bf16 or fp32
    cpu        the processor
    versions   of Python, torch, torchvision and numpy
    minutes    that the training steps took on one thread, without evaluation
    trained    the figures of the trained network: what evaluate.py prints (linear, knn, nmi,
               shuffled, ami, used, clusters, rank, dimensions, center_norm) and what the log has
               of the last epoch (correlation, assignment_entropy)
    untrained  the same figures of the network before training
    diagnosis  of the test embeddings, by analyze.py: each mode's [number, verdict]

`curves.npz` holds two arrays for each run, under <table>/<label>/<seed>/: `spectrum`, the
eigenvalues of the embeddings' covariance over the largest of them, and `knn`, rows of (epoch, kNN
accuracy) while training.
"""

import ast
import hashlib
import json
import platform
import statistics
import subprocess
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "results" / "runs.jsonl"
CURVES = ROOT / "results" / "curves.npz"
TABLES = ("shapes", "ablations", "photographs", "all_images", "claims")

EVALUATED = (
    "linear", "knn", "nmi", "shuffled", "ami", "used", "clusters", "rank", "dimensions",
    "center_norm",
)  # fmt: skip
LOGGED = ("correlation", "assignment_entropy")

# --- reading and writing


def load():
    """All runs as a list of dicts. Each has its two arrays as `spectrum` and `knn_curve`."""
    runs = [json.loads(line) for line in RUNS.read_text().splitlines()]
    curves = np.load(CURVES)
    for run in runs:
        run["spectrum"] = curves[f"{curves_name(run)}/spectrum"]
        run["knn_curve"] = curves[f"{curves_name(run)}/knn"]
    return runs


def save(runs):
    """Writes all runs, sorted by table, method, flags and seed."""
    lines = []
    curves = {}
    for run in sorted(runs, key=place):
        line = dict(run)
        curves[f"{curves_name(run)}/spectrum"] = line.pop("spectrum")
        curves[f"{curves_name(run)}/knn"] = line.pop("knn_curve")
        lines.append(json.dumps(line) + "\n")
    new_curves = CURVES.with_suffix(".new.npz")
    np.savez_compressed(new_curves, **curves)
    new_runs = RUNS.with_suffix(".new")
    new_runs.write_text("".join(lines), encoding="utf-8", newline="\n")
    new_curves.replace(CURVES)
    new_runs.replace(RUNS)


def store(new):
    """Stores a run in place of the run of the same table and command, if there is one."""
    runs = [run for run in load() if key(run) != key(new)]
    runs.append(new)
    save(runs)


def key(run):
    """What makes two runs the same."""
    return run["table"], run["command"]


def place(run):
    """The order of the runs in the file."""
    return TABLES.index(run["table"]), run["method"], label(run), run["seed"]


def curves_name(run):
    return f"{run['table']}/{label(run)}/{run['seed']}"


def label(run):
    """The method and its flags as text, without --seed. Runs that differ only by the seed have the
    same label."""
    script, flags = run["command"].removesuffix(f" --seed {run['seed']}").split(".py")
    return Path(script).name + flags


def select(runs, table, method=None):
    """The runs of a table, and of a method if one is given."""
    return [run for run in runs if run["table"] == table and method in (None, run["method"])]


# --- the code of a run


def code_of(method):
    """A hash of what a run's figures depend on: the lines of common.py and of the method's script
    that are code. Empty lines, comments and docstrings do not count."""
    digest = hashlib.sha256()
    for path in (ROOT / "common.py", ROOT / "methods" / f"{method}.py"):
        for line in code_lines(path.read_text(encoding="utf-8")):
            digest.update(line.encode() + b"\n")
    return digest.hexdigest()[:12]


def code_lines(text):
    """The lines of a program without empty lines, docstrings, and lines that are comments."""
    in_docstrings = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(
            node
        ):
            docstring = node.body[0]
            in_docstrings.update(range(docstring.lineno, docstring.end_lineno + 1))
    lines = []
    for number, line in enumerate(text.splitlines(), 1):
        is_comment = line.lstrip().startswith("#")
        if line.strip() and not is_comment and number not in in_docstrings:
            lines.append(line)
    return lines


# --- measuring


def measure(run, folder):
    """The finished run in `folder` as a dict like those of `load`. `run` has its table, method,
    command, seed and code. The folder holds evaluated.json, the output of `evaluate.py --untrained
    --json`, and in report/ the output of `analyze.py`."""
    header = json.loads((folder / "run.json").read_text())
    with open(folder / "log.jsonl") as file:
        epochs = [json.loads(line) for line in file]
    untrained, trained = json.loads((folder / "evaluated.json").read_text())
    (analysis,) = json.loads((folder / "report" / "report.json").read_text()).values()
    arrays = np.load(folder / "report" / "report.npz")
    (spectrum,) = [arrays[name] for name in arrays if name.endswith("/spectrum_embedding")]

    speeds = [line["images_per_second"] for line in epochs if "images_per_second" in line]
    images = trained["training_images"]
    # The median, so that an epoch in which the machine was busy with other things counts little.
    seconds = len(speeds) * images / statistics.median(speeds)

    diagnosis = {}
    for mode, entry in analysis["diagnosis"].items():
        number = entry["number"]
        if number is not None:
            number = round(number, 4)
        diagnosis[mode] = [number, entry["verdict"]]

    return run | {
        "commit": commit_of(run["method"]),
        "precision": header["args"]["precision"],
        "cpu": cpu(),
        "versions": header["versions"],
        "minutes": significant(seconds / 60),
        "trained": figures(trained, epochs[-1]),
        "untrained": figures(untrained, epochs[0]),
        "diagnosis": diagnosis,
        "spectrum": np.float32(spectrum / max(spectrum[0], 1e-30)),
        "knn_curve": np.array([(line["epoch"], line["knn"]) for line in epochs if "knn" in line]),
    }


def figures(evaluated, logged):
    """The stored figures of one network, from evaluate.py and from a line of the log."""
    kept = {}
    for name in EVALUATED:
        kept[name] = evaluated[name]
        if isinstance(kept[name], float):
            kept[name] = round(kept[name], 4)
    for name in LOGGED:
        if name in logged:
            kept[name] = significant(logged[name], 4)
    return kept


def significant(number, digits=3):
    return float(f"{number:.{digits}g}")


def commit_of(method):
    """The last commit that changed the script or common.py, with "-changed" if they have been
    changed since, or "unknown" where there is no git."""
    files = ("common.py", f"methods/{method}.py")
    try:
        name = git("log", "-1", "--format=%h", "--", *files)
        changes = git("status", "--porcelain", "--", *files)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    if changes:
        return f"{name}-changed"
    return name


def git(*words):
    command = ["git", "-C", ROOT, *words]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def cpu():
    """The processor, where Linux tells it with family and model: names alone hide generations."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    about = {}
    for line in lines:
        name, _, value = line.partition(":")
        about.setdefault(name.strip(), value.strip())
    if "model name" not in about:
        return platform.processor()
    return f"{about['model name']}, family {about.get('cpu family')}, model {about.get('model')}"
