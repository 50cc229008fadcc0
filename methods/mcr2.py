"""MCR²: let all embeddings together fill as much space as they can, and the two views of an image as little.

    loss = compression - expansion,  expansion = ½ logdet(I + d / (2n epsilon²) ZᵀZ)
    compression = mean_i ½ logdet(I + d / (2 epsilon²) Z_i Z_iᵀ)

Z (2n, d) holds the embeddings of two views of n images, scaled to length 1, and Z_i (2, d) those of image i. The terms
are coding rates, the bits (here nats) that the embeddings take at a precision of epsilon: of the whole batch, and of
each image's views if coded apart. The loss is minus the rate reduction, with each image as a class of its own.

What prevents collapse: `expansion`, which is largest if the covariance has no preferred direction. `--expansion-weight 0`
removes it.

"Learning Diverse and Discriminative Representations via the Principle of Maximal Coding Rate Reduction", Yu et al.,
NeurIPS 2020.
Departs from the paper: two views of many images instead of 50 views of 20 images, Adam instead of SGD.
Run: python methods/mcr2.py
"""

import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common

# VIEWS: changes to common.AUGMENT["strong"], explained there. SIZES: changes to common.SIZES, for small data sets.
VIEWS = ({"blur": 1.0}, {"blur": 0.1, "solarize": 0.2})
SIZES = {}


def add_flags(parser):
    parser.set_defaults(optimizer="adam", lr=1e-3, weight_decay=1e-6)  # ours
    parser.add_argument("--epsilon", type=common.number(0.001), default=0.7, help="precision; the paper's epsilon² is 0.5")
    parser.add_argument("--expansion-weight", type=common.number(0), default=1.0, help="0: collapse")


# --- the method


def loss_fn(z1, z2, *, epsilon=0.7, expansion_weight=1.0):
    """Minus the rate reduction of two views' embeddings (n, d), float32: `loss`, `expansion` and `compression`."""
    z1, z2 = (nn.functional.normalize(z, dim=1) for z in (z1, z2))
    z, d = torch.cat([z1, z2]), z1.shape[1]
    gram = z.T @ z if d < len(z) else z @ z.T  # the smaller one, as both give the same determinant
    identity = torch.eye(len(gram), dtype=z.dtype, device=z.device)
    lower = torch.linalg.cholesky_ex(identity + d / (len(z) * epsilon**2) * gram)[0]
    expansion = lower.diagonal().log().sum()  # half of logdet, which is twice this sum
    cosine, a = (z1 * z2).sum(1), d / (2 * epsilon**2)
    compression = (torch.log1p(a * (1 - cosine)) + torch.log1p(a * (1 + cosine))).mean() / 2  # det = (1+a)² - (a cos)²
    loss = compression - expansion_weight * expansion
    return {"loss": loss, "expansion": expansion, "compression": compression}


class Model(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.backbone = common.build_backbone(args)
        d = args.projector_dim
        self.head = nn.Sequential(
            nn.Linear(self.backbone.num_features, d, bias=False), nn.BatchNorm1d(d), nn.ReLU(),
            nn.Linear(d, d, bias=False), nn.BatchNorm1d(d), nn.ReLU(),
            nn.Linear(d, 128, bias=False),
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

    for epoch, first in run.epochs():  # a resumed epoch begins at its step `first`
        for x1, x2 in common.two_views(data, args, VIEWS, epoch, first):
            for group in optimizer.param_groups:
                group["lr"] = run.lr()  # a linear warm-up, then a half cosine down to 0
            with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
                z1, z2 = model(x1), model(x2)  # one after the other: batch norm sees one view at a time
            z1, z2 = common.gather(z1, z2)  # float32; all processes' rows, if several
            terms = loss_fn(z1, z2, epsilon=args.epsilon, expansion_weight=args.expansion_weight)
            optimizer.zero_grad()
            terms["loss"].backward()
            common.sum_gradients(model)  # over processes: each has the gradient that comes through its own rows
            optimizer.step()
            run.step += 1
            run.end_step(terms)
        run.end_epoch(epoch, common.collapse_metrics(model, data))
    run.finish()


if __name__ == "__main__":
    main()
