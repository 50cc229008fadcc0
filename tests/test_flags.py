"""A walk over all flags of all scripts: each choice and each boundary value changes the run, or is
refused."""

import pytest
import torch
from cases import CASES
from conftest import METHODS, same_state, tiny

import common
import evaluate

# Shared flags, with simclr on small images.
IMAGES = (
    "--dataset shapes --image-size 8 --backbone resnet8 --width 4 --device cpu --projector-dim 16 "
    "--batch-size 200 --epochs 1 --warmup-epochs 0.6"
).split()
SHARED = (
    "--dataset moons --backbone mlp --image-size 32",
    "--image-size 12",
    "--backbone resnet18 --width 16",
    "--backbone resnet50 --width 16",
    "--backbone vit_small --width 64",
    "--width 1",
    "--projector-dim 4",
    "--augment weak",
    "--epochs 2",
    "--batch-size 500",
    "--optimizer sgd --lr 0.1",
    "--optimizer lars --lr 0.1",
    "--optimizer adamw --lr 0.1",
    "--clip-norm 0.01",
    "--lr 0",
    "--weight-decay 0",
    "--weight-decay 1",
    "--warmup-epochs 0",
    "--warmup-epochs 1",
    "--seed 1",
    "--precision bf16",
)
SHARED_REFUSED = (
    "--dataset mnist",
    "--dataset blobs",
    "--data-dir nowhere --dataset folder",
    "--data-dir nowhere --dataset imagenet100",
    "--width 0",
    "--image-size 7",
    "--backbone vgg",
    "--backbone mlp",
    "--width 65 --backbone vit_small",
    "--backbone resnet18",
    "--projector-dim 3",
    "--augment none",
    "--epochs 0",
    "--batch-size 1",
    "--batch-size 1001",
    "--optimizer adamw",
    "--optimizer sgd",
    "--lr -1",
    "--clip-norm -1",
    "--weight-decay -1",
    "--warmup-epochs -1",
    "--warmup-epochs 2",
    "--seed -1",
    "--labels none",
    "--cache-dir",
    "--skip-damaged=1",
    "--weights",
    "--weights nowhere.pt",
    "--keep-every -1",
    "--stop-on-collapse -1",
    "--device tpu",
    "--precision fp8",
    "--eval-every 0",
    "--save-every 0",
    "--compile=1",
    "--resume=1",
    "--out",
    "--data-dir",
    "--augment weak --dataset blobs",
    "--image-size 16 --dataset moons",
    "--epoch 2",
)
# What these change stands in tests of their own: run folders, what is written when, and devices.
ELSEWHERE = {
    *("--out", "--resume", "--eval-every", "--save-every"),
    *("--device", "--data-dir", "--compile"),
    *("--labels", "--cache-dir", "--skip-damaged"),
    *("--keep-every", "--stop-on-collapse", "--weights"),
}
# Choices that need a download or a GPU, or are what the runs here have anyway.
OTHER_CHOICES = {
    *("cifar10", "cifar100", "svhn", "folder", "imagenet100", "blobs"),
    *("cuda", "mps", "fp32", "adam", "strong", "folders", "none"),
}


def result(run, method, flags, out):
    """What a run leaves: every tensor of the trained network."""
    done = run(method, *flags, "--out", out)
    assert done.code == 0, (flags, done.err)
    return torch.load(f"{out}/last.pt", weights_only=True)["model"]


def actions(add_flags):
    """The flags that `add_flags` adds, by name, as argparse knows them."""
    parser = common.Parser(add_help=False)
    add_flags(parser)
    return {action.option_strings[0]: action for action in parser._actions}


def words(lines):
    return {word for line in lines for word in line.replace("=", " ").split()}


def flag_words(lines):
    return {word for word in words(lines) if word.startswith("--")}


@pytest.mark.parametrize("name", METHODS)
def test_the_walk_leaves_out_no_flag_and_no_choice(name):
    """Of the method's own flags. They are in `changes` and `refused` in tests/cases.py."""
    method, case = evaluate.load_method(name), CASES[name]
    own = actions(method.add_flags)
    assert flag_words(case.changes) == own.keys()
    for flag, action in own.items():
        default = method.DEFAULTS.get("blobs", {}).get(action.dest, action.default)
        for choice in action.choices or ():
            assert choice == default or choice in words(case.changes), (flag, choice)
        if action.type:
            assert flag in {line.split()[0] for line in case.refused}, flag


def test_the_walk_leaves_out_no_shared_flag_and_no_choice():
    shared = actions(common.add_shared_flags)
    assert flag_words(SHARED) == shared.keys() - ELSEWHERE
    assert flag_words(SHARED_REFUSED) >= shared.keys()
    for flag, action in shared.items():
        for choice in {*(action.choices or ())} - {action.default} - OTHER_CHOICES:
            assert choice in words([*SHARED, *IMAGES]), (flag, choice)


@pytest.mark.parametrize("name", METHODS)
def test_own_flags_change_the_run(name, run):
    # Two epochs, because SwAV's prototypes are frozen in the first anyway.
    flags = [*tiny(name), "--epochs", "2", "--eval-every", "9"]
    base = result(run, name, flags, "base")
    assert same_state(base, result(run, name, flags, "again"))  # the same seed, the same run
    for i, line in enumerate(CASES[name].changes):
        assert not same_state(base, result(run, name, [*flags, *line.split()], f"{i}")), line


@pytest.mark.parametrize("name", METHODS)
def test_own_flags_are_refused(name, run, tmp_path):
    """Out of bounds, in words that help; and words where a number or a choice should be. Nothing is
    written."""
    refused = dict(CASES[name].refused)
    for flag, action in actions(evaluate.load_method(name).add_flags).items():
        if action.nargs == 0:
            refused[f"{flag}=1"] = f"{flag}: ignored explicit argument '1'"
        elif action.choices:
            refused[f"{flag} magic"] = f"{flag}: invalid choice: 'magic'"
        else:
            refused[f"{flag} magic"] = f"{flag}: invalid {action.type.__name__} value: 'magic'"
            refused[f"{flag} nan"] = flag
            refused[f"{flag} inf"] = flag
    for line, words_of_it in refused.items():
        assert words_of_it in run(name, *tiny(name), *line.split()).error, line
    assert not list(tmp_path.iterdir())


def test_paper_sets_the_papers_settings_where_none_is_given(run):
    # As in the authors' scripts/pretrain/cifar/cplearn.yaml, whose rate is scaled by 64 / 256.
    published = {"lr": 2.5e-4, "weight_decay": 1e-4, "beta": 1.0, "sharpness": 0.407}
    published["activation"] = "tanh-unscaled"
    flags = ["--dataset", "blobs", "--epochs", "1", "--device", "cpu", "--paper"]
    cases = {"": published | {"batch_size": 64}, "--beta 0.5": published | {"beta": 0.5}}
    for given, expected in cases.items():
        assert run("cplearn", *flags, *given.split(), "--out", f"paper{given}").code == 0
        args = torch.load(f"paper{given}/last.pt", weights_only=True)["args"]
        assert {key: args[key] for key in expected} == expected
    assert "--paper" in run("simclr", *flags).error


@pytest.fixture
def few_shapes(monkeypatch):
    """A fifth of the images, which is faster."""
    draw = common.draw_shapes
    monkeypatch.setattr(common, "draw_shapes", lambda n, size, seed: draw(n // 5, size, seed))


def test_shared_flags_change_the_run(run, few_shapes, monkeypatch):
    base = result(run, "simclr", IMAGES, "base")
    assert same_state(base, result(run, "simclr", IMAGES, "again"))
    for i, line in enumerate(SHARED):
        assert not same_state(base, result(run, "simclr", [*IMAGES, *line.split()], f"{i}")), line
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda m: compiled.append(type(m).__name__))
    assert same_state(base, result(run, "simclr", [*IMAGES, "--compile"], "compiled"))
    assert compiled == ["Model"]


def test_shared_flags_are_refused(run, few_shapes):
    for line in SHARED_REFUSED:
        word = line.replace("=", " ").split()[0].lstrip("-")
        assert word in run("simclr", *IMAGES, *line.split()).error, line
    if not torch.cuda.is_available():
        assert "--device cuda is not available" in run("simclr", *IMAGES, "--device", "cuda").error
