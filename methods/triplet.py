"""Triplet: an image's other view must be closer than any other image, by a margin.

    loss = mean over anchors a and negatives n of
           1/2 max(0, ||z_a - z_p||^2 - ||z_a - z_n||^2 + margin)                           (Eq. 5)
         = max(0, <z_a, z_n> - <z_a, z_p> + margin / 2)

z are the embeddings of two views of each image, scaled to length 1, so both forms are equal. Each
of them is the anchor z_a in turn. z_p is the other view of the anchor's image. z_n is each view of
each other image. From margin 4 on the maximum is never 0 (Eq. 6).

What prevents collapse: the negatives z_n. Equal embeddings cost margin / 2. `--negatives none`
removes them. With `--negatives hardest` each anchor has its closest negative only. This is what
SimCLR becomes as its temperature goes to 0 (Eq. 13).

In the log: `positive` and `negative` are mean cosines, `negative` over the negatives in use. In a
good run `positive` rises to near 1, and `negative` of all negatives stays near 0. In collapse both
are 1.

"The Common Stability Mechanism behind most Self-Supervised Learning Approaches", Jha et al., 2024.
Departs from the paper: it names no settings for images, so these are ours.
Run: python methods/triplet.py
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
    # Our choice: the paper names no settings for images.
    parser.set_defaults(optimizer="adam", lr=1e-3, weight_decay=1e-6)
    parser.add_argument(
        "--margin",
        type=common.bounded_float(0),
        default=1.0,
        help="by how much the squared distance to a negative must be larger; distances are at "
        "most 4",
    )
    parser.add_argument(
        "--negatives",
        choices=["all", "hardest", "none"],
        default="all",
        help="which negatives each anchor has; none: collapse",
    )


# --- the method


def loss_fn(z1, z2, *, margin=1.0, negatives="all"):
    """Eq. 5 of two views' embeddings (n, d), float32.

    Returns scalars: `loss` and the mean cosines `positive` and `negative`.
    """
    n = len(z1)
    z = nn.functional.normalize(torch.cat([z1, z2]), dim=1)
    similarity = z @ z.T  # (2n, 2n), a row for each anchor; rows i and i + n are views of image i
    positive = torch.cat([similarity.diagonal(n), similarity.diagonal(-n)])  # (2n,)

    image = torch.arange(n, device=z.device).repeat(2)  # which image a row or column shows
    other_image = image[:, None] != image  # (2n, 2n)
    if negatives == "all":
        hinge = (similarity - positive[:, None] + margin / 2).relu()
        count = 2 * n * (2 * n - 2)
        loss = (hinge * other_image).sum() / count
        negative = (similarity * other_image).sum() / count
    elif negatives == "hardest":
        closest = similarity.masked_fill(~other_image, -torch.inf).amax(1)
        loss = (closest - positive + margin / 2).relu().mean()
        negative = closest.mean()
    else:
        loss = (1 - positive + margin / 2).relu().mean()  # only attraction is left
        negative = torch.ones_like(loss)
    return {"loss": loss, "positive": positive.mean(), "negative": negative}


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
            terms = loss_fn(z1, z2, margin=args.margin, negatives=args.negatives)

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
