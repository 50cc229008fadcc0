"""A run can be stopped, killed and resumed, and refuses what it cannot do in one line before
anything is written."""

import argparse
import errno
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import METHODS, ROOT, TINY, launch, same_state, tiny
from PIL import Image

import common
import evaluate

FOUR_EPOCHS = ["--epochs", "4", "--eval-every", "2"]
RUN = [*TINY, *FOUR_EPOCHS]


def epoch_lines(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("images_per_second", None)
    return lines


def assert_same_run(a, b):
    assert epoch_lines(a) == epoch_lines(b)
    first, second = (torch.load(folder / "last.pt", weights_only=True) for folder in (a, b))
    for name in ("epoch", "step", "model", "backbone", "optimizer"):
        assert same_state(first[name], second[name]), name


@pytest.mark.parametrize("method", METHODS)
def test_run_folder_log_and_checkpoint(method, run, tmp_path):
    flags = [*tiny(method), *FOUR_EPOCHS]
    result = run(method, *flags)
    assert result.code == 0, result.err
    folder = tmp_path / "runs" / f"{method}-blobs-seed0"
    files = [".lock", "last.pt", "log.jsonl", "run.json"]
    assert sorted(p.name for p in folder.iterdir()) == files
    header = json.loads((folder / "run.json").read_text())
    assert header["args"]["epochs"] == 4 and header["versions"]["torch"] == torch.__version__
    lines = epoch_lines(folder)
    assert [line["epoch"] for line in lines] == [0, 1, 2, 3, 4]
    assert ["knn" in line for line in lines] == [True, False, True, False, True]
    assert {"loss", "center_norm", "effective_rank", "correlation"} <= lines[1].keys()
    state = torch.load(folder / "last.pt", weights_only=True)
    assert state["method"] == method and state["epoch"] == 4
    for key, value in state["backbone"].items():
        assert torch.equal(value, state["model"][f"backbone.{key}"])
    next_command = f"next: python evaluate.py --untrained runs/{method}"
    for word in ("knn ", "untrained", "center_norm", next_command):
        assert word in result.out
    # A finished run is not overwritten, and resuming it changes nothing.
    assert "--resume" in run(method, *flags).error
    written = (folder / "last.pt").read_bytes()
    assert run(method, *flags, "--resume").code == 0
    assert (folder / "last.pt").read_bytes() == written and epoch_lines(folder) == lines


@pytest.mark.parametrize("method", METHODS)
def test_stopped_and_resumed_is_never_stopped(method, run, tmp_path, monkeypatch):
    """In the first epoch, and then at the end of the second of 11 steps."""
    flags = [*tiny(method, state=True), *FOUR_EPOCHS]
    assert run(method, *flags, "--out", "whole").code == 0
    end_step = common.Run.end_step
    for number, step in ((signal.SIGTERM, 6), (signal.SIGINT, 22)):

        def interrupt(self, terms, number=number, step=step):
            if self.step == step - 1:  # `end_step` counts it
                signal.raise_signal(number)
            end_step(self, terms)

        with monkeypatch.context() as patch:
            patch.setattr(common.Run, "end_step", interrupt)
            stopped = run(method, *flags, "--out", "parts", "--resume")
        assert stopped.code == 128 + number and "--resume" in stopped.out
        assert torch.load(tmp_path / "parts" / "last.pt", weights_only=True)["step"] == step
        torch.manual_seed(123)  # whatever state the next process starts in
    assert run(method, *flags, "--out", "parts", "--resume").code == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("method", METHODS)
def test_network_in_bf16(method, run):
    """What a GPU uses by default: the network's outputs are bf16, and all that follows must take
    them."""
    flags = [*tiny(method, state=True), "--epochs", "1", "--precision", "bf16"]
    assert run(method, *flags).code == 0


def test_a_crash_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    common.atomic_write(path, lambda file: file.write(b"old"))

    def crash(file):
        file.write(b"half")
        raise KeyError

    with pytest.raises(KeyError):
        common.atomic_write(path, crash)
    assert path.read_bytes() == b"old"


def test_a_full_disk_is_one_line_and_leaves_the_old_file(tmp_path, capsys):

    def write_bytes(file):
        file.write(bytes(2000))

    def write_tensor(file):
        torch.save(torch.zeros(2000), file)

    path = tmp_path / "file"
    common.atomic_write(path, lambda file: file.write(b"old"))
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        for write in (write_bytes, write_tensor):
            with pytest.raises(SystemExit) as stop:
                common.atomic_write(path, write)
            (line,) = capsys.readouterr().err.splitlines()
            assert stop.value.code == 2 and f"cannot write '{path}'" in line
            assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def test_two_runs_in_one_folder_are_refused_and_a_killed_one_leaves_no_lock(
    run, tmp_path, monkeypatch
):
    process = launch("barlow_twins", *TINY, "--epochs", "500", "--out", "r", cwd=tmp_path)
    deadline = time.time() + 120
    while not (tmp_path / "r" / "log.jsonl").exists():
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.01)
    for flags in ([], ["--resume"]):
        error = run("barlow_twins", *RUN, "--out", "r", *flags).error
        assert "another process trains in 'r'" in error
    process.kill()
    process.communicate(timeout=60)
    (tmp_path / "r" / "last.pt").unlink(missing_ok=True)
    with monkeypatch.context() as patch:  # a file system without locks is no obstacle

        def no_locks(*args):
            raise OSError(errno.ENOLCK, "No locks available")

        patch.setattr(common.fcntl, "lockf", no_locks)
        assert run("barlow_twins", *RUN, "--out", "unlocked").code == 0
    assert run("barlow_twins", *RUN, "--out", "r", "--resume").code == 0


def test_log_lines_after_the_checkpoint_are_dropped(run, tmp_path):
    """A crash between an epoch's log line and its checkpoint leaves a line of work that will be
    done again."""
    assert run("barlow_twins", *RUN, "--out", "whole").code == 0
    assert run("barlow_twins", *RUN, "--out", "parts", "--save-every", "4").code == 0
    state = torch.load(tmp_path / "whole" / "last.pt", weights_only=True)
    assert state["epoch"] == 4
    with (tmp_path / "parts" / "log.jsonl").open("a") as file:
        file.write(json.dumps({"epoch": 5, "loss": 1.0}) + "\n" + '{"epoch": 6, "lo')
    longer = [*RUN, "--epochs", "5", "--out", "parts", "--resume"]
    assert run("barlow_twins", *longer).code == 0
    assert [line["epoch"] for line in epoch_lines(tmp_path / "parts")] == [0, 1, 2, 3, 4, 5]


def test_a_loss_that_is_not_finite_stops_the_run(run, tmp_path):
    result = run("barlow_twins", *RUN, "--lr", "1e30", "--optimizer", "sgd", "--warmup-epochs", "2")
    assert result.code == 1
    (line,) = result.err.strip().splitlines()
    assert "epoch 1" in line and ("nan" in line or "inf" in line)
    assert not (tmp_path / "runs" / "barlow_twins-blobs-seed0" / "last.pt").exists()


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "lars"])
def test_optimizers_learn_and_resume(optimizer, run, tmp_path):
    flags = [*RUN, "--optimizer", optimizer, "--lr", "0.01"]
    assert run("barlow_twins", *flags, "--out", "whole").code == 0
    lines = epoch_lines(tmp_path / "whole")
    assert lines[-1]["loss"] < lines[1]["loss"]
    state = torch.load(tmp_path / "whole" / "last.pt", weights_only=True)
    weights, others = state["optimizer"]["param_groups"]
    assert len(state["optimizer"]["state"]) == len(weights["params"]) + len(others["params"])


def test_lars_step_is_its_equation():
    """v <- 0.9 v + eta |w| / |g + wd w| (g + wd w), w <- w - lr v; biases plain, and a weight of
    norm 0 too."""
    args = argparse.Namespace(optimizer="lars", lr=0.5, weight_decay=0.1, clip_norm=0.0)
    layers = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(2, 2, bias=False))
    torch.nn.init.zeros_(layers[1].weight)
    w, b, zero = layers.parameters()
    optimizer = common.build_optimizer(layers, args)
    vw, vb, ew, eb = 0, 0, w.detach().clone(), b.detach().clone()
    for step in range(3):
        w.grad, b.grad = torch.randn(3, 2), torch.randn(3)
        zero.grad = torch.ones(2, 2) if step == 0 else None
        g = w.grad + 0.1 * ew
        vw = 0.9 * vw + 0.001 * ew.norm() / g.norm() * g
        vb = 0.9 * vb + b.grad
        ew, eb = ew - 0.5 * vw, eb - 0.5 * vb
        optimizer.step()
        torch.testing.assert_close(w.detach(), ew)
        torch.testing.assert_close(b.detach(), eb)
        if step == 0:
            torch.testing.assert_close(zero.detach(), torch.full((2, 2), -0.5))


def test_adamw_and_clipping_are_their_equations():
    """AdamW decays apart from the gradient: w <- (1 - lr wd) w - lr m / (sqrt(v) + eps), biases
    without decay. The gradient of all parameters together is first scaled down to the norm."""
    args = argparse.Namespace(optimizer="adamw", lr=0.1, weight_decay=0.5, clip_norm=2.0)
    layer = torch.nn.Linear(2, 3)
    optimizer = common.build_optimizer(layer, args)
    m, v = [0.0, 0.0], [0.0, 0.0]
    expected = [p.detach().clone() for p in layer.parameters()]
    for step in (1, 2, 3):
        size = 10.0 ** (2 - step)  # the last ones are below the norm
        gradients = [size * torch.randn(3, 2), size * torch.randn(3)]
        for p, g in zip(layer.parameters(), gradients, strict=True):
            p.grad = g.clone()
        optimizer.step()
        norm = math.sqrt(sum(g.square().sum().item() for g in gradients))
        scale = min(1.0, 2.0 / norm)
        for i, decay in enumerate((0.5, 0.0)):
            g = scale * gradients[i]
            m[i] = 0.9 * m[i] + 0.1 * g
            v[i] = 0.999 * v[i] + 0.001 * g * g
            direction = (m[i] / (1 - 0.9**step)) / ((v[i] / (1 - 0.999**step)).sqrt() + 1e-8)
            expected[i] = (1 - 0.1 * decay) * expected[i] - 0.1 * direction
        for p, value in zip(layer.parameters(), expected, strict=True):
            torch.testing.assert_close(p.detach(), value, rtol=1e-4, atol=1e-5)


def test_a_transformer_has_its_own_recipe_and_no_decay_of_token_and_positions(monkeypatch):
    method = evaluate.load_method("dino")
    given = ["--dataset", "shapes", "--backbone", "vit_small", "--width", "64"]
    for more, expected in (
        ([], ("adamw", 5e-4, 0.04, 3.0)),
        (["--optimizer", "sgd", "--lr", "0.1", "--clip-norm", "0"], ("sgd", 0.1, 0.04, 0.0)),
    ):
        monkeypatch.setattr(sys, "argv", ["dino.py", *given, *more])
        args = common.parse_args("dino.py", None, method.add_flags, method.DEFAULTS)
        found = args.optimizer, args.lr, args.weight_decay, args.clip_norm
        assert found == expected
    model = common.build_backbone(args)
    decayed, others = common.build_optimizer(model, args).param_groups
    assert decayed["weight_decay"] == 0.04 and others["weight_decay"] == 0
    names = {parameter: name for name, parameter in model.named_parameters()}
    kept = {names[parameter] for parameter in others["params"]}
    assert {"class_token", "encoder.pos_embedding", "encoder.ln.weight", "conv_proj.bias"} <= kept
    matrices = {names[parameter] for parameter in decayed["params"]}
    assert (
        "conv_proj.weight" in matrices and "encoder.layers.encoder_layer_0.mlp.0.weight" in matrices
    )
    assert not any(name.endswith((".bias", "token", "embedding")) for name in matrices)


def test_no_console_ends_in_a_traceback(tmp_path):
    """A folder's name and a help text with letters that the console lacks."""
    for name in ("\u03b1\u03b2", "\u65e5\u672c"):
        (tmp_path / "own" / name).mkdir(parents=True)
        for i in range(10):
            Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / "own" / name / f"{i}.png")
    flags = "--dataset folder --data-dir own --image-size 8 --backbone resnet8 --width 4 --epochs 1"
    training = ["methods/vicreg.py", *flags.split(), "--batch-size", "4", "--device", "cpu"]
    for encoding, command in (("ascii", training), ("cp1252", ["evaluate.py", "--help"])):
        done = subprocess.run(
            [sys.executable, str(ROOT / command[0]), *command[1:]],
            cwd=tmp_path,
            env=os.environ | {"PYTHONIOENCODING": encoding},
            capture_output=True,
        )
        assert done.returncode == 0 and done.stdout, done.stderr
        assert b"Traceback" not in done.stderr


def test_learning_rate_warms_up_and_falls_to_zero(run, tmp_path):
    assert run("barlow_twins", *RUN, "--warmup-epochs", "2", "--lr", "0.25", "--out", "r").code == 0
    rates = [line["lr"] for line in epoch_lines(tmp_path / "r")[1:]]
    assert rates[0] == pytest.approx(0.125) and rates[1] == pytest.approx(0.25)
    assert rates[1] > rates[2] > rates[3] >= 0 and rates[3] < 0.02


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--nonsense", "--nonsense"),
        ("--lam 1", "--lam"),
        ("--epochs many", "--epochs"),
        ("--epochs 0", "--epochs: must be at least 1, not 0"),
        ("--batch-size 1", "--batch-size: must be at least 2, not 1"),
        ("--projector-dim 0", "--projector-dim: must be at least 4, not 0"),
        ("--batch-size 1501", "--batch-size 1501 is larger than the training set of 1500"),
        ("--lr nan", "--lr: must be at least 0, not nan"),
        ("--lr inf", "--lr: must be at least 0, not inf"),
        ("--epochs 2.5", "--epochs: invalid int value: '2.5'"),
        ("--dataset", "--dataset: expected one argument"),
        ("--seed -1", "--seed"),
        ("--warmup-epochs 9", "--warmup-epochs 9"),
        ("--dataset imagenet", "--dataset"),
        ("--backbone resnet18", "--backbone"),
        ("--backbone resnet18 --dataset folder --data-dir nowhere", "nowhere' does not exist"),
        ("--device cuda", "--device"),
        ("--optimizer adagrad", "adagrad"),
        ("--optimizer adamw", "adamw needs its own --lr, because 0.001 is meant for adam"),
        ("--optimizer lars", "lars needs its own --lr, because 0.001 is meant for adam"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(flags, words, run, tmp_path):
    if "cuda" in flags and torch.cuda.is_available():
        flags = "--device mps"
    assert words in run("barlow_twins", *RUN, *flags.split()).error
    assert not list(tmp_path.iterdir())


def test_a_signal_that_comes_during_the_vote_is_not_lost(monkeypatch):
    """Several processes agree by an all-reduce on whether to stop. What comes while they do so
    counts the next time."""
    run, votes = common.Run.__new__(common.Run), []
    run.stop_signal, run.data = 0, argparse.Namespace(mean=torch.zeros(1))

    def all_reduce(flag, op):
        votes.append(flag.item())
        run.stop_signal = signal.SIGTERM

    monkeypatch.setattr(common, "world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    monkeypatch.setattr(common.Run, "means", lambda self, steps: {})
    monkeypatch.setattr(common.Run, "save", lambda self: None)
    run.bar = argparse.Namespace(close=lambda: None)
    run.checkpoint = "last.pt"
    run.stop_if_told(ask=True)
    with pytest.raises(SystemExit) as stop:
        run.stop_if_told(ask=True)
    assert votes == [0, signal.SIGTERM] and stop.value.code == 128 + signal.SIGTERM


def test_resume_refuses_another_run_and_broken_checkpoints(run, tmp_path):
    assert run("barlow_twins", *RUN, "--out", "r").code == 0
    checkpoint = tmp_path / "r" / "last.pt"
    whole, log = checkpoint.read_bytes(), (tmp_path / "r" / "log.jsonl").read_bytes()
    resume = [*RUN, "--out", "r", "--resume"]

    def error(*flags):
        return run("barlow_twins", *resume, *flags).error

    assert "--projector-dim" in error("--projector-dim", "8")
    assert "a run of barlow_twins, not cplearn" in run("cplearn", *resume).error
    assert "4 epochs" in error("--epochs", "2")
    for broken in (whole[: len(whole) // 2], b"", b"something else"):
        checkpoint.write_bytes(broken)
        assert "damaged or not a checkpoint" in error()
    checkpoint.write_bytes(whole)
    state = torch.load(checkpoint, weights_only=True)
    torch.save({"weights": torch.ones(3)}, checkpoint)
    assert "not a checkpoint of these methods" in error()
    for change in ({"args": [1]}, {"model": [1]}, {"step": "3"}, {"method": 1}, {"backbone": None}):
        torch.save(state | change, checkpoint)
        assert "not a checkpoint of these methods" in error()
    changes = [
        {"optimizer": [1]},
        {"sums": 1},
        {"model": {}},
        {"optimizer": {"state": {}, "param_groups": []}},
        {"lines": 1},
        {"lines": [1, 2]},
        {"lines": ["{}"]},
    ]
    for change in changes:
        torch.save(state | change, checkpoint)
        assert "does not fit this model" in error()
    assert (tmp_path / "r" / "log.jsonl").read_bytes() == log
    (tmp_path / "file").write_text("")
    assert "run folder" in run("barlow_twins", *RUN, "--out", "file/r").error
