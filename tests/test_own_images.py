"""Images as people have them: any layout, with and without labels, odd and damaged files."""

import argparse
import errno
import os
import resource
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common

CPU = torch.device("cpu")


def load(**changes):
    settings = {
        "dataset": "folder",
        "image_size": 8,
        "data_dir": "images",
        "labels": "auto",
        "cache_dir": None,
        "skip_damaged": False,
    }
    return common.load_data(argparse.Namespace(**settings | changes), CPU)


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def refused(capsys):
    """refused(...) -> the one line with which the program ends instead of loading."""

    def call(**changes):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            load(**changes)
        assert stop.value.code == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        return line

    return call


def save(name, size=(8, 8), color=None, **options):
    """Writes an image of one color, or of noise that its name draws, to images/<name>."""
    path = Path("images", name)
    path.parent.mkdir(parents=True, exist_ok=True)
    if color is None:
        noise = np.random.default_rng(list(name.encode())).integers(0, 256, (size[1], size[0], 3))
        image = Image.fromarray(noise.astype(np.uint8))
    else:
        image = Image.new("RGB", size, color)
    image.save(path, **options)
    return path


def caches(folder="images/.cache-8"):
    return sorted(path.name for path in Path(folder).iterdir())


def flat(count):
    for i in range(count):
        save(f"{i}.png")


# --- layouts and labels


def test_a_flat_folder_needs_no_labels_and_no_test_split():
    flat(40)
    data = load()
    assert data.images.shape == (36, 3, 8, 8) and data.test_images.shape == (4, 3, 8, 8)
    assert data.labels is None and data.test_labels is None and data.classes == []
    assert data.summary == [
        "folder: 36 images to train on, 4 others held out",
        "no labels: the images do not lie in folders of classes",
    ]
    assert sorted(data.train_names + data.test_names) == sorted(f"{i}.png" for i in range(40))
    for names, images in (
        (data.train_names, data.images),
        (data.test_names, data.test_images),
    ):
        for name, image in zip(names, images, strict=True):
            pixels = np.asarray(Image.open(Path("images", name)))
            assert torch.equal(image, torch.from_numpy(pixels.copy()).permute(2, 0, 1))


def test_two_views_need_no_labels():
    flat(10)
    data = load()
    args = argparse.Namespace(
        dataset="folder", image_size=8, batch_size=3, seed=0, augment="strong"
    )
    views = list(common.two_views(data, args, ({}, {}), 0))
    assert len(views) == 2 and views[0][0].shape == (3, 3, 8, 8)


def test_held_out_images_are_the_same_in_every_run_and_mostly_so_when_some_are_added():
    flat(200)
    first = load()
    assert len(first.test_names) == 20 and not set(first.test_names) & set(first.train_names)
    assert load().test_names == first.test_names
    for i in range(200, 230):
        save(f"{i}.png")
    second = load()
    assert len(second.test_names) == 23
    assert len(set(first.test_names) & set(second.test_names)) >= 15
    # The hash of the path decides, on every machine and in every version.
    assert first.test_names[:3] == ["192.png", "68.png", "187.png"]


@pytest.mark.parametrize("count, held_out", [(2, 1), (5, 2), (8, 4), (39, 4), (50, 5)])
def test_how_many_are_held_out(count, held_out):
    flat(count)
    data = load()
    assert len(data.test_images) == held_out and len(data.images) == count - held_out


def test_at_most_5000_are_held_out(monkeypatch):
    names = [f"{i}.png" for i in range(60_000)]
    images = torch.zeros(60_000, 1, dtype=torch.uint8)
    files = [(name, 1, 1) for name in names]
    monkeypatch.setattr(common, "read_splits", lambda *_: ({"all": images}, {"all": files}, []))
    monkeypatch.setattr(common, "list_images", lambda *_: list(names))
    Path("images").mkdir()
    args = argparse.Namespace(dataset="folder", data_dir="images", labels="auto")
    train, test, _, _ = common.read_folder(args)
    assert len(test[0]) == 5000 and len(train[0]) == 55_000


def test_folders_of_dates_are_no_classes_unless_asked_for(refused):
    for name in ("2023/05/a", "2023/06/b", "2024/c", "2024/d"):
        save(f"{name}.png")
    data = load()
    assert data.labels is None and len(data.images) == 2
    assert data.summary[1] == (
        "no labels: images lie at different depths; "
        "--labels folders takes the first folder's name as the class"
    )
    data = load(labels="folders")
    assert data.classes == ["2023", "2024"]
    for names, labels in (
        (data.train_names, data.labels),
        (data.test_names, data.test_labels),
    ):
        assert [data.classes[label] for label in labels] == [name[:4] for name in names]
    save("e.png")
    assert load().summary[1] == "no labels: some images lie in folders, others do not"
    line = refused(labels="folders")
    assert "'images/e.png' does not lie in the folder of a class" in line
    assert "--labels none" in line


def test_folders_of_equal_depth_are_no_classes_unless_asked_for():
    for name in ("2023/05/a", "2023/06/b", "2024/01/c"):
        save(f"{name}.png")
    data = load()
    assert data.labels is None and "folders of folders; --labels folders" in data.summary[1]
    assert load(labels="folders").classes == ["2023", "2024"]


def test_class_folders_are_labels_unless_refused():
    for name in ("a", "b", "c", "d"):
        for i in range(3):
            save(f"{name}/{i}.png")
    data = load()
    assert data.classes == ["a", "b", "c", "d"] and len(data.images) == 8
    assert [data.classes[label] for label in data.labels] == [name[0] for name in data.train_names]
    assert data.labels.dtype == torch.int64
    assert data.summary[1] == (
        "labels: 4 classes from the names of folders (a, b, c, ...); --labels none ignores them"
    )
    other = load(labels="none")
    assert other.labels is None and other.test_labels is None and other.classes == []
    assert other.summary[1] == "no labels, because of --labels none"
    assert torch.equal(other.images, data.images) and other.fingerprint == data.fingerprint
    assert len(caches()) == 2  # what --labels says changes no pixel


def test_one_folder_is_no_class(refused):
    for i in range(3):
        save(f"a/{i}.png")
    assert load().summary[1] == "no labels: all images lie in one folder"
    assert "the only class is 'a': use --labels none" in refused(labels="folders")


def test_a_folder_with_train_alone_holds_out_a_part_of_it():
    for i in range(10):
        save(f"train/{i}.png")
    save("elsewhere/0.png")
    data = load()
    assert len(data.images) == 6 and len(data.test_images) == 4
    assert all(name.startswith("train/") for name in data.train_names + data.test_names)
    for i in range(10):
        Path(f"images/train/{i}.png").rename(save(f"train/{i % 2}/{i}.png"))
    data = load()
    assert data.classes == ["0", "1"]
    assert data.labels.tolist() == [int(name.split("/")[1]) for name in data.train_names]


@pytest.mark.parametrize("test", ["val", "test"])
def test_train_and_a_test_split(test, refused):
    for name in ("cat", "dog"):
        save(f"train/{name}/0.png")
        save(f"{test}/{name}/1.png")
    data = load()
    assert data.train_names == ["train/cat/0.png", "train/dog/0.png"]
    assert data.test_names == [f"{test}/cat/1.png", f"{test}/dog/1.png"]
    assert data.labels.tolist() == data.test_labels.tolist() == [0, 1]
    assert data.summary[0] == f"folder: 2 images to train on, 2 in {test}/ to test on"
    save(f"{test}/cow/1.png")
    assert f"'images/{test}' has class 'cow', which train/ lacks" in refused()
    assert load(labels="none").labels is None
    Path(f"images/{test}/cow/1.png").rename(f"images/{test}/1.png")
    data = load()  # a test image without a class
    assert data.labels is None and len(data.test_images) == 3
    assert f"'images/{test}/1.png' does not lie" in refused(labels="folders")


def test_val_without_labels_and_without_train():
    for i in range(4):
        save(f"train/{i}.png")
        save(f"val/{i}.png")
    data = load()
    assert data.labels is None and len(data.images) == len(data.test_images) == 4
    Path("images/train").rename("images/all")
    data = load()
    assert len(data.images) + len(data.test_images) == 8
    assert data.summary[2].startswith("there is no folder train/, so val/ and test/ are folders")


def test_other_data_sets_say_what_they_hold():
    data = load(dataset="shapes")
    assert data.summary == ["shapes: 5000 images of 10 classes, 1000 test images"]
    assert data.fingerprint == "shapes-8-5000" and data.train_names == data.test_names == []
    assert load(dataset="blobs").summary == ["blobs: 1500 points of 3 classes, 600 test points"]


def test_fingerprint_follows_the_training_images_but_not_their_folder():
    flat(10)
    data = load()
    Path("images").rename("moved")
    moved = load(data_dir="moved")
    os.utime(Path("moved", data.train_names[0]), (1, 1))  # as a copy may have
    touched = load(data_dir="moved")
    assert data.fingerprint == moved.fingerprint == touched.fingerprint
    Path("moved", data.test_names[0]).write_bytes(Path("moved", data.test_names[1]).read_bytes())
    assert load(data_dir="moved").fingerprint == data.fingerprint
    Image.new("RGB", (9, 9)).save(Path("moved", data.train_names[0]))
    assert load(data_dir="moved").fingerprint != data.fingerprint


# --- which files are images


def test_endings_are_taken_as_they_come():
    names = ["a.JPEG", "b.Jpg", "c.jfif", "d.WEBP", "e.tif", "f.bmp", "g.GIF", "h.PNG", "i.ppm"]
    formats = ["JPEG", "JPEG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PNG", "PPM"]
    for ending in (".avif", ".jp2"):
        if ending in common.image_endings():
            names.append(f"j{ending}")
            formats.append(Image.EXTENSION[ending])
    for name, kind in zip(names, formats, strict=True):
        save(name, color=(200, 100, 50), format=kind)
    save(".hidden.png")
    save(".hidden/a.png")
    for name in ("a.txt", "b.TXT", "c.heic", "noending"):
        Path("images", name).write_text("not an image")
    data = load()
    assert sorted(data.train_names + data.test_names) == sorted(names)
    color = torch.tensor([200, 100, 50]).view(3, 1, 1)
    assert ((torch.cat([data.images, data.test_images]).int() - color).abs() < 12).all()
    skipped = "skipped, because they are not images: 2 .txt, 1 .heic, 1 without an ending"
    assert data.summary[2] == skipped


def test_endings_that_pillow_cannot_open_do_not_count(monkeypatch):
    flat(4)
    save("a.webp")
    Image.init()
    monkeypatch.delitem(Image.OPEN, "WEBP")
    data = load()
    assert len(data.images) + len(data.test_images) == 4 and "1 .webp" in data.summary[2]


def test_links_are_followed_once(refused, tmp_path):
    flat(4)
    Path("images").rename("elsewhere")
    Path("images").mkdir()
    Path("images/all").symlink_to("../elsewhere")
    assert load().train_names[0].startswith("all/")
    Path("images/again").symlink_to("all")
    line = refused()
    assert "is there twice, by a link: 'images/again' is 'images/all'" in line
    Path("images/again").unlink()
    Path("elsewhere/loop").symlink_to("..")
    assert "is there twice, by a link" in refused(data_dir=".")


def test_names_with_odd_characters():
    os.makedirs(b"images/cost_$5\xff")
    for i in range(4):
        save(f"_other/{i} é.png")
        Path(f"images/_other/{i} é.png").rename(os.fsdecode(b"images/cost_$5\xff/%d.png" % i))
        save(f"_other/{i} é.png")
    Path("images/_other/bad\udcff é.png").write_bytes(b"")
    data = load(skip_damaged=True)
    assert len(data.images) + len(data.test_images) == 8 and len(data.classes) == 2
    assert b"bad\xff" in Path("images/.cache-8/folder-all-8-damaged.txt").read_bytes()
    load(skip_damaged=True)
    assert len(caches()) == 3


# --- how they are decoded


def test_exif_orientation_is_respected():
    """For each of the eight orientations, the file is written so that it must be turned upright."""
    upright = np.arange(64, dtype=np.uint8).reshape(8, 8)
    turned = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright),  # shown by a clockwise turn
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }
    Path("images").mkdir()
    for orientation, pixels in turned.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        for ending in ("png", "tiff"):
            path = f"images/{orientation}.{ending}"
            Image.fromarray(np.ascontiguousarray(pixels)).save(path, exif=exif)
    data = load()
    images = torch.cat([data.images, data.test_images])
    assert len(images) == 16
    for image, name in zip(images, data.train_names + data.test_names, strict=True):
        assert (image.numpy() == upright).all(), name


def test_a_photograph_that_lies_on_its_side():
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.zeros((30, 60, 3), np.uint8)
    pixels[:, 20:30] = 255  # above the middle, when upright
    Path("images").mkdir()
    for i in range(2):
        Image.fromarray(pixels).save(f"images/{i}.jpg", exif=exif, quality=100)
    data = load(image_size=30)
    assert data.images.shape == (1, 3, 30, 30)
    assert data.images[0, :, 6:14].min() > 200 and data.images[0, :, 17:].max() < 50


def test_transparency_is_laid_on_white():
    hidden = np.zeros((8, 8, 4), np.uint8)
    hidden[..., 0] = 200  # red that nobody sees
    hidden[:, :4, 3] = 255  # but for the left half
    Path("images").mkdir()
    Image.fromarray(hidden).save("images/rgba.png")
    Image.fromarray(hidden[..., [0, 3]], "LA").save("images/la.png")
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([200, 0, 0] * 2)
    palette.paste(0, (0, 0, 4, 8))
    palette.save("images/palette.png", transparency=1)
    palette.save("images/palette.gif", transparency=1)
    rgb = Image.fromarray(np.ascontiguousarray(hidden[..., :3]))
    rgb.paste((1, 2, 3), (4, 0, 8, 8))
    rgb.save("images/rgb.png", transparency=(1, 2, 3))
    hidden[..., 3] = 128
    Image.fromarray(hidden).save("images/half.webp", lossless=True, exact=True)
    data = load()
    for image, name in zip(
        torch.cat([data.images, data.test_images]),
        data.train_names + data.test_names,
        strict=True,
    ):
        if name == "half.webp":
            assert 226 <= image[0].min() <= 228 and 126 <= image[1].min() <= 128
            continue
        assert (image[:, :, 4:] == 255).all(), name
        expected = 200 if name == "la.png" else 0
        assert (image[0, :, :4] == 200).all() and (image[1, :, :4] == expected).all(), name


def test_long_images_are_spoken_of():
    for i in range(20):
        save(f"{i}.png", (24, 16))  # 3:2 loses just a third
    for i in range(2):
        save(f"long{i}.png", (16, 25))
    assert len(load().summary) == 2
    save("long2.png", (40, 16))
    line = (
        "of each image the middle square is used: "
        "3 of 23 images lose more than a third of their pixels"
    )
    assert load().summary[2] == line
    assert load().summary[2] == line  # from the cache


# --- damaged files


@pytest.fixture
def decoded(monkeypatch):
    """The names of the files that are decoded, as a list that grows."""
    names = []
    original = common.decode_image

    def spy(path, size):
        names.append(path.name)
        return original(path, size)

    monkeypatch.setattr(common, "decode_image", spy)
    return names


def damage(count):
    for i in range(count):
        Path(f"images/bad{i:02}.png").write_bytes(b"not an image")


def test_damaged_files_are_listed_together_and_nothing_is_decoded_twice(refused, decoded):
    flat(40)
    damage(12)
    line = refused()
    assert "cannot use 12 of 52 images" in line and "--skip-damaged" in line
    assert line.count("'images/bad") == 10
    assert "all names are in 'images/.cache-8/folder-all-8-damaged.txt'" in line
    text = Path("images/.cache-8/folder-all-8-damaged.txt").read_text()
    assert sorted(text.splitlines()) == [f"bad{i:02}.png" for i in range(12)]
    assert len(decoded) == 52
    assert not list(Path("images/.cache-8").glob("*.part"))

    decoded.clear()
    assert refused() == line
    assert sorted(decoded) == [f"bad{i:02}.png" for i in range(12)]  # tried again, and no other
    decoded.clear()
    data = load(skip_damaged=True)
    assert len(data.images) == 36 and len(data.test_images) == 4
    assert "left out: 12 of 52 images" in data.summary[2]
    assert "folder-all-8-damaged.txt" in data.summary[2]
    assert len(decoded) == 12

    decoded.clear()
    for i in range(11):
        Path(f"images/bad{i:02}.png").unlink()
    assert "cannot use 1 of 41 images" in refused() and decoded == ["bad11.png"]
    Path("images/bad11.png").unlink()
    decoded.clear()
    after = load()
    assert not decoded and len(after.summary) == 2
    assert after.fingerprint == data.fingerprint and torch.equal(after.images, data.images)
    assert [Path(name).suffix for name in caches()] == [".json", ".npy"]


def test_a_damaged_file_that_is_mended_is_used(refused):
    flat(8)
    damage(1)
    refused()
    save("bad00.png")
    data = load()
    assert len(data.images) + len(data.test_images) == 9 and len(caches()) == 2


def test_damaged_files_of_all_splits_are_listed_together(refused):
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            save(f"{split}/{name}/0.png")
        Path(f"images/{split}/cat/bad.png").write_bytes(b"")
    line = refused()
    assert "2 of 6" in line and "'images/train/cat/bad.png', 'images/val/cat/bad.png'" in line
    assert "train-8-damaged.txt' and 'images/.cache-8/folder-val-8-damaged.txt'" in line
    data = load(skip_damaged=True)
    assert data.labels.tolist() == data.test_labels.tolist() == [0, 1]


def test_all_kinds_of_damage(refused):
    flat(8)
    whole = save("bad.png", (16, 16)).read_bytes()
    path = Path("images/bad.png")
    for broken in (b"", whole[: len(whole) // 2], whole[:60] + b"\xff" + whole[61:]):
        path.write_bytes(broken)
        assert "cannot use 1 of 9 images" in refused()
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(path)
    assert "more than 8 bits" in refused()
    path.unlink()
    path.symlink_to("nowhere")
    assert "'images/bad.png'" in refused()
    path.unlink()
    if hasattr(os, "mkfifo"):
        os.mkfifo(path)  # opening it would wait
        assert "'images/bad.png'" in refused()
        path.unlink()
    assert len(load().images) == 4


def test_any_error_of_pillow_is_a_damaged_file(refused, monkeypatch):
    flat(8)
    original = Image.open

    def raises(path):
        if path.name == "3.png":
            raise KeyError("of a kind that nobody expects")
        return original(path)

    monkeypatch.setattr(Image, "open", raises)
    assert "cannot use 1 of 8 images" in refused() and "'images/3.png'" in refused()


def test_only_damaged_files(refused):
    Path("images").mkdir()
    damage(3)
    assert "all 3 images are damaged" in refused(skip_damaged=True)
    assert caches() == []


# --- the cache


def test_read_only_data_with_a_cache_elsewhere(refused, monkeypatch):
    flat(8)
    original = Path.mkdir

    def mkdir(path, *args, **kwargs):
        if ".cache" in path.name:
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return original(path, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    line = refused()
    assert "Read-only file system" in line and "--cache-dir" in line
    Path("file").touch()
    assert "cannot write the image cache 'file'" in refused(cache_dir="file")
    data = load(cache_dir="new/cache")
    assert len(data.images) == 4 and len(caches("new/cache")) == 2
    assert not Path("images/.cache-8").exists()


def test_two_roots_under_one_cache_keep_what_is_theirs(decoded):
    flat(8)
    Path("images").rename("first")
    flat(9)
    for _ in range(2):
        assert len(load(data_dir="first", cache_dir="cache").images) == 4
        assert len(load(cache_dir="cache").images) == 5
    load(data_dir="first/../images", cache_dir="cache")  # the same root
    assert len(decoded) == 17


def test_data_sets_and_sizes_under_one_root_keep_what_is_theirs(decoded):
    classes = common.IMAGENET100
    for name in classes:
        save(f"train/{name}/0.png", color="red")
        save(f"val/{name}/0.png", color="blue")
    flags = {"cache_dir": "cache"}
    load(**flags)
    load(dataset="imagenet100", **flags)
    load(image_size=9, **flags)
    assert len(caches("cache")) == 2 * 6  # each array with a note
    decoded.clear()
    load(**flags)
    load(dataset="imagenet100", **flags)
    load(image_size=9, **flags)
    assert not decoded
    save(f"train/{classes[0]}/0.png", color="green")
    load(**flags)  # the old array goes
    assert len(caches("cache")) == 2 * 6
    load()  # the default folder
    load(dataset="imagenet100")
    decoded.clear()
    load()
    assert not decoded and len(caches()) == 2 * 4


def test_what_a_killed_run_left_behind_is_removed_later():
    flat(8)
    folder = Path("images/.cache-8")
    folder.mkdir()
    old, new, foreign = (
        folder / f"folder-{name}.part" for name in ("all-8-old", "all-8-new", "all-80-old")
    )
    for path in (old, new, foreign):
        path.write_bytes(b"half")
    os.utime(old, (1, 1))
    os.utime(foreign, (1, 1))
    load()
    assert not old.exists() and new.exists() and foreign.exists()


def test_temporary_names_do_not_depend_on_the_process(monkeypatch):
    """Two containers that share a file system may have the same process ids."""
    flat(8)
    parts = []
    original = os.replace

    def replace(part, cache):
        parts.append(part.name)
        original(part, cache)

    monkeypatch.setattr(os, "replace", replace)
    load(cache_dir="a")
    load(cache_dir="b")
    assert len({name.split("-8-")[1] for name in parts}) == 2


def test_a_mapped_array_that_cannot_be_replaced_is_used(monkeypatch, refused):
    """Windows refuses to replace a file that another run has mapped. It holds the same."""
    flat(8)
    cache = Path("images/.cache-8")
    load()
    (array,) = cache.glob("*.npy")
    whole = array.read_bytes()

    def replace(part, path):
        path.write_bytes(whole)  # the other run has been faster
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "replace", replace)
    array.unlink()
    assert len(load().images) == 4 and not list(cache.glob("*.part"))
    array.unlink()

    def replace_and_fail(part, path):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "replace", replace_and_fail)
    assert "Permission denied" in refused() and not list(cache.glob("*.part"))


def test_a_disk_that_is_too_small_is_found_before_the_work(refused, decoded, monkeypatch):
    flat(8)
    usage = argparse.Namespace(total=10**6, used=10**6 - 1000, free=1000)
    monkeypatch.setattr(common.shutil, "disk_usage", lambda _: usage)
    line = refused()
    assert "GB" in line and "--cache-dir" in line and not decoded
    assert caches() == []
    usage.total = usage.free = 0  # a file system that does not know
    assert len(load().images) == 4


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is the stand-in for a full disk")
def test_a_disk_that_becomes_full_is_one_line(refused):
    flat(200)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        line = refused()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert "cannot write the image cache 'images/.cache-8' (File too large)" in line
    assert "--cache-dir" in line
    assert caches() == []
    assert len(load().images) == 180


def test_images_that_change_while_they_are_read(refused, monkeypatch):
    flat(8)
    original = common.decode_images

    def and_another(*args):
        original(*args)
        save("another.png")
        original(args[0], args[1], args[2], [*args[3], ("another.png", 1, 1)], args[4])

    monkeypatch.setattr(common, "decode_images", and_another)
    assert "images in 'images' have changed while they were read: start again" in refused()


def test_a_file_that_vanishes_while_it_is_read(refused, monkeypatch):
    flat(8)
    original = common.decode_images

    def vanish(*args):
        Path("images/3.png").unlink()
        original(*args)

    monkeypatch.setattr(common, "decode_images", vanish)
    assert "cannot use 1 of 8 images" in refused()


def test_a_damaged_cache_is_named(refused):
    flat(8)
    load()
    (cache,) = Path("images/.cache-8").glob("*.npy")
    for broken in (b"", b"nothing", cache.read_bytes()[:-10]):
        cache.write_bytes(broken)
        line = refused()
        assert "cannot read the image cache" in line and cache.name in line


def test_other_processes_find_what_the_first_one_wrote(monkeypatch, refused):
    flat(8)
    damage(1)
    whole = load(skip_damaged=True)
    monkeypatch.setattr(common, "decode_images", lambda *_: pytest.fail("it decodes, too"))
    monkeypatch.setattr(common.dist, "barrier", lambda: None)
    monkeypatch.setenv("LOCAL_RANK", "1")
    other = load(skip_damaged=True)
    assert torch.equal(other.images, whole.images) and other.train_names == whole.train_names
    assert "cannot use 1 of 9 images" in refused()


# --- messages


def test_what_is_missing_is_named(refused):
    assert "nowhere' does not exist" in refused(data_dir="nowhere")
    Path("images").mkdir()
    assert "no images in 'images': --data-dir must hold images, at any depth" in refused()
    save("train/a/0.png")
    Path("images/val").mkdir()
    assert "no images in 'images/val'" in refused()
    Path("images/val").rmdir()
    assert "'images' holds one image" in refused()


def test_imagenet100_names_the_split_that_is_missing(refused):
    Path("images").mkdir()
    line = refused(dataset="imagenet100")
    assert "no images in 'images/train' for 100 of the 100 classes" in line
    for name in common.IMAGENET100:
        save(f"train/{name}/0.png", color="red")
    line = refused(dataset="imagenet100")
    assert "no images in 'images/test' for 100" in line and "val/<class>/* or test/" in line
    save(f"val/{common.IMAGENET100[0]}/0.png", color="red")
    assert "no images in 'images/val' for 99 of the 100 classes" in refused(dataset="imagenet100")


def test_a_folder_that_cannot_be_listed(refused, monkeypatch):
    flat(8)
    save("closed/0.png")
    original = os.scandir

    def scandir(path):
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return original(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert "cannot read the folder 'images/closed' (Permission denied)" in refused()


def test_images_and_no_data_set_are_told_apart_from_a_download(run):
    """CIFAR-10 is the default, and would be downloaded into the folder of images."""
    save("deep/er/a.png")
    line = run("vicreg", "--data-dir", "images").error
    assert "add --dataset folder" in line and "--dataset cifar10" in line
    assert "add --dataset folder" in run("vicreg", "--data-dir=images").error
    assert "--labels none is for --dataset folder" in run("vicreg", "--labels", "none").error
