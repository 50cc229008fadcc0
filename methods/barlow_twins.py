"""Barlow Twins: make the cross-correlation matrix of two views' embeddings the identity.

    C = Z1ᵀ Z2 / n with columns of Z1, Z2 standardised over the batch;  loss = Σ_i (1 - C_ii)² + lambda Σ_{i≠j} C_ij²

What prevents collapse: a standardised column cannot shrink to a constant, and the off-diagonal terms (`redundancy`)
keep columns from being copies of each other. `--lambda-offdiag 0` takes these terms away.

"Barlow Twins: Self-Supervised Learning via Redundancy Reduction", Zbontar et al., ICML 2021, Eqs. 1 and 2.
Departs from the paper: lambda as in the authors' code (0.005 in the text), Adam, a projector 2048 instead of 8192 wide.
Run: python methods/barlow_twins.py
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
    "lambda_offdiag": (0.0051, "weight of the off-diagonal terms; 0 leaves the invariance alone", 0),
}
VIEWS = ({"blur": 1.0}, {"blur": 0.1, "solarize": 0.2})  # changes to --augment strong

# --- the method


def loss_fn(z1, z2, *, lambda_offdiag=0.0051):
    """Eq. 1 for two views' embeddings (n, d), as scalars `loss`, `invariance` and `redundancy`."""
    # Batch norm without parameters: variance over n, not n - 1, so that identical views have C_ii = 1.
    z1, z2 = (nn.functional.batch_norm(common.gather(z), None, None, training=True) for z in (z1, z2))
    c = z1.T @ z2 / len(z1)
    invariance = (1 - c.diagonal()).square().sum()
    redundancy = c.square().sum() - c.diagonal().square().sum()
    return {"loss": invariance + lambda_offdiag * redundancy, "invariance": invariance, "redundancy": redundancy}


class Model(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.args = args
        self.backbone = common.build_backbone(args)
        self.head = MLP(self.backbone.num_features, [args.projector_dim] * 3, nn.BatchNorm1d, bias=False)

    def forward(self, x1, x2):
        """The arguments of loss_fn for two views of a batch, each sent through the network on its own."""
        z1, z2 = (self.head(self.backbone(x)).float() for x in (x1, x2))
        return {"z1": z1, "z2": z2, "lambda_offdiag": self.args.lambda_offdiag}

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
