"""SimCLR: find each image's other view among all other views of the batch.

    loss = -mean_i log( exp(sim(z_i, z_j(i)) / temperature)
                        / sum_{k != i} exp(sim(z_i, z_k) / temperature) )                   (Eq. 1)

z_i are the embeddings of the 2n views of n images. j(i) is the other view of the image that view i
shows. sim is the cosine. The loss is the sum of two terms, which the log shows: `alignment`, the
numerator's part, and `uniformity`, the denominator's.

What prevents collapse: the denominator. It grows when z_i comes close to the views of other images,
so all images push each other apart. `--no-negatives` leaves it out.

In the log: if all z are equal, the loss is log(2n - 1), which is 6.93 for batches of 512, and
center_norm is 1. A good run goes well below that loss, and its center_norm stays small.

"A Simple Framework for Contrastive Learning of Visual Representations", Chen et al., ICML 2020.
Departs from the paper: Adam and batches of 512 instead of LARS and 4096. The loss is half of what
the authors' code computes.
Run: python methods/simclr.py
"""

import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common

# What each of the two views changes in common.AUGMENT["strong"].
BOTH = {"jitter": (0.4, 0.4, 0.4, 0.1), "blur": 0.5}
VIEWS = (BOTH, BOTH)
# This method's own defaults for each data set.
DEFAULTS = {}


def add_flags(parser):
    # As in the code of W-MSE, for SimCLR on CIFAR-10.
    parser.set_defaults(optimizer="adam", lr=3e-3, weight_decay=1e-6, batch_size=512)
    parser.add_argument(
        "--temperature",
        type=common.bounded_float(0.001),
        default=0.5,
        help="lower: near images are pushed harder; 0.5 is the paper's best for CIFAR-10",
    )
    parser.add_argument(
        "--no-negatives",
        action="store_true",
        help="leave out the denominator, which pushes other images away; collapses",
    )


# --- the method


def loss_fn(z1, z2, *, temperature=0.5, negatives=True):
    """Eq. 1 of two views' embeddings (n, d), float32: scalars `loss`, `alignment`, `uniformity`."""
    n = len(z1)
    z = nn.functional.normalize(torch.cat([z1, z2]), dim=1)
    similarity = z @ z.T / temperature  # (2n, 2n); rows i and i + n are the views of image i
    # One of the two diagonals of pairs is enough, because sim(z_i, z_j) = sim(z_j, z_i).
    alignment = -similarity.diagonal(n).mean()
    if negatives:
        similarity.fill_diagonal_(-torch.inf)  # exp(-inf) = 0 leaves out k = i
        uniformity = similarity.logsumexp(1).mean()
    else:
        uniformity = torch.zeros_like(alignment)
    loss = alignment + uniformity
    return {"loss": loss, "alignment": alignment, "uniformity": uniformity}


class Model(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.backbone = common.build_backbone(args)
        d = args.projector_dim  # width of the head
        self.head = nn.Sequential(
            nn.Linear(self.backbone.num_features, d, bias=False),
            nn.BatchNorm1d(d),
            nn.ReLU(),
            nn.Linear(d, 128, bias=False),
            nn.BatchNorm1d(128),
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
            terms = loss_fn(z1, z2, temperature=args.temperature, negatives=not args.no_negatives)

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
