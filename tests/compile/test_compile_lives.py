"""What grows while it is compiled computes what it would compute uncompiled."""

import asyncio

import pytest
import torch
from compile_cases import WHOLE_LIFE, asks_for_gradients, germinate, live, net, wrapped
from kasmina_library import Irregular, MemoryLibrary, Residual
from torch._dynamo.testing import CompileCounterWithBackend

import esper
from esper.contracts import SeedState
from esper.kasmina.model import MorphableModel

pytestmark = asks_for_gradients


@pytest.mark.parametrize(("blockwise", "backend"), [(False, "aot_eager"), (True, "inductor")])
def test_a_compiled_life_is_an_eager_one(
    backend: str, blockwise: bool, library: MemoryLibrary
) -> None:
    eager, model = wrapped(net(), library), wrapped(net(), library)
    run = None
    if blockwise:
        esper.compile(model, backend=backend, fullgraph=True)
    else:
        run = torch.compile(model, backend=backend, fullgraph=True)
    outs = []
    for which, through in ((eager, None), (model, run)):
        torch.manual_seed(3)
        live(which, 2, through)
        germinate(which, "1.up", 1, library.add())
        germinate(which, "2.up", 0, library.add(Irregular))
        outs.append(live(which, WHOLE_LIFE + 1, through))
        with torch.no_grad():
            outs[-1].append((which if through is None else through)(torch.ones(5, 8)))
    torch.testing.assert_close(outs[0], outs[1])
    for ours, theirs in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_compiled_isolation_does_not_reach_the_host(library: MemoryLibrary) -> None:
    plain, model = wrapped(net(), library), wrapped(net(), library)
    for which in (plain, model):
        esper.compile(which, backend="aot_eager", fullgraph=True)
    outs = []
    for which in (plain, model):
        torch.manual_seed(3)
        live(which, 2)
        if which is model:
            germinate(which, "1.up", 0, library.add())
        outs.append(live(which, 2))
    assert model.kasmina_layers["1.up"].state(0) is SeedState.TRAINING
    assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))
    [seat] = model.kasmina.isolated_seats()
    assert all(weight.grad is not None for weight in seat.kernel.weights())


def test_dropout_in_isolation_compiles(
    model: MorphableModel, library: MemoryLibrary, counter: CompileCounterWithBackend
) -> None:
    esper.compile(model, backend=counter, fullgraph=True)
    live(model, 2)
    germinate(model, "1.up", 0, library.add(Residual, dropout=0.5))
    live(model, 2)
    assert model.kasmina_layers["1.up"].state(0) is SeedState.TRAINING
    assert counter.frame_count == 2


def test_faults_are_counted_in_compiled_code(
    model: MorphableModel, library: MemoryLibrary, counter: CompileCounterWithBackend
) -> None:
    esper.compile(model, backend=counter, fullgraph=True)
    live(model, 2)
    assert asyncio.run(model.load_kernel("1.up", 0, library.add(), alpha=0.5))
    kernel = model.kasmina_layers["1.up"].kernel(0)
    assert kernel is not None
    with torch.no_grad():
        kernel.weights()[-1].fill_(float("nan"))
    assert all(out.isfinite().all() for out in live(model, 6))
    assert model.kasmina_layers["1.up"].state(0) in (SeedState.CULLED, SeedState.DORMANT)
