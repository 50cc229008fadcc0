"""Self-Classifier: both views of an image get the same class, and all classes are equally likely.

    loss = mean over both directions of -mean_i sum_y t_iy log p_iy
    t: softmax over the batch of s / 0.05, then each row divided by its sum      (one view, target)
    p: softmax over classes of s / 0.1, then each column divided by its sum,
       times n / k                                                      (other view, prediction)

s (n, k) are one view's scores of n images for k learned classes. The softmax over the batch is
p(x_i | y). If all classes are equally likely, p(y) = 1 / k, then t_iy is p(y | x_i), by Bayes'
rule. In p, too, each class is given the same share, 1 / k. The loss is a mean over classifiers
with k, 2k, 4k, ... classes.

What prevents collapse: the division by columns. If all images have the same scores, the loss of a
classifier is log k, and not less. `--no-column-softmax` leaves out both steps over columns: then
one class wins, and the loss falls as well.

In the log: four classifiers with k, 2k, 4k and 8k classes have a loss of log k + 1.5 log 2 if all
images have the same scores. A good run goes below that. The least for a classifier is 0, or
log(k / n) if the batch has fewer images n than classes k.

"Self-Supervised Classification Network", Amrani, Karlinsky and Bronstein, ECCV 2022.
Departs from the paper: Adam; two views, not eight; no neighbours as positives.
Run: python methods/self_classifier.py
"""

import math
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common

# What each of the two views changes in common.AUGMENT["strong"].
VIEWS = ({"blur": 1.0}, {"blur": 0.1, "solarize": 0.2})
# This method's own defaults for each data set.
DEFAULTS = {
    "shapes": {"classes": 64},
    "blobs": {"classes": 16, "classifiers": 2},
    "moons": {"classes": 16, "classifiers": 2},
}


def add_flags(parser):
    # Our choice: the paper's settings are for ImageNet.
    parser.set_defaults(optimizer="adam", lr=1e-3, weight_decay=1e-6)
    parser.add_argument(
        "--classes",
        type=common.bounded_int(2),
        default=1000,
        help="number of classes k of the first classifier",
    )
    parser.add_argument(
        "--classifiers",
        type=common.bounded_int(1, 8),
        default=4,
        help="number of classifiers; each has twice as many classes as the one before",
    )
    parser.add_argument(
        "--no-column-softmax",
        action="store_true",
        help="softmax over classes alone; collapses",
    )


# --- the method


def loss_fn(s1, s2, sizes, *, column_softmax=True, row_temperature=0.1, column_temperature=0.05):
    """The loss of two views' scores (n, sum of `sizes`), float32.

    sizes: the number of classes k of each classifier; its scores are so many columns.
    Returns scalars `loss`, `loss12` (target from view 1, prediction from view 2) and `loss21`.
    """
    scores1 = s1.split(sizes, 1)  # (n, k) of each classifier
    scores2 = s2.split(sizes, 1)
    loss12, loss21 = 0.0, 0.0
    for a, b in zip(scores1, scores2, strict=True):
        part12 = one_direction(a, b, column_softmax, row_temperature, column_temperature)
        part21 = one_direction(b, a, column_softmax, row_temperature, column_temperature)
        loss12 = loss12 + part12 / len(sizes)
        loss21 = loss21 + part21 / len(sizes)
    loss = (loss12 + loss21) / 2
    return {"loss": loss, "loss12": loss12, "loss21": loss21}


def one_direction(target, prediction, column_softmax, row_temperature, column_temperature):
    """-mean_i sum_y t_iy log p_iy of one classifier's scores (n, k). Both views get gradient."""
    n, k = target.shape
    log_t = target / column_temperature
    log_p = (prediction / row_temperature).log_softmax(1)
    if column_softmax:
        log_t = log_t.log_softmax(0)
        log_p = log_p.log_softmax(0)  # divides each column of p by its sum
        log_p = log_p + math.log(n / k)
    t = log_t.softmax(1)
    return -(t * log_p).sum(1).mean()


class Model(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.backbone = common.build_backbone(args)
        d = args.projector_dim  # width of the head
        self.head = nn.Sequential(
            nn.Linear(self.backbone.num_features, d),
            nn.BatchNorm1d(d),
            nn.LeakyReLU(),
            nn.Linear(d, 128),
        )
        self.sizes = [args.classes * 2**i for i in range(args.classifiers)]
        self.classes = nn.Linear(128, sum(self.sizes), bias=False)  # of all classifiers
        self.gain = nn.Parameter(torch.ones(sum(self.sizes)))  # as in weight norm
        self.temperature = 0.1  # of p, as in loss_fn; the metrics read it, too

    def forward(self, x):
        return self.head(self.backbone(x))

    def all_scores(self, z):
        """Scores of all classifiers, (n, sum of sizes): cosines times each class's gain."""
        z = nn.functional.normalize(z.float(), dim=1)
        weight = nn.functional.normalize(self.classes.weight, dim=1)
        cosines = z @ weight.T
        return cosines * self.gain

    def scores(self, z):
        """Scores of the first classifier, which the metrics use."""
        return self.all_scores(z)[:, : self.sizes[0]]


# --- training


def main():
    args = common.parse_args(__file__, __doc__, add_flags, DEFAULTS)
    device = common.set_up(args)
    model = common.to_device(Model(args), device, compile=args.compile)
    data = common.load_data(args, device)
    optimizer = common.build_optimizer(model, args)
    run = common.open_run(args, model, optimizer, data, VIEWS)

    for epoch, first_step in run.epochs():  # a resumed epoch goes on at its step `first_step`
        for x1, x2 in common.two_views(data, args, VIEWS, epoch, first_step):
            # run.lr() rises linearly, then falls to 0 along a half cosine.
            for group in optimizer.param_groups:
                group["lr"] = run.lr()

            # The views go through the network one after the other: batch norm sees one at a time.
            with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
                z1, z2 = model(x1), model(x2)

            # The loss is computed over the rows of all processes, in float32.
            s1, s2 = common.gather(model.all_scores(z1), model.all_scores(z2))
            terms = loss_fn(s1, s2, model.sizes, column_softmax=not args.no_column_softmax)

            optimizer.zero_grad()
            terms["loss"].backward()
            common.sum_gradients(model)  # each process has the gradient of its own rows only
            optimizer.step()
            run.end_step(terms)  # counts the step, on which run.lr() depends
        # Collapse shows as a center_norm near 1 or as a low effective_rank of the embeddings.
        run.end_epoch(epoch, common.collapse_metrics(model, data))
    run.finish()


if __name__ == "__main__":
    main()
