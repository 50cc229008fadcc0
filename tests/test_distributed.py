"""k processes compute the loss, the gradient and the training run of one process with the whole batch."""

import copy
import os
import signal
import sys
import time
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from conftest import METHODS, OWN, TINY, launch, same_state
from PIL import Image

import common
import evaluate

PROCESSES = (4, 2)

# One call per method from two views' rows z1, z2 (n, 8), and for prototypes from their scores, as the scripts make it.
CALLS = {
    "barlow_twins": lambda m, z1, z2: m.loss_fn(*common.gather(z1, z2)),
    "cplearn": lambda m, z1, z2: m.loss_fn(
        *common.gather(z1, z2), m.draw_codes("rademacher", 8, 40, 0), tau=0.5, beta=0.3
    ),
    "cplearn in blocks": lambda m, z1, z2: m.loss_in_blocks(
        *common.gather(z1, z2), m.draw_codes("rademacher", 8, 40, 0), tau=0.5, prior="cross-entropy", block=16
    ),
    "simclr": lambda m, z1, z2: m.loss_fn(*common.gather(z1, z2), temperature=0.3),
    "simsiam": lambda m, z1, z2: m.loss_fn(*common.gather(z1, z2, 2 * z1 + 1, z2 - 3)),
    "byol": lambda m, z1, z2: m.loss_fn(*common.gather(z1, z2, 2 * z1 + 1, z2 - 3)),
    "dino": lambda m, z1, z2: m.loss_fn(*common.gather(z1, z2, 2 * z1 + 1, z2 - 3), torch.arange(8.0)),
    "swav": lambda m, z1, z2: m.loss_fn(*common.gather(z1.tanh(), z2.tanh()), *torch.ones(2, 4, 8).to(z1)),
    "vicreg": lambda m, z1, z2: m.loss_fn(*common.gather(z1 / 3, z2 / 3)),
    "wmse": lambda m, z1, z2: m.loss_fn(*common.gather(z1[:, :2], z2[:, :2]), part_size=6),
    "triplet": lambda m, z1, z2: m.loss_fn(*common.gather(z1, z2), margin=0.4),
    "gedi": lambda m, z1, z2: m.loss_fn(*common.gather(z1, z2, z1[:, 0], z2[:, 1]), weights=(1.0, 0.3, 0.1)),
    "mcr2": lambda m, z1, z2: m.loss_fn(*common.gather(z1, z2), epsilon=0.4),
    "self_classifier": lambda m, z1, z2: m.loss_fn(*common.gather(z1.tanh(), z2.tanh()), [3, 5]),
    "center_vector": lambda m, z1, z2: m.loss_fn(*common.gather(z1, z2)),
}

# Ten steps of 32 images, 22 of 128 points. `shapes` itself has 5000 images, which would take ten times as long.
IMAGES = ["--dataset", "folder", "--data-dir", "images", "--image-size", "16", "--backbone", "resnet8", "--width", "4",
          "--projector-dim", "16", "--batch-size", "32", "--device", "cpu"]  # fmt: skip
DATA = {"points": TINY, "strong": [*IMAGES, "--augment", "strong"], "weak": [*IMAGES, "--augment", "weak"]}
# On images a few methods show what all have in common: shares of the augmentation, and of its noise.
SOME = {"strong": ("byol", "cplearn", "self_classifier", "swav", "wmse"), "weak": ("gedi", "simclr")}
RUNS = [(data, method) for data in DATA for method in METHODS if method in SOME.get(data, METHODS)]


def processes(run):
    """Images in two processes only, because four share two cores."""
    return PROCESSES if run[0] == "points" else (2,)


def rows():
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(12, 8, generator=rng, dtype=torch.float64) for _ in range(2)]


def losses_and_gradients(share):
    results = {}
    for name, call in CALLS.items():
        z1, z2 = (z[share].clone().requires_grad_() for z in rows())
        terms = call(evaluate.load_method(name.split()[0]), z1, z2)
        terms["loss"].backward()
        results[name] = {k: v.detach() for k, v in terms.items()} | {"rows": torch.stack([z1.grad, z2.grad], 1)}
    return results


def networks(share):
    """Output, gradients and statistics of a batch norm over all rows, and of a ResNet-18, which has 20, over images.
    A run of the ResNet in float32 would not show much, because there rounding alone changes a step by a tenth of it."""
    torch.manual_seed(0)
    resnet18 = common.build_backbone(SimpleNamespace(backbone="resnet18", dataset="shapes", image_size=8, width=16))
    images, results = torch.randn(12, 3, 8, 8, dtype=torch.float64), {}
    for name, net, x in (
        ("norm", torch.nn.Sequential(torch.nn.BatchNorm1d(8)), rows()[0]),
        ("resnet", resnet18, images),
    ):
        net = common.to_device(net, torch.device("cpu")).double()
        x = x[share].clone().requires_grad_()
        y = net(x)
        (common.gather(y)[0].T ** 3 @ torch.linspace(-1, 1, 12, dtype=torch.float64)).sum().backward()
        common.sum_gradients(net)
        results[name] = {"rows": torch.cat([y.detach(), x.grad.flatten(1)], 1)} | net.state_dict()
        results[name] |= {f"gradient of {k}": p.grad for k, p in net.named_parameters()}
    return results


def train(data, method, out):
    """What a script's network holds before and after a run: parameters, statistics, teacher, center, queue, codes. With
    SGD, because Adam makes whole steps even of a gradient that is nothing but rounding."""
    models, to_device = [], common.to_device

    def keep(model, *args, **settings):
        models[:] = copy.deepcopy(model), to_device(model, *args, **settings)
        return models[1]

    own = [*OWN[method], *(["--generative-weight", "0.1"] if method == "gedi" else [])]
    flags = [*DATA[data], *own, "--optimizer", "sgd", "--lr", "0.001", "--out", out]
    # SwAV's prototypes learn from the second epoch on. Points are fast.
    flags += ["--epochs", "2" if method == "swav" or data == "points" else "1"]
    with mock.patch.object(common, "to_device", keep), mock.patch.object(sys, "argv", [method, *flags]):
        evaluate.load_method(method).main()
    return [dict(model.state_dict()) | dict(model.named_buffers()) for model in models]


if __name__ == "__main__":
    rank = int(os.environ["RANK"])
    leave, dist.destroy_process_group = dist.destroy_process_group, lambda: None  # what a run ends with
    for k in (k for k in PROCESSES if rank < k):
        dist.init_process_group("gloo", f"file://{os.getcwd()}/store-{k}", rank=rank, world_size=k)
        share = slice(rank * 12 // k, (rank + 1) * 12 // k)
        results = {"losses": losses_and_gradients(share), "networks": networks(share)}
        results["runs"] = {run: train(*run, f"{k}/{'-'.join(run)}")[1] for run in RUNS if k in processes(run)}
        torch.save(results, f"{k}-{rank}.pt")
        leave()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A folder with images of the drawn shapes, 320 for training and 50 for tests."""
    folder = tmp_path_factory.mktemp("several")
    for split, n in (("train", 320), ("val", 50)):
        images, labels = common.draw_shapes(n, 16, seed=n)
        for i, (image, label) in enumerate(zip(images.permute(0, 2, 3, 1).numpy(), labels.tolist(), strict=True)):
            path = folder / "images" / split / str(label) / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    return folder


@pytest.fixture(scope="session")
def several(folder):
    """For each k what the k processes have come to. Four are launched, for all tests, and two of them go on as two."""
    process = launch(__file__, processes=max(PROCESSES), cwd=folder)
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    assert out.count("\nknn ") == sum(len(processes(run)) for run in RUNS)  # one of the k prints
    return {k: [torch.load(folder / f"{k}-{r}.pt", weights_only=True) for r in range(k)] for k in PROCESSES}


def close(parts, one):
    """Results of the processes, whose "rows" stand together, are one process's, up to the order of sums in float64."""
    for part in parts:
        assert part.keys() == one.keys()
    for name in one:
        for value in [torch.cat([part[name] for part in parts])] if name == "rows" else [part[name] for part in parts]:
            torch.testing.assert_close(
                value, one[name], rtol=1e-10, atol=1e-10, msg=lambda text, n=name: f"{n}: {text}"
            )


def test_every_method_has_a_call():
    assert {name.split()[0] for name in CALLS} == set(METHODS)


@pytest.mark.parametrize("k", PROCESSES)
@pytest.mark.parametrize("name", CALLS)
def test_loss_and_gradient(name, k, several):
    close([part["losses"][name] for part in several[k]], losses_and_gradients(slice(None))[name])


@pytest.mark.parametrize("k", PROCESSES)
@pytest.mark.parametrize("name", ["norm", "resnet"])
def test_batch_norm(name, k, several):
    close([part["networks"][name] for part in several[k]], networks(slice(None))[name])


# What a method updates beside its parameters.
OTHERS = {"byol": ["teacher.head.3.weight", "teacher.head.1.running_mean"], "dino": ["center", "teacher.head.3.weight"],
          "gedi": ["samples"], "swav": ["queue", "prototypes.weight"]}  # fmt: skip


@pytest.mark.parametrize("data, method", RUNS)
def test_training_run(data, method, several, folder, run, monkeypatch):
    """All processes end with the same bits, and with what one process has trained.

    Sums in another order move a float32 by some 1e-7 of its size, hence the 1e-6 of its size, for 10 to 22 steps.
    They also carry an activation over the kink of a ReLU now and then, where the gradient jumps. With that, what these
    steps change in a tensor differs by up to 1e-2 of the change, and may differ by 5e-2.
    """
    monkeypatch.chdir(folder)
    before, one = train(data, method, f"1/{data}-{method}")
    for name in ("head.0.weight", "head.1.running_mean", *OTHERS.get(method, [])):
        assert not torch.equal(one[name], before[name])
    for k in processes((data, method)):
        ends = [part["runs"][data, method] for part in several[k]]
        assert all(same_state(end, ends[0]) for end in ends)
        assert ends[0].keys() == one.keys()
        for name in one:
            error, change = ((x[name] - one[name]).double().norm() for x in (ends[0], before))
            assert error <= 5e-2 * change + 1e-6 * one[name].double().norm(), (k, name, error, change)


def test_stopped_processes_resume(run, tmp_path):
    """SIGTERM to torchrun reaches both processes, which stop at the same step, save once and go on as one run."""
    flags = [*TINY, "--epochs", "30", "--eval-every", "30"]
    process = launch("barlow_twins", *flags, "--out", "r", processes=2, cwd=tmp_path)
    deadline = time.time() + 120
    while not (tmp_path / "r" / "last.pt").exists():
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    step = torch.load(tmp_path / "r" / "last.pt", weights_only=True)["step"]
    assert process.returncode != 0 and out.count("--resume goes on") == 1 and 0 < step < 330, err
    process = launch("barlow_twins", *flags, "--out", "r", "--resume", processes=2, cwd=tmp_path)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and "\nknn " in out, err
    assert torch.load(tmp_path / "r" / "last.pt", weights_only=True)["step"] == 330
