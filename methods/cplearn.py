"""CPLearn: give each image one of many fixed random codes, both views the same, and all codes equal shares.

    H = sqrt(f/n) l2norm(bn(linear(Z))),  P = softmax(H W / tau),  W in {-1, 1}^(f × c) random and frozen     (Eq. 1)
    tau = f / (sqrt(n) log((1 - eps (c - 1)) / eps)), eps = 1e-8;  loss = beta mean_i CE(p_i, p'_i) + prior(mean_i p_i)

What prevents collapse: the prior, KL(mean p || uniform), forbids one or few codes for all images; quasi-orthogonal
codes, many more than dimensions (c >> f), spread embeddings over all directions. `--beta` sets the balance. Balanced
hard codes cost log(c/n) if n < c, the uniform assignment beta log(c), one code for all log(c): above beta = 1 total
collapse is cheaper than the uniform start (Table 9's cliff); below log(c/n) / log(c) soft assignments are cheaper than
hard ones, which need not be bad. `--beta 0` takes the views' agreement away.

"Collapse-Proof Non-Contrastive Self-Supervised Learning", Sansone, Lebailly and Tuytelaars, ICML 2025.
Departs from the paper: the prior is Appendix N's reverse KL (Eq. 2's is unbounded once a code goes unused) and both
terms are averaged over the views, as in the authors' code, whose tanh lacks 1/sqrt(n) and makes P sharper than Eq. 1.
Run: python methods/cplearn.py --c 16384
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
    "projector_dim": (2048, "width of the embedding z"),
    # this method's
    "c": (16384, "codes in the dictionary; many more than projector_dim against dimensional and intracluster collapse"),
    "beta": (1.0, "weight of the views' agreement; above 1 total collapse is cheaper than the uniform start"),
    "activation": ("l2", "tanh is divided by sqrt(n): a corner has l2's norm", ["l2", "tanh", "tanh-unscaled"]),
    "prior": ("reverse-kl", "Appendix N's, bounded, or Eq. 2's", ["reverse-kl", "cross-entropy"]),
    "codes": ("rademacher", "hadamard: exactly orthogonal, c <= projector_dim", ["rademacher", "hadamard"]),
    "no_batchnorm": (False, "leave batch norm out of the projector"),
}
VIEWS = ({"blur": 1.0}, {"blur": 0.1, "solarize": 0.2})  # what each view changes in --augment strong

# --- the method


class BlockwiseLoss(torch.autograd.Function):
    """Eq. 2 and its gradient in two walks over blocks of codes, so that no n × c matrix is ever held."""

    @staticmethod
    def forward(ctx, h1, h2, codes, tau, beta, prior, block):
        n, c = common.world_size() * len(h1), codes.shape[1]
        h = (torch.cat([h1, h2]) / tau).requires_grad_()
        lse = torch.stack([(h @ w.to(h)).logsumexp(1) for w in codes.split(block, 1)]).logsumexp(0).requires_grad_()
        terms, slope = 0, 0
        for w in codes.split(block, 1):
            w = w.to(h)
            with torch.enable_grad():
                log_p = (h @ w - lse[:, None]).view(2, len(h1), -1)
                p = log_p.exp()
                # In log space, because an unused code's mean is 0 in float32, and 0 log 0 is NaN.
                log_mean = common.gather(log_p.logsumexp(1)[None]).logsumexp(0) - math.log(n)
                invariance = -(p * log_p.flip(0)).sum() / (2 * n)
                if prior == "reverse-kl":
                    matching = (log_mean.exp() * (log_mean + math.log(c))).sum() / 2
                else:
                    matching = -log_mean.sum() / (2 * c)
                (beta * invariance + matching).backward()
            terms += torch.stack([invariance.detach(), matching.detach()])
            slope += p.detach().flatten(0, 1) @ w.T
        # h.grad holds the log-sum-exp fixed; the chain rule adds its share, slope = d lse / d h.
        ctx.save_for_backward((h.grad + lse.grad[:, None] * slope) / tau)
        invariance, matching = common.gather(terms[:1]).sum(), terms[1]
        ctx.mark_non_differentiable(invariance, matching)
        return beta * invariance + matching, invariance, matching

    @staticmethod
    def backward(ctx, grad, *_):
        return *(grad * ctx.saved_tensors[0]).chunk(2), None, None, None, None, None


def loss_fn(h1, h2, codes, *, tau, beta=1.0, prior="reverse-kl", block=1024):
    """Eq. 2 of two views' embeddings (n, f) and codes (f, c): `loss`, and without gradient `invariance` and `prior`."""
    loss, invariance, matching = BlockwiseLoss.apply(h1, h2, codes, tau, beta, prior, block)
    return {"loss": loss, "invariance": invariance, "prior": matching}


def draw_codes(kind, f, c, seed):
    """W (f, c) of entries ±1 as int8: "rademacher" draws every entry, "hadamard" has orthogonal columns."""
    rng = torch.Generator().manual_seed(seed)
    if kind == "rademacher":
        return 2 * torch.randint(2, (f, c), generator=rng, dtype=torch.int8) - 1
    if f & (f - 1) or c > f:
        common.fail(f"--codes hadamard needs a power of two as --projector-dim and --c no larger, not {f} and {c}")
    w = torch.ones(1, 1, dtype=torch.int8)
    while len(w) < f:
        w = torch.cat([torch.cat([w, w], 1), torch.cat([w, -w], 1)])
    return w[:, torch.randperm(f, generator=rng)[:c]]


class Model(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.args = args
        self.backbone = common.build_backbone(args)
        self.head = nn.Sequential(
            nn.Linear(self.backbone.num_features, args.projector_dim),
            nn.Identity() if args.no_batchnorm else nn.BatchNorm1d(args.projector_dim),
        )
        if args.c < 2:
            common.fail(f"--c must be at least 2, not {args.c}: with one code there is nothing to tell apart")
        if args.beta > 1:
            print(f"warning: at beta {args.beta} > 1 total collapse is cheaper than the uniform start", file=sys.stderr)
        # Not stored but rebuilt from the seed. n is the training batch's size, kept for evaluation.
        self.register_buffer("codes", draw_codes(args.codes, args.projector_dim, args.c, args.seed), persistent=False)
        self.scale, eps = 1 / math.sqrt(args.batch_size), 1e-8
        self.tau = args.projector_dim * self.scale / math.log((1 - eps * (args.c - 1)) / eps)

    def project(self, z):
        z = self.head(z).float()
        if self.args.activation == "l2":
            return self.scale * math.sqrt(z.shape[1]) * nn.functional.normalize(z, dim=1)
        return z.tanh() * (self.scale if self.args.activation == "tanh" else 1)

    def forward(self, x1, x2):
        """The arguments of loss_fn for two views of a batch, each sent through the network on its own."""
        h1, h2 = (self.project(self.backbone(x)) for x in (x1, x2))
        beta, prior = self.args.beta, self.args.prior
        return {"h1": h1, "h2": h2, "codes": self.codes, "tau": self.tau, "beta": beta, "prior": prior}

    def embed(self, x):
        """What evaluation asks for: the backbone's `features`, the `embedding` and its `scores` over the codes."""
        z = self.backbone(x)
        h = self.project(z)
        return {"features": z, "embedding": h, "scores": h @ self.codes.to(h) / self.tau}


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

            with common.autocast(device, args.precision):
                inputs = network(x1, x2)
            terms = loss_fn(**inputs)

            optimizer.zero_grad()
            terms["loss"].backward()
            common.sum_gradients(model)
            optimizer.step()
            run.record(terms)
        run.end_epoch(common.collapse_metrics(model, data, args))
    run.finish()


if __name__ == "__main__":
    main()
