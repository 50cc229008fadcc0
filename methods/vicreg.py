"""VICReg: make two views agree, keep the variance of every dimension up, and decorrelate the dimensions.

    loss = 25 mean (Z1 - Z2)² + 25 [v(Z1) + v(Z2)] / 2 + c(Z1) + c(Z2)                                          (Eq. 6)
    v(Z) = mean_j max(0, 1 - sqrt(Var(Z)_j + 0.0001)),  c(Z) = Σ_{i≠j} Cov(Z)_ij² / d

Z1 and Z2 (n, d) are the embeddings of two views of n images. Variance and covariance are taken over the batch. The
three terms are called `invariance`, `variance` and `covariance`.

What prevents collapse: `variance` keeps the standard deviation of each dimension near 1, so embeddings cannot shrink
to a point. `covariance` keeps dimensions from being copies of each other. `--variance-weight 0` and
`--covariance-weight 0` remove them.

"VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning", Bardes et al., ICLR 2022.
Departs from the paper: Adam (LARS), a projector of 2048 (8192). As in the authors' code, `invariance` is a mean
over d too, and `variance` is the mean of the two views', not their sum.
Run: python methods/vicreg.py
"""

import math
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common

# What each view changes of --augment strong (see common.AUGMENT), and this method's flags on small data sets.
VIEWS = ({"blur": 1.0}, {"blur": 0.1, "solarize": 0.2})
SIZES = {}


def add_flags(parser):
    parser.set_defaults(optimizer="adam", lr=1e-3, weight_decay=1e-4)
    parser.add_argument(
        "--invariance-weight", type=common.number(0), default=25.0, help="weight of the views' agreement"
    )
    parser.add_argument("--variance-weight", type=common.number(0), default=25.0, help="0: total collapse")
    parser.add_argument("--covariance-weight", type=common.number(0), default=1.0, help="0: dimensional collapse")
    parser.add_argument(
        "--sum-variance", action="store_true", help="add the views' variance terms, as the paper prints"
    )


# --- the method


def loss_fn(z1, z2, *, weights=(25.0, 25.0, 1.0), sum_variance=False):
    """Eq. 6 of two views' embeddings (n, d), as scalars `loss`, `invariance`, `variance` and `covariance`."""
    invariance = (z1 - z2).square().mean()
    c1, c2 = ((z - z.mean(0)).T @ (z - z.mean(0)) / (len(z) - 1) for z in (z1, z2))
    v1, v2 = ((1 - (c.diagonal() + 1e-4).sqrt()).relu().mean() for c in (c1, c2))
    variance = v1 + v2 if sum_variance else (v1 + v2) / 2
    covariance = sum((c.square().sum() - c.diagonal().square().sum()) / len(c) for c in (c1, c2))
    loss = weights[0] * invariance + weights[1] * variance + weights[2] * covariance
    return {"loss": loss, "invariance": invariance, "variance": variance, "covariance": covariance}


class Model(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.backbone = common.build_backbone(args)
        d = args.projector_dim
        self.head = nn.Sequential(
            nn.Linear(self.backbone.num_features, d, bias=False), nn.BatchNorm1d(d), nn.ReLU(),
            nn.Linear(d, d, bias=False), nn.BatchNorm1d(d), nn.ReLU(),
            nn.Linear(d, d, bias=False),
        )  # fmt: skip

    def forward(self, x):
        return self.head(self.backbone(x))


# --- training


def main():
    args = common.parse_args(__file__, __doc__, add_flags, SIZES)
    device = common.start(args)
    model = common.to_device(Model(args), device, compile=args.compile)
    data = common.load_data(args, device)
    optimizer = common.build_optimizer(model, args)
    run = common.open_run(args, model, optimizer, data)

    for epoch in run.epochs():
        for x1, x2 in common.two_views(data, args, VIEWS, epoch, run.step % run.steps_per_epoch):
            for group in optimizer.param_groups:
                group["lr"] = run.learning_rate()  # linear warm-up, then a half cosine to zero
            with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
                z1, z2 = model(x1), model(x2)  # one view at a time: batch norm must not mix the views
            z1, z2 = common.gather(z1, z2)  # the rows of all processes, float32
            weights = args.invariance_weight, args.variance_weight, args.covariance_weight
            terms = loss_fn(z1, z2, weights=weights, sum_variance=args.sum_variance)
            optimizer.zero_grad()
            terms["loss"].backward()
            common.sum_gradients(model)
            optimizer.step()
            run.step += 1
            run.end_step(terms)
        run.end_epoch(epoch, common.collapse_metrics(model, data))
    run.finish()


if __name__ == "__main__":
    main()
