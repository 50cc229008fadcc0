"""LeJEPA: make two views agree, and make the embeddings a standard Gaussian.

    loss = (1 - lambda) invariance + lambda SIGReg
    invariance = mean_ij (z1_ij - z2_ij)^2 / 4
    SIGReg     = mean over both views and all directions a of
                 n int_{-3}^{3} |phi_a(t) - exp(-t^2 / 2)|^2 exp(-t^2 / 2) dt     (Epps and Pulley)
    phi_a(t)   = 1/n sum_i exp(i t a . z_i)

z1 and z2 (n, d) are the embeddings of two views of n images, which are not normalised. invariance
is the mean squared distance of a view from the mean of both. a (d,) are random unit vectors, others
in every step. phi_a is the characteristic function of the n projections on a, and exp(-t^2 / 2) is
that of a standard Gaussian. A distribution whose projections are all standard Gaussians is the
standard Gaussian of d dimensions. The integral is a sum over 17 values of t from 0 to 3, doubled.
The log shows both terms without their weights, as `invariance` and `sigreg`. lambda is
`--sigreg-weight`.

What prevents collapse: SIGReg. Embeddings that are one point, or lie in few dimensions, are no
Gaussian of d dimensions. `--sigreg-weight 0` removes it, and all embeddings become one point. No
teacher and no stop-gradient is needed. cplearn.py, too, fixes in advance how embeddings are to be
distributed: there on a sphere, in the scores of random codes.

In the log: `sigreg` is 0.41 n if all z are 0, and falls to a few units in a good run. n draws from
the Gaussian itself have 1.06 on average.

"LeJEPA: Provable and Scalable Self-Supervised Learning Without the Heuristics", Balestriero and
LeCun, 2025.
Departs from the authors' code: two views instead of four to eight, and our augmentation, warm-up
and batch size.
Run: python methods/lejepa.py
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
    # The authors' for ResNets.
    parser.set_defaults(optimizer="adamw", lr=5e-4, weight_decay=5e-4)
    parser.add_argument(
        "--sigreg-weight",
        type=common.bounded_float(0, 1),
        default=0.02,
        help="lambda; 0: all embeddings become one point",
    )
    parser.add_argument(
        "--directions",
        type=common.bounded_int(1),
        default=256,
        help="random directions of a step, on which embeddings are projected",
    )
    parser.add_argument(
        "--embedding-dim",
        type=common.bounded_int(2),
        default=128,
        help="dimensions of z; the authors have 16 for ten classes",
    )


# --- the method


def loss_fn(z1, z2, directions, *, sigreg_weight=0.02):
    """The loss of two views' embeddings (n, d), float32, and unit vectors `directions` (d, k).

    Returns scalars `loss`, `invariance` and `sigreg`.
    """
    invariance = (z1 - z2).square().mean() / 4
    sigreg = (epps_pulley(z1 @ directions) + epps_pulley(z2 @ directions)) / 2
    loss = (1 - sigreg_weight) * invariance + sigreg_weight * sigreg
    return {"loss": loss, "invariance": invariance, "sigreg": sigreg}


def epps_pulley(x):
    """The statistic of Epps and Pulley of each column of x (n, k), mean over columns.

    It is n times a distance between the column's characteristic function and the Gaussian's.
    """
    n = len(x)
    t = torch.linspace(0, 3, 17, dtype=x.dtype, device=x.device)
    gaussian = (-t.square() / 2).exp()
    angles = x[:, :, None] * t  # (n, k, 17)
    real = angles.cos().mean(0)
    imaginary = angles.sin().mean(0)
    distance = (real - gaussian).square() + imaginary.square()  # (k, 17)
    integral = 2 * torch.trapezoid(distance * gaussian, t, dim=1)  # from -3 to 3, by symmetry
    return n * integral.mean()


def draw_directions(d, k, seed, step):
    """k random unit vectors (d, k), from the seed and the step."""
    draw = common.generator(seed, step)
    return nn.functional.normalize(torch.randn(d, k, generator=draw), dim=0)


class Model(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.backbone = common.build_backbone(args)
        d = args.projector_dim  # width of the head
        self.head = nn.Sequential(
            nn.Linear(self.backbone.num_features, d),
            nn.BatchNorm1d(d),
            nn.ReLU(),
            nn.Linear(d, d),
            nn.BatchNorm1d(d),
            nn.ReLU(),
            nn.Linear(d, args.embedding_dim),
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
            # All processes draw the same directions.
            directions = draw_directions(args.embedding_dim, args.directions, args.seed, run.step)
            directions = directions.to(device, non_blocking=True)
            terms = loss_fn(z1, z2, directions, sigreg_weight=args.sigreg_weight)

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
