"""SimSiam: predict one view's projection from the other, without gradient into what is predicted.

    loss = -½ [ cos(p1, stop(z2)) + cos(p2, stop(z1)) ],  p = predictor(z)                               (Eqs. 1 and 2)

What prevents collapse: a predictor, which learns what the augmentation changes, and a stop-gradient, which keeps z from
coming to meet it; without both all z drift to one direction. `--no-predictor`, `--no-stop-gradient` take them away.

"Exploring Simple Siamese Representation Learning", Chen and He, CVPR 2021.
Departs from the paper: Adam instead of SGD, and the predictor's learning rate falls like the others'.
Run: python methods/simsiam.py
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
    "no_predictor": (False, "compare z with z; collapses"),
    "no_stop_gradient": (False, "let the gradient into the target too; collapses"),
}
VIEWS = ({"scale": (0.2, 1), "jitter": (0.4, 0.4, 0.4, 0.1), "blur": 0.5},) * 2  # changes to --augment strong

# --- the method


def loss_fn(p1, p2, z1, z2, *, stop_gradient=True):
    """Eq. 2 for two views' predictions p and projections z (n, d), as scalars `loss`, `loss12` and `loss21`."""
    p1, p2, z1, z2 = (common.gather(x) for x in (p1, p2, z1, z2))
    z1, z2 = (z1.detach(), z2.detach()) if stop_gradient else (z1, z2)
    loss12 = -nn.functional.cosine_similarity(p1, z2).mean()
    loss21 = -nn.functional.cosine_similarity(p2, z1).mean()
    return {"loss": (loss12 + loss21) / 2, "loss12": loss12, "loss21": loss21}


class Model(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.args = args
        self.backbone = common.build_backbone(args)
        self.head = MLP(self.backbone.num_features, [args.projector_dim] * 2, nn.BatchNorm1d, bias=False)
        self.head.append(nn.BatchNorm1d(args.projector_dim, affine=False))
        widths = [args.projector_dim // 4, args.projector_dim]
        self.predictor = nn.Identity() if args.no_predictor else MLP(args.projector_dim, widths, nn.BatchNorm1d)

    def forward(self, x1, x2):
        """The arguments of loss_fn for two views of a batch, each sent through the network on its own."""
        z1, z2 = (self.head(self.backbone(x)).float() for x in (x1, x2))
        p1, p2 = self.predictor(z1).float(), self.predictor(z2).float()
        return {"p1": p1, "p2": p2, "z1": z1, "z2": z2, "stop_gradient": not self.args.no_stop_gradient}

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
