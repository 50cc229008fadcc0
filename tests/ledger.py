"""What a step of each method costs: python tests/benchmark.py step

Counted with fake tensors, for each method's default settings on CIFAR-10: the arithmetic of products and convolutions,
the bytes (each operation reads its inputs and writes its outputs once) and the kernels. From these follows what a GPU
would need at its published peaks: an operation takes as long as its arithmetic or its bytes, whichever takes longer,
and a step at least 5 µs for each kernel, because the host cannot launch them faster. Left out: that no kernel reaches
the peak, that caches hold what was just written, that batch norm reads its input twice, and the time between epochs. So
a real run is slower, by a factor that only a GPU can tell.
"""

import argparse
import statistics
import time
from collections import Counter
from unittest.mock import patch

import torch
from conftest import METHODS
from rehearsal import rehearse
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import flop_registry
from torchvision.transforms import v2

import common
import evaluate

# Dense peaks, operations a second, in bf16, in float32 (as TF32) and in float64, and bytes of memory a second: NVIDIA's
# data sheets for the SXM modules with 80 GB.
GPUS = {
    "H100": ({torch.bfloat16: 989e12, torch.float32: 494e12, torch.float64: 67e12}, 3.35e12),
    "A100": ({torch.bfloat16: 312e12, torch.float32: 156e12, torch.float64: 19.5e12}, 2.04e12),
}
LAUNCH = 5e-6  # seconds


class Ledger(TorchDispatchMode):
    """Adds up arithmetic, bytes, kernels and a GPU's seconds of all operations."""

    def __init__(self):
        super().__init__()
        self.clear()

    def clear(self):
        self.flops, self.bytes, self.kernels, self.seconds = 0, 0, 0, Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        inputs, outputs = ([x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)] for tree in (args, out))
        if function.is_view or function.namespace != "aten" or not outputs or "empty" in function.name():
            return out
        moved = sum(x.numel() * x.element_size() for x in inputs + outputs)
        count = flop_registry.get(function.overloadpacket)
        flops = count(*args, **(kwargs or {}), out_val=out) if count else 0
        self.flops += flops
        self.bytes += moved
        self.kernels += 1
        for gpu, (peaks, bandwidth) in GPUS.items():
            self.seconds[gpu] += max(moved / bandwidth, flops / peaks[(inputs + outputs)[0].dtype] if flops else 0)
        return out


def count_step(method, *flags):
    """The ledger of the second step of a run, because the first also allocates the optimizer's state. Optimizers update
    all parameters at once, as they do on a GPU."""
    ledger, adam, sgd = Ledger(), torch.optim.Adam, torch.optim.SGD
    with (
        patch.object(torch.optim, "Adam", lambda *args, fused: adam(*args, fused=True)),
        patch.object(torch.optim, "SGD", lambda *args, momentum: sgd(*args, momentum=momentum, foreach=True)),
    ):
        rehearse(
            method, *flags, device="cpu", watch=lambda: ledger, after_step=lambda step: step == 1 and ledger.clear()
        )
    return ledger


def default_batch_size(method):
    parser = common.Parser()
    common.add_shared_flags(parser)
    evaluate.load_method(method).add_flags(parser)
    return parser.get_default("batch_size")


def projection(ledger, gpu):
    return max(ledger.seconds[gpu], ledger.kernels * LAUNCH)


# What grows, and what a step then takes: method, and flags that are compared with its default settings and batches of
# 256, because with smaller ones an H100 only waits for kernels to be launched.
GROWTH = {
    "barlow_twins": ("--batch-size 1024", "--projector-dim 8192", "--image-size 64", "--backbone resnet50"),
    "cplearn": ("--c 512", "--c 1048576"),
}


class Plain(Dataset):
    """Two views of each image as most public training loops make them: with PIL, one image at a time."""

    def __init__(self, images):
        self.images = [v2.functional.to_pil_image(image) for image in images]
        self.transform = v2.Compose([
            v2.RandomResizedCrop(32, (0.08, 1)), v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8), v2.RandomGrayscale(0.2),
            v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.25] * 3),
        ])  # fmt: skip

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.transform(self.images[i]), self.transform(self.images[i])


def training_rates(backbone, width, batch=128, steps=4, repeats=3):
    """Images a second of Barlow Twins: our loop, the plain loop, and our network on views that are there. Medians of
    alternating runs."""
    barlow, device = evaluate.load_method("barlow_twins"), common.find_device(None)
    args = argparse.Namespace(
        dataset="shapes", image_size=32, batch_size=batch, seed=0, augment="strong", backbone=backbone, width=width,
        projector_dim=256, optimizer="adam", lr=1e-3, weight_decay=0,
    )  # fmt: skip
    data = common.load_data(args, device)
    loader = DataLoader(Plain(data.images[: batch * steps].cpu()), batch, shuffle=True, num_workers=2)
    ours, plain = common.to_device(barlow.Model(args), device), barlow.Model(args).to(device)
    optimizers = {model: common.build_optimizer(model, args) for model in (ours, plain)}

    def rate(model, pairs):
        began = time.perf_counter()
        for _, (x1, x2) in zip(range(steps), pairs, strict=False):
            terms = barlow.loss_fn(model(x1.to(device)), model(x2.to(device)))
            optimizers[model].zero_grad()
            terms["loss"].backward()
            optimizers[model].step()
        terms["loss"].item()
        return batch * steps / (time.perf_counter() - began)

    there = [next(common.two_views(data, args, barlow.VIEWS, 0))] * steps
    runs = [
        (rate(ours, common.two_views(data, args, barlow.VIEWS, 0)), rate(plain, loader), rate(ours, there))
        for _ in range(1 + repeats)
    ]
    return [statistics.median(column) for column in zip(*runs[1:], strict=True)]


def product_peak(size=2048, repeats=5):
    """Operations a second that this machine reaches in a float32 product of two size × size matrices. Convolutions come
    from another library, and can be faster."""
    a, b = torch.randn(2, size, size, device=common.find_device(None))
    times = []
    for _ in range(1 + repeats):
        began = time.perf_counter()
        (a @ b).sum().item()
        times.append(time.perf_counter() - began)
    return 2 * size**3 / min(times[1:])


def report():
    print(
        "A step with the default settings on CIFAR-10, counted; milliseconds, share of the peak in bf16 and minutes are"
    )
    print("projected, not measured. The share is arithmetic over what the peak could do in the projected time.\n")
    print(f"{'method':<14}{'batch':>6}{'Gflop':>8}{'GB':>6}{'kernels':>9}", end="")
    for gpu in GPUS:
        print(f"  {gpu:>5} ms{'share':>7}{'200 ep':>8}{'1000 ep':>9}", end="")
    print()
    for method in METHODS:
        batch, ledger = default_batch_size(method), count_step(method)
        flops = ledger.flops
        print(f"{method:<14}{batch:>6}{flops / 1e9:>8.0f}{ledger.bytes / 1e9:>6.1f}{ledger.kernels:>9}", end="")
        for gpu, (peaks, _) in GPUS.items():
            seconds = projection(ledger, gpu)
            minutes = seconds * (50_000 // batch) * 200 / 60
            share = flops / seconds / peaks[torch.bfloat16]
            print(f"  {1e3 * seconds:>8.1f}{share:>7.0%}{minutes:>8.0f}{5 * minutes:>9.0f}", end="")
        print()

    print("\nProjected time of a step on an H100 over that with the default settings and batches of 256:")
    for method, changes in GROWTH.items():
        usual, *grown = (
            projection(count_step(method, "--batch-size", "256", *flags.split()), "H100") for flags in ("", *changes)
        )
        for flags, seconds in zip(changes, grown, strict=True):
            print(f"  {method} {flags}: {seconds / usual:.2f}")
    print(
        f"\nThis machine, {common.find_device(None)}, {torch.get_num_threads()} threads, Barlow Twins, 32 × 32 pixels:"
    )
    peak = product_peak()
    for backbone, width in (("resnet18", 16), ("resnet8", 32)):
        ours, plain, network = training_rates(backbone, width)
        flags = ["--backbone", backbone, "--width", str(width), "--batch-size", "128", "--projector-dim", "256"]
        flops = count_step("barlow_twins", *flags, "--precision", "fp32").flops / 128
        with_data, without = flops * ours / peak, flops * network / peak
        print(f"  {backbone}, width {width}: {with_data:.0%} of the rate of float32 products, without data", end="")
        print(f" {without:.0%}; {ours / plain:.1f} times as fast as the plain loop")
