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
import os
import shutil
import signal
import subprocess
import sys
import time

import plan
import store
import write_pages
from store import ROOT
from torchvision.datasets import CIFAR10

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
    planned = len(plan.planned())
    print(f"{len(runs)} of {planned} runs are missing: about {hours:.1f} hours, {jobs} a time")


# --- the photographs


def save_photographs(folder, limits):
    """Saves the first images of each class of CIFAR-10 as JPEG, `limits` = how many of (training,
    test), to <folder>/<split>/<class>/. The folder appears when it is complete."""
    if folder.is_dir():
        return
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    for split, limit in zip(("train", "test"), limits, strict=True):
        data = CIFAR10(ROOT / "data", train=split == "train", download=True)
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


def folder_of(run):
    """Where a run is made. The name has the code, so that no run goes on with other code."""
    name = store.label(run).replace(" --", "-").replace(" ", "-").replace("/", "-")
    return OUT / f"{run['table']}-{name}-seed-{run['seed']}-{run['code']}"


def stages(run):
    """The commands that make a run, one after another, each with the file for what it prints."""
    folder = folder_of(run)
    train = [*run["command"].split()[1:], "--out", folder, "--resume"]
    evaluate = ["evaluate.py", folder, "--untrained", "--json"]
    analyze = ["analyze.py", folder, "--components", "10", "--out", folder / "report"]
    return [
        (train, f"{folder}.log"),
        (evaluate, folder / "evaluated.json"),
        (analyze, folder / "analyzed.txt"),
    ]


def start_next_stage(job):
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


def make(runs, jobs):
    """Makes the runs, `jobs` at a time, and stores each when it is finished. Returns how many
    failed."""
    OUT.mkdir(parents=True, exist_ok=True)
    waiting = list(runs)
    working = []  # dicts of a run, the stages that are left, and the process of the stage now
    failed = 0
    try:
        while waiting or working:
            while waiting and len(working) < jobs:
                run = waiting.pop(0)
                job = {"run": run, "stages": stages(run)}
                start_next_stage(job)
                working.append(job)
                say(f"start  {run['command']}")
            time.sleep(0.5)
            for job in list(working):
                status = job["process"].poll()
                if status is None:
                    continue
                if status == 0 and job["stages"]:
                    start_next_stage(job)
                    continue
                working.remove(job)
                run = job["run"]
                if status == 0:
                    store.store(store.measure(run, folder_of(run)))
                    say(f"stored {run['command']}, {len(waiting) + len(working)} are left")
                else:
                    failed += 1
                    say(f"failed {run['command']}, see {folder_of(run)}.errors")
    finally:
        for job in working:
            job["process"].send_signal(signal.SIGTERM)
        for job in working:
            job["process"].wait()
    return failed


def say(text):
    print(f"{time.strftime('%H:%M')} {text}", flush=True)


def stop(*_):
    raise KeyboardInterrupt


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="say what is missing, and stop")
    parser.add_argument("--pages", action="store_true", help="write the pages, and stop")
    parser.add_argument("--table", choices=store.TABLES, help="only the runs of this table")
    parser.add_argument("--method", help="only the runs of this method")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time [2]")
    options = parser.parse_args()
    if options.pages:
        write_pages.write_pages()
        return
    runs = missing(options)
    if options.list:
        show(runs, options.jobs)
        return
    if any("data/cifar " in run["command"] for run in runs):
        save_photographs(ROOT / "data" / "cifar", (1000, 500))
    if any("data/cifar50 " in run["command"] for run in runs):
        save_photographs(ROOT / "data" / "cifar50", (5000, 1000))
    signal.signal(signal.SIGTERM, stop)
    try:
        failed = make(runs, options.jobs)
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on")
    write_pages.write_pages()
    if failed:
        sys.exit(f"{failed} runs failed")


if __name__ == "__main__":
    main()
