"""What all methods share about data, backbones, collapse metrics and the run; nothing here knows a method.

Data           load_data, two_views            uint8 images on the device, two augmented views of each batch
Augmentation   draw_augmentation, augment      random parameters for each image, applied to a whole batch at once
Backbones      build_backbone                  resnet8, resnet18, resnet50, vit_small, mlp
Metrics        center_norm, effective_rank, average_correlation, used_codes, nmi, ami, knn_accuracy,
               covariance_spectrum, fit_mixture, mixture_entropy, diagnose
Run            parse_args, start, Run          flags, seeds, processes, folder, log, checkpoint, resume
"""

import argparse
import copy
import functools
import hashlib
import importlib.util
import json
import math
import os
import platform
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torchvision
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm


def fail(message):
    """Ends the program with one line on stderr and exit status 2."""
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def generator(*key, device="cpu"):
    """A random generator that depends on nothing but the integers of `key`, so that any step can be drawn again."""
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
    return torch.Generator(device).manual_seed(seed)


# --- data

TOYS = ("blobs", "moons")
IMAGE_ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".ppm", ".tif", ".tiff"}

# The 100 classes that "Contrastive Multiview Coding" (Tian et al., 2020) drew from ImageNet.
IMAGENET100 = """
n02869837 n01749939 n02488291 n02107142 n13037406 n02091831 n04517823 n04589890 n03062245 n01773797 n01735189 n07831146
n07753275 n03085013 n04485082 n02105505 n01983481 n02788148 n03530642 n04435653 n02086910 n02859443 n13040303 n03594734
n02085620 n02099849 n01558993 n04493381 n02109047 n04111531 n02877765 n04429376 n02009229 n01978455 n02106550 n01820546
n01692333 n07714571 n02974003 n02114855 n03785016 n03764736 n03775546 n02087046 n07836838 n04099969 n04592741 n03891251
n02701002 n03379051 n02259212 n07715103 n03947888 n04026417 n02326432 n03637318 n01980166 n02113799 n02086240 n03903868
n02483362 n04127249 n02089973 n03017168 n02093428 n02804414 n02396427 n04418357 n02172182 n01729322 n02113978 n03787032
n02089867 n02119022 n03777754 n04238763 n02231487 n03032252 n02138441 n02104029 n03837869 n03494278 n04136333 n03794056
n03492542 n02018207 n04067472 n03930630 n03584829 n02123045 n04229816 n02100583 n03642806 n04336792 n03259280 n02116738
n02108089 n03424325 n01855672 n02090622
""".split()


@dataclass
class Data:
    """A data set. Images are uint8 (N, 3, H, W), or float32 (N, 2) for the toys; labels are int64 (N,).

    `mean` and `std` are the training set's, per channel, of pixels in [0, 1].
    """

    images: torch.Tensor
    labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    classes: list
    mean: torch.Tensor
    std: torch.Tensor

    def normalise(self, images):
        """A batch as the network sees it without augmentation, float32 and standardised, on the statistics' device."""
        images = images.to(self.mean.device)
        if images.ndim == 2:
            return (images - self.mean) / self.std
        images = (images / 255 - self.mean.view(3, 1, 1)) / self.std.view(3, 1, 1)
        return images.contiguous(memory_format=torch.channels_last)


def load_data(args, device):
    """The data set `args.dataset`, as `Data`. A set too large for the device stays a memory-mapped file."""
    if args.dataset in TOYS:
        train, test = (draw_toy(args.dataset, n, seed) for n, seed in ((1500, 0), (600, 1)))
        classes = ["0", "1", "2"]
    elif args.dataset == "shapes":
        train, test = (draw_shapes(n, args.image_size, seed) for n, seed in ((5000, 0), (1000, 1)))
        classes = list(SHAPES)
    elif args.dataset in ("folder", "imagenet100"):
        train, test, classes = read_folder(Path(args.data_dir), args.image_size, args.dataset)
    else:
        train, test, classes = read_torchvision(args)
    if args.dataset in TOYS:
        std, mean = torch.std_mean(train[0], dim=0)
    else:
        sample = train[0][:: 1 + train[0].nbytes // 50_000_000]  # of a large set a part will do
        std, mean = torch.std_mean(sample / 255, dim=(0, 2, 3))
    mean, std = mean.to(device), std.clamp_min(1e-3).to(device)
    if device.type != "cuda" or train[0].nbytes < torch.cuda.mem_get_info(device)[0] / 3:
        train, test = ([t.to(device) for t in split] for split in (train, test))
    return Data(*train, *test, classes, mean, std)


def read_torchvision(args):
    """CIFAR-10, CIFAR-100 or SVHN through torchvision, which downloads them once and checks their sums."""
    cls = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "svhn": "SVHN"}[args.dataset]
    cls = getattr(torchvision.datasets, cls)
    splits = []
    for train in (True, False):
        split = {"split": "train" if train else "test"} if args.dataset == "svhn" else {"train": train}
        try:
            with rank_zero_first():
                found = cls(args.data_dir, download=is_main(), **split)
        except (OSError, RuntimeError) as error:
            files = "train_32x32.mat and test_32x32.mat" if args.dataset == "svhn" else Path(cls.url).name
            where = "http://ufldl.stanford.edu/housenumbers/" if args.dataset == "svhn" else cls.url
            fail(
                f"{args.dataset} is not in {args.data_dir!r} and could not be downloaded ({type(error).__name__}): "
                f"put {files} from {where} there, or use --dataset shapes, which needs no download"
            )
        images = torch.from_numpy(np.ascontiguousarray(found.data))
        images = images if args.dataset == "svhn" else images.permute(0, 3, 1, 2).contiguous()
        if args.image_size != images.shape[-1]:
            resized = [TF.resize(part, [args.image_size] * 2, antialias=True) for part in images.split(1000)]
            images = torch.cat(resized)
        splits.append(
            (images, torch.as_tensor(getattr(found, "labels" if args.dataset == "svhn" else "targets")).long())
        )
    return *splits, list(getattr(found, "classes", "0123456789"))


def read_folder(root, size, dataset):
    """root/train/<class>/* and root/{val,test}/<class>/* as memory-mapped uint8, decoded once into root/.cache-<size>.

    Each image is resized (shorter side to `size`, antialiased) and its center cut out. With dataset "imagenet100"
    only the published 100 classes of an ImageNet folder are read. The cache is written whole, then renamed, and
    written anew when the files (names, sizes or times) change.
    """
    if not (root / "train").is_dir():
        fail(f"no images under {str(root)!r}: --data-dir must hold train/<class>/* and val/<class>/* or test/<class>/*")
    test = next((root / name for name in ("val", "test") if (root / name).is_dir()), None)
    if test is None:
        fail(f"{str(root)!r} has train/ but neither val/ nor test/, which the evaluation needs")
    if dataset == "imagenet100":
        classes = sorted(IMAGENET100)
        missing = [str(split / c) for split in (root / "train", test) for c in classes if not (split / c).is_dir()]
        if missing:
            fail(f"{len(missing)} folders of ImageNet-100 are missing, the first is {missing[0]!r}")
    else:
        classes = sorted(p.name for p in (root / "train").iterdir() if p.is_dir() and not p.name.startswith("."))
        if not classes:
            fail(f"{str(root / 'train')!r} holds no class folders; put the images into train/<class>/")
        extra = {p.name for p in test.iterdir() if p.is_dir() and not p.name.startswith(".")} - set(classes)
        if extra:
            fail(f"{str(test)!r} has class {min(extra)!r}, which train/ lacks")
    splits = []
    for split in (root / "train", test):
        files, labels = [], []
        for label, name in enumerate(classes):
            found = [p for p in (split / name).glob("[!.]*") if p.suffix.lower() in IMAGE_ENDINGS]
            if not found and (split == root / "train" or (split / name).is_dir()):
                fail(f"class folder {str(split / name)!r} holds no images; add some or remove the folder")
            files += sorted(found)
            labels += [label] * len(found)
        if not files:
            fail(f"{str(split)!r} holds no images in class folders of train/, and the evaluation needs some")
        splits.append((split.name, files, torch.tensor(labels)))
    cached = []
    for name, files, labels in splits:
        with rank_zero_first():
            cached.append((_decode(root, name, files, size), labels))
    return *cached, classes


def _decode(root, split, files, size):
    stats = [(str(p.relative_to(root)), (s := p.stat()).st_size, s.st_mtime_ns) for p in files]
    key = hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:16]
    cache = root / f".cache-{size}" / f"{split}-{key}.npy"
    if not cache.exists():
        part = cache.with_suffix(".part")
        try:
            cache.parent.mkdir(exist_ok=True)
            array = np.lib.format.open_memmap(part, "w+", np.uint8, (len(files), 3, size, size))
        except OSError as error:
            fail(f"cannot write the image cache {str(cache.parent)!r} ({error.strerror}): link the images elsewhere")

        def decode(i):
            try:
                with Image.open(files[i]) as image:
                    image = TF.center_crop(TF.resize(image.convert("RGB"), size, antialias=True), size)
                array[i] = np.asarray(image).transpose(2, 0, 1)
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
                return files[i]

        try:
            # Threads, not processes: Pillow decodes and resizes without holding the interpreter's lock.
            with ThreadPoolExecutor() as pool:
                bar = tqdm(
                    pool.map(decode, range(len(files))), f"decode {split}", len(files), disable=None, leave=False
                )
                unreadable = [str(path) for path in bar if path]
            if unreadable:
                fail(f"{len(unreadable)} unreadable image(s), the first is {unreadable[0]!r}; replace or remove")
            array.flush()
            os.replace(part, cache)
        finally:
            part.unlink(missing_ok=True)
        for old in cache.parent.glob(f"{split}-*.npy"):
            if old != cache:
                old.unlink()
    # Copy-on-write, because torch wants writable memory; nothing is ever written.
    return torch.from_numpy(np.load(cache, mmap_mode="c"))


def draw_toy(name, n, seed):
    """`n` points (n, 2) of three classes: "blobs" are Gaussians around a circle, "moons" interleaved half circles."""
    rng = generator(seed)
    labels = torch.randperm(n, generator=rng) % 3
    noise = torch.randn(n, 2, generator=rng)
    if name == "blobs":
        angle = 2 * math.pi * labels / 3
        return 2 * torch.stack([angle.cos(), angle.sin()], 1) + 0.5 * noise, labels
    angle = math.pi * torch.rand(n, generator=rng)
    up = 1 - 2 * (labels % 2)
    points = torch.stack([angle.cos() + labels, up * angle.sin() + 0.5 * (labels % 2)], 1)
    return points + 0.1 * noise, labels


def _box(x, y, w, h):
    return torch.maximum(x.abs() - w, y.abs() - h)


def _polygon(x, y, corners, inner):
    """A regular polygon (inner radius cos(pi / corners)) or star (smaller inner radius) by folding the plane."""
    sector = 2 * math.pi / corners
    angle = torch.remainder(torch.atan2(y, x), sector)
    angle = torch.minimum(angle, sector - angle)
    u, v = torch.hypot(x, y) * angle.cos(), torch.hypot(x, y) * angle.sin()
    a, b = inner * math.cos(sector / 2) - 1, inner * math.sin(sector / 2)
    return (b * (u - 1) - a * v) / math.hypot(a, b)


# Each shape is a function of coordinates in units of its radius, negative inside.
SHAPES = {
    "disc": lambda x, y: torch.hypot(x, y) - 0.9,
    "ring": lambda x, y: (torch.hypot(x, y) - 0.75).abs() - 0.22,
    "half_disc": lambda x, y: torch.maximum(torch.hypot(x, y + 0.4) - 1, -0.4 - y),
    "crescent": lambda x, y: torch.maximum(torch.hypot(x, y) - 1, 0.8 - torch.hypot(x - 0.55, y)),
    "triangle": lambda x, y: _polygon(x, y, 3, 0.5),
    "square": lambda x, y: _box(x, y, 0.75, 0.75),
    "star": lambda x, y: _polygon(x, y, 5, 0.4),
    "plus": lambda x, y: torch.minimum(_box(x, y, 0.28, 1), _box(x, y, 1, 0.28)),
    "bars": lambda x, y: _box(x, y.abs() - 0.6, 0.95, 0.28),
    "tee": lambda x, y: torch.minimum(_box(x, y - 0.65, 0.95, 0.28), _box(x, y + 0.2, 0.28, 0.8)),
}


def draw_shapes(n, size, seed):
    """`n` images (n, 3, size, size) uint8 of ten light shapes on dark ground; size, place, rotation, tint, background
    and noise vary. Tints are faint, because colour that augmentation leaves recognisable is learned before shape."""
    rng = generator(seed)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(n, *shape, generator=rng)

    labels = torch.randperm(n, generator=rng) % len(SHAPES)
    axis = torch.linspace(-1, 1, size)
    radius, angle = uniform(0.5, 0.7, 1, 1), uniform(0, 2 * math.pi, 1, 1)
    x = axis.view(1, 1, -1) - uniform(-0.2, 0.2, 1, 1)
    y = axis.view(1, -1, 1) - uniform(-0.2, 0.2, 1, 1)
    x, y = (angle.cos() * x + angle.sin() * y) / radius, (angle.cos() * y - angle.sin() * x) / radius
    inside = torch.empty(n, size, size)
    for label, shape in enumerate(SHAPES.values()):
        chosen = labels == label
        inside[chosen] = shape(x[chosen], y[chosen])
    alpha = (0.5 - inside * radius * size / 2).clamp(0, 1).unsqueeze(1)
    tint = uniform(-0.05, 0.05, 2, 3, 1, 1)
    back, fore = uniform(0.1, 0.4, 1, 1, 1) + tint[:, 0], uniform(0.6, 0.9, 1, 1, 1) + tint[:, 1]
    clutter = F.interpolate(torch.randn(n, 3, 5, 5, generator=rng), (size, size), mode="bicubic")
    image = alpha * fore + (1 - alpha) * (back + uniform(0, 0.06, 1, 1, 1) * clutter)
    image = image + uniform(0, 0.06, 1, 1, 1) * torch.randn(n, 3, size, size, generator=rng)
    return (image.clamp(0, 1) * 255).round().byte(), labels


def two_views(data, args, views, epoch, first=0):
    """Two augmented views (x1, x2) of each batch of an epoch, from step `first` on; the last, short batch is left out.

    `views` are each view's changes to `--augment strong`. For the toys the two views are two samples of one class.
    Order and augmentation depend on the seed, the epoch and the step alone: a resumed run sees the same batches.
    Of several processes each gets its share of the batch, and all together get what one process would.
    """
    n, size = len(data.labels), args.batch_size
    order = torch.randperm(n, generator=generator(args.seed, epoch))
    share = size // world_size()
    mine = slice(rank() * share, (rank() + 1) * share)
    for step in range(first, n // size):
        index = order[step * size : (step + 1) * size]
        draw = generator(args.seed, epoch, step)
        if data.images.ndim == 2:
            yield tuple(data.normalise(data.images[i[mine]]) for i in (index, _partners(data.labels, index, draw)))
            continue
        images = data.images[index[mine].to(data.images.device)].to(data.mean.device)
        pair = []
        for changes in views:
            settings = AUGMENT[args.augment] | (changes if args.augment == "strong" else {})
            settings = settings | OWN_AUGMENT.get(args.dataset, {})
            parameters = draw_augmentation(size, settings, args.image_size, draw)
            pair.append(augment(images, {k: v[mine] for k, v in parameters.items()}, data.mean, data.std))
        yield tuple(pair)


def _partners(labels, index, draw):
    order = torch.argsort(labels.cpu(), stable=True)
    count = torch.bincount(labels.cpu())
    own = labels.cpu()[index]
    return order[(count.cumsum(0) - count)[own] + (torch.rand(len(index), generator=draw) * count[own]).long()]


# --- augmentation

# scale, ratio: random resized crop · padding: reflected border of a plain random crop · jitter: brightness, contrast,
# saturation and hue, applied with probability jitter_p · flip, grayscale, blur, solarize: probabilities · noise:
# standard deviation after normalisation. "strong" is BYOL's (Grill et al., 2020, Table 6) without its per-view blur and
# solarization; blur is skipped below 64 pixels, as SimCLR does on CIFAR. "weak" is CPLearn's for ResNet-8 (2025).
AUGMENT = {
    "strong": {"scale": (0.08, 1), "ratio": (3 / 4, 4 / 3), "jitter": (0.4, 0.4, 0.2, 0.1), "jitter_p": 0.8,
               "flip": 0.5, "grayscale": 0.2, "blur": 0, "solarize": 0, "noise": 0},
    "weak": {"padding": 4, "jitter": (0.4, 0.4, 0.4, 0.1), "jitter_p": 0.1,
             "flip": 0.5, "grayscale": 0.1, "blur": 0, "solarize": 0, "noise": 0.03},
}  # fmt: skip


# A mirrored digit is another sign, and a crop of a twelfth of the image seldom holds the shape.
OWN_AUGMENT = {"svhn": {"flip": 0}, "shapes": {"scale": (0.3, 1)}}


def draw_augmentation(n, settings, size, draw):
    """Random parameters of `n` augmentations of size × size images, as a dict of CPU tensors with n rows each.

    crop (top, left, height, width), flip, brightness, contrast, saturation (factors), hue (turns), order (of these
    four, the same for the whole batch), grayscale, sigma (blur, pixels; 0 = none), solarize, noise (deviation).
    """

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(*shape, n, generator=draw)

    if "padding" in settings:
        shift = (uniform(0, 2 * settings["padding"] + 1, 2)).long() - settings["padding"]
        crop = torch.stack([*shift, *torch.full((2, n), size)], 1)
    else:
        # Ten tries per image, the first that fits, else the whole image: torchvision's RandomResizedCrop.
        area = uniform(*settings["scale"], 10) * size**2
        ratio = uniform(*(math.log(r) for r in settings["ratio"]), 10).exp()
        height, width = (area / ratio).sqrt().round(), (area * ratio).sqrt().round()
        fits = (height <= size) & (width <= size) & (height > 0) & (width > 0)
        tried = fits.int().argmax(0, keepdim=True)
        height, width = (torch.where(fits.any(0), t.gather(0, tried)[0], size) for t in (height, width))
        top, left = ((uniform(0, 1) * (size - t + 1)).floor() for t in (height, width))
        crop = torch.stack([top, left, height, width], 1).long()
    parameters = {"crop": crop, "flip": uniform(0, 1) < settings["flip"]}
    chosen = uniform(0, 1) < settings["jitter_p"]
    for name, strength in zip(("brightness", "contrast", "saturation", "hue"), settings["jitter"], strict=True):
        neutral = 0.0 if name == "hue" else 1.0
        parameters[name] = torch.where(chosen, neutral + uniform(-strength, strength), neutral)
    parameters["order"] = torch.randperm(4, generator=draw).expand(n, 4)  # one for the batch
    parameters["grayscale"] = uniform(0, 1) < settings["grayscale"]
    if settings["blur"] and size >= 64:
        parameters["sigma"] = torch.where(uniform(0, 1) < settings["blur"], uniform(0.1, 2), 0)
    if settings["solarize"]:
        parameters["solarize"] = uniform(0, 1) < settings["solarize"]
    if settings["noise"]:
        parameters["noise"] = torch.full((n,), settings["noise"])
    return parameters


def augment(images, parameters, mean, std):
    """Augments uint8 images (n, 3, size, size) to standardised float32 of that size, each with its own parameters.

    Each image comes out as torchvision's functional operations with the same parameters give it: resized_crop
    (bilinear), horizontal_flip, adjust_*, rgb_to_grayscale, gaussian_blur, solarize, normalize.
    A crop that reaches over the border continues by reflection, like a random crop of a reflect-padded image.
    """
    order = parameters["order"][0].tolist()  # read before the rest goes to the device, so that nothing waits for it
    parameters = {k: v.to(images.device, non_blocking=True) for k, v in parameters.items()}
    top, left, height, width = parameters["crop"].unbind(1)
    rows = _resize_matrix(top, height, images.shape[2])
    columns = _resize_matrix(left, width, images.shape[3])
    columns = torch.where(parameters["flip"].view(-1, 1, 1), columns.flip(1), columns)
    x = rows.unsqueeze(1) @ (images / 255) @ columns.unsqueeze(1).mT
    factors = {k: parameters[k].view(-1, 1, 1, 1) for k in ("brightness", "contrast", "saturation", "hue")}
    for op in order:
        if op == 0:
            x = (x * factors["brightness"]).clamp(0, 1)
        elif op == 1:
            middle = _grayscale(x).mean(dim=(1, 2, 3), keepdim=True)
            x = (middle + (x - middle) * factors["contrast"]).clamp(0, 1)
        elif op == 2:
            gray = _grayscale(x)
            x = (gray + (x - gray) * factors["saturation"]).clamp(0, 1)
        else:
            x = _shift_hue(x, factors["hue"])
    x = torch.where(parameters["grayscale"].view(-1, 1, 1, 1), _grayscale(x), x)
    if "sigma" in parameters:
        x = _blur(x, parameters["sigma"])
    if "solarize" in parameters:
        x = torch.where(parameters["solarize"].view(-1, 1, 1, 1) & (x >= 0.5), 1 - x, x)
    x = (x - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    if "noise" in parameters:
        x = x + parameters["noise"].view(-1, 1, 1, 1) * torch.randn_like(x)
    return x.contiguous(memory_format=torch.channels_last)


def _resize_matrix(start, length, size):
    """(n, size, size): row o holds the weights of the source pixels in output pixel o of the crop [start, +length)."""
    out = torch.arange(size, device=start.device).view(1, -1, 1)
    start, length = start.view(-1, 1, 1), length.view(-1, 1, 1)
    at = start + ((out + 0.5) * length / size - 0.5).clamp_min(0).minimum(length - 1)
    at = size - 1 - (size - 1 - at.abs()).abs()  # a shifted image is reflected at its border
    return (1 - (out.mT - at).abs()).clamp_min(0)


def _grayscale(x):
    return (x * x.new_tensor([0.2989, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)


def _shift_hue(x, turns):
    """Shifts the hue of HSV by `turns`; channel = V - V S max(0, min(k, 4 - k, 1)), k = (5, 3, 1) + 6 H mod 6."""
    value, low = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    chroma = value - low
    red, green, blue = x.split(1, dim=1)
    safe = torch.where(chroma > 0, chroma, 1)
    sixth = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    k = torch.remainder(x.new_tensor([5, 3, 1]).view(3, 1, 1) + sixth + 6 * turns, 6)
    return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


def _blur(x, sigma):
    """Gaussian blur with a kernel of about a tenth of the image (SimCLR) and each image's own sigma; 0 leaves it."""
    n, _, height, width = x.shape
    half = max(1, height // 20)
    offset = torch.arange(-half, half + 1, device=x.device)
    kernel = torch.exp(-0.5 * (offset / sigma.clamp_min(1e-6).view(-1, 1)) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(3, 0)
    x = F.pad(x.reshape(1, n * 3, height, width), [half] * 4, mode="reflect")
    x = F.conv2d(x, kernel.view(n * 3, 1, -1, 1), groups=n * 3)
    return F.conv2d(x, kernel.view(n * 3, 1, 1, -1), groups=n * 3).view(n, 3, height, width)


# --- backbones


def build_backbone(args):
    """The network `args.backbone` without a classifier; its `num_features` is the width of its output (n, features).

    ResNets and ViT are torchvision's modules: their state loads into torchvision's own with plain `load_state_dict`
    once the classifier there is `nn.Identity()` (and, for small images, the stem is the one below). Up to 64 pixels
    ResNets have the CIFAR stem (3 × 3, stride 1, no max-pool) and ViT has patches of 4 instead of 16 pixels.
    """
    if (args.backbone == "mlp") != (args.dataset in TOYS):
        fail(f"--dataset {args.dataset} does not go with --backbone {args.backbone}: blobs and moons need mlp")
    small = args.image_size <= 64
    if args.backbone == "mlp":
        width = args.width or 64
        net = nn.Sequential(nn.Linear(2, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        net.num_features = width
    elif args.backbone == "resnet8":
        net = ResNet8(args.width or 128)
    elif args.backbone == "vit_small":
        patch, width = 4 if small else 16, args.width or 384
        if args.image_size % patch or width % 64:
            fail(f"vit_small needs an image size that is a multiple of {patch} and a width that is a multiple of 64")
        net = torchvision.models.VisionTransformer(args.image_size, patch, 12, width // 64, width, 4 * width)
        net.heads = nn.Identity()
        net.num_features = width
    else:
        block, layers = {
            "resnet18": (torchvision.models.resnet.BasicBlock, [2, 2, 2, 2]),
            "resnet50": (torchvision.models.resnet.Bottleneck, [3, 4, 6, 3]),
        }[args.backbone]
        net = ResNet(block, layers, args.width or 64, small)
    return net


class ResNet(torchvision.models.ResNet):
    """torchvision's ResNet, `width` channels wide in its first stage (64 is the published one), without classifier."""

    def __init__(self, block, layers, width, small):
        self.width = width
        super().__init__(block, layers)
        if small:
            self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
            self.maxpool = nn.Identity()
        else:
            self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.bn1 = nn.BatchNorm2d(width)
        self.fc = nn.Identity()
        self.num_features = 8 * width * block.expansion

    def _make_layer(self, block, planes, *args, **kwargs):
        if planes == 64:
            self.inplanes = self.width
        return super()._make_layer(block, planes * self.width // 64, *args, **kwargs)


class ResNet8(nn.Module):
    """Eight 3 × 3 convolutions in four residual blocks without batch norm ("Collapse-Proof ...", 2025, Table 5).

    The last activation before the global average is not in the table; the GAN discriminators it descends from have it.
    """

    def __init__(self, width):
        super().__init__()
        self.num_features = width
        self.convs = nn.ModuleList(nn.Conv2d(3 if i == 0 else width, width, 3, padding=1) for i in range(8))
        self.shortcut = nn.Conv2d(3, width, 1)
        for conv in (*self.convs, self.shortcut):
            nn.init.kaiming_uniform_(conv.weight, a=0.2)
            nn.init.zeros_(conv.bias)

    def forward(self, x):
        act = functools.partial(F.leaky_relu, negative_slope=0.2)
        pool = functools.partial(F.avg_pool2d, kernel_size=2)
        x = pool(self.convs[1](act(self.convs[0](x)))) + self.shortcut(pool(x))
        x = pool(self.convs[3](act(self.convs[2](act(x))))) + pool(x)
        x = self.convs[5](act(self.convs[4](act(x)))) + x
        x = self.convs[7](act(self.convs[6](act(x)))) + x
        return act(x).mean(dim=(2, 3))


def frozen_copy(*modules):
    """A copy of the modules, one after the other, that no gradient reaches: a momentum teacher."""
    return copy.deepcopy(nn.Sequential(*modules)).requires_grad_(False)


def draw_codes(kind, f, c, seed):
    """A dictionary W (f, c) of entries ±1 as int8, drawn from the seed: "rademacher" draws each entry, "hadamard" takes
    c orthogonal columns of Sylvester's matrix (f, f), whose entry (i, j) is -1 to the power of the number of ones that
    i and j share in binary. Ends the program with one line where there is no such matrix."""
    rng = torch.Generator().manual_seed(seed)
    if kind == "rademacher":
        return 2 * torch.randint(2, (f, c), generator=rng, dtype=torch.int8) - 1
    if f & (f - 1) or c > f:
        fail(f"--codes hadamard needs a power of two as --projector-dim and --c no larger, not {f} and {c}")
    bits = (torch.arange(f)[:, None] >> torch.arange(f.bit_length()) & 1).float()
    return 1 - 2 * (bits @ bits[torch.randperm(f, generator=rng)[:c]].T % 2).to(torch.int8)


def linear(x, weight):
    """x weightᵀ (..., m) of x (..., k) and weight (m, k), without gradient: F.linear, but in float32 on a CPU by
    oneDNN, which on an AMD Zen 5 takes half the time of torch's default there."""
    if x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        return F.linear(x.to_mkldnn(), weight.to_mkldnn()).to_dense()
    return F.linear(x, weight)


# --- collapse metrics


def _exact(z):
    """float64, on the CPU where the device has no float64."""
    return z.detach().to("cpu" if z.device.type == "mps" else z.device, torch.float64)


def center_norm(z):
    """Norm of the mean of the L2-normalised embeddings z (n, d), in [0, 1]: 1 when all point the same way, which is
    representation collapse ("The Common Stability Mechanism ...", Section 2, the center vector)."""
    return F.normalize(_exact(z), dim=1).mean(0).norm().item()


def covariance_spectrum(z):
    """Eigenvalues of the covariance Σ_i (z_i - mean)(z_i - mean)ᵀ / n of z (n, d), largest first, float64; its singular
    values ("Preventing Collapses ...", Section 4). Only the min(n - 1, d) that can differ from 0."""
    z = _exact(z)
    rounding = 1e-6 * z.abs().max()
    z = z - z.mean(0)
    if z.abs().max() <= rounding:
        z = torch.zeros_like(z)
    gram = z @ z.T if len(z) < z.shape[1] else z.T @ z
    return torch.linalg.eigvalsh(gram / len(z)).clamp_min(0).flip(0)[: max(1, min(len(z) - 1, z.shape[1]))]


def effective_rank(z):
    """exp of the entropy of the normalised singular values of the centered embeddings z (n, d) (Roy and Vetterli,
    2007): from 1 (one direction) to min(n - 1, d) (a flat spectrum); 0 for a constant embedding."""
    sigma = covariance_spectrum(z).sqrt()
    return torch.special.entr(sigma / sigma.sum()).sum().exp().item() if sigma.any() else 0.0


def spectrum_auc(spectrum):
    """Area under the cumulative share of a spectrum (m,), largest first, as a mean over its ranks (Li, Efros and
    Pathak, 2022): (m + 1) / 2m if it is flat, 1 if one direction has it all; NaN if all is 0."""
    return (spectrum.cumsum(0) / spectrum.sum()).mean().item()


def power_law(spectrum):
    """The exponent alpha of spectrum_i ~ i^-alpha (Ghosh et al., 2022): least squares in logarithms over the ranks
    above 1e-7 of the first, weighted 1 / i so that each octave counts alike. NaN where fewer than two are."""
    values = spectrum[spectrum > 1e-7 * spectrum[0]].log()
    x = torch.arange(1, len(values) + 1, device=values.device).to(values).log()
    weight = (-x).softmax(0)
    x = x - (weight * x).sum()
    return -((weight * x * values).sum() / (weight * x * x).sum()).item()


def average_correlation(z):
    """Mean absolute off-diagonal entry of the correlation matrix of z (n, d), in [0, 1] ("Preventing Collapses ...",
    Section 5.1, which leaves the sign open). A constant dimension counts as correlated with every other: 1."""
    z = _exact(z)
    rounding = 1e-6 * z.abs().max()
    z = z - z.mean(0)
    constant = z.abs().amax(0) <= rounding
    z = F.normalize(z.masked_fill(constant, 0), dim=0)
    correlation = (z.T @ z).abs()
    correlation[constant] = correlation[:, constant] = 1
    d = len(correlation)
    return (correlation.sum() - correlation.trace()).item() / max(1, d * (d - 1))


def used_codes(codes):
    """How many different codes or prototypes the assignments (n,) name; far fewer than there could be is cluster
    collapse."""
    return len(torch.unique(codes))


def _contingency(a, b):
    """Joint counts of two integer labelings (n,) as a sparse triple, and both marginal counts, in float64."""
    a, b = (torch.unique(t.cpu(), return_inverse=True)[1] for t in (a, b))
    cells, counts = torch.unique(a * (b.max() + 1) + b, return_counts=True)
    rows, columns = cells // (b.max() + 1), cells % (b.max() + 1)
    return rows, columns, counts.double(), torch.bincount(a).double(), torch.bincount(b).double()


def _information(a, b):
    rows, columns, counts, row_sums, column_sums = _contingency(a, b)
    n = counts.sum()
    mutual = (counts / n * (n * counts / (row_sums[rows] * column_sums[columns])).log()).sum().clamp_min(0)
    mean_entropy = (torch.special.entr(row_sums / n).sum() + torch.special.entr(column_sums / n).sum()) / 2
    return mutual.item(), mean_entropy.item(), row_sums, column_sums


def nmi(a, b):
    """Normalised mutual information I(a; b) / mean(H(a), H(b)) of two labelings (n,), in [0, 1]; 1 if both are
    constant. It grows with the number of clusters even for random ones, so show `nmi_shuffled` beside it."""
    mutual, mean_entropy, *_ = _information(a, b)
    return mutual / mean_entropy if mean_entropy > 0 else 1.0


def nmi_shuffled(a, b, repeats=5):
    """NMI once the assignments `a` are shuffled, mean of `repeats`: what chance scores with these cluster sizes."""
    rng = generator(0)
    return sum(nmi(a.cpu()[torch.randperm(len(a), generator=rng)], b) for _ in range(repeats)) / repeats


def ami(a, b):
    """Adjusted mutual information (I - E[I]) / (mean(H(a), H(b)) - E[I]) of two labelings (n,): 0 by chance, 1 if equal
    (Vinh et al., 2010, Eq. 24a for E[I] under permutations)."""
    mutual, mean_entropy, row_sums, column_sums = _information(a, b)
    if mean_entropy == 0:
        return 1.0
    n = row_sums.sum().item()
    log_n = torch.lgamma(torch.arange(n + 2, dtype=torch.float64))  # log_n[k] = log (k - 1)!
    expected = 0.0
    # Only the sizes matter, so clusters of one size are counted together.
    for r, times_r in zip(*torch.unique(row_sums.long(), return_counts=True), strict=True):
        for c, times_c in zip(*torch.unique(column_sums.long(), return_counts=True), strict=True):
            k = torch.arange(max(1, int(r + c - n)), int(min(r, c)) + 1)
            log_p = log_n[r + 1] + log_n[c + 1] + log_n[int(n - r) + 1] + log_n[int(n - c) + 1] - log_n[int(n) + 1]
            log_p = log_p - log_n[k + 1] - log_n[r - k + 1] - log_n[c - k + 1] - log_n[int(n) - r - c + k + 1]
            expected += (times_r * times_c * (k / n * (n * k / (r * c).double()).log() * log_p.exp()).sum()).item()
    gap = mean_entropy - expected
    return (mutual - expected) / (gap if abs(gap) > 1e-15 else 1e-15)


def unit_variance(z):
    """z (n, d) centered and scaled to a mean variance of 1 over its dimensions, float32: what entropies are taken of,
    so that methods of all scales compare. Zeros where z is constant."""
    z = _exact(z)
    scale = covariance_spectrum(z).sum() / z.shape[1]
    return ((z - z.mean(0)) * (scale.rsqrt() if scale > 0 else 0)).float()


def logdet_entropy(z, floor=1e-3):
    """Entropy in nats of a Gaussian with the covariance of z (n, d): ½ Σ_j log(2πe (lambda_j + floor)). Exact if z is
    Gaussian and n >> d, else too high, the Gaussian being the widest of its covariance; few points make it too low."""
    spectrum = covariance_spectrum(z)
    spectrum = F.pad(spectrum, (0, z.shape[1] - len(spectrum)))  # no variance where there are too few points for any
    return (spectrum + floor).log().sum().item() / 2 + z.shape[1] * _GAUSS


def pairwise_entropy(z, noise=0.1):
    """Lower and upper bound, in nats, of the entropy of z (n, d) with Gaussian noise of variance `noise` added, that is
    of the mixture of n Gaussians around its points: ½ d log(2πe noise) - mean_i log mean_j exp(-D_ij) with the
    Bhattacharyya and the Kullback-Leibler distance (Kolchinsky and Tracey, 2017, Eqs. 10 and 13). Both are right within
    log n, and tell little once all points are further apart than the noise."""
    z = _exact(z)
    base, n = z.shape[1] * (_GAUSS + math.log(noise) / 2), len(z)
    sums = [0.0, 0.0]
    for part in z.split(1000):
        distance = torch.cdist(part, z).square()
        for i, scale in enumerate((8, 2)):
            sums[i] += (math.log(n) - (-distance / (scale * noise)).logsumexp(1)).sum().item()
    return tuple(base + total / n for total in sums)


_GAUSS = (math.log(2 * math.pi) + 1) / 2  # entropy of a Gaussian of variance 1, in nats


def _log_joint(x, weights, means, variances):
    """log(weight_k N(x_i; mean_k, variance_k)), (n, k)."""
    precision = 1 / variances
    quadratic = (x * x) @ precision.T - 2 * x @ (means * precision).T + (means * means * precision).sum(1)
    return weights.log() - (quadratic + variances.log().sum(1) + x.shape[1] * math.log(2 * math.pi)) / 2


def _mixture_of(x, shares, floor):
    """Weights, means and variances of components that own `shares` (n, k) of the points x (n, d)."""
    count = shares.sum(0) + 10 * torch.finfo(x.dtype).eps
    means = shares.T @ x / count[:, None]
    variances = (shares.T @ (x * x) / count[:, None] - means * means).clamp_min(0) + floor
    return count / count.sum(), means, variances


def fit_mixture(x, k, iterations=100, tolerance=1e-3, floor=1e-3, start=None):
    """A Gaussian mixture of `k` components of diagonal covariance fitted to x (n, d) by expectation maximisation:
    (weights (k,), means (k, d), variances (k, d)), and its mean log-likelihood in nats before the last step.

    `floor` is added to each variance, so that a component of one point does not shrink to it. Starts at the mixture
    `start`, or from k-means; ends once the log-likelihood gains less than `tolerance`.
    """
    if start is None:
        start = _mixture_of(x, F.one_hot(kmeans(x, k, restarts=1, iterations=10)[0], min(k, len(x))).to(x), floor)
    mixture, before = start, -math.inf
    for _ in range(iterations):
        joint = _log_joint(x, *mixture)
        total = joint.logsumexp(1, keepdim=True)
        likelihood = total.mean().item()
        mixture = _mixture_of(x, (joint - total).exp(), floor)
        if likelihood - before < tolerance:
            break
        before = likelihood
    return mixture, likelihood


def mixture_entropy(mixture, samples=10_000):
    """Entropy of a Gaussian mixture in nats by Monte Carlo, -mean log p over draws from it ("Collapse-Proof ...",
    Section 4). Unbiased for the mixture, which itself is narrower than the data the more components it has for them."""
    weights, means, variances = mixture
    rng = generator(0)
    chosen = torch.multinomial(weights.cpu().double(), samples, replacement=True, generator=rng).to(means.device)
    noise = torch.randn(samples, means.shape[1], generator=rng).to(means)
    x = means[chosen] + variances[chosen].sqrt() * noise
    return -_log_joint(x, weights, means, variances).logsumexp(1).mean().item()


def cluster_gap(z, queries=1000):
    """How much embeddings z (n, d) vary within clusters: the largest jump in a point's distances r_1 <= r_2 <= ... to
    the others, as min_k r_k / r_{k+1} over its nearest nine tenths; the median over up to `queries` points.

    Points without clusters have 0.36 in one dimension, where the ratios are U^(1/k) of uniform U, and more in more
    dimensions; clusters whose points are 20 times closer to one another than to the rest have 0.05. It needs no
    assignments, so that it works for every method; 0 where all points are one."""
    z = _exact(z)
    some = spread(z, queries)
    distance = torch.cdist(z[some], z)
    distance[torch.arange(len(some), device=z.device), some] = -1  # the point itself comes first
    distance = distance.sort(1).values[:, 1 : max(3, int(0.9 * len(z)))]
    ratio = torch.where(distance[:, 1:] > 0, distance[:, :-1] / distance[:, 1:], 1)
    ratio[distance[:, -1] == 0] = 0
    return ratio.amin(1).median().item()


def diagnose(z, codes=None, clusters=None, inputs=None):
    """Which of the four collapses of "Collapse-Proof ..." (Figure 1) embeddings z (n, d) suffer, with the codes or
    prototypes (n,) of `clusters` that a clustering method assigned, for images (or points) of `inputs` numbers each:
    {mode: {"number", "threshold", "verdict"}}.

    Each number is in [0, 1], and below its threshold the mode has collapsed:

    representation  1 - center_norm², the variance of the directions; 0.2 means a center vector of 0.89
    dimensional     log(effective rank) / log(dimensions); 0.5: the effective rank is the root of what could be
    cluster         log(effective codes) / log(clusters), effective = exp of the entropy of their use; 0.5 likewise
    intracluster    `cluster_gap`; 0.05: most points are 20 times closer to their own cluster than to the next

    No more dimensions than n - 1, no more clusters than n and no higher rank than `inputs` are asked for: embeddings of
    points in a plane that span a plane have lost no dimension. Where all embeddings are one vector there are no
    dimensions, clusters or variability either: these verdicts are "implied". Without codes cluster collapse, which is
    assignment to few of the prototypes, is undefined: verdict "no codes", number None. Raises ValueError for fewer than
    four embeddings.
    """
    thresholds = {"representation": 0.2, "dimensional": 0.5, "cluster": 0.5, "intracluster": 0.05}
    n, d = z.shape
    if n < 4:
        raise ValueError(f"a diagnosis needs at least 4 embeddings, not {n}")
    rank = effective_rank(z)
    dimensions = max(2, min(n - 1, d, inputs**2 if inputs else d))  # squared, because below its root is collapse
    numbers = {
        "representation": 1 - center_norm(z) ** 2 if rank else 0.0,
        "dimensional": min(1.0, math.log(max(1, rank)) / math.log(dimensions)),
        "cluster": None,
        "intracluster": cluster_gap(z) if rank else 0.0,
    }
    if codes is not None:
        use = torch.bincount(codes.cpu()).double() / n
        numbers["cluster"] = torch.special.entr(use).sum().item() / math.log(max(2, min(n, clusters)))
    point = numbers["representation"] < thresholds["representation"]
    report = {}
    for mode, number in numbers.items():
        if point and mode != "representation":
            verdict = "implied"
        elif number is None:
            verdict = "no codes"
        else:
            verdict = "collapsed" if number < thresholds[mode] else "ok"
        report[mode] = {"number": number, "threshold": thresholds[mode], "verdict": verdict}
    return report


def knn_accuracy(bank, bank_labels, queries, labels, k=200, temperature=0.1):
    """Share of `queries` (m, d) whose class the `k` nearest of `bank` (n, d) tell, by cosine similarity, each vote
    weighted exp(similarity / temperature) (Wu et al., 2018, Section 3.4). Labels are integers (m,) and (n,)."""
    bank, queries = F.normalize(bank.float(), dim=1), F.normalize(queries.float(), dim=1)
    bank_labels, labels = bank_labels.to(bank.device), labels.to(bank.device)
    classes = int(bank_labels.max()) + 1
    right = 0
    for query, label in zip(queries.split(1024), labels.split(1024), strict=True):
        similarity, nearest = (query @ bank.T).topk(min(k, len(bank)), dim=1)
        # Relative to the nearest, so that a small temperature cannot overflow.
        weight = ((similarity - similarity[:, :1]) / temperature).exp()
        votes = torch.zeros(len(query), classes, device=bank.device).scatter_add_(1, bank_labels[nearest], weight)
        right += (votes.argmax(1) == label).sum().item()
    return right / len(queries)


def kmeans(x, k, restarts=5, iterations=100):
    """Cluster assignments (n,) of x (n, d) and centers (k, d): Lloyd's algorithm from greedy k-means++ seeds, best of
    `restarts`."""
    rng, k, best = generator(0), min(k, len(x)), (math.inf,)
    for _ in range(restarts):
        chosen = [int(torch.randint(len(x), (1,), generator=rng))]
        nearest = (x - x[chosen[0]]).square().sum(1)
        for _ in range(k - 1):
            # Points on top of a seed have no weight; where all are, any will do. The best of four draws is kept.
            draws = torch.multinomial(nearest.cpu().double() + 1e-30, 4, replacement=True, generator=rng).to(x.device)
            closer = torch.minimum(nearest, torch.cdist(x[draws], x).square())
            best_draw = int(closer.sum(1).argmin())
            nearest = closer[best_draw]
            chosen.append(int(draws[best_draw]))
        centers, assigned = x[chosen], None
        for _ in range(iterations):
            before = assigned
            distance, assigned = torch.cdist(x, centers).min(1)
            if before is not None and torch.equal(before, assigned):
                break
            total = torch.zeros_like(centers).index_add_(0, assigned, x)
            count = torch.bincount(assigned, minlength=k).unsqueeze(1)
            centers = torch.where(count > 0, total / count.clamp_min(1), centers)
        inertia = distance.square().sum().item()
        if inertia < best[0]:
            best = (inertia, assigned, centers)
    return best[1:]


@torch.no_grad()
def extract(model, images, data, batch_size=500):
    """Features (n, .), embedding (n, .) and, for clustering methods, assigned codes (n,) of how many `clusters`, of
    un-augmented images in eval mode and float32, as a dict; the model comes back in the mode it was in."""
    training = model.training
    model.eval()
    parts = []
    for batch in images.split(batch_size):
        out = model.embed(data.normalise(batch))
        scores = out.pop("scores", None)
        parts.append(out if scores is None else out | {"codes": scores.argmax(1)})
    model.train(training)
    out = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return out if scores is None else out | {"clusters": scores.shape[1]}


def spread(images, limit):
    """Indices of at most `limit` images, evenly over the set, which may be sorted by class."""
    n = len(images)
    return torch.arange(min(limit, n), device=images.device) * n // min(limit, n)


def collapse_metrics(model, data):
    """The figures shown while training, of up to 1000 un-augmented training images (under 2 % of an epoch)."""
    some = spread(data.images, min(1000, max(150, len(data.images) // 20)))
    out = extract(model, data.images[some], data)
    z = out["embedding"]
    if not z.isfinite().all():
        return {"center_norm": math.nan}  # the run stops at it; eigenvalues of NaN would be a traceback
    metrics = {
        "center_norm": center_norm(z),
        "effective_rank": effective_rank(z),
        "correlation": average_correlation(z),
    }
    if "codes" in out:
        metrics["used_codes"] = used_codes(out["codes"])
    return metrics


def knn_monitor(model, data):
    """kNN accuracy of up to 2000 test images in a bank of up to 5000 training images, evenly spread over the sets."""
    features, labels = [], []
    for images, label, limit in ((data.images, data.labels, 5_000), (data.test_images, data.test_labels, 2_000)):
        some = spread(images, limit)
        features.append(extract(model, images[some], data)["features"])
        labels.append(label[some])
    return knn_accuracy(features[0], labels[0], features[1], labels[1])


# --- processes

# Under torchrun every process runs the same script on its share of each batch. Losses are functions of the whole batch:
# `gather` brings it together, each process takes the gradient of the one loss for its own rows, and `sum_gradients`
# adds these up. So k processes step exactly as one process with the whole batch would.


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def is_main():
    return rank() == 0


class rank_zero_first:
    """Within this context process 0 goes first, to download or write what the others then find."""

    def __enter__(self):
        if rank() > 0:
            dist.barrier()

    def __exit__(self, *_):
        if rank() == 0 and world_size() > 1:
            dist.barrier()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(parts, x)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        return grad.chunk(world_size())[rank()]


def gather(x):
    """The rows (n / k, ...) of all k processes as one batch (n, ...), with gradient; without processes, x itself."""
    return _Gather.apply(x.contiguous()) if world_size() > 1 else x


class _AllMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x / world_size()

    @staticmethod
    def backward(ctx, grad):
        return _AllMean.forward(ctx, grad)


class CPUSyncBatchNorm(nn.SyncBatchNorm):
    """Batch norm over the batches of all processes where torch's own, which needs a GPU, does not run."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        dims = [0, *range(2, x.ndim)]
        shape = (1, -1) + (1,) * (x.ndim - 2)
        mean = _AllMean.apply(x.mean(dims))
        x = x - mean.view(shape)
        var = _AllMean.apply((x * x).mean(dims))
        with torch.no_grad():
            n = world_size() * x.numel() / x.shape[1]
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / (n - 1), self.momentum)
        x = x * torch.rsqrt(var + self.eps).view(shape)
        return x * self.weight.view(shape) + self.bias.view(shape) if self.affine else x


def place(model, device):
    """Moves the model to the device, and under torchrun makes its batch norms count over all processes."""
    if world_size() > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        for module in model.modules():
            if isinstance(module, nn.SyncBatchNorm) and device.type != "cuda":
                module.__class__ = CPUSyncBatchNorm
    return model.to(device, memory_format=torch.channels_last)


def sum_gradients(model):
    """Adds up the gradients of all processes in one message; nothing to do without processes."""
    if world_size() > 1:
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        for grad, summed in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            grad.copy_(summed.view_as(grad))


# --- the run

SHARED = {  # name: (default, help, type or choices); a method's DEFAULTS may change a default
    "dataset": ("cifar10", "cifar10, cifar100, svhn: downloaded once · imagenet100, folder: your images · "
                "shapes, blobs, moons: drawn here, no download",
                ["cifar10", "cifar100", "svhn", "imagenet100", "folder", "shapes", "blobs", "moons"]),
    "data_dir": ("data", "where the images are or will be; a folder holds train/<class>/* and val/<class>/*", str),
    "image_size": (None, "side in pixels [32; imagenet100: 224]", int),
    "backbone": ("resnet18", "network; blobs and moons need mlp, the rest an image network",
                 ["resnet8", "resnet18", "resnet50", "vit_small", "mlp"]),
    "width": (None, "channels of the first stage; 16 makes a ResNet a laptop can train [resnet8: 128, resnet18 and "
              "resnet50: 64, vit_small: 384, mlp: 64]", int),
    "augment": ("strong", "weak: small shifts, rare colour changes, noise", ["strong", "weak"]),
    "epochs": (200, "passes over the data; more after --resume prolongs a run", int),
    "batch_size": (256, "images per step, over all processes together", int),
    "optimizer": ("adam", "sgd and lars have momentum 0.9; none decays biases and norms", ["sgd", "adam", "lars"]),
    "lr": (1e-3, "highest learning rate, as used, not scaled by the batch size; cosine to 0 after the warm-up", float),
    "weight_decay": (1e-4, "L2 penalty on weights", float),
    "warmup_epochs": (None, "epochs of linear warm-up [10, but at most a tenth of the epochs]", int),
    "seed": (0, "of weights, order and augmentation", int),
    "device": (None, "[cuda, else mps, else cpu]", ["cuda", "mps", "cpu"]),
    "precision": (None, "of the network, the loss is always float32; bf16 is also much faster on CPUs with AVX512-BF16 "
                  "or AMX, much slower on others [cuda: bf16, else fp32]", ["bf16", "fp32"]),
    "compile": (False, "compile the network with torch.compile: slow start, faster steps", bool),
    "eval_every": (10, "epochs between kNN checks", int),
    "save_every": (1, "epochs between checkpoints", int),
    "out": (None, "run folder [runs/<method>-<dataset>-seed<seed>]", str),
    "resume": (False, "go on from the run folder's last checkpoint, if there is one", bool),
}  # fmt: skip


class Parser(argparse.ArgumentParser):
    def error(self, message):
        fail(f"{message} (see --help)")


def parse_args(file, doc, defaults):
    """The flags of a method script as a namespace, checked, with `method` named after the file.

    `defaults` gives shared flags their value and the method's own flags a tuple: default, help and, where there are
    any, a list of choices or the least and the greatest value.
    """
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    shared, own = parser.add_argument_group("shared by all methods"), parser.add_argument_group("this method's")
    for name, (default, text, kind) in SHARED.items():
        _add_flag(shared, name, defaults.get(name, default), text, kind)
    limits = {"image_size": [8], "width": [1], "epochs": [1], "batch_size": [2], "warmup_epochs": [0], "seed": [0],
              "eval_every": [1], "save_every": [1], "lr": [0], "weight_decay": [0]}  # fmt: skip
    for name in defaults:
        if name not in SHARED:
            default, text, *rest = defaults[name]
            choices = rest and isinstance(rest[0], list)
            _add_flag(own, name, default, text, rest[0] if choices else type(default))
            if rest and not choices:
                limits[name] = rest
    args = parser.parse_args()
    args.method = Path(file).stem
    for name, (least, *most) in limits.items():
        value, most = getattr(args, name), most[0] if most else sys.float_info.max
        if value is not None and not least <= value <= most:
            between = f"at least {least}" if most == sys.float_info.max else f"between {least} and {most}"
            fail(f"--{name.replace('_', '-')} must be {between}, not {value}")
    if args.warmup_epochs is not None and args.warmup_epochs > args.epochs:
        fail(f"--warmup-epochs {args.warmup_epochs} is more than --epochs {args.epochs}")
    args.image_size = args.image_size or (224 if args.dataset == "imagenet100" else 32)
    args.out = args.out or f"runs/{args.method}-{args.dataset}-seed{args.seed}"
    return args


def _add_flag(group, name, default, text, kind):
    flag = "--" + name.replace("_", "-")
    text += "" if default is None or kind is bool else f" [{default}]"
    text = text.replace("%", "%%")
    if kind is bool:
        action = argparse.BooleanOptionalAction if name == "compile" else "store_true"
        group.add_argument(flag, action=action, default=default, help=text)
    elif isinstance(kind, list):
        group.add_argument(flag, choices=kind, default=default, help=text, metavar="NAME" if len(kind) > 3 else None)
    else:
        group.add_argument(flag, type=kind, default=default, help=text, metavar=kind.__name__.upper())


def find_device(name):
    """The named torch device, or the best there is: cuda, then mps, then cpu."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = name or next(kind for kind in there if there[kind])
    if not there[name]:
        fail(f"--device {name} is not available here; use --device {next(kind for kind in there if there[kind])}")
    return torch.device(name, int(os.environ.get("LOCAL_RANK", 0)) if name == "cuda" else None)


def start(args):
    """Joins the processes under torchrun, seeds torch, and returns the device."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    device = find_device(args.device)
    args.precision = args.precision or ("bf16" if device.type == "cuda" else "fp32")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    if "RANK" in os.environ and not dist.is_initialized():
        # Two hours, because the others wait while the first process decodes or downloads.
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=2))
    if args.batch_size % world_size():
        fail(f"--batch-size {args.batch_size} cannot be shared by {world_size()} processes; choose a multiple")
    torch.manual_seed(args.seed)
    return device


class LARS(torch.optim.Optimizer):
    """SGD with momentum 0.9 whose step on each weight is scaled by trust = eta |w| / |g| ("Large Batch Training of
    Convolutional Networks", You et al., 2017), g including weight decay, as in the published Barlow Twins and VICReg
    runs: eta 0.001; biases and norms, which are one-dimensional, are stepped on without trust or decay."""

    def __init__(self, params, lr, weight_decay=0.0, momentum=0.9, eta=0.001):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "eta": eta})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                step = p.grad
                if p.ndim > 1:
                    step = step.add(p, alpha=group["weight_decay"])
                    w, g = p.norm(), step.norm()
                    step = step * torch.where((w > 0) & (g > 0), group["eta"] * w / g, 1.0)
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                p.sub_(state["momentum_buffer"].mul_(group["momentum"]).add_(step), alpha=group["lr"])


def build_optimizer(model, args):
    """The optimizer `args.optimizer` over all parameters that learn, with weight decay on weights only."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": args.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if args.optimizer == "lars":
        return LARS(groups, args.lr)
    fused = parameters[0].device.type == "cuda"
    if args.optimizer == "sgd":
        return torch.optim.SGD(groups, args.lr, momentum=0.9, fused=fused)
    return torch.optim.Adam(groups, args.lr, fused=fused)


class Run:
    """A training run: where it stands (`epoch`, `step`), its folder, log, checkpoint and progress bar.

    The folder holds log.jsonl (first line: command, flags, versions, device; then one line per epoch) and last.pt.
    Ctrl-C and SIGTERM save after the step in progress and exit. Without --resume a folder that holds a run is refused.
    """

    MAY_CHANGE = {"data_dir", "epochs", "device", "precision", "compile", "eval_every", "save_every", "out", "resume"}

    def __init__(self, args, model, optimizer, data):
        self.args, self.model, self.optimizer, self.data = args, model, optimizer, data
        self.steps_per_epoch = len(data.labels) // args.batch_size
        if not self.steps_per_epoch:
            fail(f"--batch-size {args.batch_size} is larger than the training set of {len(data.labels)} images")
        self.total_steps = args.epochs * self.steps_per_epoch
        warmup = min(10, args.epochs / 10) if args.warmup_epochs is None else args.warmup_epochs
        self.warmup_steps = round(warmup * self.steps_per_epoch)
        self.step, self.epoch, self.sums, self.stopping = 0, 0, {}, False
        self.checkpoint, self.log = Path(args.out, "last.pt"), Path(args.out, "log.jsonl")
        if self.checkpoint.exists():
            if not args.resume:
                fail(f"{args.out!r} already holds a run: add --resume to go on with it, or choose another --out")
            self._load()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        if is_main():
            self._open_log()
        if is_main() and self.step == 0:
            knn = knn_monitor(model, data)
            self._write({"epoch": 0, "knn": knn, **collapse_metrics(model, data)})
        quiet = None if is_main() else True
        self.bar = tqdm(total=self.total_steps, initial=self.step, unit="step", disable=quiet, dynamic_ncols=True)

    def epochs(self):
        """The epochs still to do, from 0."""
        for epoch in range(self.step // self.steps_per_epoch, self.args.epochs):
            self.epoch = epoch
            self.model.train()
            self.began, self.first = time.perf_counter(), self.step
            yield epoch

    def batches(self, views):
        """The batches of this epoch still to do, as two views (see `two_views`)."""
        self.bar.set_description(f"epoch {self.epoch + 1}/{self.args.epochs}")
        start = self.epoch * self.steps_per_epoch
        for pair in two_views(self.data, self.args, views, self.epoch, self.step - start):
            yield pair
            self.step += 1
            self.bar.update()
            if self._told_to_stop() and self.step < start + self.steps_per_epoch:
                self._means()
                self._save()
                self._exit()

    def record(self, terms):
        """Adds up a step's loss terms; every ten steps shows their means, which is the only wait for the device."""
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()
        if (self.step + 1) % 10 == 0:
            self.bar.set_postfix({name: f"{value:.4g}" for name, value in self._means(1).items()}, refresh=False)

    def end_epoch(self, metrics):
        """Writes the epoch's line to the log and the screen, and the checkpoint."""
        done = self.epoch + 1
        line = {"epoch": done, "lr": self.optimizer.param_groups[0]["lr"], **self._means(metrics=metrics)}
        seconds = time.perf_counter() - self.began
        line["images_per_second"] = (self.step - self.first) * self.args.batch_size / seconds
        last = done == self.args.epochs
        if is_main():
            if done % self.args.eval_every == 0 or last:
                line["knn"] = knn_monitor(self.model, self.data)
            self._write(line)
            shown = "  ".join(f"{k} {v:.4g}" for k, v in line.items() if k not in ("epoch", "lr", "images_per_second"))
            tqdm.write(f"epoch {done}/{self.args.epochs}  {shown}")
        self.sums = {}
        stop = self._told_to_stop(now=True)
        if done % self.args.save_every == 0 or last or stop:
            self._save()
        if stop and not last:
            self._exit()

    def finish(self):
        """Prints what the run has come to and the next command."""
        self.bar.close()
        if is_main():
            lines = [json.loads(line) for line in self.log.read_text().splitlines()[1:]]
            before, after = lines[0], lines[-1]
            print(f"\nkNN accuracy  {before['knn']:.3f} untrained, {after['knn']:.3f} trained")
            for name in ("center_norm", "effective_rank", "correlation", "used_codes"):
                if name in after:
                    print(f"{name:<13} {before[name]:.4g} untrained, {after[name]:.4g} trained")
            print(f"\nnext: python evaluate.py --init {self.checkpoint}")
        if dist.is_initialized():
            dist.destroy_process_group()

    def _means(self, steps=None, metrics=None):
        # The sums may reach back to before an interruption, so they are divided by the steps of the whole epoch so far.
        steps = self.step + (steps or 0) - self.epoch * self.steps_per_epoch
        means = {name: float(value) / steps for name, value in self.sums.items()} | (metrics or {})
        for name, value in means.items():
            if not math.isfinite(value):
                kept = f"; the last good checkpoint is {self.checkpoint}" if self.checkpoint.exists() else ""
                self.bar.close()
                print(f"{self.args.method}: {name} is {value} in epoch {self.epoch + 1}{kept}", file=sys.stderr)
                sys.exit(1)
        return means

    def _on_signal(self, number, frame):
        self.stopping = number
        signal.signal(number, signal.SIG_DFL)  # a second one ends the program at once

    def _told_to_stop(self, now=False):
        # All processes must stop at the same step, so they agree on it, but not at every step.
        if world_size() > 1 and (now or self.step % 10 == 0):
            flag = torch.tensor(int(self.stopping), device=self.data.mean.device)
            dist.all_reduce(flag, dist.ReduceOp.MAX)
            self.stopping = flag.item()
            return self.stopping
        return self.stopping if world_size() == 1 else 0

    def _exit(self):
        self.bar.close()
        if is_main():
            print(
                f"\nstopped in epoch {self.epoch + 1}, saved {self.checkpoint}; the same command with --resume goes on"
            )
        if dist.is_initialized():
            dist.destroy_process_group()
        sys.exit(128 + self.stopping)

    def _open_log(self):
        header = {
            "argv": sys.argv,
            "args": vars(self.args),
            "versions": {"python": platform.python_version(), "torch": torch.__version__,
                         "torchvision": torchvision.__version__, "numpy": np.__version__},
            "device": torch.cuda.get_device_name() if self.data.mean.is_cuda else self.data.mean.device.type,
            "processes": world_size(),
        }  # fmt: skip
        lines = [json.dumps(header)]
        if self.step and self.log.exists():
            # Lines of epochs after the checkpoint, or cut off by a crash, are of steps that will be done again.
            kept = self.log.read_text().splitlines()
            epochs = (line for line in kept[1:] if line.endswith("}"))
            lines = kept[:1] + [
                line for line in epochs if json.loads(line)["epoch"] <= self.step // self.steps_per_epoch
            ]
        try:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            replace(self.log, lambda file: file.write("".join(line + "\n" for line in lines).encode()))
        except OSError as error:
            fail(f"cannot write to the run folder {str(self.log.parent)!r}: {error.strerror}")

    def _write(self, line):
        with open(self.log, "a") as file:
            file.write(json.dumps(line) + "\n")

    def _save(self):
        if is_main():
            state = {
                "method": self.args.method,
                "args": vars(self.args),
                "epoch": self.step // self.steps_per_epoch,
                "step": self.step,
                "model": self.model.state_dict(),
                "backbone": self.model.backbone.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "sums": self.sums,
                "rng": torch.get_rng_state(),
                "rng_cuda": torch.cuda.get_rng_state() if self.data.mean.is_cuda else None,
            }
            replace(self.checkpoint, lambda file: torch.save(state, file))
        if world_size() > 1:
            dist.barrier()  # nobody leaves before the file is written: torchrun would end the writer

    def _load(self):
        state = load_checkpoint(self.checkpoint)
        now, then = vars(self.args), state["args"]
        if state["method"] != self.args.method:
            fail(f"{self.checkpoint} is a run of {state['method']}, not {self.args.method}: choose another --out")
        changed = [k for k in now if k not in self.MAY_CHANGE and now[k] != then.get(k)]
        if changed:
            name = changed[0]
            flag = "--" + name.replace("_", "-")
            fail(f"{self.checkpoint} has {flag} {then.get(name)}, not {now[name]}: change it or choose another --out")
        if state["step"] > self.total_steps:
            fail(f"{self.checkpoint} has done {state['epoch']} epochs already, more than --epochs {self.args.epochs}")
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (KeyError, ValueError, RuntimeError) as error:
            fail(f"{self.checkpoint} does not fit this model: {str(error).splitlines()[0]}")
        device = self.data.mean.device
        self.step, self.sums = state["step"], {k: v.to(device) for k, v in state["sums"].items()}
        torch.set_rng_state(state["rng"])
        if state["rng_cuda"] is not None and device.type == "cuda":
            torch.cuda.set_rng_state(state["rng_cuda"])


def replace(path, write):
    """Writes a file whole beside `path`, then renames it: a crash leaves the old file or the new one, never half."""
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


# --- checkpoints


def load_checkpoint(path):
    """The checkpoint at `path`, a file or a run folder, on the CPU; ends the program with one line if it is none."""
    path = Path(path)
    path = path / "last.pt" if path.is_dir() else path
    if not path.exists():
        fail(f"no checkpoint at {str(path)!r}; training writes one to runs/<method>-<dataset>-seed<seed>/last.pt")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        missing = {"method", "args", "epoch", "step", "model", "backbone"} - state.keys()
    except Exception as error:  # torch.load raises half a dozen kinds on files that are cut short or something else
        fail(f"{str(path)!r} is damaged or not a checkpoint ({type(error).__name__}); train again or use a copy")
    if missing:
        fail(f"{str(path)!r} is not a checkpoint of these methods: it lacks {sorted(missing)[0]!r}")
    return state


def args_on(state, dataset=None, data_dir=None):
    """A checkpoint's flags, with the data set to look at it with in place of its own; refuses what it cannot read."""
    args = argparse.Namespace(**state["args"])
    args.dataset, args.data_dir = dataset or args.dataset, data_dir or args.data_dir
    if (args.dataset in TOYS) != (args.backbone == "mlp"):
        fail(f"a checkpoint with a {args.backbone} backbone cannot read --dataset {args.dataset}")
    return args


def load_method(name):
    """The module methods/<name>.py."""
    path = Path(__file__).parent / "methods" / f"{name}.py"
    if not path.exists():
        fail(f"the checkpoint is of method {name!r}, and there is no methods/{name}.py")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build_model(state, device, trained=True):
    """The model of a checkpoint in eval mode, or, with trained=False, as it was before training."""
    args = argparse.Namespace(**state["args"])
    torch.manual_seed(args.seed)
    model = load_method(state["method"]).Model(args)
    if trained:
        try:
            model.load_state_dict(state["model"])
        except RuntimeError as error:
            fail(f"the checkpoint does not fit methods/{state['method']}.py: {str(error).splitlines()[0]}")
    return model.to(device, memory_format=torch.channels_last).eval()
