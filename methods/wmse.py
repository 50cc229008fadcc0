"""W-MSE: whiten each view's embeddings over parts of the batch, then make the views agree.

    loss = mean_i ||w1_i - w2_i||² / dim                                                                        (Eq. 3)
    w = L⁻¹ (z - mean z),  L Lᵀ = Cov(z), L lower triangular                                             (Section 3.2)

z are the embeddings (`dim` wide) of one view in a part of the batch (`--part-size` images), w is their whitened form.
w1_i and w2_i belong to image i's two views. With `--distance cosine` the loss is 2 - 2 mean_i cos(w1_i, w2_i).

What prevents collapse: the covariance of w is the identity, so w fills all dimensions. With `--whitening batchnorm` all
dimensions may become copies of one, with `none` all z may become equal. With `--distance cosine` lengths are free: many
images may have one w near 0, if others have long ones. Unrelated w have loss 2, equal ones 0.

"Whitening for Self-Supervised Representation Learning", Ermolov et al., ICML 2021.
Departs from the paper: Euclidean distance (--no_norm in the authors' code), not the cosine; one split into parts
(theirs on CIFAR, too); the learning rate falls along a half cosine, not in steps. Run: python methods/wmse.py
"""

import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common

# VIEWS: for each view, changes to common.AUGMENT["strong"]. DEFAULTS: a data set's own defaults.
VIEWS = ({"scale": (0.2, 1), "jitter": (0.4, 0.4, 0.4, 0.1), "grayscale": 0.1},) * 2
DEFAULTS = {name: {"embedding_dim": 8, "part_size": 32} for name in common.TOYS} | {"shapes": {"projector_dim": 1024}}


def add_flags(parser):
    parser.set_defaults(optimizer="adam", lr=3e-3, weight_decay=1e-6, batch_size=512, projector_dim=1024)  # W-MSE's own
    parser.add_argument("--distance", choices=["euclidean", "cosine"], default="euclidean", help="of whitened views")
    parser.add_argument("--whitening", choices=["cholesky", "batchnorm", "none"], default="cholesky", help="see above")
    parser.add_argument("--embedding-dim", type=common.bounded_int(1), default=64, help="dim, at most half a part")
    parser.add_argument("--part-size", type=common.bounded_int(2), default=128, help="images that are whitened together")


# --- the method


def loss_fn(z1, z2, *, distance="euclidean", whitening="cholesky", part_size=128):
    """Eq. 3 of two views' embeddings (n, dim), float32: `loss`, `cosine`. Cholesky: parts of more than dim images."""
    part, white = min(len(z1), part_size), []
    for z in (z1, z2):
        w = z if z.device.type == "mps" else z.double()  # Cholesky in float32 can fail; mps has no float64
        w = w[: len(w) // part * part].reshape(-1, part, z.shape[1])  # (parts, part, dim); what is left over is dropped
        w = w if whitening == "none" else w - w.mean(1, keepdim=True)
        w = w / (w.var(1, keepdim=True) + 1e-5).sqrt() if whitening == "batchnorm" else w
        if whitening == "cholesky":
            cov, tiny = w.mT @ w / (part - 1), 1e3 * torch.finfo(w.dtype).eps  # cov (parts, dim, dim)
            # The diagonal shrinks a little: else a singular covariance may pass by rounding.
            lower, info = torch.linalg.cholesky_ex(cov - tiny * cov.diagonal(dim1=1, dim2=2).diag_embed())
            lower = lower.masked_fill(info.view(-1, 1, 1) > 0, torch.nan)  # NaN: end_step then stops the run
            w = torch.linalg.solve_triangular(lower, w.mT, upper=False).mT  # rows: L⁻¹ (z - mean z)
        white.append(w)
    cosine = nn.functional.cosine_similarity(*white, dim=2).mean().to(z1)
    loss = 2 - 2 * cosine if distance == "cosine" else (white[0] - white[1]).square().mean().to(z1)
    return {"loss": loss, "cosine": cosine}


class Model(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.backbone = common.build_backbone(args)
        if args.whitening == "cholesky" and min(args.part_size, args.batch_size) < 2 * args.embedding_dim:
            common.fail(f"--embedding-dim {args.embedding_dim} needs a --part-size and a --batch-size of twice that")
        d = args.projector_dim  # width of the head
        self.head = nn.Sequential(
            nn.Linear(self.backbone.num_features, d, bias=False), nn.BatchNorm1d(d), nn.ReLU(),
            nn.Linear(d, args.embedding_dim, bias=False),
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
            terms = loss_fn(z1, z2, distance=args.distance, whitening=args.whitening, part_size=args.part_size)
            optimizer.zero_grad()
            terms["loss"].backward()
            common.sum_gradients(model)  # each process has the gradient of its own rows only
            optimizer.step()
            run.end_step(terms)
        run.end_epoch(epoch, common.collapse_metrics(model, data))  # embeddings' center_norm near 1, low rank: collapse
    run.finish()


if __name__ == "__main__":
    main()
