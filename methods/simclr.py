"""SimCLR: find each image's other view among all other views of the batch.

    loss = -mean_i log( exp(sim(z_i, z_j(i)) / temperature) / Σ_{k≠i} exp(sim(z_i, z_k) / temperature) ),  sim = cosine

What prevents collapse: the sum over other images (`uniformity`) pushes all apart, the less the higher `--temperature`.

"A Simple Framework for Contrastive Learning of Visual Representations", Chen et al., ICML 2020, Eq. 1.
Departs from the paper: Adam instead of LARS, smaller batches. (The authors' code prints twice Eq. 1's mean.)
Run: python methods/simclr.py
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
    "temperature": (0.5, "of the similarities; the paper's best for CIFAR-10", 0.001),
}
VIEWS = ({"jitter": (0.8, 0.8, 0.8, 0.2), "blur": 0.5},) * 2  # changes to --augment strong

# --- the method


def loss_fn(z1, z2, *, temperature=0.5):
    """Eq. 1 for two views' embeddings (n, d), as scalars `loss`, `alignment` and `uniformity`."""
    n, z = len(common.gather(z1)), nn.functional.normalize(torch.cat([common.gather(z1), common.gather(z2)]), dim=1)
    similarity = z @ z.T / temperature
    alignment = -similarity.diagonal(n).mean()
    uniformity = similarity.fill_diagonal_(-math.inf).logsumexp(1).mean()
    return {"loss": alignment + uniformity, "alignment": alignment, "uniformity": uniformity}


class Model(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.args = args
        self.backbone = common.build_backbone(args)
        self.head = MLP(self.backbone.num_features, [args.projector_dim, 128], nn.BatchNorm1d, bias=False)
        self.head.append(nn.BatchNorm1d(128))

    def forward(self, x1, x2):
        """The arguments of loss_fn for two views of a batch, each sent through the network on its own."""
        z1, z2 = (self.head(self.backbone(x)).float() for x in (x1, x2))
        return {"z1": z1, "z2": z2, "temperature": self.args.temperature}

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
