"""DINO: the student predicts the teacher's sharpened and centered distribution over prototypes for the other view.

    student p = softmax(s / 0.1),  teacher q = softmax((t - center) / teacher_temperature)
    loss = ½ mean_i [ H(q1_i, p2_i) + H(q2_i, p1_i) ],  H(q, p) = -Σ_j q_j log p_j = H(q, q) + KL(q||p)         (Eq. 3)
    after each step: center <- 0.9 center + 0.1 mean t (Eq. 4),  teacher <- m teacher + (1 - m) student,  m rises to 1

s, t (n, k): cosines of one view's embeddings with k prototypes, of student and teacher; 1, 2: the views of image i.
mean t is over the images of both views. H(q, q) is the teacher's entropy, `entropy` in the log, and `divergence` is KL.

What prevents collapse: centering stops one prototype from winning everywhere, sharpening (0.04 < 0.1) stops uniform q.
In collapse `entropy` is 0 (`--no-centering`) or log k (`--teacher-temperature 1`). In a good run it is between.

"Emerging Properties in Self-Supervised Vision Transformers", Caron et al., ICCV 2021.
Departs from the paper: SGD, batches of 128, small head with batch norm, 2048 prototypes, m from 0.99, constant
temperature and weight decay, no small crops, clipping or frozen layer, student evaluated. Run: python methods/dino.py
"""

import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common

# VIEWS: for each view, changes to common.AUGMENT["strong"]. DEFAULTS: a data set's own defaults.
VIEWS = ({"scale": (0.4, 1), "blur": 1.0}, {"scale": (0.4, 1), "blur": 0.1, "solarize": 0.2})
DEFAULTS = {name: {"prototypes": 64, "teacher_temperature": 0.02} for name in (*common.TOYS, "shapes")}


def add_flags(parser):
    parser.set_defaults(optimizer="sgd", lr=0.06, weight_decay=5e-4, batch_size=128)  # lightly's CIFAR-10 benchmark
    parser.add_argument("--prototypes", type=common.bounded_int(2), default=2048, help="number of prototypes")
    parser.add_argument("--momentum", type=common.bounded_float(0, 1), default=0.99, help="m at the start")
    parser.add_argument("--teacher-temperature", type=common.bounded_float(0.001), default=0.04, help="the student's is 0.1")
    parser.add_argument("--no-centering", action="store_true", help="do not subtract the center")


# --- the method


def loss_fn(s1, s2, t1, t2, center, *, teacher_temperature=0.04, temperature=0.1):
    """Eq. 3 of cosines (n, k): scalars `loss`, `entropy`, `divergence`. The caller updates the center (k,), Eq. 4."""
    log_q1, log_q2 = [((t.detach() - center) / teacher_temperature).log_softmax(1) for t in (t1, t2)]
    log_p1, log_p2 = (s1 / temperature).log_softmax(1), (s2 / temperature).log_softmax(1)
    loss = -((log_q1.exp() * log_p2).sum(1) + (log_q2.exp() * log_p1).sum(1)).mean() / 2
    entropy = -((log_q1.exp() * log_q1).sum(1) + (log_q2.exp() * log_q2).sum(1)).mean() / 2
    return {"loss": loss, "entropy": entropy, "divergence": loss.detach() - entropy}


class Model(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.backbone = common.build_backbone(args)
        d = args.projector_dim  # width of the head
        self.head = nn.Sequential(
            nn.Linear(self.backbone.num_features, d), nn.BatchNorm1d(d), nn.GELU(),
            nn.Linear(d, 256),
        )  # fmt: skip
        self.temperature = 0.1  # the student's, as in loss_fn; common.collapse_metrics reads it
        self.prototypes = nn.Linear(256, args.prototypes, bias=False)
        self.teacher = common.frozen_copy(self)  # of the modules above; no gradient; batch norm uses the batch
        self.register_buffer("center", torch.zeros(args.prototypes))

    def forward(self, x):
        return self.head(self.backbone(x))

    def scores(self, z):
        return nn.functional.normalize(z.float(), dim=1) @ nn.functional.normalize(self.prototypes.weight, dim=1).T

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
                y1, y2 = model.teacher(x1), model.teacher(x2)
            s1, s2 = common.gather(model.scores(z1), model.scores(z2))  # float32; all processes' rows
            t1, t2 = common.gather(model.teacher.scores(y1), model.teacher.scores(y2))
            terms = loss_fn(s1, s2, t1, t2, model.center, teacher_temperature=args.teacher_temperature)
            optimizer.zero_grad()
            terms["loss"].backward()
            common.sum_gradients(model)  # each process has the gradient of its own rows only
            optimizer.step()
            model.update_teacher(m=run.cosine(args.momentum, 1))  # m rises to 1 along a half cosine
            model.center.lerp_(torch.cat([t1, t2]).mean(0), 0.0 if args.no_centering else 0.1)  # Eq. 4
            run.end_step(terms)
        run.end_epoch(epoch, common.collapse_metrics(model, data))  # embeddings' center_norm near 1, low rank: collapse
    run.finish()


if __name__ == "__main__":
    main()
