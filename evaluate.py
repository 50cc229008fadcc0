"""How good are the features of a checkpoint? Linear probe, kNN and clustering, for one or several checkpoints.

    python evaluate.py runs/cplearn-cifar10-seed0 runs/barlow_twins-cifar10-seed0 --init

linear    test accuracy of a linear classifier on the backbone's standardised features: Adam, lr 0.01, 100 epochs
          (the protocol of "Collapse-Proof Non-Contrastive Self-Supervised Learning", Appendix I), last epoch
knn       test accuracy of 200 cosine neighbours in the training set, weighted exp(similarity / 0.1)
nmi       normalised mutual information of test labels with the assigned codes or prototypes of a clustering method,
          or with k-means on the features (k = classes) of any other
shuffled  the NMI that the same assignments score in random order: with many codes chance alone scores high
ami       mutual information adjusted for chance: 0 for random assignments, 1 for perfect ones
used      clusters in use on the test set, of how many, and whose
rank      effective rank of the test embeddings, of how many dimensions

`--init` adds each network as it was before training, so that every number has a floor.
"""

import argparse
import json
import sys

import torch
from torch import nn
from tqdm import tqdm

import common


def linear_probe(features, labels, test_features, test_labels, epochs=100, lr=1e-2, batch_size=256):
    """Test accuracy of a linear softmax classifier trained with Adam on standardised features (n, d), labels (n,)."""
    std, mean = torch.std_mean(features, dim=0, correction=0)
    features, test_features = ((f - mean) / std.clamp_min(1e-6) for f in (features, test_features))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        probe = nn.Linear(features.shape[1], int(max(labels.max(), test_labels.max())) + 1).to(features.device)
        optimizer = torch.optim.Adam(probe.parameters(), lr)
        for _ in range(epochs):
            order = torch.randperm(len(features)).to(features.device)
            for index in order.split(batch_size):
                loss = nn.functional.cross_entropy(probe(features[index]), labels[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return (probe(test_features).argmax(1) == test_labels).float().mean().item()


def kmeans(x, k, restarts=5, iterations=100):
    """Cluster assignments (n,) of x (n, d): Lloyd's algorithm from greedy k-means++ seeds, best of `restarts`."""
    rng, k, best = common.generator(0), min(k, len(x)), (torch.inf, None)
    for _ in range(restarts):
        chosen = [int(torch.randint(len(x), (1,), generator=rng))]
        nearest = (x - x[chosen[0]]).square().sum(1)
        for _ in range(k - 1):
            # Points on top of a seed have no weight; where all are, any will do. The best of four draws is kept.
            draws = torch.multinomial(nearest.cpu().double() + 1e-30, 4, replacement=True, generator=rng).to(x.device)
            closer = torch.minimum(nearest, torch.cdist(x[draws], x).square())
            best_draw = int(closer.sum(1).argmin())
            nearest = closer[best_draw]
            chosen.append(int(draws[best_draw]))
        centers, assigned = x[chosen], None
        for _ in range(iterations):
            before = assigned
            distance, assigned = torch.cdist(x, centers).min(1)
            if before is not None and torch.equal(before, assigned):
                break
            total = torch.zeros_like(centers).index_add_(0, assigned, x)
            count = torch.bincount(assigned, minlength=k).unsqueeze(1)
            centers = torch.where(count > 0, total / count.clamp_min(1), centers)
        inertia = distance.square().sum().item()
        if inertia < best[0]:
            best = (inertia, assigned)
    return best[1]


def evaluate(model, data):
    """All figures of one model in eval mode, as a dict of numbers."""
    train = common.extract(model, data.images, data)
    test = common.extract(model, data.test_images, data)
    labels, test_labels = (y.to(train["features"].device) for y in (data.labels, data.test_labels))
    own_codes = "codes" in test
    codes = test["codes"] if own_codes else kmeans(test["features"], len(data.classes))
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


def main():
    parser = common.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "checkpoints", nargs="+", metavar="CHECKPOINT", help="a last.pt or the run folder that holds it"
    )
    parser.add_argument("--init", action="store_true", help="also evaluate each network as it was before training")
    parser.add_argument("--json", action="store_true", help="print JSON, one object per row, instead of the table")
    parser.add_argument("--dataset", choices=common.SHARED["dataset"][2], metavar="NAME", help="[the training data]")
    parser.add_argument("--data-dir", help="where that data set is [as in training]")
    parser.add_argument("--device", choices=["cuda", "mps", "cpu"], help="[cuda, else mps, else cpu]")
    options = parser.parse_args()
    device = common.find_device(options.device)

    states = [common.load_checkpoint(path) for path in options.checkpoints]
    jobs = [
        (path, state, trained)
        for path, state in zip(options.checkpoints, states, strict=True)
        for trained in ([False, True] if options.init else [True])
    ]
    rows, loaded = [], {}
    for path, state, trained in tqdm(jobs, "evaluate", disable=None, leave=False):
        args = argparse.Namespace(**state["args"])
        model = common.build_model(state, device, trained)
        args.dataset, args.data_dir = options.dataset or args.dataset, options.data_dir or args.data_dir
        if (args.dataset in common.TOYS) != (args.backbone == "mlp"):
            common.fail(f"{path!r} has a {args.backbone} backbone, which cannot read --dataset {args.dataset}")
        key = (args.dataset, args.data_dir, args.image_size)
        if key not in loaded:
            loaded = {key: common.load_data(args, device)}  # only the last one is kept in memory
        epoch = state["epoch"] if trained else 0
        row = {"checkpoint": path, "method": state["method"], "dataset": args.dataset, "epoch": epoch}
        rows.append(row | evaluate(model, loaded[key]))
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
