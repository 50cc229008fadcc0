"""The stored runs: reading them, writing them, and adding new ones.

`runs.jsonl` has one line for each run:

    table      which table of the pages shows it: one of TABLES
    method     the name of the script in methods/
    command    the command that makes the run, with every flag that is not a default
    seed       its --seed
    commit     the commit at which the run was stored: its code is that of this commit or of its
               parent
    cpu        the processor, null where it is not known
    threads    how many threads torch had, null where it is not known
    versions   of Python, torch, torchvision and numpy
    minutes    that the training steps took, without evaluation, null where it is not known
    trained    the figures of the trained network: what evaluate.py prints (linear, knn, nmi,
               shuffled, ami, used, clusters, rank, dimensions) and what the log has of the last
               epoch (center_norm, effective_rank, correlation, used_codes, assignment_entropy)
    untrained  the same figures of the network before training
    verdicts   what the diagnosis of analyze.py says of each mode of collapse
    mixture    the entropies of mixtures of 10, 50 and 200 Gaussians, from analyze.py

`curves.npz` holds two arrays for each run, under <table>/<label>/<seed>/: `spectrum`, the
eigenvalues of the embeddings' covariance over the largest of them, and `knn`, rows of (epoch, kNN
accuracy) while training. The oldest runs have no verdicts, mixture and curves.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402

RUNS = ROOT / "results" / "runs.jsonl"
CURVES = ROOT / "results" / "curves.npz"
TABLES = ("shapes", "ablations", "budget", "all_images", "claims")

EVALUATED = ("linear", "knn", "nmi", "shuffled", "ami", "used", "clusters", "rank", "dimensions")
LOGGED = ("center_norm", "effective_rank", "correlation", "used_codes", "assignment_entropy")

# The order of flags in a stored command. Other flags stand between those of FIRST and of LAST.
FIRST = ("dataset", "data-dir", "image-size", "width", "epochs", "precision", "projector-dim")
LAST = ("eval-every", "seed")

# --- reading and writing


def load():
    """All runs as a list of dicts. Each has its two arrays as `spectrum` and `knn_curve`, or None
    where they are not stored."""
    runs = [json.loads(line) for line in RUNS.read_text().splitlines()]
    curves = np.load(CURVES)
    for run in runs:
        run["spectrum"] = curves.get(f"{curves_name(run)}/spectrum")
        run["knn_curve"] = curves.get(f"{curves_name(run)}/knn")
    return runs


def save(runs):
    """Writes all runs, sorted by table, method, flags and seed."""
    lines = []
    curves = {}
    for run in sorted(runs, key=place):
        line = dict(run)
        spectrum = line.pop("spectrum")
        knn_curve = line.pop("knn_curve")
        if spectrum is not None:
            curves[f"{curves_name(run)}/spectrum"] = spectrum
        if knn_curve is not None:
            curves[f"{curves_name(run)}/knn"] = knn_curve
        lines.append(json.dumps(line) + "\n")
    RUNS.write_text("".join(lines))
    np.savez_compressed(CURVES, **curves)


def place(run):
    return TABLES.index(run["table"]), run["method"], label(run), run["seed"]


def curves_name(run):
    return f"{run['table']}/{label(run)}/{run['seed']}"


# --- commands


def flags_of(words):
    """A dict of the flags in `words`, which are what stands behind the script in a command: the
    name without hyphens to the value, which is "" for a switch."""
    flags = {}
    for word in words:
        if word.startswith("--"):
            name, _, value = word[2:].partition("=")
            flags[name] = value
        else:
            flags[name] = f"{flags[name]} {word}".strip()
    return flags


def text_of(flags):
    """The flags of a dict as they are typed, those of FIRST first and those of LAST last."""
    middle = [name for name in flags if name not in FIRST + LAST]
    typed = []
    for name in (*FIRST, *middle, *LAST):
        if name in flags:
            typed.append(f"--{name} {flags[name]}".strip())
    return " ".join(typed)


def label(run, *without):
    """The method and its flags as text, without --eval-every, --seed and the flags that `without`
    names. Runs that differ only by the seed have the same label."""
    flags = flags_of(run["command"].split()[2:])
    for name in (*LAST, *without):
        flags.pop(name, None)
    return f"{run['method']} {text_of(flags)}".strip()


def select(runs, table, method=None):
    """The runs of a table, and of a method if one is given."""
    return [run for run in runs if run["table"] == table and method in (None, run["method"])]


# --- adding runs


def add(folders, table):
    """Evaluates the finished runs in `folders` and stores them in `table`, each in place of a run
    of the same command. Processor, threads and commit are those of now, so add a run on the
    machine, and at the commit, that made it."""
    runs = load()
    for folder in folders:
        new = measure(Path(folder), table)
        runs = [run for run in runs if (run["table"], run["command"]) != (table, new["command"])]
        runs.append(new)
        save(runs)
        print(f"stored {new['command']}")


def measure(folder, table):
    """The run in `folder`, evaluated, as a dict like those of `load`."""
    with open(folder / "log.jsonl") as file:
        epochs = [json.loads(line) for line in file]
    if "epoch" in epochs[0]:
        header = json.loads((folder / "run.json").read_text())
    else:
        header = epochs.pop(0)  # of an older run
    args = argparse.Namespace(**header["args"])

    flags = flags_of(header["argv"][1:])
    for name in ("out", "resume", "device"):
        flags.pop(name, None)
    if "data-dir" in flags:
        flags["data-dir"] = Path(flags["data-dir"]).name
    flags["seed"] = str(args.seed)

    images = len(common.load_data(args, torch.device("cpu")).images)
    speeds = [line["images_per_second"] for line in epochs if "images_per_second" in line]
    seconds = args.epochs * images / statistics.median(speeds)

    untrained, trained = json.loads(output_of("evaluate.py", folder, "--untrained", "--json"))
    with tempfile.TemporaryDirectory() as report:
        output_of("analyze.py", folder, "--components", "10", "50", "200", "--out", report)
        (analysis,) = json.loads(Path(report, "report.json").read_text()).values()
        arrays = np.load(Path(report, "report.npz"))
        (spectrum,) = [arrays[name] for name in arrays if name.endswith("/spectrum_embedding")]

    knn_curve = [(line["epoch"], line["knn"]) for line in epochs if "knn" in line]
    return {
        "table": table,
        "method": args.method,
        "command": f"python methods/{args.method}.py {text_of(flags)}",
        "seed": args.seed,
        "commit": commit(),
        "cpu": cpu(),
        "threads": torch.get_num_threads(),
        "versions": header["versions"],
        "minutes": significant(seconds / 60),
        "trained": figures(trained, epochs[-1]),
        "untrained": figures(untrained, epochs[0]),
        "verdicts": {mode: entry["verdict"] for mode, entry in analysis["diagnosis"].items()},
        "mixture": {k: round(nats, 4) for k, nats in analysis["entropy"]["mixture"].items()},
        "spectrum": np.float32(spectrum / max(spectrum[0], 1e-30)),
        "knn_curve": np.array(knn_curve),
    }


def output_of(tool, *words):
    """What evaluate.py or analyze.py prints."""
    command = [sys.executable, ROOT / tool, *words]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


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


def commit():
    """The commit of now, with "-changed" if the training code differs from it."""
    name = git("rev-parse", "--short", "HEAD")
    if git("status", "--porcelain", "--", "common.py", "methods"):
        name += "-changed"
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
