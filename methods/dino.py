"""DINO: predict a teacher's sharpened and centered distribution over prototypes for the other view.

    loss = ½ [ H(q1, p2) + H(q2, p1) ],  mean over the images,  H(q, p) = -Σ_k q_k log p_k                      (Eq. 3)
    p = softmax(s / 0.1),  q = softmax((t - center) / teacher_temperature)
    center <- 0.9 center + 0.1 mean t,  teacher <- m teacher + (1 - m) student  after each step                 (Eq. 4)

s and t are the student's and the teacher's scores of view 1 or 2: cosines of its embedding with learned prototypes. m
rises from `--momentum` to 1. The loss is the teacher's `entropy` H(q, q) plus the `divergence` of p from q.

What prevents collapse: centering alone leads to the uniform q, a low teacher temperature alone to one prototype for all
images. Together they balance. `--no-centering` and `--teacher-temperature 1` remove them.

"Emerging Properties in Self-Supervised Vision Transformers", Caron et al., ICCV 2021.
Departs from the paper: two crops, 4096 prototypes (65536), Adam (AdamW), no temperature warm-up, no clipping.
Run: python methods/dino.py
"""

import math
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common

# What each view changes of --augment strong (see common.AUGMENT), and this method's flags on small data sets.
VIEWS = ({"blur": 1.0}, {"blur": 0.1, "solarize": 0.2})
SIZES = {name: {"prototypes": 32} for name in common.TOYS} | {"shapes": {"prototypes": 256}}


def add_flags(parser):
    parser.set_defaults(optimizer="adam", lr=1e-3, weight_decay=1e-4)
    parser.add_argument("--prototypes", type=common.integer(2), default=4096, help="number of the head's outputs")
    parser.add_argument("--momentum", type=common.number(0, 1), default=0.996, help="of the teacher at the start")
    parser.add_argument("--teacher-temperature", type=common.number(0.001), default=0.04, help="1: no sharpening")
    parser.add_argument("--no-centering", action="store_true", help="do not subtract the center")


# --- the method


def loss_fn(s1, s2, t1, t2, center, *, teacher_temperature=0.04, temperature=0.1):
    """Eq. 3 of student and teacher scores (n, k), center (k,): scalars `loss`, `entropy` and `divergence`."""
    log_q1, log_q2 = (((t.detach() - center) / teacher_temperature).log_softmax(1) for t in (t1, t2))
    log_p1, log_p2 = ((s / temperature).log_softmax(1) for s in (s1, s2))
    loss = -((log_q1.exp() * log_p2).sum(1) + (log_q2.exp() * log_p1).sum(1)).mean() / 2
    entropy = -((log_q1.exp() * log_q1).sum(1) + (log_q2.exp() * log_q2).sum(1)).mean() / 2
    return {"loss": loss, "entropy": entropy, "divergence": loss.detach() - entropy}


class Model(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.backbone = common.build_backbone(args)
        d = args.projector_dim
        self.head = nn.Sequential(
            nn.Linear(self.backbone.num_features, d), nn.GELU(),
            nn.Linear(d, d), nn.GELU(),
            nn.Linear(d, 256),
        )  # fmt: skip
        self.prototypes = nn.Linear(256, args.prototypes, bias=False)
        self.teacher = common.frozen_copy(self)
        self.register_buffer("center", torch.zeros(args.prototypes))

    def forward(self, x):
        return self.head(self.backbone(x))

    def scores(self, z):
        return nn.functional.normalize(z.float(), dim=1) @ nn.functional.normalize(self.prototypes.weight, dim=1).T

    def update_teacher(self, momentum, progress):
        for t, s in zip(self.teacher.parameters(), self.parameters(), strict=False):  # the student's come first
            t.lerp_(s.detach(), (1 - momentum) * (math.cos(math.pi * progress) + 1) / 2)


# --- training


def main():
    args = common.parse_args(__file__, __doc__, add_flags, SIZES)
    device = common.start(args)
    model = common.to_device(Model(args), device, compile=args.compile)
    data = common.load_data(args, device)
    optimizer = common.build_optimizer(model, args)
    run = common.open_run(args, model, optimizer, data)

    for epoch in run.epochs():
        for x1, x2 in common.two_views(data, args, VIEWS, epoch, run.step % run.steps_per_epoch):
            for group in optimizer.param_groups:
                group["lr"] = run.learning_rate()  # linear warm-up, then a half cosine to zero
            with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
                z1, z2 = model(x1), model(x2)  # one view at a time: batch norm must not mix the views
                y1, y2 = model.teacher(x1), model.teacher(x2)  # no gradient: its parameters are frozen
            s1, s2 = common.gather(model.scores(z1), model.scores(z2))  # the rows of all processes, float32
            t1, t2 = common.gather(model.teacher.scores(y1), model.teacher.scores(y2))
            terms = loss_fn(s1, s2, t1, t2, model.center, teacher_temperature=args.teacher_temperature)
            optimizer.zero_grad()
            terms["loss"].backward()
            common.sum_gradients(model)
            optimizer.step()
            model.update_teacher(args.momentum, run.step / run.total_steps)
            model.center.lerp_(torch.cat([t1, t2]).mean(0), 0.0 if args.no_centering else 0.1)
            run.step += 1
            run.end_step(terms)
        run.end_epoch(epoch, common.collapse_metrics(model, data))
    run.finish()


if __name__ == "__main__":
    main()
