"""BYOL: predict what a slowly moving average of the network, the teacher, makes of the other view.

    loss = mean over images of [2 - 2 cos(p1, t2)] + [2 - 2 cos(p2, t1)]                                        (Eq. 2)
    teacher <- m teacher + (1 - m) student  after each step;  m rises from `--momentum` to 1 along a half cosine

p1, p2: a predictor's outputs for the student's projections of an image's two views. t1, t2: the teacher's projections
(no gradient). One point has loss 0, too.

What prevents collapse: predictor and slow teacher. `--no-predictor --momentum 0` removes both (m then rises from 0).

"Bootstrap Your Own Latent: A New Approach to Self-Supervised Learning", Grill et al., NeurIPS 2020.
Departs from the paper: SGD, batches of 128, narrower layers. Run: python methods/byol.py
"""

import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common

# VIEWS: for each view, changes to common.AUGMENT["strong"]. DEFAULTS: a data set's own defaults.
VIEWS = ({"blur": 1.0}, {"blur": 0.1, "solarize": 0.2})
DEFAULTS = {name: {"optimizer": "adam", "lr": 3e-3, "weight_decay": 1e-6} for name in (*common.TOYS, "shapes")}
DEFAULTS["shapes"] |= {"momentum": 0.95, "last_layer": "batchnorm"}


def add_flags(parser):
    parser.set_defaults(optimizer="sgd", lr=0.015, weight_decay=2e-3, batch_size=128)  # lightly's, for 4 × its loss
    parser.add_argument("--momentum", type=common.bounded_float(0, 1), default=0.99, help="m at the start")
    parser.add_argument("--last-layer", choices=["linear", "batchnorm"], default="linear", help="of the projector")
    parser.add_argument("--no-predictor", action="store_true", help="compare the projection itself with the teacher's")


# --- the method


def loss_fn(p1, p2, t1, t2):
    """Eq. 2 of predictions p and teacher projections t (n, d), as scalars `loss`, `loss12` and `loss21`."""
    loss12 = 2 - 2 * nn.functional.cosine_similarity(p1, t2.detach()).mean()
    loss21 = 2 - 2 * nn.functional.cosine_similarity(p2, t1.detach()).mean()
    return {"loss": loss12 + loss21, "loss12": loss12, "loss21": loss21}


class Model(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.backbone = common.build_backbone(args)
        d = args.projector_dim  # width of the head
        self.head = nn.Sequential(
            nn.Linear(self.backbone.num_features, d), nn.BatchNorm1d(d), nn.ReLU(),
            nn.Linear(d, 256, bias=False), nn.BatchNorm1d(256) if args.last_layer == "batchnorm" else nn.Identity(),
        )  # fmt: skip
        self.teacher = common.frozen_copy(self)  # of backbone and head; no gradient; batch norm uses the batch
        self.predictor = nn.Sequential(nn.Linear(256, d), nn.BatchNorm1d(d), nn.ReLU(), nn.Linear(d, 256, bias=False))
        if args.no_predictor:
            self.predictor = nn.Identity()

    def forward(self, x):
        return self.head(self.backbone(x))

    def update_teacher(self, m):
        for name, weight in self.teacher.named_parameters():
            weight.lerp_(self.get_parameter(name).detach(), 1 - m)  # m weight + (1 - m) the student's


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
                t1, t2 = model.teacher(x1), model.teacher(x2)
            p1, p2, t1, t2 = common.gather(p1.float(), p2.float(), t1.float(), t2.float())  # float32; all processes' rows
            terms = loss_fn(p1, p2, t1, t2)
            optimizer.zero_grad()
            terms["loss"].backward()
            common.sum_gradients(model)  # each process has the gradient of its own rows only
            optimizer.step()
            model.update_teacher(m=run.cosine(args.momentum, 1))  # m rises to 1 along a half cosine
            run.end_step(terms)
        run.end_epoch(epoch, common.collapse_metrics(model, data))  # embeddings' center_norm near 1, low rank: collapse
    run.finish()


if __name__ == "__main__":
    main()
