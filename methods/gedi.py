"""GEDI: give both views of an image the same class out of c learned ones, and use all classes equally often.

    loss = prior_weight prior + beta invariance + generative_weight generative,  p = softmax(s)
    prior = ½ [CE(u, mean_i p1_i) + CE(u, mean_i p2_i)],  invariance = mean_i ½ [CE(p1_i, p2_i) + CE(p2_i, p1_i)]
    generative = mean_i log p(x̃_i) - mean_i log p(x1_i),  log p(x) = log Σ_j exp s_j(x) - a constant

s (n, c) are the scores of n images, linear in z. CE(p, q) = -Σ_j p_j log q_j, u is uniform, means are over a batch.
`generative`, off by default ("GEDI no gen"), makes p(x) the density of images; its gradient is that of -log p(x1).
x̃ are samples of p(x). Langevin dynamics move them up the gradient of log p(x), with noise.

What prevents collapse: the prior, log c if all classes are used equally, else more; `--prior-weight 0` removes it. This
is CPLearn's loss. But its codes are fixed and random, and by its Theorem 1 each z, of fixed norm, ends along one code.

"Learning Symbolic Representations Through Joint GEnerative and DIscriminative Training", Sansone and Manhaeve, 2023.
Departs from the paper: batch norm in backbone and head.
Run: python methods/gedi.py
"""

import math
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common

# VIEWS: changes to common.AUGMENT["strong"], explained there. SIZES: changes to common.SIZES, for small data sets.
VIEWS = ({"blur": 1.0}, {"blur": 0.1, "solarize": 0.2})
SIZES = {"shapes": {"classes": 64}} | {name: {"classes": 16} for name in common.TOYS}


def add_flags(parser):
    parser.set_defaults(optimizer="adam", lr=1e-3, weight_decay=1e-6)  # ours
    parser.add_argument("--classes", type=common.integer(2), default=2048, help="number c of classes")
    parser.add_argument("--beta", type=common.number(0), default=1.0, help="weight of invariance")
    parser.add_argument("--prior-weight", type=common.number(0), default=1.0, help="0: collapse")
    parser.add_argument("--generative-weight", type=common.number(0), default=0.0, help="above 0: 20 times slower")


# --- the method


def loss_fn(s1, s2, density=None, sampled=None, *, beta=1.0, prior_weight=1.0, generative_weight=0.0):
    """The loss of scores (n, c) and, if wanted, log p of images and of samples (n,), all float32, as scalars."""
    n, (log_p1, log_p2) = len(s1), (s.log_softmax(1) for s in (s1, s2))
    invariance = -((log_p1.exp() * log_p2).sum(1) + (log_p2.exp() * log_p1).sum(1)).mean() / 2
    log_m = torch.stack([log_p1, log_p2]).logsumexp(1) - math.log(n)  # (2, n, c) to (2, c): log of mean p1, p2
    prior = -log_m.mean()
    generative = (sampled - density).mean() if generative_weight else torch.zeros_like(prior)
    loss = prior_weight * prior + beta * invariance + generative_weight * generative
    return {"loss": loss, "invariance": invariance, "prior": prior, "generative": generative}


class Model(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.backbone = common.build_backbone(args)
        d = args.projector_dim
        self.head = nn.Sequential(
            nn.Linear(self.backbone.num_features, d, bias=False), nn.BatchNorm1d(d), nn.ReLU(),
            nn.Linear(d, d, bias=False), nn.BatchNorm1d(d), nn.ReLU(),
        )  # fmt: skip
        self.classes = nn.Linear(d, args.classes)
        self.temperature = 1.0  # for the metrics: scores are already divided by 0.1
        toy, count = args.dataset in common.TOYS, 10000 if args.generative_weight else 0
        self.step_size, self.noise = (0.01, 0.1) if toy else (1.0, 0.01)
        self.register_buffer("samples", torch.randn(count, *((2,) if toy else (3, args.image_size, args.image_size))))

    def forward(self, x):
        return self.head(self.backbone(x))

    def scores(self, z):
        return self.classes(z).float() / 0.1

    def log_density(self, x):
        scores = self.eval().scores(self(x))  # in eval mode batch norm does not make p(x) depend on other images
        self.train()
        return scores.logsumexp(1)

    def draw_samples(self, n, step):
        """Langevin dynamics: 20 steps from n of the stored samples, of which one in 20 is first replaced by noise."""
        torch.manual_seed(step)  # so that a resumed run draws the same, and several processes, too
        chosen = torch.randperm(len(self.samples), device=self.samples.device)[:n]
        self.samples[chosen[: n // 20]] = torch.randn_like(self.samples[: n // 20])
        x = self.samples[chosen.chunk(common.world_size())[common.rank()]]
        for _ in range(20):
            (gradient,) = torch.autograd.grad(self.log_density(x.requires_grad_()).sum(), x)
            noise = torch.randn_like(self.samples[:n]).chunk(common.world_size())[common.rank()]
            x = (x + self.step_size * gradient + self.noise * noise).detach()
        (self.samples[chosen],) = common.gather(x)
        return x


# --- training


def main():
    args = common.parse_args(__file__, __doc__, add_flags, SIZES)
    device = common.start(args)
    model = common.to_device(Model(args), device, compile=args.compile)
    data = common.load_data(args, device)
    optimizer = common.build_optimizer(model, args)
    run = common.open_run(args, model, optimizer, data)

    for epoch, first in run.epochs():  # a resumed epoch begins at its step `first`
        for x1, x2 in common.two_views(data, args, VIEWS, epoch, first):
            for group in optimizer.param_groups:
                group["lr"] = run.lr()  # a linear warm-up, then a half cosine down to 0
            with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
                z1, z2 = model(x1), model(x2)  # one after the other: batch norm sees one view at a time
                x = [x1, model.draw_samples(args.batch_size, run.step)] if args.generative_weight else []
                densities = [model.log_density(images) for images in x]
            s1, s2, *densities = common.gather(model.scores(z1), model.scores(z2), *densities)  # of all processes
            weights = {"prior_weight": args.prior_weight, "generative_weight": args.generative_weight}
            terms = loss_fn(s1, s2, *densities, beta=args.beta, **weights)
            optimizer.zero_grad()
            terms["loss"].backward()
            common.sum_gradients(model)  # over processes: each has the gradient that comes through its own rows
            optimizer.step()
            run.step += 1
            run.end_step(terms)
        run.end_epoch(epoch, common.collapse_metrics(model, data))
    run.finish()


if __name__ == "__main__":
    main()
