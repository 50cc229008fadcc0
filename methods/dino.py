"""DINO: the student predicts the teacher's distribution over prototypes for the other view.

    student  p = softmax(s / 0.1)
    teacher  q = softmax((t - center) / teacher_temperature)
    loss = 1/2 mean_i [ H(q1_i, p2_i) + H(q2_i, p1_i) ],  H(q, p) = -sum_j q_j log p_j      (Eq. 3)
    after each step: center <- 0.9 center + 0.1 mean t                                      (Eq. 4)
                     teacher <- m teacher + (1 - m) student

s and t (n, k) are the cosines of n embeddings with k learned prototypes, of the student and of the
teacher. The subscripts 1 and 2 are the two views of image i. mean t is over the images of both
views. m rises from `--momentum` to 1 along a half cosine. H(q, p) is the teacher's entropy H(q, q),
`entropy` in the log, plus KL(q || p), `divergence` in the log.

What prevents collapse: centering and sharpening, against each other. Subtracting the center stops
one prototype from winning for every image; without it (`--no-centering`) `entropy` goes to 0. The
teacher's low temperature (0.04, where the student has 0.1) stops q from becoming uniform; without
it (`--teacher-temperature 1`) `entropy` goes to log k.

In the log: in a good run `entropy` stays between 0 and log k, which is 7.62 for 2048 prototypes.

"Emerging Properties in Self-Supervised Vision Transformers", Caron et al., ICCV 2021.
Departs from the paper: SGD, batches of 128, a small head with batch norm, 2048 prototypes, m from
0.99. Teacher temperature and weight decay are constant. There are no small crops, no clipping of
gradients and no frozen layer. The student is evaluated, not the teacher.
Run: python methods/dino.py
"""

import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common

# What each of the two views changes in common.AUGMENT["strong"].
VIEWS = (
    {"scale": (0.4, 1), "blur": 1.0},
    {"scale": (0.4, 1), "blur": 0.1, "solarize": 0.2},
)
# This method's own defaults for each data set.
DEFAULTS = {
    "shapes": {"prototypes": 64, "teacher_temperature": 0.02},
    "blobs": {"prototypes": 64, "teacher_temperature": 0.02},
    "moons": {"prototypes": 64, "teacher_temperature": 0.02},
}


def add_flags(parser):
    # The settings of lightly's CIFAR-10 benchmark.
    parser.set_defaults(optimizer="sgd", lr=0.06, weight_decay=5e-4, batch_size=128)
    parser.add_argument(
        "--prototypes", type=common.bounded_int(2), default=2048, help="number of prototypes k"
    )
    parser.add_argument(
        "--momentum",
        type=common.bounded_float(0, 1),
        default=0.99,
        help="m at the start; the shorter the run, the lower it should be",
    )
    parser.add_argument(
        "--teacher-temperature",
        type=common.bounded_float(0.001),
        default=0.04,
        help="the student's is 0.1; try a lower one if entropy stays at log k; with 1 all "
        "prototypes become alike",
    )
    parser.add_argument(
        "--no-centering",
        action="store_true",
        help="do not subtract the center; few prototypes win for all images",
    )


# --- the method


def loss_fn(s1, s2, t1, t2, center, *, teacher_temperature=0.04, temperature=0.1):
    """Eq. 3 of cosines s (student) and t (teacher), (n, k), float32, and the center (k,).

    Returns scalars `loss`, `entropy` and `divergence`. The caller updates the center, Eq. 4.
    """
    log_q1 = ((t1.detach() - center) / teacher_temperature).log_softmax(1)
    log_q2 = ((t2.detach() - center) / teacher_temperature).log_softmax(1)
    log_p1 = (s1 / temperature).log_softmax(1)
    log_p2 = (s2 / temperature).log_softmax(1)

    cross_entropy12 = -(log_q1.exp() * log_p2).sum(1)  # (n,)
    cross_entropy21 = -(log_q2.exp() * log_p1).sum(1)
    loss = (cross_entropy12 + cross_entropy21).mean() / 2

    entropy1 = -(log_q1.exp() * log_q1).sum(1)  # (n,)
    entropy2 = -(log_q2.exp() * log_q2).sum(1)
    entropy = (entropy1 + entropy2).mean() / 2
    divergence = loss.detach() - entropy
    return {"loss": loss, "entropy": entropy, "divergence": divergence}


def cosines(z, prototypes):
    """Cosines (n, k) of embeddings z (n, d) with prototypes (k, d), float32."""
    z = nn.functional.normalize(z.float(), dim=1)
    prototypes = nn.functional.normalize(prototypes, dim=1)
    return z @ prototypes.T


class Model(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.backbone = common.build_backbone(args)
        d = args.projector_dim  # width of the head
        self.head = nn.Sequential(
            nn.Linear(self.backbone.num_features, d),
            nn.BatchNorm1d(d),
            nn.GELU(),
            nn.Linear(d, 256),
        )
        self.prototypes = nn.Linear(256, args.prototypes, bias=False)  # its weight is (k, 256)
        self.temperature = 0.1  # the student's, as in loss_fn; the metrics read it, too

        # The teacher gets no gradient. Its batch norms use the batch, as the student's do.
        self.teacher = common.frozen_copy(nn.Sequential(self.backbone, self.head))
        self.teacher_prototypes = common.frozen_copy(self.prototypes)
        self.register_buffer("center", torch.zeros(args.prototypes))

    def forward(self, x):
        return self.head(self.backbone(x))

    def scores(self, z):
        return cosines(z, self.prototypes.weight)

    def teacher_scores(self, z):
        return cosines(z, self.teacher_prototypes.weight)

    def update_teacher(self, m):
        """teacher <- m teacher + (1 - m) student, for each parameter."""
        student = nn.Sequential(self.backbone, self.head, self.prototypes)
        teacher = nn.Sequential(self.teacher, self.teacher_prototypes)
        for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
            t.lerp_(s.detach(), 1 - m)  # t = m t + (1 - m) s

    def update_center(self, t1, t2):
        """Eq. 4, of the teacher's cosines t (n, k) of both views."""
        mean = torch.cat([t1, t2]).mean(0)
        self.center.lerp_(mean, 0.1)  # 0.9 center + 0.1 mean


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
                y1, y2 = model.teacher(x1), model.teacher(x2)

            # The loss is computed over the rows of all processes, in float32.
            s1, s2 = common.gather(model.scores(z1), model.scores(z2))
            t1, t2 = common.gather(model.teacher_scores(y1), model.teacher_scores(y2))
            terms = loss_fn(
                s1, s2, t1, t2, model.center, teacher_temperature=args.teacher_temperature
            )

            optimizer.zero_grad()
            terms["loss"].backward()
            common.sum_gradients(model)  # each process has the gradient of its own rows only
            optimizer.step()
            model.update_teacher(m=run.cosine(args.momentum, 1))
            if not args.no_centering:
                model.update_center(t1, t2)
            run.end_step(terms)  # counts the step, on which run.lr() depends
        # Collapse shows as a center_norm near 1 or as a low effective_rank of the embeddings.
        run.end_epoch(epoch, common.collapse_metrics(model, data))
    run.finish()


if __name__ == "__main__":
    main()
