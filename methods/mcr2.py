"""MCR2: let all embeddings together fill much space, and the two views of one image little.

    loss = compression - expansion_weight * expansion
    expansion   = 1/2 logdet(I + d / (2n epsilon^2) Z^T Z)
    compression = mean_i 1/2 logdet(I + d / (2 epsilon^2) Z_i Z_i^T)

Z (2n, d) holds the embeddings of two views of n images, scaled to length 1. Z_i (2, d) are those of
image i. Both terms are coding rates: how many nats it takes to describe an embedding up to an error
of epsilon.

What prevents collapse: `expansion` is largest if all directions are used alike.
`--expansion-weight 0` removes it.

In the log: if all z are equal, expansion and compression are equal, and the loss is 0. In a good
run the loss is negative, because expansion is larger.

"Learning Diverse and Discriminative Representations via the Principle of Maximal Coding Rate
Reduction", Yu et al., NeurIPS 2020.
Departs from the paper: the optimizer and the head are others. There are two views of many images,
not 50 views of 20 images. epsilon is 16, not 0.7: at 0.7 expansion wins, and the views of an image
end at right angles, where compression has no gradient.
Run: python methods/mcr2.py
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
    # Our choice: the authors' settings are for 50 views of an image.
    parser.set_defaults(optimizer="adam", lr=1e-3, weight_decay=1e-6)
    parser.add_argument(
        "--epsilon",
        type=common.bounded_float(0.001),
        default=16.0,
        help="the error that a code allows; smaller: expansion weighs more",
    )
    parser.add_argument(
        "--expansion-weight",
        type=common.bounded_float(0),
        default=1.0,
        help="weight of expansion; 0: collapse",
    )


# --- the method


def loss_fn(z1, z2, *, epsilon=16.0, expansion_weight=1.0):
    """The loss of two views' embeddings (n, d), float32: `loss`, `expansion`, `compression`."""
    n, d = z1.shape
    w1, w2 = z1, z2
    if z1.device.type != "mps":  # mps has no float64
        w1, w2 = z1.double(), z2.double()  # float32 is too coarse for a large determinant
    w1 = nn.functional.normalize(w1, dim=1)
    w2 = nn.functional.normalize(w2, dim=1)
    a = d / (2 * epsilon**2)  # the factor in compression

    w = torch.cat([w1, w2])  # (2n, d)
    if d < 2 * n:
        gram = w.T @ w
    else:
        gram = w @ w.T  # the same determinant from a smaller matrix
    identity = torch.eye(len(gram), dtype=w.dtype, device=w.device)
    # The matrix is positive definite, so this cannot fail. cholesky_ex does not wait for the GPU.
    lower, _ = torch.linalg.cholesky_ex(identity + a / n * gram)
    expansion = lower.diagonal().log().sum()  # 1/2 logdet

    # Z_i Z_i^T, of two unit vectors, has the eigenvalues 1 + cosine and 1 - cosine.
    cosine = (w1 * w2).sum(1)
    logdet = (1 + a * (1 + cosine)).log() + (1 + a * (1 - cosine)).log()
    compression = logdet.mean() / 2

    expansion = expansion.to(z1)
    compression = compression.to(z1)
    loss = compression - expansion_weight * expansion
    return {"loss": loss, "expansion": expansion, "compression": compression}


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
            nn.Linear(d, 128, bias=False),
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
            terms = loss_fn(z1, z2, epsilon=args.epsilon, expansion_weight=args.expansion_weight)

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
