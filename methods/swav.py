"""SwAV: predict the other view's prototypes, where every prototype gets equally many images.

    loss = -1/2 mean_i [ sum_k q1_ik log p2_ik + sum_k q2_ik log p1_ik ]              (Eqs. 1 and 2)
    p = softmax(s / 0.1)
    q = Sinkhorn(s): begin with exp(s / epsilon); three times, divide each column by its sum, then
        each row by its sum                                                                 (Eq. 5)

z are embeddings. s (n, k) are the cosines of one view's n embeddings (rows) with k learned
prototypes (columns). p1_i and q1_i belong to view 1 of image i, p2_i and q2_i to its view 2. q gets
no gradient.

What prevents collapse: Sinkhorn's division of the columns gives all prototypes about the same share
of the images. `--no-sinkhorn` leaves it out, and all images get one or two prototypes.

In the log: if all z are equal, q is 1 / k, so the loss is at least log k, which is 6.24 for 512
prototypes. A good run goes well below. A loss that stays at log k, with assignment_entropy near 1,
says that q stays uniform. Then a smaller `--epsilon` helps.

"Unsupervised Learning of Visual Features by Contrasting Cluster Assignments", Caron et al.,
NeurIPS 2020.
Departs from the paper: no small crops, less color jitter, Adam, 512 prototypes, and no queue by
default.
Run: python methods/swav.py
"""

import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common

# What each of the two views changes in common.AUGMENT["strong"].
BOTH = {"scale": (0.14, 1), "jitter": (0.4, 0.4, 0.4, 0.1), "blur": 0.5}
VIEWS = (BOTH, BOTH)
# This method's own defaults for each data set.
DEFAULTS = {
    "shapes": {"prototypes": 64, "epsilon": 0.02},
    "blobs": {"prototypes": 32},
    "moons": {"prototypes": 32},
}
# The first epoch, counted from 0, that uses the queue, of how many: as published.
QUEUE_STARTS = 15
PUBLISHED_EPOCHS = 200


def add_flags(parser):
    # The settings of lightly's CIFAR-10 benchmark.
    parser.set_defaults(optimizer="adam", lr=2e-3, weight_decay=1e-6)
    parser.add_argument(
        "--prototypes", type=common.bounded_int(2), default=512, help="number of prototypes k"
    )
    parser.add_argument(
        "--epsilon",
        type=common.bounded_float(0.001),
        default=0.05,
        help="temperature of q; smaller: sharper; try 0.02 if q stays uniform",
    )
    parser.add_argument(
        "--queue",
        type=common.bounded_int(0),
        default=0,
        help="number of earlier embeddings of each view that take part in Sinkhorn, from epoch 15 "
        "of 200 on, earlier in shorter runs; useful if a batch has fewer images than there are "
        "prototypes; 0: none",
    )
    parser.add_argument(
        "--no-sinkhorn",
        action="store_true",
        help="q = softmax(s / epsilon); collapses",
    )
    parser.add_argument(
        "--freeze-prototypes",
        action="store_true",
        help="leave the prototypes as they were drawn",
    )


# --- the method


def loss_fn(s1, s2, queue1=None, queue2=None, *, iterations=3, epsilon=0.05, temperature=0.1):
    """Eqs. 1 and 2 of two views' cosines (n, k), float32.

    queue1, queue2: cosines (m, k) of earlier embeddings. They take part in Sinkhorn only.
    With iterations=0 q is softmax(s / epsilon). Returns scalars `loss`, `loss12`, where view 1's q
    is the target and view 2's p the prediction, and `loss21`.
    """
    q1 = assignments(s1, queue1, iterations, epsilon)
    q2 = assignments(s2, queue2, iterations, epsilon)
    log_p1 = (s1 / temperature).log_softmax(1)
    log_p2 = (s2 / temperature).log_softmax(1)
    loss12 = -(q1 * log_p2).sum(1).mean()
    loss21 = -(q2 * log_p1).sum(1).mean()
    loss = (loss12 + loss21) / 2
    return {"loss": loss, "loss12": loss12, "loss21": loss21}


def assignments(s, queue, iterations, epsilon):
    """Sinkhorn's q (n, k) of the cosines s (n, k), Eq. 5, without gradient."""
    n = len(s)
    if queue is not None:
        s = torch.cat([s, queue])
    log_q = s.detach() / epsilon
    for _ in range(iterations):
        log_q = log_q.log_softmax(0)  # divides each column of q by its sum
        log_q = log_q.log_softmax(1)  # divides each row of q by its sum
    q = log_q.softmax(1)  # exp(log_q), but with iterations=0 softmax(s / epsilon)
    return q[:n]


class Model(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.backbone = common.build_backbone(args)
        d = args.projector_dim  # width of the head
        self.head = nn.Sequential(
            nn.Linear(self.backbone.num_features, d),
            nn.BatchNorm1d(d),
            nn.ReLU(),
            nn.Linear(d, 128),
        )
        self.prototypes = nn.Linear(128, args.prototypes, bias=False)  # its weight is (k, 128)
        self.normalise_prototypes()
        self.temperature = 0.1  # of p, as in loss_fn; the metrics read it, too
        self.register_buffer("queue", torch.zeros(2, args.queue, 128))  # of each view, newest first
        # In a shorter run the queue is used earlier, from the same share of the epochs on.
        share = args.epochs / PUBLISHED_EPOCHS
        self.queue_starts = min(QUEUE_STARTS, int(QUEUE_STARTS * share))

    def forward(self, x):
        return self.head(self.backbone(x))

    def scores(self, z):
        return self.prototypes(nn.functional.normalize(z.float(), dim=1))

    @torch.no_grad()
    def normalise_prototypes(self):
        weight = self.prototypes.weight
        weight.copy_(nn.functional.normalize(weight, dim=1))

    def update_queue(self, z1, z2):
        """Puts the embeddings (n, 128) of a batch's two views in front of the earlier ones."""
        new = torch.stack([z1.detach(), z2.detach()])
        longer = torch.cat([new, self.queue], dim=1)
        self.queue = longer[:, : self.queue.shape[1]]


# --- training


def main():
    args = common.parse_args(__file__, __doc__, add_flags, DEFAULTS)
    device = common.set_up(args)
    model = common.to_device(Model(args), device, compile=args.compile)
    data = common.load_data(args, device)
    optimizer = common.build_optimizer(model, args)
    run = common.open_run(args, model, optimizer, data, VIEWS)

    for epoch, first_step in run.epochs():  # a resumed epoch goes on at its step `first_step`
        for x1, x2 in common.two_views(data, args, VIEWS, epoch, first_step):
            # run.lr() rises linearly, then falls to 0 along a half cosine.
            for group in optimizer.param_groups:
                group["lr"] = run.lr()

            # The views go through the network one after the other: batch norm sees one at a time.
            with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
                z1, z2 = model(x1), model(x2)
            # In the first epoch prototypes are fixed, as published.
            model.prototypes.requires_grad_(epoch > 0 and not args.freeze_prototypes)

            # The loss is computed over the rows of all processes, in float32.
            s1, s2 = common.gather(model.scores(z1), model.scores(z2))
            queue1, queue2 = None, None
            if args.queue and epoch >= model.queue_starts:
                filled = min(args.queue, run.step * args.batch_size)  # the rest is still zeros
                queue1 = model.scores(model.queue[0, :filled])
                queue2 = model.scores(model.queue[1, :filled])
            iterations = 3
            if args.no_sinkhorn:
                iterations = 0
            terms = loss_fn(s1, s2, queue1, queue2, iterations=iterations, epsilon=args.epsilon)

            optimizer.zero_grad()
            terms["loss"].backward()
            common.sum_gradients(model)  # each process has the gradient of its own rows only
            optimizer.step()
            model.normalise_prototypes()
            if args.queue:
                z1, z2 = common.gather(z1.float(), z2.float())
                model.update_queue(z1, z2)
            run.end_step(terms)  # counts the step, on which run.lr() depends
        # Collapse shows as a center_norm near 1 or as a low effective_rank of the embeddings.
        run.end_epoch(epoch, common.collapse_metrics(model, data))
    run.finish()


if __name__ == "__main__":
    main()
