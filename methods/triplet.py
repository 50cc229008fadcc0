"""Triplet: an image's other view must be closer than any other image, by a margin.

    loss = mean_{a,n} ½ max(0, ||z_a - z_p||² - ||z_a - z_n||² + margin)                                        (Eq. 5)
         = mean_{a,n} max(0, ⟨z_a, z_n⟩ - ⟨z_a, z_p⟩ + margin / 2)

z are the embeddings of two views of each image, scaled to length 1, so both forms are equal. Each is the anchor z_a in
turn. z_p is the other view of its image, z_n each view of each other image. From margin 4 on nothing is cut (Eq. 6).

What prevents collapse: the negatives z_n. Equal embeddings cost margin / 2. `--negatives none` removes them. `hardest`
leaves each anchor its closest negative, as in SimCLR at a temperature near 0 (Eq. 13).

"The Common Stability Mechanism behind most Self-Supervised Learning Approaches", Jha et al., 2024.
Departs from the paper: it names no settings for images, so these are ours. Run: python methods/triplet.py
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
    parser.add_argument("--margin", type=common.bounded_float(0), default=1.0, help="squared distance, which is at most 4")
    parser.add_argument("--negatives", choices=["all", "hardest", "none"], default="all", help="which each anchor has")


# --- the method


def loss_fn(z1, z2, *, margin=1.0, negatives="all"):
    """Eq. 5 of two views' embeddings (n, d), float32: `loss`, mean cosines `positive`, `negative`."""
    n, z = len(z1), nn.functional.normalize(torch.cat([z1, z2]), dim=1)
    similarity = z @ z.T  # (2n, 2n), a row for each anchor; rows i and i + n are two views of image i
    positive = torch.cat([similarity.diagonal(n), similarity.diagonal(-n)])[:, None]  # (2n, 1)
    rows = torch.arange(2 * n, device=z.device)
    others = (rows[:, None] + torch.cat([rows[1:n], rows[n + 1 :]])) % (2 * n)  # (2n, 2n - 2): all rows but i and i ± n
    negative = similarity.gather(1, others)
    if negatives == "hardest":
        negative = negative.amax(1, keepdim=True)
    if negatives == "none":
        negative = torch.ones_like(positive)  # a constant: only attraction is left
    loss = (negative - positive + margin / 2).relu().mean()
    return {"loss": loss, "positive": positive.mean(), "negative": negative.mean()}


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
            terms = loss_fn(z1, z2, margin=args.margin, negatives=args.negatives)
            optimizer.zero_grad()
            terms["loss"].backward()
            common.sum_gradients(model)  # each process has the gradient of its own rows only
            optimizer.step()
            run.end_step(terms)
        run.end_epoch(epoch, common.collapse_metrics(model, data))  # embeddings' center_norm near 1, low rank: collapse
    run.finish()


if __name__ == "__main__":
    main()
