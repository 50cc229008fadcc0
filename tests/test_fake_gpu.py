"""Training on a GPU that is not there: a step must not read anything back, must not copy from the host in a way that
waits, and must not mix devices (tests/fake_gpu.py says how)."""

import pytest
import torch
from conftest import METHODS
from fake_gpu import two_steps
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import common

aten = torch.ops.aten
READS = {aten._local_scalar_dense.default, aten.is_nonzero.default, aten.nonzero.default, aten.masked_select.default,
         aten.equal.default, aten._unique2.default, aten.bincount.default, aten.allclose.default}  # fmt: skip


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


SMALL = ["--width", "16", "--projector-dim", "32", "--batch-size", "32"]
FLAGS = {"cplearn": ["--c", "64"], "wmse": ["--embedding-dim", "8", "--part-size", "16"], "swav": ["--queue", "64"]}
BACKBONES = ("resnet18", "resnet50 --image-size 96", "vit_small --width 64", "mlp --dataset moons")
OTHERS = ("--c 1048576", "--augment weak", "--optimizer lars --lr 1", "--image-size 96")


@pytest.mark.parametrize(
    "method, backbone",
    [(method, "resnet8") for method in METHODS] + [(method, b) for method in ("cplearn", "dino") for b in BACKBONES],
)
def test_a_step_never_waits(method, backbone):
    flags = [*SMALL, *FLAGS.get(method, []), "--backbone", *backbone.split()]
    two_steps(method, *flags, device="cuda", watch=NeverWait)


@pytest.mark.parametrize("method", METHODS)
def test_a_step_with_its_backward_never_waits(method):
    two_steps(method, *SMALL, *FLAGS.get(method, []), "--backbone", "resnet8", device="cpu", watch=NeverWait)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("flags", OTHERS)
def test_a_step_of_another_kind_never_waits(flags, device):
    two_steps("cplearn", *SMALL, "--c", "64", *flags.split(), device=device, watch=NeverWait)


def test_a_step_with_langevin_dynamics_never_waits():
    """On fake tensors of the CPU, because these dynamics are a backward pass."""
    flags = ["--backbone", "resnet8", "--c", "64", "--generative-weight", "0.1"]
    two_steps("gedi", *SMALL, *flags, device="cpu", watch=NeverWait)


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
def test_the_rehearsal_sees(what, monkeypatch):
    for name in ("batches", "grayscale", "shift_hue"):
        monkeypatch.setattr(common, name, getattr(common, name))  # what the change replaces comes back
    with pytest.raises((AssertionError, DataDependentOutputException, DynamicOutputShapeException)):
        two_steps("vicreg", *SMALL, change=WAITING[what], watch=NeverWait)
