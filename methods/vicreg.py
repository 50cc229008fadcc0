"""VICReg: make two views agree, keep the variance of every dimension up, and decorrelate the dimensions.

    loss = 25 mean_ij (Z1_ij - Z2_ij)² + 25 [v(Z1) + v(Z2)] / 2 + c(Z1) + c(Z2)                             (as Eq. 6)
    v(Z) = mean_j max(0, 1 - sqrt(Var(Z)_j + 0.0001)),  c(Z) = Σ_{j≠k} Cov(Z)_jk² / d

Z1 and Z2 (n, d) are the embeddings of two views of n images. Var and Cov are over the batch, with n - 1.

What prevents collapse: `variance` (v) grows if a dimension's standard deviation falls below 1, `covariance` (c) if
dimensions become copies of each other. `--variance-weight 0` and `--covariance-weight 0` remove these terms.

"VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning", Bardes et al., ICLR 2022.
Departs from the paper: Adam, batches of 128; projector 2048 wide, not 8192. As in the authors' code, the first term is
a mean over j (Eq. 6: a sum), the two v are averaged (Eq. 6: added, `--sum-variance`). Run: python methods/vicreg.py
"""

import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common

# VIEWS: for each view, changes to common.AUGMENT["strong"]. DEFAULTS: a data set's own defaults.
VIEWS = ({"blur": 1.0}, {"blur": 0.1, "solarize": 0.2})
DEFAULTS = {}


def add_flags(parser):
    parser.set_defaults(optimizer="adam", lr=1e-3, weight_decay=1e-6, batch_size=128)  # as in Barlow-Twins-HSIC
    parser.add_argument("--invariance-weight", type=common.bounded_float(0), default=25.0, help="of the views' agreement")
    parser.add_argument("--variance-weight", type=common.bounded_float(0), default=25.0, help="0: total collapse")
    parser.add_argument("--covariance-weight", type=common.bounded_float(0), default=1.0, help="0: dimensional collapse")
    parser.add_argument("--sum-variance", action="store_true", help="add the views' variances, as in the paper")


# --- the method


def loss_fn(z1, z2, *, weights=(25.0, 25.0, 1.0), sum_variance=False):
    """Eq. 6 of two views' embeddings (n, d), float32: `loss`, `invariance`, `variance` and `covariance`."""
    n, d = z1.shape
    invariance = (z1 - z2).square().mean()
    cov1, cov2 = ((z - z.mean(0)).T @ (z - z.mean(0)) / (n - 1) for z in (z1, z2))  # (d, d), variances on the diagonal
    v1, v2 = ((1 - (cov.diagonal() + 1e-4).sqrt()).relu().mean() for cov in (cov1, cov2))
    variance = v1 + v2 if sum_variance else (v1 + v2) / 2
    covariance = sum((cov.square().sum() - cov.diagonal().square().sum()) / d for cov in (cov1, cov2))
    loss = weights[0] * invariance + weights[1] * variance + weights[2] * covariance
    return {"loss": loss, "invariance": invariance, "variance": variance, "covariance": covariance}


class Model(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.backbone = common.build_backbone(args)
        d = args.projector_dim  # width of the head
        self.head = nn.Sequential(
            nn.Linear(self.backbone.num_features, d, bias=False), nn.BatchNorm1d(d), nn.ReLU(),
            nn.Linear(d, d, bias=False), nn.BatchNorm1d(d), nn.ReLU(),
            nn.Linear(d, d, bias=False),
        )  # fmt: skip

    def forward(self, x):
        return self.head(self.backbone(x))


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
            z1, z2 = common.gather(z1.float(), z2.float())  # float32; all processes' rows
            weights = args.invariance_weight, args.variance_weight, args.covariance_weight
            terms = loss_fn(z1, z2, weights=weights, sum_variance=args.sum_variance)
            optimizer.zero_grad()
            terms["loss"].backward()
            common.sum_gradients(model)  # each process has the gradient of its own rows only
            optimizer.step()
            run.end_step(terms)
        run.end_epoch(epoch, common.collapse_metrics(model, data))  # embeddings' center_norm near 1, low rank: collapse
    run.finish()


if __name__ == "__main__":
    main()
