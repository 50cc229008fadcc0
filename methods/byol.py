"""BYOL: predict what a slowly moving average of the network, the teacher, makes of the other view.

    loss = mean over images of [2 - 2 cos(p1, t2)] + [2 - 2 cos(p2, t1)]                    (Eq. 2)
    after each step: teacher <- m teacher + (1 - m) student

p1 and p2 are a predictor's outputs for the student's projections of the two views of an image. t1
and t2 are the teacher's projections. They get no gradient. m rises from `--momentum` to 1 along a
half cosine.

What prevents collapse: the predictor together with the slow teacher. One point for all images has
loss 0, too, so the loss alone does not forbid it. `--no-predictor --momentum 0` removes both (m
then rises from 0).

In the log: the loss is between 0 and 8, and falls in good and in bad runs. So it does not show
collapse. A center_norm near 1 does.

"Bootstrap Your Own Latent: A New Approach to Self-Supervised Learning", Grill et al., NeurIPS 2020.
Departs from the paper: SGD, batches of 128, and narrower layers.
Run: python methods/byol.py
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
DEFAULTS = {
    "shapes": {
        "optimizer": "adam",
        "lr": 3e-3,
        "weight_decay": 1e-6,
        "momentum": 0.95,
        "last_layer": "batchnorm",
    },
    "blobs": {"optimizer": "adam", "lr": 3e-3, "weight_decay": 1e-6},
    "moons": {"optimizer": "adam", "lr": 3e-3, "weight_decay": 1e-6},
}


def add_flags(parser):
    # The settings of lightly's CIFAR-10 benchmark. This loss is four times the one there. So the
    # learning rate is a quarter of its 0.06, and the decay four times its 5e-4.
    parser.set_defaults(optimizer="sgd", lr=0.015, weight_decay=2e-3, batch_size=128)
    parser.add_argument(
        "--momentum",
        type=common.bounded_float(0, 1),
        default=0.99,
        help="m at the start; the shorter the run, the lower it should be",
    )
    parser.add_argument(
        "--last-layer",
        choices=["linear", "batchnorm"],
        default="linear",
        help="what the projector ends with",
    )
    parser.add_argument(
        "--no-predictor",
        action="store_true",
        help="compare the projection itself with the teacher's; with --momentum 0 it collapses",
    )


# --- the method


def loss_fn(p1, p2, t1, t2):
    """Eq. 2 of predictions p and teacher's projections t (n, d): `loss`, `loss12`, `loss21`."""
    loss12 = 2 - 2 * nn.functional.cosine_similarity(p1, t2.detach()).mean()
    loss21 = 2 - 2 * nn.functional.cosine_similarity(p2, t1.detach()).mean()
    loss = loss12 + loss21
    return {"loss": loss, "loss12": loss12, "loss21": loss21}


class Model(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.backbone = common.build_backbone(args)
        d = args.projector_dim  # width of the head
        self.head = nn.Sequential(
            nn.Linear(self.backbone.num_features, d),
            nn.BatchNorm1d(d),
            nn.ReLU(),
            nn.Linear(d, 256, bias=False),
        )
        if args.last_layer == "batchnorm":
            self.head.append(nn.BatchNorm1d(256))

        # The teacher gets no gradient. Its batch norms use the batch, as the student's do.
        self.teacher = common.frozen_copy(nn.Sequential(self.backbone, self.head))

        if args.no_predictor:
            self.predictor = nn.Identity()
        else:
            self.predictor = nn.Sequential(
                nn.Linear(256, d),
                nn.BatchNorm1d(d),
                nn.ReLU(),
                nn.Linear(d, 256, bias=False),
            )

    def forward(self, x):
        return self.head(self.backbone(x))

    def update_teacher(self, m):
        """teacher <- m teacher + (1 - m) student, for each parameter."""
        student = nn.Sequential(self.backbone, self.head)
        for t, s in zip(self.teacher.parameters(), student.parameters(), strict=True):
            t.lerp_(s.detach(), 1 - m)  # t = m t + (1 - m) s


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
                t1, t2 = model.teacher(x1), model.teacher(x2)

            # The loss is computed over the rows of all processes, in float32.
            p1, p2 = common.gather(p1.float(), p2.float())
            t1, t2 = common.gather(t1.float(), t2.float())
            terms = loss_fn(p1, p2, t1, t2)

            optimizer.zero_grad()
            terms["loss"].backward()
            common.sum_gradients(model)  # each process has the gradient of its own rows only
            optimizer.step()
            model.update_teacher(m=run.cosine(args.momentum, 1))
            run.end_step(terms)  # counts the step, on which run.lr() depends
        # Collapse shows as a center_norm near 1 or as a low effective_rank of the embeddings.
        run.end_epoch(epoch, common.collapse_metrics(model, data))
    run.finish()


if __name__ == "__main__":
    main()
