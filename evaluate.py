"""How good are the features of a checkpoint? Linear probe, kNN and clustering, for one or several checkpoints.

    python evaluate.py runs/cplearn-cifar10-seed0 runs/barlow_twins-cifar10-seed0 --init

linear    test accuracy of a linear classifier on the backbone's features, standardised. It is trained with Adam at
          learning rate 0.01 for 100 epochs ("Collapse-Proof Non-Contrastive Self-Supervised Learning", Appendix I), in
          batches of 2000, because the paper names no batch size and large ones are fast. The last epoch counts.
knn       test accuracy of weighted k-nearest-neighbour classification: 200 training images by cosine similarity, each
          with weight exp(similarity / 0.1)
nmi       normalised mutual information of the test labels with the assigned codes or prototypes. For a method without
          any: with the clusters of k-means on the features, as many as there are classes
shuffled  the NMI of the same assignments in random order. With many codes chance alone scores high
ami       adjusted mutual information: 0 for random assignments, 1 for perfect ones
used      how many clusters the test images use, of how many, and whose they are
rank      effective rank of the test embeddings, of how many dimensions. It is 0 for a constant embedding

Where all images are of one class, linear and knn are 1. Then nmi, shuffled and ami are 1 if all test images are in one
cluster too, else 0, which is scikit-learn's convention.

`--init` adds each network as it was before training, so that every number has a floor.

`--save-features DIR` writes a file for each row, DIR/<run>-<method>-<dataset>-<trained or untrained>.npz, for a probe
of your own. It holds train_features and test_features (n, d) of the backbone, train_embedding and test_embedding (what
the loss acts on), train_labels and test_labels (n,), for methods with codes or prototypes train_codes and test_codes
(n,), and checkpoint, its path. Rows of the same name get numbers. `--json` gives the file's name as "saved".
"""

import argparse
import importlib.util
import json
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from sklearn.cluster import KMeans, MiniBatchKMeans
from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score
from torch import nn
from tqdm import tqdm

import common

# --- checkpoints


def checkpoint_args(state, options):
    """A checkpoint's flags, with the data set of `options`, if given, instead of its own. Refuses a data set that the
    network cannot read."""
    args = argparse.Namespace(**state["args"])
    args.dataset, args.data_dir = options.dataset or args.dataset, options.data_dir or args.data_dir
    if (args.dataset in common.TOYS) != (args.backbone == "mlp"):
        common.fail(f"a checkpoint with a {args.backbone} backbone cannot read --dataset {args.dataset}")
    return args


def load_method(name):
    """The module methods/<name>.py."""
    folder = Path(__file__).parent / "methods"
    path = folder / f"{name}.py"
    if path not in folder.iterdir():  # nothing else, as a name like "../x" would run code elsewhere
        common.fail(f"the checkpoint is of method {name!r}, and there is no methods/{name}.py")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_flags(path, state):
    """Refuses a checkpoint whose flags are not those of its script, or that holds another network than they say."""
    method, flags = load_method(state["method"]), []
    for name, value in state["args"].items():
        flag = f"--{name}".replace("_", "-")
        if name != "method" and value is not None and value is not False:
            flags.append(flag if value is True else f"{flag}={value}")
    parser = common.Parser(add_help=False, allow_abbrev=False)
    parser.error = lambda why: common.fail(f"the flags in {str(path)!r} are not those of {state['method']}.py: {why}")
    common.add_shared_flags(parser)
    method.add_flags(parser)
    args = parser.parse_args(flags)
    missing = vars(args).keys() - state["args"].keys()
    if missing:
        parser.error(f"it lacks {min(missing)!r}")
    for name, value in vars(args).items():  # "16" reads as 16, but is another value
        if state["args"][name] != value:
            parser.error(f"{name!r} is {state['args'][name]!r}")
    try:
        with torch.device("meta"):  # takes no memory, however large the network is
            method.Model(args).load_state_dict(state["model"], assign=True)
    except (RuntimeError, TypeError, AttributeError) as error:
        common.fail(f"{str(path)!r} does not fit methods/{state['method']}.py: {str(error).splitlines()[0]}")


def build_model(state, device, trained=True):
    """The model of a checkpoint in eval mode, or, with trained=False, as it was before training."""
    args = argparse.Namespace(**state["args"])
    torch.manual_seed(args.seed)
    try:
        model = load_method(state["method"]).Model(args)
    except RuntimeError as error:
        common.fail(f"no memory for the network of methods/{state['method']}.py: {str(error).splitlines()[0]}")
    if trained:
        model.load_state_dict(state["model"])
    return model.to(device, memory_format=torch.channels_last).eval()


def add_checkpoint_flags(parser, nargs):
    """The flags that say which networks to look at, and on which data."""
    parser.add_argument(
        "checkpoints", nargs=nargs, metavar="CHECKPOINT", help="a last.pt or the run folder that holds it"
    )
    parser.add_argument("--init", action="store_true", help="also each network as it was before training")
    parser.add_argument("--dataset", choices=common.DATASETS, metavar="NAME", help="[the training data]")
    parser.add_argument("--data-dir", help="where that data set is [as in training]")
    parser.add_argument("--device", choices=["cuda", "mps", "cpu"], help="[cuda, else mps, else cpu]")


def read_checkpoints(options):
    """The networks to look at, as (path, state, trained). Refuses what cannot be read before any work is done."""
    jobs = []
    for path in options.checkpoints:
        state = common.load_checkpoint(path)
        check_flags(path, state)
        checkpoint_args(state, options)
        jobs += [(path, state, trained) for trained in ([False, True] if options.init else [True])]
    return jobs


def networks(jobs, options, device):
    """Yields (model, data) for each job. Data are loaded again only when a job needs others."""
    key = None
    for _, state, trained in jobs:
        args = checkpoint_args(state, options)
        if key != (args.dataset, args.data_dir, args.image_size):
            key, data = (args.dataset, args.data_dir, args.image_size), common.load_data(args, device)
        yield build_model(state, device, trained), data


def check_finite(path, *outputs):
    """Refuses a network whose features or embeddings are infinite or NaN."""
    arrays = [out[name] for out in outputs for name in ("features", "embedding") if name in out]
    if not all(torch.stack(x.aminmax()).isfinite().all() for x in arrays):
        common.fail(f"the network in {str(path)!r} gives features that are not finite numbers; train it again")


def count_codes(model, embedding):
    """How many codes or prototypes a model has, or None."""
    with torch.no_grad():
        return model.scores(embedding[:1]).shape[1] if hasattr(model, "scores") else None


# --- figures


def kmeans(x, k, restarts=5, iterations=100):
    """scikit-learn's k-means of x (n, d): assignments (n,) and centers (k, d) on x's device. Above 100 million numbers
    in x it takes mini-batches of 10,000."""
    k, mini = min(k, len(x)), {"batch_size": 10_000} if x.numel() > 10**8 else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fewer different points than clusters, or few iterations, are no news here
        means = (MiniBatchKMeans if mini else KMeans)(k, n_init=restarts, max_iter=iterations, random_state=0, **mini)
        fitted = means.fit(x.cpu().numpy())
    return torch.from_numpy(fitted.labels_).long().to(x.device), torch.from_numpy(fitted.cluster_centers_).to(x)


def shuffled_nmi(codes, labels, repeats=5):
    """NMI after the assignments `codes` are shuffled, mean of `repeats`: what chance scores with these clusters."""
    rng = np.random.default_rng(0)
    return float(np.mean([normalized_mutual_info_score(labels, rng.permutation(codes)) for _ in range(repeats)]))


def linear_probe(features, labels, test_features, test_labels, epochs=100, lr=1e-2, batch_size=2000):
    """Test accuracy of a linear softmax classifier trained with Adam on standardised features (n, d), labels (n,)."""
    std, mean = torch.std_mean(features, dim=0, correction=0)

    def standard(x):  # a batch at a time, because a second array of all features may be too large
        return (x - mean) / std.clamp_min(1e-6)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        probe = nn.Linear(features.shape[1], int(max(labels.max(), test_labels.max())) + 1).to(features.device)
        optimizer = torch.optim.Adam(probe.parameters(), lr, fused=features.is_cuda)
        for _ in range(epochs):
            order = torch.randperm(len(features)).to(features.device)
            for index in order.split(batch_size):
                loss = nn.functional.cross_entropy(probe(standard(features[index])), labels[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    guesses = torch.cat([probe(standard(x)).argmax(1) for x in test_features.split(batch_size)])
    return (guesses == test_labels).float().mean().item()


def evaluate(train, test, data, clusters=None):
    """All figures of one network, as a dict, from what `common.extract` gives for the training and the test images.

    `clusters` is the number of codes or prototypes, None for a method without any.
    """
    labels, test_labels = (y.to(train["features"].device) for y in (data.labels, data.test_labels))
    codes = (test["codes"] if clusters else kmeans(test["features"], len(data.classes))[0]).cpu().numpy()
    truth = data.test_labels.cpu().numpy()
    return {
        "linear": linear_probe(train["features"], labels, test["features"], test_labels),
        "knn": common.knn_accuracy(train["features"], labels, test["features"], test_labels),
        "nmi": float(normalized_mutual_info_score(truth, codes)),
        "shuffled": shuffled_nmi(codes, truth),
        "ami": float(adjusted_mutual_info_score(truth, codes)),
        "used": len(np.unique(codes)),
        "clusters": clusters or len(data.classes),
        "clusters_by": "codes" if clusters else "k-means",
        "rank": common.effective_rank(test["embedding"]),
        "dimensions": test["embedding"].shape[1],
    }


def feature_files(folder, jobs, dataset):
    """The file of features of each job (path, state, trained), none twice; ends the program with one line if the folder
    cannot be written or holds one of them already."""
    files, seen = [], Counter()
    for path, state, trained in jobs:
        path = Path(path).resolve()
        run = path.name if path.is_dir() else path.parent.name if path.name == "last.pt" else path.stem
        kind = "trained" if trained else "untrained"
        name = f"{run}-{state['method']}-{dataset or state['args']['dataset']}-{kind}"
        seen[name] += 1
        files.append(folder / (name + (f"-{seen[name]}" if seen[name] > 1 else "") + ".npz"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        common.fail(f"cannot write to --save-features {str(folder)!r}: {error.strerror}")
    there = [str(file) for file in files if file.exists()]
    if there:
        common.fail(f"{there[0]!r} exists already: remove it or choose another --save-features")
    return files


def save_features(file, path, train, test, data):
    """Writes features, embedding, labels and codes of the checkpoint at `path` to `file`, whole or not at all."""
    arrays = {"checkpoint": np.array(path)}
    for split, out, labels in (("train", train, data.labels), ("test", test, data.test_labels)):
        tensors = {name: out[name] for name in ("features", "embedding", "codes") if name in out} | {"labels": labels}
        arrays |= {f"{split}_{name}": tensor.cpu().numpy() for name, tensor in tensors.items()}
    common.atomic_write(file, lambda part: np.savez(part, **arrays))


def main():
    parser = common.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_checkpoint_flags(parser, "+")
    parser.add_argument("--json", action="store_true", help="print JSON, one object for each row, instead of the table")
    parser.add_argument("--save-features", metavar="DIR", help="also write features, embeddings, labels and codes")
    options = parser.parse_args()
    device = common.find_device(options.device)

    jobs = read_checkpoints(options)
    files = [None] * len(jobs)
    if options.save_features:
        files = feature_files(Path(options.save_features), jobs, options.dataset)
    rows = []
    bar = tqdm(
        zip(jobs, files, networks(jobs, options, device), strict=True), "evaluate", len(jobs), False, disable=None
    )
    for (path, state, trained), file, (model, data) in bar:
        train = common.extract(model, data.images, data, embeddings=bool(file))
        test = common.extract(model, data.test_images, data)
        check_finite(path, train, test)
        dataset, epoch = options.dataset or state["args"]["dataset"], state["epoch"] if trained else 0
        row = {"checkpoint": path, "method": state["method"], "dataset": dataset, "epoch": epoch}
        if file:
            save_features(file, path, train, test, data)
            row["saved"] = str(file)
        rows.append(row | evaluate(train, test, data, count_codes(model, test["embedding"])))
    if options.json:
        json.dump(rows, sys.stdout, indent=2)
        print()
        return
    table = [["checkpoint", "epoch", "linear", "knn", "nmi", "shuffled", "ami", "used", "rank"]]
    for row in rows:
        figures = [f"{row[name]:.3f}" for name in ("linear", "knn", "nmi", "shuffled", "ami")]
        used = f"{row['used']}/{row['clusters']} {row['clusters_by']}"
        table.append([row["checkpoint"], str(row["epoch"]), *figures, used, f"{row['rank']:.1f}/{row['dimensions']}"])
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    for line in table:
        print(
            "  ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
            )
        )


if __name__ == "__main__":
    main()
