"""Training says when its embeddings collapse, and does not say so of an untrained network."""

import argparse
import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY
from torch import nn

import common
import evaluate

COLLAPSE = "representation collapse: the embeddings' directions vary by 0.01, below 0.2"
CPU = torch.device("cpu")
COLLAPSE_METRICS = common.collapse_metrics


class NoNorm(nn.BatchNorm1d):
    """A batch norm that does nothing. Otherwise it prevents collapse by itself."""

    def forward(self, x):
        return x


def lines_of(folder):
    return [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]


def report(**numbers):
    """A report of `diagnose`, of which all modes but `numbers` are ok."""
    modes = ("representation", "dimensional", "cluster", "intracluster")
    found = {mode: common.finding(numbers.get(mode, 1.0), 0.2) for mode in modes}
    uniform = numbers.get("assignment", 1.0)
    return found | {"assignment": common.finding(uniform, 0.02, low="still uniform")}


# --- the words


def test_sentences():
    assert common.describe(report()) == "no collapse"
    one = common.describe(report(representation=0.09))
    assert one == "representation collapse: the embeddings' directions vary by 0.09, below 0.2"
    two = common.describe(report(dimensional=0.1, cluster=0.05))
    assert (
        two.startswith("dimensional, cluster collapse: ")
        and "is 0.1 of" in two
        and "is 0.05 of" in two
    )
    uniform = common.describe(report(assignment=0.01))
    assert uniform.startswith("no collapse, and the assignments are still uniform: ")
    assert common.names_collapse(one) and common.names_collapse(two)
    assert not common.names_collapse(uniform) and not common.names_collapse("no collapse")


def test_implied_collapses_are_not_named():
    assert common.describe(common.diagnose(torch.ones(100, 8))).startswith("representation coll")


def test_numpy_and_torch_give_the_same_report():
    z = torch.randn(300, 8)
    codes = torch.arange(300) % 16
    entropy = torch.rand(300)
    a = common.diagnose(z, codes, 16, 3072, entropy)
    b = common.diagnose(z.numpy(), codes.numpy(), 16, 3072, entropy.numpy())
    assert a == b
    assert common.cluster_gap(z) == common.cluster_gap(z.numpy())
    known = (common.center_norm(z), common.effective_rank(z))
    assert common.diagnose(z, codes, 16, 3072, entropy, measured=known) == a


@pytest.mark.parametrize("images", [150, 1000])
@pytest.mark.parametrize("codes", [1000, 16_384, 1_000_000])
def test_many_more_codes_than_images_are_no_cluster_collapse(codes, images):
    z = torch.randn(images, 32)
    assigned = torch.randint(codes, (images,))
    assert common.diagnose(z, assigned, codes)["cluster"]["verdict"] == "ok"
    one_code = common.diagnose(z, torch.zeros(images, dtype=torch.long), codes)
    assert one_code["cluster"]["verdict"] == "collapsed"


# --- runs


def test_a_healthy_run(run):
    result = run("vicreg", *TINY, "--epochs", 3, "--out", "r")
    assert result.code == 0
    assert [line["verdict"] for line in lines_of("r")] == ["no collapse"] * 4
    assert result.out.count("collapse") == 1
    assert "\nverdict: no collapse\n" in result.out
    assert result.out.splitlines()[-1].strip() == "python analyze.py r"


def test_a_collapse_is_named_and_stops_the_run(run, monkeypatch):
    monkeypatch.setattr(nn, "BatchNorm1d", NoNorm)
    flags = ["--center-weight", 0, "--epochs", 30, "--save-every", 30, "--out", "r"]
    result = run("center_vector", *TINY, *flags, "--stop-on-collapse", 2)
    assert result.code == 3 and result.err == ""
    lines = lines_of("r")
    assert 2 < len(lines) < 25
    names = ["representation" in line["verdict"].split(":")[0] for line in lines]
    assert names == [False] * (len(lines) - 2) + [True] * 2
    first = lines[-2]
    said = [line for line in result.out.splitlines() if " collapse: " in line]
    assert said == [f"epoch {first['epoch']}: {first['verdict']}"]
    assert first["verdict"].startswith("representation collapse: the embeddings' directions vary")
    assert result.out.splitlines()[-1] == (
        "stopped, because the last 2 epochs had a collapse; saved r/last.pt; "
        "python analyze.py r shows it"
    )
    assert common.load_checkpoint("r")["epoch"] == lines[-1]["epoch"]
    # Without the flag the same run goes on, and its last lines say it.
    result = run("center_vector", *TINY, *flags, "--resume")
    assert result.code == 0 and "\nverdict: representation collapse: " in result.out


def with_verdicts(monkeypatch, verdicts):
    """Makes the first verdict that of epoch 0, the next one of epoch 1, and so on."""
    verdicts = iter(verdicts)

    def metrics(model, data):
        return COLLAPSE_METRICS(model, data) | {"verdict": next(verdicts)}

    monkeypatch.setattr(common, "collapse_metrics", metrics)


def said_of_epochs(result):
    return [
        line for line in result.out.splitlines() if line.startswith("epoch") and "/" not in line
    ]


def test_changes_are_said_once(run, monkeypatch):
    other = COLLAPSE.replace("0.01", "0.02")
    uniform = "no collapse, and the assignments are still uniform: 0.01, below 0.02"
    verdicts = [COLLAPSE, COLLAPSE, other, "no collapse", uniform, uniform, "no collapse"]
    with_verdicts(monkeypatch, verdicts)
    result = run("vicreg", *TINY, "--epochs", 6, "--stop-on-collapse", 3)
    assert result.code == 0
    assert said_of_epochs(result) == [
        f"epoch 1: {COLLAPSE}",
        "epoch 3: no collapse any more",
        f"epoch 4: {uniform}",
        "epoch 6: the assignments are not uniform any more",
    ]


def test_nothing_is_said_of_epoch_0(run, monkeypatch):
    with_verdicts(monkeypatch, [COLLAPSE, "no collapse", "no collapse"])
    result = run("vicreg", *TINY, "--epochs", 2, "--stop-on-collapse", 1)
    assert result.code == 0 and said_of_epochs(result) == []


def test_epochs_in_a_row_are_counted_over_a_resume(run, monkeypatch):
    with_verdicts(monkeypatch, ["no collapse", COLLAPSE, COLLAPSE, "no collapse", COLLAPSE])
    assert run("vicreg", *TINY, "--epochs", 4, "--stop-on-collapse", 3, "--out", "r").code == 0
    with_verdicts(monkeypatch, [COLLAPSE, COLLAPSE])
    flags = ["--epochs", 9, "--stop-on-collapse", 3, "--out", "r", "--resume"]
    result = run("vicreg", *TINY, *flags)
    assert result.code == 3 and common.load_checkpoint("r")["epoch"] == 6


PROGRAM = """
import sys
sys.path.insert(0, {root!r})
import common
import evaluate
verdicts = iter({verdicts!r})
measured = common.collapse_metrics
def metrics(model, data):
    found = measured(model, data)
    if model.training:
        found["verdict"] = next(verdicts)
    return found
common.collapse_metrics = metrics
evaluate.load_method("vicreg").main()
"""


def test_all_processes_stop_and_epoch_0_is_that_of_one(run, tmp_path):
    """The processes disagree on the verdict, as two GPUs may do. The first one decides."""
    assert run("vicreg", *TINY, "--epochs", 1, "--out", "one").code == 0
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(root=str(ROOT), verdicts=[COLLAPSE] * 3))
    later = PROGRAM.format(root=str(ROOT), verdicts=["no collapse"] * 9)
    program.write_text(
        f"import os\nif os.environ['RANK'] == '0':\n    exec({program.read_text()!r})\n"
        f"else:\n    exec({later!r})\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", str(program), *TINY, "--epochs", "9", "--out", "two"]
    command += ["--stop-on-collapse", "2", "--save-every", "9"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode != 0 and "exitcode  : 3" in result.stderr, result.stderr
    assert "stopped, because the last 2 epochs had a collapse" in result.stdout
    assert common.load_checkpoint("two")["epoch"] == 2 and len(lines_of("two")) == 3
    one, two = lines_of("one")[0], lines_of("two")[0]
    assert one.keys() == two.keys()
    for name in one.keys() - {"verdict"}:
        assert two[name] == pytest.approx(one[name], rel=1e-4), name


def points(n=400):
    images = torch.randn(n, 2)
    labels = torch.arange(n) % 3
    return common.Data(images, labels, images, labels, ["a", "b", "c"], *torch.eye(2), 0)


class Plane(nn.Module):
    """Points in a plane of 16 dimensions, a little uneven."""

    def forward(self, x):
        waves = [0.001 * (k * x[:, :1]).sin() for k in range(1, 15)]
        return torch.cat([x[:, :2], *waves], 1)


def test_points_in_a_plane_that_span_a_plane():
    """They have lost nothing, and images that span one have."""
    model = nn.Module()
    model.backbone = nn.Identity()
    model.head = Plane()
    data = points()
    data.mean, data.std = torch.zeros(2), torch.ones(2)
    assert common.collapse_metrics(model, data)["verdict"] == "no collapse"
    data.images = torch.cat([data.images, torch.zeros(400, 62)], 1)
    data.mean, data.std = torch.zeros(64), torch.ones(64)
    assert common.collapse_metrics(model, data)["verdict"].startswith("dimensional collapse: ")


# --- the untrained network


def settings(**changes):
    values = {"batch_size": 100, "seed": 0, "dataset": "blobs", "image_size": 0, "augment": "weak"}
    return argparse.Namespace(**values | changes)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.BatchNorm1d(2)
        self.head = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))

    def forward(self, x):
        return self.head(self.backbone(x))


def test_statistics_of_the_data():
    """The mean of those of all views that the network sees. Model and random streams stay."""
    model, data, args = Network(), points(), settings()
    data.mean, data.std = torch.tensor([3.0, 1.0]), torch.tensor([2.0, 0.5])
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    measured = common.with_data_statistics(model, data, args, ({}, {}))
    assert torch.equal(state, torch.get_rng_state())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert model.training and not any(module.training for module in measured.modules())
    views = [x for pair in common.two_views(data, args, ({}, {}), 0) for x in pair]
    assert len(views) == 8  # 500 images would be five batches, and there are four
    mean = torch.stack([x.mean(0) for x in views]).mean(0)
    var = torch.stack([x.var(0) for x in views]).mean(0)
    torch.testing.assert_close(measured.backbone.running_mean, mean)
    torch.testing.assert_close(measured.backbone.running_var, var)
    assert not common.has_new_statistics(measured.head[1])
    for name, value in measured.named_parameters():
        assert torch.equal(value, before[name])


def test_other_statistics_are_kept():
    model = Network()
    model.backbone.running_mean.fill_(7)
    measured = common.with_data_statistics(model, points(), settings(), ({}, {}))
    assert (measured.backbone.running_mean == 7).all()
    assert (measured.head[1].running_mean != 0).all()


@pytest.mark.parametrize("size", [1, 2, 60])
def test_few_images(size):
    model, data = Network(), points(size)
    measured = common.with_data_statistics(model, data, settings(), ({}, {}))
    assert common.has_new_statistics(measured.backbone) == (size == 1)


def test_the_first_epochs_lack_what_norms_begin_with():
    """A running mean without its start is the mean with weights 0.9^k, k batches ago."""
    model = nn.Sequential(nn.BatchNorm1d(2))
    batches = [5 + 0.1 * torch.randn(50, 2) for _ in range(6)]
    for x in batches:
        model(x)
    weights = torch.tensor([0.9 ** (5 - k) for k in range(6)])
    weights = (weights / weights.sum())[:, None]
    mean = (weights * torch.stack([x.mean(0) for x in batches])).sum(0)
    var = (weights * torch.stack([x.var(0) for x in batches])).sum(0)
    before = copy.deepcopy(model.state_dict())
    with common.without_initial_statistics(model):
        torch.testing.assert_close(model[0].running_mean, mean)
        torch.testing.assert_close(model[0].running_var, var, rtol=1e-3, atol=0)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_new_and_long_trained_norms_stay():
    for count in (0, 500):
        norm = nn.BatchNorm1d(2)
        norm.running_mean.fill_(0.5)
        norm.num_batches_tracked.fill_(count)
        with common.without_initial_statistics(norm):
            assert (norm.running_mean == 0.5).all() and (norm.running_var == 1).all()


def test_training_is_the_same_without_the_measurement(run, monkeypatch):
    """The floor and the verdict change no bit of the network that is trained."""
    flags = [*TINY, "--epochs", 2, "--momentum", 0.9]
    assert run("byol", *flags, "--out", "a").code == 0
    monkeypatch.setattr(common, "with_data_statistics", lambda model, *_: model)
    monkeypatch.setattr(common, "collapse_metrics", lambda *_: {"center_norm": 0.0})
    assert run("byol", *flags, "--out", "b").code == 0
    a, b = common.load_checkpoint("a")["model"], common.load_checkpoint("b")["model"]
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


@pytest.mark.parametrize("method", ["byol", "cplearn"])
def test_tools_measure_the_untrained_network_like_training(method, run):
    assert run(method, *TINY, "--epochs", 1, "--out", "r").code == 0
    parser = common.Parser()
    evaluate.add_checkpoint_flags(parser, "+")
    options = parser.parse_args(["r", "--untrained"])
    jobs = evaluate.read_jobs(options)
    model, data = next(iter(evaluate.networks(jobs, options, CPU)))
    assert not jobs[0].trained
    found = common.collapse_metrics(model, data) | {"knn": common.knn_monitor(model, data)}
    for name, value in lines_of("r")[0].items():
        if name not in ("epoch", "verdict"):
            assert found[name] == pytest.approx(value, rel=1e-5), name


def test_an_untrained_resnet_is_no_point(run):
    """With mean 0 and variance 1 in its batch norms it is one, by its center norm."""
    flags = "--dataset shapes --image-size 8 --backbone resnet18 --width 16 --projector-dim 16"
    options = [*flags.split(), "--batch-size", 250, "--device", "cpu", "--epochs", 1]
    module = evaluate.load_method("vicreg")
    sys.argv = ["vicreg", *map(str, options)]
    args = common.parse_args("vicreg.py", None, module.add_flags, module.DEFAULTS)
    args.precision = "fp32"
    torch.manual_seed(0)
    model, data = module.Model(args), common.load_data(args, CPU)
    assert common.collapse_metrics(model, data)["center_norm"] > 0.9
    measured = common.with_data_statistics(model, data, args, module.VIEWS)
    assert common.collapse_metrics(measured, data)["center_norm"] < 0.8


# --- embeddings that are constant, or nearly


def test_constant_embeddings_need_no_eigenvalues(monkeypatch):
    def refuse(_):
        raise RuntimeError("CUSOLVER_STATUS_INVALID_VALUE")

    monkeypatch.setattr(torch.linalg, "eigvalsh", refuse)
    for z in (torch.zeros(30, 8), torch.full((30, 8), 3.7), torch.zeros(5, 9)):
        spectrum = common.covariance_spectrum(z)
        assert spectrum.dtype == torch.float64 and not spectrum.any()
        assert len(spectrum) == min(len(z) - 1, z.shape[1])
        assert common.effective_rank(z) == 0
        verdict = common.describe(common.diagnose(z))
        assert verdict.startswith("representation collapse: ")


@pytest.mark.parametrize("shape", [(40, 12), (12, 40)])
def test_sparse_embeddings(shape, monkeypatch):
    """Only what is not all zero enters, and the eigenvalues are those of the whole matrix."""
    z = torch.zeros(shape, dtype=torch.float64)
    z[0, :5] = torch.randn(5).double()
    z[1, :5] = -z[0, :5]
    centered = z - z.mean(0)
    expected = torch.linalg.eigvalsh(centered.T @ centered / len(z)).flip(0)
    eigvalsh, sizes = torch.linalg.eigvalsh, []

    def watch(matrix):
        sizes.append(len(matrix))
        return eigvalsh(matrix)

    monkeypatch.setattr(torch.linalg, "eigvalsh", watch)
    spectrum = common.covariance_spectrum(z)
    assert sizes == [2]
    count = min(shape[0] - 1, shape[1])
    torch.testing.assert_close(spectrum, expected[:count].clamp_min(0))
