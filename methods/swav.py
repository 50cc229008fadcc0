"""SwAV: predict one view's cluster from the other, clusters dealt out in equal shares.

    loss = -½ mean_i [ Σ_k q1_ik log p2_ik + Σ_k q2_ik log p1_ik ],  p = softmax(s / 0.1),  s = Cᵀ z            (Eq. 2)
    q = Sinkhorn(s): exp(s / 0.05), normalised by turns so that prototypes (columns) and images (rows) have equal shares

What prevents collapse: equal shares, so the images cannot all agree on one prototype. `--no-sinkhorn` takes
q = softmax(s / 0.05) instead; `--freeze-prototypes` keeps the random ones, which are spread evenly without learning.

"Unsupervised Learning of Visual Features by Contrasting Cluster Assignments", Caron et al., NeurIPS 2020.
Departs from the paper: no small crops, Adam, prototypes not frozen at first, milder views (in 2-epoch trials).
Run: python methods/swav.py
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
    "prototypes": (3000, "number of clusters", 2),
    "queue": (3840, "earlier embeddings that join the batch in Sinkhorn once there are so many; 0: none", 0),
    "no_sinkhorn": (False, "softmax instead of equal shares; collapses"),
    "freeze_prototypes": (False, "leave the prototypes as they were drawn"),
}
VIEWS = ({"scale": (0.2, 1)},) * 2  # changes to --augment strong

# --- the method


@torch.no_grad()
def sinkhorn(s, iterations=3, epsilon=0.05):
    """Assignments from scores (..., n, k): rows sum to 1, columns nearly to n / k. In log space nothing overflows."""
    log_q = s / epsilon
    for _ in range(iterations):
        log_q = log_q.log_softmax(-2).log_softmax(-1)
    return log_q.softmax(-1)


def loss_fn(z1, z2, prototypes, queue, *, iterations=3, temperature=0.1):
    """Eq. 2 for embeddings (n, d), unit prototypes (k, d) and queue (m, 2, d): scalars `loss`, `loss12`, `loss21`."""
    s = common.gather(nn.functional.normalize(torch.stack([z1, z2], 1), dim=2) @ prototypes.T).transpose(0, 1)
    earlier = (nn.functional.normalize(queue, dim=2) @ prototypes.T).transpose(0, 1)
    q = sinkhorn(torch.cat([s, earlier], 1), iterations)[:, : s.shape[1]]
    loss12, loss21 = -(q * (s.flip(0) / temperature).log_softmax(2)).sum(2).mean(1)
    return {"loss": (loss12 + loss21) / 2, "loss12": loss12, "loss21": loss21}


class Model(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.args = args
        self.backbone = common.build_backbone(args)
        self.head = MLP(self.backbone.num_features, [args.projector_dim, 128], nn.BatchNorm1d)
        self.prototypes = nn.Linear(128, args.prototypes, bias=False).requires_grad_(not args.freeze_prototypes)
        self.register_buffer("queue", torch.zeros(args.queue, 2, 128))
        self.full = False

    def forward(self, x1, x2):
        """The arguments of loss_fn for two views of a batch, each sent through the network on its own."""
        z1, z2 = (self.head(self.backbone(x)).float() for x in (x1, x2))
        self.prototypes.weight.data = nn.functional.normalize(self.prototypes.weight.data, dim=1)
        self.full = self.full or bool(self.queue.any(2).all())  # waits for the device only until full
        queue = self.queue if self.full else self.queue[:0]
        self.queue = torch.cat([common.gather(torch.stack([z1, z2], 1).detach()), self.queue])[: self.args.queue]
        iterations = 0 if self.args.no_sinkhorn else 3
        return {"z1": z1, "z2": z2, "prototypes": self.prototypes.weight, "queue": queue, "iterations": iterations}

    def embed(self, x):
        """What evaluation asks for: the backbone's `features`, the `embedding`, and with codes the `scores`."""
        h = self.backbone(x)
        z = self.head(h)
        return {"features": h, "embedding": z, "scores": self.prototypes(nn.functional.normalize(z, dim=1))}


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
