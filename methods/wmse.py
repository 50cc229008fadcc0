"""W-MSE: whiten each view's embeddings over the batch, then make them agree.

    loss = 2 - 2 mean_i cos(w1_i, w2_i),  w = L⁻¹ (z - mean z),  L Lᵀ = Cov(z) over a random part of the batch   (Eq. 3)

What prevents collapse: whatever the network does, w has the identity as covariance. `--whitening batchnorm` fixes only
the variance of each dimension, which lets all dimensions be copies of one; `none` fixes nothing.

"Whitening for Self-Supervised Representation Learning", Ermolov et al., ICML 2021.
Departs from the paper: the learning rate falls along a cosine instead of in steps, and the batch is 256, not 512.
Run: python methods/wmse.py
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
    "whitening": ("cholesky", "batchnorm: only variances; none: nothing", ["cholesky", "batchnorm", "none"]),
    "embedding_dim": (64, "width of the whitened z; at most half of part_size", 1),
    "part_size": (128, "images whitened together, a random part of the batch", 2),
}
VIEWS = ({"scale": (0.2, 1), "jitter": (0.4, 0.4, 0.4, 0.1), "grayscale": 0.1},) * 2  # changes to --augment strong

# --- the method


def whiten(z, kind="cholesky"):
    """z (parts, n, d) with mean 0 and, by Cholesky, covariance I (over n - 1) in each part; "batchnorm": variance 1."""
    z = (z - z.mean(1, keepdim=True)).to(z.dtype if z.device.type == "mps" else torch.float64)  # for small variances
    if kind == "batchnorm":
        return z / (z.var(1, keepdim=True) + 1e-5).sqrt()
    lower, singular = torch.linalg.cholesky_ex(z.mT @ z / (z.shape[1] - 1))
    lower = lower.masked_fill(singular.view(-1, 1, 1) > 0, math.nan)  # NaN stops the run
    return torch.linalg.solve_triangular(lower, z.mT, upper=False).mT


def loss_fn(z1, z2, *, whitening="cholesky", part_size=128):
    """Eq. 3 for two views' embeddings (n, d), both with gradient, as scalars `loss` and `cosine`."""
    z1, z2 = common.gather(z1), common.gather(z2)
    if whitening != "none":
        # The same images in both views' parts; a remainder smaller than a part is left out.
        order = torch.randperm(len(z1)).unfold(0, min(part_size, len(z1)), part_size).to(z1.device)
        z1, z2 = (whiten(z[order], whitening).flatten(0, 1) for z in (z1, z2))
    cosine = nn.functional.cosine_similarity(z1, z2).mean()
    return {"loss": 2 - 2 * cosine, "cosine": cosine}


class Model(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.args = args
        self.backbone = common.build_backbone(args)
        if args.whitening == "cholesky" and min(args.part_size, args.batch_size) < 2 * args.embedding_dim:
            common.fail(f"--embedding-dim {args.embedding_dim} needs twice as large --part-size and --batch-size")
        widths = [args.projector_dim, args.embedding_dim]
        self.head = MLP(self.backbone.num_features, widths, nn.BatchNorm1d, bias=False)

    def forward(self, x1, x2):
        """The arguments of loss_fn for two views of a batch, each sent through the network on its own."""
        z1, z2 = (self.head(self.backbone(x)).float() for x in (x1, x2))
        return {"z1": z1, "z2": z2, "whitening": self.args.whitening, "part_size": self.args.part_size}

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
