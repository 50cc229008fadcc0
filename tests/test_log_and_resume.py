"""What a run writes, keeps and says, and what it does with data, flags and schedules that changed
since its checkpoint."""

import argparse
import dataclasses
import json
import resource
from pathlib import Path

import pytest
import torch
from conftest import TINY

import analyze
import common
import evaluate

IMAGES = (
    "--dataset shapes --image-size 8 --backbone resnet8 --width 4 --projector-dim 16 "
    "--batch-size 100 --device cpu"
).split()


def lines_of(folder):
    return [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def change_checkpoint(change):
    state = torch.load("r/last.pt", weights_only=True)
    change(state)
    torch.save(state, "r/last.pt")
    return state


def other_data(monkeypatch, change):
    """From now on data sets are changed by `change(data)`, which returns a new one."""
    load_data = common.load_data
    monkeypatch.setattr(common, "load_data", lambda *args: change(load_data(*args)))


def first_images(n, **fields):
    def change(data):
        test = slice(0, 50)
        return dataclasses.replace(
            data,
            images=data.images[:n],
            labels=data.labels[:n],
            test_images=data.test_images[test],
            test_labels=data.test_labels[test],
            fingerprint=f"first {n}",
            **fields,
        )

    return change


# --- what a run writes and says


def test_first_lines_and_files(run, tmp_path):
    result = run("vicreg", *TINY, "--epochs", 2, "--out", "r")
    assert result.code == 0
    about = json.loads(Path("r/run.json").read_text())
    assert about.keys() == {"argv", "args", "versions", "device", "processes", "data"}
    assert about["args"]["epochs"] == 2 and "defaults" not in about["args"]
    assert about["device"] == "cpu" and about["processes"] == 1
    assert about["versions"]["torch"] == torch.__version__
    first, second = result.out.splitlines()[:2]
    assert [first] == about["data"]
    state = common.load_checkpoint("r")
    backbone = sum(p.numel() for p in state["backbone"].values())
    words = f"mlp: {backbone} parameters in the backbone, 1600 in the head; cpu, fp32"
    assert second == words
    lines = lines_of("r")
    assert [line["epoch"] for line in lines] == [0, 1, 2] and lines == state["lines"]
    assert {path.name for path in Path("r").iterdir()} == {
        ".lock", "last.pt", "log.jsonl", "run.json",
    }  # fmt: skip


def test_the_checkpoint_holds_what_is_needed_elsewhere(run):
    assert run("vicreg", *TINY, "--epochs", 1, "--out", "r").code == 0
    state = common.load_checkpoint("r")
    points = common.draw_toy("blobs", 1500, seed=0)[0]
    torch.testing.assert_close(torch.tensor(state["mean"]), points.mean(0))
    torch.testing.assert_close(torch.tensor(state["std"]), points.std(0))
    assert state["size"] == 32 and state["images"] == 1500 and state["fingerprint"]
    change_checkpoint(lambda state: [state.pop(name) for name in ("mean", "std", "images")])
    state = common.load_checkpoint("r")
    assert state["mean"] is None and state["std"] is None and state["images"] is None


@pytest.mark.parametrize("wrong", [{"mean": "0"}, {"size": "32"}, {"fingerprint": 3}])
def test_wrong_kinds_are_refused(wrong, run):
    assert run("vicreg", *TINY, "--epochs", 1, "--out", "r").code == 0
    change_checkpoint(lambda state: state.update(wrong))
    (name,) = wrong
    assert f"its {name!r} is missing or of a wrong kind" in run("evaluate", "r").error


def test_the_log_is_appended_and_cut_back(run, monkeypatch):
    """`tail -f` follows one file. A resume writes it anew, up to the checkpoint."""
    files = []
    append = common.Run.append_to_log

    def watch(self, line):
        append(self, line)
        files.append((self.log.stat().st_ino, len(self.log.read_text().splitlines())))

    monkeypatch.setattr(common.Run, "append_to_log", watch)
    flags = [*TINY, "--out", "r", "--save-every", 2]
    assert run("vicreg", *flags, "--epochs", 4).code == 0
    assert len({file for file, _ in files}) == 1 and [n for _, n in files] == [2, 3, 4, 5]
    with open("r/log.jsonl", "a") as log:
        log.write('{"epoch": 5, "loss": 1.0}\n{"epoch": 6, "lo')
    about = Path("r/run.json").read_text()
    assert run("vicreg", *flags, "--epochs", 5, "--resume").code == 0
    assert [line["epoch"] for line in lines_of("r")] == [0, 1, 2, 3, 4, 5]
    assert Path("r/run.json").read_text() == about


def test_a_line_that_does_not_fit_on_the_disk(tmp_path, capsys):
    run = common.Run.__new__(common.Run)
    run.log = tmp_path / "log.jsonl"
    run.log.write_text('{"epoch": 0}\n')
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, limit[1]))
    try:
        with pytest.raises(SystemExit) as stop:
            run.append_to_log({"epoch": 1, "loss": 0.123456789})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and f"cannot write {str(run.log)!r}" in line
    assert run.log.read_text() == '{"epoch": 0}\n'


def test_kept_checkpoints(run):
    flags = [*TINY, "--eval-every", 9, "--keep-every", 2, "--save-every", 3, "--out", "r"]
    assert run("vicreg", *flags, "--epochs", 5).code == 0
    assert sorted(path.name for path in Path("r").glob("*.pt")) == [
        "epoch-0002.pt",
        "epoch-0004.pt",
        "last.pt",
    ]
    assert common.load_checkpoint("r/epoch-0002.pt")["epoch"] == 2
    assert run("vicreg", *flags, "--epochs", 6, "--resume").code == 0
    kept, last = (torch.load(f"r/{name}.pt") for name in ("epoch-0006", "last"))
    assert same(kept, last)
    assert run("evaluate", "r/epoch-0002.pt").code == 0


def test_without_labels_there_is_no_knn(run, monkeypatch):
    other_data(monkeypatch, first_images(200))

    def without(data):
        return dataclasses.replace(data, labels=None, test_labels=None, classes=[])

    other_data(monkeypatch, without)
    result = run("vicreg", *IMAGES, "--epochs", 2, "--eval-every", 1, "--out", "r")
    assert result.code == 0 and "knn" not in result.out
    assert "effective_rank" in result.out and "\nverdict: " in result.out
    lines = lines_of("r")
    assert len(lines) == 3 and not any("knn" in line for line in lines)


def test_the_log_is_read_in_both_forms(tmp_path):
    lines = [{"epoch": 0, "knn": 0.5, "verdict": "no collapse"}, {"epoch": 1, "loss": 2.0}]
    for header in ([], [{"argv": ["x"], "args": {}}]):
        log = "".join(json.dumps(line) + "\n" for line in header + lines)
        (tmp_path / "log.jsonl").write_text(log)
        assert analyze.read_log(tmp_path) == [{"epoch": 0, "knn": 0.5}, lines[1]]


# --- other data


@pytest.mark.parametrize(
    "change, words",
    [
        (first_images(200), "r/last.pt was trained on 300 images, and there are 200 now"),
        (first_images(40), "was trained on 300 images, and there are 40 now"),
        (
            lambda data: dataclasses.replace(data, fingerprint="other"),
            "was trained on other images: the files or their order changed",
        ),
    ],
)
def test_a_resume_on_other_data_is_refused(change, words, run, monkeypatch):
    """Also where there are fewer steps than the run has done, or less than a batch."""
    other_data(monkeypatch, first_images(300))
    flags = [*IMAGES, "--out", "r", "--resume"]
    assert run("vicreg", *flags, "--epochs", 1).code == 0
    written = Path("r/last.pt").read_bytes()
    other_data(monkeypatch, change)
    for epochs in (1, 2):
        assert words in run("vicreg", *flags, "--epochs", epochs).error
    assert Path("r/last.pt").read_bytes() == written


def test_the_fingerprint_follows_the_data():
    found = {}
    for name in ("blobs", "blobs again", "moons"):
        args = argparse.Namespace(dataset=name.split()[0], image_size=32)
        found[name] = common.load_data(args, torch.device("cpu")).fingerprint
    assert found["blobs"] == found["blobs again"] != found["moons"]


def test_an_old_checkpoint_without_fingerprint_goes_on(run):
    flags = [*TINY, "--out", "r"]
    assert run("vicreg", *flags, "--epochs", 1).code == 0
    change_checkpoint(lambda state: [state.pop(name) for name in ("fingerprint", "images")])
    assert run("vicreg", *flags, "--epochs", 2, "--resume").code == 0
    state = common.load_checkpoint("r")
    assert state["fingerprint"] and state["epoch"] == 2


# --- other flags


def yesterday(state):
    """As a script wrote it that lacked some flags of today, and had one that is no more."""
    for name in ("keep_every", "stop_on_collapse", "sum_variance"):
        del state["args"][name]
    state["args"]["sharpness"] = 3
    header = {"argv": ["vicreg.py"], "args": {"epochs": 1}, "versions": {}}
    state["lines"] = [header, *state["lines"]]


def test_a_checkpoint_of_yesterday(run):
    flags = [*TINY, "--out", "r"]
    assert run("vicreg", *flags, "--epochs", 1).code == 0
    change_checkpoint(yesterday)
    Path("r/run.json").unlink()
    for result in (run("evaluate", "r"), run("vicreg", *flags, "--epochs", 2, "--resume")):
        assert result.code == 0
        which = "the checkpoint of vicreg at epoch 1"
        lacks, ignored = result.err.splitlines()[:2]
        assert lacks == (
            f"{which} lacks flags of today, which have their defaults: "
            "--keep-every 0, --stop-on-collapse 0, --sum-variance False"
        )
        assert ignored == f"{which} has flags that are no more, which are ignored: --sharpness"
    assert [line["epoch"] for line in lines_of("r")] == [0, 1, 2]
    assert json.loads(Path("r/run.json").read_text())["argv"] == ["vicreg.py"]
    result = run("vicreg", *flags, "--epochs", 3, "--resume")
    assert result.code == 0 and "lacks" not in result.err


def test_a_lacking_flag_has_its_default_and_no_other_value(run):
    flags = [*TINY, "--out", "r", "--epochs", 1]
    assert run("vicreg", *flags).code == 0
    change_checkpoint(yesterday)
    result = run("vicreg", *flags, "--resume", "--sum-variance")
    assert result.code == 2
    assert "r/last.pt has --sum-variance False, not True" in result.err.splitlines()[-1]


def test_a_lacking_flag_has_the_default_of_its_data_set():
    """In cplearn's table shapes have a beta of their own."""
    method = evaluate.load_method("cplearn")
    state = {"method": "cplearn", "epoch": 1, "args": {"method": "cplearn", "dataset": "shapes"}}
    parser = common.make_parser(method.add_flags, method.DEFAULTS, "shapes")
    args = common.complete_args(state, vars(parser.parse_args([])))
    assert args["beta"] == method.DEFAULTS["shapes"]["beta"]
    assert args["image_size"] == common.DATASET_DEFAULTS["shapes"]["image_size"]


def test_a_run_with_the_papers_settings_is_evaluated(run):
    flags = [*TINY, "--epochs", 1, "--c", 64, "--paper", "--out", "r"]
    assert run("cplearn", *flags).code == 0
    assert run("evaluate", "r").code == 0


def test_what_changes_the_shape_is_refused(run):
    flags = [*TINY, "--epochs", 1, "--out", "r"]
    assert run("vicreg", *flags, "--width", 16).code == 0

    def change(state):
        state["args"].pop("width")

    change_checkpoint(change)
    for result in (run("evaluate", "r"), run("vicreg", *flags, "--resume")):
        assert result.code == 2
        line = result.err.splitlines()[-1]
        assert "does not fit" in line and "size mismatch for backbone.0.weight" in line


# --- a longer run


@pytest.mark.parametrize("method", ["vicreg", "byol"])
def test_a_prolonged_run_says_how_its_schedules_jump(method, run):
    flags = [*TINY, "--out", "r"]
    assert run(method, *flags, "--epochs", 2).code == 0
    result = run(method, *flags, "--epochs", 4, "--resume")
    (line,) = [line for line in result.err.splitlines() if line.startswith("the run was meant")]
    before, after = lines_of("r")[2]["lr"], lines_of("r")[3]["lr"]
    assert result.code == 0 and before < after
    assert (
        f"the run was meant for 2 epochs: with --epochs 4 its learning rate goes from {before:.2g}"
        in line
    )
    assert ("teacher's momentum" in line) == (method == "byol")
    assert line.endswith("choose the final --epochs from the start")
    assert "meant" not in run(method, *flags, "--epochs", 4, "--resume").err
