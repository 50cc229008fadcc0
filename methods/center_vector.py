"""Center vector: make two views agree, and keep the mean of all embeddings, their center, short.

    loss = 1/2 [ -mean_i <z1_i, z2_i> + center_weight * ||s||^2 ]                    (after Eq. 32)
    s = mean of all 2n embeddings, the center vector

z1_i and z2_i are the embeddings of image i's two views, scaled to length 1. The log shows the first
term as `invariance` and the penalty, without its weight, as `center`.

What prevents collapse: the second term. If all embeddings are equal, ||s|| is 1, which is its
maximum. `--center-weight 0` removes it. Where the views agree, the loss at weight 1 is
-1/2 (1 - ||s||^2). So one point is worst, and every set of embeddings with mean 0 is best, even two
opposite points. Therefore the method may live with few dimensions.

cplearn.py has this loss as its first order: if its assignments are soft, its prior sees nothing of
the embeddings but their mean. What it does beyond, with sharper ones, is to spread them.

In the log: collapse is `center` near 1. In a good run `invariance` falls to near -1 while `center`
stays near 0.

"The Common Stability Mechanism behind most Self-Supervised Learning Approaches", Jha et al., 2024.
Departs from the paper: the penalty is ||s||^2 (or ||s||, with `--penalty norm`), where Eq. 32 adds
the vector s itself. Where the paper has the squared distance, 2 - 2 cosine, minus the cosine
stands here (Eq. 4), so weight 1 here is weight 2 there.
Run: python methods/center_vector.py
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
DEFAULTS = {"shapes": {"epochs": 30}}


def add_flags(parser):
    # Our choice: the paper names no settings for images.
    parser.set_defaults(optimizer="adam", lr=1e-3, weight_decay=1e-6)
    parser.add_argument(
        "--center-weight",
        type=common.bounded_float(0),
        default=1.0,
        help="weight of the center vector's penalty; 0: collapse",
    )
    parser.add_argument(
        "--penalty",
        choices=["squared", "norm"],
        default="squared",
        help="squared: ||s||^2; norm: ||s||",
    )


# --- the method


def loss_fn(z1, z2, *, center_weight=1.0, penalty="squared"):
    """After Eq. 32, of two views' embeddings (n, d), float32: `loss`, `invariance`, `center`."""
    z1 = nn.functional.normalize(z1, dim=1)
    z2 = nn.functional.normalize(z2, dim=1)
    invariance = -(z1 * z2).sum(1).mean()
    s = torch.cat([z1, z2]).mean(0)
    if penalty == "squared":
        center = s.square().sum()
    else:
        center = s.norm()
    loss = (invariance + center_weight * center) / 2
    return {"loss": loss, "invariance": invariance, "center": center}


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
            terms = loss_fn(z1, z2, center_weight=args.center_weight, penalty=args.penalty)

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
