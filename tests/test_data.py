"""Data sets: what they hold, and what happens when files are missing or broken."""

import argparse
import multiprocessing
import time
import types
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import common

CPU = torch.device("cpu")


def load(**changes):
    return common.load_data(settings(**changes), CPU)


def settings(**changes):
    """The flags that `load_data` reads."""
    flags = {
        "dataset": "folder",
        "image_size": 16,
        "data_dir": "images",
        "labels": "auto",
        "cache_dir": None,
        "skip_damaged": False,
    }
    return argparse.Namespace(**flags | changes)


@pytest.fixture
def images(tmp_path, monkeypatch):
    """images/{train,val}/{cat,dog}/*: constant colours, one larger and not square, one gray."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3)):
        for name in ("cat", "dog"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            shapes = [(40, 24, 3), (16, 16), *[(16, 16, 3)] * 4]
            for i, shape in enumerate(shapes[:count]):
                pixels = rng.integers(0, 256, shape, dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path / "images"


def refused(capsys, **changes):
    with pytest.raises(SystemExit) as stop:
        load(**changes)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2
    return line


def test_folder_holds_the_files_pixels(images):
    data = load()
    assert data.images.shape == (12, 3, 16, 16) and data.test_images.shape == (6, 3, 16, 16)
    assert data.classes == ["cat", "dog"] and data.labels.tolist() == [0] * 6 + [1] * 6
    pixels = np.asarray(Image.open(images / "train" / "dog" / "4.png"))
    assert torch.equal(data.images[10], torch.from_numpy(pixels.copy()).permute(2, 0, 1))
    assert torch.equal(data.images[1][0], data.images[1][2])  # gray images get three channels
    expected = torch.stack([x.double() / 255 for x in data.images]).mean((0, 2, 3))
    torch.testing.assert_close(data.mean, expected.float())


def test_large_images_are_kept_larger_than_the_network_sees_them(images):
    """256 pixels for 224: random crops are cut out of the larger image, and the middle is what
    evaluation sees."""
    data = load(image_size=70)
    assert data.images.shape == (12, 3, 80, 80)
    x = data.normalise(data.images)
    assert x.shape == (12, 3, 70, 70)
    expected = (data.images[3, 1, 5:75, 5:75] / 255 - data.mean[1]) / data.std[1]
    torch.testing.assert_close(x[3, 1], expected)
    args = argparse.Namespace(dataset="folder", image_size=70, batch_size=4)
    args.seed, args.augment = 0, "strong"
    x1, x2 = next(common.two_views(data, args, ({}, {"blur": 1.0}), 0))
    assert x1.shape == x2.shape == (4, 3, 70, 70)


def test_only_the_first_process_of_a_machine_looks_at_each_file(images, monkeypatch):
    whole = load()
    monkeypatch.setattr(common, "decode_images", lambda *_: pytest.fail("another process decodes"))
    monkeypatch.setattr(common.dist, "barrier", lambda: None)
    monkeypatch.setenv("LOCAL_RANK", "1")
    other = load()
    assert torch.equal(other.images, whole.images) and torch.equal(other.labels, whole.labels)


def test_a_batch_is_read_ahead(monkeypatch):
    """While a batch is in use, a thread reads the next one, and no more."""
    images, indices = torch.arange(12).view(6, 2), torch.tensor([[5, 0], [1, 2], [3, 4]])
    read, original = [], torch.Tensor.numpy

    def spy(tensor):
        if tensor is not images:  # an index
            read.append(tensor.tolist())
        return original(tensor)

    monkeypatch.setattr(torch.Tensor, "numpy", spy)
    for step, batch in enumerate(common.batches(images, indices, CPU)):
        assert batch.tolist() == [[2 * i, 2 * i + 1] for i in indices[step].tolist()]
        for _ in range(200):
            if len(read) == min(step + 2, 3):
                break
            time.sleep(0.01)
        assert read == indices[: step + 2].tolist()
    assert list(common.batches(images, indices[:0], CPU)) == []


def test_folder_cache_is_reused_and_follows_the_files(images):
    first = load().images.clone()
    caches = sorted((images / ".cache-16").iterdir())
    assert [p.suffix for p in caches] == [".json", ".npy", ".json", ".npy"]
    written = [p.stat().st_mtime_ns for p in caches]
    assert torch.equal(load().images, first)
    assert [p.stat().st_mtime_ns for p in caches] == written
    Image.new("RGB", (16, 16), (255, 0, 0)).save(images / "train" / "cat" / "9.png")
    assert len(load().images) == 13
    assert len(list((images / ".cache-16").iterdir())) == 4


def test_two_runs_may_write_one_cache_at_the_same_time(images, tmp_path):
    rng = np.random.default_rng(0)
    for i in range(300):
        pixels = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / "train" / "cat" / f"more{i}.png")
    fork = multiprocessing.get_context("fork")
    runs = [fork.Process(target=common.read_folder, args=(settings(),)) for _ in range(2)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert [run.exitcode for run in runs] == [0, 0]
    assert not list(tmp_path.glob("images/.cache-16/*.part"))


def test_folder_that_cannot_be_read_is_named(images, capsys):
    assert "nowhere' does not exist: --data-dir" in refused(capsys, data_dir="nowhere")
    (images / "val" / "dog").rename(images / "val" / "cow")
    assert "'cow'" in refused(capsys)
    (images / "val" / "cow").rename(images / "val" / "dog")
    whole = (images / "train" / "dog" / "3.png").read_bytes()
    for broken in (b"", b"not an image", whole[: len(whole) // 2]):
        (images / "train" / "dog" / "3.png").write_bytes(broken)
        assert "images/train/dog/3.png" in refused(capsys)
        assert not list((images / ".cache-16").glob("*.part"))
    # 16-bit and float images would be clipped to 8 bits.
    Image.fromarray(np.full((16, 16), 40_000, np.uint16)).save(images / "train" / "dog" / "3.png")
    assert "more than 8 bits" in refused(capsys)
    (images / "train" / "dog" / "3.png").write_bytes(whole)
    Image.fromarray(np.full((16, 16), 0.5, np.float32)).save(images / "train" / "dog" / "4.tiff")
    assert "images/train/dog/4.tiff" in refused(capsys)
    (images / "train" / "dog" / "4.tiff").unlink()
    assert len(load().images) == 12
    (images / "train" / "dog" / "link.png").symlink_to("link.png")  # there is no file behind it
    assert "cannot use 1 of 19 images" in refused(capsys)
    assert "'images/train/dog/link.png'" in refused(capsys)
    (images / "train" / "dog" / "link.png").unlink()
    (images / "train" / "dog" / "again").symlink_to("../dog")  # each image 40 times
    assert "a folder below 'images' is there twice, by a link" in refused(capsys)
    (images / "train" / "dog" / "again").unlink()
    (images / "val").rename(images / "elsewhere")
    (images / "val").mkdir()
    assert "no images in 'images/val'" in refused(capsys)


def test_imagenet100_takes_the_published_classes(images, capsys):
    assert len(set(common.IMAGENET100)) == 100
    line = refused(capsys, dataset="imagenet100")
    assert "no images in 'images/train'" in line and "n01558993" in line
    for split in ("train", "val"):
        for name in (*common.IMAGENET100, "n01440764"):
            (images / split / name).mkdir()
            Image.new("RGB", (20, 30)).save(images / split / name / "a.JPEG")
    (images / "val" / "n02869837" / "a.JPEG").unlink()
    line = refused(capsys, dataset="imagenet100")
    assert "no images in 'images/val'" in line and "n02869837" in line
    Image.new("RGB", (20, 30)).save(images / "val" / "n02869837" / "a.JPEG")
    data = load(dataset="imagenet100")
    assert len(data.images) == 100 and data.classes == sorted(common.IMAGENET100)


@pytest.mark.parametrize(
    "name, cls", [("cifar10", "CIFAR10"), ("cifar100", "CIFAR100"), ("svhn", "SVHN")]
)
def test_torchvision_sets_become_one_tensor(name, cls, monkeypatch):
    """torchvision gives CIFAR as (N, H, W, 3) with `targets`, SVHN as (N, 3, H, W) with
    `labels`."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)

    def fake(root, download, train=None, split=None):
        if name == "svhn":
            assert split in ("train", "test") and train is None
            images = pixels.transpose(0, 3, 1, 2)
            return types.SimpleNamespace(data=images, labels=np.arange(20) % 10)
        assert split is None
        targets = [i % 10 for i in range(20)]
        return types.SimpleNamespace(data=pixels, targets=targets, classes=list("abcdefghij"))

    monkeypatch.setattr(torchvision.datasets, cls, fake)
    data = load(dataset=name, image_size=32)
    assert torch.equal(data.images, torch.from_numpy(pixels).permute(0, 3, 1, 2))
    assert data.labels.tolist() == [i % 10 for i in range(20)] and len(data.classes) == 10
    assert load(dataset=name, image_size=16).images.shape == (20, 3, 16, 16)


@pytest.mark.parametrize(
    "name, file", [("cifar10", "cifar-10-python.tar.gz"), ("svhn", "train_32x32.mat")]
)
def test_no_connection_says_what_to_do(name, file, tmp_path, monkeypatch, capsys):
    def offline(*args, **kwargs):
        raise URLError("no connection")

    monkeypatch.chdir(tmp_path)
    datasets = torchvision.datasets
    for module in (datasets.cifar, datasets.svhn, datasets.utils):
        for function in ("download_and_extract_archive", "download_url"):
            if hasattr(module, function):
                monkeypatch.setattr(module, function, offline)
    line = refused(capsys, dataset=name, data_dir="data")
    assert file in line and "'data'" in line and "--dataset shapes" in line


def test_shapes_are_ten_balanced_classes_and_the_same_every_time():
    data, again = (load(dataset="shapes", image_size=32) for _ in range(2))
    assert torch.equal(data.images, again.images)
    assert torch.bincount(data.labels).tolist() == [500] * 10 and len(data.classes) == 10
    assert data.images.dtype == torch.uint8 and data.images.float().std() > 30
    seen = {image.numpy().tobytes() for image in data.images}
    assert not any(image.numpy().tobytes() in seen for image in data.test_images)
    assert load(dataset="shapes", image_size=48).images.shape[-1] == 48


def test_shapes_cannot_be_told_by_pixels_or_brightness():
    """Neighbours by pixels or by histograms of gray find few classes."""
    data = load(dataset="shapes", image_size=16)
    pixels, tests = (images.flatten(1).float() for images in (data.images, data.test_images))
    histograms = torch.stack([x.histc(16, 0, 255) for x in pixels])
    others = torch.stack([x.histc(16, 0, 255) for x in tests])
    assert common.knn_accuracy(pixels, data.labels, tests, data.test_labels) < 0.3
    assert common.knn_accuracy(histograms, data.labels, others, data.test_labels) < 0.3


def test_a_network_that_is_told_the_labels_tells_the_shapes():
    """So a shape can be learned. After 6 epochs its accuracy was 0.955 to 0.962 with four seeds."""
    torch.manual_seed(0)
    data = load(dataset="shapes", image_size=16)
    images, tests = (x.float() / 255 - 0.4 for x in (data.images, data.test_images))
    layers = []
    for a, b in ((3, 16), (16, 32), (32, 64)):
        layers += [
            torch.nn.Conv2d(a, b, 3, padding=1),
            torch.nn.BatchNorm2d(b),
            torch.nn.ReLU(),
            torch.nn.MaxPool2d(2),
        ]
    layers += [torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(64, 10)]
    net = torch.nn.Sequential(*layers)
    batches = [rows for _ in range(6) for rows in torch.randperm(5000).split(128)]
    optimizer = torch.optim.Adam(net.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=len(batches))
    for rows in batches:
        loss = torch.nn.functional.cross_entropy(net(images[rows]), data.labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        right = net.eval()(tests).argmax(1) == data.test_labels
    assert right.float().mean() > 0.9


def test_the_monitor_sees_all_classes():
    data = load(dataset="shapes", image_size=16)
    # The few images that the training monitor takes are of all classes.
    assert len(set(data.labels[common.evenly_spaced(data.images, 500)].tolist())) == 10


@pytest.mark.parametrize("name", ["blobs", "moons"])
def test_toys_are_three_separable_classes(name):
    data = load(dataset=name)
    assert data.images.shape == (1500, 2) and torch.bincount(data.labels).tolist() == [500] * 3
    # Cosines of (x, y, 1) tell points in one direction apart.
    points = torch.cat([data.images, torch.ones(1500, 1)], 1)
    tests = torch.cat([data.test_images, torch.ones(600, 1)], 1)
    accuracy = common.knn_accuracy(points, data.labels, tests, data.test_labels, k=5)
    assert accuracy > 0.95


def test_images_stay_on_the_host_where_the_device_has_not_three_times_their_size(monkeypatch):
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 3000)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (6000, 9000))
    for name, limit in (("mps", 1000), ("cuda", 2000)):
        device = torch.device(name)
        assert common.fits(limit - 1, device) and not common.fits(limit, device)
    assert common.fits(10**15, torch.device("cpu"))


def test_batches_of_images_on_the_host_come_to_any_device():
    """ "meta" stands for a device that is neither the CPU nor CUDA."""
    images = torch.zeros(9, 3, 4, 4, dtype=torch.uint8)
    indices = torch.arange(6).view(2, 3)
    for batch in common.batches(images, indices, torch.device("meta")):
        assert batch.device.type == "meta" and batch.shape == (3, 3, 4, 4)
