"""A walk over all flags of all scripts: each choice and each boundary value changes the run, or is refused."""

from pathlib import Path

import pytest
import torch
from conftest import METHODS, OWN, TINY, same_state

import common
import evaluate

# For each method's own flags: values that change the run, and values that are refused, with words of the refusal.
CHANGES = {
    "barlow_twins": ["--lambda-offdiag 0", "--lambda-offdiag 1"],
    "byol": ["--momentum 0", "--momentum 1", "--no-predictor", "--last-layer batchnorm"],
    "center_vector": ["--center-weight 0", "--center-weight 3", "--penalty norm"],
    "cplearn": ["--c 2", "--c 32", "--beta 0", "--beta 2", "--activation tanh", "--activation tanh-unscaled",
                "--prior cross-entropy", "--codes hadamard --c 16", "--no-batchnorm", "--eps 1e-300", "--eps 1e-20"],
    "dino": ["--prototypes 2", "--momentum 0", "--momentum 1", "--teacher-temperature 0.001",
             "--teacher-temperature 1", "--no-centering"],
    "gedi": ["--c 2", "--beta 0", "--prior-weight 0", "--generative-weight 0.1"],
    "mcr2": ["--epsilon 0.001", "--epsilon 2", "--expansion-weight 0"],
    "self_classifier": ["--classes 2", "--classifiers 1", "--classifiers 3", "--no-column-softmax"],
    "triplet": ["--margin 0", "--margin 4", "--negatives hardest", "--negatives none"],
    "simclr": ["--temperature 0.001", "--temperature 2"],
    "simsiam": ["--no-predictor", "--no-stop-gradient"],
    "swav": ["--prototypes 2", "--epsilon 0.001", "--epsilon 1", "--queue 0", "--queue 1", "--no-sinkhorn",
             "--freeze-prototypes"],
    "vicreg": ["--invariance-weight 0", "--variance-weight 0", "--covariance-weight 0", "--covariance-weight 9",
               "--sum-variance"],
    "wmse": ["--distance cosine", "--whitening batchnorm", "--whitening none", "--embedding-dim 1", "--part-size 16",
             "--part-size 4 --embedding-dim 2"],
}  # fmt: skip
REFUSED = {
    "barlow_twins": ["--lambda-offdiag -1"],
    "byol": ["--momentum -0.1", "--momentum 1.1", "--no-predictor=1", "--last-layer norm"],
    "center_vector": ["--center-weight -1", "--penalty none"],
    "cplearn": [
        "--c 1",
        "--c 100000000",
        "--beta -1",
        "--eps 0",
        "--eps 0.1",
        "--activation relu",
        "--prior kl",
        "--codes gaussian",
        "--no-batchnorm=1",
    ],
    "dino": ["--prototypes 1", "--momentum -1", "--teacher-temperature 0", "--no-centering=1"],
    "gedi": ["--c 1", "--beta -1", "--prior-weight -1", "--generative-weight -1"],
    "mcr2": ["--epsilon 0", "--expansion-weight -1"],
    "self_classifier": ["--classes 1", "--classifiers 0", "--classifiers 9", "--no-column-softmax=1"],
    "triplet": ["--margin -1", "--negatives few"],
    "simclr": ["--temperature 0"],
    "simsiam": ["--no-predictor=1", "--no-stop-gradient=1"],
    "swav": ["--prototypes 1", "--epsilon 0", "--queue -1", "--no-sinkhorn=1", "--freeze-prototypes=1"],
    "vicreg": ["--invariance-weight -1", "--variance-weight nan", "--covariance-weight inf", "--sum-variance=1"],
    "wmse": ["--distance l1", "--whitening zca", "--embedding-dim 0", "--part-size 1", "--embedding-dim 64"],
}

# Shared flags, with simclr on small images.
IMAGES = ["--dataset", "shapes", "--image-size", "8", "--backbone", "resnet8", "--width", "4", "--device", "cpu",
          "--projector-dim", "16", "--batch-size", "200", "--epochs", "1", "--warmup-epochs", "0.6"]  # fmt: skip
SHARED = [
    "--dataset moons --backbone mlp --image-size 32", "--image-size 12", "--backbone resnet18 --width 16",
    "--backbone resnet50 --width 16",
    "--backbone vit_small --width 64", "--width 1", "--projector-dim 4", "--augment weak", "--epochs 2",
    "--batch-size 500", "--optimizer sgd --lr 0.1", "--optimizer lars --lr 0.1", "--lr 0", "--weight-decay 0",
    "--weight-decay 1", "--warmup-epochs 0", "--warmup-epochs 1", "--seed 1", "--precision bf16",
]  # fmt: skip
SHARED_REFUSED = [
    "--dataset mnist", "--dataset blobs", "--data-dir nowhere --dataset folder",
    "--data-dir nowhere --dataset imagenet100", "--width 0", "--image-size 7", "--backbone vgg", "--backbone mlp",
    "--width 65 --backbone vit_small", "--backbone resnet18", "--projector-dim 3", "--augment none", "--epochs 0",
    "--batch-size 1", "--batch-size 1001", "--optimizer adamw", "--optimizer sgd", "--lr -1", "--weight-decay -1",
    "--warmup-epochs -1", "--warmup-epochs 2", "--seed -1", "--device tpu", "--precision fp8", "--eval-every 0",
    "--save-every 0", "--compile=1", "--resume=1", "--out", "--data-dir", "--augment weak --dataset blobs",
    "--image-size 16 --dataset moons", "--epoch 2",
]  # fmt: skip
# What these change stands in tests of their own: run folders, what is written when, and devices.
ELSEWHERE = {"--out", "--resume", "--eval-every", "--save-every", "--device", "--data-dir", "--compile"}


def result(run, method, flags, out):
    """What a run leaves: every tensor of the trained network."""
    done = run(method, *flags, "--out", out)
    assert done.code == 0, (flags, done.err)
    return torch.load(f"{out}/last.pt", weights_only=True)["model"]


def flags_of(method):
    """The names of a script's own flags, and of those of all methods."""
    names = []
    for add_flags in (evaluate.load_method(method).add_flags, common.add_shared_flags):
        parser = common.Parser(add_help=False)
        add_flags(parser)
        names.append({action.option_strings[0] for action in parser._actions})
    return names


@pytest.mark.parametrize("method", METHODS)
def test_the_walk_leaves_out_no_flag_and_no_choice(method):
    own, shared = flags_of(method)
    walked = {word for line in CHANGES[method] for word in line.split() if word.startswith("--")}
    assert walked == own
    assert own <= {line.replace("=", " ").split()[0] for line in REFUSED[method]}
    assert shared - ELSEWHERE == {word for line in SHARED for word in line.split() if word.startswith("--")}
    assert shared <= {word for line in SHARED_REFUSED for word in line.replace("=", " ").split()}
    parser = common.Parser(add_help=False)
    common.add_shared_flags(parser)
    evaluate.load_method(method).add_flags(parser)
    lines = " ".join([*CHANGES[method], *SHARED, *IMAGES])
    for action in (action for action in parser._actions if action.choices):
        others = set(action.choices) - {action.default, "adam", "cifar10", "cifar100", "svhn", "folder", "imagenet100"}
        for choice in others - {"fp32", "cuda", "mps", "blobs", "strong"}:
            assert choice in lines.split(), (action.option_strings, choice)


@pytest.mark.parametrize("method", METHODS)
def test_own_flags_change_the_run_or_are_refused(method, run):
    # Two epochs, because SwAV's prototypes are frozen in the first anyway.
    flags = [*TINY, *OWN[method], "--epochs", "2", "--eval-every", "9"]
    base = result(run, method, flags, "base")
    assert same_state(base, result(run, method, flags, "again"))  # the same seed, the same run
    for i, line in enumerate(CHANGES[method]):
        assert not same_state(base, result(run, method, [*flags, *line.split()], f"changed{i}")), line
    for line in REFUSED[method]:
        assert line.replace("=", " ").split()[0] in run(method, *flags, *line.split(), "--out", "refused").error, line
    assert not Path("refused").exists()


def test_paper_sets_the_papers_settings_where_none_is_given(run):
    # As in the authors' code, scripts/pretrain/cifar/cplearn.yaml, whose rate is scaled by 64 / 256.
    published = {"lr": 2.5e-4, "weight_decay": 1e-4, "beta": 1.0, "eps": 1e-8, "activation": "tanh-unscaled"}
    flags = ["--dataset", "blobs", "--epochs", "1", "--device", "cpu", "--paper"]
    for given, expected in (("", published | {"batch_size": 64}), ("--beta 0.5", published | {"beta": 0.5})):
        assert run("cplearn", *flags, *given.split(), "--out", f"paper{given}").code == 0
        args = torch.load(f"paper{given}/last.pt", weights_only=True)["args"]
        assert {key: args[key] for key in expected} == expected
    assert "--paper" in run("simclr", *flags).error


def test_shared_flags_change_the_run_or_are_refused(run, monkeypatch):
    draw = common.draw_shapes
    monkeypatch.setattr(common, "draw_shapes", lambda n, size, seed: draw(n // 5, size, seed))  # faster
    base = result(run, "simclr", IMAGES, "base")
    assert same_state(base, result(run, "simclr", IMAGES, "again"))
    for i, line in enumerate(SHARED):
        assert not same_state(base, result(run, "simclr", [*IMAGES, *line.split()], f"changed{i}")), line
    for line in SHARED_REFUSED:
        word = line.replace("=", " ").split()[0].lstrip("-")
        assert word in run("simclr", *IMAGES, *line.split()).error, line
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(type(self).__name__))
    assert same_state(base, result(run, "simclr", [*IMAGES, "--compile"], "compiled")) and compiled == ["Model"]
    if not torch.cuda.is_available():
        assert "--device cuda is not available" in run("simclr", *IMAGES, "--device", "cuda").error
