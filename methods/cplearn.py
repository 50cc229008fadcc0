"""CPLearn: give both views of an image the same share of each of c random codes, and use all codes.

    p = softmax(W^T z / tau),  z = sqrt(f) l2norm(batchnorm(linear(h)))                     (Eq. 1)
    loss = beta * invariance + prior                                   (Eq. 2, with Appendix N's KL)
    invariance = mean_i 1/2 [CE(p1_i, p2_i) + CE(p2_i, p1_i)]
    prior      = 1/2 [KL(mean_i p1_i || u) + KL(mean_i p2_i || u)]

h are the backbone's features of a view, and z (f,) is its embedding. W (f, c) are the codes, one in
each column: entries of +1 and -1, which are never trained. W^T z are the scores of z. p1_i and p2_i
are the p of image i's two views, u is the uniform distribution, and CE(p, q) = -sum_j p_j log q_j.
The log shows both terms, invariance without beta.

Sharpness. Over random codes the scores of any z have standard deviation sqrt(f). So W^T z / tau has
the standard deviation sqrt(f) / tau, which is `--sharpness`. The paper sets eps instead, where
tau = f / log(1 / eps - c + 1), that is, sharpness = log(1 / eps - c + 1) / sqrt(f). So an eps means
nothing without f: 1e-8 is a sharpness of 1.63 with the paper's f = 128 (ResNet-8) and of 0.41 with
f = 2048 (ResNet-18). 1.63 is the default here for every f.

What the loss sees. With very many codes, sums over codes become expectations, and W drops out:

    invariance = log c + sharpness^2 / 2 - sharpness^2 cos(z1, z2)
    prior      = KL of a mixture of unit Gaussians around sharpness * z_i / |z_i| from N(0, I)

So CPLearn makes views agree and spreads the embeddings evenly over a sphere. It is a relative of
SimCLR at temperature 1 / sharpness^2. If the sharpness is small, only the mean of the embeddings is
left of the prior, and the loss is that of center_vector.py. (`tests/test_theory.py`.)

What prevents collapse: the prior. It is log c if all images use one code, and 0 if the mean of p is
uniform. `--beta 10` outweighs it. Let rho be the mean cosine of two views' centered embeddings. All
embeddings are drawn together while beta (1 - rho) > 1/2. At the start rho is about 0.2, so a beta
above 0.6 pulls to one point or one code at first. `--paper` has a beta of 1: on 50,000 photographs
of 16 pixels (f = 512, c = 4096) it had one code for all images after six epochs.

Codes. With fixed codes, as in the paper, a code is a cluster: its index means something, and by
Theorem 1 embeddings end at codes. But the network also learns these codes: it finds z whose scores
on them are flat, the prior falls below what as many independent images cost, and the embeddings
lose rank. `--codes fresh` draws new codes in every step, which cannot be learned. Then an index
means nothing, and ranks stay. On photographs this is better, and the default. On the drawn shapes,
which are ten clusters, fixed codes are better, and the default. The metrics of codes (used_codes,
assignment_entropy, NMI) are of the fixed codes, which with `fresh` are those of step 0.

hadamard and fresh: W is f rows of a Hadamard matrix with random signs. Its rows are orthogonal, it
is not stored, and the fast Walsh-Hadamard transform multiplies by it: c log c steps instead of f c.

In the log: invariance + prior is log c if all z are equal, and less in a good run. If each p is 1
for one code, prior is log(c / n) where the n images of a batch have different codes, and more
otherwise.

"Collapse-Proof Non-Contrastive Self-Supervised Learning", Sansone, Lebailly and Tuytelaars,
ICML 2025.
Departs from the paper: codes are fresh, where the data set is not drawn. The factor 1 / sqrt(n) in
z and in tau is left out, because it cancels. The prior is that of Appendix N. Sharpness, beta,
batch size, learning rate, decay and activation differ. `--paper` sets the paper's values, except
the prior. Paper-like at small scale: `--codes rademacher --beta 0.05`.
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
    "shapes": {
        "c": 1024,
        "beta": 0.25,
        "sharpness": 1.15,
        "codes": "rademacher",
        "lr": 1e-3,
        "weight_decay": 1e-4,
    },
    "blobs": {
        "c": 64,
        "beta": 0.5,
        "sharpness": 4.6,
        "codes": "rademacher",
        "lr": 1e-3,
        "weight_decay": 1e-4,
    },
    "moons": {
        "c": 64,
        "beta": 0.5,
        "sharpness": 4.6,
        "codes": "rademacher",
        "lr": 1e-3,
        "weight_decay": 1e-4,
    },
    "paper": {
        "beta": 1.0,
        "sharpness": 0.407,  # eps = 1e-8
        "codes": "rademacher",
        "projector_dim": 2048,
        "batch_size": 64,
        "lr": 2.5e-4,
        "weight_decay": 1e-4,
        "activation": "tanh-unscaled",
    },
}

# How many codes loss_in_blocks takes at a time: few fit into a CPU's cache, many keep a GPU busy.
BLOCK = {"cpu": 2048, "cuda": 32768, "mps": 32768}


def add_flags(parser):
    # Our choice: SimCLR's optimizer, and f = 512, the number of a ResNet-18's features.
    parser.set_defaults(
        optimizer="adam", lr=3e-3, weight_decay=1e-6, batch_size=512, projector_dim=512
    )
    parser.add_argument(
        "--c", type=common.bounded_int(2, 2**26), default=16384, help="number of codes"
    )
    parser.add_argument(
        "--beta", type=common.bounded_float(0), default=0.2, help="weight of invariance; see above"
    )
    parser.add_argument(
        "--sharpness",
        type=common.bounded_float(1e-3, 100),
        default=1.63,
        help="standard deviation of W^T z / tau over random codes; larger: harder assignments",
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
        choices=["rademacher", "hadamard", "fresh"],
        default="fresh",
        help="rademacher: random and fixed, the paper's; hadamard: fixed, with orthogonal rows "
        "and a fast transform, for very many codes; fresh: like hadamard, but others in every "
        "step. hadamard and fresh need a power of two as --c, larger than --projector-dim",
    )
    parser.add_argument(
        "--no-batchnorm", action="store_true", help="leave batch norm out of the head"
    )


# --- the method


def loss_fn(s1, s2, *, tau, beta=0.2, prior="reverse-kl"):
    """The loss of the scores W^T z of two views (n, c), float32.

    Both views get gradient. Returns scalars `loss`, `invariance` and `prior`.
    """
    n, c = s1.shape
    log_p1 = (s1 / tau).log_softmax(1)  # (n, c)
    log_p2 = (s2 / tau).log_softmax(1)
    cross_entropy12 = -(log_p1.exp() * log_p2).sum(1)  # (n,)
    cross_entropy21 = -(log_p2.exp() * log_p1).sum(1)
    invariance = (cross_entropy12 + cross_entropy21).mean() / 2

    log_mean1 = log_p1.logsumexp(0) - math.log(n)  # (c,), log of mean_i p1_i
    log_mean2 = log_p2.logsumexp(0) - math.log(n)
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


def loss_in_blocks(z1, z2, codes, scores, c, *, tau, beta=0.2, prior="reverse-kl", block=32768):
    """loss_fn for very many codes, with matrices of (2, n, block). Skip it at first reading.

    `scores(z, codes, first, last)` gives the scores of embeddings z for the codes `first` to
    `last` - 1.
    """
    z = torch.stack([z1, z2])  # (2, n, f)
    loss, invariance, prior_loss = LossInBlocks.apply(z, codes, scores, c, tau, beta, prior, block)
    return {"loss": loss, "invariance": invariance, "prior": prior_loss}


class LossInBlocks(torch.autograd.Function):
    """The loss and its gradient in one walk over the blocks, after one for the denominators.

    Let a be the loss's gradient by log p, as if the entries of log p were free. Then the gradient
    by the scores is (a - p sum_j a_j) / tau, and that by z is W times it.
    """

    @staticmethod
    def forward(ctx, z, codes, scores, c, tau, beta, prior, block):
        n = z.shape[1]
        blocks = [(first, min(first + block, c)) for first in range(0, c, block)]
        log_sums = []
        for first, last in blocks:
            s = scores(z, codes, first, last) / tau  # (2, n, block)
            log_sums.append(s.logsumexp(2, keepdim=True))
        log_sum = torch.stack(log_sums).logsumexp(0)  # (2, n, 1), log of the denominator

        invariance, prior_loss = z.new_zeros(2)
        sum_a = torch.zeros_like(log_sum)
        w_a = torch.zeros_like(z)  # W a
        w_p = torch.zeros_like(z)  # W p
        for first, last in blocks:
            with torch.enable_grad():
                leaf = z.detach().requires_grad_()
                s = scores(leaf, codes, first, last)
            log_p = s.detach() / tau - log_sum
            p = log_p.exp()
            other_view = log_p.flip(0)
            cross_entropy = p * other_view  # without its sign
            invariance -= cross_entropy.sum() / (2 * n)

            log_sum_of_images = log_p.logsumexp(1, keepdim=True)  # (2, 1, block)
            with torch.enable_grad():
                log_mean = (log_sum_of_images - math.log(n)).requires_grad_()
                terms = prior_of_codes(log_mean, c, prior).sum() / 2
                (slope,) = torch.autograd.grad(terms, log_mean)
            prior_loss += terms.detach()
            share = (log_p - log_sum_of_images).exp()  # of an image in its code's mean

            a = share * slope - (cross_entropy + p.flip(0)) * (beta / (2 * n))
            sum_a += a.sum(2, keepdim=True)
            w_a += torch.autograd.grad(s, leaf, a, retain_graph=True)[0]
            w_p += torch.autograd.grad(s, leaf, p)[0]

        ctx.save_for_backward((w_a - sum_a * w_p) / tau)
        ctx.mark_non_differentiable(invariance, prior_loss)
        return beta * invariance + prior_loss, invariance, prior_loss

    @staticmethod
    def backward(ctx, slope, *_):
        (gradient,) = ctx.saved_tensors
        return slope * gradient, None, None, None, None, None, None, None


# --- the codes


def draw_codes(kind, f, c, *key):
    """Codes, drawn from the integers `key`.

    rademacher: W (f, c), int8, each entry +1 or -1 at random. hadamard: W is f different rows of
    Sylvester's Hadamard matrix of order c, each times +1 or -1, so that W W^T = c I. The first row
    is not among them, because it adds the same to every score. c must be a power of two, and f
    less than c. What is returned is not W but row numbers and signs, int64 (2, f).
    """
    draw = common.generator(*key)
    if kind == "rademacher":
        codes = torch.randint(2, (f, c), generator=draw, dtype=torch.int8)
        return codes.mul_(2).sub_(1)  # in place, because it may be large
    rows = 1 + torch.randperm(c - 1, generator=draw)[:f]
    signs = 1 - 2 * torch.randint(2, (f,), generator=draw)
    return torch.stack([rows, signs])


def hadamard_scores(z, codes, first, last):
    """W^T z (..., last - first) of the codes from `first` on, for z (..., f) and codes of
    draw_codes("hadamard", ...), by the fast Walsh-Hadamard transform.

    The number of codes, last - first, must be a power of two, and `first` a multiple of it.
    """
    rows, signs = codes
    block = last - first
    # Entry (i, j) of the matrix is -1 if i & j has an odd number of ones, else 1. For the codes j
    # of this block, the bits of j above the block's size are those of `first`: they give a sign.
    signs = signs * (1 - 2 * odd_number_of_ones(rows & first))
    x = z.new_zeros(*z.shape[:-1], block)
    x = x.index_add(-1, rows % block, z * signs)
    # The matrix is the Kronecker product of small ones. Each turn multiplies by one of them, which
    # acts on some bits of the index: on the lowest ones first. `below` is the size of those done.
    below = 1
    while below < block:
        order = min(32, block // below)
        factor = hadamard_matrix(order, z)
        if below == 1:
            x = x.reshape(-1, order) @ factor
        else:
            x = factor @ x.reshape(-1, order, below)
        below *= order
    return x.reshape(*z.shape[:-1], block)


def odd_number_of_ones(numbers):
    """1 where the binary form of a number below 2^32 has an odd number of ones, else 0."""
    for shift in (16, 8, 4, 2, 1):
        numbers = numbers ^ (numbers >> shift)
    return numbers & 1


def hadamard_matrix(order, like):
    """Sylvester's Hadamard matrix (order, order), of the type of `like` and on its device."""
    matrix = like.new_ones(1, 1)
    while len(matrix) < order:
        upper = torch.cat([matrix, matrix], 1)
        lower = torch.cat([matrix, -matrix], 1)
        matrix = torch.cat([upper, lower])
    return matrix


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

        self.temperature = math.sqrt(f) / args.sharpness  # tau
        if args.activation == "tanh-unscaled":
            self.temperature = self.temperature / math.sqrt(args.batch_size)
        self.kind = "rademacher"
        if args.codes in ("hadamard", "fresh"):
            self.kind = "hadamard"
        self.c = args.c
        is_power_of_two = args.c.bit_count() == 1
        if self.kind == "hadamard" and not (is_power_of_two and f < args.c):
            common.fail(
                f"--codes {args.codes} needs a power of two as --c, larger than --projector-dim, "
                f"not {args.c} and {f}"
            )
        # They stay in the checkpoint, because the same seed may give others with another torch.
        self.register_buffer("codes", draw_codes(self.kind, f, args.c, args.seed))

    def forward(self, x):
        return self.head(self.backbone(x))

    def scores(self, z, codes=None, first=0, last=None):
        """W^T z (..., last - first) for the codes `first` to `last` - 1, not divided by tau."""
        if codes is None:
            codes = self.codes
        if last is None:
            last = self.c
        if self.kind == "hadamard":
            return hadamard_scores(z, codes, first, last)
        return z @ codes[:, first:last].to(z)  # from int8


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
            codes = model.codes
            if args.codes == "fresh":
                codes = draw_codes("hadamard", args.projector_dim, args.c, args.seed, run.step + 1)
                codes = codes.to(device, non_blocking=True)
            settings = {"tau": model.temperature, "beta": args.beta, "prior": args.prior}
            if len(z1) * args.c <= 2**25:
                s1, s2 = model.scores(z1, codes), model.scores(z2, codes)
                terms = loss_fn(s1, s2, **settings)
            else:  # matrices (n, c) would take over 134 MB each
                settings["block"] = BLOCK[device.type]
                terms = loss_in_blocks(z1, z2, codes, model.scores, args.c, **settings)

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
