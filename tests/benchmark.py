"""Time and memory beside the plain way of doing the same, as ratios: python tests/benchmark.py

`python tests/benchmark.py step` counts what a step of each method costs, and says what that would take on a GPU.
`python tests/benchmark.py codes` shows how CPLearn's step grows with the number of codes c.
`python tests/benchmark.py precision` shows what a network in bf16 does to each loss and its gradient.
`python tests/benchmark.py disk` reads batches from a file of images of which nothing is in memory.

CPLearn's loss and gradient, in blocks of codes against the plain formula with n × c matrices; one batch of augmented
views against torchvision's transforms image by image; expectation maximisation against scikit-learn's; and evaluation
against its forward passes. Times are medians of alternating runs in one process (evaluation: of one run); peak extra
memory is that of a process of its own above what the inputs need: its resident set (Linux), on a GPU the allocator's.
The codes are int8, as in training, so the plain formula's memory includes a float32 copy of them. For the resident set
large tensors get maps of their own (MALLOC_MMAP_THRESHOLD_), so that it is what is in use. Without that freed blocks
can stay in it: with blocks of 4096 of 131,072 codes, glibc 2.36 kept half as much as the plain formula needs.
"""

import argparse
import contextlib
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from sklearn.mixture import GaussianMixture
from torchvision.transforms import v2
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ledger
from conftest import METHODS

import analyze
import common
import evaluate

DEVICE = common.find_device(None)
cplearn = evaluate.load_method("cplearn")
ONE_MAP_EACH = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
LOSSES = {"blocks": cplearn.loss_in_blocks, "plain": cplearn.loss_fn}


def inputs(n, f, c):
    rng = torch.Generator().manual_seed(0)
    z = [math.sqrt(f) * torch.nn.functional.normalize(torch.randn(n, f, generator=rng)) for _ in range(2)]
    z = [x.to(DEVICE).requires_grad_() for x in z]
    return *z, cplearn.draw_codes("rademacher", f, c, 0).to(DEVICE), f / math.log((1 - 1e-8 * (c - 1)) / 1e-8)


def step(name, z1, z2, codes, tau):
    value = LOSSES[name](z1, z2, codes, tau=tau)["loss"]
    return value.detach(), *torch.autograd.grad(value, (z1, z2))


def seconds(function):
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def rival_times(repeats, *functions):
    """Median seconds of each function, runs alternating so that all meet the same machine."""
    for function in functions:
        function()
    times = [[seconds(function) for function in functions] for _ in range(repeats)]
    return [statistics.median(column) for column in zip(*times, strict=True)]


def peak_of(function):
    """Bytes that `function` needs at its peak, above what is in use before."""
    if DEVICE.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - before
    # The resident set, sampled: the process's high-water mark already lies above what small sizes need.
    resident = [pages()]
    done = threading.Event()

    def sample():
        while not done.wait(0.0005):
            resident.append(pages())

    thread = threading.Thread(target=sample)
    thread.start()
    function()
    done.set()
    thread.join()
    return (max(resident) - resident[0]) * resource.getpagesize()


def peak_extra(name, n, f, c):
    """Bytes above the inputs that one step of CPLearn's loss needs at its peak, or evaluation of n images with f
    features and c test images."""
    if name == "evaluation":
        return evaluation_peak(n, f, c)
    z1, z2, codes, tau = inputs(n, f, c)
    step(name, z1, z2, codes[:, :2048].contiguous(), tau)
    return peak_of(lambda: step(name, z1, z2, codes, tau))


def evaluation_peak(n, d, tests):
    """Bytes above the images that evaluation of `n` training and `tests` test images with `d` features needs."""
    rng, half = common.generator(0), torch.full((3,), 0.5, device=DEVICE)
    model = torch.nn.Module()
    model.backbone = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, d)).to(DEVICE)
    model.head = torch.nn.Linear(d, 128).to(DEVICE)
    images, test_images = (
        torch.randint(256, (k, 3, 8, 8), dtype=torch.uint8, generator=rng).to(DEVICE) for k in (n, tests)
    )
    labels, test_labels = torch.arange(n) % 100, torch.arange(tests) % 100
    data = common.Data(images, labels, test_images, test_labels, [str(i) for i in range(100)], half, half, 8)

    def run(n, tests):
        train = common.extract(model, images[:n], data, embeddings=False)["features"]
        test = common.extract(model, test_images[:tests], data)["features"]
        evaluate.linear_probe(train, labels[:n], test, test_labels[:tests], 1)
        common.knn_accuracy(train, labels[:n], test, test_labels[:tests])

    run(2000, 2000)
    return peak_of(lambda: run(n, tests))


def own_process(name, n, f, c):
    """`peak_extra` measured in a process of its own."""
    command = [sys.executable, __file__, name, str(n), str(f), str(c)]
    return int(subprocess.run(command, env=ONE_MAP_EACH, capture_output=True, text=True, check=True).stdout)


def evaluation_share():
    """Seconds of evaluate.py's figures at CIFAR-10's size (512 features, 2048 dimensions of embedding, k-means), over
    those of ResNet-18's forward passes through its 60,000 images, of which 1000 are timed."""
    rng = common.generator(0)
    net = common.build_backbone(argparse.Namespace(backbone="resnet18", width=64, dataset="cifar10", image_size=32))
    model = torch.nn.Module()
    model.backbone = net.to(DEVICE, memory_format=torch.channels_last)
    images = torch.randint(256, (1000, 3, 32, 32), dtype=torch.uint8, generator=rng).to(DEVICE)
    train, test = ({"features": torch.randn(n, 512, generator=rng).to(DEVICE)} for n in (50_000, 10_000))
    test["embedding"] = torch.randn(10_000, 2048, generator=rng).to(DEVICE)
    labels, half = torch.arange(50_000) % 10, torch.full((3,), 0.5, device=DEVICE)
    data = common.Data(images, labels, images, labels[:10_000], list("0123456789"), half, half, 32)
    common.extract(model, images[:500], data, embeddings=False)
    forward = 60 * seconds(lambda: common.extract(model, images, data, embeddings=False))
    return seconds(lambda: evaluate.evaluate(train, test, data)) / forward


def pages():
    return int(Path("/proc/self/statm").read_text().split()[1])


def codes():
    """Time and memory of CPLearn's loss and gradient as c grows, in blocks and, while it fits, by the plain formula."""
    print(f"CPLearn's loss and gradient of 64 images, {DEVICE}, {torch.get_num_threads()} threads\n")
    print(f"{'f':>6}{'c':>9}{'plain s':>9}{'blocks s':>10}{'plain MiB':>11}{'blocks MiB':>12}")
    for f in (384, 2048):
        for c in (2**14, 2**16, 2**18, 2**20):
            z1, z2, w, tau = inputs(64, f, c)
            names = ["plain", "blocks"] if 64 * c <= 2**24 else ["blocks"]
            times = dict(zip(names, rival_times(1, *(lambda n=n: step(n, z1, z2, w, tau) for n in names)), strict=True))
            memory = {n: own_process(n, 64, f, c) for n in names}
            row = [f"{times[n]:.2f}" if n in times else "-" for n in ("plain", "blocks")]
            row += [f"{memory[n] / 2**20:.0f}" if n in memory else "-" for n in ("plain", "blocks")]
            print(f"{f:>6}{c:>9}{row[0]:>9}{row[1]:>10}{row[2]:>11}{row[3]:>12}")


class Stop(Exception):
    pass


def first_gradient(method, *flags, change=lambda module: None):
    """The loss and the gradient of all parameters, as one vector, of the first step of a script's run."""
    found, folder = {}, tempfile.TemporaryDirectory()

    def stop(model):
        found["gradient"] = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double()
        raise Stop

    def keep(args, model, optimizer, data):
        run = common.Run(args, model, optimizer, data)
        run.bar = tqdm(disable=True)
        return run

    module = evaluate.load_method(method)
    change(module)
    argv = [f"methods/{method}.py", "--dataset", "shapes", "--image-size", "32", "--out", folder.name, *flags]
    loss_fn = module.loss_fn
    module.loss_fn = lambda *a, **k: found.setdefault("terms", loss_fn(*a, **k))
    with patch.object(sys, "argv", argv), patch.object(common, "sum_gradients", stop), \
         patch.object(common, "open_run", keep), contextlib.suppress(Stop):  # fmt: skip
        module.main()
    return found["terms"]["loss"].item(), found["gradient"]


def float32_head(module):
    """Takes the head out of autocast."""
    original = module.Model

    def build(args):
        model = original(args)
        forward = model.head.forward

        def without(x):
            with torch.autocast(x.device.type, enabled=False):
                return forward(x.float())

        model.head.forward = without
        return model

    module.Model = build


def precision():
    """What a network in bf16 does to each method's loss and gradient at the start of training."""
    print("First step on the drawn shapes, 32 × 32, ResNet-18 of width 16, 256 images, against float32: relative error")
    print("of the loss, and cosine of the gradient of all parameters. Network in bf16, then with its head in float32\n")
    print(f"{'method':<16}{'loss':>10}{'cosine':>9}{'loss':>12}{'cosine':>9}")
    for method in METHODS:
        flags = ["--width", "16", "--batch-size", "256", "--precision"]
        loss, gradient = first_gradient(method, *flags, "fp32")
        row = f"{method:<16}"
        for change in (lambda module: None, float32_head):
            its_loss, its_gradient = first_gradient(method, *flags, "bf16", change=change)
            cosine = torch.nn.functional.cosine_similarity(gradient, its_gradient, dim=0).item()
            row += f"{abs(its_loss - loss) / abs(loss):>10.1e}{cosine:>9.4f}  "
        print(row)


def disk(gigabytes=4):
    """Reads batches of 256 × 256 pixels in random order from a file that is not in memory, as training does."""
    n = int(gigabytes * 1e9) // (3 * 256 * 256) // 64 * 64
    with tempfile.NamedTemporaryFile(dir=".", suffix=".npy") as file:
        array = np.lib.format.open_memmap(file.name, "w+", np.uint8, (n, 3, 256, 256))
        for i in range(0, n, 64):
            array[i : i + 64] = np.random.default_rng(i).integers(256, size=(64, 3, 256, 256), dtype=np.uint8)
        array.flush()
        del array
        order = torch.randperm(n).view(-1, 64)[:40]

        def cold():
            """The images, none of them in memory. Pages that are mapped would stay, so each map is a new one."""
            with open(file.name, "rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            return torch.from_numpy(np.load(file.name, mmap_mode="c"))

        def alone(images):
            return [seconds(lambda index=index: images[index]) for index in order]

        reading = alone(cold())
        a = torch.randn(256, 256)

        def train(step):
            """A step that takes as long as reading its batch did."""
            end = time.perf_counter() + reading[step]
            while time.perf_counter() < end:
                a @ a

        def first(images):
            for step, index in enumerate(order):
                images[index]
                train(step)

        def ahead(images):
            for step, _ in enumerate(common.batches(images, order, torch.device("cpu"))):
                train(step)

        shares = [seconds(lambda way=way: way(cold())) / sum(reading) for way in (first, ahead)]
    rate = order.numel() * 3 * 256 * 256 / 1e6 / sum(reading)
    print(f"{gigabytes} GB of images, none in memory, batches of 64 in random order: {rate:.0f} MB/s")
    print(
        f"steps as long as that, time over the steps alone: {shares[0]:.2f} if each batch is read first, ",
        end="",
    )
    print(f"{shares[1]:.2f} if a thread reads ahead")


def main():
    print(f"torch {torch.__version__}, {DEVICE}, {torch.get_num_threads()} threads\n")
    print("CPLearn's loss and gradient: in blocks beside plain")
    print(f"{'(n, f, c)':>20}  {'times faster':>12}  {'memory':>24}  {'gradient differs by':>19}")
    for n, f, c in ((64, 512, 16384), (256, 384, 131072)):
        z1, z2, codes, tau = inputs(n, f, c)
        blocks, plain = (step(name, z1, z2, codes, tau) for name in LOSSES)
        error = max(((a - b).norm() / b.norm()).item() for a, b in zip(blocks, plain, strict=True))
        times = rival_times(7, *(lambda name=name: step(name, z1, z2, codes, tau) for name in LOSSES))
        memory = [own_process(name, n, f, c) / 2**20 for name in LOSSES]
        share = f"{memory[0]:.0f} MiB / {memory[1]:.0f} MiB = 1/{memory[1] / memory[0]:.1f}"
        print(f"{f'({n}, {f}, {c})':>20}  {times[1] / times[0]:>12.2f}  {share:>24}  {error:>19.0e}")

    images = common.draw_shapes(256, 32, 0)[0].to(DEVICE)
    zero, one = torch.zeros(3, device=DEVICE), torch.ones(3, device=DEVICE)
    transform = v2.Compose([
        v2.RandomResizedCrop(32, (0.08, 1), antialias=True), v2.RandomHorizontalFlip(),
        v2.ToDtype(torch.float32, scale=True), v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8),
        v2.RandomGrayscale(0.2), v2.Normalize([0.0] * 3, [1.0] * 3),
    ])  # fmt: skip
    rng = common.generator(0)

    def batched():
        return common.augment(images, common.draw_augmentation(256, common.AUGMENT["strong"], 32, rng), zero, one)

    times = rival_times(5, batched, lambda: torch.stack([transform(image) for image in images]))
    print(f"\nstrong augmentation of 256 images of 32 × 32, batched: {times[1] / times[0]:.1f} times faster")

    x = torch.randn(5000, 256, generator=rng)
    start = torch.full((200,), 1 / 200), x[:200], torch.ones(200, 256)
    judge = GaussianMixture(200, covariance_type="diag", tol=0, max_iter=10,
                            weights_init=[1 / 200] * 200, means_init=start[1], precisions_init=start[2])  # fmt: skip
    on_device = x.to(DEVICE), tuple(part.to(DEVICE) for part in start)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ten steps are not meant to converge
        times = rival_times(3, lambda: analyze.fit_mixture(on_device[0], 200, 10, -math.inf, start=on_device[1]),
                            lambda: judge.fit(x.numpy()))  # fmt: skip
    print(f"\nten steps of a mixture of 200 Gaussians: {times[1] / times[0]:.1f} times faster than scikit-learn")
    n, d, tests = 64_000, 2048, 2500
    share = own_process("evaluation", n, d, tests) / (4 * d * (n + tests))
    print(
        f"\nevaluation of {n} + {tests} images with {d} features: {share:.2f} of what the features take, 4 bytes each"
    )
    print(f"\nevaluate.py on CIFAR-10 beyond ResNet-18's forward passes: {evaluation_share():.2f} of their time")


if __name__ == "__main__":
    if len(sys.argv) > 2:
        print(peak_extra(sys.argv[1], *map(int, sys.argv[2:])))
    else:
        {"step": ledger.report, "codes": codes, "precision": precision, "disk": disk}.get("".join(sys.argv[1:]), main)()
