"""The runs behind methods/README.md.

python tests/results.py add RUN ...   stores what finished runs have come to, as methods/results/<run folder>.json
python tests/results.py               writes the page's tables again, from what is stored
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from claims import CLAIMS
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import analyze  # noqa: E402
import evaluate  # noqa: E402

STORE, PAGE = ROOT / "methods" / "results", ROOT / "methods" / "README.md"
MIXTURES = (10, 50, 200)  # sizes of the mixtures whose entropy is stored


def add(folder):
    """Evaluates a run, trained and untrained, and stores the figures with the command that makes them."""
    with open(Path(folder, "log.jsonl")) as file:
        header, *epochs = [json.loads(line) for line in file]
    command = [sys.executable, str(ROOT / "evaluate.py"), folder, "--init", "--json"]
    untrained, trained = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    options = argparse.Namespace(checkpoints=[folder], init=False, dataset=None, data_dir=None)
    jobs = evaluate.read_checkpoints(options)
    ((model, data),) = evaluate.networks(jobs, options, torch.device("cpu"))
    analysis, arrays, _ = analyze.measure(folder, model, data, MIXTURES, tqdm(disable=True))
    spectrum = arrays["spectrum_embedding"]
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
        for kind, epoch in (("untrained", epochs[0]), ("trained", epochs[-1])):
            if key in epoch:
                record[kind][key] = float(f"{epoch[key]:.4g}")
    record["curve"] = [[epoch["epoch"], epoch["knn"]] for epoch in epochs if "knn" in epoch]  # kNN while training
    speeds = [epoch["images_per_second"] for epoch in epochs if "images_per_second" in epoch]
    record["trained"] |= {
        "views_per_second": round(2 * statistics.median(speeds)),
        "verdicts": {mode: report["verdict"] for mode, report in analysis["diagnosis"].items()},
        "mixture": {k: round(entropy, 4) for k, entropy in analysis["entropy"]["mixture"].items()},
        "spectrum": [float(f"{value / max(spectrum[0], 1e-30):.3g}") for value in spectrum],
    }
    STORE.mkdir(exist_ok=True)
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in record.items()]
    (STORE / f"{Path(folder).name}.json").write_text("{" + ",\n ".join(lines) + "}\n")


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


PHOTOGRAPHS = "--dataset folder --data-dir cifar --image-size 16 --width 16"


def figures(runs, stem):
    """A run's figures, means over its seeds; `start` holds those of the untrained network."""
    its = seeds(runs, stem)

    def means(kind):
        first = its[0][kind]
        return {key: mean(its, kind, key) for key in first if isinstance(first[key], int | float)}

    out = means("trained") | {"start": means("untrained")}
    out["share"] = out["rank"] / out["dimensions"]
    if "mixture" in its[0]["trained"]:
        out["mixture200"] = mean(its, "trained", "mixture", "200")
    return out


def claims(runs):
    yield "| paper | says | made by | measured here | holds |"
    yield "|---|---|---|---|---|"
    for source, says, made, *rest in CLAIMS:
        if made is None:
            by, shown, holds = "", rest[0], "not run"
        elif not isinstance(made, str) and not all(seeds(runs, stem) for stem in made):
            by, shown, holds = "", "not run yet", "not run"
        elif isinstance(made, str):
            by, shown, holds = f"`python -m pytest {made}`", "as the tests say", "yes"
        else:
            commands = []
            for stem in made:
                its = seeds(runs, stem)
                flags = its[0]["command"].removeprefix("python methods/").replace(".py", "").replace(PHOTOGRAPHS, "…")
                words = re.sub(r" --seed \d", "", flags)
                commands.append(f"`{words}`" + (f" ({len(its)} seeds)" if len(its) > 1 else ""))
            measured = [figures(runs, stem) for stem in made]
            by, shown = "<br>".join(commands), rest[0].format(*measured)
            holds = "yes" if rest[1](*measured) else "**no**"
        yield f"| {source} | {says} | {by} | {shown} | {holds} |"


def sharpness(runs):
    yield "| `cplearn` with | seeds | linear | kNN | effective rank | entropy over log c |"
    yield "|---|---|---|---|---|---|"
    for stem in dict.fromkeys(name.rpartition("-")[0] for name in runs if name.startswith("eps-")):
        its, run = seeds(runs, stem), figures(runs, stem)
        flags = its[0]["command"].partition(PHOTOGRAPHS)[2].replace(" --epochs 10", "").strip()
        flags = re.sub(r" ?--seed \d", "", flags)
        yield (f"| {f'`{flags}`' if flags else 'the defaults'} | {len(its)} | {run['linear']:.3f} | {run['knn']:.3f} | "
               f"{run['rank']:.1f} | {run['assignment_entropy']:.3f} |")  # fmt: skip


TABLES = {
    "shapes": shapes,
    "ablations": ablations,
    "cifar": cifar,
    "sharpness": sharpness,
    "claims": claims,
}


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
