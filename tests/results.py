"""The runs behind methods/README.md.

python tests/results.py add RUN ...   stores what finished runs have come to, as methods/results/<run folder>.json
python tests/results.py               writes the page's tables again, from what is stored
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STORE, PAGE = ROOT / "methods" / "results", ROOT / "methods" / "README.md"


def add(folder):
    """Evaluates a run, trained and untrained, and stores the figures with the command that makes them."""
    with open(Path(folder, "log.jsonl")) as file:
        header, *epochs = [json.loads(line) for line in file]
    command = [sys.executable, str(ROOT / "evaluate.py"), folder, "--init", "--json"]
    untrained, trained = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    flags = [f"methods/{header['args']['method']}.py"]
    skip = False
    for word in header["argv"][1:]:
        if not skip and word not in ("--out", "--resume"):
            flags.append("cifar" if flags[-1] == "--data-dir" else word)
        skip = word == "--out"
    figures = ("linear", "knn", "nmi", "shuffled", "ami", "used", "clusters", "rank", "dimensions")
    record = {"command": " ".join(["python", *flags]), "seed": header["args"]["seed"], "versions": header["versions"]}
    for key, row in (("untrained", untrained), ("trained", trained)):
        record[key] = {k: round(row[k], 4) if isinstance(row[k], float) else row[k] for k in figures}
    for key in ("center_norm", "effective_rank", "correlation", "used_codes", "assignment_entropy"):
        if key in epochs[-1]:
            record["trained"][key] = float(f"{epochs[-1][key]:.4g}")
    STORE.mkdir(exist_ok=True)
    (STORE / f"{Path(folder).name}.json").write_text(json.dumps(record, indent=1) + "\n")


def load():
    """All stored runs by name: <table>-<method>[-<what is changed>]-<seed>."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(STORE.glob("*.json"))}


def seeds(runs, stem):
    return [run for name, run in runs.items() if name.rpartition("-")[0] == stem]


def mean(runs, *keys):
    values = []
    for run in runs:
        for key in keys:
            run = run[key]
        values.append(run)
    return statistics.mean(values)


def methods(runs, table):
    """The methods that have runs in a table, the best by kNN first."""
    names = {name.split("-")[1] for name in runs if name.startswith(f"{table}-") and name.count("-") == 2}
    return sorted(names, key=lambda m: -mean(seeds(runs, f"{table}-{m}"), "trained", "knn"))


def gain(run, figure):
    return run["trained"][figure] - run["untrained"][figure]


def shapes(runs):
    yield "| method | seeds | linear | kNN | least gain of kNN | effective rank |"
    yield "|---|---|---|---|---|---|"
    for method in methods(runs, "shapes"):
        its = seeds(runs, f"shapes-{method}")
        linear, knn, rank = (mean(its, "trained", figure) for figure in ("linear", "knn", "rank"))
        least = min(gain(run, "knn") for run in its)
        dimensions = its[0]["trained"]["dimensions"]
        yield f"| `{method}` | {len(its)} | {linear:.3f} | {knn:.3f} | {least:+.3f} | {rank:.1f} of {dimensions} |"
    its = seeds(runs, "shapes-cplearn")
    linear, knn = (mean(its, "untrained", figure) for figure in ("linear", "knn"))
    yield f"| untrained | {len(its)} | {linear:.3f} | {knn:.3f} | | |"


def ablations(runs):
    yield "| command | linear | kNN | effective rank | center norm |"
    yield "|---|---|---|---|---|"
    for name, run in runs.items():
        if name.startswith("ablation-"):
            flags = run["command"].removeprefix("python methods/").replace(".py", "").replace(" --dataset shapes", "")
            its = run["trained"]
            yield (f"| `{flags}` | {its['linear']:.3f} | {its['knn']:.3f} | "
                   f"{its['rank']:.1f} of {its['dimensions']} | {its['center_norm']:.2f} |")  # fmt: skip


CIFAR = {"dataset folder", "data-dir cifar", "image-size 16", "width 16", "epochs 20", "projector-dim 512"}


def cifar(runs):
    """A row for each method, named with the flags that are not those of all, and rows of "other" runs."""
    yield "| method | seeds | linear | gain | kNN | gain | with Adam, 1e-3, 1e-4: seeds | linear | kNN |"
    yield "|---|---|---|---|---|---|---|---|---|"
    others = dict.fromkeys(name.split("-")[1] for name in runs if name.startswith("other-"))
    for table, names in (("cifar", methods(runs, "cifar")), ("other", others)):
        for method in names:
            its, before, figures = seeds(runs, f"{table}-{method}"), seeds(runs, f"shared-{method}"), []
            for figure in ("linear", "knn"):
                gains = statistics.mean(gain(run, figure) for run in its)
                figures += [f"{mean(its, 'trained', figure):.3f}", f"{gains:+.3f}"]
            shown = before if table == "cifar" else []
            figures.append(f"{len(shown)}" if shown else "")
            figures += [f"{mean(shown, 'trained', figure):.3f}" if shown else "" for figure in ("linear", "knn")]
            flags = [part.strip() for part in its[0]["command"].split("--")[1:]]
            own = "".join(f" --{flag}" for flag in flags if flag not in CIFAR and "seed" not in flag)
            yield f"| `{method}{own}` | {len(its)} | {' | '.join(figures)} |"


TABLES = {"shapes": shapes, "ablations": ablations, "cifar": cifar}


def page(text, runs):
    """The page's text with each table between its marks written again."""
    for name, table in TABLES.items():
        begin, end = f"<!-- {name}: written by tests/results.py -->\n", f"<!-- end of {name} -->"
        if begin in text:
            before, _, rest = text.partition(begin)
            text = before + begin + "\n" + "\n".join(table(runs)) + "\n\n" + end + rest.partition(end)[2]
    return text


if __name__ == "__main__":
    if sys.argv[1:2] == ["add"]:
        for folder in sys.argv[2:]:
            add(folder)
    PAGE.write_text(page(PAGE.read_text(), load()))
