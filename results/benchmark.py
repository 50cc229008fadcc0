"""Time and memory beside the plain way of doing the same, as ratios.

    python results/benchmark.py              CPLearn's loss, augmentation, a mixture, evaluation
    python results/benchmark.py codes        how CPLearn's step grows with the number of codes c
    python results/benchmark.py precision    what a network in bf16 does to each loss and gradient
    python results/benchmark.py disk         batches from a file of images that is not in memory

Without a word it compares: CPLearn's loss and gradient, in blocks of codes against the plain
formula with n x c matrices; one batch of augmented views against torchvision's transforms image by
image; expectation maximisation against scikit-learn's; and evaluation against its forward passes.

Times are medians of alternating runs in one process (evaluation: of one run). Peak extra memory is
that of a process of its own above what the inputs need: its resident set (Linux), on a GPU the
allocator's. The codes are int8, as in training, so the plain formula's memory includes a float32
copy of them. For the resident set large tensors get maps of their own (MALLOC_MMAP_THRESHOLD_), so
that it is what is in use. Without that, freed blocks can stay in it: with blocks of 4096 of 131,072
codes, glibc 2.36 kept half as much as the plain formula needs.
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
from torch import nn
from torchvision.transforms import v2
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import analyze  # noqa: E402
import common  # noqa: E402
import evaluate  # noqa: E402

DEVICE = common.find_device(None)
METHODS = sorted(path.stem for path in (ROOT / "methods").glob("*.py"))
cplearn = evaluate.load_method("cplearn")

# --- time


def seconds(function):
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def rival_times(repeats, *functions):
    """The median seconds of each function. Their runs alternate, so that all meet the same
    machine."""
    for function in functions:
        function()
    times = []
    for _ in range(repeats):
        times.append([seconds(function) for function in functions])
    return [statistics.median(column) for column in zip(*times, strict=True)]


# --- memory


def resident_pages():
    return int(Path("/proc/self/statm").read_text().split()[1])


def peak_of(function):
    """Bytes that `function` needs at its peak, above what is in use before."""
    if DEVICE.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - before

    # Samples of the resident set, because the process's own high-water mark already lies above
    # what small sizes need.
    samples = [resident_pages()]
    done = threading.Event()

    def sample():
        while not done.wait(0.0005):
            samples.append(resident_pages())

    thread = threading.Thread(target=sample)
    thread.start()
    function()
    done.set()
    thread.join()
    return (max(samples) - samples[0]) * resource.getpagesize()


def peak_in_own_process(name, n, f, c):
    """The peak in bytes of `loss_peak` or, for the name "evaluation", of `evaluation_peak`, in a
    process of its own."""
    command = [sys.executable, __file__, "peak", name, str(n), str(f), str(c)]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout)


def loss_peak(name, n, f, c):
    """Bytes above the inputs that one step of CPLearn's loss needs at its peak."""
    loss_and_gradient(name, *loss_inputs(name, n, f, 4096))  # what the first call allocates, once
    inputs = loss_inputs(name, n, f, c)
    return peak_of(lambda: loss_and_gradient(name, *inputs))


def evaluation_peak(n, d, tests):
    """Bytes above the images that the evaluation of `n` training and `tests` test images with `d`
    features needs at its peak."""
    model = nn.Module()
    model.backbone = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, d)).to(DEVICE)
    model.head = nn.Linear(d, 128).to(DEVICE)

    rng = common.generator(0)
    images = torch.randint(256, (n, 3, 8, 8), dtype=torch.uint8, generator=rng).to(DEVICE)
    test_images = torch.randint(256, (tests, 3, 8, 8), dtype=torch.uint8, generator=rng).to(DEVICE)
    labels = torch.arange(n) % 100
    test_labels = torch.arange(tests) % 100
    classes = [str(i) for i in range(100)]
    half = torch.full((3,), 0.5, device=DEVICE)
    data = common.Data(images, labels, test_images, test_labels, classes, half, half, 8)

    def run(n, tests):
        train = common.extract(model, images[:n], data, embeddings=False)["features"]
        test = common.extract(model, test_images[:tests], data)["features"]
        evaluate.linear_probe(train, labels[:n], test, test_labels[:tests], 1)
        common.knn_accuracy(train, labels[:n], test, test_labels[:tests])

    run(2000, 2000)  # what the first call allocates, once
    return peak_of(lambda: run(n, tests))


# --- comparisons


def loss_inputs(name, n, f, c):
    """What CPLearn's loss gets: embeddings of two views (n, f), codes, their number c, and tau.

    `name` is "plain", "blocks" (the same codes a block at a time), "fast" (Hadamard rows, by the
    fast transform) or "fast blocks".
    """
    rng = torch.Generator().manual_seed(0)
    views = []
    for _ in range(2):
        z = math.sqrt(f) * nn.functional.normalize(torch.randn(n, f, generator=rng))
        views.append(z.to(DEVICE).requires_grad_())
    kind = "hadamard" if "fast" in name else "rademacher"
    codes = cplearn.draw_codes(kind, f, c, 0).to(DEVICE)

    return *views, codes, c, math.sqrt(f) / 1.63


def product(z, codes, first, last):
    return z @ codes[:, first:last].to(z)


def loss_and_gradient(name, z1, z2, codes, c, tau):
    scores = cplearn.hadamard_scores if "fast" in name else product
    if "blocks" in name:
        loss = cplearn.loss_in_blocks(z1, z2, codes, scores, c, tau=tau)["loss"]
    else:
        s1, s2 = scores(z1, codes, 0, c), scores(z2, codes, 0, c)
        loss = cplearn.loss_fn(s1, s2, tau=tau)["loss"]
    return loss.detach(), *torch.autograd.grad(loss, (z1, z2))


def compare_losses():
    print("CPLearn's loss and gradient: in blocks beside plain")
    head = f"{'(n, f, c)':>20}  {'times faster':>12}  {'memory':>24}  {'gradient differs by':>19}"
    print(head)
    for n, f, c in ((64, 512, 16384), (256, 384, 131072)):
        inputs = loss_inputs("plain", n, f, c)

        def blocks(inputs=inputs):
            return loss_and_gradient("blocks", *inputs)

        def plain(inputs=inputs):
            return loss_and_gradient("plain", *inputs)

        errors = []
        for a, b in zip(blocks(), plain(), strict=True):
            errors.append(((a - b).norm() / b.norm()).item())
        blocks_time, plain_time = rival_times(7, blocks, plain)
        blocks_memory = peak_in_own_process("blocks", n, f, c) / 2**20
        plain_memory = peak_in_own_process("plain", n, f, c) / 2**20
        less = plain_memory / blocks_memory
        memory = f"{blocks_memory:.0f} MiB / {plain_memory:.0f} MiB = 1/{less:.1f}"
        times = plain_time / blocks_time
        print(f"{f'({n}, {f}, {c})':>20}  {times:>12.2f}  {memory:>24}  {max(errors):>19.0e}")

    print("CPLearn's loss and gradient: the fast transform beside the matrix product")
    print(f"{'(n, f, c)':>20}  {'times faster':>12}  {'memory':>24}")
    for n, f, c in ((256, 128, 16384), (256, 512, 16384), (256, 2048, 16384)):
        dense = loss_inputs("plain", n, f, c)
        fast = loss_inputs("fast", n, f, c)

        def by_product(inputs=dense):
            return loss_and_gradient("plain", *inputs)

        def by_transform(inputs=fast):
            return loss_and_gradient("fast", *inputs)

        fast_time, dense_time = rival_times(7, by_transform, by_product)
        fast_memory = peak_in_own_process("fast", n, f, c) / 2**20
        dense_memory = peak_in_own_process("plain", n, f, c) / 2**20
        memory = f"{fast_memory:.0f} MiB / {dense_memory:.0f} MiB"
        print(f"{f'({n}, {f}, {c})':>20}  {dense_time / fast_time:>12.2f}  {memory:>24}")


def compare_augmentation():
    images = common.draw_shapes(256, 32, 0)[0].to(DEVICE)
    zero = torch.zeros(3, device=DEVICE)
    one = torch.ones(3, device=DEVICE)
    rng = common.generator(0)
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(32, (0.08, 1), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8),
            v2.RandomGrayscale(0.2),
            v2.Normalize([0.0] * 3, [1.0] * 3),
        ]
    )

    def batched():
        parameters = common.draw_augmentation(256, common.AUGMENT["strong"], 32, rng)
        return common.augment(images, parameters, zero, one)

    def one_by_one():
        return torch.stack([transform(image) for image in images])

    batched_time, single_time = rival_times(5, batched, one_by_one)
    times = single_time / batched_time
    print(f"\nstrong augmentation of 256 images of 32 x 32, batched: {times:.1f} times faster")


def compare_mixtures():
    x = torch.randn(5000, 256, generator=common.generator(0))
    weights = torch.full((200,), 1 / 200)
    means = x[:200]
    variances = torch.ones(200, 256)
    judge = GaussianMixture(
        200,
        covariance_type="diag",
        tol=0,
        max_iter=10,
        weights_init=[1 / 200] * 200,
        means_init=means,
        precisions_init=variances,
    )
    points = x.to(DEVICE)
    start = weights.to(DEVICE), means.to(DEVICE), variances.to(DEVICE)

    def ours():
        return analyze.fit_mixture(points, 200, 10, -math.inf, start=start)

    def scikit_learn():
        return judge.fit(x.numpy())

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ten steps are not meant to converge
        our_time, its_time = rival_times(3, ours, scikit_learn)
    times = its_time / our_time
    print(f"\nten steps of a mixture of 200 Gaussians: {times:.1f} times faster than scikit-learn")


def compare_evaluation():
    n, d, tests = 64_000, 2048, 2500
    share = peak_in_own_process("evaluation", n, d, tests) / (4 * d * (n + tests))
    print(f"\nevaluation of {n} + {tests} images with {d} features: ", end="")
    print(f"{share:.2f} of what the features take, 4 bytes each")
    share = evaluation_share()
    print(f"\nevaluate.py on CIFAR-10 beyond ResNet-18's forward passes: {share:.2f} of their time")


def evaluation_share():
    """Seconds of evaluate.py's figures at CIFAR-10's size (512 features, 2048 dimensions of
    embedding, k-means), over those of ResNet-18's forward passes through its 60,000 images, of
    which 1000 are timed."""
    rng = common.generator(0)
    size = argparse.Namespace(backbone="resnet18", width=64, dataset="cifar10", image_size=32)
    model = nn.Module()
    backbone = common.build_backbone(size)
    model.backbone = backbone.to(DEVICE, memory_format=torch.channels_last)
    images = torch.randint(256, (1000, 3, 32, 32), dtype=torch.uint8, generator=rng).to(DEVICE)
    train = {"features": torch.randn(50_000, 512, generator=rng).to(DEVICE)}
    test = {"features": torch.randn(10_000, 512, generator=rng).to(DEVICE)}
    test["embedding"] = torch.randn(10_000, 2048, generator=rng).to(DEVICE)
    labels = torch.arange(50_000) % 10
    half = torch.full((3,), 0.5, device=DEVICE)
    classes = list("0123456789")
    data = common.Data(images, labels, images, labels[:10_000], classes, half, half, 32)

    def extract(images):
        common.extract(model, images, data, embeddings=False)

    extract(images[:500])
    forward = 60 * seconds(lambda: extract(images))
    return seconds(lambda: evaluate.evaluate(train, test, data)) / forward


def compare():
    print(f"torch {torch.__version__}, {DEVICE}, {torch.get_num_threads()} threads\n")
    compare_losses()
    compare_augmentation()
    compare_mixtures()
    compare_evaluation()


# --- the number of codes


def codes():
    """Time and memory of CPLearn's loss and gradient as c grows, by the product with W and by the
    fast transform, both as in training: in blocks where (n, c) is large."""
    print(f"CPLearn's loss and gradient of 64 images, {DEVICE}", end="")
    print(f", {torch.get_num_threads()} threads\n")
    print(f"{'f':>6}{'c':>9}{'product s':>11}{'fast s':>8}{'product MiB':>13}{'fast MiB':>10}")
    for f in (384, 2048):
        for c in (2**14, 2**16, 2**18, 2**20):
            product_name, fast_name = "plain", "fast"
            if 64 * c > 2**25:
                product_name, fast_name = "blocks", "fast blocks"
            product_inputs = loss_inputs(product_name, 64, f, c)
            fast_inputs = loss_inputs(fast_name, 64, f, c)

            def product(name=product_name, inputs=product_inputs):
                loss_and_gradient(name, *inputs)

            def fast(name=fast_name, inputs=fast_inputs):
                loss_and_gradient(name, *inputs)

            product_time, fast_time = rival_times(1, product, fast)
            product_memory = peak_in_own_process(product_name, 64, f, c) / 2**20
            fast_memory = peak_in_own_process(fast_name, 64, f, c) / 2**20
            row = f"{f:>6}{c:>9}{product_time:>11.2f}{fast_time:>8.2f}"
            print(f"{row}{product_memory:>13.0f}{fast_memory:>10.0f}")


# --- precision


class Stop(Exception):
    """Ends a run after its first gradient."""


def first_gradient(method, *flags, change=None):
    """The loss and the gradient of all parameters, as one vector, of the first step of a script's
    run. `change` is called with the script's module before."""
    found = {}
    module = evaluate.load_method(method)
    if change:
        change(module)
    loss_fn = module.loss_fn

    def keep_first_loss(*args, **kwargs):
        terms = loss_fn(*args, **kwargs)
        found.setdefault("loss", terms["loss"].item())
        return terms

    def keep_gradient(model):
        parts = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        found["gradient"] = torch.cat(parts).double()
        raise Stop

    def open_run(args, model, optimizer, data, views):
        run = common.Run(args, model, optimizer, data)
        run.bar = tqdm(disable=True)
        return run

    module.loss_fn = keep_first_loss
    with tempfile.TemporaryDirectory() as folder:
        argv = [f"methods/{method}.py", "--dataset", "shapes", "--image-size", "32"]
        argv += ["--out", folder, *flags]
        with (
            patch.object(sys, "argv", argv),
            patch.object(common, "sum_gradients", keep_gradient),
            patch.object(common, "open_run", open_run),
            contextlib.suppress(Stop),
        ):
            module.main()
    return found["loss"], found["gradient"]


def float32_head(module):
    """Takes the head out of autocast."""
    original = module.Model

    def build(args):
        model = original(args)
        forward = model.head.forward

        def without_autocast(x):
            with torch.autocast(x.device.type, enabled=False):
                return forward(x.float())

        model.head.forward = without_autocast
        return model

    module.Model = build


def precision():
    """What a network in bf16 does to each method's loss and gradient at the start of training."""
    print("First step on the drawn shapes, 32 x 32, ResNet-18 of width 16, 256 images, against")
    print("float32: relative error of the loss, and cosine of the gradient of all parameters.")
    print("Network in bf16, then with its head in float32\n")
    print(f"{'method':<16}{'loss':>10}{'cosine':>9}{'loss':>12}{'cosine':>9}")
    for method in METHODS:
        flags = ["--width", "16", "--batch-size", "256", "--precision"]
        loss, gradient = first_gradient(method, *flags, "fp32")
        row = f"{method:<16}"
        for change in (None, float32_head):
            its_loss, its_gradient = first_gradient(method, *flags, "bf16", change=change)
            error = abs(its_loss - loss) / abs(loss)
            cosine = nn.functional.cosine_similarity(gradient, its_gradient, dim=0).item()
            row += f"{error:>10.1e}{cosine:>9.4f}  "
        print(row)


# --- reading from disk


def disk(gigabytes=4):
    """Reads batches of 256 x 256 pixels in random order from a file that is not in memory, as
    training does."""
    n = int(gigabytes * 1e9) // (3 * 256 * 256) // 64 * 64
    with tempfile.NamedTemporaryFile(dir=".", suffix=".npy") as file:
        write_images(file.name, n)
        order = torch.randperm(n).view(-1, 64)[:40]

        def cold():
            """The images, none of them in memory. Pages that are mapped would stay, so each map
            is a new one."""
            with open(file.name, "rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            return torch.from_numpy(np.load(file.name, mmap_mode="c"))

        def read_alone(images):
            return [seconds(lambda index=index: images[index]) for index in order]

        reading = read_alone(cold())
        a = torch.randn(256, 256)

        def train(step):
            """A step that takes as long as reading its batch did."""
            end = time.perf_counter() + reading[step]
            while time.perf_counter() < end:
                a @ a

        def read_first(images):
            for step, index in enumerate(order):
                images[index]
                train(step)

        def read_ahead(images):
            for step, _ in enumerate(common.batches(images, order, torch.device("cpu"))):
                train(step)

        first = seconds(lambda: read_first(cold())) / sum(reading)
        ahead = seconds(lambda: read_ahead(cold())) / sum(reading)
    rate = order.numel() * 3 * 256 * 256 / 1e6 / sum(reading)
    print(f"{gigabytes} GB of images, none in memory, in random batches of 64: {rate:.0f} MB/s")
    print("steps as long as that, time over the steps alone: ", end="")
    print(f"{first:.2f} if each batch is read first, {ahead:.2f} if a thread reads ahead")


def write_images(path, n):
    """Writes n random images of 256 x 256 pixels as one array."""
    array = np.lib.format.open_memmap(path, "w+", np.uint8, (n, 3, 256, 256))
    for i in range(0, n, 64):
        rng = np.random.default_rng(i)
        array[i : i + 64] = rng.integers(256, size=(64, 3, 256, 256), dtype=np.uint8)
    array.flush()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", choices=["codes", "precision", "disk"])
    what = parser.parse_args().what
    if what == "codes":
        codes()
    elif what == "precision":
        precision()
    elif what == "disk":
        disk()
    else:
        compare()


if __name__ == "__main__":
    if sys.argv[1:2] == ["peak"]:  # a process that peak_in_own_process started
        name, n, f, c = sys.argv[2], *map(int, sys.argv[3:])
        measure = evaluation_peak(n, f, c) if name == "evaluation" else loss_peak(name, n, f, c)
        print(measure)
    else:
        main()
