"""Backbones against torchvision's own classes and the layer counts of the papers."""

import argparse

import pytest
import torch
import torchvision
from torch import nn

import common


def build(backbone, **changes):
    settings = {"backbone": backbone, "dataset": "folder", "image_size": 32, "width": None}
    return common.build_backbone(argparse.Namespace(**settings | changes)).eval()


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("size", [32, 96])
def test_resnets_load_into_torchvisions_own(name, size):
    net = build(name, image_size=size)
    own = getattr(torchvision.models, name)()
    own.fc = nn.Identity()
    if size <= 64:
        own.conv1, own.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    own.load_state_dict(net.state_dict())
    x = torch.randn(2, 3, size, size)
    torch.testing.assert_close(net(x), own.eval()(x))
    assert net(x).shape == (2, net.num_features)


@pytest.mark.parametrize("size, patch", [(32, 4), (224, 16)])
def test_vit_loads_into_torchvisions_own(size, patch):
    net = build("vit_small", image_size=size)
    own = torchvision.models.VisionTransformer(size, patch, 12, 6, 384, 1536)
    own.heads = nn.Identity()
    own.load_state_dict(net.state_dict())
    x = torch.randn(1, 3, size, size)
    torch.testing.assert_close(net(x), own.eval()(x))
    assert net(x).shape == (1, net.num_features) == (1, 384)


@pytest.mark.parametrize("width, parameters", [(128, 1_037_184), (256, 4_138_752)])
def test_resnet8_has_table_5s_layers(width, parameters):
    """Eight 3 × 3 convolutions and a 1 × 1 shortcut with biases, on 32, 32, 16, 16, 8, 8, 8, 8
    pixels, no norm."""
    net = build("resnet8", width=width)
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert not any("Norm" in type(m).__name__ for m in net.modules())
    sizes = []
    for module in net.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            module.register_forward_hook(lambda m, i, out: sizes.append(out.shape[-1]))
    assert net(torch.randn(1, 3, 32, 32)).shape == (1, width)
    assert sizes == [32, 32, 16, 16, 8, 8, 8, 8]


@pytest.mark.parametrize(
    "name, width, features", [("resnet18", 16, 128), ("resnet50", 16, 512), ("vit_small", 64, 64)]
)
def test_width_narrows_every_stage(name, width, features):
    net = build(name, width=width)
    assert net.num_features == features
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, features)


def test_mlp_is_for_points():
    net = build("mlp", dataset="moons", width=16)
    assert net(torch.randn(5, 2)).shape == (5, 16)
    for backbone, dataset in (("mlp", "shapes"), ("resnet18", "blobs")):
        with pytest.raises(SystemExit) as stop:
            build(backbone, dataset=dataset)
        assert stop.value.code == 2
