"""Training on a GPU that is not there, with torch's fake tensors: they have a device and a shape, but no numbers.

Each script's own `main` runs here, with its augmentation, network under bf16 autocast, loss and optimizer on "cuda". A
step must not read anything back, must not copy from the host in a way that waits, and must not mix devices. Without a
GPU torch cannot run backward on such tensors. There a stand-in for it sets the gradients, and the same step on a fake
"cpu" runs the true one.
"""

import sys

import pytest
import torch
from conftest import METHODS, ROOT
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import common
import evaluate

aten = torch.ops.aten
READS = {aten._local_scalar_dense.default, aten.is_nonzero.default, aten.nonzero.default, aten.masked_select.default,
         aten.equal.default, aten._unique2.default, aten.bincount.default, aten.allclose.default}  # fmt: skip
COPIES = {aten._to_copy.default, aten.copy_.default}


class NeverWait(TorchDispatchMode):
    """Raises an error where a GPU would wait for the host or the host for it, or where devices are mixed."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        on_gpu = [x for x in tensors if x.is_cuda]
        host = [x for x in tensors if not x.is_cuda]
        if on_gpu and function in READS:
            raise AssertionError(f"{function} waits for the GPU")
        if function == aten.index.Tensor and on_gpu and any(i is not None and i.dtype == torch.bool for i in args[1]):
            raise AssertionError("an index of booleans waits for the GPU")
        if function == aten._to_copy.default and "device" in kwargs:
            there, here = torch.device(kwargs["device"]).type, args[0].device.type
        elif function == aten.copy_.default:
            there, here = args[0].device.type, args[1].device.type
        else:
            there = here = None
            if on_gpu and any(x.ndim for x in host):
                raise AssertionError(f"{function} mixes the GPU's tensors with the host's")
        waits = not kwargs.get("non_blocking") and not (function == aten.copy_.default and args[2:] and args[2])
        if there != here and (there == "cpu" or waits):
            raise AssertionError(f"{function} from {here} to {there} waits")
        return function(*args, **kwargs)


@pytest.fixture
def rehearse(monkeypatch, tmp_path):
    """rehearse(script, *flags, device=, change=) runs two steps of training without numbers, `change` being called with
    the script's module before."""
    monkeypatch.chdir(tmp_path)
    trained, seen = [], []
    open_run, two_views, end_step, sgd = common.open_run, common.two_views, common.Run.end_step, torch.optim.SGD

    def start(args):
        args.precision = "bf16"
        torch.manual_seed(args.seed)
        return torch.device(args.device, 0) if args.device == "cuda" else torch.device("cpu")

    def load_data(args, device):
        shape = (64, 2) if args.dataset in common.TOYS else (64, 3, args.image_size, args.image_size)
        images = torch.zeros(shape, dtype=torch.float32 if len(shape) == 2 else torch.uint8, device=device)
        labels, std = torch.zeros(64, dtype=torch.int64, device=device), torch.ones(shape[1], device=device)
        return common.Data(images, labels, images, labels, ["0", "1", "2"], std, std, args.image_size)

    def keep(args, model, optimizer, data):
        trained[:] = [model]
        return open_run(args, model, optimizer, data)

    def stand_in(loss):
        """For backward, which without a GPU torch cannot run on tensors of one."""
        assert loss.requires_grad and loss.is_cuda and loss.dtype == torch.float32
        for p in trained[0].parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None

    def watched(*args):
        with NeverWait():
            yield from two_views(*args)

    def count(run, terms):
        seen.append(run.step)
        end_step(run, terms)

    def real(function):
        def call(*args, **kwargs):
            with unset_fake_temporarily():
                return function(*args, **kwargs)

        return call

    # What happens on the host, between epochs, or needs numbers.
    monkeypatch.setattr(common, "start", start)
    monkeypatch.setattr(common, "load_data", load_data)
    monkeypatch.setattr(common, "open_run", keep)
    monkeypatch.setattr(common, "two_views", watched)
    monkeypatch.setattr(common, "draw_augmentation", real(common.draw_augmentation))
    monkeypatch.setattr(common, "knn_monitor", lambda *_: 0.0)
    monkeypatch.setattr(common, "collapse_metrics", lambda *_: {"center_norm": 0.0})
    monkeypatch.setattr(common.Run, "means", lambda *_: {})
    monkeypatch.setattr(common.Run, "end_step", count)
    monkeypatch.setattr(common.Run, "save", lambda _: None)
    # What torch asks a GPU for, or cannot do without one.
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "none")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.optim, "SGD", lambda *args, fused, **kwargs: sgd(*args, **kwargs))

    def call(script, *flags, device="cuda", change=lambda module: None):
        flags = ["--epochs", "1", "--batch-size", "32", "--device", device, *flags]
        monkeypatch.setattr(sys, "argv", [str(ROOT / "methods" / f"{script}.py"), *flags])
        if device == "cuda":
            monkeypatch.setattr(torch.Tensor, "backward", stand_in)
        else:  # fake tensors know one thread
            monkeypatch.setattr(common, "batches", lambda images, indices, _: (images[index] for index in indices))
        module = evaluate.load_method(script)
        change(module)
        module.Model = real(module.Model)  # torch turns its parameters into fake ones on their way to the device
        with FakeTensorMode(allow_non_fake_inputs=True):
            module.main()
        assert seen == [1, 2]

    return call


SMALL = ["--width", "16", "--projector-dim", "32"]
FLAGS = {"cplearn": ["--c", "64"], "wmse": ["--embedding-dim", "8", "--part-size", "16"], "swav": ["--queue", "64"]}
OTHERS = ("resnet8", "resnet50 --image-size 96", "vit_small --width 64", "mlp --dataset moons", "resnet18 --c 1048576",
          "resnet18 --augment weak", "resnet18 --optimizer lars --lr 1")  # fmt: skip


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_never_waits(method, device, rehearse):
    rehearse(method, *SMALL, *FLAGS.get(method, []), device=device)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("flags", OTHERS)
def test_a_step_of_another_kind_never_waits(flags, device, rehearse):
    rehearse("cplearn", *SMALL, "--c", "64", "--backbone", *flags.split(), device=device)


def before_loss(act):
    """A change to a script: `act` is called with the loss's first input before each loss."""

    def change(module):
        loss_fn = module.loss_fn

        def waiting(first, *args, **kwargs):
            act(first)
            return loss_fn(first, *args, **kwargs)

        module.loss_fn = waiting

    return change


def in_common(name, function):
    return lambda module: setattr(module.common, name, function)


WAITING = {
    "a value read": before_loss(lambda z: z.sum().item()),
    "a condition": before_loss(lambda z: bool(z.any())),
    "an index of booleans": before_loss(lambda z: z[z > 0]),
    "a permutation copied": before_loss(lambda z: z[torch.randperm(len(z)).to(z.device)]),
    "an index on the host": before_loss(lambda z: z[torch.randperm(len(z))]),
    "a constant copied": before_loss(lambda z: z + z.new_tensor([1.0] * z.shape[1])),
    "a tensor on the host": before_loss(lambda z: z + torch.ones(z.shape[1])),
    "a result on the host": before_loss(lambda z: z.cpu()),
    "batches by an index copied": in_common(
        "batches", lambda images, indices, device: (images[index.to(device)] for index in indices)
    ),
    "grayscale": in_common("grayscale", lambda x: (x * x.new_tensor([0.3, 0.6, 0.1]).view(3, 1, 1)).sum(1, True)),
    "hue": in_common("shift_hue", lambda x, turns: x + x.new_tensor([5, 3, 1]).view(3, 1, 1)),
}


@pytest.mark.parametrize("what", WAITING)
def test_the_rehearsal_sees(what, rehearse, monkeypatch):
    for name in ("batches", "grayscale", "shift_hue"):
        monkeypatch.setattr(common, name, getattr(common, name))  # what the change replaces comes back
    with pytest.raises((AssertionError, DataDependentOutputException, DynamicOutputShapeException)):
        rehearse("vicreg", *SMALL, change=WAITING[what])
