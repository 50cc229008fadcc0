"""--compile gives the steps of the plain network, in one graph, and compiles nothing again after
its first steps. tests/test_distributed.py has compiled code in several processes."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from cases import CASES
from conftest import METHODS, tiny

import common


def losses(run, method, out, *flags):
    result = run(method, *tiny(method), "--epochs", "2", "--out", out, *flags)
    assert result.code == 0, result.err
    return [
        json.loads(line)["loss"] for line in Path(out, "log.jsonl").read_text().splitlines()[1:]
    ]


@pytest.mark.parametrize("method", METHODS)
def test_one_graph_and_no_recompilation(method, run, monkeypatch):
    """One of the network, and one of its teacher."""
    compile_, end_step, graphs = torch.nn.Module.compile, common.Run.end_step, []

    def count(training_run, terms):
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        end_step(training_run, terms)

    plain = losses(run, method, "plain")
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda m: compile_(m, backend="eager", fullgraph=True)
    )
    monkeypatch.setattr(common.Run, "end_step", count)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert losses(run, method, "compiled", "--compile") == pytest.approx(plain, rel=1e-6)
    assert set(graphs) == {2 if CASES[method].teacher else 1}


@pytest.mark.parametrize(
    "backbone, width", [("resnet8", 8), ("resnet18", 16), ("resnet50", 16), ("vit_small", 64)]
)
def test_every_backbone_is_one_graph(backbone, width):
    torch._dynamo.reset()
    args = argparse.Namespace(backbone=backbone, width=width, dataset="cifar10", image_size=32)
    net, x = common.build_backbone(args).eval(), torch.randn(2, 3, 32, 32)
    expected = net(x)
    net.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(net(x), expected)
