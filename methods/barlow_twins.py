"""Barlow Twins: make the cross-correlation matrix of two views' embeddings the identity matrix.

    loss = sum_i (1 - C_ii)^2 + lambda_offdiag * sum_{i != j} C_ij^2                        (Eq. 1)
    C = Z1^T Z2 / n                                                                         (Eq. 2)

Z1 and Z2 (n, d) are the embeddings of two views of n images. Each of their columns is standardised
over the batch. So C_ij is the correlation of dimension i of view 1 with dimension j of view 2. The
log shows the two sums as `invariance` and `redundancy`.

What prevents collapse: two things. The standardised columns cannot be constant: a column that is
the same for all images becomes 0, so its C_ii is 0, which costs 1 in the first sum. And columns
that are copies of each other raise the second sum. `--lambda-offdiag 0` removes the second sum, and
few dimensions are left. Standardising cannot be switched off, so one point never has a low loss.

In the log: `invariance` is d if all z are equal, and falls in a good run. With columns that are
copies of one another `redundancy` comes near d (d - 1), and effective_rank near 1.

"Barlow Twins: Self-Supervised Learning via Redundancy Reduction", Zbontar et al., ICML 2021.
Departs from the paper: Adam and batches of 128. The projector is 2048 wide, not 8192, with
lambda 0.0051 as in the authors' code.
Run: python methods/barlow_twins.py
"""

import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common

# What each of the two views changes in common.AUGMENT["strong"].
VIEWS = ({"blur": 1.0}, {"blur": 0.1, "solarize": 0.2})
# This method's own defaults for each data set.
DEFAULTS = {}


def add_flags(parser):
    # As in Barlow-Twins-HSIC, for CIFAR-10.
    parser.set_defaults(optimizer="adam", lr=1e-3, weight_decay=1e-6, batch_size=128)
    parser.add_argument(
        "--lambda-offdiag",
        type=common.bounded_float(0),
        default=0.0051,
        help="weight of redundancy; 0: dimensions become copies of each other",
    )


# --- the method


def loss_fn(z1, z2, *, lambda_offdiag=0.0051):
    """Eq. 1 of two views' embeddings (n, d), float32: `loss`, `invariance` and `redundancy`."""
    # First minus the mean, so that rounding leaves almost nothing of a constant column. Batch norm
    # alone would divide its rounding error by a tiny deviation.
    z1 = z1 - z1.mean(0)
    z2 = z2 - z2.mean(0)
    # Batch norm divides by n, not by n - 1. So identical views have C_ii = 1.
    # It keeps no running statistics here, hence the two None.
    z1 = nn.functional.batch_norm(z1, None, None, training=True)
    z2 = nn.functional.batch_norm(z2, None, None, training=True)
    c = z1.T @ z2 / len(z1)
    invariance = (1 - c.diagonal()).square().sum()
    redundancy = c.square().sum() - c.diagonal().square().sum()
    loss = invariance + lambda_offdiag * redundancy
    return {"loss": loss, "invariance": invariance, "redundancy": redundancy}


class Model(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.backbone = common.build_backbone(args)
        d = args.projector_dim  # width of the head
        self.head = nn.Sequential(
            nn.Linear(self.backbone.num_features, d, bias=False),
            nn.BatchNorm1d(d),
            nn.ReLU(),
            nn.Linear(d, d, bias=False),
            nn.BatchNorm1d(d),
            nn.ReLU(),
            nn.Linear(d, d, bias=False),
        )

    def forward(self, x):
        return self.head(self.backbone(x))


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
            z1, z2 = common.gather(z1.float(), z2.float())
            terms = loss_fn(z1, z2, lambda_offdiag=args.lambda_offdiag)

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
