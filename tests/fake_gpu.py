"""A script's own `main` without numbers: two steps of training on torch's fake tensors, which have
device and shape.

Without a GPU torch cannot run backward on fake tensors of one. On "cuda" a stand-in for it sets the
gradients. On "cpu" backward is the true one.
"""

import os
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

import common
import evaluate


def real(function):
    """The function with real tensors, not fake ones."""

    def call(*args, **kwargs):
        with unset_fake_temporarily():
            return function(*args, **kwargs)

    return call


def nothing(_):
    pass


def two_steps(script, *flags, device="cuda", watch, change=nothing, after_step=nothing):
    """Runs two steps of methods/<script>.py within `watch()`, a context that sees their operations.

    `change` is called with the script's module before, `after_step` with 1 and 2 after each step.
    """
    trained, steps = [], []
    open_run = common.open_run
    two_views = common.two_views
    end_step = common.Run.end_step
    sgd = torch.optim.SGD

    def set_up(args):
        args.precision = args.precision or "bf16"
        torch.manual_seed(args.seed)
        if device == "cuda":
            return torch.device(device, 0)
        return torch.device("cpu")

    def load_data(args, device):
        n = 2 * args.batch_size
        if args.dataset in common.TOYS:
            images = torch.zeros(n, 2, device=device)
        else:
            size = args.image_size
            images = torch.zeros(n, 3, size, size, dtype=torch.uint8, device=device)
        labels = torch.zeros(n, dtype=torch.int64, device=device)
        std = torch.ones(images.shape[1], device=device)
        classes = ["0", "1", "2"]
        return common.Data(images, labels, images, labels, classes, std, std, args.image_size)

    def keep(args, model, optimizer, data, views):
        trained[:] = [model]
        return open_run(args, model, optimizer, data, views)

    def watched(*args):
        with watch():
            yield from two_views(*args)

    def count(run, terms):
        end_step(run, terms)
        steps.append(run.step)
        after_step(run.step)

    def backward(loss):
        assert loss.requires_grad and loss.is_cuda and loss.dtype == torch.float32
        for p in trained[0].parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None

    def batches(images, indices, _):
        for index in indices:
            yield images[index]

    with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:

        def replace(owner, name, value):
            stack.enter_context(patch.object(owner, name, value))

        # What happens on the host or between epochs, or needs numbers.
        replace(common, "set_up", set_up)
        replace(common, "load_data", load_data)
        replace(common, "open_run", keep)
        replace(common, "two_views", watched)
        replace(common, "draw_augmentation", real(common.draw_augmentation))
        replace(common, "knn_monitor", lambda *_: 0.0)
        replace(common, "with_data_statistics", lambda model, *_: model)
        replace(common, "collapse_metrics", lambda *_: {"center_norm": 0.0})
        replace(common.Run, "means", lambda *_: {})
        replace(common.Run, "end_step", count)
        replace(common.Run, "finish", lambda run: run.bar.close())
        replace(common.Run, "save", lambda _: None)
        replace(common.tqdm, "write", lambda _: None)
        # What torch asks a GPU for, or cannot do without one; and fake tensors know one thread.
        replace(torch.cuda, "get_device_name", lambda: "none")
        replace(torch.cuda, "is_bf16_supported", lambda *_: True)
        replace(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        replace(torch.optim, "SGD", lambda *args, fused, **kwargs: sgd(*args, **kwargs))
        if device == "cuda":
            replace(torch.Tensor, "backward", backward)
        else:
            replace(common, "batches", batches)
        script = Path(common.__file__).parent / "methods" / f"{script}.py"
        out = os.path.join(folder, "run")
        replace(sys, "argv", [str(script), "--epochs", "1", "--out", out, *flags])
        module = evaluate.load_method(script.stem)
        change(module)
        # torch turns its parameters into fake ones on their way to the device.
        module.Model = real(module.Model)
        with FakeTensorMode(allow_non_fake_inputs=True):
            module.main()
    assert steps == [1, 2]
