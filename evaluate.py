"""How good are the features of a checkpoint? Linear probe, kNN and clustering, for one or several.

    python evaluate.py runs/cplearn-cifar10-seed0 runs/barlow_twins-cifar10-seed0 --init

linear    test accuracy of a linear classifier on the standardised features of the backbone. It is
          trained with Adam at learning rate 0.01 for 100 epochs, as in "Collapse-Proof
          Non-Contrastive Self-Supervised Learning", Appendix I. The paper names no batch size.
          Batches of 2000 are used here, because large ones are fast. The last epoch counts.
knn       test accuracy of weighted k-nearest-neighbour classification. The 200 training images
          with the highest cosine similarity vote, each with weight exp(similarity / 0.1).
nmi       normalised mutual information of the test labels with the assigned codes or prototypes.
          A method without codes is measured with the clusters of k-means on its features, as many
          as there are classes.
shuffled  NMI of the same assignments in random order. With many codes chance alone scores high.
ami       adjusted mutual information: 0 for random assignments, 1 for perfect ones
used      how many clusters the test images use, of how many, and whether the clusters are codes or
          those of k-means
rank      effective rank of the test embeddings, of how many dimensions. It is 0 for a constant
          embedding.

Where all images are of one class, linear and knn are 1. Then nmi, shuffled and ami are 1 if all
test images are in one cluster too, else 0. This is scikit-learn's convention.

`--init` adds each network as it was before training, so that every number has a floor.

`--save-features DIR` writes a file for each row, for a probe of your own. Its name is
DIR/<run>-<method>-<dataset>-<trained or untrained>.npz. It holds
    train_features, test_features    (n, d), of the backbone
    train_embedding, test_embedding  (n, d), what the loss acts on
    train_codes, test_codes          (n,), only for methods with codes or prototypes
    train_labels, test_labels        (n,)
    checkpoint                       the checkpoint's path
Rows of the same name get numbers. `--json` gives the file's name as "saved".
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


def load_method(name):
    """The module methods/<name>.py. Ends the program with one line if there is none."""
    folder = Path(__file__).parent / "methods"
    path = folder / f"{name}.py"
    # Only a file of this folder is run, because a name like "../x" would run code elsewhere.
    if path not in folder.iterdir():
        common.fail(f"the checkpoint is of method {name!r}, and there is no methods/{name}.py")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def as_flags(args):
    """The arguments {name: value} of a checkpoint, written as flags on a command line."""
    flags = []
    for name, value in args.items():
        if name == "method" or value is None or value is False:
            continue
        flag = f"--{name}".replace("_", "-")
        if value is not True:
            flag = f"{flag}={value}"
        flags.append(flag)
    return flags


def check_flags(path, state):
    """Makes the flags of a checkpoint those of today's script, as `common.complete_args` does. Ends
    the program with one line if they are no values of that script's flags, or if the checkpoint
    holds another network than they describe."""
    method = load_method(state["method"])

    def refuse(why):
        script = f"{state['method']}.py"
        common.fail(f"the flags in {str(path)!r} are not those of {script}: {why}")

    dataset = str(state["args"].get("dataset"))
    paper = bool(state["args"].get("paper"))
    parser = common.make_parser(method.add_flags, method.DEFAULTS, dataset, paper)
    parser.error = refuse
    state["args"] = common.complete_args(state, vars(parser.parse_args([])))
    args = parser.parse_args(as_flags(state["args"]))
    # The text "16" reads as the number 16, but it is another value.
    for name, value in vars(args).items():
        if state["args"][name] != value:
            refuse(f"{name!r} is {state['args'][name]!r}")
    try:
        # On this device a network takes no memory, however large it is.
        with torch.device("meta"):
            method.Model(args).load_state_dict(state["model"], assign=True)
    except (RuntimeError, TypeError, AttributeError) as error:
        why = common.first_reason(error)
        common.fail(f"{str(path)!r} does not fit methods/{state['method']}.py: {why}")


def checkpoint_args(state, options):
    """The flags of a checkpoint. The data set in `options`, if any, replaces that of training.

    Ends the program with one line if the network cannot read the data set.
    """
    args = argparse.Namespace(**state["args"])
    if options.dataset:
        args.dataset = options.dataset
    if options.data_dir:
        args.data_dir = options.data_dir
    reads_points = args.backbone == "mlp"
    has_points = args.dataset in common.TOYS
    if reads_points != has_points:
        common.fail(
            f"a checkpoint with a {args.backbone} backbone cannot read --dataset {args.dataset}"
        )
    return args


def build_model(state, device, trained=True):
    """The model of a checkpoint in eval mode. With trained=False it is as before training, with new
    batch norms: see `common.with_data_statistics`."""
    args = argparse.Namespace(**state["args"])
    torch.manual_seed(args.seed)
    try:
        model = load_method(state["method"]).Model(args)
    except RuntimeError as error:
        why = str(error).splitlines()[0]
        common.fail(f"no memory for the network of methods/{state['method']}.py: {why}")
    if trained:
        model.load_state_dict(state["model"])
    elif args.weights:
        common.load_weights(model, args)
    return model.to(device, memory_format=torch.channels_last).eval()


def add_checkpoint_flags(parser, nargs):
    """The flags that say which networks to look at, and on which data."""
    parser.add_argument(
        "checkpoints",
        nargs=nargs,
        metavar="CHECKPOINT",
        help="a last.pt or the run folder that holds it",
    )
    parser.add_argument(
        "--init", action="store_true", help="also each network as it was before training"
    )
    parser.add_argument(
        "--dataset", choices=common.DATASETS, metavar="NAME", help="[the training data]"
    )
    parser.add_argument("--data-dir", help="where that data set is [as in training]")
    parser.add_argument(
        "--device", choices=["cuda", "mps", "cpu"], help="[cuda, else mps, else cpu]"
    )


def read_checkpoints(options):
    """The networks to look at, as a list of jobs (path, state, trained).

    Ends the program with one line if one cannot be read or used, before any work is done.
    """
    jobs = []
    for path in options.checkpoints:
        state = common.load_checkpoint(path)
        check_flags(path, state)
        checkpoint_args(state, options)
        if options.init:
            jobs.append((path, state, False))
        jobs.append((path, state, True))
    return jobs


def networks(jobs, options, device):
    """Yields (model, data) for each job. Data are loaded again only when a job needs others."""
    loaded = None
    for _, state, trained in jobs:
        args = checkpoint_args(state, options)
        needed = (args.dataset, args.data_dir, args.image_size)
        if needed != loaded:
            data = common.load_data(args, device)
            loaded = needed
        model = build_model(state, device, trained)
        if not trained:
            views = load_method(state["method"]).VIEWS
            model = common.with_data_statistics(model, data, args, views)
        yield model, data


def check_finite(path, *outputs):
    """Ends the program with one line if the features or embeddings that `common.extract` gave for
    the network at `path` are infinite or NaN."""
    for out in outputs:
        for name in ("features", "embedding"):
            if name not in out:
                continue
            # Both are NaN if any number is NaN. They need no second array as large as the first.
            smallest, largest = out[name].aminmax()
            if not (smallest.isfinite() and largest.isfinite()):
                common.fail(
                    f"the network in {str(path)!r} gives features that are not finite numbers; "
                    "train it again"
                )


def count_codes(model, embedding):
    """How many codes or prototypes a model has, or None if it has none."""
    if not hasattr(model, "scores"):
        return None
    with torch.no_grad():
        return model.scores(embedding[:1]).shape[1]


# --- figures


def kmeans(x, k, restarts=5, iterations=100):
    """scikit-learn's k-means of x (n, d): assignments (n,) and centers (k, d), on x's device.

    There are no more clusters than points. Above 100 million numbers in x it takes mini-batches of
    10,000 points.
    """
    k = min(k, len(x))
    if x.numel() > 10**8:
        clustering = MiniBatchKMeans(
            k, n_init=restarts, max_iter=iterations, random_state=0, batch_size=10_000
        )
    else:
        clustering = KMeans(k, n_init=restarts, max_iter=iterations, random_state=0)
    with warnings.catch_warnings():
        # It warns of fewer different points than clusters and of few iterations. Both are meant.
        warnings.simplefilter("ignore")
        clustering.fit(x.cpu().numpy())
    assigned = torch.from_numpy(clustering.labels_).long().to(x.device)
    centers = torch.from_numpy(clustering.cluster_centers_).to(x)
    return assigned, centers


def shuffled_nmi(codes, labels, repeats=5):
    """NMI of the labels with the assignments `codes` in random order, mean of `repeats`.

    This is what chance scores with clusters of these sizes.
    """
    rng = np.random.default_rng(0)
    scores = []
    for _ in range(repeats):
        shuffled = rng.permutation(codes)
        scores.append(normalized_mutual_info_score(labels, shuffled))
    return float(np.mean(scores))


def linear_probe(
    features, labels, test_features, test_labels, epochs=100, lr=1e-2, batch_size=2000
):
    """Test accuracy, in [0, 1], of a linear softmax classifier trained with Adam.

    Features are (n, d), labels (n,). All features are standardised with the mean and the standard
    deviation of the training features.
    """
    std, mean = torch.std_mean(features, dim=0, correction=0)
    classes = int(max(labels.max(), test_labels.max())) + 1

    # It is applied to one batch at a time, because a second array of all features may be too large.
    def standardise(x):
        return (x - mean) / std.clamp_min(1e-6)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        probe = nn.Linear(features.shape[1], classes).to(features.device)
        optimizer = torch.optim.Adam(probe.parameters(), lr, fused=features.is_cuda)
        for _ in range(epochs):
            order = torch.randperm(len(features)).to(features.device)
            for index in order.split(batch_size):
                logits = probe(standardise(features[index]))
                loss = nn.functional.cross_entropy(logits, labels[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    guesses = []
    for batch in test_features.split(batch_size):
        logits = probe(standardise(batch))
        guesses.append(logits.argmax(1))
    correct = torch.cat(guesses) == test_labels
    return correct.float().mean().item()


def evaluate(train, test, data, clusters=None):
    """All figures of one network, as a dict {name: number or text}.

    `train` and `test` are what `common.extract` gives for the training and the test images of
    `data`. `clusters` is the number of codes or prototypes, None for a method without any.
    """
    device = train["features"].device
    labels = data.labels.to(device)
    test_labels = data.test_labels.to(device)
    if clusters:
        clusters_by = "codes"
        assigned = test["codes"]
    else:
        clusters_by = "k-means"
        clusters = len(data.classes)
        assigned, _ = kmeans(test["features"], clusters)
    assigned = assigned.cpu().numpy()
    truth = data.test_labels.cpu().numpy()
    return {
        "linear": linear_probe(train["features"], labels, test["features"], test_labels),
        "knn": common.knn_accuracy(train["features"], labels, test["features"], test_labels),
        "nmi": float(normalized_mutual_info_score(truth, assigned)),
        "shuffled": shuffled_nmi(assigned, truth),
        "ami": float(adjusted_mutual_info_score(truth, assigned)),
        "used": len(np.unique(assigned)),
        "clusters": clusters,
        "clusters_by": clusters_by,
        "rank": common.effective_rank(test["embedding"]),
        "dimensions": test["embedding"].shape[1],
    }


# --- files of features


def run_name(path):
    """The name of a checkpoint's run: its folder, or the file itself if it is not a last.pt."""
    path = Path(path).resolve()
    if path.is_dir():
        return path.name
    if path.name == "last.pt":
        return path.parent.name
    return path.stem


def feature_files(folder, jobs, dataset):
    """The path of the file of features of each job (path, state, trained), none twice.

    `dataset` is the data set that replaces those of training, or None. Ends the program with one
    line if the folder cannot be written or holds one of the files already.
    """
    files = []
    seen = Counter()
    for path, state, trained in jobs:
        measured_on = dataset or state["args"]["dataset"]
        kind = "trained" if trained else "untrained"
        name = f"{run_name(path)}-{state['method']}-{measured_on}-{kind}"
        seen[name] += 1
        if seen[name] > 1:
            name = f"{name}-{seen[name]}"
        files.append(folder / f"{name}.npz")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        common.fail(f"cannot write to --save-features {str(folder)!r}: {error.strerror}")
    for file in files:
        if file.exists():
            common.fail(
                f"{str(file)!r} exists already: remove it or choose another --save-features"
            )
    return files


def named_arrays(split, out, labels):
    """The arrays {name: array} of the split "train" or "test", for a file of features."""
    arrays = {}
    for name in ("features", "embedding", "codes"):
        if name in out:
            arrays[f"{split}_{name}"] = out[name].cpu().numpy()
    arrays[f"{split}_labels"] = labels.cpu().numpy()
    return arrays


def save_features(file, path, train, test, data):
    """Writes features, embeddings, labels and codes of the checkpoint at `path` to `file`, whole or
    not at all."""
    arrays = {"checkpoint": np.array(path)}
    arrays |= named_arrays("train", train, data.labels)
    arrays |= named_arrays("test", test, data.test_labels)

    def write(part):
        np.savez(part, **arrays)

    common.atomic_write(file, write)


# --- the command


def parse_options():
    parser = common.Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_checkpoint_flags(parser, "+")
    parser.add_argument(
        "--json",
        action="store_true",
        help="print JSON, one object for each row, instead of the table",
    )
    parser.add_argument(
        "--save-features",
        metavar="DIR",
        help="also write features, embeddings, labels and codes",
    )
    return parser.parse_args()


def measure(job, model, data, options, file):
    """A row of the table, as a dict. Writes the features to `file`, if it is not None."""
    path, state, trained = job
    # The training images' embeddings are only needed for the file.
    train = common.extract(model, data.images, data, embeddings=file is not None)
    test = common.extract(model, data.test_images, data)
    check_finite(path, train, test)
    row = {
        "checkpoint": path,
        "method": state["method"],
        "dataset": options.dataset or state["args"]["dataset"],
        "epoch": state["epoch"] if trained else 0,
    }
    if file is not None:
        save_features(file, path, train, test, data)
        row["saved"] = str(file)
    clusters = count_codes(model, test["embedding"])
    return row | evaluate(train, test, data, clusters)


def print_table(rows):
    """Prints a line for each row, in columns. The first is aligned left, the others right."""
    table = [["checkpoint", "epoch", "linear", "knn", "nmi", "shuffled", "ami", "used", "rank"]]
    for row in rows:
        cells = [row["checkpoint"], str(row["epoch"])]
        for name in ("linear", "knn", "nmi", "shuffled", "ami"):
            cells.append(f"{row[name]:.3f}")
        cells.append(f"{row['used']}/{row['clusters']} {row['clusters_by']}")
        cells.append(f"{row['rank']:.1f}/{row['dimensions']}")
        table.append(cells)
    widths = []
    for column in zip(*table, strict=True):
        widths.append(max(len(cell) for cell in column))
    for cells in table:
        aligned = [cells[0].ljust(widths[0])]
        for cell, width in zip(cells[1:], widths[1:], strict=True):
            aligned.append(cell.rjust(width))
        print("  ".join(aligned))


def main():
    options = parse_options()
    device = common.find_device(options.device)
    jobs = read_checkpoints(options)
    if options.save_features:
        files = feature_files(Path(options.save_features), jobs, options.dataset)
    else:
        files = [None] * len(jobs)

    rows = []
    work = zip(jobs, files, networks(jobs, options, device), strict=True)
    bar = tqdm(work, desc="evaluate", total=len(jobs), leave=False, disable=None)
    for job, file, (model, data) in bar:
        row = measure(job, model, data, options, file)
        rows.append(row)

    if options.json:
        json.dump(rows, sys.stdout, indent=2)
        print()
    else:
        print_table(rows)


if __name__ == "__main__":
    main()
