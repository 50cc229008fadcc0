"""Center vector: make two views agree and keep the mean of all embeddings, the center vector, short.

    loss = ½ [ -mean_i ⟨z1_i, z2_i⟩ + center_weight ||s||² ],  s = mean of all 2n embeddings             (after Eq. 32)

z1_i, z2_i: embeddings of image i's two views, scaled to length 1. Terms: `invariance` (the first), `center` (||s||²).

What prevents collapse: if all embeddings are equal, ||s|| is 1, its maximum. With views that agree, weight 1 makes the
loss -½ (1 - ||s||²). One point is worst, any mean 0 best, even two opposite points. `--center-weight 0` removes this.

"The Common Stability Mechanism behind most Self-Supervised Learning Approaches", Jha et al., 2024.
Departs from the paper: ||s||² (or ||s||, `--penalty norm`), where Eq. 32 adds the vector s. Its squared distance,
2 - 2 cosine, is the cosine here (Eq. 4), so weight 1 here is weight 2 there. Run: python methods/center_vector.py
"""

import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common

# VIEWS: for each view, changes to common.AUGMENT["strong"]. DEFAULTS: a data set's own defaults.
VIEWS = ({"blur": 1.0}, {"blur": 0.1, "solarize": 0.2})
DEFAULTS = {"shapes": {"epochs": 30}}


def add_flags(parser):
    parser.set_defaults(optimizer="adam", lr=1e-3, weight_decay=1e-6)  # our choice
    parser.add_argument("--center-weight", type=common.bounded_float(0), default=1.0, help="weight of center; 0: collapse")
    parser.add_argument("--penalty", choices=["squared", "norm"], default="squared", help="||s||² or ||s||")


# --- the method


def loss_fn(z1, z2, *, center_weight=1.0, penalty="squared"):
    """After Eq. 32, of two views' embeddings (n, d), float32: `loss`, `invariance` (minus cosine) and `center`."""
    z1, z2 = (nn.functional.normalize(z, dim=1) for z in (z1, z2))
    invariance = -(z1 * z2).sum(1).mean()
    mean = torch.cat([z1, z2]).mean(0)
    center = mean.square().sum() if penalty == "squared" else mean.norm()
    return {"loss": (invariance + center_weight * center) / 2, "invariance": invariance, "center": center}


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
            terms = loss_fn(z1, z2, center_weight=args.center_weight, penalty=args.penalty)
            optimizer.zero_grad()
            terms["loss"].backward()
            common.sum_gradients(model)  # each process has the gradient of its own rows only
            optimizer.step()
            run.end_step(terms)
        run.end_epoch(epoch, common.collapse_metrics(model, data))  # embeddings' center_norm near 1, low rank: collapse
    run.finish()


if __name__ == "__main__":
    main()
