"""W-MSE: whiten each view's embeddings over parts of the batch, then make the views agree.

    loss = mean_i ||w1_i - w2_i||^2 / dim                                                   (Eq. 3)
    w_i = L^-1 (z_i - mean z),  L L^T = Cov(z),  L lower triangular                   (Section 3.2)

z_i (dim,) are the embeddings of one view of the images in a part of the batch, and w_i is their
whitened form. w1_i and w2_i belong to the two views of image i. With `--distance cosine` the loss
is 2 - 2 mean_i cos(w1_i, w2_i).

What prevents collapse: the covariance of w is the identity, so w fills all dimensions.
`--whitening batchnorm` only standardises each dimension, and all dimensions may become copies of
one. `--whitening none` leaves z as it is, and all z may become equal. With `--distance cosine` the
lengths of w are free: many images may share one short w, while a few have very long ones.

In the log: unrelated w have loss 2 and equal ones have loss 0. `cosine` is the mean cosine of the
views' w. A loss that is NaN means that some part's covariance is singular: its embeddings fill
fewer than dim dimensions.

"Whitening for Self-Supervised Representation Learning", Ermolov et al., ICML 2021.
Departs from the paper: the Euclidean distance (--no_norm in the authors' code), not the cosine. The
batch is split into parts once, as in the authors' code on CIFAR, where the paper allows several
random splits. The learning rate falls along a half cosine, not in steps.
Run: python methods/wmse.py
"""

import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common

# What each of the two views changes in common.AUGMENT["strong"].
BOTH = {"scale": (0.2, 1), "jitter": (0.4, 0.4, 0.4, 0.1), "grayscale": 0.1}
VIEWS = (BOTH, BOTH)
# This method's own defaults for each data set.
DEFAULTS = {
    "shapes": {"projector_dim": 1024},
    "blobs": {"embedding_dim": 8, "part_size": 32},
    "moons": {"embedding_dim": 8, "part_size": 32},
}


def add_flags(parser):
    # The authors' own settings for CIFAR-10.
    parser.set_defaults(
        optimizer="adam", lr=3e-3, weight_decay=1e-6, batch_size=512, projector_dim=1024
    )
    parser.add_argument(
        "--distance",
        choices=["euclidean", "cosine"],
        default="euclidean",
        help="distance of the whitened views",
    )
    parser.add_argument(
        "--whitening",
        choices=["cholesky", "batchnorm", "none"],
        default="cholesky",
        help="cholesky: whiten; batchnorm: only standardise each dimension, which leaves few "
        "dimensions; none: neither, which leaves one point",
    )
    parser.add_argument(
        "--embedding-dim",
        type=common.bounded_int(1),
        default=64,
        help="dimensions of the embeddings, at most half of --part-size",
    )
    parser.add_argument(
        "--part-size",
        type=common.bounded_int(2),
        default=128,
        help="number of images that are whitened together",
    )


# --- the method


def loss_fn(z1, z2, *, distance="euclidean", whitening="cholesky", part_size=128):
    """Eq. 3 of two views' embeddings (n, dim), float32: scalars `loss` and `cosine`.

    Cholesky needs parts of more than dim images. With dim images or fewer the loss is NaN.
    """
    w1 = whiten(z1, whitening, part_size)
    w2 = whiten(z2, whitening, part_size)
    cosine = nn.functional.cosine_similarity(w1, w2, dim=2).mean()
    if distance == "cosine":
        loss = 2 - 2 * cosine
    else:
        loss = (w1 - w2).square().mean()
    return {"loss": loss.to(z1), "cosine": cosine.to(z1)}


def whiten(z, whitening, part_size):
    """z (n, dim) cut into parts and whitened in each: (parts, part_size, dim), float64.

    Rows beyond the last full part are dropped. NaN where a covariance is singular. float32 on mps.
    """
    if z.device.type != "mps":  # mps has no float64
        z = z.double()  # in float32 Cholesky can fail
    part_size = min(part_size, len(z))
    parts = len(z) // part_size
    z = z[: parts * part_size].reshape(parts, part_size, z.shape[1])
    if whitening == "none":
        return z

    z = z - z.mean(1, keepdim=True)
    if whitening == "batchnorm":
        return z / (z.var(1, keepdim=True) + 1e-5).sqrt()

    cov = z.mT @ z / (part_size - 1)  # (parts, dim, dim)
    # Rounding can hide that a covariance is singular. With a slightly smaller diagonal cholesky_ex
    # reports it.
    tiny = 1e3 * torch.finfo(z.dtype).eps
    diagonal = cov.diagonal(dim1=1, dim2=2)
    cov = cov - torch.diag_embed(tiny * diagonal)
    lower, info = torch.linalg.cholesky_ex(cov)  # cholesky would wait for the GPU
    failed = (info > 0).view(-1, 1, 1)
    lower = lower.masked_fill(failed, torch.nan)  # the run then stops, see Run.end_step
    # The rows of z as columns, times L^-1, and back to rows.
    return torch.linalg.solve_triangular(lower, z.mT, upper=False).mT


class Model(nn.Module):
    def __init__(self, args):
        super().__init__()
        smallest_part = min(args.part_size, args.batch_size)
        if args.whitening == "cholesky" and smallest_part < 2 * args.embedding_dim:
            common.fail(
                f"--embedding-dim {args.embedding_dim} needs a --part-size and a --batch-size of "
                "twice that"
            )
        self.backbone = common.build_backbone(args)
        d = args.projector_dim  # width of the head
        self.head = nn.Sequential(
            nn.Linear(self.backbone.num_features, d, bias=False),
            nn.BatchNorm1d(d),
            nn.ReLU(),
            nn.Linear(d, args.embedding_dim, bias=False),
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
                distance=args.distance,
                whitening=args.whitening,
                part_size=args.part_size,
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
