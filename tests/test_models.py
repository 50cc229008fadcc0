"""What a method keeps and updates beside its loss: teachers, centers, queues, prototypes,
samples."""

import math
import sys
from unittest import mock

import pytest
import torch
from cases import CASES
from conftest import METHODS, TINY, tiny

import common

TEACHERS = [name for name in METHODS if CASES[name].teacher]


def parse(methods, name, *flags):
    """The flags of the method's script on this command line."""
    with mock.patch.object(sys, "argv", [name, *flags]):
        return common.parse_args(f"{name}.py", "", methods[name].add_flags, methods[name].DEFAULTS)


def main(methods, name, *flags):
    """Runs the method's script with small sizes."""
    with mock.patch.object(sys, "argv", [f"{name}.py", *tiny(name), "--out", "r", *flags]):
        methods[name].main()


def build_model(methods, name, *flags):
    """The method's Model as the command line with these flags would build it."""
    torch.manual_seed(0)
    return methods[name].Model(parse(methods, name, *tiny(name), *flags))


# --- teachers


@pytest.mark.parametrize("name", METHODS)
def test_the_entry_says_whether_there_is_a_teacher(name, methods):
    """`--compile` compiles a teacher by its name, so it must be called `teacher`."""
    has_one = hasattr(build_model(methods, name), "teacher")
    assert has_one == CASES[name].teacher, "`teacher` in tests/cases.py"


@pytest.mark.parametrize("m", [0.9, 0.0, 1.0])
@pytest.mark.parametrize("name", TEACHERS)
def test_teacher_is_the_moving_average_of_parameters_alone(name, m, methods):
    """The teacher is a copy of backbone and head, `teacher_x` one of the module `x`."""
    model = build_model(methods, name)
    student = [*model.backbone.parameters(), *model.head.parameters()]
    teacher = [*model.teacher.parameters()]
    for part, module in model.named_children():
        if part.startswith("teacher_"):
            student += getattr(model, part.removeprefix("teacher_")).parameters()
            teacher += module.parameters()
    assert all(torch.equal(t, s) for t, s in zip(teacher, student, strict=True))
    assert not any(t.requires_grad for t in teacher)
    model.train()
    assert not model.teacher(torch.randn(8, 2)).requires_grad
    buffers = [buffer.clone() for buffer in model.teacher.buffers()]
    with torch.no_grad():
        for s in student:
            s.add_(torch.randn_like(s))
    expected = [
        m * t.detach() + (1 - m) * s.detach() for t, s in zip(teacher, student, strict=True)
    ]
    model.update_teacher(m)
    for t, e in zip(teacher, expected, strict=True):
        torch.testing.assert_close(t.detach(), e)
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.teacher.buffers(), strict=True))
    assert model.teacher.training  # its batch norms use the batch


@pytest.mark.parametrize("name", ["byol", "dino"])
def test_momentum_rises_along_a_cosine(name, methods, run, monkeypatch):
    """m = 1 - (1 - momentum) (cos(π progress) + 1) / 2 after each of 22 steps."""
    used = []
    monkeypatch.setattr(methods[name].Model, "update_teacher", lambda self, m: used.append(m))
    main(methods, name, "--epochs", "2", "--momentum", "0.9")
    expected = [1 - 0.1 * (math.cos(math.pi * step / 22) + 1) / 2 for step in range(22)]
    assert used == pytest.approx(expected)


@pytest.mark.parametrize("flags", [[], ["--no-centering"]])
def test_dino_center_by_hand(flags, methods, run, monkeypatch):
    """center <- 0.9 center + 0.1 mean over both views, after the step; without centering it stays
    at 0."""
    expected, loss_fn = torch.zeros(32), methods["dino"].loss_fn

    def spy(s1, s2, t1, t2, center, **settings):
        nonlocal expected
        torch.testing.assert_close(center, expected)
        if not flags:
            expected = 0.9 * expected + 0.1 * torch.cat([t1, t2]).mean(0)
        return loss_fn(s1, s2, t1, t2, center, **settings)

    monkeypatch.setattr(methods["dino"], "loss_fn", spy)
    main(methods, "dino", "--epochs", "1", *flags)
    assert expected.any() != bool(flags)


# --- CPLearn


@pytest.mark.parametrize("codes", ["rademacher", "hadamard", "fresh"])
@pytest.mark.parametrize("c, function", [(4096, "loss_fn"), (2**20, "loss_in_blocks")])
def test_cplearn_takes_blocks_of_a_large_dictionary(methods, run, monkeypatch, codes, c, function):
    """The plain formula is used for up to 2^25 scores. 64 images have 2^26 with a million codes."""
    called = set()

    def plain(s1, s2, **settings):
        called.add(("loss_fn", s1.shape[1]))
        return {"loss": (s1 * s2).sum()}

    def in_blocks(z1, z2, codes, scores, c, **settings):
        called.add(("loss_in_blocks", c))
        assert scores(z1, codes, c - 1024, c).shape == (64, 1024)
        return {"loss": (z1 * z2).sum()}

    monkeypatch.setattr(methods["cplearn"], "loss_fn", plain)
    monkeypatch.setattr(methods["cplearn"], "loss_in_blocks", in_blocks)
    monkeypatch.setattr(common, "collapse_metrics", lambda *_: {"center_norm": 0.0})
    sizes = ["--batch-size", "64", "--projector-dim", "4", "--c", str(c), "--codes", codes]
    main(methods, "cplearn", *sizes, "--epochs", "1")
    assert called == {(function, c)}


def test_cplearn_codes_are_fixed_or_fresh_in_every_step(methods, run, monkeypatch):
    """Fresh ones, too, are those of step 0 in the checkpoint, which the metrics use."""
    drawn = []
    draw_codes = methods["cplearn"].draw_codes

    def spy(*arguments):
        drawn.append(draw_codes(*arguments))
        return drawn[-1]

    monkeypatch.setattr(methods["cplearn"], "draw_codes", spy)
    flags = ["--projector-dim", "16", "--c", "64", "--batch-size", "500", "--epochs", "2"]
    for codes, count in (("rademacher", 1), ("hadamard", 1), ("fresh", 7)):
        drawn.clear()
        main(methods, "cplearn", *flags, "--codes", codes, "--out", codes)
        assert len(drawn) == count
        different = {tuple(codes.flatten().tolist()) for codes in drawn}
        assert len(different) == count
        kept = torch.load(f"{codes}/last.pt", weights_only=True)["model"]["codes"]
        assert torch.equal(kept, drawn[0])


@pytest.mark.parametrize("activation", ["l2", "tanh", "tanh-unscaled"])
def test_cplearn_scores_are_those_of_eq_1(activation, methods):
    """H W / tau with Eq. 1's H = sqrt(f/n) l2norm(z) and its tau, n being the batch size in
    training, whatever batch is scored. At a corner of the hypercube tanh(z) / sqrt(n) is as long;
    the authors' tanh is sqrt(n) sharper."""
    n, f, c = 64, 16, 32
    sizes = ["--c", str(c), "--batch-size", str(n), "--no-batchnorm", "--width", "8"]
    sizes += ["--codes", "rademacher", "--sharpness", "1.63"]
    model = build_model(methods, "cplearn", "--activation", activation, *sizes).eval()
    x = torch.randn(3, 2)
    scores = model.scores(model(x)).detach() / model.temperature
    z = model.head[0](model.backbone(x)).double().detach()
    if activation == "l2":
        h = math.sqrt(f / n) * z / z.norm(dim=1, keepdim=True)
    elif activation == "tanh":
        h = z.tanh() / math.sqrt(n)
    else:
        h = z.tanh()
    # The eps whose tau has this sharpness.
    eps = 1 / (math.exp(math.sqrt(f) * 1.63) + c - 1)
    tau = f / (math.sqrt(n) * math.log((1 - eps * (c - 1)) / eps))
    expected = h @ model.codes.double() / tau
    torch.testing.assert_close(scores.double(), expected, rtol=1e-4, atol=1e-5)
    corner = model.head(1e5 * torch.randn(3, 8)).norm(dim=1)
    torch.testing.assert_close(corner, torch.full((3,), math.sqrt(f)), rtol=1e-2, atol=0)


# --- SwAV


@pytest.mark.parametrize(
    "published, starts, epochs, queue", [(200, 0, 4, 300), (16, 15, 16, 300), (30, 2, 4, 5500)]
)
def test_swav_queue_and_prototypes(published, starts, epochs, queue, methods, run, monkeypatch):
    """The queue holds the last embeddings. What is filled joins in epoch 15 of 200, counted from 0,
    or at that share of fewer epochs. Prototypes are always unit vectors."""
    used, seen, networks = [], [], []
    loss_fn, model_class, gather = methods["swav"].loss_fn, methods["swav"].Model, common.gather

    class Model(model_class):
        def __init__(self, args):
            super().__init__(args)
            networks.append(self)

    def watch_loss(s1, s2, queue1=None, queue2=None, **settings):
        (model,) = networks
        torch.testing.assert_close(model.prototypes.weight.norm(dim=1), torch.ones(32))
        if queue1 is None or len(queue1) == 0:
            used.append(0)
        else:
            used.append(len(queue1))
            filled = torch.cat(seen[::-1], 1)[:, : len(queue1)]
            assert torch.equal(model.queue[:, : len(queue1)], filled)
            assert torch.equal(queue1, model.scores(filled[0]))
            assert torch.equal(queue2, model.scores(filled[1]))
        return loss_fn(s1, s2, queue1, queue2, **settings)

    def watch_gather(*rows):
        out = gather(*rows)
        if out[0].shape[1] == 128:  # embeddings, not scores
            seen.append(torch.stack(out).detach())
        return out

    assert methods["swav"].QUEUE_STARTS == 15 and methods["swav"].PUBLISHED_EPOCHS == 200
    monkeypatch.setattr(methods["swav"], "PUBLISHED_EPOCHS", published)
    monkeypatch.setattr(methods["swav"], "loss_fn", watch_loss)
    monkeypatch.setattr(methods["swav"], "Model", Model)
    monkeypatch.setattr(common, "gather", watch_gather)
    main(methods, "swav", "--epochs", str(epochs), "--queue", str(queue))
    steps = range(starts * 11, epochs * 11)
    assert used == starts * 11 * [0] + [min(queue, 128 * step) for step in steps]
    assert used[-1] == queue
    (model,) = networks
    torch.testing.assert_close(model.prototypes.weight.norm(dim=1), torch.ones(32))
    assert not model.queue.requires_grad and model.prototypes.bias is None


@pytest.mark.parametrize("queue, gathered", [("0", {32}), ("256", {32, 128})])
def test_swav_gathers_nothing_for_a_queue_it_does_not_have(
    queue, gathered, methods, run, monkeypatch
):
    """A step gathers the scores for 32 prototypes, and the embeddings, 128 wide, for a queue."""
    widths, gather = [], common.gather

    def watch(*rows):
        widths.append(rows[0].shape[1])
        return gather(*rows)

    monkeypatch.setattr(common, "gather", watch)
    main(methods, "swav", "--epochs", "1", "--queue", queue)
    assert len(widths) == 11 * len(gathered) and set(widths) == gathered


@pytest.mark.parametrize(
    "flags, epochs, moved", [([], 1, False), ([], 2, True), (["--freeze-prototypes"], 2, False)]
)
def test_swav_prototypes_are_frozen_in_the_first_epoch_or_for_good(
    flags, epochs, moved, methods, run
):
    start = build_model(methods, "swav", *flags).prototypes.weight
    main(methods, "swav", *flags, "--epochs", str(epochs))
    trained = common.load_checkpoint("r")["model"]["prototypes.weight"]
    assert torch.allclose(start, trained, atol=1e-6) != moved


# --- GEDI


def test_gedi_samples_have_the_variance_of_langevin_dynamics(methods):
    """Where log p(x) = -5 ||x||² + const, a Gaussian of variance 1/10, steps x - 0.05 x + 0.1 noise
    have, after many, the variance v = 0.95² v + 0.01. Before every 20 steps, one sample in 20 gets
    variance 1 again."""
    model = methods["gedi"].Model(parse(methods, "gedi", *TINY, "--generative-weight", "1"))
    model.log_density = lambda x: -5 * x.square().sum(1)
    before = model.samples.clone()
    _, log_fake = model.sampled_densities(before[:500], 0)
    moved = (model.samples != before).any(1)
    assert moved.sum() == 500 and model.training
    expected = model.log_density(model.samples[moved])
    torch.testing.assert_close(log_fake.sort()[0], expected.sort()[0])
    for step in range(1, 100):
        model.sampled_densities(before[:2000], step)
    v, left = 0.01 / (1 - 0.95**2), 0.95**40  # what 20 steps leave of a difference to v
    excess = left * (1 - v) / 20 / (1 - left * 19 / 20)
    assert model.samples.var().item() == pytest.approx(v + excess, rel=0.02)


def test_gedi_chains_depend_on_their_seed_and_touch_no_other_random_numbers(methods):
    model = build_model(methods, "gedi", "--generative-weight", "1")
    images, samples, state = torch.randn(100, 2), model.samples.clone(), torch.get_rng_state()
    ends = []
    for seed in (1, 1, 2):
        model.samples.copy_(samples)
        torch.manual_seed(len(ends))  # must not matter
        state = torch.get_rng_state()
        model.sampled_densities(images, seed)
        assert torch.equal(torch.get_rng_state(), state)
        ends.append(model.samples.clone())
    assert torch.equal(ends[0], ends[1])
    # Of 10,000 samples both seeds move 100, hardly any of them the same.
    assert ((ends[0] != samples) & (ends[2] == samples)).any(1).sum() > 90


def test_gedi_chains_differ_between_seeds_and_steps(methods, run, monkeypatch):
    """Each step of each run of another `--seed` has a seed of its own, and a run again has the
    same."""
    used = []

    def watch(self, x1, seed):
        used.append(seed)
        return torch.zeros(len(x1)), torch.zeros(len(x1))

    monkeypatch.setattr(methods["gedi"].Model, "sampled_densities", watch)
    for out, seed in (("a", "0"), ("b", "1"), ("c", "0")):
        flags = ["--generative-weight", "0.1", "--epochs", "2", "--seed", seed]
        main(methods, "gedi", *flags, "--out", out)
    first, second, again = used[:22], used[22:44], used[44:]
    assert first == again
    assert len(set(first + second)) == 44
