"""CPLearn: give both views of an image the same share of each of c random codes, and use all codes.

    p = softmax(W^T z / tau),  z = sqrt(f) l2norm(batchnorm(linear(h)))                     (Eq. 1)
    loss = beta * invariance + prior                                   (Eq. 2, with Appendix N's KL)
    invariance = mean_i 1/2 [CE(p1_i, p2_i) + CE(p2_i, p1_i)]
    prior      = 1/2 [KL(mean_i p1_i || u) + KL(mean_i p2_i || u)]

h are the backbone's features of a view, and z (f,) is its embedding. W (f, c) are the codes: random
entries of +1 and -1, which are never trained. p1_i and p2_i are the p of image i's two views, and u
is the uniform distribution. CE(p, q) = -sum_j p_j log q_j. The entries of W^T z are
the scores of z, f at most. tau = f / log(1 / eps - c + 1): a z with score f for one code and 0 for
all others has p = 1 - eps (c - 1) for that code. The log shows both terms, invariance without beta.

What prevents collapse: the prior is log c if all images use one code, and 0 if the mean of p is
uniform. If c is much larger than f, no single z has uniform p. So the z of different images must
differ. And z that lie in few dimensions can reach only few codes. `--beta 10` outweighs the prior,
and one code wins.

In the log: invariance + prior is log c if all z are equal, and less in a good run. If each p is 1
for one code, prior is log(c / n) where the n images of a batch have different codes, and more
otherwise.

"Collapse-Proof Non-Contrastive Self-Supervised Learning", Sansone, Lebailly and Tuytelaars,
ICML 2025.
Departs from the paper: the factor 1 / sqrt(n) in z and in tau is left out, because it cancels. The
prior is that of Appendix N. eps, beta, batch size, learning rate, decay and activation differ.
`--paper` sets the paper's values, except the prior.
Run: python methods/cplearn.py --c 16384
"""

import math
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common

# What each of the two views changes in common.AUGMENT["strong"].
VIEWS = ({"blur": 1.0}, {"blur": 0.1, "solarize": 0.2})
# This method's own defaults for each data set, and the settings of --paper.
DEFAULTS = {
    "shapes": {"c": 1024, "beta": 0.25, "eps": 1e-8, "weight_decay": 1e-4},
    "blobs": {"c": 64, "beta": 0.5, "eps": 1e-8, "weight_decay": 1e-4},
    "moons": {"c": 64, "beta": 0.5, "eps": 1e-8, "weight_decay": 1e-4},
    "paper": {
        "beta": 1.0,
        "eps": 1e-8,
        "batch_size": 64,
        "lr": 2.5e-4,
        "weight_decay": 1e-4,
        "activation": "tanh-unscaled",
    },
}


def add_flags(parser):
    # Our choice.
    parser.set_defaults(optimizer="adam", lr=1e-3, weight_decay=1e-6)
    parser.add_argument(
        "--c", type=common.bounded_int(2, 2**26), default=16384, help="number of codes"
    )
    parser.add_argument(
        "--beta", type=common.bounded_float(0), default=0.05, help="weight of invariance"
    )
    parser.add_argument(
        "--eps",
        type=common.bounded_float(1e-300, 1e-8),
        default=1e-32,
        help="smaller: sharper p; see tau above",
    )
    parser.add_argument(
        "--activation",
        choices=["l2", "tanh", "tanh-unscaled"],
        default="l2",
        help="what the head ends with; tanh-unscaled: tanh, and scores sqrt(batch size) times as "
        "large, as in the paper's code",
    )
    parser.add_argument(
        "--prior",
        choices=["reverse-kl", "cross-entropy"],
        default="reverse-kl",
        help="reverse-kl: KL(mean p || u), Appendix N; cross-entropy: CE(u, mean p), Eq. 2",
    )
    parser.add_argument(
        "--codes",
        choices=["rademacher", "hadamard"],
        default="rademacher",
        help="rademacher: random; hadamard: orthogonal, for c up to f",
    )
    parser.add_argument(
        "--no-batchnorm", action="store_true", help="leave batch norm out of the head"
    )


# --- the method


def loss_fn(z1, z2, codes, *, tau, beta=0.05, prior="reverse-kl"):
    """The loss of two views' embeddings (n, f), float32, and codes (f, c).

    With the default activation l2 embeddings have norm sqrt(f). Both views get gradient.
    Returns scalars `loss`, `invariance` and `prior`.
    """
    n = len(z1)
    codes = codes.to(z1)  # from int8
    log_p1 = (z1 @ codes / tau).log_softmax(1)  # (n, c)
    log_p2 = (z2 @ codes / tau).log_softmax(1)
    cross_entropy12 = -(log_p1.exp() * log_p2).sum(1)  # (n,)
    cross_entropy21 = -(log_p2.exp() * log_p1).sum(1)
    invariance = (cross_entropy12 + cross_entropy21).mean() / 2

    log_mean1 = log_p1.logsumexp(0) - math.log(n)  # (c,), log of mean_i p1_i
    log_mean2 = log_p2.logsumexp(0) - math.log(n)
    c = codes.shape[1]
    prior1 = prior_of_codes(log_mean1, c, prior).sum()
    prior2 = prior_of_codes(log_mean2, c, prior).sum()
    prior_loss = (prior1 + prior2) / 2

    loss = beta * invariance + prior_loss
    return {"loss": loss, "invariance": invariance, "prior": prior_loss}


def prior_of_codes(log_mean, c, prior):
    """What each code adds to the prior, from the log of its mean probability."""
    if prior == "reverse-kl":
        return log_mean.exp() * (log_mean + math.log(c))  # KL(mean p || u)
    return -log_mean / c  # CE(u, mean p)


def loss_in_blocks(z1, z2, codes, *, tau, beta=0.05, prior="reverse-kl", block=32768):
    """loss_fn for very many codes, with matrices of (2, n, block). Skip it at first reading.

    Checkpointing computes each block of codes a second time for the gradient.
    """
    checkpoint = torch.utils.checkpoint.checkpoint
    c = codes.shape[1]
    z = torch.stack([z1, z2])  # (2, n, f)
    log_sums = []
    for w in codes.split(block, 1):
        log_sums.append(checkpoint(block_log_sum, z, w, tau, use_reentrant=False))
    log_sum = torch.stack(log_sums).logsumexp(0)  # (2, n, 1), log of the softmax's denominator

    invariance, prior_loss = 0.0, 0.0
    for w in codes.split(block, 1):
        terms = checkpoint(block_terms, z, w, log_sum, tau, c, prior, use_reentrant=False)
        invariance = invariance + terms[0]
        prior_loss = prior_loss + terms[1]
    loss = beta * invariance + prior_loss
    return {"loss": loss, "invariance": invariance, "prior": prior_loss}


def block_log_sum(z, w, tau):
    """log of the sum of exp(scores) over a block of codes w (f, block), for z (2, n, f)."""
    scores = z @ w.to(z) / tau  # (2, n, block)
    return scores.logsumexp(2, keepdim=True)


def block_terms(z, w, log_sum, tau, c, prior):
    """What a block of codes adds to invariance and prior."""
    n = z.shape[1]
    scores = z @ w.to(z) / tau  # (2, n, block)
    log_p = scores - log_sum
    other_view = log_p.flip(0)
    cross_entropy = -(log_p.exp() * other_view).sum() / n  # both directions together
    log_mean = log_p.logsumexp(1) - math.log(n)  # (2, block)
    prior_loss = prior_of_codes(log_mean, c, prior).sum()  # both views together
    return cross_entropy / 2, prior_loss / 2


def draw_codes(kind, f, c, seed):
    """Codes W (f, c) with entries +1 and -1, int8.

    rademacher: each entry is random. hadamard: c different columns of Sylvester's orthogonal matrix
    (f, f), for which f must be a power of two and c at most f.
    """
    rng = torch.Generator().manual_seed(seed)
    if kind == "rademacher":
        codes = torch.randint(2, (f, c), generator=rng, dtype=torch.int8)
        return codes.mul_(2).sub_(1)  # in place, because it may be large

    if f.bit_count() != 1 or c > f:
        common.fail(
            "--codes hadamard needs a power of two as --projector-dim and --c no larger, "
            f"not {f} and {c}"
        )
    columns = torch.randperm(f, generator=rng)[:c]
    hadamard = torch.ones(1, 1, dtype=torch.int8)
    while len(hadamard) < f:  # Sylvester's construction doubles the matrix
        upper = torch.cat([hadamard, hadamard], 1)
        lower = torch.cat([hadamard, -hadamard], 1)
        hadamard = torch.cat([upper, lower])
    return hadamard[:, columns]


class Model(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.backbone = common.build_backbone(args)
        f = args.projector_dim
        self.head = nn.Sequential(nn.Linear(self.backbone.num_features, f))
        if args.no_batchnorm:
            self.head.append(nn.Identity())
        else:
            self.head.append(nn.BatchNorm1d(f))
        if args.activation == "l2":
            self.head.append(nn.RMSNorm(f, eps=1e-12, elementwise_affine=False))  # sqrt(f) l2norm
        else:
            self.head.append(nn.Tanh())

        self.temperature = f / math.log(1 / args.eps - args.c + 1)  # tau
        if args.activation == "tanh-unscaled":
            self.temperature = self.temperature / math.sqrt(args.batch_size)
        codes = draw_codes(args.codes, f, args.c, args.seed)
        self.register_buffer("codes", codes, persistent=False)  # the seed gives them again

    def forward(self, x):
        return self.head(self.backbone(x))

    def scores(self, z):
        """W^T z (n, c), for the metrics; not divided by tau."""
        blocks = self.codes.split(32768, 1)
        return torch.cat([z @ w.to(z) for w in blocks], 1)


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

            # The loss is computed over the rows of all processes, in float32.
            z1, z2 = common.gather(z1.float(), z2.float())
            if len(z1) * args.c <= 2**25:
                chosen_loss = loss_fn
            else:
                chosen_loss = loss_in_blocks  # matrices (n, c) would take over 134 MB each
            terms = chosen_loss(
                z1, z2, model.codes, tau=model.temperature, beta=args.beta, prior=args.prior
            )

            optimizer.zero_grad()
            terms["loss"].backward()
            common.sum_gradients(model)  # each process has the gradient of its own rows only
            optimizer.step()
            run.end_step(terms)  # counts the step, on which run.lr() depends
        # Collapse shows as a center_norm near 1 or as a low effective_rank of the embeddings.
        run.end_epoch(epoch, common.collapse_metrics(model, data))
    run.finish()


if __name__ == "__main__":
    main()
