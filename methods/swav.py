"""SwAV: predict one view's distribution over prototypes from the other view; prototypes share the images equally.

    loss = -½ mean_i [ Σ_k q1_ik log p2_ik + Σ_k q2_ik log p1_ik ],  p = softmax(s / 0.1)                    (Eqs. 1, 2)
    q = Sinkhorn(s): begin with exp(s / epsilon); three times: divide columns by their sums, then rows by theirs (Eq. 5)

s (n, k): cosines of the embeddings z of one view (rows) with k learned prototypes (columns). q gets no gradient.

What prevents collapse: Sinkhorn (off: `--no-sinkhorn`). Equal z get q = 1 / k, so loss >= log k; good runs go lower.

"Unsupervised Learning of Visual Features by Contrasting Cluster Assignments", Caron et al., NeurIPS 2020.
Departs from the paper: no small crops, less jitter, Adam, 512 prototypes, optional queue. Run: python methods/swav.py
"""

import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common

# VIEWS: for each view, changes to common.AUGMENT["strong"]. DEFAULTS: a data set's own defaults.
VIEWS = ({"scale": (0.14, 1), "jitter": (0.4, 0.4, 0.4, 0.1), "blur": 0.5},) * 2
DEFAULTS = {name: {"prototypes": 32} for name in common.TOYS} | {"shapes": {"prototypes": 64, "epsilon": 0.02}}


def add_flags(parser):
    parser.set_defaults(optimizer="adam", lr=2e-3, weight_decay=1e-6)  # lightly's CIFAR-10 benchmark
    parser.add_argument("--prototypes", type=common.bounded_int(2), default=512, help="number of clusters")
    parser.add_argument("--epsilon", type=common.bounded_float(0.001), default=0.05, help="0.02 if q stays uniform")
    parser.add_argument("--queue", type=common.bounded_int(0), default=0, help="past embeddings, for q from epoch 15 on")
    parser.add_argument("--no-sinkhorn", action="store_true", help="q = softmax(s / epsilon); collapses")
    parser.add_argument("--freeze-prototypes", action="store_true", help="leave the prototypes as they were drawn")


# --- the method


def loss_fn(s1, s2, earlier1, earlier2, *, iterations=3, epsilon=0.05, temperature=0.1):
    """Eqs. 1, 2 of cosines (n, k): `loss`, `loss12` (q1, p2), `loss21`. `earlier` (m, k): from a queue, for q only."""
    losses = []
    for s, earlier, other in ((s1, earlier1, s2), (s2, earlier2, s1)):
        log_q = torch.cat([s, earlier]).detach() / epsilon
        for _ in range(iterations):  # Sinkhorn: divide exp(log_q)'s columns by their sums, then its rows
            log_q = log_q.log_softmax(0).log_softmax(1)
        q = log_q.softmax(1)[: len(s)]  # exp(log_q), or, if iterations=0, softmax(s / epsilon)
        losses.append(-(q * (other / temperature).log_softmax(1)).sum(1).mean())
    return {"loss": sum(losses) / 2, "loss12": losses[0], "loss21": losses[1]}


class Model(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.backbone = common.build_backbone(args)
        d = args.projector_dim  # width of the head
        self.head = nn.Sequential(
            nn.Linear(self.backbone.num_features, d), nn.BatchNorm1d(d), nn.ReLU(),
            nn.Linear(d, 128),
        )  # fmt: skip
        self.temperature = 0.1  # of p, as in loss_fn; common.collapse_metrics reads it
        self.prototypes = nn.Linear(128, args.prototypes, bias=False)
        self.normalise_prototypes()
        self.register_buffer("queue", torch.zeros(2, args.queue, 128))  # for each view, the newest first

    def forward(self, x):
        return self.head(self.backbone(x))

    def scores(self, z):
        return self.prototypes(nn.functional.normalize(z.float(), dim=-1))

    def normalise_prototypes(self):
        nn.functional.normalize(self.prototypes.weight.data, dim=1, out=self.prototypes.weight.data)


# --- training


def main():
    args = common.parse_args(__file__, __doc__, add_flags, DEFAULTS)
    device = common.set_up(args)
    model = common.to_device(Model(args), device, compile=args.compile)
    data = common.load_data(args, device)
    optimizer = common.build_optimizer(model, args)
    run = common.open_run(args, model, optimizer, data)

    for epoch, first_step in run.epochs():  # a resumed epoch goes on at its step `first_step`
        for x1, x2 in common.two_views(data, args, VIEWS, epoch, first_step):
            for group in optimizer.param_groups:
                group["lr"] = run.lr()  # a linear warm-up, then a half cosine down to 0
            with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
                z1, z2 = model(x1), model(x2)  # one after the other: batch norm sees one view at a time
            model.prototypes.requires_grad_(epoch > 0 and not args.freeze_prototypes)  # fixed in epoch 0, as published
            s1, s2 = common.gather(model.scores(z1), model.scores(z2))  # float32; all processes' rows
            m = min(args.queue, run.step * args.batch_size) if epoch >= 15 else 0  # rows filled
            earlier1, earlier2 = model.scores(model.queue[:, :m])  # one (m, k) for each view
            terms = loss_fn(s1, s2, earlier1, earlier2, iterations=0 if args.no_sinkhorn else 3, epsilon=args.epsilon)
            optimizer.zero_grad()
            terms["loss"].backward()
            common.sum_gradients(model)  # each process has the gradient of its own rows only
            optimizer.step()
            model.normalise_prototypes()
            model.queue = torch.cat([torch.stack(common.gather(z1.float(), z2.float())).detach(), model.queue], 1)[:, : args.queue]
            run.end_step(terms)
        run.end_epoch(epoch, common.collapse_metrics(model, data))  # embeddings' center_norm near 1, low rank: collapse
    run.finish()


if __name__ == "__main__":
    main()
