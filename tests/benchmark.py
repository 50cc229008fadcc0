"""Time and memory beside the plain way of doing the same, as ratios: python tests/benchmark.py

CPLearn's loss and gradient, in blocks of codes against the plain formula with n × c matrices; one batch of augmented
views against torchvision's transforms image by image; expectation maximisation against scikit-learn's; and evaluation
against its forward passes. Times are medians of alternating runs in one process (evaluation: of one run); peak extra
memory is that of a process of its own above what the inputs need: its resident set (Linux), on a GPU the allocator's.
The codes are int8, as in training, so the plain formula's memory includes a float32 copy of them. For the resident set
large tensors get maps of their own (MALLOC_MMAP_THRESHOLD_), so that it is what is in use. Without that freed blocks
can stay in it: with blocks of 4096 of 131,072 codes, glibc 2.36 kept half as much as the plain formula needs.
"""

import argparse
import math
import os
import resource
import statistics
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import torch
from sklearn.mixture import GaussianMixture
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
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


def peak_extra(name, n, f, c):
    """Bytes above the inputs that one step needs at its peak, measured in this process."""
    z1, z2, codes, tau = inputs(n, f, c)
    step(name, z1, z2, codes[:, :2048].contiguous(), tau)
    if DEVICE.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(name, z1, z2, codes, tau)
        return torch.cuda.max_memory_allocated() - before
    # The resident set, sampled: the process's high-water mark already lies above what small sizes need.
    resident = [pages()]
    done = threading.Event()

    def sample():
        while not done.wait(0.0005):
            resident.append(pages())

    thread = threading.Thread(target=sample)
    thread.start()
    step(name, z1, z2, codes, tau)
    done.set()
    thread.join()
    return (max(resident) - resident[0]) * resource.getpagesize()


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


def main():
    print(f"torch {torch.__version__}, {DEVICE}, {torch.get_num_threads()} threads\n")
    print("CPLearn's loss and gradient: in blocks beside plain")
    print(f"{'(n, f, c)':>20}  {'times faster':>12}  {'memory':>24}  {'gradient differs by':>19}")
    for n, f, c in ((64, 512, 16384), (256, 384, 131072)):
        z1, z2, codes, tau = inputs(n, f, c)
        blocks, plain = (step(name, z1, z2, codes, tau) for name in LOSSES)
        error = max(((a - b).norm() / b.norm()).item() for a, b in zip(blocks, plain, strict=True))
        times = rival_times(7, *(lambda name=name: step(name, z1, z2, codes, tau) for name in LOSSES))
        memory = []
        for name in LOSSES:
            command = [sys.executable, __file__, name, str(n), str(f), str(c)]
            done = subprocess.run(command, env=ONE_MAP_EACH, capture_output=True, text=True, check=True)
            memory.append(int(done.stdout) / 2**20)
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
    print(f"\nevaluate.py on CIFAR-10 beyond ResNet-18's forward passes: {evaluation_share():.2f} of their time")


if __name__ == "__main__":
    if sys.argv[1:]:
        print(peak_extra(sys.argv[1], *map(int, sys.argv[2:])))
    else:
        main()
