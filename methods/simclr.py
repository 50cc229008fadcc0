"""SimCLR: find each image's other view among all other views of the batch.

    loss = -mean_i log( exp(sim(z_i, z_j(i)) / temperature) / Σ_{k≠i} exp(sim(z_i, z_k) / temperature) )        (Eq. 1)

z_i are the embeddings of the 2n views of n images, j(i) is the other view of view i's image, and sim is the cosine. The
loss is `alignment`, the numerator's part, plus `uniformity`, the denominator's.

What prevents collapse: the denominator grows when z_i comes close to other images, so images push each other apart. If
all z are equal, the loss is log(2n - 1). At a high `--temperature` near images are pushed hardly more than far ones.

"A Simple Framework for Contrastive Learning of Visual Representations", Chen et al., ICML 2020.
Departs from the paper: Adam, batches of 512 (not LARS, 4096); half the loss of its code. Run: python methods/simclr.py
"""

import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common

# VIEWS: for each view, changes to common.AUGMENT["strong"]. DEFAULTS: a data set's own defaults.
VIEWS = ({"jitter": (0.4, 0.4, 0.4, 0.1), "blur": 0.5},) * 2
DEFAULTS = {}


def add_flags(parser):
    parser.set_defaults(optimizer="adam", lr=3e-3, weight_decay=1e-6, batch_size=512)  # as in W-MSE's code, for SimCLR
    parser.add_argument("--temperature", type=common.bounded_float(0.001), default=0.5, help="the paper's best for CIFAR-10")


# --- the method


def loss_fn(z1, z2, *, temperature=0.5):
    """Eq. 1 of two views' embeddings (n, d), float32: scalars `loss`, `alignment` and `uniformity`."""
    z = nn.functional.normalize(torch.cat([z1, z2]), dim=1)
    similarity = z @ z.T / temperature  # (2n, 2n)
    alignment = -similarity.diagonal(len(z1)).mean()  # (i, i + n), with n = len(z1): image i's two views
    uniformity = similarity.fill_diagonal_(-torch.inf).logsumexp(1).mean()  # exp(-inf) = 0: without k = i
    return {"loss": alignment + uniformity, "alignment": alignment, "uniformity": uniformity}


class Model(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.backbone = common.build_backbone(args)
        d = args.projector_dim  # width of the head
        self.head = nn.Sequential(
            nn.Linear(self.backbone.num_features, d, bias=False), nn.BatchNorm1d(d), nn.ReLU(),
            nn.Linear(d, 128, bias=False), nn.BatchNorm1d(128),
        )  # fmt: skip

    def forward(self, x):
        return self.head(self.backbone(x))


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
            terms = loss_fn(z1, z2, temperature=args.temperature)
            optimizer.zero_grad()
            terms["loss"].backward()
            common.sum_gradients(model)  # each process has the gradient of its own rows only
            optimizer.step()
            run.end_step(terms)
        run.end_epoch(epoch, common.collapse_metrics(model, data))  # embeddings' center_norm near 1, low rank: collapse
    run.finish()


if __name__ == "__main__":
    main()
