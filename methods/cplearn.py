"""CPLearn: give each image one of many fixed random codes, both views the same, and all codes equal shares.

    p = softmax(zᵀ W / tau),  z = sqrt(f/n) l2norm(bn(linear(h))),  W in {-1, 1}^(f × c) random and frozen       (Eq. 1)
    loss = beta mean_i CE(p_i, p'_i) + prior(mean_i p_i),  tau = f / (sqrt(n) log((1 - eps (c - 1)) / eps)), eps = 1e-8

What prevents collapse: the prior, KL(mean p || uniform), forbids one or few codes for all images; quasi-orthogonal
codes, many more than dimensions (c >> f), spread embeddings over all directions. `--beta 0` takes the agreement away, a
large beta drowns the prior: balanced hard codes cost log(c/n) if n < c, the uniform start beta log(c), one code for all
log(c): less than the start if beta > 1 (Table 9's cliff). Below log(c/n) / log(c) soft codes are cheaper than hard.

"Collapse-Proof Non-Contrastive Self-Supervised Learning", Sansone, Lebailly and Tuytelaars, ICML 2025.
Departs from the paper: sqrt(n), which cancels, is left out of z and tau; the prior, over both views, is Appendix N's.
Run: python methods/cplearn.py --c 16384
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
    "c": (16384, "codes; many more than projector_dim against dimensional and intracluster collapse", 2),
    "beta": (0.25, "weight of the views' agreement; 1 suits long runs, above it collapse is cheaper than the start", 0),
    "activation": ("l2", "tanh-unscaled: the authors', sqrt(batch size) sharper", ["l2", "tanh", "tanh-unscaled"]),
    "prior": ("reverse-kl", "Appendix N's, bounded, or Eq. 2's", ["reverse-kl", "cross-entropy"]),
    "codes": ("rademacher", "hadamard: exactly orthogonal, c <= projector_dim", ["rademacher", "hadamard"]),
    "no_batchnorm": (False, "leave batch norm out of the projector"),
}
VIEWS = ({"blur": 1.0}, {"blur": 0.1, "solarize": 0.2})  # changes to --augment strong

# --- the method


def loss_fn(z1, z2, codes, *, tau, beta=1.0, prior="reverse-kl", block=1024):
    """Eq. 2 of embeddings (n, f) and codes (f, c): scalars `loss`, `invariance`, `prior`; only `loss` has a gradient.
    Walks over blocks of codes twice, for the log-sum-exp and for the gradient: no n × c matrix is ever held."""
    n, c, z = common.world_size() * len(z1), codes.shape[1], torch.stack([z1, z2]) / tau
    with torch.no_grad():
        lse, row_sum, slope, pulled, matching = z.new_full(z.shape[:2], -math.inf), 0, 0, 0, 0
        for w in codes.split(block, 1):
            lse = lse.logaddexp(common.linear(z, w.to(z).T).logsumexp(2))
        for w in (w.to(z) for w in codes.split(block, 1)):
            log_p = common.linear(z, w.T) - lse[..., None]
            p = log_p.exp()
            # In log space, because an unused code's mean is 0 in float32, and 0 log 0 is NaN.
            log_mean = common.gather(log_p.logsumexp(1)[None]).logsumexp(0) - math.log(n)
            kl, even = log_mean.exp() * (log_mean + math.log(c)), torch.full_like(log_mean, 1 / c)
            gap, d_gap = (kl, kl + log_mean.exp()) if prior == "reverse-kl" else (-log_mean * even, -even)
            matching += gap.sum() / 2
            # 2n d loss / d log p is pull - beta p'. The softmax takes from it p times its sum over the codes.
            pull = d_gap[:, None] * (log_p - log_mean[:, None]).exp() - beta * p * log_p.flip(0)
            row_sum, slope, pulled = row_sum + pull.sum(2), slope + common.linear(p, w), pulled + common.linear(pull, w)
        invariance = common.gather((lse - (z * slope.flip(0)).sum(2)).sum()[None]).sum() / (2 * n)
        grad = (pulled - beta * slope.flip(0) - (row_sum - beta)[..., None] * slope) / (2 * n)  # slope is d lse / d z
    loss = beta * invariance + matching + (grad * (z - z.detach())).sum()  # the last term is 0 and has the gradient
    return {"loss": loss, "invariance": invariance, "prior": matching}


class Model(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.args = args
        self.backbone = common.build_backbone(args)
        f, n = args.projector_dim, args.batch_size if args.activation == "tanh-unscaled" else 1  # else n cancels out
        self.head = MLP(self.backbone.num_features, [f])
        self.head.append(nn.Identity() if args.no_batchnorm else nn.BatchNorm1d(f))
        self.head.append(nn.RMSNorm(f, 1e-12, elementwise_affine=False) if args.activation == "l2" else nn.Tanh())
        if args.beta > 1:
            print(f"warning: at beta {args.beta} > 1 total collapse is cheaper than the uniform start", file=sys.stderr)
        self.register_buffer("codes", common.draw_codes(args.codes, f, args.c, args.seed), persistent=False)
        self.tau = f / (math.sqrt(n) * math.log((1 - 1e-8 * (args.c - 1)) / 1e-8))

    def forward(self, x1, x2):
        """The arguments of loss_fn for two views of a batch, each sent through the network on its own."""
        z1, z2 = (self.head(self.backbone(x)).float() for x in (x1, x2))
        settings = {"codes": self.codes, "tau": self.tau, "beta": self.args.beta, "prior": self.args.prior}
        return {"z1": z1, "z2": z2, **settings}

    def embed(self, x):
        """What evaluation asks for: the backbone's `features`, the `embedding`, and with codes the `scores`."""
        h = self.backbone(x)
        z = self.head(h)
        return {"features": h, "embedding": z, "scores": z @ self.codes.to(z) / self.tau}


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
