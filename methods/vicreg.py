"""VICReg: make two views agree, keep every dimension's variance up, and decorrelate the dimensions.

    loss = 25 mean_ij (Z1_ij - Z2_ij)^2 + 25 [v(Z1) + v(Z2)] / 2 + c(Z1) + c(Z2)         (as Eq. 6)
    v(Z) = mean_j max(0, 1 - sqrt(Var(Z)_j + 0.0001))
    c(Z) = sum_{j != k} Cov(Z)_jk^2 / d

Z1 and Z2 (n, d) are the embeddings of two views of n images. Var and Cov are over the batch, with
n - 1. The log shows the terms without their weights as `invariance`, `variance` and `covariance`.

What prevents collapse: `variance` grows if the standard deviation of a dimension falls below 1.
`--variance-weight 0` removes it, and all embeddings become one point. `covariance` grows if
dimensions become copies of each other. `--covariance-weight 0` removes it, and few dimensions are
left.

In the log: `variance` is 0.99 if all z are equal, and near 0 in a good run. A `covariance` that
keeps growing, together with an effective_rank that falls, means that dimensions are lost.

"VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning", Bardes et al.,
ICLR 2022.
Departs from the paper: Adam and batches of 128. The projector is 2048 wide, not 8192. As in the
authors' code, the first term is a mean over j, where Eq. 6 has a sum, and the two v are averaged,
where Eq. 6 adds them (`--sum-variance` adds them).
Run: python methods/vicreg.py
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
        "--invariance-weight",
        type=common.bounded_float(0),
        default=25.0,
        help="weight of the views' agreement",
    )
    parser.add_argument(
        "--variance-weight",
        type=common.bounded_float(0),
        default=25.0,
        help="weight of variance; 0: all embeddings become one point, after some hundred steps",
    )
    parser.add_argument(
        "--covariance-weight",
        type=common.bounded_float(0),
        default=1.0,
        help="weight of covariance; 0: few dimensions are left",
    )
    parser.add_argument(
        "--sum-variance",
        action="store_true",
        help="add the variance terms of the two views, as in Eq. 6, instead of averaging them",
    )


# --- the method


def loss_fn(
    z1,
    z2,
    *,
    invariance_weight=25.0,
    variance_weight=25.0,
    covariance_weight=1.0,
    sum_variance=False,
):
    """After Eq. 6, of two views' embeddings (n, d), float32.

    Returns scalars `loss`, `invariance`, `variance` and `covariance`.
    """
    n, d = z1.shape
    invariance = (z1 - z2).square().mean()

    z1 = z1 - z1.mean(0)
    z2 = z2 - z2.mean(0)
    cov1 = z1.T @ z1 / (n - 1)  # (d, d), with the variances on the diagonal
    cov2 = z2.T @ z2 / (n - 1)

    std1 = (cov1.diagonal() + 1e-4).sqrt()
    std2 = (cov2.diagonal() + 1e-4).sqrt()
    variance = (1 - std1).relu().mean() + (1 - std2).relu().mean()
    if not sum_variance:
        variance = variance / 2

    covariance1 = (cov1.square().sum() - cov1.diagonal().square().sum()) / d
    covariance2 = (cov2.square().sum() - cov2.diagonal().square().sum()) / d
    covariance = covariance1 + covariance2

    loss = (
        invariance_weight * invariance + variance_weight * variance + covariance_weight * covariance
    )
    return {"loss": loss, "invariance": invariance, "variance": variance, "covariance": covariance}


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
            terms = loss_fn(
                z1,
                z2,
                invariance_weight=args.invariance_weight,
                variance_weight=args.variance_weight,
                covariance_weight=args.covariance_weight,
                sum_variance=args.sum_variance,
            )

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
