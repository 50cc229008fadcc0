"""`--weights FILE` starts a backbone from whatever network fits it, and says what it took."""

import argparse
import json
from pathlib import Path

import pytest
import torch
import torchvision
from conftest import TINY
from torch import nn

import common
import evaluate

RESNET = {"backbone": "resnet18", "dataset": "folder", "image_size": 224, "width": None}
SMALL = {"backbone": "resnet8", "dataset": "shapes", "image_size": 16, "width": 4}
CPU = torch.device("cpu")


def model_of(args):
    torch.manual_seed(1)
    model = nn.Module()
    model.backbone = common.build_backbone(args)
    model.teacher = common.frozen_copy(nn.Sequential(model.backbone))
    return model


def loaded(file, **settings):
    """The line that is printed, and the model."""
    args = argparse.Namespace(weights=str(file), **settings)
    model = model_of(args)
    return common.load_weights(model, args), model


def refused(file, capsys, **settings):
    with pytest.raises(SystemExit) as stop:
        loaded(file, **settings)
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    return line


def small_state():
    torch.manual_seed(2)
    return common.build_backbone(argparse.Namespace(**SMALL)).state_dict()


def holds(model, state):
    own, teacher = model.backbone.state_dict(), model.teacher[0].state_dict()
    return all(torch.equal(own[k], state[k]) and torch.equal(teacher[k], state[k]) for k in state)


def lines_of(folder):
    return [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]


# --- what fits


def test_torchvision_with_and_without_classifier(tmp_path):
    network = torchvision.models.resnet18()
    network.bn1.running_mean.fill_(0.3)
    network.bn1.num_batches_tracked.fill_(20)
    state = network.state_dict()
    file = tmp_path / "resnet18.pth"
    torch.save(state, file)
    line, model = loaded(file, **RESNET)
    assert line == (
        f"weights: 100 of 100 tensors of resnet18 from {file}; left out: fc.weight, fc.bias"
    )
    backbone = {key: value for key, value in state.items() if not key.startswith("fc.")}
    assert holds(model, backbone)
    # Old files lack the counts of batches. The statistics are not taken for a new network's.
    old = {key: value for key, value in backbone.items() if "num_batches" not in key}
    torch.save(old, file)
    line, model = loaded(file, **RESNET)
    assert line == f"weights: 100 of 100 tensors of resnet18 from {file}" and holds(model, old)
    model.backbone.bn1.num_batches_tracked += 2  # as training does it
    with common.without_initial_statistics(model):
        assert (model.backbone.bn1.running_mean == 0.3).all()


@pytest.mark.parametrize("prefix", ["", "module.", "encoder_q.", "module.student.backbone."])
@pytest.mark.parametrize("place", ["", "state_dict", "model", "teacher"])
def test_prefixes_and_places(prefix, place, tmp_path):
    state = small_state()
    saved = {prefix + key: value for key, value in state.items()}
    saved["classifier.weight"] = torch.zeros(3)
    if place:
        saved = {"epoch": 7, "optimizer": {"state": {0: torch.zeros(2)}}, place: saved}
    torch.save(saved, tmp_path / "file.pt")
    line, model = loaded(tmp_path / "file.pt", **SMALL)
    assert holds(model, state)
    assert line.startswith("weights: 18 of 18 tensors of resnet8 from ")
    assert line.endswith("; left out: classifier.weight")
    assert (f", under {place!r}" in line) == bool(place)
    assert (f", without the prefix {prefix!r}" in line) == bool(prefix)


def test_of_two_networks_the_first(tmp_path):
    first = small_state()
    second = {key: value + 1 for key, value in first.items()}
    saved = {f"encoder_q.{key}": value for key, value in first.items()}
    saved |= {f"encoder_k.{key}": value for key, value in second.items()}
    torch.save(saved, tmp_path / "file.pt")
    line, model = loaded(tmp_path / "file.pt", **SMALL)
    assert holds(model, first) and "'encoder_q.'" in line and "and 14 more" in line


def test_a_few_tensors_that_the_file_lacks_stay_new(tmp_path):
    state = small_state()
    removed = {"shortcut.weight": state.pop("shortcut.weight")}
    torch.save(state, tmp_path / "file.pt")
    line, model = loaded(tmp_path / "file.pt", **SMALL)
    assert "weights: 17 of 18 tensors" in line and "not there, so new: shortcut.weight" in line
    assert holds(model, state)
    assert not torch.equal(model.backbone.shortcut.weight, removed["shortcut.weight"])


# --- what does not fit


def test_other_shapes(tmp_path, capsys):
    file = tmp_path / "file.pt"
    torch.save(torchvision.models.resnet18().state_dict(), file)
    line = refused(file, capsys, **RESNET | {"image_size": 32})
    assert "conv1.weight is (64, 3, 7, 7) there and (64, 3, 3, 3) here" in line
    assert line.endswith("choose --image-size 224 (the file is of a network for large images)")
    line = refused(file, capsys, **RESNET | {"width": 16})
    assert "(64, 3, 7, 7) there and (16, 3, 7, 7) here; choose --width 64" in line
    line = refused(file, capsys, **RESNET | {"backbone": "resnet50"})
    assert "100 of the 265 tensors of resnet50: it lacks 'layer1.0.conv3.weight'" in line
    torch.save(torchvision.models.resnet50().state_dict(), file)
    line = refused(file, capsys, **RESNET)
    assert "layer1.0.conv1.weight is (64, 64, 1, 1) there and (64, 64, 3, 3)" in line
    assert line.endswith("choose the --backbone and --width that the file is of")
    small = common.build_backbone(argparse.Namespace(**RESNET | {"image_size": 32, "width": 16}))
    torch.save(small.state_dict(), file)
    line = refused(file, capsys, **RESNET | {"width": 16})
    assert line.endswith("(the file is of a network for images of up to 64 pixels)")


@pytest.mark.parametrize(
    "content, words",
    [
        ({"blocks.0.norm1.weight": torch.ones(3)}, "0 of the 18 tensors of resnet8: it lacks"),
        ({"blocks.0.norm1.weight": torch.ones(3)}, "and has blocks.0.norm1.weight; choose"),
        ({"epoch": 3}, "it lacks 'convs.0.weight' and has no tensors"),
        ({"shortcut.bias": torch.zeros(4)}, "1 of the 18 tensors of resnet8"),
        ([torch.zeros(3)], "holds no dict"),
        (b"", "cannot be read (EOFError)"),
        (b"nonsense", "cannot be read (UnpicklingError)"),
        (nn.Linear(2, 2), "it must be a state_dict, written by torch.save"),
        (None, "does not exist"),
    ],
)
def test_files_that_fit_nothing(content, words, tmp_path, capsys):
    file = tmp_path / "file.pt"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(content, file)
    assert words in refused(file, capsys, **SMALL)


# --- runs


def test_a_run_starts_from_another_one(run, tmp_path):
    """Epoch 0 is that network's. The teacher begins with the same backbone."""
    assert run("vicreg", *TINY, "--epochs", 2, "--out", "a").code == 0
    backbone = common.load_checkpoint("a")["backbone"]
    flags = [*TINY, "--epochs", 2, "--out", "b", "--weights", "a/last.pt"]
    result = run("byol", *flags, "--lr", 0, "--weight-decay", 0, "--momentum", 0)
    assert result.code == 0
    said = "weights: 6 of 6 tensors of mlp from a/last.pt, under 'model', without the prefix "
    assert f"{said}'backbone.'; left out: head." in result.out
    state = common.load_checkpoint("b")
    for name, value in backbone.items():
        assert torch.equal(state["model"][f"backbone.{name}"], value)
        assert torch.equal(state["model"][f"teacher.0.{name}"], value)
    # As a folder, and measured by the tools as it began.
    parser = common.Parser()
    evaluate.add_checkpoint_flags(parser, "+")
    options = parser.parse_args(["b", "--untrained"])
    jobs = evaluate.read_jobs(options)
    model, data = next(iter(evaluate.networks(jobs, options, CPU)))
    assert common.collapse_metrics(model, data)["center_norm"] == pytest.approx(
        lines_of("b")[0]["center_norm"], rel=1e-5
    )
    assert torch.equal(model.backbone[0].weight, backbone["0.weight"])
    assert run("byol", *TINY, "--epochs", 1, "--out", "c", "--weights", "a").code == 0


def test_the_checkpoint_wins_at_a_resume(run, monkeypatch):
    assert run("vicreg", *TINY, "--epochs", 1, "--out", "a").code == 0
    flags = [*TINY, "--weights", "a/last.pt", "--out", "r"]
    assert run("vicreg", *flags, "--epochs", 2).code == 0
    Path("a/last.pt").unlink()

    def refuse(*_):
        raise AssertionError("the weights are loaded again")

    monkeypatch.setattr(common, "load_weights", refuse)
    result = run("vicreg", *flags, "--epochs", 3, "--resume")
    assert result.code == 0 and "weights:" not in result.out
    without = [*TINY, "--epochs", 4, "--out", "r", "--resume"]
    assert "has --weights a/last.pt, not None" in run("vicreg", *without).error


def test_a_refused_file_leaves_nothing(run, tmp_path):
    (tmp_path / "file.pt").write_bytes(b"nonsense")
    assert "cannot be read" in run("vicreg", *TINY, "--weights", "file.pt", "--out", "r").error
    assert [path.name for path in tmp_path.iterdir()] == ["file.pt"]
