"""SwAV: predict the prototype of one view from the other view; the prototypes share the images equally.

    loss = -½ mean_i [ Σ_k q1_ik log p2_ik + Σ_k q2_ik log p1_ik ],  p = softmax(s / 0.1)                       (Eq. 2)
    q = Sinkhorn(s): start from exp(s / epsilon), then three times divide columns by their sums, then rows      (Eq. 3)

s (n, k) are the scores of view 1 or 2 of n images: cosines of their embeddings with k learned prototypes. q is the
target, without gradient. Dividing columns gives all prototypes equal shares; dividing rows makes each q_i sum to 1.

What prevents collapse: equal shares, so images cannot all take one prototype. `--no-sinkhorn` takes q = softmax(s /
epsilon). `--freeze-prototypes` keeps the random prototypes, which are spread evenly already.

"Unsupervised Learning of Visual Features by Contrasting Cluster Assignments", Caron et al., NeurIPS 2020.
Departs from the paper: two larger crops, Adam (LARS), prototypes not frozen at first, queue used only once it is full.
Run: python methods/swav.py
"""

import math
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common

# What each view changes of --augment strong (see common.AUGMENT), and this method's flags on small data sets.
VIEWS = ({"scale": (0.2, 1)},) * 2
SIZES = {name: {"prototypes": 32, "queue": 0} for name in (*common.TOYS, "shapes")}


def add_flags(parser):
    parser.set_defaults(optimizer="adam", lr=1e-3, weight_decay=1e-4)
    parser.add_argument("--prototypes", type=common.integer(2), default=3000, help="number of clusters")
    parser.add_argument("--queue", type=common.integer(0), default=3840, help="earlier embeddings in Sinkhorn; 0: none")
    parser.add_argument("--no-sinkhorn", action="store_true", help="softmax instead of equal shares; collapses")
    parser.add_argument("--freeze-prototypes", action="store_true", help="leave the prototypes as they were drawn")


# --- the method


def loss_fn(s1, s2, earlier1, earlier2, *, iterations=3, epsilon=0.05, temperature=0.1):
    """Eq. 2 of two views' scores (n, k) and those of a queue (m, k), m may be 0: scalars `loss`, `loss12`, `loss21`."""
    losses = []
    for s, earlier, other in ((s1, earlier1, s2), (s2, earlier2, s1)):
        log_q = torch.cat([s, earlier]).detach() / epsilon
        for _ in range(iterations):  # Sinkhorn, in log space, where nothing overflows
            log_q = log_q.log_softmax(0).log_softmax(1)
        q = log_q.softmax(1)[: len(s)]
        losses.append(-(q * (other / temperature).log_softmax(1)).sum(1).mean())
    return {"loss": sum(losses) / 2, "loss12": losses[0], "loss21": losses[1]}


class Model(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.backbone = common.build_backbone(args)
        d = args.projector_dim
        self.head = nn.Sequential(
            nn.Linear(self.backbone.num_features, d), nn.BatchNorm1d(d), nn.ReLU(),
            nn.Linear(d, 128),
        )  # fmt: skip
        self.prototypes = nn.Linear(128, args.prototypes, bias=False).requires_grad_(not args.freeze_prototypes)
        self.normalise_prototypes()
        self.register_buffer("queue", torch.zeros(2, args.queue, 128))

    def forward(self, x):
        return self.head(self.backbone(x))

    def scores(self, z):
        return self.prototypes(nn.functional.normalize(z.float(), dim=-1))

    def normalise_prototypes(self):
        self.prototypes.weight.data = nn.functional.normalize(self.prototypes.weight.data, dim=1)


# --- training


def main():
    args = common.parse_args(__file__, __doc__, add_flags, SIZES)
    device = common.start(args)
    model = common.to_device(Model(args), device, compile=args.compile)
    data = common.load_data(args, device)
    optimizer = common.build_optimizer(model, args)
    run = common.open_run(args, model, optimizer, data)

    for epoch in run.epochs():
        for x1, x2 in common.two_views(data, args, VIEWS, epoch, run.step % run.steps_per_epoch):
            for group in optimizer.param_groups:
                group["lr"] = run.learning_rate()  # linear warm-up, then a half cosine to zero
            with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
                z1, z2 = model(x1), model(x2)  # one view at a time: batch norm must not mix the views
            s1, s2 = common.gather(model.scores(z1), model.scores(z2))  # the rows of all processes, float32
            m = args.queue if run.step * args.batch_size >= args.queue else 0  # the queue is used once it is full
            terms = loss_fn(s1, s2, *model.scores(model.queue[:, :m]), iterations=0 if args.no_sinkhorn else 3)
            optimizer.zero_grad()
            terms["loss"].backward()
            common.sum_gradients(model)
            optimizer.step()
            model.normalise_prototypes()
            model.queue = torch.cat([torch.stack(common.gather(z1, z2)).detach(), model.queue], 1)[:, : args.queue]
            run.step += 1
            run.end_step(terms)
        run.end_epoch(epoch, common.collapse_metrics(model, data))
    run.finish()


if __name__ == "__main__":
    main()
