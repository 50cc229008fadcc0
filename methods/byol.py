"""BYOL: predict what a slowly moving average of the network, the teacher, makes of the other view.

    loss = 2 - 2 cos(p1, t2) + 2 - 2 cos(p2, t1),  p = predictor(z)                                           (Eq. 2)
    teacher <- m teacher + (1 - m) student after each step,  m = 1 - (1 - momentum) (cos(π progress) + 1) / 2

What prevents collapse: a predictor that chases a teacher without gradient that changes slowly. `--momentum 0` makes
the teacher the student of the step before, `--no-predictor` compares the projections themselves.

"Bootstrap Your Own Latent: A New Approach to Self-Supervised Learning", Grill et al., NeurIPS 2020.
Departs from the paper: Adam instead of LARS. As in the authors' code only parameters are averaged, not batch norms.
Run: python methods/byol.py
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
    "momentum": (0.99, "of the teacher at the start; rises to 1. 0: the teacher is the last step's student", 0, 1),
    "no_predictor": (False, "compare the projection itself with the teacher's"),
}
VIEWS = ({"blur": 1.0}, {"blur": 0.1, "solarize": 0.2})  # changes to --augment strong

# --- the method


def loss_fn(p1, p2, t1, t2):
    """Eq. 2, both directions, of predictions p and teacher projections t (n, d): scalars `loss`, `loss12`, `loss21`."""
    p1, p2, t1, t2 = (common.gather(x) for x in (p1, p2, t1.detach(), t2.detach()))
    loss12 = 2 - 2 * nn.functional.cosine_similarity(p1, t2).mean()
    loss21 = 2 - 2 * nn.functional.cosine_similarity(p2, t1).mean()
    return {"loss": loss12 + loss21, "loss12": loss12, "loss21": loss21}


class Model(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.args = args
        self.backbone = common.build_backbone(args)
        widths = [args.projector_dim, 256]
        self.head = MLP(self.backbone.num_features, widths, nn.BatchNorm1d, bias=False)
        self.predictor = nn.Identity() if args.no_predictor else MLP(256, widths, nn.BatchNorm1d, bias=False)
        self.teacher = common.frozen_copy(self.backbone, self.head)

    @torch.no_grad()
    def update_teacher(self, progress):
        student = nn.Sequential(self.backbone, self.head)
        for t, s in zip(self.teacher.parameters(), student.parameters(), strict=True):
            t.lerp_(s, (1 - self.args.momentum) * (math.cos(math.pi * progress) + 1) / 2)

    def forward(self, x1, x2):
        """The arguments of loss_fn for two views of a batch, each sent through the network on its own."""
        z1, z2 = (self.head(self.backbone(x)).float() for x in (x1, x2))
        with torch.no_grad():
            t1, t2 = (self.teacher(x).float() for x in (x1, x2))
        return {"p1": self.predictor(z1).float(), "p2": self.predictor(z2).float(), "t1": t1, "t2": t2}

    def embed(self, x):
        """What evaluation asks for: the backbone's `features`, the `embedding`, and with codes the `scores`."""
        h = self.backbone(x)
        z = self.head(h)
        return {"features": h, "embedding": z}


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
