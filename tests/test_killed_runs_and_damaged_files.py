"""What happens to runs that are killed, and to files that are damaged."""

import json
import math
import multiprocessing
import os
import random
import re
import resource
import runpy
import shutil
import signal
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, launch, same_state
from PIL import Image
from test_data import load
from test_run import assert_same_run

import analyze
import common
import evaluate

IMAGES = (
    "--dataset shapes --image-size 8 --backbone resnet8 --width 4 --projector-dim 16 "
    "--batch-size 500 --device cpu --eval-every 1000"
).split()
RUNS = {
    "byol": "--epochs 8",  # a teacher
    "swav": "--epochs 20 --queue 1000 --augment weak",  # a queue, used from epoch 15 on
    "cplearn": "--epochs 8 --c 64",
}
FILES = [".lock", "last.pt", "log.jsonl", "run.json"]  # of a run folder
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and prlimit")
# Imports take seconds, a kill less than one. So this server imports once, and every run is a fork
# of it.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["torch", "torchvision.transforms.v2", "sklearn.cluster", "matplotlib.pyplot", "pytest"]
)


def script(path, folder, flags):
    """What a process of the server does."""
    # The server's way to start processes would leave tqdm's semaphore behind after a kill.
    multiprocessing.set_start_method("fork", force=True)
    os.chdir(folder)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(name, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), number)
    sys.argv = [path, *flags]
    runpy.run_path(path, run_name="__main__")


def begin(method, folder):
    """Starts or resumes the run folder/parts in a process of its own, which prints to the files
    folder/out and err."""
    flags = [*IMAGES, *RUNS[method].split(), "--out", "parts", "--resume"]
    path = str(ROOT / "methods" / f"{method}.py")
    process = SERVER.Process(target=script, args=(path, folder, flags))
    process.start()
    return process


def wait(process, there):
    """Waits until `there()`, which must come before the process ends."""
    deadline = time.time() + 120
    while not there():
        assert process.exitcode is None and time.time() < deadline
        time.sleep(0.001)


def written(path):
    """When the file was written last, 0 if there is none."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def begin_and_reach(method, folder, epoch):
    """Starts or resumes a run, and waits until this process has written the log and the epoch's
    line is there."""
    log = folder / "parts" / "log.jsonl"
    before = written(log)
    process = begin(method, folder)
    wait(process, lambda: written(log) > before)
    lines = epoch + 1  # after epoch 0
    wait(process, lambda: log.read_bytes().count(b"\n") >= lines)
    return process


def file_names(folder):
    return sorted(path.name for path in folder.iterdir())


def finish(method, folder):
    process = begin(method, folder)
    process.join(300)
    assert process.exitcode == 0, (folder / "err").read_text()
    assert file_names(folder / "parts") == FILES
    return folder / "parts"


@pytest.fixture(scope="session")
def whole(made_once):
    """whole(method) -> the folder of a run that nothing disturbed, and the seconds that an epoch
    takes."""

    def call(method):
        folder = made_once(f"whole-{method}", lambda folder: finish(method, folder)) / "parts"
        lines = (folder / "log.jsonl").read_text().splitlines()[1:]
        fastest = max(json.loads(line)["images_per_second"] for line in lines)
        return folder, 5000 / fastest

    return call


def epochs_to_stop_in(method, times, dice):
    """Random epochs in order, and at last the fourth from the end: the run must not end before it
    is stopped."""
    last = int(RUNS[method].split()[1]) - 4
    return [*sorted(dice.randrange(last) for _ in range(times - 1)), last]


@pytest.mark.parametrize("method", RUNS)
def test_killed_again_and_again_is_never_killed(method, long, whole, tmp_path):
    """Half of the kills come while the checkpoint is written, the others at any moment."""
    (undisturbed, seconds), dice, inside = whole(method), random.Random(method), 0
    epochs = epochs_to_stop_in(method, 17 if long else 3, dice)
    part = tmp_path / "parts" / "last.pt.part"
    for i, epoch in enumerate(epochs):
        before = written(part)  # a kill leaves it there
        process = begin_and_reach(method, tmp_path, epoch)
        if i % 2 == 0:
            wait(process, lambda: written(part) > before)
        else:
            time.sleep(dice.uniform(0, seconds))
        process.kill()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        assert "Traceback" not in (tmp_path / "err").read_text()
        inside += written(part) > before
        if (tmp_path / "parts" / "last.pt").exists():
            common.load_checkpoint(tmp_path / "parts")
    assert inside
    assert_same_run(finish(method, tmp_path), undisturbed)
    print(f"{method}: kills in epochs {epochs}, {inside} inside a write of the checkpoint")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop_at_any_moment(number, long, whole, tmp_path):
    """SIGTERM and Ctrl-C end a run with 128 + their number and the command that goes on, which
    changes nothing."""
    (undisturbed, seconds), dice = whole("byol"), random.Random(number)
    for epoch in epochs_to_stop_in("byol", 10 if long else 2, dice):
        process = begin_and_reach("byol", tmp_path, epoch)
        time.sleep(dice.uniform(0, seconds))
        os.kill(process.pid, number)
        process.join(60)
        last = (tmp_path / "out").read_text().splitlines()[-1]
        assert process.exitcode == 128 + number and (tmp_path / "err").read_text() == ""
        assert last == "stopped, saved parts/last.pt; the same command with --resume goes on"
    assert_same_run(finish("byol", tmp_path), undisturbed)


@LINUX
@pytest.mark.parametrize("name", ["log.jsonl", "last.pt"])
def test_disk_full_while_training(name, whole, tmp_path):
    """A file that no longer fits ends the run in one line, and with more room the run goes on as if
    nothing was."""
    process = begin_and_reach("byol", tmp_path, 1)
    wait(process, (tmp_path / "parts" / "last.pt").exists)
    limit = int(0.9 * (tmp_path / "parts" / name).stat().st_size)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))
    process.join(60)
    (line,) = (tmp_path / "err").read_text().splitlines()
    assert process.exitcode == 2 and f"cannot write 'parts/{name}'" in line
    assert file_names(tmp_path / "parts") == FILES
    assert 1 <= common.load_checkpoint(tmp_path / "parts")["epoch"] < 8
    assert_same_run(finish("byol", tmp_path), whole("byol")[0])


def test_a_run_folder_that_cannot_be_made(run, tmp_path):
    error = run("byol", *TINY, "--out", "/proc/run").error
    assert "cannot write to the run folder '/proc/run'" in error
    assert not list(tmp_path.iterdir())


def workers(launcher):
    """The processes that torchrun has started, by their rank."""
    found = {}
    for file in Path(f"/proc/{launcher.pid}/task").glob("*/children"):
        for pid in file.read_text().split():
            for variable in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                name, _, value = variable.partition(b"=")
                if name == b"RANK":
                    found[int(value)] = int(pid)
    return found


@LINUX
def test_two_processes_end_together_and_go_on(long, tmp_path):
    """When one is killed, torchrun and the other end, too. When torchrun is told to stop, both
    save. In either case two processes go on from the last checkpoint."""
    flags = [*TINY, "--epochs", "30", "--eval-every", "30", "--out", "r"]
    for way in ("kill 1", "kill 0", "stop") if long else ("kill 1",):
        shutil.rmtree(tmp_path / "r", ignore_errors=True)
        launcher = launch("byol", *flags, processes=2, cwd=tmp_path)
        deadline = time.time() + 120
        while not (tmp_path / "r" / "last.pt").exists():
            assert launcher.poll() is None and time.time() < deadline
            time.sleep(0.01)
        pids = workers(launcher)
        assert pids.keys() == {0, 1}
        if way == "stop":
            launcher.send_signal(signal.SIGTERM)
        else:
            os.kill(pids[int(way[-1])], signal.SIGKILL)
        out, _ = launcher.communicate(timeout=60)
        assert launcher.returncode != 0
        assert out.count("--resume goes on") == (way == "stop")
        assert not any(Path(f"/proc/{pid}").exists() for pid in pids.values())
        assert 0 < common.load_checkpoint(tmp_path / "r")["step"] < 330
        launcher = launch("byol", *flags, "--resume", processes=2, cwd=tmp_path)
        out, err = launcher.communicate(timeout=120)
        assert launcher.returncode == 0 and "\nknn " in out, err
        assert common.load_checkpoint(tmp_path / "r")["step"] == 330


def damage(whole, number):
    """The bytes with one damage, always the same for a number: bits flipped, a span zeroed, two
    spans swapped, bytes inserted, or the end cut off. Spans are short more often than long."""
    dice, data, n = random.Random(number), bytearray(whole), len(whole)
    length = min(n // 2, int(2 ** dice.uniform(0, math.log2(n))))
    a, b = sorted(dice.randrange(n - length + 1) for _ in range(2))
    kind = number % 5
    if kind == 0:
        for _ in range(dice.choice((1, 1, 8))):
            data[dice.randrange(n)] ^= 1 << dice.randrange(8)
    elif kind == 1:
        data[a : a + length] = bytes(length)
    elif kind == 2:
        length = min(length, b - a)
        data[a : a + length], data[b : b + length] = data[b : b + length], data[a : a + length]
    elif kind == 3:
        data[a:a] = dice.randbytes(length)
    else:
        del data[n - length :]
    return bytes(data)


def refusal_or(result, capsys):
    """What `result()` gives, or None if it refuses: exit status 2 and one line on stderr."""
    capsys.readouterr()
    try:
        found = result()
    except SystemExit as stop:
        (line,) = capsys.readouterr().err.splitlines()
        assert stop.code == 2 and "error: " in line
        return None
    assert capsys.readouterr().err == ""
    return found


def test_damaged_checkpoints(run, long, tmp_path, capsys):
    """A damaged checkpoint is refused in one line, or what is read from it has not changed."""
    assert run("byol", *TINY, "--epochs", "1", "--eval-every", "9", "--out", "r").code == 0
    path = tmp_path / "r" / "last.pt"
    original, whole, refused = common.load_checkpoint(path), path.read_bytes(), 0
    # In the archive's directory one bit marks an entry as a folder. Of such an entry torch reads
    # nothing, and leaves the tensor's memory as it happens to be.
    archive = zipfile.ZipFile(path)
    entries = re.compile(b"PK\1\2").finditer(whole, archive.start_dir)
    marks = [entry.start() + 38 for entry in entries]
    assert len(marks) == len(archive.infolist())
    marked = [whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :] for at in marks]

    def check():
        state = common.load_checkpoint(path)
        evaluate.check_flags(path, state)
        return state

    damaged = [damage(whole, number) for number in range(2500 if long else 250)] + marked
    for number, data in enumerate(damaged):
        path.write_bytes(data)
        state = refusal_or(check, capsys)
        assert state is None or same_state(state, original), number
        refused += state is None
    print(f"{refused} of {len(damaged)} damaged checkpoints are refused")


@pytest.mark.parametrize("ending, times", [("png", 150), ("jpg", 50)])
def test_damaged_images(ending, times, long, tmp_path, monkeypatch, capsys):
    """A damaged image is refused in one line, or, as a PNG has checksums, its pixels have not
    changed."""
    monkeypatch.chdir(tmp_path)
    # Smooth pictures, because Pillow sees less of the damage to them than to noise, which deflate
    # cannot shorten.
    y, x = np.mgrid[:16, :16]
    pictures = np.stack([16 * x, 16 * y, 8 * (x + y)], 2), 200 * ((x - 8) ** 2 + (y - 6) ** 2 < 30)
    for split in ("train", "val"):
        for name, picture in zip(("color", "gray"), pictures, strict=True):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            Image.fromarray(picture.astype(np.uint8)).save(folder / f"0.{ending}")
    files = [tmp_path / "images" / "train" / name / f"0.{ending}" for name in ("color", "gray")]
    whole, pixels, refused = [file.read_bytes() for file in files], load().images, 0
    for number in range(times * (10 if long else 1)):
        which = number % 2
        files[which].write_bytes(damage(whole[which], number // 2))
        found = refusal_or(lambda: load().images, capsys)
        assert found is None or ending == "jpg" or torch.equal(found, pixels), (which, number // 2)
        refused += found is None
        files[which].write_bytes(whole[which])
        # The cache knows files by size and time, and these are written within one tick of the
        # clock.
        shutil.rmtree(tmp_path / "images" / ".cache-16")
    if ending == "png":  # without the part that holds the pixels
        start, end = (whole[0].index(name) - 4 for name in (b"IDAT", b"IEND"))
        files[0].write_bytes(whole[0][:start] + whole[0][end:])
        assert refusal_or(load, capsys) is None
    print(f"{refused} of {number + 1} damaged {ending} files are refused")


def test_damaged_logs(run, long, tmp_path, capsys):
    """A damaged log is refused in one line, or its lines hold numbers."""
    assert run("byol", *TINY, "--epochs", "4", "--eval-every", "2", "--out", "r").code == 0
    log, refused = tmp_path / "r" / "log.jsonl", 0
    whole = log.read_bytes()
    start = whole.index(b"\n") + 1
    for number in range(1000 if long else 100):
        if number % 2:  # spares the first line
            log.write_bytes(whole[:start] + damage(whole[start:], number))
        else:
            log.write_bytes(damage(whole, number))
        found = refusal_or(lambda: analyze.read_log(tmp_path / "r"), capsys)
        for line in found or []:
            assert "epoch" in line, number
            assert all(isinstance(value, int | float) for value in line.values()), number
        refused += found is None
    print(f"{refused} of {number + 1} damaged logs are refused")
