"""VICReg: make views agree, keep every dimension's standard deviation above 1, and decorrelate the dimensions.

    loss = 25 mean (z1 - z2)² + 25 [v(z1) + v(z2)] / 2 + [c(z1) + c(z2)]                                         (Eq. 6)
    v(z) = mean_j max(0, 1 - sqrt(Var z_j + 0.0001)),  c(z) = Σ_{i≠j} Cov(z)_ij² / d

What prevents collapse: `variance` keeps embeddings from shrinking to a point, `covariance` from using few dimensions.
`--variance-weight 0` and `--covariance-weight 0` take them away.

"VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning", Bardes et al., ICLR 2022.
Departs from the paper: Adam, narrower expander; as in the authors' code `invariance` is over d too, `variance` halved.
Run: python methods/vicreg.py
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
    "invariance_weight": (25.0, "weight of the views' agreement", 0),
    "variance_weight": (25.0, "weight of the variance term; 0: total collapse", 0),
    "covariance_weight": (1.0, "weight of the covariance term; 0: dimensional collapse", 0),
    "sum_variance": (False, "add the views' variance terms, the paper's form, instead of averaging them"),
}
VIEWS = ({"blur": 1.0}, {"blur": 0.1, "solarize": 0.2})  # changes to --augment strong

# --- the method


def loss_fn(z1, z2, *, weights=(25.0, 25.0, 1.0), sum_variance=False):
    """Eq. 6 for two views' embeddings (n, d), as scalars `loss`, `invariance`, `variance` and `covariance`."""
    z1, z2 = common.gather(z1), common.gather(z2)
    invariance = (z1 - z2).square().mean()
    c1, c2 = ((z - z.mean(0)).T @ (z - z.mean(0)) / (len(z) - 1) for z in (z1, z2))
    variance = sum((1 - (c.diagonal() + 1e-4).sqrt()).relu().mean() for c in (c1, c2)) / (1 if sum_variance else 2)
    covariance = sum((c.square().sum() - c.diagonal().square().sum()) / len(c) for c in (c1, c2))
    loss = weights[0] * invariance + weights[1] * variance + weights[2] * covariance
    return {"loss": loss, "invariance": invariance, "variance": variance, "covariance": covariance}


class Model(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.args = args
        self.backbone = common.build_backbone(args)
        self.head = MLP(self.backbone.num_features, [args.projector_dim] * 3, nn.BatchNorm1d, bias=False)

    def forward(self, x1, x2):
        """The arguments of loss_fn for two views of a batch, each sent through the network on its own."""
        z1, z2 = (self.head(self.backbone(x)).float() for x in (x1, x2))
        weights = self.args.invariance_weight, self.args.variance_weight, self.args.covariance_weight
        return {"z1": z1, "z2": z2, "weights": weights, "sum_variance": self.args.sum_variance}

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
