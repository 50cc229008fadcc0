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
    "projector_dim": (2048, "width of the projector"),
    # this method's
    "prototypes": (3000, "clusters C"),
    "queue": (3840, "earlier embeddings that join the batch in Sinkhorn once there are so many; 0: none"),
    "no_sinkhorn": (False, "softmax instead of equal shares; collapses"),
    "freeze_prototypes": (False, "leave the prototypes as they were drawn"),
}
VIEWS = ({"scale": (0.2, 1)},) * 2  # per view, changes to --augment strong

# --- the method


@torch.no_grad()
def sinkhorn(s, iterations=3, epsilon=0.05):
    """Assignments (n, k) from scores (n, k): rows sum to 1, columns nearly to n / k. In log space nothing overflows."""
    log_q = s / epsilon
    for _ in range(iterations):
        log_q = log_q.log_softmax(0)
        log_q = log_q.log_softmax(1)
    return log_q.softmax(1)


def loss_fn(s1, s2, queue1=None, queue2=None, *, iterations=3, temperature=0.1):
    """Eq. 2 for two views' scores (n, k), Sinkhorn joined by the queues' (m, k): scalars `loss`, `loss12`, `loss21`."""
    s1, s2 = common.gather(s1), common.gather(s2)
    joined = ((s if queue is None else torch.cat([s, queue])).detach() for s, queue in ((s1, queue1), (s2, queue2)))
    q1, q2 = (sinkhorn(s, iterations)[: len(s1)] for s in joined)
    loss12 = -(q1 * (s2 / temperature).log_softmax(1)).sum(1).mean()
    loss21 = -(q2 * (s1 / temperature).log_softmax(1)).sum(1).mean()
    return {"loss": (loss12 + loss21) / 2, "loss12": loss12, "loss21": loss21}


class Model(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.args = args
        self.backbone = common.build_backbone(args)
        self.head = nn.Sequential(
            nn.Linear(self.backbone.num_features, args.projector_dim, bias=False),
            nn.BatchNorm1d(args.projector_dim),
            nn.ReLU(),
            nn.Linear(args.projector_dim, 128),
        )
        self.prototypes = nn.Linear(128, args.prototypes, bias=False).requires_grad_(not args.freeze_prototypes)
        self.register_buffer("queue", torch.zeros(2, args.queue, 128))
        self.queue_full = False

    def score(self, z):
        with torch.autocast(z.device.type, enabled=False):  # a low temperature would magnify bfloat16's rounding
            return self.prototypes(z)

    def forward(self, x1, x2):
        """The arguments of loss_fn for two views of a batch, each sent through the network on its own."""
        with torch.no_grad():
            self.prototypes.weight.copy_(nn.functional.normalize(self.prototypes.weight, dim=1))
        z1, z2 = (nn.functional.normalize(self.head(self.backbone(x)).float(), dim=1) for x in (x1, x2))
        scores = {"s1": self.score(z1), "s2": self.score(z2), "iterations": 0 if self.args.no_sinkhorn else 3}
        if self.args.queue:
            self.queue_full = self.queue_full or bool(self.queue[0, -1].any())  # waits for the device only until full
            if self.queue_full:
                scores |= {"queue1": self.score(self.queue[0]), "queue2": self.score(self.queue[1])}
            new = torch.stack([common.gather(z.detach()) for z in (z1, z2)])
            self.queue = torch.cat([new, self.queue], 1)[:, : self.args.queue]
        return scores

    def embed(self, x):
        """What evaluation asks for: the backbone's `features`, the `embedding` and its `scores` over the prototypes."""
        h = self.backbone(x)
        z = nn.functional.normalize(self.head(h), dim=1)
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
            run.record(terms)
        run.end_epoch(common.collapse_metrics(model, data))
    run.finish()


if __name__ == "__main__":
    main()
