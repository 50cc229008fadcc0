"""Training on a GPU that is not there: a step must not read anything back, must not copy from the
host in a way that waits, and must not mix devices (tests/fake_gpu.py says how)."""

import pytest
import torch
from cases import CASES
from conftest import METHODS
from fake_gpu import two_steps
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import common

aten = torch.ops.aten
READS = {
    aten._local_scalar_dense.default,
    aten.is_nonzero.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten._unique2.default,
    aten.bincount.default,
    aten.allclose.default,
}


class NeverWait(TorchDispatchMode):
    """Raises an error where a GPU would wait for the host or the host for it, or where devices are
    mixed."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        on_gpu = [x for x in tensors if x.is_cuda]
        host = [x for x in tensors if not x.is_cuda]
        if on_gpu and function in READS:
            raise AssertionError(f"{function} waits for the GPU")
        if on_gpu and function == aten.index.Tensor:
            booleans = [
                index for index in args[1] if index is not None and index.dtype == torch.bool
            ]
            if booleans:
                raise AssertionError("an index of booleans waits for the GPU")
        if function == aten._to_copy.default and "device" in kwargs:
            there, here = torch.device(kwargs["device"]).type, args[0].device.type
            waits = not kwargs.get("non_blocking")
        elif function == aten.copy_.default:
            there, here = args[0].device.type, args[1].device.type
            non_blocking = kwargs.get("non_blocking") or (args[2:] and args[2])
            waits = not non_blocking
        else:
            there = here = None
            if on_gpu and any(x.ndim for x in host):
                raise AssertionError(f"{function} mixes the GPU's tensors with the host's")
        if there != here and (there == "cpu" or waits):
            raise AssertionError(f"{function} from {here} to {there} waits")
        return function(*args, **kwargs)


SMALL = ["--width", "16", "--projector-dim", "32", "--batch-size", "32"]
BACKBONES = ("resnet18", "resnet50 --image-size 96", "vit_small --width 64", "mlp --dataset moons")
FLAGS = ("--c 1048576", "--augment weak", "--optimizer lars --lr 1", "--image-size 96")


def small(method, *flags):
    return [*SMALL, *CASES[method].flags.split(), *" ".join(flags).split()]


@pytest.mark.parametrize("method", METHODS)
def test_no_step_waits_with_a_stand_in_for_backward(method):
    two_steps(method, *small(method, "--backbone resnet8"), device="cuda", watch=NeverWait)


@pytest.mark.parametrize("method", METHODS)
def test_no_step_waits_with_its_backward(method):
    """On fake tensors of the CPU."""
    flags = small(method, CASES[method].state_flags, "--backbone resnet8")
    two_steps(method, *flags, device="cpu", watch=NeverWait)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("method", ["cplearn", "dino"])
def test_no_step_of_another_backbone_waits(method, backbone):
    flags = small(method, "--backbone", backbone)
    two_steps(method, *flags, device="cuda", watch=NeverWait)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("flags", FLAGS)
def test_no_step_of_another_kind_waits(flags, device):
    two_steps("cplearn", *small("cplearn", flags), device=device, watch=NeverWait)


def test_no_step_with_a_queue_waits():
    two_steps("swav", *small("swav", "--queue 64"), device="cuda", watch=NeverWait)


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


def batches_that_wait(images, indices, device):
    for index in indices:
        yield images[index.to(device)]


def grayscale_that_waits(x):
    weights = x.new_tensor([0.3, 0.6, 0.1])
    return (x * weights.view(3, 1, 1)).sum(1, True)


def hue_that_waits(x, turns):
    return x + x.new_tensor([5, 3, 1]).view(3, 1, 1)


WAITING = {
    "a value read": before_loss(lambda z: z.sum().item()),
    "a condition": before_loss(lambda z: bool(z.any())),
    "an index of booleans": before_loss(lambda z: z[z > 0]),
    "a permutation copied": before_loss(lambda z: z[torch.randperm(len(z)).to(z.device)]),
    "an index on the host": before_loss(lambda z: z[torch.randperm(len(z))]),
    "a constant copied": before_loss(lambda z: z + z.new_tensor([1.0] * z.shape[1])),
    "a tensor on the host": before_loss(lambda z: z + torch.ones(z.shape[1])),
    "a result on the host": before_loss(lambda z: z.cpu()),
    "batches by an index copied": in_common("batches", batches_that_wait),
    "grayscale": in_common("grayscale", grayscale_that_waits),
    "hue": in_common("shift_hue", hue_that_waits),
}


@pytest.mark.parametrize("what", WAITING)
def test_each_way_to_wait_is_seen(what, monkeypatch):
    for name in ("batches", "grayscale", "shift_hue"):  # what the change replaces comes back
        monkeypatch.setattr(common, name, getattr(common, name))
    with pytest.raises((AssertionError, DataDependentOutputException, DynamicOutputShapeException)):
        two_steps("vicreg", *SMALL, change=WAITING[what], watch=NeverWait)
