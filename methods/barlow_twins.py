"""Barlow Twins: make the cross-correlation matrix of two views' embeddings the identity matrix.

    loss = Σ_i (1 - C_ii)² + lambda Σ_{i≠j} C_ij²                                                               (Eq. 1)
    C = Z1ᵀ Z2 / n                                                                                              (Eq. 2)

Z1 and Z2 (n, d) are the embeddings of two views of n images, each column standardised over the batch. So C_ij is the
correlation of dimension i of view 1 with dimension j of view 2. The sums are called `invariance` and `redundancy`.

What prevents collapse: a constant column standardises to 0, so C_ii = 0, which costs 1 in the first sum. The second
sum grows if columns are copies of each other. `--lambda-offdiag 0` removes the second sum.

"Barlow Twins: Self-Supervised Learning via Redundancy Reduction", Zbontar et al., ICML 2021.
Departs from the paper: Adam, batches of 128; lambda 0.0051, projector 2048 wide. Run: python methods/barlow_twins.py
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
    parser.add_argument("--lambda-offdiag", type=common.bounded_float(0), default=0.0051, help="weight of redundancy")


# --- the method


def loss_fn(z1, z2, *, lambda_offdiag=0.0051):
    """Eq. 1 of two views' embeddings (n, d), float32: scalars `loss`, `invariance` and `redundancy`."""
    # Batch norm without parameters standardises columns. It divides by n, not n - 1, so identical views have C_ii = 1.
    # First - mean, so that a constant column is 0: batch norm alone divides a rounding error by a tiny deviation.
    z1, z2 = (nn.functional.batch_norm(z - z.mean(0), None, None, training=True) for z in (z1, z2))
    c = z1.T @ z2 / len(z1)
    invariance = (1 - c.diagonal()).square().sum()
    redundancy = c.square().sum() - c.diagonal().square().sum()
    return {"loss": invariance + lambda_offdiag * redundancy, "invariance": invariance, "redundancy": redundancy}


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
            terms = loss_fn(z1, z2, lambda_offdiag=args.lambda_offdiag)
            optimizer.zero_grad()
            terms["loss"].backward()
            common.sum_gradients(model)  # each process has the gradient of its own rows only
            optimizer.step()
            run.end_step(terms)
        run.end_epoch(epoch, common.collapse_metrics(model, data))  # embeddings' center_norm near 1, low rank: collapse
    run.finish()


if __name__ == "__main__":
    main()
