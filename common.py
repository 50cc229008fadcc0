"""What the training scripts share. Nothing here knows a method.

Contents, in the order of this file:

Data          load_data, two_views          uint8 images, and two augmented views of each batch
Augmentation  draw_augmentation, augment    random parameters for each image, a batch at once
Backbones     build_backbone, load_weights  resnet8, resnet18, resnet50, vit_small, mlp
Metrics       collapse_metrics, diagnose    center norm, rank, codes, kNN accuracy; the verdict
Processes     gather, sum_gradients         several processes compute what a single one would
Flags         add_shared_flags, parse_args  the flags of all methods, and where defaults come from
Run           set_up, open_run, Run         device, optimizer, run folder, log, checkpoint, resume

What this file asks of a method's `Model`, a `torch.nn.Module` that is built as `Model(args)`:

backbone      a Module from images (n, 3, H, W) or points (n, 2) to features (n, num_features), as
              `build_backbone` returns it, with the attribute `num_features`. The checkpoint holds
              its state a second time, alone.
head          a Module from features to embeddings z (n, d), which the loss acts on.
forward(x)    head(backbone(x)).
scores(z)     Only if there are codes or prototypes: embeddings (n, d) to scores (n, c). Image i is
              assigned the code with the largest score. A row of scores depends on its own z alone.
temperature   Only if there are scores, and 1 if it is missing: softmax(scores / temperature) is the
              distribution whose entropy is measured.
teacher       Only if there is one: a Module without gradient, as `frozen_copy` returns it. Its
              first part, teacher[0], is a copy of the backbone, which `--weights` sets, too.
              `--compile` compiles its `forward`, and that of the model.

Parameters and buffers hold all that training changes, because the checkpoint keeps nothing else of
the model. The parameters that learn require a gradient when `build_optimizer` is called. Layers
with parameters come before `gather`. Before it, nothing may mix the rows of a batch but the batch
norms of torch.nn, which `to_device` lets see the batch of all processes. Random numbers within a
step come from a generator seeded by seed and step, because the checkpoint does not hold the state
of torch's own generator.
"""

import argparse
import collections
import copy
import functools
import hashlib
import itertools
import json
import math
import os
import platform
import shutil
import signal
import sys
import time
import uuid
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
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

try:
    import fcntl
except ImportError:  # Windows, where run folders are not locked
    fcntl = None


def fail(message):
    """Ends the program with one line on stderr and exit status 2."""
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def generator(*key):
    """A random generator that depends only on the integers `key`: any step can be drawn again."""
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed))


def uniform(low, high, shape, draw):
    """Random numbers between `low` and `high`, drawn from the generator `draw`."""
    return low + (high - low) * torch.rand(shape, generator=draw)


# --- data

TOYS = ("blobs", "moons")
DATASETS = ("cifar10", "cifar100", "svhn", "imagenet100", "folder", "shapes", *TOYS)
# Files with these endings are images, if the installed Pillow reads them.
IMAGE_ENDINGS = """
.jpg .jpeg .jpe .jfif .png .apng .webp .avif .gif .tif .tiff .bmp .dib .jp2 .j2k .jpx .jpf .j2c
.ppm .pgm .pbm .pnm .tga .qoi
""".split()

# How an image is turned upright, by its EXIF orientation. (`ImageOps.exif_transpose` of Pillow also
# writes the EXIF data anew, which fails where another entry is damaged.)
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# The 100 classes that "Contrastive Multiview Coding" (Tian et al., 2020) drew from ImageNet.
IMAGENET100 = """
n02869837 n01749939 n02488291 n02107142 n13037406 n02091831 n04517823 n04589890 n03062245 n01773797
n01735189 n07831146 n07753275 n03085013 n04485082 n02105505 n01983481 n02788148 n03530642 n04435653
n02086910 n02859443 n13040303 n03594734 n02085620 n02099849 n01558993 n04493381 n02109047 n04111531
n02877765 n04429376 n02009229 n01978455 n02106550 n01820546 n01692333 n07714571 n02974003 n02114855
n03785016 n03764736 n03775546 n02087046 n07836838 n04099969 n04592741 n03891251 n02701002 n03379051
n02259212 n07715103 n03947888 n04026417 n02326432 n03637318 n01980166 n02113799 n02086240 n03903868
n02483362 n04127249 n02089973 n03017168 n02093428 n02804414 n02396427 n04418357 n02172182 n01729322
n02113978 n03787032 n02089867 n02119022 n03777754 n04238763 n02231487 n03032252 n02138441 n02104029
n03837869 n03494278 n04136333 n03794056 n03492542 n02018207 n04067472 n03930630 n03584829 n02123045
n04229816 n02100583 n03642806 n04336792 n03259280 n02116738 n02108089 n03424325 n01855672 n02090622
""".split()


@dataclass
class Data:
    """A data set. Training and test images are uint8 (N, 3, H, W), points are float32 (N, 2).

    Labels are int64 (N,), places in the list `classes`. They are None, and `classes` is empty, if
    the data set has no labels. `mean` and `std` are those of the training set: of each color (3,)
    of pixels in [0, 1], or of each coordinate (2,). The network sees `size` × `size` pixels. Of
    larger images it sees the middle.

    The lines of `summary` say what was understood. `fingerprint` changes when the training images
    or their order change. For a folder, the names are the images' paths relative to it.
    """

    images: torch.Tensor
    labels: torch.Tensor | None
    test_images: torch.Tensor
    test_labels: torch.Tensor | None
    classes: list
    mean: torch.Tensor
    std: torch.Tensor
    size: int
    summary: list = field(default_factory=list)
    fingerprint: str = ""
    train_names: list = field(default_factory=list)
    test_names: list = field(default_factory=list)

    def normalise(self, images):
        """A batch without augmentation as the network sees it: float32, mean 0, deviation 1."""
        device = self.mean.device
        if images.ndim == 2:
            return (images.to(device) - self.mean) / self.std
        images = TF.center_crop(images, self.size)
        x = images.to(device) / 255
        x = (x - self.mean.view(3, 1, 1)) / self.std.view(3, 1, 1)
        return x.contiguous(memory_format=torch.channels_last)


def load_data(args, device):
    """The data set `args.dataset` as `Data`.

    Images that take a third of a GPU's memory or more stay on the host, as `fits` decides. Those of
    a folder then stay in a memory-mapped file.
    """
    size = args.image_size
    details = {}  # the fields of `Data` that only a folder has
    if args.dataset in TOYS:
        train = draw_toy(args.dataset, 1500, seed=0)
        test = draw_toy(args.dataset, 600, seed=1)
        classes = ["0", "1", "2"]
    elif args.dataset == "shapes":
        train = draw_shapes(5000, size, seed=0)
        test = draw_shapes(1000, size, seed=1)
        classes = list(SHAPES)
    elif args.dataset in ("folder", "imagenet100"):
        train, test, classes, details = read_folder(args)
    else:
        train, test, classes = read_torchvision(args)
    images, labels = train
    test_images, test_labels = test
    if not details:
        kind = "points" if images.ndim == 2 else "images"
        details = {
            "summary": [
                f"{args.dataset}: {len(images)} {kind} of {len(classes)} classes, "
                f"{len(test_images)} test {kind}"
            ],
            "fingerprint": f"{args.dataset}-{size}-{len(images)}",
        }

    sample = images[:: 1 + images.nbytes // 50_000_000]  # a part of a large set is enough
    if sample.ndim == 2:
        std, mean = torch.std_mean(sample, 0)
    else:
        std, mean = torch.std_mean(sample / 255, (0, 2, 3))
    std = std.clamp_min(1e-3)  # a channel may be constant

    if fits(images.nbytes, device):
        images = images.to(device)
        test_images = test_images.to(device)
        if classes:
            labels = labels.to(device)
            test_labels = test_labels.to(device)
    mean = mean.to(device)
    std = std.to(device)
    return Data(images, labels, test_images, test_labels, classes, mean, std, size, **details)


def fits(nbytes, device):
    """Whether so many bytes of images should lie on the device: up to a third of its memory."""
    if device.type == "cuda":
        free_memory, _ = torch.cuda.mem_get_info(device)
        return nbytes < free_memory / 3
    if device.type == "mps":
        return nbytes < torch.mps.recommended_max_memory() / 3
    return True


def read_torchvision(args):
    """CIFAR-10, CIFAR-100 or SVHN by torchvision, which downloads it once and checks its checksums.

    Returns (images, labels) of the training set, the same of the test set, and the class names.
    Without the files and without a connection, the program ends with one line.
    """
    svhn = args.dataset == "svhn"
    dataset_class = getattr(torchvision.datasets, args.dataset.upper())
    splits = {}
    for split in ("train", "test"):
        if svhn:
            which = {"split": split}
        else:
            which = {"train": split == "train"}
        try:
            with first_on_machine() as first:
                found = dataset_class(args.data_dir, download=first, **which)
        except (OSError, RuntimeError) as error:
            why = type(error).__name__
            if svhn:
                url = dataset_class.split_list[split][0]
            else:
                url = dataset_class.url
            fail(
                f"{args.dataset} is not in {args.data_dir!r} and could not be downloaded ({why}): "
                f"put {url} there, or use --dataset shapes"
            )
        if svhn:
            images = torch.from_numpy(found.data)
            labels = found.labels
            classes = list("0123456789")
        else:
            images = torch.from_numpy(found.data.transpose(0, 3, 1, 2).copy())
            labels = found.targets
            classes = found.classes
        if images.shape[-1] != args.image_size:
            images = TF.resize(images, [args.image_size, args.image_size], antialias=True)
        splits[split] = (images, torch.as_tensor(labels).long())
    return splits["train"], splits["test"], classes


def read_folder(args):
    """The images of the folder `args.data_dir`, for "folder" and "imagenet100".

    "folder" takes the images below train/, and those below val/ or test/ as the test set. Without
    train/ it takes all images. Without a test set it holds images out (see `by_hash`).
    "imagenet100" takes the 100 published classes of an ImageNet folder. Returns (images, labels) of
    the training set, the same of the test set, the class names, and a dict of the other fields of
    `Data`. Without labels (see `find_classes`) they are None, and there are no class names.

    The images are memory-mapped uint8. Above 64 pixels they are larger than the network sees them,
    256 for 224, because random crops are cut out of them. The program ends with one line if there
    are no images, if their labels are not clear, or if some of them cannot be read.
    """
    root = Path(args.data_dir)
    if not root.is_dir():
        what = "is no folder" if root.exists() else "does not exist"
        fail(f"{str(root.absolute())!r} {what}: --data-dir must be the folder of your images")
    others = collections.Counter()
    if args.dataset == "imagenet100":
        splits = find_imagenet100(root, others)
        classes = sorted(IMAGENET100)
        about_labels = "labels: 100 classes"
    else:
        splits = find_splits(root, others)
        classes, about_labels = find_classes(args.labels, root, splits)

    images, files, about_images = read_splits(args, root, splits)
    if len(splits) == 2:
        _, test = splits
        train_images, train_files = images["train"], files["train"]
        test_images, test_files = images[test], files[test]
        counts = f"{len(train_files)} images to train on, {len(test_files)} in {test}/ to test on"
    else:
        (split,) = splits
        n = len(files[split])
        if n < 2:
            fail(f"{str(root)!r} holds one image: at least two are needed")
        held_out = min(5000, max(n // 10, min(4, n // 2)))
        train_images, train_files = images[split][held_out:], files[split][held_out:]
        test_images, test_files = images[split][:held_out], files[split][:held_out]
        counts = f"{len(train_files)} images to train on, {held_out} others held out"

    summary = [f"{args.dataset}: {counts}", about_labels]
    if "all" in splits and ((root / "val").is_dir() or (root / "test").is_dir()):
        summary.append("there is no folder train/, so val/ and test/ are folders like all others")
    if others:
        kinds = [f"{count} {ending}" for ending, count in others.most_common(5)]
        if len(others) > 5:
            kinds.append("...")
        summary.append(f"skipped, because they are not images: {', '.join(kinds)}")
    summary += about_images

    train_names = [name for name, _, _ in train_files]
    test_names = [name for name, _, _ in test_files]
    train_labels = test_labels = None
    if classes:
        depth = 0 if "all" in splits else 1
        train_labels = labels_of(train_names, classes, depth)
        test_labels = labels_of(test_names, classes, depth)
    details = {
        "summary": summary,
        # Without the times, which a copy of the folder need not keep.
        "fingerprint": fingerprint([(name, size) for name, size, _ in train_files]),
        "train_names": train_names,
        "test_names": test_names,
    }
    return (train_images, train_labels), (test_images, test_labels), classes, details


def find_splits(root, others):
    """The names of the images of each split, as a dict: an image's name is its path below `root`.

    The splits are "train", and "val" or "test" if there is one. Without a folder train/ the only
    split is "all". Where it is alone, the names stand in the order of `by_hash`. `others` counts
    the endings of files that are not images.
    """
    if (root / "val").is_dir():
        test = "val"
    else:
        test = "test"
    folders = {"all": root}
    if (root / "train").is_dir():
        folders = {"train": root / "train"}
        if (root / test).is_dir():
            folders[test] = root / test
    splits = {}
    for split, folder in folders.items():
        splits[split] = list_images(root, [folder], others)
        if not splits[split]:
            fail(
                f"no images in {str(folder)!r}: --data-dir must hold images, at any depth, or else "
                "in train/, and in val/ or test/ if some are to be held out"
            )
    if len(splits) == 1:
        splits[split].sort(key=by_hash)
    return splits


def by_hash(name):
    """The place of an image where a part of all images, the first ones, are held out.

    They are the same in every run. After images have come or gone they are mostly the same.
    """
    return hashlib.sha256(os.fsencode(name)).digest()


def find_imagenet100(root, others):
    """Like `find_splits`, for the 100 classes of an ImageNet folder, which all must have images."""
    if (root / "val").is_dir():
        test = "val"
    else:
        test = "test"
    splits = {}
    for split in ("train", test):
        folders = [root / split / name for name in sorted(IMAGENET100)]
        folders = [folder for folder in folders if folder.is_dir()]
        splits[split] = list_images(root, folders, others)
        there = {name.split("/")[1] for name in splits[split]}
        missing = sorted(set(IMAGENET100) - there)
        if missing:
            fail(
                f"no images in {str(root / split)!r} for {len(missing)} of the 100 classes, the "
                f"first is {missing[0]}: imagenet100 needs train/<class>/*, and val/<class>/* or "
                "test/<class>/*"
            )
    return splits


def list_images(root, folders, others):
    """The paths below `root`, with "/", of all images below the folders, in the order of names.

    Hidden files and folders are left out. Links are followed. `others` counts the endings of files
    that are not images.
    """
    endings = image_endings()
    names = []
    seen = {}
    for top in folders:
        for folder, subfolders, files in os.walk(top, onerror=refuse_folder, followlinks=True):
            subfolders[:] = sorted(name for name in subfolders if name[0] != ".")
            there = os.path.realpath(folder)
            if there in seen:
                fail(
                    f"a folder below {str(root)!r} is there twice, by a link: "
                    f"{seen[there]!r} is {folder!r}; remove the link"
                )
            seen[there] = folder
            prefix = Path(folder).relative_to(root).as_posix() + "/"
            if prefix == "./":
                prefix = ""
            for file in sorted(files):
                ending = os.path.splitext(file)[1].lower()
                if file[0] == ".":
                    continue
                if ending in endings:
                    names.append(prefix + file)
                else:
                    others[ending or "without an ending"] += 1
    return names


def refuse_folder(error):
    """Ends the program with one line because a folder cannot be listed."""
    fail(f"cannot read the folder {error.filename!r} ({error.strerror})")


def image_endings():
    """Those of IMAGE_ENDINGS that the installed Pillow reads."""
    Image.init()
    return {ending for ending in IMAGE_ENDINGS if Image.EXTENSION.get(ending) in Image.OPEN}


def holds_images(folder):
    """Whether there is an image below the folder."""
    endings = image_endings()
    for _, subfolders, files in os.walk(folder):
        subfolders[:] = [name for name in subfolders if name[0] != "."]
        for file in files:
            if file[0] != "." and os.path.splitext(file)[1].lower() in endings:
                return True
    return False


def find_classes(choice, root, splits):
    """The class names, sorted, and a line that says how the labels were understood.

    The class of an image is the first folder of its path below the folder of its split. `choice` is
    "folders"; "none", for no labels; or "auto", for labels if every image lies in <class>/<image>
    and there are two or more classes. Without labels the class names are an empty list.
    """
    if choice == "none":
        return [], "no labels, because of --labels none"
    below = {}  # the paths below the folder of the split
    for split, names in splits.items():
        cut = 0 if split == "all" else len(split) + 1
        below[split] = [name[cut:] for name in names]
    depths = {name.count("/") for names in below.values() for name in names}
    first_split, *other_splits = below
    classes = {name.split("/")[0] for name in below[first_split] if "/" in name}

    if choice == "auto":
        hint = "--labels folders takes the first folder's name as the class"
        if depths == {0}:
            return [], "no labels: the images do not lie in folders of classes"
        if 0 in depths:
            return [], "no labels: some images lie in folders, others do not"
        if len(depths) > 1:
            return [], f"no labels: images lie at different depths; {hint}"
        if depths != {1}:
            return [], f"no labels: images lie in folders of folders; {hint}"
        if len(classes) == 1:
            return [], "no labels: all images lie in one folder"
    for split, names in below.items():
        for name in names:
            if "/" not in name:
                path = root / name if split == "all" else root / split / name
                fail(
                    f"{str(path)!r} does not lie in the folder of a class: "
                    "move it, or use --labels none"
                )
    if len(classes) == 1:
        fail(f"the only class is {min(classes)!r}: use --labels none")
    for split in other_splits:
        extra = {name.split("/")[0] for name in below[split]} - classes
        if extra:
            fail(
                f"{str(root / split)!r} has class {min(extra)!r}, which {first_split}/ lacks: "
                "remove it, or use --labels none"
            )
    classes = sorted(classes)
    some = ", ".join(classes[:3])
    if len(classes) > 3:
        some += ", ..."
    about = f"labels: {len(classes)} classes from the names of folders ({some})"
    if choice == "auto":
        about += "; --labels none ignores them"
    return classes, about


def labels_of(names, classes, depth):
    """The place in `classes` of each image: the folder `depth` folders below the root names it."""
    label_of = {name: label for label, name in enumerate(classes)}
    return torch.tensor([label_of[name.split("/")[depth]] for name in names])


def read_splits(args, root, splits):
    """The images of all splits, from their names.

    Returns two dicts with the images and the files of each split, as `read_images` does, and lines
    that say what has been left out. If images are damaged, and `args.skip_damaged` is not set, the
    program ends with one line when all have been decoded.
    """
    if args.image_size <= 64:
        size = args.image_size
    else:
        size = args.image_size * 8 // 7
    images = {}
    files = {}
    total = 0
    long = 0
    damaged = []
    damaged_lists = []
    for split, names in splits.items():
        images[split], files[split], long_here, damaged_list = read_images(
            args, root, split, names, size
        )
        total += len(names)
        long += long_here
        good = {name for name, _, _ in files[split]}
        if len(good) < len(names):
            damaged += [name for name in names if name not in good]
            damaged_lists.append(repr(str(damaged_list)))

    lines = []
    what = f"{len(damaged)} of {total} images, which are damaged or have more than 8 bits"
    names_are_in = f"all names are in {' and '.join(damaged_lists)}"
    if damaged and not args.skip_damaged:
        first_ten = ", ".join(repr(str(root / name)) for name in damaged[:10])
        fail(
            f"cannot use {what}: {first_ten}; {names_are_in}: "
            "replace or remove these images, or add --skip-damaged"
        )
    if damaged:
        lines.append(f"left out: {what}; {names_are_in}")
    if long > total / 10:
        lines.append(
            "of each image the middle square is used: "
            f"{long} of {total} images lose more than a third of their pixels"
        )
    return images, files, lines


def read_images(args, root, split, names, size):
    """The images of a split (n, 3, size, size), memory-mapped from the cache of decoded images.

    Images that are damaged are left out. Returns the images, the files that they are from as
    (name, size in bytes, time of change), how many of them are long (see `decode_image`), and the
    path of the file that names those that were left out.
    """
    if args.cache_dir is None:
        folder = root / f".cache-{size}"
        prefix = f"{args.dataset}-{split}-{size}-"
    else:
        folder = Path(args.cache_dir)
        place = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:8]
        prefix = f"{args.dataset}-{place}-{split}-{size}-"  # several roots may share the folder
    damaged_list = folder / f"{prefix}damaged.txt"
    files = [(name, *size_and_time(os.path.join(root, name))) for name in names]
    with first_on_machine() as first:
        if first:
            decode_images(folder, prefix, root, files, size)
    damaged = read_lines(damaged_list)
    files = [file for file in files if file[0] not in damaged]
    cache = folder / f"{prefix}{fingerprint(files)}.npy"
    try:
        array = np.load(cache, mmap_mode="c")  # copy-on-write: torch wants writable memory
    except FileNotFoundError:
        fail(f"images in {str(root)!r} have changed while they were read: start again")
    except (OSError, ValueError, EOFError) as error:
        fail(f"cannot read the image cache {str(cache)!r} ({error}): remove this file")
    return torch.from_numpy(array), files, count_long(cache), damaged_list


def size_and_time(path):
    """Of a file: its bytes and the time of its last change, in ns, -1 if it cannot be found."""
    try:
        status = os.stat(path)
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


def read_lines(path):
    """The set of lines of a text file, empty if there is none that can be read."""
    try:
        text = path.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return set()
    return set(text.split("\n")) - {""}


def fingerprint(files):
    """16 hexadecimal digits that change if one of the tuples of strings and numbers does."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(ascii(file).encode())
    return digest.hexdigest()[:16]


def decode_images(folder, prefix, root, files, size):
    """Writes the images as one uint8 array (n, 3, size, size), if that is not yet done.

    The array is folder/<prefix><fingerprint of the files>.npy. So other files, or changed ones, get
    a new array. Arrays of the same prefix that are outdated are removed. Files that are damaged are
    not in the array, and stand in folder/<prefix>damaged.txt, one in a line. The program ends with
    one line if all are damaged, or the array cannot be written.
    """
    damaged_list = folder / f"{prefix}damaged.txt"
    known = read_lines(damaged_list)
    # What was damaged the last time is tried again: perhaps a disk was not there.
    again = [file for file in files if file[0] in known]
    damaged = {file[0] for file, decoded in decode_all(root, again, size) if decoded is None}
    good = [file for file in files if file[0] not in damaged]
    cache = folder / f"{prefix}{fingerprint(good)}.npy"
    if not cache.exists():
        cache, damaged = write_cache(folder, prefix, root, files, size)
    try:
        if damaged and damaged != known:
            text = "".join(f"{name}\n" for name, _, _ in files if name in damaged)
            damaged_list.write_text(text, encoding="utf-8", errors="surrogateescape")
        elif not damaged:
            damaged_list.unlink(missing_ok=True)
    except OSError as error:
        fail(f"cannot write {str(damaged_list)!r} ({error.strerror}): choose another --cache-dir")
    for path in folder.glob(f"{prefix}*"):
        outdated = path.suffix in (".npy", ".json") and path.stem != cache.stem
        with suppress(OSError):  # on Windows another run may have mapped it
            # A killed run leaves its .part. A living one writes to it all the time.
            if path.suffix == ".part":
                outdated = time.time() - path.stat().st_mtime > 3600
            if outdated:
                path.unlink()


def write_cache(folder, prefix, root, files, size):
    """Decodes the files into a new array, which appears only when it is whole.

    Returns its path and the set of the names of damaged files.
    """
    part = folder / f"{prefix}{uuid.uuid4().hex}.part"  # another run may be writing the same array
    good = []
    damaged = set()
    long = 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
        needed = len(files) * 3 * size**2
        disk = shutil.disk_usage(folder)
        if needed > disk.free and disk.total:  # some file systems know neither
            fail(
                f"the image cache {str(folder)!r} needs {needed / 1e9:.3g} GB, and there are "
                f"{disk.free / 1e9:.3g} GB free: choose another folder with --cache-dir"
            )
        # Written row by row, because a map of a file on a full disk ends the program by a signal.
        with open(part, "xb") as out:
            write_header(out, len(files), size)
            for file, decoded in decode_all(root, files, size):
                if decoded is None:
                    damaged.add(file[0])
                    continue
                pixels, is_long = decoded
                out.write(pixels)
                good.append(file)
                long += is_long
            if not good:
                fail(
                    f"all {len(files)} images are damaged or have more than 8 bits, "
                    f"the first is {str(root / files[0][0])!r}"
                )
            out.seek(0)
            write_header(out, len(good), size)
            out.flush()
            os.fsync(out.fileno())
        cache = folder / f"{prefix}{fingerprint(good)}.npy"
        try:
            os.replace(part, cache)
        except PermissionError:  # on Windows, where another run has mapped the same array
            if not cache.exists():
                raise
    except OSError as error:
        fail(
            f"cannot write the image cache {str(folder)!r} ({error.strerror}): "
            "choose another folder with --cache-dir"
        )
    finally:
        with suppress(OSError):  # mostly there is none
            part.unlink()
    with suppress(OSError):  # `count_long` does without it
        cache.with_suffix(".json").write_text(json.dumps({"long": long}))
    return cache, damaged


def write_header(file, n, size):
    """The beginning of an .npy file of `n` images. It has the same length for every `n`."""
    header = {"descr": "|u1", "fortran_order": False, "shape": (n, 3, size, size)}
    np.lib.format.write_array_header_1_0(file, header)


def count_long(cache):
    """How many images of the cache are long."""
    try:
        return json.loads(cache.with_suffix(".json").read_text())["long"]
    except (OSError, ValueError):
        return 0


def decode_all(root, files, size):
    """Yields (file, what `decode_image` gives for it) for all files, in their order."""

    def decode(file):
        return decode_image(root / file[0], size)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of large files, and of odd EXIF data
        # Threads, not processes: Pillow works without the interpreter's lock.
        with (
            ThreadPoolExecutor() as pool,
            tqdm(desc="decode", total=len(files), disable=None, leave=False) as bar,
        ):
            # Some at a time, because the pool would not wait if the disk is slow.
            for first in range(0, len(files), 1000):
                some = files[first : first + 1000]
                for file, decoded in zip(some, pool.map(decode, some), strict=True):
                    bar.update()
                    yield file, decoded


def decode_image(path, size):
    """An image file as (uint8 pixels (3, size, size), whether it is long).

    It is turned upright, as its EXIF orientation says, and laid on white where it is transparent.
    The shorter side is resized to `size`, antialiased, and the middle is cut out. An image is long
    if that leaves out more than a third of it. Returns None if the file is damaged or has more than
    8 bits.
    """
    try:
        if not path.is_file():  # a pipe would be waited for
            return None
        with Image.open(path) as file:
            if file.mode[0] in "IF":  # more than 8 bits, which "RGB" would clip
                return None
            if "transparency" in file.info or file.mode in ("RGBA", "RGBa", "LA", "La", "PA"):
                image = file.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image).convert("RGB")
            else:
                image = file.convert("RGB")
            orientation = file.getexif().get(0x0112)
        with Image.open(path) as file:
            file.verify()  # the checksums of a PNG, which loading does not look at
        if orientation in UPRIGHT:
            image = image.transpose(UPRIGHT[orientation])
        is_long = max(image.size) > 1.5 * min(image.size)
        image = TF.resize(image, size, antialias=True)
        image = TF.center_crop(image, size)
    except Exception:  # Pillow raises a dozen kinds of them on damaged files
        return None
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1)), is_long


def draw_toy(name, n, seed):
    """`n` points (n, 2) of three classes, and their labels (n,).

    "blobs" are three Gaussians on a circle, "moons" are three half circles, up and down in turn.
    """
    draw = generator(seed)
    labels = torch.randperm(n, generator=draw) % 3
    noise = torch.randn(n, 2, generator=draw)
    if name == "blobs":
        angle = 2 * math.pi * labels / 3
        centers = 2 * torch.stack([angle.cos(), angle.sin()], 1)
        return centers + 0.5 * noise, labels
    angle = math.pi * torch.rand(n, generator=draw)
    odd = labels % 2
    x = angle.cos() + labels
    y = (1 - 2 * odd) * angle.sin() + 0.5 * odd  # the half circle of an odd label is turned over
    return torch.stack([x, y], 1) + 0.1 * noise, labels


# Ten shapes as rows of 5 × 5 squares.
SHAPES = {
    "disc": ".###. ##### ##### ##### .###.",
    "ring": ".###. #...# #...# #...# .###.",
    "triangle": "..#.. ..#.. .###. .###. #####",
    "plus": "..#.. ..#.. ##### ..#.. ..#..",
    "tee": "##### ##### ..#.. ..#.. ..#..",
    "ell": "##... ##... ##... ##### #####",
    "cup": "#...# #...# #...# ##### #####",
    "bars": "##### ..... ##### ..... #####",
    "zigzag": "###.. ..#.. ..#.. ..#.. ..###",
    "arrow": "..### ...## ..#.# .#... #....",
}


def draw_shapes(n, size, seed):
    """`n` images (n, 3, size, size) uint8 of ten light shapes on dark ground, and labels (n,).

    Size, place, rotation and noise vary, so that pixels say little about the class. Colors and
    ground do not vary: both views of an image would share them, and a method could learn them
    instead of the shape.
    """
    draw = generator(seed)
    labels = torch.randperm(n, generator=draw) % len(SHAPES)
    radius = uniform(0.35, 0.8, n, draw)
    angle = uniform(0, 2 * math.pi, n, draw)
    x = uniform(-0.6, 0.6, n, draw)
    y = uniform(-0.6, 0.6, n, draw)
    noise_level = uniform(0, 0.1, n, draw)
    noise = noise_level.view(n, 1, 1, 1) * torch.randn(n, 3, size, size, generator=draw)

    squares = torch.zeros(len(SHAPES), 1, 5, 5)
    for i, shape in enumerate(SHAPES.values()):
        for j, row in enumerate(shape.split()):
            squares[i, 0, j] = torch.tensor([square == "#" for square in row])

    # For each pixel of the image, its place in the 5 × 5 squares, from -1 to 1.
    cos = angle.cos() / radius
    sin = angle.sin() / radius
    to_squares = torch.stack([cos, -sin, x, sin, cos, y], 1).view(n, 2, 3)
    places = F.affine_grid(to_squares, (n, 1, size, size), align_corners=False)
    inside = F.grid_sample(squares[labels], places, align_corners=False)
    inside = (4 * inside - 1.5).clamp(0, 1)  # sharper edges
    images = (0.25 + 0.5 * inside + noise).clamp(0, 1)
    return (images * 255).round().byte(), labels


def two_views(data, args, views, epoch, first=0):
    """Yields two augmented views (x1, x2) of each batch of an epoch, from step `first` on.

    `views` holds, for each view, changes to `--augment strong` (see `view_settings`). For points
    the second view is another point of the same class. A view is float32, (n, 3, size, size) or
    (n, 2), where n is this process's share of the batch. The last, short batch is left out. All
    depends only on seed, epoch and step, so that a resumed run sees the same batches.
    """
    n = len(data.images)
    steps = n // args.batch_size
    permutation = torch.randperm(n, generator=generator(args.seed, epoch))
    whole_batches = permutation[: steps * args.batch_size]
    order = whole_batches.view(steps, args.batch_size)  # the images of each step
    remaining = order[first:]
    if data.images.ndim == 2:
        yield from views_of_points(data, args, remaining, epoch, first)
    else:
        yield from views_of_images(data, args, views, remaining, epoch, first)


def own_share(batch_size):
    """The rows of a batch that belong to this process."""
    share = batch_size // world_size()
    return slice(rank() * share, (rank() + 1) * share)


def views_of_points(data, args, order, epoch, first):
    """`two_views` for points: the second view is a random point of the first one's class."""
    device = data.mean.device
    own = own_share(args.batch_size)
    # In `by_class` the points of a class stand together: `count` of them, from `start` on.
    by_class = torch.argsort(data.labels, stable=True)
    class_numbers = torch.arange(len(data.classes), device=device)
    count = (data.labels == class_numbers[:, None]).sum(1)
    start = count.cumsum(0) - count
    for step, points in enumerate(order.to(device, non_blocking=True), first):
        # Drawn for the whole batch, of which each process takes its share.
        draw = generator(args.seed, epoch, step)
        random = torch.rand(args.batch_size, generator=draw).to(device, non_blocking=True)
        label = data.labels[points]
        partners = by_class[start[label] + (random * count[label]).long()]
        x1 = data.normalise(data.images[points[own]])
        x2 = data.normalise(data.images[partners[own]])
        yield x1, x2


def views_of_images(data, args, views, order, epoch, first):
    """`two_views` for images: each view is augmented with its own settings."""
    size = args.image_size
    own = own_share(args.batch_size)
    settings_of_views = [view_settings(args, changes) for changes in views]
    own_batches = batches(data.images, order[:, own], data.mean.device)
    for step, images in enumerate(own_batches, first):
        draw = generator(args.seed, epoch, step)
        source = images.shape[-1]
        augmented = []
        for settings in settings_of_views:
            # Drawn for the whole batch, of which each process takes its share.
            parameters = draw_augmentation(args.batch_size, settings, size, draw, source, own)
            augmented.append(augment(images, parameters, data.mean, data.std, size))
        yield tuple(augmented)


def batches(images, indices, device):
    """Yields images[index] on the device for each row of `indices` (steps, n).

    If the images are on the host, a thread reads one batch ahead from their memory-mapped file and
    sends it to the device, while the network trains on the batch before.
    """
    if images.device.type != "cpu":
        for index in indices.to(device, non_blocking=True):
            yield images[index]
        return

    def read(index):
        # By numpy, because torch would start threads here, which slow down the network's.
        batch = torch.from_numpy(images.numpy().take(index.numpy(), 0))
        if device.type == "cuda":
            return batch.pin_memory().to(device, non_blocking=True)
        return batch.to(device)

    if len(indices) == 0:
        return
    with ThreadPoolExecutor(1) as thread:
        ahead = thread.submit(read, indices[0])
        for index in indices[1:]:
            ready = ahead
            ahead = thread.submit(read, index)
            yield ready.result()
        yield ahead.result()


# --- augmentation

# scale, ratio       area and aspect ratio of a random resized crop, as shares of the image
# padding            instead, a shift by up to so many pixels of the image reflected at its border
# jitter, jitter_p   strengths for brightness, contrast, saturation and hue, and the probability of
#                    any jitter
# flip, grayscale, blur, solarize
#                    probabilities; images below 64 pixels are not blurred, as in SimCLR on CIFAR-10
# noise              standard deviation of Gaussian noise, added after normalisation
# "strong" is BYOL's (Grill et al., 2020, Table 6), without the blur and solarization that differ
# between its two views: a script's VIEWS adds them. "weak" is CPLearn's for ResNet-8 (Sansone et
# al., 2025).
AUGMENT = {
    "strong": {
        "scale": (0.08, 1), "ratio": (3 / 4, 4 / 3),
        "jitter": (0.4, 0.4, 0.2, 0.1), "jitter_p": 0.8,
        "flip": 0.5, "grayscale": 0.2, "blur": 0, "solarize": 0, "noise": 0,
    },
    "weak": {
        "padding": 4,
        "jitter": (0.4, 0.4, 0.4, 0.1), "jitter_p": 0.1,
        "flip": 0.5, "grayscale": 0.1, "blur": 0, "solarize": 0, "noise": 0.03,
    },
}  # fmt: skip

# What a data set needs of every view: a mirrored digit is another sign, and a crop of a twelfth of
# the image seldom holds the shape. These settings come last, so they also replace what a script's
# VIEWS say: on shapes the crop of SwAV, DINO, SimSiam and W-MSE is this one, too.
DATASET_AUGMENT = {"svhn": {"flip": 0}, "shapes": {"scale": (0.3, 1)}}

# The parameter "order" of an augmentation is a permutation of the places in this tuple.
COLOR_OPERATIONS = ("brightness", "contrast", "saturation", "hue")


def view_settings(args, changes):
    """The settings of one view: those of `--augment`, then `changes`, then the data set's.

    `changes` is the view's entry in a script's VIEWS. With `--augment weak` it is ignored.
    """
    settings = dict(AUGMENT[args.augment])
    if args.augment == "strong":
        settings |= changes
    settings |= DATASET_AUGMENT.get(args.dataset, {})
    return settings


def draw_augmentation(n, settings, size, draw, source=None, rows=slice(None)):
    """Random parameters for `n` augmentations of images (source, source) to (size, size).

    They are a dict of CPU tensors with n rows: "crop" (top, left, height, width), "flip",
    "grayscale" and "solarize" (yes or no), "brightness", "contrast" and "saturation" (factors),
    "hue" (turns), "sigma" of the blur (pixels, 0: none), "noise" (n, 3, size, size). "sigma",
    "solarize" and "noise" are missing if the settings have them off. "order" is the order of the
    four color operations, one list for all images. `source` None means `size`. Of all n rows that
    are drawn, `rows` are returned.
    """
    source = source or size
    parameters = {}
    if "padding" in settings:
        parameters["crop"] = draw_shifts(n, settings["padding"], source, draw)
    else:
        parameters["crop"] = draw_crops(n, settings["scale"], settings["ratio"], source, draw)
    parameters["flip"] = uniform(0, 1, n, draw) < settings["flip"]

    jittered = uniform(0, 1, n, draw) < settings["jitter_p"]
    for name, strength in zip(COLOR_OPERATIONS, settings["jitter"], strict=True):
        neutral = 0.0 if name == "hue" else 1.0
        changed = neutral + uniform(-strength, strength, n, draw)
        parameters[name] = torch.where(jittered, changed, neutral)
    order = torch.randperm(len(COLOR_OPERATIONS), generator=draw).tolist()

    parameters["grayscale"] = uniform(0, 1, n, draw) < settings["grayscale"]
    if settings["blur"] and size >= 64:
        blurred = uniform(0, 1, n, draw) < settings["blur"]
        parameters["sigma"] = torch.where(blurred, uniform(0.1, 2, n, draw), 0)
    if settings["solarize"]:
        parameters["solarize"] = uniform(0, 1, n, draw) < settings["solarize"]
    if settings["noise"]:
        noise = torch.randn(n, 3, size, size, generator=draw)
        parameters["noise"] = settings["noise"] * noise

    parameters = {name: values[rows] for name, values in parameters.items()}
    parameters["order"] = order
    return parameters


def draw_shifts(n, padding, source, draw):
    """Crops (n, 4) as large as the image, shifted by up to `padding` pixels in each direction.

    The columns are top, left, height, width.
    """
    top, left = uniform(0, 2 * padding + 1, (2, n), draw).long() - padding
    side = torch.full((n,), source)
    return torch.stack([top, left, side, side], 1)


def draw_crops(n, scale, ratio, source, draw):
    """Random crops (n, 4) within the image, by area and aspect ratio.

    The columns are top, left, height, width. Ten crops are tried for each image, as in torchvision.
    The first that fits is taken, and if none fits, the whole image.
    """
    area = uniform(scale[0], scale[1], (10, n), draw) * source**2
    log_ratio = uniform(math.log(ratio[0]), math.log(ratio[1]), (10, n), draw)
    ratio = log_ratio.exp()
    height = (area / ratio).sqrt().round()
    width = (area * ratio).sqrt().round()
    fits = (height <= source) & (width <= source) & (height > 0) & (width > 0)
    some_fit = fits.any(0)
    first_fit = fits.int().argmax(0, keepdim=True)
    height = torch.where(some_fit, height.gather(0, first_fit)[0], source)
    width = torch.where(some_fit, width.gather(0, first_fit)[0], source)
    top = (uniform(0, 1, n, draw) * (source - height + 1)).floor()
    left = (uniform(0, 1, n, draw) * (source - width + 1)).floor()
    return torch.stack([top, left, height, width], 1).long()


def augment(images, parameters, mean, std, size=None):
    """Augments and standardises each image with its own parameters.

    From uint8 (n, 3, source, source) to float32 (n, 3, size, size). `size` None leaves the size as
    it is. Each result is what torchvision's functional resized_crop, horizontal_flip, adjust_*,
    rgb_to_grayscale, gaussian_blur, solarize and normalize give. Beyond its border, a crop sees the
    image reflected.
    """
    source = images.shape[-1]
    size = size or source
    on_device = {}
    for name, values in parameters.items():
        if name != "order":
            on_device[name] = values.to(images.device, non_blocking=True)

    # Crop, resize and flip are linear: output = rows @ input @ columns.T.
    top, left, height, width = on_device["crop"].unbind(1)
    rows = resize_matrix(top, height, source, size)
    columns = resize_matrix(left, width, source, size)
    columns = torch.where(on_device["flip"].view(-1, 1, 1), columns.flip(1), columns)
    x = rows.unsqueeze(1) @ (images / 255) @ columns.unsqueeze(1).mT

    for place in parameters["order"]:
        operation = COLOR_OPERATIONS[place]
        strength = on_device[operation].view(-1, 1, 1, 1)
        if operation == "brightness":
            x = (x * strength).clamp(0, 1)
        elif operation == "contrast":
            middle = grayscale(x).mean(dim=(1, 2, 3), keepdim=True)
            x = (middle + (x - middle) * strength).clamp(0, 1)
        elif operation == "saturation":
            gray = grayscale(x)
            x = (gray + (x - gray) * strength).clamp(0, 1)
        else:
            x = shift_hue(x, strength)

    x = torch.where(on_device["grayscale"].view(-1, 1, 1, 1), grayscale(x), x)
    if "sigma" in on_device:
        x = blur(x, on_device["sigma"])
    if "solarize" in on_device:
        inverted = on_device["solarize"].view(-1, 1, 1, 1) & (x >= 0.5)
        x = torch.where(inverted, 1 - x, x)
    x = (x - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    if "noise" in on_device:
        x = x + on_device["noise"]
    return x.contiguous(memory_format=torch.channels_last)


def resize_matrix(start, length, source, size):
    """Matrices (n, size, source) that resize crops of `length` pixels, which begin at `start`.

    start, length: (n,). Columns of an image become those of its resized crop by matrix @ column.
    """
    start = start.view(-1, 1, 1)
    length = length.view(-1, 1, 1)
    # Where in the source the middle of each output pixel lies.
    output = torch.arange(size, device=start.device).view(1, -1, 1)
    inside = ((output + 0.5) * length / size - 0.5).clamp_min(0).minimum(length - 1)
    place = start + inside
    # The image is reflected at its first and at its last pixel.
    last = source - 1
    place = place.abs()
    place = last - (last - place).abs()
    # Linear interpolation between the two nearest pixels.
    distance = (torch.arange(source, device=start.device) - place).abs()
    return (1 - distance).clamp_min(0)


def grayscale(x):
    """Luminance (n, 1, H, W) of RGB images (n, 3, H, W)."""
    red, green, blue = x.split(1, dim=1)
    # 0.2989 red + 0.587 green + 0.114 blue, in place, which saves memory.
    return (0.587 * green).add_(red, alpha=0.2989).add_(blue, alpha=0.114)


def shift_hue(x, turns):
    """Adds `turns` to the hue of RGB images x (n, 3, H, W), as HSV defines hue.

    A channel is V - V S max(0, min(k, 4 - k, 1)), where k = ((5, 3, 1) + 6 hue) mod 6 for red,
    green and blue.
    """
    value = x.amax(1, keepdim=True)
    chroma = value - x.amin(1, keepdim=True)  # V S
    red, green, blue = x.split(1, dim=1)
    divisor = torch.where(chroma > 0, chroma, 1)  # gray has no hue
    # Six times the hue.
    if_red = (green - blue) / divisor
    if_green = 2 + (blue - red) / divisor
    if_blue = 4 + (red - green) / divisor
    sixfold = torch.where(value == red, if_red, torch.where(value == green, if_green, if_blue))
    five_three_one = torch.arange(5, 0, -2, device=x.device).view(3, 1, 1)
    k = torch.remainder(five_three_one + sixfold + 6 * turns, 6)
    return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


def blur(x, sigma):
    """Gaussian blur of x (n, 3, H, W) by each image's own sigma (n,) in pixels, 0 for none.

    The kernel is about a tenth of the image wide, as in SimCLR.
    """
    n, _, height, width = x.shape
    half = max(1, height // 20)
    offset = torch.arange(-half, half + 1, device=x.device)
    sigma = sigma.clamp_min(1e-6).view(-1, 1)
    kernel = torch.exp(-0.5 * (offset / sigma) ** 2)
    kernel = kernel / kernel.sum(1, keepdim=True)
    kernel = kernel.repeat_interleave(3, 0)  # of each image's three channels
    # Each channel of each image is a group of its own.
    x = x.reshape(1, n * 3, height, width)
    x = F.pad(x, [half, half, half, half], mode="reflect")
    x = F.conv2d(x, kernel.view(n * 3, 1, -1, 1), groups=n * 3)
    x = F.conv2d(x, kernel.view(n * 3, 1, 1, -1), groups=n * 3)
    return x.view(n, 3, height, width)


# --- backbones


def build_backbone(args):
    """The network `args.backbone` without a classifier: images to features (n, `num_features`).

    ResNets and ViT are torchvision's. Their state loads into its own networks by `load_state_dict`
    once the classifier there is `nn.Identity()`. Images of up to 64 pixels get the CIFAR stem (3 ×
    3, stride 1, no max-pool), or patches of 4 pixels. The program ends with one line if the network
    does not go with the data set, or with the width.
    """
    if (args.backbone == "mlp") != (args.dataset in TOYS):
        fail(
            f"--dataset {args.dataset} does not go with --backbone {args.backbone}: "
            "blobs and moons need mlp"
        )
    small = args.image_size <= 64
    if args.backbone == "mlp":
        width = args.width or 64
        net = nn.Sequential(
            nn.Linear(2, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, width),
        )
        net.num_features = width
    elif args.backbone == "resnet8":
        net = ResNet8(args.width or 128)
    elif args.backbone == "vit_small":
        width = args.width or 384
        patch = 4 if small else 16
        if args.image_size % patch or width % 64:
            fail(
                f"vit_small needs an image size that is a multiple of {patch} "
                "and a width that is a multiple of 64"
            )
        net = torchvision.models.VisionTransformer(
            image_size=args.image_size,
            patch_size=patch,
            num_layers=12,
            num_heads=width // 64,
            hidden_dim=width,
            mlp_dim=4 * width,
        )
        net.heads = nn.Identity()
        net.num_features = width
    else:
        width = args.width or 64
        if width < 16:
            # Strided 1 × 1 convolutions then give wrong gradients on CPUs:
            # github.com/uxlfoundation/oneDNN/issues/6035
            fail(f"{args.backbone} needs --width 16 or more, or --backbone resnet8")
        if args.backbone == "resnet18":
            net = ResNet(torchvision.models.resnet.BasicBlock, [2, 2, 2, 2], width, small)
        else:
            net = ResNet(torchvision.models.resnet.Bottleneck, [3, 4, 6, 3], width, small)
    return net


class ResNet(torchvision.models.ResNet):
    """torchvision's ResNet without a classifier, with `width` channels in its first stage.

    As published the width is 64. `small` asks for the CIFAR stem.
    """

    def __init__(self, block, layers, width, small):
        self.width = width  # first, because the constructor calls `_make_layer`
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
        if planes == 64:  # the first stage, whose input comes from `conv1`
            self.inplanes = self.width
        return super()._make_layer(block, planes * self.width // 64, *args, **kwargs)


class ResNet8(nn.Module):
    """Eight 3 × 3 convolutions in four residual blocks without batch norm.

    "Collapse-Proof ..." (2025), Table 5. The last activation is not in the table. The GAN
    discriminators that the network comes from have it.
    """

    def __init__(self, width):
        super().__init__()
        self.num_features = width
        self.convs = nn.ModuleList()
        self.convs.append(nn.Conv2d(3, width, 3, padding=1))
        for _ in range(7):
            self.convs.append(nn.Conv2d(width, width, 3, padding=1))
        self.shortcut = nn.Conv2d(3, width, 1)
        for conv in (*self.convs, self.shortcut):
            nn.init.kaiming_uniform_(conv.weight, a=0.2)
            nn.init.zeros_(conv.bias)

    def forward(self, x):
        act = functools.partial(F.leaky_relu, negative_slope=0.2)
        pool = functools.partial(F.avg_pool2d, kernel_size=2)

        residual = self.convs[1](act(self.convs[0](x)))
        x = pool(residual) + self.shortcut(pool(x))

        residual = self.convs[3](act(self.convs[2](act(x))))
        x = pool(residual) + pool(x)

        residual = self.convs[5](act(self.convs[4](act(x))))
        x = residual + x

        residual = self.convs[7](act(self.convs[6](act(x))))
        x = residual + x

        return act(x).mean(dim=(2, 3))


def frozen_copy(model):
    """A copy of the model without gradient: a momentum teacher."""
    return copy.deepcopy(model).requires_grad_(False)


def load_weights(model, args):
    """Starts the backbone of a model, and its teacher's, from the tensors in `args.weights`.

    The file is what torch.save writes of a dict: a state_dict, or a dict with one inside. Its names
    may have a prefix before those of the backbone here. What it lacks of the backbone stays as it
    is. Returns a line that says what was loaded and what was not. Ends the program with one line if
    the file cannot be read, holds less than half of the backbone, or has other shapes.
    """
    path = Path(args.weights)
    if path.is_dir():
        path = path / "last.pt"
    own = model.backbone.state_dict()
    # Old files lack these counts, which nothing here reads.
    names = [name for name in own if not name.endswith("num_batches_tracked")]
    place, entries, prefix = find_weights(read_weights(path), names)
    tensors = {name: entries[prefix + name] for name in own if prefix + name in entries}
    missing = [name for name in names if name not in tensors]
    found = len(names) - len(missing)
    if found < len(names) / 2:
        has = first_few(list(entries)) or "no tensors"
        fail(
            f"--weights {str(path)!r} holds {found} of the {len(names)} tensors of "
            f"{args.backbone}: it lacks {missing[0]!r} and has {has}; "
            "choose another file, or the --backbone that it is of"
        )
    for name, tensor in tensors.items():
        there = tuple(tensor.shape)
        here = tuple(own[name].shape)
        if there != here:
            fail(
                f"--weights {str(path)!r} does not fit: {name} is {there} there and {here} here; "
                + advice_on_shapes(name, there, here)
            )
    model.backbone.load_state_dict(tensors, strict=False)
    for norm in batch_norms(model.backbone):
        # A file without this count is of a network that has seen many batches.
        if norm.num_batches_tracked == 0 and not has_new_statistics(norm):
            norm.num_batches_tracked.fill_(10_000)
    if hasattr(model, "teacher"):
        model.teacher[0].load_state_dict(model.backbone.state_dict())

    line = f"weights: {found} of {len(names)} tensors of {args.backbone} from {path}"
    if place:
        line += f", under {place!r}"
    if prefix:
        line += f", without the prefix {prefix!r}"
    if missing:
        line += f"; not there, so new: {first_few(missing)}"
    used = {prefix + name for name in own}
    unused = [key for key in entries if key not in used]
    if unused:
        line += f"; left out: {first_few(unused)}"
    return line


def read_weights(path):
    """The dict in a file of weights. Ends the program with one line if there is none."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        fail(f"--weights {str(path)!r} does not exist")
    except Exception as error:  # torch.load raises half a dozen kinds of them
        fail(
            f"--weights {str(path)!r} cannot be read ({type(error).__name__}): "
            "it must be a state_dict, written by torch.save"
        )
    if not isinstance(saved, dict):
        fail(f"--weights {str(path)!r} holds no dict: it must be a state_dict, by torch.save")
    return saved


def find_weights(saved, names):
    """Where most of the tensors `names` are in a loaded file.

    A place is the file's dict itself or a dict in it, and a prefix that stands there before each of
    the names. Of places with as many the largest dict is taken, then the first. Returns (the key of
    the dict or "", its tensors by their keys, the prefix).
    """
    places = {"": saved}
    for key, value in saved.items():
        if isinstance(value, dict):
            places[key] = value
    best = "", {}, ""
    most = 0, 0
    for place, entries in places.items():
        tensors = {}
        for key, value in entries.items():
            if isinstance(key, str) and isinstance(value, torch.Tensor):
                tensors[key] = value
        for prefix in possible_prefixes(tensors, names):
            count = sum(prefix + name in tensors for name in names)
            if (count, len(tensors)) > most:
                most = count, len(tensors)
                best = place, tensors, prefix
    return best


def possible_prefixes(keys, names):
    """No prefix, and whatever stands before one of the names in one of the keys."""
    prefixes = {"": True}  # a dict, because it keeps the order
    for key in keys:
        for name in names:
            if key.endswith("." + name):
                prefixes[key.removesuffix(name)] = True
    return list(prefixes)


def first_few(names):
    """Up to four names, and how many more there are."""
    text = ", ".join(names[:4])
    if len(names) > 4:
        text += f" and {len(names) - 4} more"
    return text


def advice_on_shapes(name, there, here):
    """What to do if the first tensor of other shape than the file's is `name`."""
    stem = name in ("conv1.weight", "conv_proj.weight")  # of the ResNets and of ViT
    flags = []
    if stem and there[-1] > here[-1]:
        flags.append("--image-size 224 (the file is of a network for large images)")
    elif stem and there[-1] < here[-1]:
        flags.append("--image-size 32 (the file is of a network for images of up to 64 pixels)")
    if stem and there[0] != here[0]:
        flags.append(f"--width {there[0]}")
    if flags:
        return f"choose {' and '.join(flags)}"
    if name == "encoder.pos_embedding":
        return "choose the --image-size that the file is of"
    return "choose the --backbone and --width that the file is of"


# --- collapse metrics

# Those of arrays take numpy's and torch's.


def center_norm(z):
    """Norm of the mean of the L2-normalised embeddings z (n, d), in [0, 1].

    1 is representation collapse. ("The Common Stability Mechanism ...", Section 2, calls this mean
    the center vector.)
    """
    z = torch.as_tensor(z).detach().double()
    directions = F.normalize(z, dim=1)
    center = directions.mean(0)
    return center.norm().item()


def centered(z):
    """z (n, d) minus its mean, float64. A dimension constant up to float32's rounding becomes 0."""
    z = torch.as_tensor(z).detach().double()
    offset = z - z.mean(0)
    varies = offset.abs().amax(0) > 1e-6 * z.abs().max()
    return offset * varies


def variance_share(z):
    """The variance of z (n, d) over its mean squared norm, in [0, 1]. It is 0 for a constant z."""
    variance = centered(z).square().sum()
    square = torch.as_tensor(z).detach().double().square().sum()
    return (variance / square).item() if variance > 0 else 0.0


def covariance_spectrum(z):
    """Eigenvalues of the covariance Σ_i (z_i - mean)(z_i - mean)ᵀ / n of z (n, d), float64.

    The min(n - 1, d) that can differ from 0, largest first ("Preventing Collapses ...", Section 4).
    """
    z = centered(z)
    n, d = z.shape
    count = max(1, min(n - 1, d))
    # Rows and dimensions that are all 0 only add eigenvalues 0. Some versions of CUDA fail on
    # matrices with many zeros, which is what a collapse leaves.
    rows = z.any(1)
    dimensions = z.any(0)
    if not (rows.all() and dimensions.all()):
        z = z[rows][:, dimensions]
    if z.numel() == 0:
        return z.new_zeros(count)
    if len(z) < z.shape[1]:
        products = z @ z.T  # the smaller one of two matrices with the same eigenvalues but for 0
    else:
        products = z.T @ z
    eigenvalues = torch.linalg.eigvalsh(products / n)
    largest_first = eigenvalues.clamp_min(0).flip(0)[:count]
    return F.pad(largest_first, (0, count - len(largest_first)))


def effective_rank(z):
    """exp of the entropy of the normalised singular values of the centered embeddings z (n, d).

    From 1 (one direction) to min(n - 1, d) (a flat spectrum), and 0 for a constant embedding (Roy
    and Vetterli, 2007).
    """
    sigma = covariance_spectrum(z).sqrt()
    if not sigma.any():
        return 0.0
    shares = sigma / sigma.sum()
    entropy = torch.special.entr(shares).sum()
    return entropy.exp().item()


def average_correlation(z):
    """Mean absolute correlation of two dimensions of z (n, d), in [0, 1].

    ("Preventing Collapses ...", Section 5.1, with absolute values.) A constant dimension counts as
    correlated with every other: 1.
    """
    z = F.normalize(centered(z), dim=0)
    d = z.shape[1]
    correlation = (z.T @ z).abs()
    constant = ~z.any(0)
    correlation[constant] = 1
    correlation[:, constant] = 1
    off_diagonal = correlation.sum() - correlation.trace()
    return off_diagonal.item() / max(1, d * (d - 1))


def neighbours(labels):
    """How many neighbours vote in kNN, by the labels (n,) of the bank: 200, the field's number, but
    never more than its smallest class holds.

    With more neighbours than that, images of other classes are among them, however good the
    features are. Of 120, 12 and 12 images 200 neighbours are all, and the large class wins.
    """
    counts = torch.bincount(torch.as_tensor(labels).cpu())
    smallest = counts[counts > 0].min().item()
    return min(200, smallest)


def knn_accuracy(bank, bank_labels, queries, labels, k=None, temperature=0.1):
    """Accuracy of weighted k-nearest-neighbour classification of `queries` by `bank`, in [0, 1].

    queries (m, d), bank (n, d), labels integers (m,), bank_labels (n,). Each of the k neighbours by
    cosine similarity votes with weight exp(similarity / temperature) (Wu et al., 2018). `k` None
    means `neighbours(bank_labels)`.
    """
    bank = torch.as_tensor(bank)
    bank_labels = torch.as_tensor(bank_labels).long()
    queries = torch.as_tensor(queries)
    labels = torch.as_tensor(labels)
    if k is None:
        k = neighbours(bank_labels)
    classes = int(bank_labels.max()) + 1
    right = 0
    for query, truth in zip(queries.split(1024), labels.split(1024), strict=True):
        similarity, neighbour_labels = nearest_neighbours(query, bank, bank_labels, k)
        # Relative to the nearest neighbour, so that a small temperature cannot overflow.
        weight = ((similarity - similarity[:, :1]) / temperature).exp()
        votes = torch.zeros(len(query), classes, device=query.device)
        votes.scatter_add_(1, neighbour_labels, weight)
        right += (votes.argmax(1) == truth.to(query.device)).sum().item()
    return right / len(queries)


def nearest_neighbours(queries, bank, bank_labels, k):
    """Cosine similarities and labels (m, k) of the k nearest rows of `bank`, nearest first.

    The bank is walked over in blocks. Of each block the k nearest rows are kept.
    """
    queries = F.normalize(queries.float(), dim=1)
    best_similarities = []
    best_labels = []
    for block, block_labels in zip(bank.split(2**14), bank_labels.split(2**14), strict=True):
        block = F.normalize(block.to(queries.device).float(), dim=1)
        block_labels = block_labels.to(queries.device)
        similarity, nearest = (queries @ block.T).topk(min(k, len(block)), dim=1)
        best_similarities.append(similarity)
        best_labels.append(block_labels[nearest])
    similarity, nearest = torch.cat(best_similarities, 1).topk(min(k, len(bank)), dim=1)
    return similarity, torch.cat(best_labels, 1).gather(1, nearest)


def normalised_entropy(scores):
    """Entropies (n,) of softmax(scores) as shares of log c, in [0, 1], for scores (n, c).

    1 is uniform, which is the state at the start.
    """
    entropy = torch.special.entr(scores.softmax(1)).sum(1)
    return entropy / math.log(scores.shape[1])


def cluster_gap(z, queries=1000):
    """How much embeddings z (n, d) vary within clusters, from 0 (not at all) to 1. It needs no
    assignments.

    For a point with distances r_1 <= r_2 <= ... to the others it is min_k r_k / r_{k+1}, the
    largest jump, over the nearest nine tenths. The result is the median over up to `queries`
    points. Points without clusters have 0.36 in one dimension, where the ratios are U^(1/k) of
    uniform U, and more in more dimensions. Clusters with points 20 times closer to one another than
    to the rest have 0.05.
    """
    z = torch.as_tensor(z).detach().double()
    some = evenly_spaced(z, queries)
    distance = torch.cdist(z[some], z)
    # The distance of a point to itself is sorted to the front, and left out with the farthest.
    distance[torch.arange(len(some), device=z.device), some] = -1
    end = max(3, int(0.9 * len(z)))
    distance = distance.sort(1).values[:, 1:end]
    nearer = distance[:, :-1]
    farther = distance[:, 1:]
    ratio = torch.where(farther > 0, nearer / farther, 1)
    # Where even the last distance is 0, the points do not vary at all.
    ratio[distance[:, -1] == 0] = 0
    return ratio.amin(1).median().item()


def finding(number, threshold, implied=False, low="collapsed"):
    """A mode's entry in the diagnosis. `low` is the verdict on a number below the threshold."""
    if implied:
        verdict = "implied"
    elif number is None:
        verdict = "no codes"
    elif number < threshold:
        verdict = low
    else:
        verdict = "ok"
    return {"number": number, "threshold": threshold, "verdict": verdict}


def diagnose(
    z, codes=None, clusters=None, inputs=None, entropy=None, measured=None, array="embedding"
):
    """Which of the four collapses of "Collapse-Proof ..." (Figure 1) the embeddings z (n, d)
    suffer, and whether their assignments have left the uniform start.

    `codes` (n,) are the assigned codes or prototypes, of `clusters` in all. `entropy` (n,) is the
    entropy of each assignment over log(clusters). `inputs` is how many numbers an image (or a
    point) has. All arrays may be numpy's or torch's. `measured` is (center norm, effective rank) of
    z where they are known already. `array` says what z is: "embedding", or "features" of a
    backbone. Returns {mode: {"number", "threshold", "verdict"}}. Each number is in [0, 1]. Below
    its threshold the mode has collapsed:

    representation  of embeddings: 1 - center_norm², the variance of the directions. 0.2 means a
                    center vector of length 0.89. Of features: `variance_share`, below 0.1.
    dimensional     log(effective rank) / log(dimensions). At 0.5 the effective rank is the root of
                    the dimensions.
    cluster         log(effective codes) / log(clusters). The number of effective codes is exp of
                    the entropy of their use.
    intracluster    `cluster_gap`. At 0.05 most points are 20 times closer to their own cluster than
                    to the next.
    assignment      1 - mean entropy. Below 0.02 each image is assigned to all codes alike, and the
                    verdict is "still uniform".

    Dimensions count up to n - 1, clusters up to n. No higher rank than `inputs` is asked for,
    because embeddings of points in a plane that span a plane have lost nothing. Where all
    embeddings are one vector, the other collapses are "implied". Without codes, cluster and
    assignment are undefined: verdict "no codes", number None. Raises ValueError for fewer than four
    embeddings.

    Features have a rule of their own, because those after a ReLU are all positive, and so their
    directions are close to one another while nothing is wrong. On shapes (ResNet-18, width 16) the
    directions of living features vary by 0.22 to 0.27, which is too close to 0.2. Their variance
    share is 0.25 untrained and 0.30 to 0.56 trained, and 0.03 after SimCLR without negatives. It is
    0.01 to 0.03, too, for an untrained torchvision ResNet-18 in eval mode, whose batch norms have
    not seen any data.
    """
    z = torch.as_tensor(z)
    n, d = z.shape
    if n < 4:
        raise ValueError(f"a diagnosis needs at least 4 embeddings, not {n}")
    if measured is None:
        measured = center_norm(z), effective_rank(z)
    norm, rank = measured
    constant = rank == 0

    if array == "features":
        number = variance_share(z)
        threshold = 0.1
    else:
        number = 0.0 if constant else 1 - norm**2
        threshold = 0.2
    representation = finding(number, threshold)
    one_vector = representation["verdict"] == "collapsed"

    dimensions = min(n - 1, d)
    if inputs:
        # Collapse is a rank below the root of the dimensions, so no rank above `inputs` is needed.
        dimensions = min(dimensions, inputs**2)
    number = math.log(max(1, rank)) / math.log(max(2, dimensions))
    dimensional = finding(min(1.0, number), 0.5, implied=one_vector)

    number = None
    if codes is not None:
        use = torch.bincount(torch.as_tensor(codes).cpu()).double() / n
        entropy_of_use = torch.special.entr(use).sum().item()
        number = entropy_of_use / math.log(max(2, min(n, clusters)))
    cluster = finding(number, 0.5, implied=one_vector)

    number = 0.0 if constant else cluster_gap(z)
    intracluster = finding(number, 0.05, implied=one_vector)

    number = None
    if entropy is not None:
        number = 1 - torch.as_tensor(entropy).mean().item()
    assignment = finding(number, 0.02, low="still uniform")

    return {
        "representation": representation,
        "dimensional": dimensional,
        "cluster": cluster,
        "intracluster": intracluster,
        "assignment": assignment,
    }


# What the numbers of `diagnose` say, in words.
FINDINGS = {
    "representation": "the embeddings' directions vary by {}",
    "dimensional": "log(effective rank) is {} of log(dimensions)",
    "cluster": "log(effective codes) is {} of log(codes)",
    "intracluster": "the embeddings within a cluster vary by {}",
    "assignment": "the assignments are {} from uniform",
}
FINDINGS_OF_FEATURES = {
    "representation": "the features' variance is {} of their mean square",
    "intracluster": "the features within a cluster vary by {}",
}


def describe(report, array="embedding"):
    """What a report of `diagnose` on this array says, as one line.

    It is "no collapse" or, for example, "representation collapse: the embeddings' directions vary
    by 0.09, below 0.2". Of several collapses it names all. What stands before the colon depends on
    the verdicts alone, not on the numbers, and begins with "no collapse" if there is none.
    Assignments that are still uniform are no collapse, and are named, too.
    """
    collapsed = [mode for mode, entry in report.items() if entry["verdict"] == "collapsed"]
    found = list(collapsed)
    if collapsed:
        line = f"{', '.join(collapsed)} collapse"
    else:
        line = "no collapse"
    if report["assignment"]["verdict"] == "still uniform":
        line += ", and the assignments are still uniform"
        found.append("assignment")
    reasons = []
    for mode in found:
        number = f"{report[mode]['number']:.2g}"
        threshold = report[mode]["threshold"]
        words = FINDINGS[mode]
        if array == "features":
            words = FINDINGS_OF_FEATURES.get(mode, words)
        reasons.append(f"{words.format(number)}, below {threshold:g}")
    if reasons:
        line += f": {'; '.join(reasons)}"
    return line


def names_collapse(verdict):
    """Whether a line of `describe` names a collapse."""
    return not verdict.startswith("no collapse")


@torch.no_grad()
def extract(model, images, data, embeddings=True, batch_size=500):
    """What a network makes of images without augmentation, in eval mode and float32.

    Returns a dict of tensors with n rows: "features" (n, num_features). With `embeddings` also
    "embedding" (n, d), and, if the model has scores, the assigned "codes" (n,) and the "entropy"
    (n,) of the assignments, as a share of log c.
    """
    training = model.training
    model.eval()
    out = {}
    for first in range(0, len(images), batch_size):
        x = data.normalise(images[first : first + batch_size])
        batch = {"features": model.backbone(x)}
        if embeddings:
            z = model.head(batch["features"])
            batch["embedding"] = z
            if hasattr(model, "scores"):
                batch["codes"], batch["entropy"] = assign_codes(model, z)
        # Rows are written into one array, because joining batches would take the memory twice.
        for name, rows in batch.items():
            if first == 0:
                out[name] = rows.new_empty(len(images), *rows.shape[1:])
            out[name][first : first + batch_size] = rows
    model.train(training)
    if data.mean.device.type == "mps":  # has no float64, which the metrics need
        out = {name: rows.cpu() for name, rows in out.items()}
    return out


@torch.no_grad()
def count_codes(model, z):
    """How many codes or prototypes a model has, None if it has none. z are some of its embeddings
    (n, d), on its device."""
    if not hasattr(model, "scores"):
        return None
    return model.scores(z[:1]).shape[1]


def assign_codes(model, z):
    """The code with the largest score for each embedding z (n, d), and `normalised_entropy`."""
    # With many codes a few rows at a time: no matrix of scores has more than 16 million entries.
    c = count_codes(model, z)
    temperature = getattr(model, "temperature", 1)
    codes = []
    entropies = []
    for rows in z.split(max(1, 2**24 // c)):
        scores = model.scores(rows)
        codes.append(scores.argmax(1))
        entropies.append(normalised_entropy(scores / temperature))
    return torch.cat(codes), torch.cat(entropies)


def evenly_spaced(images, limit):
    """Indices of at most `limit` images at even distances: a data set may be sorted by class."""
    n = len(images)
    count = min(limit, n)
    return torch.arange(count, device=images.device) * n // count


def collapse_metrics(model, data):
    """The metrics shown while training, of up to 1000 training images without augmentation.

    A dict of numbers: center_norm, effective_rank, correlation, and with codes used_codes and
    assignment_entropy. "verdict" is what `describe` says of their diagnosis, and is missing for
    fewer than four images. All cost less than 2 % of an epoch.
    """
    count = min(1000, max(150, len(data.images) // 20))
    some = evenly_spaced(data.images, count)
    with without_initial_statistics(model):
        out = extract(model, data.images[some], data)
    z = out["embedding"]
    if not z.isfinite().all():
        return {"center_norm": math.nan}  # stops the run; eigenvalues of NaN would raise an error
    norm = center_norm(z)
    rank = effective_rank(z)
    metrics = {
        "center_norm": norm,
        "effective_rank": rank,
        "correlation": average_correlation(z),
    }
    codes = out.get("codes")
    entropy = out.get("entropy")
    clusters = count_codes(model, z[:1].to(data.mean.device))  # on MPS, z is on the host
    if codes is not None:
        metrics["used_codes"] = len(torch.unique(codes))  # few of many: cluster collapse
        metrics["assignment_entropy"] = entropy.mean().item()
    if len(z) >= 4:
        inputs = data.images[0].numel()
        report = diagnose(z, codes, clusters, inputs, entropy, measured=(norm, rank))
        metrics["verdict"] = describe(report)
    return metrics


def knn_monitor(model, data):
    """kNN accuracy of up to 2000 test images in a bank of up to 5000 training images.

    It is None if the data have no labels.
    """
    if data.labels is None:
        return None
    some = evenly_spaced(data.images, 5000)
    some_tests = evenly_spaced(data.test_images, 2000)
    bank = extract(model, data.images[some], data, embeddings=False)["features"]
    queries = extract(model, data.test_images[some_tests], data, embeddings=False)["features"]
    return knn_accuracy(bank, data.labels[some], queries, data.test_labels[some_tests])


def batch_norms(model):
    """The batch norms of a model that keep a running mean."""
    norms = []
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            norms.append(module)
    return norms


@torch.no_grad()
def with_data_statistics(model, data, args, views):
    """A copy of the model in eval mode, whose new batch norms have the statistics of the data.

    A new batch norm has mean 0 and variance 1. With those, all embeddings of an untrained network
    look like one point. In the copy it has the mean of the statistics of the first batches that
    training sees: both augmented views, `views` as in `two_views`, of about 500 images. A batch
    norm that has other statistics, as those of `--weights`, keeps them. The model itself and all
    random streams stay as they are. Under torchrun all processes call this, because batch norms use
    the batch of all of them.
    """
    measured = copy.deepcopy(model).eval()
    new_norms = False
    for norm in batch_norms(measured):
        if has_new_statistics(norm):
            norm.reset_running_stats()
            norm.momentum = None  # all batches count alike
            norm.train()
            new_norms = True

    args = copy.copy(args)
    args.batch_size = min(args.batch_size, len(data.images))
    if not new_norms or args.batch_size < 2:
        return measured
    count = math.ceil(500 / args.batch_size)
    for batch in itertools.islice(two_views(data, args, views, epoch=0), count):
        for x in batch:
            measured(x)
    return measured.eval()


@contextmanager
def without_initial_statistics(model):
    """Within it, the batch norms of a model that has seen few batches lack what they began with.

    A running mean of the statistics of n batches, with momentum m, keeps (1 - m)^n of the mean 0
    and the variance 1 at its start. In the first steps of a run that makes all embeddings look like
    one point. Here it is taken out, as Adam does it with its averages. A model without new batches,
    or with hundreds of them, stays as it is.
    """
    before = []
    for norm in batch_norms(model):
        if norm.momentum is None:
            continue
        rest = (1 - norm.momentum) ** int(norm.num_batches_tracked)
        if 1e-3 < rest < 1:
            mean, var = norm.running_mean, norm.running_var
            before.append((mean, mean.clone(), var, var.clone()))
            mean.div_(1 - rest)
            var.sub_(rest).div_(1 - rest).clamp_min_(0)
    try:
        yield
    finally:
        for mean, old_mean, var, old_var in before:
            mean.copy_(old_mean)
            var.copy_(old_var)


def has_new_statistics(norm):
    """Whether a batch norm has the mean 0 and the variance 1 that it is made with."""
    return not norm.running_mean.any() and bool((norm.running_var == 1).all())


# --- processes

# Under torchrun every process runs the same script on its share of each batch. A loss is a function
# of the whole batch, so `gather` brings the rows of all processes together, and every process
# computes the same loss of the same rows. Backward, `gather` passes on the gradient of a process's
# own rows only. So each process gets the part of the parameters' gradient that comes from its own
# images, and `sum_gradients` adds the parts up to the whole gradient. What has parameters must
# therefore come before `gather`, where a row is counted once.


def world_size():
    """The number of processes, 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


@contextmanager
def first_on_machine():
    """A context that the first process of each machine passes through before the others.

    So it can write what the others then find. The context's value is whether this process is the
    first one.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", rank()))
    first = local_rank == 0
    if not first:
        dist.barrier()
    yield first
    if first and world_size() > 1:
        dist.barrier()


class Gather(torch.autograd.Function):
    """The rows of all k processes, from x (n / k, ...) to (n, ...).

    Backward, a process gets the gradient of its own rows. If all processes compute the same from
    the rows, it has this gradient already. If not, `summed` adds up what each of them has.
    """

    @staticmethod
    def forward(ctx, x, summed):
        ctx.summed = summed
        parts = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(parts, x)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        if ctx.summed:
            grad = grad.clone(memory_format=torch.contiguous_format)
            dist.all_reduce(grad)
        own = grad.chunk(world_size())[rank()]
        return own, None  # None: for `summed`


def gather(*rows):
    """Each tensor (n / k, ...) of the k processes as the whole batch (n, ...), in a tuple."""
    if world_size() == 1:
        return rows
    return tuple(Gather.apply(x.contiguous(), False) for x in rows)


def to_device(model, device, compile=False):
    """Moves the model to the device, and compiles it, with its teacher, if `compile`.

    With several processes its batch norms use the batch of all of them.
    """
    if world_size() > 1:
        if device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        else:
            # SyncBatchNorm needs a GPU. Here each norm gets the whole batch, and a process keeps
            # its rows of the result.
            for module in model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.register_forward_pre_hook(gather_input)
                    module.register_forward_hook(keep_own_rows)
    if compile:
        model.compile()
        if hasattr(model, "teacher"):
            model.teacher.compile()
    return model.to(device, memory_format=torch.channels_last)


def gather_input(norm, inputs):
    """Before a batch norm, in training: its input becomes the whole batch."""
    if not norm.training:
        return inputs
    (x,) = inputs
    return Gather.apply(x.contiguous(), True)


def keep_own_rows(norm, inputs, output):
    """After a batch norm, in training: its output becomes this process's share of it."""
    if not norm.training:
        return output
    return output.chunk(world_size())[rank()].clone()


def sum_gradients(model):
    """Adds up the gradients of all processes in one message. A single process does nothing."""
    if world_size() == 1:
        return
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    sums = flat.split([grad.numel() for grad in grads])
    for grad, summed in zip(grads, sums, strict=True):
        grad.copy_(summed.view_as(grad))


# --- the flags

# Defaults of a data set for all methods. `parse_args` says what replaces what.
DATASET_DEFAULTS = {
    "blobs": {"backbone": "mlp", "epochs": 30, "batch_size": 128, "projector_dim": 16},
    "moons": {"backbone": "mlp", "epochs": 30, "batch_size": 128, "projector_dim": 16},
    "imagenet100": {"image_size": 224},
    "shapes": {
        "image_size": 16,
        "width": 16,
        "epochs": 20,
        "batch_size": 128,
        "projector_dim": 256,
    },
}


# What a transformer needs to learn, whatever the method: DINO's recipe (Caron et al., 2021), with
# the weight decay it starts with.
BACKBONE_DEFAULTS = {
    "vit_small": {"optimizer": "adamw", "lr": 5e-4, "weight_decay": 0.04, "clip_norm": 3.0},
}


class Parser(argparse.ArgumentParser):
    """Says what is wrong with a command in one line.

    From then on no output fails because a console lacks a letter, such as one of a folder's name.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")

    def error(self, message):
        fail(f"{message} (see --help)")


class Help(argparse.RawDescriptionHelpFormatter):
    """Shows the docstring as it is written, and each flag's default in brackets."""

    def _get_help_string(self, action):
        default = action.default
        if default is None or default is False or default is argparse.SUPPRESS:
            return action.help
        return action.help + " [%(default)s]"


def bounded_float(least, most=math.inf):
    """An argparse `type`: a finite number from `least` to `most`."""
    return bounded(float, least, most)


def bounded_int(least, most=math.inf):
    """An argparse `type`: a whole number from `least` to `most`."""
    return bounded(int, least, most)


def bounded(kind, least, most):
    """An argparse `type` that reads a number by `kind`, and refuses it if it is out of bounds."""

    def parse(text):
        value = kind(text)
        if not (least <= value <= most and math.isfinite(value)):
            bounds = f"at least {least}" if most == math.inf else f"between {least} and {most}"
            raise argparse.ArgumentTypeError(f"must be {bounds}, not {text}")
        return value

    parse.__name__ = kind.__name__  # argparse prints it: "invalid int value: 'many'"
    return parse


def add_shared_flags(parser):
    """The flags of all methods.

    `optimizer`, `lr` and `weight_decay` have no default here: each script gives them its own.
    """
    parser.add_argument(
        "--dataset",
        choices=DATASETS,
        default="cifar10",
        help="cifar10, cifar100, svhn: downloaded; imagenet100, folder: your images; shapes, "
        "blobs, moons: drawn here, and small. blobs, moons: points, a run takes seconds",
    )
    parser.add_argument(
        "--data-dir",
        default="data",
        help="where images are or will be; a folder of yours has them at any depth, or in train/ "
        "and in val/ or test/; without these a tenth is held out",
    )
    parser.add_argument(
        "--labels",
        choices=["auto", "folders", "none"],
        default="auto",
        help="of --dataset folder. folders: the first folder's name is the class; auto: so if all "
        "images lie in <class>/*, else none",
    )
    parser.add_argument(
        "--cache-dir",
        help="where decoded images are kept, for data that is read-only [<data-dir>/.cache-<size>]",
    )
    parser.add_argument(
        "--skip-damaged",
        action="store_true",
        help="go on without images that cannot be read",
    )
    parser.add_argument("--image-size", type=bounded_int(8), default=32, help="side in pixels")
    parser.add_argument(
        "--backbone",
        choices=["resnet8", "resnet18", "resnet50", "vit_small", "mlp"],
        default="resnet18",
        help="blobs and moons need mlp, all images one of the others",
    )
    parser.add_argument(
        "--width",
        type=bounded_int(1),
        help="of the first stage [resnet8: 128, ResNets: 64, vit_small: 384, mlp: 64]",
    )
    parser.add_argument(
        "--weights",
        metavar="FILE",
        help="start the backbone from these: a state_dict of torchvision or a last.pt, or any file "
        "whose names fit after one prefix",
    )
    parser.add_argument(
        "--projector-dim", type=bounded_int(4), default=2048, help="width of the projector"
    )
    parser.add_argument(
        "--augment",
        choices=["strong", "weak"],
        default="strong",
        help="weak: small shifts, rare color jitter, noise; it ignores a method's own changes "
        "to the views",
    )
    parser.add_argument(
        "--epochs",
        type=bounded_int(1),
        default=200,
        help="passes over the data, each without the last, incomplete batch; with --resume, more "
        "prolong a run",
    )
    parser.add_argument(
        "--batch-size",
        type=bounded_int(2),
        default=256,
        help="images in a step, of all processes together",
    )
    parser.add_argument(
        "--optimizer",
        choices=["sgd", "adam", "adamw", "lars"],
        help="sgd and lars have momentum 0.9; adamw decays weights apart from the gradient",
    )
    parser.add_argument(
        "--lr",
        type=bounded_float(0),
        help="highest learning rate: a linear warm-up to it, then a half cosine to 0",
    )
    parser.add_argument(
        "--weight-decay",
        type=bounded_float(0),
        help="L2 penalty on weights, not on biases, norms, and a transformer's token and positions",
    )
    parser.add_argument(
        "--clip-norm",
        type=bounded_float(0),
        default=0.0,
        help="largest norm of the gradient, which is scaled down to it; 0: any",
    )
    parser.add_argument(
        "--warmup-epochs",
        type=bounded_float(0),
        help="epochs of warm-up [10, but at most a tenth of the epochs]",
    )
    parser.add_argument(
        "--seed",
        type=bounded_int(0),
        default=0,
        help="of the weights, the order and the augmentation",
    )
    parser.add_argument(
        "--device",
        choices=["cuda", "mps", "cpu"],
        help="[cuda if there is one, else mps, else cpu]",
    )
    parser.add_argument(
        "--precision",
        choices=["bf16", "fp32"],
        help="of the network, not the loss [bf16 on a GPU that has it, else fp32, because bf16 is "
        "then slower]",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the network with torch.compile: slow start, faster steps",
    )
    parser.add_argument(
        "--eval-every",
        type=bounded_int(1),
        default=10,
        help="epochs between measurements of kNN accuracy",
    )
    parser.add_argument(
        "--save-every",
        type=bounded_int(1),
        default=1,
        help="epochs between checkpoints; each overwrites last.pt",
    )
    parser.add_argument(
        "--keep-every",
        type=bounded_int(0),
        default=0,
        help="epochs between checkpoints that stay, as epoch-0050.pt; 0: none",
    )
    parser.add_argument(
        "--stop-on-collapse",
        type=bounded_int(0),
        default=0,
        metavar="N",
        help="stop with exit status 3 after N epochs in a row with a collapse; 0: never. Some "
        "methods pass through one in their first epochs",
    )
    parser.add_argument("--out", help="run folder [runs/<method>-<dataset>-seed<seed>]")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the run folder's checkpoint, if there is one",
    )


def make_parser(add_flags, defaults, dataset=None, backbone=None, paper=False, doc=None):
    """A parser of all flags of a script, with the defaults that `parse_args` describes.

    `add_flags`, `defaults` and `doc` are the script's, as in `parse_args`.
    """
    parser = Parser(description=doc, formatter_class=Help, allow_abbrev=False)
    own = parser.add_argument_group("flags of this method")
    shared = parser.add_argument_group("flags of all methods")
    add_shared_flags(shared)
    add_flags(own)
    if "paper" in defaults:
        own.add_argument(
            "--paper",
            action="store_true",
            help="the paper's settings, for flags that are not given",
        )
    dataset = dataset or parser.get_default("dataset")
    parser.set_defaults(**DATASET_DEFAULTS.get(dataset, {}))
    parser.set_defaults(**defaults.get(dataset, {}))
    parser.set_defaults(**BACKBONE_DEFAULTS.get(backbone, {}))
    if paper:
        parser.set_defaults(**defaults.get("paper", {}))
    return parser


def parse_args(file, doc, add_flags, defaults):
    """The flags of the script `file`, checked, with the script's name as `method`.

    `doc` is its docstring, `add_flags(parser)` adds its own flags, and `defaults` is its table
    DEFAULTS. The value of a flag is found in this order. Each step replaces what came before:

    1. the flag's own default, in `add_shared_flags` or in the script's `add_flags`;
    2. the script's recipe: `parser.set_defaults` in `add_flags`;
    3. the data set's defaults: DATASET_DEFAULTS[dataset];
    4. the script's defaults for the data set: DEFAULTS[dataset];
    5. those of a backbone that needs its own: BACKBONE_DEFAULTS[backbone];
    6. with --paper, the paper's settings: DEFAULTS["paper"];
    7. the command line.

    The flag --paper is there only if the script has DEFAULTS["paper"]. `defaults` of the result,
    which is no flag, holds what the flags would be without step 7. The program ends with one line
    if a flag is unknown, out of bounds, or does not go with the others.
    """
    # These flags are read first, because they change the defaults, which --help then shows.
    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--dataset")
    first.add_argument("--backbone")
    first.add_argument("--paper", action="store_true")
    known, _ = first.parse_known_args()
    parser = make_parser(add_flags, defaults, known.dataset, known.backbone, known.paper, doc)
    args = parser.parse_args()
    args.defaults = vars(parser.parse_args([]))

    args.method = Path(file).stem
    given = {word.split("=")[0] for word in sys.argv[1:]}
    if "--data-dir" in given and "--dataset" not in given and holds_images(args.data_dir):
        fail(
            f"{args.data_dir!r} holds images: add --dataset folder to train on them, "
            f"or --dataset {args.dataset}, which is the default, to download it there"
        )
    if args.labels != "auto" and args.dataset != "folder":
        fail(f"--labels {args.labels} is for --dataset folder")
    recipe = parser.get_default("optimizer")
    lr_is_given = any(word.split("=")[0] == "--lr" for word in sys.argv)
    if args.optimizer != recipe and not lr_is_given:
        fail(
            f"--optimizer {args.optimizer} needs its own --lr, "
            f"because {args.lr:g} is meant for {recipe}"
        )
    if args.dataset in TOYS:
        for name in ("augment", "image_size"):
            if getattr(args, name) != parser.get_default(name):
                fail(
                    f"--dataset {args.dataset} holds points: "
                    "--augment and --image-size are for images"
                )
    if args.warmup_epochs is not None and args.warmup_epochs > args.epochs:
        fail(f"--warmup-epochs {args.warmup_epochs:g} is more than --epochs {args.epochs}")
    args.out = args.out or f"runs/{args.method}-{args.dataset}-seed{args.seed}"
    return args


def flags_of(args):
    """The flags that `parse_args` gave, and `method`, as a dict for the checkpoint."""
    return {name: value for name, value in vars(args).items() if name != "defaults"}


def complete_args(state, defaults):
    """The flags of a checkpoint, made those of today's script: a dict {name: value}.

    `defaults` are those of all flags of the script. A flag that the checkpoint lacks has its
    default, and one that the script no longer has is left out. Each is said in one line on stderr.
    """
    saved = state["args"]
    lacking = {name: value for name, value in defaults.items() if name not in saved}
    unknown = [name for name in saved if name not in defaults and name != "method"]
    complete = {name: value for name, value in saved.items() if name not in unknown}
    complete |= lacking
    which = f"the checkpoint of {state['method']} at epoch {state['epoch']}"
    if lacking:
        flags = ", ".join(f"{flag_of(name)} {value}" for name, value in lacking.items())
        tell(f"{which} lacks flags of today, which have their defaults: {flags}")
    if unknown:
        flags = ", ".join(flag_of(name) for name in unknown)
        tell(f"{which} has flags that are no more, which are ignored: {flags}")
    return complete


def flag_of(name):
    """A flag as it is typed, from its name in `args`."""
    return f"--{name}".replace("_", "-")


def tell(line):
    """Prints a line on stderr, by one of the processes."""
    if rank() == 0:
        print(line, file=sys.stderr)


# --- the run


def find_device(name):
    """The torch device `name`, or, if it is None, the best there is: cuda, then mps, then cpu.

    Under torchrun "cuda" is the process's own GPU. Ends the program with one line if the device is
    not available.
    """
    available = []
    if torch.cuda.is_available():
        available.append("cuda")
    if torch.backends.mps.is_available():
        available.append("mps")
    available.append("cpu")
    best = available[0]
    name = name or best
    if name not in available:
        fail(f"--device {name} is not available here; use --device {best}")
    if name == "cuda":
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device(name)


def has_bf16(device):
    """Whether it multiplies in bf16: NVIDIA GPUs of compute capability 8 and above, and AMD's."""
    if device.type != "cuda":
        return False
    if torch.version.hip:
        return True
    major, _ = torch.cuda.get_device_capability(device)
    return major >= 8


def set_up(args):
    """Joins the other processes under torchrun, seeds torch, and returns the device.

    Sets `args.precision` where it is not given. Ends the program with one line if the device is not
    available, or the batch cannot be shared by the processes.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, exit_on_signal)
    device = find_device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")  # TF32 in losses, as in convolutions
    if args.precision is None:
        args.precision = "bf16" if has_bf16(device) else "fp32"
    if not torch.amp.is_autocast_available(device.type):
        fail(
            f"torch {torch.__version__} is too old for --device {device.type}: "
            "use --device cpu or a newer torch"
        )
    if "RANK" in os.environ and not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        # Two hours, because the others wait while the first process decodes or downloads.
        dist.init_process_group(backend, timeout=timedelta(hours=2))
    if args.batch_size % world_size():
        fail(
            f"--batch-size {args.batch_size} cannot be shared by {world_size()} processes; "
            "choose a multiple"
        )
    torch.manual_seed(args.seed)
    return device


def exit_on_signal(number, frame):
    """Ends the program at once: until the run is open, there is nothing to save."""
    sys.exit(128 + number)


def build_optimizer(model, args):
    """The optimizer `args.optimizer` over all parameters that learn, with decay of weights only.

    Weights are the parameters with two or more dimensions. Biases and norms have one. The class
    token and the position embedding of a transformer have three, but are not decayed either.
    """
    parameters = []
    weights = []
    others = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        parameters.append(parameter)
        if parameter.ndim > 1 and not name.endswith(("class_token", "pos_embedding")):
            weights.append(parameter)
        else:
            others.append(parameter)
    weight_decay = args.weight_decay
    if args.optimizer == "lars":
        weight_decay = 0.0  # `lars_gradients` adds it
    groups = [
        {"params": weights, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    fused = parameters[0].device.type == "cuda"
    if args.optimizer == "adam":
        optimizer = torch.optim.Adam(groups, args.lr, fused=fused)
    elif args.optimizer == "adamw":
        optimizer = torch.optim.AdamW(groups, args.lr, fused=fused)
    else:
        optimizer = torch.optim.SGD(groups, args.lr, momentum=0.9, fused=fused)

    def before_step(optimizer, step_args, step_kwargs):
        if args.clip_norm:
            nn.utils.clip_grad_norm_(parameters, args.clip_norm)
        if args.optimizer == "lars":
            lars_gradients(weights, args.weight_decay)

    optimizer.register_step_pre_hook(before_step)
    return optimizer


@torch.no_grad()
def lars_gradients(weights, weight_decay):
    """Turns the gradients of SGD into those of LARS (You, Gitman and Ginsburg, 2017).

    The gradient g of each weight w, decay included, is scaled by 0.001 |w| / |g|, as in the
    published Barlow Twins and VICReg runs.
    """
    for w in weights:
        if w.grad is None:
            continue
        w.grad.add_(w, alpha=weight_decay)
        ratio = 0.001 * w.norm() / w.grad.norm()
        usable = ratio.isfinite() & (ratio > 0)  # not so if w or g is 0
        w.grad.mul_(torch.where(usable, ratio, 1.0))


def atomic_write(path, write):
    """Writes a file by `write(file)` beside `path`, then renames it.

    A crash leaves the old file or the new one, never half of one. If the file cannot be written,
    the program ends with one line.
    """
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch.save turns one into the other
        part.unlink(missing_ok=True)
        fail(f"cannot write {str(path)!r} ({error})")


def write_text(path, text):
    """Writes a text file by `atomic_write`."""

    def write(file):
        file.write(text.encode())

    atomic_write(path, write)


def load_checkpoint(path):
    """The checkpoint at `path`, a file or a run folder, on the CPU.

    What older ones lack is None: the pixels' "mean" and "std", the image "size", the data's
    "fingerprint", and how many "images" it has. Ends the program with one line if there is none, or
    if it is damaged or something else.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "last.pt"
    if not path.exists():
        fail(
            f"no checkpoint at {str(path)!r}; training writes one to "
            "runs/<method>-<dataset>-seed<seed>/last.pt"
        )
    kinds = {
        "method": str,
        "args": dict,
        "epoch": int,
        "step": int,
        "model": dict,
        "backbone": dict,
    }
    about_data = {"mean": list, "std": list, "size": int, "fingerprint": str, "images": int}
    try:
        check_archive(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        for name, kind in about_data.items():
            if state.setdefault(name, None) is not None:
                kinds[name] = kind
        wrong = [name for name, kind in kinds.items() if not isinstance(state.get(name), kind)]
    except Exception as error:  # torch.load raises half a dozen kinds of them on damaged files
        why = type(error).__name__
        fail(f"{str(path)!r} is damaged or not a checkpoint ({why}); train again or use a copy")
    if wrong:
        fail(
            f"{str(path)!r} is not a checkpoint of these methods: "
            f"its {wrong[0]!r} is missing or of a wrong kind"
        )
    return state


def first_reason(error):
    """The line of an error's text that says what is wrong."""
    lines = str(error).splitlines()
    if len(lines) > 1 and lines[0].startswith("Error(s) in loading"):  # by load_state_dict
        return lines[1].strip()
    return lines[0] if lines else ""


def check_archive(path):
    """Raises an error if a zip file is damaged in a way that torch.load does not look at."""
    with zipfile.ZipFile(path) as archive:
        if archive.testzip():
            raise ValueError("a checksum is wrong")
        for entry in archive.infolist():
            if entry.external_attr & 16:
                raise ValueError("an entry is marked as a folder, of which torch reads nothing")


def open_run(args, model, optimizer, data, views):
    """Begins a run in the folder `args.out`, or goes on with the one there, and returns it.

    Prints what was understood. `views` are the script's, as in `two_views`. Ends the program with
    one line if the folder cannot be written to, if another process trains there, or if it holds a
    run that cannot or should not be continued.
    """
    run = Run(args, model, optimizer, data)
    first_lines = [*data.summary, describe_network(args, model, data.mean.device)]
    if not run.checkpoint.exists():  # else the checkpoint wins
        run.check_batch_size()
        if args.weights:
            first_lines.append(load_weights(model, args))
    if rank() == 0:
        run.lock()
    if run.checkpoint.exists():
        if not args.resume:
            fail(
                f"{args.out!r} already holds a run: "
                "add --resume to continue it, or choose another --out"
            )
        run.load()
    first_lines.append(run.describe_epochs())
    if rank() == 0:
        print("\n".join(first_lines))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, run.on_signal)
    if not run.lines:
        untrained = with_data_statistics(model, data, args, views)
        if rank() == 0:
            run.measure_untrained(untrained)
    if rank() == 0:
        run.begin_log()
    hide_bar = None if rank() == 0 else True  # None hides it where there is no terminal
    run.bar = tqdm(total=run.total_steps, initial=run.step, unit="step", disable=hide_bar)
    return run


def describe_network(args, model, device):
    """A line on the network and on what it runs on."""
    name = args.backbone
    if args.width:
        name += f", width {args.width}"
    where = device.type
    if device.type == "cuda":
        where = torch.cuda.get_device_name()
    if world_size() > 1:
        where = f"{world_size()} x {where}"
    backbone = count_parameters(model.backbone)
    head = count_parameters(model.head)
    return (
        f"{name}: {backbone} parameters in the backbone, {head} in the head; "
        f"{where}, {args.precision}"
    )


def count_parameters(module):
    """How many parameters a module has, as text, in millions from 0.1 million on."""
    count = sum(p.numel() for p in module.parameters())
    if count < 100_000:
        return str(count)
    return f"{count / 1e6:.2f} M"


class Run:
    """A training run: its schedules, folder, log, checkpoint and progress bar.

    `step` counts the optimizer's steps, over all epochs. `end_step` adds 1 to it at the end of each
    pass of the training loop. Until then it is the number of steps before this one, and so `lr`,
    `cosine` and the scripts read it.

    The folder holds run.json (command, flags, versions, device and data), log.jsonl (one line for
    each epoch, the first for the untrained network, epoch 0) and last.pt, the checkpoint. Ctrl-C
    and SIGTERM save after the step in progress and exit. Without --resume a folder that holds a run
    is refused.
    """

    # The flags that may differ when a run is continued.
    MAY_CHANGE = {
        "data_dir", "labels", "cache_dir", "skip_damaged",
        "epochs", "device", "precision", "compile",
        "eval_every", "save_every", "keep_every", "stop_on_collapse", "out", "resume",
    }  # fmt: skip

    def __init__(self, args, model, optimizer, data):
        self.args = args
        self.model = model
        self.optimizer = optimizer
        self.data = data
        self.checkpoint = Path(args.out, "last.pt")
        self.log = Path(args.out, "log.jsonl")

        self.steps_per_epoch = len(data.images) // args.batch_size
        self.total_steps = args.epochs * self.steps_per_epoch
        warmup_epochs = args.warmup_epochs
        if warmup_epochs is None:
            warmup_epochs = min(10, args.epochs / 10)
        self.warmup_steps = max(1, round(warmup_epochs * self.steps_per_epoch))

        self.step = 0
        self.sums = {}  # each loss term, summed over the steps of the epoch
        self.lines = []  # the lines of the log, one for each epoch from 0 on
        self.header = {
            "argv": sys.argv,
            "args": flags_of(args),
            "versions": {
                "python": platform.python_version(),
                "torch": str(torch.__version__),
                "torchvision": str(torchvision.__version__),
                "numpy": str(np.__version__),
            },
            "device": data.mean.device.type,
            "processes": world_size(),
            "data": data.summary,
        }
        if data.mean.is_cuda:
            self.header["device"] = torch.cuda.get_device_name()
        self.stop_signal = 0  # the number of the signal that has come
        self.bar = None  # the progress bar; `open_run` makes it when `step` is known

    def check_batch_size(self):
        """Ends the program with one line if the data do not fill a batch."""
        if self.steps_per_epoch == 0:
            fail(
                f"--batch-size {self.args.batch_size} is larger than "
                f"the training set of {len(self.data.images)} images"
            )

    def describe_epochs(self):
        """A line on the steps of an epoch, and on what is left over."""
        batch_size = self.args.batch_size
        line = f"{self.steps_per_epoch} steps of {batch_size} an epoch"
        left = len(self.data.images) - self.steps_per_epoch * batch_size
        if left:
            line += f"; {left} of {len(self.data.images)}, others in each epoch, are left over"
        return line

    def cosine(self, start, end, after=0):
        """A number that goes from `start` at step `after` to `end` at the last, on a half cosine.

        It stays at `start` before step `after`.
        """
        length = max(1, self.total_steps - after)
        progress = max(0.0, (self.step - after) / length)
        return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2

    def lr(self):
        """The learning rate of the next step: a linear warm-up, then a half cosine down to 0."""
        warmup = self.args.lr * ((self.step + 1) / self.warmup_steps)
        return min(warmup, self.cosine(self.args.lr, 0, after=self.warmup_steps))

    def epochs(self):
        """Yields (epoch, first step) of the epochs still to do, both counted from 0.

        The first step is not 0 if the epoch was interrupted.
        """
        for epoch in range(self.step // self.steps_per_epoch, self.args.epochs):
            self.bar.set_description(f"epoch {epoch + 1}/{self.args.epochs}")
            self.model.train()
            self.epoch_start_time = time.perf_counter()
            self.epoch_start_step = self.step
            yield epoch, self.step % self.steps_per_epoch

    def end_step(self, terms):
        """Counts the step and adds up its loss terms, a dict of scalar tensors.

        Stops the run if a mean is not finite. After Ctrl-C or SIGTERM, saves and exits.
        """
        self.step += 1
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()
        steps = (self.step - 1) % self.steps_per_epoch + 1  # of this epoch
        epoch_ends = steps == self.steps_per_epoch
        if self.step % 10 == 0 or epoch_ends:  # seldom, because reading waits for the device
            means = self.means(steps)
            shown = {name: f"{mean:.4g}" for name, mean in means.items()}
            self.bar.set_postfix(shown, refresh=False)
            self.check_finite(means)
        self.bar.update()
        self.epoch_seconds = time.perf_counter() - self.epoch_start_time
        if not epoch_ends:  # else `end_epoch` stops, after its metrics
            self.stop_if_told(ask=self.step % 10 == 0)

    def end_epoch(self, epoch, metrics):
        """Writes the epoch's line to the log and the screen, and the checkpoint.

        `metrics` are those of `collapse_metrics`. Stops like `end_step`, and, with
        --stop-on-collapse, if the last epochs all had a collapse.
        """
        done = epoch + 1
        is_last = done == self.args.epochs
        line = {"epoch": done, "lr": self.optimizer.param_groups[0]["lr"]}
        line |= self.means(self.steps_per_epoch)
        line |= metrics
        self.check_finite(line)
        images = (self.step - self.epoch_start_step) * self.args.batch_size
        line["images_per_second"] = images / self.epoch_seconds
        if rank() == 0:
            knn = None
            if done % self.args.eval_every == 0 or is_last:
                knn = knn_monitor(self.model, self.data)
            if knn is not None:
                line["knn"] = knn
            self.print_epoch(line)
            self.lines.append(line)
            self.append_to_log(line)
        self.sums = {}
        collapsed = self.collapsed_for_long()
        if done % self.args.save_every == 0 or is_last or collapsed:
            self.save()
        if self.args.keep_every and done % self.args.keep_every == 0:
            self.save(self.checkpoint.with_name(f"epoch-{done:04d}.pt"))
        if collapsed:
            last_epochs = f"the last {self.args.stop_on_collapse} epochs"
            if self.args.stop_on_collapse == 1:
                last_epochs = "the last epoch"
            self.leave(
                3,
                f"stopped, because {last_epochs} had a collapse; "
                f"saved {self.checkpoint}; python analyze.py {self.checkpoint.parent} shows it",
            )
        if not is_last:
            self.stop_if_told(ask=True)

    def print_epoch(self, line):
        """Prints an epoch's numbers, and its verdict if that is another one than before."""
        shown = []
        for name, value in line.items():
            if name not in ("epoch", "lr", "images_per_second", "verdict"):
                shown.append(f"{name} {value:.4g}")
        tqdm.write(f"epoch {line['epoch']}/{self.args.epochs}  {'  '.join(shown)}")

        before = self.lines[-1].get("verdict", "no collapse")
        if self.lines[-1]["epoch"] == 0:
            before = "no collapse"  # what an untrained network has is not the method's doing
        now = line.get("verdict", "no collapse")
        # Before the colon stand the modes of collapse, after it their numbers.
        if now.split(":")[0] == before.split(":")[0]:
            return
        if now == "no collapse" and names_collapse(before):
            now = "no collapse any more"
        elif now == "no collapse":
            now = "the assignments are not uniform any more"
        tqdm.write(f"epoch {line['epoch']}: {now}")

    def collapsed_for_long(self):
        """Whether the last epochs, as many as --stop-on-collapse, all had a collapse.

        All processes get the answer of the first, which has the log.
        """
        limit = self.args.stop_on_collapse
        if not limit:
            return False
        count = 0
        for line in reversed(self.lines[1:]):  # without the untrained network
            if not names_collapse(line.get("verdict", "no collapse")):
                break
            count += 1
        collapsed = count >= limit
        if world_size() > 1:
            answer = torch.tensor(int(collapsed), device=self.data.mean.device)
            dist.broadcast(answer, 0)
            collapsed = answer.item() == 1
        return collapsed

    def leave(self, status, line):
        """Ends all processes with this exit status, and prints a line."""
        self.bar.close()
        if rank() == 0:
            print(f"\n{line}")
        if dist.is_initialized():
            dist.destroy_process_group()
        sys.exit(status)

    def finish(self):
        """Prints what the run has come to, and the next command."""
        self.bar.close()
        if rank() == 0:
            untrained = self.lines[0]
            trained = self.lines[-1]
            names = ["knn", "center_norm", "effective_rank", "correlation"]
            names += ["used_codes", "assignment_entropy"]
            print()
            for name in names:
                if name in trained and name in untrained:
                    before, after = untrained[name], trained[name]
                    print(f"{name:<18} {before:<6.3g} untrained, {after:.3g} trained")
            if "verdict" in trained:
                print(f"\nverdict: {trained['verdict']}")
            print(f"\nnext: python evaluate.py --untrained {self.checkpoint.parent}")
            print(f"      python analyze.py {self.checkpoint.parent}")
        if dist.is_initialized():
            dist.destroy_process_group()

    def means(self, steps):
        """Means of the loss terms over the first `steps` of the epoch.

        Some of these steps may have been done before an interruption.
        """
        return {name: float(value) / steps for name, value in self.sums.items()}

    def check_finite(self, values):
        """Stops the run if one of the values is infinite or NaN. The last checkpoint stays."""
        for name, value in values.items():
            if name == "verdict" or math.isfinite(value):
                continue
            epoch = (self.step - 1) // self.steps_per_epoch + 1
            message = f"{self.args.method}: {name} is {value} in epoch {epoch}"
            if self.checkpoint.exists():
                message += f"; the last good checkpoint is {self.checkpoint}"
            self.bar.close()
            print(message, file=sys.stderr)
            sys.exit(1)

    def on_signal(self, number, frame):
        """Remembers the signal. `stop_if_told` then stops the run."""
        self.stop_signal = number
        signal.signal(number, signal.SIG_DFL)  # a second one ends the program at once

    def stop_if_told(self, ask):
        """Saves and exits if a signal has come.

        Several processes first ask each other, to stop at the same step. They do so only if all of
        them call this with `ask`. A single process need not ask.
        """
        number = self.stop_signal
        if world_size() > 1:
            if not ask:
                return
            largest = torch.tensor(int(number), device=self.data.mean.device)
            dist.all_reduce(largest, dist.ReduceOp.MAX)
            number = largest.item()  # a signal that came meanwhile stays for the next time
        if not number:
            return
        self.check_finite(self.means(1))  # before a network that is lost replaces the checkpoint
        self.save()
        self.leave(
            128 + number,
            f"stopped, saved {self.checkpoint}; the same command with --resume goes on",
        )

    def lock(self):
        """Makes the run folder, and locks it as long as this process lives, however it ends."""
        folder = self.log.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # The file is never closed, which keeps the lock.
            file = os.open(folder / ".lock", os.O_CREAT | os.O_WRONLY)
        except OSError as error:
            fail(f"cannot write to the run folder {str(folder)!r}: {error.strerror}")
        if fcntl is None:
            return
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            fail(f"another process trains in {str(folder)!r}: wait for it, or choose another --out")
        except OSError:
            pass  # a file system without locks

    def measure_untrained(self, model):
        """The first line of a new log, of the model before training."""
        line = {"epoch": 0}
        knn = knn_monitor(model, self.data)
        if knn is not None:
            line["knn"] = knn
        line |= collapse_metrics(model, self.data)
        self.lines = [line]

    def begin_log(self):
        """Writes run.json, if the run is new, and the log up to where the run stands.

        So the log never has more than the run has done.
        """
        about = self.log.with_name("run.json")
        if self.step == 0 or not about.exists():
            write_text(about, json.dumps(self.header, indent=2) + "\n")
        write_text(self.log, "".join(json.dumps(line) + "\n" for line in self.lines))

    def append_to_log(self, line):
        """Adds an epoch's line to the log. If that fails, the log stays as it was."""
        text = json.dumps(line) + "\n"
        length = self.log.stat().st_size
        try:
            with open(self.log, "ab") as file:
                file.write(text.encode())
        except OSError as error:
            os.truncate(self.log, length)
            fail(f"cannot write {str(self.log)!r} ({error})")

    def save(self, path=None):
        """Writes the checkpoint to `path` [last.pt]: tensors, numbers and strings only."""
        path = path or self.checkpoint
        if rank() == 0:
            state = {
                "method": self.args.method,
                "args": flags_of(self.args),
                "lines": self.lines,
                "epoch": self.step // self.steps_per_epoch,
                "step": self.step,
                "sums": self.sums,
                "model": self.model.state_dict(),
                "backbone": self.model.backbone.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "mean": self.data.mean.tolist(),
                "std": self.data.std.tolist(),
                "size": self.data.size,
                "fingerprint": self.data.fingerprint,
                "images": len(self.data.images),
            }

            def write(file):
                torch.save(state, file)

            atomic_write(path, write)
        if world_size() > 1:
            # Nobody leaves before the file is written, because torchrun would then end the writer.
            dist.barrier()

    def load(self):
        """Brings model, optimizer and step to where the checkpoint stands.

        Refuses a checkpoint of another run. Says so if the run becomes longer than it was meant.
        """
        state = load_checkpoint(self.checkpoint)
        if state["method"] != self.args.method:
            fail(
                f"{self.checkpoint} is a run of {state['method']}, not {self.args.method}: "
                "choose another --out"
            )
        flags = complete_args(state, self.args.defaults)
        for name, now in flags_of(self.args).items():
            then = flags.get(name)
            if name not in self.MAY_CHANGE and now != then:
                fail(
                    f"{self.checkpoint} has {flag_of(name)} {then}, not {now}: "
                    "change it or choose another --out"
                )
        self.check_data(state)
        self.check_batch_size()
        if state["step"] > self.total_steps:
            fail(
                f"{self.checkpoint} has done {state['epoch']} epochs already, "
                f"more than --epochs {self.args.epochs}"
            )
        device = self.data.mean.device
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = state["step"]
            self.lines = [dict(line) for line in state["lines"]]
            if "epoch" not in self.lines[0]:  # older runs kept there what is in run.json now
                self.header = self.lines.pop(0)
            self.sums = {name: value.to(device) for name, value in state["sums"].items()}
        except Exception as error:  # of any kind, if the file holds other things than `save` writes
            why = f"{type(error).__name__}: {first_reason(error)}"
            fail(f"{self.checkpoint} does not fit this model ({why})")
        if flags["epochs"] < self.args.epochs:
            self.tell_of_longer_schedule(flags["epochs"])

    def check_data(self, state):
        """Ends the program with one line if the checkpoint was trained on other images."""
        now = len(self.data.images)
        then = state["images"]
        if state["fingerprint"] in (None, self.data.fingerprint):
            return
        if then != now:
            what = f"{then} images, and there are {now} now"
        else:
            what = "other images: the files or their order changed"
        fail(
            f"{self.checkpoint} was trained on {what}; bring the data back or choose another --out"
        )

    def tell_of_longer_schedule(self, epochs):
        """Says how the schedules jump if a run that was meant for `epochs` is to be longer."""
        before = self.optimizer.param_groups[0]["lr"]
        now = self.lr()
        if now <= before:
            return
        line = (
            f"the run was meant for {epochs} epochs: with --epochs {self.args.epochs} its learning "
            f"rate goes from {before:.2g} back up to {now:.2g}"
        )
        if hasattr(self.model, "teacher"):
            line += ", and its teacher's momentum falls back"
        tell(f"{line}; to avoid that, choose the final --epochs from the start")
