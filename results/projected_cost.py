"""What a step of each method costs, and what it would take on a GPU at its published peaks.

    python results/projected_cost.py

Counted with fake tensors, for each method's default settings on CIFAR-10: the arithmetic of
products and convolutions, the bytes (each operation reads its inputs and writes its outputs once)
and the kernels. From these follows what a GPU would need: an operation takes as long as its
arithmetic or its bytes, whichever takes longer, and a step at least 5 microseconds for each
kernel, because the host cannot launch them faster. Left out is that no kernel reaches the peak,
that caches hold what was just written, that batch norm reads its input twice, and the time between
epochs. So a real run is slower, by a factor that only a GPU can tell.

At the end stands how fast Barlow Twins trains on this machine, measured.
"""

import argparse
import contextlib
import io
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import flop_registry
from torchvision.transforms import v2

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import fake_gpu  # noqa: E402

import common  # noqa: E402
import evaluate  # noqa: E402

METHODS = sorted(path.stem for path in (ROOT / "methods").glob("*.py"))

# Dense peaks, operations a second, in bf16, in float32 (as TF32) and in float64, and bytes of
# memory a second: NVIDIA's data sheets for the SXM modules with 80 GB.
PEAKS = {
    "H100": {torch.bfloat16: 989e12, torch.float32: 494e12, torch.float64: 67e12},
    "A100": {torch.bfloat16: 312e12, torch.float32: 156e12, torch.float64: 19.5e12},
}
BANDWIDTH = {"H100": 3.35e12, "A100": 2.04e12}
LAUNCH = 5e-6  # seconds for each kernel

# What grows, and what a step then takes: method, and flags that are compared with its default
# settings and batches of 256, because with smaller ones an H100 only waits for launches.
GROWTH = {
    "barlow_twins": (
        "--batch-size 1024",
        "--projector-dim 8192",
        "--image-size 64",
        "--backbone resnet50",
    ),
    "cplearn": (
        "--codes rademacher",
        "--c 1048576",
        "--c 1048576 --codes rademacher",
        "--projector-dim 2048",
        "--projector-dim 2048 --c 1048576",
    ),
}

# --- counting


class Cost(TorchDispatchMode):
    """Adds up arithmetic, bytes, kernels and each GPU's seconds of all operations."""

    def __init__(self):
        super().__init__()
        self.clear()

    def clear(self):
        self.flops = 0
        self.bytes = 0
        self.kernels = 0
        self.seconds = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        inputs = [x for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
        outputs = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        free = function.is_view or function.namespace != "aten" or "empty" in function.name()
        if free or not outputs:
            return out

        tensors = inputs + outputs
        moved = sum(x.numel() * x.element_size() for x in tensors)
        flops = 0
        if function.overloadpacket in flop_registry:
            flops = flop_registry[function.overloadpacket](*args, **kwargs, out_val=out)
        self.flops += flops
        self.bytes += moved
        self.kernels += 1
        for gpu, peaks in PEAKS.items():
            seconds = moved / BANDWIDTH[gpu]
            if flops:
                seconds = max(seconds, flops / peaks[tensors[0].dtype])
            self.seconds[gpu] += seconds
        return out

    def step_seconds(self, gpu):
        return max(self.seconds[gpu], self.kernels * LAUNCH)


def load_for_gpu(name, load=evaluate.load_method):
    """A method's module, which walks over codes as on a GPU."""
    module = load(name)
    if name == "cplearn":
        module.BLOCK["cpu"] = module.BLOCK["cuda"]
    return module


def count_step(method, *flags):
    """The cost of the second step of a run, because the first also allocates the optimizer's
    state. Optimizers update all parameters at once, as they do on a GPU."""
    cost = Cost()
    adam = torch.optim.Adam
    sgd = torch.optim.SGD

    def fused_adam(*args, fused):
        return adam(*args, fused=True)

    def foreach_sgd(*args, momentum):
        return sgd(*args, momentum=momentum, foreach=True)

    def after_step(step):
        if step == 1:
            cost.clear()

    with (
        patch.object(torch.optim, "Adam", fused_adam),
        patch.object(torch.optim, "SGD", foreach_sgd),
        patch.object(evaluate, "load_method", load_for_gpu),
        contextlib.redirect_stdout(io.StringIO()),  # what a run says of its data
    ):
        fake_gpu.two_steps(method, *flags, device="cpu", watch=lambda: cost, after_step=after_step)
    return cost


def default_batch_size(method):
    parser = common.Parser()
    common.add_shared_flags(parser)
    evaluate.load_method(method).add_flags(parser)
    return parser.get_default("batch_size")


# --- this machine


class Plain(Dataset):
    """Two views of each image as most public training loops make them: with PIL, one image at a
    time."""

    def __init__(self, images):
        self.images = [v2.functional.to_pil_image(image) for image in images]
        self.transform = v2.Compose(
            [
                v2.RandomResizedCrop(32, (0.08, 1)),
                v2.RandomHorizontalFlip(),
                v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8),
                v2.RandomGrayscale(0.2),
                v2.PILToTensor(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize([0.5] * 3, [0.25] * 3),
            ]
        )

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.transform(self.images[i]), self.transform(self.images[i])


def training_rates(backbone, width, batch=128, steps=4, repeats=3):
    """Images a second of Barlow Twins: our loop, the plain loop, and our network on views that are
    there. Medians of alternating runs."""
    barlow_twins = evaluate.load_method("barlow_twins")
    device = common.find_device(None)
    args = argparse.Namespace(
        dataset="shapes",
        image_size=32,
        batch_size=batch,
        seed=0,
        augment="strong",
        backbone=backbone,
        width=width,
        projector_dim=256,
        optimizer="adam",
        lr=1e-3,
        weight_decay=0,
        clip_norm=0.0,
    )
    data = common.load_data(args, device)
    images = Plain(data.images[: batch * steps].cpu())
    loader = DataLoader(images, batch, shuffle=True, num_workers=2)
    our_model = common.to_device(barlow_twins.Model(args), device)
    our_optimizer = common.build_optimizer(our_model, args)
    plain_model = barlow_twins.Model(args).to(device)
    plain_optimizer = common.build_optimizer(plain_model, args)

    def rate(model, optimizer, pairs):
        began = time.perf_counter()
        for _, (x1, x2) in zip(range(steps), pairs, strict=False):
            terms = barlow_twins.loss_fn(model(x1.to(device)), model(x2.to(device)))
            optimizer.zero_grad()
            terms["loss"].backward()
            optimizer.step()
        terms["loss"].item()
        return batch * steps / (time.perf_counter() - began)

    def views():
        return common.two_views(data, args, barlow_twins.VIEWS, 0)

    there = [next(views())] * steps
    rates = []
    for _ in range(1 + repeats):
        ours = rate(our_model, our_optimizer, views())
        plain = rate(plain_model, plain_optimizer, loader)
        without_data = rate(our_model, our_optimizer, there)
        rates.append((ours, plain, without_data))
    return [statistics.median(column) for column in zip(*rates[1:], strict=True)]


def product_peak(size=2048, repeats=5):
    """Operations a second that this machine reaches in a float32 product of two size x size
    matrices. Convolutions come from another library, and can be faster."""
    a, b = torch.randn(2, size, size, device=common.find_device(None))
    times = []
    for _ in range(1 + repeats):
        began = time.perf_counter()
        (a @ b).sum().item()
        times.append(time.perf_counter() - began)
    return 2 * size**3 / min(times[1:])


# --- the tables


def report_methods():
    print("A step with the default settings on CIFAR-10, counted. Milliseconds, share of the peak")
    print("in bf16 and minutes are projected, not measured. The share is the arithmetic over what")
    print("the peak could do in the projected time.\n")
    head = f"{'method':<16}{'batch':>6}{'Gflop':>8}{'GB':>6}{'kernels':>9}"
    for gpu in PEAKS:
        head += f"  {gpu:>5} ms{'share':>7}{'200 ep':>8}{'1000 ep':>9}"
    print(head)
    for method in METHODS:
        batch = default_batch_size(method)
        cost = count_step(method)
        line = f"{method:<16}{batch:>6}{cost.flops / 1e9:>8.0f}"
        line += f"{cost.bytes / 1e9:>6.1f}{cost.kernels:>9}"
        for gpu, peaks in PEAKS.items():
            seconds = cost.step_seconds(gpu)
            share = cost.flops / seconds / peaks[torch.bfloat16]
            minutes = seconds * (50_000 // batch) * 200 / 60
            line += f"  {1e3 * seconds:>8.1f}{share:>7.0%}{minutes:>8.0f}{5 * minutes:>9.0f}"
        print(line)


def report_growth():
    print("\nProjected time of a step on an H100 over that with the default settings and batches")
    print("of 256:")
    for method, changes in GROWTH.items():
        usual = count_step(method, "--batch-size", "256").step_seconds("H100")
        for flags in changes:
            grown = count_step(method, "--batch-size", "256", *flags.split()).step_seconds("H100")
            print(f"  {method} {flags}: {grown / usual:.2f}")


def report_machine():
    print(f"\nThis machine, {common.find_device(None)}, {torch.get_num_threads()} threads", end="")
    print(", Barlow Twins, 32 x 32 pixels:")
    peak = product_peak()
    for backbone, width in (("resnet18", 16), ("resnet8", 32)):
        ours, plain, network = training_rates(backbone, width)
        flags = ["--backbone", backbone, "--width", str(width), "--batch-size", "128"]
        flags += ["--projector-dim", "256", "--precision", "fp32"]
        flops = count_step("barlow_twins", *flags).flops / 128
        print(f"  {backbone}, width {width}: {flops * ours / peak:.0%} of the rate of ", end="")
        print(f"float32 products, without data {flops * network / peak:.0%}; ", end="")
        print(f"{ours / plain:.1f} times as fast as the plain loop")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    report_methods()
    report_growth()
    report_machine()


if __name__ == "__main__":
    main()
