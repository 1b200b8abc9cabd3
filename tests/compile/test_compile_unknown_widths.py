"""Layers that do not know their width yet see a forward before compilers do."""

import copy

import torch
from compile_cases import Block, asks_for_gradients, batch, live, net, wrapped
from kasmina_library import MemoryLibrary
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import esper
from esper.config import SeedSettings

pytestmark = asks_for_gradients


def test_layers_of_unknown_width_see_the_first_forward_of_a_compiled_model(
    library: MemoryLibrary, counter: CompileCounterWithBackend
) -> None:
    model = wrapped(net(), library)
    assert model.kasmina_layers["1.act"].shapes is None
    run = torch.compile(model, backend=counter, fullgraph=True)
    random = torch.get_rng_state()
    run(torch.ones(5, 8))
    assert torch.equal(torch.get_rng_state(), random)
    assert model.kasmina_layers["1.act"].site(0).act_shape == (None, 4)
    run(batch())
    assert counter.frame_count == 1


def test_a_model_that_fake_tensors_cannot_run_compiles_all_the_same(
    library: MemoryLibrary, counter: CompileCounterWithBackend
) -> None:
    class Real(Block):
        def forward(self, x: Tensor) -> Tensor:
            if not torch.compiler.is_compiling() and torch._guards.detect_fake_mode(x):
                raise TypeError("no fake")
            return super().forward(x)

    plain = Real()
    model = wrapped(copy.deepcopy(plain), library, observe_every=3)
    run = torch.compile(model, backend=counter, fullgraph=True)
    inp = batch()
    torch.testing.assert_close(run(inp), plain(inp))
    assert model.kasmina_layers["act"].shapes is None
    live(model, 8, run)
    assert model.kasmina_layers["act"].shapes is not None
    assert counter.frame_count == 1


def test_a_lazy_layer_is_shaped_by_the_first_forward_of_a_compiled_model(
    library: MemoryLibrary, counter: CompileCounterWithBackend
) -> None:
    plain = nn.Sequential(nn.LazyLinear(4), nn.Tanh())
    model = esper.wrap(copy.deepcopy(plain), settings=SeedSettings(seeds_per_layer=2))
    results = []
    for module in (plain, model):
        torch.manual_seed(3)
        results.append(torch.compile(module, backend=counter, fullgraph=True)(batch()))
    assert model[0].weight.device.type == "cpu"
    assert torch.equal(*results)
    assert counter.frame_count == 2
