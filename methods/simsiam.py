"""SimSiam: predict one view's projection from the other view; the target gets no gradient.

    loss = -½ [ cos(p1, stop(z2)) + cos(p2, stop(z1)) ],  mean over the images                           (Eqs. 1 and 4)

z1, z2: the projections of an image's two views. p1, p2: predictor(z1), predictor(z2). stop(z): z as a constant.

What prevents collapse: predictor and stop-gradient together. If one is removed, all z fall into few dimensions or one
point. `--no-predictor` and `--no-stop-gradient` remove them. Collapse, too, has a loss near -1.

"Exploring Simple Siamese Representation Learning", Chen and He, CVPR 2021.
Departs from the paper: warm-up, batches of 128, the predictor's learning rate decays. Run: python methods/simsiam.py
"""

import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common

# VIEWS: for each view, changes to common.AUGMENT["strong"]. DEFAULTS: a data set's own defaults.
VIEWS = ({"scale": (0.2, 1), "jitter": (0.4, 0.4, 0.4, 0.1), "blur": 0.5},) * 2
DEFAULTS = {"shapes": {"batch_size": 64}}


def add_flags(parser):
    parser.set_defaults(optimizer="sgd", lr=0.06, weight_decay=5e-4, batch_size=128)  # lightly's CIFAR-10 benchmark
    parser.add_argument("--no-predictor", action="store_true", help="p = z: compare z1 with z2; collapses")
    parser.add_argument("--no-stop-gradient", action="store_true", help="let the gradient into the target; collapses")


# --- the method


def loss_fn(p1, p2, z1, z2, *, stop_gradient=True):
    """Eq. 4 of two views' predictions p and projections z (n, d), as scalars `loss`, `loss12` and `loss21`."""
    t1, t2 = (z1.detach(), z2.detach()) if stop_gradient else (z1, z2)
    loss12 = -nn.functional.cosine_similarity(p1, t2).mean()
    loss21 = -nn.functional.cosine_similarity(p2, t1).mean()
    return {"loss": (loss12 + loss21) / 2, "loss12": loss12, "loss21": loss21}


class Model(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.backbone = common.build_backbone(args)
        d = args.projector_dim  # width of the head
        self.head = nn.Sequential(
            nn.Linear(self.backbone.num_features, d, bias=False), nn.BatchNorm1d(d), nn.ReLU(),
            nn.Linear(d, d, bias=False), nn.BatchNorm1d(d, affine=False),  # no scale, no shift
        )  # fmt: skip
        self.predictor = nn.Sequential(nn.Linear(d, d // 4), nn.BatchNorm1d(d // 4), nn.ReLU(), nn.Linear(d // 4, d))
        if args.no_predictor:
            self.predictor = nn.Identity()

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
                p1, p2 = model.predictor(z1), model.predictor(z2)
            p1, p2, z1, z2 = common.gather(p1.float(), p2.float(), z1.float(), z2.float())  # float32; all processes' rows
            terms = loss_fn(p1, p2, z1, z2, stop_gradient=not args.no_stop_gradient)
            optimizer.zero_grad()
            terms["loss"].backward()
            common.sum_gradients(model)  # each process has the gradient of its own rows only
            optimizer.step()
            run.end_step(terms)
        run.end_epoch(epoch, common.collapse_metrics(model, data))  # embeddings' center_norm near 1, low rank: collapse
    run.finish()


if __name__ == "__main__":
    main()
