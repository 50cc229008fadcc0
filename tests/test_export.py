"""evaluate.py --export: a backbone as one file that PyTorch loads without this project."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import torchvision
from conftest import TINY
from torch import nn

import common
import evaluate

# Images or points in, features out, for batches of 1, 2 and 7. It is run without this project.
LOAD = """
import sys
import numpy as np
import torch

for name in sys.argv[1:]:
    backbone = torch.export.load(name + ".pt2").module()
    rows = torch.from_numpy(np.load(name + "-in.npy"))
    features = [backbone(rows[:1]), backbone(rows[1:3]), backbone(rows[3:])]
    np.save(name + "-out.npy", torch.cat(features).detach().numpy())
for module in ("common", "evaluate", "torchvision"):
    assert module not in sys.modules, module
"""

MEAN = [0.2, 0.5, 0.7]
STD = [0.1, 0.3, 0.2]


def save_checkpoint(path, flags, mean, std):
    """A checkpoint of SimSiam with these flags, whose batch norms have seen something else than
    mean 0 and variance 1. Returns its model."""
    method = evaluate.load_method("simsiam")
    args = common.make_parser(method.add_flags, method.DEFAULTS).parse_args(flags)
    model = method.Model(args).eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 2)
    state = {
        "method": "simsiam",
        "args": vars(args),
        "epoch": 3,
        "step": 9,
        "model": model.state_dict(),
        "backbone": model.backbone.state_dict(),
        "mean": mean,
        "std": std,
    }
    torch.save(state, path)
    return model


def test_exported_backbones_give_the_features_without_this_project(
    run, tmp_path, long, monkeypatch
):
    networks = {
        "resnet8": ["--backbone", "resnet8", "--width", "8"],
        "resnet18": ["--backbone", "resnet18", "--width", "16"],
        "vit_small": ["--backbone", "vit_small", "--width", "64"],
        "mlp": ["--backbone", "mlp", "--dataset", "blobs"],
    }
    if long:
        networks["resnet50"] = ["--backbone", "resnet50", "--width", "16"]
        networks["resnet50-64"] = ["--backbone", "resnet50"]
    else:
        transformer = torchvision.models.VisionTransformer

        def short_transformer(num_layers, **sizes):
            return transformer(num_layers=2, **sizes)

        monkeypatch.setattr(torchvision.models, "VisionTransformer", short_transformer)
    expected = {}
    for name, flags in networks.items():
        if name == "mlp":
            mean, std = [1.0, -2.0], [3.0, 0.5]
            rows = torch.randn(10, 2)
            inputs = rows
        else:
            flags = [*flags, "--image-size", "16"]
            mean, std = MEAN, STD
            rows = torch.randint(256, (10, 3, 16, 16), dtype=torch.uint8)
            inputs = rows / 255
        model = save_checkpoint(tmp_path / f"{name}.pt", flags, mean, std)
        data = common.Data(
            rows, None, rows, None, [], torch.tensor(mean), torch.tensor(std), size=16
        )
        expected[name] = common.extract(model, rows, data)["features"].numpy()
        np.save(tmp_path / f"{name}-in.npy", inputs.numpy())

        result = run("evaluate", f"{name}.pt", "--export", f"{name}.pt2")
        assert result.code == 0, result.err
        (line,) = result.out.splitlines()
        assert f"torch.export.load('{name}.pt2').module()" in line
        assert f"(n, {model.backbone.num_features})" in line

    command = [sys.executable, "-I", "-c", LOAD, *networks]
    subprocess.run(command, cwd=tmp_path, check=True)
    for name, features in expected.items():
        loaded = np.load(tmp_path / f"{name}-out.npy")
        np.testing.assert_allclose(loaded, features, rtol=1e-4, atol=1e-5, err_msg=name)


def test_a_run_without_mean_and_std_takes_those_of_its_data(run, tmp_path):
    flags = ["--backbone", "mlp", "--dataset", "blobs"]
    model = save_checkpoint(tmp_path / "old.pt", flags, None, None)
    assert run("evaluate", "old.pt", "--export", "old.pt2").code == 0
    points = common.draw_toy("blobs", 1500, seed=0)[0]
    normalised = (points - points.mean(0)) / points.std(0)
    loaded = torch.export.load("old.pt2").module()
    torch.testing.assert_close(loaded(points), model.backbone(normalised), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_exported_is_refused_in_one_line(run, tmp_path):
    flags = ["--backbone", "mlp", "--dataset", "blobs"]
    save_checkpoint(tmp_path / "net.pt", flags, [0.0, 0.0], [1.0, 1.0])
    assert "must end with .pt2" in run("evaluate", "net.pt", "--export", "net.onnx").error
    Path("there.pt2").write_text("mine")
    error = run("evaluate", "net.pt", "--export", "there.pt2").error
    assert "'there.pt2' exists already" in error
    assert Path("there.pt2").read_text() == "mine"
    assert "give one" in run("evaluate", "net.pt", "net.pt", "--export", "two.pt2").error
    np.save("z.npy", np.ones((5, 2)))
    assert "and no file" in run("evaluate", "z.npy", "--export", "z.pt2").error
    assert (
        "cannot write 'no/where.pt2'" in run("evaluate", "net.pt", "--export", "no/where.pt2").error
    )
    assert sorted(path.name for path in tmp_path.glob("*.pt2*")) == ["there.pt2"]


def test_a_trained_run_is_exported_with_its_mean_and_std(run):
    assert run("simsiam", *TINY, "--epochs", "1", "--out", "one").code == 0
    assert run("evaluate", "one", "--export", "one.pt2", "--device", "cpu").code == 0
    run("evaluate", "one", "--save-features", "features", "--device", "cpu")
    (file,) = Path("features").iterdir()
    points = common.draw_toy("blobs", 600, seed=1)[0]
    features = torch.export.load("one.pt2").module()(points)
    np.testing.assert_allclose(
        features.detach().numpy(), np.load(file)["test_features"], rtol=1e-4, atol=1e-5
    )
