"""GEDI: give both views of an image the same class out of c learned ones, and use all classes equally often.

    loss = prior_weight prior + beta invariance + generative_weight generative,  p = softmax(s)
    prior = ½ [CE(u, mean_i p1_i) + CE(u, mean_i p2_i)],  invariance = mean_i ½ [CE(p1_i, p2_i) + CE(p2_i, p1_i)]
    generative = mean_i F(x̃_i) - mean_i F(x1_i),  F(x) = log Σ_j exp s_j(x), a log density up to a constant

z are embeddings of n images, s (n, c) scores, linear in z, u is uniform, CE(p, q) = -Σ_j p_j log q_j. `generative` (by
default off: "GEDI no gen") raises F at images and lowers it at x̃, samples of the density, drawn by Langevin dynamics.

What prevents collapse: the prior, log c if classes are used equally, else more (off: `--prior-weight 0`). Invariance is
log c if p are uniform. CPLearn: the same with fixed random classes, z of fixed norm; then each z ends along one class.

"Learning Symbolic Representations Through Joint GEnerative and DIscriminative Training", Sansone and Manhaeve, 2023.
Departs from the paper: batch norm in backbone and head, Adam, temperature 0.36. Run: python methods/gedi.py
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
DEFAULTS = {"shapes": {"c": 64}} | {name: {"c": 16} for name in common.TOYS}


def add_flags(parser):
    parser.set_defaults(optimizer="adam", lr=1e-3, weight_decay=1e-6, augment="weak")  # weak: as published; no VIEWS
    parser.add_argument("--c", type=common.bounded_int(2), default=2048, help="number of classes")
    parser.add_argument("--beta", type=common.bounded_float(0), default=0.05, help="weight of invariance")
    parser.add_argument("--prior-weight", type=common.bounded_float(0), default=1.0, help="weight of prior; 0: collapse")
    parser.add_argument("--generative-weight", type=common.bounded_float(0), default=0.0, help="0: no gen; images: 0.001")


# --- the method


def loss_fn(s1, s2, log_real=None, log_fake=None, *, weights=(1.0, 0.05, 0.0)):
    """The loss and its terms. s: scores (n, c). log_real, log_fake: F (n,) of images, samples. All float32."""
    n, log_p1, log_p2 = len(s1), s1.log_softmax(1), s2.log_softmax(1)
    invariance = -((log_p1.exp() * log_p2).sum(1) + (log_p2.exp() * log_p1).sum(1)).mean() / 2
    log_m = torch.stack([log_p1, log_p2]).logsumexp(1) - math.log(n)  # (2, c): log of mean p1, of mean p2
    prior = -log_m.mean()  # over classes, u = 1 / c, and views
    generative = (log_fake - log_real).mean() if weights[2] else torch.zeros_like(prior)
    loss = weights[0] * prior + weights[1] * invariance + weights[2] * generative
    return {"loss": loss, "invariance": invariance, "prior": prior, "generative": generative}


class Model(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.backbone = common.build_backbone(args)
        d = args.projector_dim  # width of the head
        self.head = nn.Sequential(
            nn.Linear(self.backbone.num_features, d, bias=False), nn.BatchNorm1d(d), nn.ReLU(),
            nn.Linear(d, 128, bias=False), nn.BatchNorm1d(128),
        )  # fmt: skip
        self.classes = nn.Linear(128, args.c)
        shape = (2,) if args.dataset in common.TOYS else (3, args.image_size, args.image_size)
        self.register_buffer("samples", torch.randn(10000 if args.generative_weight else 0, *shape))

    def forward(self, x):
        return self.head(self.backbone(x))

    def scores(self, z):
        return self.classes(z.float()).float() / 0.36  # so that s start with standard deviation 1.6

    def log_densities(self, x1, step):
        """F of images and of as many samples: 20 Langevin steps on from stored samples, one in 20 of them new noise."""
        n, log_p = len(x1) * common.world_size(), lambda x: self.eval().scores(self(x)).logsumexp(1)  # fixed statistics
        torch.manual_seed(step)  # all processes, and a resumed run, draw the same
        chosen = torch.randperm(len(self.samples), device=x1.device)[:n]
        self.samples[chosen[: n // 20]] = torch.randn_like(self.samples[: n // 20])
        x = self.samples[chosen].chunk(common.world_size())[common.rank()]
        for _ in range(20):
            (gradient,) = torch.autograd.grad(log_p(x.requires_grad_()).sum(), x)
            noise = torch.randn_like(self.samples[:n]).chunk(common.world_size())[common.rank()]
            x = (x + 0.005 * gradient + 0.1 * noise).detach()  # 0.005: half the noise's variance
        (self.samples[chosen],) = common.gather(x)  # of all processes
        densities = log_p(x1), log_p(x)
        self.train()
        return densities


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
                densities = model.log_densities(x1, run.step) if args.generative_weight else []
            s1, s2, *densities = common.gather(model.scores(z1), model.scores(z2), *densities)  # of all processes
            terms = loss_fn(s1, s2, *densities, weights=(args.prior_weight, args.beta, args.generative_weight))
            optimizer.zero_grad()
            terms["loss"].backward()
            common.sum_gradients(model)  # each process has the gradient of its own rows only
            optimizer.step()
            run.end_step(terms)
        run.end_epoch(epoch, common.collapse_metrics(model, data))  # embeddings' center_norm near 1, low rank: collapse
    run.finish()


if __name__ == "__main__":
    main()
