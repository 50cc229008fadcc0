"""k processes compute the loss, the gradient and the training run of one process with the whole
batch. All the processes are started once, for all tests of this file that are selected."""

import copy
import json
import os
import signal
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from cases import CASES
from conftest import METHODS, TINY, launch, same_state, selected
from PIL import Image

import common
import evaluate

LOSSES = [(name, setting) for name in METHODS for setting in CASES[name].settings]
# Ten steps of 32 images, 22 of 128 points. `shapes` itself has 5000 images, which would take ten
# times as long.
IMAGES = (
    "--dataset folder --data-dir images --image-size 16 --backbone resnet8 --width 4 "
    "--projector-dim 16 --batch-size 32 --device cpu"
).split()
KINDS = {
    "points": TINY,
    "compiled": [*TINY, "--compile"],
    "strong": [*IMAGES, "--augment", "strong"],
    "weak": [*IMAGES, "--augment", "weak"],
}
# On images a few methods show what all have in common: shares of the augmentation, and of its
# noise. BYOL has two networks to compile.
SOME = {
    "strong": ("byol", "cplearn", "self_classifier", "swav", "wmse"),
    "weak": ("gedi", "simclr"),
    "compiled": ("byol",),
}


def training_runs(long):
    """(kind, method) of the runs that are compared."""
    runs = [("points", name) for name in METHODS]
    for kind, some in SOME.items():
        everything = METHODS if long and kind == "compiled" else some
        runs += [(kind, name) for name in METHODS if name in everything]
    return runs


def pytest_generate_tests(metafunc):
    long = metafunc.config.getoption("--long")
    if metafunc.function is test_training_run:
        metafunc.parametrize("kind, name", training_runs(long))


# --- what the processes do


def rows_of_two_views(share):
    """Random views (12, 8), of which a process has a share."""
    rng = torch.Generator().manual_seed(0)
    views = [torch.randn(12, 8, generator=rng, dtype=torch.float64) for _ in range(2)]
    return [view.tanh()[share].clone().requires_grad_() for view in views]


def loss_and_gradient(name, setting, share):
    case, (z1, z2) = CASES[name], rows_of_two_views(share)
    rows = common.gather(*case.rows(z1, z2))
    terms = case.loss(evaluate.load_method(name), setting, *rows)
    terms["loss"].backward()
    result = {term: value.detach() for term, value in terms.items()}
    result["rows"] = torch.stack([z1.grad, z2.grad], 1)
    return result


def network(name, share):
    """Output, gradients and statistics of a batch norm over all rows, or of a ResNet-18, which has
    20, over images. A run of the ResNet in float32 would not show much, because there rounding
    alone changes a step by a tenth of it."""
    torch.manual_seed(0)
    if name == "norm":
        net = torch.nn.Sequential(torch.nn.BatchNorm1d(8))
        x = torch.randn(12, 8, dtype=torch.float64)
    else:
        sizes = {"backbone": "resnet18", "dataset": "shapes", "image_size": 8, "width": 16}
        net = common.build_backbone(SimpleNamespace(**sizes))
        x = torch.randn(12, 3, 8, 8, dtype=torch.float64)
    net = common.to_device(net, torch.device("cpu")).double()
    x = x[share].clone().requires_grad_()
    y = net(x)
    weights = torch.linspace(-1, 1, 12, dtype=torch.float64)
    (common.gather(y)[0].T ** 3 @ weights).sum().backward()
    common.sum_gradients(net)
    result = {"rows": torch.cat([y.detach(), x.grad.flatten(1)], 1)} | net.state_dict()
    return result | {f"gradient of {key}": p.grad for key, p in net.named_parameters()}


def train(kind, name, out, *more, long=False):
    """What a script's network holds before and after a run: parameters, statistics, teacher,
    center, queue, codes. With SGD, because Adam makes whole steps even of a gradient that is
    nothing but rounding. In the short form `--compile` traces the network and leaves out the
    compiler, which takes a minute."""
    before, trained, to_device = [], [], common.to_device
    compile_ = torch.nn.Module.compile

    def keep(model, *args, **settings):
        before.append(copy.deepcopy(model))
        trained.append(to_device(model, *args, **settings))
        return trained[0]

    def compile_without_compiler(module):
        compile_(module, backend="eager")

    # SwAV's prototypes learn from the second epoch on. Points are fast.
    epochs = "2" if name == "swav" or KINDS[kind][1] == "blobs" else "1"
    case = CASES[name]
    flags = [*KINDS[kind], *case.flags.split(), *case.state_flags.split(), "--epochs", epochs]
    flags += ["--optimizer", "sgd", "--lr", "0.001", "--eval-every", "9", "--out", out, *more]
    with (
        mock.patch.object(common, "to_device", keep),
        mock.patch.object(sys, "argv", [name, *flags]),
        mock.patch.object(
            torch.nn.Module, "compile", compile_ if long else compile_without_compiler
        ),
    ):
        evaluate.load_method(name).main()
    return [dict(model.state_dict()) | dict(model.named_buffers()) for model in before + trained]


def stop_and_resume(out):
    """A run of which the last process alone is told to stop in step 5; then it is resumed."""
    end_step = common.Run.end_step

    def interrupt(self, terms):
        if self.step == 4 and common.rank() == common.world_size() - 1:
            signal.raise_signal(signal.SIGTERM)
        end_step(self, terms)

    code = None
    with mock.patch.object(common.Run, "end_step", interrupt):
        try:
            train("points", "barlow_twins", out)
        except SystemExit as stop:
            code = stop.code
    stopped_at = common.load_checkpoint(out)["step"]
    end = train("points", "barlow_twins", out, "--resume")[1]
    return {"code": code, "stopped at": stopped_at, "end": end}


def work(job, rank, k):
    """Of one of k processes: results of all that the job asks for."""
    share = slice(rank * 12 // k, (rank + 1) * 12 // k)
    results = {"networks": {name: network(name, share) for name in job["networks"]}}
    losses = {}
    for name, setting in job["losses"]:
        losses[name, setting] = loss_and_gradient(name, setting, share)
    runs = {}
    for kind, name in job["runs"]:
        if k == 2 or kind == "points":  # because four processes share two cores
            runs[kind, name] = train(kind, name, f"{k}/{kind}-{name}", long=job["long"])[1]
    results |= {"losses": losses, "runs": runs}
    if job["stop"]:
        results["stopped"] = stop_and_resume(f"{k}/stopped")
        results["not stopped"] = train("points", "barlow_twins", f"{k}/not-stopped")[1]
    return results


if __name__ == "__main__":
    with open("job.json") as file:
        job = json.load(file)
    rank = int(os.environ["RANK"])
    leave = dist.destroy_process_group
    dist.destroy_process_group = lambda: None  # what a run ends with
    for k in job["processes"]:
        if rank < k:
            store = f"file://{os.getcwd()}/store-{k}"
            dist.init_process_group("gloo", store, rank=rank, world_size=k)
            torch.save(work(job, rank, k), f"{k}-{rank}.pt")
            leave()


# --- the tests


def draw_images(folder):
    """images/train/* and images/val/*: 320 and 50 images of the drawn shapes."""
    for split, n in (("train", 320), ("val", 50)):
        images, labels = common.draw_shapes(n, 16, seed=n)
        for i in range(n):
            path = folder / "images" / split / str(labels[i].item()) / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[i].permute(1, 2, 0).numpy()).save(path)


@pytest.fixture(scope="session")
def folder(request, long, made_once):
    """What the processes have left in a folder. As many are started as are needed at most, and the
    first two of them go on as two."""
    processes = [4, 2] if long else [2]
    job = {
        "long": long,
        "processes": processes,
        "networks": [p["name"] for p in selected(request, "test_batch_norm")],
        "losses": [[p["name"], p["setting"]] for p in selected(request, "test_loss_and_gradient")],
        "runs": [[p["kind"], p["name"]] for p in selected(request, "test_training_run")],
        "stop": bool(selected(request, "test_stopped_and_resumed_processes_are_never_stopped")),
    }

    def make(folder):
        draw_images(folder)
        (folder / "job.json").write_text(json.dumps(job))
        process = launch(__file__, processes=max(processes), cwd=folder)
        _, err = process.communicate(timeout=1200)
        assert process.returncode == 0, err

    return made_once("processes", make)


@pytest.fixture(scope="session")
def several(folder, long):
    """For each number of processes what each of them has come to."""
    results = {}
    for k in (4, 2) if long else (2,):
        paths = [folder / f"{k}-{rank}.pt" for rank in range(k)]
        results[k] = [torch.load(path, weights_only=True) for path in paths]
    return results


def assert_close(parts, one):
    """Results of the processes, whose "rows" stand together, are one process's, up to the order of
    sums in float64."""
    for key in one:
        values = [part[key] for part in parts]
        if key == "rows":
            values = [torch.cat(values)]
        for value in values:
            torch.testing.assert_close(
                value, one[key], rtol=1e-10, atol=1e-10, msg=lambda text, key=key: f"{key}: {text}"
            )


@pytest.mark.parametrize("name, setting", LOSSES)
def test_loss_and_gradient(name, setting, several):
    one = loss_and_gradient(name, setting, slice(None))
    for parts in several.values():
        assert_close([part["losses"][name, setting] for part in parts], one)


@pytest.mark.parametrize("name", ["norm", "resnet"])
def test_batch_norm(name, several):
    one = network(name, slice(None))
    for parts in several.values():
        assert_close([part["networks"][name] for part in parts], one)


def test_training_run(kind, name, several, folder, run, monkeypatch):
    """All processes end with the same bits, and with what one process has trained.

    Sums in another order move a float32 by some 1e-7 of its size, hence the 1e-6 of its size, for
    10 to 22 steps. They also carry an activation over the kink of a ReLU now and then, where the
    gradient jumps. With that, what these steps change in a tensor differs by up to 1e-2 of the
    change, and may differ by 5e-2.

    The one process never compiles.
    """
    monkeypatch.chdir(folder)
    plain = "points" if kind == "compiled" else kind
    before, one = train(plain, name, f"1/{kind}-{name}")
    networks = ("backbone.", "head.", "teacher.")
    for key in one:
        learns = key.startswith(networks) and key.endswith(("weight", "running_mean"))
        if learns or key in CASES[name].trained:
            assert not torch.equal(one[key], before[key]), key
    for k, parts in several.items():
        if k > 2 and kind != "points":
            continue
        ends = [part["runs"][kind, name] for part in parts]
        assert all(same_state(end, ends[0]) for end in ends)
        assert ends[0].keys() == one.keys()
        for key in one:
            error = (ends[0][key] - one[key]).double().norm()
            change = (before[key] - one[key]).double().norm()
            size = one[key].double().norm()
            assert error <= 5e-2 * change + 1e-6 * size, (k, key, error, change)


def test_stopped_and_resumed_processes_are_never_stopped(several):
    """A signal reaches one process. All stop at the same step, the tenth, in which they ask each
    other; they save once, and go on as one run."""
    for parts in several.values():
        for part in parts:
            assert part["stopped"]["code"] == 128 + signal.SIGTERM
            assert part["stopped"]["stopped at"] == 10
            assert same_state(part["stopped"]["end"], part["not stopped"])
