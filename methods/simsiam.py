"""SimSiam: predict one view's projection from the other view; the target gets no gradient.

    loss = -1/2 mean over images of [ cos(p1, stop(z2)) + cos(p2, stop(z1)) ]         (Eqs. 1 and 4)

z1 and z2 are the projections of an image's two views. p1 and p2 are predictor(z1) and
predictor(z2). stop(z) is z as a constant, without gradient.

What prevents collapse: the predictor together with the stop-gradient. Collapse also has the lowest
loss, -1. If one of the two is removed, embeddings fall into few dimensions or one point.
`--no-predictor` and `--no-stop-gradient` remove them.

In the log: a loss near -1 says nothing, because collapse has it, too. A good run has a small
center_norm and keeps many dimensions (effective_rank).

"Exploring Simple Siamese Representation Learning", Chen and He, CVPR 2021.
Departs from the paper: a warm-up, batches of 128, and the predictor's learning rate falls like that
of the rest.
Run: python methods/simsiam.py
"""

import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common

# What each of the two views changes in common.AUGMENT["strong"].
BOTH = {"scale": (0.2, 1), "jitter": (0.4, 0.4, 0.4, 0.1), "blur": 0.5}
VIEWS = (BOTH, BOTH)
# This method's own defaults for each data set.
DEFAULTS = {"shapes": {"batch_size": 64}}


def add_flags(parser):
    # The settings of lightly's CIFAR-10 benchmark.
    parser.set_defaults(optimizer="sgd", lr=0.06, weight_decay=5e-4, batch_size=128)
    parser.add_argument(
        "--no-predictor",
        action="store_true",
        help="p = z: compare the projections themselves; collapses",
    )
    parser.add_argument(
        "--no-stop-gradient",
        action="store_true",
        help="let the gradient into the target, too; collapses",
    )


# --- the method


def loss_fn(p1, p2, z1, z2, *, stop_gradient=True):
    """Eq. 4 of predictions p and projections z (n, d), float32: `loss`, `loss12` and `loss21`."""
    if stop_gradient:
        z1 = z1.detach()
        z2 = z2.detach()
    loss12 = -nn.functional.cosine_similarity(p1, z2).mean()
    loss21 = -nn.functional.cosine_similarity(p2, z1).mean()
    loss = (loss12 + loss21) / 2
    return {"loss": loss, "loss12": loss12, "loss21": loss21}


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
            nn.BatchNorm1d(d, affine=False),  # no scale, no shift
        )
        if args.no_predictor:
            self.predictor = nn.Identity()
        else:
            self.predictor = nn.Sequential(
                nn.Linear(d, d // 4),
                nn.BatchNorm1d(d // 4),
                nn.ReLU(),
                nn.Linear(d // 4, d),
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
                p1, p2 = model.predictor(z1), model.predictor(z2)

            # The loss is computed over the rows of all processes, in float32.
            p1, p2 = common.gather(p1.float(), p2.float())
            z1, z2 = common.gather(z1.float(), z2.float())
            terms = loss_fn(p1, p2, z1, z2, stop_gradient=not args.no_stop_gradient)

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
