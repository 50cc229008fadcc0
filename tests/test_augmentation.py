"""The batched augmentation against torchvision's functional operations, image by image with the
same parameters."""

import argparse
import itertools

import pytest
import torch
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as TF

import common


def by_torchvision(image, p, mean, std, size, padding=0):
    """One uint8 image through torchvision with row `p` of the parameters."""
    x = image.float() / 255
    top, left, height, width = (int(v) for v in p["crop"])
    if padding:
        x = TF.pad(x, [padding] * 4, padding_mode="reflect")
        x = TF.crop(x, top + padding, left + padding, height, width)
        x = TF.resize(x, [size, size], antialias=False)
    else:
        antialias = x.shape[-1] == size
        x = TF.resized_crop(x, top, left, height, width, [size, size], antialias=antialias)
    if p["flip"]:
        x = TF.horizontal_flip(x)
    jitter = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue]
    factors = [float(p[name]) for name in ("brightness", "contrast", "saturation", "hue")]
    for op in p["order"]:
        x = jitter[op](x, factors[op])
    if p["grayscale"]:
        x = TF.rgb_to_grayscale(x, 3)
    if "sigma" in p and p["sigma"] > 0:
        kernel = 2 * max(1, size // 20) + 1
        x = TF.gaussian_blur(x, [kernel, kernel], [float(p["sigma"])] * 2)
    if p.get("solarize"):
        x = TF.solarize(x, 0.5)
    return TF.normalize(x, mean.tolist(), std.tolist())


@pytest.mark.parametrize("source, size", [(32, 32), (80, 80), (91, 80)])
@pytest.mark.parametrize("kind", ["strong", "view 2", "weak"])
def test_every_image_is_torchvisions(source, size, kind):
    rng = common.generator(size)
    images = torch.randint(0, 256, (40, 3, source, source), generator=rng, dtype=torch.uint8)
    images[:10] = common.draw_shapes(10, source, 0)[0]
    images[10] = 128  # no hue, no contrast
    settings = dict(common.AUGMENT["weak" if kind == "weak" else "strong"], noise=0)
    if kind == "view 2":
        settings |= {"blur": 0.7, "solarize": 0.5, "grayscale": 0.5}
    if kind == "weak":
        settings |= {"jitter_p": 0.8}
    parameters = common.draw_augmentation(40, settings, size, rng, source)
    assert ("sigma" in parameters) == (kind == "view 2" and size >= 64)
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3])
    got = common.augment(images, parameters, mean, std, size)
    for i in range(40):
        p = {k: v if k == "order" else v[i] for k, v in parameters.items()}
        expected = by_torchvision(images[i], p, mean, std, size, settings.get("padding", 0))
        # Solarisation and hue jump where two values nearly tie, so a few pixels may land on the
        # other side.
        off = (got[i] - expected).abs() > 1e-3
        assert off.float().mean() < 2e-3, (i, (got[i] - expected).abs().max())


def test_crops_are_distributed_as_torchvisions():
    torch.manual_seed(0)
    image, theirs = torch.zeros(3, 32, 32), []
    for _ in range(4000):
        theirs.append(RandomResizedCrop.get_params(image, (0.08, 1), (3 / 4, 4 / 3)))
    theirs = torch.tensor(theirs).float()
    drawn = common.draw_augmentation(40_000, common.AUGMENT["strong"], 32, common.generator(0))
    ours = drawn["crop"].float()
    assert (ours[:, :2] >= 0).all() and (ours[:, :2] + ours[:, 2:] <= 32).all()
    # Means within four standard errors, and the spread.
    error = theirs.std(0) / 4000**0.5
    assert ((ours.mean(0) - theirs.mean(0)).abs() < 4 * error).all()
    torch.testing.assert_close(ours.std(0), theirs.std(0), rtol=0.05, atol=0)


def test_probabilities_and_ranges():
    p = common.draw_augmentation(20_000, common.AUGMENT["strong"], 32, common.generator(1))
    assert p["flip"].float().mean().item() == pytest.approx(0.5, abs=0.02)
    assert p["grayscale"].float().mean().item() == pytest.approx(0.2, abs=0.02)
    assert (p["brightness"] != 1).float().mean().item() == pytest.approx(0.8, abs=0.02)
    assert p["brightness"].min() >= 0.6 and p["brightness"].max() <= 1.4
    assert p["hue"].abs().max() <= 0.1
    weak = common.draw_augmentation(20_000, common.AUGMENT["weak"], 32, common.generator(1))
    assert set(weak["crop"][:, 0].tolist()) == set(range(-4, 5))
    assert (weak["brightness"] != 1).float().mean().item() == pytest.approx(0.1, abs=0.02)


def make_args(**changes):
    settings = {
        "dataset": "shapes",
        "image_size": 32,
        "batch_size": 64,
        "seed": 0,
        "augment": "strong",
        "data_dir": "",
    }
    return argparse.Namespace(**settings | changes)


def test_views_depend_on_seed_epoch_and_step_alone():
    args = make_args()
    data = common.load_data(args, torch.device("cpu"))
    views = ({}, {"solarize": 0.2})
    whole = list(itertools.islice(common.two_views(data, args, views, 3), 4))
    later = next(iter(common.two_views(data, args, views, 3, first=2)))
    assert torch.equal(whole[2][0], later[0]) and torch.equal(whole[2][1], later[1])
    assert not torch.equal(whole[2][0], whole[2][1])
    other = next(iter(common.two_views(data, args, views, 4, first=2)))
    assert not torch.equal(other[0], later[0])
    # 5000 images are two batches of 1999 and a rest.
    batches = list(common.two_views(data, make_args(batch_size=1999), views, 0))
    assert len(batches) == 2


@pytest.mark.parametrize("augment", ["strong", "weak"])
def test_processes_together_see_what_one_would(augment, monkeypatch):
    """The rows of two processes are those of one, noise included."""
    args = make_args(augment=augment)
    data = common.load_data(args, torch.device("cpu"))
    whole = next(common.two_views(data, args, ({}, {"solarize": 0.2}), 1))
    monkeypatch.setattr(common, "world_size", lambda: 2)
    shares = []
    for k in range(2):
        monkeypatch.setattr(common, "rank", lambda k=k: k)
        shares.append(next(common.two_views(data, args, ({}, {"solarize": 0.2}), 1)))
    for view in range(2):
        assert torch.equal(torch.cat([share[view] for share in shares]), whole[view])


def test_no_two_batches_are_augmented_alike(monkeypatch):
    seeds = []
    original = common.draw_augmentation

    def spy(n, settings, size, draw, *others):
        seeds.append(draw.initial_seed())
        return original(n, settings, size, draw, *others)

    monkeypatch.setattr(common, "draw_augmentation", spy)
    args = make_args(batch_size=1000)
    data = common.load_data(args, torch.device("cpu"))
    for args.seed in (0, 1):
        for epoch in (0, 1):
            assert len(list(common.two_views(data, args, ({},), epoch))) == 5
    assert len(set(seeds)) == len(seeds) == 20


def test_toy_views_are_two_samples_of_one_class():
    args = make_args(dataset="moons")
    data = common.load_data(args, torch.device("cpu"))
    lookup = {}
    for point, label in zip(data.normalise(data.images), data.labels, strict=True):
        lookup[tuple(point.tolist())] = int(label)
    partners = set()
    for x1, x2 in common.two_views(data, args, ({}, {}), 0):
        for a, b in zip(x1.tolist(), x2.tolist(), strict=True):
            assert lookup[tuple(a)] == lookup[tuple(b)]
            partners.add(tuple(b))
    assert len(partners) > 500


def test_normalised_data_is_standard():
    data = common.load_data(make_args(), torch.device("cpu"))
    x = data.normalise(data.images)
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3)), torch.ones(3), atol=1e-3, rtol=0)
