"""A graph that is sent to the child process is the same graph there, down to the key of the cache."""

import asyncio
import itertools
import json
import time
from pathlib import Path

import pytest
import torch
from compile_cases import asks_for_gradients, wrapped
from kasmina_library import MemoryLibrary
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.fx import symbolic_trace

import esper
from esper.kasmina.traced import UnportableGraphError, read_graph, write_graph

pytestmark = asks_for_gradients


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def plus_one_i(x: Tensor) -> Tensor:
    return x + 1j


def test_a_graph_with_what_cannot_be_sent_is_refused() -> None:
    with pytest.raises(UnportableGraphError, match="it holds modules or tensors of its own"):
        write_graph(symbolic_trace(Holder()))
    with pytest.raises(UnportableGraphError, match="an argument is a complex"):
        write_graph(symbolic_trace(plus_one_i))


def test_a_graph_that_was_sent_computes_the_same() -> None:
    def compute(x: Tensor) -> Tensor:
        parts = torch.stack([x[..., 1:], x[:, None, 0].expand(-1, 3)])
        filled = parts.masked_fill(parts > 0, float("-inf")).to(torch.float64)
        return torch.nn.functional.softmax(filled[:, 0], dim=-1, dtype=torch.float32)

    graph = symbolic_trace(compute)
    again = read_graph(json.loads(json.dumps(write_graph(graph))))
    inp = torch.arange(-10.0, 10.0).reshape(5, 4)
    torch.testing.assert_close(again(inp), compute(inp), rtol=0, atol=0, equal_nan=True)
    assert [node.name for node in again.graph.nodes] == [node.name for node in graph.graph.nodes]


@pytest.mark.timeout(300)  # four compilations by Inductor
def test_the_trainer_finds_what_a_child_process_has_compiled(
    library: MemoryLibrary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    small = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    model = wrapped(small, library)
    esper.compile(model, blocks=[""], on_germination="background", fullgraph=True)
    sizes = itertools.cycle((5, 7))

    def train() -> None:
        inp = torch.randn(next(sizes), 8)
        torch._dynamo.mark_dynamic(inp, 0)
        model(inp).square().mean().backward()
        model.step()

    for _ in range(3):
        train()
    assert asyncio.run(model.load_kernel("0", 0, library.add(), alpha=0.5))
    deadline_s = time.monotonic() + 240
    misses = counters["inductor"]["fxgraph_cache_miss"]
    train()
    while not model.compile_report()[0].runs_compiled and time.monotonic() < deadline_s:
        train()
    [report] = model.compile_report()
    assert (report.runs_compiled, report.num_recompiles) == (True, 1)
    assert counters["inductor"]["fxgraph_cache_miss"] == misses
    assert counters["inductor"]["fxgraph_cache_hit"] >= 2  # forward and backward
    esper.unwrap(model, discard_kernels=True)
