"""Self-Classifier: both views of an image get the same class, and all classes are equally likely.

    loss = mean over both directions of -mean_i Σ_y t_iy log p_iy
    t = softmax over the batch of s / 0.05, then each row divided by its sum        (of one view: the target)
    p = softmax over classes of s / 0.1, then each column divided by its sum, times n / k   (of the other view)

s (n, k): one view's scores of n images for k learned classes. Softmax over the batch is p(x_i | y), with p(y) = 1 / k,
t_iy is p(y | x_i) (Bayes). In p, 1 / k replaces the column's mean. Losses of k, 2k, 4k, ... classes are averaged.

What prevents collapse: if all images have the same scores, the loss is log k. The least loss is 0, or log(k / n) if
n < k. `--no-column-softmax` leaves out both steps over columns: one class wins, and the loss falls as well.

"Self-Supervised Classification Network", Amrani, Karlinsky and Bronstein, ECCV 2022.
Departs from the paper: Adam; two views, not eight; no neighbours as positives. Run: python methods/self_classifier.py
"""

import math
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common

# VIEWS: for each view, changes to common.AUGMENT["strong"]. DEFAULTS: a data set's own defaults.
VIEWS = ({"blur": 1.0}, {"blur": 0.1, "solarize": 0.2})
DEFAULTS = {name: {"classes": 16, "classifiers": 2} for name in common.TOYS} | {"shapes": {"classes": 64}}


def add_flags(parser):
    parser.set_defaults(optimizer="adam", lr=1e-3, weight_decay=1e-6)  # our choice
    parser.add_argument("--classes", type=common.bounded_int(2), default=1000, help="k, of the first classifier")
    parser.add_argument("--classifiers", type=common.bounded_int(1, 8), default=4, help="each has twice as many classes")
    parser.add_argument("--no-column-softmax", action="store_true", help="softmax over classes alone; collapses")


# --- the method


def loss_fn(s1, s2, sizes, *, column_softmax=True, row_temperature=0.1, column_temperature=0.05):
    """The loss of two views' scores (n, sum of `sizes`), float32, as scalars `loss`, `loss12` (t1, p2) and `loss21`."""
    losses = {"loss12": 0.0, "loss21": 0.0}
    for name, target, prediction in (("loss12", s1, s2), ("loss21", s2, s1)):
        for a, b in zip(target.split(sizes, 1), prediction.split(sizes, 1), strict=True):  # (n, k) of each classifier
            log_t, log_p = a / column_temperature, (b / row_temperature).log_softmax(1)  # no stop-gradient
            if column_softmax:  # log_p.log_softmax(0) = log(p / p.sum(0))
                log_t, log_p = log_t.log_softmax(0), log_p.log_softmax(0) + math.log(len(b) / b.shape[1])
            losses[name] -= (log_t.softmax(1) * log_p).sum(1).mean() / len(sizes)
    return {"loss": (losses["loss12"] + losses["loss21"]) / 2} | losses


class Model(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.backbone = common.build_backbone(args)
        d = args.projector_dim  # width of the head
        self.head = nn.Sequential(
            nn.Linear(self.backbone.num_features, d), nn.BatchNorm1d(d), nn.LeakyReLU(),
            nn.Linear(d, 128),
        )  # fmt: skip
        self.temperature = 0.1  # of p, as in loss_fn; common.collapse_metrics reads it
        self.sizes = [args.classes * 2**i for i in range(args.classifiers)]
        self.classes = nn.Linear(128, sum(self.sizes), bias=False)  # of all classifiers
        self.gain = nn.Parameter(torch.ones(sum(self.sizes)))  # as weight norm has it; s = gain × cosine

    def forward(self, x):
        return self.head(self.backbone(x))

    def all_scores(self, z):
        z, weight = nn.functional.normalize(z.float(), dim=1), nn.functional.normalize(self.classes.weight, dim=1)
        return z @ weight.T * self.gain

    def scores(self, z):
        return self.all_scores(z)[:, : self.sizes[0]]  # for the metrics


# --- training


def main():
    args = common.parse_args(__file__, __doc__, add_flags, DEFAULTS)
    device = common.set_up(args)
    model = common.to_device(Model(args), device, compile=args.compile)
    data = common.load_data(args, device)
    optimizer = common.build_optimizer(model, args)
    run = common.open_run(args, model, optimizer, data)

    for epoch, first_step in run.epochs():  # a resumed epoch goes on at its step `first_step`
        for x1, x2 in common.two_views(data, args, VIEWS, epoch, first_step):
            for group in optimizer.param_groups:
                group["lr"] = run.lr()  # a linear warm-up, then a half cosine down to 0
            with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
                z1, z2 = model(x1), model(x2)  # one after the other: batch norm sees one view at a time
            s1, s2 = common.gather(model.all_scores(z1), model.all_scores(z2))  # float32; all processes' rows
            terms = loss_fn(s1, s2, model.sizes, column_softmax=not args.no_column_softmax)
            optimizer.zero_grad()
            terms["loss"].backward()
            common.sum_gradients(model)  # each process has the gradient of its own rows only
            optimizer.step()
            run.end_step(terms)
        run.end_epoch(epoch, common.collapse_metrics(model, data))  # embeddings' center_norm near 1, low rank: collapse
    run.finish()


if __name__ == "__main__":
    main()
