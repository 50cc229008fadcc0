"""Makes every run of the pages of results, and writes the pages.

    python results/make.py --list
    python results/make.py
    python results/make.py --table shapes --method simclr

A run is trained on one thread, then evaluated and analyzed, then stored in results/runs.jsonl. Two
runs go side by side. A run that is stored already, by the code as it is now, is skipped. "Code"
are the lines of its script and of common.py, without comments. At the end, and with --pages at
once, the tables and pictures are written (see results/write_pages.py).

Ctrl-C stops the runs, and the same command goes on where they were. Run folders are kept in
runs/results/ and may be deleted once their runs are stored.

The photographs are those of CIFAR-10, saved as JPEG once. They are downloaded and saved to
data/cifar (1000 training and 500 test images of each class) and data/cifar50 (all), unless these
folders are there.
"""

import argparse
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time

import plan
import store
import tables
import write_pages
from store import ROOT
from torchvision.datasets import CIFAR10

try:
    import fcntl
except ImportError:  # Windows, where a second program is not kept out
    fcntl = None

OUT = ROOT / "runs" / "results"

# Training steps allocate and free large matrices. By default glibc gives their memory back to the
# system each time, which takes longer than some of the steps.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": "2000000000",
    "MALLOC_TRIM_THRESHOLD_": "4000000000",
}

# --- what there is to make


def missing(options):
    """The planned runs that are not stored, of the tables and methods that were asked for."""
    there = {(*store.key(run), run["code"]) for run in store.load()}
    runs = []
    for run in plan.planned():
        wanted = options.table in (None, run["table"]) and options.method in (None, run["method"])
        if wanted and (*store.key(run), run["code"]) not in there:
            runs.append(run)
    return runs


def show(runs, jobs):
    """What is missing, and how long it takes."""
    for run in runs:
        print(f"about {plan.MINUTES[run['table']]} min  {run['table']}  {run['command']}")
    minutes = sum(plan.MINUTES[run["table"]] for run in runs)
    hours = minutes / jobs / 60
    print(f"{len(runs)} runs are missing: about {hours:.1f} hours, {jobs} at a time")


# --- the photographs


def save_photographs():
    """Saves data/cifar and data/cifar50, unless they are there."""
    try:
        save_first(ROOT / "data" / "cifar", train=1000, test=500)
        save_first(ROOT / "data" / "cifar50", train=5000, test=1000)
    except (OSError, RuntimeError) as error:
        print(f"make.py: cannot download and save CIFAR-10: {error}", file=sys.stderr)
        sys.exit(2)


def save_first(folder, **limits):
    """Saves the first images of each class of CIFAR-10 as JPEG, as many as `limits` says for each
    split, to <folder>/<split>/<class>/. The folder appears when it is complete."""
    if folder.is_dir():
        return
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    for split, limit in limits.items():
        is_train = split == "train"
        data = CIFAR10(ROOT / "data", train=is_train, download=True)
        count = [0] * len(data.classes)
        for image, label in data:
            if count[label] == limit:
                continue
            path = unfinished / split / data.classes[label] / f"{count[label]:05d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path, quality=75)
            count[label] += 1
    unfinished.rename(folder)


# --- making runs


def lock():
    """Keeps a second program like this one out, as long as this process lives, however it ends."""
    OUT.mkdir(parents=True, exist_ok=True)
    file = os.open(OUT / "lock", os.O_CREAT | os.O_WRONLY)
    if fcntl is None:
        return
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        print(f"make.py: another one makes runs in {OUT}: wait for it", file=sys.stderr)
        sys.exit(2)


def folder_of(run):
    """Where a run is made. The name depends on code and precision, so that no run goes on with
    others."""
    text = f"{run['command']} {run['precision']} {run['code']}"
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return OUT / f"{run['table']}-{run['method']}-seed{run['seed']}-{digest}"


def precision_of(run, bf16):
    """The precision of a run's network. `bf16` is about the runs on photographs alone."""
    if bf16 and "--dataset folder" in run["command"]:
        return "bf16"
    return "fp32"


def stages(run):
    """The commands that make a run, one after another, each with the file for what it prints. They
    run on the CPU, as all runs of the pages do."""
    folder = folder_of(run)
    cpu = ["--device", "cpu"]
    precision = ["--precision", run["precision"]]
    train = [*run["command"].split()[1:], "--out", folder, "--resume", *precision, *cpu]
    evaluate = ["evaluate.py", folder, "--untrained", "--json", *cpu]
    analyze = ["analyze.py", folder, "--components", "10", "--out", folder / "report", *cpu]
    return [
        (train, f"{folder}.log"),
        (evaluate, folder / "evaluated.json"),
        (analyze, folder / "analyzed.txt"),
    ]


def start_next_stage(job):
    """Takes the next command off a job's list and starts it."""
    command, output = job["stages"].pop(0)
    with open(output, "w") as printed, open(f"{folder_of(job['run'])}.errors", "a") as errors:
        job["process"] = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=os.environ | ENVIRONMENT,
            stdout=printed,
            stderr=errors,
            start_new_session=True,  # Ctrl-C reaches this program alone, which then stops the runs
        )


def finish(run, status):
    """Stores a run whose last stage has ended with `status`. Raises ValueError if it failed, or if
    its code was changed while it was made."""
    if status != 0:
        raise ValueError(f"see {folder_of(run)}.errors")
    if store.code_of(run["method"]) != run["code"]:
        raise ValueError("its code was changed meanwhile")
    store.store(store.measure(run, folder_of(run)))


def make(runs, jobs, bf16=False):
    """Makes the runs, `jobs` at a time, and stores each when it is finished. With `bf16` the runs
    on photographs are in bf16. Returns how many failed."""
    OUT.mkdir(parents=True, exist_ok=True)
    waiting = list(runs)
    working = []  # dicts of a run, the stages that are left, and the process of the stage now
    failed = 0
    try:
        while waiting or working:
            while waiting and len(working) < jobs:
                run = waiting.pop(0)
                code = store.code_of(run["method"])
                run = run | {"code": code, "precision": precision_of(run, bf16)}
                job = {"run": run, "stages": stages(run)}
                start_next_stage(job)
                working.append(job)
                say(f"start  {run['command']}")
            time.sleep(0.5)
            for job in list(working):
                run = job["run"]
                status = job["process"].poll()
                if status is None:
                    continue
                if status == 0 and job["stages"]:
                    start_next_stage(job)
                    continue
                working.remove(job)
                try:
                    finish(run, status)
                    say(f"stored {run['command']}, {len(waiting) + len(working)} are left")
                except (OSError, ValueError, KeyError) as error:
                    failed += 1
                    say(f"failed {run['command']}: {error}")
    finally:
        for job in working:
            job["process"].send_signal(signal.SIGTERM)
        for job in working:
            job["process"].wait()
    return failed


def say(text):
    """Prints a line with the time."""
    print(f"{time.strftime('%H:%M')} {text}", flush=True)


def stop(*_):
    """SIGTERM stops the runs as Ctrl-C does."""
    raise KeyboardInterrupt


def number_of_jobs(text):
    jobs = int(text)
    if jobs < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return jobs


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    methods = [entry[0] for entry in tables.METHODS]
    parser.add_argument("--list", action="store_true", help="say what is missing, and stop")
    parser.add_argument("--pages", action="store_true", help="write the pages, and stop")
    parser.add_argument("--photographs", action="store_true", help="save the photographs, and stop")
    parser.add_argument("--table", choices=store.TABLES, help="only the runs of this table")
    parser.add_argument("--method", choices=methods, help="only the runs of this method")
    parser.add_argument(
        "--bf16",
        action="store_true",
        help="make the runs on photographs in bf16. A CPU with neither AVX512-BF16 nor AMX is then "
        "many times slower",
    )
    parser.add_argument("--jobs", type=number_of_jobs, default=2, help="runs at a time [2]")
    options = parser.parse_args()
    if options.pages:
        write_pages.write_pages()
        return
    if options.photographs:
        save_photographs()
        return
    runs = missing(options)
    if options.list or not runs:
        show(runs, options.jobs)
        return
    lock()
    if any("--dataset folder" in run["command"] for run in runs):
        save_photographs()
    signal.signal(signal.SIGTERM, stop)
    try:
        failed = make(runs, options.jobs, options.bf16)
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on")
    if failed:
        print(f"{failed} of {len(runs)} runs failed")
    write_pages.write_pages()
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
