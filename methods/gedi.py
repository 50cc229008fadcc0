"""GEDI: give both views of an image the same learned class, and use all classes equally often.

    p = softmax(s)
    loss = prior_weight * prior + beta * invariance + generative_weight * generative
    prior      = 1/2 [CE(u, mean_i p1_i) + CE(u, mean_i p2_i)]
    invariance = mean_i 1/2 [CE(p1_i, p2_i) + CE(p2_i, p1_i)]
    generative = mean_i F(y_i) - mean_i F(x1_i),  F(x) = log sum_j exp s_j(x)

s (n, c) are the scores of n images for c classes, linear in their embeddings z. p1_i and p2_i
belong to the views of image i. u is the uniform distribution, and CE(p, q) = -sum_j p_j log q_j. F
is a log density up to a constant. `generative` raises it at the images x1 and lowers it at y, which
are samples of the density, drawn by Langevin dynamics. By default this term is off, which the paper
calls "GEDI no gen".

What prevents collapse: the prior. It is log c if classes are used equally often, and more
otherwise. `--prior-weight 0` removes it, and all images fall into a few classes. CPLearn has the
first two terms, too, with random classes that are not learned, and embeddings of a fixed length.

In the log: `invariance` is log c if each p is uniform, and goes below that in a good run. `prior`
stays near log c, and used_codes, the number of classes in use, stays high.

"Learning Symbolic Representations Through Joint GEnerative and DIscriminative Training", Sansone
and Manhaeve, 2023.
Departs from the paper: batch norm in backbone and head, Adam, and a temperature of 0.36.
Run: python methods/gedi.py
"""

import math
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common

# What each of the two views changes in common.AUGMENT["strong"]. Used only with `--augment strong`:
# the default here is `--augment weak`.
VIEWS = ({"blur": 1.0}, {"blur": 0.1, "solarize": 0.2})
# This method's own defaults for each data set.
DEFAULTS = {"shapes": {"c": 64}, "blobs": {"c": 16}, "moons": {"c": 16}}


def add_flags(parser):
    # Weak augmentation as published, the rest is our choice.
    parser.set_defaults(optimizer="adam", lr=1e-3, weight_decay=1e-6, augment="weak")
    parser.add_argument("--c", type=common.bounded_int(2), default=2048, help="number of classes")
    parser.add_argument(
        "--beta", type=common.bounded_float(0), default=0.05, help="weight of invariance"
    )
    parser.add_argument(
        "--prior-weight",
        type=common.bounded_float(0),
        default=1.0,
        help="weight of the prior; 0: a few classes for all images",
    )
    parser.add_argument(
        "--generative-weight",
        type=common.bounded_float(0),
        default=0.0,
        help="weight of the generative term; 0.001 suits images; steps then take far longer",
    )


# --- the method


def loss_fn(
    s1, s2, log_real=None, log_fake=None, *, prior_weight=1.0, beta=0.05, generative_weight=0.0
):
    """The loss of two views' scores (n, c), float32.

    log_real, log_fake: F (n,) of the images and of as many samples, if generative_weight is not 0.
    Returns scalars `loss`, `invariance`, `prior` and `generative`.
    """
    n = len(s1)
    log_p1 = s1.log_softmax(1)
    log_p2 = s2.log_softmax(1)
    cross_entropy12 = -(log_p1.exp() * log_p2).sum(1)  # (n,)
    cross_entropy21 = -(log_p2.exp() * log_p1).sum(1)
    invariance = (cross_entropy12 + cross_entropy21).mean() / 2

    log_mean1 = log_p1.logsumexp(0) - math.log(n)  # (c,), log of mean_i p1_i
    log_mean2 = log_p2.logsumexp(0) - math.log(n)
    log_mean = (log_mean1 + log_mean2) / 2
    prior = -log_mean.mean()  # the mean over classes, because u = 1 / c

    loss = prior_weight * prior + beta * invariance
    if generative_weight:
        generative = (log_fake - log_real).mean()
        loss = loss + generative_weight * generative
    else:
        generative = torch.zeros_like(prior)
    return {"loss": loss, "invariance": invariance, "prior": prior, "generative": generative}


class Model(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.backbone = common.build_backbone(args)
        d = args.projector_dim  # width of the head
        self.head = nn.Sequential(
            nn.Linear(self.backbone.num_features, d, bias=False),
            nn.BatchNorm1d(d),
            nn.ReLU(),
            nn.Linear(d, 128, bias=False),
            nn.BatchNorm1d(128),
        )
        self.classes = nn.Linear(128, args.c)

        # Samples of the density begin as noise.
        if args.dataset in common.TOYS:
            shape = (2,)
        else:
            shape = (3, args.image_size, args.image_size)
        count = 0
        if args.generative_weight:
            count = 10_000
        self.register_buffer("samples", torch.randn(count, *shape))

    def forward(self, x):
        return self.head(self.backbone(x))

    def scores(self, z):
        # The temperature 0.36 gives s a standard deviation of 1.6 at the start.
        scores = self.classes(z.float()).float()  # the second: autocast may have made it bf16
        return scores / 0.36

    def log_density(self, x):
        """F (n,) of images x."""
        return self.scores(self(x)).logsumexp(1)

    def langevin_step(self, x, noise):
        """x + 0.005 grad F(x) + 0.1 noise, where 0.005 is half the noise's variance."""
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(self.log_density(x).sum(), x)
        moved = x + 0.005 * gradient + 0.1 * noise
        return moved.detach()

    def sampled_densities(self, x1, seed):
        """F of this process's images x1 (n, ...) and of as many samples of the density, each (n,).

        The samples are some of those that are stored. One in 20 of them begins anew as noise. Then
        all take 20 steps of Langevin dynamics, and are stored again for later batches. The same
        `seed` gives the same random numbers: every process draws those of all samples, and uses
        its share of them.
        """
        self.eval()  # so that F of an image does not depend on the rest of the batch
        rng = torch.Generator(x1.device).manual_seed(seed)
        total = len(x1) * common.world_size()
        own = common.own_share(total)

        def noise(count):
            return torch.randn(count, *x1.shape[1:], generator=rng, device=x1.device)

        chosen = torch.randperm(len(self.samples), generator=rng, device=x1.device)[:total]
        renewed = chosen[: total // 20]
        self.samples[renewed] = noise(len(renewed))
        x = self.samples[chosen[own]]
        for _ in range(20):
            x = self.langevin_step(x, noise(total)[own])
        (moved,) = common.gather(x)
        self.samples[chosen] = moved

        log_real = self.log_density(x1)
        log_fake = self.log_density(x)
        self.train()
        return log_real, log_fake


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
                log_real, log_fake = None, None
                if args.generative_weight:
                    # The last 1 keeps the seed apart from those of the views.
                    seed = common.generator(args.seed, epoch, run.step, 1).initial_seed()
                    log_real, log_fake = model.sampled_densities(x1, seed)

            # The loss is computed over the rows of all processes, in float32.
            s1, s2 = common.gather(model.scores(z1), model.scores(z2))
            if args.generative_weight:
                log_real, log_fake = common.gather(log_real, log_fake)
            terms = loss_fn(
                s1,
                s2,
                log_real,
                log_fake,
                prior_weight=args.prior_weight,
                beta=args.beta,
                generative_weight=args.generative_weight,
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
