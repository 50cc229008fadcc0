"""How good are the features of a checkpoint? Linear probe, kNN and clustering, for one or several checkpoints.

    python evaluate.py runs/cplearn-cifar10-seed0 runs/barlow_twins-cifar10-seed0 --init

linear    test accuracy of a linear classifier on the backbone's standardised features: Adam, lr 0.01, 100 epochs
          (the protocol of "Collapse-Proof Non-Contrastive Self-Supervised Learning", Appendix I, which names no
          batch size), batches of 2000 for speed, last epoch
knn       test accuracy of 200 cosine neighbours in the training set, weighted exp(similarity / 0.1)
nmi       normalised mutual information of test labels with the assigned codes or prototypes of a clustering method,
          or with k-means on the features (k = classes) of any other
shuffled  the NMI that the same assignments score in random order: with many codes chance alone scores high
ami       mutual information adjusted for chance: 0 for random assignments, 1 for perfect ones
used      clusters in use on the test set, of how many, and whose
rank      effective rank of the test embeddings, of how many dimensions

Where all images are of one class, linear and knn are 1, and nmi, shuffled and ami are 1 if all test images are in one
cluster too, else 0, which is scikit-learn's convention. The rank of a constant embedding is 0.

`--init` adds each network as it was before training, so that every number has a floor.

`--save-features DIR` writes for each row DIR/<run>-<method>-<dataset>-<trained or untrained>.npz (numbered where two
rows have the same name) with what a probe of your own needs: train_features and test_features (n, d) of the backbone,
train_embedding and test_embedding (what the loss acts on), train_labels and test_labels (n,), for clustering methods
train_codes and test_codes (n,), and checkpoint, its path. `--json` then gives the file as "saved".
"""

import argparse
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import common


def linear_probe(features, labels, test_features, test_labels, epochs=100, lr=1e-2, batch_size=2000):
    """Test accuracy of a linear softmax classifier trained with Adam on standardised features (n, d), labels (n,)."""
    std, mean = torch.std_mean(features, dim=0, correction=0)
    features, test_features = ((f - mean) / std.clamp_min(1e-6) for f in (features, test_features))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        probe = nn.Linear(features.shape[1], int(max(labels.max(), test_labels.max())) + 1).to(features.device)
        optimizer = torch.optim.Adam(probe.parameters(), lr, fused=features.is_cuda)
        for _ in range(epochs):
            order = torch.randperm(len(features)).to(features.device)
            for index in order.split(batch_size):
                loss = nn.functional.cross_entropy(probe(features[index]), labels[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return (probe(test_features).argmax(1) == test_labels).float().mean().item()


def evaluate(train, test, data):
    """All figures of one model, as a dict, from what `common.extract` gives for the training and the test images."""
    labels, test_labels = (y.to(train["features"].device) for y in (data.labels, data.test_labels))
    own_codes = "codes" in test
    codes = test["codes"] if own_codes else common.kmeans(test["features"], len(data.classes))[0]
    return {
        "linear": linear_probe(train["features"], labels, test["features"], test_labels),
        "knn": common.knn_accuracy(train["features"], labels, test["features"], test_labels),
        "nmi": common.nmi(codes, test_labels),
        "shuffled": common.nmi_shuffled(codes, test_labels),
        "ami": common.ami(codes, test_labels),
        "used": common.used_codes(codes),
        "clusters": test["clusters"] if own_codes else len(data.classes),
        "clusters_by": "codes" if own_codes else "k-means",
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
    try:
        common.replace(file, lambda part: np.savez(part, **arrays))
    except OSError as error:
        common.fail(f"cannot write {str(file)!r}: {error.strerror}")


def main():
    parser = common.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "checkpoints", nargs="+", metavar="CHECKPOINT", help="a last.pt or the run folder that holds it"
    )
    parser.add_argument("--init", action="store_true", help="also evaluate each network as it was before training")
    parser.add_argument("--json", action="store_true", help="print JSON, one object per row, instead of the table")
    parser.add_argument("--dataset", choices=common.SHARED["dataset"][2], metavar="NAME", help="[the training data]")
    parser.add_argument("--data-dir", help="where that data set is [as in training]")
    parser.add_argument("--save-features", metavar="DIR", help="also write features, embeddings, labels and codes")
    parser.add_argument("--device", choices=["cuda", "mps", "cpu"], help="[cuda, else mps, else cpu]")
    options = parser.parse_args()
    device = common.find_device(options.device)

    states = [common.load_checkpoint(path) for path in options.checkpoints]
    jobs = [
        (path, state, trained)
        for path, state in zip(options.checkpoints, states, strict=True)
        for trained in ([False, True] if options.init else [True])
    ]
    files = [None] * len(jobs)
    if options.save_features:
        files = feature_files(Path(options.save_features), jobs, options.dataset)
    rows, loaded = [], {}
    for (path, state, trained), file in zip(tqdm(jobs, "evaluate", disable=None, leave=False), files, strict=True):
        args = common.args_on(state, options.dataset, options.data_dir)
        model = common.build_model(state, device, trained)
        key = (args.dataset, args.data_dir, args.image_size)
        if key not in loaded:
            loaded = {key: common.load_data(args, device)}  # only the last one is kept in memory
        data = loaded[key]
        train, test = (common.extract(model, images, data) for images in (data.images, data.test_images))
        if not all(out[name].isfinite().all() for out in (train, test) for name in ("features", "embedding")):
            common.fail(f"the network in {path!r} gives features that are not finite numbers; train it again")
        epoch = state["epoch"] if trained else 0
        row = {"checkpoint": path, "method": state["method"], "dataset": args.dataset, "epoch": epoch}
        if file:
            save_features(file, path, train, test, data)
            row["saved"] = str(file)
        rows.append(row | evaluate(train, test, data))
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
