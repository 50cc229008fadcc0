"""How good are the features of a checkpoint, or of a file? Linear probe, kNN and clustering.

    python evaluate.py runs/cplearn-cifar10-seed0 runs/barlow_twins-cifar10-seed0 --untrained
    python evaluate.py embeddings.npz
    python evaluate.py runs/cplearn-cifar10-seed0 --export backbone.pt2

linear    test accuracy of a linear classifier on the standardised features of the backbone. It is
          trained with Adam at learning rate 0.01 for 100 epochs, as in "Collapse-Proof
          Non-Contrastive Self-Supervised Learning", Appendix I. The paper names no batch size.
          Batches of 2000 are used here, because large ones are fast. The last epoch counts.
knn       test accuracy of weighted k-nearest-neighbour classification. The training images with the
          highest cosine similarity vote, each with weight exp(similarity / 0.1). They are 200, but
          no more than the smallest class of the training images holds. Else images of other classes
          would be among them, however good the features are. `--k` sets another number.
nmi       normalised mutual information of the test labels with the assigned codes or prototypes.
          A method without codes is measured with the clusters of k-means on its features, as many
          as there are classes.
shuffled  NMI of the same assignments in random order. With many codes chance alone scores high.
ami       adjusted mutual information: 0 for random assignments, 1 for perfect ones
used      how many clusters the test images use, of how many, and whether the clusters are codes or
          those of k-means
rank      effective rank of the test embeddings, of how many dimensions. It is 0 for a constant
          embedding.
center    norm of the mean of the test embeddings' directions. It is 1 if all are one direction.

Where all images are of one class, linear and knn are 1. Then nmi, shuffled and ami are 1 if all
test images are in one cluster too, else 0. This is scikit-learn's convention. Without labels only
used, rank and center are measured, and k-means has 10 clusters.

`--untrained` adds each network as it was before training, so that every number has a floor.
`--label-fraction 0.01` gives the linear probe and kNN a part of the training labels: the same in
every run, of each class the same share, and at least one image.

A file is what `--save-features` writes, or an .npy or .npz file from elsewhere. It needs one array
(n, d), which is in an .npz file the only one with two dimensions, or is called features,
embedding, embeddings or z. An array without a negative number counts as features. An .npz file may
have labels (n,) too, numbers or names. Of such a file a fixed, random half of the rows trains the
probe and votes in kNN, and the other half is tested. All else is measured on all rows. With
train_features and test_features (or train_embedding, ...), and train_labels and test_labels, there
is no need to halve it.

`--save-features DIR` writes a file for each network, for a probe of your own. Its name is
DIR/<run>-<method>-<dataset>-<trained or untrained>.npz. It holds
    train_features, test_features    (n, d), of the backbone
    train_embedding, test_embedding  (n, d), what the loss acts on
    train_codes, test_codes          (n,), only for methods with codes or prototypes
    train_entropy, test_entropy      (n,), of the assignments to them, over its largest value
    train_labels, test_labels        (n,), if there are labels
    train_names, test_names          (n,), the files of the images, if the data set is a folder
    classes                          the names of the classes, if there are labels
    clusters                         how many codes or prototypes, only for methods with them
    inputs                           how many numbers an image (or a point) has
    checkpoint                       the checkpoint's path
Files of the same name get numbers. `--json` gives the file's name as "saved".

`--export FILE.pt2` writes the backbone as a program that PyTorch loads without this project, and
measures nothing. It takes images in [0, 1], float (n, 3, size, size) with any n, and returns
features. The mean and deviation of the training images are inside.
"""

import argparse
import importlib.util
import json
import sys
import tempfile
import warnings
import zipfile
import zlib
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from sklearn.cluster import KMeans, MiniBatchKMeans
from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score
from torch import nn
from tqdm import tqdm

import common

# What an array (n, d) of a file may be called, with or without train_ or test_ before it.
FEATURES = ("features",)
EMBEDDINGS = ("embedding", "embeddings", "z")
CLUSTERS_WITHOUT_LABELS = 10


@dataclass
class Job:
    """A network or a file to look at. `path` is as on the command line.

    A network has the `state` of its checkpoint, and `trained` is whether it is meant as it was
    before training. A file has `arrays`.
    """

    path: str
    state: dict | None = None
    trained: bool = True
    arrays: "Arrays | None" = None

    def dataset(self, options):
        """The name of the data set it is measured on, None for a file."""
        if self.state is None:
            return None
        return options.dataset or self.state["args"]["dataset"]

    def epoch(self):
        """How many epochs it was trained for, None for a file."""
        if self.state is None:
            return None
        return self.state["epoch"] if self.trained else 0


@dataclass
class Arrays:
    """What a file holds: `train` and `test` as `common.extract` gives them, with "features" or
    "embedding" or both.

    `data` has the labels and the classes, and None for images. `clusters` is the number of codes or
    prototypes, and `inputs` how many numbers an image has, None where they are not known. With
    `halves` the file has no parts for training and testing. Then `train` and `test` both hold all
    rows, and the linear probe and kNN halve them.
    """

    train: dict
    test: dict
    data: common.Data
    clusters: int | None
    inputs: int | None
    halves: bool


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
    backbone = str(state["args"].get("backbone"))
    parser = common.make_parser(method.add_flags, method.DEFAULTS, dataset, backbone, paper)
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
    if options.labels:
        args.labels = options.labels
    elif options.dataset or options.data_dir:
        args.labels = "auto"  # how other data are labelled says nothing about these
    if options.cache_dir:
        args.cache_dir = options.cache_dir
    if options.skip_damaged:
        args.skip_damaged = True
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
    model = load_method(state["method"]).Model(args)
    if trained:
        model.load_state_dict(state["model"])
    elif args.weights:
        common.load_weights(model, args)
    return model.to(device, memory_format=torch.channels_last).eval()


def add_checkpoint_flags(parser, nargs):
    """The flags that say what to look at, and on which data."""
    parser.add_argument(
        "checkpoints",
        nargs=nargs,
        metavar="CHECKPOINT",
        help="a run folder, a last.pt, or an .npy or .npz file of features or embeddings",
    )
    parser.add_argument(
        "--untrained", action="store_true", help="also each network as it was before training"
    )
    # The same under its old name.
    parser.add_argument("--init", dest="untrained", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument(
        "--dataset", choices=common.DATASETS, metavar="NAME", help="[the training data]"
    )
    parser.add_argument("--data-dir", help="where that data set is [as in training]")
    parser.add_argument(
        "--labels",
        choices=["auto", "folders", "none"],
        help="of --dataset folder [as in training; auto for other data]",
    )
    parser.add_argument("--cache-dir", help="where decoded images are kept [as in training]")
    parser.add_argument(
        "--skip-damaged", action="store_true", help="leave out images that cannot be read"
    )
    parser.add_argument(
        "--device", choices=["cuda", "mps", "cpu"], help="[cuda, else mps, else cpu]"
    )


def read_jobs(options):
    """What to look at, as a list of jobs.

    Ends the program with one line if one cannot be read or used, before any work is done.
    """
    jobs = []
    for path in options.checkpoints:
        if is_array_file(path):
            jobs.append(Job(path, arrays=read_arrays(path)))
            continue
        state = common.load_checkpoint(path)
        check_flags(path, state)
        checkpoint_args(state, options)
        if options.untrained:
            jobs.append(Job(path, state, trained=False))
        jobs.append(Job(path, state))
    return jobs


def networks(jobs, options, device):
    """Yields (model, data) for each job, (None, None) for a file. Data are loaded again only when a
    job needs others.

    Images are normalised with the mean and deviation of the images that the network was trained on.
    """
    loaded = None
    for job in jobs:
        if job.state is None:
            yield None, None
            continue
        args = checkpoint_args(job.state, options)
        names = ("dataset", "data_dir", "image_size", "labels", "cache_dir", "skip_damaged")
        needed = {name: vars(args).get(name) for name in names}
        if needed != loaded:
            data = common.load_data(args, device)
            loaded = needed
        own_data = not (options.dataset or options.data_dir)
        if own_data and job.state["fingerprint"] not in (None, data.fingerprint):
            common.tell(
                f"{job.path} was trained on {job.state['images']} images, and there are "
                f"{len(data.images)} now, or others"
            )
        seen = data
        if job.state["mean"] is not None:  # older checkpoints lack them
            mean = torch.tensor(job.state["mean"], device=device)
            std = torch.tensor(job.state["std"], device=device)
            seen = replace(data, mean=mean, std=std)
        model = build_model(job.state, device, job.trained)
        if not job.trained:
            views = load_method(job.state["method"]).VIEWS
            model = common.with_data_statistics(model, seen, args, views)
        yield model, seen


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


# --- files of features and embeddings


def is_array_file(path):
    """Whether a path on the command line is a file of arrays, by its ending."""
    return Path(path).suffix.lower() in (".npy", ".npz")


def load_arrays(path):
    """All arrays {name: array} of an .npz file, or {"": array} of an .npy file.

    Ends the program with one line if the file cannot be read. Nothing in it is executed.
    """
    try:
        # Arrays of objects are pickles, and a pickle may run code.
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return {"": loaded}
        with loaded:
            return {name: loaded[name] for name in loaded.files}
    except FileNotFoundError:
        common.fail(f"there is no file {str(path)!r}")
    except MemoryError as error:
        common.fail(f"no memory for {str(path)!r} ({error})")
    except ValueError as error:
        if "Object arrays" in str(error):
            common.fail(
                f"{str(path)!r} holds arrays of objects, which are not read: "
                "save numbers, for example with x.astype('float32')"
            )
        common.fail(f"{str(path)!r} is damaged or not an .npy or .npz file ({error})")
    except (OSError, EOFError, KeyError, SyntaxError, zipfile.BadZipFile, zlib.error) as error:
        common.fail(f"{str(path)!r} is damaged or not an .npy or .npz file ({error})")


def read_arrays(path):
    """The `Arrays` in a file. The docstring of this file says what it must hold.

    Ends the program with one line if it holds something else, or numbers that are not finite.
    """
    arrays = load_arrays(path)
    prefixes = []
    for prefix in ("train_", "test_", ""):
        if any(prefix + name in arrays for name in FEATURES + EMBEDDINGS):
            prefixes.append(prefix)
    if "train_" in prefixes and "test_" in prefixes:
        train_prefix, test_prefix = "train_", "test_"
    elif prefixes:
        train_prefix = test_prefix = prefixes[0]
    else:
        train_prefix = test_prefix = ""
        arrays = name_only_array(path, arrays)

    train = take_part(path, arrays, train_prefix)
    test = train
    if test_prefix != train_prefix:
        test = take_part(path, arrays, test_prefix)
        for name in train.keys() & test.keys() & {"features", "embedding"}:
            if train[name].shape[1] != test[name].shape[1]:
                common.fail(
                    f"{str(path)!r} has train_{name} {tuple(train[name].shape)} and test_{name} "
                    f"{tuple(test[name].shape)}: they must have as many dimensions"
                )
        if ("features" in train) != ("features" in test):
            common.fail(f"{str(path)!r} has features in one of train_ and test_ only")
    for part in (test, train):
        rows = len(matrix_of(part))
        if rows < 4:
            common.fail(f"{str(path)!r} has {rows} rows: at least 4 are needed")
    if "features" not in test and not has_negative(train) and not has_negative(test):
        for part in (train, test):  # one and the same without train_ and test_
            if "embedding" in part:
                part["features"] = part.pop("embedding")

    labels = take_labels(path, arrays, train_prefix, len(matrix_of(train)))
    test_labels = take_labels(path, arrays, test_prefix, len(matrix_of(test)))
    classes = []
    if labels is None or test_labels is None:
        labels = test_labels = None
    else:
        classes, labels, test_labels = number_classes(arrays, labels, test_labels)
    clusters = take_number(arrays, "clusters")
    if "codes" not in test or int(test["codes"].max()) >= (clusters or 0):
        clusters = None
    inputs = take_number(arrays, "inputs")
    data = common.Data(
        images=None,
        labels=labels,
        test_images=None,
        test_labels=test_labels,
        classes=classes,
        mean=None,
        std=None,
        size=0,
    )
    halves = train_prefix == test_prefix
    return Arrays(train, test, data, clusters, inputs, halves)


def name_only_array(path, arrays):
    """The arrays of a file in which none has a known name, with a name for the one (n, d).

    Ends the program with one line if there is not exactly one.
    """
    matrices = [name for name, array in arrays.items() if array.ndim == 2]
    if len(matrices) != 1:
        found = ", ".join(f"{name} {array.shape}".strip() for name, array in arrays.items())
        common.fail(
            f"{str(path)!r} has {found or 'no arrays'}: expected one array (n, d), "
            "or one called features or embedding; and, if there are any, labels (n,)"
        )
    (name,) = matrices
    others = {other: array for other, array in arrays.items() if other != name}
    return others | {"z": as_matrix(path, name, arrays[name]).numpy()}


def take_part(path, arrays, prefix):
    """The features, the embedding, or both, and the codes and their entropy, if they are there, as
    tensors. `prefix` is "train_", "test_" or ""."""
    part = {}
    for names, key in ((FEATURES, "features"), (EMBEDDINGS, "embedding")):
        for name in names:
            if prefix + name in arrays:
                part[key] = as_matrix(path, prefix + name, arrays[prefix + name])
                break
    lengths = {key: len(x) for key, x in part.items()}
    n = max(lengths.values())
    if min(lengths.values()) < n:
        common.fail(f"{str(path)!r} has {prefix}features and {prefix}embedding of different length")
    codes = arrays.get(prefix + "codes")
    if codes is not None and codes.shape == (n,) and codes.dtype.kind in "iu" and codes.min() >= 0:
        part["codes"] = torch.from_numpy(codes.astype(np.int64))
    entropy = arrays.get(prefix + "entropy")
    if "codes" in part and entropy is not None and entropy.shape == (n,):
        part["entropy"] = torch.from_numpy(entropy.astype(np.float32))
    return part


def as_matrix(path, name, array):
    """An array (n, d) of a file as a float32 tensor. Ends the program with one line if it is not
    one of finite numbers."""
    name = f"the array {name!r}" if name else "the array"
    if array.dtype.kind not in "fiu" or array.ndim != 2 or array.shape[1] == 0:
        common.fail(
            f"{str(path)!r}: {name} is {array.shape} of {array.dtype}, "
            "expected numbers (n, d), a row for each image"
        )
    with np.errstate(over="ignore"):
        x = torch.from_numpy(array.astype(np.float32, copy=False))
    bad = len(x) - x.isfinite().all(1).sum().item()
    if bad:
        common.fail(
            f"{str(path)!r}: {bad} of the {len(x)} rows of {name} hold NaN or infinite numbers: "
            "remove these rows"
        )
    return x


def take_labels(path, arrays, prefix, n):
    """The labels (n,) of a file as they are there, or None. Ends the program with one line if there
    are not n of them, or if they are neither whole numbers nor names."""
    name = f"{prefix}labels"
    if name not in arrays:
        return None
    labels = arrays[name]
    if labels.shape != (n,) or labels.dtype.kind not in "iuU":
        common.fail(
            f"{str(path)!r}: {name} is {labels.shape} of {labels.dtype}, "
            f"expected ({n},) whole numbers or names"
        )
    return labels


def take_number(arrays, name):
    """The positive whole number of this name in a file, or None."""
    array = arrays.get(name)
    if array is None or array.shape != () or array.dtype.kind not in "iu" or array < 1:
        return None
    return int(array)


def number_classes(arrays, labels, test_labels):
    """The names of the classes, and the labels as places in them, int64 tensors.

    Labels are places in the array `classes`, if there is one. Else their values are the names.
    """
    both = np.concatenate([labels, test_labels])
    names = arrays.get("classes")
    named = names is not None and names.ndim == 1 and names.dtype.kind == "U"
    if named and both.dtype.kind in "iu" and both.min() >= 0 and both.max() < len(names):
        places = both
    else:
        names, places = np.unique(both, return_inverse=True)
    places = torch.from_numpy(places.reshape(-1).astype(np.int64))
    return [str(name) for name in names], places[: len(labels)], places[len(labels) :]


def matrix_of(out):
    """The array (n, d) that linear probe, kNN and k-means see: the features, or else the
    embedding."""
    return out["features"] if "features" in out else out["embedding"]


def has_negative(out):
    """Whether a number in the array that `matrix_of` gives is negative."""
    return bool((matrix_of(out) < 0).any())


def to_device(out, device):
    """The tensors of a dict on the device. They stay on the CPU where the device is MPS, which has
    no float64."""
    if device.type == "mps":
        return out
    return {name: x.to(device) for name, x in out.items()}


# --- figures


def kmeans(x, k, restarts=5, iterations=100):
    """scikit-learn's k-means of x (n, d): assignments (n,) and centers (k, d), on x's device.

    There are no more clusters than points. Above 100 million numbers in x it takes mini-batches of
    10,000 points.
    """
    x = torch.as_tensor(x)
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
    features = torch.as_tensor(features)
    test_features = torch.as_tensor(test_features)
    labels = torch.as_tensor(labels)
    test_labels = torch.as_tensor(test_labels)
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


def share_of_each_class(labels, fraction):
    """Indices of a part of the labels (n,): of each class this fraction, at least one, at random
    but always the same."""
    labels = labels.cpu()
    order = torch.randperm(len(labels), generator=common.generator(0))
    chosen = []
    for c in labels.unique():
        rows = order[labels[order] == c]
        count = max(1, round(fraction * len(rows)))
        chosen.append(rows[:count])
    return torch.cat(chosen).sort().values


def half_and_half(n):
    """Indices of two halves of n rows, at random but always the same."""
    order = torch.randperm(n, generator=common.generator(0))
    return order[: n // 2].sort().values, order[n // 2 :].sort().values


def probe(train, test, labels, test_labels, halves=False, fraction=1.0, k=None):
    """What is measured with the training labels, as a dict: "linear" and "knn", how many of how
    many training labels they use, and "k", the number of neighbours.

    train (n, d) and test (m, d) are what the probe sees. With `halves` they are the same rows, of
    which one half trains and the other is tested.
    """
    if halves:
        first, second = half_and_half(len(train))
        train, labels = train[first], labels[first]
        test, test_labels = test[second], test_labels[second]
    images = len(labels)
    if fraction < 1:
        some = share_of_each_class(labels, fraction)
        train, labels = train[some], labels[some]
    k = min(k or common.neighbours(labels), len(labels))
    return {
        "linear": linear_probe(train, labels, test, test_labels),
        "knn": common.knn_accuracy(train, labels, test, test_labels, k),
        "k": k,
        "training_labels": len(labels),
        "training_images": images,
    }


def evaluate(train, test, data, clusters=None, halves=False, fraction=1.0, k=None):
    """All figures of one network or file, as a dict {name: number or text}.

    `train` and `test` are what `common.extract` gives for the training and the test images of
    `data`. They need not have both features and embedding. `clusters` is the number of codes or
    prototypes, None if it is unknown or there are none. `halves`, `fraction` and `k` are as in
    `probe`. Without labels what needs them is left out.
    """
    features = matrix_of(test)
    embedding = test.get("embedding", features)
    has_labels = data.labels is not None
    if "codes" in test:
        clusters_by = "codes"
        assigned = test["codes"]
    else:
        clusters_by = "k-means"
        clusters = len(data.classes) or CLUSTERS_WITHOUT_LABELS
        assigned, _ = kmeans(features, clusters)
    assigned = assigned.cpu().numpy()
    row = {}
    if has_labels:
        labels = data.labels.to(features.device)
        test_labels = data.test_labels.to(features.device)
        row |= probe(matrix_of(train), features, labels, test_labels, halves, fraction, k)
        row["halves"] = halves
        truth = data.test_labels.cpu().numpy()
        row["nmi"] = float(normalized_mutual_info_score(truth, assigned))
        row["shuffled"] = shuffled_nmi(assigned, truth)
        row["ami"] = float(adjusted_mutual_info_score(truth, assigned))
    row["used"] = len(np.unique(assigned))
    if clusters is not None:
        row["clusters"] = clusters
    row["clusters_by"] = clusters_by
    row["rank"] = common.effective_rank(embedding)
    row["dimensions"] = embedding.shape[1]
    row["center_norm"] = common.center_norm(embedding)
    return row


# --- files to write


def run_name(path):
    """The name of a checkpoint's run: its folder's, with the name of a checkpoint of an epoch. Any
    other file has its own name."""
    path = Path(path).resolve()
    if path.is_dir():
        return path.name
    if path.name == "last.pt":
        return path.parent.name
    if path.name.startswith("epoch-"):
        return f"{path.parent.name}-{path.stem}"
    return path.stem


def feature_files(folder, jobs, options):
    """The path of the file of features of each job, none twice, and None for what is a file
    itself.

    Ends the program with one line if the folder cannot be written or holds one of the files
    already.
    """
    files = []
    seen = Counter()
    for job in jobs:
        if job.state is None:
            files.append(None)
            continue
        kind = "trained" if job.trained else "untrained"
        name = f"{run_name(job.path)}-{job.state['method']}-{job.dataset(options)}-{kind}"
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
        if file is not None and file.exists():
            common.fail(
                f"{str(file)!r} exists already: remove it or choose another --save-features"
            )
    return files


def named_arrays(split, out, labels, names):
    """The arrays {name: array} of the split "train" or "test", for a file of features."""
    arrays = {}
    for name in ("features", "embedding", "codes", "entropy"):
        if name in out:
            arrays[f"{split}_{name}"] = out[name].cpu().numpy()
    if labels is not None:
        arrays[f"{split}_labels"] = labels.cpu().numpy()
    if names:
        arrays[f"{split}_names"] = np.array(names)
    return arrays


def save_features(file, path, train, test, data, clusters):
    """Writes features, embeddings, labels, codes and names of the checkpoint at `path` to `file`,
    whole or not at all."""
    arrays = {"checkpoint": np.array(path)}
    if data.classes:
        arrays["classes"] = np.array(data.classes)
    if clusters is not None:
        arrays["clusters"] = np.array(clusters)
    arrays["inputs"] = np.array(data.test_images[0].numel())
    arrays |= named_arrays("train", train, data.labels, data.train_names)
    arrays |= named_arrays("test", test, data.test_labels, data.test_names)

    def write(part):
        np.savez(part, **arrays)

    common.atomic_write(file, write)


class Exported(nn.Module):
    """A backbone with its normalisation: images (n, 3, size, size) in [0, 1], or points (n, 2), to
    features."""

    def __init__(self, backbone, mean, std):
        super().__init__()
        self.backbone = backbone
        shape = (1, -1, 1, 1) if len(mean) == 3 else (1, -1)
        self.register_buffer("mean", torch.tensor(mean).view(shape))
        self.register_buffer("std", torch.tensor(std).view(shape))

    def forward(self, images):
        return self.backbone((images - self.mean) / self.std)


def export(job, options, file):
    """Writes the backbone of a checkpoint to the Path `file`, as a program of `torch.export`, and
    prints how to load it."""
    if file.suffix != ".pt2":
        common.fail(f"--export {str(file)!r} must end with .pt2")
    if file.exists():
        common.fail(f"{str(file)!r} exists already: remove it or choose another --export")
    cpu = torch.device("cpu")
    args = checkpoint_args(job.state, options)
    mean, std = job.state["mean"], job.state["std"]
    if mean is None:  # older checkpoints lack them
        data = common.load_data(args, cpu)
        mean, std = data.mean.tolist(), data.std.tolist()
    model = build_model(job.state, cpu)
    module = Exported(model.backbone, mean, std).to(memory_format=torch.contiguous_format).eval()
    if len(mean) == 3:
        shape = (3, args.image_size, args.image_size)
        what = f"images (n, 3, {args.image_size}, {args.image_size}) in [0, 1]"
    else:
        shape = (2,)
        what = "points (n, 2)"
    example = torch.rand(2, *shape)
    batch = torch.export.Dim("n", min=1)
    with torch.no_grad():
        program = torch.export.export(module, (example,), dynamic_shapes={"images": {0: batch}})

    def write(part):
        torch.export.save(program, part)

    common.atomic_write(file, write)
    print(
        f"wrote {file}: features (n, {model.backbone.num_features}) of {what}; "
        f"load it with torch.export.load({str(file)!r}).module()"
    )


# --- the command


def parse_options():
    parser = common.Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_checkpoint_flags(parser, "+")
    parser.add_argument(
        "--label-fraction",
        type=common.bounded_float(1e-6, 1),
        default=1.0,
        metavar="F",
        help="the part of the training labels for linear and knn, as 0.01 or 0.1 [1]",
    )
    parser.add_argument(
        "--k",
        type=common.bounded_int(1),
        help="neighbours that vote in knn [200, at most the smallest class]",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print JSON, one object for each row, instead of the table",
    )
    parser.add_argument(
        "--save-features",
        metavar="DIR",
        help="also write features, embeddings, labels, codes and names",
    )
    parser.add_argument(
        "--export", metavar="FILE.pt2", help="write the backbone of one checkpoint, and stop"
    )
    return parser.parse_args()


def measure(job, model, data, options, file):
    """A row of the table for a network, as a dict. Writes the features to `file`, if it is not
    None."""
    # The training images' embeddings are only needed for the file.
    train = common.extract(model, data.images, data, embeddings=file is not None)
    test = common.extract(model, data.test_images, data)
    check_finite(job.path, train, test)
    clusters = common.count_codes(model, test["embedding"][:1].to(data.mean.device))
    row = {
        "checkpoint": job.path,
        "method": job.state["method"],
        "dataset": job.dataset(options),
        "epoch": job.epoch(),
    }
    if file is not None:
        save_features(file, job.path, train, test, data, clusters)
        row["saved"] = str(file)
    return row | evaluate(train, test, data, clusters, fraction=options.label_fraction, k=options.k)


def measure_file(job, options, device):
    """A row of the table for a file of arrays, as a dict."""
    arrays = job.arrays
    train = to_device(arrays.train, device)
    test = to_device(arrays.test, device)
    return {"checkpoint": job.path} | evaluate(
        train, test, arrays.data, arrays.clusters, arrays.halves, options.label_fraction, options.k
    )


def note_of(row):
    """What else must be known about a row of the table."""
    notes = []
    if "linear" not in row:
        note = "no labels"
        if row["clusters_by"] == "k-means":
            note += f", so k-means has {row['clusters']} clusters"
        return note
    if row["halves"]:
        notes.append("half of the rows train the probe")
    if row["training_labels"] < row["training_images"]:
        notes.append(f"{row['training_labels']} of {row['training_images']} labels")
    if row["k"] != 200:
        notes.append(f"k = {row['k']}")
    return ", ".join(notes)


def print_table(rows):
    """Prints a line for each row, in columns. The first and the notes are aligned left, the others
    right. The data set and the notes are only there if they say something."""
    several = len({row.get("dataset") for row in rows}) > 1
    notes = [note_of(row) for row in rows]
    head = ["checkpoint", "epoch", "linear", "knn", "nmi", "shuffled", "ami", "used", "rank"]
    head.append("center")
    if several:
        head.insert(1, "dataset")
    if any(notes):
        head.append("note")
    table = [head]
    for row, note in zip(rows, notes, strict=True):
        cells = [row["checkpoint"]]
        if several:
            cells.append(row.get("dataset", "-"))
        cells.append(str(row.get("epoch", "-")))
        for name in ("linear", "knn", "nmi", "shuffled", "ami"):
            if name in row:
                cells.append(f"{row[name]:.3f}")
            else:
                cells.append("-")
        used = str(row["used"])
        if "clusters" in row:
            used += f"/{row['clusters']}"
        cells.append(f"{used} {row['clusters_by']}")
        cells.append(f"{row['rank']:.1f}/{row['dimensions']}")
        cells.append(f"{row['center_norm']:.3f}")
        if any(notes):
            cells.append(note)
        table.append(cells)
    widths = []
    for column in zip(*table, strict=True):
        widths.append(max(len(cell) for cell in column))
    for cells in table:
        aligned = []
        for name, cell, width in zip(head, cells, widths, strict=True):
            if name in ("checkpoint", "note"):
                aligned.append(cell.ljust(width))
            else:
                aligned.append(cell.rjust(width))
        print("  ".join(aligned))


def main():
    options = parse_options()
    device = common.find_device(options.device)
    jobs = read_jobs(options)
    if options.export:
        if len(jobs) > 1 or jobs[0].state is None:
            common.fail("--export writes the backbone of one checkpoint: give one, and no file")
        export(jobs[0], options, Path(options.export))
        return
    if options.save_features:
        files = feature_files(Path(options.save_features), jobs, options)
    else:
        files = [None] * len(jobs)

    rows = []
    work = zip(jobs, files, networks(jobs, options, device), strict=True)
    bar = tqdm(work, desc="evaluate", total=len(jobs), leave=False, disable=None)
    for job, file, (model, data) in bar:
        if job.state is None:
            row = measure_file(job, options, device)
        else:
            row = measure(job, model, data, options, file)
        rows.append(row)

    if options.json:
        json.dump(rows, sys.stdout, indent=2)
        print()
    else:
        print_table(rows)
    for file in files:
        if file is not None:
            common.tell(f"wrote {file}")


if __name__ == "__main__":
    main()
