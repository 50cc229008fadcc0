"""The runs behind methods/README.md.

python tests/results.py add RUN ...   stores what finished runs have come to, as methods/results/<run folder>.json
python tests/results.py               writes the page's tables and two pictures of README.md again, from what is stored
"""

import argparse
import json
import math
import re
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from claims import CLAIMS
from matplotlib import pyplot as plt
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import analyze  # noqa: E402
import evaluate  # noqa: E402

STORE, PAGE = ROOT / "methods" / "results", ROOT / "methods" / "README.md"
PICTURES = ROOT / ".github" / "pictures"
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
            flags.append(Path(word).name if flags[-1] == "--data-dir" else word)
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


def spread(values, form=".3f"):
    """Mean and standard deviation over the seeds."""
    return f"{statistics.mean(values):{form}}" + (f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else "")


def made_again(runs, method):
    """Runs on the shapes of the same seeds, on another CPU or with another number of threads."""
    return seeds(runs, f"again-{method}") + seeds(runs, f"third-{method}")


def shapes(runs):
    """Every method on the drawn shapes."""
    yield "| method | seeds | linear | kNN | kNN, made again | least gain of kNN | effective rank |"
    yield "|---|---|---|---|---|---|---|"
    for method in methods(runs, "shapes"):
        its, again = seeds(runs, f"shapes-{method}"), made_again(runs, method)
        linear, knn = (spread([run["trained"][figure] for run in its]) for figure in ("linear", "knn"))
        second = spread([run["trained"]["knn"] for run in again])
        least = min(gain(run, "knn") for run in its + again)
        rank = f"{mean(its, 'trained', 'rank'):.1f} of {its[0]['trained']['dimensions']}"
        yield f"| `{method}` | {len(its)} | {linear} | {knn} | {second} | {least:+.3f} | {rank} |"
    its = seeds(runs, "shapes-cplearn")
    linear, knn = (spread([run["untrained"][figure] for run in its]) for figure in ("linear", "knn"))
    yield f"| untrained | {len(its)} | {linear} | {knn} | | | |"


def ablations(runs):
    """In brackets the same figure of the run with the mechanism, of the same seed."""
    yield "| command | linear | kNN | effective rank | center norm |"
    yield "|---|---|---|---|---|"
    for name, run in runs.items():
        if name.startswith("ablation-"):
            flags = run["command"].removeprefix("python methods/").replace(".py", "").replace(" --dataset shapes", "")
            cells = []
            for figure, form in (("linear", ".3f"), ("knn", ".3f"), ("rank", ".1f"), ("center_norm", ".2f")):
                with_ = runs[f"shapes-{name.split('-')[1]}-{run['seed']}"]["trained"][figure]
                of = f" of {run['trained']['dimensions']}" if figure == "rank" else ""
                cells.append(f"{run['trained'][figure]:{form}} ({with_:{form}}){of}")
            yield f"| `{flags}` | {' | '.join(cells)} |"


USUAL = {"dataset folder", "data-dir cifar", "image-size 16", "width 16", "projector-dim 512"}


def named(name, run, *usual):
    """A method with those of the run's flags that are not the table's."""
    flags = [part.strip() for part in run["command"].split("--")[1:]]
    own = "".join(f" --{flag}" for flag in flags if flag not in USUAL.union(usual) and "seed" not in flag)
    return f"`{name.split('-')[0]}{own}`"


def cifar(runs):
    """A row for each method, named with the flags that are not those of all, and rows of "other" runs. In brackets: the
    recipe's mean less that of the shared settings, seed by seed, and its standard error."""
    yield "| method | seeds | linear | gain | kNN | gain | with Adam, 1e-3, 1e-4: seeds | linear | kNN |"
    yield "|---|---|---|---|---|---|---|---|---|"
    others = dict.fromkeys(name.removeprefix("other-").rpartition("-")[0] for name in runs if name.startswith("other-"))
    for table, names in (("cifar", methods(runs, "cifar")), ("other", others)):
        for name in names:
            its, before, figures = seeds(runs, f"{table}-{name}"), seeds(runs, f"shared-{name}"), []
            for figure in ("linear", "knn"):
                gains = statistics.mean(gain(run, figure) for run in its)
                figures += [f"{mean(its, 'trained', figure):.3f}", f"{gains:+.3f}"]
            figures.append(f"{len(before)}" if before else "")
            pairs = [(new, old) for new in its for old in before if new["seed"] == old["seed"]]
            for figure in ("linear", "knn"):
                figures.append(f"{mean(before, 'trained', figure):.3f}" if before else "")
                if len(pairs) > 1:
                    apart = [new["trained"][figure] - old["trained"][figure] for new, old in pairs]
                    error = statistics.stdev(apart) / math.sqrt(len(apart))
                    figures[-1] += f" ({round(statistics.mean(apart), 3) + 0.0:+.3f} ± {error:.3f})"  # + 0.0: no -0.000
            yield f"| {named(name, its[0], 'epochs 20')} | {len(its)} | {' | '.join(figures)} |"


# Linear accuracy with a whole ResNet-18 and 1000 epochs: solo-learn's README, or Table 8 of the CPLearn paper.
PUBLISHED = {
    "barlow_twins": 0.921, "byol": 0.926, "dino": 0.895, "simclr": 0.907, "simsiam": 0.905, "swav": 0.892,
    "vicreg": 0.921, "wmse": 0.887, "cplearn": 0.913, "gedi": 0.800, "self_classifier": 0.848,
}  # fmt: skip


def fifty(runs):
    """Table A: every method at the same budget."""
    yield "| method | seeds | linear | kNN | NMI, shuffled, AMI | rank | center | codes | collapse | views/s | paper |"
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    for method in methods(runs, "fifty"):
        its = [run["trained"] for run in seeds(runs, f"fifty-{method}")]
        label = named(method, runs[f"fifty-{method}-0"], "epochs 50", "eval-every 5")
        values = {key: [run[key] for run in its] for key in its[0] if key not in ("verdicts", "mixture", "spectrum")}
        modes = [mode for run in its for mode, verdict in run["verdicts"].items() if verdict == "collapsed"]
        used = f"{statistics.mean(values['used']):.0f} of {its[0]['clusters']}" if "used_codes" in values else ""
        cells = [label, f"{len(its)}", spread(values["linear"]), spread(values["knn"])]
        cells.append(" / ".join(f"{statistics.mean(values[key]):.2f}" for key in ("nmi", "shuffled", "ami")))
        cells += [
            f"{spread(values['rank'], '.1f')} of {its[0]['dimensions']}",
            spread(values["center_norm"], ".2f"),
            used,
        ]
        cells.append(", ".join(f"{mode} ({modes.count(mode)})" for mode in dict.fromkeys(modes)) or "none")
        cells += [f"{values['views_per_second'][0]}", f"{PUBLISHED[method]:.3f}" if method in PUBLISHED else "–"]
        yield f"| {' | '.join(cells)} |"
    floor = {run["seed"]: run["untrained"] for name, run in runs.items() if name.startswith("fifty-")}
    if floor:
        linear, knn = (spread([run[key] for run in floor.values()]) for key in ("linear", "knn"))
        yield f"| untrained | | {linear} | {knn} | | | | | | | |"


RELATIVE = ("rank", "center_norm")  # in these methods differ much, so a deviation is a share of the mean


def deviation(runs, figure):
    """What a run of Table A differs by from others of its method: the root of the mean of all methods' variances."""
    variances = []
    for method in methods(runs, "fifty"):
        values = [run["trained"][figure] for run in seeds(runs, f"fifty-{method}")]
        variances.append(statistics.variance(values) / (statistics.mean(values) ** 2 if figure in RELATIVE else 1))
    return math.sqrt(statistics.mean(variances))


def remade(runs):
    """Rows of Table A made again: the difference of two means of n runs has sqrt(2 / n) times a run's deviation, and
    one of 20 such differences is more than twice as large."""
    yield "| method | figure | above | made again | apart | stated |"
    yield "|---|---|---|---|---|---|"
    for method in methods(runs, "refifty"):
        for figure, name in {"linear": "linear", "knn": "kNN", "rank": "rank", "center_norm": "center norm"}.items():
            first, again = (
                [run["trained"][figure] for run in seeds(runs, f"{table}-{method}")] for table in ("fifty", "refifty")
            )
            form = ".1f" if figure == "rank" else ".3f"
            apart = abs(statistics.mean(again) - statistics.mean(first))
            stated = 2 * math.sqrt(1 / len(first) + 1 / len(again)) * deviation(runs, figure)
            if figure in RELATIVE:
                stated *= statistics.mean(first)
            cells = [f"`{method}`", name, spread(first, form), spread(again, form)]
            yield f"| {' | '.join(cells)} | {apart:{form}} | {stated:{form}} |"
    accuracy = " and ".join(f"{deviation(runs, key):.4f}" for key in ("linear", "knn"))
    relative = " and ".join(f"{100 * deviation(runs, key):.1f} %" for key in RELATIVE)
    yield f"\nA run's deviation: {accuracy} in linear and kNN, {relative} of the mean in rank and center norm."


WHOLE = " --dataset folder --data-dir cifar50 --width 16 --epochs {} --precision bf16 --eval-every {} --seed 0"


def whole(runs):
    """Table B: few methods on all images, named with the flags that are not those of all, then how kNN rises."""
    rows = []
    for run in (run for name, run in runs.items() if name.startswith("all-")):
        own = re.sub(WHOLE.format(r"\d+", r"\d+"), "", run["command"])
        rows.append((own.removeprefix("python methods/").replace(".py", ""), run["curve"][-1][0], run))
    rows.sort(key=lambda row: (row[1], -row[2]["trained"]["knn"]))
    columns = "epochs | linear | gain | kNN | gain | NMI, shuffled, AMI | rank | center | codes | collapse | paper"
    yield f"| method | {columns} |"
    yield "|---" * 12 + "|"
    for method, epochs, run in rows:
        its = run["trained"]
        cells = [f"`{method}`", str(epochs)]
        for figure in ("linear", "knn"):
            cells += [f"{its[figure]:.3f}", f"{gain(run, figure):+.3f}"]
        cells.append(" / ".join(f"{its[key]:.2f}" for key in ("nmi", "shuffled", "ami")))
        cells += [f"{its['rank']:.1f} of {its['dimensions']}", f"{its['center_norm']:.2f}"]
        cells.append(f"{its['used']} of {its['clusters']}" if "used_codes" in its else "")
        cells.append(", ".join(mode for mode, verdict in its["verdicts"].items() if verdict == "collapsed") or "none")
        yield f"| {' | '.join([*cells, f'{PUBLISHED[method.split()[0]]:.3f}'])} |"
    yield ""
    at = range(0, 1 + max((epochs for _, epochs, _ in rows), default=0), 4)
    yield f"| kNN after epoch | {' | '.join(map(str, at))} |"
    yield "|---" * (1 + len(at)) + "|"
    for method, epochs, run in rows:
        knn = dict(run["curve"])
        yield f"| `{method}`, {epochs} epochs | {' | '.join(f'{knn[e]:.3f}' if e in knn else '' for e in at)} |"


PHOTOGRAPHS = "--dataset folder --data-dir cifar --image-size 16 --width 16"
TEN = {
    f"{PHOTOGRAPHS} --epochs 10 --projector-dim 512 --eval-every 1": "…",
    f"{PHOTOGRAPHS} --epochs 10 --projector-dim 128 --eps 1e-8 --weight-decay 1e-4": "…",
}  # what the page's claims leave out


def figures(runs, stem):
    """A run's figures, means over its seeds; `start` holds those of the untrained network."""
    its = seeds(runs, stem)

    def means(kind):
        keys = set.intersection(*(set(run[kind]) for run in its))  # older runs hold less
        return {key: mean(its, kind, key) for key in keys if isinstance(its[0][kind][key], int | float)}

    out = means("trained") | {"start": means("untrained")}
    out["share"] = out["rank"] / out["dimensions"]
    if "curve" in its[0]:
        out["curve"] = [knn for _, knn in its[0]["curve"]]
    if all("mixture" in run["trained"] for run in its):
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
                flags = its[0]["command"].removeprefix("python methods/").replace(".py", "")
                for long, short in TEN.items():
                    flags = flags.replace(long, short)
                flags = re.sub(r" --seed \d| --eval-every 1", "", flags)
                commands.append(f"`{flags}`" + (f" ({len(its)} seeds)" if len(its) > 1 else ""))
            measured = [figures(runs, stem) for stem in made]
            by, shown = "<br>".join(commands), rest[0].format(*measured)
            holds = {True: "yes", False: "**no**", None: "too close"}[rest[1](*measured)]
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


# The picture of spectra: for each method a run without its mechanism, and the flag that removes it.
WITHOUT = {
    "simclr": ("ablation-simclr-temperature-100", "--temperature 100"),
    "simsiam": ("ablation-simsiam-no-stop-gradient", "--no-stop-gradient"),
    "byol": ("ablation-byol-momentum-0-no-predictor-last-layer-linear", "--momentum 0 --no-predictor"),
    "dino": ("ablation-dino-no-centering", "--no-centering"),
    "swav": ("ablation-swav-no-sinkhorn", "--no-sinkhorn"),
    "barlow_twins": ("claim-barlow_twins-offdiag", "--lambda-offdiag 0"),
    "vicreg": ("ablation-vicreg-covariance-weight-0", "--covariance-weight 0"),
    "wmse": ("ablation-wmse-whitening-none", "--whitening none"),
    "mcr2": ("ablation-mcr2-expansion-weight-0", "--expansion-weight 0"),
    "triplet": ("ablation-triplet-negatives-none", "--negatives none"),
    "self_classifier": ("ablation-self_classifier-no-column-softmax", "--no-column-softmax"),
    "gedi": ("ablation-gedi-prior-weight-0", "--prior-weight 0"),
    "center_vector": ("ablation-center_vector-center-weight-0", "--center-weight 0"),
    "cplearn": ("ablation-cplearn-beta-10", "--beta 10"),
}


def picture_of_spectra(runs):
    """The eigenvalues of the embeddings' covariance, with the mechanism and without, on the drawn shapes. Their sum is
    scaled to 1 - center_norm², the variance of the directions, so that the curve of one point is low."""
    figure, axes = plt.subplots(3, 5, figsize=(12, 6.4), sharex=True, sharey=True, layout="constrained")
    for ax, (method, (without, flag)) in zip(axes.flat, WITHOUT.items(), strict=False):
        for stem, color in ((f"shapes-{method}", "tab:blue"), (without, "tab:red")):
            its = runs[f"{stem}-0"]["trained"]
            values = np.array(its["spectrum"])
            values = values / values.sum() * (1 - its["center_norm"] ** 2)
            ax.plot(np.linspace(0, 1, len(values)), np.log10(values.clip(1e-8)), color=color)
        ax.set_title(method, fontsize=10)
        ax.text(0.98, 0.98, flag.replace(" --", "\n--"), color="tab:red", fontsize=8, ha="right", va="top",
                transform=ax.transAxes)  # fmt: skip
        ax.set(xticks=(0, 0.5, 1), ylim=(-8.3, 0.1))
    for ax in axes.flat[len(WITHOUT) :]:
        ax.axis("off")
        ax.text(0.1, 0.6, "with the mechanism", color="tab:blue", fontsize=10, transform=ax.transAxes)
        ax.text(0.1, 0.4, "without it", color="tab:red", fontsize=10, transform=ax.transAxes)
    figure.supxlabel("rank of the eigenvalue / number of dimensions", fontsize=10)
    figure.supylabel("log10 of the eigenvalue, at least -8", fontsize=10)
    figure.savefig(PICTURES / "mechanisms.png", dpi=150)
    plt.close(figure)


def picture_of_curves(runs):
    """kNN accuracy while training, mean over the seeds, on the photographs (Table A's runs)."""
    figure, ax = plt.subplots(figsize=(9, 5), layout="constrained")
    ends = []
    for i, method in enumerate(methods(runs, "fifty")):
        its = [run["curve"] for run in seeds(runs, f"fifty-{method}")]
        epochs, curve = [epoch for epoch, _ in its[0]], np.mean([[knn for _, knn in run] for run in its], 0)
        color = plt.cm.tab10(i % 10)
        ax.plot(epochs, curve, color=color, linestyle="-" if i < 10 else "--", marker="o", markersize=2.5)
        ends.append((curve[-1], method, color))
    place = math.inf
    for end, method, color in sorted(ends, reverse=True):
        place = min(end, place - 0.0085)  # labels side by side, not one over another
        ax.annotate(method, (epochs[-1], end), (epochs[-1] * 1.04, place), color=color, fontsize=9, va="center",
                    arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.5, "relpos": (0, 0.5)})  # fmt: skip
    floor = np.mean([run["curve"][0][1] for name, run in runs.items() if name.startswith("fifty-")])
    ax.axhline(floor, color="black", linestyle=":", linewidth=1)
    ax.annotate(
        "untrained network", (epochs[-1], floor), (0, -4), textcoords="offset points", ha="right", va="top", fontsize=9
    )
    ax.set_xlim(0, epochs[-1] * 1.25)
    ax.set_xticks(epochs)
    ax.set_xlabel("epoch")
    ax.set_ylabel("kNN accuracy")
    figure.savefig(PICTURES / "curves.png", dpi=150)
    plt.close(figure)


TABLES = {
    "shapes": shapes,
    "ablations": ablations,
    "fifty": fifty,
    "remade": remade,
    "whole": whole,
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
    else:
        PAGE.write_text(page(PAGE.read_text(), load()))
        picture_of_spectra(load())
        picture_of_curves(load())
