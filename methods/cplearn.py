"""CPLearn: give both views of an image the same distribution over c random codes, and use all codes equally often.

    p = softmax(Wᵀ z / tau),  z = sqrt(f) l2norm(batchnorm(linear(h)))                                           (Eq. 1)
    loss = beta ½ mean_i [CE(p1_i, p2_i) + CE(p2_i, p1_i)] + ½ [KL(mean_i p1_i || u) + KL(mean_i p2_i || u)]

h: the backbone's features of a view. z (f,): its embedding. W (f, c): codes, random ±1, never trained. p1_i, p2_i: p of
image i's views. u: the uniform p. CE(p, q) = -Σ_j p_j log q_j. tau = f / log(1 / eps - c + 1): z with score f for one
code and 0 for the others has p = 1 - eps (c - 1). The log has both terms, `invariance` (without beta) and `prior`.

What prevents collapse: the prior is log c if all images use one code, and 0 if the mean p is uniform. If c >> f, no z
has uniform p, so z must differ by image; z in few dimensions reach too few codes. With `--beta 10` one code wins. Log:
invariance + prior is log c if all z are equal, less in a good run. Prior >= log(c / n) if the n images have one-hot p.

"Collapse-Proof Non-Contrastive Self-Supervised Learning", Sansone, Lebailly and Tuytelaars, ICML 2025.
Departs from the paper: no 1 / sqrt(n) in z and tau, which cancels; the prior is of its Appendix N; eps, beta, batch
size, learning rate, decay and activation: `--paper` has all but the prior. Run: python methods/cplearn.py --c 16384
"""

import math
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common

# VIEWS: for each view, changes to common.AUGMENT["strong"]. DEFAULTS: a data set's own defaults.
VIEWS = ({"blur": 1.0}, {"blur": 0.1, "solarize": 0.2})
PAPER = {"eps": 1e-8, "weight_decay": 1e-4}  # in `--paper` and for small data sets
DEFAULTS = {"shapes": {"c": 1024, "beta": 0.25} | PAPER, **{name: {"c": 64, "beta": 0.5} | PAPER for name in common.TOYS}}
DEFAULTS["paper"] = {"beta": 1.0, "batch_size": 64, "lr": 2.5e-4, "activation": "tanh-unscaled"} | PAPER


def add_flags(parser):
    parser.set_defaults(optimizer="adam", lr=1e-3, weight_decay=1e-6)  # our choice
    parser.add_argument("--c", type=common.bounded_int(2, 2**26), default=16384, help="number of codes")
    parser.add_argument("--beta", type=common.bounded_float(0), default=0.05, help="weight of invariance")
    parser.add_argument("--eps", type=common.bounded_float(1e-300, 1e-8), default=1e-32, help="smaller: sharper p")
    parser.add_argument("--activation", choices=["l2", "tanh", "tanh-unscaled"], default="l2", help="of the head")
    parser.add_argument("--prior", choices=["reverse-kl", "cross-entropy"], default="reverse-kl", help="of each view")
    parser.add_argument("--codes", choices=["rademacher", "hadamard"], default="rademacher", help="random, orthogonal")
    parser.add_argument("--no-batchnorm", action="store_true", help="leave batch norm out of the head")


# --- the method


def loss_fn(z1, z2, codes, *, tau, beta=0.05, prior="reverse-kl"):
    """The loss of embeddings (n, f), float32, of norm sqrt(f) (l2), and codes (f, c): `loss`, `invariance`, `prior`."""
    n, c, codes = len(z1), codes.shape[1], codes.to(z1)
    log_p1, log_p2 = ((z @ codes / tau).log_softmax(1) for z in (z1, z2))  # (n, c)
    invariance = -((log_p1.exp() * log_p2).sum(1) + (log_p2.exp() * log_p1).sum(1)).mean() / 2
    log_m = torch.stack([log_p1, log_p2]).logsumexp(1) - math.log(n)  # (2, c): log of mean p1, of mean p2
    prior_loss = {"reverse-kl": log_m.exp() * (log_m + math.log(c)), "cross-entropy": -log_m / c}[prior].sum(1).mean()
    return {"loss": beta * invariance + prior_loss, "invariance": invariance, "prior": prior_loss}


def loss_in_blocks(z1, z2, codes, *, tau, beta=0.05, prior="reverse-kl", block=32768):
    """loss_fn for a very large c. Skip it at first reading. Each block of codes is computed again for the gradient."""
    n, c, z, checkpoint = len(z1), codes.shape[1], torch.stack([z1, z2]), torch.utils.checkpoint.checkpoint
    blocks, logsumexp = codes.split(block, 1), lambda w: (z @ w.to(z) / tau).logsumexp(2, keepdim=True)
    log_sum = torch.stack([checkpoint(logsumexp, w, use_reentrant=False) for w in blocks]).logsumexp(0)  # (2, n, 1)

    def terms(w):
        log_p = z @ w.to(z) / tau - log_sum  # (2, n, block)
        log_m = log_p.logsumexp(1) - math.log(n)
        prior_part = {"reverse-kl": log_m.exp() * (log_m + math.log(c)), "cross-entropy": -log_m / c}[prior]
        return torch.stack([-(log_p.exp() * log_p.flip(0)).sum() / n, prior_part.sum()]) / 2  # mean of the two views

    invariance, prior_loss = sum(checkpoint(terms, w, use_reentrant=False) for w in blocks)
    return {"loss": beta * invariance + prior_loss, "invariance": invariance, "prior": prior_loss}


def draw_codes(kind, f, c, seed):
    """Codes W (f, c) of ±1, int8: each entry random, or c different columns of Sylvester's orthogonal matrix (f, f)."""
    rng = torch.Generator().manual_seed(seed)
    if kind == "rademacher":
        return torch.randint(2, (f, c), generator=rng, dtype=torch.int8).mul_(2).sub_(1)  # in place: it may be large
    if f & (f - 1) or c > f:
        common.fail(f"--codes hadamard needs a power of two as --projector-dim and --c no larger, not {f} and {c}")
    bits = (torch.arange(f)[:, None] >> torch.arange(f.bit_length())) & 1  # row i holds the binary digits of i
    return 1 - 2 * ((bits @ bits[torch.randperm(f, generator=rng)[:c]].T) % 2).to(torch.int8)  # -1: odd count in common


class Model(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.backbone = common.build_backbone(args)
        d = args.projector_dim  # width of the head
        self.head = nn.Sequential(
            nn.Linear(self.backbone.num_features, d), nn.Identity() if args.no_batchnorm else nn.BatchNorm1d(d),
            nn.RMSNorm(d, 1e-12, elementwise_affine=False) if args.activation == "l2" else nn.Tanh(),  # norm sqrt(d)
        )  # fmt: skip
        self.temperature = d / math.log(1 / args.eps - args.c + 1)  # tau; d is f above
        self.temperature /= math.sqrt(args.batch_size) if args.activation == "tanh-unscaled" else 1  # not so for z
        self.register_buffer("codes", draw_codes(args.codes, d, args.c, args.seed), persistent=False)

    def forward(self, x):
        return self.head(self.backbone(x))

    def scores(self, z):
        return torch.cat([z @ w.to(z) for w in self.codes.split(32768, 1)], 1)  # for the metrics


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
            z1, z2 = common.gather(z1.float(), z2.float())  # float32; all processes' rows
            loss = loss_fn if len(z1) * args.c <= 2**25 else loss_in_blocks  # matrices (n, c) of more than 134 MB
            terms = loss(z1, z2, model.codes, tau=model.temperature, beta=args.beta, prior=args.prior)
            optimizer.zero_grad()
            terms["loss"].backward()
            common.sum_gradients(model)  # each process has the gradient of its own rows only
            optimizer.step()
            run.end_step(terms)
        run.end_epoch(epoch, common.collapse_metrics(model, data))  # embeddings' center_norm near 1, low rank: collapse
    run.finish()


if __name__ == "__main__":
    main()
