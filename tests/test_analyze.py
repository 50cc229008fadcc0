"""analyze.py: the report as a user gets it, its numbers against closed forms, and wrong input."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import CASES
from conftest import TINY, tiny
from matplotlib import pyplot as plt
from PIL import Image

import analyze
import evaluate

QUICK = ["--components", "5", "20", "--device", "cpu"]
IMAGES = (
    "--dataset shapes --image-size 8 --backbone resnet8 --width 8 --device cpu "
    "--batch-size 500 --projector-dim 16"
).split()
MODES = ["representation", "dimensional", "cluster", "intracluster", "assignment"]


def read(folder):
    numbers = json.loads(Path(folder, "report.json").read_text())
    return numbers, np.load(Path(folder, "report.npz")), Path(folder, "report.html").read_text()


@pytest.fixture
def trained(run):
    def call(*methods):
        for method in methods:
            assert run(method, *tiny(method), "--epochs", "2").code == 0
        return [f"runs/{method}-blobs-seed0" for method in methods]

    return call


def test_report(run, trained, long):
    methods = ["barlow_twins", "cplearn", "dino", "swav", "wmse"]
    if not long:
        methods = ["barlow_twins", "cplearn"]
    result = run("analyze", *trained(*methods), "--out", "report", *QUICK)
    assert result.code == 0, result.err
    numbers, arrays, page = read("report")
    assert list(numbers) == [f"{method}-blobs-seed0" for method in methods]
    for label, entry in numbers.items():
        (line,) = [line for line in result.out.splitlines() if line.startswith(f"{label}: ")]
        for mode, verdict in entry["diagnosis"].items():
            named = line.removeprefix(f"{label}: ").split(" collapse")[0].split(", ")
            assert (verdict["verdict"] == "collapsed") == (mode in named)
    for label, entry in numbers.items():
        assert entry["images"] == 600 and entry["epoch"] == 2
        assert list(entry["diagnosis"]) == MODES
        codes = CASES[entry["method"]].codes
        assert entry["clusters"]["by"] == ("codes" if codes else "k-means")
        assert entry["clusters"]["of"] == (codes or 3) >= entry["clusters"]["used"] >= 1
        assert (entry["diagnosis"]["cluster"]["verdict"] == "no codes") == (codes is None)
        # The spectrum in the file is the one the numbers are of.
        sigma = np.sqrt(arrays[f"{label}/spectrum_embedding"])
        share = sigma[sigma > 0] / sigma.sum()
        rank = np.exp(-(share * np.log(share)).sum())
        assert entry["effective_rank"]["embedding"] == pytest.approx(rank, rel=1e-6)
        mixture = entry["entropy"]["mixture"]
        assert list(mixture) == ["5", "20"]
        assert list(arrays[f"{label}/entropy_mixture"]) == list(mixture.values())
        assert label in page
    # One page with its pictures inside, which asks nothing of the network; each is a file too.
    sources = re.findall(r'(?:src|href)="?([^" >]{1,31})', page)
    assert sources and all(source.startswith("data:image/webp;base64,") for source in sources)
    assert not re.search(r"https?://|<script|@import|url\(", page)
    names = {path.stem for path in Path("report").glob("*.png")}
    shared = {"spectra", "entropy", "curves_linear", "curves_log", "tsne"}
    own = {f"{kind}-{label}" for label in numbers for kind in ("matrices", "nearest")}
    assert names == shared | own
    for path in Path("report").glob("*.png"):
        with Image.open(path) as image:
            image.verify()
            assert min(image.size) > 200


def test_images_with_untrained_networks_and_fewer_images(run):
    assert run("cplearn", *IMAGES, "--c", "64", "--epochs", "1").code == 0
    path = "runs/cplearn-shapes-seed0/last.pt"
    result = run("analyze", path, "--untrained", "--images", "100", "--out", "report", *QUICK)
    assert result.code == 0, result.err
    numbers, arrays, _ = read("report")
    names = ["cplearn-shapes-seed0 (untrained)", "cplearn-shapes-seed0"]
    assert list(numbers) == names
    assert [entry["epoch"] for entry in numbers.values()] == [0, 1]
    for label, entry in numbers.items():
        assert entry["images"] == 100 and len(arrays[f"{label}/labels"]) == 100
    lines = Path("runs/cplearn-shapes-seed0/log.jsonl").read_text().splitlines()
    log = [json.loads(line) for line in lines]
    # The log's figures are of other images, so nearly the same.
    before, after = (numbers[name]["center_norm"] for name in names)
    assert before == pytest.approx(log[0]["center_norm"], abs=0.1)
    assert after == pytest.approx(log[1]["center_norm"], abs=0.1)


def test_other_data_than_training(run, trained):
    (path,) = trained("vicreg")
    assert run("analyze", path, "--dataset", "moons", "--out", "report", *QUICK).code == 0
    assert read("report")[0]["vicreg-blobs-seed0"]["dataset"] == "moons"
    assert run("vicreg", *TINY, "--dataset", "moons", "--epochs", "1").code == 0
    assert run("analyze", path, "runs/vicreg-moons-seed0", "--out", "both", *QUICK).code == 0
    assert list(read("both")[0]) == ["vicreg-blobs-seed0 on blobs", "vicreg-moons-seed0 on moons"]


def test_a_collapsed_network_gives_a_report_too(run, trained):
    """All embeddings and features one vector: no division by zero on the way to the verdict, no NaN
    in the JSON."""
    (path,) = trained("simsiam")
    state = torch.load(Path(path, "last.pt"), weights_only=True)
    state["model"] = {name: torch.zeros_like(value) for name, value in state["model"].items()}
    Path("dead").mkdir()
    torch.save(state, "dead/last.pt")  # without a log beside it
    result = run("analyze", "dead", "--out", "report", *QUICK)
    assert result.code == 0, result.err
    (entry,) = read("report")[0].values()
    assert entry["diagnosis"]["representation"]["verdict"] == "collapsed"
    assert (
        "dead: representation collapse: the embeddings' directions vary by 0, below" in result.out
    )
    assert entry["effective_rank"] == {"embedding": 0, "features": 0}
    assert entry["power_law"]["features"] is None
    assert "NaN" not in Path("report/report.json").read_text()
    assert not Path("report/curves_linear.png").exists()
    state["model"] = {name: value.float() * torch.nan for name, value in state["model"].items()}
    torch.save(state, "dead/last.pt")
    assert "not finite" in run("analyze", "dead", "--out", "other", *QUICK).error
    assert not Path("other").exists()


def test_codes_are_quasi_orthogonal(run):
    """Eq. 5: mean 0 and variance 1 / f of the cosines, whatever c. The f rows of Hadamard codes are
    orthogonal, and add up to 0: from W W^T = c I and W 1 = 0 follow mean and variance."""
    assert run("analyze", "--codes", "64", "64", "2048", "--out", "report").code == 0
    numbers, arrays, _ = read("report")
    assert [entry["c"] for entry in numbers] == [64, 2048]
    for entry in numbers:
        pairs = entry["c"] * (entry["c"] - 1) / 2
        assert abs(entry["rademacher"]["mean"]) < 4 / (64 * pairs) ** 0.5
        assert entry["rademacher"]["variance"] == pytest.approx(1 / 64, rel=6 * (2 / pairs) ** 0.5)
    assert "hadamard" not in numbers[0]
    mean, square = -1 / 2047, (2048 / 64 - 1) / 2047
    assert numbers[1]["hadamard"] == pytest.approx({"mean": mean, "variance": square - mean**2})
    codes = evaluate.load_method("cplearn").draw_codes("rademacher", 64, 2048, 0).double().numpy()
    cosines = (codes.T @ codes / 64)[~np.eye(2048, dtype=bool)]
    counts, _ = np.histogram(cosines, np.arange(-65, 67, 2) / 64)
    np.testing.assert_allclose(arrays["rademacher_2048"], counts / counts.sum(), atol=1e-12)


def test_bad_input_is_one_line(run, trained, tmp_path):
    (path,) = trained("byol")
    out = ["--out", "report"]
    assert "no checkpoint at 'nowhere'" in run("analyze", "nowhere", *out).error
    (tmp_path / "empty").mkdir()
    assert "no checkpoint at" in run("analyze", "empty", *out).error
    whole = (tmp_path / path / "last.pt").read_bytes()
    (tmp_path / "half.pt").write_bytes(whole[: len(whole) // 2])
    assert "damaged or not a checkpoint" in run("analyze", path, "half.pt", *out).error
    state = torch.load(tmp_path / path / "last.pt", weights_only=True)
    torch.save(state | {"method": "magic"}, tmp_path / "unknown.pt")
    assert "no methods/magic.py" in run("analyze", "unknown.pt", *out).error
    assert "cannot read --dataset shapes" in run("analyze", path, "--dataset", "shapes", *out).error
    assert "either checkpoints or --codes" in run("analyze", *out).error
    assert "either checkpoints or --codes" in run("analyze", path, "--codes", "8", "8", *out).error
    assert "--codes wants" in run("analyze", "--codes", "8", *out).error
    assert not Path("report").exists()
    (tmp_path / "file").write_text("")
    assert "cannot write to 'file'" in run("analyze", path, "--out", "file").error


def test_few_images_of_one_class(run, tmp_path):
    rng = np.random.default_rng(0)
    for split, n in (("train", 10), ("val", 5)):
        (tmp_path / "images" / split / "only").mkdir(parents=True)
        for i in range(n):
            pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / split / "only" / f"{i}.png")
    flags = (
        "--dataset folder --data-dir images --image-size 8 --backbone resnet8 --width 8 "
        "--c 16 --projector-dim 8 --batch-size 5 --epochs 1"
    )
    assert run("cplearn", *flags.split()).code == 0
    result = run("analyze", "runs/cplearn-folder-seed0", "--out", "report", *QUICK)
    assert result.code == 0, result.err
    (entry,) = read("report")[0].values()
    assert entry["images"] == 5 and entry["entropy"]["mixture"] == {}
    for i in range(2):
        (tmp_path / "images" / "val" / "only" / f"{i}.png").unlink()
    few = run("analyze", "runs/cplearn-folder-seed0", "--out", "other", *QUICK)
    assert "at least 4 test images" in few.error


def test_data_that_is_not_there_leaves_no_half_report(run):
    assert run("simclr", *IMAGES, "--epochs", "1").code == 0
    elsewhere = ["--dataset", "folder", "--data-dir", "gone"]
    result = run("analyze", "runs/simclr-shapes-seed0", *elsewhere, "--out", "report")
    assert "gone' does not exist: --data-dir" in result.error
    assert not Path("report").exists()


AWKWARD = ["cost_$5_to_$10", "_other", "a_b^c", "\u03b1\u03b2", "\u65e5\u672c"]


@pytest.mark.filterwarnings("ignore:Glyph")
def test_names_with_any_letters_are_drawn_letter_by_letter(run, monkeypatch):
    """Each class stands in the legend of t-SNE, and looks as matplotlib draws it when it is told
    that the text holds no mathematics."""
    texts = []
    as_png = analyze.as_png

    def watch(figure):
        for legend in figure.legends:
            texts.extend(text.get_text() for text in legend.get_texts())
        return as_png(figure)

    monkeypatch.setattr(analyze, "as_png", watch)
    rng = np.random.default_rng(0)
    labels = np.array(AWKWARD * 8)
    np.savez("_odd_$x$.npz", embedding=rng.normal(size=(40, 6)), labels=labels)
    np.savez("plain.npz", embedding=rng.normal(size=(40, 6)), labels=labels)
    result = run("analyze", "_odd_$x$.npz", "plain.npz", "--out", "report", *QUICK)
    assert result.code == 0 and Path("report/report.html").exists(), result.err
    drawn = {text.replace("\\$", "$").strip() for text in texts}
    assert drawn >= {*AWKWARD, "_odd_$x$.npz", "plain.npz"}

    def picture(text, **settings):
        figure = plt.figure(figsize=(3, 1))
        figure.text(0.1, 0.5, text, **settings)
        figure.canvas.draw()
        pixels = np.asarray(figure.canvas.buffer_rgba()).copy()
        plt.close(figure)
        return pixels

    for name in AWKWARD:
        ours = picture(analyze.plain(name))
        assert np.array_equal(ours, picture(" " * name.startswith("_") + name, parse_math=False))
