"""DINO: match the sharpened, centered code distribution of a slowly moving average of the network, the teacher.

    loss = ½ [ H(q1, p2) + H(q2, p1) ],  p = softmax(s / 0.1),  q = softmax((t - center) / teacher_temperature)  (Eq. 3)
    center <- 0.9 center + 0.1 mean t;  teacher <- m teacher + (1 - m) student after each step, m from momentum to 1

What prevents collapse: two opposite pulls on q. Centering removes what all images share, alone it leads to uniform q; a
low temperature sharpens, alone it lets one code win. `--no-centering`, `--teacher-temperature 1` take one of them away.

"Emerging Properties in Self-Supervised Vision Transformers", Caron et al., ICCV 2021.
Departs from the paper: no local crops, 4096 instead of 65536 codes, Adam instead of AdamW, a constant temperature.
Run: python methods/dino.py
"""

import math
import sys
from pathlib import Path

import torch
from torch import nn
from torchvision.ops import MLP

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common

DEFAULTS = {
    "backbone": "resnet18",
    "augment": "strong",
    "epochs": 200,
    "batch_size": 256,
    "optimizer": "adam",
    "lr": 1e-3,
    "weight_decay": 1e-4,
    "projector_dim": (2048, "width of the projector", 4),
    # this method's
    "prototypes": (4096, "number of codes, the outputs of the head", 2),
    "momentum": (0.996, "of the teacher at the start; rises to 1", 0, 1),
    "teacher_temperature": (0.04, "sharpening; 1 or more takes it away", 0.001),
    "no_centering": (False, "do not subtract the center"),
}
VIEWS = ({"blur": 1.0}, {"blur": 0.1, "solarize": 0.2})  # changes to --augment strong

# --- the method


class Prototypes(nn.Linear):
    def forward(self, z):
        with torch.autocast(z.device.type, enabled=False):  # a low temperature would magnify bfloat16's rounding
            return nn.functional.normalize(z.float(), dim=1) @ nn.functional.normalize(self.weight, dim=1).T


def loss_fn(s1, s2, t1, t2, center, *, teacher_temperature=0.04, temperature=0.1):
    """Eq. 3 for student and teacher scores (n, c): scalars `loss` = teacher's `entropy` + `divergence` from it."""
    s1, s2, t1, t2 = (common.gather(x) for x in (s1, s2, t1.detach(), t2.detach()))
    log_q = ((torch.cat([t1, t2]) - center) / teacher_temperature).log_softmax(1)
    loss = -(log_q.exp() * (torch.cat([s2, s1]) / temperature).log_softmax(1)).sum(1).mean()
    entropy = -(log_q.exp() * log_q).sum(1).mean()
    return {"loss": loss, "entropy": entropy, "divergence": loss.detach() - entropy}


class Model(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.args = args
        self.backbone = common.build_backbone(args)
        self.head = MLP(self.backbone.num_features, [args.projector_dim] * 2 + [256], activation_layer=nn.GELU)
        self.prototypes = Prototypes(256, args.prototypes, bias=False)  # weight-normalised with gain 1, as cosines
        self.teacher = common.frozen_copy(self.backbone, self.head, self.prototypes)
        self.register_buffer("center", torch.zeros(args.prototypes))

    @torch.no_grad()
    def update_teacher(self, progress):
        student = nn.Sequential(self.backbone, self.head, self.prototypes)
        for t, s in zip(self.teacher.parameters(), student.parameters(), strict=True):
            t.lerp_(s, (1 - self.args.momentum) * (math.cos(math.pi * progress) + 1) / 2)
        self.center.lerp_(self.teacher_mean, 0 if self.args.no_centering else 0.1)

    def forward(self, x1, x2):
        """The arguments of loss_fn for two views of a batch, each sent through the network on its own."""
        z1, z2 = (self.head(self.backbone(x)).float() for x in (x1, x2))
        with torch.no_grad():
            t1, t2 = (self.teacher(x).float() for x in (x1, x2))
        self.teacher_mean = common.gather(torch.cat([t1, t2], 1)).mean(0).view(2, -1).mean(0)
        scores = {"s1": self.prototypes(z1), "s2": self.prototypes(z2), "t1": t1, "t2": t2}
        return scores | {"center": self.center, "teacher_temperature": self.args.teacher_temperature}

    def embed(self, x):
        """What evaluation asks for: the backbone's `features`, the `embedding`, and with codes the `scores`."""
        h = self.backbone(x)
        z = self.head(h)
        return {"features": h, "embedding": z, "scores": self.prototypes(z)}


# --- training


def main():
    args = common.parse_args(__file__, __doc__, DEFAULTS)
    device = common.start(args)
    model = common.place(Model(args), device)
    data = common.load_data(args, device)
    optimizer = common.build_optimizer(model, args)
    network = torch.compile(model) if args.compile else model
    run = common.Run(args, model, optimizer, data)

    for _ in run.epochs():
        for x1, x2 in run.batches(VIEWS):
            # Linear warm-up, then a half cosine to zero.
            progress = (run.step - run.warmup_steps) / max(1, run.total_steps - run.warmup_steps)
            cosine = (1 + math.cos(math.pi * max(0, progress))) / 2
            for group in optimizer.param_groups:
                group["lr"] = args.lr * min(cosine, (run.step + 1) / max(1, run.warmup_steps))

            with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
                inputs = network(x1, x2)
            terms = loss_fn(**inputs)

            optimizer.zero_grad()
            terms["loss"].backward()
            common.sum_gradients(model)
            optimizer.step()
            model.update_teacher(run.step / run.total_steps)
            run.record(terms)
        run.end_epoch(common.collapse_metrics(model, data))
    run.finish()


if __name__ == "__main__":
    main()
