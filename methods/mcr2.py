"""MCR²: let all embeddings together fill as much space as they can, and the two views of an image as little.

    loss = compression - expansion,  expansion = ½ logdet(I + d / (2n epsilon²) ZᵀZ)
    compression = mean_i ½ logdet(I + d / (2 epsilon²) Z_i Z_iᵀ)

Z (2n, d) holds the embeddings of two views of n images, scaled to length 1, and Z_i (2, d) those of image i. The terms
are coding rates: nats that describe an embedding up to an error of epsilon. If all z are equal, the loss is 0.

What prevents collapse: `expansion`, largest if all directions are used alike. `--expansion-weight 0` removes it.

"Learning Diverse and Discriminative Representations via ... Maximal Coding Rate Reduction", Yu et al., NeurIPS 2020.
Departs from the paper: optimizer; head; two views of many images, not 50 views of 20; epsilon 16, not 0.7. At 0.7
expansion wins: an image's views end at right angles, where compression is flat. Run: python methods/mcr2.py
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
    parser.set_defaults(optimizer="adam", lr=1e-3, weight_decay=1e-6)  # our choice
    parser.add_argument("--epsilon", type=common.bounded_float(0.001), default=16.0, help="error that a code allows")
    parser.add_argument("--expansion-weight", type=common.bounded_float(0), default=1.0, help="of expansion; 0: collapse")


# --- the method


def loss_fn(z1, z2, *, epsilon=16.0, expansion_weight=1.0):
    """Compression minus expansion of two views' embeddings (n, d), float32: `loss`, `expansion` and `compression`."""
    # In double: float32 is too coarse for the determinant of a large matrix. mps has no double.
    w1, w2 = (nn.functional.normalize(z if z.device.type == "mps" else z.double(), dim=1) for z in (z1, z2))
    w, a = torch.cat([w1, w2]), z1.shape[1] / (2 * epsilon**2)
    gram = w.T @ w if w.shape[1] < len(w) else w @ w.T  # the smaller one: both give the same determinant
    identity = torch.eye(len(gram), dtype=w.dtype, device=w.device)
    lower = torch.linalg.cholesky_ex(identity + a / len(z1) * gram)[0]  # positive definite, so it cannot fail
    expansion = lower.diagonal().log().sum().to(z1)  # logdet is twice this sum
    cosine = (w1 * w2).sum(1)  # Z_i Z_iᵀ, of two unit vectors, has the eigenvalues 1 + cosine and 1 - cosine
    compression = ((1 + a * (1 + cosine)).log() + (1 + a * (1 - cosine)).log()).mean().to(z1) / 2
    loss = compression - expansion_weight * expansion
    return {"loss": loss, "expansion": expansion, "compression": compression}


class Model(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.backbone = common.build_backbone(args)
        d = args.projector_dim  # width of the head
        self.head = nn.Sequential(
            nn.Linear(self.backbone.num_features, d, bias=False), nn.BatchNorm1d(d), nn.ReLU(),
            nn.Linear(d, d, bias=False), nn.BatchNorm1d(d), nn.ReLU(),
            nn.Linear(d, 128, bias=False),
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
            terms = loss_fn(z1, z2, epsilon=args.epsilon, expansion_weight=args.expansion_weight)
            optimizer.zero_grad()
            terms["loss"].backward()
            common.sum_gradients(model)  # each process has the gradient of its own rows only
            optimizer.step()
            run.end_step(terms)
        run.end_epoch(epoch, common.collapse_metrics(model, data))  # embeddings' center_norm near 1, low rank: collapse
    run.finish()


if __name__ == "__main__":
    main()
