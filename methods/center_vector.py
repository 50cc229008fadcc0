"""Center vector: make views agree and keep the mean of all embeddings, the center vector, short.

    loss = ½ [ -mean_i ⟨z1_i, z2_i⟩ + center_weight ||s||² ],  s = mean of all normalised z                     (Eq. 32)

What prevents collapse: ||s||², the mean inner product of all pairs, which agreement alone drives to 1, where all
embeddings are equal. At weight 1 both together are minus half the trace of the covariance between the views, for which
one point for all is worst. `--center-weight 0` takes the penalty away.

"The Common Stability Mechanism behind most Self-Supervised Learning Approaches", Jha et al., 2024.
Departs from the paper: Eq. 32 adds the vector s to a scalar; here its squared norm, or by flag its norm. The distance
is minus the cosine, whose gradient is Eq. 4's; the squared one, 2 - 2 cos, wants weight 2 (at 1 it collapsed on CIFAR).
Run: python methods/center_vector.py
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
    "center_weight": (1.0, "weight of the penalty; 0 collapses", 0),
    "penalty": ("squared", "norm: ||s||", ["squared", "norm"]),
}
VIEWS = ({"blur": 1.0}, {"blur": 0.1, "solarize": 0.2})  # changes to --augment strong

# --- the method


def loss_fn(z1, z2, *, center_weight=1.0, penalty="squared"):
    """Eq. 32 for two views' embeddings (n, d), as scalars `loss`, `invariance` (minus cosine) and `center`."""
    z1, z2 = (nn.functional.normalize(common.gather(z), dim=1) for z in (z1, z2))
    invariance = -(z1 * z2).sum(1).mean()
    center = torch.cat([z1, z2]).mean(0).square().sum()
    center = center if penalty == "squared" else center.sqrt()
    return {"loss": (invariance + center_weight * center) / 2, "invariance": invariance, "center": center}


class Model(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.args = args
        self.backbone = common.build_backbone(args)
        self.head = MLP(self.backbone.num_features, [args.projector_dim] * 3, nn.BatchNorm1d, bias=False)

    def forward(self, x1, x2):
        """The arguments of loss_fn for two views of a batch, each sent through the network on its own."""
        z1, z2 = (self.head(self.backbone(x)).float() for x in (x1, x2))
        return {"z1": z1, "z2": z2, "center_weight": self.args.center_weight, "penalty": self.args.penalty}

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
            run.record(terms)
        run.end_epoch(common.collapse_metrics(model, data))
    run.finish()


if __name__ == "__main__":
    main()
