"""CPLearn: give each image one of many fixed random codes, both views the same, and all codes equal shares.

    H = sqrt(f/n) l2norm(bn(linear(Z))),  P = softmax(H W / tau),  W in {-1, 1}^(f × c) random and frozen     (Eq. 1)
    tau = f / (sqrt(n) log((1 - eps (c - 1)) / eps)), eps = 1e-8;  loss = beta mean_i CE(p_i, p'_i) + prior(mean_i p_i)

What prevents collapse: the prior, KL(mean p || uniform), forbids one or few codes for all images; quasi-orthogonal
codes, many more than dimensions (c >> f), spread embeddings over all directions. `--beta 0` takes the agreement away, a
large beta drowns the prior: balanced hard codes cost log(c/n) if n < c, uniform assignments beta log(c), one code for
all log(c). So above beta = 1 total collapse is cheaper than the uniform start (Table 9's cliff), and below
log(c/n) / log(c) soft assignments are cheaper than hard ones, which need not be bad.

"Collapse-Proof Non-Contrastive Self-Supervised Learning", Sansone, Lebailly and Tuytelaars, ICML 2025.
Departs from the paper: as in the authors' code the prior is Appendix N's reverse KL (Eq. 2's is unbounded once a code
goes unused), averaged over the views; its tanh, which lacks 1/sqrt(n) and so makes P far sharper than Eq. 1, is a flag.
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
    "projector_dim": (2048, "width of the projector"),
    # this method's
    "c": (16384, "codes in the dictionary; many more than projector_dim against dimensional and intracluster collapse"),
    "beta": (0.25, "weight of the views' agreement; 1 suits long runs, above it collapse is cheaper than the start"),
    "activation": ("l2", "tanh is divided by sqrt(n): a corner has l2's norm", ["l2", "tanh", "tanh-unscaled"]),
    "prior": ("reverse-kl", "Appendix N's, bounded, or Eq. 2's", ["reverse-kl", "cross-entropy"]),
    "codes": ("rademacher", "hadamard: exactly orthogonal, c <= projector_dim", ["rademacher", "hadamard"]),
    "no_batchnorm": (False, "leave batch norm out of the projector"),
}
VIEWS = ({"blur": 1.0}, {"blur": 0.1, "solarize": 0.2})  # per view, changes to --augment strong

# --- the method


def loss_fn(h1, h2, codes, *, tau, beta=1.0, prior="reverse-kl", block=1024):
    """Eq. 2 of two views' embeddings (n, f) and codes (f, c), as scalars `loss`, `invariance` and `prior`.

    Walks over blocks of codes twice, first for the softmax's log-sum-exp, then for loss and gradient together, so that
    no n × c matrix is ever held. Only `loss` has a gradient, and only into h1 and h2.
    """
    n, c, h = common.world_size() * len(h1), codes.shape[1], torch.cat([h1, h2]) / tau
    leaf, blocks = h.detach().requires_grad_(), codes.split(block, 1)
    lse = torch.full((len(h),), -math.inf).to(h)
    for w in blocks:
        lse = lse.logaddexp((h.detach() @ w.to(h)).logsumexp(1))
    lse, slope, invariance, matching = lse.requires_grad_(), torch.zeros_like(h), 0, 0
    for w in (w.to(h) for w in blocks):
        with torch.enable_grad():
            log_p = (leaf @ w - lse[:, None]).view(2, len(h1), -1)
            p = log_p.exp()
            # In log space, because an unused code's mean is 0 in float32, and 0 log 0 is NaN.
            log_mean = common.gather(log_p.logsumexp(1)[None]).logsumexp(0) - math.log(n)
            cross = -(p * log_p.flip(0)).sum() / (2 * n)
            if prior == "reverse-kl":
                gap = (log_mean.exp() * (log_mean + math.log(c))).sum() / 2
            else:
                gap = -log_mean.sum() / (2 * c)
            (beta * cross + gap).backward()
        invariance, matching = invariance + cross.detach(), matching + gap.detach()
        slope.addmm_(p.detach().flatten(0, 1), w.T)
    # leaf.grad holds the log-sum-exp fixed; the chain rule adds its share, slope = d lse / d h.
    grad = leaf.grad + lse.grad[:, None] * slope
    invariance = common.gather(invariance[None]).sum()
    # The second term is zero; its gradient is the one just computed.
    loss = beta * invariance + matching + (grad * (h - h.detach())).sum()
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
        # Not stored but rebuilt from the seed. The n of Eq. 1 is training's batch size, whatever evaluation's is.
        self.register_buffer("codes", draw_codes(args.codes, args.projector_dim, args.c, args.seed), persistent=False)
        self.tau = args.projector_dim / (math.sqrt(args.batch_size) * math.log((1 - 1e-8 * (args.c - 1)) / 1e-8))

    def project(self, z):
        z = self.head(z).float()
        h = z.tanh() if "tanh" in self.args.activation else math.sqrt(z.shape[1]) * nn.functional.normalize(z, dim=1)
        return h if self.args.activation == "tanh-unscaled" else h / math.sqrt(self.args.batch_size)

    def forward(self, x1, x2):
        """The arguments of loss_fn for two views of a batch, each sent through the network on its own."""
        h1, h2 = (self.project(self.backbone(x)) for x in (x1, x2))
        settings = {"tau": self.tau, "beta": self.args.beta, "prior": self.args.prior}
        return {"h1": h1, "h2": h2, "codes": self.codes, **settings}

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
