"""Two processes compute the loss, the gradient and the training run of one process with the whole batch."""

import json
import signal
import sys
import time

import pytest
import torch
import torch.distributed as dist
from conftest import METHODS, OWN, ROOT, TINY, launch

import common
import evaluate

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
    "center_vector": lambda m, z1, z2: m.loss_fn(*common.gather(z1, z2)),
}


def rows():
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(12, 8, generator=rng, dtype=torch.float64) for _ in range(2)]


def losses_and_gradients(share):
    results = {}
    for name, call in CALLS.items():
        z1, z2 = (z[share].clone().requires_grad_() for z in rows())
        terms = call(evaluate.load_method(name.split()[0]), z1, z2)
        terms["loss"].backward()
        results[name] = {k: v.item() for k, v in terms.items()} | {"grad": [z1.grad.tolist(), z2.grad.tolist()]}
    return results


def batch_norm(share):
    """Output, input gradient and running statistics of a batch norm over all rows."""
    norm = common.to_device(torch.nn.Sequential(torch.nn.BatchNorm1d(8)), torch.device("cpu")).double()
    x = rows()[0][share].clone().requires_grad_()
    y = norm(x)
    (common.gather(y)[0] ** 3 * rows()[1]).sum().backward()
    common.sum_gradients(norm)
    stats = [p.grad.tolist() for p in norm.parameters()] + [norm[0].running_mean.tolist(), norm[0].running_var.tolist()]
    return {"y": y.tolist(), "grad": x.grad.tolist(), "stats": stats}


def training(method):
    return [*TINY, *OWN[method], "--epochs", "1", "--optimizer", "sgd", "--lr", "0.001"]


if __name__ == "__main__":
    folder = sys.argv[1]
    dist.init_process_group("gloo")
    half = slice(6 * dist.get_rank(), 6 * dist.get_rank() + 6)
    with open(f"{folder}/{dist.get_rank()}.json", "w") as file:
        json.dump({"losses": losses_and_gradients(half), "norm": batch_norm(half)}, file)
    leave, dist.destroy_process_group = dist.destroy_process_group, lambda: None  # a second time they could not join
    for method in METHODS:
        sys.argv = [method, *training(method), "--out", f"{folder}/{method}"]
        evaluate.load_method(method).main()
    leave()


@pytest.fixture(scope="session")
def two_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    process = launch(__file__, folder, processes=2, cwd=ROOT / "tests")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.count("\nknn ") == len(METHODS)  # one of the two prints
    return folder


@pytest.fixture(scope="session")
def two(two_folder):
    return [json.loads((two_folder / f"{rank}.json").read_text()) for rank in range(2)]


def close(a, b):
    torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=1e-6, atol=1e-9)


def test_every_method_has_a_call():
    assert {name.split()[0] for name in CALLS} == set(METHODS)


@pytest.mark.parametrize("name", CALLS)
def test_loss_and_gradient(name, two):
    one = losses_and_gradients(slice(None))[name]
    for part in two:
        for term in one.keys() - {"grad"}:
            close(part["losses"][name][term], one[term])
    for view in range(2):
        close(two[0]["losses"][name]["grad"][view] + two[1]["losses"][name]["grad"][view], one["grad"][view])


def test_batch_norm(two):
    one = batch_norm(slice(None))
    close(two[0]["norm"]["y"] + two[1]["norm"]["y"], one["y"])
    close(two[0]["norm"]["grad"] + two[1]["norm"]["grad"], one["grad"])
    for part in two:
        for a, b in zip(part["norm"]["stats"], one["stats"], strict=True):
            close(a, b)


@pytest.mark.parametrize("method", METHODS)
def test_training_run(method, run, two_folder, tmp_path):
    assert run(method, *training(method), "--out", "one").code == 0
    folders = tmp_path / "one", two_folder / method
    one, two = (torch.load(folder / "last.pt", weights_only=True)["model"] for folder in folders)
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-5, msg=lambda text, name=name: name + text)


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
